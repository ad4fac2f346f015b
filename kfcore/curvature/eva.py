"""Eva: both sides of a layer by their means.

Zhang, Shi and Li, "Eva: Practical Second-order Optimization with Kronecker-vectorized Approximation", ICLR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kfcore import linalg
from kfcore._array import Array, Namespace, Schedule
from kfcore.curvature.base import Cost, Fisher
from kfcore.curvature.rank_one import Deflation, RankOne, leading_value, relative, shares, strength, unit_vector
from kfcore.damping import Damping
from kfcore.layers import Layer
from kfcore.operators import BlockOperator, Reflection
from kfcore.statistics import output_mean


@dataclass(frozen=True, kw_only=True)
class Eva(RankOne):
    """Rank one on both sides: ``(ghat ghat^T (x) abar abar^T + damping I)^-1``, which is true Tikhonov damping.

    The direction of a gradient ``G`` is ``(G - (ghat^T G abar) / (gamma + |abar|^2 |ghat|^2) ghat abar^T) / gamma``, ``gamma`` being the
    damping: but for one direction that of gradient descent, ``1 / gamma`` times as long, which is why Eva goes with a trust region
    (``clip=1e-3`` of :class:`kfcore.StepSize`, the paper's KL clip).

    ``abar`` is the mean input as :class:`kfcore.MAC` has it, ``ghat`` the mean over the terms of the loss of the output gradients, summed
    over the positions of an example: the gradient of the mean loss by a bias, whatever the batch size. The averages are of the means, so
    that ``ghat`` tends to zero as the batch grows. A state holds ``2 (in + out)`` numbers; a refresh costs ``O(in + out)``, a step
    ``5 in out`` operations.

    Parameters
    ----------
    damping
        ``gamma``. A first value is 0.03 for convolutional networks, 0.3 for vision transformers (baselines in the code of MAC).
    fisher
        ``"empirical"``: under labels drawn from the model gradients have the mean zero.
    """

    damping: float | Schedule | Damping = 0.03
    fisher: Fisher = "empirical"

    name: ClassVar[str] = "eva"

    _of_outputs: ClassVar[Any] = staticmethod(output_mean)

    def __post_init__(self) -> None:
        if not isinstance(self.damping, Damping):
            object.__setattr__(self, "damping", Damping(self.damping, kind="exact"))
        super().__post_init__()
        if self.rule.kind != "exact":
            raise ValueError(f"`damping` of Eva must be of kind 'exact', got {self.rule.kind!r}")
        if self.fisher != "empirical":
            raise ValueError(f"`fisher` of Eva must be 'empirical', for the mean of drawn gradients is zero, got {self.fisher!r}")

    def cost(self, layer: Layer, itemsize: int = 4) -> Cost:
        """Exact bytes; operations to leading order."""
        out, inp = layer.shape
        rows = 1.0 if layer.input_kind == "ids" else float(inp)
        return Cost(itemsize * (2 * (inp + out) + 3) + 8, rows + out, 4.0 * (inp + out), 5.0 * out * inp)

    def _solver(self, xp: Namespace, means: tuple[Any, ...], damping: float | Array, like: Array) -> Deflation:
        (a, g), (of_a, of_g) = means, [linalg.length(xp, mean) for mean in means]
        # by roots: the product of both lengths may leave the range of the dtype
        size = xp.sqrt(of_a) * xp.sqrt(of_g)
        strong = relative(xp, self.rule, xp.sqrt(strength(xp, damping, like)), size, (a.shape[-1] * g.shape[-1]) ** 0.5)
        unit = xp.maximum(size, strong)
        share, rest = shares(xp, (size / unit) ** 2, (strong / unit) ** 2)
        scale = 1.0 / strong**4 + xp.zeros_like(rest)
        return Deflation(share[..., None] * unit_vector(xp, a, of_a), unit_vector(xp, g, of_g), rest, scale)

    def _applied(self, xp: Namespace, solver: Deflation, grad: Array) -> Array:
        assert solver.output is not None
        left = solver.output[..., :, None]
        size = xp.sum(left * (grad @ solver.input[..., :, None]), axis=-2, keepdims=True) * left
        return solver.scale[..., None, None] * (grad - size * solver.input[..., None, :])

    def _undamped(self, xp: Namespace, means: tuple[Any, ...], layer: Layer) -> BlockOperator:
        """``ghat ghat^T (x) abar abar^T``."""
        a, g = means
        return self._between(xp, layer, g, a, xp.sum(a * a, axis=-1) * xp.sum(g * g, axis=-1), xp.zeros_like(a[..., 0]))

    def _damped(self, xp: Namespace, solver: Deflation, layer: Layer) -> BlockOperator:
        """That and ``gamma I``."""
        gamma = 1.0 / solver.scale
        return self._between(xp, layer, solver.output, solver.input, gamma / solver.rest, gamma)

    def _between(self, xp: Namespace, layer: Layer, g: Any, a: Array, first: Array, others: Array) -> BlockOperator:
        """``first`` in the direction of the means, ``others`` in all others."""
        out, inp = layer.shape
        row = leading_value(xp, inp, first, others)
        rest = xp.zeros_like(row) + others[..., None]
        values = xp.concat([row[..., None, :], xp.broadcast_to(rest[..., None, :], (*rest.shape[:-1], out - 1, inp))], axis=-2)
        return BlockOperator(Reflection.onto(g), Reflection.onto(a), values)
