"""The optimizer for plain arrays: hand-written backward passes on NumPy, CuPy or anything with the array API."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from kfcore._array import Array, Schedule, cast, is_real_floating, namespace, number
from kfcore.curvature.base import Method, Needs
from kfcore.layers import check_layers
from kfcore.layers.base import live_count
from kfcore.model import Model, flatten, unflatten
from kfcore.optimizer import ModelOptimizer, OptimizerState, Reduction, Statistics, added, merge
from kfcore.quadratic import QuadraticModel, inner
from kfcore.report import Report
from kfcore.stepsize import StepSize

Record: TypeAlias = tuple[Array, Array | None] | tuple[Array, Array | None, Array | None]
"""``(inputs, output_grads)``, or ``(inputs, output_grads, mask)``."""
Records: TypeAlias = Mapping[str, Record | list[Record]]
Product: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]
LossFunction: TypeAlias = Callable[[Mapping[str, Any]], Any]


class Optimizer:
    """The optimizer for arrays: you wrote the backward pass, this makes the step. Pure functions of an explicit state.

    Parameters
    ----------
    method
        The approximation, such as :class:`kfcore.KFAC`.
    layers
        Layer descriptions by name, such as ``{"fc1": kfcore.Linear(784, 128)}``.
    learning_rate, momentum, nesterov, weight_decay, decay, clip, graft, quadratic
        See :class:`kfcore.StepSize`.
    loss_reduction, fallback, group, spread
        See :class:`kfcore.ModelOptimizer`.

    Examples
    --------
    >>> import numpy as np, kfcore as kf
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(32, 3)), rng.normal(size=(32, 2))
    >>> params = {"fc": {"weight": np.zeros((2, 3)), "bias": np.zeros(2)}}
    >>> opt = kf.Optimizer(kf.KFAC(damping=1e-3), {"fc": kf.Linear(3, 2)}, learning_rate=1.0, momentum=0.0)
    >>> state = opt.init(params)
    >>> dz = (x @ params["fc"]["weight"].T + params["fc"]["bias"] - y) / len(x)  # mean of 0.5 |z - y|^2
    >>> grads = {"fc": {"weight": dz.T @ x, "bias": dz.sum(axis=0)}}
    >>> params, state = opt.step(params, grads, {"fc": (x, dz)}, state)

    """

    def __init__(
        self,
        method: Method,
        layers: Mapping[str, Any],
        *,
        learning_rate: float | Schedule | None = None,
        momentum: float | Schedule = 0.9,
        nesterov: bool | Literal["delayed"] = False,
        weight_decay: float | Schedule = 0.0,
        decay: Literal["decoupled", "coupled"] = "decoupled",
        clip: float | Schedule | None = None,
        graft: bool = False,
        quadratic: QuadraticModel | None = None,
        loss_reduction: Reduction = "mean",
        fallback: Method | None = None,
        group: bool = False,
        spread: bool = False,
    ) -> None:
        self.method = method
        self.layers = dict(layers)
        self.step_size = StepSize(
            learning_rate=learning_rate,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            decay=decay,
            clip=clip,
            graft=graft,
            quadratic=quadratic,
        )
        self.loss_reduction: Reduction = loss_reduction
        self._options = {"loss_reduction": loss_reduction, "fallback": fallback, "group": group, "spread": spread}
        self._bound: dict[Any, ModelOptimizer] = {}
        check_layers(self.layers)
        self._alone = self._bind(Model(self.layers).shapes())

    def bind(self, params: Mapping[str, Any]) -> ModelOptimizer:
        """The optimizer of the model with these parameters; those of no layer get the fallback."""
        return self._bind({name: tuple(p.shape) for name, p in flatten(params).items()})

    def init(self, params: Mapping[str, Any]) -> OptimizerState:
        """State for ``params``, a nest of dictionaries such as ``{"fc1": {"weight": ..., "bias": ...}, "scale": ...}``.

        Raises
        ------
        ValueError
            If a layer's parameter is missing or has another shape than the layer says.
        TypeError
            If a parameter is not real floating point.
        """
        flat = flatten(params)
        for name, p in flat.items():
            if not is_real_floating(namespace(p), p):
                raise TypeError(f"`params` must be real floating point, got {p.dtype} for {name!r}")
        return self.bind(params).init(flat)

    def stats_due(self, state: OptimizerState) -> Any:
        """Whether the coming step wants records."""
        return self._of(state).stats_due(state)

    @property
    def captured(self) -> tuple[str, ...]:
        """Layers of which records are wanted: all but those that the method leaves to their gradients."""
        return self._alone.captured

    def reduce(
        self, state: OptimizerState, name: str, inputs: Array, output_grads: Array | None = None, mask: Array | None = None
    ) -> dict[str, Any]:
        """Statistics of one record, see :meth:`step`; those of several micro-batches or uses of a layer merge by ``+``.

        Raises
        ------
        ValueError, TypeError
            Naming the layer, what came and what was expected.
        """
        layer, optimizer = self._layer(name), self._of(state)
        needs = optimizer.needs(name)
        if output_grads is None and Needs.OUTPUT_GRADS in needs:
            raise ValueError(f"layer {name!r}: `output_grads` are missing; {self.method.name} with this Fisher type needs them")
        try:
            captured = layer.capture(inputs, output_grads)
            mask = None if mask is None else layer.capture_mask(mask, inputs)
            return optimizer.reduce(state, name, *captured, mask=mask)
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {name!r}: {error}") from error

    def step(
        self,
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        records: Records | None,
        state: OptimizerState,
        *,
        terms: float | Array | None = None,
        overrides: Mapping[str, Any] | None = None,
        curvature_product: Product | None = None,
        loss: LossFunction | None = None,
    ) -> tuple[dict[str, Any], OptimizerState]:
        """New parameters and new state; the arguments stay as they are.

        Parameters
        ----------
        params, grads
            Nests of dictionaries as given to :meth:`init`.
        records
            By layer, the inputs ``[N, ..., in]`` and the gradients of the loss at its output ``[N, ..., out]`` as your backward pass has
            them (already divided by N where the loss is a mean); a list of such pairs where a layer is used, or a batch cut, more
            than once. Where positions or whole examples are there only to fill up an array, a third entry ``mask [N, ...]`` of booleans
            is true at those that are real: the others are as if they had not been there, whatever they hold. For ``fisher="mc"`` and
            ``"exact"`` the gradients are instead the vectors of :func:`kfcore.fisher_vectors` pulled back, undivided, one record a
            vector. May be ``None`` at steps where :meth:`stats_due` says so.
        terms
            Number of terms in the loss, if it is not the number of examples: N T for a mean over T tokens each, N C for a mean
            squared error over C numbers each. With masks the examples are those with a real position, and ``terms`` must be given
            where the host cannot read the masks at once (on an accelerator, or in a compiled program).
        overrides
            See :meth:`ModelOptimizer.update`.
        curvature_product
            With ``quadratic``: a function that multiplies a nest like ``params`` by the generalised Gauss-Newton (or Fisher) matrix of the
            loss on this batch, at ``params``.
        loss
            With ``quadratic``, where it rejects steps or adapts the damping: the loss on this batch at parameters like ``params``.
        """
        statistics: Statistics = None
        if records is not None:
            flat = {name: _several(record) for name, record in records.items()}
            missing = [name for name in self.layers if name not in flat and name in self.captured]
            if missing:
                raise ValueError(f"`records` lack the layer{'s' * (len(missing) > 1)} {', '.join(missing)}")
            if terms is None and flat:
                terms = self.terms_of({name: sum(self.examples(name, *part) for part in parts) for name, parts in flat.items()})

            def reduce(state: OptimizerState) -> dict[str, Any]:
                total: dict[str, Any] = {}
                for name, parts in flat.items():
                    for part in parts:
                        merge(total, self.reduce(state, name, *part))
                return total

            statistics = reduce

        lent = {"curvature_product": curvature_product, "loss": loss}
        return self.step_reduced(params, grads, statistics, state, terms=terms, overrides=overrides, **lent)

    def step_reduced(
        self,
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        statistics: Statistics,
        state: OptimizerState,
        *,
        terms: float | Array | None,
        overrides: Mapping[str, Any] | None = None,
        curvature_product: Product | None = None,
        loss: LossFunction | None = None,
    ) -> tuple[dict[str, Any], OptimizerState]:
        """:meth:`step` from statistics that :meth:`reduce` made earlier."""
        flat, flat_grads = flatten(params), flatten(grads)
        _same_shapes(flat, flat_grads)
        bound = self.bind(params)
        objective = None if curvature_product is None and loss is None else _Lent(params, curvature_product, loss)
        updates, state = bound.update(flat, flat_grads, state, statistics, terms=terms, overrides=overrides, objective=objective)
        new = {name: added(p, updates[name]) if name in updates else p for name, p in flat.items()}
        return unflatten(new, params), state

    def diagnostics(self, state: OptimizerState) -> dict[str, Any]:
        """See :meth:`ModelOptimizer.diagnostics`."""
        return self._of(state).diagnostics(state)

    def report(self, params: Mapping[str, Any]) -> Report:
        """Which block every parameter has, why, and what it costs."""
        itemsize = 8 if any(str(p.dtype).endswith("float64") for p in flatten(params).values()) else 4
        return self.bind(params).report(itemsize=itemsize)

    def _bind(self, shapes: Mapping[str, tuple[int, ...]]) -> ModelOptimizer:
        key = tuple(sorted(shapes.items()))
        if key not in self._bound:
            expected = Model(self.layers).shapes()
            for name, shape in expected.items():
                if shapes.get(name) != shape:
                    came = f"shape {shapes[name]}" if name in shapes else "nothing"
                    raise ValueError(f"`params` must hold {name!r} with shape {shape}, got {came}")
            others = {name: shape for name, shape in shapes.items() if name not in expected}
            self._bound[key] = ModelOptimizer(self.method, Model(self.layers, others), self.step_size, **self._options)
        return self._bound[key]

    def _layer(self, name: str) -> Any:
        if name not in self.layers:
            raise ValueError(f"`records` name the unknown layer {name!r}; known: {', '.join(self.layers)}")
        return self.layers[name]

    def _of(self, state: OptimizerState) -> ModelOptimizer:
        """The optimizer that made ``state``, known by its blocks; that of the layers alone if none here did."""
        return next((bound for bound in self._bound.values() if bound.made(state)), self._alone)

    def examples(self, name: str, inputs: Array, output_grads: Array | None = None, mask: Array | None = None) -> float:
        """Number of examples in one record; with a mask, of those that have a real position, or NaN where the host cannot tell."""
        layer = self._layer(name)
        if mask is None:
            lead = len(getattr(layer, "leading", layer.stack))
            return inputs.shape[lead] if inputs.ndim > lead else 0
        try:
            found = live_count(layer.capture_mask(mask, inputs), "reduce")
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {name!r}: {error}") from error
        xp = namespace(found)
        least, most = number(xp, xp.min(found)), number(xp, xp.max(found))
        return least if isinstance(least, float) and least == most else math.nan

    def terms_of(self, examples: Mapping[str, float]) -> float:
        """Number of terms in the loss when each example is one, from the number of :meth:`examples` recorded for each layer."""
        if self.method.fisher == "exact":
            raise ValueError("`terms` must be given with fisher='exact': the records repeat each example, once a column of its Hessian")
        unknown = [name for name, count in examples.items() if math.isnan(count)]
        if unknown:
            raise ValueError(
                f"`terms` must be given: the host cannot tell from the masks of {', '.join(unknown)} how many examples there are"
            )
        if len(set(examples.values())) > 1:
            raise ValueError(f"`terms` must be given: the records have different numbers of examples, {dict(examples)}")
        samples = self.method.mc_samples if self.method.fisher == "mc" else 1
        return float(next(iter(examples.values()))) / samples


class Recorder:
    """A stateful shell around :class:`Optimizer`: record in the backward pass, then step.

    What is recorded is reduced at once, or copied where that is smaller (fewer rows than features); the arrays are yours again.

    Examples
    --------
    >>> import numpy as np, kfcore as kf
    >>> params = {"fc": {"weight": np.ones((2, 3)), "bias": np.zeros(2)}}
    >>> recorder = kf.Recorder(kf.Optimizer(kf.KFAC(), {"fc": kf.Linear(3, 2)}), params)
    >>> x, dz = np.ones((4, 3)), np.full((4, 2), 0.25)
    >>> recorder.record("fc", x, dz)
    >>> params = recorder.step(params, {"fc": {"weight": dz.T @ x, "bias": dz.sum(axis=0)}})

    """

    def __init__(self, optimizer: Optimizer, params: Mapping[str, Any]) -> None:
        self.optimizer = optimizer
        self.state = optimizer.init(params)
        self._clear()

    def record(self, name: str, inputs: Array, output_grads: Array | None = None, mask: Array | None = None) -> None:
        """Take what layer ``name`` saw: ``inputs [N, ..., in]`` and the gradients at its output ``[N, ..., out]``.

        ``mask [N, ...]``, if given, is true at the positions that are real, see :meth:`Optimizer.step`.
        """
        if self.optimizer.stats_due(self.state):
            merge(self._statistics, self.optimizer.reduce(self.state, name, inputs, output_grads, mask))
            self._examples[name] = self._examples.get(name, 0) + self.optimizer.examples(name, inputs, output_grads, mask)
        elif name not in self.optimizer.layers:
            raise ValueError(f"`name` must be one of {', '.join(self.optimizer.layers)}, got {name!r}")

    def step(
        self,
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        *,
        terms: float | None = None,
        curvature_product: Product | None = None,
        loss: LossFunction | None = None,
        **overrides: Any,
    ) -> dict[str, Any]:
        """New parameters; ``overrides`` such as ``learning_rate=0.05`` hold for this step, the rest is that of :meth:`Optimizer.step`."""
        due = self.optimizer.stats_due(self.state)
        missing = [name for name in self.optimizer.layers if name not in self._examples and name in self.optimizer.captured]
        if due and missing:
            self._clear()
            raise ValueError(f"nothing was recorded for {', '.join(missing)}: call `record` for every layer before `step`")
        if due and terms is None and self._examples:
            terms = self.optimizer.terms_of(self._examples)
        statistics = self._statistics if due else None
        # the records belong to this step, whether it succeeds or is refused
        self._clear()
        lent = {"curvature_product": curvature_product, "loss": loss}
        params, self.state = self.optimizer.step_reduced(params, grads, statistics, self.state, terms=terms, overrides=overrides, **lent)
        return params

    def _clear(self) -> None:
        self._statistics: dict[str, Any] = {}
        self._examples: dict[str, float] = {}


class _Lent:
    """The :class:`kfcore.Objective` in two functions of nests."""

    def __init__(self, params: Mapping[str, Any], product: Product | None, loss: LossFunction | None) -> None:
        if product is None:
            raise ValueError("`curvature_product` must be given with `quadratic`, at every step")
        self._params, self._product, self._loss = params, product, loss

    def gram(self, vectors: Sequence[Mapping[str, Array]]) -> Array:
        xp, flat = namespace(*vectors[0].values()), flatten(self._params)
        whole = [{name: cast(xp, v[name], p.dtype) if name in v else xp.zeros_like(p) for name, p in flat.items()} for v in vectors]
        products = [flatten(self._product(unflatten(v, self._params))) for v in whole]
        for product in products:
            _same_shapes(flat, product, "curvature_product")
        return inner(xp, whole, products, dict.fromkeys(flat, 1.0))

    def loss(self, update: Mapping[str, Array] | None) -> float | Array:
        if self._loss is None:
            raise ValueError("`loss` must be given where `quadratic` rejects steps or the damping is adaptive")
        if update is None:
            return self._loss(self._params)
        moved = {name: added(p, update[name]) if name in update else p for name, p in flatten(self._params).items()}
        return self._loss(unflatten(moved, self._params))


def _several(record: Any) -> Sequence[Record]:
    """A record, or a list of them, as a list."""
    parts = record if isinstance(record, list) else [record]
    for part in parts:
        if not (isinstance(part, tuple) and len(part) in (2, 3)):
            came = f"a tuple of {len(part)}" if isinstance(part, tuple) else type(part).__name__
            raise TypeError(f"`records` must hold (inputs, output_grads) pairs, those with a mask behind, or lists of them, got {came}")
    return parts


def _same_shapes(params: Mapping[str, Array], grads: Mapping[str, Array], what: str = "grads") -> None:
    unknown = [name for name in grads if name not in params]
    if unknown:
        raise ValueError(f"`{what}` name the unknown parameters {', '.join(unknown)}; known: {', '.join(params)}")
    for name, grad in grads.items():
        if tuple(grad.shape) != tuple(params[name].shape):
            raise ValueError(f"`{what}` must have shape {tuple(params[name].shape)} for {name!r}, got {tuple(grad.shape)}")
        if not is_real_floating(namespace(grad), grad):
            raise TypeError(f"`{what}` must be real floating point, got {grad.dtype} for {name!r}")
