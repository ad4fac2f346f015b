"""Scale and shift behind a normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kfcore._array import Array, Namespace, cast, device, namespace
from kfcore.factors import Forms
from kfcore.layers.base import (
    Layer,
    Parameters,
    Plain,
    checked_int,
    checked_stack,
    live_count,
    live_examples,
    live_only,
    mask_positions,
    positions,
)


@dataclass(frozen=True)
class Norm(Plain):
    """The trained part of a normalisation layer: ``y = weight * xhat + bias`` of each position, ``xhat`` being what was normalised.

    The gradients of an example, ``sum_s xhat g`` and ``sum_s g`` over its positions, are cheap, so that the block is their exact second
    moment: whole, or its diagonal. No factor approximates it, whatever the network.

    LayerNorm, RMSNorm (``bias=False``), GroupNorm, InstanceNorm and BatchNorm with fixed statistics (evaluation) are all this layer and
    differ in ``xhat`` alone, which is why captured ``inputs`` are ``xhat`` itself: ``(x - mean) / sqrt(var + eps)`` with the mean and
    the variance that the layer took. BatchNorm that computes its statistics from the batch has no gradients of single examples: each
    example's loss depends on all others through them, and an adapter should leave its parameters to the fallback. A bare number that
    multiplies an activation is ``Norm(1, bias=False)``, with the activation for ``xhat``.

    A program may apply scale and shift at different places, as ``scale / sqrt(var + eps) * (x - mean) + shift`` does, and each be seen
    where it is applied: ``u`` and ``g`` where a scale multiplies ``u``, whatever follows, and ``h`` where a shift is added.
    :meth:`ModelOptimizer.reduce` then takes ``inputs [N, S, 2 features]``, ``u`` and behind it ones, with ``output_grads`` ``g`` and behind
    it ``h``. A shift alone is ``Norm(features, bias=False)`` whose inputs are ones.

    As a matrix it has one column, ``[weight; bias]``, and the input factor 1; the factored and
    the exact kind of damping both apply ``(F + damping I)^-1`` exactly.

    Parameters
    ----------
    features
        Shape of ``weight`` and of ``bias``: a number, or a tuple for normalisation over several axes.
    bias
        Whether there is a shift.
    block
        ``"diagonal"``: the mean square of each entry of the gradient, ``features`` numbers each for scale and shift. ``"full"``: the second
        moment of both together, ``(2 features)^2`` numbers, inverted at a refresh.
    channels
        Where captured arrays have their features: ``"last"`` for ``[N, ..., features]``, ``"first"`` for ``[N, features, ...]``, as group
        and batch normalisation of images do. All axes besides are positions.
    stack
        Leading axes of parameters and captured arrays that hold as many independent layers.
    """

    features: int | tuple[int, ...]
    bias: bool = True
    block: Literal["diagonal", "full"] = "diagonal"
    channels: Literal["last", "first"] = "last"
    stack: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        axes = self.features if isinstance(self.features, tuple) else (self.features,)
        if not axes:
            raise ValueError("`features` of Norm must be a positive int or a tuple of them, got ()")
        for axis in axes:
            checked_int("features", "Norm", axis, got=self.features)
        if not isinstance(self.bias, bool):
            raise ValueError(f"`bias` of Norm must be True or False, got {self.bias!r}")
        if self.block not in ("diagonal", "full"):
            raise ValueError(f"`block` of Norm must be 'diagonal' or 'full', got {self.block!r}")
        if self.channels not in ("last", "first"):
            raise ValueError(f"`channels` of Norm must be 'last' or 'first', got {self.channels!r}")
        if self.channels == "first" and len(axes) > 1:
            raise ValueError(f"`features` of Norm with channels='first' must be an int, got {self.features!r}")
        checked_stack("Norm", self.stack)

    @property
    def size(self) -> int:
        """Number of features."""
        return math.prod(self._axes)

    @property
    def shape(self) -> tuple[int, int]:
        """``(2 features, 1)``, or ``(features, 1)`` without a shift."""
        return self.size * (1 + self.bias), 1

    @property
    def forms(self) -> Forms:
        """The output factor is what ``block`` says, the input factor the number 1."""
        return ("diagonal" if self.block == "diagonal" else "matrix"), "matrix"

    @property
    def together(self) -> Literal[True]:
        """A gradient by the scale is made of both."""
        return True

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the layer's parameters by role."""
        shape = (*self.stack, *self._axes)
        return {"weight": shape} | ({"bias": shape} if self.bias else {})

    def blocks(self) -> dict[str, Layer]:
        """The one curvature block of this layer, for scale and shift."""
        return {"": self}

    def matrices(self, params: Parameters) -> dict[str, Array]:
        """Scale and shift (or their gradients) as one column, ``[..., 2 features, 1]``."""
        xp = namespace(params["weight"])
        parts = [xp.reshape(params[role], (*self.stack, self.size)) for role in self.parameters]
        return {"": (xp.concat(parts, axis=-1) if self.bias else parts[0])[..., None]}

    def parameters_of(self, matrices: Mapping[str, Array]) -> dict[str, Array]:
        """Inverse of :meth:`matrices`."""
        column = matrices[""][..., 0]
        xp = namespace(column)
        parts = {"weight": column[..., : self.size]} | ({"bias": column[..., self.size :]} if self.bias else {})
        return {role: xp.reshape(part, self.parameters[role]) for role, part in parts.items()}

    def to_oi(self, weight: Array) -> Array:
        """The scale as it is, which is the layout of files."""
        return weight

    def from_oi(self, weight: Array) -> Array:
        """Inverse of :meth:`to_oi`."""
        return weight

    def capture(self, inputs: Array, output_grads: Array | None) -> tuple[Array, Array | None]:
        """Bring what a user recorded, ``xhat`` and the gradients at ``y``, both ``[N, ..., features]``, to ``[N, S, features]``.

        Behind the axes of ``stack``, if there are any; with the features where ``channels`` says.
        """
        xp = namespace(inputs, output_grads)
        flat = self._positions(xp, "inputs", inputs)
        if output_grads is None:
            return flat, None
        if inputs.shape != output_grads.shape:
            raise ValueError(f"`inputs` and `output_grads` must agree in shape, got {tuple(inputs.shape)} and {tuple(output_grads.shape)}")
        return flat, self._positions(xp, "output_grads", output_grads)

    def capture_mask(self, mask: Array, inputs: Array) -> Array:
        """Bring ``mask``, true at the positions that are real, of the shape of ``inputs`` without the features, to ``[N, S]``."""
        lead = len(self.stack) + 1
        if self.channels == "first":
            shape = (*inputs.shape[:lead], *inputs.shape[lead + 1 :])
        else:
            shape = inputs.shape[: inputs.ndim - len(self._axes)]
        return mask_positions(self, mask, shape, inputs)

    def input_rows(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """Ones ``[..., N, 1]``: the example's gradient is all in the output rows."""
        if mask is not None:
            return live_examples(xp, mask, dtype)[..., None]
        return xp.ones((*inputs.shape[:-2], 1), dtype=dtype, device=device(inputs))

    def input_count(self, inputs: Array, mask: Array | None = None) -> int | Array:
        """Number of examples."""
        return inputs.shape[-3] if mask is None else live_count(mask, "reduce")

    def input_gram(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """The number of examples as a matrix ``[..., 1, 1]``."""
        if mask is not None:
            return xp.astype(live_count(mask, "reduce"), dtype)[..., None, None]
        return xp.full((*inputs.shape[:-3], 1, 1), float(inputs.shape[-3]), dtype=dtype, device=device(inputs))

    def output_rows(
        self, xp: Namespace, output_grads: Array, dtype: object, inputs: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Each example's gradient ``[..., N, 2 features]``: ``sum_s xhat g``, and behind it ``sum_s g``.

        Where scale and shift were seen apart, both arrays have the features of the two behind each other, and the gradient is the sum over
        positions of their product.
        """
        if inputs is None or inputs.shape != output_grads.shape:
            came = None if inputs is None else tuple(inputs.shape)
            raise ValueError(f"`inputs` must be given with the shape of `output_grads`, {tuple(output_grads.shape)}, got {came}")
        grads, hat = cast(xp, output_grads, dtype), cast(xp, inputs, dtype)
        if mask is not None:
            grads, hat = live_only(xp, grads, mask), live_only(xp, hat, mask)
        products = xp.sum(hat * grads, axis=-2)
        if not self.bias or output_grads.shape[-1] == self.shape[0]:
            return products
        return xp.concat([products, xp.sum(grads, axis=-2)], axis=-1)

    @property
    def _axes(self) -> tuple[int, ...]:
        return self.features if isinstance(self.features, tuple) else (self.features,)

    def _positions(self, xp: Namespace, name: str, x: Array) -> Array:
        """``x`` as ``[*stack, N, S, features]``."""
        lead, axes = len(self.stack), self._axes
        if self.channels == "last":
            if x.ndim < lead + 1 + len(axes) or tuple(x.shape[x.ndim - len(axes) :]) != axes:
                raise ValueError(f"`{name}` must have shape {self._named(lead)}, got {tuple(x.shape)}")
            x = xp.reshape(x, (*x.shape[: x.ndim - len(axes)], self.size))
        else:
            if x.ndim < lead + 2 or x.shape[lead + 1] != self.size:
                raise ValueError(f"`{name}` must have shape {self._named(lead)}, got {tuple(x.shape)}")
            x = xp.permute_dims(x, (*range(lead + 1), *range(lead + 2, x.ndim), lead + 1))
        return positions(xp, name, x, self.stack, self.size)

    def _named(self, lead: int) -> str:
        """The shape of captured arrays, for messages."""
        features = [str(n) for n in self._axes]
        axes = ["N", "...", *features] if self.channels == "last" else ["N", *features, "..."]
        return f"[{', '.join([*map(str, self.stack), *axes])}]"
