"""A look at a model and a tiny batch: are layers seen as they are used, and how far are their blocks from the exact ones."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfcore import EKFAC, KFAC, CrossEntropy, Loss, Method, StepSize
from kfcore._array import namespace
from kfcore.scales import example_gradients
from kfcore.statistics import Use
from kfcore_torch.capture import captures_of
from kfcore_torch.engine import Call, Engine
from kfcore_torch.fisher import pull_back
from kfcore_torch.passes import batches_of
from kfcore_torch.sites import NormBlock, Sharing, coupled

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Largest relative error, by dtype of the model; 0.1 for others."""


@dataclass(frozen=True)
class Checked:
    """One curvature block."""

    block: str
    kind: str
    """Layer and method."""
    uses: str
    """Shapes ``N x S`` of what was captured."""
    gradient: float
    """Largest error of the gradients of single examples that the capture makes, relative to the largest entry of autograd's."""
    distance: float
    """Of the block from the exact one, in the Frobenius norm and relative; of the diagonals alone where the block is one."""
    exact: bool
    """Whether it must be the exact block here."""
    note: str = ""
    """What is wrong, or why nothing is compared."""
    wrong: bool = False


@dataclass(frozen=True)
class SelfCheck:
    """What :func:`self_check` found; prints as a table."""

    rows: tuple[Checked, ...]
    left_out: Mapping[str, str]
    """Parameters of no layer, and layers that the optimizer would move to the fallback, with the reason."""

    def __getitem__(self, block: str) -> Checked:
        return {row.block: row for row in self.rows}[block]

    def __iter__(self) -> Iterator[Checked]:
        return iter(self.rows)

    def wrong(self) -> list[Checked]:
        """Rows with something wrong."""
        return [row for row in self.rows if row.wrong]

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("block", "kind", "uses", "gradients", "distance", "must be exact", "")]
        for r in self.rows:
            error, distance = ("-" if math.isnan(x) else f"{x:.1e}" for x in (r.gradient, r.distance))
            lines.append((r.block, r.kind, r.uses, error, distance, "yes" if r.exact else "no", r.note))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*text, *(f"{name}: no block ({why})" for name, why in self.left_out.items())])


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
    engine = _Engine(model, _exact(method or KFAC()), params, loss or CrossEntropy(), bias, sharing, norm)
    try:
        with _untouched(model, engine), torch.enable_grad():
            outputs = model(batch[0]) if forward is None else forward(model, batch[0])
            found = _compared(engine, outputs, batch[1], examples, tolerance)
    finally:
        assert engine.capture is not None
        engine.capture.remove()
    if show:
        print(found)
    wrong = found.wrong()
    if wrong:
        raise AssertionError("; ".join(f"{row.block}: {row.note}" for row in wrong))
    return found


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

    def by_block(self, seen: Mapping[str, list[Use]]) -> dict[str, list[Use]]:
        """Uses of layers as those of their blocks."""
        found: dict[str, list[Use]] = {}
        for name, uses in seen.items():
            for suffix, block in self.layout.model.blocks(name).items():
                found[block] = [use._replace(layer=use.layer.blocks()[suffix]) for use in uses]  # pyright: ignore[reportAttributeAccessIssue]
        return found


def _exact(method: Method) -> Method:
    if isinstance(method, EKFAC):
        return replace(method, fisher="exact", scales="average")
    if type(method) is not KFAC:  # one whose blocks are of some other kind: what is captured is the same
        return KFAC(fisher="exact")
    return replace(method, fisher="exact")


@contextmanager
def _untouched(model: nn.Module, engine: Engine) -> Iterator[None]:
    """Restore buffers and random numbers, and keep other optimizers from looking."""
    others = [(capture, capture.wanted, capture.counting) for capture in captures_of(model) if capture is not engine.capture]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        for capture, *_ in others:
            capture.wanted = capture.counting = False
        with torch.random.fork_rng(devices):
            yield
    finally:
        for capture, wanted, counting in others:
            capture.wanted, capture.counting = wanted, counting
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _compared(engine: _Engine, outputs: Tensor, targets: Any, examples: int | None, tolerance: float | None) -> SelfCheck:
    layout, core = engine.layout, engine.core
    parameters = list(layout.parameters.values())
    captured: list[dict[str, list[Use]]] = []
    exact: dict[str, list[Tensor]] = {}
    for vector, seen in engine.vectors(outputs, targets):
        if examples is None:
            votes = Counter(n for uses in seen.values() for n in {len(use.inputs) for use in uses if use.inputs is not None})
            examples = max(votes or [1], key=lambda n: (len(outputs) % n == 0, votes[n], n))
        if len(outputs) % examples:
            raise ValueError(f"`outputs` must have the {examples} examples of the layers on their first axis, got {tuple(outputs.shape)}")
        captured.append(engine.by_block(seen))
        parts = vector.to(outputs.dtype).reshape(examples, -1)
        for n in range(examples):
            alone = torch.zeros_like(parts)
            alone[n] = parts[n]
            grads = torch.autograd.grad(outputs, parameters, alone.reshape(outputs.shape), retain_graph=True, materialize_grads=True)
            whole = dict(zip(layout.parameters, grads, strict=True))
            for name, matrix in core.model.matrices({n: part.of(whole[part.parameter]) for n, part in layout.parts.items()}).items():
                exact.setdefault(name, []).append(matrix)
    if not captured:
        raise ValueError("`loss` has no columns for these outputs: there is nothing to compare")
    assert examples is not None
    assert engine.loss is not None
    terms = float(engine.loss.terms(outputs.detach(), targets))
    away = engine.moved_away()
    blocks = {block: name for name in layout.model.layers if name not in away for block in layout.model.blocks(name).values()}
    tolerance = tolerance or TOLERANCE.get(outputs.dtype, 0.1)
    loose = bool(coupled(engine.module))
    rows = []
    for block in blocks:
        # [*groups, K N, out, in] of all vectors and examples
        gradients = torch.stack(exact[block], dim=-3)
        uses = [of_vector.get(block, []) for of_vector in captured]
        rows.append(_checked(engine, block, uses, gradients, examples, terms, tolerance, loose))
    left_out = {name: layout.reasons.get(name, "no layer") for name in layout.model.others} | away
    return SelfCheck(tuple(rows), left_out)


