"""Whether layers are captured as they are used, and how far their blocks are from the exact ones: what an adapter's self-check compares.

An adapter brings what it captured of a tiny batch for every vector of the exact Fisher matrix, and the gradients of the same vectors at
single examples as automatic differentiation gives them.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kfcore._array import Array, Namespace, factor_dtype, namespace
from kfcore.curvature import EKFAC, KFAC, Method
from kfcore.model import Model
from kfcore.preconditioner import Block
from kfcore.scales import example_gradients
from kfcore.statistics import Use

Uses = Mapping[str, Sequence[Use]]
"""Uses of a batch by layer, their output gradients those of one vector or of several behind each other."""


@dataclass(frozen=True)
class Checked:
    """One curvature block."""

    block: str
    kind: str
    """Layer and method."""
    uses: str
    """Shapes ``N x S`` of what was captured."""
    gradient: float
    """Largest error of the gradients of single examples that the capture makes, relative to the largest entry of autodiff's."""
    distance: float
    """Of the block from the exact one, in the Frobenius norm and relative; of the diagonals alone where the block is one."""
    exact: bool
    """Whether it must be the exact block here."""
    note: str = ""
    """What is wrong, or why nothing is compared."""
    wrong: bool = False


@dataclass(frozen=True)
class SelfCheck:
    """What a self-check found; prints as a table."""

    rows: tuple[Checked, ...]
    left_out: Mapping[str, str]
    """Parameters of no layer, and layers that the optimizer would move to the fallback, with the reason."""

    def __getitem__(self, block: str) -> Checked:
        return {row.block: row for row in self.rows}[block]

    def __iter__(self) -> Iterator[Checked]:
        return iter(self.rows)

    def wrong(self) -> list[Checked]:
        """Rows with something wrong."""
        return [row for row in self.rows if row.wrong]

    def settled(self, *, show: bool) -> SelfCheck:
        """Itself, printed if it is to be shown.

        Raises
        ------
        AssertionError
            Naming the blocks that are wrong, after that.
        """
        if show:
            print(self)
        wrong = self.wrong()
        if wrong:
            raise AssertionError("; ".join(f"{row.block}: {row.note}" for row in wrong))
        return self

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("block", "kind", "uses", "gradients", "distance", "must be exact", "")]
        for r in self.rows:
            error, distance = ("-" if math.isnan(x) else f"{x:.1e}" for x in (r.gradient, r.distance))
            lines.append((r.block, r.kind, r.uses, error, distance, "yes" if r.exact else "no", r.note))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*text, *(f"{name}: no block ({why})" for name, why in self.left_out.items())])


def exactly(method: Method) -> Method:
    """``method`` under the exact Fisher matrix, its scales averages."""
    if isinstance(method, EKFAC):
        return replace(method, fisher="exact", scales="average")
    if type(method) is not KFAC:  # one whose blocks are of some other kind: what is captured is the same
        return KFAC(fisher="exact")
    return replace(method, fisher="exact")


def tolerance_of(xp: Namespace, dtype: object) -> float:
    """Largest relative error of a model in ``dtype`` that is none."""
    return 1e-6 if dtype == xp.float64 else 1e-2 if dtype == xp.float32 else 0.1


def examples_of(seen: Uses, outputs: tuple[int, ...], given: int | None = None) -> int:
    """Number of examples: the ``given`` one, or what most layers have and divides the first axis of ``outputs``, a shape."""
    examples = given
    if examples is None:
        votes = Counter(n for uses in seen.values() for n in {_sizes(use)[0] for use in uses})
        examples = max(votes or [1], key=lambda n: (outputs[0] % n == 0, votes[n], n))
    if outputs[0] % examples:
        raise ValueError(f"`outputs` must have the {examples} examples of the layers on their first axis, got {outputs}")
    return examples


def compare(
    model: Model,
    blocks: Mapping[str, Block],
    captured: Sequence[Uses],
    exact: Mapping[str, Array],
    *,
    examples: int,
    terms: float,
    tolerance: float,
    left_out: Mapping[str, str],
    dependent: Callable[[], bool],
) -> SelfCheck:
    """Compare what was captured, and the blocks it makes, with the exact gradients.

    Parameters
    ----------
    model, blocks
        The layers, and their blocks by name under the method to be checked, see :func:`exactly`.
    captured
        For every vector, or some of them, the uses of all layers.
    exact
        By block the gradients ``[*leading, K N, out, in]`` of the K vectors, in the order in which they were captured, each at one of the N
        examples and zero at all others.
    examples
        N, see :func:`examples_of`.
    terms
        Number of terms in the loss.
    tolerance
        Largest relative error, see :func:`tolerance_of`.
    left_out
        What has no block, with the reason. Layers in it are not compared.
    dependent
        Tells whether examples depend on each other, as through a normalisation of the batch. It is asked where their gradients are not
        those that were captured although the sums are.
    """
    names = {block: (name, suffix) for name in model.layers if name not in left_out for suffix, block in model.blocks(name).items()}
    depend = functools.cache(dependent)
    rows = []
    for block, (name, suffix) in names.items():
        uses = [[_of_block(use, suffix) for use in of_vector.get(name, ())] for of_vector in captured]
        rows.append(_checked(blocks[block], uses, exact[block], examples, terms, tolerance, depend))
    return SelfCheck(tuple(rows), left_out)


