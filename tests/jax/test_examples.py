"""Which axes hold the examples: followed through the program, and lost rather than guessed."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import kfcore_jax
from kfcore_jax.examples import follow

N, S, C = 6, 4, 6


def ends(net, *shapes):
    """Axes of examples of what a program ends with, and how many these are."""
    jaxpr = jax.make_jaxpr(lambda *args: jnp.negative(net(*args)))(*(jnp.zeros(shape) for shape in shapes or [(N, S, C)])).jaxpr
    found, path = follow(jaxpr, [True] * len(jaxpr.invars), False), (len(jaxpr.eqns) - 1,)
    shape = jaxpr.eqns[-1].outvars[0].aval.shape
    return found.among(path, range(len(shape)), shape)


def axes(net, *shapes):
    return ends(net, *shapes)[0]


def over_time(x):
    return lax.scan(lambda h, x: (h + x, h * x), jnp.zeros((N, C)), x)[1]


def in_parts(x):
    """A mean of means over micro-batches."""
    return lax.scan(lambda total, x: (total, jnp.tanh(x)), 0.0, x.reshape(3, 2, S, C))[1]


def along_time(x):
    return lax.conv_general_dilated(x, jnp.ones((3, C, 2)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@jax.custom_vjp
def ruled(x):
    return jnp.swapaxes(x, 0, 1)


ruled.defvjp(lambda x: (ruled(x), None), lambda _, g: (jnp.swapaxes(g, 0, 1),))

FOLLOWED = {
    "elementwise": (lambda x: jnp.tanh(x) * 2, (0,)),
    "normalised": (lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True), (0,)),
    "mean_over_positions": (lambda x: x.mean(1), (0,)),
    "mean_over_the_batch": (lambda x: x.mean(0), ()),
    "mean_over_the_batch_kept": (lambda x: x.mean(0, keepdims=True), ()),
    "mean_over_the_batch_added": (lambda x: x + x.mean(0), (0,)),
    "time_first": (lambda x: x.swapaxes(0, 1), (1,)),
    "heads": (lambda x: x.reshape(N, S, 2, 3).transpose(2, 0, 1, 3), (1,)),
    "heads_merged_with_examples": (lambda x: x.reshape(N, S, 2, 3).transpose(0, 2, 1, 3).reshape(-1, S, 3), (0,)),
    "merged_behind_others": (lambda x: x.swapaxes(0, 1).reshape(-1, C), ()),
    "flat_and_back": (lambda x: x.reshape(-1, C).reshape(N, S, C), (0,)),
    "windows": (lambda x: x.reshape(N, 2, 2, C).reshape(-1, 2, C), (0,)),
    "half_of_flat_rows": (lambda x: x.reshape(-1, C)[: N * S // 2], ()),
    "flat_and_split": (lambda x: x.reshape(-1, C).reshape(2, 3, S, C), (0, 1)),
    "flat_in_other_parts": (lambda x: x.reshape(-1, C).reshape(S, N, C), ()),
    "in_two_parts": (lambda x: x.reshape(2, 3, S, C), (0, 1)),
    "parts_merged": (lambda x: x.reshape(2, 3, S, C).reshape(N, S * C), (0,)),
    "with_a_new_axis": (lambda x: x[:, None, :, None], (0,)),
    "with_a_new_first_axis": (lambda x: jnp.broadcast_to(x, (5, *x.shape)), (1,)),
    "product": (lambda x: x @ jnp.ones((C, 2)), (0,)),
    "product_from_the_left": (lambda x: jnp.ones((2, S)) @ x, (0,)),
    "contracted": (lambda x: jnp.einsum("nsc,nd->sdc", x, x[:, 0]), ()),
    "attention": (lambda x: jax.nn.softmax(jnp.einsum("nsc,ntc->nst", x, x)) @ x, (0,)),
    "convolution": (along_time, (0,)),
    "one_position": (lambda x: x[:, 0], (0,)),
    "half_of_the_batch": (lambda x: x[: N // 2], (0,)),
    "halves": (lambda x: jnp.concatenate([x[: N // 2], x[N // 2 :]]), (0,)),
    "class_token": (lambda x: jnp.concatenate([jnp.zeros((N, 1, C)), x], 1), (0,)),
    "vmap": (jax.vmap(lambda x: x.T @ x), (0,)),
    "vmap_of_positions_first": (jax.vmap(jnp.tanh, 1), (1,)),
    "scan_over_time": (lambda x: over_time(x.swapaxes(0, 1)), (1,)),
    "time_is_first_in_the_batch": (lambda x: lax.scan(lambda h, x: (h, x * 2), 0.0, x)[1], (1,)),
    "scan_over_layers": (lambda x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.ones((2, C, C)))[0], (0,)),
    "micro_batches": (in_parts, (1,)),
    "cond": (lambda x: lax.cond(x.sum() > 0, jnp.tanh, jnp.sin, x), (0,)),
    "while": (lambda x: lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1, x), (0,)),
    "custom_vjp": (ruled, (1,)),
    "softplus": (jax.nn.softplus, (0,)),
    "largest": (lambda x: x.argmax(-1).astype(float), (0,)),
    "rows_of_it": (lambda x: jnp.take_along_axis(x, x.argmax(-1, keepdims=True), -1), (0,)),
    "sorted": (lambda x: jnp.sort(x, -1), (0,)),
}


@pytest.mark.parametrize(("net", "expected"), FOLLOWED.values(), ids=FOLLOWED)
def test_axes(net, expected):
    assert axes(net) == expected


COUNTS = {
    "each": (jnp.tanh, N),
    "flat": (lambda x: x.reshape(-1, C), N),
    "flat_twice": (lambda x: x.reshape(-1, C).reshape(-1), N),
    "windows": (FOLLOWED["windows"][0], N),
    "in_two_parts": (FOLLOWED["in_two_parts"][0], N),
    "in_two_parts_of_flat_rows": (lambda x: x.reshape(-1, C).reshape(2, -1, C), N),
    "micro_batches": (in_parts, 2),
    "half_of_the_batch": (FOLLOWED["half_of_the_batch"][0], N // 2),
    "none": (FOLLOWED["mean_over_the_batch"][0], 0),
}


@pytest.mark.parametrize(("net", "count"), COUNTS.values(), ids=COUNTS)
def test_how_many(net, count):
    assert ends(net)[1] == count


@pytest.mark.parametrize("n", [1, 5])
def test_a_batch_of_one(n):
    assert axes(lambda x: x.reshape(n, S, 2, 3), (n, S, C)) == (0,)
    assert axes(lambda x: x[:, None].reshape(n, S, C), (n, S, C)) == (0,)
    assert axes(lambda x: x.mean(0, keepdims=True), (n, S, C)) == ()
    assert axes(lambda x: x.reshape(n * S, C), (n, S, C)) == ((0,) if n > 1 else ())


PAIRS = {
    "labels": ((N,), lambda x, y: x * y[:, None, None], (0,)),
    "positions": ((S,), lambda x, y: x * y[:, None], (0,)),
    "statistics": ((C,), lambda x, y: x * y, (0,)),
    "mask": ((S, S), lambda x, y: jnp.einsum("nsc,ntc->nst", x, x) + y, (0,)),
    "draws": ((3, N, S, C), lambda x, y: x + y, (0,)),
}


@pytest.mark.parametrize(("shape", "net", "expected"), PAIRS.values(), ids=PAIRS)
def test_with_another_argument(shape, net, expected):
    assert axes(net, (N, S, C), shape) == expected


@pytest.mark.parametrize("name", ["positions", "statistics", "mask"])
def test_what_is_the_same_for_every_example_of_another_argument_is_none(name):
    shape, net, _ = PAIRS[name]
    jaxpr = jax.make_jaxpr(lambda x, y: (y * 2, net(x, y)))(jnp.zeros((N, S, C)), jnp.zeros(shape)).jaxpr
    found = follow(jaxpr, [True, True], False)
    assert found.positions == {1}
    assert found.among((0,), range(len(shape)), shape) == ((), 0)


def test_what_a_program_closes_over_counts_as_the_batch_only_if_it_is(lib):
    x, params = lib.normal(0, N, S, C), {"g": lib.normal(1, C)}
    model = kfcore_jax.trace(lambda p: jnp.mean(jnp.sin(x * p["g"])), params)
    assert set(model.layers) == {"g"}
