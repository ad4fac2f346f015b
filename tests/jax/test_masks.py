"""Masked positions are as if they had not been there: the same statistics as from examples that are shorter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfcore as kf
import kfcore_jax

N, S, V, D, C = 6, 4, 5, 4, 3
LOSS = kf.CrossEntropy()
LENGTHS = (4, 2, 2, 4, 4, 2)


def initial():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (V, D), "scale": (D,), "shift": (D,), "w": (2, D, D), "b": (2, D), "pooled": (D, 2), "head": (D, C)}
    return {name: jnp.asarray(0.5 * rng.normal(size=shape) + (name == "scale")) for name, shape in shapes.items()}


def predict(p, t, mask):
    """A table, stacked layers, a normalisation, a layer that sees every example once, and attention to real positions."""
    h, _ = jax.lax.scan(lambda h, q: (h + jnp.tanh(h @ q[0] + q[1]), None), p["embedding"][t], (p["w"], p["b"]))
    weights = jax.nn.softmax(jnp.where(mask[:, None, :], h @ h.mT, -jnp.inf))
    gate = jnp.tanh(jnp.where(mask[..., None], h, 0).sum(1) @ p["pooled"]).sum(-1)
    h = h + gate[:, None, None] * (weights @ h)
    return (h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-3) * p["scale"] + p["shift"]) @ p["head"]


def loss(p, t, y, mask):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(predict(p, t, mask), y)
    return jnp.where(mask, losses, 0).sum() / mask.sum()


def batch():
    rng = np.random.default_rng(1)
    mask = np.arange(S) < np.array(LENGTHS)[:, None]
    return jnp.asarray(rng.integers(V, size=(N, S))), jnp.asarray(rng.integers(C, size=(N, S))), jnp.asarray(mask)


def gap(x, y):
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


@pytest.mark.parametrize("method", [kf.EKFAC(damping=0.1), kf.EKFAC(damping=0.1, fisher="exact")], ids=["empirical", "exact"])
def test_a_mask_is_deletion(method):
    params, (t, y, mask) = initial(), batch()
    model = kfcore_jax.trace(loss, params, t, y, mask)
    assert len(model.layers) == 5
    optimizer = kfcore_jax.optimizer(method, model)

    def records_of(t, y, mask, use):
        if method.fisher == "exact":
            return model.fisher_records(lambda p, t: predict(p, t, mask), method, LOSS, params, t, mask=use)
        return model.value_grad_and_records(params, t, y, mask, mask=use)[2]

    def observed(state, records):
        state = optimizer.update(params, state, params, records=records)[1]
        blocks = {n: b for n, b in state.curvature.blocks.items() if hasattr(b, "scales")}
        return state, {n: (b.average.values, b.scales.values) for n, b in blocks.items()}, jnp.asarray(records.terms)

    @jax.jit
    def masked(state, use):
        records = records_of(t, y, mask, use)
        assert records.masks.keys() == model.layers.keys() - {"pooled"}
        return observed(state, records)

    @jax.jit
    def others(state):
        """Examples of their own length, two micro-batches with masks."""
        pieces, kind = [], "mean" if method.fisher == "empirical" else "sum"
        for length in sorted(set(LENGTHS)):
            rows = np.flatnonzero(np.array(LENGTHS) == length)
            pieces.append(records_of(t[rows, :length], y[rows, :length], jnp.ones((len(rows), length), bool), None))
        parts = [records_of(t[s], y[s], mask[s], mask[s]) for s in (slice(0, 2), slice(2, 6))]
        return [observed(state, kfcore_jax.accumulate(each, loss_reduction=kind))[1:] for each in (pieces, parts)]

    state = masked(optimizer.init(params), mask)[0]  # from here on scales are measured
    _, found, terms = masked(state, mask)
    assert float(terms) == sum(LENGTHS)
    for expected, n in others(state):
        assert float(n) == sum(LENGTHS)
        assert gap(found, expected) < 1e-12
    _, whole, terms = masked(state, jnp.ones_like(mask))
    assert float(terms) == N * S
    assert gap(whole, found) > 1e-2


def test_rows_of_masked_layers_are_not_taken_for_the_gradient():
    """The gradient has a part at positions that are masked for the statistics alone."""
    rng = np.random.default_rng(2)
    params = {"w": jnp.asarray(rng.normal(size=(40, 30)))}
    x = jnp.asarray(rng.normal(size=(2, 2, 40)))
    mask = jnp.asarray([[True, False], [True, True]])
    model = kfcore_jax.trace(lambda p, x: jnp.mean((x @ p["w"]) ** 2), params, x, loss=kf.MSE())
    optimizer = kfcore_jax.optimizer(kf.KFAC(damping=0.1), model)

    @jax.jit
    def run(params):
        _, grads, records = model.value_grad_and_records(params, x, mask=mask)
        known, _ = optimizer.update(grads, optimizer.init(params), params, records=records)
        changed, _ = optimizer.update({"w": 1.0 * grads["w"]}, optimizer.init(params), params, records=records)
        return known, changed, records.terms

    known, changed, terms = run(params)
    assert gap(known, changed) < 1e-10
    assert float(terms) == 90


def test_wrong_masks_are_refused():
    params, (t, y, mask) = initial(), batch()
    model = kfcore_jax.trace(loss, params, t, y, mask)
    given = [(mask[:, :3], r"got \(6, 3\), which none does"), (mask.astype(float), "must be boolean"), (mask[0], "must be boolean")]
    for wrong, message in given:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda p, wrong=wrong: model.value_grad_and_records(p, t, y, mask, mask=wrong), params)
