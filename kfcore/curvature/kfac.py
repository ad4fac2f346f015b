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
from kfcore._array import Array, Namespace, cast, device, factor_dtype, namespace, readable, scalar, truth
from kfcore.curvature.base import Cost, Method, Needs, check_captured, count_failure, select
from kfcore.factors import MATRICES, Form, Forms, sandwich
from kfcore.layers import Layer
from kfcore.layers.base import check_mask
from kfcore.linalg import carried, identity, kron, thin_product
from kfcore.statistics import GradientRows, KroneckerStatistics, RunningAverage, input_moment, observe, output_moment, spans, unseen


class Inverses(NamedTuple):
    """Damped inverse factors, each in the form of the factor (see :mod:`kfcore.factors`); ``None`` stands for the identity."""

    input: Array
    output: Array | None


class Eigenbases(NamedTuple):
    """Eigendecomposed factors and the damping they are applied with; ``None`` stands for the identity.

    A factor of diagonal form has its own entries for values, in their order, and the identity for a basis.
    """

    input_basis: Array | None
    input_values: Array
    output_basis: Array | None
    output_values: Array | None
    damping: Array


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


@dataclass(frozen=True, kw_only=True)
class KFAC(Method):
    """Kronecker-factored approximate curvature, ``F ~= G (x) A``.

    One block a layer: ``A`` the second moment of its inputs, ``G`` that of the gradients at its outputs. The direction is
    ``(F + damping I)^-1`` applied to the gradient, the damping taken as :class:`kfcore.Damping` says (factored by default).
    With ``fisher="forward"`` ``G`` is the identity and the method is FOOF (Benzing 2022).

    Prefer it for dense and convolutional networks up to a few thousand features a layer. A state holds ``2 (in^2 + out^2)``
    numbers; a refresh costs ``in^3 + out^3``, a step ``2 in out (in + out)`` operations. A side whose factor is diagonal (the input of an
    embedding, both of a normalisation) has ``2 n`` numbers in place of ``2 n^2`` and costs ``n`` and ``in out``.
    """

    name: ClassVar[str] = "kfac"

    def requires(self, layer: Layer) -> Needs:
        """Inputs, and output gradients unless the Fisher type is forward-only; at once only if the layer says so."""
        if self.fisher == "forward":
            return Needs.INPUTS
        return Needs.INPUTS | Needs.OUTPUT_GRADS | (Needs.TOGETHER if layer.together else Needs.NOTHING)

    def init(self, layer: Layer, like: Array, leading: tuple[int, ...] = ()) -> KFACState:
        """Empty averages and a solver that is the identity."""
        xp = namespace(like)
        like = xp.zeros((), dtype=factor_dtype(xp, like.dtype), device=device(like))
        (output, inp), (rows, columns), forward = layer.forms, layer.shape, self.fisher == "forward"
        shapes = (factors.shape(inp, columns), None if forward else factors.shape(output, rows))
        left = None if forward else factors.identity(xp, output, like, rows, leading)
        right = factors.identity(xp, inp, like, columns, leading)
        if self.rule.kind == "exact":
            zero = xp.zeros(leading, dtype=like.dtype, device=device(like))
            ones = [None if s is None else factors.identity(xp, "diagonal", like, s[0], leading) for s in shapes]
            bases = [None if form == "diagonal" else basis for form, basis in ((inp, right), (output, left))]
            solver = Eigenbases(bases[0], ones[0], bases[1], ones[1], zero)
        else:
            solver = Inverses(right, left)
        counter = xp.zeros(leading, dtype=xp.int32, device=device(like))
        return KFACState(unseen(xp, like, shapes, leading), solver, counter, counter)

    def reduce(
        self,
        layer: Layer,
        state: KFACState,
        inputs: Array | None = None,
        output_grads: Array | None = None,
        *,
        mask: Array | None = None,
        grad: Array | None = None,
        terms: float | Array = 1.0,
    ) -> KroneckerStatistics:
        """Second moments of the rows; a side that is not given is left out and can be added later by ``+``.

        Only a layer whose output factor is made of both sides (:attr:`kfcore.layers.Layer.together`) wants them in one call. A mask
        belongs to every call.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what came and what is allowed; a ``mask`` too that is not boolean, has another shape than the positions,
            or comes with a layer that knows none (:attr:`kfcore.layers.Layer.unmaskable`).
        """
        dtype = state.average.weight.dtype
        a = g = None
        rows = examples = 0.0
        if inputs is not None:
            xp = check_captured("inputs", inputs, state.average.weight, layer.input_kind)
            if mask is not None:
                check_mask(layer, mask, inputs.shape if layer.input_kind == "ids" else inputs.shape[:-1], "inputs", inputs)
            a, rows = input_moment(xp, layer, inputs, dtype, mask)
        if output_grads is not None and self.fisher != "forward":
            xp = check_captured("output_grads", output_grads, state.average.weight)
            if mask is not None:
                check_mask(layer, mask, output_grads.shape[:-1], "output_grads", output_grads)
            g, examples = output_moment(xp, layer, output_grads, dtype, inputs, mask)
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
        factorise: Any = factors.eigh_all if self.rule.kind == "exact" else factors.invert_all
        solver_of: Any = self._eigenbases if self.rule.kind == "exact" else self._inverses
        sides: list[Any] = [(layer.forms, *state.average.values) for layer, state in zip(layers, states, strict=True)]
        values = [damp.strength(xp, self.rule, self._damping(d), *side) for side, d in zip(sides, dampings, strict=True)]
        dampable = [self._dampable(xp, forms, a, g, value) for (forms, a, g), value in zip(sides, values, strict=True)]
        found = iter(factorise(xp, [factor for of_block in dampable for factor in of_block]))
        fresh: list[KFACState] = []
        for state, (_, a, g), value, of_block in zip(states, sides, values, dampable, strict=True):
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
            return self._two_sided(xp, layer, solver.output, grad, solver.input, rows)
        left, right = solver.output_basis, solver.input_basis
        scale = solver.input_values[..., None, :] + solver.damping[..., None, None]
        if solver.output_values is None and right is not None:
            return sandwich(xp, MATRICES, grad, right, right.mT / scale.mT)
        if solver.output_values is not None:
            scale = solver.output_values[..., :, None] * solver.input_values[..., None, :] + solver.damping[..., None, None]
        rotated = self._two_sided(xp, layer, _transposed(left), grad, right, rows)
        return sandwich(xp, layer.forms, left, rotated / scale, _transposed(right))

    @staticmethod
    def _two_sided(xp: Namespace, layer: Layer, left: Array | None, grad: Array, right: Array | None, rows: GradientRows | None) -> Array:
        """``left grad right``, by the rows of the gradient where that is cheaper by a quarter at least."""
        if rows is not None and left is not None and right is not None and layer.forms == MATRICES:
            (out, inp), n = layer.shape, rows.inputs.shape[-2]
            cheaper = n * (out * out + inp * inp + out * inp) < 0.75 * out * inp * (out + inp)
            if cheaper and (rows.known or (readable(xp, grad) and spans(xp, rows, grad) is True)):
                return thin_product(xp, rows.scale * (rows.output_grads @ left.mT), rows.inputs @ right)
        return sandwich(xp, layer.forms, left, grad, right)

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
        exact = self.rule.kind == "exact"
        sides = list(zip(layer.forms, layer.shape, strict=True))[1 if self.fisher == "forward" else 0 :]
        matrices, vectors = ([n for form, n in sides if form == kind] for kind in ("matrix", "diagonal"))
        numbers = 1 + exact + sum(2 * n * n + exact * n for n in matrices) + sum(2 * n for n in vectors)
        reduce = sum(2.0 * n * n for n in matrices) + sum(1.0 if layer.input_kind == "ids" else 2.0 * n for n in vectors)
        refresh = sum((9.0 if exact else 1.0) * n**3 for n in matrices) + sum(2.0 * n for n in vectors)
        # exact damping applies bases to both sides of the gradient twice, and divides in between whatever the forms are
        apply = 2.0 * out * inp * sum(matrices) * (2 if exact else 1) + out * inp * (0 if exact else len(vectors))
        return Cost(itemsize * numbers + 8, reduce, refresh, apply)

    def _dampable(self, xp: Namespace, forms: Forms, a: Array, g: Array | None, value: float | Array) -> list[tuple[Form, Array]]:
        """What is to be factorised, each with its form: the factors, or the damped factors."""
        output, inp = forms
        if self.rule.kind == "exact":
            return [(inp, a)] if g is None else [(inp, a), (output, g)]
        if g is None:
            return [(inp, factors.damped(xp, inp, a, value))]
        if self._scalar(a, g):
            if g.shape[-1] == 1:
                return [(inp, factors.damped(xp, inp, factors.times(inp, a, factors.first(output, g)), value))]
            return [(output, factors.damped(xp, output, factors.times(output, g, factors.first(inp, a)), value))]
        damping_a, damping_g = damp.split(xp, self.rule, value, forms, a, g)
        return [(inp, factors.damped(xp, inp, a, damping_a)), (output, factors.damped(xp, output, g, damping_g))]

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
        top = xp.max(values_a, axis=-1)
        if g is None:
            return Eigenbases(basis_a, values_a, None, None, _carried(xp, value, top)), ok
        values_g, basis_g, ok_g = found[1]
        value = _carried(xp, value, top * xp.max(values_g, axis=-1))
        return Eigenbases(basis_a, values_a, basis_g, values_g, value), ok & ok_g


def _carried(xp: Namespace, damping: float | Array, size: Array) -> Array:
    """:func:`carried` as an array ``[...]``."""
    return scalar(xp, carried(xp, damping, size, size.dtype), size)


def _transposed(basis: Array | None) -> Array | None:
    return None if basis is None else basis.mT
