"""Scales and shifts: a parameter that the batch is multiplied with, or that is added to it, entry by entry and alike in every row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from kfcore_jax.program import Path
from kfcore_jax.sites.site import Single, Site, merged
from kfcore_jax.views import Each, Reshape, Shape, View, apply, undo


@dataclass(frozen=True)
class Affine(Single):
    """Geometry of a scale, alone or with the shift behind it, or of a shift alone."""

    site: Site
    stack: tuple[int, ...]
    features: tuple[int, ...]
    """Shape of the parameter, of one layer where they are stacked."""
    weight: View
    """From the parameter to ``[*stack, *features]``."""
    rows: tuple[int, ...]
    """Axes of the output along which the parameter is repeated, those of the examples not counted."""
    entries: tuple[int, ...]
    """Axes of the output that go over the parameter, in its order."""
    kind: Literal["scale", "shift"]
    examples: tuple[int, ...] = ()
    """Axes of the output that hold examples, before positions where they are merged with some."""
    count: int = 0
    """Number of examples."""
    shift: Affine | None = None
    """What is added to the output of a scale, if that belongs to it."""
    before: Site | None = None
    """Where the scale was multiplied with something that has no examples, whose product is what the batch is multiplied with."""
    way: View = ()
    """From the other factor there to the output here."""

    @property
    def output_axes(self) -> tuple[list[int], list[int], list[int]]:
        """Axes of the output that are stacked (none), rows, and features."""
        return [], [*self.examples, *self.rows], [*self.entries]

    @property
    def outs(self) -> int:
        """Number of features."""
        return math.prod(self.features)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The scale's, and those that belong to it."""
        further = () if self.shift is None else self.shift.sites
        return (self.site, *further) if self.before is None else (self.site, *further, self.before)

    def takes(self, shift: Affine) -> bool:
        """Whether a shift that is added to what this scale makes can be in one layer with it."""
        mine, other = self.site, shift.site
        same = (self.features, mine.stacked, mine.scans, self.count) == (shift.features, other.stacked, other.scans, shift.count)
        return same and self.shift is None and mine.leaf != other.leaf

    def captured(self, inputs: dict[Path, Any], pulled: dict[Path, Any]) -> tuple[Any, Any]:
        """``inputs [*stack, N, S, features]``, what was scaled (ones for a shift), and ``output_grads`` of that shape.

        With scale and shift their features are behind each other. They may be seen at different numbers of positions, of which each lacks
        the last ones, with zeros in their place.
        """
        dy = self._rows(pulled[self.site.path])
        x = jnp.ones_like(dy) if self.kind == "shift" else self._rows(self._scaled(inputs))
        if self.shift is None:
            return x, dy
        ones, dz = self.shift.captured(inputs, pulled)
        longest = max(x.shape[-2], ones.shape[-2])

        def side(*parts: Any) -> Any:
            dtype = jnp.result_type(*parts)
            longer = [jnp.pad(p.astype(dtype), [(0, 0)] * (p.ndim - 2) + [(0, longest - p.shape[-2]), (0, 0)]) for p in parts]
            return jnp.concatenate(longer, -1)

        return side(x, ones), side(dy, dz)

    def gradients(self, inputs: np.ndarray, output_grads: np.ndarray) -> dict[int, np.ndarray]:
        """Of scale and shift, by leaf: what was scaled times the gradients, added up."""
        total = (inputs.astype(np.float64) * output_grads.astype(np.float64)).sum((-3, -2))
        parts = [self] if self.shift is None else [self, self.shift]
        split = np.split(total, len(parts), axis=-1)
        return {p.site.leaf: undo(p.weight, x.reshape(*self.stack, *p.features)) for p, x in zip(parts, split, strict=True)}

    def _scaled(self, inputs: dict[Path, Any]) -> Any:
        """What the scale is multiplied with, as the output is shaped."""
        x = inputs[self.site.path]
        if self.before is not None:
            loops = tuple(Each(depth) for depth in range(len(self.site.scans)))
            x = x * apply((*loops, *self.way), inputs[self.before.path])
        return jnp.broadcast_to(x, self.site.tap)

    def _rows(self, x: Any) -> Any:
        """``x``, shaped as the output, as ``[*stack, N, S, features]``."""
        site = self.site
        x = merged(x, site.stacked, [site.behind(self.examples), [*site.shared, *site.behind(self.rows)], site.behind(self.entries)])
        return x.reshape(*x.shape[:-3], self.count, -1, x.shape[-1])


def affine(site: Site, shape: Shape, kind: Literal["scale", "shift"]) -> Affine | str:
    """Geometry of a product or a sum whose weight is a parameter of this ``shape``, its rows not yet told apart; or why it has none.

    ``site.view`` leads to the shape of the output, or to one that is broadcast to it. The parameter is labelled by entry: it must have
    each of them once along some axes of the output, and be repeated along all others.
    """
    last = max((i for i, step in enumerate(site.view) if isinstance(step, Each)), default=-1) + 1
    lead, after = site.view[:last], site.view[last:]
    own = apply(lead, np.broadcast_to(np.int8(0), shape)).shape[len(site.stacked) :]
    size = math.prod(own)
    labels = np.broadcast_to(apply(after, np.arange(size).reshape(own)), site.output)
    axes = range(labels.ndim)
    rows = tuple(a for a in axes if labels.shape[a] == 1 or labels.strides[a] == 0)
    entries = tuple(sorted((a for a in axes if a not in rows), key=lambda a: -labels.strides[a]))
    order = [sorted(entries).index(axis) for axis in entries]
    seen = labels[tuple(0 if a in rows else slice(None) for a in axes)].transpose(order)
    if size == 0 or not np.array_equal(seen.ravel(), np.arange(size)):
        return "whose entries are repeated or in another order"
    features = own or (1,)
    return Affine(site, site.lengths, features, (*lead, Reshape((), (1,))) if not own else lead, rows, entries, kind)


def with_examples(found: Affine, axes: tuple[int, ...], count: int) -> Affine:
    """The same geometry where ``axes``, some of its rows, hold ``count`` examples."""
    return replace(found, examples=axes, count=count, rows=tuple(a for a in found.rows if a not in axes))
