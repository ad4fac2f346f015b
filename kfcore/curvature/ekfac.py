"""EKFAC: a curvature block as a diagonal in the eigenbasis of its Kronecker factors.

George, Laurent, Bouthillier, Ballas and Vincent 2018, algorithm 1. In the basis of KFAC the best diagonal, in the Frobenius norm, is the
second moment of the gradients of single examples, which KFAC replaces by the product of the eigenvalues of its factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from kfcore import factors, linalg
from kfcore._array import Array, Namespace, finite, namespace, number, scalar, select, truth
from kfcore.curvature.base import Cost, Needs, count_failure
from kfcore.curvature.kronecker import Eigenbases, Kronecker, carried_array, eigenbases, no_rungs, transposed, two_sided
from kfcore.curvature.sides import checked_grad, checked_statistics, like_of
from kfcore.damping import Damping
from kfcore.eigenbasis import Eigh, decompose_all, transport
from kfcore.factors import MATRICES
from kfcore.ladder import climbed
from kfcore.layers import Layer
from kfcore.operators import BlockOperator
from kfcore.scales import scales
from kfcore.statistics import GradientRows, KroneckerStatistics, RunningAverage, Use, observe, unseen

SCALES = ("average", "batch", "gradient")
MOVED = ("transport", "reset", "measure")


class EKFACState(NamedTuple):
    """State of an EKFAC block; every array may have leading axes that stack equal layers."""

    average: RunningAverage
    """Running averages of the factors ``A`` and ``G``, as KFAC has them."""
    scales: RunningAverage
    """Of the scales ``S [..., out, in]``, in the basis of ``solver``; they are KFAC's, of weight zero, until they are measured."""
    solver: Eigenbases
    """The basis. Before the first refresh it is the identity."""
    dropped: Array
    """How many batches' statistics were not finite and therefore not observed, int32."""
    kept: Array
    """How many refreshes failed, or had no statistics yet, and kept the old basis, int32."""
    rungs: Array
    """How many factors were solved by jitter, and how many in float64, ``[..., 2]``, int32; see :mod:`kfcore.ladder`."""


