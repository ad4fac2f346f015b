"""Convolutional modules are layers of the core: captured exactly, whatever their geometry and the way they are called."""

import copy

import numpy as np
import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer, Preconditioner

# a remark of PyTorch on its own speed
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

nn, F = torch.nn, torch.nn.functional
DOUBLE = {"dtype": torch.float64}
SPATIAL = {1: (9,), 2: (7, 8), 3: (5, 4, 6)}
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def conv(kind=nn.Conv2d, kernel=3, **options):
    torch.manual_seed(0)
    return kind(4, 8, kernel, **(DOUBLE | options))


def images(axes=2, n=3, channels=4):
    return torch.randn(n, channels, *SPATIAL[axes], **DOUBLE)


def loss_of(outputs):
    return (outputs * torch.linspace(0.5, 1.5, outputs.numel(), dtype=outputs.dtype).reshape(outputs.shape)).square().sum()


def backward(module, *args, **kwargs):
    return lambda: loss_of(module(*args, **kwargs)).backward()


GEOMETRIES = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "strided and dilated": {"stride": 2, "dilation": 2, "padding": 1},
    "valid": {"padding": "valid"},
    "same": {"padding": "same", "kernel": 2},
}


@pytest.mark.parametrize("bias", ["joint", "separate", None])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rows_rebuild_the_gradients(lib, axes, geometry, groups, mode, bias):
    module = conv(PLAIN[axes], bias=bias is not None, groups=groups, padding_mode=mode, **({"kernel": 3} | GEOMETRIES[geometry]))
    found = lib.rebuilt(module, backward(module, images(axes)), bias=bias or "joint")
    assert sorted(found) == ([".bias", ".weight"] if bias == "separate" else [""])
    assert max(found.values()) < 1e-10


@pytest.mark.parametrize("bias", ["joint", "separate", None])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("how", [{}, {"stride": 2, "padding": 1, "output_padding": 1}, {"stride": 3, "dilation": 2}], ids=str)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rows_rebuild_the_gradients_of_transposed_modules(lib, axes, how, groups, bias):
    module = conv(TRANSPOSED[axes], bias=bias is not None, groups=groups, **how)
    found = lib.rebuilt(module, backward(module, images(axes)), bias=bias or "joint")
    assert max(found.values()) < 1e-10


def test_a_gradient_that_is_off_by_a_hundredth_is_seen(lib):
    module = conv()

    def wrong():
        backward(module, images())()
        module.weight.grad[0, 0] *= 1.01

    assert lib.rebuilt(module, wrong)[""] > 1e-3


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_one_position_makes_expand_and_reduce_rebuild_alike(lib, sharing):
    module = conv()
    x = torch.randn(5, 4, 3, 3, **DOUBLE)
    assert max(lib.rebuilt(module, backward(module, x), sharing=sharing).values()) < 1e-10
    assert lib.optimizer(module, sharing={"": sharing}).engine.layout.model.layers[""].sharing == sharing


# -- ways of calling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*PLAIN.values(), *TRANSPOSED.values()], ids=lambda k: k.__name__)
def test_an_example_without_a_batch_axis_is_a_batch_of_one(lib, kind):
    axes = int(kind.__name__[-2])

    def statistics(single):
        module = conv(kind)
        optimizer = lib.optimizer(module)
        torch.manual_seed(3)
        x = images(axes, 1)
        backward(module, x[0] if single else x)()
        return optimizer.engine._statistics[""], optimizer.engine._terms

    (one, terms), (batch, others) = statistics(True), statistics(False)
    assert terms == others
    assert lib.gap(one.input_sum, batch.input_sum) < 1e-13
    assert lib.gap(one.output_sum, batch.output_sum) < 1e-13


def test_channels_last_changes_nothing(lib):
    def run(order):
        module = conv(padding=1).to(memory_format=order)
        optimizer = lib.optimizer(module)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            backward(module, images().to(memory_format=order))()
            optimizer.step()
        return lib.weights(module)

    assert lib.gap(run(torch.contiguous_format), run(torch.channels_last)) < 1e-12


class Net(nn.Module):
    """Convolutions with a way through them that is a function."""

    def __init__(self, way, **more):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1, **DOUBLE), nn.Conv2d(4, 4, 3, padding=1, **DOUBLE)
        self.head, self.way = nn.Linear(4, 3, **DOUBLE), way
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.head(self.way(self, x).mean(dim=(2, 3)))


def plain(net, x):
    return torch.tanh(net.b(torch.tanh(net.a(x))))


def twice(net, x):
    return torch.tanh(net.b(torch.tanh(net.b(torch.tanh(net.a(x))))))


