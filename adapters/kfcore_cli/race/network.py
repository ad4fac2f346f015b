"""A network as a list of layers and a loss, with its forward and backward pass written out over the Python array API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kfcore_cli.race.interfaces import Array, Layer, Weights
from kfcore_cli.race.layers import Activation, Dense
from kfcore_cli.race.losses import Kind, Loss

Observe = Callable[[str, Array, Array], None]
"""Told the name, the input and the gradient at the output of every layer that has parameters."""


@dataclass(frozen=True)
class Network:
    """Layers, one after the other, and the loss of the last one's outputs."""

    layers: tuple[Layer, ...]
    loss: Loss

    def init(self, seed: int) -> Weights:
        """Initial weights, the same for every contender."""
        rng = np.random.default_rng([seed, 0])
        return {layer.name: layer.init(rng) for layer in self.layers if layer.name is not None}

    def forward(self, xp: Any, params: Mapping[str, Mapping[str, Array]], x: Array) -> list[Array]:
        """The input and the outputs of all layers, in this order."""
        values = [x]
        for layer in self.layers:
            values.append(layer.forward(xp, params.get(layer.name, {}), values[-1]))
        return values

    def gradients(
        self, xp: Any, params: Mapping[str, Mapping[str, Array]], x: Array, y: Array, observe: Observe | None = None
    ) -> dict[str, dict[str, Array]]:
        """Gradients of the loss by all weights."""
        values = self.forward(xp, params, x)
        dz = self.loss.gradient(xp, values[-1], y)
        grads = {}
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            if layer.name is not None and observe is not None:
                observe(layer.name, values[i], dz)
            dz, own = layer.backward(xp, params.get(layer.name, {}), values[i], values[i + 1], dz)
            if layer.name is not None:
                grads[layer.name] = own
        return {name: grads[name] for name in params}

    def curvature(self) -> dict[str, Any]:
        """The layers by name as kfcore knows them."""
        return {layer.name: layer.curvature() for layer in self.layers if layer.name is not None}


def mlp(sizes: tuple[int, ...], activation: str, loss: Kind, linear: tuple[int, ...] = ()) -> Network:
    """Dense layers ``fc1``, ``fc2``, ... of these sizes; an activation after each but the last and those numbered in ``linear``."""
    layers: list[Layer] = []
    for number, (n, m) in enumerate(pairwise(sizes), 1):
        layers.append(Dense(f"fc{number}", n, m))
        if number < len(sizes) - 1 and number not in linear:
            layers.append(Activation(activation))
    return Network(tuple(layers), Loss(loss))
