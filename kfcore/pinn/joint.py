"""Inverses of sums of Kronecker products: of one by its eigenbases, of two by simultaneous diagonalisation, of more by merging them.

A block with factors ``A [in, in]`` (inputs) and ``B [out, out]`` (output gradients) takes a gradient ``X [out, in]`` to ``B X A``. What is
factorised is given and returned in lists, one entry a layer, so that a library may do equal sizes together; leading axes are allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from kfcore._array import Array, Namespace, choose, device, number, root, scalar
from kfcore.linalg import eigh_all, sandwich, symmetrise, trace

Pair: TypeAlias = tuple[Array, Array]
"""``(A, B)``."""
Kind: TypeAlias = Literal["plain", "factored", "exact"]
TURNS = 24
"""Of the power iteration in :func:`nearest`."""
ITERATIONS = 12
"""Of the conjugate gradients in :func:`solve`."""


class Joint(NamedTuple):
    """The linear map ``X -> left ((left^T X right) / scale) right^T``, symmetric and positive definite whatever the rounding errors."""

    left: Array
    """``[..., out, out]``."""
    right: Array
    """``[..., in, in]``."""
    scale: Array
    """``[..., out, in]``, positive."""


def apply(xp: Namespace, joint: Joint, x: Array) -> Array:
    """The map of ``x [..., out, in]``."""
    inner = sandwich(xp, joint.left.mT, x, joint.right) / joint.scale
    return sandwich(xp, joint.left, inner, joint.right.mT)


def invert(xp: Namespace, layers: Sequence[Sequence[Pair]], damping: Array, kind: Kind) -> tuple[list[Joint], list[Array]]:
    """Inverses of ``sum_t B_t X A_t``, damped, for one or two terms; and by layer whether all factorisations succeeded, ``[...]``.

    Parameters
    ----------
    layers
        By layer one or two pairs of factors, the same number everywhere.
    damping
        ``lambda``, 0-d.
    kind
        ``"plain"``: ``lambda`` on each factor. ``"factored"``: ``lambda / terms`` on each product, divided between its factors by
        their mean eigenvalues. ``"exact"``: ``lambda`` on a single product; for two see :func:`solve`, of which this is the
        preconditioner, damped as if factored.
    """
    pairs = [pair for layer in layers for pair in layer]
    bases = eigh_all(xp, [x for pair in pairs for x in pair[:2]])
    terms = len(layers[0])
    if terms == 1:
        found, fine = [], []
        for i, (a, b) in enumerate(pairs):
            (sa, va, ok_a), (sb, vb, ok_b) = bases[2 * i], bases[2 * i + 1]
            if kind == "exact":
                scale = sb[..., :, None] * sa[..., None, :]
                scale = scale + _least(xp, damping, scale)
            else:
                da, db = _dampings(xp, a, b, damping, kind, 1)
                scale = _floored(xp, sb, db)[..., :, None] * _floored(xp, sa, da)[..., None, :]
            found.append(Joint(vb, va, scale))
            fine.append(ok_a & ok_b)
        return found, fine
    if terms != 2:
        raise ValueError(f"`layers` must hold one or two pairs of factors each, got {terms}; merge them first")
    whitened, seconds, fine = [], [], []
    for i, ((a, b), (c, d)) in enumerate(layers):
        (sa, va, ok_a), (sb, vb, ok_b) = bases[4 * i], bases[4 * i + 1]
        da, db = _dampings(xp, a, b, damping, kind, 2)
        dc, dd = _dampings(xp, c, d, damping, kind, 2)
        p = va / xp.sqrt(_floored(xp, sa, da))[..., None, :]
        q = vb / xp.sqrt(_floored(xp, sb, db))[..., None, :]
        whitened.append((p, q))
        # the damping apart: added to the other factor first it would be lost beside its largest entries
        seconds += [symmetrise(p.mT @ c @ p + _times(dc, p.mT @ p)), symmetrise(q.mT @ d @ q + _times(dd, q.mT @ q))]
        fine.append(ok_a & ok_b)
    turned, found = eigh_all(xp, seconds), []
    for i, (p, q) in enumerate(whitened):
        (sa, va, ok_a), (sb, vb, ok_b) = turned[2 * i], turned[2 * i + 1]
        found.append(Joint(q @ vb, p @ va, 1.0 + sb[..., :, None] * sa[..., None, :]))
        fine[i] = fine[i] & ok_a & ok_b
    return found, fine


def solve(xp: Namespace, joint: Joint, pairs: Sequence[Pair], damping: Array, x: Array) -> Array:
    """``sum_t B_t Y A_t + damping Y = x`` for ``Y``, by conjugate gradients preconditioned with ``joint``.

    Two Kronecker products and a multiple of the identity have no common eigenbasis, but the factored inverse is close to theirs. Each
    of the :data:`ITERATIONS` costs a few small products, and brings ``Y`` nearer to the solution in the norm of the matrix.
    """
    y, r = xp.zeros_like(x), x
    z = apply(xp, joint, r)
    p, rz = z, _inner(xp, r, z)
    for _ in range(ITERATIONS):
        moved = damping * p
        for a, b in pairs:
            moved = moved + sandwich(xp, b, p, a)
        step = _ratio(xp, rz, _inner(xp, p, moved))
        y, r = y + step * p, r - step * moved
        z = apply(xp, joint, r)
        new = _inner(xp, r, z)
        p, rz = z + _ratio(xp, new, rz) * p, new
    return y


def nearest(xp: Namespace, pairs: Sequence[Pair]) -> Pair:
    """The Kronecker product nearest to ``sum_t B_t (x) A_t`` in the Frobenius norm, both factors positive semi-definite.

    It lies in the span of the factors: with their Gram matrices the best coefficients are the leading singular vectors of a matrix
    of one row a term, with entries that are not negative, found by power iteration (Van Loan and Pitsianis 1993). Scaled so that
    its trace is that of the sum.
    """
    if len(pairs) == 1:
        return pairs[0]
    a, b = ([pair[side] for pair in pairs] for side in (0, 1))
    gram_a, gram_b = (_grams(xp, x) for x in (a, b))
    alpha = xp.ones_like(gram_a[..., 0])
    for _ in range(TURNS):
        beta = (gram_a @ alpha[..., None])[..., 0]
        beta = beta / _positive(xp, xp.max(xp.abs(beta), axis=-1, keepdims=True))
        alpha = (gram_b @ beta[..., None])[..., 0]
        alpha = alpha / _positive(xp, xp.max(xp.abs(alpha), axis=-1, keepdims=True))
    beta = (gram_a @ alpha[..., None])[..., 0]
    one = sum(alpha[..., i, None, None] * x for i, x in enumerate(a))
    other = sum(beta[..., i, None, None] * x for i, x in enumerate(b))
    size = trace(xp, one) * trace(xp, other)
    wanted = sum(trace(xp, x) * trace(xp, y) for x, y in pairs)
    return one, (wanted / _positive(xp, size))[..., None, None] * other


def grouped(xp: Namespace, pairs: Sequence[Pair], groups: Sequence[Sequence[int]]) -> list[Pair]:
    """Each of the ``groups`` of terms merged by :func:`nearest`."""
    return [nearest(xp, [pairs[i] for i in group]) for group in groups]


def _dampings(xp: Namespace, a: Array, b: Array, damping: Array, kind: Kind, terms: int) -> tuple[Array | float, Array | float]:
    if kind == "plain":
        return damping, damping
    size_a, size_b = (number(xp, trace(xp, x)) / x.shape[-1] for x in (a, b))
    usable = (size_a > 0) & (size_b > 0)
    pi = root(xp, choose(xp, usable, size_a, 1.0)) / root(xp, choose(xp, usable, size_b, 1.0))
    strong = root(xp, damping / terms)
    return pi * strong, strong / pi


def _floored(xp: Namespace, values: Array, damping: Any) -> Array:
    """Eigenvalues ``[..., n]`` plus damping ``[...]``, not below their rounding errors."""
    shifted = values + (damping[..., None] if getattr(damping, "ndim", 0) else damping)
    info = xp.finfo(values.dtype)
    least = values.shape[-1] * float(info.eps) * xp.max(values, axis=-1, keepdims=True) + float(info.smallest_normal) ** 0.5
    return xp.maximum(shifted, least)


def _least(xp: Namespace, damping: Array, scale: Array) -> Array:
    """``damping`` raised to the rounding errors of the products ``scale [..., out, in]``."""
    info = xp.finfo(scale.dtype)
    top = float(info.eps) * xp.max(scale, axis=(-2, -1), keepdims=True) + float(info.smallest_normal) ** 0.5
    return xp.maximum(scalar(xp, damping, scale), top)


def _times(value: Any, x: Array) -> Array:
    return (value[..., None, None] if getattr(value, "ndim", 0) else value) * x


def _grams(xp: Namespace, matrices: Sequence[Array]) -> Array:
    """``<M_i, M_j>``, ``[..., T, T]``."""
    rows = [xp.stack([_inner(xp, x, y)[..., 0, 0] for y in matrices], axis=-1) for x in matrices]
    return xp.stack(rows, axis=-2)


def _inner(xp: Namespace, x: Array, y: Array) -> Array:
    return xp.sum(x * y, axis=(-2, -1), keepdims=True)


def _ratio(xp: Namespace, x: Array, y: Array) -> Array:
    return xp.where(y > 0, x / _positive(xp, y), xp.zeros_like(x))


def _positive(xp: Namespace, x: Array) -> Array:
    """``x`` where it is positive, else 1."""
    return xp.where(x > 0, x, xp.ones((), dtype=x.dtype, device=device(x)))
