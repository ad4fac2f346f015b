"""The hand-written networks: gradients, losses, initial weights."""

import array_api_compat.numpy as xp
import numpy as np
import pytest

from kfcore_cli.race.layers import Activation, Convolution, Dense, Reshape
from kfcore_cli.race.losses import Loss
from kfcore_cli.race.network import Network, mlp


def _targets(rng, loss, n):
    return {
        "cross-entropy": rng.integers(0, 3, n),
        "squared error": rng.normal(size=(n, 3)),
        "binary cross-entropy": rng.uniform(size=(n, 3)),
    }[loss]


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
@pytest.mark.parametrize("loss", ["cross-entropy", "squared error", "binary cross-entropy"])
def test_gradients_are_those_of_central_differences(activation, loss):
    network = mlp((4, 5, 6, 3), activation, loss, linear=(2,))
    rng = np.random.default_rng(1)
    weights = {n: {r: w + 0.1 * rng.normal(size=w.shape) for r, w in own.items()} for n, own in network.init(0).items()}
    x, y = rng.normal(size=(7, 4)), _targets(rng, loss, 7)

    def value(at):
        return float(network.loss.value(xp, network.forward(xp, at, x)[-1], y))

    grads = network.gradients(xp, weights, x, y)
    assert list(grads) == ["fc1", "fc2", "fc3"]
    for name, own in weights.items():
        for role, w in own.items():
            direction = rng.normal(size=w.shape)
            shifted = [weights | {name: own | {role: w + h * direction}} for h in (1e-5, -1e-5)]
            numeric = (value(shifted[0]) - value(shifted[1])) / 2e-5
            assert float(np.sum(grads[name][role] * direction)) == pytest.approx(numeric, rel=1e-6, abs=1e-9)


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
    weights = {n: {r: w + 0.1 * rng.normal(size=w.shape) for r, w in own.items()} for n, own in network.init(0).items()}
    x, y = rng.normal(size=(5, 72)), rng.integers(0, 3, 5)
    grads = network.gradients(xp, weights, x, y)
    for name, own in weights.items():
        for role, w in own.items():
            direction = rng.normal(size=w.shape)
            shifted = [weights | {name: own | {role: w + h * direction}} for h in (1e-5, -1e-5)]
            values = [float(network.loss.value(xp, network.forward(xp, at, x)[-1], y)) for at in shifted]
            assert float(np.sum(grads[name][role] * direction)) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-9)


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
