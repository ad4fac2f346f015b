"""What the benchmarks share: arms that take turns in one process, and their times as medians and ratios to the first."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BLOCK = 10
"""Steps timed at a time: as many as there are between two refreshes, so that every block holds one."""


def options(description: str | None, **more: str | bool) -> argparse.Namespace:
    """The command line; ``more`` are further options and their defaults, ``False`` for one without a value."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    for name, default in more.items():
        parser.add_argument(f"--{name}", default=default, action="store_true" if default is False else "store")
    return parser.parse_args()


def write(out: Path | None, result: Mapping[str, Any]) -> None:
    """The figures as JSON, if wanted."""
    if out:
        out.write_text(json.dumps(result, indent=2))


def measure(
    arms: Mapping[str, Callable[[], None]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Milliseconds a step and ratios to the first arm, taken within a repetition, as medians with quartiles."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repetitions):
        for name, step in arms.items():
            times[name].append(_block(step, clock))
    first = next(iter(times.values()))
    rows = {}
    for name, own in times.items():
        low, middle, high = statistics.quantiles([mine / base for mine, base in zip(own, first, strict=True)], n=4)
        rows[name] = {"ms": statistics.median(own), "ratio": middle, "ratio_q1": low, "ratio_q3": high}
    return rows


def line(name: str, row: Mapping[str, float]) -> str:
    """A row of :func:`measure` for the eye."""
    return f"  {name:22}{row['ms']:9.2f} ms  {row['ratio']:5.2f} x  ({row['ratio_q1']:.2f}...{row['ratio_q3']:.2f})"


def state(row: Mapping[str, float]) -> str:
    """Bytes of the state, where a row has them."""
    return f"  state {row['state_bytes']:,} bytes, reported {row['reported_bytes']:,}"


def _block(step: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(BLOCK):
        step()
    return (clock() - start) / BLOCK * 1e3
