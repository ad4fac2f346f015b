"""From directions to updates: grafting, trust-region (KL) clip, momentum, weight decay, learning rate."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kfcore import schedule
from kfcore._array import Array, Namespace, Schedule, cast, device, factor_dtype, finite, host, namespace, scalar, truth
from kfcore.curvature.base import count_failure
from kfcore.damping import LevenbergMarquardt, check_positive
from kfcore.linalg import blend, length, scale_all, total
from kfcore.quadratic import Control, QuadraticModel, control

Values = Mapping[str, Any] | Any
"""One value for all parameters, or one a parameter by name."""


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """How a direction ``d`` becomes an update of the parameters ``p``.

    In this order: graft (:func:`graft`, on whole blocks), clip, coupled decay, momentum ``b' = momentum b + d`` (``b' = d`` at first),
    Nesterov ``d + momentum b'``, ``p' = p - learning_rate b'``, decoupled decay. Momentum is that of ``torch.optim.SGD`` without
    dampening.

    Parameters
    ----------
    learning_rate
        Non-negative number or function of the step; 0.1 if not given, or 1 with a learning rate from ``quadratic``.
    momentum
        In [0, 1), or a function of the step.
    nesterov
        Use Nesterov's form of momentum. ``"delayed"``: from the second step on; the first is ``p' = p - learning_rate d``, not
        ``(1 + momentum)`` times as long (as in the language model of the code of MAC).
    weight_decay
        Coefficient of the decay; it is never preconditioned.
    decay
        ``"decoupled"``: ``p' = p - learning_rate weight_decay p + ...``; ``"coupled"``: ``d + weight_decay p`` enters the momentum, which
        decays about ``1 / (1 - momentum)`` times faster for the same coefficient.
    clip
        Trust region kappa: directions are scaled by ``min(1, sqrt(kappa / (learning_rate^2 sum <grad, d>)))``, summed over all
        parameters, which bounds the step's KL divergence to second order (Ba et al. 2017, section 5; elsewhere called KL clip or
        norm constraint). It is applied before momentum.
    graft
        Give each block's direction the norm of its gradient.
    quadratic
        Learning rate, momentum or both from the quadratic model of the loss: the buffer is the last update ``u`` then, ``p' = p + u``.
        The decay must be coupled, for it is part of the loss; ``clip`` bounds ``<u, C u>`` with the exact curvature matrix.
    """

    learning_rate: float | Schedule | None = None
    momentum: float | Schedule = 0.9
    nesterov: bool | Literal["delayed"] = False
    weight_decay: float | Schedule = 0.0
    decay: Literal["decoupled", "coupled"] = "decoupled"
    clip: float | Schedule | None = None
    graft: bool = False
    quadratic: QuadraticModel | None = None

    def __post_init__(self) -> None:
        if self.quadratic is not None and not isinstance(self.quadratic, QuadraticModel):
            raise TypeError(f"`quadratic` must be a kfcore.QuadraticModel, got {self.quadratic!r}")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1.0 if self.quadratic is not None and self.quadratic.learning_rate else 0.1)
        for name in ("learning_rate", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not callable(value):
                check_positive(name, value, zero=True)
        if not callable(self.momentum) and self.momentum >= 1:
            raise ValueError(f"`momentum` must lie in [0, 1), got {self.momentum!r}")
        if self.clip is not None and not callable(self.clip):
            check_positive("clip", self.clip)
        if self.decay not in ("decoupled", "coupled"):
            raise ValueError(f"`decay` must be 'decoupled' or 'coupled', got {self.decay!r}")
        if self.nesterov not in (True, False, "delayed"):
            raise ValueError(f"`nesterov` must be True, False or 'delayed', got {self.nesterov!r}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("`nesterov` needs a positive `momentum`, got 0")
        if self.quadratic is not None:
            if self.nesterov:
                raise ValueError("`nesterov` has no meaning with `quadratic`, whose momentum is a step along the last update")
            coupled(self, self.weight_decay, ("p",))

    @property
    def buffered(self) -> bool:
        """Whether there is a buffer for each parameter."""
        return self.momentum != 0 or (self.quadratic is not None and self.quadratic.momentum)


class StepState(NamedTuple):
    """State of the step rule."""

    momentum: dict[str, Array]
    """Buffer of each parameter, at least float32; empty without momentum."""
    skipped: Array
    """How many steps were skipped because a direction was not finite, int32."""
    control: Control | None = None
    """Of the quadratic model, if the rule has one."""


def init(step: StepSize, params: Mapping[str, Array], damping: LevenbergMarquardt | None = None) -> StepState:
    """Zero buffers of the shapes of ``params``, and the first of an adaptive ``damping``."""
    first = next(iter(params.values()))
    xp = namespace(first)
    buffers = {}
    if step.buffered:
        for name, p in params.items():
            buffers[name] = xp.zeros(p.shape, dtype=factor_dtype(xp, p.dtype), device=device(p))
    skipped = xp.zeros((), dtype=xp.int32, device=device(first))
    if step.quadratic is None:
        return StepState(buffers, skipped)
    like = xp.zeros((), dtype=factor_dtype(xp, first.dtype), device=device(first))
    return StepState(buffers, skipped, control(xp, like, damping))


def apply(
    step: StepSize,
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    directions: Mapping[str, Array],
    state: StepState,
    count: int | Array,
    overrides: Mapping[str, Values] | None = None,
) -> tuple[dict[str, Array], StepState]:
    """Updates, to be added to the parameters, and the new state.

    Parameters
    ----------
    params, grads, directions
        By parameter name, of the parameters' shapes; parameters without a direction get no update.
    count
        The step number, for schedules.
    overrides
        Values for ``"learning_rate"``, ``"weight_decay"`` and ``"clip"`` that replace the configured ones; the first two may
        be one a parameter by name.

    A direction that holds NaN or an infinity makes all updates zero and leaves the buffers as they are.
    """
    values = settings(step, count, overrides, directions)
    first = next(iter(directions.values()))
    xp = namespace(first)
    scale = None if values["clip"] is None else clip_scale(values["clip"], values["learning_rate"], grads, directions)
    mu = plain(values["momentum"])
    ahead = _ahead(xp, mu, host(count)) if step.nesterov == "delayed" else mu
    rates, decays = (each(values[key], directions) for key in ("learning_rate", "weight_decay"))
    ok = truth(xp, all_finite(xp, directions, [mu, *rates, *decays, scale]))
    guard = _Guard(xp, ok)
    made: list[Array] = []
    momentum = dict(state.momentum)
    for (name, d), wd in zip(directions.items(), decays, strict=True):
        if scale is not None:
            d = d * cast(xp, scale, d.dtype)
        if step.decay == "coupled" and nonzero(wd):
            d = d + guard(wd, 0.0, d) * cast(xp, params[name], d.dtype)
        if name in momentum:
            momentum[name] = blend(xp, momentum[name], d, guard(mu, 1.0, d), guard(1.0, 0.0, d), ok)
        if name not in momentum or step.nesterov:
            d = guard.whole(d)
        if name in momentum:
            d = d + guard(ahead, 0.0, d) * momentum[name] if step.nesterov else momentum[name]
        if step.decay == "decoupled" and nonzero(wd):
            d = d + guard(wd, 0.0, d) * cast(xp, params[name], d.dtype)
        made.append(d)
    updates = scale_all(xp, made, [guard(lr, 0.0, d, sign=-1.0) for lr, d in zip(rates, made, strict=True)])
    return dict(zip(directions, updates, strict=True)), state._replace(momentum=momentum, skipped=count_failure(xp, state.skipped, ok))


def settings(step: StepSize, count: int | Array, overrides: Mapping[str, Values] | None, names: Iterable[str]) -> dict[str, Any]:
    """Learning rate, momentum, weight decay and clip of step ``count``; see :func:`apply` for ``overrides``."""
    count = host(count)
    values = {name: schedule.at(getattr(step, name), count) for name in ("learning_rate", "momentum", "weight_decay", "clip")}
    unknown = [name for name in overrides or {} if name not in ("learning_rate", "weight_decay", "clip")]
    if unknown:
        raise ValueError(f"`overrides` must be among learning_rate, weight_decay, clip, damping, got {unknown[0]!r}")
    values |= overrides or {}
    for name in ("learning_rate", "weight_decay"):
        missing = [p for p in names if p not in values[name]] if isinstance(values[name], Mapping) else []
        if missing:
            raise ValueError(f"`{name}` must be given for every parameter with a gradient; it lacks {', '.join(missing)}")
    return values


def coupled(step: StepSize, weight_decay: Values, names: Iterable[str]) -> dict[str, Any]:
    """The decay of each parameter; raise if it is not part of the loss, for then a quadratic model cannot know it."""
    decays = dict(zip(names, each(weight_decay, names), strict=True))
    if step.decay != "coupled" and any(nonzero(decay) for decay in decays.values()):
        raise ValueError("`decay` must be 'coupled' with `quadratic`: the weight decay is part of the loss that is modelled")
    return decays


def decayed(grad: Array, param: Array, decay: Any) -> Array:
    """``grad + decay param``, in the dtype of ``grad`` or float32."""
    xp = namespace(grad)
    wide = cast(xp, grad, factor_dtype(xp, grad.dtype))
    return wide + _number(xp, decay, wide) * cast(xp, param, wide.dtype)


def guarded(directions: Mapping[str, Array], state: StepState) -> tuple[dict[str, Array], StepState]:
    """``directions``, or zeros and a step counted as skipped where one of them is not finite: for those who make their own step."""
    xp = namespace(next(iter(directions.values())))
    ok = truth(xp, all_finite(xp, directions, []))
    guard = _Guard(xp, ok)
    return {name: guard.whole(d) for name, d in directions.items()}, state._replace(skipped=count_failure(xp, state.skipped, ok))


class _Guard:
    """Hyper-parameters of a step that is taken only where ``ok``: their values, or neutral ones. Each is made once a step."""

    def __init__(self, xp: Namespace, ok: bool | Array) -> None:
        self._xp, self._ok, self._made = xp, ok, {}

    def whole(self, x: Array) -> Array:
        """``x``, or zeros."""
        if isinstance(self._ok, bool):
            return x if self._ok else self._xp.zeros_like(x)
        return self._xp.where(self._ok, x, self(0.0, 0.0, x))

    def __call__(self, value: Any, neutral: float, like: Array, sign: float = 1.0) -> float | Array:
        if self._ok is True:
            return sign * _number(self._xp, value, like)
        if self._ok is False:
            return sign * neutral
        key = (value if isinstance(value, (int, float)) else id(value), neutral, like.dtype, sign)
        if key not in self._made:
            made = self._xp.where(self._ok, scalar(self._xp, value, like), scalar(self._xp, neutral, like))
            self._made[key] = made if sign == 1.0 else sign * made
        return self._made[key]


def clip_scale(clip: float | Array, learning_rate: Values, grads: Mapping[str, Array], directions: Mapping[str, Array]) -> Array:
    """``min(1, sqrt(clip / sum lr^2 <grad, direction>))``, 0-d."""
    first = next(iter(directions.values()))
    xp = namespace(first)
    total = None
    for (name, d), rate in zip(directions.items(), each(learning_rate, directions), strict=True):
        rate = _number(xp, rate, d)
        part = rate * rate * xp.sum(cast(xp, grads[name], d.dtype) * d)
        total = part if total is None else total + cast(xp, part, total.dtype)
    assert total is not None
    one = xp.ones_like(total)
    positive = total > 0
    bound = xp.sqrt(_number(xp, clip, total) / xp.where(positive, total, one))
    return xp.where(positive, xp.minimum(bound, one), one)


def graft(grads: Mapping[str, Array], directions: Mapping[str, Array]) -> dict[str, Array]:
    """``directions`` rescaled to the Frobenius norms of ``grads``, by block."""
    grafted = {}
    for name, direction in directions.items():
        xp = namespace(direction)
        norm, own = length(xp, cast(xp, grads[name], direction.dtype), None), length(xp, direction, None)
        grafted[name] = direction * (norm / xp.where(own > 0, own, xp.ones_like(own)))
    return grafted


def all_finite(xp: Namespace, directions: Mapping[str, Array], values: Iterable[Any]) -> bool | Array:
    """Whether all directions and hyper-parameters (``None`` aside) are finite, 0-d."""
    ok = finite(xp, total(xp, list(directions.values())))  # NaN or infinite if an entry is
    for value in {id(value): value for value in values if value is not None}.values():
        ok = ok & finite(xp, value)
    return ok


def each(values: Values, names: Iterable[str]) -> list[Any]:
    """The value of each of ``names``."""
    if isinstance(values, Mapping):
        return [plain(values[name]) for name in names]
    return [plain(values)] * len(list(names))


def plain(value: Any) -> Any:
    """A number of any kind as a float; an array as it is."""
    return float(value) if isinstance(value, (float, numbers.Real)) else value


def _number(xp: Namespace, value: Any, like: Array) -> Any:
    """A Python number as it is (it takes the dtype of what it meets), an array in the dtype of ``like``."""
    return value if isinstance(value, (int, float)) else scalar(xp, value, like)


def _ahead(xp: Namespace, mu: Any, count: int | Array) -> Any:
    """How far a delayed Nesterov step goes along the buffer: at the first step not at all."""
    if isinstance(count, int):
        return mu if count else 0.0
    return xp.where(count == 0, 0.0, mu)


def nonzero(value: Any) -> bool:
    """Whether a setting may be other than zero; an array may."""
    return not isinstance(value, (int, float)) or value != 0
