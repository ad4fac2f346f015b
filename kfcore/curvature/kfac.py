"""KFAC: a curvature block as one Kronecker product of two small factors.

Martens and Grosse 2015; for convolutions and weight sharing Grosse and Martens 2016, Eschenhagen et al. 2023. The factors and
their scale are fixed at the head of :mod:`kfcore.layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from kfcore import damping as damp
from kfcore import factors
from kfcore._array import Array, Namespace, device, namespace, select, truth
from kfcore.curvature.base import Cost, count_failure
from kfcore.curvature.kronecker import Eigenbases, Kronecker, carried_array, eigenbases, no_rungs, transposed, two_sided
from kfcore.curvature.sides import checked_grad, checked_statistics, like_of
from kfcore.eigenbasis import Eigh, decompose_all
from kfcore.factors import MATRICES, Form, Forms
from kfcore.ladder import climbed
from kfcore.layers import Layer
from kfcore.linalg import identity, kron
from kfcore.operators import BlockOperator
from kfcore.statistics import GradientRows, KroneckerStatistics, RunningAverage, observe, unseen


class Inverses(NamedTuple):
    """Damped inverse factors, each in the form of the factor (see :mod:`kfcore.factors`); ``None`` stands for the identity."""

    input: Array
    output: Array | None


class KFACState(NamedTuple):
    """State of a KFAC block; every array may have leading axes that stack equal layers."""

    average: RunningAverage
    """Running averages of ``A [..., in, in]`` and ``G [..., out, out]`` (``None`` for the forward-only Fisher).

    A factor that the layer says is diagonal is the vector ``[..., in]`` or ``[..., out]``.
    """
    solver: Inverses | Eigenbases
    """What is applied. Before the first refresh it gives back the gradient."""
    dropped: Array
    """How many batches' statistics were not finite and therefore not observed, int32."""
    kept: Array
    """How many refreshes failed, or had no statistics yet, and kept the old solver, int32."""
    rungs: Array
    """How many factors were solved by jitter, and how many in float64, ``[..., 2]``, int32; see :mod:`kfcore.ladder`."""


