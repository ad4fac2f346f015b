"""From the same weights and data PyTorch and a hand-written backward pass in NumPy follow the same trajectory."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import kfcore as kf
from kfcore.testing import reference
from kfcore_torch import Optimizer

SIZES = (4, 6, 5, 3)
KINDS = [
    kf.Damping(0.5 if relative else 0.05, kind, relative=relative) for kind in ("exact", "factored", "plain") for relative in (False, True)
]
STEPS = {
    "plain gradient": {"momentum": 0.0},
    "momentum": {},
    "nesterov": {"nesterov": True},
    "clip": {"clip": 1e-4},
    "decoupled decay": {"weight_decay": 0.05},
    "coupled decay": {"weight_decay": 0.05, "decay": "coupled"},
    "everything": {"nesterov": True, "clip": 1e-3, "weight_decay": 0.02, "decay": "coupled", "graft": True},
}


EKFACS = {
    "ekfac": kf.EKFAC(damping=0.05, stats_every=2, refresh_every=5),
    "of the batch, reset": kf.EKFAC(damping=0.05, refresh_every=7, scales="batch", moved="reset"),
    "of the gradient": kf.EKFAC(damping=0.05, refresh_every=5, scales="gradient"),
    "relative damping, measured again": kf.EKFAC(damping=kf.Damping(0.5, "exact", relative=True), refresh_every=5, moved="measure"),
}


def inputs(lib, step, dead):
    """A batch; the first ``dead`` of its features are zero, so that a factor has a null space."""
    x, y = lib.data(seed=step, n=32)
    x[:, :dead] = 0.0
    return x, y


def numpy_run(lib, method, options, steps, bias="joint", fisher="empirical", dead=0):
    net = lib.mlp(SIZES)
    linears = [m for m in net if isinstance(m, torch.nn.Linear)]
    params = {f"l{i}": {"weight": m.weight.detach().numpy().copy(), "bias": m.bias.detach().numpy().copy()} for i, m in enumerate(linears)}
    layers = {f"l{i}": kf.Linear(m.in_features, m.out_features, bias) for i, m in enumerate(linears)}
    options = dict(options)
    optimizer = kf.Optimizer(method, layers, learning_rate=0.05, **options)
    state = optimizer.init(params)
    for step in range(steps):
        x, y = (t.numpy() for t in inputs(lib, step, dead))
        hs = [x]
        for i in range(3):
            z = hs[-1] @ params[f"l{i}"]["weight"].T + params[f"l{i}"]["bias"]
            hs.append(np.tanh(z) if i < 2 else z)
        e = np.exp(hs[-1] - hs[-1].max(axis=1, keepdims=True))
        dz = (e / e.sum(axis=1, keepdims=True) - np.eye(3)[y]) / len(x)
        grads, records = {}, {}
        for i in reversed(range(3)):
            grads[f"l{i}"] = {"weight": dz.T @ hs[i], "bias": dz.sum(axis=0)}
            records[f"l{i}"] = (hs[i], None if fisher == "forward" else dz)
            dz = (dz @ params[f"l{i}"]["weight"]) * (1 - hs[i] ** 2)
        params, state = optimizer.step(params, grads, records, state)
    return np.concatenate([np.concatenate([p["weight"].ravel(), p["bias"]]) for p in params.values()])


def torch_run(lib, method, options, steps, dead=0, **more):
    net = lib.mlp(SIZES)
    optimizer = Optimizer(net, method, lr=0.05, **options, **more)
    return lib.train(net, optimizer, [inputs(lib, step, dead) for step in range(steps)])


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS.keys())
def test_a_hundred_steps_agree_under_every_step_rule(lib, options):
    method = kf.KFAC(damping=0.05, stats_every=2, refresh_every=5)
    theirs = torch_run(lib, method, options, 100)
    assert lib.gap(numpy_run(lib, method, options, 100), theirs) <= 1e-10
    assert lib.gap(lib.weights(lib.mlp(SIZES)), theirs) > 1e-2, "nothing moved"


@pytest.mark.parametrize("damping", KINDS, ids=lambda d: f"{d.kind}-{'relative' if d.relative else 'absolute'}")
def test_a_hundred_steps_agree_under_every_damping(lib, damping):
    method, options = kf.KFAC(damping=damping, refresh_every=3), {"clip": 1e-3, "momentum": 0.0}
    assert lib.gap(numpy_run(lib, method, options, 100), torch_run(lib, method, options, 100)) <= 1e-10


@pytest.mark.parametrize("dead", [0, 2], ids=["full", "with a null space"])
@pytest.mark.parametrize("method", EKFACS.values(), ids=EKFACS)
def test_a_hundred_steps_of_ekfac_agree(lib, method, dead):
    options = {"clip": 1e-3, "momentum": 0.0}
    theirs = torch_run(lib, method, options, 100, dead)
    assert lib.gap(numpy_run(lib, method, options, 100, dead=dead), theirs) <= 1e-9
    assert lib.gap(torch_run(lib, kf.KFAC(damping=method.damping, refresh_every=5), options, 100, dead), theirs) > 1e-3


def test_a_hundred_steps_agree_with_the_forward_fisher(lib):
    method = kf.KFAC(damping=0.05, refresh_every=3, fisher="forward")
    assert lib.gap(numpy_run(lib, method, {}, 100, fisher="forward"), torch_run(lib, method, {}, 100)) <= 1e-10


def test_a_hundred_steps_agree_with_separate_biases(lib):
    method = kf.KFAC(damping=0.05, refresh_every=3)
    theirs = torch_run(lib, method, {}, 100, bias="separate")
    assert lib.gap(numpy_run(lib, method, {}, 100, bias="separate"), theirs) <= 1e-10
    assert lib.gap(torch_run(lib, method, {}, 100), theirs) > 1e-3, "a joint bias must differ"


def test_schedules_of_the_method_agree(lib):
    method = kf.KFAC(damping=lambda t: 0.5 / (1 + t), stats_decay=lambda t: 0.9, refresh_every=4)
    options = {"momentum": lambda t: 0.5 + 0.004 * t, "clip": lambda t: 1e-2 / (1 + t)}
    assert lib.gap(numpy_run(lib, method, options, 100), torch_run(lib, method, options, 100)) <= 1e-10


def test_stacking_equal_layers_changes_nothing(lib):
    method = kf.KFAC(damping=kf.Damping(0.05, "exact"), refresh_every=3)

    def run(group):
        net = lib.mlp((4, 4, 4, 4))
        optimizer = Optimizer(net, method, lr=0.05, group=group)
        return lib.train(net, optimizer, lib.batches(20, classes=4))

    assert lib.gap(run(False), run(True)) <= 1e-10


def test_a_summed_loss_makes_the_steps_of_the_mean_loss(lib):
    def run(reduction, **options):
        net = lib.mlp(SIZES)
        optimizer = lib.optimizer(net, loss_reduction=reduction, clip=1e-3, **options)
        loss = torch.nn.CrossEntropyLoss(reduction=reduction)
        return lib.train(net, optimizer, lib.batches(10), loss)

    assert lib.gap(run("mean"), run("sum")) <= 1e-11


def test_a_batch_given_twice_makes_the_same_step(lib):
    def run(times):
        net = lib.mlp(SIZES)
        return lib.train(net, lib.optimizer(net), [(x.repeat(times, 1), y.repeat(times)) for x, y in lib.batches(5)])

    assert lib.gap(run(1), run(3)) <= 1e-11


class Convolutional(torch.nn.Module):
    """Two convolutions, the first strided, the second with groups, tanh, a mean over the positions, and a dense layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        double = {"dtype": torch.float64}
        self.l0 = torch.nn.Conv2d(2, 4, 3, stride=2, padding=1, **double)
        self.l1 = torch.nn.Conv2d(4, 6, (2, 3), padding=(0, 1), groups=2, **double)
        self.l2 = torch.nn.Linear(6, 3, **double)

    def forward(self, x):
        return self.l2(torch.tanh(self.l1(torch.tanh(self.l0(x)))).mean(dim=(2, 3)))


