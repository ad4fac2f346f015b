"""Finding the layers: one walk over a program, without running it, that follows every parameter to where it is used.

Each variable of the program gets a *fact*: it is a view of a parameter, a view of the output of a site, a function of parameters
alone, something that depends on the batch, or a constant. Where a view of one parameter meets the batch in a product, a convolution or as a
table whose rows are taken, there is a site; where a parameter meets the batch in any other way, that use is written down, and the parameter
falls back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from kfcore_jax import program
from kfcore_jax.program import CALLS, REMATS, SUMS, Equation, Jaxpr, Path
from kfcore_jax.sites import Convolution, Dense, Geometry, Site, convolution, dense, gather
from kfcore_jax.tap import TAP
from kfcore_jax.views import MOVES, Each, Reshape, View, apply, exact, step_of


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


Fact: TypeAlias = Parameter | Output | Function | Batch | Constant
BATCH, CONSTANT = Batch(), Constant()


@dataclass
class Findings:
    """What the walk found."""

    sites: dict[Path, Geometry] = field(default_factory=dict)
    """In the order of the program."""
    uses: dict[int, list[str]] = field(default_factory=dict)
    """Uses of a parameter outside every site, by leaf."""
    touched: set[int] = field(default_factory=set)
    """Parameters that the program uses at all."""
    regularised: set[int] = field(default_factory=set)
    """Parameters that also have a term of their own, which does not see the batch."""

    def use(self, facts: Sequence[Fact], how: str) -> None:
        """Write down that the parameters behind ``facts`` meet the batch in ``how``."""
        for fact in facts:
            made = fact.made if isinstance(fact, Function) else ()
            told = f"{how} after {', '.join(made)}" if made else how
            for leaf in sorted(_leaves(fact)):
                uses = self.uses.setdefault(leaf, [])
                if told not in uses:
                    uses.append(told)


def analyse(jaxpr: Jaxpr, leaves: Sequence[Any], others: int) -> Findings:
    """Sites and other uses in a program whose first inputs are ``leaves``, and then ``others`` arrays of the batch.

    The parameters are those of the leaves that are real floating, numbered among themselves; the rest are constants. Arrays that the
    program closes over count as the batch if there is no other, or none that a parameter meets.
    """
    shapes: list[tuple[int, ...]] = []
    facts: list[Fact] = []
    for leaf in leaves:
        trained = is_trained(leaf)
        facts.append(Parameter(len(shapes)) if trained else CONSTANT)
        shapes += [tuple(leaf.shape)] * trained

    def walk(closed: Fact) -> tuple[Findings, Fact]:
        findings = Findings()
        outs = _Walk(findings, shapes, closed)(jaxpr, [closed] * len(jaxpr.constvars), [*facts, *(BATCH,) * others], (), ())
        return findings, outs[0]

    findings, value = walk(CONSTANT if others else BATCH)
    if others and not findings.sites and not findings.uses:
        findings, value = walk(BATCH)
    if value in (CONSTANT, BATCH) and not findings.sites and not findings.uses:
        raise ValueError("`loss` depends on no parameter: it must be a function of its first argument")
    return findings


def is_trained(leaf: Any) -> bool:
    """Whether a leaf of a tree is a parameter: real floating point."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


