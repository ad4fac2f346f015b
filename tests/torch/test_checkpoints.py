"""A state goes through ``state_dict`` or a file exactly, or is refused and changes nothing."""

import copy
import io

import pytest
import torch
from torch import nn

import kfcore as kf
from kfcore_torch import Optimizer

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
F = torch.nn.functional


def made(lib, dtype=torch.float64, sizes=(4, 6, 5, 3), **options):
    model = lib.mlp(sizes, dtype=dtype)
    return model, lib.optimizer(model, method=kf.KFAC(damping=kf.Damping(0.1, "exact"), refresh_every=3), clip=1e-2, **options)


def through_a_file(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def arrays(optimizer):
    return {name: x.clone() for name, x in optimizer.state_dict()["kfcore"]["arrays"].items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_resumed_run_takes_the_same_next_twenty_steps(lib, dtype):
    model, optimizer = made(lib, dtype)
    lib.train(model, optimizer, lib.batches(5, dtype=dtype))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, resumed = made(lib, dtype)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    more = lib.batches(20, first=50, dtype=dtype)
    assert (lib.train(model, optimizer, more) == lib.train(other, resumed, more)).all()
    fresh, forgetful = made(lib, dtype)
    fresh.load_state_dict(saved["model"])
    assert (lib.train(fresh, forgetful, more) != lib.weights(other)).any(), "the state must matter"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_state_keeps_its_own_precision(lib, dtype):
    model, optimizer = made(lib, dtype)
    lib.train(model, optimizer, lib.batches(3, dtype=dtype))
    _, other = made(lib, dtype)
    before = arrays(optimizer)
    other.load_state_dict(optimizer.state_dict())
    for name, x in arrays(other).items():
        assert x.dtype == before[name].dtype != torch.bfloat16
        assert torch.equal(x, before[name]), name


def test_groups_come_back_with_the_state(lib):
    model, optimizer = made(lib)
    lib.train(model, optimizer, lib.batches(1))
    optimizer.param_groups[0]["lr"] = 0.33
    _, other = made(lib)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.33


def test_a_state_dict_is_a_snapshot_that_later_steps_do_not_change(lib):
    model, optimizer = made(lib)
    lib.train(model, optimizer, lib.batches(3))
    saved, before = optimizer.state_dict()["kfcore"], arrays(optimizer)
    lib.train(model, optimizer, lib.batches(4, first=9))
    assert all(torch.equal(saved["arrays"][name], x) for name, x in before.items())


def foreign(lib):
    good = made(lib)[1].state_dict()
    sgd = torch.optim.SGD(lib.mlp().parameters(), lr=0.1).state_dict()
    return {
        "another optimizer": sgd,
        "no curvature": sgd | {"kfcore": None},
        "damaged header": good | {"kfcore": good["kfcore"] | {"header": "{"}},
        "lost array": good | {"kfcore": good["kfcore"] | {"arrays": dict(list(good["kfcore"]["arrays"].items())[1:])}},
        "another width": made(lib, sizes=(4, 7, 5, 3))[1].state_dict(),
        "another depth": made(lib, sizes=(4, 6, 3))[1].state_dict(),
        "no momentum": made(lib, momentum=0.0)[1].state_dict(),
        "another method": lib.optimizer(lib.mlp()).state_dict(),
        "more groups": good | {"param_groups": good["param_groups"] * 2},
        "no groups": {"state": {}, "kfcore": good["kfcore"]},
    }


@pytest.mark.parametrize("case", range(10))
def test_a_mismatched_state_is_refused_and_changes_nothing(lib, case):
    saved = list(foreign(lib).values())[case]
    model, optimizer = made(lib)
    lib.train(model, optimizer, lib.batches(3))
    before, groups = arrays(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(kf.CheckpointError):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(x, before[name]) for name, x in arrays(optimizer).items())
    assert optimizer.state_dict()["param_groups"] == groups
    assert optimizer.diagnostics()["steps"] == 3


def test_a_file_goes_on_exactly(lib, tmp_path):
    model, optimizer = made(lib)
    lib.train(model, optimizer, lib.batches(5))
    optimizer.save(tmp_path / "state")
    other, resumed = made(lib)
    other.load_state_dict(model.state_dict())
    resumed.load(tmp_path / "state")
    more = lib.batches(20, first=50)
    assert (lib.train(model, optimizer, more) == lib.train(other, resumed, more)).all()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "missing"])
def test_a_bad_file_is_refused_and_changes_nothing(lib, tmp_path, damage):
    model, optimizer = made(lib)
    lib.train(model, optimizer, lib.batches(3))
    path, before = tmp_path / "state", arrays(optimizer)
    optimizer.save(path)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        torch.save({"a": 1}, path)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(kf.CheckpointError):
        optimizer.load(path)
    assert all(torch.equal(x, before[name]) for name, x in arrays(optimizer).items())


class Functional(torch.nn.Module):
    """Uses the weight of its first layer without calling it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(4, 6, dtype=torch.float64), torch.nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x):
        return self.b(torch.tanh(F.linear(x, self.a.weight, self.a.bias)))


def test_layers_given_up_in_the_first_run_stay_given_up_after_resuming(lib):
    def trained():
        model = Functional()
        optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.05)
        with pytest.warns(UserWarning, match="layer 'a' has no statistics"):
            lib.train(model, optimizer, lib.batches(2))
        return model, optimizer

    model, optimizer = trained()
    other = Functional()
    other.load_state_dict(model.state_dict())
    resumed = Optimizer(other, kf.KFAC(damping=0.1), lr=0.05)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    twin = copy.deepcopy(optimizer)
    more = lib.batches(5, first=9)
    assert (lib.train(model, optimizer, more) == lib.train(other, resumed, more)).all()
    assert (lib.train(twin._model, twin, more) == lib.weights(model)).all()
    assert resumed.report()["a.weight"].kind == "diagonal"


def test_a_file_of_a_model_that_gave_up_a_layer_resumes_in_a_fresh_optimizer(tmp_path):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.unseen = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return nn.functional.linear(torch.tanh(self.seen(x)), self.unseen.weight, self.unseen.bias)

    def step(model, optimizer):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(torch.ones(3, 4)), torch.zeros(3, 2)).backward()
        optimizer.step()

    torch.manual_seed(0)
    model = Functional()
    optimizer = Optimizer(model, kf.KFAC(damping=0.1))
    with pytest.warns(UserWarning, match="unseen"):
        step(model, optimizer)
    optimizer.save(tmp_path / "state")
    twin = copy.deepcopy(model)
    other = Optimizer(twin, kf.KFAC(damping=0.1))
    other.load(tmp_path / "state")
    for _ in range(3):
        step(model, optimizer)
        step(twin, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
