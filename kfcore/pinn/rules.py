"""How far to go along a direction: by a search on a grid, by the quadratic model of the loss, or as told."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

from kfcore._array import Array, Namespace, cond, scalar
from kfcore.damping import LevenbergMarquardt, check_positive
from kfcore.pinn.linearised import Linearised, Vector, dot
from kfcore.quadratic import Model, minimum


class Around(NamedTuple):
    """The loss around the parameters."""

    lin: Linearised
    gradient: Vector
    damping: Array
    """``lambda``, 0-d."""
    loss: Array
    """At the parameters, 0-d."""
    losses: Callable[[Vector, Sequence[Array]], list[Array]]
    """``(v, [rate, ...])`` -> the loss at the parameters plus each rate times ``v``, 0-d."""

    def model(self, xp: Namespace, vectors: Sequence[Vector]) -> Model:
        """The quadratic model along ``vectors``, with the exact Gauss-Newton matrix and ``lambda``."""
        moved = xp.stack([self.lin.push(v) for v in vectors])
        like = self.loss
        inner = [[scalar(xp, dot(xp, v, u), like) for u in vectors] for v in vectors]
        slopes = xp.stack([scalar(xp, dot(xp, v, self.gradient), like) for v in vectors])
        return Model(moved @ moved.mT, self.damping * xp.stack([xp.stack(row) for row in inner]), slopes)


class Move(NamedTuple):
    """What a rule decides."""

    rate: Array
    """On the direction, 0-d."""
    momentum: Array
    """On the last update, 0-d."""
    exponent: Array
    """Of two, where the next search begins."""
    promised: Array | None = None
    """Change of the loss by the model."""
    after: Array | None = None
    """The loss afterwards, if it was looked at."""


@dataclass(frozen=True)
class LineSearch:
    """The best rate ``2^e`` of the batch's loss, ``e`` whole between ``smallest`` and ``largest``, on ``direction + momentum last``.

    First ``radius`` exponents on either side of the last one are tried, then all others if the best lies at the end. If none
    makes the loss smaller the parameters stay.

    Parameters
    ----------
    radius
        How many. At least as large as the whole grid, all are tried at once.
    smallest, largest
        Of ``e``.
    momentum
        In [0, 1); of the last update.
    together
        How many rates are evaluated in one pass: as stacked networks, which take so many times the memory.
    """

    radius: int = 2
    _: KW_ONLY
    smallest: int = -30
    largest: int = 0
    momentum: float = 0.0
    together: int = 1

    def __post_init__(self) -> None:
        for name in ("radius", "smallest", "largest", "together"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or (name in ("radius", "together") and value < 1):
                raise ValueError(
                    f"`{name}` of LineSearch must be a {'positive ' if name in ('radius', 'together') else ''}int, got {value!r}"
                )
        if self.smallest > self.largest:
            raise ValueError(f"`smallest` must not be above `largest`, got {self.smallest!r} and {self.largest!r}")
        _check_momentum("LineSearch", self.momentum)

    @property
    def start(self) -> float:
        """The first exponent."""
        return float(self.largest)

    def decide(self, xp: Namespace, around: Around, direction: Vector, last: Vector | None, state: Any) -> Move:
        """Where to go."""
        mu = scalar(xp, self.momentum, around.loss)
        v = direction if last is None else {n: d + mu * last[n] for n, d in direction.items()}
        count, low, high = 2 * self.radius + 1, float(self.smallest), float(self.largest)
        whole = [scalar(xp, float(e), around.loss) for e in range(self.smallest, self.largest + 1)]

        def search(exponents: list[Array]) -> tuple[Array, Array]:
            rates = [2.0**e for e in exponents]
            found = [xp.where(xp.isfinite(x), x, xp.full_like(x, math.inf)) for x in around.losses(v, rates)]
            values, places = xp.stack(found), xp.stack(exponents)
            best = xp.min(values)
            # of equal ones the largest step
            return best, xp.max(xp.where(values == best, places, xp.full_like(places, low)))

        if count >= len(whole):
            best, exponent = search(whole)
        else:
            centre = xp.clip(state.exponent, low + self.radius, high - self.radius)
            best, exponent = search([centre + float(k) for k in range(-self.radius, self.radius + 1)])
            end = ((exponent == centre - self.radius) & (exponent > low)) | ((exponent == centre + self.radius) & (exponent < high))
            best, exponent = cond(end, lambda *_: search(whole), lambda *found: found, best, exponent)
        better = best < around.loss
        rate = xp.where(better, 2.0**exponent, xp.zeros_like(exponent))
        return Move(rate, rate * mu, exponent, after=xp.where(better, best, around.loss))


@dataclass(frozen=True)
class Quadratic:
    """Rate and momentum that minimise the quadratic model of the loss, with the exact Gauss-Newton matrix (Martens and Grosse 2015).

    No pass through the network is needed: products with the Jacobian come from what the layers saw.

    Parameters
    ----------
    momentum
        From the model, together with the rate. Without, the step is along the direction alone.
    reject
        Leave the parameters where the loss went up, which evaluates it once more. An adaptive damping does so always.
    """

    momentum: bool = True
    _: KW_ONLY
    reject: bool = False

    def __post_init__(self) -> None:
        for name in ("momentum", "reject"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` of Quadratic must be True or False, got {getattr(self, name)!r}")

    @property
    def start(self) -> float:
        """Not searched for."""
        return 0.0

    def decide(self, xp: Namespace, around: Around, direction: Vector, last: Vector | None, state: Any) -> Move:
        """Where to go."""
        vectors = [direction] if last is None else [direction, last]
        model = around.model(xp, vectors)
        w = minimum(xp, model, None, None)
        return Move(w[0], xp.zeros_like(w[0]) if last is None else w[1], state.exponent, promised=model.value(w))


@dataclass(frozen=True)
class Fixed:
    """A rate and a momentum that are given.

    Parameters
    ----------
    learning_rate
        Positive.
    momentum
        In [0, 1); of the last update.
    bound
        Largest length of the update, which is shortened to it.
    reject
        As of :class:`Quadratic`.
    """

    learning_rate: float = 1.0
    _: KW_ONLY
    momentum: float = 0.0
    bound: float | None = None
    reject: bool = False

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        _check_momentum("Fixed", self.momentum)
        if self.bound is not None:
            check_positive("bound", self.bound)
        if not isinstance(self.reject, bool):
            raise ValueError(f"`reject` of Fixed must be True or False, got {self.reject!r}")

    @property
    def start(self) -> float:
        """Not searched for."""
        return 0.0

    def decide(self, xp: Namespace, around: Around, direction: Vector, last: Vector | None, state: Any) -> Move:
        """Where to go."""
        rate, mu = (scalar(xp, x, around.loss) for x in (self.learning_rate, self.momentum))
        if self.bound is not None:
            v = {n: rate * d if last is None else rate * d + mu * last[n] for n, d in direction.items()}
            length = xp.sqrt(scalar(xp, dot(xp, v, v), rate))
            share = xp.minimum(xp.ones_like(rate), self.bound / xp.where(length > 0, length, xp.ones_like(length)))
            rate, mu = share * rate, share * mu
        return Move(rate, mu, state.exponent)


Rule = LineSearch | Quadratic | Fixed


def uses_last(rule: Rule) -> bool:
    """Whether a rule looks at the last update."""
    return bool(rule.momentum)


def rejects(rule: Rule, adaptive: LevenbergMarquardt | None) -> bool:
    """Whether a step that makes the loss larger is taken back."""
    return not isinstance(rule, LineSearch) and (rule.reject or adaptive is not None)


def combined(move: Move, direction: Vector, last: Vector | None) -> Mapping[str, Array]:
    """``rate direction + momentum last``."""
    if last is None:
        return {n: move.rate * d for n, d in direction.items()}
    return {n: move.rate * d + move.momentum * last[n] for n, d in direction.items()}


def _check_momentum(kind: str, value: Any) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= float(value) < 1:
        raise ValueError(f"`momentum` of {kind} must lie in [0, 1), got {value!r}")
