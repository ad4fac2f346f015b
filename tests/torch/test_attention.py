"""The four products inside of attention modules are captured exactly, whatever way the module goes through them."""

import copy
import io

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer

nn, F = torch.nn, torch.nn.functional
DOUBLE = {"dtype": torch.float64}
E, N, L, S = 8, 3, 5, 4
INPUTS = {
    "self": lambda: (torch.randn(N, L, E, **DOUBLE),) * 3,
    "cross": lambda: (torch.randn(N, L, E, **DOUBLE), *(torch.randn(N, S, E, **DOUBLE),) * 2),
    "three": lambda: (torch.randn(N, L, E, **DOUBLE), torch.randn(N, S, E, **DOUBLE), torch.randn(N, S, E, **DOUBLE)),
    "query is key": lambda: (*(torch.randn(N, L, E, **DOUBLE),) * 2, torch.randn(N, L, E, **DOUBLE)),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, 2, **(DOUBLE | options))
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module


def backward(module, inputs, call=None, **options):
    """A backward pass of a function of everything that comes out."""
    first = options.pop("first", module.batch_first)
    if not first:
        same = {id(x): x.transpose(0, 1) for x in inputs}
        inputs = [same[id(x)] for x in inputs]
    outputs, weights = (module if call is None else call)(*inputs, **options)
    loss = (outputs * torch.linspace(0.5, 1.5, outputs.numel(), **DOUBLE).reshape(outputs.shape)).square().sum()
    if weights is not None:
        loss = loss + (weights**3).sum()
    loss.backward()


@pytest.mark.parametrize("bias", ["joint", "separate", None])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("inputs", INPUTS)
def test_rows_rebuild_the_gradients(lib, inputs, batch_first, need_weights, bias):
    module = attention(batch_first=batch_first, bias=bias is not None)
    found = lib.rebuilt(module, lambda: backward(module, INPUTS[inputs](), need_weights=need_weights), bias=bias or "joint")
    assert sorted({name.removesuffix(".weight").removesuffix(".bias") for name in found}) == sorted(PROJECTIONS)
    assert max(found.values()) < 1e-10


