"""NumPy, with the backward pass written by hand."""

from __future__ import annotations

import array_api_compat.numpy as xp

from kfcore_cli.race.arrays import ArrayContender
from kfcore_cli.race.interfaces import Weights
from kfcore_cli.race.network import Network
from kfcore_cli.race.rules import Rule


class NumPy:
    """Needs nothing but NumPy."""

    packages = ("numpy",)

    def contender(self, network: Network, weights: Weights, rule: Rule, dtype: str) -> ArrayContender:
        """A network of plain arrays."""
        return ArrayContender(xp, network, weights, rule, dtype)


backend = NumPy()
