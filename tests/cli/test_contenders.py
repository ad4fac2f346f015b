"""Contenders: equal starts, equal batches, equal trajectories on every backend."""

import functools
import importlib.util
from dataclasses import dataclass
from itertools import islice

import array_api_compat.numpy as xp
import numpy as np
import pytest

import kfcore
from kfcore_cli.errors import UsageError
from kfcore_cli.race import registry, rules
from kfcore_cli.race.arrays import ArrayContender
from kfcore_cli.race.batches import batches
from kfcore_cli.race.command import settings_of
from kfcore_cli.race.course import Run, deviation, run
from kfcore_cli.race.data import windows
from kfcore_cli.race.interfaces import Data
from kfcore_cli.race.layers import Activation, Convolution, Dense, Reshape
from kfcore_cli.race.losses import Loss
from kfcore_cli.race.network import Network, mlp
from kfcore_cli.race.transformer import transformer

LOSSES = ("cross-entropy", "squared error", "binary cross-entropy")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_jax = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax", "optax")), reason="jax or optax is not installed"
)
FRAMEWORKS = (pytest.param("torch", marks=needs_torch), pytest.param("jax", marks=needs_jax))


class Small:
    """A problem without files."""

    title, batch_size, steps, target, metric, settings = "small", 16, 30, 0.5, "test loss", {}

    def __init__(self, loss="cross-entropy", activation="tanh"):
        self.network = mlp((5, 8, 7, 3), activation, loss)

    def load(self):
        rng = np.random.default_rng(3)
        x = rng.normal(size=(120, 5))
        z = np.tanh(x @ rng.normal(size=(5, 3)))
        y = np.argmax(z, axis=1) if self.network.loss.kind == "cross-entropy" else 0.5 + 0.5 * z
        return Data(x[:100], y[:100], x[100:], y[100:])

    def score(self, outputs, targets):
        return float(self.network.loss.value(xp, outputs, targets))


class SmallConv(Small):
    """The same data as images of 1 x 5 pixels under two convolutions."""

    def __init__(self):
        layers = (
            Reshape((1, 1, 5)),
            Convolution("conv1", 1, 4, 3, stride=2, padding=2),
            Activation("tanh"),
            Convolution("conv2", 4, 3, 2, padding=1),
            Activation("tanh"),
            Reshape((45,)),
            Dense("fc", 45, 3),
        )
        self.network = Network(layers, Loss("cross-entropy"))


class SmallText(Small):
    """A text without files, and a transformer."""

    def __init__(self):
        self.network = transformer(num=5, places=6, width=8, heads=2, blocks=1)

    def load(self):
        rng = np.random.default_rng(3)
        ids = np.cumsum(rng.choice([1, 1, 1, 2], size=300)) % 5
        return windows(ids, 6, measured=16)


def _rule(method):
    loaded = registry.load("methods", method)
    return loaded.rule(settings_of("small", Small(), method, loaded))


def _run(problem, backend, rule, steps=30, make=None, **options):
    weights = problem.network.init(0)
    make = make or (lambda: backend.contender(problem.network, weights, rule, "float64"))
    return run(make, problem, problem.load(), 0, **({"seconds": None, "steps": steps} | options), watch=lambda *_: None)


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", registry.names("methods"))
def test_backends_follow_one_trajectory(method, loss, backend):
    problem, rule = Small(loss), _rule(method)
    ours, theirs = (_run(problem, registry.load("backends", name), rule) for name in ("numpy", backend))
    assert deviation(ours.compared[1], problem.network.init(0)) > 1e-3
    assert deviation(theirs.compared[1], ours.compared[1]) <= 1e-9
    np.testing.assert_allclose(theirs.losses, ours.losses, rtol=1e-9)


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize("method", ["sgd", "kfac"])
def test_backends_follow_one_trajectory_with_convolutions(method, backend):
    problem, rule = SmallConv(), _rule(method)
    reference = _run(problem, registry.load("backends", "numpy"), rule)
    own = _run(problem, registry.load("backends", backend), rule)
    assert deviation(own.compared[1], reference.compared[1]) < 1e-9
    assert reference.losses[-1] < reference.losses[0]


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize("method", ["sgd", "adam", "kfac"])
def test_backends_follow_one_trajectory_with_a_transformer(method, backend):
    problem, rule = SmallText(), _rule(method)
    reference = _run(problem, registry.load("backends", "numpy"), rule)
    own = _run(problem, registry.load("backends", backend), rule)
    assert deviation(own.compared[1], reference.compared[1]) < 1e-9
    np.testing.assert_allclose(own.losses, reference.losses, rtol=1e-10)
    assert reference.losses[-1] < reference.losses[0]


