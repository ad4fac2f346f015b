"""The table at the end of a race."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from kfcore_cli.race.course import COMPARED_AFTER
from kfcore_cli.race.interfaces import Problem

if TYPE_CHECKING:
    from kfcore_cli.race.command import Entry


def show_table(console: Console, problem: Problem, entries: Sequence[Entry]) -> None:
    """Print one row a contender, the best of the columns that rank them in bold."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", style="bold", no_wrap=True)
    table.add_column("backend", style="cyan", no_wrap=True)
    compared = min(COMPARED_AFTER, *(entry.result.steps[-1] for entry in entries))
    for heading in (
        "train\nloss",
        problem.metric.replace(" ", "\n"),
        f"time to\n{problem.target:g}",
        "steps\nto it",
        "ms a\nstep",
        "state\nsize",
        f"differ\n@ {compared}",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    reached = [entry.result.reached(problem.target) for entry in entries]
    losses = [entry.result.losses[-1] for entry in entries]
    fastest = min((r[0] for r in reached if r), default=None)
    fewest = min((r[1] for r in reached if r), default=None)
    lowest = min((loss for loss in losses if math.isfinite(loss)), default=None)
    for entry, loss, at in zip(entries, losses, reached, strict=True):
        result = entry.result
        table.add_row(
            entry.title,
            entry.backend,
            _best(f"{loss:.2e}" if math.isfinite(loss) else "diverged", loss == lowest),
            f"{result.scores[-1]:.4f}",
            _best(f"{at[0]:.2f} s", at[0] == fastest) if at else "-",
            _best(f"{at[1]:,.0f}", at[1] == fewest) if at else "-",
            _short(statistics.median(result.milliseconds)),
            readable_bytes(result.state_bytes),
            "-" if entry.deviation is None else f"{entry.deviation:.1e}",
        )
    console.print()
    console.print(table)
    console.print()


def readable_bytes(number: int) -> str:
    """Such as ``"1.30 MB"``."""
    value = float(number)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{_short(value)} {unit}"
        value /= 1000
    return f"{_short(value)} GB"


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _best(text: str, best: bool) -> str:
    return f"[bold green]{text}[/]" if best else text
