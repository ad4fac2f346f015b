"""EKFAC in a whole optimizer: in which order a step measures, moves and refreshes, and what is counted."""

import gc
import sys

import numpy as np
import pytest

import kfcore as kf


@pytest.mark.parametrize("options", [{}, {"spread": True}, {"group": True}, {"spread": True, "group": True}])
@pytest.mark.parametrize("every", [1, 3, lambda step: 1 if step < 2 else 4])
@pytest.mark.parametrize("stats_every", [1, 2])
def test_a_step_measures_then_moves_then_refreshes(rng, model, every, stats_every, options):
    """The verbs one by one, in this order; any other gives other numbers."""
    method = kf.EKFAC(damping=0.1, refresh_every=every, stats_every=stats_every)
    layers = model.layers(sizes=(4, 4, 4))
    optimizer = kf.Optimizer(method, layers, learning_rate=0.1, momentum=0.0, **options)
    params = model.params(rng, sizes=(4, 4, 4))
    state = optimizer.init(params)
    refreshed = 0
    for step in range(9):
        grads, records = model.gradients(params, *model.batch(rng, sizes=(4, 4, 4)))
        new, after = optimizer.step(params, grads, records, state)
        period = every(step) if callable(every) else every
        any_due = False
        for index, (name, layer) in enumerate(layers.items()):
            old = state.curvature.blocks[name]
            x, g = layer.capture(*records[name])
            if step % stats_every == 0:
                old = method.observe(old, method.reduce(layer, old, x, g).over(1.0 / 8.0))
            due = step == 0 or step % period == (index % period if options.get("spread") and not options.get("group") else 0)
            if step == 0:
                old = method.refresh(layer, old)
            matrix = np.column_stack([grads[name]["weight"], grads[name]["bias"]])
            found = method.precondition(layer, old, matrix)
            np.testing.assert_allclose(params[name]["weight"] - new[name]["weight"], 0.1 * found[:, :-1], rtol=0, atol=1e-12)
            if due and step:
                fresh = method.refresh(layer, old)
                assert step % stats_every or np.abs(method.precondition(layer, fresh, matrix) - found).max() > 1e-6
                old = fresh
            any_due = any_due or due
            for here, there in zip(after.curvature.blocks[name].scales.values, old.scales.values, strict=True):
                np.testing.assert_allclose(here, there, rtol=0, atol=1e-11)
        # the fallback of the scale is refreshed as often as it has statistics, and is the last to be spread
        index = (1 if options.get("group") else 2) if options.get("spread") else 0
        refreshed += any_due or step == 0 or step % stats_every == index % stats_every
        assert int(after.curvature.refreshed) == refreshed
        params, state = new, after


def test_the_first_step_is_that_of_kfac_and_the_second_is_not(rng, model):
    batches = [model.batch(rng) for _ in range(2)]
    ends = []
    for method in (kf.EKFAC(damping=0.1), kf.KFAC(damping=kf.Damping(0.1, "exact"))):
        optimizer = kf.Optimizer(method, model.layers(), learning_rate=0.1)
        params = model.params(np.random.default_rng(3))
        state, history = optimizer.init(params), []
        for x, y in batches:
            grads, records = model.gradients(params, x, y)
            params, state = optimizer.step(params, grads, records, state)
            history.append(params["fc1"]["weight"])
        ends.append(history)
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=0, atol=1e-13)
    assert np.abs(ends[0][1] - ends[1][1]).max() > 1e-4


def test_refreshes_that_come_late_are_counted_once_a_step(rng, model):
    """Also where nothing else is ever refreshed, and where one layer never has good statistics."""
    layers = {"a": kf.Linear(3, 2), "b": kf.Linear(3, 2)}
    params = {name: {"weight": rng.normal(size=(2, 3)), "bias": np.zeros(2)} for name in layers}
    for broken, count in ((None, 4), ("b", 0)):
        optimizer = kf.Optimizer(kf.EKFAC(damping=0.1, refresh_every=2), layers)
        state, now = optimizer.init(params), params
        for _ in range(7):
            records = {name: (rng.normal(size=(6, 3)), rng.normal(size=(6, 2))) for name in layers}
            if broken:
                records[broken][0][0, 0] = np.nan
            now, state = optimizer.step(now, params, records, state)
        assert int(state.curvature.refreshed) == count
        assert np.array_equal(state.curvature.blocks["a"].solver.ways, [0, 0, 8])
        found = optimizer.diagnostics(state)
        assert found["kept_refreshes"] == ({"b": 4} if broken else {})
        assert found["dropped_statistics"] == ({"b": 7} if broken else {})


