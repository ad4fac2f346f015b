"""Curvature of residuals: Jacobians against imaginary steps, Kronecker factors and inverses against dense matrices."""

import numpy as np
import pytest

from kfcore import pinn, taylor
from kfcore import testing as kt
from kfcore._array import namespace
from kfcore.pinn import joint
from kfcore.pinn.kronecker import factors, groups
from kfcore.pinn.linearised import UNKNOWNS

XP = namespace(np.zeros(1))
LAPLACE = taylor.Derivatives(2, operators={"laplacian": taylor.laplacian(2)})
VALUE = taylor.Derivatives(2, ())


def source(points):
    return np.sin(3.0 * points.x[:, 0]) + points.x[:, 1]


def parameters(rng, network, unknowns=()):
    params = {k: {r: 0.7 * rng.normal(size=s) for r, s in layer.parameters.items()} for k, layer in network.layers.items()}
    return params | ({UNKNOWNS: {name: rng.normal(size=shape) for name, shape in dict(unknowns).items()}} if unknowns else {})


def poisson(network):
    inside = pinn.Term(pinn.LinearOperator({"laplacian": -1.0}, source), LAPLACE, weight=0.5)
    return {"inside": inside, "border": pinn.Term(pinn.LinearOperator({"value": 1.0}, 0.25), VALUE, weight=3.0)}


def burgers():
    """``u_t + u u_x = nu u_xx`` with ``nu`` unknown, beside data."""

    def residual(points, jet, unknowns):
        return jet.first[:, 0, 0] + jet.value[:, 0] * jet.first[:, 1, 0] - unknowns["nu"] * jet.operators["second"][:, 0]

    def cotangents(points, jet, unknowns):
        ones = np.ones_like(jet.value)
        first = np.stack([ones, jet.value], axis=1)
        return taylor.Jet(jet.first[:, 1], first, {"second": -unknowns["nu"] * ones}), {"nu": -jet.operators["second"][:, 0]}

    derivatives = taylor.Derivatives(2, operators={"second": taylor.laplacian(2, of=(1,))})
    measured = pinn.LinearOperator({"value": 1.0}, lambda points: points.data["u"])
    return {"equation": pinn.Term(pinn.Nonlinear(residual, cotangents), derivatives), "data": pinn.Term(measured, VALUE, 2.0)}


def system():
    """Two outputs, three equations, one of them nonlinear in both, two unknowns of which one is a vector."""

    def residual(points, jet, unknowns):
        u, v, q = jet.value[:, 0], jet.value[:, 1], jet.operators["laplacian"]
        return np.stack(
            [q[:, 0] + u * v, jet.first[:, 0, 1] * unknowns["a"] - u, v * unknowns["b"][1] + q[:, 1] * unknowns["b"][0]], axis=1
        )

    def cotangents(points, jet, unknowns):
        u, v, zero = jet.value[:, 0], jet.value[:, 1], np.zeros(len(points.x))
        one, a, b = zero + 1.0, zero + unknowns["a"], unknowns["b"]
        value = np.stack([np.stack([v, u], 1), np.stack([-one, zero], 1), np.stack([zero, zero + b[1]], 1)])
        first = np.zeros((3, *jet.first.shape))
        first[1, :, 0, 1] = a
        laplacian = np.stack([np.stack([one, zero], 1), np.zeros((len(u), 2)), np.stack([zero, zero + b[0]], 1)])
        by_b = np.zeros((3, len(u), 2))
        by_b[2] = np.stack([jet.operators["laplacian"][:, 1], v], 1)
        by_a = np.stack([zero, jet.first[:, 0, 1], zero])
        return taylor.Jet(value, first, {"laplacian": laplacian}), {"a": by_a, "b": by_b}

    mixed = pinn.LinearOperator({"value": [[1.0, -2.0]], "first[1]": lambda points: points.data["c"]}, 0.1)
    return {
        "equations": pinn.Term(pinn.Nonlinear(residual, cotangents), LAPLACE, 0.7),
        "flux": pinn.Term(mixed, taylor.Derivatives(2)),
        "border": pinn.Term(pinn.LinearOperator({"value": 1.0}), VALUE),
    }


