"""Finding the layers: one walk over a program, without running it, that follows every parameter to where it is used.

Each variable of the program gets a *fact*: it is a view of a parameter, a view of the output of a site, a function of parameters
alone, something that depends on the batch, or a constant. Where a view of one parameter meets the batch in a product, a convolution, as a
table whose rows are taken, or entry by entry, there is a site; where a parameter meets the batch in any other way, that use is written
down, and the parameter falls back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import jax.numpy as jnp

from kfcore_jax import program
from kfcore_jax.examples import Examples, follow
from kfcore_jax.facts import (
    BATCH,
    CONSTANT,
    Fact,
    Function,
    Multiple,
    Output,
    Parameter,
    Scaled,
    join,
    leaves_in,
    made_of,
    of_batch,
    slice_of,
    unseen,
)
from kfcore_jax.program import CALLS, REMATS, SUMS, Equation, Jaxpr, Path
from kfcore_jax.sites import Affine, Convolution, Dense, Gather, Geometry, Site, affine, convolution, dense, gather, with_examples
from kfcore_jax.sites.bias import bias_view
from kfcore_jax.tap import TAP
from kfcore_jax.views import Broadcast, Shape, View, exact, step_of

ALONE = "without an axis of examples"
Row = TypeVar("Row", bound=Dense | Convolution | Gather)


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
            for leaf in sorted(leaves_in(fact)):
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
        findings, given = Findings(), [*(False for _ in leaves), *(True for _ in range(others))]
        examples = follow(jaxpr, given, closed == BATCH)
        outs = _Walk(findings, examples, shapes, closed)(jaxpr, [closed] * len(jaxpr.constvars), [*facts, *(BATCH,) * others], (), ())
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

    def __init__(self, findings: Findings, examples: Examples, shapes: list[Shape], closed: Fact, ruled: bool = False) -> None:
        self.found, self.examples, self.shapes, self.closed, self.ruled = findings, examples, shapes, closed, ruled

    def __call__(self, jaxpr: Jaxpr, consts: Sequence[Fact], inputs: Sequence[Fact], path: Path, scans: tuple[int, ...]) -> list[Fact]:
        facts: dict[Any, Fact] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        reads = Counter(v for e in [*(e.invars for e in jaxpr.eqns), jaxpr.outvars] for v in e if not program.is_literal(v))

        def fact(variable: Any) -> Fact:
            found = CONSTANT if program.is_literal(variable) else facts[variable]
            if program.is_literal(variable) or reads[variable] < 2:
                return found
            # an output that goes two ways does not tell the gradient of a bias that is added on one of them
            return BATCH if isinstance(found, Output | Multiple) else self._settled(found)

        for index, equation in enumerate(jaxpr.eqns):
            outs = self._equation(equation, [fact(v) for v in equation.invars], (*path, index), scans)
            facts.update(zip(equation.outvars, outs, strict=True))
        return [fact(v) for v in jaxpr.outvars]

    def _equation(self, equation: Equation, facts: list[Fact], path: Path, scans: tuple[int, ...]) -> list[Fact]:
        name = program.name_of(equation)
        ruled = name == "custom_jvp_call" and any(isinstance(f, Parameter) for f in facts)
        if name in CALLS or name in REMATS or ruled:
            jaxpr, consts = program.inside(equation)
            walk = _Walk(self.found, self.examples, self.shapes, self.closed, self.ruled or ruled)
            return walk(jaxpr, [self.closed] * len(consts), facts, path, scans)
        if name == "scan":
            return self._scan(equation, facts, path, scans)
        self.found.touched.update(*map(leaves_in, facts))
        if name == "mul" and (product := self._product(equation, facts, path, scans)):
            return [product]
        if (view := self._view(equation, facts, name)) is not None:
            return [view]
        facts = [self._settled(f) for f in facts]
        if name == TAP:
            return self._tap(equation, facts, path, scans)
        if name in PLACES and (found := self._meeting(equation, facts, name, path, scans)):
            return [found]
        if name in SUMS and (self._bias(equation, facts) or self._shift(equation, facts, path, scans)):
            return [BATCH]
        if name in {*SUMS, "sub"} and (moved := _moved(equation, facts, name)):
            return [moved]
        return self._generic(equation, facts, name)

    def _view(self, equation: Equation, facts: list[Fact], name: str) -> Fact | None:
        if not facts or not isinstance(facts[0], Parameter | Output | Scaled | Multiple) or len(equation.outvars) != 1:
            return None
        if not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
            return None
        before, after = (tuple(v.aval.shape) for v in (equation.invars[0], equation.outvars[0]))
        steps = step_of(name, equation.params, before, after)
        return None if steps is None else _seen(facts[0], steps)

    def _settled(self, fact: Fact) -> Fact:
        """A fact that meets something else than what would make a layer of it."""
        if not isinstance(fact, Scaled):
            return fact
        if fact.batch:
            self.found.use([fact.weight], f"mul {ALONE}")
            return BATCH
        return made_of([fact.weight], "mul")

    def _generic(self, equation: Equation, facts: list[Fact], name: str) -> list[Fact]:
        weights = [f for f in facts if leaves_in(f)]
        n = len(equation.outvars)
        if any(of_batch(f) for f in facts):
            # a number added to the loss is a regulariser: it has its gradient, and no part in the curvature of the network
            regulariser = name in {*SUMS, "sub"} and equation.outvars[0].aval.shape == () and all(isinstance(f, Function) for f in weights)
            if not regulariser:
                self.found.use(weights, name)
            return [BATCH] * n
        self.found.regularised.update(*map(leaves_in, weights))
        name = "gather of the same rows for every example" if name == "gather" else name
        return [made_of(weights, name) if weights else CONSTANT] * n

    def _meeting(self, equation: Equation, facts: list[Fact], name: str, path: Path, scans: tuple[int, ...]) -> Fact | None:
        """The fact about what a parameter and the batch make of each other, if the parameter is the weight and an exact view."""
        weights = [k for k in PLACES[name] if isinstance(facts[k], Parameter) and of_batch(facts[1 - k])]
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
        assert not isinstance(found, Affine)
        found = self._with_examples(found)
        if isinstance(found, Gather) and not found.examples:
            self.found.use([weight], f"gather {ALONE}")
            return BATCH
        self.found.sites[path] = found
        # what is added to rows of a table is no bias
        return Output(path) if isinstance(found, Dense | Convolution) else BATCH

    def _with_examples(self, found: Row) -> Row:
        """The same geometry with the axes of its output that hold examples."""
        axes, count = self.examples.among(found.site.path, found.output_axes[1], found.site.output)
        return replace(found, examples=axes, count=count)

    def _product(self, equation: Equation, facts: list[Fact], path: Path, scans: tuple[int, ...]) -> Fact | None:
        """The fact about a product entry by entry, if a parameter (or what one made) is one factor and none is in the other."""
        if self.ruled or not all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in [*equation.invars, *equation.outvars]):
            return None
        for place, (fact, other) in enumerate((facts, facts[::-1])):
            if not (of_batch(other) or other == CONSTANT):
                continue
            if isinstance(fact, Multiple) and not isinstance(other, Multiple):
                return fact
            if isinstance(fact, Parameter):
                return self._scale(equation, fact, other, place, path, scans)
            if isinstance(fact, Scaled) and of_batch(other):
                return self._scale_later(equation, _seen(fact, _wider(equation, place)), place, path, scans)
        return None

    def _scale(self, equation: Equation, fact: Parameter, other: Fact, place: int, path: Path, scans: tuple[int, ...]) -> Fact:
        """What a parameter and something else make of each other entry by entry: a scale, if that has an axis of examples."""
        weight = _seen(fact, _wider(equation, place))
        site = _site(equation, weight, path, scans, place=place, source=1 - place)
        found = self._affine(site, "scale") if of_batch(other) else ALONE
        if isinstance(found, Affine):
            self.found.sites[path] = found
            return Multiple(path)
        if found == ALONE:
            return Scaled(weight, site, _wider(equation, 1 - place), of_batch(other))
        self.found.use([fact], f"mul {found}")
        return Multiple(None)

    def _scale_later(self, equation: Equation, fact: Scaled, place: int, path: Path, scans: tuple[int, ...]) -> Fact:
        """A scale whose product with something else is what the batch is multiplied with: both factors are what it scales."""
        first, site = fact.first, _site(equation, fact.weight, path, scans, place=place, source=1 - place)
        found = self._affine(site, "scale")
        if isinstance(found, Affine) and first.source is not None and self.examples.meet(first.path, first.source, path, found.examples):
            found = "with statistics of the whole batch"
        if isinstance(found, str):
            self.found.use([fact.weight], f"mul {found}")
            return Multiple(None)
        self.found.sites[path] = replace(found, before=first, way=fact.way)
        return Multiple(path)

    def _shift(self, equation: Equation, facts: list[Fact], path: Path, scans: tuple[int, ...]) -> bool:
        """Whether this sum adds a parameter to what depends on the batch; it then is a shift, or has a reason why it is none."""
        for place, (fact, other) in enumerate((facts, facts[::-1])):
            if not isinstance(fact, Parameter) or not of_batch(other):
                continue
            site = replace(_site(equation, _seen(fact, _wider(equation, place)), path, scans, place=place, source=1 - place), source=None)
            found = "behind a scale that has no block" if other == Multiple(None) else self._affine(site, "shift")
            if isinstance(found, str):
                self.found.use([fact], f"add {found}")
                return True
            scale = self.found.sites[other.site] if isinstance(other, Multiple) and other.site is not None else None
            if isinstance(scale, Affine) and scale.takes(found):
                pair = replace(scale.site, bias=fact.leaf, bias_view=found.weight)
                self.found.sites[scale.site.path] = replace(scale, site=pair, shift=found)
            else:
                self.found.sites[path] = found
            return True
        return False

    def _affine(self, site: Site, kind: Literal["scale", "shift"]) -> Affine | str:
        """Geometry of a scale or a shift whose output has an axis of examples, or why it is none."""
        found = affine(site, self.shapes[site.leaf], kind)
        if isinstance(found, str):
            return found
        axes, count = self.examples.among(site.path, found.rows, site.output)
        return with_examples(found, axes, count) if axes else ALONE

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
        self.found.sites[path] = self._with_examples(dense(site, 1, numbers))
        return [BATCH]

    def _bias(self, equation: Equation, facts: list[Fact]) -> bool:
        """Whether this sum adds a parameter to the output of a site as a bias; the site then owns it."""
        if self.ruled and any(isinstance(f, Parameter) for f in facts) and any(of_batch(f) for f in facts):
            self.found.use(facts, "custom_jvp_call")
            return True
        for output, bias in (facts, facts[::-1]):
            if isinstance(output, Output) and isinstance(bias, Parameter) and self.found.sites[output.site].site.bias is None:
                use = self.found.sites[output.site]
                assert isinstance(use, Dense | Convolution)
                view = bias_view(use, output.view, bias.view, self.shapes[bias.leaf], tuple(equation.outvars[0].aval.shape))
                if view is not None:
                    self.found.sites[output.site] = replace(use, site=replace(use.site, bias=bias.leaf, bias_view=view))
                    return True
        return False

    def _scan(self, equation: Equation, facts: list[Fact], path: Path, scans: tuple[int, ...]) -> list[Fact]:
        jaxpr, sub = program.inside(equation)
        facts = [self._settled(f) for f in facts]
        first, carried, length = (equation.params[key] for key in ("num_consts", "num_carry", "length"))
        constants = [BATCH if of_batch(f) else f for f in facts[:first]]
        carry = [unseen(f) for f in facts[first : first + carried]]
        slices = [slice_of(f, len(scans)) for f in facts[first + carried :]]
        inner = (*scans, length)
        while True:
            # what comes round is known once it stays the same; only then are the findings written down
            trial = _Walk(Findings(dict(self.found.sites)), self.examples, self.shapes, self.closed, self.ruled)
            outs = trial(jaxpr, [self.closed] * len(sub), [*constants, *carry, *slices], path, inner)
            grown = [join(old, unseen(trial._settled(new))) for old, new in zip(carry, outs[:carried], strict=True)]
            if grown == carry:
                break
            carry = grown
        for entered, left, seen in zip(facts[first:], outs[:carried], carry, strict=False):
            if seen == BATCH:
                self.found.use([entered, self._settled(left)], "scan carry")
        outs = self(jaxpr, [self.closed] * len(sub), [*constants, *carry, *slices], path, inner)
        return [*carry, *(unseen(self._settled(out)) for out in outs[carried:])]


def _seen(fact: Any, steps: View) -> Any:
    """What is known of a view of what ``fact`` is about."""
    if isinstance(fact, Scaled):
        return replace(fact, weight=_seen(fact.weight, steps), way=(*fact.way, *steps))
    return fact if isinstance(fact, Multiple) else replace(fact, view=(*fact.view, *steps))


def _wider(equation: Equation, place: int) -> View:
    """From an operand of a primitive that works entry by entry to the shape of the output, if it is repeated to that."""
    before, after = (tuple(v.aval.shape) for v in (equation.invars[place], equation.outvars[0]))
    return () if before == after else (Broadcast(before, tuple(range(len(before))), after),)


def _moved(equation: Equation, facts: Sequence[Fact], name: str) -> Fact | None:
    """A parameter plus a constant: its gradients are those of the parameter itself."""
    for place, (fact, other) in enumerate((facts, facts[::-1])):
        if isinstance(fact, Parameter) and other == CONSTANT and (place == 0 or name in SUMS):
            return _seen(fact, _wider(equation, place))
    return None


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
