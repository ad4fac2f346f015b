"""Learning rate, momentum and damping from the quadratic model, with products that JAX takes."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfcore as kf
import kfcore_jax
from kfcore_jax.objective import Objective

N = 16
RULE = kf.LevenbergMarquardt(0.5, every=2, factor=0.8, search_every=4)
METHOD = kf.KFAC(damping=RULE, refresh_every=4)
HOW = {"quadratic": kf.QuadraticModel(reject=True), "weight_decay": 0.01, "decay": "coupled"}


def initial():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "fc1": {"weight": jax.random.normal(keys[0], (4, 6)) / 2, "bias": jnp.zeros(6)},
        "fc2": {"weight": jax.random.normal(keys[1], (3, 6)) / 2, "bias": jnp.zeros(3)},
    }


def network(params, x):
    h = jnp.tanh(x @ params["fc1"]["weight"] + params["fc1"]["bias"])
    return h @ params["fc2"]["weight"].T + params["fc2"]["bias"]


def entropy(logits, labels):
    weights = jnp.asarray([1.0, 0.5, 2.0])[labels]
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, labels)) / jnp.sum(weights)


def loss(params, x, labels):
    return entropy(network(params, x), labels)


def data(step):
    x, y = jax.random.split(jax.random.key(100 + step))
    return jax.random.normal(x, (N, 4)), jax.random.randint(y, (N,), 0, 3)


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(True):
        return kfcore_jax.trace(loss, initial(), *data(0))


def one_step(model, optimizer):
    def step(carry, batch):
        params, state = carry
        x, labels = batch
        value, grads, records = model.value_grad_and_records(params, x, labels)
        halves = {"predict": lambda p: network(p, x), "loss_fn": lambda z: entropy(z, labels)}
        updates, state = optimizer.update(grads, state, params, records=records, **halves)
        return (optax.apply_updates(params, updates), state), value

    return step


def ggn(params, x, labels):
    """The exact matrix, and the flat vector of its rows with the way back."""
    flat, back = jax.flatten_util.ravel_pytree(params)
    outputs = network(params, x)
    jacobian = jax.jacobian(lambda v: network(back(v), x))(flat).reshape(outputs.size, -1)
    hessian = jax.hessian(lambda z: entropy(z.reshape(outputs.shape), labels))(outputs.ravel())
    return jacobian.T @ hessian @ jacobian, back, flat


def test_products_are_those_of_the_dense_matrix(model):
    """Whatever the outputs are a tree of, and the parameters besides."""
    params, (x, labels) = initial(), data(0)
    matrix, back, flat = ggn(params, x, labels)
    vectors = np.random.default_rng(0).normal(size=(2, len(flat)))
    of_core = [model.layout.flat(back(jnp.asarray(v))) for v in vectors]
    predict = lambda p: {"logits": network(p, x), "unused": x}  # noqa: E731
    counted = {**params, "calls": jnp.asarray(3)}
    objective = Objective(predict, lambda z: entropy(z["logits"], labels), model.layout, counted, lambda x: x)
    assert np.allclose(objective.gram(of_core), vectors @ matrix @ vectors.T, rtol=1e-11)
    assert objective.loss(None) == pytest.approx(float(loss(params, x, labels)), rel=1e-14)
    assert objective.loss(of_core[0]) == pytest.approx(float(loss(back(flat + vectors[0]), x, labels)), rel=1e-14)


def test_twenty_steps_are_those_of_arrays(model):
    """In a compiled loop, with search, rejection and decay; the products of the arrays are those of the dense matrix."""
    optimizer = kfcore_jax.optimizer(METHOD, model, **HOW)
    batches = [data(k) for k in range(20)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    carry = initial(), optimizer.init(initial())
    (params, state), _ = jax.jit(lambda c, b: jax.lax.scan(one_step(model, optimizer), c, b))(carry, stacked)

    host = kf.Optimizer(METHOD, {"fc1": kf.Linear(4, 6, layout="io"), "fc2": kf.Linear(6, 3)}, **HOW)
    own = jax.tree.map(np.asarray, initial())
    there = host.init(own)
    dense, call = jax.jit(lambda p, x, y: ggn(p, x, y)[0]), jax.jit(model.value_grad_and_records)
    _, back, _ = ggn(initial(), *batches[0])
    for x, labels in batches:
        _, grads, records = call(own, x, labels)
        taken = {name: tuple(np.asarray(a)[:, 0] for a in uses[0]) for name, uses in records.layers.items()}
        matrix = np.asarray(dense(own, x, labels))

        def product(v, matrix=matrix):
            return jax.tree.map(np.asarray, back(matrix @ jax.flatten_util.ravel_pytree(v)[0]))

        value = lambda p, x=x, labels=labels: float(loss(p, x, labels))  # noqa: E731
        own, there = host.step(own, jax.tree.map(np.asarray, grads), taken, there, terms=float(N), curvature_product=product, loss=value)
    for path, expected in jax.tree_util.tree_leaves_with_path(own):
        got = params[path[0].key][path[1].key]
        assert np.abs(got - expected).max() <= 1e-9 * np.abs(expected).max()
    for name, expected in there.step.control._asdict().items():
        assert float(getattr(state.step.control, name)) == pytest.approx(float(expected), rel=1e-8)
    assert float(state.step.control.damping) != RULE.initial
    assert optimizer.diagnostics(state)["steps"] == 20


def test_narrow_parameters_have_a_wide_model(model):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float64 else x, initial())
    optimizer = kfcore_jax.optimizer(METHOD, model, **HOW)
    x, labels = data(0)
    (moved, state), _ = jax.jit(one_step(model, optimizer))((params, optimizer.init(params)), (x.astype(jnp.bfloat16), labels))
    assert state.step.control.damping.dtype == jnp.float32
    assert moved["fc1"]["weight"].dtype == jnp.bfloat16
    assert 0 < float(state.step.control.learning_rate) < 10


def test_a_run_goes_on_from_a_file(model, tmp_path):
    optimizer = kfcore_jax.optimizer(METHOD, model, **HOW)
    step = jax.jit(one_step(model, optimizer))
    carry = initial(), optimizer.init(initial())
    for k in range(3):
        carry, _ = step(carry, data(k))
    optimizer.save(tmp_path / "run", carry[1])
    loaded = optimizer.load(tmp_path / "run", optimizer.init(initial()))
    (on, _), (again, _) = (step((carry[0], state), data(3))[0] for state in (carry[1], loaded))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(on), jax.tree.leaves(again), strict=True))


def test_wrong_calls_say_so(model):
    params, (x, labels) = initial(), data(0)
    _, grads, records = model.value_grad_and_records(params, x, labels)
    optimizer = kfcore_jax.optimizer(METHOD, model, **HOW)
    state = optimizer.init(params)
    predict, entropies = (lambda p: network(p, x)), (lambda z: entropy(z, labels))
    with pytest.raises(ValueError, match="`predict` must be given to `update`"):
        optimizer.update(grads, state, params, records=records, loss_fn=entropies)
    with pytest.raises(ValueError, match="`loss_fn` must be given to `update`"):
        optimizer.update(grads, state, params, records=records, predict=predict)
    with pytest.raises(ValueError, match="`loss_fn` must give a scalar"):
        optimizer.update(grads, state, params, records=records, predict=predict, loss_fn=lambda z: z)
    with pytest.raises(TypeError, match="`predict` must give arrays of real floating point"):
        optimizer.update(grads, state, params, records=records, predict=lambda p: labels, loss_fn=entropies)
    with pytest.raises(ValueError, match="`damping` is adaptive"):
        kfcore_jax.optimizer(METHOD, model)
    with pytest.raises(ValueError, match="`damping` is adaptive"):
        kfcore_jax.scale_by_curvature(METHOD, model)
    masked = optax.masked(optimizer, {"fc1": True, "fc2": False})
    with pytest.raises(ValueError, match=r"leave optax\.masked out"):
        masked.update(grads, masked.init(params), params, records=records, predict=predict, loss_fn=entropies)
