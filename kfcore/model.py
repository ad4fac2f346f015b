"""Which parameters belong to which layer, and both as matrices: the map between a model and the blocks of its curvature."""

from __future__ import annotations

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

    def roles(self, layer: str) -> dict[str, str]:
        """Parameter names of a layer by role."""
        given = self.names.get(layer, {})
        return {role: given.get(role, f"{layer}.{role}") for role in self.layers[layer].parameters}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name."""
        shapes = {}
        for name, layer in self.layers.items():
            shapes |= {parameter: layer.parameters[role] for role, parameter in self.roles(name).items()}
        return shapes | dict(self.others)

    def block_names(self) -> dict[str, list[str]]:
        """Names of the blocks of each parameter's layer (or of itself), by parameter."""
        names = {}
        for name, layer in self.layers.items():
            blocks = list(layer.blocks())
            for role, parameter in self.roles(name).items():
                names[parameter] = [name + b for b in blocks if b in ("", f".{role}")]
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
            matrices |= {name + suffix: matrix for suffix, matrix in layer.matrices(given).items()}
        return matrices | {name: values[name] for name in self.others if name in values}

    def parameters(self, matrices: Mapping[str, Array]) -> dict[str, Array]:
        """Inverse of :meth:`matrices`."""
        values = {}
        for name, layer in self.layers.items():
            parts = {suffix: matrices[name + suffix] for suffix in layer.blocks() if name + suffix in matrices}
            if parts:
                roles = self.roles(name)
                values |= {roles[role]: value for role, value in layer.parameters_of(parts).items()}
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
