"""Micro-batches: their records together are those of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfcore as kf
import kfcore_jax


def predict(params, x):
    return jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


def losses(params, x, y):
    return optax.losses.softmax_cross_entropy_with_integer_labels(predict(params, x), y)


LOSS = {"mean": lambda *args: losses(*args).mean(), "sum": lambda *args: losses(*args).sum()}


@pytest.fixture
def batch():
    rng = np.random.default_rng(3)
    params = {"a": {"kernel": rng.normal(size=(5, 6)), "bias": rng.normal(size=6)}, "b": {"kernel": rng.normal(size=(6, 3))}}
    return jax.tree.map(jnp.asarray, (params, rng.normal(size=(24, 5)), rng.integers(0, 3, 24)))


def update(reduction, model, params, grads, records, method=None):
    optimizer = kfcore_jax.optimizer(method or kf.KFAC(damping=0.1), model, loss_reduction=reduction)
    return optimizer.update(grads, optimizer.init(params), params, records=records)


def close(one, other, rtol=1e-12):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.allclose(a, b, rtol=rtol, atol=1e-12) for a, b in leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_unequal_micro_batches_are_the_whole_batch(batch, reduction):
    params, x, y = batch
    model = kfcore_jax.trace(LOSS[reduction], params, x, y)
    _, grads, records = model.value_grad_and_records(params, x, y)
    whole = update(reduction, model, params, grads, records)
    pieces = [model.value_grad_and_records(params, x[p], y[p])[2] for p in (slice(0, 4), slice(4, 14), slice(14, 24))]
    together = kfcore_jax.accumulate(pieces, loss_reduction=reduction)
    assert together.terms == 24
    assert close(update(reduction, model, params, grads, together), whole)
    wrong = kfcore_jax.accumulate(pieces, loss_reduction="sum" if reduction == "mean" else "mean")
    assert not close(update(reduction, model, params, grads, wrong), whole, 1e-2)


def test_records_stacked_by_a_scan_are_the_whole_batch(batch):
    params, x, y = batch
    model = kfcore_jax.trace(LOSS["mean"], params, x, y)
    _, grads, records = model.value_grad_and_records(params, x, y)
    whole = update("mean", model, params, grads, records)

    @jax.jit
    def step(params, x, y):
        def micro(total, xy):
            _, grads, records = model.value_grad_and_records(params, *xy)
            return jax.tree.map(lambda t, g: t + g / 4, total, grads), records

        start = jax.tree.map(jnp.zeros_like, params)
        grads, stacked = jax.lax.scan(micro, start, (x.reshape(4, 6, 5), y.reshape(4, 6)))
        return update("mean", model, params, grads, kfcore_jax.accumulate(stacked))

    assert close(step(params, x, y), whole)


def test_records_of_pulled_back_vectors_add_up(batch):
    params, x, y = batch
    method, loss = kf.KFAC(damping=0.1, fisher="exact"), kf.CrossEntropy()
    model = kfcore_jax.trace(LOSS["mean"], params, x, y)
    _, grads, _ = model.value_grad_and_records(params, x, y)
    whole = update("mean", model, params, grads, model.fisher_records(predict, method, loss, params, x), method)
    pieces = [model.fisher_records(predict, method, loss, params, x[p]) for p in (slice(0, 9), slice(9, 24))]
    together = kfcore_jax.accumulate(pieces, loss_reduction="sum")
    assert close(update("mean", model, params, grads, together, method), whole)


def test_micro_batches_of_images_may_differ_in_size():
    """Padding "SAME" at stride 2 pads odd and even images differently: each part is reduced as it was used."""
    rng = np.random.default_rng(5)
    params = {"conv": jnp.asarray(rng.normal(size=(3, 3, 2, 4))), "fc": jnp.asarray(rng.normal(size=(4, 3)))}

    def loss_fn(params, x, y):
        h = jax.lax.conv_general_dilated(x, params["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        z = jnp.tanh(h).mean(axis=(1, 2)) @ params["fc"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    batches = [(jnp.asarray(rng.normal(size=(n, s, s, 2))), jnp.asarray(rng.integers(0, 3, n))) for n, s in ((4, 6), (2, 7))]
    model = kfcore_jax.trace(loss_fn, params, *batches[0], strict=True)
    optimizer = kfcore_jax.optimizer(kf.KFAC(damping=0.1), model)
    results = [model.value_grad_and_records(params, *batch) for batch in batches]
    grads = jax.tree.map(lambda a, b: (4 * a + 2 * b) / 6, *(r[1] for r in results))
    _, state = optimizer.update(grads, optimizer.init(params), params, records=kfcore_jax.accumulate([r[2] for r in results]))
    patches = [
        jax.lax.conv_general_dilated_patches(x, (3, 3), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).reshape(-1, 18)
        for x, _ in batches
    ]
    rows = jnp.concatenate(patches)
    assert np.allclose(state.curvature.blocks["conv"].average.values[0], rows.T @ rows / len(rows), rtol=1e-12, atol=1e-13)


def test_wrong_calls(batch):
    params, x, y = batch
    model = kfcore_jax.trace(LOSS["mean"], params, x, y)
    _, _, records = model.value_grad_and_records(params, x, y)
    with pytest.raises(ValueError, match="`records` must hold those of one micro-batch at least"):
        kfcore_jax.accumulate([])
    with pytest.raises(ValueError, match="`records` must be stacked along a first axis of one length"):
        kfcore_jax.accumulate(kfcore_jax.Records({"a": [(jnp.zeros((2, 3, 1, 5)), jnp.zeros((4, 3, 1, 5)))]}, 3.0))
    with pytest.raises(ValueError, match="`records` must all be of one model"):
        kfcore_jax.accumulate([records, kfcore_jax.Records({"c": []}, 3.0)])
    with pytest.raises(ValueError, match="`loss_reduction` must be 'mean' or 'sum'"):
        kfcore_jax.accumulate([records], loss_reduction="none")
