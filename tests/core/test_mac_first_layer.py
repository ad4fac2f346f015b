"""What MAC and its relatives do with the first layer, with normalisations and with parameters of no layer; whole optimizers."""

import numpy as np
import pytest

import kfcore as kf
from kfcore.preconditioner import blocks_of

KINDS = {"mac": kf.MAC, "smac": kf.SMAC, "eva": kf.Eva, "foof": kf.FOOF}


def methods(layers, method, others=None):
    return {name: block.method for name, block in blocks_of(method, layers, others).items()}


def names(layers, method, others=None):
    return {name: own.name for name, own in methods(layers, method, others).items()}


@pytest.fixture
def convnet():
    return {"bn": kf.Norm(3), "conv": kf.Conv(3, 4, (3, 3)), "norm": kf.Norm(4), "fc": kf.Linear(16, 8), "head": kf.Linear(8, 2)}


def test_the_first_layer_is_the_first_convolution_or_dense_layer(convnet):
    others = {"scale": (3,)}
    found = names(convnet, kf.MAC(), others)
    plain = {"bn": "gradient", "norm": "gradient", "scale": "gradient"}
    assert found == plain | {"conv": "foof", "fc": "mac", "head": "mac"}
    assert names(convnet, kf.MAC(first="rank-one"), others) == found | {"conv": "mac"}
    assert names(convnet, kf.MAC(first="none"), others) == found | {"conv": "gradient"}
    assert names(convnet, kf.MAC(first_layer="fc"), others) == found | {"conv": "mac", "fc": "foof"}
    assert names(convnet, kf.SMAC(), others) == found | {"fc": "smac", "head": "smac"}
    assert names(convnet, kf.FOOF(), others) == plain | {"conv": "foof", "fc": "foof", "head": "foof"}
    assert set(names(convnet, kf.Eva()).values()) == {"eva"}
    assert names({}, kf.Eva(), others) == names({}, kf.KFAC(), others) == {"scale": "diagonal"}


def test_a_model_that_begins_with_a_table_has_no_first_layer():
    layers = {"table": kf.Embedding(5, 4), "norm": kf.Norm(4), "fc": kf.Linear(4, 2)}
    assert names(layers, kf.MAC()) == {"table": "mac", "norm": "gradient", "fc": "mac"}
    assert names(layers, kf.MAC(first_layer="fc"))["fc"] == "foof"


def test_the_method_of_the_first_layer_goes_with_that_of_the_others(convnet):
    damping, every = kf.Damping(2.0), 3
    for first, decoupled in (("covariance", False), ("decoupled", True)):
        found = methods(convnet, kf.MAC(damping=damping, stats_every=every, refresh_every=4, first=first), {"gain": (3,)})
        own = found["conv"]
        assert own == kf.FOOF(damping=damping, stats_every=every, refresh_every=40, stats_decay=1.0, decoupled=decoupled)
        assert found["norm"] == kf.Gradient(damping=damping, stats_every=every, refresh_every=4)
        assert found["norm"] is found["bn"] is found["gain"], "equal methods are one, so that they are due together"
    assert methods(convnet, kf.MAC(decoupled=False, first="decoupled"))["conv"].decoupled is False
    own = kf.FOOF(damping=0.1)
    assert methods(convnet, kf.MAC(first=own))["conv"] is own
    schedule = lambda t: 7  # noqa: E731
    assert methods(convnet, kf.MAC(refresh_every=schedule))["conv"].refresh_every is schedule


def test_a_separate_bias_of_the_first_layer_goes_with_its_weight():
    layers = {"fc": kf.Linear(3, 2, "separate"), "head": kf.Linear(2, 1, "separate")}
    assert names(layers, kf.MAC()) == {"fc.weight": "foof", "fc.bias": "foof", "head.weight": "mac", "head.bias": "mac"}


