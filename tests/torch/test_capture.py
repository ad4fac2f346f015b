"""Whatever the model does between the layers, the statistics are those of the training pass."""

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer

nn, F = torch.nn, torch.nn.functional
DOUBLE = {"dtype": torch.float64}


class Net(nn.Module):
    """A net whose way through its layers is a function."""

    def __init__(self, way, **more):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 6, **DOUBLE), nn.Linear(6, 6, **DOUBLE), nn.Linear(6, 3, **DOUBLE)
        self.way = way
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.way(self, x)


def plain(net, x):
    return net.c(F.relu(net.b(torch.tanh(net.a(x)))))


def run(lib, way, *, steps=3, around=None, prepare=None, **options):
    net = Net(way)
    optimizer = lib.optimizer(net, **options)
    model = prepare(net) if prepare else net
    for x, y in lib.batches(steps):
        if around:
            around(net, x)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert {row.kind for row in optimizer.report()} == {"kfac"}
    return lib.weights(net)


@pytest.mark.parametrize("fisher", ["empirical", "forward"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(lib, reentrant, fisher):
    def way(net, x):
        inner = torch.utils.checkpoint.checkpoint(lambda h: F.relu(net.b(torch.tanh(h))), net.a(x), use_reentrant=reentrant)
        return net.c(inner)

    method = kf.KFAC(damping=0.1, fisher=fisher)
    assert lib.gap(run(lib, way, method=method), run(lib, plain, method=method)) < 1e-13


def test_an_activation_in_place_changes_nothing(lib):
    def way(net, x):
        return net.c(F.relu(net.b(torch.tanh_(net.a(x))), inplace=True))

    assert (run(lib, way) == run(lib, plain)).all()


def test_keyword_inputs_change_nothing(lib):
    def way(net, x):
        return net.c(F.relu(net.b(input=torch.tanh(net.a(input=x)))))

    assert (run(lib, way) == run(lib, plain)).all()


def eval_no_grad(net, x):
    net.eval()
    with torch.no_grad():
        net(x * 50)
    net.train()


def eval_with_grad(net, x):
    net.eval()
    net(x * 50)
    net.train()


def inference(net, x):
    with torch.inference_mode():
        net(x * 50)


def train_without_backward(net, x):
    net(x * 50)


STRAYS = [eval_no_grad, eval_with_grad, inference, train_without_backward]


@pytest.mark.parametrize("around", STRAYS, ids=lambda f: f.__name__)
def test_passes_without_a_backward_pass_do_not_enter(lib, around):
    assert (run(lib, plain, around=around) == run(lib, plain)).all()


@pytest.mark.parametrize("around", STRAYS[:3], ids=lambda f: f.__name__)
def test_the_forward_fisher_ignores_evaluation(lib, around):
    method = kf.KFAC(damping=0.1, fisher="forward")
    assert (run(lib, plain, around=around, method=method) == run(lib, plain, method=method)).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compilation_after_the_optimizer_changes_nothing(lib):
    compiled = run(lib, plain, prepare=lambda net: torch.compile(net, backend="eager"))
    assert lib.gap(compiled, run(lib, plain)) < 1e-13


def test_thrown_away_gradients_take_their_statistics_with_them(lib):
    def around(net, x):
        F.cross_entropy(net(x * 50), torch.zeros(len(x), dtype=torch.long)).backward()

    assert (run(lib, plain, around=around) == run(lib, plain)).all()


def test_a_module_called_twice_sums_over_both_uses(lib):
    net = Net(lambda net, x: net.c(net.b(torch.tanh(net.b(net.a(x))))))
    optimizer = lib.optimizer(net)
    seen = []
    net.b.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output)))
    x, y = lib.data()
    loss = F.cross_entropy(net(x), y)
    grads = torch.autograd.grad(loss, [output for _, output in seen], retain_graph=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    a, g = lib.factors(optimizer, "b")
    rows = torch.cat([torch.cat([h, torch.ones(len(h), 1, **DOUBLE)], 1) for h, _ in seen])
    outs = len(x) * torch.cat(grads)
    assert lib.gap(a, (rows.T @ rows / len(rows)).numpy()) < 1e-12
    assert lib.gap(g, (outs.T @ outs / len(x)).numpy()) < 1e-12


def test_two_modules_with_one_weight_are_one_layer_used_twice(lib):
    def way(net, x):
        return net.c(net.twin(torch.tanh(net.b(torch.tanh(net.a(x))))))

    tied = Net(way, twin=nn.Linear(6, 6, **DOUBLE))
    tied.twin.weight, tied.twin.bias = tied.b.weight, tied.b.bias
    optimizer = lib.optimizer(tied)
    again = Net(lambda net, x: net.c(net.b(torch.tanh(net.b(torch.tanh(net.a(x)))))))
    one, two = lib.train(tied, optimizer, lib.batches(4)), lib.train(again, lib.optimizer(again), lib.batches(4))
    assert (one == two).all()
    assert optimizer.report()["b.weight"].kind == "kfac"


@pytest.mark.parametrize("extra", [(), (5,), (2, 3)], ids=["none", "one", "two"])
def test_extra_axes_are_positions(lib, extra):
    model = lib.mlp()
    optimizer = lib.optimizer(model)
    x = torch.randn(8, *extra, 4, **DOUBLE)
    F.mse_loss(model(x), torch.zeros(8, *extra, 3, **DOUBLE)).backward()
    optimizer.step()
    rows = torch.cat([x.reshape(-1, 4), torch.ones(x.numel() // 4, 1, **DOUBLE)], 1)
    assert lib.gap(lib.factors(optimizer, "0")[0], (rows.T @ rows / len(rows)).numpy()) < 1e-13


def test_one_example_without_a_batch_axis_is_a_batch_of_one(lib):
    def run(single):
        model = lib.mlp()
        optimizer = lib.optimizer(model)
        x, y = lib.data(1)
        F.cross_entropy(model(x[0] if single else x), y[0] if single else y).backward()
        optimizer.step()
        return lib.weights(model)

    assert lib.gap(run(True), run(False)) < 1e-13


def test_frozen_and_unused_layers_stay_while_the_rest_trains(lib):
    def way(net, x):
        return net.c(torch.tanh(net.a(x)))

    net = Net(way)
    net.a.requires_grad_(False)
    optimizer = Optimizer(net, kf.KFAC(damping=0.1), lr=0.05, weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    lib.train(net, optimizer, lib.batches(3))
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {"c.weight", "c.bias"}


def test_a_frozen_bias_leaves_a_layer_of_the_weight_alone(lib):
    net = Net(plain)
    net.b.bias.requires_grad_(False)
    optimizer, bias = lib.optimizer(net), net.b.bias.detach().clone()
    lib.train(net, optimizer, lib.batches(3))
    assert torch.equal(net.b.bias, bias)
    assert lib.factors(optimizer, "b")[0].shape == (6, 6)
    assert "bias is not trained" in optimizer.report()["b.weight"].reason


def test_a_layer_that_two_heads_share_is_scaled_alike_whichever_head_is_used():
    torch.manual_seed(0)
    x = torch.randn(64, 4)

    def trace_after(heads):
        torch.manual_seed(1)
        model = torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in "tab"})
        optimizer = Optimizer(model, kf.KFAC(stats_decay=1e-9), lr=0.0)
        for head in heads:
            optimizer.zero_grad()
            (model[head](torch.tanh(model["t"](x))) ** 2).sum(dim=1).mean().backward()
            optimizer.step()
        return float(optimizer.engine.state.curvature.blocks["t"].average.values[1].trace())

    assert trace_after("ab") == pytest.approx(trace_after("b"), rel=1e-5)


def test_the_fallback_is_scaled_by_the_examples_under_the_forward_only_fisher():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = torch.nn.Linear(3, 2), torch.nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.fc(x) * self.scale

    torch.manual_seed(0)
    model = Scaled()
    optimizer = Optimizer(model, kf.KFAC(fisher="forward"), lr=0.0)
    (model(torch.randn(16, 3)) ** 2).mean().backward()
    grad = model.scale.grad.clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.engine.state.curvature.blocks["scale"].average.values[0], 16 * grad**2)
