"""Read a checkpoint, and show the spectra of its factors as a table and a picture."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kfcore import CheckpointError
from kfcore.checkpoint import read
from kfcore.diagnostics import spectrum as numbers_of
from kfcore_cli.errors import UsageError, missing

MEANS = {"mac": ("A",), "smac": ("A",), "eva": ("A", "G")}
"""Factors of rank one by method, of which the vector is kept."""


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of what one block keeps, in descending order; those of stacked blocks behind one another."""

    block: str
    method: str
    part: str
    """``"A"`` and ``"G"``, the factors of inputs and output gradients, ``"S"``, the scales, or ``"h"``, a diagonal."""
    values: np.ndarray


def spectrum(path: Path, out: Path, console: Console) -> list[Spectrum]:
    """Print a line for every factor of every block in the checkpoint at ``path``, and draw them to ``out``."""
    if importlib.util.find_spec("matplotlib") is None:
        raise missing("the picture of spectra", "matplotlib", "pip install 'kfcore[cli]'")
    try:
        arrays, header = read(path)
        found = spectra(arrays, header)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    console.print(f"{path.name}: {len(header['blocks'])} blocks after {header['steps']:,} steps", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("block", "method", "of"):
        table.add_column(name)
    for name in ("size", "largest", "mean", "effective rank", "below 1e-6 of the largest"):
        table.add_column(name, justify="right")
    for one in found:
        numbers = numbers_of(one.values)
        small = int((one.values <= 1e-6 * numbers["eigenvalue_max"]).sum())
        table.add_row(
            one.block,
            one.method,
            one.part,
            f"{one.values.size:,}",
            f"{numbers['eigenvalue_max']:.2e}",
            f"{numbers['eigenvalue_mean']:.2e}",
            f"{numbers['effective_rank']:.1f}",
            f"{small:,}",
        )
    console.print(table)
    from kfcore_cli.spectrum.picture import draw

    out.parent.mkdir(parents=True, exist_ok=True)
    draw(out, path.name, found)
    console.print(f"[dim]{out}[/]", highlight=False, soft_wrap=True)
    return found


def spectra(arrays: dict[str, np.ndarray], header: Any) -> list[Spectrum]:
    """The spectra of all that is in a checkpoint."""
    try:
        blocks = {name: str(block["method"]) for name, block in header["blocks"].items()}
        int(header["steps"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"`path` has a damaged kfcore header: {error!r}") from error
    found = []
    for block, method in blocks.items():
        for part, key in (("A", "average/values/0"), ("G", "average/values/1"), ("S", "scales/values/0")):
            x = arrays.get(f"curvature/{block}/{key}")
            if x is None or not x.size:
                continue
            if part in MEANS.get(method, ()):
                x = np.sum(x.astype(np.float64) ** 2, axis=-1)
            of_factor = part != "S" and method != "diagonal" and x.ndim > 1 and x.shape[-1] == x.shape[-2]
            values = np.linalg.eigvalsh(x.astype(np.float64)) if of_factor else x.astype(np.float64)
            label = "h" if method == "diagonal" else part
            found.append(Spectrum(block, method, label, np.sort(np.maximum(values, 0.0), axis=None)[::-1]))
    return found
