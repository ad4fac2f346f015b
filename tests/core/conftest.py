"""Builders shared by the tests of the core: reference nets, ways to feed the library, small models and random trajectories."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import kfcore as kf

_spec = importlib.util.spec_from_file_location("core_reference", Path(__file__).with_name("reference.py"))
reference = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = reference
_spec.loader.exec_module(reference)

LOSSES = {"mse": kf.MSE(), "ce": kf.CrossEntropy(), "bce": kf.BCEWithLogits()}


@pytest.fixture(scope="session")
def ref():
    return reference


@pytest.fixture
def rng():
    return np.random.default_rng(20240607)


@pytest.fixture(scope="session")
def drawer():
    """``draw`` of a NumPy generator."""

    def make(rng):
        return lambda kind, shape: rng.random(shape) if kind == "uniform" else rng.normal(size=shape)

    return make


def _fisher_pulls(net, x, loss, y, fisher, draw, samples):
    """Captured pairs ``(inputs, output gradients)`` by layer, one for each vector; gradients of the *summed* loss."""
    f, trace = net.forward(x)
    if fisher == "empirical":
        vectors = [reference.output_gradients(loss, f, y)]
    else:
        vectors = kf.fisher_vectors(fisher, LOSSES[loss], f, None, draw=draw, samples=samples)
    return [list(zip(trace[0], net.pull(trace, v), strict=True)) for v in vectors]


@pytest.fixture(scope="session")
def dense_blocks():
    """Blocks of the library for a reference net, by layer, through the verbs of a method or through a whole optimizer.

    ``error`` scales one quantity by 1.01 on the way: "inputs", "vectors" or "terms".
    """

    def make(
        net,
        x,
        loss,
        y=None,
        *,
        fisher="exact",
        bias=None,
        sharing="expand",
        draw=None,
        samples=1,
        path="method",
        reduction="mean",
        error=None,
    ):
        method = kf.KFAC(fisher=fisher, mc_samples=samples)
        terms = reference.count_terms(loss, net.forward(x)[0]) * (1.01 if error == "terms" else 1.0)
        layers = [kf.Linear(w.shape[1], w.shape[0], bias, sharing) for w in net.weights]
        pulls = _fisher_pulls(net, x, loss, y, fisher, draw, samples)
        pulls = [[(a * (1.01 if error == "inputs" else 1.0), g * (1.01 if error == "vectors" else 1.0)) for a, g in p] for p in pulls]
        if path == "method":
            count = terms * (samples if fisher == "mc" else 1)
            return [_by_method(method, layer, [p[i] for p in pulls], count) for i, layer in enumerate(layers)]
        if path == "optimizer":
            return _by_optimizer(method, net, layers, pulls, terms, reduction)
        return _by_model(method, net, layers, pulls, terms)

    return make


def _by_method(method, layer, pairs, count):
    blocks = {}
    for suffix, part in layer.blocks().items():
        state = method.init(part, np.zeros(()))
        total = None
        for a, g in pairs:
            new = method.reduce(part, state, a, g)
            total = new if total is None else total + new
        blocks[suffix] = method.dense(part, method.observe(state, total.over(count)))
    return blocks


def _params(net):
    return {
        f"l{i}": {"weight": w} | ({} if b is None else {"bias": b}) for i, (w, b) in enumerate(zip(net.weights, net.biases, strict=True))
    }


def _by_optimizer(method, net, layers, pulls, terms, reduction):
    scale = 1.0 / terms if reduction == "mean" and method.fisher == "empirical" else 1.0
    optimizer = kf.Optimizer(method, {f"l{i}": layer for i, layer in enumerate(layers)}, loss_reduction=reduction)
    params = _params(net)
    records = {f"l{i}": [(p[i][0], p[i][1] * scale) for p in pulls] for i in range(len(layers))}
    _, state = optimizer.step(params, params, records, optimizer.init(params), terms=terms)
    return _split(optimizer.bind(params).preconditioner.dense(state.curvature), layers)


def _by_model(method, net, layers, pulls, terms):
    flat = {f"{layer}.{role}": p for layer, roles in _params(net).items() for role, p in roles.items()}
    optimizer = kf.ModelOptimizer(method, kf.Model({f"l{i}": layer for i, layer in enumerate(layers)}), kf.StepSize())
    state = optimizer.init(flat)
    total = {}
    scale = 1.0 / terms if method.fisher == "empirical" else 1.0
    for p in pulls:
        for i in range(len(layers)):
            for name, part in optimizer.reduce(state, f"l{i}", p[i][0], 512.0 * scale * p[i][1]).items():
                total[name] = total[name] + part if name in total else part
    _, state = optimizer.update(flat, flat, state, lambda _: total, terms=terms, loss_scale=512.0)
    return _split(optimizer.preconditioner.dense(state.curvature), layers)


def _split(dense, layers):
    return [{suffix: dense[f"l{i}{suffix}"] for suffix in layer.blocks()} for i, layer in enumerate(layers)]


@pytest.fixture(scope="session")
def captures():
    """Random captured arrays ``(inputs, output_grads)``."""

    def make(rng, n=6, s=1, inp=3, out=2, dtype=np.float64):
        return rng.normal(size=(n, s, inp)).astype(dtype), rng.normal(size=(n, s, out)).astype(dtype)

    return make


@pytest.fixture(scope="session")
def fitted():
    """Average of one batch refreshed by a method: a state that preconditions."""

    def make(method, layer, inputs, output_grads, damping=None):
        state = method.init(layer, inputs)
        state = method.observe(state, method.reduce(layer, state, inputs, output_grads))
        return method.refresh(layer, state, damping)

    return make


@pytest.fixture(scope="session")
def model():
    """A small regression model with hand-written gradients of its mean loss, and a way to run an optimizer on it."""

    def forward(params, x, layout="oi"):
        w1, w2 = (params[n]["weight"] if layout == "oi" else params[n]["weight"].T for n in ("fc1", "fc2"))
        h = np.tanh(x @ w1.T + params["fc1"]["bias"]) * params["scale"]
        return h, h @ w2.T + params["fc2"]["bias"], w2

    def gradients(params, x, y, layout="oi", scale=1.0):
        """Gradients and records of ``scale / N sum_n 0.5 |f_n - y_n|^2``."""
        h, f, w2 = forward(params, x, layout)
        t = h / params["scale"]
        dz2 = scale * (f - y) / max(len(x), 1)
        dh = dz2 @ w2
        dz1 = dh * params["scale"] * (1.0 - t**2)
        turn = (lambda w: w) if layout == "oi" else (lambda w: w.T)
        grads = {
            "fc1": {"weight": turn(dz1.T @ x), "bias": dz1.sum(axis=0)},
            "fc2": {"weight": turn(dz2.T @ h), "bias": dz2.sum(axis=0)},
            "scale": (dh * t).sum(axis=0),
        }
        return grads, {"fc1": (x, dz1), "fc2": (h, dz2)}

    def params(rng, layout="oi", sizes=(4, 5, 3), dtype=np.float64):
        i, h, o = sizes
        turn = (lambda w: w) if layout == "oi" else (lambda w: np.ascontiguousarray(w.T))
        tree = {
            "fc1": {"weight": turn(rng.normal(size=(h, i)) / 2), "bias": 0.1 * rng.normal(size=h)},
            "fc2": {"weight": turn(rng.normal(size=(o, h)) / 2), "bias": 0.1 * rng.normal(size=o)},
            "scale": np.ones(h),
        }
        return cast(tree, dtype)

    def cast(tree, dtype):
        return {k: cast(v, dtype) if isinstance(v, dict) else v.astype(dtype) for k, v in tree.items()}

    def layers(layout="oi", sizes=(4, 5, 3), bias="joint"):
        i, h, o = sizes
        return {"fc1": kf.Linear(i, h, bias, layout=layout), "fc2": kf.Linear(h, o, bias, layout=layout)}

    def batch(rng, n=8, sizes=(4, 5, 3)):
        return rng.normal(size=(n, sizes[0])), rng.normal(size=(n, sizes[-1]))

    def run(optimizer, params, state, batches, layout="oi"):
        for x, y in batches:
            grads, records = gradients(params, x, y, layout)
            params, state = optimizer.step(params, grads, records if optimizer.stats_due(state) else None, state)
        return params, state

    def flat(tree):
        leaves = []
        for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else [tree]:
            if value is not None:
                leaves += flat(value) if isinstance(value, dict | tuple | list) else [np.array(value)]
        return leaves

    def same(x, y, tolerance=0.0):
        x, y = flat(x), flat(y)
        return len(x) == len(y) and all(
            a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(x, y, strict=True)
        )

    return SimpleNamespace(forward=forward, gradients=gradients, params=params, layers=layers, batch=batch, run=run, flat=flat, same=same)