def residuals(optimizer, params, batches):
    """``rho`` by itself, with complex numbers too."""
    found = []
    params = {k: {r: np.asarray(a, dtype=complex) for r, a in roles.items()} for k, roles in params.items()}
    for name, term in optimizer.terms.items():
        points = batches[name] if isinstance(batches[name], pinn.Points) else pinn.Points(batches[name])
        jet = taylor.Propagation(optimizer.network, term.derivatives).jet(params, points.x.astype(complex))
        r = term.residual.value(points, jet, params.get(UNKNOWNS, {}))
        found.append(np.sqrt(term.weight / len(points.x)) * (r.T if r.ndim == 2 else r).reshape(-1))
    return np.concatenate(found)


def imaginary(optimizer, params, batches):
    """``J [R, D]`` in the order of :meth:`Linearised.jacobian`."""
    columns = []
    places = []
    for name, layer in optimizer.network.layers.items():
        for o in range(layer.out_features):
            places += [(name, "weight", (o, i) if layer.layout == "oi" else (i, o)) for i in range(layer.in_features)]
            places += [(name, "bias", (o,))] if layer.bias else []
    for name, shape in optimizer.unknowns.items():
        places += [(UNKNOWNS, name, entry) for entry in np.ndindex(shape)]
    for layer, role, entry in places:
        moved = {k: {r: a.astype(complex) for r, a in roles.items()} for k, roles in params.items()}
        moved[layer][role][entry] += 1e-30j
        columns.append(np.imag(residuals(optimizer, moved, batches)) / 1e-30)
    return np.stack(columns, axis=1)


def problem(kind, rng, n=7):
    if kind == "poisson":
        network = taylor.Sequential.mlp((2, 5, 4, 1), "tanh")
        return pinn.Optimizer(network, poisson(network), "engd-w"), {"inside": rng.uniform(size=(n, 2)), "border": rng.uniform(size=(4, 2))}
    if kind == "burgers":
        network = taylor.Sequential.mlp((2, 4, 4, 1), "sin", layout="io")
        data = pinn.Points(rng.uniform(size=(3, 2)), {"u": rng.normal(size=3)})
        return pinn.Optimizer(network, burgers(), "engd-w", unknowns={"nu": ()}), {"equation": rng.uniform(size=(n, 2)), "data": data}
    network = taylor.Sequential.mlp((2, 5, 2), "tanh", bias=None)
    flux = pinn.Points(rng.uniform(size=(3, 2)), {"c": rng.normal(size=(3, 1, 2))})
    batches = {"equations": rng.uniform(size=(n, 2)), "flux": flux, "border": rng.uniform(size=(2, 2))}
    return pinn.Optimizer(network, system(), "engd-w", unknowns={"a": (), "b": (2,)}), batches


def setting(kind, seed=0, n=7):
    rng = np.random.default_rng(seed)
    optimizer, batches = problem(kind, rng, n)
    params = parameters(rng, optimizer.network, optimizer.unknowns)
    lin = optimizer.loss.linearised(params, optimizer._points(batches), np.float64)
    return rng, optimizer, params, batches, lin


def close(x, desired, rtol=1e-11):
    assert np.shape(x) == np.shape(desired)
    assert np.abs(x - desired).max() <= rtol * np.abs(desired).max()


def kron(b, a):
    return np.kron(b, a)


