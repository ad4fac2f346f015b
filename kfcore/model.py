"""Which parameters belong to which layer, and both as matrices: the map between a model and the blocks of its curvature."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kfcore._array import Array


@dataclass(frozen=True)
class Model:
    """Layers by name, the names of their parameters, and the shapes of the parameters outside every layer.

    Parameters
    ----------
    layers
        Layer descriptions such as :class:`kfcore.Linear` by name.
    others
        Shapes of all other parameters, by parameter name.
    names
        Parameter name of each role of each layer; ``LAYER.ROLE`` where not given.
    """

    layers: Mapping[str, Any]
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @functools.cached_property
    def _roles(self) -> dict[str, dict[str, str]]:
        return {
            name: {role: self.names.get(name, {}).get(role, f"{name}.{role}") for role in layer.parameters}
            for name, layer in self.layers.items()
        }

    @functools.cached_property
    def _blocks(self) -> dict[str, dict[str, str]]:
        return {name: {suffix: name + suffix for suffix in layer.blocks()} for name, layer in self.layers.items()}

    def roles(self, layer: str) -> Mapping[str, str]:
        """Parameter names of a layer by role."""
        return self._roles[layer]

    def blocks(self, layer: str) -> Mapping[str, str]:
        """Block names of a layer by suffix."""
        return self._blocks[layer]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name."""
        shapes = {}
        for name, layer in self.layers.items():
            shapes |= {parameter: layer.parameters[role] for role, parameter in self.roles(name).items()}
        return shapes | dict(self.others)

    def block_names(self) -> dict[str, list[str]]:
        """Names of the blocks of each parameter's layer (or of itself), by parameter."""
        names = {}
        for name in self.layers:
            for role, parameter in self.roles(name).items():
                names[parameter] = [block for suffix, block in self.blocks(name).items() if suffix in ("", f".{role}")]
        return names | {name: [name] for name in self.others}

    def matrices(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Parameters (or gradients) by name as matrices by block. A layer of which nothing is given is left out."""
        matrices = {}
        for name, layer in self.layers.items():
            roles = self.roles(name)
            given = {role: values[parameter] for role, parameter in roles.items() if parameter in values}
            if not given:
                continue
            if len(given) < len(roles):
                missing = [parameter for parameter in roles.values() if parameter not in values]
                raise ValueError(f"`grads` hold some of the parameters of layer {name!r} but not {', '.join(missing)}")
            blocks = self.blocks(name)
            for suffix, matrix in layer.matrices(given).items():
                matrices[blocks[suffix]] = matrix
        return matrices | {name: values[name] for name in self.others if name in values}

    def parameters(self, matrices: Mapping[str, Array]) -> dict[str, Array]:
        """Inverse of :meth:`matrices`."""
        values = {}
        for name, layer in self.layers.items():
            parts = {suffix: matrices[block] for suffix, block in self.blocks(name).items() if block in matrices}
            if parts:
                roles = self.roles(name)
                for role, value in layer.parameters_of(parts).items():
                    values[roles[role]] = value
        return values | {name: matrices[name] for name in self.others if name in matrices}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Array]:
    """Arrays of a nest of dictionaries by dotted name."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any], like: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nest ``like`` with the values of ``flat``."""
    return {
        key: unflatten(flat, value, f"{prefix}{key}.") if isinstance(value, Mapping) else flat[f"{prefix}{key}"]
        for key, value in like.items()
    }
