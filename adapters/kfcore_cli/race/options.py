"""What one race is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from kfcore_cli.errors import UsageError

DTYPES = ("float64", "float32")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``kfcore race``, checked; neither ``seconds`` nor ``steps`` means as many steps as the problem suggests."""

    problem: str
    methods: tuple[str, ...]
    backends: tuple[str, ...]
    out: Path
    seconds: float | None = None
    steps: int | None = None
    dtype: str = "float64"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seconds is not None and self.steps is not None:
            raise UsageError(
                f"--seconds and --steps exclude each other, got --seconds {self.seconds:g} --steps {self.steps}: give one of the two"
            )
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise UsageError(f"--seconds must be a positive number, got {self.seconds:g}")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"--steps must be 1 or more, got {self.steps}")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.seed < 0:
            raise UsageError(f"--seed must be 0 or more, got {self.seed}")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out must be a folder, got the file {self.out}")
