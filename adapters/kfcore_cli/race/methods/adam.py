"""Adam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfcore_cli.race import rules
from kfcore_cli.race.interfaces import Settings


class Adam:
    """The usual decay rates, 0.9 and 0.999."""

    title = "Adam"
    default: Mapping[str, Any] = {"lr": 1e-3}
    settings: Mapping[str, Settings] = {}

    def rule(self, settings: Settings) -> rules.Adam:
        """With the problem's learning rate."""
        return rules.Adam(**settings)


method = Adam()
