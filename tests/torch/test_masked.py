"""Steps under a mask are those of the same sequences without padding, each of its own length."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kfcore as kf
from kfcore_torch import Optimizer, Preconditioner

nn, F = torch.nn, torch.nn.functional
DOUBLE = {"dtype": torch.float64}
V, T, E = 5, 4, 4
LENGTHS = torch.tensor([2, 4, 1, 3, 4, 2])
N = len(LENGTHS)
MASK = torch.arange(T) < LENGTHS[:, None]


class Words(nn.Module):
    """Words to the logits of words, at each position."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(V, E, **DOUBLE), nn.LayerNorm(E, **DOUBLE)
        self.a, self.head = nn.Linear(E, E, **DOUBLE), nn.Linear(E, V, bias=False, **DOUBLE)

    def forward(self, ids, mask):
        return self.head(torch.tanh(self.a(self.norm(self.embed(ids)))))


class Encoder(Words):
    """The same with attention to the words there are."""

    def __init__(self, first, norm_first):
        super().__init__()
        self.first = first
        self.body = nn.TransformerEncoderLayer(E, 2, 6, 0.0, batch_first=first, norm_first=norm_first, **DOUBLE)

    def forward(self, ids, mask):
        h = self.embed(ids)
        h = self.body(h if self.first else h.transpose(0, 1), src_key_padding_mask=~mask)
        return self.head(torch.tanh(self.a(self.norm(h if self.first else h.transpose(0, 1)))))


class Pooled(Words):
    """A mean over the words there are, and the logits of each example."""

    def forward(self, ids, mask):
        h = torch.tanh(self.a(self.norm(self.embed(ids)))) * mask[..., None]
        return self.head(h.sum(dim=1) / mask.sum(dim=1, keepdim=True))


class Grid(Words):
    """Positions on two axes."""

    def forward(self, ids, mask):
        return super().forward(ids.reshape(len(ids), -1, 1), mask).flatten(1, 2)


MODELS = {
    "words": Words,
    "grid": Grid,
    "encoder": lambda: Encoder(True, False),
    "encoder, positions first": lambda: Encoder(False, True),
    "pooled": Pooled,
}


def batch(step):
    generator = torch.Generator().manual_seed(step)
    ids, y = torch.randint(V, (N, T), generator=generator), torch.randint(V, (N, T), generator=generator)
    return ids, torch.where(MASK, y, -100)


def made(which, method=None, **options):
    torch.manual_seed(0)
    model = MODELS[which]()
    loss = kf.CrossEntropy(ignore_index=-100)
    return model, Optimizer(model, method or kf.KFAC(damping=0.1, refresh_every=2), **({"lr": 0.05, "loss": loss} | options))


def targets(model, y):
    return y[:, :1] if isinstance(model, Pooled) else y


def summed(f, y):
    return F.cross_entropy(f.reshape(-1, V), y.reshape(-1), reduction="sum", ignore_index=-100)


def fisher_pass(optimizer, f, y):
    if optimizer.engine.method.fisher == "exact":
        optimizer.backward_fisher(f, y if f.ndim == 3 else y[:, 0])


def step(model, optimizer, number, how, mask=MASK):
    """A step of one array under the mask (or ``"bare"`` without), or of one array a sequence, each of its own length."""
    ids, y = batch(number)
    terms = float((targets(model, y) >= 0).sum())
    optimizer.zero_grad()
    if how == "ragged":
        for n, length in enumerate(LENGTHS):
            if length:
                part = slice(n, n + 1), slice(0, length)
                f, wanted = model(ids[part], MASK[part]), targets(model, y[part])
                fisher_pass(optimizer, f, wanted)
                (summed(f, wanted) / terms).backward()
    else:
        with optimizer.masked(mask) if how == "masked" else torch.enable_grad():
            f = model(ids, MASK)
        fisher_pass(optimizer, f, targets(model, y))
        (summed(f, targets(model, y)) / terms).backward()
    return f


def blocks(lib, optimizer):
    """Dense blocks, and the running averages, by name."""
    found = dict(lib.dense(optimizer))
    for name, block in optimizer.engine.state.curvature.blocks.items():
        found |= {f"{name}, {i}": x.numpy() for i, x in enumerate(block.average.values) if x is not None}
    return found


