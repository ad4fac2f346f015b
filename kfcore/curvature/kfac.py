"""KFAC: a curvature block as one Kronecker product of two small factors.

Martens and Grosse 2015; for convolutions and weight sharing Grosse and Martens 2016, Eschenhagen et al. 2023. The factors and
their scale are fixed at the head of :mod:`kfcore.layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from kfcore import damping as damp
from kfcore._array import Array, Namespace, cast, device, factor_dtype, namespace, readable, scalar, truth
from kfcore.curvature.base import Cost, Method, Needs, check_captured, count_failure, select
from kfcore.layers import Layer
from kfcore.linalg import carried, damped, eigh_all, identity, invert_all, kron, sandwich, thin_product
from kfcore.statistics import GradientRows, KroneckerStatistics, Moment, RunningAverage, observe, spans, unseen


class Inverses(NamedTuple):
    """Damped inverse factors; ``None`` stands for the identity."""

    input: Array
    output: Array | None


class Eigenbases(NamedTuple):
    """Eigendecomposed factors and the damping they are applied with; ``None`` stands for the identity."""

    input_basis: Array
    input_values: Array
    output_basis: Array | None
    output_values: Array | None
    damping: Array


class KFACState(NamedTuple):
    """State of a KFAC block; every array may have leading axes that stack equal layers."""

    average: RunningAverage
    """Running averages of ``A [..., in, in]`` and ``G [..., out, out]`` (``None`` for the forward-only Fisher)."""
    solver: Inverses | Eigenbases
    """What is applied. Before the first refresh it gives back the gradient."""
    dropped: Array
    """How many batches' statistics were not finite and therefore not observed, int32."""
    kept: Array
    """How many refreshes failed, or had no statistics yet, and kept the old solver, int32."""


