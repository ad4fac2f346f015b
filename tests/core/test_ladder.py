"""Every rung of the ladder is taken where it must be, counted, and gives what a healthy library would have given."""

import numpy as np
import pytest

import kfcore as kf
from kfcore import _array, ladder, linalg

EPS = {"float32": np.finfo(np.float32).eps, "float64": np.finfo(np.float64).eps}


def definite(rng, *shape):
    root = rng.normal(size=(*shape, shape[-1] + 3))
    return root @ np.swapaxes(root, -1, -2) / root.shape[-1]


@pytest.fixture
def failing(monkeypatch):
    """Let a primitive on NumPy fail for the matrices that ``bad(x)`` says, in the way that ``how`` says."""

    def make(name, bad, how):
        reference = getattr(linalg, name).reference

        def kernel(xp, x):
            if x.ndim > 2:
                return tuple(np.stack(parts) for parts in zip(*[kernel(xp, one) for one in x], strict=True))
            result = reference(xp, x)
            if not bad(x):
                return result
            if how == "told":
                return (*(np.full_like(part, np.nan) for part in result[:-1]), np.asarray(False))
            if how == "garbage":
                return (*(np.roll(part, 1, axis=-1) + 0.5 for part in result[:-1]), np.asarray(True))
            raise AssertionError(how)

        monkeypatch.setitem(_array._kernels, (name, "numpy"), kernel)

    return make


def check_bases(values, vectors, x, rtol):
    assert np.abs((vectors * values[..., None, :]) @ np.swapaxes(vectors, -1, -2) - x).max() <= rtol * np.abs(x).max()


WAYS = {"eigh": ladder.eigh_all, "invert": ladder.invert_all}


def check(name, result, x, rtol):
    if name == "eigh":
        check_bases(*result[:2], x, rtol)
    else:
        assert np.abs(result[0] @ x - np.eye(x.shape[-1])).max() <= rtol


@pytest.mark.parametrize("name", WAYS)
def test_a_healthy_factor_stays_on_the_first_rung(rng, name):
    x = definite(rng, 3, 5)
    ((*result, ok, rung),) = WAYS[name](np, [x])
    assert ok.all()
    assert rung is None
    check(name, result, x, 1e-10)


@pytest.mark.parametrize("how", ["told", "garbage"])
@pytest.mark.parametrize("name", WAYS)
def test_jitter_is_the_second_rung(rng, failing, name, how):
    x = definite(rng, 5).astype(np.float32)
    failing(name, lambda y: y.dtype == np.float32 and np.array_equal(y, x), how)
    ((*result, ok, rung),) = WAYS[name](np, [x])
    assert ok
    assert rung == ladder.JITTERED
    check(name, result, x, 1e-3)
    shift = ladder.JITTER * EPS["float32"] * np.trace(x)
    if name == "invert":
        assert np.allclose(result[0], np.linalg.inv(x + shift * np.eye(5)), rtol=1e-4, atol=1e-4)
    else:
        assert np.allclose(result[0], np.linalg.eigvalsh(x), atol=1e-5)


@pytest.mark.parametrize("how", ["told", "garbage"])
@pytest.mark.parametrize("name", WAYS)
def test_float64_is_the_third_rung(rng, failing, name, how):
    x = definite(rng, 5).astype(np.float32)
    failing(name, lambda y: y.dtype == np.float32, how)
    ((*result, ok, rung),) = WAYS[name](np, [x])
    assert ok
    assert rung == ladder.WIDENED
    assert all(part.dtype == np.float32 for part in result)
    check(name, result, x, 1e-5)


@pytest.mark.parametrize("name", WAYS)
def test_a_stack_climbs_each_for_itself(rng, failing, name):
    x = definite(rng, 4, 5).astype(np.float32)
    first, second = x[1].copy(), x[2].copy()
    failing(name, lambda y: y.dtype == np.float32 and (np.array_equal(y, first) or np.abs(y - second).max() < 1e-2), "told")
    ((*result, ok, rung),) = WAYS[name](np, [x])
    assert ok.all()
    assert rung.tolist() == [0, ladder.JITTERED, ladder.WIDENED, 0]
    for i in range(4):
        check(name, [part[i] for part in result], x[i], 1e-3)


