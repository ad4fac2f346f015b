"""Eigenbases that are followed: what is seen of their drift, what a sweep does to it, and which way a refresh takes."""

from itertools import pairwise

import numpy as np
import pytest

import kfcore as kf
from kfcore import eigenbasis
from kfcore._array import namespace
from kfcore.eigenbasis import follow, look, probes, refined

XP = namespace(np.zeros(1))
LEFT, IMPROVED, DECOMPOSED = np.eye(3, dtype=int)


def orthogonal(rng, n, leading=()):
    return np.linalg.qr(rng.normal(size=(*leading, n, n)))[0]


def near_to(rng, basis, size):
    """An orthogonal matrix that differs by ``size`` an entry."""
    found, triangle = np.linalg.qr(basis + size * rng.normal(size=basis.shape))
    return found * np.sign(np.diag(triangle))


def turned(basis, x):
    return np.swapaxes(basis, -1, -2) @ x @ basis


def drift_of(basis, x):
    """Mass off the diagonal in the basis, relative."""
    inside = turned(basis, x)
    return np.linalg.norm(inside - np.diag(np.diag(inside))) / np.linalg.norm(x)


def skew_of(basis):
    wide = basis.astype(np.float64)
    return np.abs(np.swapaxes(wide, -1, -2) @ wide - np.eye(wide.shape[-1])).max()


def refresh(how, x, basis, turn=1):
    found = follow(XP, how, x, basis, np.full(x.shape[:-2], turn, np.int32))
    assert found.ok.all()
    return found


def walk(rng, n, steps, rate=0.02, dtype=np.float64):
    """Second moments of rows that forget a little at every step, with a spectrum over three orders of magnitude."""
    shape = orthogonal(rng, n) * np.exp(-np.linspace(0.0, 3.5, n))
    rows = rng.normal(size=(2 * n, n))
    for _ in range(steps):
        rows = np.sqrt(1.0 - rate**2) * rows + rate * rng.normal(size=rows.shape)
        seen = rows @ shape.T / np.sqrt(2 * n)
        yield (seen.T @ seen).astype(dtype)


# -- what is seen --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 40])
def test_the_drift_is_seen(rng, n):
    basis, values = orthogonal(rng, n), rng.uniform(0.1, 2.0, n)
    x = (basis * values) @ basis.T
    near = near_to(rng, basis, 0.003)
    looks = [look(XP, x, near, probes(XP, x, np.asarray(turn, np.int32))) for turn in range(300)]
    inside = turned(near, x)
    exact = ((inside - np.diag(np.diag(inside))) ** 2).sum(axis=0)
    # the values are fitted to the same vectors, which takes one of their degrees of freedom
    share = 1.0 - 1.0 / eigenbasis.PROBES
    np.testing.assert_allclose(np.mean([drift for _, drift, _ in looks], axis=0), share * exact, rtol=0.2)
    np.testing.assert_allclose(np.mean([values for values, _, _ in looks], axis=0), np.diag(inside), atol=3e-3)
    totals = np.array([drift.sum() for _, drift, _ in looks]) / exact.sum()
    assert 0.25 < totals.min() < totals.max() < 3.0
    values_seen, drift, apart = look(XP, x, basis, probes(XP, x, np.asarray(0, np.int32)))
    np.testing.assert_allclose(values_seen, values, rtol=1e-13)
    assert drift.max() < 1e-28
    assert apart < 1e-28


def test_skew_is_seen(rng):
    x, basis = np.eye(30), orthogonal(rng, 30)
    for size in (1e-10, 1e-3):
        skew = size * rng.normal(size=(30, 30))
        apart = look(XP, x, basis + skew, probes(XP, x, np.asarray(3, np.int32)))[2]
        exact = np.linalg.norm((basis + skew) @ (basis + skew).T - np.eye(30)) ** 2 / 30.0
        assert 0.3 < apart / exact < 3.0


# -- what a sweep does -----------------------------------------------------------------------------------------------------


