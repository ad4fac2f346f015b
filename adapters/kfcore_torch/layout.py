"""Which parameters of a module belong to which layer: the map from PyTorch's names to the model of the core."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kfcore import Model, Norm
from kfcore_torch.attention import Projection
from kfcore_torch.sites import NormBlock, Part, Sharing, Site, inner_modules, sites_of, why_without
from kfcore_torch.views import Reader


@dataclass
class Layout:
    """A module seen by the core.

    Names in the core are PyTorch's, except where the layers of an attention module share a parameter: its rows then have the
    names that they would have as parameters of their own, such as ``attention.q_proj.weight``.
    """

    model: Model
    parameters: dict[str, nn.Parameter]
    """Trained parameters by PyTorch's name, each once."""
    parts: dict[str, Part]
    """Where every parameter of the core is in them, by its name in the core."""
    sites: dict[str, list[Site]]
    """Places where a layer is used, by layer."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a parameter has the block it has, by its name in the core."""

    @functools.cached_property
    def names(self) -> dict[int, list[str]]:
        """Names in the core of the trained parameters by their ``id``."""
        names: dict[int, list[str]] = {}
        for name, part in self.parts.items():
            names.setdefault(id(self.parameters[part.parameter]), []).append(name)
        return names

    @functools.cached_property
    def _whole(self) -> bool:
        return all(part.rows is None for part in self.parts.values())

    def values(self) -> Mapping[str, Tensor]:
        """The parameters by their names in the core; parts are views."""
        if self._whole:
            return self.parameters
        return {name: part.of(self.parameters[part.parameter]) for name, part in self.parts.items()}

    def grads(self) -> dict[str, Tensor]:
        """Their gradients, of those that have one."""
        grads = {name: p.grad.detach() for name, p in self.parameters.items() if p.grad is not None}
        if self._whole:
            return grads
        return {name: part.of(grads[part.parameter]) for name, part in self.parts.items() if part.parameter in grads}

    def calls(self) -> list[tuple[str, nn.Module, Reader | None]]:
        """Layers with the modules whose calls are their uses, and how these are read."""
        layers = self.model.layers
        return [(name, s.module, s.reader(layers[name])) for name, sites in self.sites.items() for s in sites if not s.part]

    def attentions(self) -> list[tuple[nn.Module, list[Projection]]]:
        """Attention modules with the layers inside of them."""
        found: dict[int, tuple[nn.Module, list[Projection]]] = {}
        for name, sites in self.sites.items():
            for site in sites:
                if site.part:
                    projections = found.setdefault(id(site.module), (site.module, []))[1]
                    projections.append(Projection(name, site.attribute, site.weight.rows))
        return list(found.values())


def layout(
    module: nn.Module,
    trained: Collection[Tensor],
    *,
    bias: Literal["joint", "separate"] = "joint",
    sharing: Sharing | Mapping[str, Sharing] = "expand",
    norm: NormBlock = "diagonal",
    excluded: Mapping[str, str] | None = None,
) -> Layout:
    """Find the layers of ``module``.

    Parameters
    ----------
    module
        The model.
    trained
        The parameters that the optimizer holds.
    bias, sharing, norm
        How every layer is set up; ``sharing`` may be given by layer name, and does not concern tables if it is not.
    excluded
        Layers not to cover, with the reason.

    Raises
    ------
    ValueError
        If ``trained`` has a tensor that is no parameter of ``module``, or ``module`` a parameter that has no shape yet, or ``norm`` is no
        kind of block.
    """
    if norm not in ("diagonal", "full"):
        raise ValueError(f"`norm` must be 'diagonal' or 'full', got {norm!r}")
    parameters = _trained(module, trained)
    holders = _holders(module)
    tied: dict[Part, list[Site]] = {}
    for site in sites_of(module):
        tied.setdefault(site.weight, []).append(site)
    layers: dict[str, Any] = {}
    roles: dict[str, dict[str, str]] = {}
    sites: dict[str, list[Site]] = {}
    names: dict[Part, str] = {}
    reasons: dict[Part, str] = {}
    split: set[str] = set()
    for weight, users in tied.items():
        first = users[0]
        biases = {s.bias: type(s.module).__name__ for s in users if s.bias is not None and s.bias.parameter in parameters}
        names |= {weight: _name(weight, first, "weight")} | {each: _name(each, first, "bias") for each in biases}
        if weight.parameter not in parameters:
            reasons |= {each: f"bias of a {kind} whose weight is not a trained parameter" for each, kind in biases.items()}
            continue
        own = _own_bias(users, holders)
        obstacle = _obstacle(users, holders[weight.parameter])
        if not obstacle:
            split |= {part.parameter for part in (weight, own) if part is not None and part.rows is not None}
        reason = obstacle or (excluded or {}).get(first.name)
        if reason:
            reasons[weight] = reason
            reasons |= {each: f"bias of a {kind} without a layer: {reason}" for each, kind in biases.items()}
            continue
        parts = {"weight": weight} | ({"bias": own} if own in biases else {})
        if own not in biases:
            reasons |= dict.fromkeys(biases, "bias of a layer that shares its weight with another bias, or itself shared")
        layers[first.name] = layer = first.layer(bias if "bias" in parts else None, _sharing(sharing, first), norm)
        roles[first.name] = {role: names[part] for role, part in parts.items()}
        sites[first.name] = users
        where = "" if weight.rows is None else f" in rows {weight.rows[0]}:{weight.rows[1]} of {weight.parameter}"
        frozen = "; its bias is not trained" if own is not None and own not in biases else ""
        block = f" ({layer.block})" if isinstance(layer, Norm) else ""
        if where or frozen or block:
            reasons[weight] = type(layer).__name__ + block + where + frozen
        if block and "bias" in parts:
            reasons[parts["bias"]] = type(layer).__name__ + block
    covered = {name for of_layer in roles.values() for name in of_layer.values()}
    # what is excluded in the middle of a step, for it was not seen to be used, keeps its names
    parts = {name: Part(name) for name in parameters if name not in split}
    parts |= {name: part for part, name in names.items() if part.parameter in split and part.parameter in parameters}
    others = {name: tuple(part.of(parameters[part.parameter]).shape) for name, part in parts.items() if name not in covered}
    found = {name if name in parts else part.parameter: reasons[part] for part, name in names.items() if part in reasons}
    for name in others.keys() - found.keys():
        found[name] = _unsupported(module, parameters[parts[name].parameter])
    return Layout(Model(layers, others, roles), parameters, parts, sites, found)


