"""Gradient: no curvature at all, for parameters that a method leaves to plain gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from kfcore._array import Array, cast, device, namespace, scalar
from kfcore.curvature.base import Cost, Fisher, Method, Needs
from kfcore.curvature.sides import like_of
from kfcore.layers import Layer, Norm
from kfcore.operators import BlockOperator
from kfcore.statistics import GradientRows, RunningAverage


class GradientState(NamedTuple):
    """State of a block without curvature."""

    average: RunningAverage
    """Of nothing; its weight stays zero."""
    scale: Array
    """What gradients are multiplied by, ``[...]``: 1, or ``1 / damping`` of the last refresh."""
    dropped: Array
    """Zero, int32: there are no statistics."""
    kept: Array
    """Zero, int32: a refresh cannot fail."""


@dataclass(frozen=True, kw_only=True)
class Gradient(Method):
    """The gradient itself. Its ``damping`` has no effect unless ``decoupled`` is false.

    The curvature is zero, so that damping is all there is: ``damping (0 + damping I)^-1`` leaves a gradient as it is. It is what methods of
    decoupled damping, such as :class:`kfcore.MAC`, do with parameters of no layer and with normalisations.

    Parameters
    ----------
    decoupled
        Whether the direction is the gradient, or ``(0 + damping I)^-1 grad = grad / damping``, which is to be beside methods whose
        directions are of that scale.
    """

    fisher: Fisher = "forward"
    decoupled: bool = True

    name: ClassVar[str] = "gradient"

    @property
    def tikhonov(self) -> bool:
        """Whether the damping is that of the inverse."""
        return not self.decoupled

    @classmethod
    def beside(cls, method: Method, *, decoupled: bool) -> Gradient:
        """That with the damping and the schedules of ``method``."""
        return cls(
            damping=method.damping,
            stats_every=method.stats_every,
            refresh_every=method.refresh_every,
            stats_decay=method.stats_decay,
            decoupled=decoupled,
        )

    def requires(self, layer: Layer) -> Needs:
        """Nothing is captured."""
        return Needs.NOTHING

    def init(self, layer: Layer, like: Array, leading: tuple[int, ...] = ()) -> GradientState:
        """A scale of 1."""
        xp, like = like_of(like)
        one = xp.ones(leading, dtype=like.dtype, device=device(like))
        counter = xp.zeros(leading, dtype=xp.int32, device=device(like))
        return GradientState(RunningAverage(xp.zeros_like(one), ()), one, counter, counter)

    def reduce(
        self,
        layer: Layer,
        state: GradientState,
        inputs: Array | None = None,
        output_grads: Array | None = None,
        *,
        mask: Array | None = None,
        grad: Array | None = None,
        terms: float | Array = 1.0,
    ) -> Any:
        """Not defined: there are no statistics."""
        raise TypeError("a block without curvature has no statistics: see `requires`")

    def observe(self, state: GradientState, statistics: Any, decay: float | Array | None = None) -> GradientState:
        """Not defined either."""
        raise TypeError("a block without curvature has no statistics: see `requires`")

    def refresh(self, layer: Layer, state: GradientState, damping: float | Array | None = None) -> GradientState:
        """Take the damping, where it has an effect."""
        if self.decoupled:
            return state
        xp, like = namespace(state.scale), state.scale
        return state._replace(scale=1.0 / (scalar(xp, self._damping(damping), like) + xp.zeros_like(like)))

    def precondition(self, layer: Layer, state: GradientState, grad: Array, rows: GradientRows | None = None) -> Array:
        """``grad``, or ``grad / damping``, in the dtype of the state."""
        xp = namespace(grad)
        grad = cast(xp, grad, state.scale.dtype)
        if self.decoupled:
            return grad
        return grad * state.scale[(...,) + (None,) * (grad.ndim - state.scale.ndim)]

    def operator(self, layer: Layer, state: GradientState, *, damped: bool = False) -> BlockOperator:
        """Zero; damped, the multiple of the identity whose inverse is applied."""
        xp, scale = namespace(state.scale), state.scale
        values = 1.0 / scale if damped else xp.zeros_like(scale)
        return BlockOperator(None, None, xp.broadcast_to(values[..., None, None], (*scale.shape, *layer.shape)))

    def cost(self, layer: Layer, itemsize: int = 4) -> Cost:
        """Two numbers and two counters."""
        out, inp = layer.shape
        return Cost(2 * itemsize + 8, 0.0, 0.0, 0.0 if self.decoupled else float(out * inp))


def with_plain_norms(method: Method, layers: Mapping[str, Any], *, decoupled: bool) -> dict[str, Method]:
    """``method`` for each of ``layers`` but normalisations, which get their gradients."""
    plain = Gradient.beside(method, decoupled=decoupled)
    return {name: plain if isinstance(layer, Norm) else method for name, layer in layers.items()}
