"""What methods share that know the mean of a side's rows instead of their second moment: blocks with one direction apart from all others.

States are vectors, and nothing is ever made a matrix: the mean input ``abar`` stands for ``abar abar^T``, whose damped inverse takes two
products of a vector with the gradient (Sherman and Morrison 1950).
"""

from __future__ import annotations

import abc
import numbers
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from kfcore._array import Array, Namespace, Schedule, device, namespace, root, scalar, select, truth
from kfcore.curvature.base import count_failure
from kfcore.curvature.sides import Sided, checked_grad, checked_statistics, like_of
from kfcore.damping import Damping
from kfcore.layers import Layer
from kfcore.operators import BlockOperator
from kfcore.statistics import GradientRows, KroneckerStatistics, RunningAverage, input_mean, observe, unseen


class Deflation(NamedTuple):
    """What is applied: vectors and numbers. Before the first refresh it gives back the gradient."""

    input: Array
    """``u [..., in]``, along the mean input: of the length at which ``I - u u^T`` shrinks that direction to ``rest``."""
    output: Array | None
    """``[..., out]``, what the method makes of the output gradients."""
    rest: Array
    """What is left of the mean direction, ``[...]``, in (0, 1]."""
    scale: Array
    """What all is multiplied by, ``[...]``."""


class RankOneState(NamedTuple):
    """State of a block; every array may have leading axes that stack equal layers."""

    average: RunningAverage
    """Running averages of the mean input ``[..., in]`` and of what is taken of the output gradients ``[..., out]`` (or ``None``)."""
    solver: Deflation
    """What is applied."""
    dropped: Array
    """How many batches' statistics were not finite and therefore not observed, int32."""
    kept: Array
    """How many refreshes had no statistics yet, int32."""


@dataclass(frozen=True, kw_only=True)
class RankOne(Sided):
    """Base of the methods that keep the mean input of a layer."""

    damping: float | Schedule | Damping = 1.0
    stats_every: int | Schedule = 5
    refresh_every: int | Schedule = 5

    _of_inputs: ClassVar[Any] = staticmethod(input_mean)

    def init(self, layer: Layer, like: Array, leading: tuple[int, ...] = ()) -> RankOneState:
        """Empty averages, and vectors of zeros that change nothing."""
        xp, like = like_of(like)
        out, inp = layer.shape
        shapes = (inp,), None if self.fisher == "forward" else (out,)
        one = xp.ones(leading, dtype=like.dtype, device=device(like))
        u, v = unseen(xp, like, shapes, leading).values
        counter = xp.zeros(leading, dtype=xp.int32, device=device(like))
        return RankOneState(unseen(xp, like, shapes, leading), Deflation(u, self._unfitted(xp, v), one, one), counter, counter)

    def observe(self, state: RankOneState, statistics: KroneckerStatistics, decay: float | Array | None = None) -> RankOneState:
        """Running averages of the means of the batches, each batch weighing 1."""
        checked_statistics(state.average.values, statistics)
        xp = namespace(state.average.weight)
        sums, counts = (statistics.inputs, statistics.outputs), (statistics.input_count, statistics.output_count)
        average, ok = observe(xp, state.average, sums, counts, self._decay(decay))
        return state._replace(average=average, dropped=count_failure(xp, state.dropped, ok))

    def refresh(self, layer: Layer, state: RankOneState, damping: float | Array | None = None) -> RankOneState:
        """Take the averages as they are now: ``O(in + out)``."""
        xp, weight = namespace(state.average.weight), state.average.weight
        value = self._damping(damping)
        value = float(value) if isinstance(value, numbers.Real) else scalar(xp, value, weight)
        ok = truth(xp, weight > 0)
        solver = self._solver(xp, state.average.values, value, weight)
        # NumPy makes numbers of its own of 0-d arrays
        solver = solver._replace(rest=xp.asarray(solver.rest), scale=xp.asarray(solver.scale))
        solver = select(xp, ok, solver, state.solver)
        return state._replace(solver=solver, kept=count_failure(xp, state.kept, ok))

    def precondition(self, layer: Layer, state: RankOneState, grad: Array, rows: GradientRows | None = None) -> Array:
        """The direction, in the dtype of the averages."""
        xp, grad = checked_grad(layer, grad, state.average.weight.dtype)
        return self._applied(xp, state.solver, grad)

    def operator(self, layer: Layer, state: RankOneState, *, damped: bool = False) -> BlockOperator:
        """The matrix of the running averages; damped, that of the last refresh."""
        xp = namespace(state.average.weight)
        found = self._damped(xp, state.solver, layer) if damped else self._undamped(xp, state.average.values, layer)
        values = xp.broadcast_to(found.values, (*found.values.shape[:-2], *layer.shape))
        return BlockOperator(found.output_basis, found.input_basis, values)

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def _unfitted(self, xp: Namespace, output: Array | None) -> Array | None:
        """The vector of the output side that changes nothing, given zeros."""
        return output

    @abc.abstractmethod
    def _solver(self, xp: Namespace, means: tuple[Any, ...], damping: float | Array, like: Array) -> Deflation:
        """What is applied, of the averages and the damping, a float or ``[...]``; ``like [...]`` gives the dtype of a number."""

    @abc.abstractmethod
    def _applied(self, xp: Namespace, solver: Deflation, grad: Array) -> Array:
        """The direction of ``grad [..., out, in]``."""

    @abc.abstractmethod
    def _undamped(self, xp: Namespace, means: tuple[Any, ...], layer: Layer) -> BlockOperator:
        """The matrix of the averages; its values may have axes of length 1 where they are all the same."""

    @abc.abstractmethod
    def _damped(self, xp: Namespace, solver: Deflation, layer: Layer) -> BlockOperator:
        """The matrix whose inverse is applied, likewise."""


def strength(xp: Namespace, damping: float | Array, like: Array) -> Array:
    """The root of ``damping`` as an array in the dtype of ``like``, positive also where the damping itself is too small for that."""
    least = float(xp.finfo(like.dtype).smallest_normal)
    value = scalar(xp, root(xp, damping), like)
    return xp.maximum(value, xp.full_like(value, least))


def shares(xp: Namespace, size: Array, strong: Array) -> tuple[Array, Array]:
    """``size / sqrt(size^2 + strong^2)`` and ``strong^2 / (size^2 + strong^2)``, without overflow; ``size`` may be zero."""
    unit = xp.maximum(size, strong)
    a, b = size / unit, strong / unit
    both = a * a + b * b
    return a / xp.sqrt(both), b * b / both


def unit_vector(xp: Namespace, x: Array, size: Array) -> Array:
    """``x [..., n]`` over its length ``size [...]``, or zeros."""
    return x / xp.where(size > 0, size, xp.ones_like(size))[..., None]


def relative(xp: Namespace, rule: Damping, strong: Array, size: Array, count: float) -> Array:
    """The root of the damping that is meant, in units of the mean of ``count`` eigenvalues of which only ``size^2`` is not zero."""
    # a block that has seen only zeros has no scale of its own: there damping is absolute
    return xp.where(size > 0, strong * (size / count**0.5), strong) if rule.relative else strong


def leading_value(xp: Namespace, n: int, first: Array, others: Array) -> Array:
    """``[..., n]`` with ``first [...]`` in front and ``others [...]`` behind."""
    place = xp.arange(n, dtype=xp.int32, device=device(first))
    return xp.where(place == 0, first[..., None], others[..., None])