def pictures(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 6, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (8,), generator=generator)


def convolve(layer, params, x):
    """``[N, in, *spatial]`` to ``[N, out, *outputs]``, as a product of patches with the matrix of the core."""
    xp = kf._array.namespace(x)
    inputs, _ = layer.capture(x, None)
    rows = layer.input_rows(xp, inputs, x.dtype)
    outputs = rows @ layer.matrices(params)[""].mT
    outputs = outputs if layer.groups == 1 else np.moveaxis(outputs, 0, 1).reshape(rows.shape[1], -1)
    spatial = layer.window(x.shape[2:]).outputs(x.shape[2:])
    return np.moveaxis(outputs.reshape(len(x), *spatial, -1), -1, 1)


def numpy_convolutions(method, how, steps):
    net = Convolutional()
    layers = {
        "l0": kf.Conv(2, 4, (3, 3), stride=2, padding=1, **how),
        "l1": kf.Conv(4, 6, (2, 3), padding=(0, 1), groups=2, **how),
        "l2": kf.Linear(6, 3, how["bias"]),
    }
    # the gradient of what goes into a convolution is what the transposed one makes of the gradient of what comes out
    backwards = kf.Conv(6, 4, (2, 3), padding=(0, 1), groups=2, transposed=True, bias=None)
    params = {n: {role: p.detach().numpy().copy() for role, p in getattr(net, n).named_parameters()} for n in layers}
    optimizer = kf.Optimizer(method, layers, learning_rate=0.05, momentum=0.9)
    state = optimizer.init(params)
    joint = [replace(layers[n], bias="joint", sharing="expand") for n in ("l0", "l1")]
    for step in range(steps):
        x, y = (t.numpy() for t in pictures(step))
        h0 = np.tanh(convolve(joint[0], params["l0"], x))
        h1 = np.tanh(convolve(joint[1], params["l1"], h0))
        pooled = h1.mean(axis=(2, 3))
        z = pooled @ params["l2"]["weight"].T + params["l2"]["bias"]
        e = np.exp(z - z.max(axis=1, keepdims=True))
        d2 = (e / e.sum(axis=1, keepdims=True) - np.eye(3)[y]) / len(x)
        d1 = (d2 @ params["l2"]["weight"])[:, :, None, None] * (1 - h1**2) / h1[0, 0].size
        d0 = convolve(backwards, {"weight": params["l1"]["weight"]}, d1) * (1 - h0**2)
        records, grads = {"l0": (x, d0), "l1": (h0, d1), "l2": (pooled, d2)}, {}
        for layer, name in zip(joint, ("l0", "l1"), strict=True):
            inputs, dz = layer.capture(*records[name])
            xp = kf._array.namespace(inputs)
            grads[name] = layer.parameters_of({"": layer.output_rows(xp, dz, dz.dtype).mT @ layer.input_rows(xp, inputs, dz.dtype)})
        grads["l2"] = {"weight": d2.T @ pooled, "bias": d2.sum(axis=0)}
        params, state = optimizer.step(params, grads, records, state)
    return np.concatenate([params[n][role].ravel() for n in layers for role in ("weight", "bias")])


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_fifty_steps_of_a_convolutional_net_agree(lib, sharing, bias):
    method = kf.KFAC(damping=0.05, stats_every=2, refresh_every=4)
    net = Convolutional()
    optimizer = Optimizer(net, method, lr=0.05, momentum=0.9, sharing={"l0": sharing, "l1": sharing}, bias=bias)
    theirs = lib.train(net, optimizer, [pictures(step) for step in range(50)])
    assert lib.gap(lib.weights(Convolutional()), theirs) > 1e-2, "nothing moved"
    assert lib.gap(numpy_convolutions(method, {"sharing": sharing, "bias": bias}, 50), theirs) <= 1e-9


