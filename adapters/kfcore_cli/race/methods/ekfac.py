"""Eigenvalue-corrected Kronecker-factored curvature with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kfcore
from kfcore_cli.race.methods.kfac import KFAC


class EKFAC(KFAC):
    """EK-FAC with the empirical Fisher; every setting that is not of the step rule goes to :class:`kfcore.EKFAC`."""

    title = "EK-FAC"
    default: Mapping[str, Any] = {"lr": 0.1, "momentum": 0.9, "clip": 1e-2, "damping": 1e-3}
    curvature = kfcore.EKFAC


method = EKFAC()
