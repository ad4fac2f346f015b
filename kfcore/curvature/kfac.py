"""KFAC: a curvature block as one Kronecker product of two small factors.

Martens and Grosse 2015; for convolutions and weight sharing Grosse and Martens 2016, Eschenhagen et al. 2023. The factors and
their scale are fixed at the head of :mod:`kfcore.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from kfcore import damping as damp
from kfcore._array import Array, Namespace, cast, device, factor_dtype, namespace, truth
from kfcore.curvature.base import Cost, Method, Needs, check_captured, count_failure, select
from kfcore.layers import Layer
from kfcore.linalg import carried, damped, eigh, gram, identity, invert, kron, sandwich
from kfcore.statistics import KroneckerStatistics, RunningAverage, observe, unseen


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
            a, rows = layer.input_gram(xp, inputs, dtype)
        if output_grads is not None and self.fisher != "forward":
            xp = check_captured("output_grads", output_grads, state.average.weight)
            examples, g = float(output_grads.shape[-3]), gram(xp, layer.output_rows(xp, output_grads, dtype))
        return KroneckerStatistics(a, rows, g, examples)

    def observe(self, state: KFACState, statistics: KroneckerStatistics, decay: float | Array | None = None) -> KFACState:
        """Running averages of both factors, each batch weighing 1."""
        sums = (statistics.input_sum, statistics.output_sum)
        missing = [s for s, v, t in zip(("inputs", "output_grads"), state.average.values, sums, strict=True) if v is not None and t is None]
        if missing:
            raise ValueError(f"`statistics` lack the {' and the '.join(missing)}: give them to `reduce` too, and add the results")
        xp = namespace(state.average.weight)
        counts = (statistics.input_count, statistics.output_count)
        average, ok = observe(xp, state.average, sums, counts, self._decay(decay))
        return KFACState(average, state.solver, count_failure(xp, state.dropped, ok), state.kept)

    def refresh(self, layer: Layer, state: KFACState, damping: float | Array | None = None) -> KFACState:
        """Invert (or eigendecompose) both factors; where that fails, keep the old ones and count it."""
        xp = namespace(state.average.weight)
        a, g = state.average.values
        value = damp.strength(xp, self.rule, self._damping(damping), a, g)
        solver, ok = self._eigenbases(xp, a, g, value) if self.rule.kind == "exact" else self._inverses(xp, a, g, value)
        ok = truth(xp, ok & (state.average.weight > 0))
        return state._replace(solver=select(xp, ok, solver, state.solver), kept=count_failure(xp, state.kept, ok))

    def precondition(self, layer: Layer, state: KFACState, grad: Array) -> Array:
        """``G^-1 grad A^-1`` with damped factors, in the dtype of the factors."""
        xp = namespace(grad)
        if tuple(grad.shape[-2:]) != layer.shape:
            raise ValueError(f"`grad` must have shape [..., {layer.shape[0]}, {layer.shape[1]}], got {tuple(grad.shape)}")
        grad = cast(xp, grad, state.average.weight.dtype)
        solver = state.solver
        if isinstance(solver, Inverses):
            return grad @ solver.input if solver.output is None else sandwich(xp, solver.output, grad, solver.input)
        if solver.output_basis is None or solver.output_values is None:
            scale = solver.input_values[..., None, :] + solver.damping[..., None, None]
            return sandwich(xp, grad, solver.input_basis, solver.input_basis.mT / scale.mT)
        rotated = sandwich(xp, solver.output_basis.mT, grad, solver.input_basis)
        scale = solver.output_values[..., :, None] * solver.input_values[..., None, :] + solver.damping[..., None, None]
        return sandwich(xp, solver.output_basis, rotated / scale, solver.input_basis.mT)

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

    def _inverses(self, xp: Namespace, a: Array, g: Array | None, value: Array) -> tuple[Inverses, Array]:
        if g is None:
            right, ok = invert(xp, damped(xp, a, value))
            return Inverses(right, None), ok
        if self.rule.kind == "factored" and 1 in (a.shape[-1], g.shape[-1]):
            # a 1 x 1 factor is a number: all damping goes to the other side, and the result is exact
            return self._scaled_inverse(xp, a, g, value)
        damping_a, damping_g = damp.split(xp, self.rule, value, a, g)
        right, ok_a = invert(xp, damped(xp, a, damping_a))
        left, ok_g = invert(xp, damped(xp, g, damping_g))
        return Inverses(right, left), ok_a & ok_g

    @staticmethod
    def _scaled_inverse(xp: Namespace, a: Array, g: Array, value: Array) -> tuple[Inverses, Array]:
        inverse, ok = invert(xp, damped(xp, a * g, value))
        one = xp.ones_like(g if g.shape[-1] == 1 else a)
        return (Inverses(inverse, one) if g.shape[-1] == 1 else Inverses(one, inverse)), ok

    @staticmethod
    def _eigenbases(xp: Namespace, a: Array, g: Array | None, value: Array) -> tuple[Eigenbases, Array]:
        values_a, basis_a, ok = eigh(xp, a)
        if g is None:
            return Eigenbases(basis_a, values_a, None, None, carried(xp, value, values_a[..., -1])), ok
        values_g, basis_g, ok_g = eigh(xp, g)
        value = carried(xp, value, values_a[..., -1] * values_g[..., -1])
        return Eigenbases(basis_a, values_a, basis_g, values_g, value), ok & ok_g