class _Walk:
    """One walk: over the program, and by itself over those inside.

    ``closed`` is the fact about what programs close over; under ``ruled`` derivatives are not those of what is computed.
    """

    def __init__(self, findings: Findings, shapes: list[tuple[int, ...]], closed: Fact, ruled: bool = False) -> None:
        self.found, self.shapes, self.closed, self.ruled = findings, shapes, closed, ruled

    def __call__(self, jaxpr: Jaxpr, consts: Sequence[Fact], inputs: Sequence[Fact], path: Path, scans: tuple[int, ...]) -> list[Fact]:
        facts: dict[Any, Fact] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        reads = Counter(v for e in [*(e.invars for e in jaxpr.eqns), jaxpr.outvars] for v in e if not program.is_literal(v))

        def fact(variable: Any) -> Fact:
            found = CONSTANT if program.is_literal(variable) else facts[variable]
            # an output that goes two ways does not tell the gradient of a bias that is added on one of them
            return BATCH if isinstance(found, Output) and reads[variable] > 1 else found

        for index, equation in enumerate(jaxpr.eqns):
            outs = self._equation(equation, [fact(v) for v in equation.invars], (*path, index), scans)
            facts.update(zip(equation.outvars, outs, strict=True))
        return [fact(v) for v in jaxpr.outvars]

    def _equation(self, equation: Equation, facts: list[Fact], path: Path, scans: tuple[int, ...]) -> list[Fact]:
        name = program.name_of(equation)
        ruled = name == "custom_jvp_call" and any(isinstance(f, Parameter) for f in facts)
        if name in CALLS or name in REMATS or ruled:
            jaxpr, consts = program.inside(equation)
            walk = _Walk(self.found, self.shapes, self.closed, self.ruled or ruled)
            return walk(jaxpr, [self.closed] * len(consts), facts, path, scans)
        if name == "scan":
            return self._scan(equation, facts, path, scans)
        self.found.touched.update(*map(_leaves, facts))
        if name == TAP:
            return self._tap(equation, facts, path, scans)
        if name in PLACES and (found := self._meeting(equation, facts, name, path, scans)):
            return [found]
        if name in SUMS and self._bias(equation, facts):
            return [BATCH]
        steps = self._view(equation, facts, name)
        if steps is not None:
            return [steps]
        return self._generic(equation, facts, name)

    def _view(self, equation: Equation, facts: list[Fact], name: str) -> Fact | None:
        if not facts or not isinstance(facts[0], Parameter | Output) or len(equation.outvars) != 1:
            return None
        if not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
            return None
        before, after = (tuple(v.aval.shape) for v in (equation.invars[0], equation.outvars[0]))
        steps = step_of(name, equation.params, before, after)
        return None if steps is None else replace(facts[0], view=facts[0].view + steps)

    def _generic(self, equation: Equation, facts: list[Fact], name: str) -> list[Fact]:
        weights = [f for f in facts if _leaves(f)]
        n = len(equation.outvars)
        if any(_of_batch(f) for f in facts):
            # a number added to the loss is a regulariser: it has its gradient, and no part in the curvature of the network
            regulariser = name in {*SUMS, "sub"} and equation.outvars[0].aval.shape == () and all(isinstance(f, Function) for f in weights)
            if not regulariser:
                self.found.use(weights, name)
            return [BATCH] * n
        self.found.regularised.update(*map(_leaves, weights))
        return [_made(weights, name) if weights else CONSTANT] * n

    def _meeting(self, equation: Equation, facts: list[Fact], name: str, path: Path, scans: tuple[int, ...]) -> Fact | None:
        """The fact about what a parameter and the batch make of each other, if the parameter is the weight and an exact view."""
        weights = [k for k in PLACES[name] if isinstance(facts[k], Parameter) and _of_batch(facts[1 - k])]
        if not weights:
            return None
        (place,) = weights
        floating = [v for k, v in enumerate(equation.invars) if k == place or name != "gather"]
        if not all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in [*floating, *equation.outvars]):
            return None
        weight = facts[place]
        assert isinstance(weight, Parameter)
        if not exact(weight.view):
            return None
        site = replace(_site(equation, weight, path, scans, place=place, source=1 - place), ruled=self.ruled)
        found = _geometry(name, site, place, equation.params)
        if isinstance(found, str):
            self.found.use([weight], found)
            return BATCH
        self.found.sites[path] = found
        # what is added to rows of a table is no bias
        return Output(path) if isinstance(found, Dense | Convolution) else BATCH

    def _tap(self, equation: Equation, facts: list[Fact], path: Path, scans: tuple[int, ...]) -> list[Fact]:
        name, weight = equation.params["name"], facts[2]
        if not isinstance(weight, Parameter) or not exact(weight.view):
            raise ValueError(f"tap {name!r}: `weight` must be a parameter of the loss, or a view of one that moves its entries only")
        contract = 0 if equation.params["layout"] == "io" else 1
        numbers = (((equation.invars[1].aval.ndim - 1,), (contract,)), ((), ()))
        site = replace(_site(equation, weight, path, scans, place=2, source=1), name=name)
        if len(facts) > 3:
            bias = facts[3]
            if not isinstance(bias, Parameter) or not exact(bias.view):
                raise ValueError(f"tap {name!r}: `bias` must be a parameter of the loss")
            site = replace(site, bias=bias.leaf, bias_view=bias.view)
        self.found.sites[path] = dense(site, 1, numbers)
        return [BATCH]

    def _bias(self, equation: Equation, facts: list[Fact]) -> bool:
        """Whether this sum adds a parameter to the output of a site as a bias; the site then owns it."""
        if self.ruled and any(isinstance(f, Parameter) for f in facts) and any(_of_batch(f) for f in facts):
            self.found.use(facts, "custom_jvp_call")
            return True
        for output, bias in (facts, facts[::-1]):
            if isinstance(output, Output) and isinstance(bias, Parameter) and self.found.sites[output.site].site.bias is None:
                use = self.found.sites[output.site]
                view = _bias_view(use, output.view, bias, self.shapes[bias.leaf], tuple(equation.outvars[0].aval.shape))
                if view is not None:
                    self.found.sites[output.site] = replace(use, site=replace(use.site, bias=bias.leaf, bias_view=view))
                    return True
        return False

    def _scan(self, equation: Equation, facts: list[Fact], path: Path, scans: tuple[int, ...]) -> list[Fact]:
        jaxpr, sub = program.inside(equation)
        first, carried, length = (equation.params[key] for key in ("num_consts", "num_carry", "length"))
        constants = [BATCH if isinstance(f, Output) else f for f in facts[:first]]
        carry = [_unseen(f) for f in facts[first : first + carried]]
        slices = [_slice(f, len(scans)) for f in facts[first + carried :]]
        inner = (*scans, length)
        while True:
            # what comes round is known once it stays the same; only then are the findings written down
            trial = _Walk(Findings(dict(self.found.sites)), self.shapes, self.closed, self.ruled)
            outs = trial(jaxpr, [self.closed] * len(sub), [*constants, *carry, *slices], path, inner)
            grown = [_join(old, _unseen(new)) for old, new in zip(carry, outs[:carried], strict=True)]
            if grown == carry:
                break
            carry = grown
        for entered, left, seen in zip(facts[first:], outs[:carried], carry, strict=False):
            if seen == BATCH:
                self.found.use([entered, left], "scan carry")
        outs = self(jaxpr, [self.closed] * len(sub), [*constants, *carry, *slices], path, inner)
        return [*carry, *map(_unseen, outs[carried:])]


