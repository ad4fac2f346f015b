"""From sites to layers: which parameters make up which layer of the core, under what name, and why the others fall back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax

import kfcore
from kfcore import Linear
from kfcore_jax.analysis import Findings, is_trained
from kfcore_jax.sites import Dense, dense
from kfcore_jax.views import View, apply, undo

Sharing = Literal["expand", "reduce"]
WEIGHTS = {"kernel", "weight", "w", "W"}
"""Last keys that say "the weight" and are left out of the name of a layer."""


@dataclass(frozen=True)
class Placement:
    """Where a parameter of the user's tree is in the core."""

    name: str
    shape: tuple[int, ...]
    """As the user has it."""
    view: View = ()

    def shown(self, x: Any) -> Any:
        """The array as the core sees it."""
        return apply(self.view, x)

    def back(self, x: Any) -> Any:
        """The array as the user has it."""
        return undo(self.view, x)


@dataclass(frozen=True)
class Layout:
    """A parameter tree seen by the core."""

    model: kfcore.Model
    places: Mapping[str, Placement]
    """By the path of the parameter in the user's tree."""
    sites: Mapping[str, tuple[Dense, ...]]
    """Uses of each layer."""
    reasons: Mapping[str, str]
    """Why a parameter has the block it has, by its name in the core."""
    regularised: frozenset[str] = frozenset()
    """Layers whose weight also has a term of its own in the loss, which is no part of the curvature."""
    whole: frozenset[str] = frozenset()
    """Layers whose gradient is the product of what is captured of them, and nothing else."""

    def flat(self, tree: Any) -> dict[str, jax.Array]:
        """Arrays of a tree of the shape of the parameters, by their names in the core."""
        return {self.places[path].name: self.places[path].shown(x) for path, x in leaves_of(tree).items() if path in self.places}

    def only(self, paths: frozenset[str]) -> Layout:
        """The layout where only the parameters at ``paths`` are trained; layers whose weight is not are left out."""
        if paths >= self.places.keys():
            return self
        names = {place.name: path for path, place in self.places.items()}
        layers, others = {}, {n: s for n, s in self.model.others.items() if names[n] in paths}
        reasons = dict(self.reasons)
        for name, layer in self.model.layers.items():
            held = {role for role, parameter in self.model.roles(name).items() if names[parameter] in paths}
            if "weight" in held:
                layers[name] = layer if len(held) == len(layer.parameters) else replace(layer, bias=None)
            elif held:
                others[f"{name}.bias"] = layer.parameters["bias"]
                reasons[f"{name}.bias"] = "bias of a layer whose weight is not trained here"
        places = {path: place for path, place in self.places.items() if path in paths}
        sites = {name: self.sites[name] for name in layers}
        return Layout(kfcore.Model(layers, others), places, sites, reasons, self.regularised & layers.keys(), self.whole & layers.keys())


def layout(
    params: Any, found: Findings, *, bias: Literal["joint", "separate"], sharing: Sharing | Mapping[str, Sharing], prefix: str | None
) -> Layout:
    """Give every parameter its layer, or the reason why it has none."""
    arrays = leaves_of(params)
    paths = list(arrays)
    short = _names(paths, prefix)
    uses, owners = _sites_by_leaf(found)
    layers: dict[str, Linear] = {}
    places: dict[str, Placement] = {}
    sites: dict[str, tuple[Dense, ...]] = {}
    reasons: dict[str, str] = {}
    refused: dict[int, str] = {}
    for leaf, uses_here in uses.items():
        why = _obstacle(found, leaf, uses_here)
        if why:
            refused[leaf] = why
            refused |= {u.site.bias: "bias of a product whose weight has no layer" for u in uses_here if u.site.bias is not None}
            continue
        first = uses_here[0]
        name = first.site.name or _layer_name(short, leaf)
        if name in layers:
            name = short[leaf]
        biases = {use.site.bias for use in uses_here}
        owned = _own_bias(found, owners, uses_here, uses)
        how = sharing if isinstance(sharing, str) else sharing.get(name, "expand")
        layers[name] = Linear(first.ins, first.outs, bias if owned is not None else None, how, first.layout, first.stack)
        places[paths[leaf]] = Placement(f"{name}.weight", tuple(arrays[paths[leaf]].shape), first.weight)
        sites[name] = tuple(uses_here)
        times = f", used {len(uses_here)} times" if len(uses_here) > 1 else ""
        reasons[f"{name}.weight"] = f"dense: {paths[leaf]}{times}"
        if owned is not None:
            places[paths[owned]] = Placement(f"{name}.bias", tuple(arrays[paths[owned]].shape), first.site.bias_view)
            reasons[f"{name}.bias"] = f"bias of {name}: {paths[owned]}"
        else:
            refused |= {b: "bias that more than one layer adds, or that is used elsewhere too" for b in biases if b is not None}
    others: dict[str, tuple[int, ...]] = {}
    for leaf, path in enumerate(paths):
        if path in places:
            continue
        name = short[leaf]
        if any(name in (f"{n}.weight", f"{n}.bias", n) for n in layers):
            name = path
        others[name] = tuple(arrays[path].shape)
        places[path] = Placement(name, others[name])
        reasons[name] = refused.get(leaf) or _other_reason(found, leaf)
    regularised = frozenset(name for name, uses_here in sites.items() if uses_here[0].site.leaf in found.regularised)
    whole = frozenset(name for name, uses_here in sites.items() if _whole(found, uses_here))
    return Layout(kfcore.Model(layers, others), places, sites, reasons, regularised, whole)


