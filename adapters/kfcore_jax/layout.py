"""From sites to layers: which parameters make up which layer of the core, under what name, and why the others fall back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeAlias

import jax

import kfcore
from kfcore import Conv, Embedding, Linear, Norm
from kfcore_jax.analysis import Findings, is_trained
from kfcore_jax.sites import Affine, Convolution, Dense, Gather, Geometry, Site
from kfcore_jax.sites.gather import Mode
from kfcore_jax.views import View, apply, undo

Sharing = Literal["expand", "reduce"]
Blocks = Literal["diagonal", "full"]
Described: TypeAlias = Linear | Conv | Embedding | Norm
"""A layer of the core that a use of a weight may be."""
WEIGHTS = {"kernel", "weight", "w", "W"}
"""Last keys that say "the weight" and are left out of the name of a layer."""
OWN_WEIGHTS = {"gather": {"embedding", "embeddings"}, "scale": {"scale", "gamma"}}
"""Those that do so in layers of one kind."""
LABELS = {"product": "dense", "convolution": "convolution", "gather": "embedding", "scale": "scale", "shift": "shift"}
"""What a report calls the layer of each kind of use."""
PASSES = {"stride", "padding", "padding_mode", "dilation", "input_dilation", "output_padding"}
"""What a description says of how a kernel passes over its input: it may differ from use to use, for no parameter or state depends on it."""


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
    sites: Mapping[str, tuple[Geometry, ...]]
    """Uses of the weight of each layer, and of every other parameter that is a weight wherever it is used, by the name of its layer to be.

    They have a bias where it is that of the layer.
    """
    reasons: Mapping[str, str]
    """Why a parameter has the block it has, by its name in the core."""
    regularised: frozenset[str] = frozenset()
    """Of the names in ``sites``, those whose weight or bias also has a term of its own in the loss, which is no part of the curvature."""
    whole: frozenset[str] = frozenset()
    """Layers whose gradient is the product of what is captured of them, and nothing else."""
    uses: Mapping[str, tuple[Described, ...]] = field(default_factory=dict)
    """Every layer as each of its uses in this program has it: they are :func:`alike`, and the first is that of the model."""

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
                layers[name] = layer if len(held) == len(layer.parameters) else without_bias(layer)
            elif held:
                parameter = self.model.roles(name)["bias"]
                others[parameter] = layer.parameters["bias"]
                reasons[parameter] = "bias of a layer whose weight is not trained here"
        places = {path: place for path, place in self.places.items() if path in paths}
        sites = {name: self.sites[name] for name in layers}
        uses = {name: self.uses[name] for name in layers}
        regularised, whole = self.regularised & layers.keys(), self.whole & layers.keys()
        return Layout(kfcore.Model(layers, others, self.model.names), places, sites, reasons, regularised, whole, uses)


def layer_of(use: Geometry, bias: Literal["joint", "separate"] | None, sharing: Sharing, norm: Blocks) -> Described | str:
    """The layer of the core that a use of a weight is, or why there is none. The only place that knows which there are."""
    if isinstance(use, Dense):
        return Linear(use.ins, use.outs, bias, sharing, use.layout, use.stack)
    if isinstance(use, Convolution):
        return _convolution(use, bias, sharing)
    if isinstance(use, Gather):
        if 0 in (use.rows, use.outs):
            return "table that is empty"
        return Embedding(use.rows, use.outs, use.rows if use.mode == Mode.FILL_OR_DROP else None, stack=use.stack)
    features = use.features[0] if len(use.features) == 1 else use.features
    full = norm == "full" and max(use.features) == use.outs
    return Norm(features, bias is not None, "full" if full else "diagonal", stack=use.stack)


def without_bias(layer: Described) -> Described:
    """A layer with a bias (or shift) as one without."""
    return replace(layer, bias=False if isinstance(layer, Norm) else None)


def _convolution(use: Convolution, bias: Literal["joint", "separate"] | None, sharing: Sharing) -> Conv | str:
    if len(use.kernel) not in (1, 2, 3):
        return f"convolution over {len(use.kernel)} axes: captured, but curvature blocks are for one to three"
    if 0 in (*use.site.weight, *(use.site.output[axis] for axis in use.numbers.out_spec[2:])):
        return "convolution that has no output"
    return Conv(
        use.ins,
        use.outs,
        use.kernel,
        stride=use.strides,
        padding=use.padding,
        dilation=use.kernel_dilation,
        groups=use.groups,
        input_dilation=use.input_dilation,
        bias=bias,
        sharing=sharing,
        layout="io",
        channels="last",
        leading=use.stack,
    )


def alike(one: object, other: object) -> bool:
    """Whether two descriptions make the same blocks of the same parameters, however their kernels pass over their inputs."""
    if type(one) is not type(other) or not is_dataclass(one) or isinstance(one, type):
        return False
    return all(getattr(one, part.name) == getattr(other, part.name) for part in fields(one) if part.name not in PASSES)


def layout(
    params: Any,
    found: Findings,
    *,
    bias: Literal["joint", "separate"],
    sharing: Sharing | Mapping[str, Sharing],
    norm: Blocks,
    prefix: str | None,
) -> Layout:
    """Give every parameter its layer, or the reason why it has none."""
    arrays = leaves_of(params)
    paths = list(arrays)
    short = _names(paths, prefix)
    uses, owners = _sites_by_leaf(found)
    described: dict[str, tuple[Described, ...]] = {}
    names: dict[str, dict[str, str]] = {}
    places: dict[str, Placement] = {}
    sites: dict[str, tuple[Geometry, ...]] = {}
    reasons: dict[str, str] = {}
    refused: dict[int, str] = {}
    for leaf, uses_here in uses.items():
        first = uses_here[0]
        biases = {use.site.bias for use in uses_here if use.site.bias is not None}
        if leaf in found.uses and not first.site.name:
            what = first.kind if isinstance(first, Affine) else f"weight of a {first.kind}"
            refused[leaf] = f"{what}, but also used in {', '.join(found.uses[leaf])}"
            refused |= dict.fromkeys(biases, f"bias of a {first.kind} whose weight has no layer")
            continue
        if owners[leaf]:
            refused[leaf] = f"{first.kind} that is used elsewhere too, as the bias of another layer"
            refused |= dict.fromkeys(biases, f"bias of a {first.kind} whose weight has no layer")
            continue
        name = first.site.name or _layer_name(short, leaf, first.kind)
        if name in sites:
            name = short[leaf]
        owned = _own_bias(found, owners, uses_here, uses)
        sites[name] = tuple(uses_here if owned is not None else (replace(u, site=replace(u.site, bias=None)) for u in uses_here))
        how = sharing if isinstance(sharing, str) else sharing.get(name, "expand")
        layers_here = _layers(uses_here, None if owned is None else bias, how, norm)
        if isinstance(layers_here, str):
            refused[leaf] = layers_here
            refused |= dict.fromkeys(biases, f"bias of a {first.kind} whose weight has no layer")
            continue
        described[name] = layers_here
        roles = {"weight": f"{name}.weight"} | ({} if owned is None else {"bias": f"{name}.bias"})
        if isinstance(first, Affine) and name == short[leaf]:
            # bare vectors, whose paths say all that is known of them
            plain = {role: short[k] for role, k in zip(roles, (leaf, owned), strict=False) if k is not None}
            if not {p.name for p in places.values()} & set(plain.values()):
                roles = names[name] = plain
        places[paths[leaf]] = Placement(roles["weight"], tuple(arrays[paths[leaf]].shape), first.weight)
        times = f", used {len(uses_here)} times" if len(uses_here) > 1 else ""
        lost = "" if all(use.examples for use in uses_here) else ", examples taken to lie along the first axis"
        reasons[roles["weight"]] = f"{LABELS[first.kind]}: {paths[leaf]}{times}{lost}"
        if owned is not None:
            places[paths[owned]] = Placement(roles["bias"], tuple(arrays[paths[owned]].shape), first.site.bias_view)
            reasons[roles["bias"]] = f"bias of {name}: {paths[owned]}"
        else:
            refused |= dict.fromkeys(biases, "bias that more than one layer adds, or that is used elsewhere too")
    layers = {name: of_layer[0] for name, of_layer in described.items()}
    taken = {place.name for place in places.values()} | layers.keys()
    others: dict[str, tuple[int, ...]] = {}
    for leaf, path in enumerate(paths):
        if path in places:
            continue
        name = short[leaf]
        if name in taken:
            name = path
        others[name] = tuple(arrays[path].shape)
        places[path] = Placement(name, others[name])
        reasons[name] = refused.get(leaf) or _other_reason(found, leaf)
    assert len({place.name for place in places.values()}) == len(places), "two parameters of one name"
    regularised = frozenset(name for name, uses_here in sites.items() if _has_own_term(found, uses_here[0].site))
    whole = frozenset(name for name in layers if name not in regularised and not any(u.site.name or u.site.ruled for u in sites[name]))
    return Layout(kfcore.Model(layers, others, names), places, sites, reasons, regularised, whole, described)


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


def _layer_name(short: Sequence[str], leaf: int, kind: str) -> str:
    """The path of the weight without a last key that only says so, as long as nothing else is called that."""
    head, _, last = short[leaf].rpartition(".")
    names = WEIGHTS | OWN_WEIGHTS.get(kind, set())
    twins = [p for p in short if p.rpartition(".")[0] == head and p.rpartition(".")[2] in names]
    return head if head and last in names and len(twins) == 1 else short[leaf]


def _sites_by_leaf(found: Findings) -> tuple[dict[int, list[Geometry]], Counter[int]]:
    """Uses of every weight, those named by hand alone where there are any (they own their bias); and how many of them add every bias."""
    uses: dict[int, list[Geometry]] = {}
    for use in _parted(found):
        uses.setdefault(use.site.leaf, []).append(use)
    for leaf, all_uses in uses.items():
        uses[leaf] = [use for use in all_uses if use.site.name] or all_uses
    named = {use.site.bias for all_uses in uses.values() for use in all_uses if use.site.name}
    uses = {leaf: all_uses for leaf, all_uses in uses.items() if leaf not in named}
    return uses, Counter(use.site.bias for all_uses in uses.values() for use in all_uses if use.site.bias is not None)


def _parted(found: Findings) -> list[Geometry]:
    """All sites; scale and shift apart where they are not one layer at every use of each."""
    roles: dict[int, set[tuple[int | None, View]]] = {}
    for use in found.sites.values():
        site = use.site
        roles.setdefault(site.leaf, set()).add((site.bias, site.bias_view))
        if site.bias is not None:
            roles.setdefault(site.bias, set()).add((site.leaf, site.bias_view))
    parts: list[Geometry] = []
    for use in found.sites.values():
        if not isinstance(use, Affine) or use.shift is None:
            parts.append(use)
            continue
        both = (use.site.leaf, use.shift.site.leaf)
        if all(len(roles[leaf]) == 1 and leaf not in found.uses for leaf in both):
            parts.append(use)
        else:
            parts += [replace(use, site=replace(use.site, bias=None, bias_view=()), shift=None), use.shift]
    return parts


def _layers(
    uses: Sequence[Geometry], bias: Literal["joint", "separate"] | None, sharing: Sharing, norm: Blocks
) -> tuple[Described, ...] | str:
    """The layer that all uses of a weight are, as each of them has it, or why there is none."""
    kinds = dict.fromkeys(use.kind for use in uses)
    if len(kinds) > 1:
        return f"captured in a {' and in a '.join(kinds)}, but no curvature block covers both"
    found: list[Described] = []
    for use in uses:
        layer = layer_of(use, bias, sharing, norm)
        if isinstance(layer, str):
            return layer
        found.append(layer)
    if any(isinstance(layer, Embedding) and layer.padding is not None for layer in found):
        found = [replace(layer, padding=layer.num) if isinstance(layer, Embedding) else layer for layer in found]
    if not all(alike(found[0], other) for other in found) or any(use.weight != uses[0].weight for use in uses):
        return (
            f"used in {uses[0].kind}s of different orientation or shape, as tied weights are, or weights in a loss that takes derivatives"
        )
    return tuple(found)


def _own_bias(found: Findings, owners: Mapping[int, int], uses: Sequence[Geometry], weights: Mapping[int, Any]) -> int | None:
    """The bias that every use of the layer adds, if nothing else touches it."""
    first = uses[0].site
    bias = first.bias
    if bias is None or bias in weights or any(u.site.bias != bias or u.site.bias_view != first.bias_view for u in uses):
        return None
    if bias in found.uses and not first.name:
        return None
    return bias if owners[bias] == len(uses) else None


def _has_own_term(found: Findings, site: Site) -> bool:
    """Whether weight or bias have a term that does not see the batch. A bias that meets the batch after all (a wrong tap) has none."""
    return site.leaf in found.regularised or (site.bias in found.regularised and site.bias not in found.uses)


def _other_reason(found: Findings, leaf: int) -> str:
    if leaf in found.uses:
        return f"no layer: used in {', '.join(found.uses[leaf])}"
    return "no layer: only in a term that does not see the batch" if leaf in found.touched else "no layer: unused"
