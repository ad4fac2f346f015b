"""Steps with blocks of tables and normalisations: exact curvature, the trajectory of plain arrays, micro-batches, masks, files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import kfcore as kf
import kfcore_jax

N, S, V, C = 6, 3, 7, 4
EPS = 1e-3


def initial():
    rng = np.random.default_rng(0)
    shapes = {"embed": (V, C), "norm": {"scale": (C,), "bias": (C,)}, "out": (C, V)}
    shift = {"embed": 0.0, "norm": {"scale": 1.0, "bias": 0.0}, "out": 0.0}
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda shape, mean: jnp.asarray(mean + 0.5 * rng.normal(size=shape)), shapes, shift, is_leaf=is_shape)


def batch(step, n=N):
    rng = np.random.default_rng(10 + step)
    return jnp.asarray(rng.integers(-1, V, (n, S))), jnp.asarray(rng.integers(V, size=(n, S)))


def predict(p, t):
    """A token of -1 has no row. Scale and shift of the normalisation are applied at two places, as Flax does."""
    x = p["embed"].at[jnp.where(t < 0, V, t)].get(mode="fill", fill_value=0.3)
    x = jnp.tanh(x) + jnp.arange(C) / C
    x = x - x.mean(-1, keepdims=True)
    return (x * (lax.rsqrt((x**2).mean(-1, keepdims=True) + EPS) * p["norm"]["scale"]) + p["norm"]["bias"]) @ p["out"]


def loss(p, t, y):
    return optax.losses.softmax_cross_entropy_with_integer_labels(predict(p, t), y).mean()


LAYERS = {"embed": kf.Embedding(V, C, padding=V), "norm": kf.Norm(C), "out": kf.Linear(C, V, None, layout="io")}


def trace(**options):
    return kfcore_jax.trace(loss, initial(), *batch(0), **options)


def gap(x, y):
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


class Arrays:
    """The same network on NumPy arrays, with the normalised activations for inputs of the normalisation, as PyTorch captures them."""

    def __init__(self, method, norm):
        layers = LAYERS | {"norm": kf.Norm(C, block=norm)}
        self.optimizer = kf.Optimizer(method, layers, learning_rate=0.3)
        p = jax.tree.map(np.array, initial())
        norm = {"weight": p["norm"]["scale"], "bias": p["norm"]["bias"]}
        self.params = {"embed": {"weight": p["embed"]}, "norm": norm, "out": {"weight": p["out"]}}
        self.state = self.optimizer.init(self.params)

    def step(self, t, y):
        p, t = self.params, np.where(np.asarray(t) < 0, V, np.asarray(t))
        table = np.vstack([p["embed"]["weight"], np.full(C, 0.3)])
        h = np.tanh(table[t])
        x = h + np.arange(C) / C
        x = x - x.mean(-1, keepdims=True)
        std = np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
        hat = x / std
        z = hat * p["norm"]["weight"] + p["norm"]["bias"]
        logits = z @ p["out"]["weight"]
        e = np.exp(logits - logits.max(-1, keepdims=True))
        d = (e / e.sum(-1, keepdims=True) - np.eye(V)[np.asarray(y)]) / y.size
        dz = d @ p["out"]["weight"].T
        dhat = dz * p["norm"]["weight"]
        dx = (dhat - hat * (dhat * hat).mean(-1, keepdims=True)) / std
        dx = (dx - dx.mean(-1, keepdims=True)) * (1 - h**2)
        grads = {
            "embed": {"weight": np.stack([dx[t == v].sum(0) for v in range(V)])},
            "norm": {"weight": (dz * hat).sum((0, 1)), "bias": dz.sum((0, 1))},
            "out": {"weight": np.einsum("nsi,nsj->ij", z, d)},
        }
        records = {"embed": (t, dx), "norm": (hat, dz), "out": (z, d)}
        self.params, self.state = self.optimizer.step(p, grads, records, self.state, terms=y.size)


def stepper(method, model, **options):
    optimizer = kfcore_jax.optimizer(method, model, learning_rate=0.3, **options)

    @jax.jit
    def step(params, state, t, y):
        _, grads, records = model.value_grad_and_records(params, t, y)
        updates, state = optimizer.update(grads, state, params, records=records)
        return optax.apply_updates(params, updates), state

    return optimizer, step


@pytest.mark.parametrize(("norm", "kind"), [("diagonal", "factored"), ("full", "exact")])
def test_the_trajectory_and_the_file_are_those_of_plain_arrays(norm, kind, tmp_path):
    method = kf.KFAC(damping=kf.Damping(0.1, kind), stats_every=2, refresh_every=4)
    arrays, model = Arrays(method, norm), trace(norm=norm)
    assert model.layers == LAYERS | {"norm": kf.Norm(C, block=norm)}
    optimizer, step = stepper(method, model)
    params = initial()
    state = optimizer.init(params)
    for k in range(20):
        params, state = step(params, state, *batch(k))
        arrays.step(*batch(k))
        if k == 9:
            optimizer.save(tmp_path / "state.safetensors", state)
    assert gap(model.named_arrays(params), {f"{n}.{role}": x for n, p in arrays.params.items() for role, x in _files(n, p).items()}) < 1e-10
    assert gap(params, initial()) > 0.1
    again = Arrays(method, norm)
    for k in range(10):
        again.step(*batch(k))
    again.state = kf.load(tmp_path / "state.safetensors", again.optimizer.bind(again.params), again.state)
    for k in range(10, 20):
        again.step(*batch(k))
    assert gap(again.params, arrays.params) < 1e-10


def _files(name, parameters):
    """In the layout of files: a table as it is, a weight ``[out, in]``."""
    return {role: x.T if name == "out" else x for role, x in parameters.items()}


def test_named_arrays_come_back():
    model, params = trace(), initial()
    arrays = model.named_arrays(params)
    assert {name: x.shape for name, x in arrays.items()} == {
        "embed.weight": (V, C),
        "norm.weight": (C,),
        "norm.bias": (C,),
        "out.weight": (V, C),
    }
    double = model.params_from({name: 2 * x for name, x in arrays.items()}, params)
    assert gap(double, jax.tree.map(lambda x: 2 * x, params)) == 0


# ---- the generalised Gauss-Newton matrix


def ggn(p, t, name):
    """The block of some parameters: second moment of the vectors pulled back, of each example at all its positions at once."""
    out = predict(p, t)
    vectors = jnp.stack(list(kf.fisher_vectors("exact", kf.CrossEntropy(), out, None)))
    tree = jax.jacobian(lambda part: predict(p | {name: part}, t))(p[name])
    leaves = [tree["scale"], tree["bias"]] if name == "norm" else [jnp.swapaxes(tree, -1, -2)]
    j = jnp.concatenate([leaf.reshape(*out.shape, -1) for leaf in leaves], -1)
    rows = jnp.einsum("nsai,cnsa->cni", j, vectors)
    return jnp.einsum("cni,cnj->ij", rows, rows) / t.size


def curvature(model, t, fisher="exact"):
    """Dense blocks after one batch."""
    p, method = initial(), kf.KFAC(fisher=fisher)
    optimizer = kfcore_jax.optimizer(method, model)

    def run(p, t):
        records = model.fisher_records(predict, method, kf.CrossEntropy(), p, t)
        _, state = optimizer.update(p, optimizer.init(p), p, records=records)
        return optimizer.core.bind(p)[1].preconditioner.dense(state.curvature)

    return jax.tree.map(np.asarray, jax.jit(run)(p, t))


@pytest.mark.parametrize("norm", ["full", "diagonal"])
def test_a_norm_has_the_exact_matrix_and_its_diagonal(norm):
    t = batch(0)[0]
    exact = np.asarray(jax.jit(ggn, static_argnums=2)(initial(), t, "norm"))
    exact = exact if norm == "full" else np.diag(np.diag(exact))
    found = curvature(trace(norm=norm), t)["norm"]
    assert np.abs(found - exact).max() < 1e-12 * np.abs(exact).max()
    assert np.abs(1.01 * found - exact).max() > 1e-3 * np.abs(exact).max()


def test_a_table_has_the_exact_matrix_for_one_token():
    t = jnp.asarray([[2]])
    exact, found = np.asarray(jax.jit(ggn, static_argnums=2)(initial(), t, "embed")), curvature(trace(), t)["embed"]
    assert np.abs(found - exact).max() < 1e-12 * np.abs(exact).max()


# ---- what the statistics are made of


def test_a_scale_of_the_logits_does_not_tell_the_number_of_terms():
    params, data = initial() | {"temperature": jnp.asarray(2.0)}, batch(0)

    def scaled(p, t, y):
        logits = predict(p, t) * p["temperature"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    model = kfcore_jax.trace(scaled, params, *data)
    assert model.layers == LAYERS | {"temperature": kf.Norm(1, bias=False)}
    assert jax.eval_shape(model.value_grad_and_records, params, *data)[2].terms == N * S


def test_unequal_micro_batches_are_the_whole_batch():
    model, params, (t, y) = trace(norm="full"), initial(), batch(0, 8)
    optimizer = kfcore_jax.optimizer(kf.KFAC(damping=0.1), model)

    @jax.jit
    def updates(params, state):
        _, grads, records = model.value_grad_and_records(params, t, y)
        pieces = [model.value_grad_and_records(params, t[p], y[p])[2] for p in (slice(0, 2), slice(2, 8))]
        every = (records, kfcore_jax.accumulate(pieces), kfcore_jax.accumulate(pieces, loss_reduction="sum"))
        return [optimizer.update(grads, state, params, records=one)[0] for one in every]

    whole, together, wrong = updates(params, optimizer.init(params))
    assert gap(together, whole) < 1e-11
    assert gap(wrong, whole) > 1e-2


@pytest.mark.parametrize("trained", [{"norm": {"scale": True, "bias": False}}, {"norm": {"scale": False, "bias": True}, "embed": False}])
def test_masks(trained):
    """What is masked is out of the blocks; the others' blocks are what they were."""
    model, params, data = trace(norm="full"), initial(), batch(0)
    mask = {"embed": True, "norm": {"scale": True, "bias": True}, "out": True} | trained
    optimizer = kfcore_jax.optimizer(kf.KFAC(damping=0.1), model)
    masked = optax.masked(optimizer, mask)

    @jax.jit
    def both(params):
        _, grads, records = model.value_grad_and_records(params, *data)
        return [o.update(grads, o.init(params), params, records=records)[1] for o in (masked, optimizer)]

    state, whole = both(params)
    blocks, expected = state.inner_state.curvature.blocks, whole.curvature.blocks
    assert ("embed" in blocks) == mask["embed"]
    assert ("norm.bias" in blocks) == (mask["norm"] == {"scale": False, "bias": True})
    if "norm" in blocks:
        size = C * sum(mask["norm"].values())
        np.testing.assert_allclose(blocks["norm"].average.values[1], expected["norm"].average.values[1][:size, :size], rtol=1e-12)
    assert gap(blocks["out"].average.values, expected["out"].average.values) < 1e-12


def test_the_rows_of_a_small_batch_are_taken_only_for_matrices():
    """One example with one position: fewer rows than any layer has features."""
    model, params = trace(), initial()
    data = [x[:1, :1] for x in batch(2)]
    optimizer, step = stepper(kf.KFAC(damping=0.1), model)
    layout, core = optimizer.core.bind(params)

    def rows(params):
        _, grads, records = model.value_grad_and_records(params, *data)
        return optimizer.core._rows(layout, core, optimizer.init(params), records, grads)

    assert jax.eval_shape(rows, params).keys() == {"out"}
    arrays = Arrays(kf.KFAC(damping=0.1), "diagonal")
    arrays.step(*data)
    moved, _ = step(params, optimizer.init(params), *data)
    assert gap(model.named_arrays(moved), {f"{n}.{role}": x for n, p in arrays.params.items() for role, x in _files(n, p).items()}) < 1e-11
