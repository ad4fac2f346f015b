"""A site: one place where a program multiplies with a parameter, and how its arrays become those of a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from kfcore_jax.program import Path
from kfcore_jax.views import Each, Reshape, Shape, Transpose, View


@dataclass(frozen=True)
class Site:
    """One use of a parameter as the weight of a layer.

    ``view`` leads from the parameter to the operand of the equation at ``path``, inside the loops ``scans`` (outermost first).
    """

    path: Path
    leaf: int
    view: View
    operand: int
    """Which operand of the product is the weight."""
    source: int
    """Which operand of the equation is the other factor, the inputs of the layer."""
    scans: tuple[int, ...]
    """Lengths of the loops around it."""
    weight: Shape
    """Shape of the operand."""
    inputs: Shape
    """Shape of the other operand."""
    output: Shape
    dtype: Any
    numbers: Any
    """``dimension_numbers`` of the product."""
    varying: tuple[str, ...] = ()
    """Axes of a ``shard_map`` over which the output differs."""
    bias: int | None = None
    bias_view: View = ()
    name: str | None = None
    """Given by the user, for a tap."""
    ruled: bool = False
    """Whether it lies in a function with a rule of its own for derivatives, which need not be those of what is computed."""

    @property
    def tap(self) -> Shape:
        """Shape of what is added to the output: the loops first."""
        return (*self.scans, *self.output)

    @property
    def stacked(self) -> tuple[int, ...]:
        """Depths of the loops that take another weight each time; the others use the same one again."""
        return tuple(step.depth for step in self.view if isinstance(step, Each))


@dataclass(frozen=True)
class Dense:
    """Geometry of a product: which axes of weight, inputs and output are stacked, contracted (in), kept (out), and rows."""

    stack: Shape
    ins: int
    outs: int
    layout: Literal["oi", "io"]
    weight: View
    """From the parameter to ``[*stack, in, out]`` (``"io"``) or ``[*stack, out, in]`` (``"oi"``)."""
    site: Site

    def inputs(self, x: Any) -> Any:
        """``[*stack, N, S, in]`` from what the loops returned of the other operand."""
        contract, batch = (axes[1 - self.site.operand] for axes in self.site.numbers)
        free = [a for a in range(len(self.site.inputs)) if a not in contract and a not in batch]
        return self._rows(x, batch, free, contract)

    def output_grads(self, dy: Any) -> Any:
        """``[*stack, N, S, out]`` from the gradient at the output."""
        rows, outs = output_axes(self.site)
        return self._rows(dy, range(len(self.site.numbers[1][0])), rows, outs)

    def _rows(self, x: Any, batch: Any, free: Any, last: Any) -> Any:
        """Axes in the order stacked loops, batch; first free; other loops, other free; features."""
        loops = range(len(self.site.scans))
        stacked, shared = [d for d in loops if d in self.site.stacked], [d for d in loops if d not in self.site.stacked]
        own = [len(self.site.scans) + a for a in free]
        groups = [
            [*stacked, *(len(self.site.scans) + a for a in batch)],
            own[:1],
            [*shared, *own[1:]],
            [len(self.site.scans) + a for a in last],
        ]
        shape = [x.shape[a] for a in groups[0]] + [math.prod(x.shape[a] for a in group) for group in groups[1:]]
        return x.transpose([a for group in groups for a in group]).reshape(shape)


def output_axes(site: Site) -> tuple[list[int], list[int]]:
    """Axes of the output of a product that are rows, and those that are features (of the weight)."""
    (left, _), (batch, _) = site.numbers
    first = len(batch)
    kept = len(site.weight if site.operand == 0 else site.inputs) - len(left) - len(batch)
    of_left, of_right = list(range(first, first + kept)), list(range(first + kept, len(site.output)))
    return (of_right, of_left) if site.operand == 0 else (of_left, of_right)


def dense(site: Site) -> Dense:
    """Geometry of a product."""
    contract, batch = (tuple(axes[site.operand]) for axes in site.numbers)
    kept = tuple(a for a in range(len(site.weight)) if a not in contract and a not in batch)
    sizes = {a: site.weight[a] for a in range(len(site.weight))}
    ins, outs = math.prod(sizes[a] for a in contract), math.prod(sizes[a] for a in kept)
    stack = tuple(site.scans[d] for d in site.stacked) + tuple(sizes[a] for a in batch)
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
    return Dense(stack, ins, outs, layout, view, site)
