"""Kernels beyond the sizes of the conformance suite."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfcore import linalg
from kfcore._array import namespace
from kfcore_jax import kernels


@pytest.mark.parametrize(("n", "leading"), [(5, ()), (8, (2,)), (13, (2, 3)), (33, ())])
def test_an_inverse_built_from_halves_is_the_inverse(monkeypatch, n, leading):
    monkeypatch.setattr(kernels, "WIDE", 4)
    rng = np.random.default_rng(n)
    x = rng.normal(size=(*leading, n, 2 * n))
    x = x @ np.swapaxes(x, -1, -2) / n
    inverse, ok = jax.jit(lambda x: kernels.invert(jnp, x))(jnp.asarray(x))
    assert np.allclose(np.asarray(inverse) @ x, np.eye(n), atol=1e-10)
    assert np.allclose(inverse, np.swapaxes(inverse, -1, -2), rtol=0, atol=1e-14 * np.abs(inverse).max())
    assert np.asarray(ok).all()
    assert ok.shape == leading


def test_a_matrix_that_is_not_definite_is_refused_wherever_its_fault_lies(monkeypatch):
    monkeypatch.setattr(kernels, "WIDE", 4)
    good = np.eye(13)
    faults = [good]
    for at in (0, 5, 12):
        bad = good.copy()
        bad[at, at] = -1.0
        faults.append(bad)
    faults.append(good * np.nan)
    _, ok = kernels.invert(jnp, jnp.asarray(np.stack(faults)))
    assert ok.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(("n", "leading"), [(5, ()), (8, (2,)), (13, (2, 3))])
def test_a_moment_built_from_halves_is_the_moment(monkeypatch, n, leading):
    monkeypatch.setattr(kernels, "WIDE", 4)
    x = np.random.default_rng(n).normal(size=(*leading, 3, n))
    moment = jax.jit(lambda x: kernels.gram(jnp, x))(jnp.asarray(x))
    assert np.allclose(moment, np.swapaxes(x, -1, -2) @ x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("verb", ["invert_all", "eigh_all"])
def test_lapack_takes_one_matrix_at_a_time(verb):
    """Batched calls of LAPACK that run side by side can wait for each other for good on a CPU."""
    matrices = [jnp.stack([2.0 * jnp.eye(n) + 0.01] * b) for n, b in ((5, 2), (7, 3), (7, 1))] + [jnp.eye(5), jnp.ones((2, 2, 3, 3))]
    program = jax.jit(lambda xs: getattr(linalg, verb)(namespace(xs[0]), xs))
    calls = [line for line in program.lower(matrices).compile().as_text().splitlines() if "lapack" in line and "custom-call" in line]
    assert calls
    stacked = [line for line in calls if re.search(r"f64\[(?!1,)\d+,\d+,\d+\]", line)]
    assert not stacked, stacked[0]
