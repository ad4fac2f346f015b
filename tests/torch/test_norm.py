"""Scale and shift of every normalisation have the exact second moment of the gradients of single examples, where there are such."""

import copy

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer, Preconditioner
from kfcore_torch.views import hat

nn, F = torch.nn, torch.nn.functional
DOUBLE = {"dtype": torch.float64}
N, C = 5, 4


def evaluated(module):
    """With statistics of its own, fixed."""
    torch.manual_seed(3)
    module.running_mean.copy_(torch.randn(C))
    module.running_var.copy_(torch.rand(C) + 0.5)
    return module.eval()


# a module and the shape of its input
KINDS = {
    "layer": lambda: (nn.LayerNorm(C), (N, C)),
    "layer, tokens": lambda: (nn.LayerNorm(C), (N, 3, C)),
    "layer, two axes": lambda: (nn.LayerNorm((3, C)), (N, 2, 3, C)),
    "layer, no bias": lambda: (nn.LayerNorm(C, bias=False), (N, 3, C)),
    "rms": lambda: (nn.RMSNorm(C), (N, 3, C)),
    "rms, two axes": lambda: (nn.RMSNorm((3, C), eps=0.1), (N, 3, C)),
    "group": lambda: (nn.GroupNorm(2, C), (N, C, 3, 2)),
    "group, no positions": lambda: (nn.GroupNorm(2, C), (N, C)),
    "instance1": lambda: (nn.InstanceNorm1d(C, affine=True), (N, C, 3)),
    "instance2": lambda: (nn.InstanceNorm2d(C, affine=True), (N, C, 3, 2)),
    "instance3": lambda: (nn.InstanceNorm3d(C, affine=True), (N, C, 3, 2, 2)),
    "instance, tracked": lambda: (nn.InstanceNorm2d(C, affine=True, track_running_stats=True), (N, C, 3, 2)),
    "instance, fixed": lambda: (evaluated(nn.InstanceNorm2d(C, affine=True, track_running_stats=True)), (N, C, 3, 2)),
    "batch1": lambda: (evaluated(nn.BatchNorm1d(C)), (N, C)),
    "batch1, positions": lambda: (evaluated(nn.BatchNorm1d(C)), (N, C, 3)),
    "batch2": lambda: (evaluated(nn.BatchNorm2d(C)), (N, C, 3, 2)),
    "batch3": lambda: (evaluated(nn.BatchNorm3d(C)), (N, C, 3, 2, 2)),
    "sync": lambda: (evaluated(nn.SyncBatchNorm(C)), (N, C, 3, 2)),
}
UNBATCHED = ["layer", "layer, two axes", "rms, two axes", "instance1", "instance2", "instance3", "instance, tracked", "instance, fixed"]


class Net(nn.Module):
    """What comes before a normalisation, it, a curve, and a dense layer on everything."""

    def __init__(self, norm, width):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.norm, self.head = nn.Parameter(torch.ones(())), norm, nn.Linear(width, 3)
        for p in norm.parameters():
            nn.init.normal_(p)
        self.to(torch.float64)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(x * self.scale)).flatten(1))


def net(kind):
    norm, shape = KINDS[kind]()
    model = Net(norm, torch.Size(shape[1:]).numel())
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(1), **DOUBLE), torch.arange(N) % 3


