"""The training loss around the parameters, as a rule with a quadratic model asks for it: see :class:`kfcore.Objective`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfcore._array import factor_dtype, namespace
from kfcore.optimizer import added
from kfcore_torch.derivatives import Derivatives
from kfcore_torch.layout import Layout
from kfcore_torch.quiet import Aside

Predict = Callable[[], Any]
LossFunction = Callable[[Any], Tensor]


class Objective:
    """The loss of a batch, ``loss_fn(predict())``, as a function of the parameters.

    Parameters
    ----------
    predict, loss_fn
        Of the batch, see :meth:`kfcore_torch.Optimizer.step`.
    layout, aside, derivatives
        Of the model.
    across
        What becomes of a tensor of this rank's part of the batch in all of them, if there are several.
    """

    def __init__(
        self,
        predict: Predict,
        loss_fn: LossFunction,
        layout: Layout,
        aside: Aside,
        derivatives: Derivatives,
        across: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._predict, self._loss_fn = predict, loss_fn
        self._layout, self._aside, self._derivatives, self._across = layout, aside, derivatives, across
        self._rebuilt: Callable[[Sequence[Tensor]], Any] = tuple

    def gram(self, vectors: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """``J`` applied to each vector in the model, and the Hessian of the loss with respect to the outputs between the results."""
        directions = [self._whole(v) for v in vectors]
        outputs, along = self._derivatives(self._run, self._layout.parameters, directions, self._loss_of)
        images = self._curved(outputs, along)
        return self._over_ranks(torch.stack([torch.stack([_inner(u, h, outputs[0]) for h in images]) for u in along]))

    def loss(self, update: Mapping[str, Tensor] | None) -> Tensor:
        """Evaluated without gradients, at what the optimizer would write."""
        with torch.no_grad():
            return self._over_ranks(self._loss_of(self._run({} if update is None else self._moved(update))))

    def _run(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Outputs in floating point where the parameters are ``values``; what else there is goes to the loss as it is."""
        outputs = self._aside.run(self._predict, values)
        parts = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        if not all(isinstance(part, Tensor) for part in parts) or not any(part.is_floating_point() for part in parts):
            came = ", ".join(str(part.dtype) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
            raise TypeError(
                f"`predict` must return a floating point tensor, or a tuple or list of tensors with one, got {came or 'nothing'}"
            )
        live = [k for k, part in enumerate(parts) if part.is_floating_point()]

        def rebuilt(found: Sequence[Tensor]) -> Any:
            whole = [part.detach() for part in parts]
            for k, z in zip(live, found, strict=True):
                whole[k] = z
            if not isinstance(outputs, (tuple, list)):
                return whole[0]
            return type(outputs)(*whole) if hasattr(outputs, "_fields") else type(outputs)(whole)

        self._rebuilt = rebuilt
        return [parts[k] for k in live]

    def _loss_of(self, outputs: Sequence[Tensor]) -> Tensor:
        loss = self._loss_fn(self._rebuilt(outputs))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"`loss_fn` must return the loss as a tensor of one number, got {came}")
        return loss.reshape(())

    def _curved(self, outputs: Sequence[Tensor], along: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
        """The Hessian of the loss with respect to the outputs, times derivatives of these; by the derivative of its gradient."""
        with torch.enable_grad():
            leaves = [z.detach().requires_grad_() for z in outputs]
            first = torch.autograd.grad(self._loss_of(leaves), leaves, create_graph=True, allow_unused=True)
            found: list[list[Tensor | None]] = []
            for of_vector in along:
                pairs = [(g, t) for g, t in zip(first, of_vector, strict=True) if g is not None and t is not None and g.requires_grad]
                if not pairs:  # a linear loss, or a vector that moves nothing
                    found.append([None] * len(leaves))
                    continue
                gradients, tangents = zip(*pairs, strict=True)
                found.append(list(torch.autograd.grad(gradients, leaves, tangents, retain_graph=True, allow_unused=True)))
        return found

    def _whole(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A vector by PyTorch's parameters, in their dtypes; zero in rows that it lacks."""
        found: dict[str, Tensor] = {}
        for name, x in vector.items():
            part = self._layout.parts[name]
            p = self._layout.parameters[part.parameter]
            if part.rows is None:
                found[part.parameter] = x.detach().to(p.dtype)
            else:
                part.of(found.setdefault(part.parameter, torch.zeros_like(p))).copy_(x)
        return found

    def _moved(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of PyTorch after ``update``."""
        found: dict[str, Tensor] = {}
        for name, x in update.items():
            part = self._layout.parts[name]
            p = self._layout.parameters[part.parameter].detach()
            if part.rows is None:
                found[part.parameter] = added(p, x)
            else:
                rows = part.of(found.setdefault(part.parameter, p.clone()))
                rows.copy_(added(rows, x))
        return found

    def _over_ranks(self, x: Tensor) -> Tensor:
        return x if self._across is None else self._across(x)


def _inner(left: Sequence[Tensor | None], right: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """``<left, right>`` over all outputs, 0-d, in float32 at least."""
    wide = factor_dtype(namespace(like), like.dtype)
    total = torch.zeros((), dtype=wide, device=like.device)
    for x, y in zip(left, right, strict=True):
        if x is not None and y is not None:
            total = total + torch.sum(x.to(wide) * y.to(wide))
    return total
