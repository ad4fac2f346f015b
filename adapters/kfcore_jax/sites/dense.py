"""Products: ``dot_general`` of a parameter with the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kfcore_jax.program import Path
from kfcore_jax.sites.site import Single, Site, merged
from kfcore_jax.views import Reshape, Transpose, View


@dataclass(frozen=True)
class Dense(Single):
    """Geometry of a product: which axes of weight, inputs and output are stacked, contracted (in), kept (out), and rows."""

    site: Site
    stack: tuple[int, ...]
    ins: int
    outs: int
    layout: Literal["oi", "io"]
    weight: View
    """From the parameter to ``[*stack, in, out]`` (``"io"``) or ``[*stack, out, in]`` (``"oi"``)."""
    operand: int
    """Which operand of the product is the weight."""
    numbers: Any
    """``dimension_numbers`` of the product."""
    examples: tuple[int, ...] = ()
    """Axes of the output that hold examples, before positions where they are merged with some. The first, where they were lost."""
    count: int = 0
    """Number of examples, where it is known."""

    kind = "product"

    def captured(self, inputs: dict[Path, Any], pulled: dict[Path, Any]) -> tuple[Any, Any]:
        """``inputs [*stack, N, S, in]`` and ``output_grads [*stack, N, S, out]`` from what the loops returned of them."""
        x, dy = inputs[self.site.path], pulled[self.site.path]
        contract, batch = (axes[1 - self.operand] for axes in self.numbers)
        free = [a for a in range(len(self.site.inputs)) if a not in contract and a not in batch]
        return self._rows(x, batch, free, contract), self._rows(dy, *self.output_axes)

    def gradient(self, inputs: np.ndarray, output_grads: np.ndarray) -> np.ndarray:
        """Of the weight, in its layout."""
        pair = (inputs, output_grads) if self.layout == "io" else (output_grads, inputs)
        return np.einsum("...nsi,...nsj->...ij", *(v.astype(np.float64) for v in pair))

    @property
    def output_axes(self) -> tuple[list[int], list[int], list[int]]:
        """Axes of the output that are stacked, rows, and features (of the weight)."""
        (left, _), (batch, _) = self.numbers
        first = len(batch)
        kept = len(self.site.weight if self.operand == 0 else self.site.inputs) - len(left) - len(batch)
        of_left, of_right = list(range(first, first + kept)), list(range(first + kept, len(self.site.output)))
        return (list(range(first)), of_right, of_left) if self.operand == 0 else (list(range(first)), of_left, of_right)

    def _rows(self, x: Any, batch: Any, free: Any, last: Any) -> Any:
        """Axes in the order stacked loops, batch; examples; other loops, other free; features."""
        site, (_, rows, _) = self.site, self.output_axes
        own = dict(zip(rows, site.behind(free), strict=True))
        first = [own[a] for a in self.examples or rows[:1]]
        rest = [axis for axis in own.values() if axis not in first]
        x = merged(x, [*site.stacked, *site.behind(batch)], [first, [*site.shared, *rest], site.behind(last)])
        if not self.examples or x.shape[-3] == self.count:
            return x
        return x.reshape(*x.shape[:-3], self.count, -1, x.shape[-1])


def dense(site: Site, operand: int, numbers: Any) -> Dense:
    """Geometry of a product whose weight is the operand number ``operand``."""
    contract, batch = (tuple(axes[operand]) for axes in numbers)
    kept = tuple(a for a in range(len(site.weight)) if a not in contract and a not in batch)
    sizes = dict(enumerate(site.weight))
    ins, outs = math.prod(sizes[a] for a in contract), math.prod(sizes[a] for a in kept)
    stack = site.lengths + tuple(sizes[a] for a in batch)
    natural = (*batch, *kept, *contract)
    layout: Literal["oi", "io"] = "oi" if natural == tuple(sorted(natural)) else "io"
    order, last = (natural, (outs, ins)) if layout == "oi" else ((*batch, *contract, *kept), (ins, outs))
    view = site.view
    if order != tuple(sorted(order)):
        view += (Transpose(order),)
    moved = tuple(sizes[a] for a in order)
    final = (*(sizes[a] for a in batch), *last)
    if moved != final:
        view += (Reshape(moved, final),)
    return Dense(site, stack, ins, outs, layout, view, operand, numbers)
