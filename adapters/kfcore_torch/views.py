"""From what a module was called with to what its layer takes: examples first, and a normalisation's input normalised.

Most layers take what their module was called with as it is and have no reader. A reader looks at the module when it is called, for its mode
may be another at the backward pass; the view it returns computes only when the output gradient is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfcore import Norm

View = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a module's input, and its output or the gradient of that; gives what the layer takes for both."""
Reader = Callable[[nn.Module, bool], View | str | None]
"""Called with a module at each call of it, and whether the examples must come first even where sums over all rows would not ask for that.

Gives how to view the call, ``None`` for as it is, or why it is no use of the layer.
"""

SHAPED = (nn.LayerNorm, nn.RMSNorm)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (*SHAPED, nn.GroupNorm, *INSTANCE, *BATCH)

COUPLED = "of the batch, through which each example's loss depends on all the others: there are no gradients of single examples"


def norm_of(module: nn.Module, bias: bool, block: Any) -> Norm | str:
    """The layer of a normalisation, or why it has none; ``block`` as in :class:`kfcore.Norm`."""
    of: Any = module
    if isinstance(module, SHAPED):
        shape = of.normalized_shape
        return Norm(tuple(shape) if len(shape) > 1 else shape[0], bias, block)
    if isinstance(module, BATCH) and of.running_mean is None:
        return f"{type(module).__name__} without running statistics takes those {COUPLED}"
    features = of.num_channels if isinstance(module, nn.GroupNorm) else of.num_features
    return Norm(features, bias, block, channels="first")


def coupling(module: nn.Module) -> str | None:
    """Why calls of ``module`` in its present mode have no gradients of single examples, if so."""
    if isinstance(module, BATCH) and module.training:
        return f"{type(module).__name__} in training mode takes statistics {COUPLED}"
    return None


def reader_of(module: nn.Module, layer: Any, examples: int | None) -> Reader | None:
    """How calls of ``module`` are read as uses of ``layer``; ``None`` where they are what the layer takes.

    ``examples`` is the axis of the examples where arrays are known to be examples, positions and features in some order.
    """
    if isinstance(layer, Norm):
        return functools.partial(_read_norm, examples)
    if examples is None:
        return None
    view = functools.partial(_ordered, examples)
    by_example = getattr(layer, "bias", None) == "separate" or getattr(layer, "sharing", None) == "reduce"
    return lambda module, ordered: view if ordered or by_example else None


def _read_norm(examples: int | None, module: nn.Module, ordered: bool) -> View | str:
    of: Any = module
    own = isinstance(module, INSTANCE) and (module.training or not of.track_running_stats)
    return coupling(module) or functools.partial(_normalised, module, own, examples)


def _normalised(module: nn.Module, own: bool, examples: int | None, inputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``own`` is whether an instance normalisation takes the statistics of the example itself."""
    of: Any = module
    one = len(of.normalized_shape) if isinstance(module, SHAPED) else _spatial_axes(module) + 1 if isinstance(module, INSTANCE) else 0
    if examples is not None:
        inputs, y = _ordered(examples, inputs, y)
    elif inputs.ndim == one:
        inputs, y = inputs[None], y[None]
    return hat(module, inputs, own), y


def hat(module: nn.Module, x: Tensor, own: bool) -> Tensor:
    """What ``module`` scales and shifts, in float32 at least, of an input with an axis of examples."""
    of: Any = module
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, of.normalized_shape, eps=of.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(x, of.normalized_shape, eps=of.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, of.num_groups, eps=of.eps)
    if own:
        return functional.instance_norm(x, eps=of.eps)
    return functional.batch_norm(x, of.running_mean.to(x.dtype), of.running_var.to(x.dtype), eps=of.eps)


def _spatial_axes(module: nn.Module) -> int:
    return next(k for k, kind in enumerate(INSTANCE, start=1) if isinstance(module, kind))


def _ordered(examples: int, inputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, S, features]`` of both, from the order that ``examples`` says or from ``[S, features]`` of one example."""
    if inputs.ndim == 2:
        return inputs[None], y[None]
    return (inputs.transpose(0, 1), y.transpose(0, 1)) if inputs.ndim == 3 and examples == 1 else (inputs, y)