def pictures(step, n=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 2, 6, 5, generator=generator, **DOUBLE), torch.randint(3, (n,), generator=generator)


def train(net, optimizer, steps=4, times=1):
    for step in range(steps):
        x, y = pictures(step)
        optimizer.zero_grad()
        F.cross_entropy(net(x.repeat(times, 1, 1, 1)), y.repeat(times)).backward()
        optimizer.step()
    return np.concatenate([p.detach().numpy().ravel() for p in net.parameters()])


def test_a_module_called_twice_sums_over_both_uses(lib):
    net = Net(twice)
    found = lib.rebuilt(net, lambda: F.cross_entropy(net(pictures(0)[0]), pictures(0)[1]).backward())
    assert sorted(found) == ["a", "b", "head"]
    assert max(found.values()) < 1e-10


def test_two_modules_with_one_kernel_are_one_layer_used_twice(lib):
    def way(net, x):
        return torch.tanh(net.twin(torch.tanh(net.b(torch.tanh(net.a(x))))))

    tied = Net(way, twin=nn.Conv2d(4, 4, 3, padding=1, **DOUBLE))
    tied.twin.weight, tied.twin.bias = tied.b.weight, tied.b.bias
    again = Net(twice)
    assert (train(tied, lib.optimizer(tied)) == train(again, lib.optimizer(again))).all()


def test_one_kernel_in_two_geometries_falls_back_with_the_reason(lib):
    net = Net(plain, twin=nn.Conv2d(4, 4, 3, dilation=2, **DOUBLE))
    net.twin.weight, net.twin.bias = net.b.weight, net.b.bias
    report = lib.optimizer(net).report()
    assert "different things" in report["b.weight"].reason
    assert "different things" in report["b.bias"].reason


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(lib, reentrant):
    def way(net, x):
        return torch.utils.checkpoint.checkpoint(lambda h: torch.tanh(net.b(torch.tanh(h))), net.a(x), use_reentrant=reentrant)

    one, two = Net(way), Net(plain)
    assert lib.gap(train(one, lib.optimizer(one)), train(two, lib.optimizer(two))) < 1e-13


def test_eval_mode_takes_part_where_there_is_a_backward_pass(lib):
    one, two = Net(plain).eval(), Net(plain)
    assert (train(one, lib.optimizer(one)) == train(two, lib.optimizer(two))).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compilation_changes_nothing(lib):
    one, two = Net(plain), Net(plain)
    optimizer = lib.optimizer(one)
    torch._dynamo.reset()
    assert lib.gap(train(torch.compile(one, backend="eager"), optimizer), train(two, lib.optimizer(two))) < 1e-13
    torch._dynamo.reset()


def test_a_frozen_bias_leaves_a_layer_of_the_kernel_alone(lib):
    net = Net(plain)
    net.b.bias.requires_grad_(False)
    optimizer, bias = lib.optimizer(net), net.b.bias.detach().clone()
    train(net, optimizer)
    assert torch.equal(net.b.bias, bias)
    assert lib.factors(optimizer, "b")[0].shape == (36, 36)
    assert "Conv; its bias is not trained" in optimizer.report()["b.weight"].reason


def test_a_frozen_kernel_says_why_its_bias_falls_back(lib):
    net = Net(plain)
    net.b.weight.requires_grad_(False)
    assert "Conv2d whose weight is not a trained parameter" in lib.optimizer(net).report()["b.bias"].reason


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias, padding=1)


def test_a_subclass_falls_back_with_the_reason(lib):
    net = Net(lambda net, x: torch.tanh(net.own(net.a(x))), own=Standardised(4, 4, 3, padding=1, **DOUBLE))
    optimizer = lib.optimizer(net)
    assert "Standardised is not nn.Conv2d itself" in optimizer.report()["own.weight"].reason
    with pytest.raises(ValueError, match=r"own\.weight .*own\.bias"):
        lib.optimizer(net, strict=True)


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(3, 3), nn.LazyLinear(3)], ids=["conv", "linear"])
def test_a_lazy_module_must_have_run_once(lib, lazy):
    model = nn.Sequential(copy.deepcopy(lazy))
    with pytest.raises(ValueError, match=r"'0\.weight' of a Lazy.*run a forward pass"):
        lib.optimizer(model)
    x = torch.randn(2, 4, 5, 6)
    model(x)
    optimizer = lib.optimizer(model, strict=True)
    backward(model, x)()
    optimizer.step()
    assert {row.kind for row in optimizer.report()} == {"kfac"}


