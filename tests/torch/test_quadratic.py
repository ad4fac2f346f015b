"""Learning rate, momentum and damping from the quadratic model, with products that PyTorch takes."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kfcore as kf
from kfcore_torch import Optimizer, Preconditioner
from kfcore_torch.derivatives import Derivatives
from kfcore_torch.layout import layout
from kfcore_torch.objective import Objective
from kfcore_torch.quiet import Aside

F = nn.functional
RULE = kf.LevenbergMarquardt(0.5, every=2, factor=0.8, search_every=4)
METHOD = kf.KFAC(damping=RULE, refresh_every=4)
HOW = {"quadratic": kf.QuadraticModel(reject=True), "weight_decay": 0.01, "decay": "coupled"}


class Language(nn.Module):
    """A table that is the head too, attention, dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=dropout, batch_first=True)

    def forward(self, ids):
        return self.block(self.table(ids)) @ self.table.weight.T


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0])


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(4, 5), nn.Linear(5, 3), reentrant

    def forward(self, x):
        return self.second(torch.tanh(checkpoint(self.first, x, use_reentrant=self.reentrant)))


def image_net():
    return nn.Sequential(nn.Conv2d(2, 3, 3, groups=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))


def made(kind):
    """A model, its inputs and a loss of its outputs."""
    torch.manual_seed(0)
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, -100, 2, 0])
    if kind == "dense":
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        return net.double(), torch.randn(6, 4).double(), lambda z: F.cross_entropy(z, labels, weight=weight, label_smoothing=0.1)
    if kind == "images":
        return image_net().double(), torch.randn(6, 2, 4, 4).double(), lambda z: F.cross_entropy(z, labels)
    if kind == "tokens":
        ids, targets = torch.randint(7, (2, 3)), torch.randint(7, (6,))
        return Language().double(), ids, lambda z: F.cross_entropy(z.reshape(-1, 7), targets, reduction="sum")
    if kind == "recurrent":
        return Recurrent().double(), torch.randn(2, 3, 3).double(), lambda z: (z**2).mean() + z.exp().mean()
    assert kind == "checkpointed"
    return Checkpointed(False).double(), torch.randn(6, 4).double(), lambda z: F.cross_entropy(z, labels)


def objective(model, x, loss_fn):
    found = layout(model, list(model.parameters()), bias="joint", sharing="expand", norm="diagonal")
    return Objective(lambda: model(x), loss_fn, found, Aside(model), Derivatives(), None), found


def vectors_of(found, count=2, seed=0):
    rng = np.random.default_rng(seed)
    return [{name: torch.from_numpy(rng.normal(size=tuple(x.shape))) for name, x in found.values().items()} for _ in range(count)]


def by_hand(model, x, loss_fn, vectors, found):
    """``<v, J^T H J u>`` with the whole Jacobian, and H by autograd."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def run(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)) | copy.deepcopy(buffers), (x,)).reshape(-1)

    outputs = run(*parameters)
    shape = model(x).shape
    jacobian = torch.autograd.functional.jacobian(run, tuple(p.detach() for p in parameters))
    hessian = torch.autograd.functional.hessian(lambda z: loss_fn(z.reshape(shape)), outputs.detach())
    of_module = {id(p): name for name, p in model.named_parameters()}
    images = []
    for v in vectors:
        whole = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
        for name, value in v.items():
            part = found.parts[name]
            target = whole[of_module[id(found.parameters[part.parameter])]]
            (target if part.rows is None else part.of(target)).copy_(value)
        images.append(sum(j.reshape(len(outputs), -1) @ whole[name].reshape(-1) for name, j in zip(names, jacobian, strict=True)))
    u = torch.stack(images)
    return u @ hessian @ u.T


@pytest.mark.parametrize("kind", ["dense", "images", "tokens", "recurrent", "checkpointed"])
def test_products_are_those_of_the_dense_matrix(kind):
    model, x, loss_fn = made(kind)
    lent, found = objective(model, x, loss_fn)
    vectors = vectors_of(found)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which way is taken is another matter
        got = lent.gram(vectors)
    assert torch.allclose(got, by_hand(model, x, loss_fn, vectors, found), rtol=1e-9, atol=1e-12)
    assert lent.loss(None) == pytest.approx(loss_fn(model(x)).item(), rel=1e-12)
    for name, value in before.items():
        if not (kind == "images" and "running" in name) and "num_batches" not in name:  # the line above ran the model itself
            assert torch.equal(model.state_dict()[name], value), name


def test_the_loss_is_that_of_moved_parameters():
    model, x, loss_fn = made("dense")
    lent, found = objective(model, x, loss_fn)
    (update,) = vectors_of(found, 1)
    got = lent.loss(update)
    moved = copy.deepcopy(model)
    for p, u in zip(moved.parameters(), update.values(), strict=True):
        p.data += u
    assert got == pytest.approx(loss_fn(moved(x)).item(), rel=1e-12)


class Once(torch.autograd.Function):
    """A product whose derivative is written by hand, and has none itself."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