def test_the_covariance_is_that_of_all_batches(rng):
    layers = {"fc": kf.Linear(3, 2), "head": kf.Linear(2, 2)}
    params = {name: {r: rng.normal(size=s) for r, s in layer.parameters.items()} for name, layer in layers.items()}
    for first in ("covariance", "decoupled"):
        optimizer = kf.Optimizer(kf.MAC(damping=0.5, stats_every=1, refresh_every=1, first=first), layers, learning_rate=1.0, momentum=0.0)
        state, now, seen = optimizer.init(params), params, []
        for t in range(11):
            x, h = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
            seen.append(np.hstack([x, np.ones((5, 1))]))
            grads = {name: {r: rng.normal(size=v.shape) for r, v in p.items()} for name, p in params.items()}
            new, state = optimizer.step(now, grads, {"fc": (x, None), "head": (h, None)}, state)
            if t in (0, 10):
                moment = sum(a.T @ a for a in seen) / (5 * len(seen))
                grad = np.hstack([grads["fc"]["weight"], grads["fc"]["bias"][:, None]])
                wanted = grad @ np.linalg.inv(moment + 0.5 * np.eye(4)) * (0.5 if first == "decoupled" else 1.0)
                moved = {role: now["fc"][role] - new["fc"][role] for role in ("weight", "bias")}
                np.testing.assert_allclose(np.hstack([moved["weight"], moved["bias"][:, None]]), wanted, rtol=1e-10, atol=1e-12)
            now = new


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (kf.MAC(damping=4.0), 1.0),
        (kf.MAC(damping=4.0, decoupled=False), 0.25),
        (kf.SMAC(damping=4.0), 0.25),
        (kf.FOOF(damping=4.0), 0.25),
        (kf.FOOF(damping=4.0, decoupled=True), 1.0),
    ],
)
def test_what_has_no_rank_one_block_goes_by_gradients_of_the_same_scale(rng, method, scale):
    layers = {"norm": kf.Norm(3), "fc": kf.Linear(3, 2)}
    params = {name: {r: rng.normal(size=s) for r, s in layer.parameters.items()} for name, layer in layers.items()} | {"gain": np.ones(2)}
    grads = {
        n: {r: rng.normal(size=v.shape) for r, v in p.items()} if isinstance(p, dict) else rng.normal(size=2) for n, p in params.items()
    }
    optimizer = kf.Optimizer(method, layers, learning_rate=1.0, momentum=0.0)
    new, _ = optimizer.step(params, grads, {"fc": (rng.normal(size=(4, 3)), rng.normal(size=(4, 2)))}, optimizer.init(params))
    np.testing.assert_allclose(params["gain"] - new["gain"], scale * grads["gain"], rtol=1e-13)
    for role in ("weight", "bias"):
        np.testing.assert_allclose(params["norm"][role] - new["norm"][role], scale * grads["norm"][role], rtol=1e-13)


def test_the_true_inverse_is_the_decoupled_direction_over_the_damping(rng):
    layers = {"fc": kf.Linear(3, 2), "norm": kf.Norm(2), "head": kf.Linear(2, 2)}
    params = {name: {r: rng.normal(size=s) for r, s in layer.parameters.items()} for name, layer in layers.items()}
    grads = {name: {r: rng.normal(size=v.shape) for r, v in p.items()} for name, p in params.items()}
    records = {"fc": (rng.normal(size=(4, 3)), None), "head": (rng.normal(size=(4, 2)), None)}
    moved = []
    for decoupled in (True, False):
        method = kf.MAC(damping=5.0, decoupled=decoupled, first="decoupled")
        optimizer = kf.Optimizer(method, layers, learning_rate=1.0, momentum=0.0)
        new, _ = optimizer.step(params, grads, records, optimizer.init(params))
        moved.append({(name, r): params[name][r] - x for name, p in new.items() for r, x in p.items()})
    for key, x in moved[0].items():
        np.testing.assert_allclose(moved[1][key], x / 5.0, rtol=1e-10, atol=1e-14)


