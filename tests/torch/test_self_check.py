"""The self-check passes models that are captured rightly, finds those that are not, and leaves no trace."""

import numpy as np
import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer, self_check

nn, F = torch.nn, torch.nn.functional
DOUBLE = {"dtype": torch.float64}
V, T, E = 3, 3, 4


class Words(nn.Module):
    def __init__(self, first=True):
        super().__init__()
        self.first, self.embed = first, nn.Embedding(5, E, **DOUBLE)
        self.body = nn.TransformerEncoderLayer(E, 2, 5, 0.0, batch_first=first, **DOUBLE)
        self.norm, self.head = nn.RMSNorm(E, **DOUBLE), nn.Linear(E, V, **DOUBLE)

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(self.norm(self.body(h) if self.first else self.body(h.transpose(0, 1)).transpose(0, 1)))


class Loop(nn.Module):
    """A cell over time, with weights that two modules share."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(E, E, **DOUBLE), nn.Linear(E, E, **DOUBLE), nn.Linear(E, V, **DOUBLE)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        h = torch.zeros(len(x), E, **DOUBLE)
        for t in range(x.shape[1]):
            h = torch.tanh(self.a(x[:, t]) + self.b(h))
        return self.head(h)


def images():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, **DOUBLE),
        nn.GroupNorm(2, 4, **DOUBLE),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2, **DOUBLE),
        nn.Flatten(),
        nn.Linear(18, V, **DOUBLE),
    )


def dense():
    return nn.Sequential(nn.Linear(E, 5, **DOUBLE), nn.Tanh(), nn.LayerNorm(5, **DOUBLE), nn.Linear(5, V, bias=False, **DOUBLE))


MODELS = {
    "dense": (dense, lambda n: torch.randn(n, E, **DOUBLE)),
    "images": (images, lambda n: torch.randn(n, 2, 3, 4, **DOUBLE)),
    "words": (Words, lambda n: torch.randint(5, (n, T))),
    "words, positions first": (lambda: Words(False), lambda n: torch.randint(5, (n, T))),
    "loop": (Loop, lambda n: torch.randn(n, T, E, **DOUBLE)),
}
METHODS = {
    "kfac": (kf.KFAC(), {}),
    "reduce": (kf.KFAC(damping=kf.Damping(0.1, "exact")), {"sharing": "reduce", "bias": "separate", "norm": "full"}),
    "ekfac": (kf.EKFAC(), {"norm": "full"}),
    "ekfac of the gradient": (kf.EKFAC(scales="gradient"), {"bias": "separate"}),
}


def made(which, n=2):
    torch.manual_seed(0)
    build, data = MODELS[which]
    return build(), data(n)


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("which", MODELS)
def test_models_that_are_captured_rightly_pass(which, how, capsys):
    method, options = METHODS[how]
    model, x = made(which)
    found = self_check(model, (x, None), method=method, **options)
    assert found.left_out == {}
    assert not found.wrong()
    assert max(row.gradient for row in found) < 1e-12
    for row in found:
        if row.block.startswith("body.self_attn.k_proj.bias"):
            assert (row.note, row.exact) == ("its gradient vanishes", False)
            continue
        exact = row.kind.startswith(("Norm", "Bias")) and which != "loop"
        assert row.exact == (exact or (which == "loop" and row.block == "head.bias"))
        assert row.distance < 1e-10 if row.exact else row.distance > 1e-3
        assert row.kind.endswith(f", {method.name}")
    printed = capsys.readouterr().out
    assert all(row.block in printed for row in found)


@pytest.mark.parametrize(
    "method", [kf.KFAC(), kf.KFAC(damping=kf.Damping(0.1, "exact")), kf.EKFAC()], ids=["kfac", "exact damping", "ekfac"]
)
def test_one_example_at_one_position_is_exact(method):
    model, x = made("dense", 1)
    found = self_check(model, (x, None), method=method, norm="full", show=False)
    assert all(row.exact and row.distance < 1e-10 for row in found)
    model, x = made("loop", 1)
    found = self_check(model, (x, None), method=method, show=False)
    assert {row.block: row.exact for row in found} == {"a": False, "head": True}


def test_ekfac_is_closer_than_kfac():
    for which in MODELS:
        model, x = made(which, 3)
        rows = [self_check(model, (x, None), method=method, show=False) for method in (kf.KFAC(), kf.EKFAC())]
        pairs = [(a, b) for a, b in zip(*rows, strict=True) if not a.exact]
        assert pairs
        assert all(b.distance < a.distance + 1e-12 for a, b in pairs)
        assert any(b.distance < 0.99 * a.distance for a, b in pairs)


@pytest.mark.parametrize("which", ["dense", "words", "loop"])
def test_the_distance_is_that_of_the_blocks_of_the_ggn(lib, which):
    model, x = made(which)
    found = self_check(model, (x, None), loss=kf.MSE(), show=False)
    f = model(x)
    exact = lib.blocks_of_ggn(model, lambda: model(x), f.numel())
    optimizer = Optimizer(model, kf.KFAC(fisher="exact"), lr=0.0, loss=kf.MSE())
    f = model(x)
    optimizer.backward_fisher(f)
    f.square().mean().backward()
    optimizer.step()
    for name, block in lib.dense(optimizer).items():
        f, b = exact[name], block
        if found[name].kind.startswith("Norm"):
            f, b = np.diag(f), np.diag(b)
        assert found[name].distance == pytest.approx(np.linalg.norm(b - f) / np.linalg.norm(f), rel=1e-6, abs=1e-10)


# -- what is wrong is found --------------------------------------------------------------------------------------------


def scaled(model):
    plain = model.a.forward
    model.a.forward = lambda x: 2.0 * plain(x)


def functional(model):
    model.forward = lambda x: model.head(torch.tanh(F.linear(x, model.a.weight, model.a.bias)))


def also_functional(model):
    model.forward = lambda x: model.head(torch.tanh(model.a(x)) + 0.1 * F.linear(x, model.a.weight))


def partly_detached(model):
    plain = model.a.forward

    def forward(x):
        y = plain(x)
        return torch.cat([y[:, :2].detach(), y[:, 2:]], dim=1) + F.pad(F.linear(x, model.a.weight[:2]), (0, 2))

    model.a.forward = forward


def other_input(model):
    model.a.forward = lambda x: F.linear(x.roll(1, dims=1), model.a.weight, model.a.bias)


def mixed(model):
    """The second use has the examples in another order."""
    model.forward = lambda x: model.head(torch.tanh(model.a(x) + model.a(x.flip(0)).flip(0)))


def shared_rows(model):
    """Rows without examples, which every example looks at."""
    rows = torch.randn(5, E, **DOUBLE)
    model.forward = lambda x: model.head(torch.tanh(x + model.a(rows).mean(dim=0)))


CASES = {
    scaled: "a: gradients from what was captured are .* off autodiff's: its layer computes something else",
    functional: "a: it has a gradient, but no call of its layer was seen",
    also_functional: "a: gradients from what was captured are .* off autodiff's",
    partly_detached: "a: gradients from what was captured are .* off autodiff's",
    other_input: "a: gradients from what was captured are .* off autodiff's",
    mixed: "a: gradients of single examples are .* off autodiff's, though not their sum: examples are mixed",
    shared_rows: "a: the first axis of its input has 5 entries, which are not the 2 examples",
}


@pytest.mark.parametrize("wrong", CASES, ids=lambda f: f.__name__)
def test_what_is_wrong_is_found(wrong, capsys):
    torch.manual_seed(0)
    model = nn.Module()
    model.a, model.head, x = nn.Linear(E, E, **DOUBLE), nn.Linear(E, V, **DOUBLE), torch.randn(2, E, **DOUBLE)
    model.forward = lambda x: model.head(torch.tanh(model.a(x)))
    self_check(model, (x, None), show=False)
    wrong(model)
    with pytest.raises(AssertionError, match=f"^{CASES[wrong]}") as error:
        self_check(model, (x, None))
    assert "head:" not in str(error.value)
    assert str(error.value).partition(": ")[2] in capsys.readouterr().out, "the table is printed first"
    assert not model.a._forward_hooks


def test_a_weight_that_is_detached_is_found():
    model, x = made("dense")
    model[3].forward = lambda x: F.linear(x, model[3].weight.detach())
    with pytest.raises(AssertionError, match=r"^3: gradients from what was captured are"):
        self_check(model, (x, None), show=False)


def test_a_normalisation_that_computes_something_else_is_found():
    model, x = made("dense")
    model[2].forward = lambda x: F.layer_norm(x, (5,), model[2].weight, model[2].bias, eps=0.1)
    with pytest.raises(AssertionError, match=r"^2: gradients from what was captured are"):
        self_check(model, (x, None), show=False)


def test_a_block_that_is_not_what_it_must_be_is_found(monkeypatch):
    model, x = made("dense", 1)
    operator = kf.KFAC.operator
    monkeypatch.setattr(kf.KFAC, "operator", lambda *args, **more: operator(*args, **more).damped(1e-3))
    with pytest.raises(AssertionError, match=r"^0: its block is .* off where it must be exact"):
        self_check(model, (x, None), show=False)


def test_what_the_optimizer_moves_to_the_fallback_is_told_and_not_wrong():
    class Positions(Words):
        def __init__(self):
            super().__init__()
            self.places, self.scale = nn.Embedding(T, E, **DOUBLE), nn.Parameter(torch.ones(V, **DOUBLE))

        def forward(self, ids):
            return self.scale * self.head(self.norm(self.embed(ids) + self.places(torch.arange(T))))

    torch.manual_seed(0)
    found = self_check(Positions(), (torch.randint(5, (2, T)), None), show=False)
    assert found.left_out["scale"] == "a bare parameter"
    assert "the first axis of its input has 3 entries" in found.left_out["places"]
    assert found["body.linear1"].note == "unused"
    assert "places: no block" in str(found)


def test_flattened_examples_are_told_apart():
    model, x = made("loop")
    found = self_check(
        model, (x, None), forward=lambda model, x: model.head(model.a(x).flatten(0, 1)).unflatten(0, (len(x), T)), examples=2, show=False
    )
    assert found["head"].uses == "6 x 1"
    assert found["head"].gradient < 1e-12
    assert np.isnan(found["head"].distance)
    assert found["a"].distance > 0.0


# -- no trace ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(lib, fails):
    def build():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(E, 6, **DOUBLE), nn.BatchNorm1d(6, **DOUBLE), nn.Dropout(0.5), nn.Linear(6, V, **DOUBLE))
        net = nn.ModuleDict({"body": body, "attention": nn.MultiheadAttention(V, 1, **DOUBLE)})
        net.forward = lambda x: net["attention"](*[net["body"](x)[None]] * 3)[0][0]
        return net

    def run(checks):
        model = build()
        optimizer = lib.optimizer(model)
        x, y = lib.data(inp=E)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if checks:
                if fails:
                    plain, model["body"][0].forward = model["body"][0].forward, lambda x: 2.0 * F.linear(x, model["body"][0].weight)
                    with pytest.raises(AssertionError, match=r"body\.0"):
                        self_check(model, (x[:2], y[:2]), show=False)
                    model["body"][0].forward = plain
                else:
                    found = self_check(model, (x[:2], y[:2]), show=False)
                    assert found["body.0"].note == "examples depend on each other, through normalisations of the batch"
            optimizer.step()
        modes = [m.training for m in model.modules()]
        hooks = [len(m._forward_hooks) for m in model.modules()]
        state = [t.clone() for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), torch.get_rng_state())]
        return state, modes, hooks

    (a, *rest), (b, *other) = run(True), run(False)
    assert rest == other
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_what_an_optimizer_has_of_attention_alone_stays():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(V, 1, **DOUBLE)
    optimizer, x = Optimizer(model, kf.KFAC(damping=0.1)), torch.randn(4, 2, V, **DOUBLE)
    model(x, x, x)[0].square().sum().backward()
    before = dict(optimizer.engine._statistics)
    self_check(model, (x, None), forward=lambda model, x: model(x, x, x)[0].transpose(0, 1), show=False)
    assert optimizer.engine._statistics == before


def test_the_call_is_as_it_is_told(capsys):
    model, x = made("dense")
    batch = {"x": x, "unused": None}
    with pytest.raises(TypeError):
        self_check(model, (batch, None), show=False)
    found = self_check(model, (batch, None), forward=lambda model, batch: model(batch["x"]), params=list(model[3].parameters()), show=False)
    assert [row.block for row in found] == ["3"]
    assert capsys.readouterr().out == ""
    single = model.float()
    found = self_check(single, (x.float(), None), show=False)
    assert 0.0 < max(row.gradient for row in found) < 1e-4
    with pytest.raises(AssertionError, match="off autodiff"):
        self_check(single, (x.float(), None), tolerance=1e-9, show=False)
    with pytest.raises(ValueError, match=r"`outputs` must have the 2 examples of the layers on their first axis, got \(3, 2\)"):
        self_check(single, (x.float(), None), forward=lambda model, x: model(x).mT, show=False)
    with pytest.raises(ValueError, match="`targets` must be given"):
        self_check(single, (x.float(), None), loss=kf.CrossEntropy(ignore_index=0), show=False)
    self_check(single, (x.float(), torch.tensor([0, 1])), loss=kf.CrossEntropy(ignore_index=0), show=False)
