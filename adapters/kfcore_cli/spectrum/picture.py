"""The picture of spectra: one panel a block, eigenvalues against their rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kfcore_cli.race.picture import COLOURS

if TYPE_CHECKING:
    from kfcore_cli.spectrum.command import Spectrum

FLOOR = 1e-12
"""Eigenvalues below this share of the largest are drawn there."""


def draw(path: Path, title: str, spectra: Sequence[Spectrum]) -> None:
    """Write a PNG; each spectrum relative to its largest value."""
    blocks = list(dict.fromkeys(one.block for one in spectra))
    columns = min(4, max(1, math.ceil(math.sqrt(len(blocks)))))
    rows = math.ceil(len(blocks) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    parts = list(dict.fromkeys(one.part for one in spectra))
    for axis, block in zip(grid.flat, blocks, strict=False):
        for one in spectra:
            if one.block == block:
                top = float(one.values[0])
                shown = np.maximum(one.values / top, FLOOR) if top > 0 else np.full_like(one.values, FLOOR)
                place = np.arange(1, shown.size + 1) / shown.size
                axis.plot(place, shown, color=COLOURS[parts.index(one.part) % len(COLOURS)], linewidth=1.6, label=one.part)
        axis.set(yscale="log", xlim=(0.0, 1.0))
        axis.set_title(block, fontsize=9)
        axis.grid(True, color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    for axis in list(grid.flat)[len(blocks) :]:
        axis.set_visible(False)
    figure.supxlabel("rank, as a share of all", fontsize=9)
    figure.supylabel("eigenvalue over the largest", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