def example_gradients(model, x, loss):
    """Gradients ``[N, scale and shift]`` of each example's own loss, by a loop."""
    parameters = list(model.norm.parameters())
    rows = []
    for n in range(len(x)):
        found = torch.autograd.grad(loss(model(x[n : n + 1]), n), parameters)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("block", ["diagonal", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_block_is_the_second_moment_of_the_gradients_of_examples(lib, kind, block):
    model, x, y = net(kind)
    rows = example_gradients(copy.deepcopy(model), x, lambda f, n: F.cross_entropy(f, y[n : n + 1]))
    optimizer = Optimizer(model, kf.KFAC(), lr=0.0, norm=block)
    assert {row.reason for row in optimizer.report() if row.parameter.startswith("norm")} == {f"Norm ({block})"}
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    expected = (rows.mT @ rows / N).numpy()
    found = lib.dense(optimizer)["norm"]
    if block == "diagonal":
        assert (found == found * torch.eye(len(found)).numpy()).all()
        found, expected = found.diagonal(), expected.diagonal()
    assert lib.gap(found, expected) < 1e-12
    assert lib.gap(1.01 * found, expected) > 5e-3


@pytest.mark.parametrize("kind", ["layer, tokens", "rms", "group", "batch2"])
def test_the_exact_fisher_has_the_blocks_of_the_ggn_matrix_for_any_batch(lib, kind):
    model, x, _ = net(kind)
    optimizer = Optimizer(model, kf.KFAC(fisher="exact"), lr=0.0, loss=kf.MSE(), norm="full")
    f = model(x)
    optimizer.backward_fisher(f)
    f.square().mean().backward()
    optimizer.step()
    assert lib.gap(lib.dense(optimizer)["norm"], lib.blocks_of_ggn(model, lambda: model(x), f.numel())["norm"]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_rows_rebuild_the_gradients(lib, kind):
    model, x, y = net(kind)
    found = lib.rebuilt(model, lambda: F.cross_entropy(model(x), y).backward())
    assert set(found) == {"norm", "head"}
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize("kind", UNBATCHED)
def test_an_example_without_a_batch_axis_is_a_batch_of_one(lib, kind):
    def block(squeeze):
        model, x, _ = net(kind)
        x = x[0, 0] if kind == "layer, two axes" else x[0]
        optimizer = Optimizer(model.norm, kf.KFAC(), lr=0.0, norm="full")
        model.norm(x if squeeze else x[None]).sin().sum().backward()
        optimizer.step(terms=1.0)
        return lib.dense(optimizer)[""]

    assert lib.gap(block(True), block(False)) < 1e-13


def test_a_frozen_shift_leaves_an_exact_block_of_the_scale(lib):
    model, x, y = net("layer, tokens")
    model.norm.bias.requires_grad_(False)
    rows = example_gradients(_without_shift(model), x, lambda f, n: F.cross_entropy(f, y[n : n + 1]))
    optimizer = Optimizer(model, kf.KFAC(), lr=0.0, norm="full")
    report = optimizer.report()
    assert report["norm.weight"].reason == "Norm (full); its bias is not trained"
    assert report["norm.weight"].factors == (C, 1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert lib.gap(lib.dense(optimizer)["norm"], (rows.mT @ rows / N).numpy()) < 1e-12


def _without_shift(model):
    model = copy.deepcopy(model)
    model.norm.parameters = lambda: [model.norm.weight]
    return model


def test_a_frozen_scale_says_why_the_shift_falls_back(lib):
    model, x, y = net("layer")
    model.norm.weight.requires_grad_(False)
    optimizer = lib.optimizer(model)
    assert optimizer.report()["norm.bias"].reason == "bias of a LayerNorm whose weight is not a trained parameter"
    lib.train(model, optimizer, [(x, y)])


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(C, elementwise_affine=False), nn.GroupNorm(2, C, affine=False), nn.BatchNorm1d(C, affine=False)]
)
def test_nothing_to_train_is_nothing_to_report(module):
    model = nn.Sequential(module, nn.Linear(C, 3))
    assert [row.parameter for row in Optimizer(model, kf.KFAC()).report()] == ["1.weight", "1.bias"]


def test_the_kind_of_block_is_checked(lib):
    for make in (Optimizer, Preconditioner):
        with pytest.raises(ValueError, match="`norm` must be 'diagonal' or 'full', got 'whole'"):
            make(lib.mlp(), kf.KFAC(), norm="whole")


def test_a_preconditioner_gives_the_directions_of_the_optimizer(lib):
    (model, x, y), (other, _, _) = net("layer, tokens"), net("layer, tokens")
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.1, momentum=0.0, norm="full")
    sgd, preconditioner = torch.optim.SGD(other.parameters(), lr=0.1), Preconditioner(other, kf.KFAC(damping=0.1), norm="full")
    for _ in range(3):
        lib.train(model, optimizer, [(x, y)])
        sgd.zero_grad()
        F.cross_entropy(other(x), y).backward()
        preconditioner.step()
        sgd.step()
    assert lib.gap(lib.weights(model), lib.weights(other)) < 1e-12


@pytest.mark.parametrize("block", ["diagonal", "full"])
def test_the_direction_is_that_of_the_dense_block(lib, block):
    model, x, y = net("layer, tokens")
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=1.0, momentum=0.0, norm=block)
    before = torch.cat([p.detach().clone() for p in model.norm.parameters()])
    F.cross_entropy(model(x), y).backward()
    grad = torch.cat([p.grad for p in model.norm.parameters()])
    optimizer.step()
    dense = torch.as_tensor(lib.dense(optimizer)["norm"])
    moved = before - torch.cat([p.detach() for p in model.norm.parameters()])
    assert lib.gap(moved, torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), **DOUBLE), grad)) < 1e-11


