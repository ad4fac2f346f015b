"""Copies of a model do not feed the optimizer of the original; hooks end with it."""

import copy
import gc
import io
import pickle

import pytest
import torch

F = torch.nn.functional


def backward(model, x, y):
    F.cross_entropy(model(x), y).backward()


def test_a_copied_pair_goes_its_own_way(lib):
    model = lib.mlp()
    optimizer = lib.optimizer(model, clip=1e-2)
    lib.train(model, optimizer, lib.batches(3))
    other, twin = copy.deepcopy((model, optimizer))
    more = lib.batches(4, first=9)
    after = lib.train(other, twin, more)
    assert twin.diagnostics()["steps"] == 7
    assert optimizer.diagnostics()["steps"] == 3
    assert (lib.train(model, optimizer, more) == after).all()


def test_a_copied_model_does_not_feed_the_optimizer(lib):
    def run(copied):
        model = lib.mlp()
        optimizer = lib.optimizer(model)
        for x, y in lib.batches(3):
            optimizer.zero_grad()
            if copied:
                backward(copy.deepcopy(model), x * 10, y)
            backward(model, x, y)
            optimizer.step()
        return lib.weights(model)

    assert (run(True) == run(False)).all()


def test_a_weight_average_of_a_hooked_model_works(lib):
    model = lib.mlp()
    optimizer = lib.optimizer(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    lib.train(model, optimizer, lib.batches(2))
    average.update_parameters(model)
    assert torch.equal(average(lib.data()[0]), model(lib.data()[0]))


def test_a_hooked_model_can_be_saved_whole(lib):
    model = lib.mlp()
    optimizer = lib.optimizer(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x, y = lib.data()
    assert torch.equal(again(x), model(x))
    backward(again, x, y)
    assert not optimizer.engine._statistics


def test_an_optimizer_with_hooks_says_how_to_save_it(lib):
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(lib.optimizer(lib.mlp()))


def test_removed_hooks_leave_the_model_as_it_was(lib):
    model = lib.mlp()
    optimizer = lib.optimizer(model)
    assert any(m._forward_hooks for m in model)
    optimizer.remove_hooks()
    assert not any(m._forward_hooks for m in model)
    backward(model, *lib.data())
    assert not optimizer.engine._statistics


def test_a_collected_optimizer_watches_no_more(lib):
    model = lib.mlp()
    optimizer = lib.optimizer(model)
    hook = next(iter(model[0]._forward_hooks.values()))
    assert hook.capture() is not None
    del optimizer
    gc.collect()
    assert hook.capture() is None
    backward(model, *lib.data())


def test_two_optimizers_of_one_model_each_see_their_part(lib):
    model = lib.mlp()
    first = lib.optimizer(model, params=model[0].parameters())
    second = lib.optimizer(model, params=[*model[2].parameters(), *model[4].parameters()])
    start = lib.weights(model)
    backward(model, *lib.data())
    first.step()
    second.step()
    other = lib.mlp()
    whole = lib.optimizer(other)
    backward(other, *lib.data())
    whole.step()
    # the first has no output layer of the loss, but as many rows
    assert lib.gap(lib.weights(model) - start, lib.weights(other) - start) < 1e-12