def test_of_two_vectors_a_sweep_is_the_rotation_of_jacobi(rng):
    for coupling, gap in ((0.3, 1.0), (0.3, -1.0), (0.3, 0.0), (1e-9, 1.0), (-0.7, 1e-9)):
        x = np.array([[1.0 + gap, coupling], [coupling, 1.0]])
        basis = refined(XP, x, np.eye(2), np.diag(x), np.array([1.0, 0.5]), 1)
        assert drift_of(basis, x) < 1e-15
        assert skew_of(basis) < 1e-15
        # by the smaller of both angles, to either side
        assert np.abs(basis).diagonal().min() > np.sqrt(0.5) - 1e-12


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_sweep_takes_out_what_drifted(rng, dtype):
    n = 24
    x = np.linspace(1.0, 3.0, n) * np.eye(n)
    x = np.tensordot(x, 1.0, 0)
    skew = rng.normal(size=(n, n))
    skew[:, 4:] *= 1e-3
    basis = np.linalg.qr(np.eye(n) + 0.02 * (np.tril(skew, -1) - np.tril(skew, -1).T))[0]
    x = turned(basis, x).astype(dtype)
    before = drift_of(np.eye(n), x)
    values, drift = np.diag(x), ((x - np.diag(np.diag(x))) ** 2).sum(axis=0)
    after = refined(XP, x, np.eye(n, dtype=dtype), values, drift, 6)
    assert after.dtype == dtype
    assert drift_of(after, x) < 0.5 * before
    assert skew_of(after) < 20 * np.finfo(dtype).eps
    # what is left is of second order: a small turn of the same kind leaves the square of it
    assert drift_of(refined(XP, x, after, np.diag(turned(after, x)), drift, n), x) < 0.05 * before


def test_a_sweep_of_everything_decomposes(rng):
    x = turned(orthogonal(rng, 9), np.diag(np.arange(1.0, 10.0)))
    basis = refined(XP, x, orthogonal(rng, 9), np.ones(9), np.ones(9), 9)
    assert drift_of(basis, x) < 1e-13


