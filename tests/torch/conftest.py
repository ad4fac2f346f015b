"""Builders shared by the tests of the PyTorch adapter."""

import copy
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


def rebuilt(model, backward, **options):
    """Deviation of every block's gradient, made of the rows that the core was given, from autograd's; 1 where nothing was given.

    ``backward`` runs the model and the backward pass. The moments in the statistics are compared with those of the rows too.
    """
    opt = Optimizer(model, kf.KFAC(), lr=0.0, **options)
    core, state, layout = opt.engine.core, opt.engine.state, opt.engine.layout
    xp = kf._array.namespace(next(iter(layout.values().values())))
    sums, sizes, moments, reduce = {}, {}, {}, core.reduce

    def record(state, name, inputs, output_grads, mask=None, use=None):
        found = reduce(state, name, inputs, output_grads, mask=mask, use=use)
        for suffix, layer in (use or core.model.layers[name]).blocks().items():
            a = layer.input_rows(xp, inputs, output_grads.dtype)
            g = layer.output_rows(xp, output_grads, output_grads.dtype, inputs)
            size = layer.output_rows(xp, output_grads.abs(), output_grads.dtype, inputs.abs())
            sums[name + suffix] = sums.get(name + suffix, 0) + g.mT @ a
            sizes[name + suffix] = sizes.get(name + suffix, 0) + size.mT @ a.abs()
            moment = a.mT @ a
            moments[name + suffix] = moments.get(name + suffix, 0) + (moment.diagonal() if layer.forms[1] == "diagonal" else moment)
        return found

    core.reduce = record
    backward()
    statistics = opt.engine._statistics
    opt.remove_hooks()
    grads = core.model.matrices(layout.grads())
    deviations = {}
    for name, block in core.preconditioner.blocks.items():
        if name in grads and name not in core.model.others:
            if name not in sums:
                deviations[name] = 1.0
                continue
            assert block.layer.shape == tuple(sums[name].shape[-2:])
            # some gradients vanish, as that of the bias of the keys of attention: all terms of the sum cancel
            scale = max(abs(grads[name]).max(), 1e-3 * sizes[name].max())
            deviations[name] = float(abs(sums[name] - grads[name]).max() / scale)
            assert gap(statistics[name].input_sum, moments[name]) < 1e-12
    assert state is opt.engine.state
    return deviations


def blocks_of_ggn(model, outputs, terms):
    """Diagonal blocks, by block of the layout of ``model``, of the GGN matrix of the mean of ``terms`` squares ``sum f^2``."""
    opt = Optimizer(model, kf.KFAC(), lr=0.0)
    layout, core = opt.engine.layout, opt.engine.core
    opt.remove_hooks()
    f = outputs()
    rows = {}
    for seed in torch.eye(f.numel(), dtype=f.dtype):
        parts = torch.autograd.grad(f, list(layout.parameters.values()), seed.reshape(f.shape), retain_graph=True)
        whole = dict(zip(layout.parameters, parts, strict=True))
        values = {name: part.of(whole[part.parameter]) for name, part in layout.parts.items()}
        for name, matrix in core.model.matrices(values).items():
            rows.setdefault(name, []).append(matrix)
    found = {}
    for name, of_name in rows.items():
        j = torch.stack(of_name).reshape(f.numel(), -1)
        found[name] = (2.0 / terms * j.mT @ j).numpy()
    return found


def resumed(model, old, how, folder):
    """A copy of the model and a new optimizer of it that goes on where ``old`` is, by a ``"file"`` in the folder or by its state dict."""
    other = copy.deepcopy(model)
    new = optimizer(other)
    if how == "file":
        old.save(folder / "state.safetensors")
        new.load(folder / "state.safetensors")
    else:
        new.load_state_dict(old.state_dict())
    return other, new


@pytest.fixture(scope="session")
def lib():
    """The helpers of this file."""
    return SimpleNamespace(
        mlp=mlp,
        data=data,
        weights=weights,
        gap=gap,
        factors=factors,
        dense=dense,
        train=train,
        batches=batches,
        optimizer=optimizer,
        resumed=resumed,
        rebuilt=rebuilt,
        blocks_of_ggn=blocks_of_ggn,
    )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