@dataclass(frozen=True, kw_only=True)
class KFAC(Kronecker):
    """Kronecker-factored approximate curvature, ``F ~= G (x) A``.

    One block a layer: ``A`` the second moment of its inputs, ``G`` that of the gradients at its outputs. The direction is
    ``(F + damping I)^-1`` applied to the gradient, the damping taken as :class:`kfcore.Damping` says (factored by default).
    With ``fisher="forward"`` ``G`` is the identity and the method is FOOF (Benzing 2022).

    Prefer it for dense and convolutional networks up to a few thousand features a layer. A state holds ``2 (in^2 + out^2)``
    numbers; a refresh costs ``in^3 + out^3``, a step ``2 in out (in + out)`` operations. A side whose factor is diagonal (the input of an
    embedding, both of a normalisation) has ``2 n`` numbers in place of ``2 n^2`` and costs ``n`` and ``in out``.

    Parameters
    ----------
    basis
        How eigenbases are found, :class:`kfcore.Eigh` or :class:`kfcore.Tracked`. Without it only the exact kind of damping has need of
        them and the others invert; with :class:`kfcore.Tracked` all work in the basis that is followed.
    """

    name: ClassVar[str] = "kfac"

    @property
    def diagonalises(self) -> bool:
        """Whether what is applied are eigenbases, not inverses."""
        return self.basis is not None or self.rule.kind == "exact"

    @property
    def factored(self) -> bool:
        """Whether the damping is split between two factors."""
        return self.rule.kind == "factored" and self.fisher != "forward"

    def init(self, layer: Layer, like: Array, leading: tuple[int, ...] = ()) -> KFACState:
        """Empty averages and a solver that is the identity."""
        xp, like = like_of(like)
        (output, inp), (rows, columns), shapes = layer.forms, layer.shape, self._shapes(layer)
        if self.diagonalises:
            solver = self._unturned(layer, like, leading)
        else:
            left = None if shapes[1] is None else factors.identity(xp, output, like, rows, leading)
            solver = Inverses(factors.identity(xp, inp, like, columns, leading), left)
        counter = xp.zeros(leading, dtype=xp.int32, device=device(like))
        return KFACState(unseen(xp, like, shapes, leading), solver, counter, counter, no_rungs(xp, like, leading))

    def observe(self, state: KFACState, statistics: KroneckerStatistics, decay: float | Array | None = None) -> KFACState:
        """Running averages of both factors, each batch weighing 1."""
        checked_statistics(state.average.values, statistics)
        sums = (statistics.inputs, statistics.outputs)
        xp = namespace(state.average.weight)
        counts = (statistics.input_count, statistics.output_count)
        average, ok = observe(xp, state.average, sums, counts, self._decay(decay))
        return state._replace(average=average, dropped=count_failure(xp, state.dropped, ok))

    def refresh_all(
        self, layers: Sequence[Layer], states: Sequence[KFACState], dampings: Sequence[float | Array | None]
    ) -> list[KFACState]:
        """Invert (or eigendecompose) both factors; where that fails, keep the old ones and count it."""
        xp = namespace(states[0].average.weight)
        sides: list[Any] = [(layer.forms, *state.average.values) for layer, state in zip(layers, states, strict=True)]
        values = [damp.strength(xp, self.rule, self._damping(d), *side) for side, d in zip(sides, dampings, strict=True)]
        solved = self._decomposed(xp, sides, values, states) if self.diagonalises else self._inverted(xp, sides, values)
        fresh: list[KFACState] = []
        for state, (solver, ok, taken) in zip(states, solved, strict=True):
            ok = truth(xp, ok & (state.average.weight > 0))
            solver, kept = select(xp, ok, solver, state.solver), count_failure(xp, state.kept, ok)
            fresh.append(state._replace(solver=solver, kept=kept, rungs=climbed(xp, state.rungs, ok, taken)))
        return fresh

    def precondition(self, layer: Layer, state: KFACState, grad: Array, rows: GradientRows | None = None) -> Array:
        """``G^-1 grad A^-1`` with damped factors, in the dtype of the factors.

        Where the gradient is the product of few ``rows``, the inverses are applied to these: ``(g G^-1)^T (a A^-1)``.
        """
        xp, grad = checked_grad(layer, grad, state.average.weight.dtype)
        solver = state.solver
        if isinstance(solver, Inverses):
            return two_sided(xp, layer, solver.output, grad, solver.input, rows)
        left, right = solver.output_basis, solver.input_basis
        scale = solver.products + solver.damping[..., None, None]
        if solver.output_values is None and right is not None:
            return factors.sandwich(xp, MATRICES, grad, right, right.mT / scale.mT)
        rotated = two_sided(xp, layer, transposed(left), grad, right, rows)
        return factors.sandwich(xp, layer.forms, left, rotated / scale, transposed(right))

    def operator(self, layer: Layer, state: KFACState, *, damped: bool = False) -> BlockOperator:
        """``G (x) A`` of the running averages; damped, of the last refresh."""
        xp, solver = namespace(state.average.weight), state.solver
        if isinstance(solver, Eigenbases) and damped:
            values = solver.products + solver.damping[..., None, None]
            bases = solver.output_basis, solver.input_basis
        else:
            assert not damped or isinstance(solver, Inverses)
            a, g = (solver.input, solver.output) if isinstance(solver, Inverses) and damped else state.average.values
            found = iter(factors.eigh_all(xp, [(form, x) for form, x in zip(layer.forms, (g, a), strict=True) if x is not None]))
            (left, out_basis, *_), (right, in_basis, *_) = (None, None) if g is None else next(found), next(found)
            values = right[..., None, :] if left is None else left[..., :, None] * right[..., None, :]
            values, bases = 1.0 / values if damped else values, (out_basis, in_basis)
        return BlockOperator(*bases, xp.broadcast_to(values, (*values.shape[:-2], *layer.shape)))

    def unit(self, layer: Layer, state: KFACState) -> float | Array:
        """The product of the mean eigenvalues of both factors."""
        return damp.unit(namespace(state.average.weight), layer.forms, *state.average.values)

    def dense(self, layer: Layer, state: KFACState) -> Array:
        """``G (x) A`` from the running averages."""
        xp = namespace(state.average.weight)
        a, g = state.average.values
        output, inp = layer.forms
        left = identity(xp, a, layer.shape[0]) if g is None else factors.dense(xp, output, g)
        return kron(xp, left, factors.dense(xp, inp, a))

    def cost(self, layer: Layer, itemsize: int = 4) -> Cost:
        """Exact bytes; operations to leading order, an inverse counted as n^3 and an eigendecomposition as 9 n^3."""
        out, inp = layer.shape
        exact = self.diagonalises
        sides = list(zip(layer.forms, layer.shape, strict=True))[1 if self.fisher == "forward" else 0 :]
        matrices, vectors = ([n for form, n in sides if form == kind] for kind in ("matrix", "diagonal"))
        numbers = 1 + exact + sum(2 * n * n + exact * n for n in matrices) + sum(2 * n for n in vectors)
        reduce = sum(2.0 * n * n for n in matrices) + sum(1.0 if layer.input_kind == "ids" else 2.0 * n for n in vectors)
        refresh = sum((9.0 if exact else 1.0) * n**3 for n in matrices) + sum(2.0 * n for n in vectors)
        # exact damping applies bases to both sides of the gradient twice, and divides in between whatever the forms are
        apply = 2.0 * out * inp * sum(matrices) * (2 if exact else 1) + out * inp * (0 if exact else len(vectors))
        return Cost(itemsize * numbers + (28 if exact else 16), reduce, refresh, apply)

    def _inverted(self, xp: Namespace, sides: list[Any], values: list[Any]) -> list[tuple[Inverses, Array, list[Array | None]]]:
        """Inverses of the damped factors of each block, whether that succeeded, and on which rungs."""
        dampable = [self._dampable(xp, forms, a, g, value) for (forms, a, g), value in zip(sides, values, strict=True)]
        found = iter(factors.invert_all(xp, [factor for of_block in dampable for factor in of_block]))
        solved: list[Any] = []
        for (_, a, g), some in zip(sides, dampable, strict=True):
            of_block = [next(found) for _ in some]
            solved.append((*self._inverses(xp, a, g, of_block), [rung for *_, rung in of_block]))
        return solved

    def _dampable(self, xp: Namespace, forms: Forms, a: Array, g: Array | None, value: float | Array) -> list[tuple[Form, Array]]:
        """The damped factors that are to be inverted, each with its form."""
        output, inp = forms
        if g is None:
            return [(inp, factors.damped(xp, inp, a, value))]
        if self._scalar(a, g):
            if g.shape[-1] == 1:
                return [(inp, factors.damped(xp, inp, factors.times(inp, a, factors.first(output, g)), value))]
            return [(output, factors.damped(xp, output, factors.times(output, g, factors.first(inp, a)), value))]
        damping_a, damping_g = damp.split(xp, self.rule, value, forms, a, g)
        return [(inp, factors.damped(xp, inp, a, damping_a)), (output, factors.damped(xp, output, g, damping_g))]

    def _inverses(self, xp: Namespace, a: Array, g: Array | None, found: list[Any]) -> tuple[Inverses, Array]:
        (first, ok, _), (last, ok_last, _) = found[0], found[-1]
        if g is None:
            return Inverses(first, None), ok
        if self._scalar(a, g):
            one = xp.ones_like(g if g.shape[-1] == 1 else a)
            return (Inverses(first, one) if g.shape[-1] == 1 else Inverses(one, first)), ok
        return Inverses(first, last), ok & ok_last

    def _scalar(self, a: Array, g: Array) -> bool:
        """Whether a factor is a number: then all damping goes to the other side, and the result is exact."""
        return self.rule.kind == "factored" and 1 in (a.shape[-1], g.shape[-1])

    def _decomposed(
        self, xp: Namespace, sides: list[Any], values: list[Any], states: Sequence[KFACState]
    ) -> list[tuple[Eigenbases, Array, list[Array | None]]]:
        """Eigenbases of the factors of each block with their damping, whether that succeeded, and on which rungs."""
        each = decompose_all(xp, self.basis or Eigh(), sides, [state.solver for state in states])
        solved: list[Any] = []
        for (forms, a, g), value, state, found in zip(sides, values, states, each, strict=True):
            split = g is not None and self.rule.kind != "exact" and not self._scalar(a, g)
            solver, ok = eigenbases(xp, state.solver, found, 0.0 if split else value)
            if split:
                on_a, on_g = damp.split(xp, self.rule, value, forms, a, g)
                solver = solver._replace(
                    input_values=_raised(xp, solver.input_values, on_a, forms[1]),
                    output_values=_raised(xp, solver.output_values, on_g, forms[0]),
                    damping=xp.zeros_like(solver.damping),
                )
            solved.append((solver, ok, [side.rung for side in found if side is not None]))
        return solved


def _raised(xp: Namespace, values: Array, damping: float | Array, form: Form) -> Array:
    """Eigenvalues ``[..., n]`` of a factor with its damping, as :func:`kfcore.factors.damped` has them."""
    return factors.damped(xp, "diagonal", values, damping if form == "diagonal" else carried_array(xp, damping, xp.sum(values, axis=-1)))