def test_what_has_no_exact_products_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4).double())

        def forward(self, x):
            return Once.apply(x, self.weight)

    lent, found = objective(Net(), torch.randn(6, 4).double(), lambda z: z.exp().mean())
    with pytest.raises(RuntimeError, match="through which no exact curvature products can be taken"):
        lent.gram(vectors_of(found))


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


def test_a_step_lands_on_the_minimum_of_a_quadratic_problem():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3, bias=False).double(), torch.randn(20, 4).double(), torch.randn(20, 3).double()
    optimizer = Optimizer(model, kf.KFAC(damping=1e-12, fisher="forward"), quadratic=kf.QuadraticModel())
    steps(model, optimizer, [(x, y)], F.mse_loss)
    best = torch.linalg.lstsq(x, y).solution.T
    assert torch.allclose(model.weight, best, atol=1e-9)
    # the direction is Newton's for half the square of each example's error; the loss is a mean over numbers
    assert optimizer.diagnostics()["learning_rate"] == pytest.approx(1.5, rel=1e-6)


def test_nothing_but_the_parameters_is_touched():
    """Buffers, gradients, modes and generators are as a plain optimizer leaves them, with dropout and statistics of the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    optimizer = Optimizer(model, kf.KFAC(damping=RULE), quadratic=kf.QuadraticModel(reject=True))
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    grads = [p.grad.clone() for p in model.parameters()]
    random, captured = torch.get_rng_state(), len(optimizer.engine.capture.take())
    seen = []

    def predict():
        z = model(x)
        seen.append(z.detach().clone())
        return z

    optimizer.step(predict=predict, loss_fn=lambda z: F.cross_entropy(z, y))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    assert len(optimizer.engine.capture.take()) == captured
    assert len(seen) >= 3
    assert torch.equal(seen[0] == 0, seen[1] == 0)
    assert model.training


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


class PauseError(Exception):
    """A collective that waits for the other rank."""


def test_two_ranks_are_the_whole():
    """Each sees half of the batch and what the other summed."""
    model, (x, y) = net(), batches(1)[0]
    whole = steps(model, Optimizer(model, METHOD, **HOW), [(x, y)])

    def rank(part, reduce):
        one = net()
        optimizer = Optimizer(one, METHOD, all_reduce=reduce, **HOW)
        F.cross_entropy(one(x), y).backward()
        grads = [p.grad.clone() for p in one.parameters()]
        optimizer.zero_grad()
        F.cross_entropy(one(x[part]), y[part]).backward()
        for p, g in zip(one.parameters(), grads, strict=True):
            p.grad.copy_(g)  # as DistributedDataParallel averages them
        optimizer.step(predict=lambda: one(x[part]), loss_fn=lambda z: F.cross_entropy(z, y[part]))
        return np.concatenate([p.detach().numpy().ravel() for p in one.parameters()])

    def together():
        """Collectives one after the other: the other rank's part is found in a run of its own, as often as there are collectives."""
        known = []
        while True:
            taken = iter(known)
            new = []

            def reduce(tensor, taken=taken, new=new):
                other = next(taken, None)
                if other is None:
                    new.append(tensor.clone())
                    raise PauseError
                tensor.add_(other)

            try:
                found = rank(slice(0, 8), reduce)
            except PauseError:
                known.append(_part_of_other(rank, len(known), known_of_first + new))
                known_of_first.extend(new)
                continue
            return found

    known_of_first = []
    found = together()
    assert np.abs(found - whole).max() <= 1e-9 * np.abs(whole).max()


