"""Directions from the few rows a gradient is made of: equal to those from the gradient, and taken only where it is made of them."""

import numpy as np
import pytest

import kfcore as kf
from kfcore import factors
from kfcore.curvature import kfac, kronecker
from kfcore.statistics import GradientRows, rows_of, spans

WIDE = kf.Linear(40, 30)


@pytest.fixture
def paths(monkeypatch):
    """Which way each direction went."""
    taken = []
    plain = kfac.two_sided
    sandwich = factors.sandwich

    def two_sided(xp, layer, left, grad, right, rows):
        taken.append("rows")
        return plain(xp, layer, left, grad, right, rows)

    def counted(*args):
        taken[-1:] = ["matrix"]
        return sandwich(*args)

    monkeypatch.setattr(kfac, "two_sided", two_sided)
    monkeypatch.setattr(factors, "sandwich", counted)
    return taken


def case(rng, layer=WIDE, n=4, damping=1e-2, **options):
    method = kf.KFAC(damping=damping, **options)
    x, g = rng.normal(size=(n, 1, layer.in_features)), rng.normal(size=(n, 1, layer.out_features))
    state = method.init(layer, x)
    for _ in range(2):
        x, g = rng.normal(size=x.shape), rng.normal(size=g.shape)
        statistics = method.reduce(layer, state, x, g)
        state = method.observe(state, statistics.over(float(n)))
    a = layer.input_rows(np, x, x.dtype)
    return method, method.refresh(layer, state), rows_of(statistics, 0.5), 0.5 * layer.output_rows(np, g, g.dtype).T @ a


@pytest.mark.parametrize("damping", [kf.Damping(0.3), kf.Damping(0.3, kind="plain")])
@pytest.mark.parametrize("layer", [WIDE, kf.Linear(40, 30, None)], ids=["joint", "none"])
def test_the_direction_from_the_rows_is_that_of_the_gradient(ref, rng, paths, layer, damping):
    method, state, rows, grad = case(rng, layer, damping=damping)
    expected = method.precondition(layer, state, grad)
    assert paths == ["matrix"]
    assert ref.distance(method.precondition(layer, state, grad, rows), expected) < 1e-11
    assert paths == ["matrix", "rows"]
    off = rows._replace(scale=1.01 * rows.scale, known=True)
    assert ref.distance(method.precondition(layer, state, grad, off), expected) > 5e-3


def test_the_eigenbasis_is_applied_to_the_rows_too(ref, rng, monkeypatch):
    method, state, rows, grad = case(rng, damping=kf.Damping(1e-2, kind="exact"))
    expected = method.precondition(WIDE, state, grad)
    sandwiches = []
    plain = factors.sandwich
    monkeypatch.setattr(factors, "sandwich", lambda *args: sandwiches.append(1) or plain(*args))
    assert ref.distance(method.precondition(WIDE, state, grad, rows), expected) < 1e-11
    assert len(sandwiches) == 1, "one of the two rotations is of rows"


def test_many_rows_are_no_help(rng, paths):
    method, state, _, grad = case(rng)
    left, right = rng.normal(size=(25, 30)), rng.normal(size=(25, 41))
    method.precondition(WIDE, state, left.T @ right, GradientRows(left, right, known=True))
    assert paths == ["matrix"]
    assert grad.shape == (30, 41)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_gradient_of_something_else_is_told_apart(rng, dtype):
    """Nothing that users do to gradients, down to a part in ten thousand, passes for the product of the rows."""
    g, x, weight = rng.normal(size=(16, 96)), rng.normal(size=(16, 200)), rng.normal(size=(96, 200))
    rows = GradientRows(g.astype(dtype), x.astype(dtype), 0.25)
    grad = (0.25 * g.T @ x).astype(dtype)

    def told(changed):
        return not spans(np, rows, changed.astype(dtype))

    assert spans(np, rows, grad) is True
    assert told(grad * 0.9999), "clipped"
    assert told(grad + 1e-4 * weight), "penalised"
    assert told(grad - 0.25 * g[:1].T @ x[:1]), "a row that was not captured"
    assert told(2.0 * grad), "accumulated"
    assert all(told(other) for other in (np.roll(grad, 1, axis=0), np.roll(grad, 1, axis=1), -grad)), "moved or turned"
    for at in ((0, 0), (95, 199), (40, 77), (3, 13)):
        one = grad.copy()
        one[at] *= 1.0 + 1e-2
        assert told(one), f"one entry, at {at}"
    masked = grad.copy()
    masked[:, 5] = 0.0
    assert told(masked), "a frozen column"
    with np.errstate(all="ignore"):
        assert all(told(grad + bad) for bad in (np.nan, np.inf))
        assert not spans(np, rows._replace(inputs=rows.inputs * (1e30 if dtype == "float32" else 1e200)), grad)


