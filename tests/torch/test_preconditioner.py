"""The preconditioner rewrites gradients, and any optimizer of PyTorch does the rest."""

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer, Preconditioner

F = torch.nn.functional


def run(lib, inner, steps=20, lr=None, **options):
    model = lib.mlp()
    preconditioner = Preconditioner(model, kf.KFAC(damping=0.1, refresh_every=3), **options)
    optimizer = inner(model.parameters())
    for x, y in lib.batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        preconditioner.step(lr=lr)
        optimizer.step()
    return lib.weights(model)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_behind_it_is_the_optimizer(lib, momentum, decay):
    model = lib.mlp()
    options = {"lr": 0.05, "momentum": momentum, "weight_decay": decay}
    whole = lib.train(model, Optimizer(model, kf.KFAC(damping=0.1, refresh_every=3), decay="coupled", **options), lib.batches(20))
    assert lib.gap(run(lib, lambda params: torch.optim.SGD(params, **options)), whole) < 1e-11


def test_adam_runs_behind_it(lib):
    moved = run(lib, lambda params: torch.optim.Adam(params, lr=1e-2))
    assert lib.gap(moved, lib.weights(lib.mlp())) > 1e-2


def test_grafting_keeps_the_norm_of_every_block(lib):
    model = lib.mlp()
    preconditioner = Preconditioner(model, kf.KFAC(damping=0.1), graft=True)
    x, y = lib.data()
    F.cross_entropy(model(x), y).backward()
    before = [[p.grad.clone() for p in layer.parameters()] for layer in model[::2]]
    preconditioner.step()
    for layer, grads in zip(model[::2], before, strict=True):
        after = torch.cat([p.grad.flatten() for p in layer.parameters()])
        old = torch.cat([g.flatten() for g in grads])
        assert torch.allclose(after.norm(), old.norm(), rtol=1e-12)
        assert not torch.allclose(after, old, rtol=1e-3)


def test_the_clip_bounds_the_step_and_needs_the_rate(lib):
    model = lib.mlp()
    preconditioner = Preconditioner(model, kf.KFAC(damping=0.1), clip=1e-5)
    x, y = lib.data()
    F.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="`lr` must be given"):
        preconditioner.step()
    preconditioner.step(lr=0.1)
    clipped = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    free = Preconditioner(model, kf.KFAC(damping=0.1))
    F.cross_entropy(model(x), y).backward()
    free.step()
    scales = [(c / p.grad).mean() for c, p in zip(clipped, model.parameters(), strict=True)]
    energy = sum((g * c).sum() for g, c in zip(grads, clipped, strict=True)) / scales[0]
    assert all(torch.allclose(scale, scales[0]) for scale in scales)
    assert torch.allclose(0.01 * scales[0] ** 2 * energy, torch.tensor(1e-5, dtype=energy.dtype), rtol=1e-9)


def test_its_state_goes_on_exactly_and_foreign_ones_are_refused(lib, tmp_path):
    def fresh():
        model = lib.mlp()
        return model, Preconditioner(model, kf.KFAC(damping=0.1))

    def directions(model, preconditioner, seed):
        x, y = lib.data(seed=seed)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    (model, one), (twin, two), (third, three) = fresh(), fresh(), fresh()
    directions(model, one, 1)
    two.load_state_dict(one.state_dict())
    one.save(tmp_path / "state")
    three.load(tmp_path / "state")
    expected = directions(model, one, 2)
    assert torch.equal(expected, directions(twin, two, 2))
    assert torch.equal(expected, directions(third, three, 2))
    with pytest.raises(kf.CheckpointError):
        two.load_state_dict(Preconditioner(lib.mlp((4, 3)), kf.KFAC()).state_dict())


def test_a_direction_that_is_not_finite_becomes_zero(lib):
    model = lib.mlp()
    preconditioner = Preconditioner(model, kf.KFAC(damping=0.1))
    x, y = lib.data()
    F.cross_entropy(model(x), y).backward()
    model[2].weight.grad[0, 0] = float("nan")
    preconditioner.step()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_a_step_that_is_not_finite_leaves_zero_gradients_and_is_counted():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    preconditioner = Preconditioner(model, kf.KFAC(damping=0.1))
    for x in (torch.ones(4, 3), torch.full((4, 3), torch.nan)):
        model.zero_grad()
        (model(x) ** 2).mean().backward()
        preconditioner.step()
    assert all(not p.grad.any() for p in model.parameters())
    assert preconditioner.diagnostics()["skipped_steps"] == 1


def test_a_parameter_that_is_frozen_no_more_joins():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    preconditioner = Preconditioner(model, kf.KFAC(damping=0.1, refresh_every=1))
    model[0].requires_grad_(True)
    for _ in range(2):
        model.zero_grad()
        (model(torch.ones(4, 3)) ** 2).mean().backward()
        raw = model[0].weight.grad.clone()
        preconditioner.step()
    assert not torch.allclose(model[0].weight.grad, raw)