@pytest.mark.parametrize("name", WAYS)
def test_what_is_not_finite_goes_straight_to_the_last(rng, failing, name):
    x = definite(rng, 5)
    x[1, 2] = x[2, 1] = x[3, 3] = np.nan
    calls = []
    failing(name, lambda y: bool(calls.append(y.dtype)), "told")
    ((*_, ok, _),) = WAYS[name](np, [x])
    assert not ok
    assert len(calls) == 1


@pytest.mark.parametrize("name", WAYS)
def test_in_float64_there_is_no_wider_rung(rng, failing, name):
    failing(name, lambda y: True, "told")
    ((*_, ok, rung),) = WAYS[name](np, [definite(rng, 5)])
    assert not ok
    assert rung == 0


METHODS = {
    "inverses": (kf.KFAC(damping=0.1, refresh_every=1), "invert"),
    "exact": (kf.KFAC(damping=kf.Damping(0.1, "exact"), refresh_every=1), "eigh"),
    "ekfac": (kf.EKFAC(damping=0.1, refresh_every=1), "eigh"),
    "foof": (kf.FOOF(damping=0.1, refresh_every=1), "invert"),
}


@pytest.mark.parametrize("case", METHODS)
def test_an_optimizer_counts_the_rungs_and_takes_the_healthy_step(rng, failing, case):
    """Weights after three steps are those of a library that does not fail; diagnostics say how they came about, by layer."""
    method, name = METHODS[case]
    x, g = rng.normal(size=(16, 4)).astype(np.float32), rng.normal(size=(16, 3)).astype(np.float32)
    start = {"fc": {"weight": np.ones((3, 4), np.float32)}}
    optimizer = kf.Optimizer(method, {"fc": kf.Linear(4, 3, None)}, learning_rate=0.1)

    def train():
        params, state = start, optimizer.init(start)
        for _ in range(3):
            params, state = optimizer.step(params, {"fc": {"weight": g.T @ x / 16}}, {"fc": (x, g / 16)}, state)
        return params["fc"]["weight"], optimizer.diagnostics(state)

    healthy, nothing = train()
    assert nothing["widened_factors"] == {}
    assert nothing["jittered_factors"] == {}
    failing(name, lambda y: y.dtype == np.float32, "garbage")
    widened, found = train()
    sides = 1 if case == "foof" else 2
    assert found["widened_factors"] == {"fc": 3 * sides}
    assert found["kept_refreshes"] == {}
    assert np.abs(widened - healthy).max() < 1e-5
    failing(name, lambda y: True, "told")
    lost, found = train()
    assert found["kept_refreshes"] == {"fc": 3}
    assert found["widened_factors"] == {}
    assert np.isfinite(lost).all()


HARD = {
    "tiny": lambda x: 1e-30 * x,
    "huge": lambda x: 1e15 * x,
    "one row": lambda x: np.repeat(x[:1], len(x), axis=0),
    "zeros": lambda x: 0.0 * x,
    "ill-conditioned": lambda x: x * np.logspace(0, -6, x.shape[1]).astype(np.float32),
}


@pytest.mark.parametrize("what", HARD)
@pytest.mark.parametrize("case", METHODS)
def test_hard_factors_have_finite_directions_downhill(rng, case, what):
    method, _ = METHODS[case]
    x, g = rng.normal(size=(16, 6)).astype(np.float32), rng.normal(size=(16, 3)).astype(np.float32)
    x = HARD[what](x).astype(np.float32)
    layer, grad = kf.Linear(6, 3, None), rng.normal(size=(3, 6)).astype(np.float32)
    for damping in (1e-12, 1e-4):
        state = method.init(layer, x)
        state = method.observe(state, method.reduce(layer, state, x[:, None], g[:, None]))
        state = method.refresh(layer, state, damping)
        direction = method.precondition(layer, state, grad)
        assert np.isfinite(direction).all(), (case, what, damping)
        assert np.sum(direction * grad) > 0
