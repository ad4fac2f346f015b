"""The hand-written networks: gradients, losses, initial weights."""

import math

import array_api_compat.numpy as xp
import numpy as np
import pytest

from kfcore_cli.race.layers import Activation, Convolution, Dense, Reshape
from kfcore_cli.race.losses import Loss
from kfcore_cli.race.network import Network, mlp, residual
from kfcore_cli.race.transformer import GELU, Embedding, LayerNorm, transformer


def _targets(rng, loss, n):
    return {
        "cross-entropy": rng.integers(0, 3, n),
        "squared error": rng.normal(size=(n, 3)),
        "binary cross-entropy": rng.uniform(size=(n, 3)),
    }[loss]


def _moved(network, rng):
    """Initial weights away from the zeros and ones that some begin with."""
    return {n: {r: w + 0.1 * rng.normal(size=w.shape) for r, w in own.items()} for n, own in network.init(0).items()}


def _check_gradients(network, weights, x, y, rng):
    """Compare gradients with central differences along a direction for each weight."""

    def value(at):
        return float(network.loss.value(xp, network.forward(xp, at, x)[-1], y))

    grads = network.gradients(xp, weights, x, y)
    assert list(grads) == list(weights)
    for name, own in weights.items():
        for role, w in own.items():
            direction = rng.normal(size=w.shape)
            shifted = [weights | {name: own | {role: w + h * direction}} for h in (1e-5, -1e-5)]
            numeric = (value(shifted[0]) - value(shifted[1])) / 2e-5
            assert float(np.sum(grads[name][role] * direction)) == pytest.approx(numeric, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
@pytest.mark.parametrize("loss", ["cross-entropy", "squared error", "binary cross-entropy"])
def test_gradients_are_those_of_central_differences(activation, loss):
    network = mlp((4, 5, 6, 3), activation, loss, linear=(2,))
    rng = np.random.default_rng(1)
    weights = _moved(network, rng)
    _check_gradients(network, weights, rng.normal(size=(7, 4)), _targets(rng, loss, 7), rng)


def _conv_net():
    layers = (
        Reshape((1, 9, 8)),
        Convolution("conv1", 1, 3, 5, stride=2, padding=2),
        Activation("tanh"),
        Convolution("conv2", 3, 4, 3, stride=3, padding=1),
        Reshape((16,)),
        Dense("fc", 16, 3),
    )
    return Network(layers, Loss("cross-entropy"))


def test_gradients_of_convolutions_are_those_of_central_differences():
    """Strides that leave a rest, paddings, and a spatial size that is not square."""
    network = _conv_net()
    rng = np.random.default_rng(1)
    weights = _moved(network, rng)
    _check_gradients(network, weights, rng.normal(size=(5, 72)), rng.integers(0, 3, 5), rng)


def _tokens(rng, *shape):
    return rng.integers(0, 5, shape), rng.integers(0, 5, shape)


def test_gradients_of_a_transformer_are_those_of_central_differences():
    network = transformer(num=5, places=4, width=6, heads=2, blocks=2)
    assert network.init(0)["up2"]["weight"].shape == (24, 6)
    rng = np.random.default_rng(1)
    weights = _moved(network, rng)
    _check_gradients(network, weights, *_tokens(rng, 3, 4), rng)


def test_branches_may_begin_together():
    inner = residual(Dense("fc1", 4, 4), Activation("tanh"))
    network = Network((Dense("fc0", 4, 4), *residual(*inner, Dense("fc2", 4, 4)), Dense("fc3", 4, 3)), Loss("cross-entropy"))
    rng = np.random.default_rng(1)
    weights, x = _moved(network, rng), rng.normal(size=(7, 4))
    start = x @ weights["fc0"]["weight"].T + weights["fc0"]["bias"]
    h = start + np.tanh(start @ weights["fc1"]["weight"].T + weights["fc1"]["bias"])
    h = start + h @ weights["fc2"]["weight"].T + weights["fc2"]["bias"]
    np.testing.assert_allclose(network.forward(xp, weights, x)[-2], h, rtol=1e-14)
    _check_gradients(network, weights, x, rng.integers(0, 3, 7), rng)


def test_a_transformer_looks_at_no_later_token():
    network, rng = transformer(num=5, places=4, width=6, heads=2, blocks=2), np.random.default_rng(2)
    weights, (x, _) = _moved(network, rng), _tokens(rng, 3, 4)
    later = x.copy()
    later[:, 2] = (later[:, 2] + 1) % 5
    before, after = (network.outputs(xp, weights, ids) for ids in (x, later))
    assert np.array_equal(before[:, :2], after[:, :2])
    assert np.all(np.abs(before[:, 2:] - after[:, 2:]).max(axis=-1) > 1e-3)


def test_gelu_is_the_exact_one():
    x = np.linspace(-5.0, 5.0, 41)
    exact = [0.5 * v * math.erfc(-v / math.sqrt(2.0)) for v in x]
    np.testing.assert_allclose(GELU().forward(xp, {}, x), exact, rtol=1e-9, atol=1e-16)


def test_what_a_normalisation_and_a_table_have_captured_makes_their_gradients():
    rng = np.random.default_rng(3)
    norm, table = LayerNorm("norm", 6), Embedding("tokens", 5, 6)
    x, dy, own = rng.normal(size=(3, 4, 6)), rng.normal(size=(3, 4, 6)), {"weight": rng.normal(size=6), "bias": rng.normal(size=6)}
    assert norm.curvature().capture(norm.captured(xp, x), dy)[0].shape == (3, 4, 6)
    np.testing.assert_allclose(np.sum(norm.captured(xp, x) * dy, axis=(0, 1)), norm.backward(xp, own, x, None, dy)[1]["weight"], rtol=1e-12)
    ids = rng.integers(0, 5, (3, 4))
    rows = table.curvature().input_rows(xp, ids, np.float64)
    np.testing.assert_allclose(rows.T @ dy.reshape(-1, 6), table.backward(xp, {}, ids, None, dy)[1]["weight"], rtol=1e-12)


def test_a_transformer_needs_nothing_beyond_the_array_api_but_its_gelu():
    strict = pytest.importorskip("array_api_strict")
    layers = tuple(Activation("tanh") if isinstance(x, GELU) else x for x in transformer(5, 4, 6, 2, 1).layers)
    network, rng = Network(layers, Loss("cross-entropy")), np.random.default_rng(4)
    weights, (x, y) = _moved(network, rng), _tokens(rng, 3, 4)
    arrays = {name: {role: strict.asarray(w) for role, w in own.items()} for name, own in weights.items()}
    found = network.gradients(strict, arrays, strict.asarray(x), strict.asarray(y))
    for name, own in network.gradients(xp, weights, x, y).items():
        for role, expected in own.items():
            np.testing.assert_allclose(np.asarray(found[name][role]), expected, rtol=1e-10, atol=1e-14)


def test_outputs_in_parts_are_those_of_the_whole():
    network, rng = mlp((4, 5, 3), "tanh", "squared error"), np.random.default_rng(0)
    weights, x = network.init(0), rng.normal(size=(7, 4))
    np.testing.assert_allclose(network.outputs(xp, weights, x, rows=3), network.forward(xp, weights, x)[-1], rtol=1e-14)


def test_inputs_are_only_read():
    network = mlp((4, 5, 3), "tanh", "cross-entropy")
    weights, rng = network.init(0), np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)), rng.integers(0, 3, 6)
    for array in (x, y, *(w for own in weights.values() for w in own.values())):
        array.flags.writeable = False
    network.gradients(xp, weights, x, y)