# -- the size of the output -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_transposed_module_called_with_an_output_size(lib, axes, bias):
    module = conv(TRANSPOSED[axes], stride=3, output_padding=1)
    x = images(axes)
    small = [(n - 1) * 3 + 3 for n in SPATIAL[axes]]

    def twice():
        for more in (0, 2):  # the module's own would be 1
            outputs = module(x, output_size=[n + more for n in small])
            loss_of(outputs).backward()

    assert max(lib.rebuilt(module, twice, bias=bias).values()) < 1e-10


def test_the_forward_fisher_sees_the_output_size_too(lib):
    module = conv(nn.ConvTranspose2d, stride=2)
    other = conv(nn.ConvTranspose2d, stride=2, output_padding=1)
    x, found = images(), []
    for m, options in ((module, {"output_size": (16, 18)}), (other, {}), (conv(nn.ConvTranspose2d, stride=2), {})):
        optimizer = lib.optimizer(m, method=kf.KFAC(fisher="forward"))
        backward(m, x, **options)()
        found.append((optimizer.engine._statistics[""].input_sum, optimizer.engine._terms))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] == 3 * 16 * 18
    assert not torch.allclose(found[0][0], found[2][0])


# -- terms of the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["pixels", "numbers"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_term_is_a_pixel_where_the_output_layer_is_a_convolution(lib, reduction, loss):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 3, 3, padding=1, **DOUBLE)
    x, y = images(), torch.randint(3, (3, *SPATIAL[2]))
    optimizer = Optimizer(module, kf.KFAC(), lr=0.0, loss=kf.MSE() if loss == "numbers" else None, loss_reduction=reduction)
    f = module(x)
    if loss == "pixels":
        F.cross_entropy(f, y, reduction=reduction).backward()
        g, terms = f.softmax(1) - F.one_hot(y, 3).movedim(-1, 1), y.numel()
    else:
        F.mse_loss(f, torch.zeros_like(f), reduction=reduction).backward()
        g, terms = 2 * f, f.numel()
    optimizer.step()
    rows = g.detach().movedim(1, -1).reshape(-1, 3)
    assert lib.gap(lib.factors(optimizer, "")[1], (rows.T @ rows / terms).numpy()) < 1e-12


def test_a_summed_loss_is_divided_by_its_pixels_between_statistics(lib):
    def run(reduction):
        torch.manual_seed(0)
        module = nn.Conv2d(4, 3, 3, padding=1, **DOUBLE)
        optimizer = lib.optimizer(module, method=kf.KFAC(damping=0.1, stats_every=3, refresh_every=3), loss_reduction=reduction)
        for step in range(5):
            torch.manual_seed(step)
            x, y = images(), torch.randint(3, (3, *SPATIAL[2]))
            optimizer.zero_grad()
            F.cross_entropy(module(x), y, reduction=reduction).backward()
            optimizer.step()
        return lib.weights(module)

    assert lib.gap(run("mean"), run("sum")) < 1e-11


# -- exactness --------------------------------------------------------------------------------------------------------


def exact(model, x, **options):
    optimizer = Optimizer(model, kf.KFAC(fisher="exact"), lr=0.0, loss=kf.MSE(), **options)
    f = model(x)
    optimizer.backward_fisher(f)
    F.mse_loss(f, torch.zeros_like(f)).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["plain", "transposed"])
def test_a_convolution_before_the_loss_has_the_blocks_of_the_ggn_matrix(lib, kind, groups):
    model = conv(nn.ConvTranspose2d if kind == "transposed" else nn.Conv2d, stride=2, padding=1, groups=groups)
    x = images(n=2)
    found = lib.dense(exact(model, x))[""]
    with torch.no_grad():
        terms = model(x).numel()
    expected = lib.blocks_of_ggn(model, lambda: model(x), terms)[""]
    size = found.shape[-1]
    for i in range(groups):
        block = expected[i * size : (i + 1) * size, i * size : (i + 1) * size]
        mine = found[i] if groups > 1 else found
        assert lib.gap(mine, block) < 1e-11
        assert lib.gap(1.01 * mine, block) > 5e-3


def test_reduce_is_exact_where_a_linear_net_pools_its_positions(lib):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, **DOUBLE)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=False, **DOUBLE))
    x = torch.randn(6, 2, 5, 6, **DOUBLE)
    expected = lib.blocks_of_ggn(model, lambda: model(x), 6 * 3)["0"]
    assert lib.gap(lib.dense(exact(model, x, sharing="reduce"))["0"], expected) < 1e-11
    assert lib.gap(lib.dense(exact(model, x, sharing="expand"))["0"], expected) > 1e-2