KINDS = ["poisson", "burgers", "system"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slab", [2**24, 40])
def test_every_product_is_with_the_jacobian(kind, slab, monkeypatch):
    monkeypatch.setattr(pinn.linearised, "SLAB", slab)  # 40: in pieces, none as products of columns
    rng, optimizer, params, batches, lin = setting(kind)
    j = imaginary(optimizer, params, batches)
    rho = residuals(optimizer, params, batches).real
    close(lin.jacobian(), j)
    close(lin.residuals, rho)
    close(lin.kernel(), j @ j.T)
    w, flat = rng.normal(size=j.shape[0]), rng.normal(size=j.shape[1])
    v = lin.unflat(flat, {name: np.zeros(shape) for name, shape in optimizer.shapes.items()})
    close(lin.flat(lin.pull(w)), j.T @ w)
    close(lin.push(v), j @ flat)
    total = sum(lin.losses().values())
    close(total, 0.5 * rho @ rho)
    close(sum(optimizer.evaluate(params, batches).values()), 0.5 * rho @ rho)


def test_columns_are_multiplied_where_that_costs_less():
    """A wide layer at few columns: the product form is taken, and is the same matrix."""
    rng = np.random.default_rng(1)
    z, g, w, h = (rng.normal(size=s) for s in ((6, 2, 20), (2, 6, 2, 30), (5, 1, 20), (1, 5, 1, 30)))
    one, other = pinn.linearised.Side(z, g), pinn.linearised.Side(w, h)
    each = [np.einsum("mnso,nsi->mnoi", s.grads, s.rows).reshape(-1, 600) for s in (one, other)]
    close(pinn.linearised._products(XP, one, other, False), each[0] @ each[1].T)
    close(pinn.linearised._products(XP, one, one, True), each[0] @ each[0].T)


def test_cotangents_can_be_checked():
    rng = np.random.default_rng(2)
    good, points = burgers()["equation"], pinn.Points(rng.uniform(size=(4, 2)))
    kt.check_cotangents(good.residual, good.derivatives, points, unknowns={"nu": np.asarray(0.3)})
    every = system()["equations"]
    unknowns = {"a": np.asarray(0.3), "b": np.array([1.0, -0.5])}
    kt.check_cotangents(every.residual, every.derivatives, points, 2, unknowns)

    def wrong(points, jet, unknowns):
        jet_part, others = good.residual.cotangents(points, jet, unknowns)
        return jet_part, {name: 1.01 * x for name, x in others.items()}

    def wrong_first(points, jet, unknowns):
        jet_part, others = good.residual.cotangents(points, jet, unknowns)
        return jet_part._replace(first=1.01 * jet_part.first), others

    for cotangents, name in ((wrong, "'nu'"), (wrong_first, "'first'")):
        residual = pinn.Nonlinear(good.residual.function, cotangents)
        with pytest.raises(AssertionError, match=name):
            kt.check_cotangents(residual, good.derivatives, points, unknowns={"nu": np.asarray(0.3)})


# -- factors -----------------------------------------------------------------------------------------------------------


def stacked_residual():
    """All columns of the jet of one output: u, both first derivatives, the Laplacian."""

    def residual(points, jet, unknowns):
        return np.concatenate([jet.value, jet.first[:, :, 0], jet.laplacian], axis=1)

    def cotangents(points, jet, unknowns):
        n = len(points.x)
        value, first, laplacian = np.zeros((4, n, 1)), np.zeros((4, n, 2, 1)), np.zeros((4, n, 1))
        value[0], first[1, :, 0], first[2, :, 1], laplacian[3] = 1.0, 1.0, 1.0, 1.0
        return taylor.Jet(value, first, {"laplacian": laplacian})

    return pinn.Nonlinear(residual, cotangents)


def block_errors(network, term, n, columns="live", seed=3):
    """Relative distance of ``B (x) A`` from the exact block ``J^T J`` of each layer."""
    rng = np.random.default_rng(seed)
    direction = pinn.Kronecker(columns=columns)
    optimizer = pinn.Optimizer(network, {"only": term}, direction)
    lin = optimizer.loss.linearised(parameters(rng, network), {"only": pinn.Points(rng.uniform(size=(n, 2)))}, np.float64)
    errors, j, start = [], lin.jacobian(), 0
    for name, shape in optimizer.shapes.items():
        a, count, b = factors(XP, lin.sides(name)[0])
        size = shape[0] * shape[1]
        exact = j[:, start : start + size].T @ j[:, start : start + size]
        start += size
        errors.append(np.linalg.norm(kron(b, a / count) - exact) / np.linalg.norm(exact))
    return errors


def test_factors_are_exact_for_all_columns_of_a_linear_network():
    deep = taylor.Sequential.mlp((2, 4, 3, 1), "identity")
    term = pinn.Term(stacked_residual(), LAPLACE, 0.3)
    for columns in ("live", "all"):
        assert max(block_errors(deep, term, 6, columns)) < 1e-14
    errors = block_errors(taylor.Sequential.mlp((2, 4, 3, 1), "tanh"), term, 6)
    assert errors[-1] < 1e-14
    assert min(errors[:-1]) > 1e-2


def test_factors_of_values_are_those_of_ordinary_kfac():
    border = pinn.Term(pinn.LinearOperator({"value": 1.0}), VALUE, 2.0)
    tanh, deep = (taylor.Sequential.mlp((2, 4, 3, 1), kind) for kind in ("tanh", "identity"))
    assert max(block_errors(tanh, border, 1)) < 1e-14
    assert max(block_errors(deep, border, 6)) < 1e-14
    several = block_errors(tanh, border, 6)
    assert several[-1] < 1e-14
    assert min(several[:-1]) > 1e-3


def test_the_last_layer_under_a_laplacian_is_exact_without_its_unused_columns():
    network = taylor.Sequential.mlp((2, 4, 3, 1), "tanh")
    term = pinn.Term(pinn.LinearOperator({"laplacian": 1.0}), LAPLACE)
    assert block_errors(network, term, 6, "live")[-1] < 1e-14
    assert block_errors(network, term, 6, "all")[-1] > 0.1


def test_averages_have_no_bias_and_do_not_see_the_order_of_points():
    rng = np.random.default_rng(4)
    network = taylor.Sequential.mlp((2, 5, 4, 1), "tanh")
    optimizer = pinn.Optimizer(network, poisson(network), pinn.Kronecker(1e-3, stats_decay=0.7))
    params, states = parameters(rng, network), []
    batches = [{"inside": rng.uniform(size=(6, 2)), "border": rng.uniform(size=(3, 2))} for _ in range(3)]
    for turn in (slice(None), slice(None, None, -1)):
        state = optimizer.init(params)
        for b in batches:
            _, state, _ = optimizer.step(params, state, {name: x[turn] for name, x in b.items()})
        states.append(state)
    weights = np.array([0.49, 0.7, 1.0]) / 2.19
    lins = [optimizer.loss.linearised(params, optimizer._points(b), np.float64) for b in batches]
    for i, name in enumerate(network.layers):
        for t in range(2):
            each = [factors(XP, lin.sides(name)[t]) for lin in lins]
            values = states[0].direction.averages[i].values[2 * t : 2 * t + 2]
            close(values[0], sum(w * a / n for w, (a, n, _) in zip(weights, each, strict=True)))
            close(values[1], sum(w * b for w, (_, _, b) in zip(weights, each, strict=True)))
        close(states[1].direction.averages[i].values[1], states[0].direction.averages[i].values[1])


# -- inverses ----------------------------------------------------------------------------------------------------------


def spd(rng, n, rank=None):
    x = rng.normal(size=(rank or n + 3, n))
    return x.T @ x / len(x)


def test_the_inverse_of_two_products_is_the_dense_one():
    rng, lam = np.random.default_rng(5), np.asarray(1e-3)
    layers = [[(spd(rng, m), spd(rng, n)), (spd(rng, m), spd(rng, n))] for m, n in rng.integers(1, 12, size=(40, 2))]
    found, fine = joint.invert(XP, layers, lam, "plain")
    assert all(fine)
    for (pair, other), solver in zip(layers, found, strict=True):
        shifted = [x + lam * np.eye(len(x)) for x in (*pair, *other)]
        whole = kron(shifted[1], shifted[0]) + kron(shifted[3], shifted[2])
        x = rng.normal(size=(len(pair[1]), len(pair[0])))
        close(joint.apply(XP, solver, x), np.linalg.solve(whole, x.ravel()).reshape(x.shape), 1e-12)
        without = np.linalg.solve(kron(shifted[1], shifted[0]), x.ravel()).reshape(x.shape)
        assert np.abs(joint.apply(XP, solver, x) - without).max() > 1e-3 * np.abs(without).max()


def test_the_inverse_of_products_without_full_rank_leaves_no_residual():
    rng, lam = np.random.default_rng(6), np.asarray(1e-5)
    a, b, c, d = spd(rng, 9, 4), spd(rng, 7, 3), spd(rng, 9, 3), spd(rng, 7, 2)
    (solver,), _ = joint.invert(XP, [[(a, b), (c, d)]], lam, "plain")
    x = rng.normal(size=(7, 9))
    y = joint.apply(XP, solver, x)
    a, b, c, d = (m + lam * np.eye(len(m)) for m in (a, b, c, d))
    assert np.abs(b @ y @ a + d @ y @ c - x).max() < 1e-4
    (solver,), fine = joint.invert(XP, [[(0 * a, 0 * b), (0 * c, 0 * d)]], np.asarray(1e-300), "plain")
    assert fine[0]
    assert np.isfinite(joint.apply(XP, solver, x)).all()


@pytest.mark.parametrize("terms", [1, 2, 4])
def test_exact_damping_is_added_to_the_sum(terms):
    """As the optimizer does it: by eigenbases for one product, by conjugate gradients for more."""
    rng, lam = np.random.default_rng(7), np.asarray(1e-2)
    every = [(spd(rng, 6), spd(rng, 5)) for _ in range(terms)]
    merged = joint.grouped(XP, every, groups([2, *[0] * (terms - 1)]))
    (solver,), _ = joint.invert(XP, [merged], lam, "exact")
    x = rng.normal(size=(5, 6))
    y = joint.apply(XP, solver, x) if terms == 1 else joint.solve(XP, solver, every, lam, x)
    whole = sum(kron(b, a) for a, b in every) + lam * np.eye(30)
    close(y, np.linalg.solve(whole, x.ravel()).reshape(5, 6), 1e-9 if terms < 3 else 1e-3)


def test_products_are_merged_into_the_nearest_one():
    rng = np.random.default_rng(8)
    every = [(spd(rng, 4), s * spd(rng, 3)) for s in (1.0, 0.3, 2.0)]
    a, b = joint.nearest(XP, every)
    assert min(np.linalg.eigvalsh(a).min(), np.linalg.eigvalsh(b).min()) > 0
    u, s, v = np.linalg.svd(sum(np.outer(y.ravel(), x.ravel()) for x, y in every))
    best = s[0] * np.outer(u[:, 0], v[0])
    found = np.outer(b.ravel(), a.ravel())
    close(found / np.linalg.norm(found), best / np.linalg.norm(best), 1e-9)
    whole = sum(kron(y, x) for x, y in every)
    close(np.trace(kron(b, a)), np.trace(whole))
    # what is lost, beside what one of the terms alone would miss
    assert np.linalg.norm(kron(b, a) - whole) < 0.4 * np.linalg.norm(whole)


@pytest.mark.parametrize(
    ("orders", "expected"), [([2], [[0]]), ([2, 0], [[0], [1]]), ([0, 2, 1, 2], [[1, 3], [0, 2]]), ([0, 0, 0], [[0], [1, 2]])]
)
def test_which_terms_are_merged(orders, expected):
    assert groups(orders) == expected


# -- directions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_the_exact_solve_are_the_same(kind):
    _, optimizer, params, batches, lin = setting(kind)
    j, rho, lam = lin.jacobian(), lin.residuals, 1e-3
    desired = -np.linalg.solve(j.T @ j + lam * np.eye(j.shape[1]), j.T @ rho)
    for side in ("samples", "parameters", "auto"):
        made = pinn.Optimizer(
            optimizer.network, optimizer.terms, pinn.SampleSpace(lam, side=side), step_rule=pinn.Fixed(), unknowns=optimizer.unknowns
        )
        moved, _, info = made.step(params, made.init(params), batches)
        assert bool(info.accepted)
        change = made.moved(params, lin.unflat(desired, {n: np.zeros(s) for n, s in made.shapes.items()}))
        for name, roles in change.items():
            for role, x in roles.items():
                close(moved[name][role] - params[name][role], x - params[name][role], 1e-10)


def test_spring_carries_its_momentum():
    _, optimizer, params, batches, _ = setting("poisson")
    lam, mu = 1e-3, 0.8
    made = pinn.Optimizer(optimizer.network, optimizer.terms, pinn.SampleSpace(lam, momentum=mu), step_rule=pinn.Fixed(0.1))
    state, phi = made.init(params), 0.0
    for k in range(1, 4):
        lin = made.loss.linearised(params, made._points(batches), np.float64)
        j, rho = lin.jacobian(), lin.residuals
        back = np.linalg.solve(j @ j.T + lam * np.eye(len(rho)), -rho - mu * (j @ (phi + np.zeros(j.shape[1]))))
        phi = mu * phi + j.T @ back
        like = {n: np.zeros(s) for n, s in made.shapes.items()}
        desired = made.moved(params, lin.unflat(0.1 * phi / np.sqrt(1 - mu ** (2 * k)), like))
        params, state, _ = made.step(params, state, batches)
        close(params["fc1"]["weight"], desired["fc1"]["weight"], 1e-10)


def test_kfac_star_takes_the_minimum_of_the_exact_model():
    _, optimizer, params, batches, _ = setting("poisson")
    lam = 1e-2
    made = pinn.Optimizer(optimizer.network, optimizer.terms, "kfac*", damping=lam)
    state = made.init(params)
    params, state, first = made.step(params, state, batches)
    assert float(first.momentum) == 0.0
    lin = made.loss.linearised(params, made._points(batches), np.float64)
    last = np.concatenate([x.ravel() for x in state.last])
    moved, _, info = made.step(params, state, batches)
    change = np.concatenate(
        [x.ravel() for n in params for x in [np.c_[moved[n]["weight"], moved[n]["bias"]] - np.c_[params[n]["weight"], params[n]["bias"]]]]
    )
    direction = (change - float(info.momentum) * last) / float(info.rate)
    j = lin.jacobian()
    slope = j.T @ lin.residuals + j.T @ (j @ change) + lam * change
    for v in (direction, last):
        assert abs(v @ slope) <= 1e-9 * np.linalg.norm(v) * np.linalg.norm(j.T @ lin.residuals)
    promised = (j.T @ lin.residuals) @ change + 0.5 * (j @ change) @ (j @ change) + 0.5 * lam * change @ change
    close(promised, 0.5 * (j.T @ lin.residuals) @ change, 1e-8)
    assert promised < 0


def test_kfac_is_the_inverse_of_its_blocks():
    _, optimizer, params, batches, lin = setting("burgers")
    lam = 1e-3
    made = pinn.Optimizer(optimizer.network, optimizer.terms, pinn.Kronecker(lam), step_rule=pinn.Fixed(), unknowns={"nu": ()})
    moved, _, _ = made.step(params, made.init(params), batches)
    gradient = lin.pull(lin.residuals)
    for name in optimizer.network.layers:
        whole = 0.0
        for side in lin.sides(name):
            a, count, b = factors(XP, side)
            whole = whole + kron(b + lam * np.eye(len(b)), a / count + lam * np.eye(len(a)))
        step = -np.linalg.solve(whole, gradient[name].ravel()).reshape(gradient[name].shape)
        close(moved[name]["weight"] - params[name]["weight"], step[:, :-1].T, 1e-9)
        close(moved[name]["bias"] - params[name]["bias"], step[:, -1], 1e-9)
    j = lin.jacobian()[:, -1]
    close(moved[UNKNOWNS]["nu"] - params[UNKNOWNS]["nu"], -gradient[UNKNOWNS][0, 0] / (j @ j + lam), 1e-10)


def test_conjugate_gradients_arrive_at_the_exact_direction():
    _, optimizer, params, batches, lin = setting("poisson")
    lam = 1e-2
    j = lin.jacobian()
    desired = -np.linalg.solve(j.T @ j + lam * np.eye(j.shape[1]), j.T @ lin.residuals)
    errors = []
    for n in (1, 60):
        direction = pinn.ConjugateGradients(lam, iterations=n, preconditioner=pinn.Kronecker(1e-1))
        made = pinn.Optimizer(optimizer.network, optimizer.terms, direction, step_rule=pinn.Fixed())
        moved, _, _ = made.step(params, made.init(params), batches)
        flat = np.concatenate(
            [(np.c_[moved[k]["weight"], moved[k]["bias"]] - np.c_[params[k]["weight"], params[k]["bias"]]).ravel() for k in params]
        )
        errors.append(np.linalg.norm(flat - desired) / np.linalg.norm(desired))
    assert errors[1] < 1e-7 < 1e-2 < errors[0]
