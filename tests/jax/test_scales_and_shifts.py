"""Scales and shifts: however a program applies them, every example's gradient is captured, and a block is their exact second moment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfcore as kf
import kfcore_jax

N, S, C = 4, 3, 6


def scalar(z, c):
    """A sum over examples whose gradient is another one at every place of the output."""
    return jnp.sum(jnp.sin(z + c[(...,) + (None,) * (z.ndim - c.ndim)]) * (1.0 + jnp.arange(z[0].size).reshape(z.shape[1:])))


def hat(x, axis=-1):
    x = x - x.mean(axis, keepdims=True)
    return x / jnp.sqrt((x**2).mean(axis, keepdims=True) + 1e-3)


def linen_net(make, **state):
    """A module of Flax as ``net(p, x)``; its parameters are moved from zeros and ones by the test."""

    def build(lib, x):
        linen = pytest.importorskip("flax.linen")
        module = make(linen)
        variables = module.init(jax.random.key(0), x)
        rest = lib.moved({k: v for k, v in variables.items() if k != "params"})
        return (lambda p, x: module.apply({"params": p["norm"], **rest}, x)), {"norm": lib.moved(variables["params"])}

    return build


def equinox_net(lib, x):
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(eqx.nn.LayerNorm(C), eqx.is_array)
    return (lambda p, x: jax.vmap(jax.vmap(eqx.combine(p["norm"], static)))(x)), {"norm": lib.moved(params)}


def by_hand(net, **shapes):
    return lambda lib, x: (net, {name: lib.normal(k + 5, *shape) for k, (name, shape) in enumerate(shapes.items())})


def stacked(p, x):
    return lax.scan(lambda x, p: (x + jnp.tanh(hat(x) * p["g"] + p["b"]), None), x, p)[0]


def cell(p, x):
    """A recurrent cell with a normalisation, over time."""

    def step(h, x):
        h = jnp.tanh(hat(x + h @ p["w"]) * p["g"] + p["b"])
        return h, h

    return lax.scan(step, jnp.zeros((len(x), C)), jnp.swapaxes(x, 0, 1))[1].swapaxes(0, 1)


def twice(p, x):
    return hat(jnp.tanh(hat(x) * p["g"] + p["b"])) * p["g"] + p["b"]


def frozen(p, x):
    """BatchNorm in evaluation: the scale is multiplied with what has no examples first."""
    inverse = p["g"] * lax.rsqrt(jnp.arange(1.0, C + 1) + 1e-3)
    return (x - 0.1) * inverse + p["b"]


def shared_scale(p, x):
    """One scale with two shifts: they cannot be in one layer."""
    return hat(jnp.tanh(hat(x) * p["g"] + p["b"])) * p["g"] + p["c"]


VECTORS = {"g": (C,), "b": (C,)}
PAIR = {"g": kf.Norm(C)}
ROWS, IMAGE = (N, S, C), (N, 2, 3, C)
CASES = {
    "linen_layer_norm": (ROWS, linen_net(lambda nn: nn.LayerNorm()), {"norm": kf.Norm(C)}),
    "linen_without_shift": (ROWS, linen_net(lambda nn: nn.LayerNorm(use_bias=False)), {"norm": kf.Norm(C, bias=False)}),
    "linen_without_scale": (ROWS, linen_net(lambda nn: nn.LayerNorm(use_scale=False)), {"norm.bias": kf.Norm(C, bias=False)}),
    "linen_rms_norm": (ROWS, linen_net(lambda nn: nn.RMSNorm()), {"norm": kf.Norm(C, bias=False)}),
    "linen_over_two_axes": (
        IMAGE,
        linen_net(lambda nn: nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1))),
        {"norm": kf.Norm((3, C))},
    ),
    "linen_group_norm": (IMAGE, linen_net(lambda nn: nn.GroupNorm(num_groups=2)), {"norm": kf.Norm(C)}),
    "linen_instance_norm": (IMAGE, linen_net(lambda nn: nn.InstanceNorm()), {"norm": kf.Norm(C)}),
    "linen_batch_norm_in_evaluation": (IMAGE, linen_net(lambda nn: nn.BatchNorm(use_running_average=True)), {"norm": kf.Norm(C)}),
    "equinox_under_vmap": (ROWS, equinox_net, {"norm": kf.Norm(C)}),
    "one_position": ((N, C), by_hand(lambda p, x: hat(x) * p["g"] + p["b"], **VECTORS), PAIR),
    "channels_first": ((N, C, 2, 3), by_hand(lambda p, x: hat(x, 1) * p["g"][:, None, None] + p["b"][:, None, None], **VECTORS), PAIR),
    "one_plus_scale": (ROWS, by_hand(lambda p, x: hat(x) * (1 + p["g"]) + p["b"], **VECTORS), PAIR),
    "frozen_statistics": (ROWS, by_hand(frozen, **VECTORS), PAIR),
    "in_jit_and_remat": (ROWS, by_hand(jax.jit(jax.checkpoint(lambda p, x: hat(x) * p["g"] + p["b"])), **VECTORS), PAIR),
    "over_layers": (ROWS, by_hand(stacked, g=(2, C), b=(2, C)), {"g": kf.Norm(C, stack=(2,))}),
    "over_time": (ROWS, by_hand(cell, w=(C, C), **VECTORS), {"w": kf.Linear(C, C, None, layout="io")} | PAIR),
    "used_twice": (ROWS, by_hand(twice, **VECTORS), PAIR),
    "one_scale_two_shifts": (
        ROWS,
        by_hand(shared_scale, **VECTORS, c=(C,)),
        dict.fromkeys(["g", "b", "c"], kf.Norm(C, bias=False)),
    ),
    "layer_scale": (
        ROWS,
        by_hand(lambda p, x: x + p["g"] * (jnp.tanh(x) @ p["w"]), w=(C, C), g=(C,)),
        {"w": kf.Linear(C, C, None, layout="io"), "g": kf.Norm(C, bias=False)},
    ),
    "shift_then_scale": (
        ROWS,
        by_hand(lambda p, x: p["g"] * jnp.tanh(x + p["b"]), **VECTORS),
        dict.fromkeys(["g", "b"], kf.Norm(C, bias=False)),
    ),
    "a_number": (ROWS, by_hand(lambda p, x: x + p["g"] * jnp.tanh(x), g=()), {"g": kf.Norm(1, bias=False)}),
    "positions": (ROWS, by_hand(lambda p, x: jnp.tanh(x + p["b"]), b=(1, S, C)), {"b": kf.Norm((1, S, C), bias=False)}),
    "after_a_split_into_heads": (
        ROWS,
        by_hand(lambda p, x: hat(x.reshape(*x.shape[:2], 2, 3)) * p["g"] + p["b"], g=(3,), b=(3,)),
        {"g": kf.Norm(3)},
    ),
    "in_flat_rows": (
        ROWS,
        by_hand(lambda p, x: (hat(x.reshape(-1, C)) * p["g"]).reshape(x.shape) + p["b"], **VECTORS),
        PAIR,
    ),
    "in_windows": (
        IMAGE,
        by_hand(lambda p, x: (hat(x.swapaxes(1, 2).reshape(-1, 2, C)) * p["g"] + p["b"]).reshape(-1, 3, 2, C), **VECTORS),
        PAIR,
    ),
}


def example_gradients(layer, x, dy):
    """Of the parameters by role, ``[N, *stack, ...]``."""
    lead = len(layer.stack)
    if isinstance(layer, kf.Norm):
        rows = np.moveaxis(layer.output_rows(np, dy, np.float64, x), lead, 0)
        return [layer.parameters_of({"": row[..., None]}) for row in rows]
    return [{"weight": w} for w in np.moveaxis(np.einsum("...nsi,...nsj->...nij", x, dy), lead, 0)]


@pytest.mark.parametrize(("shape", "build", "layers"), CASES.values(), ids=CASES)
def test_the_gradient_of_every_example_and_its_second_moment(lib, shape, build, layers):
    x, c = lib.normal(0, *shape), lib.normal(1, shape[0], 2)[:, 0]
    net, params = build(lib, x)

    def loss(p, x, c):
        return scalar(net(p, x), c)

    model = kfcore_jax.trace(loss, params, x, c)
    assert model.layers == layers
    assert not model.layout.model.others

    def everything(p, x, c):
        one = jax.vmap(lambda x, c: jax.grad(loss)(p, x[None], c[None]))
        return model.value_grad_and_records(p, x, c), one(x, c)

    ((_, grads, records), rows), flat = jax.jit(everything)(params, x, c), model.layout.flat
    for name, layer in model.layers.items():
        uses = [example_gradients(layer, *(np.asarray(v) for v in pair)) for pair in records.layers[name]]
        for role in layer.parameters:
            total = np.stack([sum(use[n][role] for use in uses) for n in range(N)])
            own = model.layout.model.roles(name)[role]
            expected = np.stack([flat(jax.tree.map(lambda g, n=n: g[n], rows))[own] for n in range(N)])
            assert np.abs(total - expected).max() <= 1e-12 * np.abs(expected).max(), (name, role)
            assert np.abs(total.sum(0) - flat(grads)[own]).max() <= 1e-12 * np.abs(expected).max()
        if not isinstance(layer, kf.Norm) or layer.stack or len(uses) > 1:
            continue
        vectors = np.stack([np.concatenate([one[role].ravel() for role in layer.parameters]) for one in uses[0]])
        exact = vectors.T @ vectors / N
        for kind, want in (("full", exact), ("diagonal", np.diag(np.diag(exact)))):
            part = kf.Norm(layer.features, layer.bias, kind)
            state = kf.KFAC().init(part, vectors)
            state = kf.KFAC().observe(state, kf.KFAC().reduce(part, state, *(np.asarray(v) for v in records.layers[name][0])))
            assert np.abs(kf.KFAC().dense(part, state) - want).max() <= 1e-12 * np.abs(want).max()


ALONE, WHOLE = "without an axis of examples", "with statistics of the whole batch"


def batch_norm(p, x):
    """With the statistics of the batch."""
    x = x - x.mean((0, 1))
    return x * (lax.rsqrt((x**2).mean((0, 1)) + 1e-3) * p["g"]) + p["b"]


def linen_batch_norm(p, x):
    linen = pytest.importorskip("flax.linen")
    net = linen.BatchNorm(use_running_average=False)
    start = {"mean": jnp.zeros(C), "var": jnp.ones(C)}
    return net.apply({"params": {"scale": p["g"], "bias": p["b"]}, "batch_stats": start}, x, mutable=["batch_stats"])[0]


def pairs(x):
    """Every entry of the last axis twice."""
    return jnp.broadcast_to(x[..., None], (*x.shape, 2)).reshape(*x.shape[:-1], -1)


TRAPS = {
    "batch_norm": (batch_norm, {"g": WHOLE, "b": "behind a scale that has no block"}),
    "linen_batch_norm": (linen_batch_norm, {"g": WHOLE, "b": "behind a scale that has no block"}),
    "of_a_mean_over_the_batch": (
        lambda p, x: x + jnp.tanh(p["g"] * x.mean(0)) + jnp.tanh(x.mean((0, 1)) + p["b"]),
        {"g": ALONE, "b": ALONE},
    ),
    "of_statistics_each_position_has": (lambda p, x: x * (p["g"] / (1 + x.std(0))) + p["b"], {"g": "div"}),
    "weight_normalisation": (lambda p, x: x * p["g"] * p["b"] + x * (p["g"] * p["b"]), {"g": "mul after mul", "b": "mul after mul"}),
    "from_one": (lambda p, x: x * (1 - p["g"]) + p["b"], {"g": "mul after sub"}),
    "divided_and_subtracted": (lambda p, x: x / p["g"] - p["b"], {"g": "div", "b": "sub"}),
    "every_second_entry": (lambda p, x: x[..., ::2] * p["g"][::2] + p["b"][::2], {"g": "mul after", "b": "add after"}),
    "alike_in_two_entries": (lambda p, x: x * jnp.tile(p["g"][:3], 2) + jnp.tile(p["b"][:3], 2), {"g": "mul after", "b": "add after"}),
    "each_entry_twice": (lambda p, x: pairs(x) * pairs(p["g"]) + pairs(p["b"]), {"g": "whose entries", "b": "behind a scale"}),
    "each_entry_added_twice": (lambda p, x: pairs(x * p["g"]) + pairs(p["b"]), {"b": "whose entries"}),
    "backwards": (lambda p, x: x * p["g"][::-1] + p["b"][::-1], {"g": "another order", "b": "behind a scale"}),
    "also_elsewhere": (lambda p, x: x * p["g"] + p["b"] + x * p["g"].sum(), {"g": "also used in mul after reduce_sum"}),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_has_no_gradient_of_an_example_falls_back_with_its_reason(lib, trap):
    net, words = TRAPS[trap]
    params = {"g": lib.normal(1, C), "b": lib.normal(2, C)}
    model = kfcore_jax.trace(lambda p, x: jnp.mean(jnp.sin(net(p, x))), params, lib.normal(0, N, S, C))
    assert words.keys() <= model.layout.model.others.keys()
    for name, word in words.items():
        assert word in model.layout.reasons[name], model.layout.reasons[name]
    assert all(isinstance(layer, kf.Norm) and name not in words for name, layer in model.layers.items())


def test_a_batch_of_one_has_an_axis_of_examples_and_a_mean_over_it_has_none(lib):
    for n in (1, N):
        x = lib.normal(0, n, S, C)
        params = {"g": lib.normal(1, C), "b": lib.normal(2, C)}
        model = kfcore_jax.trace(lambda p, x: jnp.mean(hat(x) * p["g"] + p["b"]), params, x)
        assert model.layers == {"g": kf.Norm(C)}
        model = kfcore_jax.trace(lambda p, x: jnp.mean(batch_norm(p, x)), params, x)
        assert not model.layers


def test_positions_given_as_an_argument_are_no_examples(lib):
    """Even if there are as many of them as examples."""
    params = {"g": lib.normal(1, C), "table": lib.normal(2, 7, C)}

    def loss(p, x, places, grid):
        return jnp.mean(jnp.sin(x + p["table"][places] + p["g"] * grid))

    model = kfcore_jax.trace(loss, params, lib.normal(0, S, S, C), jnp.arange(S), lib.normal(3, S, C))
    assert not model.layers
    assert "gather without an axis of examples" in model.layout.reasons["table"]
    assert ALONE in model.layout.reasons["g"]

    each = jnp.zeros((S, S), int), lib.normal(3, S, S, C)
    assert kfcore_jax.trace(loss, params, lib.normal(0, S, S, C), *each).layers.keys() == {"table", "g"}


def test_statistics_given_as_arguments_are_no_examples(lib):
    """As many features as examples."""
    params = {"g": lib.normal(1, C), "b": lib.normal(2, C)}

    def loss(p, stats, x):
        return jnp.mean(jnp.sin((x - stats["mean"]) * (lax.rsqrt(stats["var"]) * p["g"]) + p["b"]))

    stats, x = {"mean": lib.normal(3, C), "var": lib.normal(4, C) ** 2}, lib.normal(0, C, S, C)
    model, records = lib.captured(loss, params, stats, x)
    assert model.layers == {"g": kf.Norm(C)}
    hats = (x - stats["mean"]) / jnp.sqrt(stats["var"])
    np.testing.assert_allclose(np.asarray(records.layers["g"][0][0])[..., :C], hats, rtol=1e-12)


def test_an_error_of_one_percent_in_a_record_is_caught(lib, monkeypatch):
    x, params = lib.normal(0, N, S, C), {"g": lib.normal(1, C), "b": lib.normal(2, C)}
    model, _ = lib.captured(lambda p, x: jnp.mean(jnp.sin(hat(x) * p["g"] + p["b"])), params, x)
    whole = model.capture

    def off(part, *args):
        value, grads, records = whole(*args)
        pair = list(records.layers["g"][0])
        pair[part] = pair[part] * jnp.where(jnp.arange(2 * C) < C, 1.01, 1.0)
        records.layers["g"] = [tuple(pair)]
        return value, grads, records

    for part in (0, 1):
        monkeypatch.setattr(model, "capture", functools.partial(off, part))
        with pytest.raises(AssertionError, match="differ from autodiff's in g"):
            model.check_capture(params, x)


# ---- blocks, and steps with them


def test_kinds_of_blocks(lib):
    params = {"g": lib.normal(1, C), "b": lib.normal(2, C), "positions": lib.normal(3, S, C)}
    loss = lambda p, x: jnp.mean(jnp.sin(hat(x + p["positions"]) * p["g"] + p["b"]))  # noqa: E731
    model = kfcore_jax.trace(loss, params, lib.normal(0, N, S, C), norm="full")
    assert model.layers == {"g": kf.Norm(C, block="full"), "positions": kf.Norm((S, C), bias=False)}
    with pytest.raises(ValueError, match="`norm` must be 'diagonal' or 'full', got 'whole'"):
        kfcore_jax.trace(loss, params, lib.normal(0, N, S, C), norm="whole")
