"""Settings shared by the tests of the JAX adapter."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

collect_ignore_glob = [] if importlib.util.find_spec("jax") and importlib.util.find_spec("optax") else ["*"]


@pytest.fixture(autouse=True)
def _settings():
    """Float64, and programs compiled with little effort: they run a few times on a few numbers."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_enable_x64", before)
    jax.config.update("jax_disable_most_optimizations", False)


def _normal(seed, *shape):
    import jax

    return jax.random.normal(jax.random.key(seed), shape, "float64")


def _moved(tree):
    """Parameters in float64, and away from the zeros and ones that libraries start with; integers as they are."""
    import jax
    import jax.numpy as jnp

    leaves, structure = jax.tree.flatten(tree)
    moved = [x + 0.1 * _normal(i, *x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else x for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


def _captured(loss, params, *args, rtol=1e-9):
    """Model and records of everything that is captured, once the gradients rebuilt from them were found to be autodiff's."""
    import jax

    import kfcore_jax

    model = kfcore_jax.trace(loss, params, *args)
    value, grads, records = jax.jit(model.capture)(params, *args)
    expected = jax.jit(jax.value_and_grad(loss))(params, *args)
    for x, y in zip(jax.tree.leaves((value, grads)), jax.tree.leaves(expected), strict=True):
        assert np.abs(x - y).max() <= 1e-9 * max(np.abs(y).max(), 1e-3)
    deviations = model.check_capture(params, *args, rtol=rtol)
    assert deviations.keys() == records.layers.keys() == model.layout.sites.keys()
    assert model.value_grad_and_records(params, *args)[2].layers.keys() == model.layers.keys()
    return model, records


@pytest.fixture(scope="session")
def lib():
    """The helpers of this file."""
    return SimpleNamespace(normal=_normal, moved=_moved, captured=_captured)
