"""MAC: the inputs of a layer by their mean alone.

Seung, Lee and Ko, "MAC: An Efficient Gradient Preconditioning using Mean Activation Approximated Curvature", ICDM 2025
(arXiv:2506.08464).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kfcore import linalg
from kfcore._array import Array, Namespace
from kfcore.curvature.base import Cost, Fisher, Method
from kfcore.curvature.foof import FOOF
from kfcore.curvature.gradient import Gradient, with_plain_norms
from kfcore.curvature.rank_one import Deflation, RankOne, leading_value, relative, shares, strength, unit_vector
from kfcore.layers import Embedding, Layer, Norm
from kfcore.operators import BlockOperator, Reflection

FIRST = ("covariance", "decoupled", "rank-one", "none")
RARELY = 10
"""By how much more rarely the matrix of the first layer is inverted than means are refreshed, which costs nothing."""


@dataclass(frozen=True, kw_only=True)
class MAC(RankOne):
    """Mean activation approximated curvature, of decoupled ``damping`` ``rho``: ``G rho (abar abar^T + rho I)^-1``, without a ``1 / rho``.

    The direction of a gradient ``G`` is ``G - (G abar) abar^T / (rho + |abar|^2)``: what lies along the mean input ``abar`` (with the 1 of
    a joint bias) shrinks by ``rho / (rho + |abar|^2)``, all else is left as it is. Steps are therefore never longer than those of gradient
    descent, with whose learning rates they go, and ``rho`` says how much of the mean direction is left: at infinity all, at zero nothing,
    so that a step does not change the mean output of a layer.

    It is FOOF (``F ~= I (x) A``) with ``A = E a a^T`` replaced by ``abar abar^T``. The average is that of the mean, exactly bias-corrected.
    Only inputs are looked at, in the forward pass. A state holds ``2 in`` numbers; a refresh costs ``O(in)``, a step ``4 in out``
    operations.

    Dense layers have the mean over all positions, which kinds of weight sharing do not change; convolutions their mean patch, each group
    its own; tables the shares of their rows. A bias that is separate has the constant input 1 and shrinks by ``rho / (rho + 1)``.
    Normalisations and parameters of no layer get their gradients (:class:`kfcore.Gradient`).

    Parameters
    ----------
    damping
        ``rho``. It is absolute, and ``|abar|^2`` grows with the width and the scale of the inputs; ``kfcore.Damping(value, relative=True)``
        counts in ``|abar|^2 / in``. A first value is 1, for vision transformers 3 (official code).
    decoupled
        If false the direction is the true inverse's, ``1 / rho`` times as long, for all parameters.
    first
        What is done with the first layer, the inputs of which are the data, often centred, so that their mean says little.
        ``"covariance"``: ``G (A + rho I)^-1``, :class:`kfcore.FOOF` with the plain mean of all batches seen. **Its scale is another**, that
        of the true inverse: from ``1 / (rho + lambda_max(A))`` to ``1 / rho``, as in the official code. At ``rho = 1`` the two go together.
        ``"decoupled"``: ``rho G (A + rho I)^-1``, of the scale of all other layers. ``"rank-one"``: like them. ``"none"``: its gradient.
        A :class:`kfcore.FOOF` is taken as it is.

        The first layer is the first convolution or dense layer in the order of the layers, if no table comes before it, for ids have no
        covariance that is worth it (the official language model has no first-layer case either). JAX programs have the order of the forward
        pass, PyTorch modules that of their definition (a different order of the first calls is warned of), arrays that of the dictionary.
    first_layer
        Its name, where that order does not tell.
    stats_every, refresh_every, stats_decay
        As of every method. The official code has 5, 50 and 0.95 for convolutional networks, 5, 5 and 0.99 for vision transformers, and 5, 5
        and 0.95 for its language model; a refresh is as good as free here. That of the first layer comes ten times as rarely.

    Notes
    -----
    Steps of the official code, as options of :class:`kfcore.StepSize` (README and scripts of github.com/hseung88/mac): CIFAR with
    ``learning_rate=0.1, momentum=0.9, weight_decay=5e-4, decay="coupled"``; ResNets on ImageNet ``0.5, 0.9, 2e-5, "decoupled"``; DeiT-S and
    Swin-T ``0.5, 0.9, 1e-4, "decoupled"`` with ``damping=3.0, stats_decay=0.99``; nanoGPT ``1e-3, 0.9, 0.1, "decoupled"`` with
    ``nesterov="delayed"``.

    """

    fisher: Fisher = "forward"
    decoupled: bool = True
    first: Literal["covariance", "decoupled", "rank-one", "none"] | FOOF = "covariance"
    first_layer: str | None = None

    name: ClassVar[str] = "mac"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fisher()
        if not isinstance(self.decoupled, bool):
            raise TypeError(f"`decoupled` must be True or False, got {self.decoupled!r}")
        if not isinstance(self.first, FOOF) and self.first not in FIRST:
            raise ValueError(f"`first` must be one of {', '.join(FIRST)}, or a kfcore.FOOF, got {self.first!r}")
        if self.first_layer is not None and not isinstance(self.first_layer, str):
            raise TypeError(f"`first_layer` must be the name of a layer or None, got {self.first_layer!r}")

    def _check_fisher(self) -> None:
        if self.fisher != "forward":
            raise ValueError(f"`fisher` of MAC must be 'forward', for it looks at inputs alone, got {self.fisher!r}")

    @property
    def tikhonov(self) -> bool:
        """Whether the damping is that of the inverse."""
        return not self.decoupled

    def assign(self, layers: Mapping[str, Any]) -> Mapping[str, Method]:
        """Normalisations to their gradients, the first layer to what ``first`` says, all else to this method."""
        if self.first_layer is not None and self.first_layer not in layers:
            raise ValueError(f"`first_layer` must be one of the layers {', '.join(layers)}, got {self.first_layer!r}")
        assigned = with_plain_norms(self, layers, decoupled=self._plain)
        first = self.first_layer or self.first_of(layers)
        if first is not None and self.first != "rank-one":
            assigned[first] = self._of_first()
        return assigned

    def first_of(self, layers: Mapping[str, Any]) -> str | None:
        """The first convolution or dense layer, if no table comes before it; none where that is not asked."""
        if self.first == "rank-one" or self.first_layer is not None:
            return None
        name = next((name for name, layer in layers.items() if not isinstance(layer, Norm)), None)
        return None if name is None or isinstance(layers[name], Embedding) else name

    def others(self) -> Method:
        """Their gradients."""
        return Gradient.beside(self, decoupled=self._plain)

    @property
    def _plain(self) -> bool:
        """Whether gradients are of the scale of the directions."""
        return self.decoupled

    def _of_first(self) -> Method:
        if isinstance(self.first, FOOF):
            return self.first
        if self.first == "none":
            return self.others()
        return FOOF(
            damping=self.damping,
            stats_every=self.stats_every,
            refresh_every=self.refresh_every if callable(self.refresh_every) else RARELY * self.refresh_every,
            stats_decay=1.0,
            decoupled=self.first == "decoupled" and self.decoupled,
        )

    def cost(self, layer: Layer, itemsize: int = 4) -> Cost:
        """Exact bytes; operations to leading order."""
        out, inp = layer.shape
        rows = 1.0 if layer.input_kind == "ids" else float(inp)
        return Cost(itemsize * (2 * inp + 3) + 8, rows, 4.0 * inp, (4.0 + (not self.decoupled)) * out * inp)

    def _solver(self, xp: Namespace, means: tuple[Any, ...], damping: float | Array, like: Array) -> Deflation:
        mean = means[0]
        size = linalg.length(xp, mean)
        strong = relative(xp, self.rule, strength(xp, damping, like), size, mean.shape[-1])
        share, rest = shares(xp, size, strong)
        scale = xp.ones_like(rest) if self.decoupled else 1.0 / strong / strong + xp.zeros_like(rest)
        return Deflation(share[..., None] * unit_vector(xp, mean, size), None, rest, scale)

    def _applied(self, xp: Namespace, solver: Deflation, grad: Array) -> Array:
        direction = linalg.deflate(xp, grad, solver.input)
        return direction if self.decoupled else solver.scale[..., None, None] * direction

    def _undamped(self, xp: Namespace, means: tuple[Any, ...], layer: Layer) -> BlockOperator:
        """``I (x) abar abar^T``."""
        mean = means[0]
        square = xp.sum(mean * mean, axis=-1)
        values = leading_value(xp, layer.shape[1], square, xp.zeros_like(square))
        return BlockOperator(None, Reflection.onto(mean), values[..., None, :])

    def _damped(self, xp: Namespace, solver: Deflation, layer: Layer) -> BlockOperator:
        """``I (x) (abar abar^T + rho I)``, decoupled over ``rho``."""
        values = leading_value(xp, layer.shape[1], 1.0 / solver.rest, xp.ones_like(solver.rest)) / solver.scale[..., None]
        return BlockOperator(None, Reflection.onto(solver.input), values[..., None, :])
