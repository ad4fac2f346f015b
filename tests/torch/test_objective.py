"""Learning rate, momentum and damping from the quadratic model: products with the exact matrix, and a step that leaves no trace."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kfcore as kf
from kfcore_torch import Optimizer, Preconditioner
from kfcore_torch.derivatives import backward, forward

F = nn.functional
DOUBLE = {"dtype": torch.float64}


def machine(model, method=None, **options):
    return Optimizer(model, method or kf.KFAC(damping=0.1), **({"quadratic": kf.QuadraticModel()} | options))


def normal(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def directions(opt, count=2):
    """Random updates by the core's names."""
    return [{n: normal(*p.shape, seed=10 * k + i) for i, (n, p) in enumerate(opt.engine.layout.values().items())} for k in range(count)]


def dense_gram(opt, predict, loss_fn, vectors):
    """From the Jacobian, a row an output, and the Hessian of the loss, both whole."""
    layout = opt.engine.layout
    outputs = predict()
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    live = [z for z in parts if z.is_floating_point()]
    sizes = [z.numel() for z in live]
    flat = torch.cat([z.reshape(-1) for z in live])
    rows = []
    for k in range(len(flat)):
        grads = torch.autograd.grad(flat[k], list(layout.parameters.values()), retain_graph=True, materialize_grads=True)
        rows.append(dict(zip(layout.parameters, grads, strict=True)))

    def of(vector, row):
        return sum((layout.parts[n].of(row[layout.parts[n].parameter]) * x).sum() for n, x in vector.items())

    def loss(flat):
        pieces = iter(flat.split(sizes))
        whole = tuple(next(pieces).reshape(z.shape) if z.is_floating_point() else z for z in parts)
        return loss_fn(whole if isinstance(outputs, tuple) else whole[0])

    hessian = torch.autograd.functional.hessian(loss, flat.detach())
    j = torch.stack([torch.stack([of(v, row) for row in rows]) for v in vectors])
    return (j @ hessian @ j.mT).detach().numpy()


