"""The eigenbasis of a factor that changes slowly: decomposed anew, or followed from one refresh to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from kfcore import factors, ladder, linalg
from kfcore._array import Array, Namespace, cond, device, truth
from kfcore.damping import check_positive
from kfcore.factors import Form, Forms
from kfcore.layers.base import checked_int

PROBES = 16
"""Vectors by which the drift of a basis is seen; the estimate of its square has a relative error of about ``sqrt(2 / 16)``."""
ORTHOGONALITY = 1.5
"""Distance from orthogonality at which a followed basis is made orthonormal, in ``eps sqrt(n)``; an exact decomposition has about 0.3."""


@dataclass(frozen=True, kw_only=True)
class Eigh:
    """A full eigendecomposition at every refresh: about ``9 n^3`` operations in time, exact."""


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """Follow the basis from refresh to refresh, at a fraction of the cost of a decomposition.

    The first refresh decomposes the factor. A later one first looks at the drift ``|A - Q diag(q_j^T A q_j) Q^T|_F / |A|_F``, the mass
    off the diagonal of ``Q^T A Q``, by products with a few fixed vectors (``O(n^2)``). It leaves the basis if the drift is below
    ``tolerance``, decomposes the factor anew if it is above ``jump``, and improves the basis in between: the ``block`` basis vectors that
    drifted most are diagonalised against each other and turned against all others by the angles of Jacobi's method, all at once, as one
    product of reflections. That takes ``10 n^2 block`` operations, keeps the basis orthogonal to rounding, and unlike a step of orthogonal
    iteration serves every part of the spectrum.

    The eigenvalues that go with the basis are the quotients ``q_j^T A q_j``, by one product of matrices, where a direction is made of them;
    EKFAC, which measures its scales, is content with estimates by the same vectors. Prefer it where refreshes cost most of a step:
    factors of a thousand features and more, refreshed often.

    Parameters
    ----------
    tolerance, jump
        Bounds of the drift, ``0 <= tolerance < jump``.
    step
        ``"refine"`` as above, or ``"qr"``: one step of orthogonal iteration, ``Q <- qr(A Q)``, as SOAP does (Vyas et al. 2024); it costs a
        product and an orthogonalisation of whole matrices, and converges slowly where eigenvalues are close.
    block
        Vectors improved in a sweep; a sixteenth of them if not given.
    sweeps
        Most sweeps a refresh; those after the first only where the drift is still above ``tolerance``.
    smallest
        Factors with fewer features are decomposed, which is cheaper there.
    """

    tolerance: float = 0.01
    jump: float = 0.5
    step: Literal["refine", "qr"] = "refine"
    block: int | None = None
    sweeps: int = 2
    smallest: int = 128

    def __post_init__(self) -> None:
        check_positive("tolerance", self.tolerance, zero=True)
        check_positive("jump", self.jump)
        if not self.tolerance < self.jump:
            raise ValueError(f"`jump` of Tracked must be above `tolerance`, {self.tolerance!r}, got {self.jump!r}")
        if self.step not in ("refine", "qr"):
            raise ValueError(f"`step` of Tracked must be 'refine' or 'qr', got {self.step!r}")
        for name in ("sweeps", "smallest"):
            checked_int(name, "Tracked", getattr(self, name))
        if self.block is not None:
            checked_int("block", "Tracked", self.block)

    def width(self, n: int) -> int:
        """Vectors improved in a sweep of a basis of ``n``."""
        return min(n, self.block or max(8, math.ceil(n / 16)))


Basis: TypeAlias = Eigh | Tracked


class Decomposed(NamedTuple):
    """A factor's eigenvalues and eigenbasis, and how they came about."""

    values: Array
    """``[..., n]``, not negative; in no particular order where the basis was followed."""
    basis: Array | None
    """``[..., n, n]``; ``None`` for the identity, of a diagonal factor."""
    ok: Array
    """``[...]`` of booleans."""
    way: Array
    """``[..., 3]``, int32: 1 at how it came about: left as it was, improved, decomposed."""
    rung: Array | None
    """Of the :mod:`kfcore.ladder`, ``[...]``, int32; ``None`` for the first."""


def decompose_all(
    xp: Namespace, how: Basis, sides: Sequence[tuple[Forms, Array, Array | None]], old: Sequence[Any], *, exact: bool = True
) -> list[tuple[Decomposed, Decomposed | None]]:
    """Eigenbases of the input and the output factor of blocks, given as ``(forms, A, G)`` with forms of G and of A.

    ``old`` are what was applied before, with ``input_basis``, ``output_basis`` and ``ways``. All that is decomposed anew is so in one call.
    Without ``exact`` the values of a basis that is followed are estimates.
    """
    wanted: list[tuple[Form, Array]] = []
    results: list[list[Any]] = []
    for ((output, inp), a, g), before in zip(sides, old, strict=True):
        # the vectors by which the drift is seen change with every refresh, so that nothing escapes them for good
        turn = xp.sum(before.ways, axis=-1, dtype=before.ways.dtype)
        results_of_block: list[Any] = []
        both: Any = ((inp, a, before.input_basis), (output, g, before.output_basis))
        for form, x, basis in both:
            if x is None:
                results_of_block.append(None)
            elif isinstance(how, Tracked) and form == "matrix" and x.shape[-1] >= how.smallest:
                results_of_block.append(follow(xp, how, x, basis, turn, exact=exact))
            else:
                results_of_block.append(len(wanted))
                wanted.append((form, x))
        results.append(results_of_block)
    anew = [Decomposed(values, basis, ok, _way(xp, ok, 2), rung) for values, basis, ok, rung in factors.eigh_all(xp, wanted)]
    return [tuple(anew[x] if isinstance(x, int) else x for x in block) for block in results]  # pyright: ignore[reportReturnType]


