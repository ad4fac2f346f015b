"""Fisher types that do not see the labels of the batch: forward-only and drawn from the model; and flattened outputs."""

import numpy as np
import pytest

import kfcore as kf


@pytest.mark.parametrize("bias", [None, "joint"])
@pytest.mark.parametrize("positions", [1, 5])
def test_forward_only_is_half_the_width_times_the_ggn_of_one_linear_layer(ref, rng, positions, bias):
    net = ref.Net.random(rng, (4, 3), bias=bias is not None)
    x = rng.normal(size=(6, positions, 4))
    method, layer = kf.KFAC(fisher="forward"), kf.Linear(4, 3, bias)
    state = method.init(layer, x)
    foof = method.dense(layer, method.observe(state, method.reduce(layer, state, x)))
    (ggn,) = ref.ggn_blocks(net, x, "mse", joint=bias == "joint")
    assert ref.distance(2.0 / 3.0 * foof, ggn) < 1e-10
    wrong = method.dense(layer, method.observe(state, method.reduce(layer, state, 1.01 * x)))
    assert ref.distance(2.0 / 3.0 * wrong, ggn) > 1e-3


@pytest.mark.parametrize("kind", ["exact", "factored", "plain"])
@pytest.mark.parametrize("bias", [True, "separate"])
def test_forward_only_sees_no_output_gradients_and_damps_exactly(ref, rng, captures, fitted, kind, bias):
    x, g = captures(rng)
    layer = kf.Linear(3, 2, bias)
    method = kf.KFAC(damping=kf.Damping(0.01, kind), fisher="forward")
    for part in layer.blocks().values():
        assert method.requires(part) == kf.Needs.INPUTS
        grad = rng.normal(size=part.shape)
        with_g, without = (method.precondition(part, fitted(method, part, x, gradients), grad) for gradients in (g, None))
        state = fitted(method, part, x, None)
        want = np.linalg.solve(method.dense(part, state) + 0.01 * np.eye(grad.size), grad.reshape(-1)).reshape(part.shape)
        assert np.array_equal(with_g, without)
        assert ref.distance(without, want) < 1e-10
        assert ref.distance(method.precondition(part, fitted(method, part, 1.01 * x, None), grad), want) > 1e-4 or part.shape[1] == 1


def many(x, copies):
    return np.concatenate([x] * copies)


@pytest.mark.parametrize("positions", [1, 5])
def test_25_000_drawn_labels_come_near_the_ggn_of_a_deep_linear_net(ref, rng, dense_blocks, drawer, positions):
    net = ref.Net.random(rng, (4, 3, 3, 2))
    x = rng.normal(size=(6, positions, 4))
    blocks = dense_blocks(net, many(x, 500), "mse", fisher="mc", draw=drawer(rng), samples=50, path="optimizer")
    for block, want in zip(blocks, ref.ggn_blocks(net, x, "mse"), strict=True):
        assert ref.distance(block[""], want) < 0.01
        assert ref.distance(1.03 * block[""], want) > 0.01


@pytest.mark.parametrize("path", ["method", "optimizer", "model"])
@pytest.mark.parametrize("loss", ["mse", "ce", "bce"])
def test_25_000_drawn_labels_come_near_the_ggn_of_one_example(ref, rng, dense_blocks, drawer, loss, path):
    net = ref.Net.random(rng, (4, 5, 3), activation="sigmoid")
    x = rng.normal(size=(1, 1, 4))
    blocks = dense_blocks(net, many(x, 1250), loss, fisher="mc", draw=drawer(rng), samples=20, path=path)
    for block, want in zip(blocks, ref.ggn_blocks(net, x, loss), strict=True):
        assert ref.distance(block[""], want) < 0.03
        assert ref.distance(1.08 * block[""], want) > 0.03


def test_25_000_drawn_labels_come_near_the_ggn_of_a_pooled_net(ref, rng, dense_blocks, drawer):
    net = ref.Net.random(rng, (4, 3, 2), pools={1: "mean"})
    x = rng.normal(size=(6, 5, 4))
    blocks = dense_blocks(net, many(x, 500), "mse", fisher="mc", sharing="reduce", draw=drawer(rng), samples=50)
    for block, want in zip(blocks, ref.ggn_blocks(net, x, "mse"), strict=True):
        assert ref.distance(block[""], want) < 0.01
        assert ref.distance(1.03 * block[""], want) > 0.01


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_outputs_with_four_axes_and_flattened_outputs_have_one_curvature(ref, rng, reduction, fisher):
    x, w = rng.normal(size=(4, 2, 3, 5)), rng.normal(size=(3, 5))
    terms = 4 * 2 * 3.0
    y = rng.integers(0, 3, (4, 2, 3))
    f = x @ w.T

    def curvature(x, f, y, terms):
        optimizer = kf.Optimizer(kf.KFAC(fisher=fisher), {"fc": kf.Linear(5, 3, None)}, loss_reduction=reduction)
        params = {"fc": {"weight": w}}
        scale = 1.0 / terms if reduction == "mean" else 1.0
        if fisher == "exact":
            records = [(x, v) for v in kf.fisher_vectors("exact", kf.CrossEntropy(), f)]
        else:
            records = [(x, scale * ref.output_gradients("ce", f, y))]
        _, state = optimizer.step(params, params, {"fc": records}, optimizer.init(params), terms=terms)
        return optimizer.bind(params).preconditioner.dense(state.curvature)["fc"]

    flat = curvature(x.reshape(24, 5), f.reshape(24, 3), y.reshape(24), terms)
    assert ref.distance(curvature(x, f, y, terms), flat) < 1e-10
    assert ref.distance(curvature(x, 1.01 * f, y, terms), flat) > 1e-4
    assert ref.distance(curvature(x, f, y, 1.01 * terms), flat) > 1e-3