@dataclass(frozen=True, kw_only=True)
class KFAC(Method):
    """Kronecker-factored approximate curvature, ``F ~= G (x) A``.

    One block a layer: ``A`` the second moment of its inputs, ``G`` that of the gradients at its outputs. The direction is
    ``(F + damping I)^-1`` applied to the gradient, the damping taken as :class:`kfcore.Damping` says (factored by default).
    With ``fisher="forward"`` ``G`` is the identity and the method is FOOF (Benzing 2022).

    Prefer it for dense and convolutional networks up to a few thousand features a layer. A state holds ``2 (in^2 + out^2)``
    numbers; a refresh costs ``in^3 + out^3``, a step ``2 in out (in + out)`` operations.
    """

    name: ClassVar[str] = "kfac"

    def requires(self, layer: Layer) -> Needs:
        """Inputs, and output gradients unless the Fisher type is forward-only; not necessarily at once."""
        return Needs.INPUTS if self.fisher == "forward" else Needs.INPUTS | Needs.OUTPUT_GRADS

    def init(self, layer: Layer, like: Array, leading: tuple[int, ...] = ()) -> KFACState:
        """Empty averages and a solver that is the identity."""
        xp = namespace(like)
        out, inp = layer.shape
        like = xp.zeros((), dtype=factor_dtype(xp, like.dtype), device=device(like))
        sides = ((inp, inp), None if self.fisher == "forward" else (out, out))
        left = None if self.fisher == "forward" else identity(xp, like, out, leading)
        right = identity(xp, like, inp, leading)
        if self.rule.kind == "exact":
            zero = xp.zeros(leading, dtype=like.dtype, device=device(like))
            ones = [None if s is None else xp.ones((*leading, s[0]), dtype=like.dtype, device=device(like)) for s in sides]
            solver = Eigenbases(right, ones[0], left, ones[1], zero)
        else:
            solver = Inverses(right, left)
        counter = xp.zeros(leading, dtype=xp.int32, device=device(like))
        return KFACState(unseen(xp, like, sides, leading), solver, counter, counter)

    def reduce(
        self,
        layer: Layer,
        state: KFACState,
        inputs: Array | None = None,
        output_grads: Array | None = None,
        *,
        grad: Array | None = None,
        terms: float | Array = 1.0,
    ) -> KroneckerStatistics:
        """Second moments of the rows; a side that is not given is left out and can be added later by ``+``."""
        dtype = state.average.weight.dtype
        a = g = None
        rows = examples = 0.0
        if inputs is not None:
            xp = check_captured("inputs", inputs, state.average.weight)
            count = layer.input_count(inputs)
            rows, few = float(count), count <= layer.shape[1]
            a = Moment.of(xp, layer.input_rows(xp, inputs, dtype), inputs) if few else Moment(layer.input_gram(xp, inputs, dtype))
        if output_grads is not None and self.fisher != "forward":
            xp = check_captured("output_grads", output_grads, state.average.weight)
            g = layer.output_rows(xp, output_grads, dtype)
            examples, g = float(output_grads.shape[-3]), Moment.of(xp, g, output_grads)
        return KroneckerStatistics(a, rows, g, examples)

    def observe(self, state: KFACState, statistics: KroneckerStatistics, decay: float | Array | None = None) -> KFACState:
        """Running averages of both factors, each batch weighing 1."""
        sums = (statistics.inputs, statistics.outputs)
        missing = [s for s, v, t in zip(("inputs", "output_grads"), state.average.values, sums, strict=True) if v is not None and t is None]
        if missing:
            raise ValueError(f"`statistics` lack the {' and the '.join(missing)}: give them to `reduce` too, and add the results")
        xp = namespace(state.average.weight)
        counts = (statistics.input_count, statistics.output_count)
        average, ok = observe(xp, state.average, sums, counts, self._decay(decay))
        return KFACState(average, state.solver, count_failure(xp, state.dropped, ok), state.kept)

    def refresh(self, layer: Layer, state: KFACState, damping: float | Array | None = None) -> KFACState:
        """Invert (or eigendecompose) both factors; where that fails, keep the old ones and count it."""
        return self.refresh_all([layer], [state], [damping])[0]

    def refresh_all(
        self, layers: Sequence[Layer], states: Sequence[KFACState], dampings: Sequence[float | Array | None]
    ) -> list[KFACState]:
        """:meth:`refresh` of several blocks, whose factors the library may take together."""
        xp = namespace(states[0].average.weight)
        factorise: Any = eigh_all if self.rule.kind == "exact" else invert_all
        solver_of: Any = self._eigenbases if self.rule.kind == "exact" else self._inverses
        sides: list[Any] = [state.average.values for state in states]
        values = [damp.strength(xp, self.rule, self._damping(d), a, g) for (a, g), d in zip(sides, dampings, strict=True)]
        matrices = [self._matrices(xp, a, g, value) for (a, g), value in zip(sides, values, strict=True)]
        found = iter(factorise(xp, [matrix for of_block in matrices for matrix in of_block]))
        fresh = []
        for state, (a, g), value, of_block in zip(states, sides, values, matrices, strict=True):
            solver, ok = solver_of(xp, a, g, value, [next(found) for _ in of_block])
            ok = truth(xp, ok & (state.average.weight > 0))
            fresh.append(state._replace(solver=select(xp, ok, solver, state.solver), kept=count_failure(xp, state.kept, ok)))
        return fresh

    def precondition(self, layer: Layer, state: KFACState, grad: Array, rows: GradientRows | None = None) -> Array:
        """``G^-1 grad A^-1`` with damped factors, in the dtype of the factors.

        Where the gradient is the product of few ``rows``, the inverses are applied to these: ``(g G^-1)^T (a A^-1)``.
        """
        xp = namespace(grad)
        if tuple(grad.shape[-2:]) != layer.shape:
            raise ValueError(f"`grad` must have shape [..., {layer.shape[0]}, {layer.shape[1]}], got {tuple(grad.shape)}")
        grad = cast(xp, grad, state.average.weight.dtype)
        solver = state.solver
        if isinstance(solver, Inverses):
            if solver.output is None:
                return grad @ solver.input
            return self._two_sided(xp, layer, solver.output, grad, solver.input, rows)
        if solver.output_basis is None or solver.output_values is None:
            scale = solver.input_values[..., None, :] + solver.damping[..., None, None]
            return sandwich(xp, grad, solver.input_basis, solver.input_basis.mT / scale.mT)
        rotated = self._two_sided(xp, layer, solver.output_basis.mT, grad, solver.input_basis, rows)
        scale = solver.output_values[..., :, None] * solver.input_values[..., None, :] + solver.damping[..., None, None]
        return sandwich(xp, solver.output_basis, rotated / scale, solver.input_basis.mT)

    @staticmethod
    def _two_sided(xp: Namespace, layer: Layer, left: Array, grad: Array, right: Array, rows: GradientRows | None) -> Array:
        """``left grad right``, by the rows of the gradient where that is cheaper by a quarter at least."""
        if rows is not None:
            (out, inp), n = layer.shape, rows.inputs.shape[-2]
            cheaper = n * (out * out + inp * inp + out * inp) < 0.75 * out * inp * (out + inp)
            if cheaper and (rows.known or (readable(xp, grad) and spans(xp, rows, grad) is True)):
                return thin_product(xp, rows.scale * (rows.output_grads @ left.mT), rows.inputs @ right)
        return sandwich(xp, left, grad, right)

    def dense(self, layer: Layer, state: KFACState) -> Array:
        """``G (x) A`` from the running averages."""
        xp = namespace(state.average.weight)
        a, g = state.average.values
        return kron(xp, identity(xp, a, layer.shape[0]) if g is None else g, a)

    def cost(self, layer: Layer, itemsize: int = 4) -> Cost:
        """Exact bytes; operations to leading order, an inverse counted as n^3 and an eigendecomposition as 9 n^3."""
        out, inp = layer.shape
        sides = [inp] if self.fisher == "forward" else [inp, out]
        exact = self.rule.kind == "exact"
        numbers = 1 + sum(2 * n * n + exact * n for n in sides) + exact
        apply = 2.0 * out * inp * sum(sides) * (2 if exact else 1)
        return Cost(itemsize * numbers + 8, sum(2.0 * n * n for n in sides), sum((9.0 if exact else 1.0) * n**3 for n in sides), apply)

    def _matrices(self, xp: Namespace, a: Array, g: Array | None, value: float | Array) -> list[Array]:
        """What is to be factorised: the factors, or the damped factors."""
        if self.rule.kind == "exact":
            return [a] if g is None else [a, g]
        if g is None:
            return [damped(xp, a, value)]
        if self._scalar(a, g):
            return [damped(xp, a * g, value)]
        damping_a, damping_g = damp.split(xp, self.rule, value, a, g)
        return [damped(xp, a, damping_a), damped(xp, g, damping_g)]

    def _inverses(self, xp: Namespace, a: Array, g: Array | None, value: float | Array, found: list[Any]) -> tuple[Inverses, Array]:
        (first, ok), (last, ok_last) = found[0], found[-1]
        if g is None:
            return Inverses(first, None), ok
        if self._scalar(a, g):
            one = xp.ones_like(g if g.shape[-1] == 1 else a)
            return (Inverses(first, one) if g.shape[-1] == 1 else Inverses(one, first)), ok
        return Inverses(first, last), ok & ok_last

    def _scalar(self, a: Array, g: Array) -> bool:
        """Whether a factor is a number: then all damping goes to the other side, and the result is exact."""
        return self.rule.kind == "factored" and 1 in (a.shape[-1], g.shape[-1])

    @staticmethod
    def _eigenbases(xp: Namespace, a: Array, g: Array | None, value: float | Array, found: list[Any]) -> tuple[Eigenbases, Array]:
        values_a, basis_a, ok = found[0]
        if g is None:
            return Eigenbases(basis_a, values_a, None, None, _carried(xp, value, values_a[..., -1])), ok
        values_g, basis_g, ok_g = found[1]
        value = _carried(xp, value, values_a[..., -1] * values_g[..., -1])
        return Eigenbases(basis_a, values_a, basis_g, values_g, value), ok & ok_g


def _carried(xp: Namespace, damping: float | Array, size: Array) -> Array:
    """:func:`carried` as an array ``[...]``."""
    return scalar(xp, carried(xp, damping, size, size.dtype), size)
