"""Second moments of the gradients of single examples in a Kronecker-factored eigenbasis: the scales of EKFAC.

``S = sum_n (U_G^T G_n U_A)^2`` entry by entry, ``G_n = sum_s g_ns a_ns^T`` the gradient of example n, which sums over its positions
before anything is squared (George et al. 2018, equation 15, and for shared weights Grosse and Martens 2016).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy

from kfcore._array import Array, Namespace, cast, device, primitive, register_kernel
from kfcore.layers import Layer
from kfcore.statistics import Use

PAIRS = 6
"""Positions an example up to which products of pairs of positions are summed, instead of each example's gradient being formed."""
ROOM = 1 << 22
"""Numbers of gradients of single examples, or of patches, that are held at a time, at least those of one example."""


class _Split(NamedTuple):
    """A use with its Fisher vectors on an axis of their own."""

    layer: Layer
    inputs: Array
    output_grads: Array
    """``[..., K, N, S, out]``."""
    mask: Array | None


def scales(xp: Namespace, uses: Sequence[Use], left: Array | None, right: Array | None, dtype: object) -> Array:
    """``sum_n (left^T G_n right)^2 [..., out, in]`` over all examples and all Fisher vectors of each.

    Parameters
    ----------
    uses
        Those of a batch whose gradients add up in one example: one, or several of a layer that is called again with the same weight.
        All of them must have the same examples.
    left, right
        Bases ``[..., out, out]`` and ``[..., in, in]``; ``None`` is the identity.

    The cheapest of these routes is taken, by the sizes alone. With one position an example the squares of the rotated rows make one
    product. With up to :data:`PAIRS` of them, ``sum_st (g_s g_t)^T (a_s a_t)`` makes one of the products of all pairs. With more, the
    gradients of a few examples at a time are formed, of rotated rows or rotated afterwards, whichever takes fewer operations.
    """
    split = _split(xp, uses)
    if split[0].layer.input_kind == "ids":
        return _of_tables(xp, split, left, dtype)
    arrays, axes = _arrays(split, split[0].output_grads.ndim - 4)

    def part(*arrays: Array) -> Array:
        rows = [_rows(xp, use, dtype) for use in _given(split, arrays)]
        g, a = rows[0] if len(rows) == 1 else (xp.concat(list(side), axis=-2) for side in zip(*rows, strict=True))
        return _rotated(xp, g, a, left, right)

    return fold(xp, part, arrays, axes, max(1, ROOM // max(1, sum(_numbers(use) for use in split))))


def example_gradients(xp: Namespace, uses: Sequence[Use], dtype: object) -> Array:
    """Gradients of single examples ``[..., K, N, out, in]``, K Fisher vectors of each, summed over its positions and over ``uses``.

    They are ``K N out in`` numbers, and for a table as many one-hot rows as positions: for analysis of small batches.
    """
    total: Any = 0.0
    for use in uses:
        g, a = _rows(xp, _split(xp, [use])[0], dtype)
        total = total + g.mT @ a[..., None, :, :, :]
    return total


@primitive
def fold(xp: Namespace, function: Callable[..., Array], arrays: list[Array], axes: list[int], step: int) -> Array:
    """Sum of ``function(*parts)`` over parts of ``arrays`` along their ``axes``, of equal length, ``step`` entries at a time at most."""
    n = arrays[0].shape[axes[0]]
    if n <= step:
        return function(*arrays)
    cuts = [[(slice(None),) * a + (slice(k, min(k + step, n)), ...) for a in axes] for k in range(0, n, step)]
    parts = (function(*[x[cut] for x, cut in zip(arrays, some, strict=True)]) for some in cuts)
    return functools.reduce(operator.add, parts)


@primitive
def squares(xp: Namespace, g: Array, a: Array) -> Array:
    """``sum_b (g_b^T a_b)^2`` for ``g [..., B, S, p]`` and ``a [..., B, S, q]``: ``[..., p, q]``."""
    (s, p), q = g.shape[-2:], a.shape[-1]
    if s == 1:
        return (g[..., 0, :] ** 2).mT @ (a[..., 0, :] ** 2)
    if s <= PAIRS:
        pairs = [(i, j) for i in range(s) for j in range(i, s)]
        left = xp.concat([(1.0 if i == j else 2.0) * g[..., i, :] * g[..., j, :] for i, j in pairs], axis=-2)
        return left.mT @ xp.concat([a[..., i, :] * a[..., j, :] for i, j in pairs], axis=-2)

    def part(g: Array, a: Array) -> Array:
        return xp.sum((g.mT @ a) ** 2, axis=-3)

    return fold(xp, part, [g, a], [g.ndim - 3, a.ndim - 3], max(1, ROOM // (p * q * math.prod(g.shape[:-3]))))


@primitive
def rotated_squares(xp: Namespace, g: Array, a: Array, left: Array, right: Array) -> Array:
    """``sum_b (left^T g_b^T a_b right)^2`` for ``g [..., B, S, p]``, ``a [..., B, S, q]`` and bases: ``[..., p, q]``."""
    left, right = left[..., None, :, :].mT, right[..., None, :, :]

    def part(g: Array, a: Array) -> Array:
        return xp.sum((left @ (g.mT @ a) @ right) ** 2, axis=-3)

    numbers = left.shape[-1] * right.shape[-1] * math.prod(g.shape[:-3])
    return fold(xp, part, [g, a], [g.ndim - 3, a.ndim - 3], max(1, ROOM // numbers))


@primitive
def gather_sum(xp: Namespace, rows: Array, ids: Array, num: int) -> Array:
    """Sum of the ``rows [..., n, d]`` of each id in ``ids [..., n]``: ``[..., num, d]``. Ids outside of 0 to num - 1 count for nothing."""
    every = xp.arange(num, dtype=ids.dtype, device=device(ids))

    def part(rows: Array, ids: Array) -> Array:
        return xp.astype(ids[..., None] == every, rows.dtype).mT @ rows

    return fold(xp, part, [rows, ids], [rows.ndim - 2, ids.ndim - 1], max(1, ROOM // max(1, num)))


def _rotated(xp: Namespace, g: Array, a: Array, left: Array | None, right: Array | None) -> Array:
    """The sum over the examples at hand, of ``g [..., K, N, S, out]`` and ``a [..., N, S, in]``."""
    (vectors, n, s, p), q, lead = g.shape[-4:], a.shape[-1], g.shape[:-4]
    afterwards = left is not None and right is not None and s > PAIRS and s * (p * p + q * q) > p * q * (p + q)
    if not afterwards:
        g, a = _turned(xp, g, left), _turned(xp, a, right)
    if s == 1 and vectors > 1:
        # the same inputs for all vectors of an example: their squares add up first
        g = xp.sqrt(xp.sum(g * g, axis=-4))
    elif vectors > 1:
        a = xp.reshape(xp.broadcast_to(a[..., None, :, :, :], (*lead, vectors, n, s, q)), (*lead, vectors * n, s, q))
    g = xp.reshape(g, (*lead, a.shape[-3], s, p))
    return rotated_squares(xp, g, a, left, right) if afterwards else squares(xp, g, a)


def _turned(xp: Namespace, x: Array, basis: Array | None) -> Array:
    """All rows of ``x [..., n]`` in a basis ``[*leading, n, n]``, as one product for each stacked basis."""
    if basis is None:
        return x
    leading = basis.shape[:-2]
    rows = xp.reshape(x, (*leading, math.prod(x.shape[len(leading) : -1]), x.shape[-1]))
    return xp.reshape(rows @ basis, x.shape)


def _rows(xp: Namespace, use: _Split, dtype: object) -> tuple[Array, Array]:
    """Rows ``g [..., K, N, S, out]`` and ``a [..., N, S, in]`` whose products, summed over S, are the gradients of single examples.

    They are those that make up the factors where every position counts for itself, whatever the layer does with them.
    """
    layer: Any = use.layer
    wide = layer if getattr(layer, "sharing", "expand") == "expand" else replace(layer, sharing="expand")
    n = use.output_grads.shape[-3]
    a = wide.input_rows(xp, use.inputs, dtype, use.mask)
    a = xp.reshape(a, (*a.shape[:-2], n, a.shape[-2] // n if n else 1, a.shape[-1]))
    each = []
    for k in range(use.output_grads.shape[-4]):
        g = wide.output_rows(xp, use.output_grads[..., k, :, :, :], dtype, use.inputs, use.mask)
        each.append(xp.reshape(g, (*g.shape[:-2], *a.shape[-3:-1], g.shape[-1])))
    return xp.stack(each, axis=-4) if len(each) > 1 else each[0][..., None, :, :, :], a


def _of_tables(xp: Namespace, uses: Sequence[_Split], left: Array | None, dtype: object) -> Array:
    """The same for tables, whose rows ``a`` are columns of the identity: what the positions of one id in an example sum to, squared."""
    lead, (features, num) = uses[0].inputs.ndim - 2, uses[0].layer.shape
    positions, stacked = sum(use.inputs.shape[-1] for use in uses), math.prod(uses[0].inputs.shape[:-2])
    arrays, axes = _arrays(uses, lead)

    def part(*arrays: Array) -> Array:
        some = _given(uses, arrays)
        rows = [_of_table(xp, use, dtype) for use in some]
        g, ids = (rows[0], some[0].inputs) if len(rows) == 1 else (xp.concat(rows, axis=-2), xp.concat([u.inputs for u in some], axis=-1))
        g = _turned(xp, g, left)
        same = cast(xp, ids[..., :, None] == ids[..., None, :], dtype)
        # once an id, where it stands first
        first = cast(xp, xp.sum(xp.tril(same, k=-1), axis=-1) == 0, dtype)
        squared = first[..., None] * xp.sum((same[..., None, :, :, :] @ g) ** 2, axis=-4)
        n, s = ids.shape[-2:]
        flat = xp.reshape(squared, (*ids.shape[:-2], n * s, features))
        return gather_sum(xp, flat, xp.reshape(ids, (*ids.shape[:-2], n * s)), num).mT

    # each part adds a whole table, so that there is no use in parts much smaller than one
    numbers = stacked * positions * (positions + 2 * uses[0].output_grads.shape[-4] * features)
    return fold(xp, part, arrays, axes, max(1, max(ROOM, stacked * num * features) // max(1, numbers)))


def _of_table(xp: Namespace, use: _Split, dtype: object) -> Array:
    """Output gradients ``[..., K, N, S, out]`` of a table, zero where there is none."""
    every = range(use.output_grads.shape[-4])
    each = [use.layer.output_rows(xp, use.output_grads[..., k, :, :, :], dtype, use.inputs, use.mask) for k in every]
    return xp.stack([xp.reshape(g, use.output_grads[..., 0, :, :, :].shape) for g in each], axis=-4)


def _split(xp: Namespace, uses: Sequence[Use]) -> list[_Split]:
    """``uses`` with their Fisher vectors, of which each example has as many, on an axis of their own."""
    every: Any = uses
    lead = every[0].output_grads.ndim - 3
    seen = {(use.inputs.shape[lead], use.output_grads.shape[lead]) for use in every}
    n, rows = seen.pop()
    if seen:
        counts = ", ".join(f"{use.inputs.shape[lead]} and {use.output_grads.shape[lead]}" for use in every)
        raise ValueError(f"`uses` of one layer in one batch must have the same examples in `inputs` and `output_grads`, got {counts}")
    if rows % max(1, n):
        raise ValueError(f"`output_grads` must have as many examples as `inputs`, {n}, or a multiple (of Fisher vectors), got {rows}")
    grads = [use.output_grads for use in every]
    grads = [xp.reshape(g, (*g.shape[:lead], rows // n if n else 1, n, *g.shape[lead + 1 :])) for g in grads]
    return [_Split(use.layer, use.inputs, g, use.mask) for use, g in zip(every, grads, strict=True)]


def _arrays(uses: Sequence[_Split], lead: int) -> tuple[list[Array], list[int]]:
    """All arrays of ``uses``, and which axis of each is the examples'."""
    arrays: list[Array] = []
    axes: list[int] = []
    for use in uses:
        arrays += [use.inputs, use.output_grads] if use.mask is None else [use.inputs, use.output_grads, use.mask]
        axes += [lead, lead + 1] if use.mask is None else [lead, lead + 1, lead]
    return arrays, axes


def _given(uses: Sequence[_Split], arrays: Sequence[Array]) -> list[_Split]:
    """``uses`` with other ``arrays``, in the order of :func:`_arrays`."""
    given = iter(arrays)
    return [_Split(use.layer, next(given), next(given), None if use.mask is None else next(given)) for use in uses]


def _numbers(use: _Split) -> int:
    """Numbers in the rows of an example, with each of its Fisher vectors, in all stacked layers."""
    *lead, vectors, _, positions, _ = use.output_grads.shape
    return max(math.prod(lead), math.prod(use.layer.stack)) * vectors * positions * sum(use.layer.shape)


def _numpy_gather_sum(xp: Namespace, rows: Array, ids: Array, num: int) -> Array:
    where = numpy.where((ids >= 0) & (ids < num), ids, num)
    total = numpy.zeros((*ids.shape[:-1], num + 1, rows.shape[-1]), rows.dtype)
    for stack in numpy.ndindex(*ids.shape[:-1]):
        numpy.add.at(total[stack], where[stack], rows[stack])
    return total[..., :-1, :]


register_kernel("gather_sum", "numpy", _numpy_gather_sum)
