"""What a module is to the core: the layers that its calls are uses of, and which of its parameters they have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from kfcore import Conv, Embedding, Linear
from kfcore_torch.views import NORMS, Reader, coupling, norm_of, reader_of

Sharing = Literal["expand", "reduce"]
BiasMode = Literal["joint", "separate"] | None
NormBlock = Literal["diagonal", "full"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Layers in an attention module."""
TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder)
WITHOUT: dict[type[nn.Module], str] = {
    nn.RNNBase: "is one fused operation, in which the uses of its weights over time are not seen: a loop over nn.Linear has blocks",
    nn.RNNCellBase: "is one fused operation, in which the uses of its weights are not seen: two nn.Linear in its place have blocks",
    nn.Bilinear: "multiplies two inputs with each other, and its weight is no matrix",
    nn.EmbeddingBag: "adds rows of its table in one operation, in which the single ones are not seen",
    nn.PReLU: "is an activation, whose slopes no layer describes",
}
"""Why a kind of module has no layer."""


def layer_of(module: nn.Module, bias: BiasMode, sharing: Sharing, norm: NormBlock = "diagonal", part: str = "") -> Any:
    """The layer of the core that calls of ``module`` are uses of, or why there is none. The only place that knows which there are.

    A class counts, not its subclasses: these may do something else with the same attributes, or not be called as modules.

    Parameters
    ----------
    module
        The module.
    bias
        How its bias is to be treated, ``None`` if the layer has none, or none that is trained.
    sharing
        See :class:`kfcore.Linear`.
    norm
        The ``block`` of a :class:`kfcore.Norm`.
    part
        Which layer, in a module that has several: one of :data:`PROJECTIONS` for ``nn.MultiheadAttention``.
    """
    kind: Any = type(module)
    of: Any = module
    if kind is nn.Linear:
        return Linear(of.in_features, of.out_features, bias, sharing)
    if kind is nn.MultiheadAttention:
        widths = {"q_proj": of.embed_dim, "k_proj": of.kdim, "v_proj": of.vdim, "out_proj": of.embed_dim}
        return Linear(widths[part], of.embed_dim, bias, sharing)
    if kind in CONVOLUTIONS or kind in TRANSPOSED:
        return Conv(
            of.in_channels,
            of.out_channels,
            of.kernel_size,
            of.stride,
            of.padding,
            of.padding_mode,
            of.dilation,
            of.groups,
            transposed=kind in TRANSPOSED,
            output_padding=of.output_padding if kind in TRANSPOSED else 0,
            bias=bias,
            sharing=sharing,
        )
    if kind is nn.Embedding:
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(of, option):
                return f"Embedding with {option}={getattr(of, option)}, by which its gradient is not that of plain rows of a table"
        return Embedding(of.num_embeddings, of.embedding_dim, of.padding_idx, sharing=sharing)
    if kind in NORMS:
        return norm_of(module, bias is not None, norm)
    for known in (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.MultiheadAttention, nn.Embedding, *NORMS):
        if isinstance(module, known):
            return f"{kind.__name__} is not nn.{known.__name__} itself and may not be called as a module, or compute something else"
    return f"{kind.__name__} {why_without(module) or 'is not a supported layer'}"


def why_without(module: nn.Module) -> str | None:
    """Why its kind has no layer, if there is more to say than that."""
    return next((why for kind, why in WITHOUT.items() if isinstance(module, kind)), None)


def coupled(model: nn.Module) -> dict[str, str]:
    """Sites of which, in the present mode of their modules, no gradients of single examples exist, with the reason."""
    return {site.name: why for site in sites_of(model) if (why := coupling(site.module))}


