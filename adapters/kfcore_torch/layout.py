"""Which parameters of a module belong to which layer: the map from PyTorch's names to the model of the core."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from kfcore import Linear, Model

Sharing = Literal["expand", "reduce"]


@dataclass
class Layout:
    """A module seen by the core."""

    model: Model
    parameters: dict[str, nn.Parameter]
    """Trained parameters by name, each once."""
    sites: dict[str, list[nn.Module]]
    """Modules whose calls are uses of a layer, by layer."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a parameter has the block it has, by parameter."""

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """Names of the trained parameters by their ``id``."""
        return {id(p): name for name, p in self.parameters.items()}


def layout(
    module: nn.Module,
    trained: Collection[Tensor],
    *,
    bias: Literal["joint", "separate"] = "joint",
    sharing: Sharing | Mapping[str, Sharing] = "expand",
    excluded: Mapping[str, str] | None = None,
) -> Layout:
    """Find the layers of ``module``.

    Parameters
    ----------
    module
        The model.
    trained
        The parameters that the optimizer holds.
    bias, sharing
        How every :class:`kfcore.Linear` is set up; ``sharing`` may be given by layer name.
    excluded
        Layers not to cover, with the reason.
    """
    ids, own = {id(p) for p in trained}, {id(p) for p in module.parameters()}
    for p in trained:
        if id(p) not in own:
            raise ValueError(f"`params` must be parameters of `model`, got another tensor, of shape {tuple(p.shape)}")
    parameters = {name: p for name, p in module.named_parameters() if id(p) in ids and p.requires_grad}
    names = {id(p): name for name, p in parameters.items()}
    reasons: dict[str, str] = {}
    users = _users(module)
    layers: dict[str, Linear] = {}
    roles: dict[str, dict[str, str]] = {}
    sites: dict[str, list[nn.Module]] = {}
    for name, child in module.named_modules():
        if not isinstance(child, nn.Linear):
            continue
        if id(child.weight) not in names:
            if id(child.bias) in names:
                reasons[names[id(child.bias)]] = "bias of a Linear whose weight is not a trained parameter"
            continue
        weight = names[id(child.weight)]
        sharers = users[id(child.weight)]
        reason = (excluded or {}).get(name) or _obstacle(module, name, child, [m for _, m in sharers])
        if reason:
            reasons[weight] = reason
            if id(child.bias) in names:
                reasons[names[id(child.bias)]] = f"bias of a Linear without a layer: {reason}"
            continue
        first = sharers[0][0]
        if first in layers:
            sites[first].append(child)
            continue
        biases = [m.bias for _, m in sharers]
        alone = biases[0] is not None and all(b is biases[0] for b in biases) and len(users[id(biases[0])]) == len(sharers)
        joint = alone and id(biases[0]) in names
        if not joint:
            for b in biases:
                if b is not None and id(b) in names:
                    reasons[names[id(b)]] = "bias of a layer that shares its weight with another bias, or itself shared"
        if alone and not joint:
            reasons[weight] = "Linear; its bias is not trained"
        how = sharing if isinstance(sharing, str) else sharing.get(name, "expand")
        layers[name] = Linear(child.in_features, child.out_features, bias if joint else None, how)
        roles[name] = {"weight": weight} | ({"bias": names[id(biases[0])]} if joint else {})
        sites[name] = [child]
    covered = {parameter for of_layer in roles.values() for parameter in of_layer.values()}
    others = {name: tuple(p.shape) for name, p in parameters.items() if name not in covered}
    for owner, child in module.named_modules():
        for role, p in child.named_parameters(recurse=False):
            name = names.get(id(p))
            if name in others and name not in reasons:
                reasons[name] = f"{type(child).__name__} {owner}.{role} is not a supported layer" if owner else "a bare parameter"
    return Layout(Model(layers, others, roles), parameters, sites, reasons)


def _users(module: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Modules that hold each parameter, by the parameter's id, without duplicates, in the order of the model."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, child in module.named_modules():
        for p in child.parameters(recurse=False):
            users.setdefault(id(p), []).append((name, child))
    return users


def _obstacle(module: nn.Module, name: str, child: nn.Linear, sharers: list[nn.Module]) -> str | None:
    """Why calls of ``child`` do not show all uses of its weight, if so."""
    if type(child) is not nn.Linear:
        parent = module.get_submodule(name.rpartition(".")[0])
        return f"{type(child).__name__} in {type(parent).__name__} is not nn.Linear itself and may not be called as a module"
    others = [m for m in sharers if type(m) is not nn.Linear]
    if others:
        return f"weight shared with {type(others[0]).__name__}, which is not a supported layer"
    return None
