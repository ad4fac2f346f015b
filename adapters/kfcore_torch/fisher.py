"""Fisher types other than the empirical one: pull vectors of the loss back through the graph of the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from kfcore import Loss, Method, fisher_vectors
from kfcore_torch.capture import Use


def pull_back(
    method: Method,
    loss: Loss,
    outputs: Tensor,
    targets: Tensor | None,
    generator: torch.Generator | None,
    uses: list[Use],
) -> Iterator[tuple[Tensor, list[tuple[Use, Tensor]]]]:
    """Each vector, and the uses of layers with their gradients for it. No ``.grad`` is touched and the graph is kept."""
    edges = [use.edge for use in uses]
    detached = outputs.detach()

    def draw(kind: Literal["uniform", "normal"], shape: tuple[int, ...]) -> Tensor:
        make = torch.rand if kind == "uniform" else torch.randn
        dtype = torch.float64 if outputs.dtype == torch.float64 else torch.float32
        return make(shape, generator=generator, dtype=dtype, device=outputs.device)

    assert method.fisher in ("mc", "exact")
    for vector in fisher_vectors(method.fisher, loss, detached, targets, draw=draw, samples=method.mc_samples):
        grads = torch.autograd.grad(outputs, edges, vector.to(outputs.dtype), retain_graph=True, allow_unused=True)
        yield vector, [(use, grad) for use, grad in zip(uses, grads, strict=True) if grad is not None]
