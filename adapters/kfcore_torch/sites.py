"""What a module is to the core: the layers that its calls are uses of, and which of its parameters they have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from kfcore import Conv, Linear

Sharing = Literal["expand", "reduce"]
BiasMode = Literal["joint", "separate"] | None

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Layers in an attention module."""


def layer_of(module: nn.Module, bias: BiasMode, sharing: Sharing, part: str = "") -> Any:
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
    for known in (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.MultiheadAttention):
        if isinstance(module, known):
            return f"{kind.__name__} is not nn.{known.__name__} itself and may not be called as a module, or compute something else"
    return f"{kind.__name__} is not a supported layer"


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

    def layer(self, bias: BiasMode, sharing: Sharing) -> Any:
        """See :func:`layer_of`."""
        return layer_of(self.module, bias, sharing, self.part)


def sites_of(model: nn.Module) -> Iterator[Site]:
    """All modules with a weight, in the order of the model; the four projections of an attention module are sites of their own."""
    names = {id(p): name for name, p in model.named_parameters()}

    def part(module: nn.Module, attribute: str, rows: tuple[int, int] | None = None) -> Part | None:
        parameter = module._parameters.get(attribute)
        return None if parameter is None else Part(names[id(parameter)], rows)

    inner = inner_modules(model)
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
                yield Site(path, module, weight, part(module, "bias"))


def inner_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Attention modules by the ``id`` of their ``out_proj``, which holds parameters for them and is never called."""
    return {id(module.out_proj): module for module in model.modules() if type(module) is nn.MultiheadAttention}


def as_used(layer: Any, inputs: Tensor, grads: Tensor | None, outputs: tuple[int, ...]) -> tuple[Any, Tensor, Tensor | None]:
    """A layer in the geometry of one use, and what was captured of that use with an axis of examples.

    ``inputs`` and ``grads`` (of shape ``outputs``) may lack that axis. A transposed convolution that was called with ``output_size`` has
    the output padding that its output shows.
    """
    axes = layer.axes if isinstance(layer, Conv) else 0
    if inputs.ndim == axes + 1:
        inputs, grads = inputs[None], None if grads is None else grads[None]
    if isinstance(layer, Conv) and layer.transposed:
        shown = tuple(layer.output_padding)  # pyright: ignore[reportArgumentType]
        computed = layer.window(tuple(inputs.shape[2:])).outputs(tuple(inputs.shape[2:]))
        more = tuple(m + n - c for m, n, c in zip(shown, outputs[-axes:], computed, strict=True))
        if more != shown:
            return replace(layer, output_padding=more), inputs, grads
    return layer, inputs, grads
