"""Batch normalisation has a block where its statistics are fixed, and never one where each example's loss depends on all the others."""

import copy

import pytest
import torch

import kfcore as kf

nn, F = torch.nn, torch.nn.functional
C = 4


def coupled_net(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C), nn.Tanh(), nn.Linear(C, 3)).double()
    return model.train(mode)


COUPLED = "BatchNorm1d in training mode takes statistics of the batch, through which each example's loss depends on all the others"


def test_batch_norm_in_training_falls_back_with_the_reason(lib):
    model = coupled_net(True)
    optimizer = lib.optimizer(model)
    assert {row.parameter for row in optimizer.report().fallbacks()} == {"1.weight", "1.bias"}
    assert optimizer.report()["1.weight"].reason.startswith(COUPLED)
    assert optimizer.report()["1.bias"].reason.startswith(f"bias of a BatchNorm1d without a layer: {COUPLED}")
    lib.train(model, optimizer, lib.batches(3))
    # the mode at set-up counts, not that of a moment at which parameters join
    model.eval()
    optimizer.engine.plan(list(model.parameters()))
    assert {row.parameter for row in optimizer.report().fallbacks()} == {"1.weight", "1.bias"}


def test_batch_norm_without_running_statistics_falls_back_in_every_mode(lib):
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).double().eval()
    assert lib.optimizer(model).report()["0.weight"].reason.startswith("BatchNorm1d without running statistics takes those of the batch")


@pytest.mark.parametrize("steps", [0, 3])
def test_batch_norm_that_turns_to_training_moves_to_the_fallback_with_a_warning(lib, steps):
    model = coupled_net(False)
    optimizer = lib.optimizer(model)
    assert optimizer.report().fallbacks() == []
    lib.train(model, optimizer, lib.batches(steps))
    model.train()
    momentum = {k: v.clone() for k, v in optimizer.engine.state.step.momentum.items()}
    with pytest.warns(UserWarning, match=f"layer '1' has no statistics in this step: {COUPLED}"):
        lib.train(model, optimizer, lib.batches(1, first=9))
    assert optimizer.report()["1.weight"].kind == "diagonal"
    assert optimizer.report()["0.weight"].kind == "kfac"
    assert set(momentum) == set(optimizer.engine.state.step.momentum)
    assert int(optimizer.engine.state.curvature.steps) == steps + 1
    lib.train(model, optimizer, lib.batches(3))
    assert optimizer.report()["1.weight"].reason.startswith(COUPLED)


def test_a_pass_in_training_mode_between_is_refused_with_strictness_and_a_pass_without_gradients_is_not(lib):
    model = coupled_net(False)
    optimizer = lib.optimizer(model, strict=True)
    (x, y), *_ = lib.batches(1)
    with torch.no_grad():
        model.train()(x)
        model.eval()
    lib.train(model, optimizer, [(x, y)])
    model.train()
    with pytest.raises(RuntimeError, match=f"`strict` is set, but 1: {COUPLED}"):
        lib.train(model, optimizer, [(x, y)])


def test_training_mode_moves_a_layer_that_was_already_not_seen(lib):
    model = coupled_net(False)
    optimizer, norm = lib.optimizer(model), model[1]
    lib.train(model, optimizer, lib.batches(1))
    functional = lambda x: F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)  # noqa: E731
    model.forward = lambda x: model[3](torch.tanh(functional(model[0](x))))
    with pytest.warns(UserWarning, match="layer '1' has no statistics in this step: its weight is used, but its module was not called"):
        lib.train(model, optimizer, lib.batches(1))
    assert optimizer.report()["1.weight"].kind == "kfac"
    del model.forward
    with pytest.warns(UserWarning, match=f"layer '1' has no statistics in this step: {COUPLED}"):
        lib.train(model.train(), optimizer, lib.batches(1))
    assert optimizer.report()["1.weight"].kind == "diagonal"


def test_one_call_in_each_mode_is_no_block_either(lib):
    model = coupled_net(False)
    optimizer = lib.optimizer(model)
    (x, y), *_ = lib.batches(1)
    first = F.cross_entropy(model(x), y)
    model[1].train()
    (first + F.cross_entropy(model(x), y)).backward()
    with pytest.warns(UserWarning, match="layer '1' has no statistics"):
        optimizer.step()
    assert optimizer.report()["1.weight"].kind == "diagonal"


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_the_extra_pass_refuses_training_mode_too(lib, fisher):
    model = coupled_net(False)
    optimizer = lib.optimizer(model, method=kf.KFAC(damping=0.1, fisher=fisher), loss=kf.CrossEntropy())
    (x, y), *_ = lib.batches(1)
    f = model.train()(x)
    optimizer.backward_fisher(f)
    F.cross_entropy(f, y).backward()
    with pytest.warns(UserWarning, match="layer '1' has no statistics"):
        optimizer.step()
    assert {row.parameter for row in optimizer.report().fallbacks()} == {"1.weight", "1.bias"}


def test_the_forward_fisher_sees_training_mode_alone(lib):
    model = coupled_net(False)
    optimizer = lib.optimizer(model.train(), method=kf.KFAC(damping=0.1, fisher="forward"))
    lib.train(model, optimizer, lib.batches(2))
    fixed = coupled_net(True)
    fixed[1].eval()
    other = lib.optimizer(fixed, method=kf.KFAC(damping=0.1, fisher="forward"))
    with pytest.warns(UserWarning, match="layer '1' has no statistics in this step: its weight is used, but no call"):
        lib.train(fixed, other, lib.batches(1))
    assert {row.parameter for row in other.report().fallbacks()} == {"1.weight", "1.bias"}


@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy"])
@pytest.mark.parametrize("mode", [True, False])
def test_a_state_comes_back_whatever_the_mode_is_then(lib, mode, how, tmp_path):
    model = coupled_net(mode)
    optimizer = lib.optimizer(model)
    lib.train(model, optimizer, lib.batches(3))
    model.train(not mode)
    if how == "deepcopy":
        resumed = copy.deepcopy(optimizer)
        other = resumed._model
    else:
        other, resumed = lib.resumed(model, optimizer, how, tmp_path)
    assert [(row.parameter, row.kind) for row in resumed.report()] == [(row.parameter, row.kind) for row in optimizer.report()]
    weights = [lib.train(m.train(mode), o, lib.batches(3, first=7)) for m, o in ((model, optimizer), (other, resumed))]
    assert (weights[0] == weights[1]).all()


@pytest.mark.parametrize("mode", [True, False])
def test_a_file_that_does_not_say_what_is_excluded_comes_back(lib, mode, tmp_path):
    # one of another framework, whose blocks tell
    model = coupled_net(mode)
    optimizer = lib.optimizer(model)
    lib.train(model, optimizer, lib.batches(3))
    arrays, header = kf.checkpoint.to_arrays(optimizer.engine.core, optimizer.engine.state)
    kf.checkpoint.write(tmp_path / "state.safetensors", arrays, header)
    other = copy.deepcopy(model)
    resumed = lib.optimizer(other.train(True))
    resumed.load(tmp_path / "state.safetensors")
    weights = [lib.train(m.train(mode), o, lib.batches(3, first=7)) for m, o in ((model, optimizer), (other, resumed))]
    assert (weights[0] == weights[1]).all()