class Tied(nn.Module):
    """A transformer whose table is also its output layer, with a checkpointed block and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4, **DOUBLE)
        self.block = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True, **DOUBLE)
        self.out = nn.Linear(4, 6, bias=False, **DOUBLE)
        self.out.weight = self.table.weight
        self.scale = nn.Parameter(normal(4))

    def forward(self, ids):
        return self.out(checkpoint(self.block, self.table(ids), use_reentrant=False) * self.scale)


class Recurrent(nn.Module):
    """Two outputs, and one that is no number."""

    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(3, 4, batch_first=True, **DOUBLE), nn.Linear(4, 2, **DOUBLE)

    def forward(self, x):
        h, (last, _) = self.lstm(x)
        z = self.out(h)
        return z, last, z.argmax(-1)


def convolutional():
    layers = [nn.Conv2d(2, 3, 3, **DOUBLE), nn.BatchNorm2d(3, **DOUBLE), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3, **DOUBLE))


def cases(lib):
    x, y = lib.data(5)
    ids, image, labels = torch.tensor([[1, 2, 5], [0, 3, 3]]), normal(4, 2, 6, 6), torch.tensor([0, 2, 1, 2])
    weighted = {"weight": torch.tensor([0.5, 2.0, 1.0], **DOUBLE), "ignore_index": int(y[0]), "label_smoothing": 0.1}
    tokens = torch.tensor([[1, 2, -100], [0, 5, 3]])

    def both(z):
        assert z[2].dtype == torch.int64
        return 0.5 * z[0].square().mean() + torch.exp(z[1]).mean()

    return {
        "mlp": (lib.mlp(), x, lambda z: F.cross_entropy(z, y)),
        "weights, smoothing, ignored": (lib.mlp(), x, lambda z: F.cross_entropy(z, y, **weighted)),
        "a summed loss": (lib.mlp(), x, lambda z: F.mse_loss(z, torch.ones_like(z), reduction="sum")),
        "a linear loss": (lib.mlp(), x, lambda z: z.mean()),
        "convolutions": (convolutional(), image, lambda z: F.cross_entropy(z, labels)),
        "tied transformer": (Tied(), ids, lambda z: F.cross_entropy(z.flatten(0, 1), tokens.flatten())),
        "attention in evaluation": (Tied().eval(), ids, lambda z: F.cross_entropy(z.flatten(0, 1), tokens.flatten())),
        "recurrent, several outputs": (Recurrent(), normal(2, 3, 3), both),
    }


CASES = [
    "mlp",
    "weights, smoothing, ignored",
    "a summed loss",
    "a linear loss",
    "convolutions",
    "tied transformer",
    "attention in evaluation",
    "recurrent, several outputs",
]


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_exact_matrix(lib, case):
    model, x, loss_fn = cases(lib)[case]
    opt = machine(model)
    vectors, predict = directions(opt), lambda: model(x)
    objective = opt.engine.objective(predict, loss_fn)
    expected = dense_gram(opt, predict, loss_fn, vectors)
    found = {"first": objective.gram(vectors).numpy()}
    assert opt.engine._derivatives.way.push is forward
    opt.engine._derivatives.way = opt.engine._derivatives.way._replace(push=backward)
    found["backward"] = objective.gram(vectors).numpy()
    for way, gram in found.items():
        assert np.abs(gram - expected).max() <= 1e-10 * max(np.abs(expected).max(), 1e-3), way
    assert (np.abs(expected) > 1e-3).all() == (case != "a linear loss")
    assert objective.loss(None) == loss_fn(predict())


def test_the_loss_is_that_of_the_parameters_the_step_would_write(lib):
    model, x, loss_fn = cases(lib)["tied transformer"]
    opt = machine(model)
    update = {n: 0.1 * v for n, v in directions(opt, 1)[0].items()}
    found = opt.engine.objective(lambda: model(x), loss_fn).loss(update)
    before = loss_fn(model(x))
    with torch.no_grad():
        opt._write(update)
    assert found == loss_fn(model(x)) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_have_wide_products(lib, dtype):
    whole, x, loss_fn = cases(lib)["mlp"]
    vectors = directions(machine(whole))
    expected = machine(whole).engine.objective(lambda: whole(x), loss_fn).gram(vectors).numpy()
    model = copy.deepcopy(whole).to(dtype)
    opt = machine(model)
    narrow = [{n: v.float() for n, v in of.items()} for of in vectors]
    found = opt.engine.objective(lambda: model(x.to(dtype)), loss_fn).gram(narrow)
    assert found.dtype == torch.float32
    assert lib.gap(found.numpy(), expected) < (1e-5 if dtype == torch.float32 else 0.05)


def test_a_float32_lstm_is_differentiated_without_its_fused_kernel(lib):
    model, x, loss_fn = cases(lib)["recurrent, several outputs"]
    vectors, predict = directions(machine(model)), lambda: model(x)
    expected = machine(model).engine.objective(predict, loss_fn).gram(vectors).numpy()
    model.float()
    opt = machine(model)
    found = opt.engine.objective(lambda: model(x.float()), loss_fn).gram([{n: v.float() for n, v in of.items()} for of in vectors])
    assert opt.engine._derivatives.way.push is forward
    assert lib.gap(found.numpy(), expected) < 1e-5


def test_two_backward_passes_take_over_where_forward_mode_does_not_go(lib):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, **DOUBLE)), nn.Tanh())
    opt, (x, y) = machine(model), lib.data(5)
    vectors, predict = directions(opt), lambda: model(x)
    loss_fn = lambda z: F.cross_entropy(z, y)  # noqa: E731
    objective = opt.engine.objective(predict, loss_fn)
    with pytest.warns(UserWarning, match="two backward passes"):
        found = objective.gram(vectors)
    assert opt.engine._derivatives.way.push is backward
    assert lib.gap(found.numpy(), dense_gram(opt, predict, loss_fn, vectors)) < 1e-10
    with warnings.catch_warnings(action="error"):
        objective.gram(vectors)


class Hidden(nn.Module):
    """Uses parameters where derivatives of other kinds do not see them."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 5, **DOUBLE), nn.Linear(5, 3, **DOUBLE), how
        self.references = [self.a.weight]

    def forward(self, x):
        if self.how == "reentrant":
            h = checkpoint(self.a, x.clone().requires_grad_(), use_reentrant=True)
        else:
            h = F.linear(x, self.references[0])
        return self.b(torch.tanh(h))


