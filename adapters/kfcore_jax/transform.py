"""The optimizers: optax transformations around the core."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

import kfcore
from kfcore import Embedding, Method, ModelOptimizer, Norm, OptimizerState, QuadraticModel, Report, StepSize, schedule
from kfcore._array import Schedule, factor_dtype
from kfcore.curvature.base import Needs
from kfcore.damping import check_positive
from kfcore.optimizer import merge
from kfcore.statistics import GradientRows, Use, rows_of
from kfcore.stepsize import guarded
from kfcore_jax.analysis import is_trained
from kfcore_jax.layout import Layout, alike, leaves_of, path_of, without_bias
from kfcore_jax.model import Model
from kfcore_jax.objective import LossFunction, Objective, Predict
from kfcore_jax.records import Records

Number = float | jax.Array | Schedule


class Transformation(optax.GradientTransformationExtraArgs):
    """An optax transformation whose ``update`` also takes ``records``; with the files and reports of the core."""

    core: _Core

    @classmethod
    def of(cls, core: _Core) -> Transformation:
        """The transformation that ``core`` computes."""
        made = cls(cast("Any", core.init), cast("Any", core.update))
        made.core = core
        return made

    def report(self, params: Any) -> Report:
        """For every parameter: its block, why, sizes, bytes, operations a refresh and a step. Prints as a table."""
        layout, optimizer = self.core.bind(params)
        wide = any(x.dtype == jnp.float64 for x in leaves_of(params).values())
        return optimizer.report(layout.reasons, 8 if wide else 4)

    def diagnostics(self, state: OptimizerState) -> dict[str, Any]:
        """Counters: see :meth:`kfcore.ModelOptimizer.diagnostics`."""
        return self.core.of_state(state).diagnostics(state)

    def save(self, path: str | os.PathLike[str], state: OptimizerState) -> None:
        """Write a state to a file that every framework reads: see :func:`kfcore.save`."""
        kfcore.save(path, self.core.of_state(state), state)

    def load(self, path: str | os.PathLike[str], like: OptimizerState, *, names: Mapping[str, str] | None = None) -> OptimizerState:
        """The state in such a file; ``like`` is a state of this optimizer, ``names`` as in :func:`kfcore.load`."""
        return kfcore.load(path, self.core.of_state(like), like, names=names)


def optimizer(
    method: Method,
    model: Model,
    *,
    learning_rate: Number | None = None,
    momentum: Number = 0.9,
    nesterov: bool | Literal["delayed"] = False,
    weight_decay: Number = 0.0,
    decay: Literal["decoupled", "coupled"] = "decoupled",
    clip: Number | None = None,
    graft: bool = False,
    quadratic: QuadraticModel | None = None,
    damping: Number | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    fallback: Method | None = None,
    axis_name: str | None = None,
    group: bool | None = None,
    spread: bool = False,
) -> Transformation:
    """Curvature-preconditioned gradient descent with momentum: ``update(grads, state, params, records=records)``.

    Every number may be a Python number, an array (as ``optax.inject_hyperparams`` gives) or a function of the step.

    Parameters
    ----------
    method
        Such as :class:`kfcore.KFAC`.
    model
        What :func:`kfcore_jax.trace` made of the loss.
    learning_rate, momentum, nesterov, weight_decay, decay, clip, graft
        See :class:`kfcore.StepSize`.
    quadratic
        Learning rate, momentum or both from the quadratic model of the loss, see :class:`kfcore.QuadraticModel`. Then ``update`` needs the
        loss in two functions too, ``update(grads, state, params, records=records, predict=predict, loss_fn=loss_fn)``.
    damping
        Replaces that of ``method``.
    loss_reduction
        ``"mean"`` or ``"sum"``: what the loss is over its terms. Their number is in the records; give ``terms`` to ``update`` where it is
        not the rows of the output layer.
    fallback
        Method for parameters of no layer, a :class:`kfcore.Diagonal` if not given.
    axis_name
        Mapped axis (``shard_map``, ``vmap``) over which the batch is spread: statistics are summed over it. Each part's loss must be
        its own mean (or sum), and the gradients given to ``update`` those of the whole: ``pmean`` of the parts', or, under
        ``shard_map(check_vma=True)``, which already summed those of replicated parameters, divided by the size of the axis.
    group, spread
        See :class:`kfcore.Preconditioner`; ``group`` is on by default where the default device is not a CPU.
    """
    step = StepSize(
        learning_rate=None if learning_rate is None else _schedule(learning_rate),
        momentum=_schedule(momentum),
        nesterov=nesterov,
        weight_decay=_schedule(weight_decay),
        decay=decay,
        clip=None if clip is None else _schedule(clip),
        graft=graft,
        quadratic=quadratic,
    )
    options = {"loss_reduction": loss_reduction, "fallback": fallback, "group": group, "spread": spread}
    return Transformation.of(_Core(method, model, step, damping, axis_name, options))


def scale_by_curvature(
    method: Method,
    model: Model,
    *,
    graft: bool = False,
    damping: Number | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    fallback: Method | None = None,
    axis_name: str | None = None,
    group: bool | None = None,
    spread: bool = False,
) -> Transformation:
    """Replace gradients by their directions, inside ``optax.chain``; parameters as in :func:`optimizer`.

    Where a direction is not finite all of them are zero and the step counts as skipped.
    """
    options = {"loss_reduction": loss_reduction, "fallback": fallback, "group": group, "spread": spread}
    return Transformation.of(_Directions(method, model, StepSize(momentum=0.0, graft=graft), damping, axis_name, options))


class _Core:
    """The core's optimizer on trees of parameters, for whichever of them it is given."""

    def __init__(
        self, method: Method, model: Model, step: StepSize, damping: Number | None, axis_name: str | None, options: dict[str, Any]
    ) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"`model` must be what kfcore_jax.trace(loss_fn, params, *args) gave, got {type(model).__name__}")
        if isinstance(damping, (int, float)):
            check_positive("damping", damping)
        self.method, self.model, self.step, self.damping, self.axis_name = method, model, step, damping, axis_name
        # stacking equal blocks saves launches, which cost where the device is not the host
        group = jax.default_backend() != "cpu" if options["group"] is None else options["group"]
        self._options: dict[str, Any] = options | {"group": group}
        self._bound: dict[frozenset[str], tuple[Layout, ModelOptimizer]] = {}
        self._of_layout(model.layout)

    def bind(self, params: Any) -> tuple[Layout, ModelOptimizer]:
        """Layout and optimizer of a tree that holds all parameters of the model, or some (``optax.masked``)."""
        arrays = leaves_of(params)
        paths = frozenset(arrays)
        if paths not in self._bound:
            unknown = sorted(paths - self.model.layout.places.keys())
            if unknown or not paths:
                raise ValueError(f"`params` must be those of the traced model; it has no {', '.join(unknown) or 'parameter in them'}")
            self._of_layout(self.model.layout.only(paths), paths)
        layout, optimizer = self._bound[paths]
        for path, x in arrays.items():
            if tuple(x.shape) != layout.places[path].shape:
                raise ValueError(f"`params` have shape {tuple(x.shape)} at {path}, which is not that of the traced model")
        return layout, optimizer

    def of_state(self, state: OptimizerState) -> ModelOptimizer:
        """The optimizer that made a state, known by its blocks."""
        if not isinstance(state, OptimizerState):
            raise TypeError(f"`state` must be this transformation's own, got {type(state).__name__}; take it out of the chain's")
        for _, optimizer in self._bound.values():
            if optimizer.made(state):
                return optimizer
        raise ValueError("`state` is of another model: this optimizer has no such blocks")

    def init(self, params: Any) -> OptimizerState:
        """State that has seen nothing."""
        layout, optimizer = self.bind(params)
        flat = layout.flat(params)
        if any(isinstance(x, Tracer) or getattr(x, "committed", True) for x in flat.values()):
            # compiled, so that the state lies where the parameters do before the first step as after it, each array in a buffer of its own
            return jax.jit(optimizer.init)(flat)
        empty = optimizer.init({name: np.zeros(x.shape, factor_dtype(jnp, x.dtype)) for name, x in flat.items()})
        return jax.tree.map(jnp.array, empty)

    def update(
        self,
        updates: Any,
        state: OptimizerState,
        params: Any = None,
        *,
        records: Records | None = None,
        terms: Any = None,
        predict: Predict | None = None,
        loss_fn: LossFunction | None = None,
        **extra: Any,
    ) -> tuple[Any, OptimizerState]:
        """Updates to be added to the parameters, and the new state; ``updates`` are the gradients.

        Parameters
        ----------
        records
            Of the same evaluation as the gradients.
        terms
            Number of terms in the loss, where the count in the records is not right.
        predict, loss_fn
            With ``quadratic``, the loss ``loss_fn(predict(params))`` on this batch, in two halves: ``predict`` gives the outputs of the
            network, an array or a tree of arrays, and ``loss_fn`` makes of them the scalar loss. They are run several times, so random
            numbers must come from a key that is the same. The curvature is positive where ``loss_fn`` is convex.
        """
        del extra  # of other transformations in a chain
        layout, optimizer = self.bind(updates)
        if not isinstance(state, OptimizerState) or not optimizer.made(state):
            raise ValueError("`state` is of another model: make one by `init` from the parameters that are trained")
        if records is None:
            raise ValueError("`records` must be given to `update`: take them from `model.value_grad_and_records(params, ...)`")
        if not isinstance(records, Records):
            raise TypeError(f"`records` must be kfcore_jax.Records, got {type(records).__name__}")
        layers = layout.model.layers
        other = [name for name in layers if not all(alike(layers[name], _masked(use, layers[name])) for use in records.uses.get(name, ()))]
        if other:
            raise ValueError(f"`records` have {', '.join(other)} with parameters of other shapes: they are of another model")
        missing = [name for name in layers if name not in records.layers]
        if missing:
            raise ValueError(f"`records` lack the layer{'s' * (len(missing) > 1)} {', '.join(missing)}: they are of another model")
        if params is None and not (isinstance(self.step.weight_decay, (int, float)) and self.step.weight_decay == 0):
            raise ValueError("`params` must be given to `update`: weight decay needs them")
        objective = self._objective(layout, params, predict, loss_fn)
        local = records.terms if terms is None else terms
        everyone = local if self.axis_name is None else jax.lax.psum(local, self.axis_name)

        def statistics(state: OptimizerState) -> dict[str, Any]:
            total = _reduced(optimizer, state, records, layers)
            if self.axis_name is not None:
                total, _ = optimizer.across(total, local, lambda x: jax.lax.psum(x, self.axis_name))
            return total

        flat = layout.flat(updates)
        shown = {} if params is None else layout.flat(params)
        given: dict[str, Any] = {"terms": everyone, "rows": self._rows(layout, optimizer, state, records, updates)}
        if objective is not None:
            given["objective"] = objective
        found, new = self._step(optimizer, shown, flat, state, statistics, given)
        return _unflatten(layout, found, updates), new

    def _objective(self, layout: Layout, params: Any, predict: Predict | None, loss_fn: LossFunction | None) -> Objective | None:
        """What the quadratic model asks for, if there is one."""
        if self.step.quadratic is None:
            return None
        missing = [name for name, x in (("params", params), ("predict", predict), ("loss_fn", loss_fn)) if x is None]
        if missing or predict is None or loss_fn is None:
            raise ValueError(f"`{missing[0]}` must be given to `update` with `quadratic`, which models loss_fn(predict(params))")
        if layout.places.keys() != self.model.layout.places.keys():
            raise ValueError("`params` must be all of the model's with `quadratic`, for `predict` takes them all: leave optax.masked out")

        def across(x: jax.Array) -> jax.Array:
            """As the gradients of parts of a batch."""
            if self.axis_name is None:
                return x
            summed = self._options["loss_reduction"] == "sum"
            return jax.lax.psum(x, self.axis_name) if summed else jax.lax.pmean(x, self.axis_name)

        return Objective(predict, loss_fn, layout, params, across)

    def _rows(
        self, layout: Layout, optimizer: ModelOptimizer, state: OptimizerState, records: Records, grads: Any
    ) -> dict[str, GradientRows]:
        """By block, rows of the gradients that are known to be products of their records.

        Those are the gradients that the records came with, neither changed nor rounded.
        """
        if self.method.fisher != "empirical" or self.axis_name is not None:
            return {}
        same = {path for path, g in leaves_of(grads).items() if records.gradients.get(path) is g and factor_dtype(jnp, g.dtype) == g.dtype}
        names = {place.name for path, place in layout.places.items() if path in same}

        def whole(name: str) -> bool:
            layer, shapes = layout.model.layers[name], [dy.shape for _, dy in records.layers[name] if dy is not None]
            # what is masked has a part in the gradient, if not in the records
            if isinstance(layer, Embedding | Norm) or name in records.masks:
                return False
            shared = any(positions > 1 for *_, positions, _ in shapes)
            few = sum(shape[-3] * shape[-2] for shape in shapes) <= min(layer.shape)
            return few and names.issuperset(layout.model.roles(name).values()) and (layer.sharing == "expand" or not shared)

        # where statistics are due the compiler finds that these are the same
        parts = _reduced(optimizer, state, records, filter(whole, layout.whole))
        found = {name: rows_of(part, 1.0) for name, part in parts.items()}
        return {name: rows._replace(known=True) for name, rows in found.items() if rows is not None}

    def _step(
        self, optimizer: ModelOptimizer, params: Any, grads: Any, state: OptimizerState, statistics: Any, given: dict[str, Any]
    ) -> Any:
        return optimizer.update(params, grads, state, statistics, overrides={"damping": self._damping(state)}, **given)

    def _damping(self, state: OptimizerState) -> Any:
        return schedule.at(self.damping, state.curvature.steps)

    def _of_layout(self, layout: Layout, paths: frozenset[str] | None = None) -> None:
        optimizer = ModelOptimizer(self.method, layout.model, self.step, **self._options)
        self._bound[frozenset(layout.places) if paths is None else paths] = layout, optimizer


