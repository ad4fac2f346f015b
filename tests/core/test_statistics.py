"""Sums that merge, averages that carry their own weight."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kfcore as kf

LAYERS = [kf.Linear(3, 2), kf.Linear(3, 2, None, "reduce"), kf.Linear(3, 2, "joint", "reduce"), kf.Bias(2)]
LAYER = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{type(layer).__name__}-{getattr(layer, 'sharing', '')}")


def sums(statistics):
    fields = (statistics.input_sum, statistics.input_count, statistics.output_sum, statistics.output_count)
    return [np.asarray(x) for x in fields if x is not None]


def ranks(optimizer, parts, terms):
    """What the first rank gets when all ranks sum theirs."""
    calls = []

    def record(value):
        calls[-1].append(value)
        return value

    for part, n in zip(parts, terms, strict=True):
        calls.append([])
        optimizer.across(part, n, record)
    totals = iter([sum(values) for values in zip(*calls, strict=True)])
    return optimizer.across(parts[0], terms[0], lambda _: next(totals))


@LAYER
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**16), sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_micro_batches_add_up_to_the_batch(captures, layer, seed, sizes):
    x, g = captures(np.random.default_rng(seed), sum(sizes), 4)
    x, g = np.round(4 * x), np.round(4 * g)  # small integers: sums are exact in any order
    method = kf.KFAC()
    state = method.init(layer, x)
    whole = method.reduce(layer, state, x, g)
    total, at = None, 0
    for n in sizes:
        part = method.reduce(layer, state, x[at : at + n], g[at : at + n])
        total, at = part if total is None else total + part, at + n
    tolerance = 0.0 if layer.shape[1] == 1 or layer.sharing == "expand" else 1e-13
    assert all(np.allclose(a, b, rtol=tolerance, atol=0) for a, b in zip(sums(total), sums(whole), strict=True))
    if sum(sizes):
        again = method.reduce(layer, state, x[:1], g[:1])
        assert (total + again).output_count != whole.output_count


@LAYER
def test_sides_captured_apart_add_up_to_both(rng, captures, layer):
    x, g = captures(rng, s=3)
    method = kf.KFAC()
    state = method.init(layer, x)
    both = method.reduce(layer, state, x, g)
    for apart in (
        method.reduce(layer, state, x) + method.reduce(layer, state, None, g),
        method.reduce(layer, state, None, g) + method.reduce(layer, state, x),
    ):
        assert all(np.array_equal(a, b) for a, b in zip(sums(apart), sums(both), strict=True))


def test_one_side_alone_cannot_be_observed(rng, captures):
    x, g = captures(rng)
    method, layer = kf.KFAC(), kf.Linear(3, 2)
    state = method.init(layer, x)
    with pytest.raises(ValueError, match="`statistics` lack the output_grads"):
        method.observe(state, method.reduce(layer, state, x))
    with pytest.raises(ValueError, match="`statistics` lack the inputs"):
        method.observe(state, method.reduce(layer, state, None, g))


def test_the_mean_over_terms_undoes_a_loss_reduction(ref, rng, captures):
    x, g = captures(rng, 6, 5)
    method, layer, terms = kf.KFAC(), kf.Linear(3, 2), 17.0
    state = method.init(layer, x)

    def output_factor(statistics):
        return method.observe(state, statistics).average.values[1]

    want = np.einsum("nso,nsp->op", g, g) / terms
    assert ref.distance(output_factor(method.reduce(layer, state, x, g).over(terms)), want) < 1e-13
    assert ref.distance(output_factor(method.reduce(layer, state, x, g / terms).over(1.0 / terms)), want) < 1e-13
    assert ref.distance(output_factor(method.reduce(layer, state, x, g / terms).over(1.01 / terms)), want) > 1e-3


@pytest.mark.parametrize("n", [6, 2])
def test_few_rows_are_kept_and_share_no_memory_with_what_was_captured(rng, captures, n):
    """Six rows of three features are reduced at once, two are kept: the same sums, whatever happens to the captured arrays."""
    x, g = captures(rng, n)
    method = kf.KFAC()
    for layer in (kf.Linear(3, 2, None), kf.Linear(3, 2, "joint"), kf.Linear(3, 2, None, "reduce")):
        state = method.init(layer, x)
        a, b = x.copy(), g.copy()
        statistics = method.reduce(layer, state, a, b)
        assert (statistics.inputs.rows is None) == (n == 6)
        before = sums(statistics)
        a[...] = b[...] = np.nan
        assert all(np.array_equal(one, other) for one, other in zip(sums(statistics), before, strict=True))
        rows = layer.output_rows(np, g, g.dtype)
        assert np.allclose(statistics.output_sum, rows.T @ rows, rtol=1e-14)


def test_rows_that_become_many_are_reduced(rng, captures):
    x, g = captures(rng, 6)
    method, layer = kf.KFAC(), kf.Linear(3, 2, None)
    state = method.init(layer, x)
    total = method.reduce(layer, state, x[:1], g[:1])
    held = []
    for k in range(1, 6):
        total = total + method.reduce(layer, state, x[k : k + 1], g[k : k + 1])
        held.append(0 if total.inputs.rows is None else total.inputs.rows.shape[-2])
    assert held == [2, 3, 0, 1, 2]
    whole = method.reduce(layer, state, x, g)
    assert all(np.allclose(a, b, rtol=1e-13) for a, b in zip(sums(total), sums(whole), strict=True))


def test_parts_of_a_batch_on_ranks_with_their_own_mean_losses_add_up_to_one_mean(ref, rng, captures):
    x, g = captures(rng, 6, 5)
    optimizer = kf.ModelOptimizer(kf.KFAC(), kf.Model({"fc": kf.Linear(3, 2, None)}), kf.StepSize())
    state = optimizer.init({"fc.weight": rng.normal(size=(2, 3))})
    terms = (13.0, 7.0)
    whole = optimizer.reduce(state, "fc", x, g / 20.0)["fc"].over(1 / 20.0)

    def distance(slip):
        parts = [optimizer.reduce(state, "fc", x[p], slip * g[p] / t) for p, t in zip((slice(0, 4), slice(4, 6)), terms, strict=True)]
        summed, everyone = ranks(optimizer, parts, terms)
        assert everyone == 20.0
        means = [(s.input_sum / s.input_count, s.output_sum / s.output_count) for s in (summed["fc"], whole)]
        return max(ref.distance(one, other) for one, other in zip(*means, strict=True))

    assert distance(1.0) < 1e-13
    assert distance(1.01) > 1e-3


@pytest.mark.parametrize("decay", [1e-3, 0.5, 0.95, 1.0])
def test_the_running_average_is_exactly_bias_corrected(ref, rng, captures, decay):
    method, layer = kf.KFAC(stats_decay=decay), kf.Linear(3, 2, None)
    state = method.init(layer, np.zeros(()))
    seen, weights = [], []
    for k in range(8):
        x, g = captures(rng, 4 + k)
        state = method.observe(state, method.reduce(layer, state, x, g))
        seen.append([np.einsum("nsi,nsj->ij", z, z) / len(z) for z in (x, g)])
        weights = [w * decay for w in weights] + [1.0]
        for side in (0, 1):
            want = sum(w * s[side] for w, s in zip(weights, seen, strict=True)) / sum(weights)
            assert ref.distance(state.average.values[side], want) < 1e-13
            if k:
                off = sum(w * s[side] for w, s in zip([*weights[:-2], 1.01 * weights[-2], 1.0], seen, strict=True)) / sum(weights)
                assert ref.distance(off, want) > 1e-6
        assert np.isclose(float(state.average.weight), sum(weights), rtol=1e-13)


@pytest.mark.parametrize("decay", [1e-3, 0.5, 1.0])
def test_the_first_value_is_the_first_batch_whatever_the_decay(ref, rng, captures, decay):
    x, g = captures(rng)
    method, layer = kf.KFAC(stats_decay=decay), kf.Linear(3, 2)
    state = method.init(layer, x)
    statistics = method.reduce(layer, state, x, g)
    a, b = method.observe(state, statistics).average.values
    assert ref.distance(a, statistics.input_sum / 6) < 1e-15
    assert ref.distance(b, statistics.output_sum / 6) < 1e-15
    assert ref.distance(1.01 * a, statistics.input_sum / 6) > 1e-3


def test_a_dropped_batch_leaves_the_weights_of_the_others(rng, captures, model):
    method, layer = kf.KFAC(stats_decay=0.7), kf.Linear(3, 2)
    batches = [captures(rng) for _ in range(4)]
    bad = (batches[1][0] * np.nan, batches[1][1])

    def run(batches):
        state = method.init(layer, np.zeros(()))
        for x, g in batches:
            state = method.observe(state, method.reduce(layer, state, x, g))
        return state

    with_bad, without = run([batches[0], bad, *batches[2:]]), run([batches[0], *batches[2:]])
    assert model.same(with_bad.average, without.average)
    assert (int(with_bad.dropped), int(without.dropped)) == (1, 0)


def test_the_decay_may_be_a_function_of_the_step(rng, model):
    asked = []

    def decay(step):
        asked.append(int(step))
        return 0.5 if step < 2 else 0.9

    params, batches = model.params(rng), [model.batch(rng) for _ in range(4)]
    optimizer = kf.Optimizer(kf.KFAC(stats_decay=decay), model.layers(), learning_rate=0.0)
    _, state = model.run(optimizer, params, optimizer.init(params), batches)
    assert set(asked) == {0, 1, 2, 3}
    weight = 0.0
    for k in range(4):
        weight = weight * (0.5 if k < 2 else 0.9) + 1.0
    assert np.isclose(float(state.curvature.blocks["fc1"].average.weight), weight, rtol=1e-14)


def test_the_diagonal_averages_in_the_same_way(ref, rng):
    method, layer = kf.Diagonal(stats_decay=0.8), None
    grads = rng.normal(size=(5, 3))
    state = method.init(layer, grads[0])
    for grad in grads:
        state = method.observe(state, method.reduce(layer, state, grad=grad, terms=9.0))
    weights = 0.8 ** np.arange(5)[::-1]
    want = 9.0 * (weights[:, None] * grads**2).sum(axis=0) / weights.sum()
    assert ref.distance(state.average.values[0], want) < 1e-13
    assert ref.distance(1.01 * state.average.values[0], want) > 1e-3


def test_a_rank_without_terms_leaves_the_statistics_of_the_others(rng):
    """Two ranks, one of them with an empty part of the batch: the sums over ranks are those of the other alone."""
    layers = {"fc": kf.Linear(3, 2, None)}
    optimizer = kf.ModelOptimizer(kf.KFAC(), kf.Model(layers), kf.StepSize())
    state = optimizer.init({"fc.weight": rng.normal(size=(2, 3))})
    x, g = rng.normal(size=(8, 1, 3)), rng.normal(size=(8, 1, 2)) / 8

    parts = [optimizer.reduce(state, "fc", x[:n], g[:n]) for n in (8, 0)]
    summed, terms = ranks(optimizer, parts, (8.0, 0.0))
    assert terms == 8.0
    alone = optimizer.reduce(state, "fc", x, g)["fc"].over(1 / 8)
    assert np.allclose(summed["fc"].output_sum / summed["fc"].output_count, alone.output_sum / alone.output_count, rtol=1e-12)
    assert np.allclose(summed["fc"].input_sum / summed["fc"].input_count, alone.input_sum / alone.input_count, rtol=1e-12)
