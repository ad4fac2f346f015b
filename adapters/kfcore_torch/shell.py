"""What the optimizer and the preconditioner offer alike, on top of their engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kfcore import Report
from kfcore_torch.engine import Engine


class Shell:
    """Reports, files and the extra pass of some Fisher types."""

    _engine: Engine | None

    @property
    def engine(self) -> Engine:
        """Layout, capture and state of the curvature."""
        assert self._engine is not None
        return self._engine

    def backward_fisher(self, outputs: Tensor, targets: Tensor | None = None, *, generator: torch.Generator | None = None) -> None:
        """Take the statistics of ``fisher="mc"`` or ``"exact"``: call it between the forward pass and ``loss.backward()``.

        It runs one backward pass for each draw (mc) or column of the output Hessian (exact), touches no ``.grad`` and keeps the
        graph. At steps where no statistics are due it returns at once.

        Parameters
        ----------
        outputs
            What the model returned, as the loss gets it.
        targets
            Needed only where the loss ignores some of them.
        generator
            Source of the drawn labels.
        """
        self.engine.backward_fisher(outputs, targets, generator)

    def masked(self, mask: Tensor) -> AbstractContextManager[None]:
        """``with optimizer.masked(mask): loss = criterion(model(x), y)``, where some positions only fill up an array.

        Every use of a layer in here whose positions have the shape of ``mask``, ``[N, S]`` or ``[N, ...]``, true where they are real, is
        reduced as if the others were not there, whatever they hold. Uses with other positions, as behind a pooling, are left alone, and so
        are convolutions. The loss must leave the same positions out. If masks are nested, each use takes the innermost that fits.

        Raises
        ------
        TypeError, ValueError
            If ``mask`` is no boolean tensor of positions; and :meth:`step` raises if no layer called in here had its positions.
        """
        return self.engine.masked(mask)

    def report(self) -> Report:
        """For every parameter of the model: its block, why, sizes, bytes, operations a refresh and a step. Prints as a table."""
        layout = self.engine.layout
        wide = any(p.dtype == torch.float64 for p in layout.parameters.values())
        found = self.engine.core.report(layout.reasons, 8 if wide else 4)
        shapes = {}
        for name, p in self.engine.module.named_parameters():
            parts = {n: layout.parts[n].of(p) for n in layout.names.get(id(p), ())} or {name: p}
            shapes |= {n: tuple(part.shape) for n, part in parts.items()}
        return found.over(shapes, "not trained: frozen, or in no parameter group")

    def diagnostics(self) -> dict[str, Any]:
        """Counters: see :meth:`kfcore.ModelOptimizer.diagnostics`."""
        return self.engine.core.diagnostics(self.engine.state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write curvature and momentum to a file that every framework reads: see :func:`kfcore.save`."""
        self.engine.save(path)

    def load(self, path: str | os.PathLike[str], *, names: Mapping[str, str] | None = None) -> None:
        """Read such a file, with ``names`` as in :func:`kfcore.load`; learning rates and the like stay as they are."""
        self.engine.load(path, names)

    def remove_hooks(self) -> None:
        """Take the hooks off the model; no further step can be taken."""
        assert self.engine.capture is not None
        self.engine.capture.remove()
