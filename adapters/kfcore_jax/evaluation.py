"""Running a program with taps: zeros added at the sites, so that their gradients are the gradients at the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from kfcore_jax import program
from kfcore_jax.program import CALLS, REMATS, Equation, Jaxpr, Path
from kfcore_jax.sites import Site

Arrays = dict[Path, Any]


def evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], sites: Mapping[Path, Site], taps: Arrays, path: Path = ()
) -> tuple[list[Any], Arrays]:
    """Results of the program with ``taps`` added to the outputs of its sites, and the inputs of these sites, loops first."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    inputs: Arrays = {}

    def read(variable: Any) -> Any:
        return variable.val if program.is_literal(variable) else values[variable]

    for index, equation in enumerate(jaxpr.eqns):
        here, operands = (*path, index), [read(v) for v in equation.invars]
        if here in sites:
            (out,) = program.run(jaxpr, equation, operands)
            outs = [out + taps[here]]
            source = sites[here].source
            if source is not None:
                inputs[here] = lax.stop_gradient(operands[source])
        elif within := {p: taps[p] for p in sites if p[: len(here)] == here}:
            outs, seen = _nested(jaxpr, equation, operands, sites, within, here)
            inputs |= seen
        else:
            outs = program.run(jaxpr, equation, operands)
        values.update(zip(equation.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars], inputs


def _nested(
    jaxpr: Jaxpr, equation: Equation, operands: list[Any], sites: Mapping[Path, Site], taps: Arrays, path: Path
) -> tuple[list[Any], Arrays]:
    """One equation with sites in the program inside it."""
    inner, consts = program.inside(equation)
    own = {p: site for p, site in sites.items() if p in taps}

    def run(args: Sequence[Any], taps: Arrays) -> tuple[list[Any], Arrays]:
        return evaluate(inner, consts, args, own, taps, path)

    name = program.name_of(equation)
    if name in CALLS:
        return run(operands, taps)
    if name in REMATS:
        again = jax.checkpoint(run, prevent_cse=equation.params["prevent_cse"], policy=equation.params["policy"])
        return again(operands, taps)
    if name == "custom_jvp_call":
        return _with_rule(lambda *args: program.run(jaxpr, equation, args), run)(tuple(operands), taps)
    assert name == "scan", name
    return _scan(equation, operands, taps, run)


def _scan(equation: Equation, operands: list[Any], taps: Arrays, run: Any) -> tuple[list[Any], Arrays]:
    """A loop that also goes over the taps, and stacks the inputs."""
    first, carried = equation.params["num_consts"], equation.params["num_carry"]
    constants = operands[:first]

    def body(carry: Any, slices: Any) -> tuple[Any, Any]:
        xs, tapped = slices
        outs, inputs = run([*constants, *carry, *xs], tapped)
        return outs[:carried], (outs[carried:], inputs)

    carry, (stacked, inputs) = lax.scan(
        body,
        operands[first : first + carried],
        (operands[first + carried :], taps),
        length=equation.params["length"],
        reverse=equation.params["reverse"],
        unroll=equation.params["unroll"],
    )
    return [*carry, *stacked], inputs


def _with_rule(original: Any, run: Any) -> Any:
    """``run``, whose derivative by the arguments is the rule of ``original``; only that by the taps is derived."""

    @jax.custom_jvp
    def call(args: Any, taps: Arrays) -> tuple[list[Any], Arrays]:
        return run(args, taps)

    @call.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        (args, taps), (by_args, by_taps) = primals, tangents
        outs, inputs = call(args, taps)
        _, by_rule = jax.jvp(original, args, by_args)
        _, by_tap = jax.jvp(lambda t: run(args, t)[0], (taps,), (by_taps,))
        total = [_plus(a, b) for a, b in zip(by_rule, by_tap, strict=True)]
        return (outs, inputs), (total, jax.tree.map(_no_tangent, inputs))

    return call


def _plus(one: Any, other: Any) -> Any:
    return one if one.dtype == jax.dtypes.float0 else one + other


def _no_tangent(x: Any) -> Any:

    floating = jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
    return jax.numpy.zeros_like(x) if floating else np.zeros(x.shape, jax.dtypes.float0)
