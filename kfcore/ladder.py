"""Inverses and eigenbases of factors that must not fail: what is tried, one after the other, before the old ones are kept.

1. The symmetric part of the factor, as it is.
2. A factor that is not finite goes straight to the last rung.
3. A result counts only if it is sound. The library's own word for it is not enough, for some return garbage in silence: an inverse must
   have a diagonal that a definite matrix can have (``x_ii (x^-1)_ii >= 1``), an eigendecomposition must rebuild the sums of the rows,
   which says at once whether its basis is orthogonal. Both cost a vanishing share of what they look at.
4. *Jitter*: ``JITTER eps tr(x)`` is added to the diagonal. Of an eigendecomposition it is taken off again.
5. *Widened*: the factor as it was, in float64, the result cast back. It is left out where factors are in float64, or it is not to be had.
6. Whoever asked keeps what there was before; see ``kept`` in the states of the methods.

Every rung is a value: the matrices of a stack climb each for itself, and what a rung costs is paid where one of them needs it, by a
branch (:func:`kfcore._array.cond`). Where nobody can branch (:func:`kfcore._array.branches`: on a GPU for which the host would wait, in
a program of ``torch.compile``), jitter is decided by one Cholesky factorisation before the inverse, and the other rungs between the
first and the last are left out.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from kfcore import linalg
from kfcore._array import Array, Namespace, branches, cast, cond, device, select, truth, wider

JITTER = 100.0
"""What is added where a factor fails, in machine epsilons times its trace: ten times the least damping (:data:`kfcore.linalg.FLOOR`)."""
JITTERED, WIDENED = 1, 2
RUNGS = 2
"""Rungs that are counted; see :func:`climbed`."""

Attempt = Callable[[Namespace, list[Array], "list[Array] | None"], list[tuple[Array, ...]]]
"""Results of matrices with something added to their diagonals, the last of each whether it is sound, ``[...]``."""


def invert_all(xp: Namespace, matrices: list[Array]) -> list[tuple[Array, Array, Array | None]]:
    """Inverse of each of ``matrices [..., n, n]``, whether one was found, ``[...]``, and on which rung, ``[...]``, int32.

    The rung is 0 for the first, or ``None`` for all of a stack if the host knows it.
    """
    if not matrices or branches(xp, matrices[0]):
        return _climb(xp, matrices, _inverses)  # pyright: ignore[reportReturnType]
    fine = [linalg.definite(xp, x) for x in matrices]
    added = [xp.where(ok, xp.zeros_like(size), size) for ok, size in zip(fine, map(functools.partial(_jitter, xp), matrices), strict=True)]
    return [(*found, xp.astype(~ok, xp.int32)) for found, ok in zip(_inverses(xp, matrices, added), fine, strict=True)]  # pyright: ignore


def eigh_all(xp: Namespace, matrices: list[Array]) -> list[tuple[Array, Array, Array, Array | None]]:
    """Eigenvalues, eigenvectors (see :func:`kfcore.linalg.eigh`), whether they were found and on which rung, as :func:`invert_all`."""
    if not matrices or branches(xp, matrices[0]):
        return _climb(xp, matrices, _bases)  # pyright: ignore[reportReturnType]
    return [(*found, None) for found in _bases(xp, matrices, None)]  # pyright: ignore[reportReturnType]


def climbed(xp: Namespace, rungs: Array, ok: bool | Array, taken: list[Array | None]) -> Array:
    """``rungs [..., 2]`` with the factors counted that were solved by jitter, and in float64, in a refresh that was ``ok [...]``."""
    known = [rung for rung in taken if rung is not None]
    if not known:
        return rungs
    steps = xp.arange(1, RUNGS + 1, dtype=xp.int32, device=device(rungs))
    more = functools.reduce(operator.add, [xp.astype(rung[..., None] == steps, xp.int32) for rung in known])
    return select(xp, ok, rungs + more, rungs)


def _climb(xp: Namespace, matrices: list[Array], attempt: Attempt) -> list[tuple[Array | None, ...]]:
    first = attempt(xp, matrices, None)
    stuck = [_stuck(xp, x, found[-1]) for x, found in zip(matrices, first, strict=True)]
    places = [i for i, flag in enumerate(stuck) if flag is not False]
    results: list[tuple[Array | None, ...]] = [(*found, None) for found in first]
    if not places:
        return results
    tried = [matrices[i] for i in places]
    # a zero that varies as the flag does where a batch is spread over devices
    begun = [(*first[i], xp.astype(first[i][-1] & ~first[i][-1], xp.int32)) for i in places]

    def jittered(found: list[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
        new = attempt(xp, tried, [_jitter(xp, x) for x in tried])
        found = [_better(xp, *pair, JITTERED) for pair in zip(found, new, strict=True)]
        if wider(xp, tried[0].dtype) is None:
            return found
        return cond(_any([_stuck(xp, x, one[-2]) for x, one in zip(tried, found, strict=True)]), widened, _same, found)

    def widened(found: list[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
        new = attempt(xp, [cast(xp, x, wider(xp, x.dtype)) for x in tried], None)
        narrow = [(*(cast(xp, part, x.dtype) for part in one[:-1]), one[-1]) for one, x in zip(new, tried, strict=True)]
        return [_better(xp, *pair, WIDENED) for pair in zip(found, narrow, strict=True)]

    for i, found in zip(places, cond(_any([stuck[i] for i in places]), jittered, _same, begun), strict=True):
        results[i] = found
    return results


def _inverses(xp: Namespace, matrices: list[Array], added: list[Array] | None) -> list[tuple[Array, ...]]:
    matrices = _lifted(xp, matrices, added)
    found: list[tuple[Array, ...]] = []
    for x, (inverse, ok) in zip(matrices, linalg.invert_all(xp, matrices), strict=True):
        # at least 1 of any definite matrix; rounding errors are forgiven
        shares = xp.linalg.diagonal(x) * xp.linalg.diagonal(inverse)
        found.append((inverse, ok & (xp.min(shares, axis=-1) > 0.5)))
    return found


def _bases(xp: Namespace, matrices: list[Array], added: list[Array] | None) -> list[tuple[Array, ...]]:
    matrices = _lifted(xp, matrices, added)
    found: list[tuple[Array, ...]] = []
    for i, (x, (values, vectors, ok)) in enumerate(zip(matrices, linalg.eigh_all(xp, matrices), strict=True)):
        info, size = xp.finfo(x.dtype), xp.sum(values, axis=-1)
        # (x + tr(x) I) 1, so that vectors of small eigenvalues count for as much as the others
        spread = (values + size[..., None]) * xp.sum(vectors, axis=-2)
        apart = xp.sum(x, axis=-1) + size[..., None] - (vectors @ spread[..., None])[..., 0]
        bound = float(info.eps) ** 0.5 * size + float(info.smallest_normal)
        ok = ok & (xp.max(xp.abs(apart), axis=-1) <= bound)
        if added is not None:
            values = values - added[i][..., None]
            values = xp.maximum(values, xp.zeros_like(values))
        found.append((values, vectors, ok))
    return found


def _lifted(xp: Namespace, matrices: list[Array], added: list[Array] | None) -> list[Array]:
    return matrices if added is None else [linalg.shift(xp, x, size) for x, size in zip(matrices, added, strict=True)]


def _jitter(xp: Namespace, x: Array) -> Array:
    return JITTER * float(xp.finfo(x.dtype).eps) * linalg.trace(xp, x)


def _better(xp: Namespace, old: tuple[Array, ...], new: tuple[Array, ...], rung: int) -> tuple[Array, ...]:
    """Results, soundness and rung, with what is ``new`` and sound where the ``old`` is not."""
    *_, ok, before = old
    better = new[-1] & ~ok
    return select(xp, better, (*new, xp.full_like(before, rung)), old)


def _stuck(xp: Namespace, x: Array, ok: Array) -> bool | Array:
    """Whether any of ``x [..., n, n]`` is worth another attempt; a bool if the host knows."""
    fine = truth(xp, xp.all(ok))
    if fine is True:
        return False
    return truth(xp, xp.any(~ok & xp.isfinite(linalg.trace(xp, x))))


def _any(flags: list[bool | Array]) -> Any:
    return functools.reduce(operator.or_, flags)


def _same(found: list[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
    return found
