"""What all sites have, whatever their kind: where they are in the program, and the loops around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfcore_jax.program import Path
from kfcore_jax.views import Each, Shape, View, undo


@dataclass(frozen=True)
class Site:
    """One use of a parameter as the weight of a layer.

    ``view`` leads from the parameter to the operand of the equation at ``path``, inside the loops ``scans`` (outermost first).
    """

    path: Path
    leaf: int
    view: View
    source: int | None
    """Which operand of the equation the layer sees: its inputs, or the numbers of the rows it takes. A shift sees none."""
    scans: tuple[int, ...]
    """Lengths of the loops around it."""
    weight: Shape
    """Shape of the operand that is the weight."""
    inputs: Shape
    """Shape of the operand that the layer sees."""
    output: Shape
    dtype: Any
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
        """Depths of the loops that take another weight each time, which are the first axes of what the loops return."""
        return tuple(step.depth for step in self.view if isinstance(step, Each))

    @property
    def shared(self) -> tuple[int, ...]:
        """Depths of the loops that use the same weight again."""
        return tuple(depth for depth in range(len(self.scans)) if depth not in self.stacked)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the loops that take another weight each time."""
        return tuple(self.scans[depth] for depth in self.stacked)

    def behind(self, axes: Iterable[int]) -> tuple[int, ...]:
        """Axes of an array of the program, once the axes of the loops stand before them."""
        return tuple(len(self.scans) + a for a in axes)


class Single:
    """What a geometry has that is one place of the program."""

    site: Site
    stack: tuple[int, ...]
    weight: View
    examples: tuple[int, ...]
    """Axes of the output that hold examples, before positions where they are merged with some; none where they were lost."""
    count: int
    """Number of examples, where it is known."""

    @property
    def rounds(self) -> int:
        """How many entries behind each other along the axis of examples, in what is captured, are of one example."""
        return 1

    @property
    def sites(self) -> tuple[Site, ...]:
        """All places it is made of."""
        return (self.site,)

    def gradient(self, inputs: np.ndarray, output_grads: np.ndarray) -> np.ndarray:
        """Of the weight, as the layer has it."""
        raise NotImplementedError

    def gradients(self, inputs: np.ndarray, output_grads: np.ndarray) -> dict[int, np.ndarray]:
        """Of the parameters by leaf, as the user has them, rebuilt from what was captured."""
        site, found = self.site, {self.site.leaf: undo(self.weight, self.gradient(inputs, output_grads))}
        if site.bias is not None:
            rows = tuple(range(len(self.stack), output_grads.ndim - 1))
            found[site.bias] = undo(site.bias_view, output_grads.astype(np.float64).sum(rows))
        return found


def merged(x: Any, lead: Sequence[int], groups: Sequence[Sequence[int]]) -> Any:
    """``x`` with the axes ``lead`` first, and then one axis for each group of axes."""
    shape = [x.shape[a] for a in lead] + [math.prod(x.shape[a] for a in group) for group in groups]
    return x.transpose([*lead, *(a for group in groups for a in group)]).reshape(shape)