def _reduced(optimizer: ModelOptimizer, state: OptimizerState, records: Records, names: Iterable[str]) -> dict[str, Any]:
    """Statistics of the layers ``names``, by block, each use as it is in the program of the records."""
    total: dict[str, Any] = {}
    for name in names:
        layer = optimizer.model.layers[name]
        apart = Needs.TOGETHER not in optimizer.needs(name)
        for uses in records.batches(name, layer, apart=apart):
            merge(total, optimizer.reduce_all(state, name, [_own(use, layer) for use in uses]))
    return total


def _own(use: Use, layer: Any) -> Use:
    """A use of ``layer``, without what belongs to a bias (or shift) that a mask has taken away."""
    described = _masked(use.layer, layer)
    if isinstance(described, Norm) and not described.bias:
        inputs, output_grads = (None if x is None else x[..., : described.size] for x in (use.inputs, use.output_grads))
        return use._replace(layer=described, inputs=inputs, output_grads=output_grads)
    return use._replace(layer=described)


def _masked(use: Any, layer: Any) -> Any:
    """A use of ``layer`` (``None``: as it was traced), without the bias where a mask has taken that away."""
    if use is None:
        return layer
    return without_bias(use) if getattr(use, "bias", None) and not getattr(layer, "bias", None) else use


class _Directions(_Core):
    def _step(
        self, optimizer: ModelOptimizer, params: Any, grads: Any, state: OptimizerState, statistics: Any, given: dict[str, Any]
    ) -> Any:
        _, found, curvature = optimizer.directions(grads, state, statistics, damping=self._damping(state), **given)
        found, step = guarded(found, state.step)
        return found, OptimizerState(curvature, step)


def _schedule(value: Number) -> Any:
    """A Python number or a function as it is, an array as a constant function of the step."""
    if isinstance(value, (int, float)) or callable(value):
        return value
    return lambda _: value


def _unflatten(layout: Layout, found: Mapping[str, jax.Array], like: Any) -> Any:
    """Updates by name in the tree of the gradients; zeros for what is not trained (integers)."""

    def update(keys: Any, grad: Any) -> Any:
        place = layout.places.get(path_of(keys)) if is_trained(grad) else None
        if place is None:
            return grad if grad.dtype == jax.dtypes.float0 else jnp.zeros_like(grad)
        return place.back(found[place.name])

    return jax.tree_util.tree_map_with_path(update, like)