def _site(equation: Equation, weight: Parameter, path: Path, scans: tuple[int, ...], *, place: int, source: int) -> Site:
    """The site at an equation whose operands number ``place`` and ``source`` are the weight and what the layer sees."""
    (output,) = equation.outvars
    return Site(
        path=path,
        leaf=weight.leaf,
        view=weight.view,
        source=source,
        scans=scans,
        weight=tuple(equation.invars[place].aval.shape),
        inputs=tuple(equation.invars[source].aval.shape),
        output=tuple(output.aval.shape),
        dtype=output.aval.dtype,
        varying=program.varying(output),
    )


PLACES = {"dot_general": (0, 1), "conv_general_dilated": (1,), "gather": (0,)}
"""By primitive, which of its two operands may be the weight."""


def _geometry(primitive: str, site: Site, place: int, params: Any) -> Geometry | str:
    """What a site is in the core's terms, or why it is nothing."""
    if primitive == "dot_general":
        return dense(site, place, params["dimension_numbers"])
    return convolution(site, params) if primitive == "conv_general_dilated" else gather(site, params)


def _leaves(fact: Fact) -> frozenset[int]:
    if isinstance(fact, Parameter):
        return frozenset((fact.leaf,))
    return fact.leaves if isinstance(fact, Function) else frozenset()


