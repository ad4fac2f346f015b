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
from typing import Any

import numpy

from kfcore._array import Array, Namespace, cast, device, primitive, register_kernel
from kfcore.layers import Layer

PAIRS = 6
"""Positions an example up to which products of pairs of positions are summed, instead of each example's gradient being formed."""
ROOM = 1 << 22
"""Numbers of gradients of single examples, or of patches, that are held at a time, at least those of one example."""

Use = tuple[Layer, Array, Array]
"""A layer as it was used, with its captured ``inputs [..., N, ...]`` and ``output_grads [..., K N, S, out]``."""


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
    layers = [layer for layer, _, _ in uses]
    lead, vectors, n = _examples(uses)
    inputs = [x for _, x, _ in uses]
    grads = [xp.reshape(g, (*g.shape[:lead], vectors, n, *g.shape[lead + 1 :])) for _, _, g in uses]
    if layers[0].input_kind == "ids":
        return _of_tables(xp, layers, inputs, grads, left, dtype)
    numbers = vectors * sum(_positions(layer, g) * sum(layer.shape) for layer, _, g in uses)

    def part(*arrays: Array) -> Array:
        rows = [_rows(xp, *use, dtype) for use in zip(layers, arrays[: len(uses)], arrays[len(uses) :], strict=True)]
        g, a = rows[0] if len(rows) == 1 else (xp.concat(list(side), axis=-2) for side in zip(*rows, strict=True))
        return _rotated(xp, g, a, left, right)

    axes = [lead] * len(uses) + [lead + 1] * len(uses)
    return fold(xp, part, [*inputs, *grads], axes, max(1, ROOM // max(1, numbers)))


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
    (vectors, n, s, p), q, lead = g.shape[-4:], a.shape[-1], a.shape[:-3]
    afterwards = left is not None and right is not None and s > PAIRS and s * (p * p + q * q) > p * q * (p + q)
    if not afterwards:
        g = g if left is None else g @ left[..., None, None, :, :]
        a = a if right is None else a @ right[..., None, :, :]
    if s == 1 and vectors > 1:
        # the same inputs for all vectors of an example: their squares add up first
        g = xp.sqrt(xp.sum(g * g, axis=-4))
    elif vectors > 1:
        a = xp.reshape(xp.broadcast_to(a[..., None, :, :, :], (*lead, vectors, n, s, q)), (*lead, vectors * n, s, q))
    g = xp.reshape(g, (*lead, a.shape[-3], s, p))
    return rotated_squares(xp, g, a, left, right) if afterwards else squares(xp, g, a)


def _rows(xp: Namespace, layer: Layer, inputs: Array, output_grads: Array, dtype: object) -> tuple[Array, Array]:
    """Rows ``g [..., K, N, S, out]`` and ``a [..., N, S, in]`` whose products, summed over S, are the gradients of single examples.

    They are those that make up the factors where every position counts for itself, whatever the layer does with them. ``output_grads`` are
    ``[..., K, N, S, out]``.
    """
    wide: Any = layer if getattr(layer, "sharing", "expand") == "expand" else replace(layer, sharing="expand")  # pyright: ignore
    vectors, n = output_grads.shape[-4:-2]
    a = wide.input_rows(xp, inputs, dtype)
    s = a.shape[-2] // n if n else 1
    a = xp.reshape(a, (*a.shape[:-2], n, s, a.shape[-1]))
    each = [wide.output_rows(xp, output_grads[..., k, :, :, :], dtype, inputs) for k in range(vectors)]
    each = [xp.reshape(g, (*g.shape[:-2], n, s, g.shape[-1])) for g in each]
    return xp.stack(each, axis=-4) if vectors > 1 else each[0][..., None, :, :, :], a


def _of_tables(xp: Namespace, layers: list[Layer], inputs: list[Array], grads: list[Array], left: Array | None, dtype: object) -> Array:
    """The same for tables, whose rows ``a`` are columns of the identity: what the positions of one id in an example sum to, squared.

    ``inputs`` are ids ``[..., N, S]``, ``grads`` are ``[..., K, N, S, out]``.
    """
    lead, (features, num) = inputs[0].ndim - 2, layers[0].shape
    positions, stacked = sum(ids.shape[-1] for ids in inputs), math.prod(inputs[0].shape[:-2])

    def part(*arrays: Array) -> Array:
        taken, seen = arrays[: len(layers)], arrays[len(layers) :]
        rows = [_of_table(xp, *use, dtype) for use in zip(layers, taken, seen, strict=True)]
        g, ids = (rows[0], taken[0]) if len(rows) == 1 else (xp.concat(rows, axis=-2), xp.concat(list(taken), axis=-1))
        g = g if left is None else g @ left[..., None, None, :, :]
        same = cast(xp, ids[..., :, None] == ids[..., None, :], dtype)
        # once an id, where it stands first
        first = cast(xp, xp.sum(xp.tril(same, k=-1), axis=-1) == 0, dtype)
        squared = first[..., None] * xp.sum((same[..., None, :, :, :] @ g) ** 2, axis=-4)
        n, s = ids.shape[-2:]
        flat = xp.reshape(squared, (*ids.shape[:-2], n * s, features))
        return gather_sum(xp, flat, xp.reshape(ids, (*ids.shape[:-2], n * s)), num).mT

    # each part adds a whole table, so that there is no use in parts much smaller than one
    numbers = stacked * positions * (positions + 2 * grads[0].shape[-4] * features)
    axes = [lead] * len(layers) + [lead + 1] * len(layers)
    return fold(xp, part, [*inputs, *grads], axes, max(1, max(ROOM, stacked * num * features) // max(1, numbers)))


def _of_table(xp: Namespace, layer: Layer, ids: Array, output_grads: Array, dtype: object) -> Array:
    """Output gradients ``[..., K, N, S, out]``, zero where there is none."""
    each = [layer.output_rows(xp, output_grads[..., k, :, :, :], dtype, ids) for k in range(output_grads.shape[-4])]
    return xp.stack([xp.reshape(g, output_grads[..., 0, :, :, :].shape) for g in each], axis=-4)


def _examples(uses: Sequence[Use]) -> tuple[int, int, int]:
    """Leading axes, Fisher vectors of each example, and examples, which all ``uses`` have in common."""
    lead = uses[0][2].ndim - 3
    seen = {(inputs.shape[lead], grads.shape[lead]) for _, inputs, grads in uses}
    n, rows = seen.pop()
    if seen:
        counts = ", ".join(f"{inputs.shape[lead]} and {grads.shape[lead]}" for _, inputs, grads in uses)
        raise ValueError(f"`uses` of one layer in one batch must have the same examples in `inputs` and `output_grads`, got {counts}")
    if rows % max(1, n):
        raise ValueError(f"`output_grads` must have as many examples as `inputs`, {n}, or a multiple (of Fisher vectors), got {rows}")
    return lead, (rows // n if n else 1), n


def _positions(layer: Layer, output_grads: Array) -> int:
    """Rows of an example with one Fisher vector, in all stacked layers."""
    return output_grads.shape[-2] * max(math.prod(output_grads.shape[:-3]), math.prod(layer.stack))


def _numpy_gather_sum(xp: Namespace, rows: Array, ids: Array, num: int) -> Array:
    where = numpy.where((ids >= 0) & (ids < num), ids, num)
    total = numpy.zeros((*ids.shape[:-1], num + 1, rows.shape[-1]), rows.dtype)
    for stack in numpy.ndindex(*ids.shape[:-1]):
        numpy.add.at(total[stack], where[stack], rows[stack])
    return total[..., :-1, :]


register_kernel("gather_sum", "numpy", _numpy_gather_sum)
