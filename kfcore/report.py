"""Which block every parameter has, why, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kfcore.curvature.diagonal import Tensor
from kfcore.model import Model
from kfcore.preconditioner import Block
from kfcore.stepsize import StepSize


@dataclass(frozen=True)
class Row:
    """One parameter."""

    parameter: str
    shape: tuple[int, ...]
    block: str
    """Name of its block; parameters of a joint block share it."""
    kind: str
    """Method of the block: ``"kfac"``, ``"diagonal"``, ..., or ``"none"``."""
    factors: tuple[int, ...]
    """Sizes of the block's factors, ``(out, in)``; empty for a diagonal."""
    reason: str
    bytes: int
    """State of the block, counted at its first parameter, plus this parameter's momentum."""
    refresh_flops: float
    step_flops: float


@dataclass(frozen=True)
class Report:
    """One row a parameter; prints as a table."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, parameter: str) -> Row:
        return {row.parameter: row for row in self.rows}[parameter]

    @property
    def bytes(self) -> int:
        """Size of the whole state."""
        return sum(row.bytes for row in self.rows)

    def fallbacks(self) -> list[Row]:
        """Rows of trained parameters that no layer covers."""
        return [row for row in self.rows if not row.factors and row.kind != "none"]

    def over(self, shapes: Mapping[str, tuple[int, ...]], reason: str) -> Report:
        """The report of a model with the parameters of ``shapes``, in that order; those of no block are there for ``reason``."""
        rows = {row.parameter: row for row in self.rows}
        return Report(tuple(rows.get(p) or Row(p, shape, "-", "none", (), reason, 0, 0.0, 0.0) for p, shape in shapes.items()))

    def __str__(self) -> str:
        head = ("parameter", "shape", "block", "kind", "factors", "bytes", "refresh flops", "step flops", "why")
        lines: list[tuple[str, ...]] = [head]
        for r in self.rows:
            sizes = " x ".join(map(str, r.factors)) or "-"
            flops = (f"{r.refresh_flops:.2g}", f"{r.step_flops:.2g}")
            lines.append((r.parameter, "x".join(map(str, r.shape)) or "()", r.block, r.kind, sizes, f"{r.bytes:,}", *flops, r.reason))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*text, f"state: {self.bytes:,} bytes"])


def report(model: Model, blocks: Mapping[str, Block], step: StepSize, reasons: Mapping[str, str], itemsize: int) -> Report:
    """The report of a model's blocks, with factors and momentum of ``itemsize`` bytes a number."""
    rows, seen = [], set()
    shapes = model.shapes()
    for parameter, names in model.block_names().items():
        (name,) = names
        block = blocks[name]
        cost = block.method.cost(block.layer, itemsize)
        first = (name not in seen) * math.prod(block.leading)
        seen.add(name)
        covered = not isinstance(block.layer, Tensor)
        size = 1
        for n in shapes[parameter]:
            size *= n
        momentum = size * itemsize if step.buffered else 0
        rows.append(
            Row(
                parameter,
                shapes[parameter],
                name,
                block.method.name,
                block.layer.shape if covered else (),
                reasons.get(parameter, type(block.layer).__name__ if covered else "belongs to no layer"),
                first * cost.bytes + momentum,
                first * cost.refresh_flops,
                first * cost.step_flops,
            )
        )
    return Report(tuple(rows))
