"""Settings shared by the tests of the JAX adapter."""

import pytest

jax = pytest.importorskip("jax")


@pytest.fixture(autouse=True)
def _settings():
    """Float64, and programs compiled with little effort: they run a few times on a few numbers."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_enable_x64", before)
    jax.config.update("jax_disable_most_optimizations", False)
