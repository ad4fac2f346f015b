"""The preconditioner: rewrites ``.grad`` before any other optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfcore import Loss, Method, StepSize
from kfcore.stepsize import clip_scale, guarded
from kfcore_torch.engine import Engine
from kfcore_torch.shell import Shell
from kfcore_torch.sites import NormBlock, Sharing


class Preconditioner(Shell):
    """Replaces the gradients of a model by their directions: ``loss.backward(); preconditioner.step(); optimizer.step()``.

    Momentum, weight decay and learning rate are the other optimizer's. Where a direction is not finite all
    gradients become zero, and :meth:`diagnostics` counts a skipped step.

    Parameters
    ----------
    model, method, loss, loss_reduction, bias, sharing, norm, fallback, grad_scaler, all_reduce, group, spread, strict
        See :class:`kfcore_torch.Optimizer`.
    graft
        Give each block's direction the norm of its gradient, so that the other optimizer's learning rate keeps its meaning.
    clip
        KL clip, see :class:`kfcore.StepSize`; it needs the learning rate, so give that to :meth:`step`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        graft: bool = False,
        clip: float | None = None,
        loss: Loss | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        bias: Literal["joint", "separate"] = "joint",
        sharing: Sharing | Mapping[str, Sharing] = "expand",
        norm: NormBlock = "diagonal",
        fallback: Method | None = None,
        grad_scaler: Any = None,
        all_reduce: Callable[[Tensor], Any] | None = None,
        group: bool | None = None,
        spread: bool = False,
        strict: bool = False,
    ) -> None:
        self._clip = clip
        self._engine = Engine(
            model,
            method,
            StepSize(momentum=0.0, graft=graft, clip=clip),
            [p for p in model.parameters() if p.requires_grad],
            loss=loss,
            loss_reduction=loss_reduction,
            bias=bias,
            sharing=sharing,
            norm=norm,
            fallback=fallback,
            grad_scaler=grad_scaler,
            all_reduce=all_reduce,
            group=group,
            spread=spread,
            strict=strict,
        )

    @torch.no_grad()
    def step(self, *, lr: float | None = None, terms: float | Tensor | None = None) -> None:
        """Rewrite ``.grad`` of every parameter that has one; those that were frozen at set-up join from the step after this one."""
        if self._clip is not None and lr is None:
            raise ValueError("`lr` must be given to `step`: the clip bounds learning rate times direction")
        grads, directions = self.engine.directions({}, terms)
        if self._clip is not None:
            scale = clip_scale(self._clip, lr, grads, directions)
            directions = {name: d * scale for name, d in directions.items()}
        directions, step = guarded(directions, self.engine.state.step)
        self.engine.state = self.engine.state._replace(step=step)
        written = self.engine.layout.grads()
        for name, direction in directions.items():
            written[name].copy_(direction)
        self.engine.join(list(self.engine.module.parameters()))

    def state_dict(self) -> dict[str, Any]:
        """Curvature, loadable with ``weights_only=True``."""
        return self.engine.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on exactly from ``state_dict``; one of another model or method is refused and changes nothing."""
        self.engine.restore(*self.engine.restored(state_dict))
