"""Settings shared by the tests of the JAX adapter."""

import importlib.util
import itertools
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


def _patches(x, use):
    """What every place of the output sees of ``x [N, *spatial, in]``, one kernel offset after the other: ``[*kernel, N, *spatial, in]``."""
    for axis, (dilation, (low, high)) in enumerate(zip(use.input_dilation, use.padding, strict=True), 1):
        spread = np.zeros((*x.shape[:axis], (x.shape[axis] - 1) * dilation + 1, *x.shape[axis + 1 :]))
        np.moveaxis(spread, axis, 0)[::dilation] = np.moveaxis(x, axis, 0)
        width = [(0, 0)] * x.ndim
        width[axis] = (max(low, 0), max(high, 0))
        x = np.moveaxis(np.pad(spread, width), axis, 0)
        x = np.moveaxis(x[max(-low, 0) : len(x) - max(-high, 0)], 0, axis)
    sizes = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(x.shape[1:-1], use.kernel, use.kernel_dilation, use.strides, strict=True)]
    seen = np.empty((*use.kernel, len(x), *sizes, x.shape[-1]))
    for offset in itertools.product(*map(range, use.kernel)):
        starts = [o * d for o, d in zip(offset, use.kernel_dilation, strict=True)]
        cut = [slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, use.strides, strict=True)]
        seen[offset] = x[(slice(None), *cut)]
    return seen


def _factors(use, inputs, grads, *, joint):
    """By group the mean of ``a a^T`` over patches, in the order of PyTorch, and the mean over the examples of the sum of ``g g^T``.

    Of arrays ``[N, *spatial, in]`` and ``[N, S, out]`` that a convolution has seen.
    """
    seen, grads = _patches(np.asarray(inputs), use), np.asarray(grads)
    count = len(use.kernel)
    rows = seen.reshape(*use.kernel, -1, use.groups, use.ins // use.groups)
    rows = rows.transpose(count + 1, count, count + 2, *range(count)).reshape(use.groups, -1, seen.size // grads[..., 0].size // use.groups)
    if joint:
        rows = np.concatenate([rows, np.ones((*rows.shape[:2], 1))], axis=2)
    right = grads.reshape(-1, use.groups, use.outs // use.groups)
    a, g = np.einsum("gni,gnj->gij", rows, rows) / rows.shape[1], np.einsum("ngi,ngj->gij", right, right) / len(grads)
    return (a, g) if use.groups > 1 else (a[0], g[0])


def _check_factors(layer, use, inputs, grads):
    """Compare the factors that the core finds for a layer with those of unfolded patches."""
    import kfcore as kf

    method, part = kf.KFAC(), layer.blocks()["" if layer.bias != "separate" else ".weight"]
    empty = method.init(part, np.zeros(()), part.stack)
    found = method.observe(empty, method.reduce(part, empty, np.asarray(inputs), np.asarray(grads))).average.values
    for x, y in zip(found, _factors(use, inputs, grads, joint=layer.bias == "joint"), strict=True):
        assert x.shape == y.shape
        assert np.abs(x - y).max() <= 1e-10 * np.abs(y).max()
        assert np.abs(1.01 * x - y).max() > 5e-3 * np.abs(y).max()


@pytest.fixture(scope="session")
def lib():
    """The helpers of this file."""
    helpers = {"normal": _normal, "moved": _moved, "captured": _captured}
    return SimpleNamespace(**helpers, patches=_patches, factors=_factors, check_factors=_check_factors)
