"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfcore_cli.race import rules
from kfcore_cli.race.interfaces import Settings


class SGD:
    """With momentum 0.9."""

    title = "SGD"
    default: Mapping[str, Any] = {"lr": 0.1, "momentum": 0.9}
    settings: Mapping[str, Settings] = {}

    def rule(self, settings: Settings) -> rules.SGD:
        """With the problem's learning rate."""
        return rules.SGD(**settings)


method = SGD()
