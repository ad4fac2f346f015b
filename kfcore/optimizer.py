"""The optimizer of a model on flat dictionaries of parameters: what the adapters, and :mod:`kfcore.arrays`, drive."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from kfcore import schedule, stepsize
from kfcore._array import Array, cast, cond, known, namespace, to_numpy
from kfcore.curvature.base import Method, Needs
from kfcore.damping import LevenbergMarquardt
from kfcore.ladder import JITTERED, WIDENED
from kfcore.model import Model
from kfcore.modelled import AroundParameters, ModelledStep, Prepared
from kfcore.preconditioner import Preconditioner, PreconditionerState, blocks_of
from kfcore.quadratic import Objective
from kfcore.report import Report, report
from kfcore.statistics import GradientRows, KroneckerStatistics, Use, rows_of
from kfcore.stepsize import StepSize, StepState

Reduction = Literal["mean", "sum"]
Statistics = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] | None


class OptimizerState(NamedTuple):
    """State of an optimizer: arrays only."""

    curvature: PreconditionerState
    """Curvature blocks and the step count."""
    step: StepState
    """Momentum."""


class ModelOptimizer:
    """The optimizer of a :class:`kfcore.model.Model` on flat dictionaries of parameters; pure functions of its state.

    This is the level at which an adapter drives the core: it captures, calls :meth:`reduce` on what it saw, and hands the merged
    statistics and the gradients to :meth:`update`.

    Parameters
    ----------
    method, model
        The approximation, and the model's layers and parameters.
    step
        The step rule.
    loss_reduction
        ``"mean"`` if the loss whose gradients come in is a mean over its terms, ``"sum"`` if it is their sum. Damping, clip and learning
        rate mean the same under both, and for every batch size.
    fallback
        Method for parameters outside every layer; a :class:`kfcore.Diagonal` with the damping and schedules of ``method`` if not given.
    group, spread
        See :class:`kfcore.Preconditioner`.
    """

    def __init__(
        self,
        method: Method,
        model: Model,
        step: StepSize,
        *,
        loss_reduction: Reduction = "mean",
        fallback: Method | None = None,
        group: bool = False,
        spread: bool = False,
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"`method` must be a curvature method such as kfcore.KFAC(), got {method!r}")
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"`loss_reduction` must be 'mean' or 'sum', got {loss_reduction!r}")
        self.method = method
        self.model = model
        self.step_size = step
        self.loss_reduction = loss_reduction
        blocks = blocks_of(method, model.layers, model.others, fallback)
        if not blocks:
            raise ValueError("`layers` and `params` are both empty: there is nothing to optimize")
        self.preconditioner = Preconditioner(blocks, group=group, spread=spread)
        self._modelled = ModelledStep(step, model, self.preconditioner, self._adaptive(), self._direct)
        self._blind = frozenset(name for name, block in blocks.items() if not block.method.requires(block.layer))

    def init(self, params: Mapping[str, Array]) -> OptimizerState:
        """State that has seen nothing."""
        like = {name: params[parameter] for parameter, names in self.model.block_names().items() for name in names}
        return OptimizerState(self.preconditioner.init(like), stepsize.init(self.step_size, params, self._modelled.rule))

    def made(self, state: OptimizerState) -> bool:
        """Whether ``state`` is one of this optimizer, by the names of its blocks."""
        return state.curvature.blocks.keys() == self.preconditioner.blocks.keys()

    def stats_due(self, state: OptimizerState) -> Any:
        """Whether the coming step wants statistics: nothing need be captured where not."""
        return self.preconditioner.stats_due(state.curvature.steps)

    def needs(self, layer: str) -> Needs:
        """What must be captured of a layer."""
        needs = Needs.NOTHING
        for name in self.model.blocks(layer).values():
            block = self.preconditioner.blocks[name]
            needs |= block.method.requires(block.layer)
        return needs

    @functools.cached_property
    def captured(self) -> tuple[str, ...]:
        """Layers of which something must be captured, in the order of the model."""
        return tuple(name for name in self.model.layers if self.needs(name) & (Needs.INPUTS | Needs.OUTPUT_GRADS))

    def reduce(
        self,
        state: OptimizerState,
        layer: str,
        inputs: Array | None,
        output_grads: Array | None,
        *,
        mask: Array | None = None,
        use: Any = None,
    ) -> dict[str, Any]:
        """Statistics, by block, of one capture of ``layer``: ``inputs [N, S, in]``, ``output_grads [N, S, out]``.

        ``mask [N, S]`` is true at the positions that are real, see :meth:`kfcore.Method.reduce`. ``use`` describes the layer as it was
        used there, if that is not how the model has it: with another stride or padding, say. Its parameters and blocks must be the same.
        """
        parts = None if use is None or use is self.model.layers[layer] else use.blocks()
        statistics = {}
        for suffix, name in self.model.blocks(layer).items():
            if name in self._blind:
                continue
            block, old = self.preconditioner.blocks[name], state.curvature.blocks[name]
            part = block.layer if parts is None else parts[suffix]
            statistics[name] = block.method.reduce(part, old, inputs, output_grads, mask=mask)
        return statistics

    def reduce_all(self, state: OptimizerState, layer: str, uses: Sequence[Use]) -> dict[str, Any]:
        """:meth:`reduce` of several uses of ``layer`` by the same examples of one batch, whose gradients add up in each example.

        A method that looks at gradients of single examples must have all uses at once; for the others it is the sum of the uses.
        """
        if len(uses) == 1:
            use = uses[0]
            return self.reduce(state, layer, use.inputs, use.output_grads, mask=use.mask, use=use.layer)
        whole: Any = [use.layer for use in uses]
        parts = [description.blocks() for description in whole]
        statistics = {}
        for suffix, name in self.model.blocks(layer).items():
            if name in self._blind:
                continue
            block, old = self.preconditioner.blocks[name], state.curvature.blocks[name]
            of_block = [use._replace(layer=part[suffix]) for use, part in zip(uses, parts, strict=True)]
            statistics[name] = block.method.reduce_all(of_block, old)
        return statistics

    def update(
        self,
        params: Mapping[str, Array],
        grads: Mapping[str, Array],
        state: OptimizerState,
        statistics: Statistics,
        *,
        terms: float | Array | None,
        loss_scale: float | Array = 1.0,
        overrides: Mapping[str, Any] | None = None,
        rows: Mapping[str, GradientRows] | None = None,
        objective: Objective | None = None,
    ) -> tuple[dict[str, Array], OptimizerState]:
        """Updates to be added to the parameters, and the new state.

        Parameters
        ----------
        params, grads
            By name. Parameters without a gradient are left alone.
        statistics
            Merged results of :meth:`reduce` from raw output gradients, by block; a function of the state that computes them,
            called only when they are due; or ``None`` when they are not.
        terms
            Number of terms in the loss: examples, or tokens, or numbers compared. May be ``None`` for a mean loss at a step at which no
            statistics are due.
        loss_scale
            Factor by which the captured output gradients (not ``grads``) were scaled, as by mixed-precision training.
        overrides
            ``"learning_rate"``, ``"weight_decay"`` and ``"clip"`` as in :func:`kfcore.stepsize.apply`, and ``"damping"``: one
            value, or one a block by name.
        rows
            By block, rows whose product is the gradient, as ``grads`` have it. Where not given, those that the statistics hold are tried.
        objective
            The loss whose gradients came in, for a rule with ``quadratic``; as it is, a mean or a sum.
        """
        overrides = dict(overrides or {})
        damping, count = overrides.pop("damping", None), state.curvature.steps
        given = {"terms": terms, "loss_scale": loss_scale, "rows": rows}
        if self.step_size.quadratic is None:
            if objective is not None:
                raise ValueError("`objective` has no use without `quadratic`, which asks it for products with the curvature matrix")
            grads, directions, curvature = self.directions(grads, state, statistics, damping=damping, **given)
            updates, step = stepsize.apply(self.step_size, params, grads, directions, state.step, count, overrides)
            return updates, OptimizerState(curvature, step)
        if objective is None:
            raise ValueError("`objective` must be given at every step with `quadratic`, whose model of the loss it tells")
        settings = stepsize.settings(self.step_size, count, overrides, grads)
        decays = stepsize.coupled(self.step_size, settings["weight_decay"], grads)
        prepared, over = self._prepared(grads, state, statistics, params=params, decays=decays, **given)
        loss = AroundParameters(objective, 1.0 if over is None else over, params, decays)
        updates, curvature, step = self._modelled.update(prepared, loss, state.step, settings, damping)
        return updates, OptimizerState(curvature, step)

    def directions(
        self,
        grads: Mapping[str, Array],
        state: OptimizerState,
        statistics: Statistics,
        *,
        terms: float | Array | None,
        loss_scale: float | Array = 1.0,
        damping: Any = None,
        rows: Mapping[str, GradientRows] | None = None,
    ) -> tuple[dict[str, Array], dict[str, Array], PreconditionerState]:
        """The first half of :meth:`update`: gradients of the mean loss, their directions, and the new curvature state."""
        prepared, _ = self._prepared(grads, state, statistics, terms=terms, loss_scale=loss_scale, rows=rows)
        directions, curvature = self._direct(prepared, damping)
        return dict(prepared.grads), directions, curvature._replace(steps=curvature.steps + 1)

    def _prepared(
        self,
        grads: Mapping[str, Array],
        state: OptimizerState,
        statistics: Statistics,
        *,
        terms: float | Array | None,
        loss_scale: float | Array,
        rows: Mapping[str, GradientRows] | None,
        params: Mapping[str, Array] | None = None,
        decays: Mapping[str, Any] | None = None,
    ) -> tuple[Prepared, float | Array | None]:
        """Gradients of the mean loss and curvature with the statistics of this step, and what a summed loss was divided by.

        Decays that are not zero join the gradients, after the statistics have been taken.
        """
        if not grads:
            raise ValueError("`grads` is empty: no parameter has a gradient, so run the backward pass before the step")
        if terms is None and self.loss_reduction == "sum":
            raise ValueError("`terms` must be given for a summed loss, at every step")
        _check_terms(terms)
        scale = _positive(terms) if self.loss_reduction == "sum" else None
        grads = {name: grad if scale is None else grad / scale for name, grad in grads.items()}
        matrices = self.model.matrices(grads)
        curvature, seen = self._observe(state, statistics, matrices, terms, loss_scale)
        if rows is None:
            rows = {name: found for name, part in seen.items() if (found := rows_of(part, 1.0 / loss_scale)) is not None}
        if scale is not None:
            rows = {name: found._replace(scale=found.scale / scale) for name, found in rows.items()}
        if params is not None and decays is not None and any(stepsize.nonzero(decay) for decay in decays.values()):
            grads = {name: stepsize.decayed(grad, params[name], decays[name]) for name, grad in grads.items()}
            matrices, rows = self.model.matrices(grads), {}
        return Prepared(grads, matrices, curvature, rows), scale

    def _direct(self, prepared: Prepared, damping: Any) -> tuple[dict[str, Array], PreconditionerState]:
        """Directions by parameter, and the curvature with the refreshes that are due before or after them."""
        curvature = self.preconditioner.refresh(prepared.curvature, damping)
        directions = self.preconditioner.precondition(curvature, prepared.matrices, prepared.rows)
        curvature = self.preconditioner.refresh_late(curvature, prepared.curvature.refreshed, damping)
        if self.step_size.graft:
            directions = stepsize.graft(prepared.matrices, directions)
        return self.model.parameters(directions), curvature

    def _adaptive(self) -> LevenbergMarquardt | None:
        """What adapts the damping of the methods."""
        methods = {id(block.method): block.method for block in self.preconditioner.blocks.values()}.values()
        rules = [rule for method in methods if (rule := method.rule.adaptive) is not None]
        if not rules:
            return None
        if self.step_size.quadratic is None:
            raise ValueError(
                "`damping` is adaptive, and only the quadratic model can judge it: give `quadratic=kfcore.QuadraticModel()` too"
            )
        if any(rule != rules[0] for rule in rules):
            raise ValueError(f"`fallback` must adapt its damping as `method` does, got {rules[1]!r} and {rules[0]!r}")
        rigid = [method.name for method in methods if method.rule.adaptive is not None and not method.tikhonov]
        if rigid:
            raise ValueError(f"`damping` of {rigid[0]} cannot be a LevenbergMarquardt, for it is not added to the curvature")
        return rules[0]

    def across(
        self, statistics: Mapping[str, Any], terms: float | Array, total: Callable[[Any], Any]
    ) -> tuple[dict[str, Any], float | Array]:
        """Statistics and terms of a whole batch from those of this rank's part of it.

        ``total`` sums an array or a number over the ranks. Each rank's output gradients must come from its own mean (or sum) loss.
        """
        everyone = total(terms)
        summed = {name: part.weighing(self._share(terms)).across(total) for name, part in statistics.items()}
        weight, over = 1.0 / _positive(self._share(everyone)), self._over(everyone)
        return {name: part.weighing(weight).over(over, everyone) for name, part in summed.items()}, everyone

    def diagnostics(self, state: OptimizerState) -> dict[str, Any]:
        """Counters as host numbers: steps taken and skipped, and by block the statistics dropped, the refreshes that failed,
        and the factors that needed jitter, or float64, to be solved (see :mod:`kfcore.ladder`).

        Blocks where nothing went wrong are not listed.
        """

        def nonzero(field: str, at: Any = ...) -> dict[str, int]:
            counters = {name: getattr(block, field, None) for name, block in state.curvature.blocks.items()}
            counts = {name: int(to_numpy(counter)[at].sum()) for name, counter in counters.items() if counter is not None}
            return {name: count for name, count in counts.items() if count}

        return {
            "steps": int(to_numpy(state.curvature.steps)),
            "skipped_steps": int(to_numpy(state.step.skipped)),
            "dropped_statistics": nonzero("dropped"),
            "kept_refreshes": nonzero("kept"),
            "jittered_factors": nonzero("rungs", (..., JITTERED - 1)),
            "widened_factors": nonzero("rungs", (..., WIDENED - 1)),
        } | ({} if state.step.control is None else {name: to_numpy(x).item() for name, x in state.step.control._asdict().items()})

    def report(self, reasons: Mapping[str, str] | None = None, itemsize: int = 4) -> Report:
        """Which block every parameter has, why, and what it costs; ``reasons`` by parameter replace the default words."""
        return report(self.model, self.preconditioner.blocks, self.step_size, reasons or {}, itemsize)

    def _observe(
        self,
        state: OptimizerState,
        statistics: Statistics,
        matrices: Mapping[str, Array],
        terms: float | Array | None,
        loss_scale: float | Array,
    ) -> tuple[PreconditionerState, Mapping[str, KroneckerStatistics]]:
        """Take statistics where they are due: those captured, with the loss reduction undone, and those of the gradients.

        Gives those captured of the training loss too, unless they were computed in a branch of a compiled program.
        """
        curvature = state.curvature
        if len(self._blind) == len(self.preconditioner.blocks):
            return curvature, {}
        due = self.stats_due(state)
        if statistics is None and self.captured and known(schedule.due(self.method.stats_every, curvature.steps)):
            raise ValueError("`statistics` are missing at a step at which they are due: capture the layers' inputs and output gradients")
        if statistics is not None and not callable(statistics):
            captured = statistics
            statistics = lambda _: captured  # noqa: E731

        seen: dict[str, KroneckerStatistics] = {}

        def take(curvature: PreconditionerState) -> PreconditionerState:
            if terms is None:
                raise ValueError("`terms` must be given at a step at which statistics are due")
            over = self._over(terms) * loss_scale * loss_scale
            new: dict[str, Any] = {name: part.over(over, terms) for name, part in statistics(state).items()} if statistics else {}
            if due is True and self.method.fisher == "empirical":
                seen.update(new)
            for name, block in self.preconditioner.blocks.items():
                needs = block.method.requires(block.layer)
                if Needs.GRADIENT not in needs:
                    continue
                captured = new.pop(name, None)
                # a method that wants both observes both or none
                if name in matrices and (captured is not None or Needs.INPUTS not in needs):
                    found = block.method.reduce(block.layer, curvature.blocks[name], grad=matrices[name], terms=terms)
                    new[name] = found if captured is None else captured + found
            return self.preconditioner.observe(curvature, new) if new else curvature

        return cond(due, take, lambda old: old, curvature), seen

    def _over(self, terms: float | Array) -> float | Array:
        """What sums of raw output gradients are divided by to give the output factor of a mean loss.

        Training gradients of a mean loss are ``g / M``; those of a sum, and pulled-back Fisher vectors, are ``g``.
        """
        if self.method.fisher == "empirical":
            return _reciprocal(terms) if self.loss_reduction == "mean" else terms
        return terms * self.method.mc_samples if self.method.fisher == "mc" else terms

    def _share(self, terms: float | Array) -> float | Array:
        """``terms / self._over(terms)``, also of no terms: what the output sum of a part of the batch weighs in that of all.

        The sum of a whole has the same weight, and is divided by it to be one of raw output gradients again.
        """
        if self.method.fisher == "empirical":
            return terms * terms if self.loss_reduction == "mean" else 1.0
        return 1.0 / self.method.mc_samples if self.method.fisher == "mc" else 1.0


def _check_terms(terms: Any) -> None:
    if isinstance(terms, (int, float)) and not (math.isfinite(terms) and terms >= 0):
        raise ValueError(f"`terms` must be the number of terms in the loss, got {terms!r}")


def _positive(terms: float | Array) -> float | Array:
    """``terms``, or 1 for a batch without any."""
    if isinstance(terms, (int, float)):
        return terms if terms > 0 else 1.0
    xp = namespace(terms)
    return xp.where(terms > 0, terms, xp.ones_like(terms))


def _reciprocal(terms: float | Array) -> float | Array:
    """``1 / terms``, or 0, which no statistics survive, for a batch without any."""
    if isinstance(terms, (int, float)):
        return 1.0 / terms if terms > 0 else 0.0
    xp = namespace(terms)
    return xp.where(terms > 0, 1.0 / _positive(terms), xp.zeros_like(terms))


def merge(total: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Add statistics by block into ``total``."""
    for name, part in new.items():
        total[name] = total[name] + part if name in total else part


def added(param: Array, update: Array) -> Array:
    """``param + update``, summed in the wider dtype and returned in that of ``param``."""
    xp = namespace(param)
    return cast(xp, cast(xp, param, update.dtype) + update, param.dtype)
