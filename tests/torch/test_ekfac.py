"""EKFAC in PyTorch: its scales are those of each example's whole gradient, however often and wherever the example goes through a layer."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kfcore as kf
from kfcore.curvature.ekfac import levelled
from kfcore_torch import Optimizer, Preconditioner

nn, F = torch.nn, torch.nn.functional
DOUBLE = {"dtype": torch.float64}
N, T, V = 6, 3, 5


class Conv(nn.Module):
    """Strides, groups, a transposed convolution, a mean over positions."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, stride=2, padding=1, **DOUBLE)
        self.b = nn.Conv2d(4, 4, (2, 3), padding=(0, 1), groups=2, **DOUBLE)
        self.c = nn.ConvTranspose2d(4, 3, 3, stride=2, **DOUBLE)
        self.head = nn.Linear(3, V, **DOUBLE)

    def forward(self, x):
        return self.head(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))).mean(dim=(2, 3)))


class Transformer(nn.Module):
    """Words to the logits of words; ``first`` is whether PyTorch's layer takes examples first."""

    def __init__(self, first=True):
        super().__init__()
        self.first, self.embed = first, nn.Embedding(V, 4, **DOUBLE)
        self.body = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=first, **DOUBLE)
        self.norm, self.head = nn.LayerNorm(4, **DOUBLE), nn.Linear(4, V, **DOUBLE)

    def forward(self, ids):
        h = self.embed(ids)
        h = self.body(h) if self.first else self.body(h.transpose(0, 1)).transpose(0, 1)
        return self.head(self.norm(h))


