"""Recurrent nets: written from dense layers they have exact factors over time; PyTorch's fused ones fall back with the reason."""

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer

nn, F = torch.nn, torch.nn.functional
DOUBLE = {"dtype": torch.float64}
N, T, D, H = 4, 6, 3, 5


class Recurrent(nn.Module):
    """A cell of two dense layers in a loop over time, and a dense layer on the last state, or on every one."""

    def __init__(self, gates, every):
        super().__init__()
        torch.manual_seed(0)
        self.gates, self.every = gates, every
        width = H if gates == "tanh" else 4 * H
        self.inp, self.hidden, self.head = (
            nn.Linear(D, width, **DOUBLE),
            nn.Linear(H, width, bias=False, **DOUBLE),
            nn.Linear(H, 2, **DOUBLE),
        )

    def forward(self, x):
        h = c = torch.zeros(len(x), H, **DOUBLE)
        states = []
        for t in range(x.shape[1]):
            z = self.inp(x[:, t]) + self.hidden(h)
            if self.gates == "tanh":
                h = torch.tanh(z)
            else:
                i, f, g, o = z.chunk(4, dim=1)
                c = f.sigmoid() * c + i.sigmoid() * torch.tanh(g)
                h = o.sigmoid() * torch.tanh(c)
            states.append(h)
        return self.head(torch.stack(states, dim=1) if self.every else h)


def sequences(step=0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, T, D, generator=generator, **DOUBLE)
    return x, (x.sum(dim=(1, 2)) > 0).long()


def loss_of(model, x, y):
    f = model(x)
    return F.cross_entropy(f.mT, y[:, None].expand(N, T)) if model.every else F.cross_entropy(f, y)


@pytest.mark.parametrize("every", [True, False], ids=["every state", "last state"])
@pytest.mark.parametrize("gates", ["tanh", "lstm"])
def test_factors_over_time_are_those_of_all_uses_together(lib, gates, every):
    model, (x, y) = Recurrent(gates, every), sequences()
    optimizer = lib.optimizer(model, lr=0.0)
    seen = []
    for layer in (model.inp, model.hidden):
        layer.register_forward_hook(lambda module, args, output: seen.append((module, args[0].detach(), output)))
    loss = loss_of(model, x, y)
    grads = torch.autograd.grad(loss, [output for _, _, output in seen], retain_graph=True, materialize_grads=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    terms = N * T if every else N
    for layer, name in ((model.inp, "inp"), (model.hidden, "hidden")):
        uses = [(a, terms * g) for (module, a, _), g in zip(seen, grads, strict=True) if module is layer]
        assert len(uses) == T
        a = sum(a.mT @ a for a, _ in uses) / (N * T)
        g = sum(g.mT @ g for _, g in uses) / terms
        found = lib.factors(optimizer, name)
        inner = found[0] if name == "hidden" else found[0][:-1, :-1]
        assert lib.gap(inner, a.numpy()) < 1e-12
        assert lib.gap(found[1], g.numpy()) < 1e-12
        assert lib.gap(1.01 * found[1], g.numpy()) > 5e-3


@pytest.mark.parametrize("gates", ["tanh", "lstm"])
def test_rows_over_time_rebuild_the_gradients(lib, gates):
    model, (x, y) = Recurrent(gates, every=True), sequences()
    found = lib.rebuilt(model, lambda: loss_of(model, x, y).backward())
    assert set(found) == {"inp", "hidden", "head"}
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize("gates", ["tanh", "lstm"])
def test_a_recurrent_net_trains(lib, gates):
    model = Recurrent(gates, every=False)
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.1, momentum=0.5)
    assert optimizer.report().fallbacks() == []
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, *sequences())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


FUSED = [nn.RNN, nn.LSTM, nn.GRU]
CELLS = [nn.RNNCell, nn.LSTMCell, nn.GRUCell]


@pytest.mark.parametrize("kind", [*FUSED, *CELLS], ids=lambda k: k.__name__)
def test_fused_modules_fall_back_with_the_reason(kind):
    torch.manual_seed(0)
    model = nn.Module()
    model.body, model.head = kind(D, H, **DOUBLE), nn.Linear(H, 2, **DOUBLE)

    def forward(x):
        if kind in FUSED:
            return model.head(model.body(x.transpose(0, 1))[0][-1])
        out = model.body(x[:, 0])
        return model.head(out[0] if kind is nn.LSTMCell else out)

    model.forward = forward
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.1)
    report = optimizer.report()
    assert {row.parameter for row in report.fallbacks()} == {f"body.{name}" for name, _ in model.body.named_parameters()}
    inside = (
        "over time are not seen: a loop over nn.Linear has blocks"
        if kind in FUSED
        else "are not seen: two nn.Linear in its place have blocks"
    )
    expected = f"{kind.__name__} is one fused operation, in which the uses of its weights {inside}"
    assert {row.reason for row in report.fallbacks()} == {expected}
    before = [p.detach().clone() for p in model.parameters()]
    x, y = sequences()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    # without a state before, no weight of the recurrence has a gradient
    still = {name for (name, p), old in zip(model.named_parameters(), before, strict=True) if torch.equal(p, old)}
    assert still <= {"body.weight_hh"}
