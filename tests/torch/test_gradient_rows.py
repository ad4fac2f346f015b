"""Directions from the rows of a step: taken where autograd's gradient is their product, and nowhere else."""

import pytest
import torch
from torch import nn

import kfcore as kf
from kfcore import factors
from kfcore.curvature import kronecker
from kfcore_torch import Optimizer


@pytest.fixture
def taken(monkeypatch):
    """Which way each direction of the wide layer went."""
    ways = []
    for way, module, name in (("matrix", factors, "sandwich"), ("rows", kronecker, "thin_product")):
        plain = getattr(module, name)

        def counted(xp, left, *rest, plain=plain, way=way):
            result = plain(xp, left, *rest)
            if tuple(result.shape[-2:]) in ((60, 50), (60, 51)):
                ways.append(way)
            return result

        monkeypatch.setattr(module, name, counted)
    return ways


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(50, 60, dtype=dtype), nn.Tanh(), nn.Linear(60, 2, dtype=dtype))


def batch(n=8, dtype=torch.float64):
    return torch.randn(n, 50, dtype=dtype), torch.randn(n, 2, dtype=dtype)


def train(model, optimizer, between=lambda: None, steps=4, penalty=0.0, micro=1):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(micro):
            x, y = batch()
            loss = nn.functional.mse_loss(model(x), y) / micro
            (loss + penalty * sum((p**2).sum() for p in model.parameters())).backward()
        between()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def run(monkeypatch, *, long=False, clip=None, **options):
    model = net()
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.05, loss=kf.MSE())
    if long:
        monkeypatch.setattr(kronecker, "spans", lambda *_: False)
    between = (lambda: nn.utils.clip_grad_norm_(model.parameters(), clip)) if clip else (lambda: None)
    return train(model, optimizer, between, **options)


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("rows", {}),
        ("rows", {"micro": 2}),
        ("matrix", {"clip": 1e-3}),
        ("matrix", {"penalty": 1e-4}),
        ("matrix", {"micro": 9}),
    ],
    ids=["plain", "two micro-batches", "clipped", "penalised", "many rows"],
)
def test_the_way_is_the_right_one_and_both_lead_to_the_same_place(monkeypatch, taken, way, options):
    short = run(monkeypatch, **options)
    assert taken == [way] * 4
    long = run(monkeypatch, long=True, **options)
    assert taken[4:] == ["matrix"] * 4
    for a, b in zip(short, long, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_an_unscaled_gradient_is_that_of_the_scaled_rows(taken):
    model = net(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.05, loss=kf.MSE(), grad_scaler=scaler)
    torch.manual_seed(1)
    for _ in range(3):
        x, y = batch(dtype=torch.float32)
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert taken == ["rows"] * 3


def test_a_second_use_outside_the_layer_goes_the_long_way(taken):
    model = net()
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.05, loss=kf.MSE())
    x, y = batch()
    (nn.functional.mse_loss(model(x), y) + 1e-3 * nn.functional.linear(x, model[0].weight).square().mean()).backward()
    optimizer.step()
    assert taken == ["matrix"]


def test_a_buffer_that_is_written_over_before_the_step_does_no_harm(taken):
    """Rows are the optimizer's own."""
    results = []
    for overwrite in (False, True):
        model = net()
        optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.05, loss=kf.MSE(), bias="separate")
        torch.manual_seed(1)
        x, y = batch()
        nn.functional.mse_loss(model(x), y).backward()
        if overwrite:
            with torch.no_grad():
                x.fill_(float("nan"))
        optimizer.step()
        results.append(model[0].weight.detach().clone())
    assert torch.equal(*results)
    assert taken == ["rows", "rows"]
