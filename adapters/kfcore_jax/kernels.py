"""What JAX does its own way: ``if`` under a trace, inverses by Cholesky, long sums by a scan. Each passes the tests of the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from kfcore import linalg, primitives, register_cond, register_kernel
from kfcore.patches import Window, at_once
from kfcore_jax import program

WIDE = 400
"""From this width on symmetric matrices are built from halves."""


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


def gram(xp: Any, x: jax.Array) -> jax.Array:
    """Of wide rows in halves: one of the two blocks beside the diagonal is the other transposed."""
    m = x.shape[-1] // 2
    if 2 * m < WIDE:
        return x.mT @ x
    first, last = x[..., :m], x[..., m:]
    corner = last.mT @ first
    return _square(first.mT @ first, corner, last.mT @ last)


def thin_product(xp: Any, left: jax.Array, right: jax.Array) -> jax.Array:
    """A last odd column (a joint bias) apart: the compiler then finds that it is cut off again, and copies nothing."""
    if right.shape[-1] % 16 != 1:
        return left.mT @ right
    return jnp.concatenate([left.mT @ right[..., :-1], left.mT @ right[..., -1:]], axis=-1)


def invert(xp: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``H^T H`` of the inverse ``H`` of the Cholesky factor, which is definite wherever it is finite; a failure is NaN throughout.

    A wide factor is cut into four, which leaves out the zeros of the triangle and turns most of the work into products: a third less
    time than two triangular solves. More cuts gain little and cost seconds of compilation.
    """
    factor = lax.linalg.cholesky(x, symmetrize_input=False)
    n = x.shape[-1]
    if n < WIDE:
        half = _negative_inverse(factor)
        return half.mT @ half, jnp.isfinite(half[..., -1, -1])
    m = n // 2
    first, last = _negative_inverse(factor[..., :m, :m]), _negative_inverse(factor[..., m:, m:])
    low = last @ (factor[..., m:, :m] @ first)  # all three times -1, so that no product needs a sign
    inverse = _square(first.mT @ first + low.mT @ low, last.mT @ low, last.mT @ last)
    return inverse, jnp.isfinite(last[..., -1, -1])


def _square(first: jax.Array, corner: jax.Array, last: jax.Array) -> jax.Array:
    """A symmetric matrix from two blocks on its diagonal and the one below it."""
    upper = jnp.concatenate([first, corner.mT], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, last], axis=-1)], axis=-2)


def _negative_inverse(factor: jax.Array) -> jax.Array:
    """Inverse of a lower triangular matrix, times -1."""
    eye = jnp.broadcast_to(-jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    return lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of matrices ``[..., n, n]`` that on the CPU takes those of a stack in turns.

    There the batched routines of LAPACK hand parts of their batch to the threads that run the program and wait for them: several that
    run side by side have been seen to wait for each other for good (jaxlib 0.10.2).
    """

    def call(xp: Any, x: jax.Array) -> Any:
        leading = x.shape[:-2]
        if not leading:
            return function(xp, x)
        flat = x.reshape(-1, *x.shape[-2:])
        in_turns = lambda x: lax.map(lambda one: function(xp, one), x)  # noqa: E731
        results = lax.platform_dependent(flat, cpu=in_turns, default=lambda x: function(xp, x))
        return tuple(part.reshape(*leading, *part.shape[1:]) for part in results)

    return call


def together(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a list of matrices that takes those of equal size at once: what compiles then grows with the sizes, not the layers."""

    def call(xp: Any, matrices: list[jax.Array]) -> list[Any]:
        groups: dict[Any, list[int]] = {}
        for index, x in enumerate(matrices):
            groups.setdefault((x.shape[-1], x.dtype), []).append(index)
        found: list[Any] = [None] * len(matrices)
        for members in groups.values():
            if len(members) == 1:
                found[members[0]] = function(xp, matrices[members[0]])
                continue
            sizes = [math.prod(matrices[i].shape[:-2]) for i in members]
            results = function(xp, jnp.concatenate([matrices[i].reshape(-1, *matrices[i].shape[-2:]) for i in members]))
            for i, start, size in zip(members, accumulate([0, *sizes]), sizes, strict=False):
                leading = matrices[i].shape[:-2]
                found[i] = tuple(part[start : start + size].reshape(*leading, *part.shape[1:]) for part in results)
        return found

    return call


def counts(xp: Any, ids: jax.Array, num: int) -> jax.Array:
    """By a sum at places; one beyond the last takes what is no row of the table."""
    flat, length = linalg.numbered(xp, ids, num)
    found = jnp.zeros(length, jnp.int32).at[flat].add(1, mode="promise_in_bounds")
    return found.reshape(*ids.shape[:-1], num + 1)[..., :num]


def gather_sum(xp: Any, rows: jax.Array, ids: jax.Array, num: int) -> jax.Array:
    """By a sum at places; one beyond the last takes what is no row of the table."""
    flat, length = linalg.numbered(xp, ids, num)
    found = jnp.zeros((length, rows.shape[-1]), rows.dtype).at[flat].add(rows.reshape(-1, rows.shape[-1]), mode="promise_in_bounds")
    return found.reshape(*ids.shape[:-1], num + 1, rows.shape[-1])[..., :num, :]


def fold(xp: Any, function: Callable[..., Any], arrays: list[jax.Array], axes: list[int], step: int) -> Any:
    """By a scan over the parts that the reference goes through one by one, so that programs stay small; of any tree of arrays.

    A part takes every k-th entry, not neighbours: where a batch is spread over devices, each of them has some of every part.
    """
    n = arrays[0].shape[axes[0]]
    parts = next(k for k in range(-(-n // step), n + 1) if n % k == 0) if n else 1
    if parts == 1:
        return function(*arrays)
    split = [x.reshape(*x.shape[:a], n // parts, parts, *x.shape[a + 1 :]) for x, a in zip(arrays, axes, strict=True)]

    def part(i: Any) -> Any:
        return function(*[lax.dynamic_index_in_dim(x, i, a + 1, keepdims=False) for x, a in zip(split, axes, strict=True)])

    def add(sums: Any, i: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, part(i)), None

    varying = tuple(sorted({axis for x in arrays for axis in program.varying(x)}))
    zeros = jax.tree.map(lambda s: program.zeros(s.shape, s.dtype, varying), jax.eval_shape(part, 0))
    return lax.scan(add, zeros, jnp.arange(parts))[0]


def patch_moments(xp: Any, x: jax.Array, window: Window, groups: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """By :func:`fold` over the examples."""
    whole = primitives()["patch_moments"]
    return fold(xp, lambda x: whole(xp, x, window, groups, dtype), [x], [x.ndim - 2 - window.axes], at_once(x, window))


def erf(xp: Any, x: jax.Array) -> jax.Array:
    """Its own."""
    return lax.erf(x)


def register() -> None:
    """Make the core use these for JAX arrays."""
    register_cond("jax", cond)
    for kernel in (gram, thin_product, counts, gather_sum, fold, patch_moments, erf):
        register_kernel(kernel.__name__, "jax", kernel)
    for name, function in (("invert", one_by_one(invert)), ("eigh", one_by_one(primitives()["eigh"]))):
        register_kernel(name, "jax", function)
        register_kernel(f"{name}_all", "jax", together(function))