@dataclass(frozen=True)
class Part:
    """A parameter of the model, or some of its rows."""

    parameter: str
    rows: tuple[int, int] | None = None

    def of(self, x: Tensor) -> Tensor:
        """A view of the part in the whole."""
        return x if self.rows is None else x[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class Site:
    """A place in the model where a layer is used, if what is there is one."""

    name: str
    """Of the layer, should the parameters at this site be its only ones or the first of several that are tied."""
    module: nn.Module
    """Whose calls are uses of the layer, or hold them."""
    weight: Part
    bias: Part | None
    part: str = ""
    """Which layer in the module, see :func:`layer_of`."""
    attribute: str = "weight"
    """Of the module, which holds the weight or, in a module with several layers, that of which it is some rows."""
    examples: int | None = None
    """Axis of the examples, where it is known that arrays have a second axis, of positions."""

    def layer(self, bias: BiasMode, sharing: Sharing, norm: NormBlock = "diagonal") -> Any:
        """See :func:`layer_of`."""
        return layer_of(self.module, bias, sharing, norm, self.part)

    def reader(self, layer: Any) -> Reader | None:
        """See :func:`kfcore_torch.views.reader_of`."""
        return reader_of(self.module, layer, self.examples)


def sites_of(model: nn.Module) -> Iterator[Site]:
    """All modules with a weight, in the order of the model; the four projections of an attention module are sites of their own."""
    names = {id(p): name for name, p in model.named_parameters()}

    def part(module: nn.Module, attribute: str, rows: tuple[int, int] | None = None) -> Part | None:
        parameter = module._parameters.get(attribute)
        return None if parameter is None else Part(names[id(parameter)], rows)

    inner, examples = inner_modules(model), _examples_in_transformers(model)
    for path, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            at, width = f"{path}." if path else "", module.embed_dim
            for i, which in enumerate(PROJECTIONS[:3]):
                rows = (i * width, (i + 1) * width)
                packed = module.in_proj_weight is not None
                attribute = "in_proj_weight" if packed else f"{which}_weight"
                weight = part(module, attribute, rows if packed else None)
                if weight is not None:
                    yield Site(at + which, module, weight, part(module, "in_proj_bias", rows), which, attribute)
            weight = part(module.out_proj, "weight")
            if weight is not None:
                yield Site(f"{at}out_proj", module, weight, part(module.out_proj, "bias"), "out_proj", "out_proj.weight")
        elif id(module) not in inner:
            weight = part(module, "weight")
            if weight is not None:
                yield Site(path, module, weight, part(module, "bias"), examples=examples.get(id(module)))


def inner_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Attention modules by the ``id`` of their ``out_proj``, which holds parameters for them and is never called."""
    return {id(module.out_proj): module for module in model.modules() if type(module) is nn.MultiheadAttention}


def _examples_in_transformers(model: nn.Module) -> dict[int, int]:
    """Axis of the examples by the ``id`` of modules inside of PyTorch's transformers, which have it as ``batch_first`` says."""
    found = {}
    for outer in model.modules():
        if isinstance(outer, TRANSFORMERS):
            axes = [0 if module.batch_first else 1 for module in outer.modules() if isinstance(module, nn.MultiheadAttention)]
            found |= {id(module): axes[0] for module in outer.modules() if axes}
    return found


def as_used(layer: Any, inputs: Tensor, grads: Tensor | None, outputs: tuple[int, ...]) -> tuple[Any, Tensor, Tensor | None]:
    """A layer in the geometry of one use, and what was captured of that use with an axis of examples.

    ``inputs`` and ``grads`` (of shape ``outputs``) may lack that axis, except those of a normalisation, whose view (see
    :mod:`kfcore_torch.views`) has given it to them. A transposed convolution that was called with ``output_size`` has the output
    padding that its output shows.
    """
    kind = type(layer)
    axes = layer.axes if kind is Conv else 0
    if inputs.ndim == (axes + 1 if kind in (Linear, Conv) else 0):
        inputs, grads = inputs[None], None if grads is None else grads[None]
    if kind is Conv and layer.transposed:
        shown = tuple(layer.output_padding)  # pyright: ignore[reportArgumentType]
        computed = layer.window(tuple(inputs.shape[2:])).outputs(tuple(inputs.shape[2:]))
        more = tuple(m + n - c for m, n, c in zip(shown, outputs[-axes:], computed, strict=True))
        if more != shown:
            return replace(layer, output_padding=more), inputs, grads
    return layer, inputs, grads
