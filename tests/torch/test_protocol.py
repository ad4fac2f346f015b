"""The optimizer obeys the protocol of ``torch.optim``: closures, schedulers, groups, accumulation, clipping."""

import pytest
import torch
from torch import nn

import kfcore as kf
from kfcore_torch import Optimizer

F = torch.nn.functional
SCHEDULERS = {
    "lambda": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.1**t),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 4),
    "one cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.2, total_steps=6, cycle_momentum=False),
}


def test_it_is_a_torch_optimizer(lib):
    assert isinstance(lib.optimizer(lib.mlp()), torch.optim.Optimizer)


def test_a_closure_makes_the_gradients_of_its_own_step(lib):
    def run(closed):
        model = lib.mlp()
        optimizer, losses = lib.optimizer(model), []
        for x, y in lib.batches(4):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            if closed:
                losses.append(optimizer.step(closure).item())
            else:
                losses.append(closure().item())
                assert optimizer.step() is None
        return lib.weights(model), losses

    (one, losses), (two, others) = run(True), run(False)
    assert (one == two).all()
    assert losses == others


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_change_the_step(lib, name):
    model = lib.mlp()
    optimizer = lib.optimizer(model, momentum=0.0)
    scheduler, scheduled = SCHEDULERS[name](optimizer), []
    for x, y in lib.batches(4):
        before = lib.weights(model)
        rate = optimizer.param_groups[0]["lr"]
        lib.train(model, optimizer, [(x, y)])
        scheduled.append((rate, before, lib.weights(model)))
        scheduler.step()
    assert len({rate for rate, *_ in scheduled}) == 4
    again = lib.mlp()
    other = lib.optimizer(again, momentum=0.0)
    for (rate, before, after), batch in zip(scheduled, lib.batches(4), strict=True):
        assert (lib.weights(again) == before).all()
        other.param_groups[0]["lr"] = rate
        assert lib.gap(lib.train(again, other, [batch]), after) < 1e-14


def test_a_tensor_learning_rate_is_the_number_in_it(lib):
    one, two = lib.mlp(), lib.mlp()
    first = lib.train(one, lib.optimizer(one, lr=torch.tensor(0.25, dtype=torch.float64)), lib.batches(2))
    assert lib.gap(first, lib.train(two, lib.optimizer(two, lr=0.25), lib.batches(2))) < 1e-14


def test_groups_have_their_own_rate_and_decay(lib):
    model = lib.mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}, {"params": model[4].parameters(), "lr": 0.2}]
    grouped = lib.optimizer(model, params=groups, momentum=0.0)
    plain = lib.mlp()
    start = [p.detach().clone() for p in plain.parameters()]
    lib.train(plain, lib.optimizer(plain, momentum=0.0), lib.batches(1))
    lib.train(model, grouped, lib.batches(1))
    factors = [0.0, 0.0, 1.0, 1.0, 4.0, 4.0]
    for p, q, s, factor in zip(model.parameters(), plain.parameters(), start, factors, strict=True):
        assert torch.allclose((p - s).detach(), factor * (q - s).detach(), rtol=1e-12, atol=1e-15)


def test_groups_decay_apart(lib):
    def run(decay):
        model = lib.mlp()
        groups = [{"params": model[:2].parameters(), "weight_decay": decay}, {"params": model[2:].parameters()}]
        lib.train(model, lib.optimizer(model, params=groups), lib.batches(1))
        return model

    one, two, start = run(0.0), run(0.5), lib.mlp()
    assert torch.allclose(two[0].weight, one[0].weight - 0.05 * 0.5 * start[0].weight, rtol=1e-12)
    assert torch.equal(two[4].weight, one[4].weight)


@pytest.mark.parametrize("group", [False, True])
def test_groups_have_their_own_damping(lib, group):
    def run(method, *dampings):
        model = lib.mlp((4, 4, 4))
        groups = [{"params": model[0].parameters(), "damping": dampings[0]}, {"params": model[2].parameters(), "damping": dampings[1]}]
        lib.train(model, Optimizer(model, method, groups, lr=0.05, momentum=0.0, group=group), lib.batches(1))
        return model

    mixed = run(kf.KFAC(damping=7.0), 0.1, 2.0)
    small, large = run(kf.KFAC(damping=0.1), None, None), run(kf.KFAC(damping=2.0), None, None)
    assert torch.allclose(mixed[0].weight, small[0].weight, rtol=1e-13)
    assert torch.allclose(mixed[2].weight, large[2].weight, rtol=1e-13)
    assert not torch.allclose(small[2].weight, large[2].weight, rtol=1e-4)


