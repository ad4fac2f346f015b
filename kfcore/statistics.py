"""Statistics of a batch, sums that merge by ``+``, and exactly bias-corrected running averages of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from kfcore._array import Array, Namespace, cast, device, finite, namespace, number, own, scalar, truth
from kfcore.layers import Layer
from kfcore.layers.base import live_count
from kfcore.linalg import absorb, blend, energy, gram, trace

Number: TypeAlias = Any
"""A Python float or a 0-d array."""


class Moment(NamedTuple):
    """A sum of outer products of rows with themselves, ``matrix + rows^T rows``. Adding two gives that of all rows.

    Rows that are fewer than their features are kept as they are: they are smaller than their moment, enter an average in one product,
    and those of a step also give its gradient as a product of two thin matrices (:class:`GradientRows`).
    """

    matrix: Array | None
    """``[..., d, d]``, or ``None`` for zero."""
    rows: Array | None = None
    """``[..., n, d]``, or ``None`` for zero."""

    @classmethod
    def of(cls, xp: Namespace, rows: Array, source: Array) -> Moment:
        """That of ``rows [..., n, d]``, which were made from ``source`` and may share its memory; the moment does not."""
        return cls(None, own(xp, rows, source)) if rows.shape[-2] <= rows.shape[-1] else cls(gram(xp, rows))

    def __add__(self, other: Moment) -> Moment:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = [rows for rows in (self.rows, other.rows) if rows is not None]
        matrix = _plus(self.matrix, other.matrix)
        if len(parts) < 2 or sum(rows.shape[-2] for rows in parts) <= parts[0].shape[-1]:
            rows = namespace(*parts).concat(parts, axis=-2) if len(parts) == 2 else parts[0] if parts else None
            return Moment(matrix, rows)
        return Moment(functools.reduce(_plus, [gram(namespace(rows), rows) for rows in parts], matrix))

    def whole(self) -> Array:
        """The sum as one matrix ``[..., d, d]``."""
        return _plus(self.matrix, None if self.rows is None else gram(namespace(self.rows), self.rows))

    def mapped(self, function: Callable[[Array], Array]) -> Moment:
        """The moment with a linear ``function`` of its matrix."""
        return Moment(function(self.whole()))

    def trace(self, xp: Namespace) -> Array:
        """Trace of the sum, ``[...]``."""
        if self.matrix is None:
            return energy(xp, self.rows)
        return trace(xp, self.matrix) if self.rows is None else trace(xp, self.matrix) + energy(xp, self.rows)

    def into(self, xp: Namespace, old: Array, keep: Any, weight: Any, ok: bool | Array) -> Array:
        """``keep old + weight sum`` where ``ok``, else ``old``, as :func:`kfcore.linalg.blend`."""
        if self.matrix is None:
            return absorb(xp, old, self.rows, keep, weight, ok)
        return blend(xp, old, self.whole(), keep, weight, ok)


class DiagonalMoment(NamedTuple):
    """The diagonal of a sum of outer products alone: sums of the squares of rows, feature by feature. Adding two gives that of all rows."""

    values: Array
    """``[..., d]``."""

    def __add__(self, other: DiagonalMoment) -> DiagonalMoment:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.mapped(lambda values: values + other.values)

    def whole(self) -> Array:
        """The diagonal, ``[..., d]``."""
        return self.values

    def mapped(self, function: Callable[[Array], Array]) -> DiagonalMoment:
        """The moment with a linear ``function`` of its diagonal."""
        return type(self)(function(self.values))

    def trace(self, xp: Namespace) -> Array:
        """Trace of the sum, ``[...]``."""
        return xp.sum(self.values, axis=-1)

    def into(self, xp: Namespace, old: Array, keep: Any, weight: Any, ok: bool | Array) -> Array:
        """``keep old + weight sum`` where ``ok``, else ``old``, as :func:`kfcore.linalg.blend`."""
        return blend(xp, old[..., None], self.values[..., None], keep, weight, ok)[..., 0]


class RowSum(DiagonalMoment):
    """A sum of rows ``[..., d]``, the first moment. Adding two gives that of all rows.

    What it is divided by differs from that of second moments, see :meth:`KroneckerStatistics.over`.
    """


class Use(NamedTuple):
    """What was captured of one use of a layer in a batch."""

    layer: Layer
    """As it was used there."""
    inputs: Array | None
    """``[..., N, S, in]``, or what else the layer says."""
    output_grads: Array | None
    """``[..., K N, S, out]``, K Fisher vectors an example."""
    mask: Array | None = None
    """``[..., N, S]``, true at real positions."""


def input_moment(
    xp: Namespace, layer: Layer, inputs: Array, dtype: object, mask: Array | None = None
) -> tuple[Moment | DiagonalMoment, Number]:
    """Second moment of the input rows of ``layer``, in the form of its factor, and their number, those that are masked not counted."""
    rows = _row_count(xp, layer, inputs, dtype, mask)
    if layer.forms[1] == "diagonal":
        return DiagonalMoment(layer.input_gram(xp, inputs, dtype, mask)), rows
    # masked rows are zero: they are held like the others, and pair with the zero rows of the other side
    held = layer.input_count(inputs)
    if isinstance(held, int) and held <= layer.shape[1]:
        return Moment.of(xp, layer.input_rows(xp, inputs, dtype, mask), inputs), rows
    return Moment(layer.input_gram(xp, inputs, dtype, mask)), rows


def input_mean(xp: Namespace, layer: Layer, inputs: Array, dtype: object, mask: Array | None = None) -> tuple[RowSum, Number]:
    """Sum of the input rows of ``layer``, and their number, those that are masked not counted."""
    return RowSum(layer.input_sum(xp, inputs, dtype, mask)), _row_count(xp, layer, inputs, dtype, mask)


def _row_count(xp: Namespace, layer: Layer, inputs: Array, dtype: object, mask: Array | None) -> Number:
    count = layer.input_count(inputs, mask)
    return float(count) if isinstance(count, int) else number(xp, cast(xp, count, dtype))


def output_moment(
    xp: Namespace, layer: Layer, output_grads: Array, dtype: object, inputs: Array | None, mask: Array | None = None
) -> tuple[Moment | DiagonalMoment, Number]:
    """Second moment of the output rows of ``layer``, in the form of its factor, and the number of examples that have a position.

    ``output_grads`` may have several Fisher vectors of each example behind each other, ``[..., K N, S, out]``.

    Raises
    ------
    ValueError
        If the layer makes these rows of the inputs too, and they are not given.
    """
    rows, examples = _output_rows(xp, layer, output_grads, dtype, inputs, mask)
    if layer.forms[0] == "diagonal":
        return DiagonalMoment(xp.sum(rows * rows, axis=-2)), examples
    return Moment.of(xp, rows, output_grads), examples


def output_squares(
    xp: Namespace, layer: Layer, output_grads: Array, dtype: object, inputs: Array | None, mask: Array | None = None
) -> tuple[DiagonalMoment, Number]:
    """The diagonal of :func:`output_moment`, whatever the form of the factor."""
    rows, examples = _output_rows(xp, layer, output_grads, dtype, inputs, mask)
    return DiagonalMoment(xp.sum(rows * rows, axis=-2)), examples


def output_mean(
    xp: Namespace, layer: Layer, output_grads: Array, dtype: object, inputs: Array | None, mask: Array | None = None
) -> tuple[RowSum, Number]:
    """Sum of the output rows of ``layer``, and the number of examples, as :func:`output_moment`."""
    rows, examples = _output_rows(xp, layer, output_grads, dtype, inputs, mask)
    return RowSum(xp.sum(rows, axis=-2)), examples


def _output_rows(
    xp: Namespace, layer: Layer, output_grads: Array, dtype: object, inputs: Array | None, mask: Array | None
) -> tuple[Array, Number]:
    if layer.together and inputs is None:
        raise ValueError(
            f"`inputs` must be given with `output_grads` in one call: {type(layer).__name__} makes its output factor of both, got None"
        )
    axis = output_grads.ndim - 3
    if mask is not None and inputs is not None:
        mask = tiled(xp, mask, output_grads.shape[axis], axis)
    if layer.together and inputs is not None:
        inputs = tiled(xp, inputs, output_grads.shape[axis], axis)
    rows = layer.output_rows(xp, output_grads, dtype, inputs, mask)
    return rows, float(output_grads.shape[-3]) if mask is None else number(xp, cast(xp, live_count(mask, "reduce"), dtype))


def tiled(xp: Namespace, x: Array, n: int, axis: int) -> Array:
    """``x`` of some examples, along ``axis``, once for each of their Fisher vectors, of which there are ``n`` in all."""
    vectors = n // max(1, x.shape[axis])
    return xp.concat([x] * vectors, axis=axis) if vectors > 1 else x


class KroneckerStatistics(NamedTuple):
    """Sums behind the two sides of a block, of outer products or, as :class:`RowSum`, of rows. Adding two gives those of the larger batch.

    ``A = input_sum / input_count`` and ``G = output_sum / output_count``; a side that was not captured is ``None``.
    """

    inputs: Moment | DiagonalMoment | None
    """Sum of ``a a^T`` over the rows, or of the rows ``a``."""
    input_count: Number
    """Number of rows: N S for expand (without what is padding or masked), N for reduce. It may be ``[...]``, one a stacked layer."""
    outputs: Moment | DiagonalMoment | None
    """Sum of ``g g^T``, of its diagonal, or of the rows ``g``."""
    output_count: Number
    """Number of examples N, or what :meth:`over` put there."""
    scales: Array | None = None
    """Sum of squares of the gradients of single examples in a basis, ``[..., out, in]``, if the method wants it."""
    scale_count: Number = 0.0
    """What it is divided by: a number of examples, or what :meth:`over` put there."""

    @property
    def input_sum(self) -> Array | None:
        """``[..., in, in]``, or the diagonal (or sum of rows) ``[..., in]``."""
        return None if self.inputs is None else self.inputs.whole()

    @property
    def output_sum(self) -> Array | None:
        """``[..., out, out]``, or the diagonal (or sum of rows) ``[..., out]``."""
        return None if self.outputs is None else self.outputs.whole()

    def __add__(self, other: KroneckerStatistics) -> KroneckerStatistics:  # pyright: ignore[reportIncompatibleMethodOverride]
        return KroneckerStatistics(
            _plus(self.inputs, other.inputs),
            self.input_count + other.input_count,
            _plus(self.outputs, other.outputs),
            self.output_count + other.output_count,
            _plus(self.scales, other.scales),
            self.scale_count + other.scale_count,
        )

    def over(self, count: Number, terms: Number | None = None) -> KroneckerStatistics:
        """The same sums with ``output_sum`` and ``scales`` averaged over ``count``.

        This is how a loss reduction is undone at no cost. If the captured gradients are ``g / M`` (a loss that is a mean over
        M terms) then ``over(1 / M)`` gives the mean over the terms of ``g g^T``; if they are ``g`` (a sum), ``over(M)`` does.

        A sum of rows is of first order in the gradients, and its mean over the terms is ``output_sum / sqrt(count M)``, for either: there
        ``terms``, M, must be given.
        """
        if isinstance(self.outputs, RowSum):
            if terms is None:
                raise ValueError("`terms` must be given for sums of output gradients, got None")
            return self._replace(output_count=_root(self.outputs.values, count * terms))
        return self._replace(output_count=count, scale_count=0.0 if self.scales is None else count)

    def weighing(self, share: Number) -> KroneckerStatistics:
        """The same statistics with ``output_sum`` and ``scales`` times ``share``; a sum of rows times its root."""
        if self.outputs is None:
            return self
        of_outputs = _root(self.outputs.values, share) if isinstance(self.outputs, RowSum) else share
        measured = None if self.scales is None else self.scales * share
        return self._replace(outputs=self.outputs.mapped(lambda whole: whole * of_outputs), scales=measured)

    def across(self, total: Callable[[Any], Any]) -> KroneckerStatistics:
        """Sums over the ranks of a batch that is spread over them: ``total`` sums an array or a number."""
        inputs, outputs = (None if side is None else side.mapped(total) for side in (self.inputs, self.outputs))
        measured = None if self.scales is None else total(self.scales)
        return KroneckerStatistics(
            inputs,
            total(self.input_count),
            outputs,
            total(self.output_count),
            measured,
            total(self.scale_count) if self.scales is not None else 0.0,
        )


class GradientRows(NamedTuple):
    """A gradient as a product of the rows that were captured of the same step, ``scale output_grads^T inputs``."""

    output_grads: Array
    """``[..., n, out]``."""
    inputs: Array
    """``[..., n, in]``, with the 1 of a joint bias."""
    scale: Number = 1.0
    known: bool = False
    """Whether it is known to be the gradient; otherwise that is found out by :func:`spans`, where the host can read the answer."""


def rows_of(statistics: KroneckerStatistics, scale: Number) -> GradientRows | None:
    """The rows in statistics of one step, if all are there and each side's belong to the other's."""
    a, g = statistics.inputs, statistics.outputs
    if not isinstance(a, Moment) or not isinstance(g, Moment):
        return None
    if a.rows is None or g.rows is None or a.matrix is not None or g.matrix is not None:
        return None
    return GradientRows(g.rows, a.rows, scale) if a.rows.shape[:-1] == g.rows.shape[:-1] else None


def spans(xp: Namespace, rows: GradientRows, grad: Array) -> bool | Array:
    """Whether ``grad [..., out, in]`` is the product of ``rows`` to within the rounding errors of that product.

    Both are multiplied with a fixed vector and compared entry by entry (Freivalds 1979), which reads the gradient once: a
    regulariser's gradient, a clipped one, one summed over ranks or with rows that were not captured is told apart unless it differs by
    less than about ten roundings. A bool where the host can read it.
    """
    n = rows.inputs.shape[-2]
    k = xp.arange(1, grad.shape[-1] + 1, dtype=grad.dtype, device=device(grad))
    # of size 1 to 2, so that no entry is overlooked, with signs and sizes that no structure of the gradient is likely to share
    size = 0.61803398875 * k
    size = 1.0 + size - xp.floor(size)
    probe = xp.where(xp.cos(1.41421356237 * k * k / grad.shape[-1]) > 0, size, -size)[:, None]
    apart = grad @ probe - rows.scale * (rows.output_grads.mT @ (rows.inputs @ probe))
    spread = (rows.output_grads**2).mT @ (rows.inputs**2 @ probe**2)
    bound = (rows.scale * 8.0 * xp.finfo(grad.dtype).eps) ** 2 * n * spread
    return truth(xp, xp.all((apart**2 <= bound) & xp.isfinite(bound)))


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
    """Factors ``[..., n, n]`` or ``[..., n]``, or other arrays; ``None`` marks a value that is never observed."""


def unseen(xp: Namespace, like: Array, shapes: tuple[tuple[int, ...] | None, ...], leading: tuple[int, ...] = ()) -> RunningAverage:
    """A running average of arrays of ``shapes`` (each behind the ``leading`` axes) that has seen nothing."""

    def zeros(shape: tuple[int, ...]) -> Array:
        return xp.zeros((*leading, *shape), dtype=like.dtype, device=device(like))

    return RunningAverage(zeros(()), tuple(None if shape is None else zeros(shape) for shape in shapes))


def observe(
    xp: Namespace,
    average: RunningAverage,
    totals: tuple[Array | Moment | DiagonalMoment | None, ...],
    counts: tuple[Number, ...],
    decay: float | Array,
    size: Callable[[Array], Array] | None = None,
    valid: bool | Array = True,
) -> tuple[RunningAverage, bool | Array]:
    """``average`` with the means ``totals / counts`` observed, and whether they were: ``[...]`` of booleans, or a bool
    where the host knows.

    All totals are observed or none: a count of zero, a NaN or an infinity in one leaves the average as it was. Moments are positive
    semi-definite, and a finite trace bounds all their entries, so that it is looked at instead of n^2 numbers; for arrays of another
    kind give ``size``, a sum of all entries. Where not ``valid [...]`` nothing is observed either.
    """
    measure: Callable[[Any], Array] = (lambda total: total.trace(xp)) if size is None else size
    parts, positive = [], True
    for value, total, count in zip(average.values, totals, counts, strict=True):
        if value is not None:
            shares, some = _reciprocal(xp, count, value)
            parts.append((value, total, shares))
            positive = positive & some
    # where the host can read single numbers (see `number`) all that follows but the blending is its arithmetic
    spread = functools.reduce(operator.add, [number(xp, measure(total)) * shares for _, total, shares in parts])
    ok = finite(xp, spread)
    ok = ok if positive is True else positive & ok
    ok = truth(xp, ok if valid is True else valid & ok)
    if ok is False:
        return average, ok
    weight = number(xp, average.weight) if ok is True else average.weight
    grown = weight * decay + 1.0
    step = 1.0 / grown
    keep = 1.0 - step
    new = iter([_blend(xp, value, total, keep, step * shares, ok) for value, total, shares in parts])
    values = tuple(None if v is None else next(new) for v in average.values)
    grown = scalar(xp, grown, average.weight)
    return RunningAverage(grown if ok is True else xp.where(ok, grown, average.weight), values), ok


def _blend(xp: Namespace, old: Array, total: Array | Moment | DiagonalMoment, keep: Any, weight: Any, ok: bool | Array) -> Array:
    """``keep old + weight total`` where ``ok``, else ``old``."""
    if isinstance(total, Moment | DiagonalMoment):
        return total.into(xp, old, keep, weight, ok)
    return blend(xp, old, total, keep, weight, ok)


def _reciprocal(xp: Namespace, count: Number, like: Array) -> tuple[Number, Any]:
    """``1 / count`` and whether the count is positive; on the host where the count is there."""
    if isinstance(count, (int, float)):
        return (1.0 / count, True) if count > 0 else (1.0, xp.zeros((), dtype=xp.bool, device=device(like)))
    count = scalar(xp, count, like)
    return 1.0 / xp.where(count > 0, count, xp.ones_like(count)), count > 0


def _root(like: Array, value: Number) -> Number:
    """Square root of a Python number or a 0-d array, which may be an integer."""
    if isinstance(value, (int, float)):
        return float(value) ** 0.5
    xp = namespace(like)
    return xp.sqrt(scalar(xp, value, like))


def _plus(x: Any, y: Any) -> Any:
    """Sum of two, of which ``None`` is zero."""
    return y if x is None else x if y is None else x + y
