"""What a layer kind is to the rest of the library, and what layer kinds share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from kfcore._array import Array, Namespace, device, namespace
from kfcore.factors import MATRICES, Forms

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

    @property
    def forms(self) -> Forms:
        """Forms ``(output, input)`` of the factors, see :mod:`kfcore.factors`; ``("matrix", "matrix")`` unless a factor is diagonal."""
        ...

    @property
    def input_kind(self) -> Literal["features", "ids"]:
        """What ``inputs`` hold: features ``[..., N, S, in]``, or ``[..., N, S]`` integers, each a place in a table."""
        ...

    @property
    def together(self) -> bool:
        """Whether :meth:`output_rows` are made of the inputs too, so that both must come in one call."""
        ...

    @property
    def unmaskable(self) -> str:
        """Why no positions can be masked; empty if they can."""
        ...

    def input_rows(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """Rows ``[..., n, columns]`` whose second moment is the input factor, from ``inputs [..., N, S, in]``.

        A row that ``mask [..., N, S]`` leaves nothing of is zero.
        """
        ...

    def output_rows(
        self, xp: Namespace, output_grads: Array, dtype: object, inputs: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Rows ``[..., n, rows]`` whose second moment is the output factor, from ``output_grads [..., N, S, out]``.

        ``inputs`` are those of the same positions, which only a layer that wants them :attr:`together` looks at.
        """
        ...

    def input_count(self, inputs: Array, mask: Array | None = None) -> int | Array:
        """Number n of :meth:`input_rows`; an array ``[...]`` where it depends on what ``inputs`` or ``mask`` hold."""
        ...

    def input_gram(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """Sum of ``a a^T`` over the rows of :meth:`input_rows`, ``[..., columns, columns]``, or its diagonal where that is the form.

        A layer that can do so computes it without holding the rows.
        """
        ...

    def input_sum(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """Sum of the rows of :meth:`input_rows`, ``[..., columns]``, likewise without holding them where that can be."""
        ...


class Plain:
    """What most layers say: both factors are matrices, inputs are features, each side is reduced by itself, positions can be masked."""

    @property
    def forms(self) -> Forms:
        """Two matrices."""
        return MATRICES

    @property
    def input_kind(self) -> Literal["features", "ids"]:
        """Features."""
        return "features"

    @property
    def together(self) -> bool:
        """No."""
        return False

    @property
    def unmaskable(self) -> str:
        """They can."""
        return ""

    def input_sum(self: Any, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """By the rows."""
        return xp.sum(self.input_rows(xp, inputs, dtype, mask), axis=-2)


class Turned:
    """A weight that is one matrix, stored as the ``layout`` of the layer says."""

    layout: Literal["oi", "io"]

    def to_oi(self, weight: Array) -> Array:
        """The user's weight (or table) as ``[..., out, in]``, the layout of files."""
        return weight if self.layout == "oi" else weight.mT

    def from_oi(self, weight: Array) -> Array:
        """Inverse of :meth:`to_oi`."""
        return weight if self.layout == "oi" else weight.mT


def check_layers(layers: Mapping[str, object]) -> None:
    """Raise unless all of ``layers`` are descriptions of whole layers, with blocks."""
    for name, layer in layers.items():
        if isinstance(layer, type) or not hasattr(layer, "blocks"):
            raise TypeError(f"`layers` must hold layer descriptions such as kfcore.Linear(784, 128), got {layer!r} for {name!r}")


def positions(xp: Namespace, name: str, x: Array, stack: tuple[int, ...], features: int) -> Array:
    """``x [*stack, N, ..., features]`` as ``[*stack, N, S, features]``."""
    lead = len(stack)
    if x.ndim < lead + 2 or tuple(x.shape[:lead]) != stack or x.shape[-1] != features:
        axes = "".join(f"{n}, " for n in stack)
        raise ValueError(f"`{name}` must have shape [{axes}N, ..., {features}], got {tuple(x.shape)}")
    return xp.reshape(x, (*x.shape[: lead + 1], math.prod(x.shape[lead + 1 : -1]), features))


def merge(xp: Namespace, x: Array) -> Array:
    """``x [..., N, S, d]`` as rows ``[..., N S, d]``."""
    return xp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))


def flat_positions(xp: Namespace, name: str, ids: Array, stack: tuple[int, ...]) -> Array:
    """``ids [*stack, N, ...]`` as ``[*stack, N, S]``."""
    lead = len(stack)
    if not xp.isdtype(ids.dtype, "integral"):
        raise TypeError(f"`{name}` must be integers, got {ids.dtype}")
    if ids.ndim < lead + 1 or tuple(ids.shape[:lead]) != stack:
        axes = "".join(f"{n}, " for n in stack)
        raise ValueError(f"`{name}` must have shape [{axes}N, ...], got {tuple(ids.shape)}")
    return xp.reshape(ids, (*ids.shape[: lead + 1], math.prod(ids.shape[lead + 1 :])))


def check_mask(layer: Layer, mask: Array, positions: tuple[int, ...], source: str, captured: Array) -> None:
    """Raise unless ``mask`` is boolean, one entry for each of the ``positions`` of what was ``captured``, and of use to ``layer``."""
    if layer.unmaskable:
        raise ValueError(f"`mask` must be None for {type(layer).__name__}: {layer.unmaskable}")
    xp = namespace(mask, captured)
    if not xp.isdtype(mask.dtype, "bool"):
        raise TypeError(f"`mask` must be boolean, True at real positions, got {mask.dtype}")
    if tuple(mask.shape) != tuple(positions):
        raise ValueError(f"`mask` must have shape {tuple(positions)}, one entry for each position of `{source}`, got {tuple(mask.shape)}")


def mask_positions(layer: Layer, mask: Array, positions: tuple[int, ...], inputs: Array) -> Array:
    """``mask [*stack, N, ...]``, which must have the shape ``positions``, as ``[*stack, N, S]``."""
    check_mask(layer, mask, positions, "inputs", inputs)
    lead = len(layer.stack) + 1
    return namespace(mask).reshape(mask, (*positions[:lead], math.prod(positions[lead:])))


def live_only(xp: Namespace, x: Array, mask: Array) -> Array:
    """``x [..., N, S, d]`` with zeros where ``mask [..., N, S]`` is false.

    A selection, not a product: what stands at a position that is none has no effect, finite or not.
    """
    return xp.where(mask[..., None], x, xp.zeros((), dtype=x.dtype, device=device(x)))


def live_examples(xp: Namespace, mask: Array, dtype: object) -> Array:
    """1 for each example that has a position, else 0: ``[..., N]`` of ``mask [..., N, S]``."""
    return xp.astype(xp.any(mask, axis=-1), dtype)


def live_count(mask: Array, sharing: Sharing) -> Array:
    """Number of positions that ``mask [..., N, S]`` leaves (expand), or of examples that have one (reduce), ``[...]``, int32."""
    xp = namespace(mask)
    if sharing == "expand":
        return xp.sum(xp.astype(mask, xp.int32), axis=(-2, -1), dtype=xp.int32)
    return xp.sum(live_examples(xp, mask, xp.int32), axis=-1, dtype=xp.int32)


def checked_int(name: str, kind: str, value: object, got: object = None) -> None:
    """Raise unless ``value`` is a positive int; ``got`` is what came, if that is another."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` of {kind} must be a positive int, got {(value if got is None else got)!r}")


def checked_stack(kind: str, stack: object) -> None:
    """Raise unless ``stack`` is a tuple of positive ints."""
    if not isinstance(stack, tuple) or not all(isinstance(n, int) and n > 0 for n in stack):
        raise ValueError(f"`stack` of {kind} must be a tuple of positive ints, got {stack!r}")