def follow(xp: Namespace, how: Tracked, x: Array, basis: Array, turn: Array, *, exact: bool = True) -> Decomposed:
    """A refresh of the ``basis`` of one factor ``x``, or of all in a stack as the one in it that drifted most needs it.

    ``turn [...]`` is the number of refreshes before. Without ``exact`` the values of a basis that was not decomposed are estimates: small
    eigenvalues are off by as much as the drift.
    """
    # in units of the trace, so that no square leaves the range of the dtype
    unit = linalg.trace(xp, x)
    unit = xp.where(unit > 0, unit, xp.ones_like(unit))
    x = x / unit[..., None, None]
    w = probes(xp, x, turn)
    values, drift, apart = look(xp, x, basis, w)
    eps = float(xp.finfo(x.dtype).eps)
    lost = (apart > eps) | ~xp.isfinite(xp.sum(drift, axis=-1))
    far = _any(xp, (turn == 0) | lost | (_relative(xp, x, drift) > how.jump))
    # rounding errors decide when this is due, so that it may do no more than to undo them
    skewed = _any(xp, apart > (ORTHOGONALITY * eps) ** 2 * x.shape[-1])
    basis = cond(skewed, lambda basis: orthonormal(xp, basis), lambda basis: basis, basis)
    some = xp.zeros(x.shape[:-2], dtype=xp.int32, device=device(x))

    def decomposed(basis: Array, values: Array, drift: Array) -> tuple[Array, Array, Array, Array, Array]:
        ((values, basis, ok, rung),) = ladder.eigh_all(xp, [x])
        return values, basis, ok, some + 2, some if rung is None else rung

    def followed(basis: Array, values: Array, drift: Array) -> tuple[Array, Array, Array, Array, Array]:
        way = some
        for _ in range(how.sweeps):
            moved = _any(xp, _relative(xp, x, drift) > how.tolerance)
            basis, values, drift, way = cond(moved, improved, left, basis, values, drift, way)
        values = xp.sum(basis * (x @ basis), axis=-2) if exact else values
        return xp.maximum(values, xp.zeros_like(values)), basis, xp.isfinite(xp.sum(values, axis=-1)), way, some

    def improved(basis: Array, values: Array, drift: Array, way: Array) -> tuple[Array, Array, Array, Array]:
        basis = refined(xp, x, basis, values, drift, how.width(x.shape[-1])) if how.step == "refine" else iterated(xp, x, basis, values)
        values, drift, _ = look(xp, x, basis, w)
        return basis, values, drift, xp.ones_like(way)

    def left(*unchanged: Array) -> tuple[Array, ...]:
        return unchanged

    values, basis, ok, way, rung = cond(far, decomposed, followed, basis, values, drift)
    return Decomposed(values * unit[..., None], basis, ok, _way(xp, ok, way), rung)


def probes(xp: Namespace, like: Array, turn: Array) -> Array:
    """Vectors ``[..., PROBES, n]`` of mean square 1 that nothing in a factor has to do with: chirps, others at every ``turn [...]``."""
    n = like.shape[-1]
    i = xp.arange(1, n + 1, dtype=like.dtype, device=device(like))
    number = xp.arange(1, PROBES + 1, dtype=like.dtype, device=device(like))
    number = number + PROBES * xp.astype(xp.remainder(turn, xp.full_like(turn, 509)), like.dtype)[..., None]
    slope, bend = 0.7548776662 * number, 0.5698402910 * number
    slope, bend = slope - xp.floor(slope), bend - xp.floor(bend)
    phase = slope[..., None] * i + (1.0 + bend[..., None]) * (i * i / n)
    return math.sqrt(2.0) * xp.cos(2.0 * math.pi * (phase - xp.floor(phase)))


def look(xp: Namespace, x: Array, basis: Array, w: Array) -> tuple[Array, Array, Array]:
    """Estimates by the vectors ``w [..., p, n]`` of each ``q^T x q`` and ``|x q - (q^T x q) q|^2``, ``[..., n]``.

    And the square of the distance of ``basis basis^T`` from the identity, ``[...]``.
    """
    at, seen = w @ basis, (w @ x) @ basis
    values = xp.sum(at * seen, axis=-2) / xp.sum(at * at, axis=-2)
    rest = seen - values[..., None, :] * at
    apart = linalg.energy(xp, at @ basis.mT - w) / linalg.energy(xp, w)
    return values, xp.mean(rest * rest, axis=-2), apart


