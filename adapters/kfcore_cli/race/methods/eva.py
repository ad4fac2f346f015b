"""Means on both sides for curvature, with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kfcore
from kfcore_cli.race.interfaces import Settings
from kfcore_cli.race.methods.kfac import KFAC


class Eva(KFAC):
    """Eva; every setting that is not of the step rule goes to :class:`kfcore.Eva`."""

    title = "Eva"
    default: Mapping[str, Any] = {"lr": 0.1, "momentum": 0.9, "clip": 1e-3, "damping": 0.03}
    settings: Mapping[str, Settings] = {}
    curvature = kfcore.Eva


method = Eva()