class Tied(nn.Module):
    """A layer called twice and a second module with its weight, once with positions and once without; a table called twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(V, 4, **DOUBLE), nn.Linear(4, 4, **DOUBLE), nn.Linear(4, 4, **DOUBLE)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.head = nn.Linear(4, V, **DOUBLE)

    def forward(self, ids):
        h = torch.tanh(self.a(torch.tanh(self.a(self.embed(ids)))))
        return self.head(torch.tanh(self.b(h.mean(dim=1))) + self.embed(ids[:, 0]))


class Recurrent(nn.Module):
    """A cell of two layers in a loop over time."""

    def __init__(self):
        super().__init__()
        self.inp, self.hidden, self.head = nn.Linear(3, 4, **DOUBLE), nn.Linear(4, 4, bias=False, **DOUBLE), nn.Linear(4, V, **DOUBLE)

    def forward(self, x):
        h = torch.zeros(len(x), 4, **DOUBLE)
        for t in range(x.shape[1]):
            h = torch.tanh(self.inp(x[:, t]) + self.hidden(h))
        return self.head(h)


def words(step, n=N):
    return torch.randint(V, (n, T), generator=torch.Generator().manual_seed(step))


def numbers(*shape):
    return lambda step, n=N: torch.randn(n, *shape, generator=torch.Generator().manual_seed(step), **DOUBLE)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6, **DOUBLE), nn.Tanh(), nn.Linear(6, V, bias=False, **DOUBLE)), numbers(4)),
    "conv": (Conv, numbers(2, 5, 4)),
    "transformer": (Transformer, words),
    "transformer, positions first": (lambda: Transformer(first=False), words),
    "tied": (Tied, words),
    "recurrent": (Recurrent, numbers(T, 3)),
}
MODEL = pytest.mark.parametrize("which", MODELS)


def made(which, method=None, **options):
    torch.manual_seed(0)
    model = MODELS[which][0]()
    method = method or kf.EKFAC(damping=0.1, refresh_every=100, scales="batch")
    return model, Optimizer(model, method, **({"lr": 0.05, "loss": kf.CrossEntropy()} | options)), MODELS[which][1]


def labels(f, step=0):
    return torch.randint(V, f.shape[:-1], generator=torch.Generator().manual_seed(100 + step))


def loss_of(f, y):
    return F.cross_entropy(f.reshape(-1, V), y.reshape(-1))


def train(model, optimizer, batches, first=0):
    """Steps; with the Fisher types that need one, a pass for them, with draws by a generator of the step."""
    for step, x in enumerate(batches, start=first):
        optimizer.zero_grad()
        f = model(x)
        if optimizer.engine.method.fisher != "empirical":
            optimizer.backward_fisher(f, generator=torch.Generator().manual_seed(step))
        loss_of(f, labels(f, step)).backward()
        optimizer.step()


def expected(optimizer, scalars, terms):
    """``1 / terms`` times the sum over ``scalars``, one a gradient to be squared, of its square in the basis; by block, by autograd."""
    layout, core = optimizer.engine.layout, optimizer.engine.core
    blocks = optimizer.engine.state.curvature.blocks
    sums = {}
    capture, wanted = optimizer.engine.capture, optimizer.engine.capture.wanted
    capture.wanted = False
    for scalar in scalars:
        parts = torch.autograd.grad(scalar, list(layout.parameters.values()), retain_graph=True, materialize_grads=True, allow_unused=True)
        whole = dict(zip(layout.parameters, parts, strict=True))
        for name, matrix in core.model.matrices({n: part.of(whole[part.parameter]) for n, part in layout.parts.items()}).items():
            solver = blocks[name].solver
            left = matrix if solver.output_basis is None else solver.output_basis.mT @ matrix
            turned = left if solver.input_basis is None else left @ solver.input_basis
            sums[name] = sums.get(name, 0) + turned**2
    capture.wanted = wanted
    xp = kf._array.namespace(next(iter(sums.values())))
    return {name: levelled(xp, total, blocks[name].solver) / terms for name, total in sums.items()}


def measured(optimizer):
    """The scales that the last step measured, under ``scales="batch"``."""
    return {name: block.scales.values[0] for name, block in optimizer.engine.state.curvature.blocks.items()}


def compare(lib, found, exact, tolerance=1e-12):
    assert set(found) == set(exact)
    # some gradients vanish, as that of the bias of the keys of attention
    gaps = {name: 0.0 if abs(x).max() < 1e-24 > abs(found[name]).max() else lib.gap(found[name], x) for name, x in exact.items()}
    assert max(gaps.values()) < tolerance, gaps


def each_loss(f, y):
    """The summed terms of each example."""
    losses = F.cross_entropy(f.reshape(-1, V), y.reshape(-1), reduction="none").reshape(len(f), -1)
    return [losses[n].sum() for n in range(len(f))]


# -- the scales --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["joint", "separate"])
@MODEL
def test_scales_are_the_second_moments_of_the_gradients_of_examples(lib, which, bias):
    model, optimizer, data = made(which, bias=bias)
    assert optimizer.report().fallbacks() == []
    train(model, optimizer, [data(0, 16)])
    f = model(x := data(1))
    y = labels(f, 1)
    exact = expected(optimizer, each_loss(f, y), f.numel() // V)
    rows = expected(optimizer, F.cross_entropy(f.reshape(-1, V), y.reshape(-1), reduction="none"), f.numel() // V)
    optimizer.zero_grad()
    train(model, optimizer, [x], first=1)
    compare(lib, measured(optimizer), exact)
    apart = {name: lib.gap(rows[name], exact[name]) for name in exact}
    assert (max(apart.values()) > 1e-2) == ("transformer" in which), "squares of the terms are others where examples have several"


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_scales_do_not_depend_on_how_factors_share(lib, sharing):
    sharing = {"a": sharing, "b": sharing}
    model, optimizer, data = made("conv", sharing=sharing)
    train(model, optimizer, [data(0, 16)])
    f = model(data(1))
    exact = expected(optimizer, each_loss(f, labels(f, 1)), N)
    train(model, optimizer, [data(1)], first=1)
    compare(lib, measured(optimizer), exact)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("which", ["mlp", "transformer", "tied", "recurrent"])
def test_scales_of_the_other_fisher_types_are_those_of_each_vector(lib, which, fisher):
    method = kf.EKFAC(damping=0.1, refresh_every=100, scales="batch", fisher=fisher, mc_samples=2)
    model, optimizer, data = made(which, method)
    train(model, optimizer, [data(0, 16)])
    f = model(x := data(1))
    generator = torch.Generator().manual_seed(1)

    def draw(kind, shape):
        return torch.rand(shape, generator=generator, **DOUBLE)

    vectors = list(kf.fisher_vectors(fisher, kf.CrossEntropy(), f.detach(), draw=draw, samples=2))
    terms = f.numel() // V * (2 if fisher == "mc" else 1)
    exact = expected(optimizer, [(f[n] * v[n]).sum() for v in vectors for n in range(N)], terms)
    together = expected(optimizer, [(f[n] * sum(v[n] for v in vectors)).sum() for n in range(N)], terms)
    train(model, optimizer, [x], first=1)
    compare(lib, measured(optimizer), exact)
    assert max(lib.gap(together[name], exact[name]) for name in exact) > 1e-2, "vectors must not be added before they are squared"


def test_the_trace_is_that_of_the_fisher_matrix_and_no_diagonal_is_closer(lib):
    model, optimizer, data = made("recurrent")
    train(model, optimizer, [data(0, 16)])
    f = model(data(1))
    layout, core = optimizer.engine.layout, optimizer.engine.core
    rows = {}
    for scalar in each_loss(f, labels(f, 1)):
        grads = dict(zip(layout.parameters, torch.autograd.grad(scalar, list(layout.parameters.values()), retain_graph=True), strict=True))
        for name, matrix in core.model.matrices(grads).items():
            rows.setdefault(name, []).append(matrix)
    train(model, optimizer, [data(1)], first=1)
    for name, block in core.preconditioner.blocks.items():
        operator = block.method.operator(block.layer, optimizer.engine.state.curvature.blocks[name])
        gradients = torch.stack(rows[name])
        assert float(operator.trace()) == pytest.approx(float((gradients**2).sum()) / N, rel=1e-12)
        best = operator.distance(gradients, N)
        for wrong in (operator.values.flip(0), 1.01 * operator.values):
            assert kf.BlockOperator(operator.output_basis, operator.input_basis, wrong).distance(gradients, N) > best


# -- what belongs together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@MODEL
def test_micro_batches_are_the_whole(lib, which, fisher):
    def run(parts):
        model, optimizer, data = made(which, kf.EKFAC(damping=0.1, refresh_every=100, scales="batch", fisher=fisher), lr=0.0)
        train(model, optimizer, [data(0, 16)])
        optimizer.zero_grad()
        x = data(1)
        y = labels(model(x), 1)
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            f = model(xs)
            if fisher == "exact":
                optimizer.backward_fisher(f)
            (loss_of(f, ys) / parts).backward()
        optimizer.step()
        return measured(optimizer)

    compare(lib, run(3), run(1))


@pytest.mark.parametrize("apart", [0, 2], ids=["pairs", "other numbers of examples"])
def test_two_forward_passes_before_one_backward_pass(lib, apart):
    """Examples of a pair are one, where there are as many on both sides."""
    model, optimizer, data = made("recurrent", lr=0.0)
    train(model, optimizer, [data(0, 16)])
    optimizer.zero_grad()
    f, g = model(data(1)), model(data(2)[: apart or N])
    y, z = labels(f, 1), labels(g, 2)
    each, other = each_loss(f, y), each_loss(g, z)
    examples = [*each, *other] if apart else [a + b for a, b in zip(each, other, strict=True)]
    exact = expected(optimizer, examples, len(examples))
    ((sum(each) + sum(other)) / len(examples)).backward()
    optimizer.step(terms=len(examples))
    compare(lib, measured(optimizer), exact)


def plainly(model, optimizer, x):
    loss_of(f := model(x), labels(f, 1)).backward()


def after_a_stray_pass(model, optimizer, x):
    model(x * 9)
    plainly(model, optimizer, x)
    x.fill_(float("nan"))  # whatever becomes of the buffer


def zeroed_between(model, optimizer, x):
    f = model(x)
    optimizer.zero_grad()
    loss_of(f, labels(f, 1)).backward()
    x.fill_(float("nan"))


def after_a_broken_pass(model, optimizer, x):
    f = model(x)
    h = f.clone()
    h.register_hook(lambda g: None)
    f.register_hook(lambda g: (_ for _ in ()).throw(KeyboardInterrupt))
    stray = model.head(model.head.weight[:, :4] * 0.0 + 1.0)
    with pytest.raises(KeyboardInterrupt):
        (loss_of(h, labels(f, 1)) + stray.sum()).backward()
    optimizer.zero_grad()
    plainly(model, optimizer, x)


def differentiated(model, optimizer, x):
    f = model(x)
    loss_of(f, labels(f, 1)).backward(create_graph=True)


def without_autograd(model, optimizer, x):
    with torch.no_grad():
        model(x * 9)
    plainly(model, optimizer, x)


WAYS = [after_a_stray_pass, zeroed_between, after_a_broken_pass, differentiated, without_autograd]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(
    ("which", "way"), [("recurrent", way) for way in WAYS] + [("mlp", way) for way in WAYS if way is not after_a_broken_pass]
)
def test_whatever_else_happens_the_uses_of_a_pass_stay_together(lib, which, way):
    results = []
    for each in (plainly, way):
        model, optimizer, data = made(which, lr=0.0)
        train(model, optimizer, [data(0, 16)])
        optimizer.zero_grad()
        each(model, optimizer, data(1))
        optimizer.step()
        results.append(measured(optimizer))
    compare(lib, *results)


def test_a_second_backward_pass_through_one_graph_is_a_batch_of_its_own(lib):
    model, optimizer, data = made("recurrent", lr=0.0)
    train(model, optimizer, [data(0, 16)])
    optimizer.zero_grad()
    f = model(data(1))
    y, z = labels(f, 1), labels(f, 2)
    exact = expected(optimizer, [*each_loss(f, y), *each_loss(f, z)], N)
    loss_of(f, y).backward(retain_graph=True)
    loss_of(f, z).backward()
    optimizer.step(terms=N)
    compare(lib, measured(optimizer), exact)


def test_a_pass_that_broke_off_may_be_run_again(lib):
    """What it had come through counts twice, as it does for every method, and nothing is mixed up."""
    results = []
    for breaks in (False, True):
        model, optimizer, data = made("mlp", lr=0.0)
        train(model, optimizer, [data(0, 16)])
        optimizer.zero_grad()

        def interrupt(grad, once=[breaks]):  # noqa: B006
            if once.pop():
                raise KeyboardInterrupt
            once.append(False)

        handle = model[1].register_forward_hook(lambda *call: call[2].register_hook(interrupt) and None)
        loss = loss_of(f := model(data(1)), labels(f, 1))
        if breaks:
            with pytest.raises(KeyboardInterrupt):
                loss.backward(retain_graph=True)
            interrupt.__defaults__[0].append(False)
        loss.backward()
        handle.remove()
        optimizer.step(terms=N)
        results.append(measured(optimizer))
    compare(lib, results[1], results[0] | {"2": 2.0 * results[0]["2"]})


def test_layers_are_reduced_as_soon_as_all_their_uses_are_there(lib):
    """Nothing is held to the end of the pass but what has more to come; uses are counted in the forward pass."""
    model, optimizer, data = made("recurrent")
    train(model, optimizer, [data(0, 16)])
    held, take = [], optimizer.engine._passes._take
    optimizer.engine._passes._take = lambda layer: (
        held.append((layer, {name: len(uses) for name, uses in optimizer.engine._passes._held.items()})),
        take(layer),
    )
    train(model, optimizer, [data(1)], first=1)
    assert [layer for layer, _ in held] in (["head", "inp", "hidden"], ["head", "hidden", "inp"])
    assert held[0][1] == {"head": 1}
    assert held[2][1] == {held[2][0]: T}


# -- activation checkpointing ------------------------------------------------------------------------------------------


class Checkpointed(Recurrent):
    """The cell in a checkpoint at each time, or (``mixed``) at all but the last."""

    def __init__(self, reentrant, mixed=False):
        super().__init__()
        self.reentrant, self.mixed = reentrant, mixed

    def cell(self, x, h):
        return torch.tanh(self.inp(x) + self.hidden(h))

    def forward(self, x):
        h = x.sum() * 0.0 + torch.zeros(len(x), 4, requires_grad=True, **DOUBLE)
        for t in range(x.shape[1]):
            inside = not self.mixed or t < x.shape[1] - 1
            h = checkpoint(self.cell, x[:, t], h, use_reentrant=self.reentrant) if inside else self.cell(x[:, t], h)
        return self.head(h)


class Nested(Checkpointed):
    """Two of these checkpoints in one around them."""

    def loop(self, x, h):
        for t in range(x.shape[1]):
            h = checkpoint(self.cell, x[:, t], h, use_reentrant=self.reentrant)
        return h

    def forward(self, x):
        h = torch.zeros(len(x), 4, requires_grad=True, **DOUBLE)
        h = checkpoint(self.loop, x[:, :-1], h + 0.0, use_reentrant=self.reentrant)
        return self.head(checkpoint(self.cell, x[:, -1], h, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("make", [Checkpointed, Nested])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(lib, make, reentrant):
    results = []
    for build in (Recurrent, lambda: make(reentrant)):
        torch.manual_seed(0)
        model, data = build(), MODELS["recurrent"][1]
        optimizer = Optimizer(model, kf.EKFAC(damping=0.1, refresh_every=2), lr=0.05)
        for micro in (1, 2, 1):
            optimizer.zero_grad()
            for k in range(micro):
                f = model(data(micro + k))
                (loss_of(f, labels(f)) / micro).backward()
            optimizer.step()
        results.append(lib.weights(model))
    assert lib.gap(*results) < 1e-12


def test_uses_that_a_checkpoint_tears_apart_are_refused(lib):
    """The reentrant kind is not seen in the forward pass: that the layer has more uses is known only after some were taken."""
    for reentrant in (False, True):
        torch.manual_seed(0)
        model, data = Checkpointed(reentrant, mixed=True), MODELS["recurrent"][1]
        optimizer = Optimizer(model, kf.EKFAC(damping=0.1), lr=0.05)
        loss_of(f := model(data(0)), labels(f)).backward()
        if not reentrant:
            optimizer.step()
            continue
        with pytest.warns(UserWarning, match="use_reentrant=False keeps them together"):
            optimizer.step()
        assert {row.parameter for row in optimizer.report().fallbacks()} == {"inp.weight", "inp.bias", "hidden.weight"}


# -- whole steps -------------------------------------------------------------------------------------------------------


def in_numpy(which, method, steps, **options):
    """The same steps by the core on NumPy arrays, which a copy of the model gives by hooks of its own."""
    model, optimizer, data = made(which, method, **options)
    optimizer.remove_hooks()
    core, names = optimizer.engine.core, dict(model.named_parameters())
    core.step_size = kf.StepSize(learning_rate=0.05, momentum=0.9)
    params = {name: p.detach().numpy().copy() for name, p in names.items()}
    state = core.init(params)
    owners, seen = {id(names[f"{name}.weight"]): name for name in core.model.layers}, []
    for module in model.modules():
        if hasattr(module, "weight"):
            module.register_forward_hook(lambda module, args, output: seen.append((owners[id(module.weight)], args[0], output)))
    for step in range(steps):
        seen.clear()
        f = model(data(step))
        grads = torch.autograd.grad(loss_of(f, labels(f, step)), [output for _, _, output in seen] + list(names.values()))
        uses = {}
        for (name, x, _), g in zip(seen, grads[: len(seen)], strict=True):
            layer = core.model.layers[name]
            uses.setdefault(name, []).append(kf.statistics.Use(layer, *layer.capture(x.detach().numpy(), g.numpy())))
        statistics = {}
        for name, of_layer in uses.items():
            statistics |= core.reduce_all(state, name, of_layer)
        grads = {name: g.numpy() for name, g in zip(names, grads[len(seen) :], strict=True)}
        updates, state = core.update(params, grads, state, statistics, terms=float(f.numel() // V))
        params = {name: p + updates[name] for name, p in params.items()}
        with torch.no_grad():
            for name, p in names.items():
                p.copy_(torch.from_numpy(params[name]))
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


@pytest.mark.parametrize("scales", ["average", "gradient"])
@pytest.mark.parametrize("which", ["mlp", "conv", "tied", "recurrent"])
def test_twenty_five_steps_are_those_of_the_core_on_numpy_arrays(lib, which, scales):
    method = kf.EKFAC(damping=0.1, stats_every=2, refresh_every=4, scales=scales)
    model, optimizer, data = made(which, method)
    start = lib.weights(model)
    train(model, optimizer, map(data, range(25)))
    assert lib.gap(start, lib.weights(model)) > 1e-2, "nothing moved"
    assert lib.gap(in_numpy(which, method, 25), lib.weights(model)) < 1e-9


@pytest.mark.parametrize("scales", ["average", "gradient"])
def test_a_resumed_run_goes_on_exactly(lib, tmp_path, scales):
    method = kf.EKFAC(damping=0.1, refresh_every=3, scales=scales)
    model, optimizer, data = made("tied", method)
    train(model, optimizer, map(data, range(5)))
    optimizer.save(tmp_path / "state")
    saved = optimizer.state_dict()
    others = []
    for how in ("file", "dictionary", "copy"):
        other, resumed = copy.deepcopy((model, optimizer)) if how == "copy" else made("tied", method)[:2]
        other.load_state_dict(model.state_dict())
        if how == "file":
            resumed.load(tmp_path / "state")
        elif how == "dictionary":
            resumed.load_state_dict(saved)
        others.append((other, resumed))
    for one, opt in [(model, optimizer), *others]:
        train(one, opt, map(data, range(5, 12)), first=5)
    assert all((lib.weights(other) == lib.weights(model)).all() for other, _ in others)
    with pytest.raises(kf.CheckpointError):
        made("tied", kf.KFAC(damping=0.1))[1].load_state_dict(saved)


def test_a_preconditioner_before_sgd_takes_the_same_steps(lib):
    method = kf.EKFAC(damping=0.1, refresh_every=2)
    model, optimizer, data = made("recurrent", method, momentum=0.0)
    train(model, optimizer, map(data, range(6)))
    torch.manual_seed(0)
    other = Recurrent()
    preconditioner, sgd = Preconditioner(other, method), torch.optim.SGD(other.parameters(), lr=0.05)
    for step in range(6):
        sgd.zero_grad()
        loss_of(f := other(data(step)), labels(f, step)).backward()
        preconditioner.step()
        sgd.step()
    assert lib.gap(lib.weights(other), lib.weights(model)) < 1e-13


@pytest.mark.parametrize("scales", ["average", "gradient"])
def test_a_loss_scale_leaves_no_mark(lib, scales):
    method = kf.EKFAC(damping=0.1, refresh_every=2, scales=scales)
    results = []
    for scale in (None, 1024.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2) if scale else None
        model, optimizer, data = made("recurrent", method, grad_scaler=scaler)
        for step in range(5):
            optimizer.zero_grad()
            loss = loss_of(f := model(data(step)), labels(f, step))
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        results.append(lib.weights(model))
    assert lib.gap(*results) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scales", ["batch", "gradient"])
def test_two_ranks_with_parts_have_the_scales_of_the_whole(lib, scales, reduction):
    """The second rank has a pass more, which nobody goes back through: what is summed has the same order all the same."""
    method = kf.EKFAC(damping=0.1, refresh_every=100, scales=scales)

    def step(part, grads=None, all_reduce=None, stray=False):
        model, optimizer, data = made("recurrent", method, lr=0.0, loss_reduction=reduction)
        train(model, optimizer, [data(0, 16)])
        optimizer.zero_grad()
        optimizer.engine.all_reduce = all_reduce
        x = data(1)
        y = labels(model(x), 1)
        optimizer.engine.clear()
        if not stray and optimizer.engine._passes is not None:
            optimizer.engine._passes.forget()
        F.cross_entropy(model(x[part]), y[part], reduction=reduction).backward()
        own = [p.grad.clone() for p in model.parameters()]
        for p, g in zip(model.parameters(), grads or (), strict=False):
            p.grad.copy_(g)
        optimizer.step()
        return measured(optimizer), own

    exact, grads = step(slice(None))
    posted = []
    step(slice(0, 2), grads, lambda t: posted.append(t.clone()))
    waiting = iter(posted)
    found, _ = step(slice(2, None), grads, lambda t: t.add_(next(waiting)), stray=True)
    assert next(waiting, None) is None, "both ranks must reduce the same things"
    compare(lib, found, exact)


def test_few_rows_make_directions_of_their_own(lib, monkeypatch):
    """Wide layers and few examples: the gradient is taken as the product of the rows in the statistics, and the step is the same."""
    method = kf.EKFAC(damping=0.1, refresh_every=2)

    def run(short):
        ways = []
        with monkeypatch.context() as patch:
            thin = kf.curvature.kronecker.thin_product
            patch.setattr(kf.curvature.kronecker, "thin_product", lambda *rows: ways.append(1) or thin(*rows))
            if not short:
                patch.setattr(kf.curvature.kronecker, "spans", lambda *_: False)
            model = lib.mlp((40, 50, 3))
            optimizer = Optimizer(model, method, lr=0.05)
            lib.train(model, optimizer, lib.batches(4, inp=40))
        return lib.weights(model), len(ways)

    (one, ways), (other, none) = run(True), run(False)
    assert (ways, none) == (4, 0)
    assert lib.gap(one, other) < 1e-11


def test_groups_have_a_damping_of_their_own(lib):
    def run(damping, groups):
        torch.manual_seed(0)
        model = Recurrent()
        params = [{"params": list(model.head.parameters()), "damping": groups}, {"params": [*model.inp.parameters(), model.hidden.weight]}]
        optimizer = Optimizer(model, kf.EKFAC(damping=damping, refresh_every=1), params, lr=0.05)
        train(model, optimizer, map(MODELS["recurrent"][1], range(3)))
        return lib.weights(model)

    assert (run(0.1, 0.1) == run(0.1, None)).all()
    assert lib.gap(run(0.1, 1.0), run(0.1, None)) > 1e-4


# -- rows that stand for examples, and layers that fall silent ---------------------------------------------------------


def test_a_layer_on_flattened_examples_says_whose_gradients_it_squares(lib):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4, **DOUBLE), nn.Linear(4, 4, **DOUBLE), nn.Linear(4, V, **DOUBLE)

        def forward(self, x):
            return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))).flatten(0, 1))

    torch.manual_seed(0)
    model, data = Flat(), MODELS["recurrent"][1]
    optimizer = Optimizer(model, kf.EKFAC(damping=0.1, refresh_every=100, scales="batch"), lr=0.0)
    message = "layer 'head' has scales of the gradients of 48 entries on the first axis of its input, not those of the 16 examples"
    with pytest.warns(UserWarning, match=message):
        train(model, optimizer, [data(0, 16)])
    f = model(data(1))
    losses = F.cross_entropy(f, y := labels(f, 1), reduction="none")
    exact = expected(optimizer, losses.reshape(N, T).sum(dim=1), N * T) | {"head": expected(optimizer, losses, N * T)["head"]}
    optimizer.zero_grad()
    loss_of(f, y).backward()
    optimizer.step()
    compare(lib, measured(optimizer), exact)
    quiet = Optimizer(Flat(), kf.KFAC(damping=0.1), lr=0.0)
    train(quiet._model, quiet, [data(0, 16)])


@pytest.mark.parametrize("scales", ["average", "gradient"])
def test_a_layer_that_is_not_called_any_more_keeps_what_it_had(lib, scales):
    model, optimizer, data = made("mlp", kf.EKFAC(damping=0.1, scales=scales))
    train(model, optimizer, [data(0)])
    before = optimizer.engine.state.curvature.blocks["2.weight" if "2.weight" in optimizer.engine.state.curvature.blocks else "2"]
    optimizer.zero_grad()
    f = F.linear(torch.tanh(model[0](data(1))), model[2].weight)
    loss_of(f, labels(f, 1)).backward()
    with pytest.warns(UserWarning, match="layer '2' has no statistics in this step"):
        optimizer.step()
    after = optimizer.engine.state.curvature.blocks["2"]
    assert all(torch.equal(a, b) for a, b in zip(before.average.values, after.average.values, strict=True))
    assert torch.isfinite(torch.as_tensor(lib.weights(model))).all()
    model[2].weight.requires_grad_(False)
    model[2].weight.grad = None
    train(model, optimizer, [data(2)], first=2)
    assert optimizer.diagnostics()["dropped_statistics"] == {}