@dataclass(frozen=True, kw_only=True)
class EKFAC(Kronecker):
    """Eigenvalue-corrected KFAC, ``F ~= (U_G (x) U_A) diag(S) (U_G (x) U_A)^T``.

    ``U_A`` and ``U_G`` are the eigenbases of KFAC's factors, ``S`` the second moment of each example's gradient in that basis,
    ``E (U_G^T G_n U_A)^2``. Under shared weights ``G_n`` is the true gradient of the example, summed over its positions, also where the
    factors are those of ``"reduce"``. Its trace is that of the Fisher matrix, and of the same data in the same basis no diagonal is
    closer to it in the Frobenius norm; of averages of different age neither is promised.

    The first step is KFAC's. After that the scales are measured in the basis they are applied in, whenever statistics are due:
    a refresh that is due comes after the step, not before it. In the null space of a factor, where no basis is better than another, the
    scales are levelled, so that every library takes the same steps. Refreshing rarely costs EKFAC less than KFAC, for the scales go on
    following the curvature in between.

    A state holds ``2 (in^2 + out^2) + in out`` numbers; a refresh costs two eigendecompositions (see ``basis``), a step ``4 in out (in +
    out)`` operations and, with N examples of one position, ``2 N (in^2 + out^2 + in out)`` for the scales.

    Parameters
    ----------
    damping
        ``lambda`` in ``(S + lambda)^-1``, which is exact Tikhonov damping; a :class:`kfcore.Damping` must be of kind ``"exact"``. Relative
        damping is in units of the mean scale. A value tuned for KFAC's factored damping is no guide: try a smaller one.
    scales
        ``"average"``: the running average of the second moments of the batches. ``"batch"``: that of the last batch alone.
        ``"gradient"``: the running average of ``M`` times the square of the mean gradient of M terms, the paper's EKFAC-ra; it needs
        no gradients of examples, and overestimates where the mean gradient is not small (empirical Fisher only).
    moved
        What becomes of the scales when the basis moves. ``"transport"``: they become the diagonal in the new basis of the matrix that they
        were in the old one, exactly. ``"reset"``: KFAC's, ``l_G l_A^T``, of the weight of those they replace. ``"measure"``: KFAC's
        until the next statistics, which replace them.
    """

    scales: Literal["average", "batch", "gradient"] = "average"
    moved: Literal["transport", "reset", "measure"] = "transport"

    name: ClassVar[str] = "ekfac"
    late: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.damping, Damping):
            object.__setattr__(self, "damping", Damping(self.damping, kind="exact"))
        super().__post_init__()
        if self.rule.kind != "exact":
            raise ValueError(f"`damping` of EKFAC must be of kind 'exact', the only one there is in an eigenbasis, got {self.rule.kind!r}")
        for field, allowed in (("scales", SCALES), ("moved", MOVED)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"`{field}` of EKFAC must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        if self.fisher == "forward":
            raise ValueError(
                "`fisher` of EKFAC must be 'empirical', 'mc' or 'exact', for its scales are made of output gradients, got 'forward'"
            )
        if self.scales == "gradient" and self.fisher != "empirical":
            raise ValueError(f"`fisher` of EKFAC with scales='gradient' must be 'empirical', got {self.fisher!r}")

    def requires(self, layer: Layer) -> Needs:
        """Inputs and output gradients of the same rows, of all uses; with ``scales="gradient"`` each by itself, and the gradient."""
        if self.scales == "gradient":
            return super().requires(layer) | Needs.GRADIENT
        return Needs.INPUTS | Needs.OUTPUT_GRADS | Needs.TOGETHER | Needs.ALL_USES

    def init(self, layer: Layer, like: Array, leading: tuple[int, ...] = ()) -> EKFACState:
        """Empty averages, scales of one and a basis that is the identity."""
        xp, like = like_of(like)
        found = unseen(xp, like, (layer.shape,), leading)
        solver = self._unturned(layer, like, leading)
        ones = found._replace(values=(xp.ones_like(found.values[0]),))
        average, counter = unseen(xp, like, self._shapes(layer), leading), solver.ways[..., 0]
        return EKFACState(average, ones, solver, counter, counter, no_rungs(xp, like, leading))

    def reduce(
        self,
        layer: Layer,
        state: EKFACState,
        inputs: Array | None = None,
        output_grads: Array | None = None,
        *,
        grad: Array | None = None,
        terms: float | Array = 1.0,
        mask: Array | None = None,
    ) -> KroneckerStatistics:
        """Second moments of the rows, and of the gradients of the examples in the basis of ``state``.

        Both sides of the same rows in one call, or with ``scales="gradient"`` one by one, and ``grad`` the gradient of the mean loss.
        """
        like = state.average.weight
        if grad is not None:
            xp, grad = checked_grad(layer, grad, like.dtype)
            turned = self._turned(xp, layer, state, grad, None)
            squared = scalar(xp, terms, turned) * turned * turned
            return KroneckerStatistics(None, 0.0, None, 0.0, levelled(xp, squared, state.solver), 1.0)
        return self.reduce_all([Use(layer, inputs, output_grads, mask)], state)

    def reduce_all(self, uses: Sequence[Use], state: EKFACState) -> KroneckerStatistics:
        """:meth:`reduce` of several uses of one weight in one batch, whose gradients of each example add up before they are squared."""
        like = state.average.weight
        if self.scales == "gradient":
            return super().reduce_all(uses, state)
        if any(use.inputs is None or use.output_grads is None for use in uses):
            raise ValueError("`inputs` and `output_grads` must be given together: EKFAC squares the gradients of single examples")
        found = super().reduce_all(uses, state)
        xp = namespace(like)
        measured = levelled(xp, scales(xp, uses, state.solver.output_basis, state.solver.input_basis, like.dtype), state.solver)
        return found._replace(scales=measured, scale_count=found.output_count)

    def observe(self, state: EKFACState, statistics: KroneckerStatistics, decay: float | Array | None = None) -> EKFACState:
        """Running averages of both factors and of the scales; those measured before there was a basis are left out."""
        checked_statistics(state.average.values, statistics)
        if statistics.scales is None:
            raise ValueError("`statistics` lack the scales: give `reduce` the gradient too, and add the results")
        xp, decay = namespace(state.average.weight), self._decay(decay)
        sums, counts = (statistics.inputs, statistics.outputs), (statistics.input_count, statistics.output_count)
        based = truth(xp, xp.any(state.solver.ways > 0, axis=-1))
        fine, total = True, None
        if based is not False:
            total = xp.sum(statistics.scales, axis=(-2, -1))
            fine = finite(xp, number(xp, total))
            fine = fine if based is True else fine | ~based
        average, ok = observe(xp, state.average, sums, counts, decay, valid=fine)
        measured = state.scales
        if based is not False:
            again = 0.0 if self.scales == "batch" else decay
            valid = ok if based is True else ok & based
            measured, _ = observe(xp, measured, (statistics.scales,), (statistics.scale_count,), again, lambda _: total, valid)
        return state._replace(average=average, scales=measured, dropped=count_failure(xp, state.dropped, ok))

    def refresh_all(
        self, layers: Sequence[Layer], states: Sequence[EKFACState], dampings: Sequence[float | Array | None]
    ) -> list[EKFACState]:
        """Find the eigenbases, and bring the scales there; where that fails, keep the old ones and count it."""
        xp = namespace(states[0].average.weight)
        sides: list[Any] = [(layer.forms, *state.average.values) for layer, state in zip(layers, states, strict=True)]
        # under "transport" scales are made of eigenvalues only until some are measured
        each = decompose_all(xp, self.basis or Eigh(), sides, [state.solver for state in states], exact=self.moved != "transport")
        fresh: list[EKFACState] = []
        for state, found, damping in zip(states, each, dampings, strict=True):
            solver, ok = eigenbases(xp, state.solver, found, 0.0)
            ok = truth(xp, ok & (state.average.weight > 0))
            measured = self._moved(xp, state, solver)
            strength = self._strength(xp, self._damping(damping), measured.values[0])
            new = (measured, solver._replace(damping=strength))
            measured, solver = select(xp, ok, new, (state.scales, state.solver))
            rungs = climbed(xp, state.rungs, ok, [side.rung for side in found if side is not None])
            fresh.append(state._replace(scales=measured, solver=solver, kept=count_failure(xp, state.kept, ok), rungs=rungs))
        return fresh

    def precondition(self, layer: Layer, state: EKFACState, grad: Array, rows: GradientRows | None = None) -> Array:
        """``U_G ((U_G^T grad U_A) / (S + lambda)) U_A^T``, in the dtype of the factors."""
        xp, grad = checked_grad(layer, grad, state.average.weight.dtype)
        turned = self._turned(xp, layer, state, grad, rows)
        scale = state.scales.values[0] + state.solver.damping[..., None, None]
        return factors.sandwich(xp, MATRICES, state.solver.output_basis, turned / scale, transposed(state.solver.input_basis))

    def operator(self, layer: Layer, state: EKFACState, *, damped: bool = False) -> BlockOperator:
        """``U diag(S) U^T`` with ``U = U_G (x) U_A``."""
        solver = state.solver
        found = BlockOperator(solver.output_basis, solver.input_basis, state.scales.values[0])
        return found.damped(solver.damping) if damped else found

    def cost(self, layer: Layer, itemsize: int = 4) -> Cost:
        """Exact bytes; operations to leading order, an eigendecomposition counted as 9 n^3."""
        out, inp = layer.shape
        sides = list(zip(layer.forms, layer.shape, strict=True))
        matrices, vectors = ([n for form, n in sides if form == kind] for kind in ("matrix", "diagonal"))
        numbers = 3 + out * inp + sum(2 * n * n + n for n in matrices) + sum(2 * n for n in vectors)
        reduce = sum(4.0 * n * n for n in matrices) + sum(1.0 if layer.input_kind == "ids" else 2.0 * n for n in vectors) + 2.0 * out * inp
        moved = 2.0 * out * inp * sum(matrices) + sum(2.0 * n**3 for n in matrices) if self.moved == "transport" else 0.0
        return Cost(itemsize * numbers + 28, reduce, sum(9.0 * n**3 for n in matrices) + moved, 4.0 * out * inp * sum(matrices) + out * inp)

    def _turned(self, xp: Namespace, layer: Layer, state: EKFACState, grad: Array, rows: GradientRows | None) -> Array:
        """``U_G^T grad U_A``."""
        return two_sided(xp, layer, transposed(state.solver.output_basis), grad, state.solver.input_basis, rows)

    def _moved(self, xp: Namespace, state: EKFACState, new: Eigenbases) -> RunningAverage:
        """The scales in a new basis, as ``moved`` says; KFAC's where none was measured yet."""
        old, kfac, weight = state.solver, new.products, state.scales.weight
        if self.moved == "measure":
            return RunningAverage(xp.zeros_like(weight), (kfac,))
        measured = truth(xp, weight > 0)
        if self.moved == "reset" or measured is False:
            return RunningAverage(weight, (kfac,))
        moved = transport(xp, state.scales.values[0], (old.output_basis, new.output_basis), (old.input_basis, new.input_basis))
        return RunningAverage(weight, (select(xp, measured, levelled(xp, moved, new), kfac),))

    def _strength(self, xp: Namespace, value: float | Array, measured: Array) -> Array:
        """``lambda`` as an array ``[...]``, in units of the mean scale if it is relative, at least what the dtype can carry."""
        top = xp.max(measured, axis=(-2, -1))
        if self.rule.relative:
            mean = xp.mean(measured, axis=(-2, -1))
            value = scalar(xp, value, mean) * xp.where(mean > 0, mean, xp.ones_like(mean))
        return carried_array(xp, value if isinstance(value, float) else scalar(xp, value, top), top)


def levelled(xp: Namespace, scales: Array, solver: Eigenbases) -> Array:
    """``scales [..., out, in]``, each replaced by the mean over the null space of a factor where its basis vector lies in one.

    There any basis is as good as another, and libraries give different ones; with one scale for all it does not matter which. Directions
    that a factor has never seen say nothing of themselves anyhow.
    """
    for values, turned in ((solver.input_values, False), (solver.output_values, True)):
        if values is None or values.shape[-1] < 2:
            continue
        null = values <= linalg.FLOOR * xp.finfo(values.dtype).eps * xp.sum(values, axis=-1)[..., None]
        if truth(xp, xp.any(null)) is False:
            continue
        share = xp.astype(null, scales.dtype)
        share = (share / xp.maximum(xp.sum(share, axis=-1), xp.ones_like(share[..., 0]))[..., None])[..., None]
        across = scales.mT if turned else scales
        across = xp.where(null[..., None, :], across @ share, across)
        scales = across.mT if turned else across
    return scales
