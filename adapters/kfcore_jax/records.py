"""What one evaluation of the loss showed of its layers."""

from __future__ import annotations

from typing import Any

import jax


@jax.tree_util.register_pytree_node_class
class Records:
    """Inputs and output gradients of every use of every layer: a pytree, made inside ``jit`` and read by ``update``.

    What a method does not need of it costs nothing in a compiled program.
    """

    def __init__(self, layers: dict[str, list[tuple[jax.Array, jax.Array | None]]], terms: float) -> None:
        self.layers = layers
        """By layer name ``(inputs [*stack, N, S, in], output_grads [*stack, K N, S, out])`` for each use, K the vectors pulled back."""
        self.terms = terms
        """Number of terms in the loss: the rows of the output layer, unless told otherwise."""
        self.gradients: dict[str, jax.Array] = {}
        """The gradients of the same evaluation by path. They do not leave the program they are computed in."""

    def tree_flatten(self) -> tuple[Any, Any]:
        """Arrays, and the number of terms, which is static."""
        return (self.layers,), self.terms

    @classmethod
    def tree_unflatten(cls, terms: Any, children: Any) -> Records:
        """Inverse of :meth:`tree_flatten`."""
        records = object.__new__(cls)
        (records.layers,), records.terms = children, terms
        records.gradients = {}
        return records
