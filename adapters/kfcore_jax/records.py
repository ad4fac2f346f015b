"""What one evaluation of the loss showed of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

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
        """By layer name its description at each use, where it is not that of the traced model (``None`` where it is): the padding of a
        convolution may change with the size of its input."""
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


def accumulate(records: Records | Sequence[Records], *, loss_reduction: Literal["mean", "sum"] = "mean") -> Records:
    """Records of a batch from those of its micro-batches, for gradients that are accumulated.

    Parameters
    ----------
    records
        One each micro-batch; or those that a ``lax.scan`` over equal micro-batches returned, stacked along a first axis.
    loss_reduction
        ``"mean"`` where each micro-batch has its own mean loss. The gradients given to ``update`` must be those of the mean over the whole
        batch: the micro-batches' gradients weighed by their terms. ``"sum"`` for summed losses, whose gradients add up, and for records of
        :meth:`Model.fisher_records`.

    Raises
    ------
    ValueError
        If there are none, or they are of different models.

    """
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"`loss_reduction` must be 'mean' or 'sum', got {loss_reduction!r}")
    if isinstance(records, Records):
        lengths = {x.shape[0] for x in jax.tree.leaves(records)}
        if len(lengths) != 1:
            raise ValueError(f"`records` must be stacked along a first axis of one length, got the lengths {sorted(lengths)}")
        parts = [jax.tree.map(lambda x, k=k: x[k], records) for k in range(lengths.pop())]
    else:
        parts = list(records)
    if not parts:
        raise ValueError("`records` must hold those of one micro-batch at least, got none")
    if any(part.layers.keys() != parts[0].layers.keys() for part in parts):
        raise ValueError("`records` must all be of one model; their layers differ")
    terms = sum(part.terms for part in parts)

    def of_whole(part: Records, use: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        inputs, grads = use
        return inputs, grads if grads is None or loss_reduction == "sum" else grads * (part.terms / terms)

    names = list(parts[0].layers)
    layers = {name: [of_whole(part, use) for part in parts for use in part.layers[name]] for name in names}
    uses = {name: sum((part.uses.get(name, (None,) * len(part.layers[name])) for part in parts), ()) for name in names}
    return Records(layers, terms, {name: of_layer for name, of_layer in uses.items() if any(of_layer)})
