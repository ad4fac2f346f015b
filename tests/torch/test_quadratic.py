"""Steps by the quadratic model as arrays take them, and what they leave alone."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import kfcore as kf
from kfcore_torch import Optimizer, Preconditioner

F = nn.functional
RULE = kf.LevenbergMarquardt(0.5, every=2, factor=0.8, search_every=4)
METHOD = kf.KFAC(damping=RULE, refresh_every=4)
HOW = {"quadratic": kf.QuadraticModel(reject=True), "weight_decay": 0.01, "decay": "coupled"}


def steps(model, optimizer, batches, loss_fn=F.cross_entropy):
    for x, y in batches:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step(predict=lambda x=x: model(x), loss_fn=lambda z, y=y: loss_fn(z, y))
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(count, n=16):
    generator = torch.Generator().manual_seed(1)
    draw = lambda: (torch.randn(n, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator))  # noqa: E731
    return [draw() for _ in range(count)]


def test_twenty_steps_are_those_of_arrays():
    """With search, rejection and decay; the products of the arrays are made by hand."""
    model, data = net(), batches(20)
    optimizer = Optimizer(model, METHOD, **HOW)
    own = {"0": {k: p.detach().numpy().copy() for k, p in model[0].named_parameters()}}
    own |= {"2": {k: p.detach().numpy().copy() for k, p in model[2].named_parameters()}}
    ends = steps(model, optimizer, data)
    host = kf.Optimizer(METHOD, {"0": kf.Linear(4, 5), "2": kf.Linear(5, 3)}, **HOW)
    state = host.init(own)
    for x, y in ((x.numpy(), y.numpy()) for x, y in data):

        def run(params, x=x):
            h = np.tanh(x @ params["0"]["weight"].T + params["0"]["bias"])
            z = h @ params["2"]["weight"].T + params["2"]["bias"]
            p = np.exp(z - z.max(1, keepdims=True))
            return h, p / p.sum(1, keepdims=True)

        h, p = run(own)

        def back(dz, own=own, h=h, x=x):
            dh = dz @ own["2"]["weight"] * (1 - h**2)
            return {"0": {"weight": dh.T @ x, "bias": dh.sum(0)}, "2": {"weight": dz.T @ h, "bias": dz.sum(0)}}, dh

        def product(v, own=own, h=h, p=p, x=x, back=back):
            dh = (x @ v["0"]["weight"].T + v["0"]["bias"]) * (1 - h**2)
            u = h @ v["2"]["weight"].T + v["2"]["bias"] + dh @ own["2"]["weight"].T
            return back((p * u - p * (p * u).sum(1, keepdims=True)) / len(x))[0]

        def loss(params, y=y, run=run):
            return -np.log(run(params)[1][np.arange(len(y)), y]).mean()

        dz = (p - np.eye(3)[y]) / len(x)
        grads, dh = back(dz)
        own, state = host.step(own, grads, {"0": (x, dh), "2": (h, dz)}, state, curvature_product=product, loss=loss)
    expected = np.concatenate([v.ravel() for layer in own.values() for v in layer.values()])
    assert np.abs(ends - expected).max() <= 1e-9 * np.abs(expected).max()
    found = optimizer.diagnostics()
    assert found["damping"] == pytest.approx(float(state.step.control.damping), rel=1e-9)
    assert found["damping"] != RULE.initial
    assert found["factored"] == pytest.approx(float(state.step.control.factored), rel=1e-9)


def test_a_parameter_without_a_gradient_does_not_move():
    model, (x, y) = net(), batches(1)[0]
    frozen = model[0].weight.detach().clone()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = Optimizer(model, METHOD, **HOW)
    steps(model, optimizer, [(x, y)] * 3)
    assert torch.equal(model[0].weight, frozen)
    whole = net()
    free = Optimizer(whole, METHOD, **HOW)
    F.cross_entropy(whole(x), y).backward()
    for p in whole[0].parameters():
        p.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free.step(predict=lambda: whole(x), loss_fn=lambda z: F.cross_entropy(z, y))
    assert torch.equal(whole[0].weight, frozen)


def test_groups_share_one_learning_rate():
    model, (x, y) = net(), batches(1)[0]
    groups = [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[2].parameters(), "lr": 0.5}]
    optimizer = Optimizer(model, METHOD, groups, **HOW)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="`learning_rate` must be the same"):
        optimizer.step(predict=lambda: model(x), loss_fn=lambda z: F.cross_entropy(z, y))


def test_a_gradient_rewriter_has_no_model_to_adapt_by():
    with pytest.raises(ValueError, match="`damping` is adaptive"):
        Preconditioner(net(), METHOD)
