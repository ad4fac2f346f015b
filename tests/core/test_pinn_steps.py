"""Steps of the optimizer for residuals: searches, adaptive damping, failures, files, and how far they come in a given time."""

import time

import array_api_strict as strict
import numpy as np
import pytest

import kfcore as kf
from kfcore import pinn, taylor

LAPLACE = taylor.Derivatives(2, operators={"laplacian": taylor.laplacian(2)})
VALUE = taylor.Derivatives(2, ())


def solution(x):
    return np.sin(np.pi * x[:, 0]) * np.sin(np.pi * x[:, 1])


def problem(sizes=(2, 8, 1), n=30, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    network = taylor.Sequential.mlp(sizes, "tanh")
    params = {}
    for name, layer in network.layers.items():
        bound = layer.in_features**-0.5
        params[name] = {r: rng.uniform(-bound, bound, size=s).astype(dtype) for r, s in layer.parameters.items()}
    source = pinn.LinearOperator({"laplacian": -1.0}, lambda points: 2 * np.pi**2 * solution(points.x))
    terms = {"inside": pinn.Term(source, LAPLACE), "border": pinn.Term(pinn.LinearOperator({"value": 1.0}), VALUE)}
    border = rng.uniform(size=(n // 2, 2))
    border[np.arange(n // 2), rng.integers(0, 2, n // 2)] = rng.integers(0, 2, n // 2)
    return network, terms, params, {"inside": rng.uniform(size=(n, 2)).astype(dtype), "border": border.astype(dtype)}


def run(optimizer, params, batches, steps):
    state, infos = optimizer.init(params), []
    for _ in range(steps):
        params, state, info = optimizer.step(params, state, batches)
        infos.append(info)
    return params, state, infos


def same(one, other, rtol=0.0):
    for name, roles in one.items():
        for role, x in roles.items():
            assert np.abs(x - other[name][role]).max() <= rtol * np.abs(x).max()


@pytest.mark.parametrize("method", pinn.METHODS)
def test_every_method_makes_the_loss_smaller(method):
    network, terms, params, batches = problem()
    optimizer = pinn.Optimizer(network, terms, method, damping=None if method in ("kfac*", "hessian-free") else 1e-4)
    _, state, infos = run(optimizer, params, batches, 40)
    assert infos[-1].loss < 0.05 * infos[0].loss
    assert int(state.skipped) == 0
    assert set(infos[0].losses) == set(terms)
    assert type(optimizer.direction).__name__ in optimizer.why


@pytest.mark.parametrize("rule", [pinn.LineSearch(2), pinn.LineSearch(1, momentum=0.5), pinn.LineSearch(99, smallest=-6)])
def test_rates_that_are_tried_together_are_those_tried_apart(rule):
    network, terms, params, batches = problem()
    found = []
    for together in (1, 3):
        made = pinn.LineSearch(rule.radius, smallest=rule.smallest, momentum=rule.momentum, together=together)
        found.append(run(pinn.Optimizer(network, terms, "kfac", step_rule=made), params, batches, 6))
    same(found[0][0], found[1][0], 1e-9)
    assert [float(i.rate) for i in found[0][2]] == [float(i.rate) for i in found[1][2]]


def test_the_search_takes_the_best_of_its_grid():
    network, terms, params, batches = problem()
    optimizer = pinn.Optimizer(network, terms, "engd-w", damping=1e-4, step_rule=pinn.LineSearch(99, smallest=-12))
    moved, _, info = optimizer.step(params, optimizer.init(params), batches)
    full = {n: {r: (moved[n][r] - x) / float(info.rate) for r, x in roles.items()} for n, roles in params.items()}
    losses = {}
    for e in range(-12, 1):
        at = {n: {r: x + 2.0**e * full[n][r] for r, x in roles.items()} for n, roles in params.items()}
        losses[2.0**e] = sum(optimizer.evaluate(at, batches).values())
    assert float(info.rate) == min(losses, key=losses.__getitem__) < 1.0


def test_a_search_that_finds_nothing_stays():
    network, terms, params, batches = problem()
    optimizer = pinn.Optimizer(network, terms, "engd-w", step_rule=pinn.LineSearch(9, smallest=40, largest=44))
    moved, _, info = optimizer.step(params, optimizer.init(params), batches)
    same(moved, params)
    assert float(info.rate) == 0.0


def test_steps_that_make_the_loss_larger_are_taken_back_and_damped():
    network, terms, params, batches = problem()
    rule = kf.LevenbergMarquardt(1e-10, every=1, factor=0.5, floor=1e-12)
    optimizer = pinn.Optimizer(network, terms, "engd-w", damping=rule, step_rule=pinn.Fixed())
    moved, state, info = optimizer.step(params, optimizer.init(params), batches)
    assert info.ratio < 0
    assert not info.accepted
    assert int(state.rejected) == 1
    assert float(state.damping) == 2e-10
    same(moved, params)


def test_the_ratio_is_that_of_the_loss_to_the_model():
    network, terms, params, batches = problem()
    rule = kf.LevenbergMarquardt(0.5, every=1)
    optimizer = pinn.Optimizer(network, terms, "kfac*", damping=kf.Damping(rule, "factored"))
    moved, _, info = optimizer.step(params, optimizer.init(params), batches)
    before, after = (sum(optimizer.evaluate(p, batches).values()) for p in (params, moved))
    lin = optimizer.loss.linearised(params, optimizer._points(batches), np.float64)
    change = {n: np.c_[moved[n]["weight"], moved[n]["bias"]] - np.c_[params[n]["weight"], params[n]["bias"]] for n in params}
    moved_by = lin.push(change)
    promised = lin.residuals @ moved_by + 0.5 * moved_by @ moved_by + 0.25 * sum((x**2).sum() for x in change.values())
    assert abs(info.ratio - (after - before) / promised) < 1e-8


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*pinn.METHODS, "fixed"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_residuals_that_are_not_finite_change_nothing(method):
    network, terms, params, batches = problem()
    chosen = pinn.SampleSpace(1e-3, momentum=0.5) if method == "fixed" else method
    optimizer = pinn.Optimizer(network, terms, chosen, step_rule=pinn.Fixed(0.1) if method == "fixed" else None)
    state = optimizer.init(params)
    params, state, _ = optimizer.step(params, state, batches)
    bad = {"inside": batches["inside"].copy(), "border": batches["border"]}
    bad["inside"][3, 1] = np.nan
    moved, after, info = optimizer.step(params, state, bad)
    same(moved, params)
    assert int(after.skipped) == 1
    assert not info.accepted
    # what comes next is as if it had not been, up to what counts steps
    one, _, _ = optimizer.step(params, after._replace(steps=state.steps), batches)
    two, _, _ = optimizer.step(params, state, batches)
    same(one, two)


def test_wrong_calls_name_what_is_wrong():
    network, terms, params, batches = problem()
    optimizer = pinn.Optimizer(network, terms, "kfac*")
    state, inside, border = optimizer.init(params), batches["inside"], batches["border"]
    for given, word in [
        ({"inside": inside}, "`batches` must be of the terms"),
        ({"inside": inside[:0], "border": border}, "at least one point"),
        ({"inside": inside[:, 0], "border": border}, r"points \[N, d\]"),
        ({"inside": inside[:, :1], "border": border}, r"`x` must have shape \[N, 2\]"),
    ]:
        with pytest.raises(ValueError, match=word):
            optimizer.step(params, state, given)
    with pytest.raises(ValueError, match=r"params.*must have the shapes"):
        optimizer.step(params | {"unknowns": {"k": np.zeros(2)}}, state, batches)
    with pytest.raises(ValueError, match="`method` must be auto, kfac"):
        pinn.Optimizer(network, terms, "adam")
    with pytest.raises(ValueError, match="bias 'joint' or None"):
        pinn.Optimizer(taylor.Sequential.mlp((2, 3, 1), bias="separate"), terms, "kfac")
    with pytest.raises(ValueError, match="`used` must name"):
        pinn.Term(pinn.LinearOperator({"laplacian": 1.0}), VALUE)
    with pytest.raises(ValueError, match="`sizes` must be given"):
        pinn.Optimizer(network, terms)
    with pytest.raises(ValueError, match="absolute"):
        pinn.Kronecker(kf.Damping(1e-3, relative=True))


def test_wrong_residuals_name_their_term():
    network, terms, params, batches = problem()

    def attempt(value, cotangents, word):
        residual = pinn.Nonlinear(lambda points, jet, unknowns: value(jet), lambda points, jet, unknowns: cotangents(jet))
        optimizer = pinn.Optimizer(network, terms | {"border": pinn.Term(residual, VALUE)}, "kfac*")
        with pytest.raises(ValueError, match=word):
            optimizer.step(params, optimizer.init(params), batches)

    def good(jet):
        return taylor.Jet(np.ones_like(jet.value))

    attempt(lambda jet: jet.value[:3, 0], good, r"residuals of term 'border' must have shape \[15\]")
    attempt(lambda jet: jet.value[:, 0], lambda jet: taylor.Jet(np.ones((2, 15, 1))), "`cotangents` of 'value' of term 'border'")
    attempt(lambda jet: jet.value[:, 0], lambda jet: taylor.Jet(None, None, {"lap": jet.value}), "operators of its derivatives, got lap")
    attempt(lambda jet: jet.value[:, 0], lambda jet: (good(jet), {"k": jet.value}), "derivatives by unknowns of term 'border'")


def test_a_network_in_float32_is_inverted_in_float64():
    network, terms, params, batches = problem(dtype="float32")
    optimizer = pinn.Optimizer(network, terms, "kfac*")
    moved, state, infos = run(optimizer, params, batches, 20)
    assert moved["fc1"]["weight"].dtype == np.float32
    assert state.direction.solvers[0].left.dtype == np.float64
    assert infos[-1].loss < 0.05 * infos[0].loss
    narrow = pinn.Optimizer(network, terms, "engd-w", damping=1e-12, precision="model")
    _, state, infos = run(narrow, params, batches, 3)
    assert int(state.direction.raised) == 3
    assert np.isfinite(float(infos[-1].loss))


def test_a_state_goes_through_a_file(tmp_path):
    network, terms, params, batches = problem()
    for method in ("kfac*", "spring"):
        optimizer = pinn.Optimizer(network, terms, method)
        params, state, _ = run(optimizer, params, batches, 3)
        kf.save_state(tmp_path / "state", state, "pinn")
        back = kf.load_state(tmp_path / "state", optimizer.init(params), "pinn")
        one, _, _ = optimizer.step(params, state, batches)
        two, _, _ = optimizer.step(params, back, batches)
        same(one, two)
        with pytest.raises(kf.CheckpointError, match="of kind 'other'"):
            kf.load_state(tmp_path / "state", state, "other")
        other = pinn.Optimizer(taylor.Sequential.mlp((2, 9, 1)), terms, method)
        wider = {k: {r: np.zeros(s) for r, s in layer.parameters.items()} for k, layer in other.network.layers.items()}
        with pytest.raises(kf.CheckpointError, match="must have shape"):
            kf.load_state(tmp_path / "state", other.init(wider), "pinn")


def test_the_choice_gives_its_reason():
    network, terms, _, _ = problem((2, 64, 64, 48, 48, 1))
    small = pinn.Optimizer(network, terms, sizes={"inside": 900, "border": 120})
    assert small.choice is not None
    assert small.choice.method == "spring"
    assert "1,020 residuals and 9,873 parameters" in small.why
    assert pinn.choose(network, terms, {"inside": 20_000, "border": 500}).method == "kfac*"
    wide = taylor.Sequential.mlp((2, 3000, 3000, 1))
    assert "GB" in pinn.choose(wide, terms, {"inside": 20_000, "border": 500}).reason
    assert " s, more than" in pinn.choose(wide, terms, {"inside": 5_000, "border": 500}, memory=1e12).reason


def test_the_strict_library_takes_whole_steps():
    """No operation beyond the standard, in any method."""
    network, terms, params, batches = problem((2, 4, 1), 8)
    terms = {"inside": pinn.Term(pinn.LinearOperator({"laplacian": -1.0}, 1.0), LAPLACE), "border": terms["border"]}
    put = strict.asarray
    theirs = {n: {r: put(x) for r, x in roles.items()} for n, roles in params.items()}
    for method in pinn.METHODS:
        optimizer = pinn.Optimizer(network, terms, method, step_rule=pinn.LineSearch(1, smallest=-4) if method == "kfac" else None)
        moved, _, _ = run(optimizer, params, batches, 3)
        found, _, _ = run(optimizer, theirs, {n: put(x) for n, x in batches.items()}, 3)
        same(moved, {n: {r: kf.to_numpy(x) for r, x in roles.items()} for n, roles in found.items()}, 1e-7)


# -- how far -----------------------------------------------------------------------------------------------------------


def adam(optimizer, params, batches, seconds, rate=3e-3):
    """With gradients of the same passes."""
    points, began = optimizer._points(batches), time.process_time()
    m = {n: np.zeros(s) for n, s in optimizer.shapes.items()}
    v, k = dict(m), 0
    while time.process_time() - began < seconds:
        lin, k = optimizer.loss.linearised(params, points, np.float64), k + 1
        for n, g in lin.pull(lin.residuals).items():
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g * g
        update = {n: -rate * m[n] / (1 - 0.9**k) / (np.sqrt(v[n] / (1 - 0.999**k)) + 1e-8) for n in m}
        params = optimizer.moved(params, update)
    return params


def test_curvature_comes_further_than_adam_in_the_same_time():
    network, terms, params, batches = problem((2, 16, 16, 1), 100)
    x = np.random.default_rng(9).uniform(size=(500, 2))
    values = taylor.Propagation(network, VALUE)

    def error(params):
        return np.linalg.norm(values.jet(params, x).value[:, 0] - solution(x)) / np.linalg.norm(solution(x))

    first = pinn.Optimizer(network, terms, "kfac*")
    slow = error(adam(first, params, batches, 1.2))
    found = {}
    for method in ("engd-w", "spring", "kfac*"):
        optimizer, moved = pinn.Optimizer(network, terms, method), params
        state, began = optimizer.init(params), time.process_time()
        while time.process_time() - began < 1.2:
            moved, state, _ = optimizer.step(moved, state, batches)
        found[method] = error(moved)
    assert all(e < 0.3 * slow for e in found.values()), (slow, found)
