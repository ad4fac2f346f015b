"""Layers of the networks in the race."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
        """``[N, ..., in]`` to ``[N, ..., out]``."""
        return x @ params["weight"].T + params["bias"]

    def backward(self, xp: Any, params: Mapping[str, Array], x: Array, y: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """Gradients at the input and of weight and bias."""
        rows = xp.reshape(dy, (-1, self.out_features))
        return dy @ params["weight"], {"weight": rows.T @ xp.reshape(x, (-1, self.in_features)), "bias": xp.sum(rows, axis=0)}

    def curvature(self) -> kfcore.Linear:
        """As kfcore knows it."""
        return kfcore.Linear(self.in_features, self.out_features)


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution of ``[N, in, H, W]``, begun as :class:`Dense` with ``kernel^2`` times the widths."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    padding: int = 0

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Weight ``[out, in, kernel, kernel]`` and bias ``[out]``."""
        bound = math.sqrt(6.0 / ((self.in_channels + self.out_channels) * self.kernel**2))
        shape = (self.out_channels, self.in_channels, self.kernel, self.kernel)
        return {"weight": rng.uniform(-bound, bound, shape), "bias": np.zeros(self.out_channels)}

    def forward(self, xp: Any, params: Mapping[str, Array], x: Array) -> Array:
        """``[N, in, H, W]`` to ``[N, out, H', W']``: patches times kernels."""
        layer = replace(self.curvature(), bias=None)
        y = self._patches(xp, layer, x) @ layer.matrices({"weight": params["weight"]})[""].T + params["bias"]
        return _channels_first(xp, y, x.shape[0], *(1 + (n + 2 * self.padding - self.kernel) // self.stride for n in x.shape[2:]))

    def backward(self, xp: Any, params: Mapping[str, Array], x: Array, y: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """Gradients at the input (by the transposed convolution) and of weight and bias."""
        layer = replace(self.curvature(), bias=None)
        _, rows = layer.capture(x, dy)
        rows = xp.reshape(rows, (-1, self.out_channels))
        own = layer.parameters_of({"": rows.T @ self._patches(xp, layer, x)}) | {"bias": xp.sum(rows, axis=0)}
        more = tuple((n + 2 * self.padding - self.kernel) % self.stride for n in x.shape[2:])
        back = replace(layer, in_channels=self.out_channels, out_channels=self.in_channels, transposed=True, output_padding=more)
        dx = self._patches(xp, back, dy) @ back.matrices({"weight": params["weight"]})[""].T
        return _channels_first(xp, dx, *(x.shape[i] for i in (0, 2, 3))), own

    def curvature(self) -> kfcore.Conv:
        """As kfcore knows it."""
        return kfcore.Conv(self.in_channels, self.out_channels, (self.kernel,) * 2, self.stride, self.padding)

    def torch_module(self) -> Any:
        """As PyTorch knows it."""
        from torch.nn import Conv2d

        return Conv2d(self.in_channels, self.out_channels, self.kernel, self.stride, self.padding)

    def jax_forward(self, params: Mapping[str, Array], x: Array) -> Array:
        """As JAX knows it: patches are no convolution to a compiler."""
        from jax import lax

        y = lax.conv_general_dilated(x, params["weight"], (self.stride,) * 2, [(self.padding,) * 2] * 2)
        return y + params["bias"][:, None, None]

    @staticmethod
    def _patches(xp: Any, layer: kfcore.Conv, x: Array) -> Array:
        return layer.input_rows(xp, layer.capture(x, None)[0], x.dtype)


@dataclass(frozen=True)
class Reshape:
    """Examples in another shape, such as pixels as an image or the reverse."""

    shape: tuple[int, ...]
    name: None = None

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """No parameters."""
        return {}

    def forward(self, xp: Any, params: Mapping[str, Array], x: Array) -> Array:
        """``[N, ...]`` to ``[N, *shape]``."""
        return xp.reshape(x, (x.shape[0], *self.shape))

    def backward(self, xp: Any, params: Mapping[str, Array], x: Array, y: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """Back to the shape of the input."""
        return xp.reshape(dy, x.shape), {}

    def curvature(self) -> None:
        """It has none."""
        return

    def torch_module(self) -> Any:
        """As PyTorch knows it."""
        from torch.nn import Flatten, Unflatten

        return Unflatten(1, self.shape) if len(self.shape) > 1 else Flatten()


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


def _channels_first(xp: Any, rows: Array, examples: int, height: int, width: int) -> Array:
    """Rows ``[N H W, channels]`` as ``[N, channels, H, W]``."""
    return xp.permute_dims(xp.reshape(rows, (examples, height, width, rows.shape[-1])), (0, 3, 1, 2))
