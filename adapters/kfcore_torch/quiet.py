"""Running a model aside: no optimizer looks, and nothing of the model or of the random numbers is moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kfcore_torch.capture import Capture, captures_of


@contextmanager
def unseen(model: nn.Module, but: Capture | None = None) -> Iterator[None]:
    """Nothing that ``model`` does in here is captured, except by ``but``, and random numbers go on as if nothing had been drawn."""
    others = [(capture, capture.wanted, capture.counting) for capture in captures_of(model) if capture is not but]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        for capture, *_ in others:
            capture.wanted = capture.counting = False
        with torch.random.fork_rng(devices):
            yield
    finally:
        for capture, wanted, counting in others:
            capture.wanted, capture.counting = wanted, counting


class Aside(nn.Module):
    """Runs functions of a model with other tensors in the place of its parameters, and copies in that of its buffers.

    Random numbers are the same in every run, as long as nobody else draws any.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        """Call it."""
        return function()

    def run(self, function: Callable[[], Any], values: Mapping[str, Tensor]) -> Any:
        """What ``function`` gives where the parameters, by name, are ``values``; the others stay themselves."""
        given = {f"model.{name}": x for name, x in values.items()}
        given |= {f"model.{name}": x.detach().clone() for name, x in self.model.named_buffers()}
        with unseen(self.model), eager():
            return torch.func.functional_call(self, given, (function,))


def eager() -> AbstractContextManager[Any]:
    """Compiled programs run as they are written: they were made for the parameters themselves, and for one kind of derivative."""
    stance = getattr(torch.compiler, "set_stance", None)  # PyTorch has it from 2.6 on
    return nullcontext() if stance is None else stance("force_eager")
