"""Numbers for a log, against dense matrices."""

import numpy as np
import pytest

import kfcore as kf

METHODS = {
    "factored": kf.KFAC(damping=0.1),
    "exact": kf.KFAC(damping=kf.Damping(0.1, kind="exact")),
    "ekfac": kf.EKFAC(damping=0.1),
}


def trained(rng, method, steps=3):
    optimizer = kf.Optimizer(method, {"fc": kf.Linear(4, 3), "pair": kf.Linear(3, 2, None, stack=(2,))}, learning_rate=0.1)
    params = {
        "fc": {"weight": rng.normal(size=(3, 4)), "bias": rng.normal(size=3)},
        "pair": {"weight": rng.normal(size=(2, 2, 3))},
        "scale": rng.normal(size=3),
    }
    state, states = optimizer.init(params), []
    for _ in range(steps):
        x, g = rng.normal(size=(9, 4)), rng.normal(size=(9, 3))
        xs, gs = rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 9, 2))
        grads = {
            "fc": {"weight": g.T @ x, "bias": g.sum(0)},
            "pair": {"weight": gs.swapaxes(-1, -2) @ xs},
            "scale": rng.normal(size=3),
        }
        _, state = optimizer.step(params, grads, {"fc": (x, g), "pair": (xs, gs)}, state)
        states.append(state)
    return optimizer.bind(params), states


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_numbers_are_those_of_the_matrices(rng, method):
    optimizer, (*_, state) = trained(rng, method)
    found = kf.measures(optimizer, state)
    for name, at in (("fc", ()), ("pair[0]", (0,)), ("pair[1]", (1,))):
        block = optimizer.preconditioner.blocks[name.partition("[")[0]]
        own = state.curvature.blocks[block.name]
        pure = np.linalg.eigvalsh(method.operator(block.layer, own).dense()[at])
        full = np.linalg.eigvalsh(method.operator(block.layer, own, damped=True).dense()[at])
        expected = {
            "eigenvalue_max": pure[-1],
            "eigenvalue_mean": pure.mean(),
            "effective_rank": pure.sum() ** 2 / (pure**2).sum(),
            "condition": full[-1] / full[0],
            "damping_over_mean": full.mean() / pure.mean() - 1.0,
        }
        for key, value in expected.items():
            assert found[f"{name}/{key}"] == pytest.approx(value, rel=1e-9), (name, key)
    assert found["scale/effective_rank"] <= 3.0
    assert not any(key.endswith(("cosine", "rotation")) for key in found)
    assert all(type(value) is float for value in found.values())


def test_exact_damping_is_that_share_of_the_mean(rng):
    optimizer, (*_, state) = trained(rng, METHODS["ekfac"])
    found = kf.measures(optimizer, state)
    assert found["fc/damping_over_mean"] == pytest.approx(0.1 / found["fc/eigenvalue_mean"], rel=1e-9)


def test_cosine_and_rotation(rng):
    optimizer, states = trained(rng, kf.EKFAC(damping=0.1, refresh_every=1))
    grads = {"fc.weight": np.eye(3, 4), "fc.bias": np.zeros(3), "pair.weight": np.ones((2, 2, 3)), "scale": np.ones(3)}
    directions = {name: 2.0 * x for name, x in grads.items()} | {"fc.bias": np.ones(3)}
    found = kf.measures(optimizer, states[-1], grads=grads, directions=directions, before=states[-2])
    assert found["pair[1]/cosine"] == pytest.approx(1.0)
    assert found["fc/cosine"] == pytest.approx(6.0 / (3**0.5 * 15**0.5))
    assert 1e-3 < found["fc/rotation"] <= 1.0
    still = kf.measures(optimizer, states[-1], before=states[-1])
    assert still["fc/rotation"] < 1e-7
    assert "scale/rotation" not in still