def _of_block(use: Any, suffix: str) -> Use:
    return use._replace(layer=use.layer.blocks()[suffix])


def _sizes(use: Any) -> tuple[int, int]:
    """Examples and positions of a use."""
    lead = use.output_grads.ndim - 3
    return use.inputs.shape[lead], use.output_grads.shape[-2]


def _checked(
    of: Block, captured: list[list[Use]], exact: Array, examples: int, terms: float, tolerance: float, dependent: Callable[[], bool]
) -> Checked:
    xp = namespace(exact)
    kind = f"{type(of.layer).__name__}, {of.method.name}"
    uses = captured[0]
    if not uses:
        wrong = bool(xp.any(exact != 0))
        note = "it has a gradient, but no call of its layer was seen: its weight is used in another way" if wrong else "unused"
        return Checked(of.name, kind, "none", math.nan, math.nan, False, note, wrong)
    sizes = {_sizes(use) for use in uses}
    shapes = ", ".join(sorted(f"{n} x {s}" for n, s in sizes))
    error, note, wrong = _gradient_error(xp, captured, exact, examples, tolerance, dependent)
    if note or any(n != examples for n, _ in sizes):
        return Checked(of.name, kind, shapes, error, math.nan, False, note, wrong)
    distance = _distance(xp, of, captured, exact, terms)
    single = sizes == {(1, 1)}
    must = isinstance(of.method, (KFAC, EKFAC)) and len(uses) == 1 and (single or of.layer.shape[1] == 1)
    wrong = must and not distance <= tolerance
    note = f"its block is {distance:.1e} off where it must be exact" if wrong else ""
    return Checked(of.name, kind, shapes, error, distance, must, note, wrong)


def _gradient_error(
    xp: Namespace, captured: list[list[Use]], exact: Array, examples: int, tolerance: float, dependent: Callable[[], bool]
) -> tuple[float, str, bool]:
    """How far gradients from the capture are from the ``exact`` ones, what that says, and whether it is wrong."""
    found, size, strange = [], 0.0, set()
    for uses in captured:
        total: Any = 0.0
        for use in uses:
            given = _gradients(xp, use)
            size = max(size, float(xp.max(_gradients(xp, _absolute(xp, use)))))
            *lead, n, out, inp = given.shape
            if n % examples:
                strange.add(n)
                given = xp.sum(given, axis=-3, keepdims=True) / examples
            else:
                given = xp.sum(xp.reshape(given, (*lead, examples, n // examples, out, inp)), axis=-3)
            total = total + given
        found.append(xp.broadcast_to(total, (*total.shape[:-3], examples, *total.shape[-2:])))
    rebuilt = xp.concat(found, axis=-4)
    apart = rebuilt - xp.reshape(xp.astype(exact, rebuilt.dtype), rebuilt.shape)
    largest = float(xp.max(xp.abs(exact)))
    # some gradients vanish, as that of the bias of the keys of attention: all terms of the sum cancel
    scale = max(largest, 1e-3 * size, float(xp.finfo(rebuilt.dtype).smallest_normal))
    error = float(xp.max(xp.abs(apart))) / scale
    if error <= tolerance:
        return error, "its gradient vanishes" if largest <= 1e-3 * tolerance * size else "", False
    if not float(xp.max(xp.abs(xp.sum(apart, axis=-3)))) <= examples * tolerance * scale:
        note = f"gradients from what was captured are {error:.1e} off autodiff's: its layer computes something else, or has other uses"
        return error, note, True
    if strange:
        rows = " or ".join(map(str, sorted(strange)))
        return error, f"the first axis of its input has {rows} entries, which are not the {examples} examples", True
    if dependent():
        return error, "examples depend on each other, through normalisations of the batch", False
    return error, f"gradients of single examples are {error:.1e} off autodiff's, though not their sum: examples are mixed", True


def _gradients(xp: Namespace, use: Any) -> Array:
    """``[*leading, K, N, out, in]``."""
    return example_gradients(xp, [use], factor_dtype(xp, use.output_grads.dtype))


def _absolute(xp: Namespace, use: Any) -> Use:
    return use._replace(inputs=xp.abs(use.inputs), output_grads=xp.abs(use.output_grads))


def _distance(xp: Namespace, of: Block, captured: list[list[Use]], exact: Array, terms: float) -> float:
    """How far the block of these uses is from that of the ``exact`` gradients; the farthest, where several are stacked."""

    def statistics(state: Any) -> Any:
        return functools.reduce(operator.add, [of.method.reduce_all(uses, state) for uses in captured]).over(terms)

    state = of.method.init(of.layer, exact, of.leading)
    state = of.method.observe(state, statistics(state))
    if of.method.late:  # it measures in what was refreshed
        state = of.method.refresh(of.layer, state, 1.0)
        state = of.method.observe(state, statistics(state))
    found = of.method.operator(of.layer, state)
    gradients = xp.astype(exact, found.values.dtype)
    if of.layer.forms[0] == "diagonal":
        diagonal = xp.sum(gradients**2, axis=-3) / terms
        apart, norm = (math.sqrt(float(xp.sum(x**2))) for x in (found.values - diagonal, diagonal))
        return apart / max(norm, float(xp.finfo(diagonal.dtype).smallest_normal))
    if not of.leading:
        return found.distance(gradients, terms)
    each = itertools.product(*map(range, of.leading))
    return max(found.at(index).distance(gradients[(*index, ...)], terms) for index in each)
