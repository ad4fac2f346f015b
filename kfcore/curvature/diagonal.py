"""Diagonal: the fallback for every parameter that no layer covers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from kfcore._array import Array, Namespace, cast, device, factor_dtype, is_real_floating, namespace, scalar
from kfcore.curvature.base import Cost, Method, Needs, count_failure
from kfcore.damping import check_positive
from kfcore.layers import Layer
from kfcore.layers.base import Plain
from kfcore.operators import BlockOperator
from kfcore.statistics import GradientRows, GradientStatistics, RunningAverage, observe


class DiagonalState(NamedTuple):
    """State of a diagonal block."""

    average: RunningAverage
    """Running average of the diagonal, of the parameter's shape."""
    damping: Array
    """What the last refresh was given, 0-d; 1 before the first, so that the direction is the gradient."""
    dropped: Array
    """How many batches were not finite and therefore not observed, int32."""
    kept: Array
    """How many refreshes had no statistics yet, int32."""


@dataclass(frozen=True)
class Tensor(Plain):
    """A parameter of any shape that has no layer geometry."""

    size: tuple[int, ...]

    @property
    def stack(self) -> tuple[int, ...]:
        """Nothing is stacked: the entries are independent as they are."""
        return ()

    @property
    def shape(self) -> tuple[int, int]:
        """As a matrix: one column."""
        return math.prod(self.size), 1

    def input_rows(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """Not defined: nothing is captured of such a parameter."""
        raise TypeError("a parameter outside every layer has no inputs; reduce its gradient instead")

    def output_rows(
        self, xp: Namespace, output_grads: Array, dtype: object, inputs: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Not defined either."""
        raise TypeError("a parameter outside every layer has no output gradients; reduce its gradient instead")

    def input_count(self, inputs: Array, mask: Array | None = None) -> int:
        """Nor is this."""
        raise TypeError("a parameter outside every layer has no inputs; reduce its gradient instead")

    def input_gram(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """Nor this."""
        raise TypeError("a parameter outside every layer has no inputs; reduce its gradient instead")


@dataclass(frozen=True, kw_only=True)
class Diagonal(Method):
    """Diagonal natural gradient from batch gradients: direction ``grad / (h + damping)``.

    ``h`` is the running average of ``M grad^2``, with M the terms of the mean loss: a mean of M independent pseudo-gradients has
    1/M of their mean square. It is unbiased while noise dominates the gradient, and too large (so the steps too short) where all
    examples agree; copies of an example count as independent. No entry of a direction exceeds ``1 / (2 sqrt(M damping))`` once the
    average is the current gradient.

    Parameters
    ----------
    power
        ``grad / (h + damping)^power``: 1 is the natural gradient, 1/2 an RMSprop-like rule, 0 the plain gradient.
    """

    power: float = 1.0
    name: ClassVar[str] = "diagonal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("power", self.power, zero=True)

    def requires(self, layer: Layer) -> Needs:
        """The gradient alone."""
        return Needs.GRADIENT

    def init(self, layer: Layer, like: Array, leading: tuple[int, ...] = ()) -> DiagonalState:
        """Empty average of the shape of ``like``, the parameter itself."""
        xp = namespace(like)
        dtype, where = factor_dtype(xp, like.dtype), device(like)
        value = xp.zeros(like.shape, dtype=dtype, device=where)
        weight = xp.zeros((), dtype=dtype, device=where)
        counter = xp.zeros((), dtype=xp.int32, device=where)
        return DiagonalState(RunningAverage(weight, (value,)), xp.ones((), dtype=dtype, device=where), counter, counter)

    def reduce(
        self,
        layer: Layer,
        state: DiagonalState,
        inputs: Array | None = None,
        output_grads: Array | None = None,
        *,
        mask: Array | None = None,
        grad: Array | None = None,
        terms: float | Array = 1.0,
    ) -> GradientStatistics:
        """``terms grad^2``."""
        if grad is None:
            raise ValueError("`grad` must be given: a diagonal block is reduced from the gradient of its parameter")
        xp = namespace(grad)
        if not is_real_floating(xp, grad):
            raise TypeError(f"`grad` must be real floating point, got {grad.dtype}")
        wide: Array = cast(xp, grad, state.average.weight.dtype)
        count = scalar(xp, terms, wide)
        return GradientStatistics(count * (wide * wide), cast(xp, count > 0, count.dtype))

    def observe(self, state: DiagonalState, statistics: GradientStatistics, decay: float | Array | None = None) -> DiagonalState:
        """Running average of the diagonal."""
        xp = namespace(state.average.weight)
        totals, counts = (statistics.square_sum,), (statistics.count,)
        average, ok = observe(xp, state.average, totals, counts, self._decay(decay), size=xp.sum)
        return state._replace(average=average, dropped=count_failure(xp, state.dropped, ok))

    def refresh(self, layer: Layer, state: DiagonalState, damping: float | Array | None = None) -> DiagonalState:
        """Take the damping; in units of the mean of the diagonal where it is relative."""
        xp = namespace(state.average.weight)
        (h,) = state.average.values
        value = scalar(xp, self._damping(damping), state.average.weight)
        if self.rule.relative:
            mean = xp.mean(h)
            value = xp.where(mean > 0, value * mean, value)
        ok = state.average.weight > 0
        return state._replace(damping=xp.where(ok, value, state.damping), kept=count_failure(xp, state.kept, ok))

    def precondition(self, layer: Layer, state: DiagonalState, grad: Array, rows: GradientRows | None = None) -> Array:
        """``grad / (h + damping)^power``, in the dtype of the state."""
        xp = namespace(grad)
        (h,) = state.average.values
        if tuple(grad.shape) != tuple(h.shape):
            raise ValueError(f"`grad` must have shape {tuple(h.shape)}, got {tuple(grad.shape)}")
        grad = cast(xp, grad, h.dtype)
        scale = h + state.damping
        return grad / (scale if self.power == 1 else scale**self.power)

    def operator(self, layer: Layer, state: DiagonalState, *, damped: bool = False) -> BlockOperator:
        """``diag(h)``; damped, ``diag((h + damping)^power)``."""
        xp = namespace(state.average.weight)
        (h,) = state.average.values
        h = (h + state.damping) ** self.power if damped else h
        return BlockOperator(None, None, xp.reshape(h, layer.shape))

    def cost(self, layer: Layer, itemsize: int = 4) -> Cost:
        """One number an entry, and a handful beside."""
        size = layer.shape[0]
        return Cost(itemsize * (size + 2) + 8, 0.0, 1.0, 3.0 * size)
