"""Tikhonov damping of Kronecker factors: exact, factored, plain, absolute or relative to the mean eigenvalue."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, replace
from typing import Any, Literal

from kfcore._array import Array, Namespace, Schedule, choose, number, root, scalar
from kfcore.linalg import FLOOR, eigh, mean_diagonal, trace

Kind = Literal["exact", "factored", "plain"]
Norm = Literal["mean", "trace", "frobenius", "spectral", "median"]
KINDS: tuple[Kind, ...] = ("exact", "factored", "plain")
NORMS: tuple[Norm, ...] = ("mean", "trace", "frobenius", "spectral", "median")


@dataclass(frozen=True)
class Damping:
    """How much multiple of the identity is added to a curvature block, and how.

    Parameters
    ----------
    value
        ``lambda``, positive; or a function of the step number that gives it.
    kind
        ``"exact"``: ``(G (x) A + lambda I)^-1``, through the eigenbases of both factors.
        ``"factored"``: ``(G + sqrt(lambda) / pi I)^-1 (x) (A + pi sqrt(lambda) I)^-1`` with ``pi = sqrt(|A| / |G|)``
        (Martens and Grosse 2015, section 6.3), which needs inverses only. Where one side is 1 x 1 or the identity it is exact.
        ``"plain"``: ``lambda`` on each factor, which is not Tikhonov damping of the block.
    norm
        The norm ``|.|`` in ``pi``: ``"mean"`` eigenvalue, ``"trace"``, ``"frobenius"``, ``"spectral"`` or ``"median"`` eigenvalue.
    relative
        Read ``lambda`` in units of the block's mean eigenvalue ``tr(A) tr(G) / (in out)``.
    """

    value: float | Schedule = 1e-3
    kind: Kind = "factored"
    norm: Norm = "mean"
    relative: bool = False

    def __post_init__(self) -> None:
        if not callable(self.value):
            check_positive("damping", self.value)
        for name, allowed in (("kind", KINDS), ("norm", NORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` of Damping must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, damping: float | Schedule | Damping) -> Damping:
        """``damping`` itself, or the default kind with that value."""
        return damping if isinstance(damping, Damping) else cls(damping)

    def at(self, step: int | Array) -> float | Array:
        """``lambda`` at ``step``."""
        return self.value(step) if callable(self.value) else self.value

    def with_value(self, value: float) -> Damping:
        """The same rule with another ``lambda``."""
        return replace(self, value=value)


def check_positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise unless ``value`` is a finite number that is positive (or zero, where allowed)."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}")
    if value < 0 or (value == 0 and not zero):
        raise ValueError(f"`{name}` must be {'zero or more' if zero else 'positive'}, got {value!r}")


def strength(xp: Namespace, rule: Damping, value: float | Array, a: Array, g: Array | None) -> float | Array:
    """``lambda`` of a block with factors ``a`` and ``g`` (``None``: the identity), ``[...]`` or one number for all."""
    value = float(value) if isinstance(value, numbers.Real) else scalar(xp, value, a)
    if not rule.relative:
        return value
    unit = number(xp, mean_diagonal(xp, a))
    if g is not None:
        unit = unit * number(xp, mean_diagonal(xp, g))
    # a block that has seen only zeros has no scale of its own: there lambda is absolute
    return choose(xp, unit > 0, value * unit, value)


def split(xp: Namespace, rule: Damping, damping: float | Array, a: Array, g: Array) -> tuple[float | Array, float | Array]:
    """What the factored and the plain kind add to the diagonals of ``a`` and ``g``, each ``[...]`` or one number for all."""
    if rule.kind == "plain":
        return damping, damping
    size_a, size_g = number(xp, size(xp, a, rule.norm)), number(xp, size(xp, g, rule.norm))
    usable = (size_a > 0) & (size_g > 0)
    # roots first: the quotient of the sizes themselves can leave the range of float32
    pi = root(xp, choose(xp, usable, size_a, 1.0)) / root(xp, choose(xp, usable, size_g, 1.0))
    strong = root(xp, damping)
    return pi * strong, strong / pi


def size(xp: Namespace, x: Array, norm: Norm) -> Array:
    """A norm of semi-definite ``x [..., n, n]``, ``[...]``."""
    if norm == "mean":
        return mean_diagonal(xp, x)
    if norm == "trace":
        return trace(xp, x)
    if norm == "frobenius":
        # scaled by the trace, which bounds every entry, so that squares neither overflow nor vanish
        total = trace(xp, x)
        unit = xp.where(total > 0, total, xp.ones_like(total))
        return total * xp.sqrt(xp.sum((x / unit[..., None, None]) ** 2, axis=(-2, -1)))
    values, _, _ = eigh(xp, x)
    if norm == "spectral":
        return values[..., -1]
    n = values.shape[-1]
    median = 0.5 * (values[..., (n - 1) // 2] + values[..., n // 2])
    # that of a factor without full rank is zero, which comes out as rounding noise
    noise = FLOOR * xp.finfo(x.dtype).eps * values[..., -1]
    return xp.where(median > noise, median, xp.zeros_like(median))