def test_curvature_of_a_transformer_on_plain_arrays_covers_all_but_the_positions():
    problem = SmallText()
    report = kfcore.Optimizer(kfcore.KFAC(), problem.network.curvature()).report(problem.network.init(0))
    assert [row.parameter for row in report.fallbacks()] == ["positions.weight"]
    result = _run(problem, registry.load("backends", "numpy"), _rule("kfac"))
    assert result.losses[-1] < 0.8 * result.losses[0]


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_backends_agree_on_other_activations(activation, backend):
    problem, rule = Small(activation=activation), _rule("sgd")
    ours, theirs = (_run(problem, registry.load("backends", name), rule) for name in ("numpy", backend))
    assert deviation(theirs.compared[1], ours.compared[1]) <= 1e-10


@functools.cache
def _data(name):
    return registry.load("problems", name).load()


@functools.cache
def _run_as_set(name, method, backend):
    """Weights after 40 steps on a problem with its own settings."""
    problem, loaded, chosen = registry.load("problems", name), registry.load("methods", method), registry.load("backends", backend)
    weights, rule = problem.network.init(0), loaded.rule(settings_of(name, problem, method, loaded))
    contender, data = chosen.contender(problem.network, weights, rule, "float64"), _data(name)
    for index in islice(batches(len(data.train_x), problem.batch_size, 0), 40):
        contender.step(data.train_x[index], data.train_y[index])
    return contender.weights()


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize(("name", "requires"), [("digits", "sklearn"), ("diamonds", "plotnine")])
@pytest.mark.parametrize("method", registry.names("methods"))
def test_backends_agree_on_real_data_with_its_own_settings(method, name, requires, backend):
    if importlib.util.find_spec(requires) is None:
        pytest.skip(f"{requires} is not installed")
    ours, theirs = (_run_as_set(name, method, b) for b in ("numpy", backend))
    assert deviation(ours, registry.load("problems", name).network.init(0)) > 1e-3
    assert deviation(theirs, ours) <= 1e-10


class Spy:
    """A contender that remembers what it was given."""

    def __init__(self, weights):
        self.start, self.seen = weights, []

    def step(self, x, y):
        self.seen.append((x.copy(), y.copy()))

    def weights(self):
        return self.start

    def state_bytes(self):
        return 0


def test_all_see_the_same_batches_and_start_from_the_same_weights():
    problem = Small()
    spies = []

    def make():
        spies.append(Spy(problem.network.init(0)))
        return spies[-1]

    runs = [_run(problem, None, None, steps=20, make=make) for _ in range(2)]
    assert len(spies) == 4, "each has one for warming up"
    first, second = spies[1], spies[3]
    assert len(first.seen) == len(second.seen) == 20
    for (x, y), (u, v) in zip(first.seen, second.seen, strict=True):
        assert np.array_equal(x, u)
        assert np.array_equal(y, v)
    assert runs[0].losses[0] == runs[1].losses[0]


@pytest.mark.parametrize("backend", [*FRAMEWORKS, "numpy"])
@pytest.mark.parametrize("method", registry.names("methods"))
def test_initial_weights_are_those_given_and_survive_training(method, backend):
    problem = Small()
    weights = problem.network.init(0)
    kept = problem.network.init(0)
    contender = registry.load("backends", backend).contender(problem.network, weights, _rule(method), "float64")
    assert deviation(contender.weights(), kept) == 0.0
    data = problem.load()
    contender.step(data.train_x, data.train_y)
    assert deviation(contender.weights(), kept) > 0.0
    assert deviation(weights, kept) == 0.0


