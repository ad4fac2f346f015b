"""A look at what is captured: are layers seen as a program uses them, and how far are their blocks from the exact ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kfcore import KFAC, CrossEntropy, Loss, Method, blocks_of
from kfcore._array import factor_dtype
from kfcore.checking import SelfCheck, compare, exactly, examples_of, tolerance_of
from kfcore_jax.analysis import is_trained
from kfcore_jax.fisher import vectors_of
from kfcore_jax.layout import Layout, leaves_of, path_of
from kfcore_jax.records import Records
from kfcore_jax.sites import Geometry

if TYPE_CHECKING:
    from kfcore_jax.model import Model
    from kfcore_jax.tapped import Function


def self_check(
    model: Model,
    predict: Function,
    params: Any,
    *args: Any,
    targets: jax.Array | None = None,
    loss: Loss | None = None,
    method: Method | None = None,
    mask: jax.Array | None = None,
    examples: int | None = None,
    tolerance: float | None = None,
    show: bool = True,
) -> SelfCheck:
    """Check on a tiny batch that the layers of ``model`` are captured rightly, and compare their blocks with the exact ones.

    For every vector of the exact Fisher matrix (a column of the root of the loss' output Hessian) and every example, the gradient of each
    layer is made of what :meth:`Model.fisher_records` captures, and by autodiff. These must agree for every batch. A tap that says
    something else than what is computed is found so, and rows that are not those of one example. Then the block of ``method`` under that
    Fisher matrix is compared with ``F = 1/M sum_p vec(G_p) vec(G_p)^T``, M being the number of terms of the loss. That distance is what
    the approximation costs on this batch. It must be zero for one example at one position, and always for normalisations (of which a
    diagonal block is the diagonal) and separate biases that are used once.

    All vectors of all examples are pulled back at once: take two or three examples, in float64 if you can.

    Parameters
    ----------
    model
        What :func:`trace` made of the loss.
    predict
        The network without the loss, ``predict(params, *args)``, on the same parameters.
    params, args
        Arrays.
    targets
        Needed only where the loss ignores some of them.
    loss
        Description of the loss, :class:`kfcore.CrossEntropy` if not given.
    method
        :class:`kfcore.KFAC` if not given. Its Fisher type is taken to be ``"exact"``, and scales to be averages.
    mask
        As in :meth:`Model.fisher_records`. A masked position that the outputs at real ones depend on is found.
    examples
        Number of examples; by default what most layers have and divides the first axis of the outputs. 1 compares gradients of the whole
        batch alone.
    tolerance
        Largest relative error; by default 1e-6 in float64 and 1e-2 in float32.
    show
        Print the table.

    Returns
    -------
    SelfCheck
        One row a block.

    Raises
    ------
    AssertionError
        Naming the blocks that are wrong, after the table is printed.
    ValueError
        If the outputs are not by example, the loss has no exact Fisher matrix, or ``predict`` does not use the layers as the loss does.

    """
    if not isinstance(getattr(model, "layout", None), Layout):
        raise TypeError(f"`model` must be what kfcore_jax.trace(loss_fn, params, *args) gave, got {type(model).__name__}")
    layout, core = model.layout, model.layout.model
    of, described = exactly(method or KFAC()), loss or CrossEntropy()

    @jax.jit
    def captured(params: Any, args: Any, targets: Any, mask: Any) -> tuple[jax.Array, Records]:
        return predict(params, *args), model.fisher_records(predict, of, described, params, *args, targets=targets, mask=mask)

    outputs, records = captured(params, args, targets, mask)
    # the comparison itself is left to NumPy, which compiles nothing
    records = jax.tree.map(_on_host, records)
    seen = {name: uses for name, layer in core.layers.items() for uses in records.batches(name, layer, apart=False)}
    n = examples_of(seen, outputs.shape, examples)

    @jax.jit
    def exact(params: Any, args: Any, targets: Any, mask: Any) -> dict[str, jax.Array]:
        """By block the gradients of all vectors at single examples, ``[K N, *leading, out, in]``."""
        covered = {parameter for name in core.layers for parameter in core.roles(name).values()}
        trained = {path: x for path, x in leaves_of(params).items() if layout.places[path].name in covered}

        def outputs_of(trained: Any) -> Any:
            return predict(jax.tree_util.tree_map_with_path(lambda keys, x: trained.get(path_of(keys), x), params), *args)

        outputs, pull = jax.vjp(outputs_of, trained)
        vectors, _ = vectors_of(of, described, outputs, targets, mask=mask)
        parts = vectors.reshape(len(vectors), 1, n, -1)
        alone = jnp.where(jnp.eye(n, dtype=bool)[:, :, None], parts, 0).reshape(-1, *outputs.shape)
        return jax.vmap(lambda vector: core.matrices(layout.flat(pull(vector)[0])))(alone)

    found = exact(params, args, targets, mask)
    return compare(
        core,
        blocks_of(of, core.layers),
        [seen],
        {block: np.moveaxis(_on_host(x), 0, -3) for block, x in found.items()},
        examples=n,
        terms=float(records.terms),
        tolerance=tolerance or tolerance_of(jnp, outputs.dtype),
        left_out={name: layout.reasons[name] for name in core.others},
        dependent=lambda: _dependent(predict, params, args, outputs, n),
    ).settled(show=show)


def _on_host(x: jax.Array) -> np.ndarray:
    """With floating-point numbers that NumPy knows."""
    return np.asarray(x, factor_dtype(jnp, x.dtype)) if is_trained(x) else np.asarray(x)


def _dependent(predict: Function, params: Any, args: Any, outputs: jax.Array, n: int) -> bool:
    """Whether the outputs of an example are others in a batch of nothing but itself."""

    @jax.jit
    def alone(params: Any, args: Any, k: jax.Array) -> jax.Array:
        some = jax.tree.map(lambda x: jnp.broadcast_to(x[k], x.shape) if x.shape[:1] == (n,) else x, args)
        return predict(params, *some).reshape(n, -1)[k]

    rows = outputs.reshape(n, -1)
    apart = max(float(jnp.abs(alone(params, args, k) - rows[k]).max()) for k in range(n))
    return apart > 10 * float(jnp.finfo(outputs.dtype).eps) * float(jnp.abs(rows).max())


def compare_gradients(found: Layout, grads: Any, records: Records, rtol: float) -> dict[str, float]:
    """Relative deviations of the gradients that ``records`` of the program ``found`` add up to from ``grads``, by name.

    Raises
    ------
    AssertionError
        Naming the layers whose deviation is above ``rtol``.

    """
    expected = [np.asarray(x, np.float64) for x in leaves_of(grads).values()]
    deviations = {}
    for name, uses in found.sites.items():
        if name in records.layers and name not in found.regularised:
            deviations[name] = max(_deviations(uses, records.layers[name], expected))
    wrong = [f"{name} ({value:.1e})" for name, value in deviations.items() if not value <= rtol]
    if wrong:
        raise AssertionError(f"gradients rebuilt from the records differ from autodiff's in {', '.join(wrong)}; allowed: {rtol:g}")
    return deviations


def _deviations(uses: Sequence[Geometry], pairs: Any, expected: Sequence[np.ndarray]) -> list[float]:
    """Of the gradients that captured arrays add up to from those by leaf: the weight's, and the bias' if there is one."""
    rebuilt: dict[int, Any] = {}
    for use, pair in zip(uses, pairs, strict=True):
        for leaf, gradient in use.gradients(*(np.asarray(v) for v in pair)).items():
            rebuilt[leaf] = rebuilt.get(leaf, 0.0) + gradient
    # a bias may have no gradient but rounding noise, as that of the keys of an attention
    floor = 1e-3 * float(np.linalg.norm(expected[uses[0].site.leaf]))
    return [_deviation(x, expected[leaf], floor) for leaf, x in rebuilt.items()]


def _deviation(x: Any, y: np.ndarray, floor: float) -> float:
    """Distance relative to the norm of ``y``, or to ``floor`` if that is larger."""
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), floor, np.finfo(np.float64).tiny))