def test_a_layer_without_a_gradient_keeps_its_block(rng, model):
    optimizer = kf.Optimizer(kf.EKFAC(damping=0.1, scales="gradient"), model.layers())
    params = model.params(rng)
    state = optimizer.init(params)
    grads, records = model.gradients(params, *model.batch(rng))
    params, state = optimizer.step(params, grads, records, state)
    del grads["fc1"]
    new, after = optimizer.step(params, grads, records, state)
    assert model.same(after.curvature.blocks["fc1"], state.curvature.blocks["fc1"])
    assert model.same(new["fc1"], params["fc1"])
    assert not model.same(after.curvature.blocks["fc2"], state.curvature.blocks["fc2"])


@pytest.mark.parametrize(
    "layer",
    [
        kf.Linear(4, 3),
        kf.Conv(4, 6, (3,), groups=2),
        kf.Embedding(7, 3),
        kf.Norm(3),
        kf.Norm(3, block="full"),
        kf.Linear(4, 3, stack=(2,)),
        kf.Linear(4, 3, "separate"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_report_counts_the_bytes_of_the_state(layer, dtype):
    optimizer = kf.Optimizer(kf.EKFAC(), {"l": layer}, momentum=0.0)
    params = {"l": {role: np.zeros(shape, dtype) for role, shape in layer.parameters.items()}}

    def size(tree):
        return 0 if tree is None else sum(map(size, tree)) if isinstance(tree, tuple) else tree.nbytes

    blocks = optimizer.init(params).curvature.blocks
    assert optimizer.report(params).bytes == sum(size(block) for block in blocks.values())


def test_fifteen_hundred_steps_in_float32(rng):
    """Finite, with bases that stay orthonormal, and no more memory than at first; ``tests/benchmarks/long_run.py`` is the longer one."""
    sizes, teacher = (20, 24, 4), rng.normal(size=(20, 4))
    layers = {"a": kf.Linear(*sizes[:2]), "b": kf.Linear(*sizes[1:])}
    params = {
        name: {"weight": rng.normal(size=(n, m)).astype(np.float32) / np.float32(m**0.5), "bias": np.zeros(n, np.float32)}
        for name, m, n in zip(layers, sizes, sizes[1:], strict=False)
    }
    method = kf.EKFAC(damping=1e-3, refresh_every=3, basis=kf.Tracked(smallest=8))
    optimizer = kf.Optimizer(method, layers, learning_rate=0.02, clip=1e-2)
    state, worst, losses, held = optimizer.init(params), 0.0, [], []
    for step in range(1500):
        x = rng.normal(size=(16, 20)).astype(np.float32)
        h = np.tanh(x @ params["a"]["weight"].T + params["a"]["bias"])
        error = h @ params["b"]["weight"].T + params["b"]["bias"] - np.tanh(x @ teacher).astype(np.float32)
        dz = error / np.float32(len(x))
        dh = (dz @ params["b"]["weight"]) * (1 - h * h)
        grads = {"a": {"weight": dh.T @ x, "bias": dh.sum(axis=0)}, "b": {"weight": dz.T @ h, "bias": dz.sum(axis=0)}}
        params, state = optimizer.step(params, grads, {"a": (x, dh), "b": (h, dz)}, state)
        losses.append(0.5 * float((error**2).sum()) / len(x))
        for block in state.curvature.blocks.values() if step % 3 == 0 else ():
            for basis in (block.solver.input_basis, block.solver.output_basis):
                wide = basis.astype(np.float64)
                worst = max(worst, np.abs(wide.T @ wide - np.eye(len(wide))).max())
        if step in (499, 1499):
            gc.collect()
            held.append(sys.getallocatedblocks())
    assert np.isfinite(losses).all()
    assert np.mean(losses[-100:]) < 0.7 * np.mean(losses[:100])
    assert worst < 2e-6
    # a block of memory is what an object takes; the losses are kept
    assert held[1] - held[0] < 1300, held
    found = optimizer.diagnostics(state)
    assert not any(found[name] for name in ("skipped_steps", "dropped_statistics", "kept_refreshes"))
    left, improved, decomposed = state.curvature.blocks["a"].solver.ways
    assert improved > 300
    assert decomposed < 100
    assert left + improved + decomposed == 1000
