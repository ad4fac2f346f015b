"""Convolutions under the optimizer: exact blocks, images of several sizes, stacks, masks, seeds, and one compilation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import kfcore as kf
import kfcore_jax

N = 4
METHOD = kf.KFAC(damping=0.05, stats_every=2, refresh_every=3)
HWIO = ("NHWC", "HWIO", "NHWC")


def convolved(x, kernel, stride=1, padding="SAME", groups=1, **how):
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=HWIO, feature_group_count=groups, **how)


def state_of(loss, params, args, method, records_of=None, **options):
    """Model, records and state after one update."""
    model = kfcore_jax.trace(loss, params, *args, strict=True, **options)
    optimizer = kfcore_jax.optimizer(method, model, learning_rate=0.1)

    @jax.jit
    def step(params, state):
        _, grads, records = model.value_grad_and_records(params, *args)
        records = records if records_of is None else records_of(model, params)
        return records, optimizer.update(grads, state, params, records=records)[1]

    records, state = step(params, optimizer.init(params))
    return model, records, state


def averages(state, block="conv"):
    return [None if x is None else np.asarray(x) for x in state.curvature.blocks[block].average.values]


def close(x, y, rtol):
    assert x.shape == y.shape
    return np.linalg.norm(x - y) <= rtol * np.linalg.norm(y)


# ---- exact blocks

GEOMETRIES = {
    "plain": {"padding": "VALID"},
    "stride": {"stride": 2},
    "dilation": {"rhs_dilation": (2, 1)},
    "groups": {"groups": 2, "stride": 2},
    "depthwise": {"groups": 4, "padding": ((1, 0), (0, 2))},
    "transposed": {"lhs_dilation": (2, 2), "padding": ((1, 2), (2, 1))},
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("how", GEOMETRIES.values(), ids=GEOMETRIES)
def test_blocks_by_group_are_the_gauss_newton_matrix_of_a_linear_convolution(lib, how, sharing):
    groups = how.get("groups", 1)
    params = {"conv": {"kernel": lib.normal(1, 3, 2, 4 // groups, 4), "bias": lib.normal(2, 4)}}
    x, y = lib.normal(0, N, 4, 3, 4), lib.normal(3, 1)

    def predict(params, x):
        z = convolved(x, params["conv"]["kernel"], **how) + params["conv"]["bias"]
        return z.sum((1, 2)) if sharing == "reduce" else z

    def loss(params, x, y):
        return jnp.mean((predict(params, x) - y) ** 2)

    def exact(model, params):
        return model.fisher_records(predict, method, kf.MSE(), params, x)

    method = kf.KFAC(fisher="exact")
    model, _, state = state_of(loss, params, (x, y), method, exact, sharing=sharing)
    layer = model.layers["conv"]
    found = np.asarray(method.dense(layer, state.curvature.blocks["conv"]))
    jacobian = jax.jacobian(predict)(params, x)["conv"]
    rows = {role: np.asarray(j).reshape(-1, *params["conv"][parameter].shape) for role, parameter in ROLES for j in [jacobian[parameter]]}
    rows = [layer.matrices({role: j[k] for role, j in rows.items()})[""].reshape(*layer.stack, -1) for k in range(len(rows["bias"]))]
    expected = 2.0 * np.einsum("k...a,k...b->...ab", rows, rows) / len(rows)
    assert close(found, expected, 1e-12)
    assert not close(1.01 * found, expected, 5e-3)


ROLES = (("weight", "kernel"), ("bias", "bias"))


def test_monte_carlo_tends_to_the_exact_factor(lib):
    params, x = {"conv": lib.normal(1, 2, 2, 2, 3)}, lib.normal(0, N, 3, 3, 2)
    predict = lambda p, x: convolved(x, p["conv"], stride=2).mean((1, 2))  # noqa: E731

    def loss(p, x):
        return optax.losses.softmax_cross_entropy_with_integer_labels(predict(p, x), jnp.arange(N) % 3).mean()

    def factor(**options):
        method = kf.KFAC(**options)
        make = lambda m, p: m.fisher_records(predict, method, kf.CrossEntropy(), p, x, key=jax.random.key(0))  # noqa: E731
        return averages(state_of(loss, params, (x,), method, make)[2])[1]

    exact = factor(fisher="exact")
    assert close(factor(fisher="mc", mc_samples=4000), exact, 0.05)
    assert not close(1.1 * exact, exact, 0.05)


def test_forward_needs_no_output_gradients(lib):
    params, x = {"conv": lib.normal(1, 2, 2, 2, 3)}, lib.normal(0, N, 3, 3, 2)
    model, records, state = state_of(lambda p, x: jnp.mean(convolved(x, p["conv"]) ** 2), params, (x,), kf.KFAC(fisher="forward"))
    a, g = averages(state)
    assert g is None
    assert close(a, lib.factors(model.layout.sites["conv"][0], x, records.layers["conv"][0][1], joint=False)[0], 1e-12)


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_the_empirical_factors_of_a_network(lib, wrap, bias):
    """With the loss' mean undone, from the gradients of every example at the output of the convolution."""
    params = {"conv": {"kernel": lib.normal(1, 3, 3, 2, 4), "bias": lib.normal(2, 4)}, "head": {"kernel": lib.normal(3, 4, 3)}}
    x, y = lib.normal(0, N, 5, 4, 2), jnp.arange(N) % 3

    def tail(p, z, y):
        logits = jnp.tanh(z).mean((-3, -2)) @ p["head"]["kernel"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def before(p, x):
        return convolved(x, p["conv"]["kernel"], stride=2, groups=1) + p["conv"]["bias"]

    model, _, state = state_of(lambda p, x, y: tail(p, wrap(before)(p, x), y), params, (x, y), kf.KFAC(), bias=bias)
    grads = jax.vmap(jax.grad(lambda z, y: tail(params, z, y)))(before(params, x), y).reshape(N, -1, 4)
    a, g = lib.factors(model.layout.sites["conv"][0], x, grads, joint=bias == "joint")
    found = averages(state, "conv" if bias == "joint" else "conv.weight")
    assert close(found[0], a, 1e-10)
    assert close(found[1], g, 1e-10)
    assert not close(1.01 * found[1], g, 5e-3)
    if bias == "separate":
        sums = np.asarray(grads.sum(1))
        assert close(averages(state, "conv.bias")[1], sums.T @ sums / N, 1e-10)


# ---- images of several sizes


def strided(p, x):
    return jnp.mean(jnp.sin(convolved(x, p["conv"]["w"], stride=2) + p["conv"]["b"]))


def strided_params(lib):
    return {"conv": {"w": lib.normal(1, 3, 3, 2, 4), "b": lib.normal(2, 4)}}


def test_images_of_another_size_are_padded_as_their_own_program_does(lib):
    params, large, small = strided_params(lib), lib.normal(0, N, 6, 6, 2), lib.normal(3, N, 5, 4, 2)
    model = kfcore_jax.trace(strided, params, large, strict=True)
    assert model.layers["conv"].padding == ((0, 1), (0, 1))
    optimizer = kfcore_jax.optimizer(kf.KFAC(), model, learning_rate=0.1)
    evaluate = jax.jit(model.value_grad_and_records)
    update = jax.jit(lambda grads, state, records: optimizer.update(grads, state, records=records)[1])
    found = {}
    for name, x in {"large": large, "small": small}.items():
        _, grads, records = evaluate(params, x)
        found[name] = averages(update(grads, optimizer.init(params), records))
        use = kfcore_jax.trace(strided, params, x).layout.sites["conv"][0]
        ((inputs, dy),) = records.layers["conv"]
        a, g = lib.factors(use, inputs, dy, joint=True)
        assert close(found[name][0], a, 1e-12)
        assert close(found[name][1], g * N * records.terms, 1e-12)
    assert records.uses["conv"][0].padding == ((1, 1), (0, 1))
    assert model.check_capture(params, small, rtol=1e-9).keys() == {"conv"}
    # the control: with the padding of the large images
    records.uses = {}
    wrong = averages(optimizer.update(grads, optimizer.init(params), records=records)[1])
    assert not close(wrong[0], found["small"][0], 1e-3)


def test_a_batch_of_the_size_that_was_traced_says_nothing_more(lib):
    params, x = strided_params(lib), lib.normal(0, N, 6, 6, 2)
    model = kfcore_jax.trace(strided, params, x)
    assert model.value_grad_and_records(params, x[:2])[2].uses == {}


def test_records_of_two_sizes_are_two_batches(lib):
    """A kernel that is used at two sizes in one program has statistics of all its positions."""
    params, x, y = strided_params(lib), lib.normal(0, N, 6, 6, 2), lib.normal(3, N, 5, 4, 2)
    model, records, state = state_of(lambda p, x, y: strided(p, x) + strided(p, y), params, (x, y), kf.KFAC())
    sides = []
    for use, pair in zip(model.layout.sites["conv"], records.layers["conv"], strict=True):
        a, g = lib.factors(use, *pair, joint=True)
        count = pair[1].shape[0] * pair[1].shape[1]
        sides.append((count * a, count, g * N))
    a, g = averages(state)
    assert close(a, (sides[0][0] + sides[1][0]) / (sides[0][1] + sides[1][1]), 1e-12)
    assert close(g, (sides[0][2] + sides[1][2]) * records.terms, 1e-12)


def test_a_batch_of_no_examples_is_no_other_layer(lib):
    params, x = {"conv": lib.normal(1, 3, 3, 2, 4)}, lib.normal(0, N, 6, 6, 2)
    model = kfcore_jax.trace(lambda p, x: jnp.sum(jnp.sin(convolved(x, p["conv"], stride=2))), params, x)
    ((inputs, grads),) = model.value_grad_and_records(params, x[:0])[2].layers["conv"]
    assert (inputs.shape, grads.shape) == ((0, 6, 6, 2), (0, 9, 4))


def test_records_of_other_parameters_are_refused(lib):
    params, x = strided_params(lib), lib.normal(0, N, 6, 6, 2)
    model = kfcore_jax.trace(strided, params, x)
    optimizer = kfcore_jax.optimizer(kf.KFAC(), model)
    _, grads, records = model.value_grad_and_records(params, x)
    records.uses = {"conv": (replace(model.layers["conv"], groups=2),)}
    with pytest.raises(ValueError, match="`records` have conv with parameters of other shapes"):
        optimizer.update(grads, optimizer.init(params), records=records)


# ---- loops, masks, seeds


def stacked(p, x):
    def block(h, q):
        return jnp.tanh(convolved(h, q["kernel"], groups=2) + q["bias"]), None

    return jnp.mean((lax.scan(jax.checkpoint(block), x, p["conv"])[0].mean((1, 2)) @ p["head"]) ** 2)


def apart(p, x):
    for q in p["conv"]:
        x = jnp.tanh(convolved(x, q["kernel"], groups=2) + q["bias"])
    return jnp.mean((x.mean((1, 2)) @ p["head"]) ** 2)


def train(loss, params, args, steps=6, wrap=lambda t: t, **options):
    model = kfcore_jax.trace(loss, params, *args, loss=kf.MSE(), **options)
    optimizer, traces = wrap(kfcore_jax.optimizer(METHOD, model, learning_rate=0.05)), []

    @jax.jit
    def step(params, state):
        traces.append(1)
        _, grads, records = model.value_grad_and_records(params, *args)
        updates, state = optimizer.update(grads, state, params, records=records)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    assert len(traces) == step._cache_size() == 1
    return params, state


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_a_loop_over_layers_takes_the_steps_of_the_layers_written_out(lib, bias):
    params = {"conv": {"kernel": lib.normal(1, 3, 3, 3, 2, 4), "bias": lib.normal(2, 3, 4)}, "head": lib.normal(3, 4, 2)}
    x = lib.normal(0, N, 5, 4, 4)
    together, state = train(stacked, params, (x,), bias=bias, strict=True)
    layers = [jax.tree.map(lambda p, k=k: p[k], params["conv"]) for k in range(3)]
    written, _ = train(apart, params | {"conv": layers}, (x,), bias=bias, strict=True)
    for role in ("kernel", "bias"):
        for k in range(3):
            assert close(np.asarray(together["conv"][role][k]), np.asarray(written["conv"][k][role]), 1e-11)
    assert not close(np.asarray(together["conv"]["kernel"]), np.asarray(params["conv"]["kernel"]), 1e-3)
    block = "conv" if bias == "joint" else "conv.weight"
    assert averages(state, block)[0].shape[:2] == (3, 2)


def masked(mask):
    off = jax.tree.map(lambda m: not m, mask)
    return lambda inner: optax.chain(optax.masked(inner, mask), optax.masked(optax.set_to_zero(), off))


@pytest.mark.parametrize("shape", [(6, 6), (5, 4)], ids=["as_traced", "another_size"])
def test_a_mask_leaves_out_weights_and_biases(lib, shape):
    params = {"conv": strided_params(lib)["conv"], "last": {"w": lib.normal(4, 3, 3, 4, 2), "b": lib.normal(5, 2)}}

    def loss(p, x):
        h = jnp.tanh(convolved(x, p["conv"]["w"], stride=2) + p["conv"]["b"])
        return jnp.mean((convolved(h, p["last"]["w"], stride=2) + p["last"]["b"]) ** 2)

    mask = {"conv": {"w": True, "b": False}, "last": {"w": False, "b": True}}
    model = kfcore_jax.trace(loss, params, lib.normal(0, N, 6, 6, 2), loss=kf.MSE())
    optimizer = masked(mask)(kfcore_jax.optimizer(METHOD, model, learning_rate=0.05))
    _, grads, records = jax.jit(model.value_grad_and_records)(params, lib.normal(0, N, *shape, 2))
    updates, state = jax.jit(lambda *a: optimizer.update(*a, params, records=records))(grads, optimizer.init(params))
    blocks = state[0].inner_state.curvature.blocks
    assert set(blocks) == {"conv", "last.bias"}
    assert blocks["conv"].average.values[0].shape == (18, 18)
    for name, roles in mask.items():
        for role, trained in roles.items():
            assert (np.abs(np.asarray(updates[name][role])).max() > 0) == trained


def test_seeds_under_vmap(lib):
    x = lib.normal(0, N, 5, 4, 2)
    loss = lambda p, x: jnp.mean((strided(p, x) - 1.0) ** 2) + jnp.mean(jnp.tanh(convolved(x, p["conv"]["w"]) + p["conv"]["b"]) ** 2)  # noqa: E731
    seeds = [jax.tree.map(lambda p, k=k: p + 0.1 * k, strided_params(lib)) for k in range(2)]
    model = kfcore_jax.trace(loss, seeds[0], x)
    optimizer = kfcore_jax.optimizer(METHOD, model, learning_rate=0.05)

    def step(params, state):
        _, grads, records = model.value_grad_and_records(params, x)
        updates, state = optimizer.update(grads, state, params, records=records)
        return optax.apply_updates(params, updates), state

    def run(step, params, state):
        for _ in range(6):
            params, state = step(params, state)
        return params

    stack = jax.tree.map(lambda *p: jnp.stack(p), *seeds)
    together = run(jax.jit(jax.vmap(step)), stack, jax.vmap(optimizer.init)(stack))
    one = jax.jit(step)
    for k, params in enumerate(seeds):
        alone = run(one, params, optimizer.init(params))
        for x_, y_ in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert close(np.asarray(x_[k]), np.asarray(y_), 1e-10)


# ---- names, layouts and reports


def test_kernels_are_named_and_laid_out_as_in_pytorch(lib):
    params = {"conv": {"w": lib.normal(1, 3, 2, 2, 4), "b": lib.normal(2, 4)}, "first": lib.normal(3, 6, 2, 5, 1)}

    def loss(p, x):
        z = convolved(x, p["conv"]["w"], groups=2) + p["conv"]["b"]
        return jnp.mean(z**2) + jnp.mean(lax.conv(x, p["first"], (1, 1), "SAME") ** 2)

    model = kfcore_jax.trace(loss, params, lib.normal(0, N, 2, 5, 4), strict=True)
    arrays = model.named_arrays(params)
    assert {name: x.shape for name, x in arrays.items()} == {"conv.weight": (4, 2, 3, 2), "conv.bias": (4,), "first.weight": (6, 2, 5, 1)}
    np.testing.assert_array_equal(arrays["conv.weight"], np.asarray(params["conv"]["w"]).transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(arrays["first.weight"], params["first"])
    back = model.params_from({name: 2.0 * x for name, x in arrays.items()}, params)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2.0 * y), back, params)
    wrong = arrays | {"conv.weight": arrays["conv.weight"].transpose(2, 3, 1, 0)}
    with pytest.raises(ValueError, match=r"`arrays` must hold 'conv.weight' with shape \(4, 2, 3, 2\), got \(3, 2, 2, 4\)"):
        model.params_from(wrong, params)
    with pytest.raises(ValueError, match=r"`arrays` must hold 'conv.weight' with shape .*, got \(4,\)"):
        model.params_from(arrays | {"conv.weight": np.zeros(4)}, params)


def test_the_report_has_the_sizes_of_the_factors(lib):
    params, x = strided_params(lib), lib.normal(0, N, 6, 6, 2)
    optimizer = kfcore_jax.optimizer(kf.KFAC(), kfcore_jax.trace(strided, params, x))
    row = optimizer.report(params)["conv.weight"]
    assert (row.shape, row.factors, row.reason) == ((3, 3, 2, 4), (4, 19), "convolution: conv.w")
