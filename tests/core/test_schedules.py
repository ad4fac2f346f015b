"""What is due when, spread over the steps or at once, in groups or one by one."""

import numpy as np
import pytest

import kfcore as kf

LAYERS = {f"l{i}": kf.Linear(3, 2) for i in range(3)} | {"wide": kf.Linear(4, 2), "bias": kf.Linear(3, 2, "separate")}


def parameters(rng):
    return {
        name: {role: rng.normal(size=shape) for role, shape in layer.parameters.items()} for name, layer in LAYERS.items()
    } | {"scale": rng.normal(size=3)}  # fmt: skip


def random_like(rng, tree):
    return {k: random_like(rng, v) if isinstance(v, dict) else rng.normal(size=v.shape) for k, v in tree.items()}


def trajectory(steps=8, overrides=None, seed=0, **options):
    """States and parameters of an optimizer on random gradients and records; ``method`` among the options."""
    rng = np.random.default_rng(seed)
    params = parameters(rng)
    optimizer = kf.Optimizer(options.pop("method"), LAYERS, **options)
    state = optimizer.init(params)
    states, all_params = [state], [params]
    for _ in range(steps):
        records = {n: (rng.normal(size=(5, layer.in_features)), rng.normal(size=(5, 2))) for n, layer in LAYERS.items()}
        params, state = optimizer.step(params, random_like(rng, params), records, state, overrides=overrides)
        states.append(state)
        all_params.append(params)
    return optimizer, states, all_params


def changed(states, part, model):
    """By block that has the part, the steps at which that part of its state changed."""
    names = [n for n, block in states[0].curvature.blocks.items() if hasattr(block, part)]
    return {
        n: [k for k in range(len(states) - 1) if not model.same(*(getattr(s.curvature.blocks[n], part) for s in states[k : k + 2]))]
        for n in names
    }


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3, lambda step: 3, lambda step: 1 if step < 2 else 4])
def test_statistics_are_taken_when_due_and_only_then(model, every, group):
    optimizer, states, _ = trajectory(method=kf.KFAC(stats_every=every, refresh_every=1), group=group)
    due = [k for k in range(8) if k % (every(k) if callable(every) else every) == 0]
    assert [k for k in range(8) if optimizer.stats_due(states[k])] == due
    assert set(map(tuple, changed(states, "average", model).values())) == {tuple(due)}
    assert int(states[-1].curvature.observed) == len(due)


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3, lambda step: 3, lambda step: 1 if step < 2 else 4])
def test_refreshes_happen_when_due_and_only_then(model, every, group):
    _, states, _ = trajectory(method=kf.KFAC(refresh_every=every), group=group)
    due = [k for k in range(8) if k % (every(k) if callable(every) else every) == 0]
    found = changed(states, "solver", model)
    assert set(map(tuple, found.values())) == {tuple(due)}


def test_spread_refreshes_block_k_at_offset_k_and_all_at_the_start(model):
    _, states, _ = trajectory(method=kf.KFAC(refresh_every=4), spread=True, fallback=kf.Diagonal(refresh_every=4))
    found = changed(states, "solver", model)
    for k, steps in enumerate(found.values()):
        assert steps == [s for s in range(8) if s == 0 or s % 4 == k % 4]


def test_what_is_not_due_costs_no_call(model):
    calls = []

    def statistics(state):
        calls.append(int(state.curvature.steps))
        return {"fc": optimizer.reduce(state, "fc", np.ones((4, 1, 3)), np.ones((4, 1, 2)))["fc"]}

    params = {"fc.weight": np.ones((2, 3))}
    optimizer = kf.ModelOptimizer(kf.KFAC(stats_every=3), kf.Model({"fc": kf.Linear(3, 2, None)}), kf.StepSize())
    state = optimizer.init(params)
    for _ in range(7):
        _, state = optimizer.update(params, params, state, statistics, terms=4.0)
    assert calls == [0, 3, 6]


DAMPINGS = [None, 0.5, {"l0": 0.3, "l2": 7.0, "bias.weight": 0.01}]


