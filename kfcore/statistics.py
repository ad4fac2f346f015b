"""Statistics of a batch, sums that merge by ``+``, and exactly bias-corrected running averages of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from kfcore._array import Array, Namespace, device, finite, number, scalar, truth
from kfcore.linalg import blend, trace

Number: TypeAlias = Any
"""A Python float or a 0-d array."""


class KroneckerStatistics(NamedTuple):
    """Sums behind the two factors of a Kronecker block. Adding two gives those of the larger batch.

    ``A = input_sum / input_count`` and ``G = output_sum / output_count``; a side that was not captured is ``None``.
    """

    input_sum: Array | None
    """Sum of ``a a^T`` over the rows, ``[..., in, in]``."""
    input_count: Number
    """Number of rows: N S for expand, N for reduce."""
    output_sum: Array | None
    """Sum of ``g g^T``, ``[..., out, out]``."""
    output_count: Number
    """Number of examples N, or what :meth:`over` put there."""

    def __add__(self, other: KroneckerStatistics) -> KroneckerStatistics:  # pyright: ignore[reportIncompatibleMethodOverride]
        return KroneckerStatistics(
            _plus(self.input_sum, other.input_sum),
            self.input_count + other.input_count,
            _plus(self.output_sum, other.output_sum),
            self.output_count + other.output_count,
        )

    def over(self, count: Number) -> KroneckerStatistics:
        """The same sums with ``output_sum`` averaged over ``count``.

        This is how a loss reduction is undone at no cost. If the captured gradients are ``g / M`` (a loss that is a mean over
        M terms) then ``over(1 / M)`` gives the mean over the terms of ``g g^T``; if they are ``g`` (a sum), ``over(M)`` does.
        """
        return KroneckerStatistics(self.input_sum, self.input_count, self.output_sum, count)

    def weighing(self, count: Number) -> KroneckerStatistics:
        """The same mean ``G`` written as a sum over ``count``, so that parts of one batch from several ranks can be added."""
        if self.output_sum is None or (isinstance(self.output_count, (int, float)) and self.output_count == 0):
            return self._replace(output_count=count)
        return self._replace(output_sum=self.output_sum * (count / self.output_count), output_count=count)


class GradientStatistics(NamedTuple):
    """Square of a batch gradient times its number of terms: the naive estimate of the diagonal of the Fisher matrix."""

    square_sum: Array
    """``M gradient^2``, of the gradient's shape."""
    count: Number
    """Number of batches merged, those without terms not counted."""

    def __add__(self, other: GradientStatistics) -> GradientStatistics:  # pyright: ignore[reportIncompatibleMethodOverride]
        return GradientStatistics(self.square_sum + other.square_sum, self.count + other.count)


class RunningAverage(NamedTuple):
    """Exponential moving averages that share one weight.

    ``weight' = decay weight + 1`` and ``value' = value + (new - value) / weight'``: the first value is the first observation,
    whatever the decay, and ``decay = 1`` is the plain mean. No start from zero or from the identity is hidden in it.
    """

    weight: Array
    """``[...]``, zero before the first observation."""
    values: tuple[Any, ...]
    """Matrices ``[..., m, n]``; ``None`` marks a value that is never observed."""


def unseen(xp: Namespace, like: Array, shapes: tuple[tuple[int, ...] | None, ...], leading: tuple[int, ...] = ()) -> RunningAverage:
    """A running average of arrays of ``shapes`` (each behind the ``leading`` axes) that has seen nothing."""

    def zeros(shape: tuple[int, ...]) -> Array:
        return xp.zeros((*leading, *shape), dtype=like.dtype, device=device(like))

    return RunningAverage(zeros(()), tuple(None if shape is None else zeros(shape) for shape in shapes))


def observe(
    xp: Namespace,
    average: RunningAverage,
    totals: tuple[Array | None, ...],
    counts: tuple[Number, ...],
    decay: float | Array,
    size: Callable[[Array], Array] | None = None,
) -> tuple[RunningAverage, bool | Array]:
    """``average`` with the means ``totals / counts`` observed, and whether they were: ``[...]`` of booleans, or a bool
    where the host knows.

    All totals are observed or none: a count of zero, a NaN or an infinity in one leaves the average as it was. They are positive
    semi-definite matrices, whose finite diagonal bounds all other entries, so that their trace is looked at instead of n^2 numbers;
    for others give ``size``, a sum of all entries.
    """
    measure: Callable[[Array], Array] = functools.partial(trace, xp) if size is None else size
    parts, positive = [], True
    for value, total, count in zip(average.values, totals, counts, strict=True):
        if value is not None:
            shares, some = _reciprocal(xp, count, value)
            parts.append((value, total, shares))
            positive = positive & some
    # where the host can read single numbers (see `number`) all that follows but the blending is its arithmetic
    spread = functools.reduce(operator.add, [number(xp, measure(total)) * shares for _, total, shares in parts])
    ok = finite(xp, spread)
    ok = truth(xp, ok if positive is True else positive & ok)
    if ok is False:
        return average, ok
    weight = number(xp, average.weight) if ok is True else average.weight
    grown = weight * decay + 1.0
    step = 1.0 / grown
    keep = 1.0 - step
    new = iter([blend(xp, value, total, keep, step * shares, ok) for value, total, shares in parts])
    values = tuple(None if v is None else next(new) for v in average.values)
    grown = scalar(xp, grown, average.weight)
    return RunningAverage(grown if ok is True else xp.where(ok, grown, average.weight), values), ok


def _reciprocal(xp: Namespace, count: Number, like: Array) -> tuple[Number, Any]:
    """``1 / count`` and whether the count is positive; on the host where the count is there."""
    if isinstance(count, (int, float)):
        return (1.0 / count, True) if count > 0 else (1.0, xp.zeros((), dtype=xp.bool, device=device(like)))
    count = scalar(xp, count, like)
    return 1.0 / xp.where(count > 0, count, xp.ones_like(count)), count > 0


def _plus(x: Array | None, y: Array | None) -> Array | None:
    return y if x is None else x if y is None else x + y
