"""Views of an array that only move its entries: recorded as steps, applied, and undone.

A program reaches a weight through reshapes, transpositions, broadcasts and slices of a scan. Where none of them copies or drops an
entry the way back is exact, and a parameter can be shown to the core as the matrix that the program multiplies with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Reshape:
    """From one shape to another of the same size."""

    before: Shape
    after: Shape


@dataclass(frozen=True)
class Transpose:
    """Axes in another order, as ``numpy.transpose``."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Reverse:
    """Entries along some axes from the last to the first."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Broadcast:
    """Entries repeated along new or unit axes; ``axes`` are where the old ones went. It has no way back."""

    before: Shape
    axes: tuple[int, ...]
    after: Shape


@dataclass(frozen=True)
class Each:
    """The leading axis is that of a scan (the one at this depth, counted from outside): what follows acts on every slice."""

    depth: int


View: TypeAlias = tuple[Reshape | Transpose | Reverse | Broadcast | Each, ...]


def exact(view: View) -> bool:
    """Whether the view has a way back."""
    return not any(isinstance(step, Broadcast) for step in view)


def apply(view: View, x: Any) -> Any:
    """``x`` seen through the view, axes of scans first. ``x`` is a NumPy or JAX array."""
    lead = 0
    for step in view:
        head = x.shape[:lead]
        if isinstance(step, Each):
            lead += 1
        elif isinstance(step, Reshape):
            x = x.reshape((*head, *step.after))
        elif isinstance(step, Transpose):
            x = x.transpose(*range(lead), *(lead + a for a in step.axes))
        elif isinstance(step, Reverse):
            x = _reversed(x, lead, step)
        else:
            unit = [1] * len(step.after)
            for old, new in enumerate(step.axes):
                unit[new] = step.before[old]
            x = (np if isinstance(x, np.ndarray) else jnp).broadcast_to(x.reshape((*head, *unit)), (*head, *step.after))
    return x


def undo(view: View, x: Any) -> Any:
    """Inverse of :func:`apply` for an exact view."""
    lead = sum(isinstance(step, Each) for step in view)
    for step in reversed(view):
        if isinstance(step, Each):
            lead -= 1
        elif isinstance(step, Reshape):
            x = x.reshape((*x.shape[:lead], *step.before))
        elif isinstance(step, Reverse):
            x = _reversed(x, lead, step)
        else:
            assert isinstance(step, Transpose)
            inverse = sorted(range(len(step.axes)), key=step.axes.__getitem__)
            x = x.transpose(*range(lead), *(lead + a for a in inverse))
    return x


def _reversed(x: Any, lead: int, step: Reverse) -> Any:
    return x[tuple(slice(None, None, -1 if axis - lead in step.axes else None) for axis in range(x.ndim))]


def step_of(primitive: str, params: dict[str, Any], before: Shape, after: Shape) -> View | None:
    """The steps of one equation of a program, none for one that changes no position; ``None`` if it is no view."""
    if primitive == "transpose":
        return (Transpose(tuple(int(a) for a in params["permutation"])),)
    if primitive == "broadcast_in_dim" and math.prod(before) != math.prod(after):
        return (Broadcast(before, tuple(int(a) for a in params["broadcast_dimensions"]), after),)
    if primitive == "rev":
        return (Reverse(tuple(int(a) for a in params["dimensions"])),)
    if primitive == "reshape" and params.get("dimensions") is not None:
        order = tuple(int(a) for a in params["dimensions"])
        return (Transpose(order), Reshape(tuple(before[a] for a in order), after))
    if primitive in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim"):
        # a broadcast that repeats nothing only adds unit axes if it keeps the order, which the primitive demands
        return () if before == after else (Reshape(before, after),)
    return () if primitive in UNCHANGED else None


UNCHANGED = {"convert_element_type", "copy", "copy_p", "sharding_constraint", "name", "reduce_precision", "pvary", "pcast"}
"""Primitives that leave every entry where it is; casts are undone by the dtype of what comes back."""
MOVES = UNCHANGED | {"transpose", "rev", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"}
"""All primitives that compute nothing."""