SETUPS = {
    "widths": ({"kdim": 3, "vdim": 6}, {}),
    "key width": ({"kdim": 3}, {}),
    "bias_kv": ({"add_bias_kv": True}, {}),
    "zero": ({"add_zero_attn": True}, {}),
    "causal": ({}, {"attn_mask": torch.triu(torch.ones(L, L, dtype=torch.bool), 1), "is_causal": True}),
    "mask": ({}, {"attn_mask": torch.randn(L, L, **DOUBLE)}),
    "mask a head": ({}, {"attn_mask": torch.randn(2 * N, L, L, **DOUBLE)}),
    "padding": ({}, {"key_padding_mask": torch.arange(L) >= torch.tensor([[L], [2], [3]])}),
    "weights a head": ({}, {"average_attn_weights": False}),
    "dropout": ({"dropout": 0.3}, {}),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("setup", SETUPS)
def test_rows_rebuild_the_gradients_in_every_setup(lib, setup, batch_first, need_weights):
    how, options = SETUPS[setup]
    module = attention(batch_first=batch_first, **how)
    x = torch.randn(N, L, E, **DOUBLE)
    inputs = (x, x, x)
    if "kdim" in how:
        inputs = (x, torch.randn(N, S, how["kdim"], **DOUBLE), torch.randn(N, S, how.get("vdim", E), **DOUBLE))
    found = lib.rebuilt(module, lambda: backward(module, inputs, need_weights=need_weights, **options))
    assert sorted(found) == sorted(PROJECTIONS)
    assert max(found.values()) < 1e-10


def test_a_gradient_that_is_off_by_a_hundredth_is_seen(lib):
    module = attention()

    def wrong():
        backward(module, INPUTS["cross"]())
        module.in_proj_weight.grad[E : 2 * E] *= 1.01

    found = lib.rebuilt(module, wrong)
    assert found["k_proj"] > 5e-3
    assert max(found[name] for name in ("q_proj", "v_proj", "out_proj")) < 1e-10


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_example_without_a_batch_axis_is_a_batch_of_one(lib, batch_first, mode):
    module = getattr(attention(batch_first=batch_first), mode)()
    x = torch.randn(L, E, **DOUBLE)
    shapes = []
    optimizer = Optimizer(module, kf.KFAC(), lr=0.0)
    reduce = optimizer.engine.core.reduce
    optimizer.engine.core.reduce = lambda s, n, a, g, **more: (shapes.append((n, *a.shape)), reduce(s, n, a, g, **more))[1]
    backward(module, (x, x, x), first=True)
    assert sorted(shapes) == sorted((name, 1, L, E) for name in PROJECTIONS)
    optimizer.remove_hooks()
    module.zero_grad()
    found = lib.rebuilt(module, lambda: backward(module, (x, x, x), first=True))
    assert max(found.values()) < 1e-10


@pytest.mark.parametrize("batch_first", [True, False])
def test_examples_come_before_positions(lib, batch_first):
    module = attention(batch_first=batch_first)
    optimizer, inputs, found = lib.optimizer(module), INPUTS["cross"](), {}
    reduce = optimizer.engine.core.reduce
    optimizer.engine.core.reduce = lambda s, n, a, g, **more: (found.update({n: (a, g)}), reduce(s, n, a, g, **more))[1]
    backward(module, inputs)
    for name, x in zip(PROJECTIONS[:3], inputs, strict=True):
        assert torch.equal(found[name][0], x)
        assert found[name][1].shape == (*x.shape[:2], E)
    assert found["out_proj"][0].shape == found["out_proj"][1].shape == (N, L, E)
    with torch.no_grad():  # the first example alone makes the first row
        q, k, v = (x[:1] if batch_first else x[:1].transpose(0, 1) for x in inputs)
        out = module(q, k, v)[0].reshape(L, E)
    assert lib.gap(found["out_proj"][0][0] @ module.out_proj.weight.detach().mT + module.out_proj.bias.detach(), out) < 1e-12


def in_a_checkpoint(module, reentrant):
    def call(*inputs, **options):
        # the input has a gradient, as in the middle of a network, which the reentrant kind needs
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        return torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=reentrant, **options)

    return call


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(lib, reentrant):
    module = attention()
    found = lib.rebuilt(module, lambda: backward(module, INPUTS["three"](), in_a_checkpoint(module, reentrant)))
    assert max(found.values()) < 1e-10
    assert torch.overrides._get_current_function_mode_stack() == []


def test_two_calls_are_uses_of_one_layer(lib):
    module = attention()

    def twice():
        backward(module, INPUTS["self"]())
        backward(module, INPUTS["cross"]())

    assert max(lib.rebuilt(module, twice).values()) < 1e-10


def test_modules_with_one_set_of_weights_are_one_layer(lib):
    model = nn.ModuleList([attention(), attention()])
    for name in ("in_proj_weight", "in_proj_bias", "out_proj"):
        setattr(model[1], name, getattr(model[0], name))

    def both():
        backward(model[0], INPUTS["self"]())
        backward(model[1], INPUTS["cross"]())

    found = lib.rebuilt(model, both)
    assert sorted(found) == sorted(f"0.{name}" for name in PROJECTIONS)
    assert max(found.values()) < 1e-10


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
def test_frozen_parameters_leave_the_rest(lib, frozen):
    module = attention()
    module.get_parameter(frozen).requires_grad_(False)
    found = lib.rebuilt(module, lambda: backward(module, INPUTS["cross"]()))
    left = {"in_proj_weight": ["out_proj"], "out_proj.weight": PROJECTIONS[:3]}.get(frozen, PROJECTIONS)
    assert sorted(found) == sorted(left)
    assert max(found.values()) < 1e-10
    report = lib.optimizer(module).report()
    assert report[frozen].kind == "none"
    if frozen == "in_proj_weight":
        assert "weight is not a trained parameter" in report["in_proj_bias"].reason
    if frozen == "in_proj_bias":
        assert "bias is not trained" in report["q_proj.weight"].reason


