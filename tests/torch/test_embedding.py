"""Tables of which rows are taken: exact blocks without a one-hot matrix, and a fallback wherever a use is not by example."""

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer, Preconditioner

nn, F = torch.nn, torch.nn.functional
DOUBLE = {"dtype": torch.float64}
V, D = 7, 4


class Words(nn.Module):
    """A table, then ``after`` it."""

    def __init__(self, *after, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.after = nn.Embedding(V, D, **(DOUBLE | options)), nn.Sequential(*after)

    def forward(self, ids):
        return self.after(self.embed(ids))


def words(**options):
    torch.manual_seed(1)
    return Words(nn.Linear(D, 5, **DOUBLE), nn.Tanh(), nn.Linear(5, 3, **DOUBLE), **options)


def ids(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def step(model, optimizer, batch, loss=lambda f: f.square().mean()):
    optimizer.zero_grad()
    value = loss(model(batch))
    value.backward()
    optimizer.step()
    return value.item()


@pytest.mark.parametrize("padding", [None, 2], ids=["plain", "padding"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
def test_rows_rebuild_the_gradients(lib, kind, shape, padding):
    model, batch = words(padding_idx=padding), ids(*shape).to(kind)
    found = lib.rebuilt(model, lambda: model(batch).square().sum().backward())
    assert set(found) == {"embed", "after.0", "after.2"}
    assert max(found.values()) < 1e-12


def exact(model, batch):
    optimizer = Optimizer(model, kf.KFAC(fisher="exact"), lr=0.0, loss=kf.MSE())
    f = model(batch)
    optimizer.backward_fisher(f)
    f.square().mean().backward()
    optimizer.step()
    return optimizer, f.numel()


@pytest.mark.parametrize("padding", [None, 6], ids=["plain", "padding"])
def test_one_id_has_the_block_of_the_ggn_matrix(lib, padding):
    model, batch = words(padding_idx=padding), torch.tensor([3])
    optimizer, terms = exact(model, batch)
    block, found = lib.blocks_of_ggn(model, lambda: model(batch), terms)["embed"], lib.dense(optimizer)["embed"]
    assert abs(block).max() > 1e-3
    assert lib.gap(found, block) < 1e-12
    assert lib.gap(1.01 * found, block) > 5e-3


def test_a_linear_net_behind_the_table_has_the_block_of_the_ggn_matrix_for_any_batch(lib):
    model, batch = Words(nn.Linear(D, 3, **DOUBLE)), ids(5, 6)
    optimizer, terms = exact(model, batch)
    assert lib.gap(lib.dense(optimizer)["embed"], lib.blocks_of_ggn(model, lambda: model(batch), terms)["embed"]) < 1e-12


def by_hand(model, batch, padding):
    """Both factors, from one-hot rows and the gradients of the loss summed over its terms."""
    taken = model.embed(batch).detach().requires_grad_()
    f = model.after(taken)
    (g,) = torch.autograd.grad(f.square().sum(), taken)
    live = torch.ones_like(batch, dtype=torch.bool) if padding is None else batch != padding
    rows = F.one_hot(batch[live], V).double()
    g = g[live]
    return rows.T @ rows / len(rows), g.T @ g / f.numel()


@pytest.mark.parametrize("padding", [None, 2, -1], ids=["plain", "padding", "counted from the end"])
def test_both_factors_are_those_of_the_live_positions(lib, padding):
    model, batch = words(padding_idx=padding), torch.tensor([[1, 2, 2, 6], [2, 1, 0, 5], [4, 6, 6, 2]])
    optimizer = Optimizer(model, kf.KFAC(), lr=0.1, loss=kf.MSE())
    before = model.embed.weight.detach().clone()
    step(model, optimizer, batch)
    inputs, outputs = by_hand(words(padding_idx=padding), batch, model.embed.padding_idx)
    a, g = lib.factors(optimizer, "embed")
    assert a.shape == (V,), "one number a row of the table"
    assert lib.gap(a, inputs.diagonal()) < 1e-13
    assert lib.gap(g, outputs) < 1e-12
    still = (model.embed.weight == before).all(dim=1)
    if padding is not None:
        assert still[padding]
    assert not still[1]


def test_the_forward_fisher_counts_ids(lib):
    model, batch = words(), ids(3, 4)
    optimizer = Optimizer(model, kf.KFAC(fisher="forward"), lr=0.0)
    step(model, optimizer, batch)
    a, none = lib.factors(optimizer, "embed")
    assert none is None
    assert lib.gap(a, torch.bincount(batch.reshape(-1), minlength=V).double() / 12) < 1e-14


@pytest.mark.parametrize("fisher", ["empirical", "exact", "forward"])
def test_a_batch_given_twice_has_the_same_factors(lib, fisher):
    def blocks(batch):
        model = words(padding_idx=1)
        optimizer = Optimizer(model, kf.KFAC(fisher=fisher), lr=0.0, loss=kf.MSE())
        f = model(batch)
        if fisher == "exact":
            optimizer.backward_fisher(f)
        f.square().mean().backward()
        optimizer.step()
        return lib.dense(optimizer)["embed"]

    assert lib.gap(blocks(ids(3, 4)), blocks(ids(3, 4).repeat(2, 1))) < 1e-13


# -- training ----------------------------------------------------------------------------------------------------------


def run(lib, steps=4, parts=1, scale=None, model=None, optimizer=None, first=0, **options):
    model = words(padding_idx=2) if model is None else model
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=bool(scale))
    optimizer = optimizer or lib.optimizer(model, grad_scaler=scaler, **options)
    for k in range(first, first + steps):
        optimizer.zero_grad()
        for part in ids(8, 5, seed=k).chunk(parts):
            scaler.scale(F.cross_entropy(model(part).mT, part % 3) / parts).backward()
        scaler.step(optimizer)
        scaler.update()
    return lib.weights(model)


def test_micro_batches_make_the_step_of_the_whole_batch(lib):
    assert lib.gap(run(lib, parts=4), run(lib)) < 1e-10


def test_a_scaler_gives_the_weights_of_a_run_without(lib):
    assert lib.gap(run(lib, scale=512.0), run(lib)) < 1e-12


@pytest.mark.parametrize("damping", [kf.Damping(0.1), kf.Damping(0.1, "exact")], ids=lambda d: d.kind)
def test_stacked_blocks_make_the_same_steps(lib, damping):
    def go(group):
        model = nn.ModuleDict({"a": words(padding_idx=2), "b": words(padding_idx=3)})
        model.forward = lambda batch: model["a"](batch) + model["b"](batch)
        return run(lib, model=model, method=kf.KFAC(damping=damping, refresh_every=2), group=group)

    assert lib.gap(go(True), go(False)) < 1e-11


@pytest.mark.parametrize("how", ["state_dict", "file"])
def test_a_resumed_run_takes_the_same_next_steps(lib, how, tmp_path):
    model = words(padding_idx=2)
    optimizer = lib.optimizer(model)
    run(lib, 3, model=model, optimizer=optimizer)
    other, resumed = lib.resumed(model, optimizer, how, tmp_path)
    more = [run(lib, 3, model=m, optimizer=o, first=3) for m, o in ((model, optimizer), (other, resumed))]
    assert (more[0] == more[1]).all()


def test_a_preconditioner_gives_the_directions_of_the_optimizer(lib):
    model, other = words(), words()
    options = {"momentum": 0.0, "weight_decay": 0.0}
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.1, **options)
    sgd, preconditioner = torch.optim.SGD(other.parameters(), lr=0.1, **options), Preconditioner(other, kf.KFAC(damping=0.1))
    for k in range(3):
        step(model, optimizer, ids(4, 3, seed=k))
        sgd.zero_grad()
        other(ids(4, 3, seed=k)).square().mean().backward()
        preconditioner.step()
        sgd.step()
    assert lib.gap(lib.weights(model), lib.weights(other)) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(lib, reentrant):
    model = words(padding_idx=2)
    model.forward = lambda batch: model.after(
        torch.utils.checkpoint.checkpoint(lambda _, b: model.embed(b), torch.ones(1, requires_grad=True), batch, use_reentrant=reentrant)
    )
    assert lib.gap(run(lib, model=model), run(lib)) < 1e-13


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compilation_changes_nothing(lib):
    model = words(padding_idx=2)
    optimizer = lib.optimizer(model)
    compiled = torch.compile(model, backend="eager")
    assert lib.gap(run(lib, model=compiled, optimizer=optimizer), run(lib)) < 1e-13


def test_half_precision_has_factors_in_single(lib):
    model = words().bfloat16()
    optimizer = lib.optimizer(model)
    step(model, optimizer, ids(3, 4))
    a, g = lib.factors(optimizer, "embed")
    assert (a.dtype, g.dtype) == ("float32", "float32")
    assert lib.gap(a, torch.bincount(ids(3, 4).reshape(-1), minlength=V) / 12.0) < 1e-6


# -- one table in several places ---------------------------------------------------------------------------------------


def test_a_table_used_twice_sums_over_both_uses(lib):
    once, twice = words(), words()
    twice.forward = lambda pair: twice.after(torch.cat([twice.embed(pair[:, :2]), twice.embed(pair[:, 2:])], dim=1))
    tied = words()
    tied.other = nn.Embedding(V, D, **DOUBLE)
    tied.other.weight = tied.embed.weight
    tied.forward = lambda pair: tied.after(torch.cat([tied.embed(pair[:, :2]), tied.other(pair[:, 2:])], dim=1))
    weights = [run(lib, model=model) for model in (once, twice, tied)]
    assert lib.gap(weights[0], weights[1]) < 1e-12
    assert lib.gap(weights[0], weights[2]) < 1e-12


def test_a_table_tied_to_the_output_layer_falls_back_with_the_reason(lib):
    model = Words(nn.Linear(D, D, **DOUBLE), nn.Linear(D, V, **DOUBLE))
    model.after[1].weight = model.embed.weight
    optimizer = lib.optimizer(model)
    report = optimizer.report()
    assert report["embed.weight"].kind == report["after.1.bias"].kind == "diagonal"
    assert report["embed.weight"].reason == "weight shared by modules that do different things with it: Embedding and Linear"
    assert report["after.1.bias"].reason == f"bias of a Linear without a layer: {report['embed.weight'].reason}"
    losses = [step(model, optimizer, ids(8, 3), lambda f: F.cross_entropy(f.mT, ids(8, 3))) for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]


# -- what has no block -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_options_that_change_the_gradient_fall_back_with_the_reason(lib, option):
    ((name, value),) = option.items()
    report = lib.optimizer(words(**option)).report()
    assert report["embed.weight"].kind == "diagonal"
    assert f"{name}={value}" in report["embed.weight"].reason
    with pytest.raises(ValueError, match=f"embed.weight .*{name}"):
        lib.optimizer(words(**option), strict=True)


def test_tables_have_no_reduce(lib):
    optimizer = lib.optimizer(words(), sharing="reduce")
    layers = optimizer.engine.layout.model.layers
    assert (layers["embed"].sharing, layers["after.0"].sharing) == ("expand", "reduce")
    with pytest.raises(ValueError, match="`sharing` of Embedding must be 'expand'"):
        lib.optimizer(words(), sharing={"embed": "reduce"})


# -- positions ---------------------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """Tokens and positions; ``places(N, T)`` are the ids that the table of positions is called with."""

    def __init__(self, places):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(V, D, **DOUBLE), nn.Embedding(9, D, **DOUBLE)
        self.mix, self.head, self.ids = nn.Linear(D, D, **DOUBLE), nn.Linear(D, V, **DOUBLE), places

    def forward(self, batch):
        return self.head(torch.tanh(self.mix(self.words(batch) + self.places(self.ids(*batch.shape)))))


BARE = {
    "row": (lambda n, t: torch.arange(t), "the first axis of its input has 5 entries, and is not that of the 3 examples"),
    "one": (lambda n, t: torch.arange(t)[None], "the first axis of its input has 1 entries, and is not that of the 3 examples"),
}


@pytest.mark.parametrize("how", BARE)
def test_positions_without_examples_fall_back_with_a_warning(lib, how):
    places, reason = BARE[how]
    model = Positions(places)
    optimizer = lib.optimizer(model)
    assert optimizer.report()["places.weight"].kind == "kfac"
    with pytest.warns(UserWarning, match=f"layer 'places' has no statistics in this step: {reason}"):
        first = step(model, optimizer, ids(3, 5))
    assert optimizer.report()["places.weight"].kind == "diagonal"
    assert optimizer.report()["places.weight"].reason == reason
    assert {row.parameter for row in optimizer.report().fallbacks()} == {"places.weight"}
    losses = [step(model, optimizer, ids(3, 5)) for _ in range(5)]
    assert losses[-1] < first


def test_a_single_other_layer_tells_how_many_examples_there_are(lib):
    model = Positions(BARE["row"][0])
    model.forward = lambda x: model.head(model.places(torch.arange(x.shape[1])) + x)
    optimizer = lib.optimizer(model)
    with pytest.warns(UserWarning, match="layer 'places' .*has 2 entries, and is not that of the 3 examples"):
        step(model, optimizer, torch.randn(3, 2, D, **DOUBLE))


def test_an_output_layer_on_a_flattened_batch_leaves_the_table_its_block(lib):
    model, flat = words(), words()
    flat.forward = lambda batch: flat.after(flat.embed(batch).reshape(-1, D)).reshape(*batch.shape, 3)
    flat.after, model.after = (nn.Sequential(nn.Linear(D, 3, **DOUBLE)) for _ in range(2))
    flat.load_state_dict(model.state_dict())
    assert lib.gap(run(lib, model=flat), run(lib, model=model)) < 1e-12


def test_as_many_positions_as_examples_cannot_be_told_apart(lib):
    model = Positions(BARE["row"][0])
    optimizer = lib.optimizer(model)
    with pytest.warns(UserWarning, match="layer 'places' .*: its 4 ids are examples or positions, of which there are as many"):
        step(model, optimizer, ids(4, 4))
    assert optimizer.report()["places.weight"].kind == "diagonal"


def test_strictness_refuses_positions_without_examples(lib):
    model = Positions(BARE["row"][0])
    with pytest.raises(RuntimeError, match="`strict` is set, but places: the first axis"):
        step(model, lib.optimizer(model, strict=True), ids(3, 5))


def test_positions_for_every_example_have_an_exact_block(lib):
    model = Positions(lambda n, t: torch.arange(t).expand(n, t))
    batch = ids(3, 5)
    found = lib.rebuilt(model, lambda: model(batch).square().mean().backward())
    assert max(found.values()) < 1e-12
    optimizer = lib.optimizer(model)
    step(model, optimizer, ids(4, 4))
    assert optimizer.report().fallbacks() == []


def test_one_id_an_example_beside_positions_keeps_its_block(lib):
    # what an earlier batch has told stays known where a later one has as many positions as examples
    model = Positions(lambda n, t: (torch.arange(n) % 9)[:, None])
    label = Positions(lambda n, t: torch.arange(n) % 9)
    label.forward = lambda batch: label.head(torch.tanh(label.mix(label.words(batch) + label.places(label.ids(*batch.shape))[:, None])))
    optimizers = [lib.optimizer(net) for net in (model, label)]
    for batch in (ids(3, 5), ids(4, 4)):
        for net, optimizer in zip((model, label), optimizers, strict=True):
            step(net, optimizer, batch)
    assert lib.gap(lib.weights(model), lib.weights(label)) < 1e-12
    assert optimizers[1].report().fallbacks() == []


def test_ids_of_tabular_models_are_examples(lib):
    model = words()
    optimizer = lib.optimizer(model)
    for n in (D, 5, 3):
        step(model, optimizer, ids(n))
    assert optimizer.report().fallbacks() == []
