"""Directions from the rows of a step: the same numbers, and only where the gradient is known to be their product."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfcore as kf
import kfcore_jax
from kfcore import factors
from kfcore.curvature import kfac

N = 4


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def taken(monkeypatch):
    """How many directions of the wide layer went each way in what was traced."""
    counts = {"rows": 0, "matrix": 0}
    sandwich, two_sided = factors.sandwich, kfac.two_sided

    def counted(xp, forms, left, x, right):
        counts["matrix"] += x.shape[-2] == 30
        counts["rows"] -= x.shape[-2] == 30
        return sandwich(xp, forms, left, x, right)

    def asked(xp, layer, left, grad, right, rows):
        counts["rows"] += layer.shape[0] == 30
        return two_sided(xp, layer, left, grad, right, rows)

    monkeypatch.setattr(factors, "sandwich", counted)
    monkeypatch.setattr(kfac, "two_sided", asked)
    return lambda: dict(counts)


def mlp(params, x, y):
    h = jnp.tanh(x @ params["wide"]["kernel"] + params["wide"]["bias"])
    return jnp.mean((h @ params["out"]["kernel"] - y) ** 2)


def start(rng, dtype=jnp.float64):
    make = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, dtype)  # noqa: E731
    params = {"wide": {"kernel": make(40, 30), "bias": make(30)}, "out": {"kernel": make(30, 2)}}
    return params, jnp.asarray(rng.normal(size=(N, 40)), dtype), jnp.asarray(rng.normal(size=(N, 2)), dtype)


def train(loss_fn, params, args, *, wrap=lambda t: t, steps=3, apart=False, method=None, **options):
    model = kfcore_jax.trace(loss_fn, params, *args, loss=kf.MSE(), **options)
    optimizer = wrap(kfcore_jax.optimizer(method or kf.KFAC(damping=0.1), model, learning_rate=0.05))
    state = jax.jit(optimizer.init)(params)
    if apart:
        evaluate = jax.jit(model.value_grad_and_records)
        advance = jax.jit(lambda grads, state, params, records: optimizer.update(grads, state, params, records=records))
    else:
        evaluate, advance = model.value_grad_and_records, lambda g, s, p, r: optimizer.update(g, s, p, records=r)

    def step(params, state):
        _, grads, records = evaluate(params, *args)
        updates, state = advance(grads, state, params, records)
        return optax.apply_updates(params, updates), state

    step = step if apart else jax.jit(step)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def same(one, other, rtol=1e-10):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.linalg.norm(a - b) <= rtol * np.linalg.norm(b) for a, b in leaves)


@pytest.mark.parametrize("damping", [kf.Damping(0.1), kf.Damping(0.1, kind="exact")], ids=["factored", "exact"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_short_way_is_taken_and_leads_to_the_same_place(rng, taken, monkeypatch, damping, every):
    params, *args = start(rng)
    method = kf.KFAC(damping=damping, stats_every=every)
    short = train(mlp, params, args, method=method)
    assert taken()["rows"] == (1 if damping.kind == "factored" else 0)
    monkeypatch.setattr(kfcore_jax.transform._Core, "_rows", lambda *_: {})
    long = train(mlp, params, args, method=method)
    assert taken()["matrix"] > 0
    assert same(short, long)
    assert not same(params, long, 1e-3)


def test_a_weight_used_twice_has_the_rows_of_both_uses(rng, taken, monkeypatch):
    params, x, y = start(rng)
    other = jnp.asarray(rng.normal(size=x.shape))

    def twice(params, x, other, y):
        h = jnp.tanh(x @ params["wide"]["kernel"] + params["wide"]["bias"])
        h = h * jnp.tanh(other @ params["wide"]["kernel"] + params["wide"]["bias"])
        return jnp.mean((h @ params["out"]["kernel"] - y) ** 2)

    short = train(twice, params, (x, other, y))
    assert taken() == {"rows": 1, "matrix": 0}
    monkeypatch.setattr(kfcore_jax.transform._Core, "_rows", lambda *_: {})
    assert same(short, train(twice, params, (x, other, y)))


def convolved(params, x, y):
    numbers = ("NWC", "WIO", "NWC")
    z = jax.lax.conv_general_dilated(x, params["wide"]["kernel"], (1,), "VALID", dimension_numbers=numbers) + params["wide"]["bias"]
    return jnp.mean((jnp.tanh(z).mean(1) @ params["out"]["kernel"] - y) ** 2)


@pytest.mark.parametrize(
    ("length", "sharing", "way"), [(7, "expand", "rows"), (6, "reduce", "rows"), (7, "reduce", "matrix"), (15, "expand", "matrix")]
)
def test_few_positions_of_a_convolution_go_the_short_way(rng, taken, monkeypatch, length, sharing, way):
    params, _, y = start(rng)
    x = jnp.asarray(rng.normal(size=(N, length, 7)))
    params["wide"]["kernel"] = jnp.asarray(rng.normal(size=(6, 7, 30)) / 6)
    short = train(convolved, params, (x, y), sharing=sharing)
    assert taken() == {"rows": 0, "matrix": 0} | {way: 1}
    monkeypatch.setattr(kfcore_jax.transform._Core, "_rows", lambda *_: {})
    assert same(short, train(convolved, params, (x, y), sharing=sharing))


def penalised(params, x, y):
    return mlp(params, x, y) + 1e-3 * jnp.sum(params["wide"]["kernel"] ** 2)


def penalised_bias(params, x, y):
    return mlp(params, x, y) + 1e-3 * jnp.sum(params["wide"]["bias"] ** 2)


def tapped(params, x, y):
    wide = params["wide"]
    h = jnp.tanh(kfcore_jax.tap(x @ wide["kernel"] + wide["bias"], x, wide["kernel"], wide["bias"], name="wide"))
    return jnp.mean((h @ params["out"]["kernel"] - y) ** 2)


@jax.custom_jvp
def ruled_product(x, kernel):
    return x @ kernel


@ruled_product.defjvp
def _rule(primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    return x @ kernel, dx @ kernel + 3.0 * (x @ dkernel)


def ruled(params, x, y):
    h = jnp.tanh(ruled_product(x, params["wide"]["kernel"]))
    return jnp.mean((h @ params["out"]["kernel"] - y) ** 2) + 0.0 * jnp.sum(params["wide"]["bias"])


@pytest.mark.parametrize("loss_fn", [penalised, penalised_bias, tapped, ruled], ids=lambda f: f.__name__)
def test_a_gradient_with_more_in_it_goes_the_long_way(rng, taken, loss_fn):
    params, *args = start(rng)
    train(loss_fn, params, args)
    assert taken() == {"rows": 0, "matrix": 1}


def test_a_changed_gradient_goes_the_long_way(rng, taken):
    params, *args = start(rng)
    train(mlp, params, args, wrap=lambda t: optax.chain(optax.clip_by_global_norm(1e-3), t))
    assert taken() == {"rows": 0, "matrix": 1}


def test_records_that_left_their_program_do_not_vouch_for_gradients(rng, taken):
    params, *args = start(rng)
    train(mlp, params, args, apart=True)
    assert taken() == {"rows": 0, "matrix": 1}


def test_records_of_another_evaluation_do_not_vouch_for_gradients(rng, taken):
    params, *args = start(rng)
    model = kfcore_jax.trace(mlp, params, *args, loss=kf.MSE())
    optimizer = kfcore_jax.optimizer(kf.KFAC(damping=0.1), model)

    @jax.jit
    def step(params, state):
        _, grads, _ = model.value_grad_and_records(params, *args)
        _, _, records = model.value_grad_and_records(jax.tree.map(lambda x: 2.0 * x, params), *args)
        return optimizer.update(grads, state, params, records=records)

    step(params, optimizer.init(params))
    assert taken() == {"rows": 0, "matrix": 1}


def test_reduced_rows_are_not_those_of_the_gradient(rng, taken):
    params, x, y = start(rng)
    x, y = x.reshape(2, 2, 40), y.reshape(2, 2, 2)
    train(mlp, params, (x, y), sharing="reduce")
    assert taken() == {"rows": 0, "matrix": 1}
    train(mlp, params, (x, y), sharing="expand")
    assert taken() == {"rows": 1, "matrix": 1}


def test_a_rounded_gradient_goes_the_long_way(rng, taken):
    params, *args = start(rng, jnp.bfloat16)
    train(mlp, params, args)
    assert taken() == {"rows": 0, "matrix": 1}
