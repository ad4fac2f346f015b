"""Bad batches leave the weights alone and are counted; ranks with a part of a batch each make the step of the whole."""

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer

F = torch.nn.functional


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("at", [0, 2])
def test_a_batch_that_is_not_finite_changes_nothing(lib, value, at):
    model, good = lib.mlp(), lib.batches(5)
    optimizer = lib.optimizer(model)
    lib.train(model, optimizer, good[:at])
    before = lib.weights(model)
    x, y = lib.data()
    x[0, 0] = value
    assert (lib.train(model, optimizer, [(x, y)]) == before).all()
    found = optimizer.diagnostics()
    assert found["skipped_steps"] == 1
    assert found["dropped_statistics"]["0"] == 1
    after = lib.train(model, optimizer, good[at:])
    assert torch.isfinite(torch.as_tensor(after)).all()
    assert lib.gap(before, after) > 1e-3
    assert optimizer.diagnostics()["skipped_steps"] == 1


def test_an_empty_loss_leaves_finite_weights(lib):
    model = lib.mlp()
    optimizer = Optimizer(model, kf.KFAC(damping=0.1, fisher="exact"), loss=kf.CrossEntropy(ignore_index=-100))
    for ignored in (False, True, False):
        x, y = lib.data()
        y = torch.full_like(y, -100) if ignored else y
        optimizer.zero_grad()
        f = model(x)
        optimizer.backward_fisher(f, y)
        F.cross_entropy(f, y, reduction="sum").div((y != -100).sum().clamp(min=1)).backward()
        optimizer.step()
        assert torch.isfinite(torch.as_tensor(lib.weights(model))).all()


@pytest.mark.parametrize("fisher", ["empirical", "exact", "forward"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_two_ranks_with_halves_have_the_factors_of_the_whole(lib, fisher, reduction):
    x, y = lib.data(10)
    method, criterion = kf.KFAC(damping=0.1, fisher=fisher), torch.nn.CrossEntropyLoss(reduction=reduction)

    def step(xs, ys, grads=None, all_reduce=None):
        model = lib.mlp()
        terms = len(xs) if fisher == "forward" else None
        optimizer = Optimizer(model, method, lr=0.05, loss=kf.CrossEntropy(), loss_reduction=reduction, all_reduce=all_reduce)
        f = model(xs)
        if fisher == "exact":
            optimizer.backward_fisher(f)
        criterion(f, ys).backward()
        for p, g in zip(model.parameters(), grads or (), strict=False):
            p.grad.copy_(g)
        optimizer.step(terms=terms)
        return model, optimizer

    whole, expected = step(x, y)
    grads = [p.grad for p in whole.parameters()]
    posted = []
    step(x[:4], y[:4], all_reduce=lambda t: posted.append(t.clone()))
    waiting = iter(posted)
    model, optimizer = step(x[4:], y[4:], grads, lambda t: t.add_(next(waiting)))
    assert next(waiting, None) is None, "both ranks must reduce the same things"
    for name, block in lib.dense(expected).items():
        assert lib.gap(lib.dense(optimizer)[name], block) < 1e-12
    assert lib.gap(lib.weights(model), lib.weights(whole)) < 1e-12


@pytest.mark.parametrize("fisher", ["empirical", "exact", "forward"])
def test_two_ranks_with_unequal_padding_have_the_factors_of_the_whole(lib, fisher):
    ids = torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 1, 1], [2, 2, 3, 4]])

    def step(part, all_reduce=None):
        torch.manual_seed(0)
        double = {"dtype": torch.float64}
        layers = [torch.nn.Embedding(6, 3, padding_idx=0, **double), torch.nn.LayerNorm(3, **double), torch.nn.Linear(3, 2, **double)]
        model = torch.nn.Sequential(*layers)
        method = kf.KFAC(damping=0.1, fisher=fisher)
        optimizer = Optimizer(model, method, lr=0.05, loss=kf.MSE(), all_reduce=all_reduce, norm="full")
        f = model(part)
        if fisher == "exact":
            optimizer.backward_fisher(f)
        f.square().mean().backward()
        optimizer.step()
        return lib.dense(optimizer)

    expected, posted = step(ids), []
    step(ids[:1], lambda t: posted.append(t.clone()))
    waiting = iter(posted)
    found = step(ids[1:], lambda t: t.add_(next(waiting)))
    assert next(waiting, None) is None, "both ranks must reduce the same things"
    assert {name: lib.gap(found[name], expected[name]) for name in found} == pytest.approx(dict.fromkeys(expected, 0.0), abs=1e-12)


def test_an_eigendecomposition_that_does_not_converge_is_tried_in_double_and_else_counted(lib, monkeypatch):
    """PyTorch raises where LAPACK gives up, as it does in single precision on some harmless factors of low rank."""
    eigh, broken, ends = torch.linalg.eigh, set(), []

    def fragile(x):
        if x.dtype in broken:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", fragile)
    data = [(x.float(), y) for x, y in lib.batches(5)]
    for dtypes in (set(), {torch.float32}, {torch.float32, torch.float64}):
        broken.clear()
        model = lib.mlp().float()
        optimizer = Optimizer(model, kf.EKFAC(damping=0.1, refresh_every=2), lr=0.05)
        lib.train(model, optimizer, data[:2])
        broken.update(dtypes)
        ends.append((lib.train(model, optimizer, data[2:]), set(optimizer.diagnostics()["kept_refreshes"].values())))
    (good, _), (wide, none), (stale, kept) = ends
    assert lib.gap(good, wide) < 1e-5
    assert not none
    assert kept == {2}
    assert torch.isfinite(torch.as_tensor(stale)).all()
