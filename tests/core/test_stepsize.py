"""From directions to updates, against the rules written out by hand."""

import numpy as np
import pytest

import kfcore as kf
from kfcore import stepsize


def by_hand(p, directions, lr, mu, wd, nesterov, decay):
    """Stochastic gradient descent as torch defines it (no dampening), or with the decay decoupled from the momentum."""
    buffer, trajectory = None, []
    for k, d in enumerate(directions):
        rate, momentum, shrink = (v(k) if callable(v) else v for v in (lr, mu, wd))
        old = p
        if decay == "coupled":
            d = d + shrink * p
        if momentum != 0 or callable(mu):
            buffer = d if buffer is None else momentum * buffer + d
            d = d + momentum * buffer if nesterov else buffer
        p = p - rate * d
        if decay == "decoupled":
            p = p - rate * shrink * old
        trajectory.append(p)
    return trajectory


def run(step, p, directions, overrides=None):
    state, trajectory = stepsize.init(step, {"p": p}), []
    for k, d in enumerate(directions):
        updates, state = stepsize.apply(step, {"p": p}, {"p": d}, {"p": d}, state, k, overrides)
        p = p + updates["p"]
        trajectory.append(p)
    return trajectory


RATES = [0.1, lambda k: 0.1 / (1 + k)]
MOMENTA = [0.0, 0.9, lambda k: 0.5 + 0.1 * k]
DECAYS = [0.0, 0.05, lambda k: 0.05 * k]


@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
@pytest.mark.parametrize("wd", DECAYS, ids=["none", "constant", "scheduled"])
@pytest.mark.parametrize(("mu", "nesterov"), [(mu, n) for mu in MOMENTA for n in (False, True) if mu != 0 or not n])
@pytest.mark.parametrize("lr", RATES, ids=["constant", "scheduled"])
def test_updates_follow_the_rule_written_out(ref, rng, lr, mu, wd, nesterov, decay):
    p, directions = rng.normal(size=(3, 2)), rng.normal(size=(4, 3, 2))
    step = kf.StepSize(learning_rate=lr, momentum=mu, nesterov=nesterov, weight_decay=wd, decay=decay)
    got, want = run(step, p, directions), by_hand(p, directions, lr, mu, wd, nesterov, decay)
    assert max(ref.distance(a, b) for a, b in zip(got, want, strict=True)) < 1e-14
    off = by_hand(p, directions, lambda k: 1.01 * (lr(k) if callable(lr) else lr), mu, wd, nesterov, decay)
    assert ref.distance(got[-1], off[-1]) > 1e-4


def test_coupled_and_decoupled_decay_differ_under_momentum(ref, rng):
    p, directions = rng.normal(size=(3, 2)), np.zeros((8, 3, 2))
    options = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    coupled, decoupled = (run(kf.StepSize(decay=d, **options), p, directions)[-1] for d in ("coupled", "decoupled"))
    assert ref.distance(decoupled, (1 - 0.005) ** 8 * p) < 1e-14
    assert np.linalg.norm(coupled) < np.linalg.norm(decoupled)


@pytest.mark.parametrize("kappa", [1e-6, 1e-3, 1e3, lambda k: 1e-3])
@pytest.mark.parametrize("lr", [0.01, 2.0, lambda k: 0.5])
def test_clip_bounds_the_summed_quadratic_form(ref, rng, kappa, lr):
    grads = {n: rng.normal(size=s) for n, s in (("a", (3, 2)), ("b", 4))}
    directions = {n: (1 + rng.random(g.shape)) * g for n, g in grads.items()}
    step = kf.StepSize(learning_rate=lr, momentum=0.0, clip=kappa)
    updates, _ = stepsize.apply(step, grads, grads, directions, stepsize.init(step, grads), 0)
    rate, bound = (v(0) if callable(v) else v for v in (lr, kappa))
    inner = sum((grads[n] * directions[n]).sum() for n in grads)
    scale = min(1.0, np.sqrt(bound / (rate**2 * inner)))
    for n in grads:
        assert ref.distance(updates[n], -rate * scale * directions[n]) < 1e-13
        assert ref.distance(1.01 * updates[n], -rate * scale * directions[n]) > 1e-3
    assert rate**2 * scale**2 * inner <= bound * (1 + 1e-12)
    assert scale == 1.0 or np.isclose(rate**2 * scale**2 * inner, bound)


def test_clip_never_lengthens_and_takes_zero_directions(rng):
    for grad in (np.zeros((3, 2)), 1e-12 * rng.normal(size=(3, 2))):
        assert float(stepsize.clip_scale(1e-3, 0.1, {"p": grad}, {"p": grad})) == 1.0


