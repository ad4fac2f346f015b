"""SMAC: MAC with the mean squares of the output gradients for a left factor, as the authors of MAC have it in their code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kfcore._array import Array, Namespace
from kfcore.curvature.base import Cost, Fisher
from kfcore.curvature.mac import MAC
from kfcore.curvature.rank_one import Deflation
from kfcore.damping import Damping
from kfcore.factors import damped
from kfcore.layers import Layer
from kfcore.operators import BlockOperator
from kfcore.statistics import output_squares


@dataclass(frozen=True, kw_only=True)
class SMAC(MAC):
    """MAC with a diagonal left factor; ``damping`` ``rho`` is added to both sides and decoupled on the right alone.

    The direction of a gradient ``G`` is ``diag(1 / (z + rho)) (G - (G abar) abar^T / (rho + |abar|^2))``, ``z`` being the diagonal of
    KFAC's output factor: the mean over examples of the sum over positions of the squared output gradients. The block is
    ``F ~= diag(z) (x) abar abar^T``, plainly damped, its inverse times ``rho``. All is as :class:`kfcore.MAC` says but for what follows.

    Output gradients are those of each example's own loss, as everywhere here, not divided by the batch size, so that ``rho`` keeps its
    meaning when that changes. The official code squares gradients of the mean loss and averages over positions too: of N examples at S
    positions its ``z`` is this one over ``N^2 S``, nearly always far below ``rho``, and its left factor nearly ``1 / rho``.

    The first layer is what ``first`` says, without a left factor, as in the official code for transformers; that for CIFAR has one there.
    Normalisations and parameters of no layer have ``grad / rho``, which is of the scale of the directions. A state holds ``2 (in + out)``
    numbers.
    """

    fisher: Fisher = "empirical"

    name: ClassVar[str] = "smac"

    _of_outputs: ClassVar[Any] = staticmethod(output_squares)

    def __post_init__(self) -> None:
        if not isinstance(self.damping, Damping):
            object.__setattr__(self, "damping", Damping(self.damping, kind="plain"))
        super().__post_init__()
        if self.rule.kind != "plain" or self.rule.relative:
            raise ValueError(f"`damping` of SMAC must be of kind 'plain' and not relative, for both sides have it, got {self.damping!r}")

    @property
    def tikhonov(self) -> bool:
        """It is not: the damping is added to both sides."""
        return False

    def _check_fisher(self) -> None:
        if self.fisher == "forward":
            raise ValueError("`fisher` of SMAC must be 'empirical', 'mc' or 'exact', for it looks at output gradients, got 'forward'")

    @property
    def _plain(self) -> bool:
        return False

    def cost(self, layer: Layer, itemsize: int = 4) -> Cost:
        """Exact bytes; operations to leading order."""
        right, (out, inp) = super().cost(layer, itemsize), layer.shape
        flops = right.statistics_flops + 2.0 * out, right.refresh_flops + 2.0 * out, right.step_flops + out * inp
        return Cost(right.bytes + 2 * itemsize * out, *flops)

    def _unfitted(self, xp: Namespace, output: Array | None) -> Array | None:
        return None if output is None else xp.ones_like(output)

    def _solver(self, xp: Namespace, means: tuple[Any, ...], damping: float | Array, like: Array) -> Deflation:
        return super()._solver(xp, means, damping, like)._replace(output=1.0 / damped(xp, "diagonal", means[1], damping))

    def _applied(self, xp: Namespace, solver: Deflation, grad: Array) -> Array:
        assert solver.output is not None
        return solver.output[..., :, None] * super()._applied(xp, solver, grad)

    def _undamped(self, xp: Namespace, means: tuple[Any, ...], layer: Layer) -> BlockOperator:
        """``diag(z) (x) abar abar^T``."""
        right = super()._undamped(xp, means, layer)
        return BlockOperator(None, right.input_basis, means[1][..., :, None] * right.values)

    def _damped(self, xp: Namespace, solver: Deflation, layer: Layer) -> BlockOperator:
        """``(diag(z) + rho I) (x) (abar abar^T + rho I)``, decoupled over ``rho``."""
        right, output = super()._damped(xp, solver, layer), solver.output
        assert output is not None
        return BlockOperator(None, right.input_basis, right.values / output[..., :, None])
