"""Linear algebra of symmetric positive semi-definite factors: moments, inverses, eigenproblems, Kronecker products.

Every function takes the namespace first and allows any number of leading (batch) axes. The primitives are the hot spots
that a library may override (:func:`kfcore.register_kernel`); what stands here is their definition.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import numpy

from kfcore._array import Array, Namespace, cast, device, larger, number, primitive, register_kernel

FLOOR = 10.0
"""Least damping of a factor, in machine epsilons times its trace: below it the damped factor is not definite in practice."""


def symmetrise(x: Array) -> Array:
    """Symmetric part of ``x [..., n, n]``; libraries disagree on which triangle of an asymmetric matrix counts."""
    return 0.5 * (x + x.mT)


def kron(xp: Namespace, x: Array, y: Array) -> Array:
    """Kronecker product of ``x [..., m, n]`` and ``y [..., p, q]``: ``[..., m p, n q]``, as ``numpy.kron``."""
    (m, n), (p, q) = x.shape[-2:], y.shape[-2:]
    product = x[..., :, None, :, None] * y[..., None, :, None, :]
    return xp.reshape(product, (*product.shape[:-4], m * p, n * q))


def identity(xp: Namespace, like: Array, n: int, leading: tuple[int, ...] = ()) -> Array:
    """Identity matrices ``[*leading, n, n]`` in the dtype and on the device of ``like``."""
    eye = xp.eye(n, dtype=like.dtype, device=device(like))
    return xp.broadcast_to(eye, (*leading, n, n)) + xp.zeros_like(eye) if leading else eye


def carried(xp: Namespace, damping: float | Array, size: float | Array, dtype: Any) -> float | Array:
    """``damping`` raised to what ``dtype`` can carry beside eigenvalues of ``size``, all ``[...]`` or numbers of the host."""
    info = xp.finfo(dtype)
    return larger(xp, damping, FLOOR * float(info.eps) * size + float(info.smallest_normal))


def damped(xp: Namespace, x: Array, damping: float | Array) -> Array:
    """``x + damping I`` for ``x [..., n, n]`` and ``damping [...]``, the damping raised to what the dtype can carry.

    The floor is ``10 eps tr(x)``: in exact arithmetic any positive damping makes a semi-definite factor definite, in
    floating point only one above its rounding errors does.
    """
    return shift(xp, x, carried(xp, damping, number(xp, trace(xp, x)), x.dtype))


@primitive
def trace(xp: Namespace, x: Array) -> Array:
    """Sum of the diagonal of ``x [..., n, n]``: ``[...]``."""
    return xp.linalg.trace(x)


@primitive
def gram(xp: Namespace, x: Array) -> Array:
    """Second moment ``x^T x`` of the rows of ``x [..., n, d]``: ``[..., d, d]``."""
    return x.mT @ x


@primitive
def energy(xp: Namespace, x: Array) -> Array:
    """Sum of the squares of ``x [..., n, d]``: ``[...]``, the trace of :func:`gram`."""
    return xp.sum(x * x, axis=(-2, -1))


@primitive
def blend(xp: Namespace, old: Array, new: Array, keep: Any, weight: Any, ok: bool | Array) -> Array:
    """``keep old + weight new`` where ``ok``, else ``old``; matrices ``[..., m, n]`` and the rest ``[...]``, or the rest single.

    ``new`` may hold NaN or infinities where ``ok`` is false; none of them reaches the result.
    """
    if isinstance(ok, bool):
        return keep * old + weight * new if ok else old
    if ok.ndim:
        keep, weight, ok = keep[..., None, None], weight[..., None, None], ok[..., None, None]
    return xp.where(ok, keep * old + weight * new, old)


@primitive
def absorb(xp: Namespace, old: Array, rows: Array, keep: Any, weight: Any, ok: bool | Array) -> Array:
    """:func:`blend` of ``old [..., d, d]`` with the second moment of ``rows [..., n, d]``."""
    return blend(xp, old, gram(xp, rows), keep, weight, ok)


@primitive
def total(xp: Namespace, arrays: list[Array]) -> float | Array:
    """Sum of all entries of all ``arrays``, 0-d in the dtype of the first: a float where :func:`number` gives one."""
    sums = [number(xp, xp.sum(x)) for x in arrays]
    return functools.reduce(operator.add, [s if isinstance(s, float) else cast(xp, s, arrays[0].dtype) for s in sums])


@primitive
def scale_all(xp: Namespace, arrays: list[Array], factors: list[Any]) -> list[Array]:
    """``factor x`` for each ``x`` of ``arrays`` with its factor, a float or 0-d."""
    return [factor * x for x, factor in zip(arrays, factors, strict=True)]


@primitive
def shift(xp: Namespace, x: Array, value: float | Array) -> Array:
    """``x + value I`` for ``x [..., n, n]`` and ``value [...]``, or one number for all."""
    each: Any = value
    return x + (each if isinstance(each, float) else each[..., None, None]) * xp.eye(x.shape[-1], dtype=x.dtype, device=device(x))


@primitive
def sandwich(xp: Namespace, left: Array, x: Array, right: Array) -> Array:
    """Two-sided product ``left x right``, the Kronecker product ``left (x) right^T`` applied to ``x``."""
    return left @ x @ right


@primitive
def thin_product(xp: Namespace, left: Array, right: Array) -> Array:
    """``left^T right`` of few rows ``left [..., n, p]`` and ``right [..., n, q]``: ``[..., p, q]``."""
    return left.mT @ right


@primitive
def invert(xp: Namespace, x: Array) -> tuple[Array, Array]:
    """Inverse of symmetric positive definite ``x [..., n, n]`` and whether it succeeded, ``[...]`` of booleans."""
    inverse = symmetrise(xp.linalg.inv(symmetrise(x)))
    total = xp.linalg.trace(inverse)
    return inverse, xp.isfinite(total) & (total > 0)


@primitive
def eigh(xp: Namespace, x: Array) -> tuple[Array, Array, Array]:
    """Eigenvalues ``[..., n]`` clipped at zero, eigenvectors ``[..., n, n]`` and success ``[...]`` of semi-definite ``x``.

    Ascending, ``x = (vectors * values[..., None, :]) @ vectors.mT``, as ``numpy.linalg.eigh``.
    """
    values, vectors = xp.linalg.eigh(symmetrise(x))
    return xp.maximum(values, xp.zeros_like(values)), vectors, xp.isfinite(xp.sum(values, axis=-1))


@primitive
def invert_all(xp: Namespace, matrices: list[Array]) -> list[tuple[Array, Array]]:
    """:func:`invert` of each, of any sizes."""
    return [invert(xp, x) for x in matrices]


@primitive
def eigh_all(xp: Namespace, matrices: list[Array]) -> list[tuple[Array, Array, Array]]:
    """:func:`eigh` of each, of any sizes."""
    return [eigh(xp, x) for x in matrices]


@primitive
def counts(xp: Namespace, ids: Array, num: int) -> Array:
    """How often each of ``0, ..., num - 1`` occurs in the integers ``ids [..., n]``: ``[..., num]``, int32. Others count for nothing.

    It is the diagonal of the second moment of the rows of the identity that ``ids`` name. By a sort, for want of a scatter in the standard.
    """
    flat, length = numbered(xp, ids, num)
    edges = xp.searchsorted(xp.sort(flat), xp.arange(length + 1, dtype=flat.dtype, device=device(flat)))
    return _per_row(xp, edges[1:] - edges[:-1], ids, num)


def numbered(xp: Namespace, ids: Array, num: int) -> tuple[Array, int]:
    """Every ``ids [..., n]`` as one vector of integers from 0 to ``length - 1``, and ``length``.

    ``num + 1`` of them belong to each row of ``ids``, the last to all that is outside of 0 to ``num - 1``.
    """
    rows = math.prod(ids.shape[:-1])
    length = rows * (num + 1)
    wide = xp.int32 if length < 2**31 else xp.int64
    if xp.iinfo(ids.dtype).max < num:
        ids = xp.astype(ids, wide)
    # compared as they came: what does not fit into 32 bits must not wrap around into the table
    inside = xp.astype(xp.where((ids >= 0) & (ids < num), ids, xp.full_like(ids, num)), wide)
    offsets = (num + 1) * xp.arange(rows, dtype=wide, device=device(ids))
    return xp.reshape(xp.reshape(inside, (rows, ids.shape[-1])) + offsets[:, None], (rows * ids.shape[-1],)), length


def _per_row(xp: Namespace, found: Array, ids: Array, num: int) -> Array:
    """Counts of all that :func:`numbered` numbers as ``[..., num]``."""
    found = xp.reshape(xp.astype(found, xp.int32), (math.prod(ids.shape[:-1]), num + 1))
    return xp.reshape(found[:, :num], (*ids.shape[:-1], num))


def _numpy_counts(xp: Namespace, ids: Array, num: int) -> Array:
    flat, length = numbered(xp, ids, num)
    return _per_row(xp, numpy.bincount(flat, minlength=length), ids, num)


def _numpy_eigh(xp: Namespace, x: Array) -> tuple[Array, Array, Array]:
    """Where LAPACK does not converge, which it reports by an exception, again in double precision; NaN if that fails too."""
    x = symmetrise(x)
    for dtype in (x.dtype, numpy.float64):
        try:
            values, vectors = numpy.linalg.eigh(x.astype(dtype, copy=False))
        except numpy.linalg.LinAlgError:
            continue
        values, vectors = values.astype(x.dtype, copy=False), vectors.astype(x.dtype, copy=False)
        return numpy.maximum(values, 0.0), vectors, numpy.isfinite(values.sum(axis=-1))
    return numpy.full_like(x[..., 0], numpy.nan), numpy.full_like(x, numpy.nan), numpy.zeros(x.shape[:-2], bool)


register_kernel("counts", "numpy", _numpy_counts)
register_kernel("eigh", "numpy", _numpy_eigh)
