"""What JAX programs are made of: the few facts about jaxprs that change between releases, behind one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

Jaxpr: TypeAlias = Any
Equation: TypeAlias = Any
Path: TypeAlias = tuple[int, ...]
"""Position of an equation: its index in the program, then in the program inside that equation, and so on."""

CALLS = {"jit", "pjit", "closed_call", "core_call"}
REMATS = {"checkpoint", "remat", "remat2"}
SUMS = {"add", "add_any"}


def name_of(equation: Equation) -> str:
    """Name of the primitive."""
    return equation.primitive.name


def inside(equation: Equation) -> tuple[Jaxpr, Sequence[Any]]:
    """The program inside a call, and its constants."""
    sub = equation.params.get("jaxpr")
    sub = equation.params["call_jaxpr"] if sub is None else sub
    return (sub.jaxpr, sub.consts) if hasattr(sub, "jaxpr") else (sub, ())


def is_literal(variable: Any) -> bool:
    """Whether an operand is a number written into the program."""
    return isinstance(variable, Literal)


def run(jaxpr: Jaxpr, equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Results of one equation on ``values``, with its derivative rules, precision and names intact."""
    variables = list(dict.fromkeys(v for v in equation.invars if not is_literal(v)))
    known = {v: x for v, x in zip(equation.invars, values, strict=True) if not is_literal(v)}
    return jaxpr_as_fun(_alone(jaxpr, equation, variables))(*(known[v] for v in variables))


def _alone(jaxpr: Jaxpr, equation: Equation, variables: list[Any]) -> ClosedJaxpr:
    """A program that is this one equation."""
    return ClosedJaxpr(jaxpr.replace(constvars=[], invars=variables, outvars=list(equation.outvars), eqns=[equation]), ())


def trace(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """The program of ``function`` and the shapes of its results, as a tree."""
    return jax.make_jaxpr(function, return_shape=True)(*args)


def of_constants(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    """A program as a function of its constants and then its inputs."""
    inner = closed.jaxpr
    return jaxpr_as_fun(ClosedJaxpr(inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars]), ()))


def varying(variable: Any) -> tuple[str, ...]:
    """Axes of a ``shard_map`` with checks over which a variable (or an array) differs."""
    aval = variable.aval
    # an attribute of its own until JAX 0.9, part of a type since
    return tuple(sorted(aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else getattr(aval, "vma", ())))


def zeros(shape: tuple[int, ...], dtype: Any, axes: tuple[str, ...]) -> jax.Array:
    """Zeros that differ over ``axes``, so that their gradients are not summed over them."""
    made = jnp.zeros(shape, dtype)
    if not axes:
        return made
    return lax.pcast(made, axes, to="varying")
