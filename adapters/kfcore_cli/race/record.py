"""The numbers of a race as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kfcore
from kfcore_cli.race.interfaces import Backend, Problem
from kfcore_cli.race.options import Options

if TYPE_CHECKING:
    from kfcore_cli.race.command import Entry


def write_record(
    path: Path, options: Options, problem: Problem, steps: int | None, backends: Mapping[str, Backend], entries: Sequence[Entry]
) -> None:
    """Write everything that went in and came out; what is not finite becomes ``null``."""
    record = {
        "problem": {
            "name": options.problem,
            "data": problem.title,
            "loss": problem.network.loss.kind,
            "metric": problem.metric,
            "target": problem.target,
            "batch_size": problem.batch_size,
        },
        "options": {
            "methods": options.methods,
            "backends": options.backends,
            "seconds": options.seconds,
            "steps": steps,
            "dtype": options.dtype,
            "seed": options.seed,
        },
        "versions": versions(backends),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpu_count": os.cpu_count()},
        "contenders": [_contender(problem, entry) for entry in entries],
    }
    path.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def versions(backends: Mapping[str, Backend]) -> dict[str, str]:
    """Versions of Python, kfcore, NumPy and the packages of the backends."""
    packages = [package for backend in backends.values() for package in backend.packages if package != "numpy"]
    return {"python": platform.python_version(), "kfcore": kfcore.__version__, "numpy": np.__version__} | {p: version(p) for p in packages}


def _contender(problem: Problem, entry: Entry) -> dict[str, Any]:
    result = entry.result
    reached = result.reached(problem.target)
    return {
        "method": entry.method,
        "backend": entry.backend,
        "settings": dict(entry.settings),
        "train_loss": result.losses[-1],
        "score": result.scores[-1],
        "seconds_to_target": reached[0] if reached else None,
        "steps_to_target": reached[1] if reached else None,
        "median_ms_per_step": float(np.median(result.milliseconds)),
        "state_bytes": result.state_bytes,
        "deviation": entry.deviation,
        "deviation_after": result.compared[0] if entry.deviation is not None and result.compared else None,
        "final_deviation": entry.final_deviation,
        "curve": {"steps": result.steps, "seconds": result.seconds, "train_loss": result.losses, "score": result.scores},
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | None) else repr(value)
