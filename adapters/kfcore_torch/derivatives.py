"""Derivatives of a model's outputs along directions in its parameters: forward-mode, or by two backward passes where that does not go.

Both are exact. Which of them a model bears is found out once, at the first product, against the gradient of the loss: an operation
without forward-mode derivatives raises, but one that hides its parameters from them (``torch.utils.checkpoint`` with
``use_reentrant=True``, say) would only give other numbers.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Values = Mapping[str, Tensor]
Run = Callable[[Values], list[Tensor]]
"""Outputs of the model where its parameters are those given."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2}
"""Largest relative error of a way, by dtype; 0.2 for others. Wide, for what is float32 outside may be computed in less inside."""


class Pushed(NamedTuple):
    """Outputs, and their derivatives along each direction; ``None`` where an output does not depend on the parameters."""

    outputs: list[Tensor]
    along: list[list[Tensor | None]]


def forward(run: Run, parameters: Values, directions: Sequence[Values]) -> Pushed:
    """By one evaluation on dual numbers a direction."""
    _prepare_forward_mode()
    outputs, along = [], []
    for direction in directions:
        with forward_ad.dual_level(), torch.no_grad():
            duals = {name: forward_ad.make_dual(parameters[name].detach(), d) for name, d in direction.items()}
            parts = [forward_ad.unpack_dual(z) for z in run(duals)]
            outputs = [part.primal.detach() for part in parts]
            along.append([None if part.tangent is None else part.tangent.detach() for part in parts])
    return Pushed(outputs, along)


def backward(run: Run, parameters: Values, directions: Sequence[Values]) -> Pushed:
    """``J v`` as the derivative with respect to ``u`` of ``<J^T u, v>``, which is linear in ``u``."""
    with torch.enable_grad():
        leaves = {name: parameters[name].detach().requires_grad_() for name in directions[0]}
        outputs = run(leaves)
        live = [k for k, z in enumerate(outputs) if z.requires_grad]
        seeds = [torch.zeros_like(outputs[k], requires_grad=True) for k in live]
        pulled = torch.autograd.grad([outputs[k] for k in live], list(leaves.values()), seeds, create_graph=True, allow_unused=True)
        linked = {name: g for name, g in zip(leaves, pulled, strict=True) if g is not None and g.requires_grad}
        along: list[list[Tensor | None]] = []
        for direction in directions:
            vectors = [direction[name] for name in linked]
            found = torch.autograd.grad(list(linked.values()), seeds, vectors, retain_graph=True, allow_unused=True) if linked else ()
            of_live = dict(zip(live, found, strict=True)) if linked else {}
            along.append([of_live.get(k) for k in range(len(outputs))])
    return Pushed([z.detach() for z in outputs], along)


class Way(NamedTuple):
    """A way to take directional derivatives."""

    push: Callable[[Run, Values, Sequence[Values]], Pushed]
    plain: bool
    """Without the fused kernels of recurrent networks, which know no derivatives but the first backward one."""

    def __call__(self, run: Run, parameters: Values, directions: Sequence[Values]) -> Pushed:
        """Outputs and their derivatives."""
        with _differentiable(self.plain):
            return self.push(run, parameters, directions)


class Derivatives:
    """Takes directional derivatives of a model, in the first way that turns out to be right."""

    def __init__(self) -> None:
        self.way: Way | None = None

    def __call__(self, run: Run, parameters: Values, directions: Sequence[Values], loss: Callable[[list[Tensor]], Tensor]) -> Pushed:
        """Outputs and derivatives; ``loss`` of the outputs is what ways are tried on."""
        way = self.way
        if way is None:
            way, expected = self._found(run, {name: parameters[name] for name in directions[0]}, loss)
            self.way = way if 0.0 < expected < math.inf else None  # else nothing was seen
        return way(run, parameters, directions)

    def _found(self, run: Run, parameters: Values, loss: Callable[[list[Tensor]], Tensor]) -> tuple[Way, float]:
        """The first way whose derivative of the loss, along the gradient of each parameter made a unit vector, is the sum of their norms.

        That sum too.
        """
        failures: list[str] = []
        with torch.enable_grad():
            outputs = run({})  # with the parameters themselves, wherever they are used
            value = loss(outputs)
            if not value.requires_grad:
                raise ValueError("`loss_fn` of what `predict` returns does not depend on the parameters: `predict` must run the model")
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.items(), gradients, strict=True)
        missed = [name for (name, p), g in pairs if g is None and p.grad is not None and bool(p.grad.any())]
        if missed:
            raise RuntimeError(
                f"`loss_fn(predict())` does not reach {', '.join(missed)}, where there is a gradient: it is of another loss, or a "
                "checkpoint with use_reentrant=True hides it, through which no exact curvature products can be taken"
            )
        norms = [torch.zeros_like(p.sum()) if g is None else g.norm() for p, g in zip(parameters.values(), gradients, strict=True)]
        units = {
            name: torch.zeros_like(p) if g is None else g / torch.where(norm > 0, norm, torch.ones_like(norm))
            for (name, p), g, norm in zip(parameters.items(), gradients, norms, strict=True)
        }
        expected = sum(float(norm) for norm in norms)
        tolerance = max(TOLERANCE.get(x.dtype, 0.2) for x in (*parameters.values(), *outputs))
        for push, plain in itertools.product((forward, backward), (False, True)):
            way = Way(push, plain)
            try:
                slope = _slope(way(run, parameters, [units]), loss)
            except (RuntimeError, NotImplementedError) as error:
                failures.append(str(error).splitlines()[0])
                continue
            # what is not finite has no right derivative, and the step says so itself
            if not abs(slope - expected) > tolerance * expected:
                if push is backward:
                    warnings.warn(f"curvature products take two backward passes, for forward-mode does not go: {failures[0]}", stacklevel=2)
                return way, expected
            failures.append(f"derivatives miss the gradient of the loss, {slope:.6g} for {expected:.6g} along it")
        raise RuntimeError(
            "`predict` runs something through which no exact curvature products can be taken (a checkpoint with use_reentrant=True, a "
            f"function with a backward pass of its own, a parameter used past the model): {'; '.join(dict.fromkeys(failures))}"
        )


def _slope(pushed: Pushed, loss: Callable[[list[Tensor]], Tensor]) -> float:
    """Derivative of the loss along the one direction."""
    with torch.enable_grad():
        leaves = [z.requires_grad_() for z in pushed.outputs]
        gradients = torch.autograd.grad(loss(leaves), leaves, allow_unused=True)
    pairs = zip(gradients, pushed.along[0], strict=True)
    return sum(float(torch.sum(g.double() * d.double())) for g, d in pairs if g is not None and d is not None)


@contextmanager
def _differentiable(plain: bool) -> Iterator[None]:
    """Only operations that have the derivatives taken here, where PyTorch has several for one thing."""
    kinds: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn) if plain else ()
    fast, enabled = torch.backends.mha.get_fastpath_enabled(), [kind.enabled for kind in kinds]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for kind in kinds:
            kind.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for kind, was in zip(kinds, enabled, strict=True):
            kind.enabled = was


@functools.cache
def _prepare_forward_mode() -> None:
    """PyTorch compiles its own rules at the first dual number, with a warning about how it does."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
