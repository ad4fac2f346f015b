"""What one evaluation of the loss showed of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax


@jax.tree_util.register_pytree_node_class
class Records:
    """Inputs and output gradients of every use of every layer: a pytree, made inside ``jit`` and read by ``update``.

    What a method does not need of it costs nothing in a compiled program.
    """

    def __init__(
        self,
        layers: dict[str, list[tuple[jax.Array, jax.Array | None]]],
        terms: float,
        uses: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        self.layers = layers
        """By layer name ``(inputs [*stack, N, S, in], output_grads [*stack, K N, S, out])`` for each use, K the vectors pulled back.

        Inputs of a convolution are ``[*stack, N, *spatial, in]``.
        """
        self.uses = dict(uses or {})
        """By layer name its description at each use, where it is not that of the traced model: the padding of a convolution may change
        with the size of its input."""
        self.terms = terms
        """Number of terms in the loss: the rows of the output layer, unless told otherwise."""
        self.gradients: dict[str, jax.Array] = {}
        """The gradients of the same evaluation by path. They do not leave the program they are computed in."""

    def tree_flatten(self) -> tuple[Any, Any]:
        """Arrays; and the number of terms and the descriptions, which are static."""
        return (self.layers,), (self.terms, tuple(self.uses.items()))

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Records:
        """Inverse of :meth:`tree_flatten`."""
        records = object.__new__(cls)
        (records.layers,), (records.terms, uses) = children, static
        records.uses = dict(uses)
        records.gradients = {}
        return records
