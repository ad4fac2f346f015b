"""Which axes of an array hold the examples: one walk over a program that follows the first axis of everything it is given.

A table, a scale or a shift must be seen where its output still has an axis of examples: behind a sum over the batch, or where positions are
the same for every example, gradients belong to no example. Sizes do not tell that (a batch may have as many examples as positions), so
axes are followed. Where it is not known what becomes of them they are lost, and what is found there has no examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from kfcore_jax import program
from kfcore_jax.program import CALLS, REMATS, Equation, Jaxpr, Path
from kfcore_jax.views import Shape

Held = frozenset[tuple[int, int]]
"""Of an axis: the arrays given to the program whose first axis lies there, by number, and how many examples it holds. An axis that was
merged with others behind it has more entries than that, those of the first example first."""
NONE: Held = frozenset()


@dataclass(frozen=True)
class Axes:
    """What is known of the axes of one array."""

    held: tuple[Held, ...]
    repeated: frozenset[int] = frozenset()
    """Axes along which all is the same, by a broadcast."""
    sources: frozenset[int] = frozenset()
    """All arrays given to the program that it depends on."""


@dataclass
class Examples:
    """What the walk found."""

    outputs: dict[Path, Axes] = field(default_factory=dict)
    operands: dict[Path, list[Axes]] = field(default_factory=dict)
    positions: set[int] = field(default_factory=set)
    """Arrays whose first axis turned out to be one of positions (or features): they are repeated for every example of another."""

    def among(self, path: Path, axes: Sequence[int], shape: Shape) -> tuple[tuple[int, ...], int]:
        """Those of ``axes`` of the output of this ``shape`` at ``path`` that hold examples, and how many.

        They are the first that does, and those it shares them with; the last may have been merged with positions.
        """
        held = {axis: self._live(self.outputs[path], [axis]) for axis in axes}
        first = next((found for found in held.values() if found), frozenset())
        found = tuple(axis for axis in axes if held[axis] & first)
        counts = [min(n for source, n in self.outputs[path].held[axis] if source in held[axis] & first) for axis in found]
        if not found or any(n != shape[axis] for n, axis in zip(counts[:-1], found[:-1], strict=True)):
            return (), 0
        return found, math.prod(counts)

    def meet(self, path: Path, operand: int, other: Path, axes: Sequence[int]) -> bool:
        """Whether an operand depends on the examples that ``axes`` of the output at another place hold."""
        return bool(self.operands[path][operand].sources & self._live(self.outputs[other], axes))

    def _live(self, found: Axes, axes: Iterable[int]) -> frozenset[int]:
        return frozenset(source for axis in axes for source, _ in found.held[axis] if source not in self.positions)


def follow(jaxpr: Jaxpr, given: Sequence[bool], closed: bool) -> Examples:
    """Follow the inputs of a program that are ``given`` with the batch, and what it closes over if that is ``closed`` with it."""
    walk = _Walk(closed)
    inputs = [walk.source(v) if of_batch else walk.nothing(v) for v, of_batch in zip(jaxpr.invars, given, strict=True)]
    walk(jaxpr, walk.closures(jaxpr.constvars), inputs, ())
    return walk.found


class _Walk:
    def __init__(self, closed: bool) -> None:
        self.found, self.closed, self.count = Examples(), closed, 0

    def source(self, variable: Any) -> Axes:
        """An array whose first axis counts as that of the examples until the program says otherwise."""
        shape, number = variable.aval.shape, self.count
        self.count += 1
        return Axes(tuple(frozenset({(number, n)}) if a == 0 else NONE for a, n in enumerate(shape)), sources=frozenset({number}))

    def nothing(self, variable: Any) -> Axes:
        """An array that does not depend on the batch."""
        return Axes((NONE,) * len(variable.aval.shape))

    def closures(self, variables: Sequence[Any]) -> list[Axes]:
        """What a program closes over."""
        return [self.source(v) if self.closed else self.nothing(v) for v in variables]

    def __call__(self, jaxpr: Jaxpr, consts: Sequence[Axes], inputs: Sequence[Axes], path: Path) -> list[Axes]:
        known: dict[Any, Axes] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

        def read(variable: Any) -> Axes:
            return self.nothing(variable) if program.is_literal(variable) else known[variable]

        for index, equation in enumerate(jaxpr.eqns):
            here, operands = (*path, index), [read(v) for v in equation.invars]
            outs = self._equation(equation, operands, here)
            known.update(zip(equation.outvars, outs, strict=True))
            self.found.operands[here] = operands
            if len(outs) == 1:
                self.found.outputs[here] = outs[0]
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, equation: Equation, operands: list[Axes], path: Path) -> list[Axes]:
        name = program.name_of(equation)
        if name in CALLS or name in REMATS or name in ("custom_jvp_call", "custom_vjp_call"):
            jaxpr, _ = program.inside(equation)
            return self(jaxpr, self.closures(jaxpr.constvars), operands, path)
        if name == "scan":
            return self._scan(equation, operands, path)
        sources = frozenset().union(*(x.sources for x in operands))
        if name == "cond":
            # paths of branches are not those of a layer
            ways = [
                self(b.jaxpr, self.closures(b.jaxpr.constvars), operands[1:], (*path, -1 - k))
                for k, b in enumerate(equation.params["branches"])
            ]
            return [_union(outs, sources) for outs in zip(*ways, strict=True)]
        if name in RULES and (rule := RULES[name](equation, operands)) is not None:
            held, repeated = rule
            return [Axes(tuple(held), frozenset(repeated), sources)]
        if name.startswith("reduce_") and "axes" in equation.params:
            kept = [a for a in range(len(operands[0].held)) if a not in equation.params["axes"]]
            return [_picked(operands[0], kept, sources) for _ in equation.outvars]
        return [self._same(equation, name, operands, tuple(v.aval.shape), sources) for v in equation.outvars]

    def _same(self, equation: Equation, name: str, operands: list[Axes], shape: Shape, sources: frozenset[int]) -> Axes:
        """Of a primitive that leaves axes where they are, as most do; those whose size changes are lost unless they are cut or grow."""
        alike = [(x, tuple(v.aval.shape)) for x, v in zip(operands, equation.invars, strict=True) if len(v.aval.shape) == len(shape)]
        held: list[Held] = []
        seen = []
        for x, own in alike:
            longer = {a for a, (n, m) in enumerate(zip(own, shape, strict=True)) if n == 1 < m}
            kept = [
                h if n == m else frozenset((s, m) for s, count in h if count == n and name in CUTS)
                for h, n, m in zip(x.held, own, shape, strict=True)
            ]
            seen.append(Axes(tuple(kept), x.repeated if name in CUTS else x.repeated | longer))
        for one, other in permutations(seen, 2):
            self._compare(one, other)
        held = [frozenset().union(*(x.held[a] for x in seen)) for a in range(len(shape))]
        repeated = [a for a in range(len(shape)) if seen and all(a in x.repeated for x in seen)]
        return Axes(tuple(held), frozenset(repeated), sources)

    def _compare(self, one: Axes, other: Axes) -> None:
        """What ``one`` has for examples are positions if it is the same for all examples of ``other``, which varies along them."""
        for axis in one.repeated:
            examples = {source for source, _ in other.held[axis]}
            own = {s for a, h in enumerate(one.held) if a != axis and a not in other.repeated for s, _ in h}
            if examples:
                self.found.positions.update(own - examples)

    def _scan(self, equation: Equation, operands: list[Axes], path: Path) -> list[Axes]:
        jaxpr, _ = program.inside(equation)
        first, carried = equation.params["num_consts"], equation.params["num_carry"]
        carry = operands[first : first + carried]
        slices = [_slice(x, v.aval.shape) for x, v in zip(operands[first + carried :], jaxpr.invars[first + carried :], strict=True)]
        closures = self.closures(jaxpr.constvars)
        while True:
            outs = self(jaxpr, closures, [*operands[:first], *carry, *slices], path)
            grown = [_union([a, b], a.sources | b.sources) for a, b in zip(carry, outs[:carried], strict=True)]
            if grown == carry:
                break
            carry = grown
        return [*carry, *(Axes((NONE, *x.held), frozenset(a + 1 for a in x.repeated), x.sources) for x in outs[carried:])]


def _slice(x: Axes, shape: Shape) -> Axes:
    """Of the slices that a loop takes along the first axis. If that was the axis of examples, as time may be, the next counts as it."""
    if not shape:
        return Axes((), sources=x.sources)
    first = frozenset((source, shape[0]) for source, _ in x.held[0]) | x.held[1]
    return Axes((first, *x.held[2:]), frozenset(a - 1 for a in x.repeated if a), x.sources)


def _union(parts: Sequence[Axes], sources: frozenset[int]) -> Axes:
    """Of an array that is one or the other."""
    held = tuple(frozenset().union(*of_axis) for of_axis in zip(*(x.held for x in parts), strict=True))
    return Axes(held, frozenset.intersection(*(x.repeated for x in parts)), sources)


def _picked(x: Axes, axes: Sequence[int], sources: frozenset[int]) -> Axes:
    return Axes(tuple(x.held[a] for a in axes), frozenset(k for k, a in enumerate(axes) if a in x.repeated), sources)


Rule = tuple[list[Held], list[int]] | None
CUTS = {"slice", "dynamic_slice", "concatenate", "pad", "split"}
"""Primitives that make an axis longer or shorter, whose entries still are examples if they were."""


def _transpose(equation: Equation, operands: list[Axes]) -> Rule:
    x, order = operands[0], equation.params["permutation"]
    return [x.held[a] for a in order], [k for k, a in enumerate(order) if a in x.repeated]


def _squeeze(equation: Equation, operands: list[Axes]) -> Rule:
    x, gone = operands[0], equation.params["dimensions"]
    kept = [a for a in range(len(x.held)) if a not in gone]
    return [x.held[a] for a in kept], [k for k, a in enumerate(kept) if a in x.repeated]


def _arg(equation: Equation, operands: list[Axes]) -> Rule:
    kept = [a for a in range(len(operands[0].held)) if a not in equation.params["axes"]]
    return [operands[0].held[a] for a in kept], []


def _broadcast(equation: Equation, operands: list[Axes]) -> Rule:
    x, before, after = operands[0], equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    held, repeated = [NONE] * len(after), {a for a, n in enumerate(after) if n > 1}
    for old, new in enumerate(equation.params["broadcast_dimensions"]):
        if before[old] == after[new]:
            held[new] = x.held[old]
            if old not in x.repeated:
                repeated.discard(new)
    return held, sorted(repeated)


def _reshape(equation: Equation, operands: list[Axes]) -> Rule:
    """Examples stay those of the first axis of several that are merged, and of the first of several that an axis is split into."""
    if equation.params.get("dimensions") is not None:
        return None
    x, before, after = operands[0], equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    held: list[Held] = [NONE] * len(after)
    repeated: list[int] = []
    for old, new in _groups(before, after):
        if len(old) == len(new) == 1:
            held[new[0]] = x.held[old[0]]
        else:
            _regroup(x, [a for a in old if before[a] > 1] or old[:1], [a for a in new if after[a] > 1] or new[:1], before, after, held)
        if all(a in x.repeated or before[a] == 1 for a in old):
            repeated += [a for a in new if after[a] > 1]
    return held, repeated


def _regroup(x: Axes, old: Sequence[int], new: Sequence[int], before: Shape, after: Shape, held: list[Held]) -> None:
    """Where the examples of the axes ``old`` go in ``new``, which have as many entries together, none of size 1 unless it is alone."""
    if not old or not new:
        return
    for source, count in x.held[old[0]]:
        if before[old[0]] == 1 or after[new[0]] == 1:
            found = {new[0]: 1} if before[old[0]] == after[new[0]] else {}
        else:
            rest, found = math.prod([count, *(n for axis in old[1:] for s, n in x.held[axis] if s == source)]), {}
            for axis in new:
                found[axis] = math.gcd(rest, after[axis])
                if found[axis] not in (rest, after[axis]):
                    found = {}  # parts that mix examples with others
                    break
                rest //= found[axis]
                if rest == 1:
                    break
        for axis, n in found.items():
            held[axis] = held[axis] | {(source, n)}


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of two shapes, in order, that hold the same entries."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        old, new = [i], [j]
        while (m := math.prod(before[a] for a in old)) != (n := math.prod(after[a] for a in new)):
            if m < n and old[-1] + 1 < len(before):
                old.append(old[-1] + 1)
            elif new[-1] + 1 < len(after):
                new.append(new[-1] + 1)
            else:
                return groups
        groups.append((old, new))
        i, j = old[-1] + 1, new[-1] + 1
    return groups


def _dot_general(equation: Equation, operands: list[Axes]) -> Rule:
    (contract, batch), held = equation.params["dimension_numbers"], []
    held += [operands[0].held[a] | operands[1].held[b] for a, b in zip(*batch, strict=True)]
    for x, gone, kept in zip(operands, contract, batch, strict=False):
        held += [h for a, h in enumerate(x.held) if a not in gone and a not in kept]
    return held, []


def _convolution(equation: Equation, operands: list[Axes]) -> Rule:
    numbers = equation.params["dimension_numbers"]
    held = [NONE] * len(operands[0].held)
    held[numbers.out_spec[0]] = operands[0].held[numbers.lhs_spec[0]]
    return held, []


def _gather(equation: Equation, operands: list[Axes]) -> Rule:
    numbers, (operand, ids) = equation.params["dimension_numbers"], operands
    held: list[Held] = [NONE] * len(equation.outvars[0].aval.shape)
    rows = [a for a in range(len(held)) if a not in numbers.offset_dims]
    for new, old in zip(rows, ids.held[:-1], strict=True):
        held[new] = old
    for old, row in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        held[rows[row]] = held[rows[row]] | operand.held[old]
    taken = [a for a in range(len(operand.held)) if a not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
    for old, new in zip(taken, numbers.offset_dims, strict=True):
        if equation.params["slice_sizes"][old] == equation.invars[0].aval.shape[old]:
            held[new] = operand.held[old]
    return held, []


RULES: Mapping[str, Any] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "argmax": _arg,
    "argmin": _arg,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
"""By primitive, what becomes of axes that do not stay where they are: what the axes of the output hold, and which are repeated."""
