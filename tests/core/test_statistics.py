"""Sums that merge, averages that carry their own weight."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kfcore as kf

LAYERS = [kf.Linear(3, 2), kf.Linear(3, 2, None, "reduce"), kf.Linear(3, 2, "joint", "reduce"), kf.Bias(2)]
LAYER = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{type(layer).__name__}-{getattr(layer, 'sharing', '')}")


def sums(statistics):
    return [np.asarray(x) for x in statistics if x is not None]


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


def test_parts_weighed_by_their_terms_add_up_to_one_mean(ref, rng, captures):
    x, g = captures(rng, 6, 5)
    method, layer = kf.KFAC(), kf.Linear(3, 2)
    state = method.init(layer, x)
    whole = method.reduce(layer, state, x, g).over(20.0)
    terms = (13.0, 7.0)
    parts = [method.reduce(layer, state, x[p], g[p] / t).over(1.0 / t) for p, t in zip((slice(0, 4), slice(4, 6)), terms, strict=True)]
    good = parts[0].weighing(terms[0]) + parts[1].weighing(terms[1])
    for a, b in zip(method.observe(state, good).average.values, method.observe(state, whole).average.values, strict=True):
        assert ref.distance(a, b) < 1e-13
    bad = parts[0].weighing(1.05 * terms[0]) + parts[1].weighing(terms[1])
    assert ref.distance(method.observe(state, bad).average.values[1], method.observe(state, whole).average.values[1]) > 1e-3
    one_sided = method.reduce(layer, state, x).weighing(3.0)
    assert one_sided.output_sum is None


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

    def ranks(sizes):
        parts = [optimizer.reduce(state, "fc", x[:n], g[:n]) for n in sizes]
        calls = []

        def record(value):
            calls.append(value)
            return value

        for part, n in zip(parts, sizes, strict=True):
            optimizer.across(part, float(n), record)
        half = len(calls) // 2
        totals = iter([a + b for a, b in zip(calls[:half], calls[half:], strict=True)])
        return optimizer.across(parts[0], float(sizes[0]), lambda _: next(totals))

    summed, terms = ranks([8, 0])
    assert terms == 8.0
    alone = optimizer.reduce(state, "fc", x, g)["fc"].over(1 / 8)
    assert np.allclose(summed["fc"].output_sum / summed["fc"].output_count, alone.output_sum / alone.output_count, rtol=1e-12)
    assert np.allclose(summed["fc"].input_sum / summed["fc"].input_count, alone.input_sum / alone.input_count, rtol=1e-12)