def _trained(module: nn.Module, trained: Collection[Tensor]) -> dict[str, nn.Parameter]:
    """The parameters of ``module`` among ``trained`` that are not frozen, by name; checks both."""
    for name, p in module.named_parameters():
        if isinstance(p, UninitializedParameter):
            kind = type(module.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(f"`model` has a parameter without a shape yet, {name!r} of a {kind}: run a forward pass before this")
    ids, own = {id(p) for p in trained}, {id(p) for p in module.parameters()}
    for p in trained:
        if id(p) not in own:
            raise ValueError(f"`params` must be parameters of `model`, got another tensor, of shape {tuple(p.shape)}")
    return {name: p for name, p in module.named_parameters() if id(p) in ids and p.requires_grad}


def _name(part: Part, site: Site, role: str) -> str:
    """What a part is called in the core."""
    return part.parameter if part.rows is None else f"{site.name}.{role}"


def _own_bias(users: Sequence[Site], holders: Mapping[str, Sequence[nn.Module]]) -> Part | None:
    """The bias that all sites of a weight have and nothing else does."""
    bias = users[0].bias
    if bias is None or any(site.bias != bias for site in users) or len(holders[bias.parameter]) != len(users):
        return None
    return bias


def _sharing(sharing: Sharing | Mapping[str, Sharing], site: Site) -> Sharing:
    """What is asked of a site by name, or of all; tables have no choice."""
    if isinstance(sharing, str):
        return "expand" if isinstance(site.module, nn.Embedding) else sharing
    return sharing.get(site.name, "expand")


def _unsupported(module: nn.Module, parameter: nn.Parameter) -> str:
    """Why a parameter that is no weight of a site has no layer."""
    for owner, child in module.named_modules():
        for role, p in child.named_parameters(recurse=False):
            if p is parameter:
                if why := why_without(child):
                    return f"{type(child).__name__} {why}"
                return f"{type(child).__name__} {owner}.{role} is not a supported layer" if owner else "a bare parameter"
    return "a bare parameter"


def _holders(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Modules that hold each parameter, by the parameter's name, without duplicates, in the order of the model."""
    names = {id(p): name for name, p in module.named_parameters()}
    inner = inner_modules(module)
    holders: dict[str, list[nn.Module]] = {}
    for child in module.modules():
        for p in child.parameters(recurse=False):
            holders.setdefault(names[id(p)], []).append(inner.get(id(child), child))
    return holders


def _obstacle(users: Sequence[Site], holders: Sequence[nn.Module]) -> str | None:
    """Why calls of the modules that hold a weight do not show all its uses, or are not those of one layer, if so."""
    layers = [site.layer(None, "expand") for site in users]
    callers = [id(site.module) for site, layer in zip(users, layers, strict=True) if not isinstance(layer, str)]
    if not callers:
        return layers[0]
    strangers = [m for m in holders if id(m) not in callers]
    if strangers:
        return f"weight shared with {type(strangers[0]).__name__}, which is not a supported layer"
    if any(layer != layers[0] for layer in layers):
        return f"weight shared by modules that do different things with it: {' and '.join(type(site.module).__name__ for site in users)}"
    return None
