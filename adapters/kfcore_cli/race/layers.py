"""Layers of the networks in the race."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import kfcore
from kfcore_cli.race.interfaces import Array


@dataclass(frozen=True)
class Dense:
    """``y = x W^T + b``, begun with uniform weights of variance ``2 / (in + out)`` and a bias of zero (Glorot and Bengio 2010)."""

    name: str
    in_features: int
    out_features: int

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Weight ``[out, in]`` and bias ``[out]``."""
        bound = math.sqrt(6.0 / (self.in_features + self.out_features))
        return {"weight": rng.uniform(-bound, bound, (self.out_features, self.in_features)), "bias": np.zeros(self.out_features)}

    def forward(self, xp: Any, params: Mapping[str, Array], x: Array) -> Array:
        """``[N, in]`` to ``[N, out]``."""
        return x @ params["weight"].T + params["bias"]

    def backward(self, xp: Any, params: Mapping[str, Array], x: Array, y: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """Gradients at the input and of weight and bias."""
        return dy @ params["weight"], {"weight": dy.T @ x, "bias": xp.sum(dy, axis=0)}

    def curvature(self) -> kfcore.Linear:
        """As kfcore knows it."""
        return kfcore.Linear(self.in_features, self.out_features)


@dataclass(frozen=True)
class Activation:
    """An elementwise function."""

    kind: Literal["tanh", "sigmoid", "relu"]
    name: None = None

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """No parameters."""
        return {}

    def forward(self, xp: Any, params: Mapping[str, Array], x: Array) -> Array:
        """The function's value."""
        if self.kind == "relu":
            return xp.where(x > 0, x, xp.zeros_like(x))
        return xp.tanh(x) if self.kind == "tanh" else sigmoid(xp, x)

    def backward(self, xp: Any, params: Mapping[str, Array], x: Array, y: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """Its derivative, from its value, times ``dy``."""
        if self.kind == "relu":
            return xp.where(y > 0, dy, xp.zeros_like(dy)), {}
        return dy * (1.0 - y * y if self.kind == "tanh" else y * (1.0 - y)), {}

    def curvature(self) -> None:
        """It has none."""
        return


def sigmoid(xp: Any, x: Array) -> Array:
    """``1 / (1 + exp(-x))`` without overflow."""
    return 0.5 + 0.5 * xp.tanh(0.5 * x)
