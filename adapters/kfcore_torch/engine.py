"""What the optimizer and the preconditioner share: a model's layout, its capture, and the core's state."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import kfcore
from kfcore import Loss, Method, ModelOptimizer, Needs, Norm, OptimizerState, StepSize
from kfcore.checkpoint import CheckpointError, from_arrays, header_of, named, read, renamed, to_arrays, write
from kfcore.optimizer import merge
from kfcore.preconditioner import default_fallback
from kfcore.statistics import Use
from kfcore_torch.capture import Capture
from kfcore_torch.derivatives import Derivatives
from kfcore_torch.examples import Examples
from kfcore_torch.fisher import pull_back
from kfcore_torch.layout import Layout, layout
from kfcore_torch.masks import RECOMPUTED, Masks, checked
from kfcore_torch.objective import LossFunction, Objective, Predict
from kfcore_torch.passes import Passes, running
from kfcore_torch.quiet import Aside
from kfcore_torch.sites import NormBlock, Sharing, as_used, coupled


class Call(NamedTuple):
    """What is known of a call of a layer besides its arrays."""

    masks: tuple[Tensor, ...]
    again: bool
    """Whether it was inside a backward pass, which computes a checkpointed region again."""


class Engine:
    """Curvature of a module: captures, and turns gradients into directions and updates. See :class:`kfcore_torch.Optimizer`."""

    def __init__(
        self,
        module: nn.Module,
        method: Method,
        step: StepSize,
        trained: Sequence[Tensor],
        *,
        loss: Loss | None,
        loss_reduction: Literal["mean", "sum"],
        bias: Literal["joint", "separate"],
        sharing: Sharing | Mapping[str, Sharing],
        norm: NormBlock,
        fallback: Method | None,
        grad_scaler: Any,
        all_reduce: Callable[[Tensor], Any] | None,
        group: bool | None,
        spread: bool,
        strict: bool,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(module).__name__}")
        if not isinstance(method, Method):
            raise TypeError(f"`method` must be a curvature method such as kfcore.KFAC(), got {method!r}")
        if method.fisher in ("mc", "exact") and loss is None:
            raise ValueError(f"`loss` must be given for fisher={method.fisher!r}, such as kfcore.CrossEntropy(), got None")
        self.module, self.method, self.step_size, self.loss = module, method, step, loss
        self._aside, self._derivatives = Aside(module), Derivatives()
        self.grad_scaler, self.all_reduce, self.strict = grad_scaler, all_reduce, strict
        self._how: dict[str, Any] = {"bias": bias, "sharing": sharing, "norm": norm}
        group = any(p.device.type != "cpu" for p in trained) if group is None else group
        self._options: dict[str, Any] = {
            "loss_reduction": loss_reduction,
            "fallback": fallback,
            "group": group,
            "spread": spread,
        }
        # decided once: a plan made anew during training may find another mode
        self._excluded: dict[str, str] = coupled(module)
        self._warned: set[str] = set()
        self._told: set[str] = set()
        self._passes: Passes | None = None
        self._masks = Masks()
        self.capture: Capture | None = None
        self.plan(trained)

    # -- set-up --------------------------------------------------------------------------------------------------------

    def plan(self, trained: Sequence[Tensor]) -> None:
        """Lay the model out anew, keeping the state of the blocks and buffers that stay."""
        old = (self.core, self.state) if self.capture is not None else None
        found, core = self._laid_out(trained, self._excluded)
        if self.strict and found.model.others:
            lines = [f"{name} ({found.reasons.get(name, 'no layer')})" for name in found.model.others]
            raise ValueError(f"`strict` is set, but these parameters would fall back to {self._fallback(core)}: {'; '.join(lines)}")
        self.layout, self.core = found, core
        needs = Needs.NOTHING
        for name in found.model.layers:
            needs |= core.needs(name)
        self._passes = Passes(self._take, self._refuse) if Needs.ALL_USES in needs else None
        self._examples = Examples.of(found.model.layers, squared=self._passes is not None)
        self.state: OptimizerState = core.init({n: p.detach() for n, p in found.values().items()})
        if old is not None:
            self._adopt(*old)
        if self.capture is not None:
            self.capture.remove()
        self._first = self.method.first_of(found.model.layers)
        self.capture = Capture(
            [call for call in found.calls() if call[0] in core.captured],
            found.attentions(),
            self._sink,
            self._refuse,
            output_grads=Needs.OUTPUT_GRADS in needs,
            deferred=self.method.fisher in ("mc", "exact"),
        )
        # a summed loss is divided by its terms at every step, whether statistics are due or not
        self.capture.counting = self.core.loss_reduction == "sum" and self.method.fisher == "empirical"
        self.moved()

    def join(self, trained: Sequence[Tensor]) -> None:
        """Take in the parameters among ``trained`` that were frozen when the model was laid out and are no more."""
        known = self.layout.names
        if any(id(p) not in known and p.requires_grad for p in trained):
            self.plan(trained)

    def _laid_out(self, trained: Sequence[Tensor], excluded: Mapping[str, str]) -> tuple[Layout, ModelOptimizer]:
        found = layout(self.module, trained, excluded=excluded, **self._how)
        return found, ModelOptimizer(self.method, found.model, self.step_size, **self._options)

    def clear(self) -> None:
        """Forget what was captured since the last step."""
        self._statistics: dict[str, Any] = {}
        self._terms: float | Tensor = 0.0
        self._output_layer: str | None = None
        self._counts: dict[str, Any] = {}
        self._refused: dict[str, str] = {}
        if self._examples is not None:
            self._examples.clear()
        if self._passes is not None:
            self._passes.clear()
        self._masks.clear()
        assert self.capture is not None
        self.capture.take()

    def moved(self) -> None:
        """The state is another one: forget what was captured, and see whether the coming step wants statistics."""
        self.clear()
        if self._passes is not None:
            self._passes.forget()
        self._masks.forget()
        self._attend()
        assert self.capture is not None
        self.capture.wanted = bool(self.core.stats_due(self.state))

    # -- capture -------------------------------------------------------------------------------------------------------

    def masked(self, mask: Tensor) -> AbstractContextManager[None]:
        """See :meth:`kfcore_torch.Optimizer.masked`."""
        return self._under(checked(mask))

    @contextmanager
    def _under(self, mask: Tensor) -> Iterator[None]:
        try:
            with self._masks.under(mask):
                self._attend()
                yield
        finally:
            self._attend()

    def _attend(self) -> None:
        """Look at calls where more than their arrays counts."""
        assert self.capture is not None
        wanted = self._passes is not None or self._masks.active or self._masks.used or self._first is not None
        self.capture.called = self._called if wanted else None

    def _called(self, name: str, padding: Tensor | None) -> Call:
        if self._first is not None:
            self._check_first(name)
        return Call(self._masks.called(padding), running() >= 0 if self._passes is None else self._passes.called(name))

    def _check_first(self, called: str) -> None:
        """Compare the first call of all with what was taken for the first layer by the order of the model."""
        first, self._first = self._first, None
        if called != first:
            kind = self.core.preconditioner.blocks[next(iter(self.layout.model.blocks(first or "").values()))].method.name
            warnings.warn(
                f"layer {called!r} is called first, but {first!r} comes first in the model and is treated as the first layer ({kind}): "
                f"say first_layer={called!r} to {type(self.method).__name__}",
                stacklevel=2,
            )
        self._attend()

    def _sink(self, name: str, inputs: Tensor, grads: Tensor | None, outputs: tuple[int, ...], call: Call | None) -> None:
        layer, inputs, grads = as_used(self.layout.model.layers[name], inputs, grads, outputs)
        wanted = self.capture is None or self.capture.wanted or self.method.fisher in ("mc", "exact")
        mask = None
        if wanted or (call is not None and call.masks):
            if wanted and self._examples is not None:
                self._examples.note(name, inputs.shape)
            inputs, taken = layer.capture(inputs, grads)
            if call is not None:
                mask = self._mask(name, layer, inputs, call)
            if wanted:
                self._reduce(name, Use(layer, inputs, taken, mask), call)
        if self.method.fisher == "empirical" and grads is not None:
            # the backward pass reaches the output layer first, and its rows are the terms of the loss
            self._output_layer = self._output_layer or name
            if name == self._output_layer:
                self._terms += _terms(layer, outputs, mask, getattr(self.loss, "per_entry", False))
        elif self.method.fisher == "forward":
            # nothing tells the order of the backward pass: the layer that was called last stands for the output layer
            self._terms = self._counts[name] = self._counts.get(name, 0.0) + _terms(layer, outputs, mask, False)

    def _mask(self, name: str, layer: Any, inputs: Tensor, call: Call) -> Tensor | None:
        if call.again and not call.masks and self._masks.used and not layer.unmaskable:
            self._refuse(name, RECOMPUTED)
        return self._masks.fitting(layer, call.masks, inputs)

    def _reduce(self, name: str, use: Use, call: Call | None) -> None:
        """Reduce a use, or hold it until those are there that belong to it."""
        if self._passes is None:
            found = self.core.reduce(self.state, name, use.inputs, use.output_grads, mask=use.mask, use=use.layer)
            merge(self._statistics, found)
        elif self.method.fisher == "empirical":
            self._passes.fired(name, use, call is not None and call.again)
        else:
            self._passes.hold(name, use)

    def _take(self, name: str, uses: list[Use]) -> None:
        merge(self._statistics, self.core.reduce_all(self.state, name, uses))

    def _refuse(self, name: str, why: str) -> None:
        self._refused[name] = why

    def backward_fisher(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> None:
        """See :meth:`kfcore_torch.Optimizer.backward_fisher`."""
        assert self.capture is not None
        if self.method.fisher not in ("mc", "exact"):
            raise ValueError(f"`backward_fisher` is for fisher='mc' and 'exact'; this method has fisher={self.method.fisher!r}")
        assert self.loss is not None
        self._terms += self.loss.terms(outputs.detach(), targets)
        if not self.capture.wanted:
            return
        uses = self.capture.take()
        if not uses:
            raise RuntimeError("`outputs` come from no captured forward pass: call the model, with gradients enabled, before this")
        self.capture.wanted = False  # a checkpointed region runs its forward pass again in here
        try:
            for _, seen in pull_back(self.method, self.loss, outputs, targets, generator, uses):
                with torch.no_grad():
                    for use, grad in seen:
                        self.capture.deliver(use, grad)
                    if self._passes is not None:
                        self._passes.close()
        finally:
            self.capture.wanted = True

    # -- step ----------------------------------------------------------------------------------------------------------

    def directions(self, damping: Mapping[str, float | None], terms: float | Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the mean loss and their directions, by parameter; the state moves on by one step."""
        grads, statistics, terms = self._gather(terms)
        grads, found, curvature = self.core.directions(
            grads, self.state, statistics, terms=terms, loss_scale=self._scale(), damping=self._by_block(damping)
        )
        self.state = self.state._replace(curvature=curvature)
        self.moved()
        return grads, found

    def updates(
        self, overrides: Mapping[str, Any], terms: float | Tensor | None, lent: tuple[Predict, LossFunction] | None = None
    ) -> dict[str, Tensor]:
        """Updates by parameter; the state moves on by one step. ``lent`` makes the objective of a rule with a quadratic model."""
        grads, statistics, terms = self._gather(terms)
        overrides = dict(overrides)
        overrides["damping"] = self._by_block(overrides["damping"])
        objective = None if lent is None else self.objective(*lent)
        scale, values = self._scale(), self.layout.values()
        found, self.state = self.core.update(
            values, grads, self.state, statistics, terms=terms, loss_scale=scale, overrides=overrides, objective=objective
        )
        self.moved()
        return found

    def objective(self, predict: Predict, loss_fn: LossFunction) -> Objective:
        """The loss ``loss_fn(predict())``, that of all ranks."""
        across = None if self.all_reduce is None else self._as_gradients
        return Objective(predict, loss_fn, self.layout, self._aside, self._derivatives, across)

    def _gather(self, terms: float | Tensor | None) -> tuple[dict[str, Tensor], dict[str, Any] | None, Any]:
        assert self.capture is not None
        grads = self.layout.grads()
        if not grads:
            raise RuntimeError("`step` found no gradient in any parameter: call `loss.backward()` before it")
        sparse = [name for name, g in grads.items() if g.layout != torch.strided]
        if sparse:
            raise TypeError(f"sparse gradients are not supported, got one for {sparse[0]!r}: use sparse=False in that embedding")
        if not self.capture.wanted:
            terms = self._count_terms(terms)
            summed = self.all_reduce is not None and self.core.loss_reduction == "sum"
            return grads, None, self._sum_over_ranks(terms) if summed else terms
        if self._passes is not None:
            self._passes.close()
        self._masks.check_fitted()
        self._check_captured(grads)
        # in the order of the model, which is the same on all ranks
        statistics = {name: self._statistics[name] for name in self.core.preconditioner.blocks if name in self._statistics}
        terms = self._count_terms(terms)
        if self.all_reduce is not None:
            statistics, terms = self.core.across(statistics, terms, self._sum_over_ranks)
        return grads, statistics, terms

    def _count_terms(self, terms: float | Tensor | None) -> Any:
        assert self.capture is not None
        if terms is not None:
            return terms
        if isinstance(self._terms, Tensor) or self._terms > 0:
            return self._terms
        if self.core.loss_reduction == "sum":
            raise ValueError("`terms` must be given to `step` for a summed loss where no output gradients were captured in this step")
        return 1.0

    def _check_captured(self, grads: Mapping[str, Tensor]) -> None:
        """Move layers whose weight has a gradient to the fallback if nobody saw them called, or not by example; or say so.

        Once there are statistics of a layer that is not seen any more, they stay; those not by example move whenever they are found.
        """
        silent: dict[str, str] = {}
        refused = self._refused if self._examples is None else self._examples.strays() | self._refused
        for name in refused:
            for block in self.layout.model.blocks(name).values():
                self._statistics.pop(block, None)
        for name, how in ({} if self._examples is None else self._examples.uneven).items():
            if name not in self._told:
                self._told.add(name)
                warnings.warn(f"layer {name!r} has scales of the gradients of {how}", stacklevel=5)
        unseen = "no call of the module in training mode was seen" if self.method.fisher == "forward" else "its module was not called"
        for name in self.core.captured:
            blocks = self.layout.model.blocks(name).values()
            if self.layout.model.roles(name)["weight"] in grads and self._statistics.keys().isdisjoint(blocks):
                silent[name] = refused.get(name, f"its weight is used, but {unseen}")
        if not silent:
            return
        if not refused and len(silent) == len(self.core.captured) and self.method.fisher in ("mc", "exact"):
            raise RuntimeError(
                f"fisher={self.method.fisher!r} has no statistics in this step: call `optimizer.backward_fisher(outputs, targets)` "
                "after the forward pass and before `loss.backward()`"
            )
        if self.strict:
            raise RuntimeError(f"`strict` is set, but {'; '.join(f'{n}: {why}' for n, why in silent.items())}")
        first = int(self.state.curvature.observed) == 0
        new = {name: why for name, why in silent.items() if name not in self._warned or name in refused}
        self._warned |= set(new)
        for name, why in new.items():
            warnings.warn(f"layer {name!r} has no statistics in this step: {why}", stacklevel=5)
        moving = {name: why for name, why in new.items() if first or name in refused}
        if moving:
            self._excluded |= moving
            statistics, terms = self._statistics, self._terms
            self.plan(list(self.layout.parameters.values()))
            self._statistics, self._terms = statistics, terms

    def _by_block(self, damping: Mapping[str, float | None]) -> dict[str, float]:
        """Damping by block from that by parameter: a block follows the group of its first parameter."""
        blocks: dict[str, float] = {}
        if all(value is None for value in damping.values()):
            return blocks
        for parameter, names in self.layout.model.block_names().items():
            value = damping.get(parameter)
            for name in names:
                if value is not None:
                    blocks.setdefault(name, value)
        return blocks

    def _scale(self) -> float:
        """Factor in the captured output gradients: only those of the training loss have one."""
        if self.grad_scaler is None or self.method.fisher != "empirical" or not self._statistics:
            return 1.0
        return float(self.grad_scaler.get_scale())

    def _sum_over_ranks(self, x: Any) -> Any:
        assert self.all_reduce is not None
        first = next(iter(self.layout.parameters.values()))
        tensor = x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device=first.device)
        self.all_reduce(tensor)
        return tensor if isinstance(x, Tensor) else float(tensor)

    def _as_gradients(self, x: Tensor) -> Tensor:
        """What becomes of gradients of the ranks' own losses in those of the whole: their mean, or the sum of summed losses."""
        wide = x.detach().reshape(-1).to(torch.promote_types(x.dtype, torch.float32))
        both = torch.cat([wide, torch.ones_like(wide[:1])])
        assert self.all_reduce is not None
        self.all_reduce(both)
        total = both[:-1].reshape(x.shape)
        return total if self.core.loss_reduction == "sum" else total / both[-1]

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name and a JSON text: loadable with ``weights_only=True``."""
        header = header_of(self.core, self.state) | {"excluded": self._excluded}
        return {"arrays": named(self.core, self.state), "header": json.dumps(header)}

    def restored(self, saved: Any) -> tuple[OptimizerState, dict[str, str]]:
        """The state in what :meth:`state_dict` gave and the layers excluded there, checked against this model; nothing is changed."""
        if not isinstance(saved, Mapping) or set(saved) != {"arrays", "header"}:
            raise CheckpointError("`state_dict` has no kfcore state: it is of another optimizer")
        try:
            header = json.loads(saved["header"])
            arrays = {name: kfcore.to_numpy(x) for name, x in saved["arrays"].items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"`state_dict` has a damaged kfcore state: {error}") from error
        return self._checked(arrays, header)

    def _checked(self, arrays: Mapping[str, Any], header: Any) -> tuple[OptimizerState, dict[str, str]]:
        try:
            excluded = dict(header["excluded"] if "excluded" in header else self._excluded_by(header["blocks"]))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"the checkpoint has a damaged kfcore header: {error}") from error
        core, like = self.core, self.state
        if set(excluded) != set(self._excluded):
            found, core = self._laid_out(list(self.layout.parameters.values()), excluded)
            like = core.init({n: p.detach() for n, p in found.values().items()})
        return from_arrays(core, like, arrays, header), excluded

    def _excluded_by(self, blocks: Mapping[str, Any]) -> dict[str, str]:
        """Layers excluded here of which a file of another framework, which says nothing of that, has no block either."""
        fallback = default_fallback(self.method) if self._options["fallback"] is None else self._options["fallback"]
        covered = {name for name, block in blocks.items() if block["method"] != fallback.name or name in self._excluded}
        return {name: why for name, why in self._excluded.items() if covered.isdisjoint((name, f"{name}.weight"))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file that every framework reads."""
        arrays, header = to_arrays(self.core, self.state)
        write(path, arrays, header | {"excluded": self._excluded})

    def load(self, path: str | os.PathLike[str], names: Mapping[str, str] | None = None) -> None:
        """Read such a file."""
        self.restore(*self._checked(*renamed(*read(path), names or {})))

    def restore(self, state: OptimizerState, excluded: dict[str, str]) -> None:
        """Go on from ``state``, of a model without the layers ``excluded``."""
        if set(excluded) != set(self._excluded):
            self._excluded = excluded
            self.plan(list(self.layout.parameters.values()))
        self.state = state
        self.moved()

    def _adopt(self, core: ModelOptimizer, state: OptimizerState) -> None:
        old, new = core.preconditioner.blocks, self.core.preconditioner.blocks
        kept = {name: state.curvature.blocks[name] for name in new if name in old and old[name] == new[name]}
        momentum = {name: state.step.momentum[name] for name in self.state.step.momentum if name in state.step.momentum}
        self.state = OptimizerState(
            state.curvature._replace(blocks=self.state.curvature.blocks | kept),
            state.step._replace(momentum=self.state.step.momentum | momentum),
        )

    @staticmethod
    def _fallback(core: ModelOptimizer) -> str:
        return next(core.preconditioner.blocks[name].method.name for name in core.model.others)


def _terms(layer: Any, outputs: tuple[int, ...], mask: Tensor | None, per_entry: bool) -> float | Tensor:
    """Outputs of a layer, of all examples and at all positions that are real, or the numbers in them."""
    width = layer.size if isinstance(layer, Norm) else layer.shape[0] * math.prod(layer.stack)
    if mask is None:
        rows: float | Tensor = math.prod(outputs) // width
    else:
        rows = float(mask.sum()) if mask.is_cpu else mask.sum()
    return rows * width if per_entry else rows
