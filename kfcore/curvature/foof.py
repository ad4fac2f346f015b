"""FOOF: the inputs of a layer by their second moment, its outputs not at all.

Benzing, "Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kfcore._array import Array, Namespace, Schedule, scalar
from kfcore.curvature.base import Fisher, Method
from kfcore.curvature.gradient import Gradient, with_plain_norms
from kfcore.curvature.kfac import KFAC, Inverses
from kfcore.curvature.kronecker import Eigenbases
from kfcore.damping import Damping
from kfcore.factors import raised, times


@dataclass(frozen=True, kw_only=True)
class FOOF(KFAC):
    """KFAC of the inputs alone, ``F ~= I (x) A``: the direction of a gradient ``G`` is ``G (A + damping I)^-1``.

    It is :class:`kfcore.KFAC` with ``fisher="forward"``, and damping on ``A`` only: only inputs are looked at, in the forward pass.
    Normalisations and parameters of no layer have what ``A = 0`` would give, ``grad / damping``.

    Parameters
    ----------
    damping
        ``rho``. A first value is 1 (baselines in the code of MAC, with a learning rate of 0.1 on CIFAR).
    decoupled
        ``rho G (A + rho I)^-1`` in place of it: never longer than the gradient, as the directions of :class:`kfcore.MAC`.
    """

    damping: float | Schedule | Damping = 1.0
    fisher: Fisher = "forward"
    decoupled: bool = False

    name: ClassVar[str] = "foof"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fisher != "forward":
            raise ValueError(f"`fisher` of FOOF must be 'forward', for it looks at inputs alone, got {self.fisher!r}: see kfcore.KFAC")
        if not isinstance(self.decoupled, bool):
            raise TypeError(f"`decoupled` must be True or False, got {self.decoupled!r}")

    @property
    def tikhonov(self) -> bool:
        """Whether the damping is that of the inverse."""
        return not self.decoupled

    def assign(self, layers: Mapping[str, Any]) -> Mapping[str, Method]:
        """Normalisations to their gradients, all else to this method."""
        return with_plain_norms(self, layers, decoupled=self.decoupled)

    def others(self) -> Method:
        """Their gradients."""
        return Gradient.beside(self, decoupled=self.decoupled)

    def _inverted(self, xp: Namespace, sides: list[Any], values: list[Any]) -> list[tuple[Inverses, Array, list[Array | None]]]:
        found = super()._inverted(xp, sides, values)
        if not self.decoupled:
            return found
        return [
            (solver._replace(input=times(forms[1], solver.input, scalar(xp, raised(xp, forms[1], a, value), a))), ok, taken)
            for (solver, ok, taken), (forms, a, _), value in zip(found, sides, values, strict=True)
        ]

    def _decomposed(
        self, xp: Namespace, sides: list[Any], values: list[Any], states: Sequence[Any]
    ) -> list[tuple[Eigenbases, Array, list[Array | None]]]:
        found = super()._decomposed(xp, sides, values, states)
        if not self.decoupled:
            return found
        # rho / (l + rho) is 1 / (l / rho + 1)
        return [
            (solver._replace(input_values=solver.input_values / solver.damping[..., None], damping=xp.ones_like(solver.damping)), ok, taken)
            for solver, ok, taken in found
        ]