def gaps(lib, some, other):
    """By name; what is no more than rounding errors of both (as is the bias of the keys of attention) is equal."""
    return {name: lib.gap(x, other[name]) for name, x in some.items() if max(abs(x).max(), abs(other[name]).max()) > 1e-24}


METHODS = {
    "expand": (kf.KFAC(damping=0.1, refresh_every=2), {}),
    "separate": (kf.KFAC(damping=0.1, refresh_every=2), {"bias": "separate", "norm": "full"}),
    "reduce": (kf.KFAC(damping=0.1, refresh_every=2), {"sharing": "reduce"}),
    "forward": (kf.KFAC(damping=0.1, fisher="forward"), {}),
    "ekfac": (kf.EKFAC(damping=0.1, refresh_every=2), {"bias": "separate"}),
    "ekfac of the gradient": (kf.EKFAC(damping=0.1, refresh_every=2, scales="gradient"), {}),
}


EXACT = {
    "exact": (kf.KFAC(damping=0.1, fisher="exact"), {}),
    "ekfac, exact": (kf.EKFAC(damping=0.1, refresh_every=2, fisher="exact"), {}),
}
# where the loss is of every position a ragged pass has as many vectors as positions, each of which brings the inputs once more
CASES = [(which, how) for which in MODELS for how in METHODS] + [("pooled", how) for how in EXACT]


@pytest.mark.parametrize(("which", "how"), CASES)
def test_steps_are_those_of_sequences_of_their_own_length(lib, which, how):
    method, options = (METHODS | EXACT)[how]
    runs = {}
    for kind in ("ragged", "masked", "bare"):
        model, optimizer = made(which, method, **options)
        assert optimizer.report().fallbacks() == []
        for number in range(4):
            step(model, optimizer, number, kind)
            # nothing tells the order of ragged passes that have no output gradients
            optimizer.step(terms=float(MASK.sum()) if method.fisher == "forward" else None)
            if number == 1:
                found = blocks(lib, optimizer)
        assert optimizer.diagnostics()["dropped_statistics"] == {}
        runs[kind] = found, lib.weights(model)
    assert max(gaps(lib, runs["masked"][0], runs["ragged"][0]).values()) < 1e-12
    assert lib.gap(runs["masked"][1], runs["ragged"][1]) < 1e-10
    assert max(gaps(lib, runs["bare"][0], runs["ragged"][0]).values()) > 1e-2, "the mask must matter"


def test_terms_are_counted_where_they_are_real(lib):
    for which, expected in (("words", float(MASK.sum())), ("encoder", float(MASK.sum())), ("pooled", float(N))):
        model, optimizer = made(which)
        step(model, optimizer, 0, "masked")
        assert optimizer.engine._terms == expected
        optimizer.zero_grad()
        step(model, optimizer, 0, "bare")
        assert optimizer.engine._terms == (N if which == "pooled" else N * T)
    model, optimizer = made("words", loss=kf.MSE())
    step(model, optimizer, 0, "masked")
    assert optimizer.engine._terms == V * float(MASK.sum())
    model, optimizer = made("words", kf.KFAC(fisher="forward"))
    step(model, optimizer, 0, "masked")
    assert optimizer.engine._terms == float(MASK.sum())


@pytest.mark.parametrize("which", ["words", "pooled"])
def test_a_summed_loss_makes_the_steps_of_the_mean_loss(lib, which):
    """Its terms are counted at every step, also where no statistics are due."""
    results = []
    for reduction in ("mean", "sum"):
        model, optimizer = made(which, kf.KFAC(damping=0.1, stats_every=2), loss_reduction=reduction, clip=1e-3)
        for number in range(4):
            ids, y = batch(number)
            optimizer.zero_grad()
            with optimizer.masked(MASK):
                f = model(ids, MASK)
            count = float((targets(model, y) >= 0).sum()) if reduction == "mean" else 1.0
            (summed(f, targets(model, y)) / count).backward()
            optimizer.step()
        results.append(lib.weights(model))
    assert lib.gap(*results) < 1e-11


