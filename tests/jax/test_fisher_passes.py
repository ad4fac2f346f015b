"""Fisher types other than the empirical one, against definitions computed by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfcore as kf
import kfcore_jax

PARAMS = {"weight": np.random.default_rng(0).normal(size=(3, 4)), "bias": np.zeros(4)}
X = np.random.default_rng(1).normal(size=(6, 3))
Y = np.arange(6) % 4


def predict(params, x):
    return x @ params["weight"] + params["bias"]


def loss(params, x, y):
    return optax.losses.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()


def trained(method, key=None, steps=1):
    """State after one update, for the parameters at hand."""
    params = jax.tree.map(jnp.asarray, {"fc": PARAMS})
    layered = lambda p, *a: loss(p["fc"], *a)  # noqa: E731
    model = kfcore_jax.trace(layered, params, X, Y)
    optimizer = kfcore_jax.optimizer(method, model, learning_rate=0.1)

    @jax.jit
    def step(params, state, key):
        _, grads, records = model.value_grad_and_records(params, X, Y)
        if method.fisher in ("mc", "exact"):
            network = lambda p, x: predict(p["fc"], x)  # noqa: E731
            records = model.fisher_records(network, method, kf.CrossEntropy(), params, X, key=key)
        return optimizer.update(grads, state, params, records=records)

    return step(params, optimizer.init(params), key)


def hessian_factor():
    """Mean of ``diag(p) - p p^T``: the output factor of a linear classifier."""
    p = np.exp(predict(PARAMS, X))
    p /= p.sum(axis=1, keepdims=True)
    return np.mean([np.diag(q) - np.outer(q, q) for q in p], axis=0)


def factors(state):
    return [None if v is None else np.asarray(v) for v in state.curvature.blocks["fc"].average.values]


def test_exact_is_the_generalised_gauss_newton_matrix():
    _, state = trained(kf.KFAC(fisher="exact"))
    a, g = factors(state)
    ones = np.concatenate([X, np.ones((6, 1))], axis=1)
    np.testing.assert_allclose(g, hessian_factor(), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(a, ones.T @ ones / 6, rtol=1e-10)
    assert np.abs(1.01 * g - hessian_factor()).max() > 1e-4


def test_monte_carlo_tends_to_it_and_follows_the_key():
    method = kf.KFAC(fisher="mc", mc_samples=4000)
    g = [factors(trained(method, jax.random.key(k))[1])[1] for k in (0, 0, 1)]
    np.testing.assert_array_equal(g[0], g[1])
    assert np.abs(g[0] - g[2]).max() > 0
    np.testing.assert_allclose(g[0], hessian_factor(), atol=0.03 * np.abs(hessian_factor()).max())


def test_forward_needs_no_output_gradients():
    method = kf.KFAC(fisher="forward")
    _, state = trained(method)
    a, g = factors(state)
    assert g is None
    np.testing.assert_allclose(a[:3, :3], X.T @ X / 6, rtol=1e-12)


def test_the_empirical_factor_is_that_of_the_examples():
    _, state = trained(kf.KFAC())
    per_example = jax.vmap(lambda x, y: jax.grad(lambda b: loss(PARAMS | {"bias": b}, x[None], y[None]))(jnp.zeros(4)))(X, Y)
    np.testing.assert_allclose(factors(state)[1], np.asarray(per_example.T @ per_example) / 6, rtol=1e-10, atol=1e-15)


def test_wrong_calls():
    params = jax.tree.map(jnp.asarray, PARAMS)
    model = kfcore_jax.trace(loss, params, X, Y)
    with pytest.raises(ValueError, match="fisher='mc' or 'exact'"):
        model.fisher_records(predict, kf.KFAC(), kf.CrossEntropy(), params, X)
    with pytest.raises(ValueError, match="`key` must be given"):
        model.fisher_records(predict, kf.KFAC(fisher="mc"), kf.CrossEntropy(), params, X)
