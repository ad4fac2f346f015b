"""Bad data is a value: it is dropped and counted, and the step stays finite."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kfcore as kf

KINDS = [("exact", "mean"), ("plain", "mean"), *[("factored", n) for n in ("mean", "trace", "frobenius", "spectral", "median")]]
BAD = [np.nan, np.inf, -np.inf]


@pytest.fixture
def trained(rng, model):
    """An optimizer, parameters and state after three good steps, and how many statistics it has."""

    def make(**options):
        optimizer = kf.Optimizer(kf.KFAC(damping=0.1, refresh_every=1), model.layers(), learning_rate=0.05, **options)
        params = model.params(rng)
        params, state = model.run(optimizer, params, optimizer.init(params), [model.batch(rng) for _ in range(3)])
        return optimizer, params, state

    return make


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize("options", [{}, {"clip": 1e-3}, {"graft": True}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decay": "coupled"}])
def test_a_batch_that_is_not_finite_changes_no_weight_and_is_counted(rng, model, trained, bad, where, options):
    optimizer, params, state = trained(**options)
    x, y = model.batch(rng)
    (x if where == "x" else y)[0, 0] = bad
    with np.errstate(all="ignore"):
        grads, records = model.gradients(params, x, y)
        after, broken = optimizer.step(params, grads, records, state)
    assert model.same(after, params)
    assert model.same(broken.step.momentum, state.step.momentum)
    told = optimizer.diagnostics(broken)
    assert told["skipped_steps"] == 1
    assert told["dropped_statistics"].get("fc1") == 1
    for name, block in state.curvature.blocks.items():
        assert model.same(broken.curvature.blocks[name].average, block.average) or name not in told["dropped_statistics"]
    later, final = model.run(optimizer, after, broken, [model.batch(rng) for _ in range(3)])
    assert all(np.isfinite(leaf).all() for leaf in model.flat(later))
    assert not model.same(later, after)
    assert optimizer.diagnostics(final)["skipped_steps"] == 1


def test_a_bad_first_batch_does_not_switch_the_curvature_off_until_the_next_refresh(rng, model):
    optimizer = kf.Optimizer(kf.KFAC(damping=0.1, refresh_every=10), model.layers(), momentum=0.0)
    params = model.params(rng)
    x, y = model.batch(rng)
    grads, records = model.gradients(params, x, y)
    grads_bad, records_bad = model.gradients(params, x * np.nan, y)
    _, state = optimizer.step(params, grads_bad, records_bad, optimizer.init(params))
    after, _ = optimizer.step(params, grads, records, state)
    good, _ = optimizer.step(params, grads, records, optimizer.init(params))
    assert not model.same(after, params)
    assert model.same(after, good, 1e-12)


@pytest.mark.parametrize("side", ["inputs", "output_grads"])
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_number_on_either_side_drops_both(rng, captures, model, side, bad):
    method, layer = kf.KFAC(), kf.Linear(3, 2)
    x, g = captures(rng)
    state = method.observe(method.init(layer, x), method.reduce(layer, method.init(layer, x), x, g))
    (x if side == "inputs" else g)[2, 0, 1] = bad
    with np.errstate(all="ignore"):
        after = method.observe(state, method.reduce(layer, state, x, g))
    assert model.same(after.average, state.average)
    assert int(after.dropped) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_changes_no_weight_and_is_counted(rng, model, trained, reduction):
    optimizer, params, state = trained(loss_reduction=reduction)
    x, y = model.batch(rng, 0)
    grads, records = model.gradients(params, x, y)
    after, broken = optimizer.step(params, grads, records, state)
    assert all(np.isfinite(leaf).all() for leaf in model.flat(after))
    for name in ("fc1", "fc2"):
        assert model.same(broken.curvature.blocks[name].average, state.curvature.blocks[name].average)
    assert optimizer.diagnostics(broken)["dropped_statistics"]["fc1"] == 1


def test_an_empty_batch_is_dropped_by_the_verbs_without_a_warning(rng, captures, model):
    method, layer = kf.KFAC(), kf.Linear(3, 2)
    x, g = captures(rng)
    state = method.observe(method.init(layer, x), method.reduce(layer, method.init(layer, x), x, g))
    after = method.observe(state, method.reduce(layer, state, x[:0], g[:0]))
    assert model.same(after.average, state.average)
    assert int(after.dropped) == 1


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_with_all_positions_masked_keeps_the_averages(rng, model, reduction, fisher):
    optimizer = kf.Optimizer(kf.KFAC(damping=0.1, fisher=fisher), model.layers(), loss_reduction=reduction)
    params = model.params(rng)
    params, state = model.run(optimizer, params, optimizer.init(params), [model.batch(rng)])
    x, y = model.batch(rng)
    grads, records = model.gradients(params, x, y, scale=0.0)
    terms = kf.CrossEntropy(ignore_index=-1).terms(y, np.full(len(y), -1))
    with np.errstate(all="ignore"):
        after, masked = optimizer.step(params, grads, records, state, terms=terms)
    assert all(np.isfinite(leaf).all() for leaf in model.flat(after))
    assert model.same(masked.curvature.blocks["fc1"].average, state.curvature.blocks["fc1"].average)


def test_a_statistic_of_zeros_is_a_statistic(rng, captures, fitted):
    x, g = captures(rng)
    for kind, norm in KINDS:
        method, layer = kf.KFAC(damping=kf.Damping(0.1, kind, norm, relative=True)), kf.Linear(3, 2, None)
        for state in (fitted(method, layer, 0 * x, g), fitted(method, layer, x, 0 * g), fitted(method, layer, 0 * x, 0 * g)):
            assert int(state.dropped) == 0
            assert int(state.kept) == 0
            assert np.isfinite(method.precondition(layer, state, np.ones((2, 3)))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("kind", "norm"), KINDS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(1, 6),
    rank=st.integers(0, 4),
    scales=st.tuples(*[st.sampled_from([0.0, 1e-20, 1e-10, 1.0, 1e5, 1e20])] * 2),
    lam=st.sampled_from([1e-12, 1e-3, 10.0]),
    bias=st.sampled_from([None, "joint"]),
)
def test_directions_are_finite_and_descend_for_degenerate_and_badly_scaled_data(
    captures, fitted, dtype, kind, norm, relative, seed, n, rank, scales, lam, bias
):
    rng = np.random.default_rng(seed)
    x, g = captures(rng, n, 2, 5, 3)
    x = (scales[0] * x @ rng.normal(size=(5, rank)) @ rng.normal(size=(rank, 5))).astype(dtype)
    g = (scales[1] * g).astype(dtype)
    layer = kf.Linear(5, 3, bias)
    method = kf.KFAC(damping=kf.Damping(lam, kind, norm, relative))
    with np.errstate(all="ignore"):
        state = fitted(method, layer, x, g)
        rows = x if bias is None else np.concatenate([x, np.ones((*x.shape[:-1], 1), dtype)], axis=-1)
        grad = np.einsum("nso,nsi->oi", g, rows) / dtype(n)
        if not np.isfinite(grad).all() or not grad.any():
            grad = rng.normal(size=layer.shape).astype(dtype)
        direction = method.precondition(layer, state, grad)
    assert direction.dtype == dtype
    assert np.isfinite(direction).all()
    inner = np.sum(grad.astype(np.float64) * direction.astype(np.float64))
    # rounding of the sum itself is forgiven
    assert inner >= -4 * np.finfo(dtype).eps * np.sum(np.abs(grad.astype(np.float64) * direction))


@pytest.mark.parametrize(("kind", "norm"), KINDS)
@pytest.mark.parametrize("lam", [1e-3, 1e-5, 1e-7])
def test_single_precision_comes_near_double_precision_where_factors_have_no_full_rank(rng, captures, fitted, kind, norm, lam):
    x, g = captures(rng, 16, 1, 64, 8)
    layer, method = kf.Linear(64, 8, None), kf.KFAC(damping=kf.Damping(lam, kind, norm))
    grad = np.einsum("nso,nsi->oi", g, x) / 16
    double, single = (
        method.precondition(layer, fitted(method, layer, x.astype(t), g.astype(t)), grad.astype(t)) for t in (np.float64, np.float32)
    )
    assert np.linalg.norm(single - double) < 0.05 * np.linalg.norm(double)


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "weight_decay", "clip"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_schedule_that_is_not_finite_leaves_the_weights_finite(rng, model, name, bad):
    optimizer = kf.Optimizer(kf.KFAC(damping=0.1), model.layers(), **{name: lambda step: bad if step == 1 else 0.01})
    params = model.params(rng)
    with np.errstate(all="ignore"):
        params, state = model.run(optimizer, params, optimizer.init(params), [model.batch(rng) for _ in range(4)])
    assert all(np.isfinite(leaf).all() for leaf in model.flat((params, state)))


def test_a_block_whose_first_batch_was_bad_is_refreshed_as_soon_as_it_has_statistics(rng, captures, model):
    layers = {"a": kf.Linear(3, 2, None), "b": kf.Linear(3, 2, None)}
    optimizer = kf.Optimizer(kf.KFAC(damping=0.1, refresh_every=10), layers, momentum=0.0)
    params = {name: {"weight": rng.normal(size=(2, 3))} for name in layers}
    x, g = captures(rng)
    _, state = optimizer.step(params, params, {"a": (x, g), "b": (x * np.nan, g)}, optimizer.init(params))
    _, state = optimizer.step(params, params, {"a": (x, g), "b": (x, g)}, state)
    assert model.same(state.curvature.blocks["b"].solver, state.curvature.blocks["a"].solver, 1e-12)


def test_an_empty_batch_is_dropped_by_the_fallback_too():
    method = kf.Diagonal()
    layer, like = kf.blocks_of(method, {}, {"p": (3,)}, method)["p"].layer, np.ones(3)
    state = method.observe(method.init(layer, like), method.reduce(layer, method.init(layer, like), grad=like, terms=8))
    after = method.observe(state, method.reduce(layer, state, grad=0 * like, terms=0.0))
    assert int(after.dropped) == 1
    assert np.array_equal(after.average.values[0], state.average.values[0])


def test_a_negative_damping_from_a_schedule_is_refused(rng, captures):
    optimizer = kf.Optimizer(kf.KFAC(damping=lambda step: -0.1), {"a": kf.Linear(3, 2, None)})
    params = {"a": {"weight": rng.normal(size=(2, 3))}}
    with pytest.raises(ValueError, match=r"`damping`.*-0.1"):
        optimizer.step(params, params, {"a": captures(rng)}, optimizer.init(params))


@pytest.mark.parametrize("method", [kf.EKFAC(damping=0.1, refresh_every=2), kf.KFAC(damping=kf.Damping(0.1, "exact"), refresh_every=2)])
def test_an_eigendecomposition_that_does_not_converge_is_tried_in_double_and_else_counted(rng, model, method, monkeypatch):
    """LAPACK's for single precision gives up on some harmless factors of low rank."""
    narrow = lambda tree: {n: narrow(p) for n, p in tree.items()} if isinstance(tree, dict) else tree.astype(np.float32)  # noqa: E731
    batches, first = [tuple(map(narrow, model.batch(rng))) for _ in range(5)], narrow(model.params(rng))
    eigh, broken, ends = np.linalg.eigh, set(), []

    def fragile(x):
        if x.dtype in broken:
            raise np.linalg.LinAlgError("Eigenvalues did not converge")
        return eigh(x)

    monkeypatch.setattr(np.linalg, "eigh", fragile)
    optimizer = kf.Optimizer(method, model.layers(), learning_rate=0.05)
    for dtypes in (set(), {np.dtype(np.float32)}, {np.dtype(np.float32), np.dtype(np.float64)}):
        broken.clear()
        params, state = model.run(optimizer, first, optimizer.init(first), batches[:2])
        broken.update(dtypes)
        params, state = model.run(optimizer, params, state, batches[2:])
        assert all(np.isfinite(leaf).all() for leaf in model.flat(params))
        ends.append((params, optimizer.diagnostics(state)["kept_refreshes"]))
    (good, _), (wide, none), (_, kept) = ends
    assert model.same(wide, good, 1e-5)
    assert not none
    assert kept == {"fc1": 2, "fc2": 2}