def test_a_failed_call_leaves_nothing_behind(lib):
    module = attention()
    optimizer = lib.optimizer(module)
    with pytest.raises((AssertionError, RuntimeError)):
        module(torch.randn(L, N, E, **DOUBLE), torch.randn(L, N, E - 1, **DOUBLE), torch.randn(L, N, E - 1, **DOUBLE))
    assert torch.overrides._get_current_function_mode_stack() == []
    backward(module, INPUTS["self"]())
    optimizer.step()
    assert optimizer.diagnostics()["dropped_statistics"] == {}
    assert {row.kind for row in optimizer.report()} == {"kfac"}


def test_other_modes_and_a_second_optimizer_do_not_hide_it(lib):
    module = attention()
    first = Optimizer(module, kf.KFAC(damping=0.1), [module.in_proj_weight, module.in_proj_bias])
    second = Optimizer(module, kf.KFAC(damping=0.1), [*module.out_proj.parameters()])
    with torch.device("cpu"):
        backward(module, INPUTS["self"]())
    assert sorted(first.engine._statistics) == sorted(PROJECTIONS[:3])
    assert sorted(second.engine._statistics) == ["out_proj"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compilation_changes_nothing(lib, backend):
    def run(compiled):
        torch._dynamo.reset()
        module = attention(batch_first=True)
        optimizer = lib.optimizer(module, method=kf.KFAC(damping=0.1, stats_every=2, refresh_every=2))
        call = torch.compile(module, backend=backend) if compiled else module
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad()
            backward(module, INPUTS["self" if step < 2 else "cross"](), call)
            optimizer.step()
        assert {row.kind for row in optimizer.report()} == {"kfac"}
        assert torch.overrides._get_current_function_mode_stack() == []
        return lib.weights(module)

    assert lib.gap(run(True), run(False)) < 1e-12
    torch._dynamo.reset()


def test_nothing_is_watched_where_nothing_is_wanted(lib):
    module = attention()
    Optimizer(module, kf.KFAC(damping=0.1))
    seen = []

    def stack(*args):
        seen.append(len(torch.overrides._get_current_function_mode_stack()))

    module.register_forward_hook(stack)
    with torch.no_grad():
        backward_free = module(*INPUTS["self"]())
    assert backward_free[0].grad_fn is None
    module.eval()
    with torch.inference_mode():
        module(*INPUTS["self"]())
    assert seen == [0, 0]


def test_watching_changes_no_number(lib):
    plain, watched = attention(dropout=0.2), attention(dropout=0.2)
    inputs = INPUTS["self"]()
    optimizer = lib.optimizer(watched)
    for module in (plain, watched):
        torch.manual_seed(5)
        backward(module, inputs)
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    optimizer.remove_hooks()
    assert not watched._forward_hooks
    assert not watched._forward_pre_hooks


class Functional(nn.Module):
    """Uses the weights of an attention module without calling it."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = attention(), nn.Linear(E, 3, **DOUBLE)

    def forward(self, x):
        a = self.attention
        args = (x, x, x, E, 2, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0, a.out_proj.weight, a.out_proj.bias)
        return self.head(F.multi_head_attention_forward(*args)[0])


@pytest.mark.filterwarnings("ignore:layer 'attention")
def test_weights_used_without_a_call_fall_back_with_a_warning(lib):
    model = Functional()
    optimizer, before = lib.optimizer(model), model.attention.in_proj_weight.detach().clone()
    model(torch.randn(L, N, E, **DOUBLE)).square().mean().backward()
    with pytest.warns(UserWarning, match="'attention.q_proj' has no statistics in this step: its weight is used, but"):
        optimizer.step()
    kinds = {row.parameter: row.kind for row in optimizer.report()}
    assert kinds["attention.q_proj.weight"] == kinds["attention.out_proj.bias"] == "diagonal"
    assert "was not called" in optimizer.report()["attention.v_proj.weight"].reason
    assert kinds["head.weight"] == "kfac"
    assert not torch.equal(before, model.attention.in_proj_weight)


def test_an_interrupted_call_does_not_spoil_the_next(lib):
    module = attention(batch_first=True)

    def interrupt(*args):
        raise KeyboardInterrupt

    def backwards():
        handle = module.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            module(*INPUTS["self"]())
        handle.remove()
        backward(module, [x[:2] for x in INPUTS["three"]()])

    assert max(lib.rebuilt(module, backwards).values()) < 1e-10
    assert torch.overrides._get_current_function_mode_stack() == []


def test_copies_are_not_watched(lib):
    module = attention()
    optimizer = lib.optimizer(module)
    backward(copy.deepcopy(module), INPUTS["self"]())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    backward(torch.load(buffer, weights_only=False), INPUTS["self"]())
    assert not optimizer.engine._statistics


def test_key_and_value_biases_and_subclasses_say_why_they_fall_back(lib):
    class Own(nn.MultiheadAttention):
        pass

    report = lib.optimizer(nn.Sequential(attention(add_bias_kv=True))).report()
    assert [row.parameter for row in report.fallbacks()] == ["0.bias_k", "0.bias_v"]
    assert "MultiheadAttention 0.bias_k" in report["0.bias_k"].reason
    model = nn.Sequential(Own(E, 2))
    reasons = {row.parameter: row.reason for row in lib.optimizer(model).report()}
    assert "not a supported layer" in reasons["0.in_proj_weight"]
    assert all(row.kind == "diagonal" for row in lib.optimizer(model).report())


# -- exactness ---------------------------------------------------------------------------------------------------------


class One(nn.Module):
    """Attention over one position and a zero: with one example every product has one row."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, q, k, v):
        return self.attention(q, k, v)[0]


def exact(model, inputs, terms):
    optimizer = Optimizer(model, kf.KFAC(fisher="exact"), lr=0.0, loss=kf.MSE())
    f = model(*inputs)
    optimizer.backward_fisher(f)
    F.mse_loss(f, torch.zeros_like(f)).backward()
    optimizer.step()
    found = optimizer.engine.core.preconditioner.dense(optimizer.engine.state.curvature)
    return {name: x.numpy() for name, x in found.items()}


@pytest.mark.parametrize("how", [{}, {"kdim": 3, "vdim": 6}], ids=["packed", "separate"])
def test_one_example_has_the_blocks_of_the_ggn_matrix(lib, how):
    model = One(attention(add_zero_attn=True, batch_first=True, **how))
    q, k, v = (torch.randn(1, 1, how.get(name, E), **DOUBLE) for name in ("", "kdim", "vdim"))
    found = exact(model, (q, k, v), E)
    expected = lib.blocks_of_ggn(model, lambda: model(q, k, v), E)
    for name in PROJECTIONS:
        block = expected[f"attention.{name}"]
        assert abs(block).max() > 1e-6
        assert lib.gap(found[f"attention.{name}"], block) < 1e-11
        assert lib.gap(1.01 * found[f"attention.{name}"], block) > 5e-3


def test_the_linear_way_of_the_values_has_the_blocks_of_the_ggn_matrix(lib):
    # with a single key the weights are 1: values and outputs are a deep linear net over the examples
    model = One(attention(batch_first=True, bias=False))
    inputs = [torch.randn(6, 1, E, **DOUBLE) for _ in range(3)]
    found = exact(model, inputs, 6 * E)
    expected = lib.blocks_of_ggn(model, lambda: model(*inputs), 6 * E)
    for name in ("attention.v_proj", "attention.out_proj"):
        assert lib.gap(found[name], expected[name]) < 1e-11
    assert abs(found["attention.q_proj"]).max() < 1e-20


# -- whole networks ----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A small vision transformer, or a causal language model where the loss keeps the positions."""

    def __init__(self, norm_first, pooled):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(E, 2, 16, 0.0, batch_first=True, norm_first=norm_first, **DOUBLE)
        self.embed, self.head, self.pooled = nn.Conv2d(1, E, 2, 2, **DOUBLE), nn.Linear(E, 3, **DOUBLE), pooled
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        h = self.embed(x).flatten(2).mT
        mask = None if self.pooled else nn.Transformer.generate_square_subsequent_mask(h.shape[1], **DOUBLE)
        h = self.body(h, mask=mask, is_causal=mask is not None)
        return self.head(h.mean(dim=1) if self.pooled else h)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_transformers_of_pytorch_are_covered(lib, pooled, norm_first):
    model = Classifier(norm_first, pooled)
    report = lib.optimizer(model).report()
    assert report.fallbacks() == []
    assert "rows 8:16 of body.layers.0.self_attn.in_proj_weight" in report["body.layers.0.self_attn.k_proj.weight"].reason
    x = torch.randn(4, 1, 6, 4, **DOUBLE)
    found = lib.rebuilt(model, lambda: model(x).square().mean().backward())
    assert len(found) == 2 + 2 * (4 + 2 + 2)
    assert max(found.values()) < 1e-10


def test_a_decoder_is_covered(lib):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, 2, 16, 0.0, batch_first=True, **DOUBLE)
    model = nn.TransformerDecoder(layer, 1)
    q, k = torch.randn(2, 3, E, **DOUBLE), torch.randn(2, 5, E, **DOUBLE)
    found = lib.rebuilt(model, lambda: model(q, k).square().mean().backward())
    assert len(found) == 2 * 4 + 2 + 3
    assert max(found.values()) < 1e-10


