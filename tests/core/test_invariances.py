"""What must not matter does not matter: copies, order, loss reduction, scale, splitting of a batch."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kfcore as kf

QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
KINDS = [("exact", "mean"), ("factored", "mean"), ("factored", "spectral"), ("plain", "mean")]
RULES = [kf.Damping(0.1, kind, norm, relative) for kind, norm in KINDS for relative in (False, True)]
OPTIONS = [{}, {"clip": 1e-3}, {"graft": True}, {"weight_decay": 0.1, "decay": "coupled"}]


def step(model, batch, options=None, *, damping=0.1, reduction="mean", scale=1.0, bias="joint", split=None, fallback=None):
    """Change of the parameters in one step of a fixed model, and the state after it."""
    rng = np.random.default_rng(5)
    params = model.params(rng)
    optimizer = kf.Optimizer(
        kf.KFAC(damping=damping), model.layers(bias=bias), momentum=0.0, loss_reduction=reduction, fallback=fallback, **(options or {})
    )
    x, y = batch
    grads, records = model.gradients(params, x, y, scale=scale * (len(x) if reduction == "sum" else 1.0))
    if split:
        records = {name: [(a[p], g[p]) for p in np.split(np.arange(len(x)), split)] for name, (a, g) in records.items()}
    after, state = optimizer.step(params, grads, records, optimizer.init(params))
    moved = np.concatenate([(a - b).reshape(-1) for a, b in zip(model.flat(after), model.flat(params), strict=True)])
    return moved, state


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("damping", RULES, ids=str)
def test_copies_of_every_example_change_nothing(ref, rng, model, damping, options):
    x, y = model.batch(rng)
    fallback = kf.Diagonal(power=0.0)  # the diagonal estimate itself grows with the number of terms that agree
    one, state = step(model, (x, y), options, damping=damping, fallback=fallback)
    many, copied = step(model, (np.repeat(x, 3, axis=0), np.repeat(y, 3, axis=0)), options, damping=damping, fallback=fallback)
    assert ref.distance(many, one) < 1e-12
    for name in ("fc1", "fc2"):
        averages = (s.curvature.blocks[name].average for s in (copied, state))
        assert model.same(*averages, 1e-12)
    uneven, _ = step(model, (np.concatenate([x, x[:1]]), np.concatenate([y, y[:1]])), options, damping=damping, fallback=fallback)
    assert ref.distance(uneven, one) > 1e-3 or "clip" in options


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("damping", RULES[:3], ids=str)
def test_mean_and_sum_of_a_loss_give_one_step(ref, rng, model, damping, options, bias):
    batch = model.batch(rng)
    mean, state = step(model, batch, options, damping=damping, bias=bias)
    total, summed = step(model, batch, options, damping=damping, bias=bias, reduction="sum")
    assert ref.distance(total, mean) < 1e-12
    assert all(model.same(summed.curvature.blocks[n], state.curvature.blocks[n], 1e-12) for n in state.curvature.blocks)
    off, _ = step(model, batch, options, damping=damping, bias=bias, reduction="sum", scale=1.01)
    assert ref.distance(off, mean) > 1e-4


@settings(max_examples=20, **QUIET)
@given(order=st.permutations(range(8)), options=st.sampled_from(OPTIONS), rule=st.sampled_from(RULES))
def test_the_order_of_examples_does_not_matter(ref, model, order, options, rule):
    x, y = model.batch(np.random.default_rng(1))
    one, _ = step(model, (x, y), options, damping=rule)
    assert ref.distance(step(model, (x[order], y[order]), options, damping=rule)[0], one) < 1e-12


@settings(max_examples=20, **QUIET)
@given(cuts=st.lists(st.integers(0, 8), max_size=3), options=st.sampled_from(OPTIONS))
def test_a_batch_recorded_in_parts_is_the_batch(ref, model, cuts, options):
    batch = model.batch(np.random.default_rng(1))
    one, _ = step(model, batch, options)
    assert ref.distance(step(model, batch, options, split=sorted(cuts))[0], one) < 1e-12


@pytest.mark.parametrize("k", [1e-3, 0.5, 100.0])
@pytest.mark.parametrize("kind", ["exact", "factored"])
@pytest.mark.parametrize("bias", ["joint", None, "separate"])
def test_loss_and_damping_times_a_number_give_the_same_direction_for_the_exact_ggn(ref, rng, captures, fitted, kind, k, bias):
    """The loss times k multiplies its Hessian by k, so Fisher vectors by the root of k."""
    x, v = captures(rng, 12, 3)
    for part in kf.Linear(3, 2, bias).blocks().values():
        grad = rng.normal(size=part.shape)

        def direction(k, damping, kind=kind, part=part, grad=grad):
            method = kf.KFAC(damping=kf.Damping(damping, kind), fisher="exact")
            return method.precondition(part, fitted(method, part, x, np.sqrt(k) * v), k * grad)

        assert ref.distance(direction(k, 0.1 * k), direction(1.0, 0.1)) < 1e-12
        assert ref.distance(direction(k, 0.1 * 1.01 * k), direction(1.0, 0.1)) > 1e-5
        assert ref.distance(direction(1.01 * k, 0.1 * k), direction(1.0, 0.1)) > 1e-5


@pytest.mark.parametrize("norm", ["mean", "trace", "frobenius", "spectral", "median"])
@settings(max_examples=20, **QUIET)
@given(seed=st.integers(0, 2**16), c=st.floats(1e-6, 1e6), inp=st.integers(2, 5), out=st.integers(2, 5))
def test_the_factored_inverse_is_blind_to_scale_moved_between_the_factors(ref, captures, fitted, norm, seed, c, inp, out):
    rng = np.random.default_rng(seed)
    x, g = captures(rng, 20, 1, inp, out)
    layer, method = kf.Linear(inp, out, None), kf.KFAC(damping=kf.Damping(0.1, norm=norm))
    grad = rng.normal(size=layer.shape)
    one, moved = (method.precondition(layer, fitted(method, layer, x / s, s * g), grad) for s in (1.0, np.sqrt(c)))
    assert ref.distance(moved, one) < 1e-9


@pytest.mark.parametrize("kind", ["exact", "factored", "plain"])
@settings(max_examples=20, **QUIET)
@given(seed=st.integers(0, 2**16))
def test_rotating_inputs_and_outputs_rotates_the_direction(ref, captures, fitted, kind, seed):
    rng = np.random.default_rng(seed)
    x, g = captures(rng, 7, 2, 4, 3)
    layer, method = kf.Linear(4, 3, None), kf.KFAC(damping=kf.Damping(0.1, kind))
    grad, q, r = rng.normal(size=(3, 4)), *(np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 3))
    plain = method.precondition(layer, fitted(method, layer, x, g), grad)
    turned = method.precondition(layer, fitted(method, layer, x @ q, g @ r), r.T @ grad @ q)
    assert ref.distance(r @ turned @ q.T, plain) < 1e-11
    assert ref.distance(turned, plain) > 1e-3


@settings(max_examples=20, **QUIET)
@given(seed=st.integers(0, 2**16), layout=st.sampled_from(["oi", "io"]), bias=st.sampled_from(["joint", "separate"]))
def test_the_layout_of_weights_does_not_matter(ref, model, seed, layout, bias):
    batches = [model.batch(np.random.default_rng(seed + k)) for k in range(3)]

    def run(layout):
        params = model.params(np.random.default_rng(seed), layout)
        optimizer = kf.Optimizer(kf.KFAC(), model.layers(layout, bias=bias), clip=1e-2, weight_decay=0.1)
        return model.run(optimizer, params, optimizer.init(params), batches, layout)[0]

    one, other = run("oi"), run(layout)
    for name in ("fc1", "fc2"):
        weight = other[name]["weight"] if layout == "oi" else other[name]["weight"].T
        assert ref.distance(weight, one[name]["weight"]) < 1e-12
        assert ref.distance(other[name]["bias"], one[name]["bias"]) < 1e-12


def test_several_samples_weigh_as_one(ref, rng, drawer):
    """Twice the same draws are the curvature of the draws once."""
    x, f = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    (v,) = kf.fisher_vectors("mc", kf.CrossEntropy(), f, draw=drawer(rng))
    params = {"fc": {"weight": rng.normal(size=(2, 3))}}

    def factor(samples, records):
        optimizer = kf.Optimizer(kf.KFAC(fisher="mc", mc_samples=samples), {"fc": kf.Linear(3, 2, None)})
        _, state = optimizer.step(params, params, {"fc": records}, optimizer.init(params))
        return optimizer.bind(params).preconditioner.dense(state.curvature)["fc"]

    once = factor(1, [(x, v)])
    assert ref.distance(factor(2, [(x, v), (x, v)]), once) < 1e-13
    assert ref.distance(factor(2, [(x, v), (x, 1.01 * v)]), once) > 1e-3