def test_observed_are_the_inputs_and_output_gradients_of_every_dense_layer():
    network = mlp((4, 5, 3), "tanh", "squared error")
    weights, rng = network.init(0), np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
    seen = {}
    grads = network.gradients(xp, weights, x, y, lambda name, a, g: seen.update({name: (a, g)}))
    assert set(seen) == {"fc1", "fc2"}
    for name, (a, g) in seen.items():
        np.testing.assert_allclose(g.T @ a, grads[name]["weight"], rtol=1e-12, atol=1e-15)


def test_losses_stay_finite_for_large_outputs():
    z = np.array([[800.0, -800.0], [-800.0, 800.0]])
    for kind, y in (("cross-entropy", np.array([0, 1])), ("binary cross-entropy", np.array([[1.0, 0.0], [0.0, 1.0]]))):
        assert float(Loss(kind).value(xp, z, y)) == 0.0
        assert np.all(np.abs(Loss(kind).gradient(xp, z, y)) < 1e-15)


def test_terms_count_labels_or_numbers():
    z = np.zeros((5, 3))
    assert Loss("cross-entropy").terms(z) == 5
    assert Loss("squared error").terms(z) == 15
    assert Loss("binary cross-entropy").terms(z) == 15


def test_mlp_has_no_activation_at_its_end_nor_where_told():
    network = mlp((4, 5, 6, 3), "tanh", "squared error", linear=(2,))
    assert network.layers == (Dense("fc1", 4, 5), Activation("tanh"), Dense("fc2", 5, 6), Dense("fc3", 6, 3))
    assert isinstance(network, Network)


def test_initial_weights_follow_the_seed():
    network = mlp((4, 5, 3), "tanh", "squared error")
    first, again, other = network.init(0), network.init(0), network.init(1)
    assert np.array_equal(first["fc1"]["weight"], again["fc1"]["weight"])
    assert not np.array_equal(first["fc1"]["weight"], other["fc1"]["weight"])