def test_an_example_without_a_position_is_none(lib):
    """As those that fill up the last batch: under a mask of examples, or of their positions."""
    runs = []
    real = torch.arange(N) < 4
    for kind in ("masked", "short"):
        model, optimizer = made("words")
        ids, y = batch(0)
        optimizer.zero_grad()
        if kind == "masked":
            with optimizer.masked(real[:, None].expand(N, T)):
                f = model(ids, MASK)[:4]
        else:
            f = model(ids[:4], MASK)
        (summed(f, y[:4]) / 16).backward()
        optimizer.step()
        runs.append(blocks(lib, optimizer))
    assert max(gaps(lib, *runs).values()) < 1e-12


def test_output_factors_of_the_exact_fisher_are_those_of_the_positions_there_are(lib):
    found = []
    for kind in ("ragged", "masked", "bare"):
        model, optimizer = made("encoder", kf.KFAC(damping=0.1, fisher="exact"))
        step(model, optimizer, 0, kind)
        optimizer.step()
        found.append({name: x for name, x in blocks(lib, optimizer).items() if name.endswith(", 1")})
    assert max(gaps(lib, found[1], found[0]).values()) < 1e-12
    # without a mask too: the loss has no vectors at other positions, and attention none either
    assert max(gaps(lib, found[2], found[0]).values()) < 1e-12


# -- recurrent nets: a mask for each step in time -----------------------------------------------------------------------


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.hidden, self.head = nn.Linear(3, E, **DOUBLE), nn.Linear(E, E, bias=False, **DOUBLE), nn.Linear(E, V, **DOUBLE)

    def forward(self, x, mask, optimizer=None):
        h = torch.zeros(len(x), E, **DOUBLE)
        for t in range(x.shape[1]):
            with optimizer.masked(mask[:, t]) if optimizer else torch.enable_grad():
                h = torch.where(mask[:, t, None], torch.tanh(self.inp(x[:, t]) + self.hidden(h)), h)
        return self.head(h)


@pytest.mark.parametrize("method", [kf.KFAC(damping=0.1), kf.EKFAC(damping=0.1, refresh_every=2)], ids=["kfac", "ekfac"])
def test_a_loop_over_time_has_a_mask_at_each_step(lib, method):
    runs = {}
    for kind in ("ragged", "masked", "bare"):
        torch.manual_seed(0)
        model = Cells()
        optimizer = Optimizer(model, method, lr=0.05)
        for number in range(3):
            x = torch.randn(N, T, 3, generator=torch.Generator().manual_seed(number), **DOUBLE)
            y = batch(number)[1][:, 0]
            optimizer.zero_grad()
            if kind == "ragged":
                for n, length in enumerate(LENGTHS):
                    part = slice(n, n + 1), slice(0, length)
                    (summed(model(x[part], MASK[part]), y[n : n + 1]) / N).backward()
            else:
                (summed(model(x, MASK, optimizer if kind == "masked" else None), y) / N).backward()
            optimizer.step()
        runs[kind] = blocks(lib, optimizer), lib.weights(model)
    assert max(gaps(lib, runs["masked"][0], runs["ragged"][0]).values()) < 1e-11
    assert lib.gap(runs["masked"][1], runs["ragged"][1]) < 1e-10
    assert lib.gap(runs["bare"][1], runs["ragged"][1]) > 1e-4


# -- attention to another sequence -------------------------------------------------------------------------------------


class Cross(nn.Module):
    """Words that attend to those of another sequence."""

    def __init__(self, first):
        super().__init__()
        self.embed, self.first = nn.Embedding(V, E, **DOUBLE), first
        self.attend, self.head = nn.MultiheadAttention(E, 2, batch_first=first, **DOUBLE), nn.Linear(E, V, **DOUBLE)

    def forward(self, ids, others, padding, told):
        q, k = self.embed(ids), torch.sin(self.embed.weight.detach()[others])
        more = {"attn_mask": torch.zeros(2 * len(q), q.shape[1], k.shape[1], **DOUBLE)}
        more["attn_mask"] += torch.where(padding, -torch.inf, 0.0)[:, None].expand(-1, q.shape[1], -1).repeat_interleave(2, dim=0)
        if told == "boolean":
            more = {"key_padding_mask": padding}
        elif told == "number":
            more = {"key_padding_mask": torch.where(padding, -torch.inf, torch.zeros((), **DOUBLE))}
        if self.first:
            return self.head(self.attend(q, k, k, **more)[0])
        return self.head(self.attend(q.mT.permute(2, 0, 1), k.transpose(0, 1), k.transpose(0, 1), **more)[0].transpose(0, 1))


