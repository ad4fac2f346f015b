"""What is known of a variable of a program while it is walked over, and what becomes of that where variables meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from kfcore_jax.program import Path
from kfcore_jax.sites import Site
from kfcore_jax.views import MOVES, Each, View, exact


@dataclass(frozen=True)
class Parameter:
    """A view of one parameter."""

    leaf: int
    view: View = ()


@dataclass(frozen=True)
class Output:
    """A view of the output of a product or convolution, used nowhere else so far."""

    site: Path
    view: View = ()


@dataclass(frozen=True)
class Multiple:
    """What a scale makes, or a multiple of that, used nowhere else so far: what is added to it may be the shift of the same layer."""

    site: Path | None
    """Of the scale; ``None`` if it has none."""


@dataclass(frozen=True)
class Scaled:
    """A view of the product, entry by entry, of a parameter and what has no axis of examples; used nowhere else so far."""

    weight: Parameter
    """The parameter, seen as the product is."""
    first: Site
    """Where it is multiplied; what the layer sees there is the other factor."""
    way: View
    """From the other factor to what this is."""
    batch: bool
    """Whether the other factor depends on the batch."""


@dataclass(frozen=True)
class Function:
    """Computed from parameters (and constants) alone: a regulariser, or a weight that is derived from others."""

    leaves: frozenset[int]
    made: tuple[str, ...] = ()
    """The primitives it is made by, each once, without those that only move entries."""


@dataclass(frozen=True)
class Batch:
    """Depends on the batch."""


@dataclass(frozen=True)
class Constant:
    """Depends on neither."""


Fact: TypeAlias = Parameter | Output | Multiple | Scaled | Function | Batch | Constant
BATCH, CONSTANT = Batch(), Constant()


def leaves_in(fact: Fact) -> frozenset[int]:
    """Parameters that a variable is made of, unless the batch is in it too."""
    if isinstance(fact, Scaled):
        fact = fact.weight
    if isinstance(fact, Parameter):
        return frozenset((fact.leaf,))
    return fact.leaves if isinstance(fact, Function) else frozenset()


def made_of(facts: Sequence[Fact], *by: str) -> Function:
    """What primitives make of facts about parameters."""
    before = [name for fact in facts if isinstance(fact, Function) for name in fact.made]
    return Function(frozenset().union(*map(leaves_in, facts)), tuple(dict.fromkeys([*before, *(name for name in by if name not in MOVES)])))


def of_batch(fact: Fact) -> bool:
    """Whether a variable depends on the batch."""
    return isinstance(fact, Batch | Output | Multiple)


def unseen(fact: Fact) -> Fact:
    """A fact that crosses the border of a loop by its carry or its stacked results: no longer a view."""
    if isinstance(fact, Parameter):
        return Function(leaves_in(fact))
    return BATCH if of_batch(fact) else fact


def slice_of(fact: Fact, depth: int) -> Fact:
    """A fact of the slices that a loop takes of an array."""
    if isinstance(fact, Parameter):
        # a view that repeats entries along the axis of the loop would give every round the same weight
        return replace(fact, view=(*fact.view, Each(depth))) if exact(fact.view) else Function(leaves_in(fact))
    return BATCH if of_batch(fact) else fact


def join(one: Fact, other: Fact) -> Fact:
    """What holds of a variable that is one or the other. Parameters stay on record by being mixed with the batch."""
    if one == other or isinstance(other, Constant):
        return one
    if isinstance(one, Constant):
        return other
    if isinstance(one, Function) and isinstance(other, Function):
        return made_of([one, other])
    return BATCH
