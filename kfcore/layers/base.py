"""What a layer kind is to the rest of the library, and what layer kinds share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

from kfcore._array import Array, Namespace

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

    def input_count(self, inputs: Array) -> int:
        """Number n of these rows."""
        ...

    def input_gram(self, xp: Namespace, inputs: Array, dtype: object) -> Array:
        """Sum of ``a a^T`` over the rows of :meth:`input_rows`, ``[..., columns, columns]``.

        A layer that can do so computes it without holding the rows.
        """
        ...


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
