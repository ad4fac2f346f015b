"""Learning rate, momentum and damping from the quadratic model, on problems whose answers are known."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

import kfcore as kf
from kfcore import quadratic

TINY = 1e-12


def regression(rng, n=20, inp=4, out=3, *, decay=0.0):
    """Mean of ``|x W^T - y|^2 / 2``: gradient, curvature products and loss as functions of the weights, and the best weights."""
    x, y = rng.normal(size=(n, inp)), rng.normal(size=(n, out))
    a = x.T @ x / n

    def loss(params):
        return 0.5 * np.sum((x @ params["fc"]["weight"].T - y) ** 2) / n

    def grads(params):
        dz = (x @ params["fc"]["weight"].T - y) / n
        return {"fc": {"weight": dz.T @ x}}, {"fc": (x, dz)}

    def product(vector):
        return {"fc": {"weight": vector["fc"]["weight"] @ a}}

    best = np.linalg.solve(a + decay * np.eye(inp), x.T @ y / n).T
    return SimpleNamespace(
        x=x, y=y, a=a, loss=loss, grads=grads, product=product, best=best, start={"fc": {"weight": rng.normal(size=(out, inp))}}
    )


def machine(method, layers=None, quadratic=None, **options):
    return kf.Optimizer(
        method, {"fc": kf.Linear(4, 3, None)} if layers is None else layers, quadratic=quadratic or kf.QuadraticModel(), **options
    )


def run(opt, problem, steps, *, params=None, state=None, product=None, loss=None, **given):
    """Parameters and states after each step."""
    params = problem.start if params is None else params
    state = opt.init(params) if state is None else state
    path = [(params, state)]
    for _ in range(steps):
        grads, records = problem.grads(params)
        lent = {"curvature_product": product or problem.product, "loss": loss or problem.loss}
        params, state = opt.step(params, grads, records, state, **lent, **given)
        path.append((params, state))
    return path


# -- coefficients ------------------------------------------------------------------------------------------------------


def model_of(rng, n=6):
    root, vectors, g = rng.normal(size=(n, n)), rng.normal(size=(2, n)), rng.normal(size=n)
    c, p = root @ root.T, 0.3 * np.eye(n)
    return SimpleNamespace(c=c, p=p, v=vectors, g=g, model=quadratic.Model(vectors @ c @ vectors.T, vectors @ p @ vectors.T, vectors @ g))


def test_the_minimum_is_that_of_the_model(rng):
    m = model_of(rng)
    w = quadratic.minimum(np, m.model, None, None)
    a = m.model.curvature + m.model.penalty
    assert np.allclose(w, np.linalg.solve(a, -m.model.slopes), rtol=1e-12)
    d = w @ m.v
    assert m.model.value(w) == pytest.approx(m.g @ d + 0.5 * d @ (m.c + m.p) @ d, rel=1e-12)
    assert m.model.divergence(w) == pytest.approx(d @ m.c @ d, rel=1e-12)


@pytest.mark.parametrize("fixed", [(-0.1, None), (None, 0.7), (-0.1, 0.7)])
def test_a_coefficient_that_is_given_stays_and_the_other_is_the_best_beside_it(rng, fixed):
    m = model_of(rng).model
    w = quadratic.minimum(np, m, *fixed)
    assert all(f is None or w[i] == f for i, f in enumerate(fixed))
    for i in [i for i, f in enumerate(fixed) if f is None]:
        for step in (1e-3, -1e-3):
            other = w.copy()
            other[i] += step
            assert m.value(other) > m.value(w)


def test_vectors_that_are_parallel_or_zero_leave_the_first_one_alone(rng):
    m = model_of(rng)
    for second in (0.0 * m.v[0], -2.5 * m.v[0], m.v[0] * (1 + 1e-12)):
        v = np.stack([m.v[0], second])
        w = quadratic.minimum(np, quadratic.Model(v @ m.c @ v.T, v @ m.p @ v.T, v @ m.g), None, None)
        assert w[1] == 0
        assert w[0] == pytest.approx(-(m.g @ m.v[0]) / (m.v[0] @ (m.c + m.p) @ m.v[0]), rel=1e-10)


def test_a_model_without_any_length_has_no_step():
    zeros = np.zeros((2, 2))
    assert np.array_equal(quadratic.minimum(np, quadratic.Model(zeros, zeros, np.zeros(2)), None, None), np.zeros(2))


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [kf.KFAC(damping=TINY, fisher="forward"), kf.KFAC(damping=kf.Damping(TINY, "exact"), fisher="forward")])
def test_a_step_on_a_quadratic_problem_lands_on_the_minimum(rng, method):
    problem = regression(rng)
    (_, _), (params, state) = run(machine(method), problem, 1)
    assert np.allclose(params["fc"]["weight"], problem.best, atol=1e-9)
    assert state.step.control.learning_rate == pytest.approx(1.0, rel=1e-9)
    assert state.step.control.momentum == 0


def test_the_learning_rate_makes_up_for_the_scale_of_the_direction(rng):
    """Grafting gives the direction the norm of the gradient; the model gives the step its length back."""
    problem = regression(rng)
    _, (params, state) = run(machine(kf.KFAC(damping=TINY, fisher="forward"), graft=True), problem, 1)
    assert np.allclose(params["fc"]["weight"], problem.best, atol=1e-9)
    assert abs(state.step.control.learning_rate - 1.0) > 0.01


def test_the_decay_is_part_of_the_model(rng):
    problem = regression(rng, decay=0.3)
    method = kf.KFAC(damping=kf.Damping(TINY, "exact"), fisher="forward")
    _, (params, state) = run(machine(method, weight_decay=0.3, decay="coupled"), problem, 1)
    assert np.allclose(params["fc"]["weight"], problem.best, atol=1e-9)
    assert state.step.control.learning_rate == pytest.approx(1.0, rel=1e-9)


def test_gradients_as_directions_make_conjugate_gradients(rng):
    """Two coefficients that minimise a quadratic along the gradient and the last update: n dimensions take n steps."""
    n = 6
    root, target = rng.normal(size=(n, n)), rng.normal(size=n)
    c = root @ root.T + 0.1 * np.eye(n)

    def descent(steps, **options):
        """Of a parameter of no layer, whose fallback gives the gradient itself."""
        fallback = kf.Diagonal(damping=TINY, power=0.0)
        opt = kf.ModelOptimizer(kf.KFAC(), kf.Model({}, {"p": (n,)}), kf.StepSize(**options), fallback=fallback)
        objective = SimpleNamespace(gram=lambda vs: np.stack([v["p"] for v in vs]) @ c @ np.stack([v["p"] for v in vs]).T)
        p, state = {"p": np.zeros(n)}, opt.init({"p": np.zeros(n)})
        yield p["p"]
        for _ in range(steps):
            updates, state = opt.update(p, {"p": c @ (p["p"] - target)}, state, None, terms=1.0, objective=objective)
            p = {"p": p["p"] + updates["p"]}
            yield p["p"]

    errors = [np.linalg.norm(p - target) for p in descent(n, quadratic=kf.QuadraticModel())]
    assert errors[-1] < 1e-7 * errors[0]
    assert errors[-2] > 1e-3 * errors[0]
    steepest = [np.linalg.norm(p - target) for p in descent(n, quadratic=kf.QuadraticModel(momentum=False), momentum=0.0)]
    assert steepest[1] == pytest.approx(errors[1], rel=1e-9)
    assert steepest[-1] > 1e-3 * errors[0]


def test_a_step_is_the_least_of_the_model_along_both_vectors(rng):
    """Against the model written out from the directions of the method itself, with a relative damping of two layers."""
    sizes, n = (4, 5, 3), 16
    layers = {"fc1": kf.Linear(4, 5, "separate"), "fc2": kf.Linear(5, 3)}
    x, y = rng.normal(size=(n, 4)), rng.normal(size=(n, 3))
    params = {
        k: {"weight": rng.normal(size=(o, i)), "bias": rng.normal(size=o)} for k, i, o in zip(layers, sizes[:2], sizes[1:], strict=True)
    }
    root = rng.normal(size=(43, 43))
    c = root @ root.T / 43
    flat = lambda tree: np.concatenate([v.ravel() for layer in tree.values() for v in layer.values()])  # noqa: E731

    def back(vector):
        out, at = {}, 0
        for k, layer in params.items():
            out[k] = {}
            for role, v in layer.items():
                out[k][role], at = vector[at : at + v.size].reshape(v.shape), at + v.size
        return out

    def grads_of(params):
        hidden = np.tanh(x @ params["fc1"]["weight"].T + params["fc1"]["bias"])
        dz = (hidden @ params["fc2"]["weight"].T + params["fc2"]["bias"] - y) / n
        dh = (dz @ params["fc2"]["weight"]) * (1 - hidden**2)
        grads = {"fc1": {"weight": dh.T @ x, "bias": dh.sum(0)}, "fc2": {"weight": dz.T @ hidden, "bias": dz.sum(0)}}
        return grads, {"fc1": (x, dh), "fc2": (hidden, dz)}

    method = kf.EKFAC(damping=kf.Damping(0.5, "exact", relative=True), refresh_every=2)
    options = {"learning_rate": 1.0, "momentum": 0.0, "fallback": kf.Diagonal(damping=0.5)}
    opt, plain = machine(method, layers), kf.Optimizer(method, layers, **options)
    state, shadow, last = opt.init(params), plain.init(params), None
    for _ in range(4):
        grads, records = grads_of(params)
        stepped, shadow = plain.step(params, grads, records, shadow)
        direction, g = flat(params) - flat(stepped), flat(grads)
        curvature = opt.bind(params)
        lam = []
        for block in ("fc1.weight", "fc1.bias", "fc2"):
            b = curvature.preconditioner.blocks[block]
            lam += [0.5 * b.method.unit(b.layer, shadow.curvature.blocks[block])] * math.prod(b.layer.shape)
        v = np.stack([direction] if last is None else [direction, last])
        a = v @ (c + np.diag(lam)) @ v.T
        w = np.linalg.solve(a, -v @ g)
        new, state = opt.step(params, grads, records, state, curvature_product=lambda u: back(c @ flat(u)))
        last = flat(new) - flat(params)
        assert np.allclose(last, w @ v, rtol=1e-9, atol=1e-12)
        params = new


def test_the_own_learning_rate_is_a_factor_on_the_whole_step(rng):
    problem = regression(rng)
    whole = run(machine(kf.KFAC(damping=0.1)), problem, 1)
    half = run(machine(kf.KFAC(damping=0.1), learning_rate=0.5), problem, 1)
    moved = [path[1][0]["fc"]["weight"] - problem.start["fc"]["weight"] for path in (whole, half)]
    assert np.allclose(0.5 * moved[0], moved[1], rtol=1e-12)


def test_without_any_coefficient_from_the_model_it_is_the_plain_rule(rng):
    problem = regression(rng)
    model = kf.QuadraticModel(learning_rate=False, momentum=False)
    path = run(machine(kf.KFAC(damping=0.1), quadratic=model, learning_rate=0.2, momentum=0.5), problem, 5)
    plain = kf.Optimizer(kf.KFAC(damping=0.1), {"fc": kf.Linear(4, 3, None)}, learning_rate=0.2, momentum=0.5)
    params, state = problem.start, plain.init(problem.start)
    for _ in range(5):
        params, state = plain.step(params, *problem.grads(params), state)
    assert np.allclose(path[-1][0]["fc"]["weight"], params["fc"]["weight"], rtol=1e-12)


@pytest.mark.parametrize("clip", [1e-3, lambda k: 1e-3])
def test_the_clip_bounds_the_exact_divergence(rng, clip):
    problem = regression(rng)
    (start, _), (params, _), *_ = run(machine(kf.KFAC(damping=0.1), clip=clip), problem, 2)
    d = params["fc"]["weight"] - start["fc"]["weight"]
    assert np.sum(d * (d @ problem.a)) == pytest.approx(1e-3, rel=1e-9)


def test_a_summed_loss_takes_the_steps_of_the_mean(rng):
    problem, n = regression(rng), 20.0
    rule = kf.LevenbergMarquardt(0.5, every=1, search_every=2)
    method = kf.KFAC(damping=rule, refresh_every=2)
    mean = run(machine(method, quadratic=kf.QuadraticModel(reject=True), weight_decay=0.1, decay="coupled"), problem, 6)

    def grads(params):
        one, records = problem.grads(params)
        return {"fc": {"weight": n * one["fc"]["weight"]}}, {"fc": (records["fc"][0], n * records["fc"][1])}

    summed = SimpleNamespace(
        start=problem.start,
        grads=grads,
        product=lambda v: {"fc": {"weight": n * problem.product(v)["fc"]["weight"]}},
        loss=lambda p: n * problem.loss(p),
    )
    options = {"quadratic": kf.QuadraticModel(reject=True), "weight_decay": 0.1, "decay": "coupled", "loss_reduction": "sum"}
    total = run(machine(method, **options), summed, 6, terms=n)
    for (p, s), (q, t) in zip(mean, total, strict=True):
        assert np.allclose(p["fc"]["weight"], q["fc"]["weight"], rtol=1e-10)
        assert np.allclose(s.step.control.damping, t.step.control.damping, rtol=1e-12)


def test_a_direction_that_is_not_finite_is_skipped(rng):
    problem = regression(rng)
    opt = machine(kf.KFAC(damping=0.1))
    (_, _), (params, state) = run(opt, problem, 1)
    grads, records = problem.grads(params)
    grads["fc"]["weight"][0, 0] = np.nan
    new, after = opt.step(params, grads, records, state, curvature_product=problem.product)
    assert np.array_equal(new["fc"]["weight"], params["fc"]["weight"])
    assert np.array_equal(after.step.momentum["fc.weight"], state.step.momentum["fc.weight"])
    assert int(after.step.skipped) == 1


# -- adaptive damping --------------------------------------------------------------------------------------------------


def test_the_damping_goes_down_where_the_model_is_right(rng):
    problem = regression(rng)
    rule = kf.LevenbergMarquardt(1.0, every=2, factor=0.9, floor=0.5)
    path = run(machine(kf.KFAC(damping=rule, fisher="forward", refresh_every=1)), problem, 12)
    found = [float(state.step.control.damping) for _, state in path]
    expected = [max(0.9 ** (2 * (k // 2)), 0.5) for k in range(13)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert path[2][1].step.control.ratio >= 1.0 - 1e-9


def test_the_damping_goes_up_where_the_model_promised_too_much(rng):
    """A model that sees a tenth of the curvature oversteps."""
    problem = regression(rng)
    product = lambda v: {"fc": {"weight": 0.1 * problem.product(v)["fc"]["weight"]}}  # noqa: E731
    rule = kf.LevenbergMarquardt(1e-3, every=3, factor=0.5, ceiling=0.02)
    path = run(machine(kf.KFAC(damping=rule, fisher="forward")), problem, 9, product=product)
    found = [float(state.step.control.damping) for _, state in path]
    assert found[:7] == pytest.approx([1e-3] * 3 + [8e-3] * 3 + [0.02], rel=1e-12)
    assert path[3][1].step.control.ratio < 0.25


def test_the_refresh_takes_the_damping_of_the_state(rng):
    problem = regression(rng)
    rule = kf.LevenbergMarquardt(1.0, every=1, factor=0.5)
    path = run(machine(kf.KFAC(damping=kf.Damping(rule, "exact"), fisher="forward", refresh_every=1)), problem, 3)
    for (_, before), (_, after) in itertools.pairwise(path):
        assert after.curvature.blocks["fc"].solver.damping == pytest.approx(float(before.step.control.damping), rel=1e-12)


def test_a_loss_that_is_not_finite_raises_the_damping(rng):
    problem = regression(rng)
    path = run(machine(kf.KFAC(damping=kf.LevenbergMarquardt(1.0, every=1, factor=0.5))), problem, 1, loss=lambda p: math.nan)
    assert path[1][1].step.control.damping == pytest.approx(2.0)
    assert not np.array_equal(path[1][0]["fc"]["weight"], path[0][0]["fc"]["weight"])


def test_at_the_minimum_the_damping_stays(rng):
    problem = regression(rng)
    problem.start = {"fc": {"weight": problem.best}}
    path = run(machine(kf.KFAC(damping=kf.LevenbergMarquardt(1.0, every=1)), quadratic=kf.QuadraticModel(reject=True)), problem, 3)
    assert [float(state.step.control.damping) for _, state in path] == [1.0] * 4
    assert int(path[-1][1].step.control.rejected) == 0


def test_a_step_that_makes_the_loss_larger_is_taken_back(rng):
    problem = regression(rng)
    product = lambda v: {"fc": {"weight": 0.02 * problem.product(v)["fc"]["weight"]}}  # noqa: E731
    rule = kf.LevenbergMarquardt(1e-4, every=100, factor=0.97)
    opt = machine(kf.KFAC(damping=rule, fisher="forward", refresh_every=1), quadratic=kf.QuadraticModel(reject=True))
    path = run(opt, problem, 8, product=product)
    losses = [problem.loss(params) for params, _ in path]
    taken = [int(state.step.control.rejected) for _, state in path]
    assert taken[1] == 1
    assert np.array_equal(path[1][0]["fc"]["weight"], problem.start["fc"]["weight"])
    assert np.array_equal(path[1][1].step.momentum["fc.weight"], np.zeros((3, 4)))
    assert path[1][1].step.control.damping == pytest.approx(1e-4 / 0.97**100)
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0] or taken[-1] < 8
    assert opt.diagnostics(path[-1][1])["rejected"] == taken[-1]


def test_the_search_keeps_the_damping_of_the_factors_with_the_least_model(rng):
    problem = regression(rng)
    rule = kf.LevenbergMarquardt(1.0, every=5, factor=0.8, search_every=3)
    wide = 0.8**1.5
    method = kf.KFAC(damping=rule, refresh_every=3)
    opt = machine(method)
    path = run(opt, problem, 7)
    for k, ((params, before), (_, after)) in enumerate(itertools.pairwise(path)):
        gamma, found = float(before.step.control.factored), float(after.step.control.factored)
        if k % 3:
            assert found == gamma
            continue
        values = {}
        for candidate in (gamma, gamma * wide, gamma / wide):
            grads, records = problem.grads(params)
            lam = float(before.step.control.damping)
            flat = kf.KFAC(damping=candidate**2, refresh_every=3)
            plain = kf.Optimizer(flat, {"fc": kf.Linear(4, 3, None)}, learning_rate=1.0, momentum=0.0)
            stepped, _ = plain.step(params, grads, records, before._replace(step=plain.init(params).step))
            v = [params["fc"]["weight"] - stepped["fc"]["weight"], before.step.momentum["fc.weight"]]
            v = np.stack([x.ravel() for x in v[: 1 + (k > 0)]])
            a = v @ np.kron(np.eye(3), problem.a) @ v.T + lam * v @ v.T
            b = v @ grads["fc"]["weight"].ravel()
            values[candidate] = -0.5 * b @ np.linalg.solve(a, b)
        assert found == pytest.approx(min(values, key=values.get), rel=1e-12)
    assert len({float(state.step.control.factored) for _, state in path}) > 1


def test_a_damping_that_is_given_for_a_step_comes_before_the_adaptive_one(rng):
    problem = regression(rng)
    adaptive = machine(kf.KFAC(damping=kf.LevenbergMarquardt(1.0), fisher="forward"))
    fixed = machine(kf.KFAC(damping=0.05, fisher="forward"))
    got = run(adaptive, problem, 1, overrides={"damping": 0.05})[1][0]["fc"]["weight"]
    assert np.allclose(got, run(fixed, problem, 1)[1][0]["fc"]["weight"], rtol=1e-12)
    assert not np.allclose(got, run(adaptive, problem, 1)[1][0]["fc"]["weight"], rtol=1e-3)


# -- files, reports, wrong calls ---------------------------------------------------------------------------------------


def test_a_run_goes_on_from_a_file(rng, tmp_path):
    problem = regression(rng)
    opt = machine(kf.KFAC(damping=kf.LevenbergMarquardt(1.0, every=2, search_every=2), refresh_every=2))
    path = run(opt, problem, 6)
    params, state = path[3]
    bound = opt.bind(params)
    kf.save(tmp_path / "run.safetensors", bound, state)
    loaded = kf.load(tmp_path / "run.safetensors", bound, opt.init(params), names={"damping": "elsewhere"})
    again = run(opt, problem, 3, params=params, state=loaded)
    assert np.array_equal(again[-1][0]["fc"]["weight"], path[-1][0]["fc"]["weight"])
    assert all(np.array_equal(a, b) for a, b in zip(again[-1][1].step.control, path[-1][1].step.control, strict=True))
    plain = kf.Optimizer(opt.method, opt.layers, quadratic=kf.QuadraticModel(momentum=False), momentum=0.0)
    with pytest.raises(kf.CheckpointError, match="momentum"):
        kf.load(tmp_path / "run.safetensors", plain.bind(params), plain.init(params))


def test_the_report_counts_the_buffer(rng):
    params = regression(rng).start
    with_buffer = machine(kf.KFAC(), momentum=0.0).report(params).bytes
    without = machine(kf.KFAC(), quadratic=kf.QuadraticModel(momentum=False), momentum=0.0).report(params).bytes
    assert with_buffer - without == 8 * 12


def step_with(rng, opt, **given):
    problem = regression(rng)
    grads, records = problem.grads(problem.start)
    return opt.step(problem.start, grads, records, opt.init(problem.start), **given)


def test_wrong_calls_say_so(rng):
    product = regression(rng).product
    with pytest.raises(ValueError, match="`objective` must be given"):
        step_with(rng, machine(kf.KFAC()))
    with pytest.raises(ValueError, match="`objective` has no use"):
        step_with(rng, kf.Optimizer(kf.KFAC(), {"fc": kf.Linear(4, 3, None)}), curvature_product=product)
    with pytest.raises(ValueError, match="`curvature_product` must be given"):
        step_with(rng, machine(kf.KFAC()), loss=lambda p: 0.0)
    with pytest.raises(ValueError, match="`loss` must be given"):
        step_with(rng, machine(kf.KFAC(), quadratic=kf.QuadraticModel(reject=True)), curvature_product=product)
    with pytest.raises(ValueError, match="`curvature_product` must have shape"):
        step_with(rng, machine(kf.KFAC()), curvature_product=lambda v: {"fc": {"weight": v["fc"]["weight"][:1]}})
    with pytest.raises(ValueError, match="`damping` is adaptive"):
        kf.Optimizer(kf.KFAC(damping=kf.LevenbergMarquardt(1.0)), {"fc": kf.Linear(4, 3)})
    with pytest.raises(ValueError, match="`fallback` must adapt"):
        machine(kf.KFAC(damping=kf.LevenbergMarquardt(1.0)), fallback=kf.Diagonal(damping=kf.LevenbergMarquardt(2.0))).bind(
            {"fc": {"weight": np.zeros((3, 4))}, "scale": np.zeros(3)}
        )
    with pytest.raises(ValueError, match="`decay` must be 'coupled'"):
        machine(kf.KFAC(), weight_decay=0.1)
    with pytest.raises(ValueError, match="`decay` must be 'coupled'"):
        step_with(rng, machine(kf.KFAC()), curvature_product=product, overrides={"weight_decay": 0.1})
    with pytest.raises(ValueError, match="`nesterov`"):
        machine(kf.KFAC(), nesterov=True)
    with pytest.raises(TypeError, match="`quadratic`"):
        machine(kf.KFAC(), quadratic=True)


def test_an_objective_is_checked():
    optimizer = machine(kf.KFAC()).bind({"fc": {"weight": np.zeros((3, 4))}, "scale": np.zeros(3)})
    params = {"fc.weight": np.ones((3, 4)), "scale": np.ones(3)}
    state = optimizer.init(params)
    statistics = optimizer.reduce(state, "fc", np.ones((2, 1, 4)), np.ones((2, 1, 3)))

    def step(size=2, **overrides):
        lent = SimpleNamespace(gram=lambda v: np.eye(size), loss=lambda u: 0.0)
        return optimizer.update(params, params, state, statistics, terms=2.0, overrides=overrides, objective=lent)

    step(learning_rate={"fc.weight": 0.5, "scale": 0.5})
    with pytest.raises(ValueError, match="`learning_rate` must be the same"):
        step(learning_rate={"fc.weight": 1.0, "scale": 0.5})
    with pytest.raises(ValueError, match=r"`gram` of the objective must give shape \(2, 2\)"):
        step(3)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"initial": 0.0}, "initial"),
        ({"initial": -1.0}, "initial"),
        ({"every": 0}, "every"),
        ({"every": 2.0}, "every"),
        ({"search_every": 0}, "search_every"),
        ({"factor": 1.0}, "factor"),
        ({"factor": 0.0}, "factor"),
        ({"low": 0.8}, "low"),
        ({"floor": 2.0}, "floor"),
        ({"ceiling": 0.5}, "ceiling"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(options, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        kf.LevenbergMarquardt(**{"initial": 1.0, **options})


def test_an_adaptive_damping_has_no_value_of_its_own():
    method = kf.KFAC(damping=kf.LevenbergMarquardt(1.0))
    with pytest.raises(ValueError, match="`damping` must be given"):
        method.rule.at(0)
    layer = kf.Linear(4, 3)
    with pytest.raises(ValueError, match="`damping` must be given"):
        method.refresh(layer, method.init(layer, np.zeros(())))
