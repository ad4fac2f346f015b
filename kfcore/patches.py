"""Patches of arrays with spatial axes: what a convolution multiplies its kernel with, and the second moment of that.

Arrays have their channels last, ``[..., *spatial, channels]``, and any leading axes. A patch holds, for every offset of the kernel,
the channels of the position there, so that a patch matrix has ``offsets x channels`` columns in this order: copies then move whole
runs of channels. One strided slice for each offset of the kernel makes it, in every library (dilation and stride included).

The patch matrix is ``offsets / stride`` times as large as the array it is taken from. :func:`patch_moments` therefore goes through a
batch by groups of examples, and through an example by slabs of outputs, and never holds more than :func:`room` allows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy

from kfcore._array import Array, Namespace, cast, device, primitive, register_kernel
from kfcore.linalg import gram

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES: tuple[PaddingMode, ...] = ("zeros", "reflect", "replicate", "circular")

ROOM = 1 << 20
"""Patch matrices up to this many numbers (4 MiB in float32) are always made in one piece."""


@dataclass(frozen=True)
class Window:
    """How a kernel passes over an array, one entry a spatial axis; paddings are numbers of positions before and after.

    Negative zero-padding takes positions away. ``input_dilation`` d puts d - 1 zeros between neighbouring positions of the input,
    before the padding.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: PaddingMode = "zeros"
    input_dilation: tuple[int, ...] = ()

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def reach(self) -> tuple[int, ...]:
        """Positions from the first to the last that an output sees, ``dilation (kernel - 1) + 1``."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def offsets(self) -> Iterator[tuple[int, ...]]:
        """Positions of the kernel's entries, the last axis running fastest."""
        return itertools.product(*(range(0, k * d, d) for k, d in zip(self.kernel, self.dilation, strict=True)))

    def outputs(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the output for an input of this size; not positive where the kernel does not fit."""
        sizes = [n if not self.input_dilation else (n - 1) * self.input_dilation[i] + 1 for i, n in enumerate(spatial)]
        padded = [n + low + high for n, (low, high) in zip(sizes, self.padding, strict=True)]
        return tuple((n - r) // s + 1 for n, r, s in zip(padded, self.reach, self.stride, strict=True))


ALL = slice(None)


def prepared(xp: Namespace, x: Array, window: Window, axes: slice = ALL) -> Array:
    """``x [..., *spatial, C]`` with the zeros between its positions and the padding around them that ``window`` asks for.

    Along all its spatial axes or along some, for padding copies an array once for every axis.
    """
    for i in range(window.axes)[axes]:
        axis = x.ndim - 1 - window.axes + i
        if window.input_dilation and window.input_dilation[i] > 1:
            x = _spaced(xp, x, axis, window.input_dilation[i])
        x = _padded(xp, x, axis, *window.padding[i], window.mode)
    return x


@primitive
def patches(xp: Namespace, x: Array, window: Window) -> Array:
    """Patches ``[..., *outputs, K, C]`` of a prepared ``x [..., *spatial, C]``; K offsets of the kernel, the last axis fastest."""
    return xp.stack(list(_slices(x, window)), axis=-2)


def patch_means(xp: Namespace, x: Array, window: Window, dtype: object) -> Array:
    """Mean patch ``[..., N, K, C]`` over the outputs of ``x [..., N, *spatial, C]``, not yet prepared, in ``dtype``.

    No patch is made: one spatial axis after the other is averaged, once for every offset along it.
    """
    step = max(1, room(x) // max(1, math.prod(x.shape) // max(1, x.shape[-2 - window.axes])))
    means = []
    for part in _examples(x, window, step):
        part = prepared(xp, cast(xp, part, dtype), window)
        for i, (k, d, s) in enumerate(zip(window.kernel, window.dilation, window.stride, strict=True)):
            axis = part.ndim - 1 - window.axes + i
            last = (part.shape[axis] - window.reach[i]) // s * s + 1
            part = xp.stack([xp.mean(_cut(part, axis, o, o + last, s), axis=axis) for o in range(0, k * d, d)], axis=axis)
        means.append(xp.reshape(part, (*part.shape[: -1 - window.axes], math.prod(window.kernel), part.shape[-1])))
    return means[0] if len(means) == 1 else xp.concat(means, axis=-3)


@primitive
def patch_moments(xp: Namespace, x: Array, window: Window, groups: int, dtype: object) -> tuple[Array, Array]:
    """Sums over examples and outputs of ``p p^T [..., groups, K c, K c]`` and of ``p [..., groups, K c]``, for all patches p.

    ``x`` is ``[..., N, *spatial, C]`` and not yet prepared, ``c = C / groups``; sums are taken in ``dtype``.
    """
    parts = _partial_moments(xp, x, window, groups, dtype)
    moment, first = next(parts)
    for more, mean in parts:
        moment, first = moment + more, first + mean
    return moment, first


def patch_rows(xp: Namespace, x: Array, window: Window, groups: int) -> Array:
    """All patches of ``x [..., N, *spatial, C]`` as rows ``[..., groups, N S, K c]``."""
    return _rows(xp, prepared(xp, x, window), window, groups)


def room(x: Array) -> int:
    """How many numbers made of ``x`` are held at a time: half of those of ``x``, or :data:`ROOM` if that is more."""
    return max(ROOM, math.prod(x.shape) // 2)


def at_once(x: Array, window: Window) -> int:
    """How many examples of ``x [..., N, *spatial, C]`` have patches that fit into :func:`room`, at least one."""
    return max(1, min(x.shape[-2 - window.axes], room(x) // max(1, _numbers(x, window))))


def _examples(x: Array, window: Window, step: int) -> Iterator[Array]:
    """``x [..., N, *spatial, C]`` by ``step`` examples at a time; what has none is one part."""
    axis = x.ndim - 2 - window.axes
    for start in range(0, max(x.shape[axis], 1), step):
        yield x if step >= x.shape[axis] else _cut(x, axis, start, min(start + step, x.shape[axis]))


def _numbers(x: Array, window: Window) -> int:
    """Numbers in the patches of one example of ``x [..., N, *spatial, C]``, in all stacked layers."""
    leading, spatial = x.shape[: -2 - window.axes], x.shape[-1 - window.axes : -1]
    return math.prod((*leading, *window.outputs(spatial), *window.kernel, x.shape[-1]))


def _partial_moments(xp: Namespace, x: Array, window: Window, groups: int, dtype: object) -> Iterator[tuple[Array, Array]]:
    """The sums of :func:`patch_moments` over some of the patches at a time, which are gone before the next are made."""
    space, step = room(x), at_once(x, window)
    height = window.outputs(x.shape[-1 - window.axes : -1])[0]
    # where the patches of a single example do not fit, it is cut into slabs along its first spatial axis
    rows = max(1, min(height, space * height // max(1, _numbers(x, window)))) if step == 1 else height
    for part in _examples(x, window, step):
        part = prepared(xp, cast(xp, part, dtype), window, slice(1))
        for top in range(0, height, rows):
            first, last = top * window.stride[0], (min(top + rows, height) - 1) * window.stride[0] + window.reach[0]
            slab = part if rows == height else _cut(part, part.ndim - 1 - window.axes, first, last)
            yield _moments(xp, _rows(xp, _contiguous(xp, prepared(xp, slab, window, slice(1, None))), window, groups))


def _rows(xp: Namespace, x: Array, window: Window, groups: int) -> Array:
    """Patches of a prepared ``x [..., n, *spatial, C]`` as rows ``[..., groups, n S, K c]``."""
    found = patches(xp, x, window)
    leading, (offsets, channels) = x.shape[: -2 - window.axes], found.shape[-2:]
    count, width = math.prod(found.shape[len(leading) : -2]), channels // groups
    if groups > 1:
        found = xp.reshape(found, (*leading, count, offsets, groups, width))
        k = len(leading)
        found = xp.permute_dims(found, (*range(k), k + 2, k, k + 1, k + 3))
    return xp.reshape(found, (*leading, groups, count, offsets * width))


def _moments(xp: Namespace, rows: Array) -> tuple[Array, Array]:
    """Sums of ``p p^T`` and of ``p`` over the rows p."""
    return gram(xp, rows), xp.sum(rows, axis=-2)


def _contiguous(xp: Namespace, x: Array) -> Array:
    """``x`` with its last axis running fastest in memory: slices of a view of channels-first data are slow to copy again and again."""
    return xp.reshape(xp.reshape(x, (math.prod(x.shape),)), x.shape)


def _slices(x: Array, window: Window) -> Iterator[Array]:
    """For each offset of the kernel the positions ``[..., *outputs, C]`` of a prepared ``x`` that it meets."""
    spatial = x.shape[-1 - window.axes : -1]
    counts = [(n - r) // s + 1 for n, r, s in zip(spatial, window.reach, window.stride, strict=True)]
    for offset in window.offsets:
        cut = (slice(o, o + (n - 1) * s + 1, s) for o, n, s in zip(offset, counts, window.stride, strict=True))
        yield x[(..., *cut, slice(None))]


def _spaced(xp: Namespace, x: Array, axis: int, factor: int) -> Array:
    """``x`` with ``factor - 1`` zeros between neighbours along an axis."""
    n, before, after = x.shape[axis], x.shape[:axis], x.shape[axis + 1 :]
    zeros = xp.zeros((*before, n, factor - 1, *after), dtype=x.dtype, device=device(x))
    wide = xp.concat([xp.reshape(x, (*before, n, 1, *after)), zeros], axis=axis + 1)
    return _cut(xp.reshape(wide, (*before, n * factor, *after)), axis, 0, n * factor - factor + 1)


def _padded(xp: Namespace, x: Array, axis: int, low: int, high: int, mode: PaddingMode) -> Array:
    """``x`` with positions added along an axis, or taken away where negative."""
    n = x.shape[axis]
    if low < 0 or high < 0:
        # what is taken away may reach into what is added at the other side, where it is more than there is
        x = _padded(xp, x, axis, max(0, low), max(0, high), mode)
        return _cut(x, axis, max(0, -low), x.shape[axis] - max(0, -high))
    if not low and not high:
        return x
    if mode == "zeros":
        sides = [xp.zeros((*x.shape[:axis], k, *x.shape[axis + 1 :]), dtype=x.dtype, device=device(x)) for k in (low, high)]
        return xp.concat([sides[0], x, sides[1]], axis=axis)
    places = [_source(i, n, mode) for i in range(-low, n + high)]
    return xp.take(x, xp.asarray(places, dtype=xp.int32, device=device(x)), axis=axis)


def _source(i: int, n: int, mode: PaddingMode) -> int:
    """Which of n positions the padding repeats at position i, which may lie outside."""
    if mode == "circular":
        return i % n
    if mode == "replicate":
        return min(max(i, 0), n - 1)
    return abs(i) if i < n else 2 * (n - 1) - i


def _cut(x: Array, axis: int, start: int, stop: int, step: int = 1) -> Array:
    return x[(slice(None),) * axis + (slice(start, stop, step), ...)]


def _numpy_patches(xp: Namespace, x: numpy.ndarray, window: Window) -> numpy.ndarray:
    """In one copy of a view, which moves whole rows of the kernel at once."""
    lead = x.ndim - 1 - window.axes
    view = numpy.lib.stride_tricks.sliding_window_view(x, window.reach, axis=tuple(range(lead, lead + window.axes)))
    steps, spreads = ([slice(None, None, n) for n in sizes] for sizes in (window.stride, window.dilation))
    view = numpy.moveaxis(view[(slice(None),) * lead + (*steps, slice(None), *spreads)], lead + window.axes, -1)
    return view.reshape(*view.shape[: lead + window.axes], math.prod(window.kernel), x.shape[-1])


register_kernel("patches", "numpy", _numpy_patches)
