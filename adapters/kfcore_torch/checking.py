"""A look at a model and a tiny batch: are layers seen as they are used, and how far are their blocks from the exact ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfcore import KFAC, CrossEntropy, Loss, Method, StepSize
from kfcore._array import namespace
from kfcore.checking import SelfCheck, compare, exactly, examples_of, tolerance_of
from kfcore.statistics import Use
from kfcore_torch.engine import Call, Engine
from kfcore_torch.fisher import pull_back
from kfcore_torch.quiet import unseen
from kfcore_torch.sites import NormBlock, Sharing, coupled


def self_check(
    model: nn.Module,
    batch: tuple[Any, Any],
    *,
    loss: Loss | None = None,
    method: Method | None = None,
    params: Sequence[Tensor] | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    examples: int | None = None,
    bias: Literal["joint", "separate"] = "joint",
    sharing: Sharing | Mapping[str, Sharing] = "expand",
    norm: NormBlock = "diagonal",
    tolerance: float | None = None,
    show: bool = True,
) -> SelfCheck:
    """Check on a tiny batch that the layers of ``model`` are captured rightly, and compare their blocks with the exact ones.

    For every vector of the exact Fisher matrix (a column of the root of the loss' output Hessian) and every example, the gradient of each
    layer is made of what the optimizer captures, and by autograd. These must agree for every batch. A layer whose weight is used without a
    call of its module, or whose module computes something else than its class, is found so, and rows that are not those of one example.
    Then the block of ``method`` under that Fisher matrix is compared with ``F = 1/M sum_p vec(G_p) vec(G_p)^T``, M being the number of
    terms of the loss. That distance is what the approximation costs on this batch. It must be zero for one example at one position, and
    always for normalisations (of which a diagonal block is the diagonal) and separate biases that are used once.

    There are as many backward passes as examples times columns: take two or three examples, in float64 if you can. Nothing is changed:
    gradients, buffers, random numbers, the mode of the model, and what other optimizers have captured of it stay as they are.

    Parameters
    ----------
    model
        In the mode in which it is to be checked. With batch normalisation in training mode single examples are not told apart.
    batch
        ``(inputs, targets)``; the targets may be ``None`` unless the loss ignores some of them.
    loss
        Description of the loss, :class:`kfcore.CrossEntropy` if not given.
    method
        :class:`kfcore.KFAC` if not given. Its Fisher type is taken to be ``"exact"``, and scales to be averages. For methods with blocks of
        other kinds (MAC and its relatives) KFAC is taken.
    params
        The trained parameters, all that require gradients if not given.
    forward
        ``forward(model, inputs)`` gives the outputs that the loss is made of; ``model(inputs)`` if not given.
    examples
        Number of examples; by default what most layers have on their first axis and divides that of the outputs. 1 compares gradients of
        the whole batch alone.
    bias, sharing, norm
        As in :class:`kfcore_torch.Optimizer`.
    tolerance
        Largest relative error; by default 1e-6 in float64 and 1e-2 in float32.
    show
        Print the table.

    Returns
    -------
    SelfCheck
        One row a block.

    Raises
    ------
    AssertionError
        Naming the blocks that are wrong, after the table is printed.
    ValueError
        If ``outputs`` are not by example, or the loss has no exact Fisher matrix.
    """
    engine = _Engine(model, exactly(method or KFAC()), params, loss or CrossEntropy(), bias, sharing, norm)
    try:
        with _untouched(model, engine), torch.enable_grad():
            outputs = model(batch[0]) if forward is None else forward(model, batch[0])
            found = _compared(engine, outputs, batch[1], examples, tolerance)
    finally:
        assert engine.capture is not None
        engine.capture.remove()
    return found.settled(show=show)


class _Engine(Engine):
    """Keeps what is captured, with examples first."""

    def __init__(self, model: nn.Module, method: Method, params: Sequence[Tensor] | None, loss: Loss, bias: Any, sharing: Any, norm: Any):
        self.seen: dict[str, list[Use]] = {}
        super().__init__(
            model,
            method,
            StepSize(momentum=0.0),
            [p for p in model.parameters() if p.requires_grad] if params is None else params,
            loss=loss,
            loss_reduction="mean",
            bias=bias,
            sharing=sharing,
            norm=norm,
            fallback=None,
            grad_scaler=None,
            all_reduce=None,
            group=False,
            spread=False,
            strict=False,
        )

    def _attend(self) -> None:
        assert self.capture is not None
        self.capture.called = self._called

    def _reduce(self, name: str, use: Use, call: Call | None) -> None:
        self.seen.setdefault(name, []).append(use)

    def vectors(self, outputs: Tensor, targets: Any) -> Iterator[tuple[Tensor, dict[str, list[Use]]]]:
        """Each Fisher vector with the uses of every layer, their output gradients those of the vector."""
        assert self.capture is not None
        assert self.loss is not None
        uses = self.capture.take()
        for vector, seen in pull_back(self.method, self.loss, outputs, targets, None, uses):
            self.seen = {}
            with torch.no_grad():
                for use, grad in seen:
                    self.capture.deliver(use, grad)
            yield vector, self.seen

    def moved_away(self) -> dict[str, str]:
        """Layers that are called in ways that are no uses of them."""
        return self._refused if self._examples is None else self._examples.strays() | self._refused


@contextmanager
def _untouched(model: nn.Module, engine: Engine) -> Iterator[None]:
    """Restore buffers and random numbers, and keep other optimizers from looking."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with unseen(model, engine.capture):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _compared(engine: _Engine, outputs: Tensor, targets: Any, examples: int | None, tolerance: float | None) -> SelfCheck:
    layout, core = engine.layout, engine.core
    parameters = list(layout.parameters.values())
    captured: list[dict[str, list[Use]]] = []
    exact: dict[str, list[Tensor]] = {}
    for vector, seen in engine.vectors(outputs, targets):
        examples = examples_of(seen, tuple(outputs.shape), examples)
        captured.append(seen)
        parts = vector.to(outputs.dtype).reshape(examples, -1)
        for n in range(examples):
            alone = torch.zeros_like(parts)
            alone[n] = parts[n]
            grads = torch.autograd.grad(outputs, parameters, alone.reshape(outputs.shape), retain_graph=True, materialize_grads=True)
            whole = dict(zip(layout.parameters, grads, strict=True))
            for name, matrix in core.model.matrices({n: part.of(whole[part.parameter]) for n, part in layout.parts.items()}).items():
                exact.setdefault(name, []).append(matrix)
    if examples is None or not captured:
        raise ValueError("`loss` has no columns for these outputs: there is nothing to compare")
    assert engine.loss is not None
    away = engine.moved_away()
    return compare(
        layout.model,
        core.preconditioner.blocks,
        captured,
        {name: torch.stack(matrices, dim=-3) for name, matrices in exact.items() if name not in layout.model.others},
        examples=examples,
        terms=float(engine.loss.terms(outputs.detach(), targets)),
        tolerance=tolerance or tolerance_of(namespace(outputs), outputs.dtype),
        left_out={name: layout.reasons.get(name, "no layer") for name in layout.model.others} | away,
        dependent=lambda: bool(coupled(engine.module)),
    )
