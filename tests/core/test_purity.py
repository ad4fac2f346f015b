"""Arguments stay as they are, states are values, and the strictest array library gives the same numbers."""

import array_api_strict as strict
import numpy as np
import pytest

import kfcore as kf

KINDS = [("exact", "mean"), ("plain", "mean"), *[("factored", n) for n in ("mean", "trace", "frobenius", "spectral", "median")]]

OPTIONS = [
    {},
    {"clip": 1e-2, "nesterov": True},
    {"graft": True, "group": True, "spread": True},
    {"weight_decay": 0.1, "decay": "coupled"},
    {"weight_decay": lambda k: 0.1, "loss_reduction": "sum"},
]


def frozen(tree):
    """A tree of read-only copies."""
    if isinstance(tree, dict):
        return {k: frozen(v) for k, v in tree.items()}
    if isinstance(tree, tuple):
        parts = [frozen(v) for v in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if tree is None:
        return None
    copy = np.array(tree)
    copy.setflags(write=False)
    return copy


def mapped(function, tree):
    if isinstance(tree, dict):
        return {k: mapped(function, v) for k, v in tree.items()}
    return tuple(mapped(function, v) for v in tree) if isinstance(tree, tuple) else function(tree)


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_nothing_is_written_into_and_batches_may_change_size(rng, model, kind, norm, bias, group):
    optimizer = kf.Optimizer(
        kf.KFAC(damping=kf.Damping(0.1, kind, norm), refresh_every=2),
        model.layers(bias=bias),
        clip=1e-2,
        graft=True,
        weight_decay=0.1,
        group=group,
    )
    free = tied = model.params(rng)
    free_state, tied_state = optimizer.init(free), frozen(optimizer.init(free))
    for n in (8, 1, 13, 5):
        x, y = model.batch(rng, n)
        grads, records = model.gradients(free, x, y)
        free, free_state = optimizer.step(free, grads, records, free_state)
        kept = frozen((tied, grads, records, tied_state))
        tied, state = optimizer.step(frozen(tied), frozen(grads), frozen(records), tied_state)
        assert model.same(kept[3], tied_state)
        tied_state = frozen(state)
    assert model.same(free, tied)
    assert model.same(free_state, tied_state)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_the_strict_library_follows_the_same_trajectory(rng, model, kind, norm, dtype, options):
    method = kf.KFAC(damping=kf.Damping(0.1, kind, norm, relative=norm == "trace"), refresh_every=2, stats_every=2)
    optimizer = kf.Optimizer(method, model.layers(), **({"learning_rate": 0.02} | options))
    params = model.params(rng, dtype=np.dtype(dtype))
    same = mapped(strict.asarray, params)
    state, strict_state = optimizer.init(params), optimizer.init(same)
    for _ in range(5):
        grads, records = model.gradients(params, *(z.astype(dtype) for z in model.batch(rng)))
        there = mapped(strict.asarray, grads), mapped(strict.asarray, records)
        due = optimizer.stats_due(state)
        params, state = optimizer.step(params, grads, records if due else None, state, terms=8.0)
        same, strict_state = optimizer.step(
            same, there[0], there[1] if optimizer.stats_due(strict_state) else None, strict_state, terms=8.0
        )
        tolerance = 1e-10 if dtype == "float64" else 1e-3
        assert model.same(params, mapped(lambda z: np.asarray(z._array), same), tolerance)
    assert optimizer.diagnostics(strict_state) == optimizer.diagnostics(state)


def test_the_strict_library_draws_the_same_fisher_vectors(rng):
    f, u, z = rng.normal(size=(4, 3, 5)), rng.random((4, 3, 5)), rng.normal(size=(4, 3, 5))
    y = rng.integers(0, 5, (4, 3))
    losses = [kf.CrossEntropy(), kf.CrossEntropy(ignore_index=2), kf.MSE(), kf.BCEWithLogits()]
    for loss in losses:
        for fisher in ("exact", "mc"):

            def draw(kind, shape):
                numbers = u if kind == "uniform" else z
                return numbers if shape == numbers.shape else numbers[..., 0]

            here = list(kf.fisher_vectors(fisher, loss, f, y, draw=draw))
            there = list(
                kf.fisher_vectors(
                    fisher,
                    loss,
                    strict.asarray(f),
                    strict.asarray(y),
                    draw=lambda kind, shape, draw=draw: strict.asarray(draw(kind, shape)),
                )
            )
            assert len(here) == len(there)
            assert all(np.allclose(a, b._array, rtol=1e-13, atol=1e-15) for a, b in zip(here, there, strict=True))
        assert float(loss.terms(f, y)) == float(loss.terms(strict.asarray(f), strict.asarray(y)))


def test_a_state_goes_between_libraries_through_a_file(rng, model, tmp_path):
    optimizer = kf.Optimizer(kf.KFAC(), model.layers())
    params = model.params(rng)
    params, state = model.run(optimizer, params, optimizer.init(params), [model.batch(rng) for _ in range(3)])
    kf.save(tmp_path / "state", optimizer.bind(params), state)
    same = mapped(strict.asarray, params)
    loaded = kf.load(tmp_path / "state", optimizer.bind(same), optimizer.init(same))
    grads, records = model.gradients(params, *model.batch(rng))
    here, _ = optimizer.step(params, grads, records, state)
    there, after = optimizer.step(same, mapped(strict.asarray, grads), mapped(strict.asarray, records), loaded)
    assert model.same(here, mapped(lambda z: np.asarray(z._array), there), 1e-12)
    kf.save(tmp_path / "again", optimizer.bind(same), after)
    assert model.same(
        kf.load(tmp_path / "again", optimizer.bind(params), state).step.momentum,
        optimizer.step(params, grads, records, state)[1].step.momentum,
        1e-12,
    )


def test_a_recorder_is_the_optimizer_with_a_memory(rng, model):
    method = kf.KFAC(stats_every=2, refresh_every=3)
    optimizer = kf.Optimizer(method, model.layers())
    params = kept = model.params(rng)
    state, recorder = optimizer.init(params), kf.Recorder(kf.Optimizer(method, model.layers()), params)
    for k in range(5):
        grads, records = model.gradients(params, *model.batch(rng))
        for name, (x, dz) in records.items():
            for part in (slice(0, 3), slice(3, 8)):
                recorder.record(name, x[part], dz[part])
        params, state = optimizer.step(
            params, grads, records if optimizer.stats_due(state) else None, state, overrides={"learning_rate": 0.01 * k}
        )
        kept = recorder.step(kept, grads, learning_rate=0.01 * k)
    assert model.same(params, kept, 1e-12)
    assert model.same(state, recorder.state, 1e-12)
