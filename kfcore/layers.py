"""Layer geometry: how inputs, output gradients and weights of each layer kind become matrices.

Conventions of the whole library, written once
----------------------------------------------
* Captured arrays are ``inputs [N, S, in]`` and ``output_grads [N, S, out]``: N examples, S shared positions (tokens, pixels,
  uses of a tied weight; 1 where none). Verbs allow further leading axes that stack layers of equal shape.
* ``output_grads`` are gradients of the *per-example* loss, not divided by N.
* A weight is a matrix ``[out, in]``; a joint bias is its last column, and the inputs get a last feature that is 1.
* Kronecker products are row-major: ``F ~= G (x) A``, ``(G (x) A) vec(X) = vec(G X A^T)``.
* Scale: ``A`` is the mean over N and S of ``a a^T``; ``G`` the mean over N of the sum over S of ``g g^T`` (*expand*).
  With *reduce*, inputs are averaged and output gradients summed over S first.

Weight sharing follows Eschenhagen et al. 2023 (expand and reduce): expand is exact for deep linear networks whose loss keeps the
positions (language models, segmentation), reduce where the network averages positions before the loss (pooling classifiers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from kfcore._array import Array, Namespace, append, cast, device, namespace

Sharing = Literal["expand", "reduce"]
Parameters = Mapping[str, Array]
"""The parameters of one layer by role: ``{"weight": ..., "bias": ...}``."""


@runtime_checkable
class Layer(Protocol):
    """What the rest of the library asks of a layer kind. Implementations are frozen, hashable descriptions without arrays."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(rows, columns)`` of the weight matrix, a joint bias included."""
        ...

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes that hold independent layers of this shape."""
        ...

    def input_rows(self, xp: Namespace, inputs: Array, dtype: object) -> Array:
        """Rows ``[..., n, columns]`` whose second moment is the input factor, from ``inputs [..., N, S, in]``."""
        ...

    def output_rows(self, xp: Namespace, output_grads: Array, dtype: object) -> Array:
        """Rows ``[..., n, rows]`` whose second moment is the output factor, from ``output_grads [..., N, S, out]``."""
        ...


@dataclass(frozen=True)
class Linear:
    """A dense layer ``y = x W^T + b``.

    Parameters
    ----------
    in_features, out_features
        Widths.
    bias
        ``"joint"`` (or ``True``): one block for weight and bias, the inputs augmented by 1. ``"separate"``: two blocks, the bias'
        own being the exact second moment of its gradient. ``None`` (or ``False``): no bias.
    sharing
        ``"expand"`` or ``"reduce"``, for inputs with extra axes between the batch and the features.
    layout
        How the user stores the weight: ``"oi"`` for ``[out, in]`` (PyTorch), ``"io"`` for ``[in, out]`` (``x @ W``, Flax, Keras).
    stack
        Leading axes of parameters and captured arrays that hold as many independent layers of equal shape (a scan over layers).
    """

    in_features: int
    out_features: int
    bias: Literal["joint", "separate"] | bool | None = "joint"
    sharing: Sharing = "expand"
    layout: Literal["oi", "io"] = "oi"
    stack: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` of Linear must be a positive int, got {value!r}")
        if self.bias is True or self.bias is False:
            object.__setattr__(self, "bias", "joint" if self.bias else None)
        if self.bias not in ("joint", "separate", None):
            raise ValueError(f"`bias` of Linear must be 'joint', 'separate' or None, got {self.bias!r}")
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f"`sharing` of Linear must be 'expand' or 'reduce', got {self.sharing!r}")
        if self.layout not in ("oi", "io"):
            raise ValueError(f"`layout` of Linear must be 'oi' or 'io', got {self.layout!r}")
        if not isinstance(self.stack, tuple) or not all(isinstance(n, int) and n > 0 for n in self.stack):
            raise ValueError(f"`stack` of Linear must be a tuple of positive ints, got {self.stack!r}")

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``, or ``(out, in + 1)`` with a joint bias."""
        return self.out_features, self.in_features + (self.bias == "joint")

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the layer's parameters in the user's layout, by role."""
        weight = (self.out_features, self.in_features)
        shapes: dict[str, tuple[int, ...]] = {"weight": (*self.stack, *(weight if self.layout == "oi" else weight[::-1]))}
        return shapes | {"bias": (*self.stack, self.out_features)} if self.bias else shapes

    def blocks(self) -> dict[str, Layer]:
        """The curvature blocks of this layer: itself under ``""``, or its weight and its bias apart."""
        if self.bias != "separate":
            return {"": self}
        return {".weight": replace(self, bias=None), ".bias": Bias(self.out_features, self.stack)}

    def matrices(self, params: Parameters) -> dict[str, Array]:
        """The parameters (or their gradients) as one matrix a block."""
        weight = params["weight"] if self.layout == "oi" else params["weight"].mT
        if self.bias == "separate":
            return {".weight": weight, ".bias": params["bias"][..., :, None]}
        if self.bias is None:
            return {"": weight}
        return {"": append(namespace(weight), weight, params["bias"])}

    def parameters_of(self, matrices: Mapping[str, Array]) -> dict[str, Array]:
        """Inverse of :meth:`matrices`."""
        if self.bias == "separate":
            params = {"weight": matrices[".weight"], "bias": matrices[".bias"][..., :, 0]}
        elif self.bias is None:
            params = {"weight": matrices[""]}
        else:
            params = {"weight": matrices[""][..., :, :-1], "bias": matrices[""][..., :, -1]}
        return params if self.layout == "oi" else params | {"weight": params["weight"].mT}

    def capture(self, inputs: Array, output_grads: Array | None) -> tuple[Array, Array | None]:
        """Bring what a user recorded, ``inputs [N, ..., in]`` and ``output_grads [N, ..., out]``, to ``[N, S, features]``.

        All behind the axes of ``stack``, if there are any.
        """
        xp = namespace(inputs, output_grads)
        flat = _positions(xp, "inputs", inputs, self.stack, self.in_features)
        if output_grads is None:
            return flat, None
        grads = _positions(xp, "output_grads", output_grads, self.stack, self.out_features)
        if flat.shape[:-1] != grads.shape[:-1]:
            raise ValueError(
                f"`inputs` and `output_grads` must agree in all axes but the last, got {tuple(inputs.shape)} and "
                f"{tuple(output_grads.shape)}"
            )
        return flat, grads

    def input_rows(self, xp: Namespace, inputs: Array, dtype: object) -> Array:
        """Rows ``[..., n, in (+1)]``; n = N S for expand, N for reduce."""
        inputs = cast(xp, inputs, dtype)
        rows = _merge(xp, inputs) if self.sharing == "expand" else xp.mean(inputs, axis=-2)
        if self.bias != "joint":
            return rows
        return append(xp, rows, 1.0)

    def output_rows(self, xp: Namespace, output_grads: Array, dtype: object) -> Array:
        """Rows ``[..., n, out]``; n = N S for expand, N for reduce."""
        grads = cast(xp, output_grads, dtype)
        return _merge(xp, grads) if self.sharing == "expand" else xp.sum(grads, axis=-2)


@dataclass(frozen=True)
class Bias:
    """A bias alone: a matrix with one column whose input is the constant 1.

    Its factor ``A`` is 1 and its factor ``G`` the second moment of the example's gradient ``sum_s g``, which is exact whatever
    the weight sharing.
    """

    features: int
    stack: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """``(features, 1)``."""
        return self.features, 1

    def input_rows(self, xp: Namespace, inputs: Array, dtype: object) -> Array:
        """Ones ``[..., N, 1]``."""
        shape = (*inputs.shape[:-2], 1)
        return xp.ones(shape, dtype=dtype, device=device(inputs))

    def output_rows(self, xp: Namespace, output_grads: Array, dtype: object) -> Array:
        """Sums over the positions, ``[..., N, features]``."""
        return xp.sum(cast(xp, output_grads, dtype), axis=-2)


def check_layers(layers: Mapping[str, object]) -> None:
    """Raise unless all of ``layers`` are descriptions of whole layers, with blocks."""
    for name, layer in layers.items():
        if isinstance(layer, type) or not hasattr(layer, "blocks"):
            raise TypeError(f"`layers` must hold layer descriptions such as kfcore.Linear(784, 128), got {layer!r} for {name!r}")


def _positions(xp: Namespace, name: str, x: Array, stack: tuple[int, ...], features: int) -> Array:
    """``x [*stack, N, ..., features]`` as ``[*stack, N, S, features]``."""
    lead = len(stack)
    if x.ndim < lead + 2 or tuple(x.shape[:lead]) != stack or x.shape[-1] != features:
        axes = "".join(f"{n}, " for n in stack)
        raise ValueError(f"`{name}` must have shape [{axes}N, ..., {features}], got {tuple(x.shape)}")
    return xp.reshape(x, (*x.shape[: lead + 1], math.prod(x.shape[lead + 1 : -1]), features))


def _merge(xp: Namespace, x: Array) -> Array:
    """``x [..., N, S, d]`` as rows ``[..., N S, d]``."""
    return xp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))