def _checked(
    engine: _Engine, block: str, captured: list[list[Use]], exact: Tensor, examples: int, terms: float, tolerance: float, loose: bool
) -> Checked:
    """``captured`` are the uses for each vector; ``loose`` is whether examples may depend on each other."""
    of = engine.core.preconditioner.blocks[block]
    kind = f"{type(of.layer).__name__}, {of.method.name}"
    uses = captured[0]
    if not uses:
        wrong = bool(exact.any())
        note = "it has a gradient, but no call of its module was seen: its weight is used in another way" if wrong else "unused"
        return Checked(block, kind, "none", math.nan, math.nan, False, note, wrong)
    shapes = ", ".join(sorted({f"{g.shape[0]} x {g.shape[1]}" for use in uses if (g := use.output_grads) is not None}))
    error, note, wrong = _gradient_error(captured, exact, examples, tolerance, loose)
    if note or any(use.output_grads is not None and use.output_grads.shape[0] != examples for use in uses):
        return Checked(block, kind, shapes, error, math.nan, False, note, wrong)
    distance = _distance(engine, block, captured, exact, terms)
    single = examples == 1 and shapes == "1 x 1"
    must = isinstance(of.method, (KFAC, EKFAC)) and len(uses) == 1 and (single or of.layer.shape[1] == 1)
    wrong = must and not distance <= tolerance
    note = f"its block is {distance:.1e} off where it must be exact" if wrong else ""
    return Checked(block, kind, shapes, error, distance, must, note, wrong)


def _gradient_error(captured: list[list[Use]], exact: Tensor, examples: int, tolerance: float, loose: bool) -> tuple[float, str, bool]:
    """How far gradients from the capture are from ``exact [*groups, K N, out, in]``, what that says, and whether it is wrong."""
    found, size, strange = [], 0.0, set()
    for uses in captured:
        total: Any = 0.0
        for use in uses:
            given = _gradients(use)
            size = max(size, float(_gradients(_absolute(use)).max()))
            n = given.shape[-3]
            if n % examples:
                strange.add(n)
                given = given.sum(dim=-3, keepdim=True) / examples
            else:
                given = given.unflatten(-3, (examples, n // examples)).sum(dim=-3)
            total = total + given
        found.append(total.expand(*total.shape[:-3], examples, *total.shape[-2:]))
    rebuilt = torch.cat(found, dim=-3)
    largest = float(exact.abs().max())
    # some gradients vanish, as that of the bias of the keys of attention: all terms of the sum cancel
    scale = max(largest, 1e-3 * size, torch.finfo(rebuilt.dtype).tiny)
    apart = rebuilt - exact.to(rebuilt.dtype)
    error = float(apart.abs().max()) / scale
    if error <= tolerance:
        return error, "its gradient vanishes" if largest <= 1e-3 * tolerance * size else "", False
    summed = apart.unflatten(-3, (len(captured), examples)).sum(dim=-3)
    if not float(summed.abs().max()) <= examples * tolerance * scale:
        note = f"gradients from what was captured are {error:.1e} off autograd's: its module computes something else, or has other uses"
        return error, note, True
    if strange:
        rows = " or ".join(map(str, sorted(strange)))
        return error, f"the first axis of its input has {rows} entries, which are not the {examples} examples", True
    if loose:
        return error, "examples depend on each other, through normalisations of the batch", False
    return error, f"gradients of single examples are {error:.1e} off autograd's, though not their sum: examples are mixed", True


def _gradients(use: Use) -> Tensor:
    """``[*groups, N, out, in]``."""
    assert use.output_grads is not None
    dtype = torch.float64 if use.output_grads.dtype == torch.float64 else torch.float32
    return example_gradients(namespace(use.output_grads), [use], dtype)[..., 0, :, :, :]


def _absolute(use: Use) -> Use:
    assert use.inputs is not None
    assert use.output_grads is not None
    return use._replace(inputs=use.inputs.abs(), output_grads=use.output_grads.abs())


def _distance(engine: _Engine, block: str, captured: list[list[Use]], exact: Tensor, terms: float) -> float:
    """How far the block of these uses is from that of the ``exact`` gradients; the farthest, where there are groups."""
    of = engine.core.preconditioner.blocks[block]

    def statistics(state: Any) -> Any:
        parts = [of.method.reduce_all(uses, state) for of_vector in captured for uses in batches_of(of_vector)]
        return functools.reduce(operator.add, parts).over(terms)

    state = of.method.init(of.layer, exact, of.leading)
    state = of.method.observe(state, statistics(state))
    if of.method.late:  # it measures in what was refreshed
        state = of.method.refresh(of.layer, state, 1.0)
        state = of.method.observe(state, statistics(state))
    found = of.method.operator(of.layer, state)
    gradients = exact.to(found.values.dtype)
    if of.layer.forms[0] == "diagonal":
        diagonal = (gradients**2).sum(dim=-3) / terms
        return float((found.values - diagonal).norm() / diagonal.norm().clamp(min=torch.finfo(diagonal.dtype).tiny))
    if not of.leading:
        return found.distance(gradients, terms)
    return max(found.at(index).distance(gradients[index], terms) for index in itertools.product(*map(range, of.leading)))
