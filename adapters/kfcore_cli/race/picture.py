"""The picture of a race: loss against seconds and against steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kfcore_cli.race.interfaces import Problem

if TYPE_CHECKING:
    from kfcore_cli.race.command import Entry

# Okabe and Ito's colours, told apart by colour-blind readers
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#000000")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.2)), "-.")


def draw(path: Path, problem: Problem, entries: Sequence[Entry]) -> None:
    """Write a PNG with two panels: a colour a method, a line style a backend."""
    figure = Figure(figsize=(10.5, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    methods = list(dict.fromkeys(entry.method for entry in entries))
    backends = list(dict.fromkeys(entry.backend for entry in entries))
    for entry in entries:
        result = entry.result
        # a diverged curve leaves the picture at its top, and must not flatten the others
        ceiling = 30.0 * result.losses[0]
        losses = np.where(np.isfinite(result.losses), np.minimum(result.losses, ceiling), np.nan)
        style = {
            "color": COLOURS[methods.index(entry.method) % len(COLOURS)],
            "linestyle": DASHES[backends.index(entry.backend) % len(DASHES)],
            "linewidth": 1.8,
            "label": entry.title if len(backends) == 1 else f"{entry.title}, {entry.backend}",
        }
        axes[0].plot(result.seconds, losses, **style)
        axes[1].plot(result.steps, losses, **style)
    for axis, label in zip(axes, ("seconds of training", "steps"), strict=True):
        axis.set(yscale="log", xlabel=label)
        axis.axhline(problem.target, color="0.45", linewidth=0.8, linestyle=":")
        axis.grid(True, color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0.0)
    axes[0].set_ylabel(f"training loss ({problem.network.loss.kind})")
    axes[0].annotate(
        f"target {problem.target:g}",
        (1.0, problem.target),
        xycoords=("axes fraction", "data"),
        color="0.35",
        fontsize=8,
        ha="right",
        va="bottom",
    )
    axes[1].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"{problem.title}, {sum(w.size for own in problem.network.init(0).values() for w in own.values()):,} weights", fontsize=11
    )
    figure.savefig(path)