def train(model, steps, **options):
    optimizer = Optimizer(model, kf.KFAC(damping=0.1, refresh_every=2), **({"lr": 0.02} | options))
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(8, 1, 6, 4, **DOUBLE)
        y = (x.mean(dim=(1, 2, 3)) > 0).long()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return optimizer, losses


@pytest.mark.parametrize("how", [{}, {"group": True}, {"bias": "separate"}], ids=str)
def test_a_transformer_trains(how):
    _, losses = train(Classifier(True, True), 40, **how)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_a_state_comes_back_exactly(lib, tmp_path):
    model = Classifier(True, True)
    optimizer, _ = train(model, 3)
    optimizer.save(tmp_path / "state.safetensors")
    for load in (lambda o: o.load(tmp_path / "state.safetensors"), lambda o: o.load_state_dict(optimizer.state_dict())):
        other = Optimizer(copy.deepcopy(model), kf.KFAC(damping=0.1, refresh_every=2), lr=0.02)
        load(other)
        mine, theirs = optimizer.state_dict()["kfcore"]["arrays"], other.state_dict()["kfcore"]["arrays"]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(x, theirs[name]) for name, x in mine.items())
    assert any("self_attn.q_proj" in name for name in mine)


def test_groups_set_the_rate_of_rows(lib):
    module = attention()
    groups = [{"params": [module.in_proj_weight, module.in_proj_bias], "lr": 0.0}, {"params": module.out_proj.parameters()}]
    optimizer = Optimizer(module, kf.KFAC(damping=0.1), groups, lr=0.1)
    before = module.in_proj_weight.clone(), module.out_proj.weight.clone()
    backward(module, INPUTS["self"]())
    optimizer.step()
    assert torch.equal(before[0], module.in_proj_weight)
    assert not torch.equal(before[1], module.out_proj.weight)


