"""The factors of a block in the form they have: matrices, or diagonal matrices kept as vectors.

A factor of form ``"matrix"`` is an array ``[..., n, n]``, one of form ``"diagonal"`` the array ``[..., n]`` of its diagonal, which is
never made a matrix (the counts of 50 000 tokens are 50 000 numbers). What depends on the form is here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kfcore import ladder, linalg
from kfcore._array import Array, Namespace, device, number
from kfcore.linalg import FLOOR

Form = Literal["matrix", "diagonal"]
Forms = tuple[Form, Form]
"""Those of the output and of the input factor, in the order of a layer's ``shape``."""
MATRICES: Forms = ("matrix", "matrix")


def shape(form: Form, n: int) -> tuple[int, ...]:
    """Shape of a factor of n features, without leading axes."""
    return (n,) if form == "diagonal" else (n, n)


def identity(xp: Namespace, form: Form, like: Array, n: int, leading: tuple[int, ...] = ()) -> Array:
    """The identity in this form, in the dtype and on the device of ``like``."""
    if form == "diagonal":
        return xp.ones((*leading, n), dtype=like.dtype, device=device(like))
    return linalg.identity(xp, like, n, leading)


def dense(xp: Namespace, form: Form, x: Array) -> Array:
    """The factor as a matrix ``[..., n, n]``, for tests and analysis."""
    return x[..., None] * linalg.identity(xp, x, x.shape[-1]) if form == "diagonal" else x


def first(form: Form, x: Array) -> Array:
    """The first entry of the diagonal, ``[...]``; of a factor of one feature that is all there is."""
    return x[..., 0] if form == "diagonal" else x[..., 0, 0]


def times(form: Form, x: Array, number: Array) -> Array:
    """The factor times ``number [...]``."""
    return x * _spread(form, number)


def trace(xp: Namespace, form: Form, x: Array) -> Array:
    """Sum of the eigenvalues, ``[...]``."""
    return xp.sum(x, axis=-1) if form == "diagonal" else linalg.trace(xp, x)


def mean(xp: Namespace, form: Form, x: Array) -> Array:
    """Mean eigenvalue, ``[...]``."""
    return trace(xp, form, x) / x.shape[-1]


def frobenius(xp: Namespace, form: Form, x: Array) -> Array:
    """Root of the sum of the squared eigenvalues, ``[...]``."""
    # scaled by the trace, which bounds every entry, so that squares neither overflow nor vanish
    total = trace(xp, form, x)
    unit = xp.where(total > 0, total, xp.ones_like(total))
    return total * xp.sqrt(xp.sum((x / _spread(form, unit)) ** 2, axis=-1 if form == "diagonal" else (-2, -1)))


def eigenvalues(xp: Namespace, form: Form, x: Array) -> Array:
    """Ascending, ``[..., n]``; of a matrix those that are zero up to rounding are zero."""
    if form == "diagonal":
        return xp.sort(x, axis=-1)
    values, _, _ = linalg.eigh(xp, x)
    return xp.where(values > FLOOR * xp.finfo(x.dtype).eps * values[..., -1:], values, xp.zeros_like(values))


def damped(xp: Namespace, form: Form, x: Array, damping: float | Array) -> Array:
    """``x + damping I`` for ``damping [...]`` or one number for all, raised to what the dtype can carry.

    That of a matrix is raised as :func:`kfcore.linalg.damped` says. The entries of a diagonal are inverted one by one, and each is as
    accurate as it came, so that there any positive number will do.
    """
    if form == "diagonal":
        least: Any = raised(xp, form, x, damping)
        return x + (least if isinstance(least, float) else least[..., None])
    return linalg.damped(xp, x, damping)


def raised(xp: Namespace, form: Form, x: Array, damping: float | Array) -> float | Array:
    """What :func:`damped` adds to the diagonal."""
    return linalg.carried(xp, damping, 0.0 if form == "diagonal" else number(xp, linalg.trace(xp, x)), x.dtype)


def invert_all(xp: Namespace, factors: Sequence[tuple[Form, Array]]) -> list[tuple[Array, Array, Array | None]]:
    """Inverse of each factor, in its form, whether that succeeded, ``[...]``, and on which rung of the :mod:`kfcore.ladder`.

    Matrices in one call. A diagonal has the first rung alone.
    """
    inverses = iter(ladder.invert_all(xp, [x for form, x in factors if form == "matrix"]))
    return [_reciprocals(xp, x) if form == "diagonal" else next(inverses) for form, x in factors]


def eigh_all(xp: Namespace, factors: Sequence[tuple[Form, Array]]) -> list[tuple[Array, Array | None, Array, Array | None]]:
    """Eigenvalues ``[..., n]`` of each factor, eigenvectors, success and rung; matrices in one call.

    A diagonal has the identity for eigenvectors, which is ``None``; its values come in the order of its entries.
    """
    found = iter(ladder.eigh_all(xp, [x for form, x in factors if form == "matrix"]))
    return [_entries(xp, x) if form == "diagonal" else next(found) for form, x in factors]


def sandwich(xp: Namespace, forms: Forms, left: Array | None, x: Array, right: Array | None) -> Array:
    """``left x right`` for ``x [..., m, n]`` and factors of these forms; ``None`` is the identity."""
    if left is not None and right is not None and forms == MATRICES:
        return linalg.sandwich(xp, left, x, right)
    if right is not None:
        x = x * right[..., None, :] if forms[1] == "diagonal" else x @ right
    if left is not None:
        x = left[..., :, None] * x if forms[0] == "diagonal" else left @ x
    return x


def _spread(form: Form, number: Array) -> Array:
    """``number [...]`` beside the entries of a factor."""
    return number[..., None] if form == "diagonal" else number[..., None, None]


def _reciprocals(xp: Namespace, x: Array) -> tuple[Array, Array, None]:
    inverse = 1.0 / x
    return inverse, xp.all(xp.isfinite(inverse) & (inverse > 0), axis=-1), None


def _entries(xp: Namespace, x: Array) -> tuple[Array, None, Array, None]:
    return xp.maximum(x, xp.zeros_like(x)), None, xp.isfinite(xp.sum(x, axis=-1)), None
