"""Dense layers, and a bias alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kfcore._array import Array, Namespace, append, cast, device, namespace
from kfcore.layers.base import (
    Layer,
    Parameters,
    Plain,
    Sharing,
    Turned,
    checked_int,
    checked_stack,
    live_count,
    live_examples,
    live_only,
    mask_positions,
    merge,
    positions,
)
from kfcore.linalg import gram


@dataclass(frozen=True)
class Linear(Turned, Plain):
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
            checked_int(name, "Linear", getattr(self, name))
        if self.bias is True or self.bias is False:
            object.__setattr__(self, "bias", "joint" if self.bias else None)
        if self.bias not in ("joint", "separate", None):
            raise ValueError(f"`bias` of Linear must be 'joint', 'separate' or None, got {self.bias!r}")
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f"`sharing` of Linear must be 'expand' or 'reduce', got {self.sharing!r}")
        if self.layout not in ("oi", "io"):
            raise ValueError(f"`layout` of Linear must be 'oi' or 'io', got {self.layout!r}")
        checked_stack("Linear", self.stack)

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
        weight = self.to_oi(params["weight"])
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
        return params | {"weight": self.from_oi(params["weight"])}

    def capture(self, inputs: Array, output_grads: Array | None) -> tuple[Array, Array | None]:
        """Bring what a user recorded, ``inputs [N, ..., in]`` and ``output_grads [N, ..., out]``, to ``[N, S, features]``.

        All behind the axes of ``stack``, if there are any.
        """
        xp = namespace(inputs, output_grads)
        flat = positions(xp, "inputs", inputs, self.stack, self.in_features)
        if output_grads is None:
            return flat, None
        grads = positions(xp, "output_grads", output_grads, self.stack, self.out_features)
        if flat.shape[:-1] != grads.shape[:-1]:
            raise ValueError(
                f"`inputs` and `output_grads` must agree in all axes but the last, got {tuple(inputs.shape)} and "
                f"{tuple(output_grads.shape)}"
            )
        return flat, grads

    def capture_mask(self, mask: Array, inputs: Array) -> Array:
        """Bring ``mask [N, ...]``, true at the positions of ``inputs [N, ..., in]`` that are real, to ``[N, S]``."""
        return mask_positions(self, mask, inputs.shape[:-1], inputs)

    def input_rows(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """Rows ``[..., n, in (+1)]``; n = N S for expand, N for reduce."""
        inputs = cast(xp, inputs, dtype)
        if mask is not None:
            return self._masked_rows(xp, inputs, dtype, mask)
        rows = merge(xp, inputs) if self.sharing == "expand" else xp.mean(inputs, axis=-2)
        if self.bias != "joint":
            return rows
        return append(xp, rows, 1.0)

    def _masked_rows(self, xp: Namespace, inputs: Array, dtype: object, mask: Array) -> Array:
        """:meth:`input_rows` where some are zero, the 1 of a joint bias too; means are of the live positions."""
        inputs = live_only(xp, inputs, mask)
        if self.sharing == "expand":
            rows, ones = merge(xp, inputs), xp.astype(merge(xp, mask[..., None])[..., 0], dtype)
        else:
            ones = live_examples(xp, mask, dtype)
            # an example without a position divides its sum, which is zero, by 1
            rows = xp.sum(inputs, axis=-2) / (xp.sum(xp.astype(mask, dtype), axis=-1) + (1.0 - ones))[..., None]
        return append(xp, rows, ones) if self.bias == "joint" else rows

    def input_sum(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """Sum of the rows, which are not made where no position is masked."""
        if mask is not None:
            return super().input_sum(xp, inputs, dtype, mask)
        total = xp.sum(inputs, axis=(-3, -2), dtype=dtype)
        total = total if self.sharing == "expand" else total / inputs.shape[-2]
        count = float(self.input_count(inputs))
        return append(xp, total[..., None, :], count)[..., 0, :] if self.bias == "joint" else total

    def output_rows(
        self, xp: Namespace, output_grads: Array, dtype: object, inputs: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Rows ``[..., n, out]``; n = N S for expand, N for reduce."""
        grads = cast(xp, output_grads, dtype)
        if mask is not None:
            grads = live_only(xp, grads, mask)
        return merge(xp, grads) if self.sharing == "expand" else xp.sum(grads, axis=-2)

    def input_count(self, inputs: Array, mask: Array | None = None) -> int | Array:
        """Rows of :meth:`input_rows`, those that are masked not counted."""
        if mask is None:
            return inputs.shape[-3] * (inputs.shape[-2] if self.sharing == "expand" else 1)
        return live_count(mask, self.sharing)

    def input_gram(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """Second moment of the rows."""
        return gram(xp, self.input_rows(xp, inputs, dtype, mask))


@dataclass(frozen=True)
class Bias(Plain):
    """A bias alone: a matrix with one column whose input is the constant 1.

    Its factor ``A`` is 1 and its factor ``G`` the second moment of the example's gradient ``sum_s g``, which is exact whatever
    the weight sharing.

    Parameters
    ----------
    features
        Width.
    stack
        As in :class:`Linear`.
    axes
        How many axes of positions the captured inputs have between the examples and the features: 1, or the spatial axes of a
        convolution.
    """

    features: int
    stack: tuple[int, ...] = ()
    axes: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """``(features, 1)``."""
        return self.features, 1

    def input_rows(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """Ones ``[..., N, 1]``."""
        if mask is not None:
            return live_examples(xp, mask, dtype)[..., None]
        shape = (*inputs.shape[: -1 - self.axes], 1)
        return xp.ones(shape, dtype=dtype, device=device(inputs))

    def output_rows(
        self, xp: Namespace, output_grads: Array, dtype: object, inputs: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Sums over the positions, ``[..., N, features]``."""
        grads = cast(xp, output_grads, dtype)
        return xp.sum(grads if mask is None else live_only(xp, grads, mask), axis=-2)

    def input_count(self, inputs: Array, mask: Array | None = None) -> int | Array:
        """Number of examples."""
        return inputs.shape[-2 - self.axes] if mask is None else live_count(mask, "reduce")

    def input_gram(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """Second moment of the rows."""
        return gram(xp, self.input_rows(xp, inputs, dtype, mask))
