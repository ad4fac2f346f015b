"""Loss scaling leaves no mark on the curvature; half-precision models have factors in float32."""

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer, Preconditioner

F = torch.nn.functional


def scaled_run(lib, scale, fisher="empirical", dtype=torch.float64, poison=None):
    model = lib.mlp(dtype=dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2) if scale else None
    method = kf.KFAC(damping=0.1, fisher=fisher)
    optimizer = Optimizer(model, method, lr=0.05, loss=kf.CrossEntropy(), grad_scaler=scaler)
    for step, (x, y) in enumerate(lib.batches(6, dtype=dtype)):
        optimizer.zero_grad()
        f = model(x)
        if fisher in ("mc", "exact"):
            optimizer.backward_fisher(f, generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(f, y)
        if scaler is None:
            loss.backward()
            optimizer.step()
            continue
        scaler.scale(loss).backward()
        if step == poison:
            model[0].weight.grad[0, 0] = float("inf")
        before = lib.weights(model)
        scaler.step(optimizer)
        scaler.update()
        assert (step == poison) == (before == lib.weights(model)).all()
    return lib.weights(model), optimizer


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact", "forward"])
def test_a_scaler_gives_the_weights_of_a_run_without(lib, fisher):
    assert lib.gap(scaled_run(lib, None, fisher)[0], scaled_run(lib, 1024.0, fisher)[0]) < 1e-12


@pytest.mark.parametrize("poison", [0, 3])
def test_a_step_skipped_by_the_scaler_leaves_no_statistics(lib, poison):
    weights, optimizer = scaled_run(lib, 1024.0, poison=poison)
    model = lib.mlp()
    other = Optimizer(model, kf.KFAC(damping=0.1), lr=0.05)
    rest = [batch for step, batch in enumerate(lib.batches(6)) if step != poison]
    assert lib.gap(lib.train(model, other, rest), weights) < 1e-12
    assert optimizer.diagnostics()["steps"] == 5
    assert optimizer.diagnostics()["dropped_statistics"] == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_follow_the_double_one_with_factors_in_single(lib, dtype):
    half, optimizer = scaled_run(lib, None, dtype=dtype)
    arrays = optimizer.state_dict()["kfcore"]["arrays"]
    assert {x.dtype for x in arrays.values()} == {torch.float32, torch.int32}
    start, double = lib.weights(lib.mlp()), scaled_run(lib, None)[0]
    assert lib.gap(half - start, double - start) < 0.1
    assert lib.gap(double, start) > 0.1


def test_autocast_takes_part(lib):
    model = lib.mlp(dtype=torch.float32)
    optimizer = lib.optimizer(model)
    x, y = lib.data(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    rows = torch.cat([x, torch.ones(len(x), 1)], 1)
    assert lib.gap(lib.factors(optimizer, "0")[0], (rows.T @ rows / len(rows)).numpy()) < 1e-5


def test_a_preconditioner_takes_unscaled_gradients(lib):
    def run(scale):
        model = lib.mlp()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=bool(scale))
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        preconditioner = Preconditioner(model, kf.KFAC(damping=0.1), grad_scaler=scaler)
        for x, y in lib.batches(3):
            sgd.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.unscale_(sgd)
            preconditioner.step()
            scaler.step(sgd)
            scaler.update()
        return lib.weights(model)

    assert lib.gap(run(None), run(256.0)) < 1e-12