def test_a_model_without_captured_layers_steps_without_records():
    layers, params = {"norm": kf.Norm(2)}, {"norm": {"weight": np.ones(2), "bias": np.zeros(2)}, "gain": np.ones(3)}
    grads = {"norm": {"weight": np.full(2, 0.5), "bias": np.ones(2)}, "gain": np.ones(3)}
    optimizer = kf.Optimizer(kf.MAC(damping=2.0), layers, learning_rate=0.1, momentum=0.0)
    state = optimizer.init(params)
    for records in (None, {}):
        new, state = optimizer.step(params, grads, records, state)
        np.testing.assert_allclose(new["norm"]["weight"], 0.95)
        np.testing.assert_allclose(new["gain"], 0.9)
    recorder = kf.Recorder(optimizer, params)
    np.testing.assert_allclose(recorder.step(params, grads)["gain"], 0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_the_library_takes_every_method(kind, rng, tmp_path):
    method = KINDS[kind](stats_every=1, refresh_every=2)
    layers = {"conv": kf.Conv(2, 4, (2, 2), groups=2, sharing="reduce"), "norm": kf.Norm(4), "fc": kf.Linear(4, 4), "head": kf.Linear(4, 4)}
    params = {name: {r: rng.normal(size=s) for r, s in layer.parameters.items()} for name, layer in layers.items()} | {"gain": np.ones(4)}
    optimizer = kf.Optimizer(method, layers, learning_rate=0.01, group=True)
    bound = optimizer.bind(params)

    def step(params, state):
        grads = {
            n: {r: rng.normal(size=v.shape) for r, v in p.items()} if isinstance(p, dict) else rng.normal(size=p.shape)
            for n, p in params.items()
        }
        records = {
            "conv": (rng.normal(size=(5, 2, 3, 3)), rng.normal(size=(5, 4, 2, 2))),
            "norm": tuple(rng.normal(size=(2, 5, 4))),
            "fc": tuple(rng.normal(size=(2, 5, 4))),
            "head": tuple(rng.normal(size=(2, 5, 4))),
        }
        return *optimizer.step(params, grads, records, state), grads

    state = optimizer.init(params)
    for _ in range(3):
        params, state, grads = step(params, state)
    found = kf.measures(bound, state, grads=kf.model.flatten(grads), directions=kf.model.flatten(grads))
    assert all(np.isfinite(value) for key, value in found.items() if not key.endswith(("condition", "damping_over_mean"))), found
    assert {"conv[1]/eigenvalue_max", "fc/effective_rank"} <= set(found)
    dense = bound.preconditioner.dense(state.curvature)
    for name, block in bound.preconditioner.blocks.items():
        operator = block.method.operator(block.layer, state.curvature.blocks[name])
        np.testing.assert_allclose(dense[name], operator.dense(), atol=1e-12)
        np.testing.assert_allclose(np.linalg.eigvalsh(dense[name]), operator.eigenvalues(), atol=1e-10)
        if block.leading:
            np.testing.assert_allclose(operator.at((1,)).dense(), dense[name][1], atol=1e-12)
    report = optimizer.report(params)
    assert {row.kind for row in report} <= {kind, "foof", "gradient", "diagonal"}
    assert str(report).count("\n") == len(report.rows) + 1
    path = tmp_path / "state.safetensors"
    kf.save(path, bound, state)
    loaded = kf.load(path, bound, optimizer.init(params))
    seed = rng.bit_generator.state
    on, _, _ = step(params, state)
    rng.bit_generator.state = seed
    again, _, _ = step(params, loaded)
    for name, x in kf.model.flatten(on).items():
        np.testing.assert_array_equal(x, kf.model.flatten(again)[name])
    other = kf.Optimizer(kf.KFAC(), layers).bind(params)
    like = other.init(kf.model.flatten(params))
    with pytest.raises(kf.CheckpointError, match="here but"):
        kf.load(path, other, like)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["smac", "eva"])
def test_output_gradients_are_those_of_examples_whatever_the_reduction(kind, reduction, rng):
    """One batch whole, in two micro-batches, scaled, and over two ranks: the same averages, by definition from single examples."""
    method = kf.SMAC(first="rank-one") if kind == "smac" else kf.Eva()
    optimizer = kf.ModelOptimizer(method, kf.Model({"fc": kf.Linear(3, 2)}), kf.StepSize(), loss_reduction=reduction)
    x, g = rng.normal(size=(8, 2, 3)), rng.normal(size=(8, 2, 2))
    terms = 16.0  # one a position
    params = {"fc.weight": np.zeros((2, 3)), "fc.bias": np.zeros(2)}
    state = optimizer.init(params)
    share = {"mean": lambda m: 1.0 / m, "sum": lambda m: 1.0}[reduction]

    def reduce(part, of):
        return optimizer.reduce(state, "fc", x[part], of * g[part])

    whole, scaled = reduce(slice(8), share(terms)), reduce(slice(8), 512.0 * share(terms))
    halves = {"fc": reduce(slice(3), share(terms))["fc"] + reduce(slice(3, 8), share(terms))["fc"]}
    ranks = [reduce(part, share(count))["fc"] for part, count in ((slice(3), 6.0), (slice(3, 8), 10.0))]

    def rank(part, number):
        """What one of two ranks gets, the sums being made of what the other sends in the same order."""
        sent = []
        optimizer.across({"fc": ranks[1 - number]}, (10.0, 6.0)[number], lambda v: sent.append(v) or v)
        queue = iter(sent)
        return optimizer.across({"fc": part}, (6.0, 10.0)[number], lambda v: v + next(queue))[0]

    second = (g**2).sum(axis=1).sum(axis=0) / terms
    wanted = second if kind == "smac" else g.sum(axis=(0, 1)) / terms
    for statistics, scale in ((whole, 1.0), (halves, 1.0), (scaled, 512.0), (rank(ranks[0], 0), 1.0), (rank(ranks[1], 1), 1.0)):
        _, new = optimizer.update(params, params, state, statistics, terms=terms, loss_scale=scale)
        found = new.curvature.blocks["fc"].average.values
        np.testing.assert_allclose(found[1], wanted, rtol=1e-12)
        np.testing.assert_allclose(found[0], [*x.mean(axis=(0, 1)), 1.0], rtol=1e-12)
        assert np.abs(found[1] - 1.01 * wanted).max() > 1e-4