def test_state_bytes_are_those_of_the_buffers():
    network = mlp((5, 8, 3), "tanh", "squared error")
    numbers = sum(w.size for own in network.init(0).values() for w in own.values())
    x, y = np.ones((4, 5)), np.zeros((4, 3))
    for rule, buffers in ((rules.SGD(lr=0.1), 1), (rules.Adam(lr=0.1), 2)):
        contender = ArrayContender(xp, network, network.init(0), rule, "float32")
        contender.step(x, y)
        assert contender.state_bytes() == buffers * 4 * numbers
    kfac = ArrayContender(xp, network, network.init(0), _rule("kfac"), "float64")
    factors = 2 * 8 * (6**2 + 8**2 + 9**2 + 3**2)
    assert factors + 8 * numbers <= kfac.state_bytes() < factors + 8 * numbers + 200


def test_float32_stays_float32():
    problem = Small()
    for method in registry.names("methods"):
        contender = ArrayContender(xp, problem.network, problem.network.init(0), _rule(method), "float32")
        contender.step(problem.load().train_x, problem.load().train_y)
        assert all(w.dtype == np.float32 for own in contender.weights().values() for w in own.values())


def test_clock_ends_a_run_and_measuring_is_not_on_it():
    result = _run(Small(), registry.load("backends", "numpy"), _rule("sgd"), seconds=0.2, steps=None)
    assert 0.2 <= result.seconds[-1] < 0.4
    assert result.seconds[-1] == pytest.approx(sum(result.milliseconds) / 1e3)
    assert result.steps[-1] == len(result.milliseconds)
    assert result.compared[0] == min(100, result.steps[-1])
    assert result.final[0] == result.steps[-1]


def test_divergence_ends_a_run():
    result = _run(Small("squared error"), registry.load("backends", "numpy"), rules.SGD(lr=1e6), steps=4000)
    assert not np.isfinite(result.losses[-1])
    assert result.steps[-1] < 4000


def test_target_is_interpolated():
    result = Run(steps=[0, 10, 20], seconds=[0.0, 1.0, 2.0], losses=[1.0, 0.1, 0.001])
    assert result.reached(0.01) == pytest.approx((1.5, 15.0))
    assert result.reached(2.0) == (0.0, 0)
    assert result.reached(1e-4) is None


def test_settings_come_from_the_problem_then_the_method_then_the_default():
    class Method:
        default, settings = {"lr": 1.0}, {"p": {"lr": 2.0}}

    problem = Small()
    assert settings_of("q", problem, "m", Method()) == {"lr": 1.0}
    assert settings_of("p", problem, "m", Method()) == {"lr": 2.0}
    problem.settings = {"m": {"lr": 3.0}}
    assert settings_of("p", problem, "m", Method()) == {"lr": 3.0}


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize("method", registry.names("methods"))
def test_state_is_as_large_on_every_backend(method, backend):
    problem = Small()
    ours, theirs = (_run(problem, registry.load("backends", name), _rule(method), steps=2).state_bytes for name in ("numpy", backend))
    # Adam's step count is an array: in torch one for every parameter, in optax one for all
    assert 0 < ours <= theirs <= ours + 64


@needs_jax
@pytest.mark.parametrize("method", registry.names("methods"))
def test_jax_runs_in_either_precision_in_one_process(method):
    import jax

    problem, backend, rule = Small(), registry.load("backends", "jax"), _rule(method)
    data, before = problem.load(), jax.config.jax_enable_x64
    contenders = {dtype: backend.contender(problem.network, problem.network.init(0), rule, dtype) for dtype in ("float64", "float32")}
    for _ in range(3):
        for contender in contenders.values():
            contender.step(data.train_x[:16], data.train_y[:16])
    for dtype, contender in contenders.items():
        assert {str(w.dtype) for own in contender.weights().values() for w in own.values()} == {dtype}
        assert {str(a.dtype) for a in jax.tree.leaves(contender.state)} <= {dtype, "int32"}
    assert 1e-12 < deviation(contenders["float32"].weights(), contenders["float64"].weights()) < 1e-4
    assert jax.config.jax_enable_x64 == before


