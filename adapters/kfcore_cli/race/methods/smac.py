"""The mean activation and the mean squared output gradients for curvature, with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kfcore
from kfcore_cli.race.interfaces import Settings
from kfcore_cli.race.methods.kfac import KFAC


class SMAC(KFAC):
    """SMAC; every setting that is not of the step rule goes to :class:`kfcore.SMAC`."""

    title = "SMAC"
    default: Mapping[str, Any] = {"lr": 0.1, "momentum": 0.9, "damping": 1.0}
    settings: Mapping[str, Settings] = {}
    curvature = kfcore.SMAC


method = SMAC()
