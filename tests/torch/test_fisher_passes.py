"""``backward_fisher`` takes its statistics without a trace elsewhere, and says what is missing."""

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer

F = torch.nn.functional


def made(lib, fisher, dtype=torch.float64, **options):
    model = lib.mlp(dtype=dtype)
    return model, Optimizer(model, kf.KFAC(damping=0.1, fisher=fisher, **options), lr=0.05, loss=kf.CrossEntropy())


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_no_gradient_and_no_global_random_number_is_touched(lib, fisher):
    model, optimizer = made(lib, fisher)
    x, y = lib.data()
    f = model(x)
    before = torch.get_rng_state()
    optimizer.backward_fisher(f, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    F.cross_entropy(f, y).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(found, model.parameters(), strict=True))


def test_a_generator_makes_draws_repeatable_and_different_from_another_seed(lib):
    def run(seed):
        model, optimizer = made(lib, "mc")
        x, y = lib.data()
        f = model(x)
        optimizer.backward_fisher(f, generator=torch.Generator().manual_seed(seed))
        F.cross_entropy(f, y).backward()
        optimizer.step()
        return lib.weights(model)

    assert (run(3) == run(3)).all()
    assert lib.gap(run(3), run(4)) > 1e-6


@pytest.mark.parametrize("fisher", ["empirical", "forward", "mc", "exact"])
@pytest.mark.parametrize("order", ["zero grad first", "zero grad between", "zero grad before backward"])
def test_the_gradients_may_be_zeroed_anywhere_before_the_backward_pass(lib, fisher, order):
    def run(order):
        model, optimizer = made(lib, fisher)
        for x, y in lib.batches(3):
            if order == "zero grad first":
                optimizer.zero_grad()
            f = model(x)
            if order == "zero grad between":
                optimizer.zero_grad()
            if fisher in ("mc", "exact"):
                optimizer.backward_fisher(f, generator=torch.Generator().manual_seed(1))
            if order == "zero grad before backward":
                optimizer.zero_grad()
            F.cross_entropy(f, y).backward()
            optimizer.step()
        assert {row.kind for row in optimizer.report()} == {"kfac"}
        return lib.weights(model)

    assert (run(order) == run("zero grad first")).all()


def test_micro_batches_merge_to_the_whole(lib):
    def run(parts):
        model, optimizer = made(lib, "exact")
        x, y = lib.data(12)
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            f = model(xs)
            optimizer.backward_fisher(f)
            (F.cross_entropy(f, ys) / parts).backward()
        optimizer.step()
        return lib.weights(model)

    assert lib.gap(run(1), run(3)) < 1e-12


def test_a_step_without_due_statistics_needs_no_fisher_pass(lib):
    model, optimizer = made(lib, "exact", stats_every=2)
    for step, (x, y) in enumerate(lib.batches(4)):
        optimizer.zero_grad()
        f = model(x)
        if step % 2 == 0:
            optimizer.backward_fisher(f)
        F.cross_entropy(f, y).backward()
        optimizer.step()
    assert optimizer.diagnostics()["steps"] == 4


def test_a_forgotten_fisher_pass_is_named(lib):
    model, optimizer = made(lib, "mc")
    x, y = lib.data()
    F.cross_entropy(model(x), y).backward()
    before = lib.weights(model)
    with pytest.raises(RuntimeError, match=r"backward_fisher\(outputs, targets\)"):
        optimizer.step()
    assert (lib.weights(model) == before).all()


def test_outputs_of_no_captured_pass_are_refused(lib):
    model, optimizer = made(lib, "mc")
    with torch.no_grad():
        f = model(lib.data()[0])
    with pytest.raises(RuntimeError, match="no captured forward pass"):
        optimizer.backward_fisher(f)


def test_a_fisher_pass_of_a_method_without_one_is_refused(lib):
    model, optimizer = made(lib, "empirical")
    with pytest.raises(ValueError, match="fisher='empirical'"):
        optimizer.backward_fisher(model(lib.data()[0]))


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_fisher_type_that_needs_the_loss_says_so(lib, fisher):
    with pytest.raises(ValueError, match="`loss` must be given"):
        Optimizer(lib.mlp(), kf.KFAC(fisher=fisher))


def test_ignored_targets_must_be_given(lib):
    model = lib.mlp()
    optimizer = Optimizer(model, kf.KFAC(fisher="exact"), loss=kf.CrossEntropy(ignore_index=-100))
    with pytest.raises(ValueError, match="`targets` must be given"):
        optimizer.backward_fisher(model(lib.data()[0]))


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_passed_by_forward_pass_does_not_enter(lib, fisher):
    def run(stray):
        model, optimizer = made(lib, fisher)
        for x, y in lib.batches(3):
            if stray:
                model(x * 100)
            f = model(x)
            optimizer.backward_fisher(f, generator=torch.Generator().manual_seed(1))
            F.cross_entropy(f, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return lib.weights(model)

    assert (run(True) == run(False)).all()


def test_half_precision_models_take_fisher_passes(lib):
    model, optimizer = made(lib, "exact", dtype=torch.bfloat16)
    x, y = lib.data(dtype=torch.bfloat16)
    f = model(x)
    optimizer.backward_fisher(f)
    F.cross_entropy(f, y).backward()
    optimizer.step()
    assert lib.factors(optimizer, "0")[1].dtype == "float32"
