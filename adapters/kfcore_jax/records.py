"""What one evaluation of the loss showed of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kfcore.statistics import Use


@jax.tree_util.register_pytree_node_class
class Records:
    """Inputs and output gradients of every use of every layer: a pytree, made inside ``jit`` and read by ``update``.

    What a method does not need of it costs nothing in a compiled program.
    """

    def __init__(
        self,
        layers: dict[str, list[tuple[jax.Array, jax.Array | None]]],
        terms: float | jax.Array,
        uses: Mapping[str, tuple[Any, ...]] | None = None,
        rounds: Mapping[str, tuple[int, ...]] | None = None,
        parts: Mapping[str, tuple[int, ...]] | None = None,
        masks: Mapping[str, list[jax.Array | None]] | None = None,
    ) -> None:
        self.layers = layers
        """By layer name ``(inputs [*stack, N, S, in], output_grads [*stack, K N, S, out])`` for each use, K the vectors pulled back.

        Inputs of a convolution are ``[*stack, N, *spatial, in]``.
        """
        self.uses = dict(uses or {})
        """By layer name its description at each use, where it is not that of the traced model (``None`` where it is): the padding of a
        convolution may change with the size of its input."""
        self.rounds = dict(rounds or {})
        """By layer name, how many entries behind each other along N are of one example at each use, where that is not 1: convolutions in
        loops, or of several frames an example."""
        self.parts = dict(parts or {})
        """By layer name, how many of its uses each micro-batch has; all are of one batch where it is not here."""
        self.masks = dict(masks or {})
        """By layer name ``[*stack, N, S]`` at each use, true at real positions, of the layers that have such a mask at some use."""
        self.terms = terms
        """Number of terms in the loss: the rows of the output layer, those that are masked not counted, unless told otherwise."""
        self.gradients: dict[str, jax.Array] = {}
        """The gradients of the same evaluation by path. They do not leave the program they are computed in."""

    def tree_flatten(self) -> tuple[Any, Any]:
        """Arrays; and the descriptions, which are static, as is the number of terms where no mask tells it."""
        told = isinstance(self.terms, (int, float))
        children = (self.layers, self.masks, None if told else self.terms)
        return children, (self.terms if told else None, *(tuple(static.items()) for static in (self.uses, self.rounds, self.parts)))

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Records:
        """Inverse of :meth:`tree_flatten`."""
        records = object.__new__(cls)
        (records.layers, records.masks, counted), (terms, *mappings) = children, static
        records.terms = counted if terms is None else terms
        records.uses, records.rounds, records.parts = (dict(mapping) for mapping in mappings)
        records.gradients = {}
        return records

    def batches(self, name: str, layer: Any, *, apart: bool) -> list[list[Use]]:
        """Uses of a layer by micro-batch: those of one have the same examples, those of another have others.

        ``layer`` is what stands for ``None`` in ``uses``. With ``apart`` every entry along N is an example; without, a convolution that
        sees several entries of an example has as many uses.
        """
        pairs = self.layers[name]
        n = len(pairs)
        described, rounds = self.uses.get(name, (None,) * n), self.rounds.get(name, (1,) * n)
        masks = self.masks.get(name, (None,) * n)
        found: list[list[Use]] = []
        for use, times, mask, (inputs, grads) in zip(described, rounds, masks, pairs, strict=True):
            use = layer if use is None else use
            if apart or times == 1 or grads is None:
                found.append([Use(use, inputs, grads, mask)])
                continue
            sides = (_rounds(x, grads.ndim - 3, times) for x in (inputs, grads))
            found.append([Use(use, *side) for side in zip(*sides, strict=True)])
        rest = iter(found)
        return [[*chain.from_iterable(islice(rest, size))] for size in self.parts.get(name, (n,))]


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
    some = terms if isinstance(terms, (int, float)) else jnp.maximum(terms, 1)

    def of_whole(part: Records, use: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        inputs, grads = use
        return inputs, grads if grads is None or loss_reduction == "sum" else grads * (part.terms / some)

    names = list(parts[0].layers)
    layers = {name: [of_whole(part, use) for part in parts for use in part.layers[name]] for name in names}

    def joined(name: str, default: Any, of_part: str) -> tuple[Any, ...]:
        return sum((tuple(getattr(part, of_part).get(name, (default,) * len(part.layers[name]))) for part in parts), ())

    uses = {name: joined(name, None, "uses") for name in names}
    rounds = {name: joined(name, 1, "rounds") for name in names}
    own = {name: sum((part.parts.get(name, (len(part.layers[name]),)) for part in parts), ()) for name in names}
    return Records(
        layers,
        terms,
        {name: of_layer for name, of_layer in uses.items() if any(of_layer)},
        {name: of_layer for name, of_layer in rounds.items() if max(of_layer, default=1) > 1},
        own,
        {name: list(joined(name, None, "masks")) for name in names if any(name in part.masks for part in parts)},
    )


def _rounds(x: jax.Array, axis: int, times: int) -> list[jax.Array]:
    """Every entry of an example by itself, of ``times`` behind each other along ``axis``."""
    split = x.reshape(*x.shape[:axis], x.shape[axis] // times, times, *x.shape[axis + 1 :])
    return [split[(slice(None),) * (axis + 1) + (k,)] for k in range(times)]
