"""Settings shared by the tests of the JAX adapter."""

import importlib.util

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
