"""Embeddings: ``gather`` of whole rows of a parameter, at places that the batch tells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode as Mode

from kfcore_jax.program import Path
from kfcore_jax.sites.site import Single, Site, merged
from kfcore_jax.views import Reshape, View


@dataclass(frozen=True)
class Gather(Single):
    """Geometry of a table of which whole rows are taken."""

    site: Site
    stack: tuple[int, ...]
    rows: int
    """Of the table."""
    outs: int
    """Numbers in a row."""
    weight: View
    """From the parameter to ``[*stack, rows, out]``."""
    numbers: Any
    """``dimension_numbers`` of the gather."""
    mode: Mode
    """What becomes of numbers that are no row of the table."""
    examples: tuple[int, ...] = ()
    """Axes of the output that hold examples, before positions where they are merged with some."""
    count: int = 0
    """Number of examples."""

    kind = "gather"

    def captured(self, inputs: dict[Path, Any], pulled: dict[Path, Any]) -> tuple[Any, Any]:
        """``ids [*stack, N, S]`` and ``output_grads [*stack, N, S, out]`` from what the loops returned of them.

        Where the program fills what lies outside of the table, the id is the number of rows, one more than the last, and the gradient zero.
        """
        site, (_, axes, features) = self.site, self.output_axes
        order = [*self.examples, *(a for a in axes if a not in self.examples)]
        own, rows, n = site.behind(axes.index(a) for a in order), site.behind(order), len(self.examples)
        x = inputs[site.path][..., self.numbers.start_index_map.index(0)]
        ids = merged(x, site.stacked, [own[:n], [*site.shared, *own[n:]]])
        dy = merged(pulled[site.path], site.stacked, [rows[:n], [*site.shared, *rows[n:]], site.behind(features)])
        ids, dy = ids.reshape(*ids.shape[:-2], self.count, -1), dy.reshape(*dy.shape[:-3], self.count, -1, dy.shape[-1])
        if jnp.iinfo(ids.dtype).max < self.rows:
            ids = ids.astype(jnp.int32)
        if self.mode == Mode.CLIP:
            return jnp.clip(ids, 0, self.rows - 1), dy
        if self.mode == Mode.FILL_OR_DROP:
            inside = (ids >= 0) & (ids < self.rows)
            return jnp.where(inside, ids, self.rows), jnp.where(inside[..., None], dy, 0)
        return ids, dy

    def gradient(self, inputs: np.ndarray, output_grads: np.ndarray) -> np.ndarray:
        """Of the table: the gradients of each row, added up."""
        ids = np.where((inputs >= 0) & (inputs < self.rows), inputs, self.rows).reshape(math.prod(self.stack), -1)
        dy = output_grads.astype(np.float64).reshape(*ids.shape, self.outs)
        total = np.zeros((len(ids), self.rows + 1, self.outs))
        for table, where, rows in zip(total, ids, dy, strict=True):
            np.add.at(table, where, rows)
        return total[:, :-1].reshape(*self.stack, self.rows, self.outs)

    @property
    def output_axes(self) -> tuple[list[int], list[int], list[int]]:
        """Axes of the output that are stacked (none), rows, and features."""
        features = list(self.numbers.offset_dims)
        return [], [a for a in range(len(self.site.output)) if a not in features], features


def gather(site: Site, params: Mapping[str, Any]) -> Gather | str:
    """Geometry of a gather with these parameters of its primitive, or why it has none."""
    numbers, mode = params["dimension_numbers"], params["mode"]
    rows, *row = site.weight
    whole = tuple(params["slice_sizes"]) == (1, *row) and tuple(numbers.collapsed_slice_dims) in ((), (0,)) and 0 in numbers.start_index_map
    # a place in another axis that is taken whole can only be its first, unless places outside of the table are told from it
    told = mode in (Mode.CLIP, Mode.PROMISE_IN_BOUNDS) or (mode == Mode.FILL_OR_DROP and len(numbers.start_index_map) == 1)
    if numbers.operand_batching_dims or not whole or not told:
        return "gather of something else than whole rows along the first axis"
    outs = math.prod(row)
    weight = site.view if len(row) == 1 else (*site.view, Reshape(site.weight, (rows, outs)))
    return Gather(site, site.lengths, rows, outs, weight, numbers, mode)
