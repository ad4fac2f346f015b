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
    # on seed 0, by end loss: lr .1 to 1, damping .003 to .3, clip .001 and .01; shakespeare lr .1, .3, damping .03, .3, clip .001
    settings: Mapping[str, Settings] = {
        "digits": {"lr": 1.0, "momentum": 0.9, "clip": 1e-3, "damping": 0.03},
        "mnist-conv": {"lr": 0.1, "momentum": 0.9, "clip": 1e-2, "damping": 0.3},
        "shakespeare": {"lr": 0.1, "momentum": 0.9, "clip": 1e-3, "damping": 0.03},
    }
    curvature = kfcore.Eva


method = Eva()
