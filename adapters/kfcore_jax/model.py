"""A loss, traced once: its layers, and a function that gives loss, gradients and records in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kfcore import Embedding, Loss, Method
from kfcore.checkpoint import translated
from kfcore_jax.checking import compare_gradients
from kfcore_jax.fisher import vectors_of
from kfcore_jax.layout import Layout, Sharing, alike, leaves_of, path_of
from kfcore_jax.records import Records
from kfcore_jax.sites import Affine, Geometry
from kfcore_jax.tapped import Function, Tapped, sites_of, zeros


class Model:
    """What a loss does with its parameters. Made by :func:`trace`.

    Attributes
    ----------
    layout
        Layers, names, and the reasons of parameters that have none.

    """

    def __init__(self, function: Function, found: Layout, *, has_aux: bool, per_entry: bool, how: Mapping[str, Any]) -> None:
        self.function, self.layout = function, found
        self.has_aux, self.per_entry, self._how = has_aux, per_entry, dict(how)

    @property
    def layers(self) -> Mapping[str, Any]:
        """Layer descriptions by name."""
        return self.layout.model.layers

    def value_grad_and_records(self, params: Any, *args: Any, mask: jax.Array | None = None) -> tuple[Any, Any, Records]:
        """``jax.value_and_grad`` of the loss, and the records of its layers. Call it inside ``jit``.

        Parameters
        ----------
        mask
            ``[N, S]`` of booleans, true at positions that are real, which the loss leaves out too. All uses of dense layers, tables, scales
            and shifts that see N examples of S positions have it, and the others (after pooling, say) are as they were. Terms are then the
            real rows of the output layer.

        Returns
        -------
        value, grads, records
            ``value`` is a pair with the auxiliary output where ``has_aux`` is set.

        """
        return self._captured(params, args, self.layers, mask)

    def capture(self, params: Any, *args: Any) -> tuple[Any, Any, Records]:
        """As :meth:`value_grad_and_records`, with records also of what no layer of the core covers yet: all names in ``layout.sites``.

        A convolution has ``inputs [*stack, N, *spatial, in]``, a gather has ``ids [*stack, N, S]`` in place of inputs, scale and shift have
        those of :class:`kfcore.Norm`. Rounds of a loop that share a convolution are further entries along N, behind their example.
        """
        return self._captured(params, args, self.layout.sites)

    def _captured(self, params: Any, args: Any, names: Collection[str], mask: jax.Array | None = None) -> tuple[Any, Any, Records]:
        tapped = Tapped(self.function, params, args, self.has_aux)
        found = self._found(tapped, names)
        uses = {name: found.sites[name] for name in names}
        sites = sites_of(uses)

        def loss(params: Any, taps: Any) -> Any:
            value, aux, inputs = tapped(params, sites, taps)
            return value, (aux, inputs)

        call = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
        (value, (aux, inputs)), (grads, pulled) = call(params, zeros(sites))
        layers = {name: [use.captured(inputs, pulled) for use in of_layer] for name, of_layer in uses.items()}
        masks = self._masks(mask, layers)
        records = Records(layers, self._terms(found, mask), self._uses(found), _rounds(uses), masks=masks)
        records.gradients = leaves_of(grads)
        return ((value, aux) if self.has_aux else value), grads, records

    def fisher_records(
        self,
        predict: Function,
        method: Method,
        loss: Loss,
        params: Any,
        *args: Any,
        targets: jax.Array | None = None,
        key: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> Records:
        """Records for ``fisher="mc"`` and ``"exact"``: vectors of the loss pulled back from the outputs of ``predict(params, *args)``.

        Parameters
        ----------
        predict
            The network without the loss, on the same parameters.
        method
            Tells the Fisher type and the number of draws.
        loss
            Such as :class:`kfcore.CrossEntropy`.
        targets
            Needed only where the loss ignores some of them.
        key
            Source of the drawn labels, for ``"mc"``.
        mask
            As in :meth:`value_grad_and_records`. Outputs ``[N, S, ...]`` at masked positions have no vectors and are no terms; where the
            loss ignores some ``targets``, these alone tell the terms.

        """
        if method.fisher not in ("mc", "exact"):
            raise ValueError(f"`method` must have fisher='mc' or 'exact' here, got {method.fisher!r}; use value_grad_and_records")
        if method.fisher == "mc" and key is None:
            raise ValueError("`key` must be given: fisher='mc' draws labels from the model")
        tapped = Tapped(predict, params, args, False)
        found = self._found(tapped, self.layers)
        uses = {name: found.sites[name] for name in self.layers}
        sites = sites_of(uses)

        def outputs_of(taps: Any) -> Any:
            outputs, _, inputs = tapped(params, sites, taps)
            return outputs, inputs

        outputs, pull, inputs = jax.vjp(outputs_of, zeros(sites), has_aux=True)
        vectors, terms = vectors_of(method, loss, outputs, targets, key, None if mask is None else _checked(mask))
        pulled = jax.vmap(lambda vector: pull(vector)[0])(vectors)

        def record(use: Geometry) -> tuple[jax.Array, jax.Array | None]:
            """The vectors take their place behind the axes of the stack, as further examples."""
            axis, of_use = len(use.stack), {site.path: pulled[site.path] for site in use.sites}
            seen, grads = jax.vmap(lambda dy: use.captured(inputs, dy), out_axes=(None, axis))(of_use)
            merged = (*grads.shape[:axis], grads.shape[axis] * grads.shape[axis + 1], *grads.shape[axis + 2 :])
            return seen, grads.reshape(merged)

        layers = {name: [record(use) for use in of_layer] for name, of_layer in uses.items()}
        return Records(layers, terms, self._uses(found), _rounds(uses), masks=self._masks(mask, layers))

    def named_arrays(self, params: Any) -> dict[str, np.ndarray]:
        """Parameters as NumPy arrays by name: what a PyTorch ``state_dict`` of the same layers holds.

        Weights are ``[out, in]``, kernels ``[out, in / groups, *kernel]``; those of a transposed convolution are the ordinary one's that it
        is, as ``to_oi`` of PyTorch's layer gives it.
        """
        arrays = {name: np.array(x) for name, x in self.layout.flat(params).items()}
        return {name: self._turned(name, x) for name, x in arrays.items()}

    def params_from(self, arrays: Mapping[str, Any], like: Any, *, names: Mapping[str, str] | None = None) -> Any:
        """Inverse of :meth:`named_arrays`: a tree like ``like`` from arrays by name, of this model or of a PyTorch ``state_dict``.

        Parameters
        ----------
        arrays
            Anything NumPy reads. Further arrays in it are left alone.
        like
            Parameters of this model, for structure, shapes and dtypes.
        names
            As in :func:`kfcore.load`: by layer or parameter of this model, what it is called in ``arrays``.

        """
        shapes = self.layout.model.shapes()

        def fill(keys: Any, x: Any) -> Any:
            place = self.layout.places.get(path_of(keys))
            if place is None:
                return x
            name = translated(place.name, names or {})
            if name not in arrays:
                raise ValueError(f"`arrays` lack {name!r}, for the parameter {path_of(keys)}")
            value, wanted = np.asarray(arrays[name]), self._turned(place.name, np.empty(shapes[place.name])).shape
            if value.shape != wanted:
                raise ValueError(f"`arrays` must hold {name!r} with shape {wanted}, got {value.shape}")
            return place.back(jnp.asarray(self._turned(place.name, value, back=True), x.dtype))

        return jax.tree_util.tree_map_with_path(fill, like)

    def _turned(self, name: str, x: np.ndarray, *, back: bool = False) -> np.ndarray:
        """A weight from the layout of its layer to that of files, or back."""
        layer, _, role = name.rpartition(".")
        # a table is a file's and PyTorch's with its rows first, as it is here
        if role != "weight" or layer not in self.layers or isinstance(self.layers[layer], Embedding):
            return x
        return self.layers[layer].from_oi(x) if back else self.layers[layer].to_oi(x)

    def check_capture(self, params: Any, *args: Any, rtol: float = 1e-3) -> dict[str, float]:
        """Rebuild the gradients of all layers from the records and compare them with autodiff's: relative deviations by name.

        The names are those of :meth:`capture`: of the layers, and of what is captured but has no layer yet. Where a weight or a bias
        has a term of its own in the loss (a penalty) they are left out: that is no part of the records.

        Raises
        ------
        AssertionError
            Naming the layers whose deviation is above ``rtol``: a tap that says something else than what is computed, or a
            ``custom_jvp`` rule that is not the derivative.

        """
        _, grads, records = jax.jit(self.capture)(params, *args)
        found = self._found(Tapped(self.function, params, args, self.has_aux), self.layout.sites)
        return compare_gradients(found, grads, records, rtol)

    def _found(self, tapped: Tapped, names: Collection[str]) -> Layout:
        """The layout of this program: sizes of batches and images may differ from those at :func:`trace`, layers and parameters may not."""
        found = tapped.layout(self._how)
        same = [name for name in names if name in found.sites and self._same(name, found)]
        lost = [name for name in names if name not in same]
        if lost:
            raise ValueError(f"the program no longer uses {', '.join(lost)} as it did when it was traced: trace the model anew")
        return found

    def _same(self, name: str, found: Layout) -> bool:
        """Whether a name stands for the layer that it was when the model was traced, or for none, as then."""
        here, there = self.layers.get(name), found.model.layers.get(name)
        return alike(here, there) or (here is None and there is None)

    def _uses(self, found: Layout) -> dict[str, tuple[Any, ...]]:
        """Descriptions of the layers as this program uses them, of those that are not what they were when the model was traced."""
        uses = {name: found.uses[name] for name in self.layers}
        return {name: of_layer for name, of_layer in uses.items() if any(use != self.layers[name] for use in of_layer)}

    def _masks(self, mask: jax.Array | None, layers: Mapping[str, Any]) -> dict[str, list[jax.Array | None]]:
        """The mask at every use that sees its positions, with the axes of the stack; nothing of layers without such a use."""
        if mask is None:
            return {}
        shape = _checked(mask).shape

        def of_use(name: str, inputs: jax.Array, grads: jax.Array) -> jax.Array | None:
            lead = grads.shape[:-3]
            # several vectors of each example stand behind each other in its output gradients
            fits = (inputs.shape[len(lead)], grads.shape[-2]) == shape
            maskable = not any(part.unmaskable for part in self.layers[name].blocks().values())
            return jnp.broadcast_to(mask, (*lead, *shape)) if fits and maskable else None

        found = {name: [of_use(name, *use) for use in of_layer] for name, of_layer in layers.items()}
        found = {name: of_layer for name, of_layer in found.items() if any(m is not None for m in of_layer)}
        if not found:
            raise ValueError(f"`mask` must have the shape [N, S] of what some layer sees, got {shape}, which none does")
        return found

    def _terms(self, found: Layout, mask: jax.Array | None = None) -> float | jax.Array:
        """Rows of the product, convolution or table that comes last, layer or not, times its width where the loss compares numbers.

        Scales and shifts behind it are none of these, but where there is nothing else.
        """
        every = [use for of_name in found.sites.values() for use in of_name]
        uses = [use for use in every if not isinstance(use, Affine)] or every
        if not uses:
            return 1.0
        last = max(uses, key=lambda use: use.site.path)
        size = math.prod(last.site.tap)
        terms = float(size if self.per_entry else size // last.outs)
        if mask is None or _positions(last) != mask.shape:
            return terms
        return jnp.sum(mask) * (terms / mask.size)


def trace(
    loss_fn: Function,
    params: Any,
    *args: Any,
    has_aux: bool = False,
    loss: Loss | None = None,
    bias: Literal["joint", "separate"] = "joint",
    sharing: Sharing | Mapping[str, Sharing] = "expand",
    norm: Literal["diagonal", "full"] = "diagonal",
    prefix: str | None = None,
    strict: bool = False,
) -> Model:
    """Find the layers in ``loss_fn(params, *args)``, which is traced but not run.

    Every product, convolution, scale and shift of a parameter with the batch is found, and every table whose rows are taken, however
    the model is written: through reshapes and transpositions, ``jit``, ``vmap``, ``scan``, ``remat`` and ``custom_jvp``. Parameters that
    are used in any other way get the fallback, and ``model.layout.reasons`` says why.

    Parameters
    ----------
    loss_fn
        A scalar loss of a tree of parameters and the batch; ``(loss, aux)`` with ``has_aux``.
    params, args
        Arrays, or ``jax.ShapeDtypeStruct``.
    loss
        Description of the loss. Only whether it compares numbers one by one (MSE, BCE) matters here: then terms are numbers, else rows.
    bias, sharing
        See :class:`kfcore.Linear`; ``sharing`` may be a dictionary by layer name. The first axis of the rows is the example, all
        others are positions.
    norm
        Blocks of scales and shifts, see :class:`kfcore.Norm`. Those that have several axes longer than 1, such as positions that are added,
        are ``"diagonal"`` anyway.
    prefix
        Of the parameters' paths, left out of names; ``"params"``, Flax's collection, if all have it.
    strict
        Raise where a parameter would get the fallback.

    Raises
    ------
    ValueError
        If the loss is not a scalar, ignores a parameter, or falls back under ``strict``.

    """
    if norm not in ("diagonal", "full"):
        raise ValueError(f"`norm` must be 'diagonal' or 'full', got {norm!r}")
    how = {"bias": bias, "sharing": sharing, "norm": norm, "prefix": prefix}
    tapped = Tapped(loss_fn, params, args, has_aux)
    tapped.check_scalar()
    found = tapped.layout(how)
    paths = list(leaves_of(params))
    unused = [path for path in paths if found.reasons.get(found.places[path].name) == "no layer: unused"]
    if unused:
        raise ValueError(f"`loss_fn` ignores the parameter{'s' * (len(unused) > 1)} {', '.join(unused)}: leave them out of `params`")
    if strict and found.model.others:
        lines = [f"{name} ({found.reasons[name]})" for name in found.model.others]
        raise ValueError(f"`strict` is set, but these parameters would fall back: {'; '.join(lines)}")
    return Model(loss_fn, found, has_aux=has_aux, per_entry=bool(getattr(loss, "per_entry", False)), how=how)


def value_grad_and_records(loss_fn: Function, **options: Any) -> Callable[..., tuple[Any, Any, Records]]:
    """A function of ``(params, *args)`` that gives value, gradients and records; ``options`` as in :func:`trace`."""

    def call(params: Any, *args: Any) -> tuple[Any, Any, Records]:
        return trace(loss_fn, params, *args, **options).value_grad_and_records(params, *args)

    return call


def _rounds(uses: Mapping[str, tuple[Geometry, ...]]) -> dict[str, tuple[int, ...]]:
    """Entries of one example at each use, of the layers where they are several."""
    rounds = {name: tuple(use.rounds for use in of_layer) for name, of_layer in uses.items()}
    return {name: of_layer for name, of_layer in rounds.items() if max(of_layer) > 1}


def _positions(use: Geometry) -> tuple[int, int]:
    """Examples and positions of each that a use sees, as it is captured."""
    rows, (_, axes, _) = math.prod(use.site.tap) // use.outs // math.prod(use.stack), use.output_axes
    n = use.count if use.examples else use.site.output[axes[0]] if axes else 1
    return n, rows // max(n, 1)


def _checked(mask: jax.Array) -> jax.Array:
    """``mask``, if it is one."""
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"`mask` must be boolean of shape [N, S], true at real positions, got {mask.dtype} of shape {mask.shape}")
    return mask
