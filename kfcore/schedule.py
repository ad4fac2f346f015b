"""Hyper-parameters that may change with the step, and the question whether something is due."""

from __future__ import annotations

from typing import Any

from kfcore._array import Array, Schedule, host


def at(value: Any, step: int | Array) -> Any:
    """``value``, or ``value(step)`` where it is a function of the step number, which is an int outside a trace."""
    return value(host(step)) if callable(value) else value


def due(every: int | Schedule, step: int | Array, offset: int = 0) -> Any:
    """Whether ``step`` is one of every ``every``-th: a bool on the host, a 0-d array of booleans under a trace.

    Step 0 is always due; ``offset`` shifts the later ones, so that the work of several blocks can be spread over the steps.
    """
    period = at(every, step)
    if isinstance(period, int):
        if period < 1:
            raise ValueError(f"`every` must give a positive number of steps, got {period} at step {step}")
        if period == 1:
            return True
    if not offset:
        return (step % period) == 0
    return ((step % period) == (offset % period)) | (step == 0)