@pytest.mark.parametrize("how", ["reentrant", "reference"])
def test_parameters_that_are_used_in_hiding_are_found_out(lib, how):
    model = Hidden(how)
    opt, (x, y) = machine(model), lib.data(5)
    F.cross_entropy(model(x), y).backward()
    given = {"predict": lambda: model(x), "loss_fn": lambda z: F.cross_entropy(z, y)}
    with pytest.raises(RuntimeError, match=r"does not reach a.weight, a.bias" if how == "reentrant" else "miss the gradient of the loss"):
        opt.engine.objective(**given).gram(directions(opt))


# -- steps -------------------------------------------------------------------------------------------------------------


def regression(n=20, seed=3):
    x, y = normal(n, 4, seed=seed), normal(n, 3, seed=seed + 1)
    model = nn.Linear(4, 3, bias=False, **DOUBLE)
    return model, x, y, lambda z: 0.5 * (z - y).square().sum() / n


def step(opt, predict, loss_fn, **given):
    opt.zero_grad()
    loss = loss_fn(predict())
    loss.backward()
    opt.step(predict=predict, loss_fn=loss_fn, **given)
    return loss.item()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_one_step_lands_on_the_minimum_of_a_linear_regression(decay):
    model, x, y, loss_fn = regression()
    method = kf.KFAC(damping=kf.Damping(1e-12, "exact"), fisher="forward")
    opt = machine(model, method, weight_decay=decay, decay="coupled")
    step(opt, lambda: model(x), loss_fn)
    best = torch.linalg.solve(x.mT @ x / 20 + decay * torch.eye(4, **DOUBLE), x.mT @ y / 20).mT
    assert torch.allclose(model.weight, best, atol=1e-9)
    assert opt.diagnostics()["learning_rate"] == pytest.approx(1.0, rel=1e-9)
    assert opt.param_groups[0]["lr"] == 1.0


def test_lr_in_the_groups_is_a_factor_that_schedulers_find():
    moved = []
    for lr in (None, 0.5):
        model, x, _, loss_fn = regression()
        torch.nn.init.ones_(model.weight)
        opt = machine(model, lr=lr)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.1)
        step(opt, lambda m=model, x=x: m(x), loss_fn)
        moved.append(model.weight.detach() - 1.0)
        scheduler.step()
        assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * (lr or 1.0))
    assert torch.allclose(moved[1], 0.5 * moved[0], rtol=1e-12)
    assert Optimizer(nn.Linear(2, 2), kf.KFAC()).param_groups[0]["lr"] == 0.1
    assert machine(nn.Linear(2, 2), quadratic=kf.QuadraticModel(learning_rate=False)).param_groups[0]["lr"] == 0.1


def test_the_damping_goes_down_on_a_quadratic_problem():
    model, x, _, loss_fn = regression()
    opt = machine(model, kf.KFAC(damping=kf.LevenbergMarquardt(1.0, every=2, factor=0.9), fisher="forward"))
    found = [step(opt, lambda: model(x), loss_fn) and opt.diagnostics()["damping"] for _ in range(6)]
    assert found == pytest.approx([1.0, 0.9**2, 0.9**2, 0.9**4, 0.9**4, 0.9**6], rel=1e-12)