@pytest.mark.parametrize("fisher", ["empirical", "exact", "forward"])
def test_a_batch_given_twice_has_the_same_factors(lib, fisher):
    def factors(times):
        model = Classifier(True, True)
        optimizer = Optimizer(model, kf.KFAC(fisher=fisher), lr=0.0, loss=kf.CrossEntropy())
        torch.manual_seed(1)
        x, y = torch.randn(4, 1, 6, 4, **DOUBLE).repeat(times, 1, 1, 1), torch.tensor([0, 1, 2, 0]).repeat(times)
        f = model(x)
        if fisher == "exact":
            optimizer.backward_fisher(f, y)
        F.cross_entropy(f, y).backward()
        optimizer.step()
        return {name: lib.factors(optimizer, name) for name in optimizer.engine.layout.model.layers}

    one, two = factors(1), factors(2)
    for name, sides in one.items():
        assert all(x is None or lib.gap(x, y) < 1e-10 for x, y in zip(sides, two[name], strict=True))


def test_autocast_and_half_precision_take_part():
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        module = nn.MultiheadAttention(E, 2, dtype=dtype)
        optimizer = Optimizer(module, kf.KFAC(damping=0.1))
        x = torch.randn(L, N, E, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = module(x, x, x)[0]
        out.float().square().mean().backward()
        assert set(optimizer.engine._statistics) == set(PROJECTIONS)
        optimizer.step()
        arrays = optimizer.state_dict()["kfcore"]["arrays"]
        assert {a.dtype for a in arrays.values()} <= {torch.float32, torch.int32}
        assert all(torch.isfinite(a).all() for a in arrays.values())
