"""Modules of PyTorch for layers that it has none for."""

from __future__ import annotations

import torch
from torch.nn import functional


class Positions(torch.nn.Module):
    """A learned vector for every place, added to what is there."""

    def __init__(self, places: int, features: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(places, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, places, features]`` to the same."""
        return x + self.weight


class Attention(torch.nn.Module):
    """Causal attention from queries, keys and values side by side."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, T, 3 features]`` to ``[N, T, features]``."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in x.chunk(3, dim=-1))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