def test_an_added_group_trains_from_then_on_and_the_rest_goes_on(lib):
    model = lib.mlp()
    optimizer = lib.optimizer(model, params=[*model[2].parameters(), *model[4].parameters()])
    first = model[0].weight.detach().clone()
    lib.train(model, optimizer, lib.batches(3))
    assert torch.equal(model[0].weight, first)
    kept = lib.factors(optimizer, "4")[1].copy()
    momentum = optimizer.engine.state.step.momentum["4.weight"].clone()
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    assert (lib.factors(optimizer, "4")[1] == kept).all()
    assert torch.equal(optimizer.engine.state.step.momentum["4.weight"], momentum)
    lib.train(model, optimizer, lib.batches(1))
    assert not torch.equal(model[0].weight, first)
    assert optimizer.report()["0.weight"].kind == "kfac"
    assert optimizer.diagnostics()["steps"] == 4


def test_a_refused_group_leaves_the_optimizer_as_it_was(lib):
    model = lib.mlp()
    optimizer = lib.optimizer(model, params=[*model[2].parameters(), *model[4].parameters()])
    for bad in ({"lr": -1.0}, {"weight_decay": -1.0}, {"damping": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            optimizer.add_param_group({"params": list(model[0].parameters()), **bad})
    with pytest.raises(ValueError, match="parameters of `model`"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1
    lib.train(model, optimizer, lib.batches(1))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_make_the_step_of_the_whole_batch(lib, parts):
    def run(parts):
        model = lib.mlp()
        optimizer = lib.optimizer(model, clip=1e-3)
        for x, y in lib.batches(4):
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(xs), ys) / parts).backward()
            optimizer.step()
        return lib.weights(model)

    assert lib.gap(run(1), run(parts)) < 1e-12


def test_clipped_gradients_scale_the_direction_and_leave_the_factors(lib):
    def run(norm):
        model = lib.mlp()
        optimizer = lib.optimizer(model, momentum=0.0)
        start = lib.weights(model)
        x, y = lib.data()
        F.cross_entropy(model(x), y).backward()
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        return lib.weights(model) - start, float(total), lib.factors(optimizer, "2")[1]

    (free, total, g), (clipped, _, same) = run(1e9), run(0.1)
    assert total > 0.1
    assert lib.gap(clipped, free * (0.1 / total)) < 1e-5
    assert (g == same).all()


def test_a_parameter_that_is_unfrozen_takes_part_from_the_next_step(lib):
    model = lib.mlp()
    model[0].requires_grad_(False)
    optimizer = lib.optimizer(model, params=model.parameters())
    before = model[0].weight.detach().clone()
    lib.train(model, optimizer, lib.batches(2))
    model[0].requires_grad_(True)
    lib.train(model, optimizer, lib.batches(1))
    assert torch.equal(model[0].weight, before)
    lib.train(model, optimizer, lib.batches(1))
    assert not torch.equal(model[0].weight, before)
    assert optimizer.report()["0.bias"].kind == "kfac"


def test_wrong_settings_are_refused(lib):
    model = lib.mlp()
    for name, value in {"lr": -0.1, "weight_decay": -1.0, "momentum": 1.0, "clip": 0.0, "decay": "both"}.items():
        with pytest.raises(ValueError, match="must"):
            Optimizer(model, kf.KFAC(), **{name: value})
    with pytest.raises(ValueError, match="`lr` must be a finite number"):
        Optimizer(model, kf.KFAC(), lr=float("nan"))
    with pytest.raises(ValueError, match="parameters of `model`"):
        Optimizer(model, kf.KFAC(), lib.mlp().parameters())
    with pytest.raises(TypeError, match="`method` must be"):
        Optimizer(model, "kfac")
    with pytest.raises(RuntimeError, match="no gradient"):
        Optimizer(model, kf.KFAC()).step()


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_a_summed_loss_steps_where_no_statistics_are_due(fisher):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = Optimizer(model, kf.KFAC(damping=0.1, stats_every=3, fisher=fisher), loss=kf.MSE(), loss_reduction="sum", lr=0.01)
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    for _ in range(5):
        outputs = model(x)
        optimizer.zero_grad()
        if fisher == "mc":
            optimizer.backward_fisher(outputs)
        nn.functional.mse_loss(outputs, y, reduction="sum").backward()
        optimizer.step()
    assert float(optimizer.engine.state.curvature.blocks[""].average.weight) == pytest.approx(1.95)


def test_a_group_with_a_setting_that_groups_do_not_have_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"`params`.*'momentum'"):
        Optimizer(model, kf.KFAC(), params=[{"params": model.parameters(), "momentum": 0.0}])
