"""The transformations keep optax's habits: chain, schedules, wrappers, jit, scan, vmap, donation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfcore as kf
import kfcore_jax

METHOD = kf.KFAC(damping=0.05, stats_every=2, refresh_every=3)


def initial(seed=0, dtype=jnp.float64):
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "fc1": {"weight": jax.random.normal(a, (4, 6), dtype) / 2, "bias": jnp.zeros(6, dtype)},
        "fc2": {"weight": jax.random.normal(b, (3, 6), dtype) / 2, "bias": jnp.zeros(3, dtype)},
        "scale": jnp.ones(3, dtype),
    }


def loss(params, x, y):
    h = jnp.tanh(x @ params["fc1"]["weight"] + params["fc1"]["bias"])
    z = (h @ params["fc2"]["weight"].T + params["fc2"]["bias"]) * params["scale"]
    return jnp.mean((z - y) ** 2)


def data(step, n=16, dtype=jnp.float64):
    a, b = jax.random.split(jax.random.key(1000 + step))
    return jax.random.normal(a, (n, 4), dtype), jax.random.normal(b, (n, 3), dtype)


MODEL = kfcore_jax.trace(loss, *jax.eval_shape(lambda: (initial(dtype=jnp.float32), *data(0, dtype=jnp.float32))), loss=kf.MSE())


def vector(params):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(params)])


def gap(x, y):
    return np.abs(vector(x) - vector(y)).max() / np.abs(vector(y)).max()


def stepper(optimizer, counts=None):
    """One step of training, to be jitted."""

    def step(params, state, x, y):
        if counts is not None:
            counts.append(1)
        value, grads, records = MODEL.value_grad_and_records(params, x, y)
        updates, state = optimizer.update(grads, state, params, records=records)
        return optax.apply_updates(params, updates), state, value

    return step


def train(optimizer, steps=12, params=None, seed=0):
    params = initial(seed) if params is None else params
    state, step = optimizer.init(params), jax.jit(stepper(optimizer))
    for k in range(steps):
        params, state, _ = step(params, state, *data(k))
    return params, state


def test_terms_of_a_loss_that_compares_numbers():
    _, _, records = MODEL.value_grad_and_records(initial(), *data(0, n=16))
    assert records.terms == 48.0


def test_a_chain_is_the_ready_made_optimizer():
    chain = optax.chain(
        kfcore_jax.scale_by_curvature(METHOD, MODEL), optax.trace(0.9), optax.add_decayed_weights(0.02), optax.scale_by_learning_rate(0.05)
    )
    ready = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05, momentum=0.9, weight_decay=0.02)
    assert gap(train(chain)[0], train(ready)[0]) <= 1e-12


def test_eager_and_jitted_steps_agree():
    optimizer = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05, clip=1e-2)
    params, state, step = initial(), optimizer.init(initial()), stepper(optimizer)
    for k in range(5):
        params, state, _ = step(params, state, *data(k))
    assert gap(params, train(optimizer, 5)[0]) <= 1e-12


def test_a_run_inside_scan_with_one_trace():
    optimizer, traced = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=optax.linear_schedule(0.1, 0.01, 10)), []
    step = stepper(optimizer, traced)
    batches = jax.tree.map(lambda *x: jnp.stack(x), *[data(k) for k in range(12)])

    @jax.jit
    def run(params, state):
        return jax.lax.scan(lambda carry, batch: (step(*carry, *batch)[:2], None), (params, state), batches)[0]

    params, _ = run(initial(), optimizer.init(initial()))
    assert gap(params, train(optimizer)[0]) <= 1e-12
    assert len(traced) == 1


def test_one_compilation_for_a_run_with_donated_buffers():
    optimizer, traced = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05), []
    step = jax.jit(stepper(optimizer, traced), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, initial())
    state = optimizer.init(params)
    for k in range(12):
        params, state, _ = step(params, state, *data(k))
    assert len(traced) == 1
    assert step._cache_size() == 1, "an array that is bound to a device compiles the program anew"
    assert gap(params, train(optimizer)[0]) <= 1e-12


def test_seeds_under_vmap():
    optimizer = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05, clip=1e-2)
    params = jax.tree.map(lambda *x: jnp.stack(x), initial(0), initial(1))
    state = jax.vmap(optimizer.init)(params)
    step = jax.jit(jax.vmap(stepper(optimizer), in_axes=(0, 0, None, None)))
    for k in range(12):
        params, state, _ = step(params, state, *data(k))
    for seed in (0, 1):
        assert gap(jax.tree.map(lambda x, s=seed: x[s], params), train(optimizer, seed=seed)[0]) <= 1e-10


def test_under_vmap_a_refresh_is_made_only_when_due():
    optimizer = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05)
    params = jax.tree.map(lambda *x: jnp.stack(x), initial(0), initial(1))
    state = jax.vmap(optimizer.init)(params)
    program = str(jax.make_jaxpr(jax.vmap(stepper(optimizer), in_axes=(0, 0, None, None)))(params, state, *data(0)))
    before_branches = program.split("cond[")[0]
    assert "cond[" in program
    assert "cholesky" not in before_branches


def test_injected_hyperparameters():
    make = optax.inject_hyperparams(kfcore_jax.optimizer, static_args=("method", "model"))
    injected = make(method=METHOD, model=MODEL, learning_rate=0.05, momentum=0.9, damping=0.05, weight_decay=0.02)
    plain = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05, momentum=0.9, weight_decay=0.02)
    params, state = train(injected)
    assert gap(params, train(plain)[0]) <= 1e-6  # injected numbers are float32
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    step = jax.jit(stepper(injected))
    moved, _, _ = step(params, state, *data(0))
    np.testing.assert_array_equal(vector(moved), vector(params))


def test_multi_steps_takes_the_mean_gradient():
    inner = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05)
    optimizer = optax.MultiSteps(inner, every_k_schedule=2)
    params, state = initial(), optimizer.init(initial())
    step = jax.jit(stepper(optimizer))
    for _ in range(6):
        for _ in range(2):  # the same batch twice: its mean is the batch
            params, state, _ = step(params, state, *data(0))
    expected, other, once = initial(), inner.init(initial()), jax.jit(stepper(inner))
    for _ in range(6):
        expected, other, _ = once(expected, other, *data(0))
    assert gap(params, expected) <= 1e-7  # its weights of a mean are float32


def test_masked_trains_the_rest_of_the_model():
    mask = {"fc1": {"weight": True, "bias": True}, "fc2": {"weight": False, "bias": False}, "scale": True}
    optimizer = optax.chain(
        optax.masked(kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05), mask),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda m: not m, mask)),
    )
    params, state = train(optimizer)
    np.testing.assert_array_equal(np.asarray(params["fc2"]["weight"]), np.asarray(initial()["fc2"]["weight"]))
    assert gap(params["fc1"], initial()["fc1"]) > 1e-2
    assert set(state[0].inner_state.curvature.blocks) == {"fc1", "scale"}


def test_half_a_layer_under_a_mask():
    mask = {"fc1": {"weight": True, "bias": False}, "fc2": {"weight": False, "bias": True}, "scale": False}
    inner = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05)
    optimizer = optax.chain(optax.masked(inner, mask), optax.masked(optax.set_to_zero(), jax.tree.map(lambda m: not m, mask)))
    params, state = train(optimizer)
    blocks = state[0].inner_state.curvature.blocks
    assert set(blocks) == {"fc1", "fc2.bias"}
    assert blocks["fc1"].average.values[0].shape == (4, 4), "no column for a bias that is not trained"
    np.testing.assert_array_equal(np.asarray(params["fc1"]["bias"]), 0.0)


def test_multi_transform_gives_each_part_its_own():
    labels = {"fc1": {"weight": "kfac", "bias": "kfac"}, "fc2": {"weight": "kfac", "bias": "kfac"}, "scale": "sgd"}
    optimizer = optax.multi_transform({"kfac": kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05), "sgd": optax.sgd(0.1)}, labels)
    params, _ = train(optimizer, 1)
    grads = jax.grad(loss)(initial(), *data(0))
    np.testing.assert_allclose(np.asarray(params["scale"]), 1.0 - 0.1 * np.asarray(grads["scale"]), rtol=1e-12)
    assert gap(params["fc1"], initial()["fc1"]) > 1e-3


def test_state_names_do_not_collide():
    optimizer = optax.chain(optax.scale_by_adam(), kfcore_jax.scale_by_curvature(METHOD, MODEL))
    assert int(optax.tree.get(optimizer.init(initial()), "count")) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("x64", [False, True])
def test_narrow_models_have_wide_state(dtype, x64):
    jax.config.update("jax_enable_x64", x64)
    params = initial(dtype=dtype)
    optimizer = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05)
    state, step = optimizer.init(params), jax.jit(stepper(optimizer))
    first = float(loss(params, *data(0, dtype=dtype)))
    for _ in range(20):
        params, state, value = step(params, state, *data(0, dtype=dtype))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert float(value) < 0.8 * first


def test_orbax_round_trip(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    optimizer = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05)
    params, state = train(optimizer, 5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", state)
    assert isinstance(back, type(state))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    step = jax.jit(stepper(optimizer))
    assert gap(step(params, back, *data(5))[0], step(params, state, *data(5))[0]) == 0.0


def test_a_batch_with_nan_is_skipped_and_counted():
    optimizer = kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05)
    params, state = train(optimizer, 4)
    x, y = data(0)
    broken, state, _ = jax.jit(stepper(optimizer))(params, state, x.at[0, 0].set(jnp.nan), y)
    np.testing.assert_array_equal(vector(broken), vector(params))
    found = optimizer.diagnostics(state)
    assert found["skipped_steps"] == 1
    assert found["dropped_statistics"] == {"fc1": 1, "fc2": 1, "scale": 1}


def test_wrong_calls():
    optimizer = kfcore_jax.optimizer(METHOD, MODEL)
    params = initial()
    state = optimizer.init(params)
    _, grads, records = MODEL.value_grad_and_records(params, *data(0))
    with pytest.raises(ValueError, match="`records` must be given"):
        optimizer.update(grads, state, params)
    with pytest.raises(TypeError, match=r"must be kfcore_jax\.Records"):
        optimizer.update(grads, state, params, records={})
    fewer = kfcore_jax.Records({"fc1": records.layers["fc1"]}, 16.0)
    with pytest.raises(ValueError, match="lack the layers fc2, scale"):
        optimizer.update(grads, state, params, records=fewer)
    with pytest.raises(ValueError, match="of another model"):
        optimizer.update(grads, optax.sgd(0.1).init(params), params, records=records)
    with pytest.raises(ValueError, match="`params` must be those of the traced model"):
        optimizer.init({"other": jnp.ones(3)})
    with pytest.raises(ValueError, match="not that of the traced model"):
        optimizer.init(params | {"scale": jnp.ones(4)})
    with pytest.raises(ValueError, match="weight decay"):
        kfcore_jax.optimizer(METHOD, MODEL, weight_decay=0.1).update(grads, state, records=records)
    with pytest.raises(ValueError, match="`damping` must be positive"):
        kfcore_jax.optimizer(METHOD, MODEL, damping=-1.0)
    with pytest.raises(TypeError, match=r"kfcore_jax\.trace"):
        kfcore_jax.optimizer(METHOD, loss)
    with pytest.raises(TypeError, match="take it out of the chain's"):
        optimizer.diagnostics(optax.chain(optimizer).init(params))