def refined(xp: Namespace, x: Array, basis: Array, values: Array, drift: Array, k: int) -> Array:
    """``basis`` with the ``k`` vectors of the largest ``drift`` turned towards eigenvectors of ``x``, and the others out of their way.

    The block is diagonalised, and every pair of one vector in it and one outside wants to turn by Jacobi's angle ``t``. The vectors
    ``E + X`` of the block in the old basis, ``X`` the tangents and ``E`` columns of the identity, are made orthonormal, ``Y = (E + X)
    (I + X^T X)^-1/2``, and ``I - (Y + E) (I + E^T Y)^-1 (Y + E)^T`` is the orthogonal matrix that takes ``-E`` to ``Y`` and moves the
    others least (a block reflector: Schreiber and Parlett 1988).
    """
    n = x.shape[-1]
    order = xp.argsort(drift, axis=-1, descending=True)[..., :k]
    pick = xp.astype(xp.arange(n, dtype=order.dtype, device=device(order))[:, None] == order[..., None, :], x.dtype)
    block = basis @ pick if n < 4 * k else _columns(xp, basis, order)
    coupled = basis.mT @ (x @ block)
    inner, turned, _ = linalg.eigh(xp, pick.mT @ coupled)
    coupled, rotated = coupled @ turned, block @ turned
    gap = inner[..., None, :] - values[..., :, None]
    size = xp.abs(gap) + xp.sqrt(gap * gap + 4.0 * coupled * coupled) + xp.finfo(x.dtype).smallest_normal
    tangents = xp.where(gap < 0, -2.0 * coupled, 2.0 * coupled) / size * (1.0 - xp.sum(pick, axis=-1))[..., None]
    spread, own, _ = linalg.eigh(xp, linalg.gram(xp, tangents))
    shrink = 1.0 / xp.sqrt(1.0 + spread)
    to_y = (own * shrink[..., None, :]) @ own.mT
    y = orthonormal(xp, (pick + tangents) @ to_y)
    both = y + pick
    inverse, _ = linalg.invert(xp, linalg.shift(xp, pick.mT @ y, 1.0))
    back = inverse @ both.mT
    moved = rotated - block
    image = basis @ y + moved @ (pick.mT @ y) + rotated
    basis = basis + xp.concat([moved, image], axis=-1) @ xp.concat([pick.mT, -back], axis=-2)
    # in a vector that is turned at every refresh, rounding errors of its length add up, one among many that `look` does not see
    return basis / xp.sqrt(xp.sum(basis * basis, axis=-2))[..., None, :]


def orthonormal(xp: Namespace, y: Array) -> Array:
    """Orthonormal columns nearest to the columns of ``y [..., n, k]``, which are nearly so: a step of Newton's and Schulz' iteration."""
    return y @ linalg.shift(xp, -0.5 * linalg.gram(xp, y), 1.5)


def iterated(xp: Namespace, x: Array, basis: Array, values: Array) -> Array:
    """One step of orthogonal iteration, the vectors of large ``values`` first."""
    order = xp.argsort(values, axis=-1, descending=True)
    return xp.linalg.qr(x @ _columns(xp, basis, order))[0]


def transport(xp: Namespace, scales: Array, left: tuple[Array | None, Array | None], right: tuple[Array | None, Array | None]) -> Array:
    """``scales [..., out, in]`` of a matrix that is diagonal in old bases, as its diagonal in new ones: ``P_G S P_A^T``, exactly.

    ``left`` and ``right`` are ``(old, new)`` of the output and the input side, and ``P = (new^T old)^2`` entry by entry, a doubly
    stochastic matrix, so that sums and signs stay. A basis that was left as it was is the same array, and costs nothing.
    """
    if left[0] is not None and left[1] is not None and left[0] is not left[1]:
        scales = (left[1].mT @ left[0]) ** 2 @ scales
    if right[0] is not None and right[1] is not None and right[0] is not right[1]:
        scales = scales @ ((right[0].mT @ right[1]) ** 2)
    return scales


def _columns(xp: Namespace, x: Array, order: Array) -> Array:
    """Columns of ``x [..., n, n]`` by number, ``order [..., k]``."""
    return xp.take_along_axis(x, xp.broadcast_to(order[..., None, :], (*x.shape[:-1], order.shape[-1])), axis=-1)


def _relative(xp: Namespace, x: Array, drift: Array) -> Array:
    """Drift of the whole basis beside the size of ``x``, ``[...]``; zero of a factor that is zero."""
    size = linalg.energy(xp, x)
    return xp.sqrt(xp.sum(drift, axis=-1) / xp.where(size > 0, size, xp.ones_like(size)))


def _any(xp: Namespace, flag: Array) -> Any:
    return truth(xp, xp.any(flag))


def _way(xp: Namespace, like: Array, way: int | Array) -> Array:
    ways = xp.arange(3, dtype=xp.int32, device=device(like))
    one = way if isinstance(way, int) else way[..., None]
    return xp.astype(ways == one, xp.int32) + xp.zeros((*like.shape, 3), dtype=xp.int32, device=device(like))
