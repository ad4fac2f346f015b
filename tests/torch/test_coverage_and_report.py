"""Every parameter has one block and a reason; what no layer covers falls back, or is refused where strictness is asked for."""

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer

nn, F = torch.nn, torch.nn.functional


def leaves(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple) else ()
    return [leaf for part in parts for leaf in leaves(part)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("fisher", ["empirical", "forward"])
@pytest.mark.parametrize("kind", ["exact", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_bytes_are_those_of_the_state(lib, momentum, fisher, kind, dtype):
    model = lib.mlp((64, 128, 128, 10), dtype=dtype)
    method = kf.KFAC(damping=kf.Damping(0.1, kind), fisher=fisher)
    optimizer = Optimizer(model, method, momentum=momentum)
    lib.train(model, optimizer, lib.batches(1, inp=64, dtype=dtype))
    actual = sum(x.numel() * x.element_size() for x in leaves(optimizer.engine.state))
    assert abs(optimizer.report().bytes / actual - 1) < 0.01


class Mixed(nn.Module):
    """Layers of many kinds."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.mix, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens):
        h = self.norm(self.embed(tokens))
        h = self.attention(h, h, h)[0] + self.mix(h) * self.scale
        return self.head(h).mT


def test_every_parameter_has_one_row_and_a_reason():
    model = Mixed()
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.05)
    report = optimizer.report()
    names = [name for name, _ in model.named_parameters() if "in_proj" not in name]
    rows = [f"attention.{which}_proj.{role}" for role in ("weight", "bias") for which in "qkv"]
    assert sorted(row.parameter for row in report) == sorted(names + rows)
    assert {row.parameter for row in report if row.kind == "kfac"} == {
        n for n in names + rows if n.startswith(("mix", "attention", "norm"))
    }
    reasons = {row.parameter: row.reason for row in report}
    assert reasons["embed.weight"] == "weight shared by modules that do different things with it: Embedding and Linear"
    assert reasons["head.bias"].startswith("bias of a Linear without a layer: weight shared by")
    assert reasons["attention.k_proj.weight"] == "Linear in rows 4:8 of attention.in_proj_weight"
    assert reasons["norm.weight"] == reasons["norm.bias"] == "Norm (diagonal)"
    assert reasons["scale"] == "a bare parameter"
    assert all(reasons[row.parameter] in str(report) for row in report)
    tokens = torch.randint(7, (3, 5))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(tokens), tokens).backward()
    optimizer.step()
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters() if p.grad.abs().max() > 1e-6)


def test_strictness_refuses_a_fallback(lib):
    with pytest.raises(ValueError, match=r"embed.weight .*Embedding and Linear"):
        Optimizer(Mixed(), kf.KFAC(), strict=True)
    Optimizer(lib.mlp(), kf.KFAC(), strict=True)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x):
        return self.b(torch.tanh(F.linear(x, self.a.weight, self.a.bias)))


def test_a_layer_used_without_a_call_falls_back_once_with_a_warning(lib):
    model = Functional()
    optimizer, before = lib.optimizer(model), model.a.weight.detach().clone()
    with pytest.warns(UserWarning, match="layer 'a' has no statistics in this step: its weight is used, but its module was not called"):
        lib.train(model, optimizer, lib.batches(1))
    lib.train(model, optimizer, lib.batches(2))
    assert optimizer.report()["a.weight"].kind == "diagonal"
    assert optimizer.report()["b.weight"].kind == "kfac"
    assert not torch.equal(model.a.weight, before)


def test_strictness_refuses_a_layer_used_without_a_call(lib):
    model = Functional()
    optimizer = lib.optimizer(model, strict=True)
    with pytest.raises(RuntimeError, match="`strict` is set, but a"):
        lib.train(model, optimizer, lib.batches(1))


def test_a_frozen_weight_says_why_its_bias_falls_back(lib):
    model = lib.mlp()
    model[0].weight.requires_grad_(False)
    assert "weight is not a trained parameter" in lib.optimizer(model).report()["0.bias"].reason


def test_a_model_without_layers_trains_by_the_fallback():
    model = nn.Sequential(nn.PReLU(3, dtype=torch.float64))
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.1)
    before = model[0].weight.detach().clone()
    model(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


def test_a_frozen_parameter_is_in_the_report_and_has_no_block():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    report = Optimizer(model, kf.KFAC()).report()
    assert [row.parameter for row in report] == [name for name, _ in model.named_parameters()]
    assert report["0.weight"].kind == "none"
    assert "frozen" in report["0.weight"].reason
    assert report["1.weight"].kind == "kfac"
    assert report.fallbacks() == []
