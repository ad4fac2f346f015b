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
class Skip:
    """The end of a residual branch: what came into the layer ``over`` places before is added."""

    over: int
    name: None = None


@dataclass(frozen=True)
class Network:
    """Layers, one after the other, and the loss of the last one's outputs."""

    layers: tuple[Layer | Skip, ...]
    loss: Loss

    def init(self, seed: int) -> Weights:
        """Initial weights, the same for every contender."""
        rng = np.random.default_rng([seed, 0])
        return {layer.name: layer.init(rng) for layer in self.layers if layer.name is not None}

    def forward(self, xp: Any, params: Mapping[str, Mapping[str, Array]], x: Array) -> list[Array]:
        """The input and the outputs of all layers, in this order."""
        return self.through(lambda layer, x: layer.forward(xp, params.get(layer.name, {}), x), x)

    def through(self, apply: Callable[[Layer, Array], Array], x: Array) -> list[Array]:
        """The same, the output of a layer being ``apply(layer, input)``: the one place that knows how layers are connected."""
        values = [x]
        for i, layer in enumerate(self.layers):
            values.append(values[i] + values[i - layer.over] if isinstance(layer, Skip) else apply(layer, values[i]))
        return values

    def outputs(self, xp: Any, params: Mapping[str, Mapping[str, Array]], x: Array, rows: int = 128) -> Array:
        """The outputs alone, of so many rows at a time."""
        return xp.concat([self.forward(xp, params, x[i : i + rows])[-1] for i in range(0, x.shape[0], rows)], axis=0)

    def gradients(
        self, xp: Any, params: Mapping[str, Mapping[str, Array]], x: Array, y: Array, observe: Observe | None = None
    ) -> dict[str, dict[str, Array]]:
        """Gradients of the loss by all weights."""
        values = self.forward(xp, params, x)
        dz = self.loss.gradient(xp, values[-1], y)
        grads = {}
        skipped: dict[int, Array] = {}
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            if isinstance(layer, Skip):
                start = i - layer.over
                skipped[start] = skipped[start] + dz if start in skipped else dz
                continue
            if layer.name is not None and observe is not None:
                observe(layer.name, values[i], dz)
            dz, own = layer.backward(xp, params.get(layer.name, {}), values[i], values[i + 1], dz)
            if layer.name is not None:
                grads[layer.name] = own
            if i in skipped:
                dz = dz + skipped.pop(i)
        return {name: grads[name] for name in params}

    def curvature(self) -> dict[str, Any]:
        """The layers by name as kfcore knows them; those that it does not are left out."""
        named = {layer.name: layer.curvature() for layer in self.layers if layer.name is not None}
        return {name: described for name, described in named.items() if described is not None}


def mlp(sizes: tuple[int, ...], activation: str, loss: Kind, linear: tuple[int, ...] = ()) -> Network:
    """Dense layers ``fc1``, ``fc2``, ... of these sizes; an activation after each but the last and those numbered in ``linear``."""
    layers: list[Layer] = []
    for number, (n, m) in enumerate(pairwise(sizes), 1):
        layers.append(Dense(f"fc{number}", n, m))
        if number < len(sizes) - 1 and number not in linear:
            layers.append(Activation(activation))
    return Network(tuple(layers), Loss(loss))


def residual(*layers: Layer) -> tuple[Layer | Skip, ...]:
    """The layers as a branch whose output is added to its input."""
    return (*layers, Skip(len(layers)))
