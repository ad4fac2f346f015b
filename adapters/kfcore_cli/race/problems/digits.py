"""Handwritten digits of 8 x 8 pixels: 1,797 images that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kfcore_cli.errors import missing
from kfcore_cli.race.data import split, standardised
from kfcore_cli.race.interfaces import Data, Settings
from kfcore_cli.race.network import mlp

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise missing("--problem digits", "scikit-learn", "pip install 'kfcore[cli]'") from error


class Digits:
    """A tanh network 64-128-128-10 learns to name the digit; 360 images are kept for the test."""

    title = "digits 8x8 (scikit-learn)"
    network = mlp((64, 128, 128, 10), "tanh", "cross-entropy")
    batch_size = 128
    steps = 600
    target = 1e-3
    metric = "test accuracy"
    # grid on seed 0, by time to target, near ties by end loss: sgd lr .03 to 1; adam lr .001 to .05; kfac lr .03 to 1, damping .001 to 1
    settings: Mapping[str, Settings] = {
        "sgd": {"lr": 0.5, "momentum": 0.9},
        "adam": {"lr": 2e-2},
        "ekfac": {"lr": 0.1, "momentum": 0.9, "clip": 1e-2, "damping": 0.3},
        "kfac": {"lr": 1.0, "momentum": 0.9, "clip": 3e-4, "damping": 0.03, "stats_every": 5, "refresh_every": 10},
    }

    def load(self) -> Data:
        """Standardised pixels and labels."""
        x, y = load_digits(return_X_y=True)
        return standardised(x, y.astype(np.int64), *split(len(x), 360, y))

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Share of digits named correctly."""
        return float(np.mean(np.argmax(outputs, axis=1) == targets))


problem = Digits()