@pytest.mark.parametrize(("dtype", "limit"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("n", [9, 40])
def test_two_hundred_refreshes_of_a_factor_that_drifts(rng, n, dtype, limit):
    how = kf.Tracked(smallest=1)
    basis, ways, before, after, worst, lengths = np.eye(n, dtype=dtype), 0, [], [], 0.0, []
    for turn, x in enumerate(walk(rng, n, 200, dtype=dtype)):
        before.append(drift_of(basis, x))
        found = refresh(how, x, basis, turn)
        basis, ways = found.basis, ways + found.way
        assert basis.dtype == found.values.dtype == dtype
        after.append(drift_of(basis, x))
        worst = max(worst, skew_of(basis))
        lengths.append(np.abs((basis.astype(np.float64) ** 2).sum(axis=0) - 1.0).max())
    assert worst < limit
    # rounding errors do not add up in the vectors that are turned again and again
    assert max(lengths[20:]) < 7.0 * np.finfo(dtype).eps
    assert ways[2] == 1
    assert ways[1] > 50
    assert ways[0] > 10
    assert max(after[1:]) < 2.0 * how.tolerance
    assert drift_of(np.eye(n), x) > 0.3
    improved = np.array(after)[1:] < np.array(before)[1:]
    assert improved.sum() > 0.9 * ways[1]


# -- which way -------------------------------------------------------------------------------------------------------------


def test_each_way_is_taken_and_counted(rng):
    how = kf.Tracked(smallest=1, tolerance=0.01, jump=0.3)
    x, y = (turned(orthogonal(rng, 12), np.diag(np.arange(1.0, 13.0))) for _ in range(2))
    values, basis = np.linalg.eigh(x)
    near = near_to(rng, basis, 0.02)
    assert np.array_equal(refresh(how, x, near, turn=0).way, DECOMPOSED)
    same = refresh(how, x, basis)
    assert np.array_equal(same.way, LEFT)
    np.testing.assert_allclose(same.basis, basis, rtol=0, atol=1e-14)
    np.testing.assert_allclose(same.values, values, rtol=1e-12)
    better = refresh(how, x, near)
    assert np.array_equal(better.way, IMPROVED)
    assert drift_of(better.basis, x) < 0.5 * drift_of(near, x)
    jumped = refresh(how, y, basis)
    assert np.array_equal(jumped.way, DECOMPOSED)
    np.testing.assert_allclose(jumped.values, np.linalg.eigvalsh(y), rtol=1e-12)


def test_rounding_errors_are_undone_and_a_basis_that_is_none_is_replaced(rng):
    how = kf.Tracked(smallest=1)
    x = turned(orthogonal(rng, 12), np.diag(np.arange(1.0, 13.0)))
    basis = np.linalg.eigh(x)[1]
    found = refresh(how, x, basis + 1e-10 * rng.normal(size=(12, 12)))
    assert np.array_equal(found.way, LEFT)
    assert skew_of(found.basis) < 1e-14
    for wrong in (1.01 * basis, basis + 1e-3 * rng.normal(size=(12, 12)), np.full((12, 12), np.nan)):
        found = refresh(how, x, wrong)
        assert np.array_equal(found.way, DECOMPOSED)
        assert skew_of(found.basis) < 1e-14


def test_the_options_of_a_refresh(rng):
    x = turned(orthogonal(rng, 12), np.diag(np.arange(1.0, 13.0)))
    near = near_to(rng, np.linalg.eigh(x)[1], 0.02)
    drifts = [drift_of(refresh(kf.Tracked(smallest=1, tolerance=0.0, block=4, sweeps=k), x, near).basis, x) for k in (1, 2, 4, 8)]
    assert all(b < 0.7 * a for a, b in pairwise(drifts))
    wide, narrow = (drift_of(refresh(kf.Tracked(smallest=1, tolerance=0.0, block=k, sweeps=1), x, near).basis, x) for k in (12, 2))
    assert wide < 1e-12 < narrow
    assert (kf.Tracked().width(100), kf.Tracked().width(1000), kf.Tracked().width(3), kf.Tracked(block=50).width(20)) == (8, 63, 3, 20)


def test_orthogonal_iteration_converges_to_the_eigenvectors(rng):
    how = kf.Tracked(smallest=1, step="qr", tolerance=0.0, sweeps=4)
    x = turned(orthogonal(rng, 8), np.diag(2.0 ** np.arange(8.0)))
    basis = near_to(rng, np.linalg.eigh(x)[1], 0.02)
    drifts = [drift_of(basis, x)]
    for turn in range(1, 6):
        found = refresh(how, x, basis, turn)
        basis = found.basis
        drifts.append(drift_of(basis, x))
        assert np.array_equal(found.way, IMPROVED)
        assert skew_of(basis) < 1e-14
    assert drifts[-1] < 1e-6 * drifts[0]
    np.testing.assert_allclose(np.sort(found.values), np.linalg.eigvalsh(x), rtol=1e-5)


# -- factors without distinct eigenvalues, tiny and huge -----------------------------------------------------------------


@pytest.mark.parametrize("step", ["refine", "qr"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("name", ["identity", "zero", "rank one", "repeated", "one eigenvalue"])
def test_degenerate_factors(rng, name, scale, dtype, step):
    n = 10
    values = {
        "identity": np.ones(n),
        "zero": np.zeros(n),
        "rank one": np.eye(n)[0],
        "repeated": np.repeat([1.0, 2.0], n // 2),
        "one eigenvalue": np.ones(n),
    }[name]
    frame = np.eye(n) if name == "identity" else orthogonal(rng, n)
    x = (scale * (frame * values) @ frame.T).astype(dtype)
    how = kf.Tracked(smallest=1, tolerance=0.0, step=step)
    eps = float(np.finfo(dtype).eps)
    for start in (np.eye(n, dtype=dtype), orthogonal(rng, n).astype(dtype)):
        basis, kept = start, 0
        for turn in range(4):
            found = refresh(how, x, basis, turn)
            basis = found.basis
            assert np.isfinite(basis).all()
            assert (found.values >= 0).all()
            assert skew_of(basis) < (2e-14 if dtype == np.float64 else 1e-5)
            rebuilt = (basis.astype(np.float64) * found.values) @ basis.T
            assert np.abs(rebuilt - x).max() <= (1e3 * eps + kept) * scale
            kept = 2e-3 if step == "qr" and name in ("repeated", "rank one") else 1e-6 if dtype == np.float32 else 1e-12


def test_one_feature(rng):
    found = refresh(kf.Tracked(smallest=1), np.array([[2.0]]), np.array([[-1.0]]))
    assert (found.values, found.basis) == (2.0, -1.0)


# -- stacks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["refine", "qr"])
def test_a_stack_is_as_many_factors(rng, step):
    how = kf.Tracked(smallest=1, tolerance=0.0, jump=0.3, block=3, step=step)
    stacked = np.stack([list(walk(rng, 10, 5)) for _ in range(3)], axis=1)  # [steps, stack, n, n]
    basis, single = np.broadcast_to(np.eye(10), (3, 10, 10)), [np.eye(10)] * 3
    for turn, x in enumerate(stacked):
        found = refresh(how, x, basis, turn)
        alone = [refresh(how, x[k], single[k], turn) for k in range(3)]
        basis, single = found.basis, [one.basis for one in alone]
        for k in range(3):
            np.testing.assert_allclose(found.values[k], alone[k].values, rtol=0, atol=1e-12)
            signs = np.sign((found.basis[k] * alone[k].basis).sum(axis=0))
            np.testing.assert_allclose(found.basis[k], signs * alone[k].basis, rtol=0, atol=1e-11)
        assert found.way.shape == (3, 3)
        assert (found.way == (IMPROVED if turn else DECOMPOSED)).all()
    # all go the way of the one that needs it most
    stacked[-1, 1] = turned(orthogonal(rng, 10), np.diag(np.arange(10.0)))
    assert (refresh(how, stacked[-1], basis, 9).way == DECOMPOSED).all()


# -- in a method -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["factored", "plain", "exact"])
@pytest.mark.parametrize("options", [{}, {"fisher": "forward"}, {"norm": "median"}, {"relative": True}])
def test_kfac_has_the_directions_of_a_decomposition(rng, captures, fitted, kind, options):
    """At the first refresh, and where a basis that was left behind has been swept to convergence."""
    options = dict(options)
    fisher = options.pop("fisher", "empirical")
    rule = kf.Damping(0.3, kind, **options)
    layer = kf.Linear(9, 8)
    (x, g), (y, h) = (captures(rng, n=40, inp=9, out=8) for _ in range(2))
    plain, exact = (kf.KFAC(damping=rule, fisher=fisher, basis=basis) for basis in (None, kf.Eigh()))
    # the values are estimates, which converge with the square of the drift
    followed = kf.KFAC(damping=rule, fisher=fisher, basis=kf.Tracked(smallest=1, tolerance=0.0, jump=2.0, sweeps=30, block=4))
    grad = rng.normal(size=layer.shape)
    states = [fitted(method, layer, x, g) for method in (plain, exact, followed)]
    for k in range(2):
        directions = [m.precondition(layer, s, grad) for m, s in zip((plain, exact, followed), states, strict=True)]
        for found in directions[1:]:
            np.testing.assert_allclose(found, directions[0], rtol=0, atol=1e-10 * np.abs(directions[0]).max())
        if k == 0:
            states = [
                m.refresh(layer, m.observe(s, m.reduce(layer, s, y, h))) for m, s in zip((plain, exact, followed), states, strict=True)
            ]
    solver = states[-1].solver
    assert solver.ways.tolist() == ([0, 2, 2] if fisher != "forward" else [0, 1, 1])
    assert states[1].solver.ways.tolist() == ([0, 0, 4] if fisher != "forward" else [0, 0, 2])


def test_what_a_direction_is_made_of_are_no_estimates(rng, captures, fitted):
    layer, tracked = kf.Linear(20, 18, None), kf.Tracked(smallest=1, tolerance=0.2)
    (x, g), (y, h) = (captures(rng, n=60, inp=20, out=18) for _ in range(2))
    exact = [kf.KFAC(damping=kf.Damping(0.3, "exact"), basis=tracked), kf.EKFAC(basis=tracked, moved="reset")]
    for method in (*exact, kf.EKFAC(basis=tracked)):
        state = fitted(method, layer, x, g)
        state = method.refresh(layer, method.observe(state, method.reduce(layer, state, y, h), 0.98))
        assert state.solver.ways[2] == 2
        quotients = np.diag(turned(state.solver.input_basis, state.average.values[0]))
        apart = np.abs(state.solver.input_values / quotients - 1.0).max()
        assert (apart < 1e-12) == (method in exact)


def test_small_factors_and_diagonal_ones_are_decomposed(rng):
    method = kf.EKFAC(basis=kf.Tracked(smallest=5))
    for layer, way in ((kf.Linear(4, 3, None), [0, 0, 4]), (kf.Linear(5, 3, None), [1, 0, 3]), (kf.Embedding(30, 6), [1, 0, 3])):
        state = method.init(layer, np.zeros(()))
        ids = rng.integers(0, 30, size=(20, 1)) if isinstance(layer, kf.Embedding) else rng.normal(size=(20, 1, layer.in_features))
        state = method.observe(state, method.reduce(layer, state, ids, rng.normal(size=(20, 1, layer.shape[0]))))
        state = method.refresh(layer, method.refresh(layer, state))
        assert state.solver.ways.tolist() == way


def test_ekfac_on_a_followed_basis_is_near_ekfac(rng, model):
    """The same numbers at first, and the same training to within the tolerance."""
    batches = [model.batch(rng, 64) for _ in range(12)]
    ends = []
    for basis in (kf.Eigh(), kf.Tracked(smallest=1, tolerance=0.005)):
        optimizer = kf.Optimizer(kf.EKFAC(damping=0.1, basis=basis, refresh_every=1), model.layers(), learning_rate=0.1)
        params = model.params(np.random.default_rng(5))
        state, history = optimizer.init(params), []
        for x, y in batches:
            grads, records = model.gradients(params, x, y)
            params, state = optimizer.step(params, grads, records, state)
            history.append(params["fc1"]["weight"])
        ends.append(history)
    assert state.curvature.blocks["fc1"].solver.ways[1] > 5
    start = model.params(np.random.default_rng(5))["fc1"]["weight"]
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=0, atol=1e-13)
    assert 0.0 < np.linalg.norm(ends[0][-1] - ends[1][-1]) < 0.01 * np.linalg.norm(ends[0][-1] - start)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"tolerance": -0.1}, "`tolerance` must be zero or more, got -0.1"),
        ({"tolerance": float("nan")}, "`tolerance` must be a finite number"),
        ({"jump": 0.0}, "`jump` must be positive"),
        ({"tolerance": 0.5, "jump": 0.5}, "`jump` of Tracked must be above `tolerance`, 0.5, got 0.5"),
        ({"step": "jacobi"}, "`step` of Tracked must be 'refine' or 'qr', got 'jacobi'"),
        ({"sweeps": 0}, "`sweeps` of Tracked must be a positive int, got 0"),
        ({"block": 1.5}, "`block` of Tracked must be a positive int, got 1.5"),
        ({"smallest": True}, "`smallest` of Tracked must be a positive int, got True"),
    ],
)
def test_a_setting_out_of_range_is_refused(options, pattern):
    with pytest.raises(ValueError, match=pattern):
        kf.Tracked(**options)
