"""Kronecker-factored curvature with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kfcore
from kfcore_cli.race import rules
from kfcore_cli.race.interfaces import Settings


class KFAC:
    """K-FAC with the empirical Fisher; every setting that is not of the step rule goes to :class:`kfcore.KFAC`."""

    title = "K-FAC"
    default: Mapping[str, Any] = {"lr": 0.1, "momentum": 0.9, "clip": 1e-2, "damping": 1e-2}
    settings: Mapping[str, Settings] = {}
    curvature: type[kfcore.Method] = kfcore.KFAC

    def rule(self, settings: Settings) -> rules.Curvature:
        """With the problem's damping, learning rate and clip."""
        step: dict[str, Any] = {name: settings[name] for name in ("lr", "momentum", "clip") if name in settings}
        return rules.Curvature(method=self.curvature(**{name: value for name, value in settings.items() if name not in step}), **step)


method = KFAC()