@needs_jax
def test_jax_compiles_the_step_once_for_the_warm_up_and_the_run():
    problem, backend, rule = Small(), registry.load("backends", "jax"), _rule("kfac")
    contenders = []

    def make():
        contenders.append(backend.contender(problem.network, problem.network.init(0), rule, "float64"))
        return contenders[-1]

    _run(problem, backend, rule, steps=12, make=make)
    warm_up, timed = contenders
    assert warm_up.program is timed.program
    assert timed.program.step._cache_size() == 1
    assert backend.contender(problem.network, problem.network.init(0), _rule("kfac"), "float64").program is not timed.program


@needs_jax
def test_jax_weights_are_copies_that_later_steps_leave_alone():
    problem = Small()
    data = problem.load()
    contender = registry.load("backends", "jax").contender(problem.network, problem.network.init(0), _rule("sgd"), "float64")
    first = contender.weights()
    contender.step(data.train_x, data.train_y)
    assert deviation(first, problem.network.init(0)) == 0.0
    first["fc1"]["weight"][:] = np.nan
    assert np.all(np.isfinite(contender.weights()["fc1"]["weight"]))


@needs_jax
@needs_torch
@pytest.mark.parametrize("loss", LOSSES)
def test_jax_takes_the_exact_fisher_from_the_model(loss):
    import torch

    problem, rule = Small(loss), rules.Curvature(method=kfcore.KFAC(damping=1e-2, fisher="exact"), lr=0.1)
    data = problem.load()
    theirs, ours = (
        registry.load("backends", b).contender(problem.network, problem.network.init(0), rule, "float64") for b in ("torch", "jax")
    )
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    for _ in range(5):
        ours.step(data.train_x, data.train_y)
        theirs.optimizer.zero_grad()
        outputs = theirs.module(x)
        theirs.optimizer.backward_fisher(outputs, y)
        theirs.loss(outputs, y).backward()
        theirs.optimizer.step()
    assert deviation(ours.weights(), theirs.weights()) <= 1e-10


@dataclass(frozen=True)
class Halved(Dense):
    """A layer that a problem brings: portable code, and nothing for any framework."""

    flaw: str = ""

    def forward(self, xp, params, x):
        if self.flaw == "writes":
            x[:, 0] = 0.0
        if self.flaw == "wrapped":
            return xp.tanh(params["weight"])[None, :, :].sum(axis=2) + params["bias"] + 0.0 * xp.sum(x, axis=1)[:, None]
        return 0.5 * x @ params["weight"].T + params["bias"]

    def curvature(self):
        return None if self.flaw == "unknown" else super().curvature()

    def backward(self, xp, params, x, y, dy):
        return 0.5 * dy @ params["weight"], {"weight": 0.5 * dy.T @ x, "bias": xp.sum(dy, axis=0)}


def _with_a_layer_of_its_own(**flaws):
    problem = Small()
    first, *others = problem.network.layers
    own = Halved(first.name, first.in_features, first.out_features, **flaws)
    problem.network = Network((own, *others), problem.network.loss)
    return problem


@needs_jax
@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_jax_runs_a_layer_of_a_problem_by_its_portable_code(method):
    problem = _with_a_layer_of_its_own()
    ours, theirs = (_run(problem, registry.load("backends", name), _rule(method)) for name in ("numpy", "jax"))
    assert deviation(theirs.compared[1], ours.compared[1]) <= 1e-10


@needs_jax
@pytest.mark.parametrize(
    ("flaw", "method", "parts"),
    [
        ("writes", "sgd", ["cannot trace the layer Halved", "write nothing in place"]),
        ("unknown", "kfac", ["finds Linear(in_features=5", "in the layer fc1", "says None"]),
        ("wrapped", "kfac", ["finds nothing that kfcore knows in the layer fc1", "says Linear(in_features=5"]),
    ],
)
def test_jax_refuses_a_layer_that_it_cannot_run(flaw, method, parts):
    problem = _with_a_layer_of_its_own(flaw=flaw)
    with pytest.raises(UsageError) as caught:
        _run(problem, registry.load("backends", "jax"), _rule(method))
    for part in (*parts, "leave jax out"):
        assert part in str(caught.value)