@pytest.mark.parametrize("told", ["boolean", "number", "nothing"])
@pytest.mark.parametrize("length", [3, T], ids=["another length", "the same length"])
@pytest.mark.parametrize("first", [True, False])
def test_keys_of_another_sequence_follow_what_attention_is_told_of_them(lib, first, length, told):
    """Told nothing, they are left alone where they are of another length, and taken for the words where not."""
    lengths = torch.tensor([1, 3, 2, 2, 1, 3])
    real = torch.arange(length) < lengths[:, None]
    runs = []
    for kind in ("ragged", "masked"):
        torch.manual_seed(0)
        model = Cross(first)
        optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.05)
        ids, y = batch(0)
        others = torch.randint(V, (N, length), generator=torch.Generator().manual_seed(7))
        optimizer.zero_grad()
        if kind == "ragged":
            for n in range(N):
                own, theirs = (slice(n, n + 1), slice(0, LENGTHS[n])), (slice(n, n + 1), slice(0, lengths[n]))
                (summed(model(ids[own], others[theirs], ~real[theirs], told), y[own]) / MASK.sum()).backward()
        else:
            with optimizer.masked(MASK):
                f = model(ids, others, ~real, told)
            (summed(f, y) / MASK.sum()).backward()
        optimizer.step()
        runs.append(blocks(lib, optimizer))
    found = gaps(lib, *runs)
    keys = {name: gap for name, gap in found.items() if "k_proj" in name or "v_proj" in name}
    assert max(gap for name, gap in found.items() if name not in keys) < 1e-12
    assert len(keys) == 6
    if told == "nothing":
        assert max(keys.values()) > 1e-2
        assert found["attend.v_proj, 1"] < 1e-12 or length == T, "gradients there are zero without a mask"
    else:
        assert max(keys.values()) < 1e-12


