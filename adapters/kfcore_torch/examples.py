"""Whether the uses of a layer are by example, told from shapes.

The first axis of what a layer is called with is that of the examples. A table of positions called with ``arange(T)`` has none: its rows
are added to those of every example, and its output gradients are sums over the batch, whose second moment is not that of examples'
gradients. There are as many examples as most layers saw, and a table or a normalisation that saw another number of them is a stray.
So is a table called with ids on one axis where there are as many positions as examples, for those may be either; unless a batch before
told which.

Dense layers and convolutions have what stands on their first axis for examples. Their factors do not ask whether that is so; the scales of
EKFAC are then those of these entries, which is said once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kfcore import Conv, Embedding, Norm


class Examples:
    """Shapes that layers were called with in a step.

    Dense layers and convolutions vote, but are no strays themselves: their factors do not ask which rows are of one example, and what
    a classifier does with a flattened batch is right.

    Parameters
    ----------
    layers
        By name.
    squared
        Whether gradients of single examples of all layers are looked at.
    """

    def __init__(self, layers: Mapping[str, Any], squared: bool = False) -> None:
        self._layers, self._squared = layers, squared
        self._known: set[str] = set()
        self.clear()

    @classmethod
    def of(cls, layers: Mapping[str, Any], squared: bool = False) -> Examples | None:
        """``None`` where there is nothing to be checked."""
        wanted = squared or any(isinstance(layer, (Embedding, Norm)) for layer in layers.values())
        return cls(layers, squared) if wanted else None

    def clear(self) -> None:
        """Forget the shapes."""
        self._shapes: dict[str, set[tuple[int, ...]]] = {}
        self.uneven: dict[str, str] = {}
        """Layers whose rows stand for examples although they are others than those of most layers, with how; known by :meth:`strays`."""

    def note(self, name: str, shape: tuple[int, ...]) -> None:
        """A layer was called with an array of this shape."""
        self._shapes.setdefault(name, set()).add(shape)

    def strays(self) -> dict[str, str]:
        """Layers whose uses are not by example, with the reason."""
        uses = {name: {(shape[0], *self._positions(name, shape)) for shape in shapes} for name, shapes in self._shapes.items()}
        firsts = {name: frozenset(use[0] for use in of_layer) for name, of_layer in uses.items()}
        votes = Counter(firsts.values())
        rows = {n: max(math.prod(use) for name, of_layer in uses.items() if firsts[name] == n for use in of_layer) for n in votes}
        if not votes:
            return {}
        # a tie goes to what has more rows, for positions without examples are fewer; then to the fewer examples, which were not flattened
        batch = max(votes, key=lambda n: (votes[n], rows[n], -sum(n)))
        sizes = {size for of_layer in uses.values() for use in of_layer for size in use[1:]}
        found = {}
        for name, of_layer in uses.items():
            strange = firsts[name] - batch
            if not isinstance(self._layers[name], (Embedding, Norm)):
                if strange and self._squared:
                    self.uneven[name] = f"{_some(strange)} entries on the first axis of its input, not those of the {_some(batch)} examples"
                continue
            if strange:
                found[name] = f"the first axis of its input has {_some(strange)} entries, and is not that of the {_some(batch)} examples"
            elif isinstance(self._layers[name], Embedding):
                alone = {use[0] for use in of_layer if len(use) == 1 and use[0] > 1}
                unclear = alone & sizes
                if alone and not unclear:
                    self._known.add(name)
                elif unclear and name not in self._known:
                    found[name] = f"its {_some(unclear)} ids are examples or positions, of which there are as many: give it ids [N, S]"
        return found

    def _positions(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        layer = self._layers[name]
        if isinstance(layer, Embedding):
            return tuple(shape[1:])
        if isinstance(layer, Conv) or (isinstance(layer, Norm) and layer.channels == "first"):
            return tuple(shape[2:])
        features = layer.features if isinstance(layer, Norm) else 1
        return tuple(shape[1 : -len(features) if isinstance(features, tuple) else -1])


def _some(numbers: frozenset[int] | set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))
