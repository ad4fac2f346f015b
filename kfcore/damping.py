"""Tikhonov damping of Kronecker factors: exact, factored, plain, absolute or relative to the mean eigenvalue."""

from __future__ import annotations

import math
import numbers
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

from kfcore import factors
from kfcore._array import Array, Namespace, Schedule, choose, number, root, scalar
from kfcore.factors import Form, Forms

Kind = Literal["exact", "factored", "plain"]
Norm = Literal["mean", "trace", "frobenius", "spectral", "median"]
KINDS: tuple[Kind, ...] = ("exact", "factored", "plain")
NORMS: tuple[Norm, ...] = ("mean", "trace", "frobenius", "spectral", "median")


@dataclass(frozen=True)
class LevenbergMarquardt:
    """A damping that follows how well the quadratic model predicts the loss (Martens and Grosse 2015, section 6.5).

    Every ``every`` steps the ratio of the change of the loss to that of the model, :class:`kfcore.QuadraticModel`, is looked at, on the
    batch of the step: above ``high`` the model can be trusted more and ``lambda`` shrinks by ``factor^every``, below ``low`` it grows by
    as much. A loss that is not finite counts as a ratio below ``low``; a change too small for the loss's dtype to show counts as neither.

    Parameters
    ----------
    initial
        ``lambda`` at first. It is in units of the curvature of the mean loss; 150 is what the paper's autoencoders (sums over 784 pixels)
        start from, 1 is a fair first try for a classifier.
    every
        Steps from one look to the next.
    factor
        In (0, 1). 19/20 in the paper.
    low, high
        Ratios between which ``lambda`` stays.
    floor, ceiling
        Bounds of ``lambda``.
    search_every
        Adapt the damping of the factors apart from ``lambda``, for methods with factored damping: at every so many steps, if a refresh is
        due there, factors damped with ``gamma^2`` for ``gamma`` as it is and by ``factor^(search_every / 2)`` smaller and larger are
        tried, and that of the least model kept (section 6.6). A multiple of ``refresh_every``; 20 in the paper. Not if ``None``.
    """

    initial: float
    _: KW_ONLY
    every: int = 5
    factor: float = 19 / 20
    low: float = 0.25
    high: float = 0.75
    floor: float = 1e-8
    ceiling: float = math.inf
    search_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("initial", "factor", "low", "high", "floor"):
            check_positive(name, getattr(self, name))
        for name in ("every", "search_every"):
            value = getattr(self, name)
            if (name == "every" or value is not None) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` of LevenbergMarquardt must be a positive int, got {value!r}")
        if self.factor >= 1:
            raise ValueError(f"`factor` must lie in (0, 1), got {self.factor!r}")
        if self.low >= self.high:
            raise ValueError(f"`low` must be below `high`, got {self.low!r} and {self.high!r}")
        if not (isinstance(self.ceiling, numbers.Real) and self.floor <= self.initial <= self.ceiling):
            raise ValueError(f"`initial` must lie between `floor` and `ceiling`, got {self.initial!r}, {self.floor!r} and {self.ceiling!r}")

    def adapted(self, xp: Namespace, damping: Array, ratio: Array) -> Array:
        """``lambda`` after a look at ``ratio``, all 0-d; NaN counts as a ratio that is too low."""
        step = self.factor**self.every
        one = xp.ones_like(damping)
        scale = xp.where(ratio > self.high, step * one, xp.where(ratio >= self.low, one, one / step))
        return self.bounded(xp, damping * scale)

    def bounded(self, xp: Namespace, damping: Array) -> Array:
        """``damping`` between the bounds."""
        top = min(self.ceiling, float(xp.finfo(damping.dtype).max))
        return xp.minimum(xp.maximum(damping, scalar(xp, self.floor, damping)), scalar(xp, top, damping))


@dataclass(frozen=True)
class Damping:
    """How much multiple of the identity is added to a curvature block, and how.

    Parameters
    ----------
    value
        ``lambda``, positive; a function of the step number that gives it; or a :class:`LevenbergMarquardt` that adapts it.
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

    value: float | Schedule | LevenbergMarquardt = 1e-3
    kind: Kind = "factored"
    norm: Norm = "mean"
    relative: bool = False

    def __post_init__(self) -> None:
        if not callable(self.value) and self.adaptive is None:
            check_positive("damping", self.value)
        for name, allowed in (("kind", KINDS), ("norm", NORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` of Damping must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, damping: float | Schedule | LevenbergMarquardt | Damping) -> Damping:
        """``damping`` itself, or the default kind with that value."""
        return damping if isinstance(damping, Damping) else cls(damping)

    @property
    def adaptive(self) -> LevenbergMarquardt | None:
        """The rule that adapts ``lambda``, if one does."""
        return self.value if isinstance(self.value, LevenbergMarquardt) else None

    def at(self, step: int | Array) -> float | Array:
        """``lambda`` at ``step``; raise if only a state knows it."""
        if isinstance(self.value, LevenbergMarquardt):
            raise ValueError("`damping` must be given: it is adaptive (LevenbergMarquardt), and only an optimizer's state knows its value")
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


def strength(xp: Namespace, rule: Damping, value: float | Array, forms: Forms, a: Array, g: Array | None) -> float | Array:
    """``lambda`` of a block with factors ``a`` and ``g`` (``None``: the identity), ``[...]`` or one number for all.

    ``forms`` are those of ``g`` and of ``a``, in this order.
    """
    value = float(value) if isinstance(value, numbers.Real) else scalar(xp, value, a)
    return value * unit(xp, forms, a, g) if rule.relative else value


def unit(xp: Namespace, forms: Forms, a: Array, g: Array | None) -> float | Array:
    """Mean eigenvalue of a block with factors ``a`` and ``g`` (``None``: the identity), ``[...]`` or a number.

    A block that has seen only zeros has no scale of its own and gets 1: there a relative damping is absolute.
    """
    mean = number(xp, factors.mean(xp, forms[1], a))
    if g is not None:
        mean = mean * number(xp, factors.mean(xp, forms[0], g))
    return choose(xp, mean > 0, mean, 1.0)


def split(xp: Namespace, rule: Damping, damping: float | Array, forms: Forms, a: Array, g: Array) -> tuple[float | Array, float | Array]:
    """What the factored and the plain kind add to the diagonals of ``a`` and ``g``, each ``[...]`` or one number for all."""
    if rule.kind == "plain":
        return damping, damping
    size_a, size_g = number(xp, size(xp, forms[1], a, rule.norm)), number(xp, size(xp, forms[0], g, rule.norm))
    usable = (size_a > 0) & (size_g > 0)
    # roots first: the quotient of the sizes themselves can leave the range of float32
    pi = root(xp, choose(xp, usable, size_a, 1.0)) / root(xp, choose(xp, usable, size_g, 1.0))
    strong = root(xp, damping)
    return pi * strong, strong / pi


def size(xp: Namespace, form: Form, x: Array, norm: Norm) -> Array:
    """A norm of a semi-definite factor ``x``, ``[...]``."""
    if norm == "mean":
        return factors.mean(xp, form, x)
    if norm == "trace":
        return factors.trace(xp, form, x)
    if norm == "frobenius":
        return factors.frobenius(xp, form, x)
    values = factors.eigenvalues(xp, form, x)
    n = values.shape[-1]
    return values[..., -1] if norm == "spectral" else 0.5 * (values[..., (n - 1) // 2] + values[..., n // 2])
