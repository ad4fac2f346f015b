"""Which positions are real, said for a part of the program and found again at the layers that are called in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

RECOMPUTED = (
    "a checkpointed region with use_reentrant=True calls it again in the backward pass, where no mask is known: use "
    "use_reentrant=False, or call `backward` under the mask too"
)


class Masks:
    """The masks under which layers are called."""

    def __init__(self) -> None:
        self.active: tuple[Tensor, ...] = ()
        """Those of the running part of the program, the innermost first."""
        self.forget()

    def clear(self) -> None:
        """Forget which uses came."""
        self._fitted = False
        self._others: set[tuple[int, ...]] = set()

    def forget(self) -> None:
        """Forget the calls too."""
        self.clear()
        self.used = False
        """Whether a layer was called under a mask."""

    @contextmanager
    def under(self, mask: Tensor) -> Iterator[None]:
        """Calls in here are under ``mask``, and under those around it."""
        before, self.active = self.active, (mask, *self.active)
        try:
            yield
        finally:
            self.active = before

    def called(self, padding: Tensor | None) -> tuple[Tensor, ...]:
        """Masks of a call: those that are active; or what attention is told itself of keys that are others than its queries.

        ``padding`` is that, ``key_padding_mask``: true, or minus infinity, where a key is none.
        """
        self.used = self.used or bool(self.active)
        if padding is None or not self.active:
            return self.active
        real = ~padding if padding.dtype == torch.bool else padding != -math.inf
        return (real if real.ndim == 2 else real[None],)

    def fitting(self, layer: Any, masks: tuple[Tensor, ...], inputs: Tensor) -> Tensor | None:
        """That of ``masks`` which has the positions ``[N, S]`` of what was captured of ``layer``, if it can be masked."""
        if not masks or layer.unmaskable:
            return None
        positions = tuple(inputs.shape if layer.input_kind == "ids" else inputs.shape[:-1])
        for mask in masks:
            if (mask.shape[0], math.prod(mask.shape[1:])) == positions:
                self._fitted = True
                return mask.reshape(positions).to(inputs.device)
        self._others.add(positions)
        return None

    def check_fitted(self) -> None:
        """Raise if uses came of calls under masks, and no mask was of their positions."""
        if self._others and not self._fitted:
            raise ValueError(
                "`mask` of `masked` fits none of the layers that were called under it: it must have the shape [N, S] of their positions, "
                f"which were {', '.join(map(str, sorted(self._others)))}"
            )


def checked(mask: Any) -> Tensor:
    """A copy of ``mask``, which must be a boolean tensor of positions."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"`mask` must be a boolean tensor, True at real positions, got {came}")
    if not mask.ndim:
        raise ValueError("`mask` must have shape [N, ...], one entry for each position, got ()")
    return mask.detach().clone()