def test_keys_that_are_the_queries_follow_the_mask(lib):
    """Where an example is none, attention must be told of a key all the same, for it would divide by zero without."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, 2, batch_first=True, **DOUBLE)
    optimizer = Optimizer(module, kf.KFAC(damping=0.1), lr=0.05)
    x, padding = torch.randn(N, T, E, **DOUBLE), ~MASK
    none = MASK.clone()
    none[0] = False
    with optimizer.masked(none):
        out = module(x, x, x, key_padding_mask=padding)[0]
    out[none].square().sum().backward()
    optimizer.step()
    rows = x[none]
    for name in ("q_proj", "k_proj", "v_proj"):
        assert lib.gap(lib.factors(optimizer, name)[0][:-1, :-1], rows.mT @ rows / len(rows)) < 1e-12


# -- nesting, checkpoints, wrong calls ---------------------------------------------------------------------------------


def test_each_use_takes_the_innermost_mask_that_fits(lib):
    model = nn.ModuleDict({"a": nn.Linear(3, 2, **DOUBLE), "b": nn.Linear(3, 2, **DOUBLE)})
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.0)
    x, z = torch.randn(N, T, 3, **DOUBLE), torch.randn(N, 2, 3, **DOUBLE)
    other = torch.rand(N, 2) < 0.5
    with optimizer.masked(torch.zeros(N, T, dtype=torch.bool)), optimizer.masked(other), optimizer.masked(MASK):
        loss = model["a"](x).square().sum() + model["b"](z).square().sum()
    loss.backward()
    optimizer.step(terms=1.0)
    for name, array, mask in (("a", x, MASK), ("b", z, other)):
        rows = array[mask]
        assert lib.gap(lib.factors(optimizer, name)[0][:-1, :-1], rows.mT @ rows / len(rows)) < 1e-12


@pytest.mark.parametrize("method", [kf.KFAC(damping=0.1), kf.EKFAC(damping=0.1)], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("inside", [True, False], ids=["backward under the mask", "backward outside"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_masks_survive_checkpoints_or_the_layer_is_refused(lib, reentrant, inside, method):
    runs = []
    for kind in ("plain", "checkpoint"):
        model, optimizer = made("words", method)
        ids, y = batch(0)

        def body(h, model=model):
            return torch.tanh(model.a(model.norm(h)))

        with optimizer.masked(MASK):
            h = model.embed(ids)
            loss = summed(model.head(body(h) if kind == "plain" else checkpoint(body, h, use_reentrant=reentrant)), y) / MASK.sum()
            if inside:
                loss.backward()
        if not inside:
            optimizer.zero_grad()  # which forgets what came, not what was called
            loss.backward()
        if kind == "checkpoint" and reentrant and not inside:
            with pytest.warns(UserWarning, match=r"layer '(norm|a)' has no statistics.*no mask is known"):
                optimizer.step()
            assert {row.parameter.partition(".")[0] for row in optimizer.report().fallbacks()} == {"norm", "a"}
            return
        optimizer.step()
        runs.append(blocks(lib, optimizer))
    assert max(gaps(lib, *runs).values()) < 1e-12


def test_the_gradients_may_be_zeroed_between_the_passes(lib):
    runs = []
    for between in (False, True):
        model, optimizer = made("words", kf.EKFAC(damping=0.1))
        ids, y = batch(0)
        with optimizer.masked(MASK):
            f = model(ids, MASK)
        if between:
            optimizer.zero_grad()
        (summed(f, y) / MASK.sum()).backward()
        optimizer.step()
        runs.append(blocks(lib, optimizer))
    assert max(gaps(lib, *runs).values()) == 0.0


def test_a_preconditioner_takes_masks(lib):
    model, optimizer = made("words", momentum=0.0)
    torch.manual_seed(0)
    other = Words()
    preconditioner, sgd = Preconditioner(other, kf.KFAC(damping=0.1, refresh_every=2)), torch.optim.SGD(other.parameters(), lr=0.05)
    for number in range(3):
        step(model, optimizer, number, "masked")
        optimizer.step()
        ids, y = batch(number)
        sgd.zero_grad()
        with preconditioner.masked(MASK):
            (summed(other(ids, MASK), y) / MASK.sum()).backward()
        preconditioner.step()
        sgd.step()
    assert lib.gap(lib.weights(model), lib.weights(other)) < 1e-12


def test_calls_are_not_watched_without_a_mask(lib):
    model, optimizer = made("words")
    assert optimizer.engine.capture.called is None
    step(model, optimizer, 0, "masked")
    assert optimizer.engine.capture.called is not None, "a checkpoint may still run"
    optimizer.step()
    assert optimizer.engine.capture.called is None
    with pytest.raises(KeyError), optimizer.masked(MASK):
        raise KeyError
    assert optimizer.engine.capture.called is None
    with optimizer.masked(MASK):
        step(model, optimizer, 1, "bare")
        optimizer.step()
        assert optimizer.engine._masks.active
        assert optimizer.engine.capture.called is not None


def test_what_is_no_mask_is_refused(lib):
    _, optimizer = made("words")
    with pytest.raises(TypeError, match=r"`mask` must be a boolean tensor, True at real positions, got torch\.float32"):
        optimizer.masked(MASK.float())
    with pytest.raises(TypeError, match="`mask` must be a boolean tensor, True at real positions, got list"):
        optimizer.masked(MASK.tolist())
    with pytest.raises(ValueError, match=r"`mask` must have shape \[N, \.\.\.\], one entry for each position, got \(\)"):
        optimizer.masked(torch.tensor(True))


def test_a_mask_that_fits_nothing_is_refused_and_changes_nothing(lib):
    model, optimizer = made("words")
    before = lib.weights(model)
    step(model, optimizer, 0, "masked", MASK.mT)
    with pytest.raises(ValueError, match=r"`mask` of `masked` fits none of the layers.*which were \(6, 4\)"):
        optimizer.step()
    assert (lib.weights(model) == before).all()
    step(model, optimizer, 0, "masked")
    optimizer.step()
    conv = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1, **DOUBLE), nn.Flatten(), nn.Linear(3 * T, 1, **DOUBLE))
    optimizer = Optimizer(conv, kf.KFAC(damping=0.1))
    with optimizer.masked(MASK):
        conv(torch.randn(N, 2, T, **DOUBLE)).square().mean().backward()
    with pytest.raises(ValueError, match=r"`mask` of `masked` fits none"):
        optimizer.step()
