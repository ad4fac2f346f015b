"""The vocabulary between methods and backends: three kinds of optimizer that every backend can run."""

from __future__ import annotations

from dataclasses import dataclass

import kfcore


@dataclass(frozen=True, kw_only=True)
class SGD:
    """``b' = momentum b + g``, ``w' = w - lr b'``, as ``torch.optim.SGD``."""

    lr: float
    momentum: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Kingma and Ba 2015 with bias correction, as ``torch.optim.Adam``."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Any method of kfcore with its step rule."""

    method: kfcore.Method
    lr: float
    momentum: float = 0.9
    clip: float | None = None


Rule = SGD | Adam | Curvature
