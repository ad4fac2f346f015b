"""The mean activation for curvature, with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kfcore
from kfcore_cli.race.interfaces import Settings
from kfcore_cli.race.methods.kfac import KFAC


class MAC(KFAC):
    """MAC; every setting that is not of the step rule goes to :class:`kfcore.MAC`."""

    title = "MAC"
    default: Mapping[str, Any] = {"lr": 0.1, "momentum": 0.9, "damping": 1.0}
    # on seed 0, by end loss: digits lr .1 to 1, damping .1 to 3; the others lr .03 to .3, damping .3 to 3
    settings: Mapping[str, Settings] = {
        "digits": {"lr": 1.0, "momentum": 0.9, "damping": 3.0},
        "mnist-conv": {"lr": 0.3, "momentum": 0.9, "damping": 0.3},
        "shakespeare": {"lr": 0.03, "momentum": 0.9, "damping": 0.3},
    }
    curvature = kfcore.MAC


method = MAC()