def _part_of_other(rank, index, of_first):
    """The tensor that the second rank brings to collective number ``index``, given those of the first."""
    seen = []

    def reduce(tensor):
        seen.append(tensor.clone())
        if len(seen) > index:
            raise PauseError
        tensor.add_(of_first[len(seen) - 1])

    with pytest.raises(PauseError):
        rank(slice(8, 16), reduce)
    return seen[-1]


@pytest.mark.parametrize("how", ["state_dict", "file", "copy"])
def test_a_run_goes_on(how, tmp_path):
    data, model = batches(6), net()
    optimizer = Optimizer(model, METHOD, **HOW)
    steps(model, optimizer, data[:3])
    if how == "copy":
        memo = {}
        twin = copy.deepcopy(model, memo)
        again = copy.deepcopy(optimizer, memo)
    else:
        twin = copy.deepcopy(model)
        again = Optimizer(twin, METHOD, **HOW)
        if how == "file":
            optimizer.save(tmp_path / "run")
            again.load(tmp_path / "run")
        else:
            again.load_state_dict(optimizer.state_dict())
    assert np.array_equal(steps(model, optimizer, data[3:]), steps(twin, again, data[3:]))
    assert again.diagnostics() == optimizer.diagnostics()


def test_layers_that_join_later_keep_the_control():
    model, data = net(), batches(4)
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    optimizer = Optimizer(model, METHOD, model.parameters(), **HOW)
    steps(model, optimizer, data[:2])
    before = optimizer.diagnostics()["damping"]
    for p in model[0].parameters():
        p.requires_grad_(True)
    optimizer.engine.join(list(model.parameters()))
    assert optimizer.diagnostics()["damping"] == before != RULE.initial
    steps(model, optimizer, data[2:])


def test_wrong_calls_say_so():
    model, (x, y) = net(), batches(1)[0]
    optimizer = Optimizer(model, METHOD, **HOW)
    F.cross_entropy(model(x), y).backward()
    entropy = lambda z: F.cross_entropy(z, y)  # noqa: E731
    with pytest.raises(ValueError, match="`predict` and `loss_fn` must be given"):
        optimizer.step(predict=lambda: model(x))
    with pytest.raises(TypeError, match="`predict` must return a floating point tensor"):
        optimizer.step(predict=lambda: y, loss_fn=entropy)
    with pytest.raises(ValueError, match="`loss_fn` must return the loss"):
        optimizer.step(predict=lambda: model(x), loss_fn=lambda z: z)
    with pytest.raises(ValueError, match="does not depend on the parameters"):
        optimizer.step(predict=lambda: x[:, :3].clone(), loss_fn=entropy)
    with pytest.raises(ValueError, match="have no use without `quadratic`"):
        Optimizer(net(), kf.KFAC()).step(predict=lambda: model(x), loss_fn=entropy)
    with pytest.raises(ValueError, match="`damping` is adaptive"):
        Optimizer(net(), METHOD)
    with pytest.raises(ValueError, match="`damping` is adaptive"):
        Preconditioner(net(), METHOD)
    with pytest.raises(ValueError, match="`decay` must be 'coupled'"):
        Optimizer(net(), kf.KFAC(), quadratic=kf.QuadraticModel(), weight_decay=0.1)


def test_groups_share_one_learning_rate():
    model, (x, y) = net(), batches(1)[0]
    groups = [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[2].parameters(), "lr": 0.5}]
    optimizer = Optimizer(model, METHOD, groups, **HOW)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="`learning_rate` must be the same"):
        optimizer.step(predict=lambda: model(x), loss_fn=lambda z: F.cross_entropy(z, y))