@pytest.mark.parametrize("overrides", DAMPINGS, ids=["configured", "one", "one a block"])
@pytest.mark.parametrize(
    "rule", [kf.Damping(0.1, "exact"), kf.Damping(0.1), kf.Damping(0.1, "plain"), kf.Damping(0.1, norm="median", relative=True)]
)
@pytest.mark.parametrize("fisher", ["empirical", "forward"])
def test_grouping_equal_blocks_changes_no_number(model, fisher, rule, overrides):
    runs = []
    for group in (False, True):
        overriding = {"damping": overrides} if overrides else None
        method = kf.KFAC(damping=rule, refresh_every=2, fisher=fisher)
        runs.append(trajectory(method=method, group=group, overrides=overriding, clip=1e-2))
    (_, single, apart), (_, grouped, together) = runs
    assert all(model.same(a, b, 1e-12) for a, b in zip(apart, together, strict=True))
    assert all(model.same(a, b, 1e-12) for a, b in zip(single, grouped, strict=True))
    other = trajectory(method=kf.KFAC(damping=rule, refresh_every=2, fisher=fisher), overrides={"damping": {"l1": 0.505}}, clip=1e-2)
    assert not model.same(other[2][-1], apart[-1], 1e-6)


def test_a_grouped_optimizer_takes_gradients_of_some_blocks(model, rng):
    params = parameters(rng)
    grads, records = (
        random_like(rng, params),
        {n: (rng.normal(size=(5, v.in_features)), rng.normal(size=(5, 2))) for n, v in LAYERS.items()},
    )
    del grads["l1"], grads["scale"]
    results = []
    for group in (False, True):
        optimizer = kf.Optimizer(kf.KFAC(), LAYERS, group=group)
        results.append(optimizer.step(params, grads, records, optimizer.init(params))[0])
    assert model.same(*results, 1e-12)
    assert model.same(results[0]["l1"], params["l1"])
    assert not model.same(results[0]["l0"], params["l0"])


def test_grouping_keeps_the_precision_of_each_block(rng):
    layers = {"single": kf.Linear(3, 2), "double": kf.Linear(3, 2)}
    dtypes = {"single": np.float32, "double": np.float64}

    def draw(shape, name):
        return rng.normal(size=shape).astype(dtypes[name])

    params = {n: {"weight": draw((2, 3), n), "bias": draw(2, n)} for n in layers}
    optimizer = kf.Optimizer(kf.KFAC(), layers, group=True)
    records = {n: (draw((5, 3), n), draw((5, 2), n)) for n in layers}
    _, state = optimizer.step(params, params, records, optimizer.init(params))
    for name, block in state.curvature.blocks.items():
        assert block.solver.input.dtype == dtypes[name]


def test_damping_may_be_a_function_of_the_step(ref, rng, captures):
    x, g = captures(rng)
    params = {"fc": {"weight": rng.normal(size=(2, 3))}}

    def run(damping):
        optimizer = kf.Optimizer(kf.KFAC(damping=damping, refresh_every=1), {"fc": kf.Linear(3, 2, None)}, momentum=0.0, learning_rate=1.0)
        state, moves = optimizer.init(params), []
        for _ in range(3):
            after, state = optimizer.step(params, params, {"fc": (x, g)}, state)
            moves.append(after["fc"]["weight"] - params["fc"]["weight"])
        return moves

    scheduled = run(lambda step: 0.1 * (1 + step))
    for k, move in enumerate(scheduled):
        assert ref.distance(move, run(0.1 * (1 + k))[k]) < 1e-13
        assert ref.distance(move, run(0.101 * (1 + k))[k]) > 1e-5


def test_the_fallback_scale_does_not_depend_on_whether_records_came(rng, captures, ref):
    """Statistics of a gradient are due every step here, records every other: its terms must be known or asked for, never guessed."""
    params = {"fc": {"weight": rng.normal(size=(2, 3))}, "scale": rng.normal(size=3)}
    x, g = captures(rng, 8)
    method, fallback = kf.KFAC(stats_every=2), kf.Diagonal(stats_every=1, stats_decay=1.0)
    optimizer = kf.Optimizer(method, {"fc": kf.Linear(3, 2, None)}, learning_rate=0.0, fallback=fallback)
    state = optimizer.init(params)
    _, state = optimizer.step(params, params, {"fc": (x, g)}, state)
    try:
        _, state = optimizer.step(params, params, None, state)
    except ValueError as error:
        assert "`terms`" in str(error)  # noqa: PT017
    assert ref.distance(state.curvature.blocks["scale"].average.values[0], 8 * params["scale"] ** 2) < 1e-12


def test_a_layer_keeps_its_own_schedule_when_the_fallback_is_due_more_often(rng, captures, model):
    params = {"fc": {"weight": rng.normal(size=(2, 3))}, "scale": rng.normal(size=3)}
    optimizer = kf.Optimizer(kf.KFAC(stats_every=3), {"fc": kf.Linear(3, 2, None)}, fallback=kf.Diagonal(stats_every=1))
    state = optimizer.init(params)
    for _ in range(3):
        x, g = captures(rng)
        _, state = optimizer.step(params, params, {"fc": (x, g)}, state)
    assert float(state.curvature.blocks["fc"].average.weight) == 1.0
