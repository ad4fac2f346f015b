"""What JAX does its own way: ``if`` under a trace, inverses by Cholesky, long sums by a scan. Each passes the tests of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from kfcore import primitives, register_cond, register_kernel
from kfcore.linalg import symmetrise
from kfcore.patches import Window, at_once
from kfcore_jax import program


def cond(predicate: jax.Array, then: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any) -> Any:
    """``lax.cond`` under a trace, a branch of the host where the predicate is known.

    Under ``vmap`` a branch is run if any member wants it, not always: members that train in step refresh in step.
    """
    if not isinstance(predicate, Tracer):
        return then(*operands) if bool(predicate) else otherwise(*operands)
    branches = [_Branch(branch, operands) for branch in (then, otherwise)]

    @jax.custom_batching.custom_vmap
    def choose(predicate: Any, consts: Any, operands: Any) -> Any:
        return lax.cond(predicate, *(lambda c, o, i=i: branches[i](c[i], o) for i in range(2)), consts, operands)

    @choose.def_vmap
    def _(size: int, batched: Any, predicate: Any, consts: Any, operands: Any) -> Any:
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        run = [jax.vmap(lambda c, o, i=i: branches[i](c[i], o), axes[1:], 0, axis_size=size) for i in range(2)]
        if not batched[0]:
            out = lax.cond(predicate, *run, consts, operands)
        else:

            def mixed(consts: Any, operands: Any) -> Any:
                chosen, rest = (r(consts, operands) for r in run)
                pick = lambda a, b: jnp.where(predicate.reshape(size, *(1,) * (a.ndim - 1)), a, b)  # noqa: E731
                return jax.tree.map(pick, chosen, rest)

            out = lax.cond(jnp.any(predicate), mixed, run[1], consts, operands)
        return out, jax.tree.map(lambda _: True, out)

    return choose(predicate, [branch.consts for branch in branches], operands)


class _Branch:
    """A function with what it closes over made visible, so that a batch of it may be batched too."""

    def __init__(self, function: Callable[..., Any], operands: Any) -> None:
        closed, shapes = program.trace(function, *operands)
        self.consts = list(closed.consts)
        self._run = program.of_constants(closed)
        self._tree = jax.tree.structure(shapes)

    def __call__(self, consts: Any, operands: Any) -> Any:
        return jax.tree.unflatten(self._tree, self._run(*consts, *jax.tree.leaves(operands)))


def invert(xp: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By Cholesky and two triangular solves, which is a little cheaper than a general inverse, and definite wherever it is finite.

    A failure is NaN, which is what ``ok`` looks for.
    """
    factor = jnp.linalg.cholesky(0.5 * (x + x.mT))
    eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
    half = lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    inverse = symmetrise(lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True))
    return inverse, jnp.isfinite(jnp.trace(inverse, axis1=-2, axis2=-1))


def patch_moments(xp: Any, x: jax.Array, window: Window, groups: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """By a scan over the groups of examples that the reference goes through one by one, so that programs stay small.

    A group takes every k-th example, not neighbours: where a batch is spread over devices, each of them has a part of every group.
    """
    axis = x.ndim - 2 - window.axes
    examples = x.shape[axis]
    parts = next(k for k in range(-(-examples // at_once(x, window)), examples + 1) if examples % k == 0) if examples else 1
    whole = primitives()["patch_moments"]
    if parts == 1:
        return whole(xp, x, window, groups, dtype)
    split = x.reshape(*x.shape[:axis], examples // parts, parts, *x.shape[axis + 1 :])

    def part(i: Any) -> tuple[jax.Array, jax.Array]:
        return whole(xp, lax.dynamic_index_in_dim(split, i, axis + 1, keepdims=False), window, groups, dtype)

    def add(sums: Any, i: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, part(i)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part, 0))
    return lax.scan(add, zeros, jnp.arange(parts))[0]


def register() -> None:
    """Make the core use these for JAX arrays."""
    register_cond("jax", cond)
    register_kernel("invert", "jax", invert)
    register_kernel("patch_moments", "jax", patch_moments)