def _made(facts: Sequence[Fact], *by: str) -> Function:
    """What primitives make of facts about parameters."""
    before = [name for fact in facts if isinstance(fact, Function) for name in fact.made]
    return Function(frozenset().union(*map(_leaves, facts)), tuple(dict.fromkeys([*before, *(name for name in by if name not in MOVES)])))


def _of_batch(fact: Fact) -> bool:
    return isinstance(fact, Batch | Output)


def _unseen(fact: Fact) -> Fact:
    """A fact that crosses the border of a loop by its carry or its stacked results: no longer a view."""
    if isinstance(fact, Parameter):
        return Function(_leaves(fact))
    return BATCH if isinstance(fact, Output) else fact


def _slice(fact: Fact, depth: int) -> Fact:
    """A fact of the slices that a loop takes of an array."""
    if isinstance(fact, Parameter):
        # a view that repeats entries along the axis of the loop would give every round the same weight
        return replace(fact, view=(*fact.view, Each(depth))) if exact(fact.view) else Function(_leaves(fact))
    return BATCH if isinstance(fact, Output) else fact


def _join(one: Fact, other: Fact) -> Fact:
    """What holds of a variable that is one or the other. Parameters stay on record by being mixed with the batch."""
    if one == other or isinstance(other, Constant):
        return one
    if isinstance(one, Constant):
        return other
    if isinstance(one, Function) and isinstance(other, Function):
        return _made([one, other])
    return BATCH


def _bias_view(use: Geometry, output_view: View, bias: Parameter, shape: tuple[int, ...], sum_shape: tuple[int, ...]) -> View | None:
    """The way from a parameter to ``[*stack, out]``, if it is added to every row of the output alike and to each feature once.

    Both sides of the sum are labelled with integers: the output by feature, with stride zero along its rows, the parameter by entry.
    """
    site = use.site
    last = max((i for i, step in enumerate(bias.view) if isinstance(step, Each)), default=-1) + 1
    before, after = bias.view[:last], bias.view[last:]
    if tuple(step.depth for step in before if isinstance(step, Each)) != site.stacked:
        return None
    slice_shape = apply(before, np.broadcast_to(np.int8(0), shape)).shape[len(site.stacked) :]
    batch, rows, outs = use.output_axes
    own = tuple(site.output[a] for a in (*batch, *outs))
    size = math.prod(own)
    if math.prod(slice_shape) != size:
        return None
    features = np.arange(size).reshape(own).reshape([1 if a in rows else n for a, n in enumerate(site.output)])
    seen = apply(output_view, np.broadcast_to(features, site.output))
    added = apply(after, np.arange(size).reshape(slice_shape))
    if seen.shape != sum_shape or added.ndim != len(sum_shape):
        return None
    repeated = [n == 1 or stride == 0 for n, stride in zip(seen.shape, seen.strides, strict=True)]
    once = [n == 1 or stride == 0 for n, stride in zip(added.shape, added.strides, strict=True)]
    if any(r and not o for r, o in zip(repeated, once, strict=True)):
        return None
    pick = tuple(0 if r else slice(None) for r in repeated)
    seen, added = seen[pick], np.broadcast_to(added, sum_shape)[pick]
    if seen.size != size or not np.array_equal(seen, added):
        return None
    final = (*use.stack[len(site.stacked) :], use.outs)
    return before if slice_shape == final else (*before, Reshape(slice_shape, final))