# -- modes and precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm, nn.GroupNorm])
def test_half_precision_is_normalised_in_single(lib, kind):
    def block(dtype):
        norm = kind(2, C) if kind is nn.GroupNorm else kind(C)
        torch.manual_seed(0)
        model = nn.Sequential(norm, nn.Flatten(), nn.Linear(3 * C, 3)).to(dtype)
        optimizer = Optimizer(model, kf.KFAC(), lr=0.0)
        x = 0.001 * torch.randn(N, C, 3, generator=torch.Generator().manual_seed(1))
        x = (x if kind is nn.GroupNorm else x.mT.contiguous()).bfloat16()
        F.cross_entropy(model(x.to(dtype)).float(), torch.arange(N) % 3).backward()
        optimizer.step()
        assert lib.gap(hat(norm, x, False), hat(norm, x.float(), False)) == 0.0
        return lib.dense(optimizer)["0"]

    assert block(torch.bfloat16).dtype == "float32"
    assert lib.gap(block(torch.bfloat16), block(torch.float32)) < 0.02


def test_autocast_changes_little(lib):
    def block(on):
        model, x, y = net("layer, tokens")
        model.float()
        optimizer = Optimizer(model, kf.KFAC(), lr=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = F.cross_entropy(model(x.float()).float(), y)
        loss.backward()
        optimizer.step()
        return lib.dense(optimizer)["norm"]

    assert lib.gap(block(True), block(False)) < 0.03


def test_an_in_place_activation_and_keyword_inputs_change_nothing(lib):
    def block(way):
        model, x, y = net("rms")
        model.forward = lambda x: model.head(way(model.norm, x * model.scale).flatten(1))
        optimizer = Optimizer(model, kf.KFAC(), lr=0.0)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return lib.dense(optimizer)["norm"]

    plain = block(lambda norm, x: torch.tanh(norm(x)))
    assert (block(lambda norm, x: torch.tanh_(norm(x=x))) == plain).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(lib, reentrant):
    def block(way):
        model, x, y = net("layer, tokens")
        model.forward = lambda x: model.head(way(lambda h: torch.tanh(model.norm(h)), x * model.scale).flatten(1))
        optimizer = Optimizer(model, kf.KFAC(), lr=0.0)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return lib.dense(optimizer)["norm"]

    checkpointed = block(lambda f, h: torch.utils.checkpoint.checkpoint(f, h, use_reentrant=reentrant))
    assert lib.gap(checkpointed, block(lambda f, h: f(h))) < 1e-13


def test_a_tracked_instance_norm_is_normalised_as_it_was_in_the_forward_pass(lib):
    def block(mode_after):
        model, x, y = net("instance, tracked")
        optimizer = Optimizer(model, kf.KFAC(), lr=0.0)
        loss = F.cross_entropy(model(x), y)
        model.train(mode_after)
        loss.backward()
        optimizer.step()
        return lib.dense(optimizer)["norm"]

    assert (block(True) == block(False)).all()


def test_a_normalisation_before_the_loss_counts_its_rows():
    for norm, shape, rows in (
        (nn.LayerNorm(C), (N, 3, C), 3 * N),
        (nn.GroupNorm(2, C), (N, C, 3), 3 * N),
        (nn.LayerNorm((3, C)), (N, 3, C), N),
    ):
        optimizer = Optimizer(nn.Sequential(norm), kf.KFAC(), lr=0.0)
        norm(torch.randn(shape)).square().mean().backward()
        assert optimizer.engine._terms == rows


# -- several places ----------------------------------------------------------------------------------------------------


def test_uses_add_up_and_two_kinds_may_share_a_scale(lib):
    def block(kinds):
        torch.manual_seed(0)
        first, last = (kind(C, **DOUBLE) for kind in kinds)
        last.weight = first.weight
        model = nn.Module()
        model.norms, model.head = nn.ModuleList([first, last]), nn.Linear(C, 3, **DOUBLE)
        model.forward = lambda x: model.head(torch.tanh(last(torch.tanh(first(x)))))
        return model

    x = torch.randn(N, C, **DOUBLE)
    model = block([nn.RMSNorm, lambda n, **how: nn.LayerNorm(n, bias=False, **how)])
    optimizer = Optimizer(model, kf.KFAC(), lr=0.0, norm="full", loss=kf.MSE())
    f = model(x)
    f.square().mean().backward()
    optimizer.step()
    # the second moment of the gradients of both uses, each an observation of its own
    expected = 0
    for use in range(2):
        rows = []
        for n in range(N):
            a, b = (model.norms[i].weight.detach().clone().requires_grad_() for i in range(2))
            h = torch.tanh(F.rms_norm(x[n : n + 1], (C,), a, model.norms[0].eps))
            out = model.head(torch.tanh(F.layer_norm(h, (C,), b, None, model.norms[1].eps)))
            rows.append(torch.autograd.grad(out.square().sum(), [a, b])[use])
        rows = torch.stack(rows)
        expected = expected + rows.mT @ rows / f.numel()
    assert lib.gap(lib.dense(optimizer)["norms.0"], expected.numpy()) < 1e-12


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformers_with_their_examples_second_have_the_blocks_of_those_with_them_first(lib, norm_first, bias):
    def blocks(batch_first):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(C, 2, 6, 0.0, batch_first=batch_first, norm_first=norm_first, **DOUBLE)
        model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(C, **DOUBLE), enable_nested_tensor=False)
        optimizer = Optimizer(model, kf.KFAC(), lr=0.0, norm="full", bias=bias)
        x = torch.randn(N, 3, C, generator=torch.Generator().manual_seed(1), **DOUBLE)
        weights = torch.linspace(-1, 1, C, **DOUBLE)
        out = model(x) if batch_first else model(x.transpose(0, 1)).transpose(0, 1)
        ((out * weights).sum(dim=2) ** 2).mean().backward()
        optimizer.step()
        assert optimizer.report().fallbacks() == []
        return lib.dense(optimizer)

    first, second = blocks(True), blocks(False)
    assert {name: lib.gap(first[name], second[name]) for name in first} == pytest.approx(dict.fromkeys(first, 0.0), abs=1e-11)


