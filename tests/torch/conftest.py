"""Builders shared by the tests of the PyTorch adapter."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import kfcore as kf  # noqa: E402
from kfcore_torch import Optimizer  # noqa: E402

nn, functional = torch.nn, torch.nn.functional


def mlp(sizes=(4, 6, 5, 3), activation=nn.Tanh, seed=0, dtype=torch.float64, bias=True):
    """A multilayer perceptron; without an activation a deep linear net."""
    torch.manual_seed(seed)
    layers = []
    for i, (inp, out) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(inp, out, bias=bias, dtype=torch.float64))
        if activation is not None and i < len(sizes) - 2:
            layers.append(activation())
    return nn.Sequential(*layers).to(dtype)


def data(n=8, inp=4, classes=3, seed=1, dtype=torch.float64):
    """Inputs and class labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inp, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (n,), generator=generator)


def weights(model):
    """All parameters as one NumPy vector in float64."""
    return np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])


def gap(x, y):
    """Largest difference relative to the largest entry."""
    x, y = np.asarray(x), np.asarray(y)
    return np.abs(x - y).max() / max(np.abs(x).max(), np.abs(y).max(), 1e-300)


def factors(optimizer, name):
    """Running averages ``(A, G)`` of a layer."""
    return tuple(None if v is None else v.numpy() for v in optimizer.engine.state.curvature.blocks[name].average.values)


def dense(optimizer):
    """Dense blocks by name."""
    found = optimizer.engine.core.preconditioner.dense(optimizer.engine.state.curvature)
    return {name: x.numpy() for name, x in found.items()}


def train(model, optimizer, batches, criterion=functional.cross_entropy):
    """Plain steps; returns the weights after them."""
    for x, y in batches:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return weights(model)


def batches(count, first=1, **shape):
    return [data(seed=first + i, **shape) for i in range(count)]


def optimizer(model, *, method=None, **options):
    """An optimizer with settings under which every mechanism shows."""
    method = method or kf.KFAC(damping=0.1, refresh_every=2)
    return Optimizer(model, method, **({"lr": 0.05, "momentum": 0.9} | options))


@pytest.fixture(scope="session")
def lib():
    """The helpers of this file."""
    return SimpleNamespace(
        mlp=mlp, data=data, weights=weights, gap=gap, factors=factors, dense=dense, train=train, batches=batches, optimizer=optimizer
    )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