class Tokens(torch.nn.Module):
    """A dense layer on normalised rows of a table."""

    def __init__(self, padding):
        super().__init__()
        torch.manual_seed(0)
        double = {"dtype": torch.float64}
        self.embed, self.norm = torch.nn.Embedding(9, 4, padding_idx=padding, **double), torch.nn.LayerNorm(4, **double)
        self.head, self.padding = torch.nn.Linear(4, 3, **double), padding

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))

    def loss(self, ids, y):
        """The mean over the examples of the sum over what is not padding, as in the reference."""
        live = torch.ones(ids.shape) if self.padding is None else ids != self.padding
        return 0.5 * ((self(ids) - y).square().sum(dim=2) * live).sum() / len(ids)


def sentences(step):
    generator = torch.Generator().manual_seed(step)
    y = torch.randn(6, 5, 3, generator=generator, dtype=torch.float64)
    return torch.randint(9, (6, 5), generator=generator), y


@pytest.mark.parametrize("padding", [None, 2], ids=["plain", "padding"])
@pytest.mark.parametrize("block", ["diagonal", "full"])
@pytest.mark.parametrize("kind", ["factored", "exact", "ekfac"])
def test_twenty_five_steps_of_tokens_agree(lib, kind, block, padding, tmp_path):
    schedule = {"stats_every": 2, "refresh_every": 4}
    method = kf.EKFAC(damping=0.05, **schedule) if kind == "ekfac" else kf.KFAC(damping=kf.Damping(0.05, kind), **schedule)
    net, start = Tokens(padding), lib.weights(Tokens(padding))
    optimizer = Optimizer(net, method, lr=0.05, momentum=0.9, norm=block)
    layers = {"embed": kf.Embedding(9, 4, padding), "norm": kf.Norm(4, block=block), "head": kf.Linear(4, 3)}
    params = {n: {role: p.detach().numpy().copy() for role, p in getattr(net, n).named_parameters()} for n in layers}
    by_hand = kf.Optimizer(method, layers, learning_rate=0.05, momentum=0.9)
    state = by_hand.init(params)
    for step in range(25):
        ids, y = sentences(step)
        optimizer.zero_grad()
        net.loss(ids, y).backward()
        optimizer.step(terms=float(len(ids)))
        grads, records = reference.tokens(params, ids.numpy(), y.numpy(), padding)
        params, state = by_hand.step(params, grads, records, state)
    theirs = np.concatenate([params[n][role].ravel() for n in layers for role in layers[n].parameters])
    assert lib.gap(start, theirs) > 1e-2, "nothing moved"
    assert lib.gap(lib.weights(net), theirs) <= 1e-10
    optimizer.save(tmp_path / "state.safetensors")
    loaded = kf.load(tmp_path / "state.safetensors", by_hand.bind(params), by_hand.init(params))
    grads, records = reference.tokens(params, *(t.numpy() for t in sentences(25)), padding)
    ours, theirs = (by_hand.step(params, grads, records, s)[0] for s in (loaded, state))
    assert all(lib.gap(ours[n][role], theirs[n][role]) <= 1e-10 for n in layers for role in layers[n].parameters)