@pytest.mark.parametrize("reject", [False, True])
def test_the_damping_goes_up_after_a_bad_step_which_may_be_taken_back(reject):
    """Where the curvature falls off, the model oversteps."""
    model, x, _, _ = regression()
    nn.init.constant_(model.weight, 4.0)
    loss_fn = lambda z: torch.sqrt(1.0 + z.square()).mean()  # noqa: E731
    before = model.weight.detach().clone()
    rule = kf.LevenbergMarquardt(1e-6, every=5 if reject else 1, factor=0.5)
    opt = machine(model, kf.KFAC(damping=rule, fisher="forward"), quadratic=kf.QuadraticModel(reject=reject))
    first = step(opt, lambda: model(x), loss_fn)
    found = opt.diagnostics()
    assert found["damping"] == pytest.approx(1e-6 / 0.5 ** (5 if reject else 1))
    assert found["rejected"] == int(reject)
    assert torch.equal(model.weight, before) == reject
    assert (loss_fn(model(x)).item() > first) != reject
    assert float(opt.engine.state.step.momentum["weight"].norm()) == pytest.approx(float((model.weight.detach() - before).norm()))


class Busy(nn.Module):
    """Everything that an evaluation could leave a trace in."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(4, 6, **DOUBLE), nn.BatchNorm1d(6, **DOUBLE), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3, **DOUBLE)
        )
        self.register_buffer("calls", torch.zeros(()))
        self.frozen = nn.Parameter(normal(3), requires_grad=False)

    def forward(self, x):
        self.calls = self.calls + 1
        return self.inner(x) + self.frozen


@pytest.mark.parametrize("method", [kf.KFAC, kf.EKFAC])
def test_evaluations_leave_no_trace(lib, method):
    """With nothing taken from the model of the loss it is the plain optimizer, on a model with buffers and random numbers of its own."""
    rule = kf.LevenbergMarquardt(0.1, every=1, floor=0.1, ceiling=0.1)
    quadratic = kf.QuadraticModel(learning_rate=False, momentum=False)
    runs = []
    for damping, options in ((0.1, {}), (rule, {"quadratic": quadratic})):
        torch.manual_seed(0)
        model = Busy()
        opt = Optimizer(model, method(damping=damping, refresh_every=2, stats_every=2), lr=0.05, momentum=0.9, **options)
        for x, y in lib.batches(5):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            lent = {"predict": lambda x=x, model=model: model(x), "loss_fn": lambda z, y=y: F.cross_entropy(z, y)} if options else {}
            grads, mode = [p.grad for p in model.parameters()], [(m, m.training) for m in model.modules()]
            opt.step(**lent)
            assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
            assert all(m.training == was for m, was in mode)
            assert all(p.requires_grad == (p is not model.frozen) and p.is_leaf for p in model.parameters())
        runs.append((model.state_dict(), torch.get_rng_state(), opt.engine.state.curvature))
    (plain, numbers, curvature), (found, same, other) = runs
    assert torch.equal(numbers, same)
    assert plain.keys() == found.keys()
    assert all(torch.allclose(plain[name], found[name], rtol=1e-12, atol=1e-14) for name in plain)
    assert plain["calls"] == 5
    for name, block in curvature.blocks.items():
        for a, b in zip(block.average.values, other.blocks[name].average.values, strict=True):
            assert a is None or torch.allclose(a, b, rtol=1e-12)


def test_what_was_captured_is_there_after_evaluations_in_either_way(lib):
    model, (x, y) = lib.mlp(), lib.data()
    opt = machine(model, loss_reduction="sum")
    engine = opt.engine
    loss_fn = lambda z: F.cross_entropy(z, y, reduction="sum")  # noqa: E731
    loss_fn(model(x)).backward()
    terms, statistics = engine._terms, {name: part.count for name, part in engine._statistics.items()}
    objective = engine.objective(lambda: model(x), loss_fn)
    for push in (forward, backward):
        objective.gram(directions(opt))
        engine._derivatives.way = engine._derivatives.way._replace(push=push)
    objective.gram(directions(opt))
    objective.loss(None)
    assert engine._terms == terms == 8
    assert {name: part.count for name, part in engine._statistics.items()} == statistics
    assert engine.capture.wanted
    assert engine.capture.counting


def test_dropout_is_the_same_in_all_evaluations_of_a_step(lib):
    model = nn.Sequential(nn.Linear(4, 30, **DOUBLE), nn.Dropout(0.5), nn.Linear(30, 3, **DOUBLE))
    opt, (x, y) = machine(model), lib.data()
    objective = opt.engine.objective(lambda: model(x), lambda z: F.cross_entropy(z, y))
    assert objective.loss(None) == objective.loss({n: torch.zeros_like(v) for n, v in directions(opt)[0].items()})
    first = objective.gram(directions(opt))
    assert torch.equal(first, objective.gram(directions(opt)))
    model(x)
    assert not torch.allclose(first, objective.gram(directions(opt)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ranks_have_the_objective_of_the_whole(lib, reduction):
    x, y = lib.data(8)

    def found(part, all_reduce=None):
        model = lib.mlp()
        opt = machine(model, loss_reduction=reduction, all_reduce=all_reduce)
        objective = opt.engine.objective(lambda: model(x[part]), lambda z: F.cross_entropy(z, y[part], reduction=reduction))
        return objective.gram(directions(opt)).numpy(), float(objective.loss(directions(opt)[0]))

    posted = []
    found(slice(4), lambda t: posted.append(t.clone()))
    waiting = iter(posted)
    gram, loss = found(slice(4, 8), lambda t: t.add_(next(waiting)))
    expected, whole = found(slice(8))
    assert next(waiting, None) is None
    assert lib.gap(gram, expected) < 1e-12
    assert loss == pytest.approx(whole, rel=1e-12)


def test_the_objective_is_unscaled_where_a_scaler_is_used(lib):
    paths = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**8)):
        model = lib.mlp(dtype=torch.float32)
        opt = machine(model, kf.KFAC(damping=kf.LevenbergMarquardt(0.1, every=1)), grad_scaler=scaler)
        for x, y in lib.batches(3, dtype=torch.float32):
            predict, loss_fn = (lambda x=x, m=model: m(x)), (lambda z, y=y: F.cross_entropy(z, y))
            if scaler is None:
                step(opt, predict, loss_fn)
                continue
            opt.zero_grad()
            scaler.scale(loss_fn(predict())).backward()
            scaler.step(opt, predict=predict, loss_fn=loss_fn)
            scaler.update()
        paths.append((lib.weights(model), opt.diagnostics()["damping"]))
    assert lib.gap(paths[0][0], paths[1][0]) < 1e-5
    assert paths[0][1] == pytest.approx(paths[1][1])


def test_a_compiled_model_is_run_as_it_is_written(lib):
    model, (x, y) = lib.mlp(), lib.data()
    opt = machine(model)
    compiled = torch.compile(model, backend="eager")
    loss_fn = lambda z: F.cross_entropy(z, y)  # noqa: E731
    vectors = directions(opt)
    found = opt.engine.objective(lambda: compiled(x), loss_fn).gram(vectors)
    assert torch.equal(found, opt.engine.objective(lambda: model(x), loss_fn).gram(vectors))


# -- state, wrong calls ------------------------------------------------------------------------------------------------


def trained(lib, count, opt=None, model=None, first=1):
    model = lib.mlp() if model is None else model
    method = kf.KFAC(damping=kf.LevenbergMarquardt(0.5, every=2, factor=0.8, search_every=2), refresh_every=2)
    opt = machine(model, method, quadratic=kf.QuadraticModel(reject=True)) if opt is None else opt
    for x, y in lib.batches(count, first=first):
        step(opt, lambda x=x: model(x), lambda z, y=y: F.cross_entropy(z, y))
    return model, opt


@pytest.mark.parametrize("how", ["state dict", "file", "copy"])
def test_a_run_goes_on_with_the_same_control(lib, how, tmp_path):
    model, opt = trained(lib, 5)
    if how == "copy":
        twin = copy.deepcopy(opt)
        other = twin._model
    else:
        other, twin = trained(lib, 0, model=copy.deepcopy(model))
        if how == "file":
            opt.save(tmp_path / "run")
            twin.load(tmp_path / "run")
        else:
            twin.load_state_dict(opt.state_dict())
    assert opt.diagnostics()["damping"] != 0.5
    assert twin.diagnostics() == opt.diagnostics()
    trained(lib, 4, opt, model, first=6)
    trained(lib, 4, twin, other, first=6)
    assert np.array_equal(lib.weights(model), lib.weights(other))
    assert twin.diagnostics() == opt.diagnostics()


def test_layers_that_join_later_keep_the_control(lib):
    model = lib.mlp()
    model[0].requires_grad_(False)
    model, opt = trained(lib, 4, machine(model, kf.KFAC(damping=kf.LevenbergMarquardt(0.5, every=2)), params=model.parameters()), model)
    before = opt.engine.state.step.control
    assert before.damping != 0.5
    model[0].requires_grad_(True)
    opt.engine.join(opt._trained())
    after = opt.engine.state.step.control
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    trained(lib, 1, opt, model)
    trained(lib, 1, opt, model)
    assert "0" in opt.engine.state.curvature.blocks
    assert "0.weight" in str(opt.report())


def test_wrong_calls_say_so_and_change_nothing(lib):
    model, (x, y) = lib.mlp(), lib.data()
    opt, before = machine(model), lib.weights(model)
    F.cross_entropy(model(x), y).backward()
    good = {"predict": lambda: model(x), "loss_fn": lambda z: F.cross_entropy(z, y)}
    for given in ({}, {"predict": good["predict"]}, {"loss_fn": good["loss_fn"]}):
        with pytest.raises(ValueError, match="`predict` and `loss_fn` must be given"):
            opt.step(**given)
    with pytest.raises(TypeError, match="`predict` must return a floating point tensor"):
        opt.step(**(good | {"predict": lambda: model(x).argmax()}))
    with pytest.raises(ValueError, match="does not depend on the parameters"):
        opt.step(**(good | {"predict": lambda: x[:, :3]}))
    with pytest.raises(ValueError, match=r"`loss_fn` must return the loss as a tensor of one number, got shape \(8,\)"):
        opt.step(**(good | {"loss_fn": lambda z: F.cross_entropy(z, y, reduction="none")}))
    assert (lib.weights(model) == before).all()
    assert opt.diagnostics()["steps"] == 0
    parameters = list(model.parameters())
    opt = machine(model, params=[{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.5}])
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="`learning_rate` must be the same"):
        opt.step(**good)
    with pytest.raises(ValueError, match="`predict` and `loss_fn` have no use"):
        lib.optimizer(model).step(**good)
    with pytest.raises(ValueError, match="`decay` must be 'coupled'"):
        machine(lib.mlp(), weight_decay=0.1)
    with pytest.raises(ValueError, match="`damping` is adaptive"):
        Preconditioner(lib.mlp(), kf.KFAC(damping=kf.LevenbergMarquardt(1.0)))


def test_losses_of_a_run_with_rejection_never_rise(lib):
    model, (x, y) = lib.mlp(), lib.data(32)
    opt = machine(model, kf.KFAC(damping=kf.LevenbergMarquardt(0.1, every=1)), quadratic=kf.QuadraticModel(reject=True))
    losses = [step(opt, lambda: model(x), lambda z: F.cross_entropy(z, y)) for _ in range(15)]
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.6 * losses[0]