def test_rounding_is_not_told_apart(rng):
    """The same product in another order of summation, for many shapes in float32."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        n, out, inp = rng.integers(1, 200), rng.integers(2, 300), rng.integers(2, 300)
        scale = 10.0 ** rng.uniform(-6, 6)
        g = (scale * rng.normal(size=(n, out)) + rng.normal()).astype("float32")
        x = (rng.normal(size=(n, inp)) + 3.0 * rng.normal()).astype("float32")
        order = rng.permutation(n)
        assert spans(np, GradientRows(g, x), g[order].T @ x[order]) is True, (seed, n, out, inp)


def test_rows_that_do_not_make_up_the_gradient_are_not_taken_from_statistics(rng):
    layer = kf.Linear(40, 30, None)
    method = kf.KFAC()
    x, g = rng.normal(size=(2, 4, 1, 40)), rng.normal(size=(2, 4, 1, 30))
    state = method.init(layer, x)
    first, second = (method.reduce(layer, state, a, b) for a, b in zip(x, g, strict=True))
    rows = rows_of(first + second, 1.0)
    assert np.allclose(rows.output_grads.T @ rows.inputs, sum(b[:, 0].T @ a[:, 0] for a, b in zip(x, g, strict=True)), rtol=1e-12)
    many = method.reduce(layer, state, rng.normal(size=(50, 1, 40)), rng.normal(size=(50, 1, 30)))
    for statistics in (many, first + many, method.reduce(layer, state, x[0]), method.reduce(layer, state, None, g[0])):
        assert rows_of(statistics, 1.0) is None
    assert rows_of(method.reduce(layer, state, x[0]) + method.reduce(layer, state, None, g[0][:2]), 1.0) is None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("change", [None, "clip", "penalty", "shared"])
def test_an_optimizer_takes_the_rows_only_where_they_are_the_gradient(ref, rng, monkeypatch, paths, reduction, change):
    """Whole steps with and without the short way are the same; it is taken unless somebody changed the gradient."""
    sharing = "reduce" if change == "shared" else "expand"
    layers = {"fc": kf.Linear(40, 30, "joint", sharing)}
    optimizer = kf.Optimizer(kf.KFAC(damping=1e-2), layers, learning_rate=0.1, loss_reduction=reduction)
    start = {"fc": {"weight": rng.normal(size=(30, 40)), "bias": rng.normal(size=30)}}
    batches = [(rng.normal(size=(2, 2, 40)), rng.normal(size=(2, 2, 30))) for _ in range(3)]

    def run():
        params, state = start, optimizer.init(start)
        for x, g in batches:
            dy = g / 4 if reduction == "mean" else g
            weight = np.einsum("nso,nsi->oi", dy, x)
            if change == "clip":
                weight = 0.9 * weight
            if change == "penalty":
                weight = weight + 1e-3 * params["fc"]["weight"]
            grads = {"fc": {"weight": weight, "bias": dy.sum(axis=(0, 1))}}
            params, state = optimizer.step(params, grads, {"fc": (x, dy)}, state, terms=4.0)
        return params

    short = run()
    assert paths == ["rows" if change is None else "matrix"] * 3
    monkeypatch.setattr(kronecker, "spans", lambda *_: False)
    long = run()
    assert paths[3:] == ["matrix"] * 3
    assert ref.distance(short["fc"]["weight"], long["fc"]["weight"]) < 1e-12


@pytest.mark.parametrize("known", [True, False])
def test_stacked_blocks_go_by_their_rows_together(ref, rng, paths, known):
    layers = {"a": WIDE, "b": WIDE}
    preconditioner = kf.Preconditioner(kf.preconditioner.blocks_of(kf.KFAC(damping=1e-2), layers), group=True)
    cases = {name: case(rng) for name in layers}
    state = preconditioner.init({name: np.zeros(()) for name in layers})
    state = state._replace(blocks={name: one[1] for name, one in cases.items()}, observed=np.asarray(1), refreshed=np.asarray(1))
    grads = {name: one[3] for name, one in cases.items()}
    expected = preconditioner.precondition(state, grads)
    rows = {name: one[2]._replace(known=known) for name, one in cases.items()}
    found = preconditioner.precondition(state, grads, rows)
    assert paths == ["matrix", "rows"]
    assert all(ref.distance(found[name], expected[name]) < 1e-11 for name in layers)
    preconditioner.precondition(state, grads, {"a": rows["a"]})
    assert paths[2:] == ["matrix"]
