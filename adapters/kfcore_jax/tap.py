"""Layers named by hand: ``tap`` says in the middle of a loss that some outputs are those of a dense layer."""

from __future__ import annotations

from typing import Any, Literal

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

TAP = "kfcore_tap"
_tap = Primitive(TAP)


def tap(
    outputs: jax.Array,
    inputs: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    name: str,
    layout: Literal["io", "oi"] = "io",
) -> jax.Array:
    """``outputs`` themselves, marked as ``inputs @ weight + bias`` however they were computed.

    Use it where a program hides its product, as a custom kernel or a ``custom_vjp`` does. What was found automatically of ``weight`` and
    ``bias`` gives way to it. Their gradients must be those of the product; :meth:`kfcore_jax.Model.check_capture` tells.

    Parameters
    ----------
    outputs
        ``[N, ..., out]``.
    inputs
        ``[N, ..., in]``, with the same axes before the last.
    weight
        A parameter, or a view of one, ``[in, out]``, or ``[out, in]`` if ``layout`` is ``"oi"``.
    bias
        A parameter ``[out]`` that was added, if any.
    name
        Name of the layer.
    layout
        Of ``weight``.
    """
    if layout not in ("io", "oi"):
        raise ValueError(f"`layout` must be 'io' or 'oi', got {layout!r}")
    wanted = (inputs.shape[-1], outputs.shape[-1]) if layout == "io" else (outputs.shape[-1], inputs.shape[-1])
    if weight.shape != wanted:
        raise ValueError(f"`weight` must have shape {wanted} with layout={layout!r}, got {weight.shape}")
    if inputs.shape[:-1] != outputs.shape[:-1]:
        raise ValueError(f"`inputs` and `outputs` must agree in all axes but the last, got {inputs.shape} and {outputs.shape}")
    if bias is not None and bias.shape != outputs.shape[-1:]:
        raise ValueError(f"`bias` must have shape {outputs.shape[-1:]}, got {bias.shape}")
    operands = [outputs, inputs, weight] + ([] if bias is None else [bias])
    return _tap.bind(*operands, name=name, layout=layout)


def _batch(args: Any, axes: Any, **params: Any) -> tuple[Any, int]:
    outputs, inputs, *weights = args
    if any(axis is not None for axis in axes[2:]):
        raise NotImplementedError(f"tap {params['name']!r}: its weight is batched by vmap; write the product itself there instead")
    size = next(x.shape[a] for x, a in zip(args[:2], axes[:2], strict=True) if a is not None)
    outputs, inputs = (batching.bdim_at_front(x, a, size) for x, a in zip((outputs, inputs), axes[:2], strict=True))
    return _tap.bind(outputs, inputs, *weights, **params), 0


def _differentiate(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    return _tap.bind(*primals, **params), tangents[0]


_tap.def_impl(lambda outputs, *_, **__: outputs)
_tap.def_abstract_eval(lambda outputs, *_, **__: outputs)
ad.primitive_jvps[_tap] = _differentiate
batching.primitive_batchers[_tap] = _batch
mlir.register_lowering(_tap, lambda _, outputs, *__, **___: [outputs])