@pytest.mark.parametrize("fisher", ["empirical", "exact", "forward"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_batch_given_twice_has_the_same_factors(lib, sharing, fisher):
    def factors(times):
        net = Net(plain)
        optimizer = Optimizer(net, kf.KFAC(fisher=fisher), lr=0.0, loss=kf.CrossEntropy(), sharing=sharing)
        x, y = pictures(0)
        f = net(x.repeat(times, 1, 1, 1))
        if fisher == "exact":
            optimizer.backward_fisher(f)
        F.cross_entropy(f, y.repeat(times)).backward()
        optimizer.step()
        return [side for name in ("a", "b", "head") for side in lib.factors(optimizer, name) if side is not None]

    for one, two in zip(factors(1), factors(2), strict=True):
        assert lib.gap(one, two) < 1e-12


def test_a_batch_given_twice_makes_the_same_steps(lib):
    one, two = Net(plain), Net(plain)
    assert lib.gap(train(one, lib.optimizer(one)), train(two, lib.optimizer(two), times=2)) < 1e-11


# -- precision, files, whole networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_half_precision_has_factors_in_single(lib, how):
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    net = Net(plain).to(dtype)
    optimizer = lib.optimizer(net)
    for step in range(3):
        x, y = pictures(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            f = net(x.to(dtype))
        F.cross_entropy(f.float(), y).backward()
        optimizer.step()
    arrays = optimizer.state_dict()["kfcore"]["arrays"]
    assert {a.dtype for a in arrays.values()} == {torch.float32, torch.int32}
    double = Net(plain)
    train(double, lib.optimizer(double), 3)
    start = lib.weights(Net(plain))
    assert lib.gap(lib.weights(net) - start, lib.weights(double) - start) < 0.1


def test_a_scaler_gives_the_weights_of_a_run_without(lib):
    def run(scale):
        net = Net(plain)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=bool(scale))
        optimizer = lib.optimizer(net, grad_scaler=scaler)
        for step in range(3):
            x, y = pictures(step)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(net(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return lib.weights(net)

    assert lib.gap(run(None), run(512.0)) < 1e-12


def test_a_preconditioner_covers_convolutions(lib):
    net, other = Net(plain), Net(plain)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    preconditioner = Preconditioner(net, kf.KFAC(damping=0.1, refresh_every=2))
    for step in range(4):
        x, y = pictures(step)
        sgd.zero_grad()
        F.cross_entropy(net(x), y).backward()
        preconditioner.step()
        sgd.step()
    assert lib.gap(lib.weights(net), train(other, lib.optimizer(other))) < 1e-12


@pytest.mark.parametrize("how", ["state_dict", "file"])
def test_a_resumed_run_takes_the_same_next_steps(lib, how, tmp_path):
    net = Net(plain, more=nn.ConvTranspose2d(4, 4, 2, groups=2, **DOUBLE))
    net.way = lambda net, x: torch.tanh(net.more(plain(net, x)))
    optimizer = lib.optimizer(net)
    train(net, optimizer, 3)
    other, resumed = lib.resumed(net, optimizer, how, tmp_path)
    assert (train(net, optimizer) == train(other, resumed)).all()


class Residual(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.down = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))) + self.down(x), inplace=True)


def resnet():
    torch.manual_seed(0)
    stem = [nn.Conv2d(2, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, Residual(8, 8, 1), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).double()


def test_a_residual_network_is_covered_but_for_its_norms(lib):
    model = resnet()
    optimizer = lib.optimizer(model)
    report = optimizer.report()
    assert all("BatchNorm2d" in row.reason for row in report.fallbacks())
    assert len(report.fallbacks()) == 2 * 7
    assert {row.parameter for row in report if row.kind == "kfac"} == {n for n, p in model.named_parameters() if p.ndim > 1} | {"7.bias"}
    assert report["3.conv1.weight"].reason == "Conv"
    assert report["3.conv1.weight"].factors == (8, 72)
    start, end = F.cross_entropy(model(pictures(0)[0]), pictures(0)[1]).item(), 0.0
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pictures(0)[0]), pictures(0)[1])
        loss.backward()
        optimizer.step()
        end = loss.item()
    assert end < 0.2 * start
    with pytest.raises(ValueError, match=r"1\.weight .*BatchNorm2d"):
        lib.optimizer(model, strict=True)


def test_rows_rebuild_the_gradients_of_a_residual_network(lib):
    model = resnet()
    found = lib.rebuilt(model, lambda: F.cross_entropy(model(pictures(0)[0]), pictures(0)[1]).backward())
    assert len(found) == 8
    assert max(found.values()) < 1e-10
