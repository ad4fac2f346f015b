"""Nets for which the Kronecker block is the exact one: the library against the definition of the curvature."""

import numpy as np
import pytest

BIASES = [None, "joint", "separate"]
ERRORS = ["inputs", "vectors", "terms"]
RTOL = 1e-10


def weight_block(block):
    return block[".weight"] if ".weight" in block else block[""]


def test_the_reference_pulls_back_gradients(ref, rng):
    net = ref.Net.random(rng, (3, 4, 4, 2), bias=True, activation="tanh", pools={1: "mean"})
    x, v = rng.normal(size=(2, 3, 3)), rng.normal(size=(2, 1, 2))
    _, trace = net.forward(x)
    gradient = sum(ref.example_gradients(trace[0][0], net.pull(trace, v)[0]))
    finite = np.zeros(net.weights[0].size)
    for k in range(finite.size):
        for sign in (1, -1):
            moved = net.weights[0].copy()
            moved.flat[k] += sign * 1e-5
            f, _ = ref.Net([moved, *net.weights[1:]], net.biases, net.activation, net.pools).forward(x)
            finite[k] += sign * (f * v).sum() / 2e-5
    assert ref.distance(gradient, finite) < 1e-8


@pytest.mark.parametrize("path", ["method", "optimizer", "model"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("positions", [1, 5])
def test_deep_linear_net_with_squared_error_has_kfac_blocks(ref, rng, dense_blocks, positions, bias, path):
    net = ref.Net.random(rng, (4, 3, 3, 2), bias=bias is not None)
    x = rng.normal(size=(6, positions, 4))
    blocks = dense_blocks(net, x, "mse", bias=bias, path=path)
    for block, want in zip(blocks, ref.ggn_blocks(net, x, "mse", joint=bias == "joint"), strict=True):
        assert ref.distance(weight_block(block), want) < RTOL


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("error", ERRORS)
def test_one_percent_off_is_seen_in_a_deep_linear_net(ref, rng, dense_blocks, positions, error):
    net = ref.Net.random(rng, (4, 3, 3, 2))
    x = rng.normal(size=(6, positions, 4))
    blocks = dense_blocks(net, x, "mse", error=error)
    assert all(ref.distance(b[""], w) > 1e-3 for b, w in zip(blocks, ref.ggn_blocks(net, x, "mse"), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["mse", "ce", "bce"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_separate_bias_block_is_exact_for_every_net(ref, rng, dense_blocks, sharing, loss, reduction):
    net = ref.Net.random(rng, (3, 4, 3), bias=True, activation="tanh")
    x = rng.normal(size=(5, 4, 3))
    y = ref.targets(rng, loss, net.forward(x)[0])
    joint = ref.empirical_blocks(net, x, loss, y, joint=True)
    blocks = dense_blocks(net, x, loss, y, fisher="empirical", bias="separate", sharing=sharing, path="optimizer", reduction=reduction)
    for weight, block, want in zip(net.weights, blocks, joint, strict=True):
        last = np.arange(weight.shape[0]) * (weight.shape[1] + 1) + weight.shape[1]
        assert ref.distance(block[".bias"], want[np.ix_(last, last)]) < RTOL
        assert ref.distance(block[".bias"] * 1.01, want[np.ix_(last, last)]) > 1e-3


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("loss", ["mse", "ce", "bce"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_one_example_has_exact_ggn_blocks(ref, rng, dense_blocks, activation, loss, bias):
    net = ref.Net.random(rng, (4, 5, 5, 3), bias=bias is not None, activation=activation)
    x = rng.normal(size=(1, 1, 4))
    blocks = dense_blocks(net, x, loss, bias=bias, path="optimizer")
    for block, want in zip(blocks, ref.ggn_blocks(net, x, loss, joint=bias == "joint"), strict=True):
        assert ref.distance(weight_block(block), want) < RTOL


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("loss", ["mse", "ce", "bce"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_one_example_has_exact_empirical_fisher_blocks(ref, rng, dense_blocks, activation, loss, bias, reduction):
    net = ref.Net.random(rng, (4, 5, 5, 3), bias=bias is not None, activation=activation)
    x = rng.normal(size=(1, 1, 4))
    y = ref.targets(rng, loss, net.forward(x)[0])
    blocks = dense_blocks(net, x, loss, y, fisher="empirical", bias=bias, path="optimizer", reduction=reduction)
    for block, want in zip(blocks, ref.empirical_blocks(net, x, loss, y, joint=bias == "joint"), strict=True):
        assert ref.distance(weight_block(block), want) < RTOL


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_one_percent_off_is_seen_with_one_example(ref, rng, dense_blocks, fisher, error):
    net = ref.Net.random(rng, (4, 5, 3), activation="tanh")
    x = rng.normal(size=(1, 1, 4))
    y = ref.targets(rng, "ce", net.forward(x)[0])
    want = ref.ggn_blocks(net, x, "ce") if fisher == "exact" else ref.empirical_blocks(net, x, "ce", y)
    blocks = dense_blocks(net, x, "ce", y, fisher=fisher, error=error)
    assert all(ref.distance(b[""], w) > 1e-3 for b, w in zip(blocks, want, strict=True))


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_several_examples_of_a_nonlinear_net_do_not_have_kfac_blocks(ref, rng, dense_blocks, loss):
    net = ref.Net.random(rng, (4, 5, 3), activation="tanh")
    x = rng.normal(size=(6, 1, 4))
    assert ref.distance(dense_blocks(net, x, loss)[0][""], ref.ggn_blocks(net, x, loss)[0]) > 1e-3


@pytest.mark.parametrize("pool", ["sum", "mean"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("depth", [1, 3])
def test_reduce_is_exact_where_positions_are_pooled_at_the_end(ref, rng, dense_blocks, depth, bias, pool):
    sizes = (4, 3, 3, 2)[-depth - 1 :]
    net = ref.Net.random(rng, sizes, bias=bias is not None, pools={depth - 1: pool})
    x = rng.normal(size=(6, 5, sizes[0]))
    wants = ref.ggn_blocks(net, x, "mse", joint=bias == "joint")
    for path in ("method", "optimizer"):
        reduced = dense_blocks(net, x, "mse", bias=bias, sharing="reduce", path=path)
        assert all(ref.distance(weight_block(b), w) < RTOL for b, w in zip(reduced, wants, strict=True))
    expanded = dense_blocks(net, x, "mse", bias=bias)
    assert all(ref.distance(weight_block(b), w) > 1e-3 for b, w in zip(expanded, wants, strict=True))
    off = dense_blocks(net, x, "mse", bias=bias, sharing="reduce", error="vectors")
    assert all(ref.distance(weight_block(b), w) > 1e-3 for b, w in zip(off, wants, strict=True))


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_pooling_in_the_middle_needs_reduce_before_it_and_neither_after(ref, rng, dense_blocks, pool):
    net = ref.Net.random(rng, (4, 3, 3, 3, 2), pools={1: pool})
    x = rng.normal(size=(6, 5, 4))
    wants = ref.ggn_blocks(net, x, "mse")
    expanded, reduced = (dense_blocks(net, x, "mse", sharing=s) for s in ("expand", "reduce"))
    assert all(ref.distance(b[""], w) < RTOL for b, w in zip(reduced, wants, strict=True))
    assert [ref.distance(b[""], w) < RTOL for b, w in zip(expanded, wants, strict=True)] == [False, False, True, True]


def test_positions_kept_to_the_loss_need_expand(ref, rng, dense_blocks):
    net = ref.Net.random(rng, (4, 3, 2))
    x = rng.normal(size=(6, 5, 4))
    wants = ref.ggn_blocks(net, x, "mse")
    assert all(ref.distance(b[""], w) > 1e-2 for b, w in zip(dense_blocks(net, x, "mse", sharing="reduce"), wants, strict=True))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_equal_inputs_have_kfac_blocks(ref, rng, dense_blocks, activation, fisher):
    net = ref.Net.random(rng, (4, 5, 3), activation=activation)
    x = np.broadcast_to(rng.normal(size=(1, 1, 4)), (6, 1, 4))
    y = ref.targets(rng, "mse", net.forward(x)[0])
    want = ref.ggn_blocks(net, x, "mse") if fisher == "exact" else ref.empirical_blocks(net, x, "mse", y)
    assert all(
        ref.distance(b[""], w) < RTOL for b, w in zip(dense_blocks(net, x, "mse", y, fisher=fisher, path="optimizer"), want, strict=True)
    )
    moved = x.copy()
    moved[0] *= 1.01
    assert all(ref.distance(b[""], w) > 1e-4 for b, w in zip(dense_blocks(net, moved, "mse", y, fisher=fisher), want, strict=True))
