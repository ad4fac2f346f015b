"""MAC and its relatives on modules: what is captured, which layer is the first, and steps against dense matrices."""

import warnings

import numpy as np
import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer, Preconditioner, self_check

nn, F = torch.nn, torch.nn.functional
KINDS = {"mac": kf.MAC, "smac": kf.SMAC, "eva": kf.Eva, "foof": kf.FOOF}


class Net(nn.Module):
    """A strided convolution, a grouped one, a normalisation, and dense layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 4, (2, 1), groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.fc = nn.Linear(12, 5)
        self.gain = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        self.seen = {"conv": x}
        self.seen["grouped"] = x = torch.tanh(self.conv(x))
        self.seen["fc"] = x = torch.tanh(self.norm(self.grouped(x))).flatten(1)[:, :12]
        self.seen["head"] = x = torch.tanh(self.fc(x)) * self.gain
        return self.head(x)


def net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return Net().to(dtype)


def batch(seed, n=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 7, 5, generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype), torch.randint(3, (n,), generator=generator)


def rows(model, name):
    """Rows of a layer from its input, by PyTorch's own unfolding, ``[groups, n, d]``."""
    x, module = model.seen[name].detach(), getattr(model, name)
    if name in ("conv", "grouped"):
        cut = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)  # [N, C K, L]
        x = cut.transpose(1, 2).reshape(-1, cut.shape[1])
        x = x.reshape(len(x), module.groups, -1).transpose(0, 1)
    else:
        x = x[None]
    return x if module.bias is None else torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def matrix(model, name, grad):
    """The gradient of a layer as ``[groups, rows, d]``."""
    module = getattr(model, name)
    groups = getattr(module, "groups", 1)
    found = grad["weight"].reshape(groups, module.weight.shape[0] // groups, -1)
    return found if module.bias is None else torch.cat([found, grad["bias"].reshape(groups, -1, 1)], dim=-1)


def test_steps_are_those_of_dense_matrices():
    """Eight steps with statistics and refreshes that are not always due, against the algorithm with ``d x d`` matrices."""
    model, twin = net(), net()
    method = kf.MAC(damping=0.7, stats_every=2, refresh_every=2, stats_decay=0.8)
    optimizer = Optimizer(model, method, lr=0.05, momentum=0.9, weight_decay=0.01, decay="coupled")
    plain = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    means, moments, applied = {}, [], {}
    for t in range(8):
        x, y = batch(t)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        plain.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        for name in ("conv", "grouped", "fc", "head"):
            module, a = getattr(twin, name), rows(twin, name)
            d = a.shape[-1]
            if t % 2 == 0:
                if name == "conv":
                    moments.append(a[0].T @ a[0] / a.shape[1])
                    if t == 0:  # the inverse of the first layer is made at steps 0, 20, ...
                        applied[name] = torch.linalg.inv(sum(moments) / len(moments) + 0.7 * torch.eye(d, dtype=torch.float64))[None]
                else:
                    m = 0.8 * means.get(name, torch.zeros(())) + 0.2 * a.mean(dim=1)
                    means[name] = m
                    mean = m / (1 - 0.8 ** (t // 2 + 1))
                    outer = mean[:, :, None] * mean[:, None, :]
                    applied[name] = torch.eye(d, dtype=torch.float64) - outer / (0.7 + (mean**2).sum(-1))[:, None, None]
            v = matrix(twin, name, {role: p.grad for role, p in module.named_parameters()}) @ applied[name]
            if module.bias is not None:
                module.bias.grad = v[..., -1].reshape(-1)
                v = v[..., :-1]
            module.weight.grad = v.reshape(module.weight.shape)
        plain.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["mac", "foof"])
def test_nothing_is_hooked_but_the_inputs_of_layers_that_need_it(kind):
    model = net()
    Optimizer(model, KINDS[kind](), lr=0.1)
    watched = {name for name, module in model.named_modules() if module._forward_hooks}
    assert watched == {"conv", "grouped", "fc", "head"}, "a normalisation is left to its gradient"
    assert not any(module._backward_hooks or module._backward_pre_hooks for module in model.modules())
    outputs = []
    for module in (model.conv, model.fc, model.head):
        module.register_forward_hook(lambda *args: outputs.append(args[-1]))
    model(batch(0)[0])
    assert len(outputs) == 3
    assert all(not out._backward_hooks for out in outputs)


def test_output_gradients_never_reach_the_core(monkeypatch):
    model = net()
    optimizer = Optimizer(model, kf.MAC(), lr=0.1)
    given, reduce = [], kf.ModelOptimizer.reduce

    def watched(self, state, name, inputs, output_grads, **how):
        given.append((name, output_grads))
        return reduce(self, state, name, inputs, output_grads, **how)

    monkeypatch.setattr(kf.ModelOptimizer, "reduce", watched)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert given == [(name, None) for name in ("conv", "grouped", "fc", "head")]


def test_only_a_first_layer_that_is_asked_for_is_hooked():
    model = net()
    Optimizer(model, kf.MAC(first="none"), lr=0.1)
    assert not model.conv._forward_hooks


def test_the_report_says_what_every_parameter_has():
    rows = Optimizer(net(), kf.MAC(), lr=0.1).report()
    assert {row.parameter: row.kind for row in rows} == {
        "gain": "gradient",
        "conv.weight": "foof",
        "conv.bias": "foof",
        "grouped.weight": "mac",
        "norm.weight": "gradient",
        "norm.bias": "gradient",
        "fc.weight": "mac",
        "fc.bias": "mac",
        "head.weight": "mac",
        "head.bias": "mac",
    }


class Late(nn.Module):
    """Defines its layers in another order than it calls them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.stem = nn.Linear(4, 6)

    def forward(self, x):
        return self.head(torch.tanh(self.stem(x)))


def steps(model, optimizer, lib, count=1):
    for t in range(count):
        x, y = lib.data(seed=t, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_a_model_that_calls_its_layers_in_another_order_is_told(lib):
    model = Late().double()
    optimizer = Optimizer(model, kf.MAC(), lr=0.1)
    with pytest.warns(UserWarning, match="layer 'stem' is called first, but 'head' comes first in the model.*first_layer='stem'"):
        steps(model, optimizer, lib)
    steps(model, optimizer, lib)  # told once
    assert optimizer.engine.capture.called is None, "nothing more is looked at"
    for method in (kf.MAC(first_layer="stem"), kf.MAC(first="rank-one"), kf.Eva(), kf.KFAC()):
        model = Late().double()
        steps(model, Optimizer(model, method, lr=0.1), lib)
    assert Optimizer(Late(), kf.MAC(first_layer="stem"), lr=0.1).report()["stem.weight"].kind == "foof"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_are_in_single_precision_whatever_the_model(lib, dtype):
    model = lib.mlp(dtype=dtype)
    optimizer = Optimizer(model, kf.MAC(first="rank-one", stats_every=1, stats_decay=0.99), lr=0.0)
    x, y = lib.data(n=300, dtype=dtype)
    means = []
    for k in range(3):
        F.cross_entropy(model((x + 0.03 * k).to(dtype)).float(), y).backward()
        optimizer.step()
        state = optimizer.engine.state.curvature.blocks["0"]
        assert {v.dtype for v in (state.average.values[0], state.solver.input)} == {torch.float32}
        means.append((x + 0.03 * k).to(dtype).double().mean(dim=0))
    decays = torch.tensor([0.99**2, 0.99, 1.0], dtype=torch.float64)
    wanted = (decays[:, None] * torch.stack(means)).sum(dim=0) / decays.sum()
    torch.testing.assert_close(state.average.values[0][:-1].double(), wanted, rtol=1e-5, atol=1e-6)


def test_micro_batches_count_once_and_masked_positions_not_at_all(lib):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, mask = torch.randn(6, 5, 4, dtype=torch.float64), torch.rand(6, 5) < 0.6
    mask[:, 0] = True
    optimizer = Optimizer(model, kf.MAC(first="rank-one"), lr=0.0)
    for part in (slice(2), slice(2, 6)):
        with optimizer.masked(mask[part]):
            (model(x[part]).square().mean(dim=-1) * mask[part]).sum().backward()
    optimizer.step()
    average = optimizer.engine.state.curvature.blocks["0"].average
    assert float(average.weight) == 1.0
    torch.testing.assert_close(average.values[0][:-1], x[mask].mean(dim=0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_its_state_dict_and_from_its_file(kind, tmp_path):
    def trained(optimizer, model, first, count):
        for t in range(first, first + count):
            x, y = batch(t)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def make(seed):
        model = net(seed)
        return model, Optimizer(model, KINDS[kind](stats_every=2, refresh_every=2), lr=0.02)

    model, optimizer = make(0)
    trained(optimizer, model, 0, 3)
    optimizer.save(tmp_path / "state.safetensors")
    weights, saved = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    whole = trained(optimizer, model, 3, 3)
    for way in ("dict", "file"):
        other, twin = make(1)
        other.load_state_dict(weights)
        if way == "dict":
            twin.load_state_dict(saved)
        else:
            twin.load(tmp_path / "state.safetensors")
        torch.testing.assert_close(trained(twin, other, 3, 3), whole, rtol=1e-11, atol=0)


def test_the_preconditioner_rewrites_gradients():
    model, (x, y) = net(), batch(0)
    preconditioner = Preconditioner(model, kf.MAC(damping=0.7, first="rank-one"))
    F.cross_entropy(model(x), y).backward()
    before = {role: p.grad.clone() for role, p in model.fc.named_parameters()}
    gain = model.gain.grad.clone()
    preconditioner.step()
    grad, mean = matrix(model, "fc", before)[0], rows(model, "fc")[0].mean(dim=0)
    wanted = grad - torch.outer(grad @ mean, mean) / (0.7 + mean @ mean)
    torch.testing.assert_close(model.fc.weight.grad, wanted[:, :-1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.fc.bias.grad, wanted[:, -1], rtol=1e-12, atol=1e-14)
    assert torch.equal(model.gain.grad, gain)


def test_attention_tables_and_batch_norm_train(lib):
    """Projections have blocks of their own, a table its shares; what is not by example goes by its gradient."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.places = nn.Embedding(5, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.bn = nn.BatchNorm1d(20)
            self.head = nn.Linear(20, 3)

        def forward(self, ids):
            h = self.table(ids) + self.places(torch.arange(5))
            return self.head(self.bn(self.attention(h, h, h)[0].flatten(1)))

    torch.manual_seed(0)
    model = Reader().double()
    optimizer = Optimizer(model, kf.MAC(stats_every=1, refresh_every=1), lr=0.05)
    ids, y = torch.randint(7, (9, 5)), torch.randint(3, (9,))
    losses = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer 'places' has no statistics")
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(ids), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    kinds = {row.parameter: row.kind for row in optimizer.report()}
    assert {name for name, kind in kinds.items() if kind == "gradient"} == {"places.weight", "bn.weight", "bn.bias"}
    assert set(kinds.values()) == {"gradient", "mac"}, "a model that begins with a table has no first layer"
    assert losses[-1] < 0.5 * losses[0]
    shares = np.bincount(ids.flatten(), minlength=7) / 45
    np.testing.assert_allclose(optimizer.engine.state.curvature.blocks["table"].average.values[0], shares, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_self_check_looks_at_the_capture_of_every_method(kind):
    model, (x, y) = net(), batch(0, n=3)
    found = self_check(model, (x, y), method=KINDS[kind](), show=False)
    assert {row.block for row in found.rows} >= {"conv", "grouped", "fc", "head"}
    assert all(not row.wrong for row in found.rows)
