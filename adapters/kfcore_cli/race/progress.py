"""Live bars, one a contender."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from kfcore_cli.race.course import Watch


class Board:
    """A context in which every contender, known by method title and backend, has a bar with its steps, loss and seconds."""

    def __init__(self, console: Console, contenders: Sequence[tuple[str, str]]) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[method]}", style="bold"),
            TextColumn("{task.fields[backend]}", style="cyan"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[steps]}", justify="right"),
            TextColumn("{task.fields[loss]}", justify="right"),
            TextColumn("{task.fields[seconds]}", justify="right"),
            console=console,
            # redrawn only from `watch`, between timed steps: a drawing thread would take time from the contenders
            auto_refresh=False,
        )
        self._tasks = {
            (method, backend): self._progress.add_task("", total=1.0, method=method, backend=backend, steps="", loss="", seconds="")
            for method, backend in contenders
        }

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def watch(self, method: str, backend: str) -> Watch:
        """The function that moves this contender's bar."""
        task = self._tasks[method, backend]

        def move(fraction: float, steps: int, loss: float, seconds: float) -> None:
            shown = f"loss {loss:.2e}" if math.isfinite(loss) else "diverged"
            self._progress.update(task, completed=fraction, steps=f"{steps:,} steps", loss=shown, seconds=f"{seconds:.1f} s", refresh=True)

        return move
