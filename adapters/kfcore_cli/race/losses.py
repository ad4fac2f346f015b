"""Losses, each a mean over its terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import kfcore
from kfcore_cli.race.interfaces import Array
from kfcore_cli.race.layers import sigmoid

Kind = Literal["cross-entropy", "squared error", "binary cross-entropy"]


@dataclass(frozen=True)
class Loss:
    """A loss of outputs ``z [N, ..., outputs]``.

    ``"cross-entropy"`` compares logits with integer labels ``[N, ...]``; ``"squared error"`` numbers and ``"binary cross-entropy"`` logits
    with targets of the shape of ``z``, as means over all entries.
    """

    kind: Kind

    def value(self, xp: Any, z: Array, y: Array) -> Array:
        """The loss, a 0-d array."""
        if self.kind == "squared error":
            return xp.mean((z - y) ** 2)
        if self.kind == "binary cross-entropy":
            positive = xp.where(z > 0, z, xp.zeros_like(z))
            return xp.mean(positive - z * y + xp.log1p(xp.exp(-xp.abs(z))))
        shifted = z - xp.max(z, axis=-1, keepdims=True)
        log_p = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
        return -xp.sum(xp.where(_is_label(xp, z, y), log_p, xp.zeros_like(z))) / self.terms(z)

    def gradient(self, xp: Any, z: Array, y: Array) -> Array:
        """Gradient of the loss by ``z``."""
        if self.kind == "squared error":
            return (z - y) * (2.0 / self.terms(z))
        if self.kind == "binary cross-entropy":
            return (sigmoid(xp, z) - y) / self.terms(z)
        shifted = xp.exp(z - xp.max(z, axis=-1, keepdims=True))
        p = shifted / xp.sum(shifted, axis=-1, keepdims=True)
        return xp.where(_is_label(xp, z, y), p - 1.0, p) / self.terms(z)

    def terms(self, z: Array) -> float:
        """Number of terms in the mean."""
        return self.curvature().terms(z)

    def curvature(self) -> Any:
        """As kfcore knows it."""
        return {
            "cross-entropy": kfcore.CrossEntropy,
            "squared error": kfcore.MSE,
            "binary cross-entropy": kfcore.BCEWithLogits,
        }[self.kind]()


def _is_label(xp: Any, z: Array, y: Array) -> Array:
    """``[N, ..., classes]``: whether a class is the label."""
    return y[..., None] == xp.arange(z.shape[-1], dtype=y.dtype)
