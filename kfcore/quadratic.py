"""The quadratic model of the loss: learning rate, momentum and damping from it.

Martens and Grosse 2015, sections 6.4 to 7. At parameters ``p`` with gradient ``g`` the model of an update ``d`` is

    M(d) = <g, d> + 1/2 <d, (C + lambda I) d>

with ``C`` the generalised Gauss-Newton matrix of the loss on the batch, exact and of all parameters together, and ``lambda`` the damping.
It is looked at only along two vectors, the direction and the last update, so that two products with ``C`` a step are enough. A weight
decay is part of the loss here, as ``weight_decay / 2 |p|^2``, and so of ``g`` and of the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from kfcore._array import Array, Namespace, cast, device, scalar
from kfcore.damping import LevenbergMarquardt


class Objective(Protocol):
    """What an adapter (or a user) lends: the loss on the batch whose gradient it is, as a function of the parameters."""

    def gram(self, vectors: Sequence[Mapping[str, Array]]) -> Array:
        """``<v_i, C v_j> [k, k]`` for updates ``v_1, ..., v_k`` of the parameters by name, ``C`` as at the head of this module."""
        ...

    def loss(self, update: Mapping[str, Array] | None) -> float | Array:
        """The loss at the parameters plus ``update``, or at the parameters: a number or a 0-d array."""
        ...


@dataclass(frozen=True, kw_only=True)
class QuadraticModel:
    """Which numbers of a step minimise the quadratic model of the loss, ``d = -learning_rate direction + momentum d_last``.

    Every step needs two products with the exact curvature matrix (two forward-mode derivatives), and with ``reject`` or an adaptive
    damping evaluations of the loss. It is made for large batches and losses without noise of their own (dropout): on small batches the
    model follows the batch, and fixed numbers do better.

    Parameters
    ----------
    learning_rate
        Take the learning rate from the model. The step rule's own is then a factor on the whole step, 1 if not given. Else the step
        rule's own is the learning rate.
    momentum
        Take the momentum from the model. Else it is the step rule's own.
    reject
        Leave the parameters as they are where the loss went up, or is not finite, and raise an adaptive damping at once. Evaluates the
        loss twice a step.
    """

    learning_rate: bool = True
    momentum: bool = True
    reject: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rate", "momentum", "reject"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` of QuadraticModel must be True or False, got {getattr(self, name)!r}")


class Control(NamedTuple):
    """What a step rule with a quadratic model carries on and last found, 0-d arrays."""

    damping: Array
    """``lambda``, if it is adaptive; else of no meaning."""
    factored: Array
    """``gamma``, whose square takes the place of ``lambda`` in factored damping while it is searched for."""
    learning_rate: Array
    """That of the last step."""
    momentum: Array
    """That of the last step."""
    ratio: Array
    """Change of the loss over that of the model, when it was last looked at; NaN before."""
    rejected: Array
    """How many steps were taken back, int32."""


def control(xp: Namespace, like: Array, rule: LevenbergMarquardt | None) -> Control:
    """The first of them, beside ``like``."""
    start = 1.0 if rule is None else rule.initial
    zero, nan = scalar(xp, 0.0, like), scalar(xp, float("nan"), like)
    first = scalar(xp, start, like)
    return Control(first, xp.sqrt(first), zero, zero, nan, xp.zeros((), dtype=xp.int32, device=device(like)))


class Model(NamedTuple):
    """The quadratic model of the updates ``w_1 v_1 + ... + w_k v_k``, as a function of ``w [k]``; k is 1 or 2."""

    curvature: Array
    """``<v_i, C v_j> [k, k]``."""
    penalty: Array
    """``<v_i, (lambda + weight_decay) v_j> [k, k]``."""
    slopes: Array
    """``<g, v_i> [k]``."""

    def value(self, w: Array) -> Array:
        """``M(w)``, 0-d."""
        return _dot(self.slopes, w) + 0.5 * _dot(w, _times(self.curvature + self.penalty, w))

    def divergence(self, w: Array) -> Array:
        """``<d, C d>`` of the update, 0-d: twice the KL divergence to second order where ``C`` is the Fisher matrix."""
        return _dot(w, _times(self.curvature, w))


def minimum(xp: Namespace, model: Model, first: float | Array | None, second: float | Array | None) -> Array:
    """The ``w [k]`` at the least value of the model; a coefficient that is given stays as it is.

    A vector of no length gets no coefficient. Where both vectors are parallel to the precision of the dtype the first one has it all.
    """
    a, b = model.curvature + model.penalty, model.slopes
    if b.shape[0] == 1:
        return scalar(xp, first, b)[None] if first is not None else _alone(xp, a[0, 0], -b[0])[None]
    if first is not None:
        w = scalar(xp, first, b)
        v = _alone(xp, a[1, 1], -b[1] - a[0, 1] * w) if second is None else scalar(xp, second, b)
    elif second is not None:
        v = scalar(xp, second, b)
        w = _alone(xp, a[0, 0], -b[0] - a[0, 1] * v)
    else:
        # in units in which both have length one, where the matrix is [[1, r], [r, 1]]
        one, two = (xp.sqrt(xp.maximum(a[i, i], xp.zeros_like(b[0]))) for i in (0, 1))
        x, y, r = _alone(xp, one, b[0]), _alone(xp, two, b[1]), _alone(xp, two, _alone(xp, one, a[0, 1]))
        rest = 1.0 - r * r
        apart = (two > 0) & (rest > float(xp.finfo(b.dtype).eps) ** 0.5)
        safe = xp.where(apart, rest, xp.ones_like(rest))
        w = xp.where(apart, _alone(xp, one, (r * y - x) / safe), _alone(xp, one, -x))
        v = xp.where(apart, _alone(xp, two, (r * x - y) / safe), xp.zeros_like(w))
    return xp.stack([w, v])


def judged(xp: Namespace, rise: Array, before: Array, promised: Array, rule: LevenbergMarquardt | None) -> tuple[Array, Array]:
    """The ratio of the loss's change to the one ``promised`` by the model, and whether the step may stand; all 0-d.

    What the loss, ``before`` the step, cannot show in its dtype is no reason to change anything.
    """
    noise = 10.0 * float(xp.finfo(promised.dtype).eps) * xp.abs(before)
    shown = ~((xp.abs(promised) <= noise) & (xp.abs(rise) <= noise))
    level = 1.0 if rule is None else 0.5 * (rule.low + rule.high)
    ratio = rise / xp.where(promised != 0, promised, xp.ones_like(promised))
    return xp.where(shown, ratio, xp.full_like(ratio, level)), ~shown | (rise <= 0)


def inner(
    xp: Namespace, vectors: Sequence[Mapping[str, Array]], others: Sequence[Mapping[str, Array]], weights: Mapping[str, Any]
) -> Array:
    """``sum_p weights_p <v_i, u_j>_p`` over the names of ``weights``, ``[k, l]``; a weight is a number, or one a stacked matrix."""
    rows = []
    for v in vectors:
        for u in others:
            total = None
            for name, weight in weights.items():
                x = v[name]
                product = x * cast(xp, u[name], x.dtype)
                stacked = getattr(weight, "ndim", 0) > 0
                part = xp.sum(product, axis=(-2, -1)) if stacked else xp.sum(product)
                part = (weight if isinstance(weight, float | int) else scalar(xp, weight, part)) * part
                part = xp.sum(part) if stacked else part
                total = part if total is None else total + cast(xp, part, total.dtype)
            rows.append(total)
    return xp.reshape(xp.stack(rows), (len(vectors), len(others)))


def _alone(xp: Namespace, square: Array, value: Array) -> Array:
    """``value / square``, or zero where there is no square."""
    return xp.where(square > 0, value / xp.where(square > 0, square, xp.ones_like(square)), xp.zeros_like(value))


def _times(matrix: Array, w: Array) -> Array:
    return (matrix @ w[:, None])[:, 0]


def _dot(x: Array, y: Array) -> Array:
    return (x[None, :] @ y[:, None])[0, 0]