def leaves_of(tree: Any) -> dict[str, Any]:
    """Real floating arrays of a tree by path, such as ``"params.Dense_0.kernel"``."""
    return {path_of(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(tree) if is_trained(x)}


def path_of(keys: Sequence[Any]) -> str:
    """A path of keys as one dotted name; the ``value`` of a variable of nnx is the variable."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in keys]
    if len(parts) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and parts[-1] == "value":
        parts = parts[:-1]
    return ".".join(parts) or "parameter"


def _names(paths: Sequence[str], prefix: str | None) -> list[str]:
    """Paths without the ``prefix``; without ``params``, Flax's collection, if they all start with it and none is given."""
    if prefix is None:
        prefix = "params" if paths and all(p.startswith("params.") for p in paths) else ""
    return [p.removeprefix(f"{prefix}.") if prefix else p for p in paths]


def _layer_name(short: Sequence[str], leaf: int) -> str:
    """The path of the weight without a last key that only says so, as long as nothing else is called that."""
    head, _, last = short[leaf].rpartition(".")
    twins = [p for p in short if p.rpartition(".")[0] == head and p.rpartition(".")[2] in WEIGHTS]
    return head if head and last in WEIGHTS and len(twins) == 1 else short[leaf]


def _sites_by_leaf(found: Findings) -> tuple[dict[int, list[Dense]], Counter[int]]:
    """Uses of every weight, those named by hand alone where there are any; and how many of them add every bias."""
    uses: dict[int, list[Dense]] = {}
    for site in found.sites.values():
        uses.setdefault(site.leaf, []).append(dense(site))
    for leaf, all_uses in uses.items():
        uses[leaf] = [use for use in all_uses if use.site.name] or all_uses
    return uses, Counter(use.site.bias for all_uses in uses.values() for use in all_uses if use.site.bias is not None)


def _obstacle(found: Findings, leaf: int, uses: Sequence[Dense]) -> str | None:
    """Why the sites of a parameter do not make a layer, if so."""
    first = uses[0]
    if leaf in found.uses and not first.site.name:
        return f"multiplied with the batch, but also used in {', '.join(found.uses[leaf])}"
    if any((u.weight, u.stack, u.ins, u.outs, u.layout) != (first.weight, first.stack, first.ins, first.outs, first.layout) for u in uses):
        return "used in products of different orientation or shape"
    return None


def _own_bias(found: Findings, owners: Mapping[int, int], uses: Sequence[Dense], weights: Mapping[int, Any]) -> int | None:
    """The bias that every use of the layer adds, if nothing else touches it."""
    first = uses[0].site
    bias = first.bias
    if bias is None or bias in weights or any(u.site.bias != bias or u.site.bias_view != first.bias_view for u in uses):
        return None
    if bias in found.uses and not first.name:
        return None
    return bias if owners[bias] == len(uses) else None


def _whole(found: Findings, uses: Sequence[Dense]) -> bool:
    """Whether the gradients of a layer's weight and bias come from these uses alone, each by the derivative of what it computes."""
    leaves = {u.site.leaf for u in uses} | {u.site.bias for u in uses}
    return leaves.isdisjoint(found.regularised) and not any(u.site.name or u.site.ruled for u in uses)


def _other_reason(found: Findings, leaf: int) -> str:
    if leaf in found.uses:
        return f"no layer: used in {', '.join(found.uses[leaf])}"
    return "no layer: only in a term that does not see the batch" if leaf in found.touched else "no layer: unused"