def test_clip_comes_before_coupled_decay_and_momentum(ref, rng):
    p, d = rng.normal(size=(3, 2)), rng.normal(size=(3, 2))
    step = kf.StepSize(learning_rate=0.1, momentum=0.9, weight_decay=0.3, decay="coupled", clip=1e-4)
    updates, state = stepsize.apply(step, {"p": p}, {"p": d}, {"p": d}, stepsize.init(step, {"p": p}), 0)
    scale = np.sqrt(1e-4 / (0.01 * (d * d).sum()))
    assert ref.distance(state.momentum["p"], scale * d + 0.3 * p) < 1e-13
    assert ref.distance(updates["p"], -0.1 * (scale * d + 0.3 * p)) < 1e-13


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_graft_gives_each_block_the_norm_of_its_gradient(ref, rng, model, bias):
    params, batch = model.params(rng), model.batch(rng)
    grads, records = model.gradients(params, *batch)
    directions = {}
    for graft in (False, True):
        optimizer = kf.Optimizer(kf.KFAC(), model.layers(bias=bias), learning_rate=1.0, momentum=0.0, graft=graft)
        after, _ = optimizer.step(params, grads, records, optimizer.init(params))
        directions[graft] = {n: {r: params[n][r] - after[n][r] for r in params[n]} for n in ("fc1", "fc2")}
    for name in ("fc1", "fc2"):
        groups = [["weight", "bias"]] if bias == "joint" else [["weight"], ["bias"]]
        for group in groups:
            grad, plain, grafted = (
                np.concatenate([t[name][r].reshape(-1) for r in group]) for t in (grads, directions[False], directions[True])
            )
            assert np.isclose(np.linalg.norm(grafted), np.linalg.norm(grad), rtol=1e-12)
            assert ref.distance(grafted / np.linalg.norm(grafted), plain / np.linalg.norm(plain)) < 1e-12
            assert not np.isclose(np.linalg.norm(plain), np.linalg.norm(grad), rtol=1e-2)


def test_graft_takes_zeros_and_extremes():
    for scale in (0.0, 1e-30, 1e30):
        d = np.full((2, 2), scale, dtype=np.float32)
        one = np.ones((2, 2), dtype=np.float32)
        assert np.allclose(stepsize.graft({"p": d}, {"p": one})["p"], d, rtol=1e-6, atol=0)
        back = stepsize.graft({"p": one}, {"p": d})["p"]
        assert np.allclose(back, one if scale else d, rtol=1e-6)


def test_overrides_replace_what_was_configured(ref, rng, model):
    params, batch = model.params(rng), model.batch(rng)
    grads, records = model.gradients(params, *batch)

    def step(configured, overrides=None):
        damping = configured.pop("damping", 0.1)
        optimizer = kf.Optimizer(kf.KFAC(damping=damping), model.layers(), momentum=0.0, **configured)
        return optimizer.step(params, grads, records, optimizer.init(params), overrides=overrides)[0]

    for name, value in (("learning_rate", 0.03), ("weight_decay", 0.7), ("clip", 1e-5), ("damping", 3.0)):
        assert model.same(step({}, {name: value}), step({name: value}), 1e-15)
        assert not model.same(step({}, {name: 1.01 * value}), step({name: value}), 1e-9)


def test_overrides_may_be_one_a_parameter_or_block(ref, rng, model):
    params, batch = model.params(rng), model.batch(rng)
    grads, records = model.gradients(params, *batch)
    names = [f"{n}.{r}" for n in ("fc1", "fc2") for r in ("weight", "bias")] + ["scale"]
    optimizer = kf.Optimizer(kf.KFAC(damping=0.1), model.layers(), momentum=0.0)
    init = optimizer.init(params)
    one, _ = optimizer.step(params, grads, records, init)
    rates = dict.fromkeys(names, 0.1) | {"fc1.bias": 0.2}
    two, _ = optimizer.step(params, grads, records, init, overrides={"learning_rate": rates})
    assert ref.distance(two["fc1"]["bias"] - params["fc1"]["bias"], 2 * (one["fc1"]["bias"] - params["fc1"]["bias"])) < 1e-12
    assert np.array_equal(two["fc1"]["weight"], one["fc1"]["weight"])
    damped, _ = optimizer.step(params, grads, records, init, overrides={"damping": {"fc2": 5.0}})
    strong, _ = optimizer.step(params, grads, records, init, overrides={"damping": 5.0})
    assert model.same([damped["fc1"]][0], one["fc1"])
    assert model.same(damped["fc2"], strong["fc2"])
    assert not model.same(damped["fc2"], one["fc2"], 1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parameters_keep_their_dtype_and_buffers_are_at_least_single(rng, model, dtype):
    for low in (np.float16, dtype):
        params = model.params(rng, dtype=low)
        optimizer = kf.Optimizer(kf.KFAC(), model.layers())
        grads, records = model.gradients(params, *(z.astype(low) for z in model.batch(rng)))
        after, state = optimizer.step(params, grads, records, optimizer.init(params))
        assert {leaf.dtype for leaf in model.flat(after)} == {np.dtype(low)}
        assert {b.dtype for b in state.step.momentum.values()} == {np.dtype(np.float32 if low != np.float64 else low)}


def test_a_rate_may_be_a_number_of_numpy(rng):
    params = {"p": rng.normal(size=3)}
    step = kf.StepSize(momentum=0.0)
    state = kf.stepsize.init(step, params)
    updates, _ = kf.stepsize.apply(step, params, params, params, state, 0, {"learning_rate": np.float32(0.5)})
    assert np.allclose(updates["p"], -0.5 * params["p"])
