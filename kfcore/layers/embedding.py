"""Embeddings: tables of which whole rows are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kfcore import linalg
from kfcore._array import Array, Namespace, cast, device, namespace, readable
from kfcore.factors import Forms
from kfcore.layers.base import (
    Layer,
    Parameters,
    Sharing,
    Turned,
    checked_int,
    checked_stack,
    flat_positions,
    live_count,
    live_only,
    mask_positions,
    merge,
    positions,
)


@dataclass(frozen=True)
class Embedding(Turned):
    """A table of ``num`` rows with ``features`` numbers each, of which whole rows are taken: ``y = table[id]``.

    It is a dense layer on one-hot inputs, of matrix ``[features, num]``. Its input factor is therefore diagonal, the share of the
    positions at which each row was taken, and is kept as a vector ``[num]``; nothing of size ``num x num`` is ever made. A step costs
    ``2 num features^2`` operations (twice that with exact damping) and a refresh ``features^3``. With one position an example the
    block is exact wherever that of a dense layer is.

    Captured ``inputs`` are the ids, integers ``[N, ...]``, and ``output_grads`` the gradients at what was taken, ``[N, ..., features]``. An
    id that is no row of the table is refused where the host can read it without waiting (NumPy, PyTorch on the CPU); elsewhere it counts
    for a position at which no row was taken, and its gradient, if it has one, enters the output factor.

    Parameters
    ----------
    num
        Rows of the table: the size of the vocabulary.
    features
        Numbers in a row.
    padding
        Positions with this id are none: they leave both factors, whatever their gradient, and the row is never moved by the others. Then
        inputs and output gradients must be reduced together. ``num`` itself, which is no row, may stand for places without one.
    layout
        How the user stores the table: ``"io"`` for ``[num, features]`` (PyTorch, Flax, Keras), ``"oi"`` for ``[features, num]``.
    sharing
        ``"expand"``; there is no ``"reduce"``, for averages over positions of one-hot inputs have a dense second moment.
    stack
        Leading axes of tables, ids and gradients that hold as many independent tables of equal shape.
    """

    num: int
    features: int
    padding: int | None = None
    layout: Literal["io", "oi"] = "io"
    sharing: Sharing = "expand"
    stack: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checked_int("num", "Embedding", self.num)
        checked_int("features", "Embedding", self.features)
        if self.padding is not None and not (
            isinstance(self.padding, int) and not isinstance(self.padding, bool) and 0 <= self.padding <= self.num
        ):
            raise ValueError(f"`padding` of Embedding must be None or an id from 0 to {self.num}, got {self.padding!r}")
        if self.layout not in ("io", "oi"):
            raise ValueError(f"`layout` of Embedding must be 'io' or 'oi', got {self.layout!r}")
        if self.sharing != "expand":
            raise ValueError(
                "`sharing` of Embedding must be 'expand', for averages over positions of one-hot inputs have no diagonal second moment, "
                f"got {self.sharing!r}"
            )
        checked_stack("Embedding", self.stack)

    @property
    def shape(self) -> tuple[int, int]:
        """``(features, num)``."""
        return self.features, self.num

    @property
    def forms(self) -> Forms:
        """The input factor is diagonal."""
        return "matrix", "diagonal"

    @property
    def input_kind(self) -> Literal["ids"]:
        """Places in the table."""
        return "ids"

    @property
    def together(self) -> bool:
        """Whether there is padding, which the ids tell and the gradients do not."""
        return self.padding is not None

    @property
    def unmaskable(self) -> str:
        """They can."""
        return ""

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of the table in the user's layout, under ``"weight"``."""
        shape = (self.num, self.features) if self.layout == "io" else (self.features, self.num)
        return {"weight": (*self.stack, *shape)}

    def blocks(self) -> dict[str, Layer]:
        """The one curvature block of this layer."""
        return {"": self}

    def matrices(self, params: Parameters) -> dict[str, Array]:
        """The table (or its gradient) as a matrix ``[..., features, num]``, a view."""
        return {"": self.to_oi(params["weight"])}

    def parameters_of(self, matrices: Mapping[str, Array]) -> dict[str, Array]:
        """Inverse of :meth:`matrices`."""
        return {"weight": self.from_oi(matrices[""])}

    def capture(self, inputs: Array, output_grads: Array | None) -> tuple[Array, Array | None]:
        """Bring what a user recorded, ids ``[N, ...]`` and ``output_grads [N, ..., features]``, to ``[N, S]`` and ``[N, S, features]``.

        All behind the axes of ``stack``, if there are any.
        """
        xp = namespace(inputs, output_grads)
        ids = flat_positions(xp, "inputs", inputs, self.stack)
        if output_grads is None:
            return ids, None
        grads = positions(xp, "output_grads", output_grads, self.stack, self.features)
        if inputs.shape != output_grads.shape[:-1]:
            raise ValueError(
                "`output_grads` must have the axes of `inputs` and one for the features, got "
                f"{tuple(output_grads.shape)} and {tuple(inputs.shape)}"
            )
        return ids, grads

    def capture_mask(self, mask: Array, inputs: Array) -> Array:
        """Bring ``mask [N, ...]``, true at the positions of ``inputs [N, ...]`` that are real, to ``[N, S]``."""
        return mask_positions(self, mask, inputs.shape, inputs)

    def input_rows(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """One-hot rows ``[..., N S, num]``, zero at padding: for analysis of small tables, the methods make no use of them."""
        ids = self._taken(xp, inputs, mask)
        return merge(xp, xp.astype(ids[..., None] == xp.arange(self.num, dtype=ids.dtype, device=device(ids)), dtype))

    def input_count(self, inputs: Array, mask: Array | None = None) -> int | Array:
        """Number of positions, without padding; an array ``[...]`` if there may be some."""
        if mask is None and self.padding is None:
            return inputs.shape[-2] * inputs.shape[-1]
        live = self._live(_wide(namespace(inputs), inputs, self.num), mask)
        return live_count(live, "expand")

    def input_gram(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """How often each row was taken, ``[..., num]``: the diagonal of the second moment of the one-hot rows.

        Raises
        ------
        ValueError
            If an id is no row of the table, and the host can read it.
        """
        ids = self._taken(xp, inputs, mask)
        return cast(xp, linalg.counts(xp, xp.reshape(ids, (*ids.shape[:-2], ids.shape[-2] * ids.shape[-1])), self.num), dtype)

    def input_sum(self, xp: Namespace, inputs: Array, dtype: object, mask: Array | None = None) -> Array:
        """How often each row was taken, ``[..., num]``: one-hot rows are their own squares."""
        return self.input_gram(xp, inputs, dtype, mask)

    def output_rows(
        self, xp: Namespace, output_grads: Array, dtype: object, inputs: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Rows ``[..., N S, features]``, zero at padding."""
        grads = cast(xp, output_grads, dtype)
        if self.padding is not None and inputs is not None:
            if tuple(inputs.shape) != tuple(grads.shape[:-1]):
                raise ValueError(
                    f"`inputs` must have the shape of `output_grads` without the features, {tuple(grads.shape[:-1])}, got "
                    f"{tuple(inputs.shape)}"
                )
            mask = self._live(_wide(xp, inputs, self.num), mask)
        return merge(xp, grads if mask is None else live_only(xp, grads, mask))

    def _live(self, ids: Array, mask: Array | None) -> Array | None:
        """Which positions are neither masked nor padding, if that is not all."""
        if self.padding is None:
            return mask
        return ids != self.padding if mask is None else mask & (ids != self.padding)

    def _taken(self, xp: Namespace, ids: Array, mask: Array | None) -> Array:
        """``ids`` in a dtype that holds ``num``, which stands, being no row, where none was taken.

        Raise if one that was is outside of the table and the host can see it.
        """
        ids = _wide(xp, ids, self.num)
        live = self._live(ids, mask)
        if 0 not in ids.shape and readable(xp, ids):
            seen = ids if live is None else xp.where(live, ids, xp.zeros((), dtype=ids.dtype, device=device(ids)))
            low, high = int(xp.min(seen)), int(xp.max(seen))
            if low < 0 or high >= self.num:
                raise ValueError(f"`inputs` must be ids from 0 to {self.num - 1}, rows of the table, got ids from {low} to {high}")
        return ids if live is None else xp.where(live, ids, xp.full((), self.num, dtype=ids.dtype, device=device(ids)))


def _wide(xp: Namespace, ids: Array, num: int) -> Array:
    """``ids`` in a dtype that holds ``num``."""
    return ids if xp.iinfo(ids.dtype).max >= num else xp.astype(ids, xp.int32)
