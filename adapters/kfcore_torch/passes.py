"""Which uses of a layer belong together: those of one backward pass, for methods that look at gradients of single examples.

A method that squares the gradients of examples (EKFAC) must have all uses of a layer at once, because they add up in each example first.
What one backward pass goes through are the uses of one batch. It has been through all of them when as many have come as were called in the
forward pass, which is the rule and holds nothing for longer than that takes, or else when it is over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kfcore.statistics import Use

SPLIT = (
    "it was used in a checkpointed region with use_reentrant=True after its other uses in this backward pass were taken: "
    "use_reentrant=False keeps them together"
)


class Passes:
    """Holds the uses of layers until all of one backward pass are there.

    Parameters
    ----------
    reduce
        Called as ``reduce(layer, uses)`` with uses of one backward pass by equally many examples: those of the same batch. Where a pass
        goes through calls with several numbers of examples, each number is a batch of its own.
    refuse
        Called as ``refuse(layer, reason)`` where uses that belong together cannot be kept so.
    """

    def __init__(self, reduce: Callable[[str, list[Use]], None], refuse: Callable[[str, str], None]) -> None:
        self._reduce, self._refuse = reduce, refuse
        self.forget()

    def clear(self) -> None:
        """Forget the uses of which the gradients came."""
        self._held: dict[str, list[Use]] = {}
        self._taken: set[str] = set()
        self._active: int | None = None

    def forget(self) -> None:
        """Forget the calls too, whose gradients are still to come."""
        self.clear()
        self._open: dict[str, int] = {}

    def called(self, layer: str) -> bool:
        """A layer was called; whether that was inside a backward pass, which computes a checkpointed region again.

        The reentrant kind of checkpoint runs a backward pass of its own there, whose uses belong to the pass around it.
        """
        task = running()
        if task >= 0:
            self._enter(task)
            return True
        self._active = None  # what was active, if anything, has ended in an exception
        self._open[layer] = self._open.get(layer, 0) + 1
        return False

    def fired(self, layer: str, use: Use, again: bool) -> None:
        """A backward pass came through a use; ``again`` is what :meth:`called` said of it."""
        task = running()
        if not again and self._active != task:
            self.close()
            self._enter(task)
        self.hold(layer, use)
        if layer in self._taken:
            self._refuse(layer, SPLIT)
        elif not again and self._open.get(layer, 0) > 0:
            self._open[layer] -= 1
            if not self._open[layer]:
                self._taken.add(layer)
                self._take(layer)

    def hold(self, layer: str, use: Use) -> None:
        """Keep a use for :meth:`close`."""
        self._held.setdefault(layer, []).append(use)

    def close(self) -> None:
        """All uses of the pass are there."""
        self._active = None
        self._taken = set()
        for layer in list(self._held):
            self._take(layer)

    def _enter(self, task: int) -> None:
        """Be told when the pass ends, unless one around it is known already."""
        if self._active is None:
            self._active = task
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)  # pyright: ignore[reportAttributeAccessIssue]

    def _ended(self) -> None:
        with torch.no_grad():
            self.close()

    def _take(self, layer: str) -> None:
        for uses in batches_of(self._held.pop(layer)):
            self._reduce(layer, uses)


def batches_of(uses: list[Use]) -> list[list[Use]]:
    """Uses in one backward pass by batch: those by equally many examples."""
    batches: dict[int, list[Use]] = {}
    for use in uses:
        assert use.output_grads is not None
        batches.setdefault(use.output_grads.shape[0], []).append(use)
    return list(batches.values())


def running() -> int:
    """Number of the running backward pass, or -1."""
    return torch._C._current_graph_task_id()  # pyright: ignore[reportAttributeAccessIssue]