def test_one_example_of_a_transformer_without_a_batch_axis(lib):
    def blocks(axis):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(C, 2, 6, 0.0, batch_first=axis == 0, **DOUBLE)
        optimizer = Optimizer(model, kf.KFAC(), lr=0.0, norm="full")
        x = torch.randn(3, C, generator=torch.Generator().manual_seed(1), **DOUBLE)
        model(x if axis is None else x.unsqueeze(axis)).sin().sum().backward()
        optimizer.step(terms=1.0)
        return lib.dense(optimizer)

    alone, batch = blocks(None), blocks(0)
    assert all(lib.gap(alone[name], batch[name]) < 1e-12 for name in ("norm1", "norm2"))


def test_a_normalisation_of_a_flattened_batch_falls_back_with_a_warning(lib):
    torch.manual_seed(0)
    model = nn.Module()
    model.body, model.norm, model.head = nn.Linear(C, C, **DOUBLE), nn.LayerNorm(C, **DOUBLE), nn.Linear(C, 3, **DOUBLE)
    model.forward = lambda x: model.head(model.norm(model.body(x).reshape(-1, C)).reshape(x.shape))
    optimizer = lib.optimizer(model)
    reason = "the first axis of its input has 15 entries, and is not that of the 5 examples"
    with pytest.warns(UserWarning, match=f"layer 'norm' has no statistics in this step: {reason}"):
        lib.train(model, optimizer, [(torch.randn(N, 3, C, **DOUBLE), torch.randn(N, 3, 3, **DOUBLE))], F.mse_loss)
    assert optimizer.report()["norm.bias"].reason == f"bias of a LayerNorm without a layer: {reason}"


# -- training ----------------------------------------------------------------------------------------------------------


def run(lib, parts=1, scale=None, steps=4, **options):
    model, _, _ = net("layer, tokens")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=bool(scale))
    optimizer = lib.optimizer(model, grad_scaler=scaler, norm="full", **options)
    for k in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 3, C, generator=torch.Generator().manual_seed(k), **DOUBLE)
        for part in x.chunk(parts):
            y = (part.mean(dim=(1, 2)) > 0).long()
            scaler.scale(F.cross_entropy(model(part), y) / parts).backward()
        scaler.step(optimizer)
        scaler.update()
    return lib.weights(model)


def test_micro_batches_make_the_step_of_the_whole_batch(lib):
    assert lib.gap(run(lib, parts=4), run(lib)) < 1e-10


def test_a_scaler_gives_the_weights_of_a_run_without(lib):
    assert lib.gap(run(lib, scale=512.0), run(lib)) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compilation_changes_nothing(lib):
    def go(compiled):
        model, x, y = net("group")
        optimizer = lib.optimizer(model)
        return lib.train(torch.compile(model, backend="eager") if compiled else model, optimizer, [(x, y)] * 3)

    assert lib.gap(go(True), go(False)) < 1e-13
