"""The optimizer of physics-informed networks on plain arrays: terms, a direction, a rule for the step, pure functions between states."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from kfcore._array import Array, Namespace, cast, counter, device, host, namespace, scalar, select, truth
from kfcore.curvature.base import count_failure
from kfcore.linalg import total
from kfcore.pinn.choice import Choice, choose, preset
from kfcore.pinn.kronecker import Directed, groups
from kfcore.pinn.linearised import UNKNOWNS, Loss, Vector, batch
from kfcore.pinn.rules import Around, LineSearch, Rule, combined, rejects, uses_last
from kfcore.pinn.samples import Direction
from kfcore.pinn.terms import Points, Term
from kfcore.quadratic import judged
from kfcore.taylor import Propagation, Sequential

Params = Mapping[str, Mapping[str, Array]]
"""By layer and role, in the layers' own layouts, and ``params["unknowns"]`` by name where there are some."""
Precision = Literal["float64", "model"]


class State(NamedTuple):
    """What an optimizer carries on: arrays alone, in tuples."""

    steps: Array
    """int32, on the host."""
    direction: Any
    """Of the direction."""
    last: tuple[Array, ...]
    """The last update by layer, where the rule or the direction wants it."""
    exponent: Array
    """Where the line search begins, 0-d."""
    damping: Array
    """``lambda``, if it is adaptive; else of no meaning."""
    ratio: Array
    """Change of the loss over that of the model, when it was last looked at."""
    skipped: Array
    """Steps that were not finite, and left everything as it was; int32."""
    rejected: Array
    """Steps that were taken back, int32."""


class Info(NamedTuple):
    """About one step, 0-d arrays."""

    loss: Array
    """Before the step."""
    losses: Mapping[str, Array]
    """The same by term, weights included."""
    rate: Array
    momentum: Array
    damping: Array
    """``lambda`` of this step."""
    ratio: Array
    """Change of the loss over that of the model; NaN where it was not looked at."""
    accepted: Array
    """Whether the parameters moved."""


@dataclass(frozen=True)
class Optimizer:
    """Minimises ``sum_t weight_t / (2 N_t) sum_n |r_tn|^2`` over a network's parameters, by curvature of the residuals.

    Parameters
    ----------
    network
        Dense layers, with a joint bias or none, and activations.
    terms
        By name.
    method
        ``"kfac"`` (Kronecker factors, line search, momentum), ``"kfac*"`` (rate and momentum from the exact quadratic model),
        ``"engd-w"`` (exact Gauss-Newton in the space of the residuals, line search), ``"spring"`` (the same with its momentum),
        ``"hessian-free"`` (conjugate gradients on the exact matrix preconditioned by Kronecker factors), ``"auto"`` (see
        :func:`kfcore.pinn.choose`; it needs ``sizes``); or a direction: :class:`Kronecker`, :class:`SampleSpace`,
        :class:`ConjugateGradients`.
    step_rule
        :class:`LineSearch`, :class:`Quadratic` or :class:`Fixed`, instead of the method's own.
    damping
        Instead of the method's own.
    unknowns
        Shapes of trainable parameters outside of layers, by name.
    sizes
        Points of each term, for ``"auto"``.
    precision
        ``"float64"`` for all that is accumulated and inverted, whatever the dtype of the network; ``"model"`` leaves it at that,
        float32 at least, in which small dampings cannot be carried.

    Examples
    --------
    >>> import numpy as np
    >>> from kfcore import pinn, taylor
    >>> network = taylor.Sequential.mlp((2, 8, 1))
    >>> laplace = taylor.Derivatives(2, operators={"laplacian": taylor.laplacian(2)})
    >>> inside = pinn.Term(pinn.LinearOperator({"laplacian": -1.0}, 1.0), laplace)
    >>> border = pinn.Term(pinn.LinearOperator({"value": 1.0}), taylor.Derivatives(2, ()))
    >>> optimizer = pinn.Optimizer(network, {"inside": inside, "border": border}, "kfac*")
    >>> rng = np.random.default_rng(0)
    >>> params = {k: {r: rng.normal(size=s) for r, s in layer.parameters.items()} for k, layer in network.layers.items()}
    >>> points = {"inside": rng.uniform(size=(20, 2)), "border": np.array([[0.0, 0.5], [1.0, 0.5], [0.5, 0.0]])}
    >>> state = optimizer.init(params)
    >>> for _ in range(5):
    ...     params, state, info = optimizer.step(params, state, points)

    """

    network: Sequential
    terms: Mapping[str, Term]
    method: str | Direction = "auto"
    _: KW_ONLY
    step_rule: Rule | None = None
    damping: Any = None
    unknowns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] | None = None
    precision: Precision = "float64"
    direction: Direction = field(init=False, repr=False, compare=False)
    """How directions are made."""
    rule: Rule = field(init=False, repr=False, compare=False)
    """How far to go."""
    choice: Choice | None = field(init=False, repr=False, compare=False)
    """What ``"auto"`` took, and why."""
    loss: Loss = field(init=False, repr=False, compare=False)
    """The terms on the network."""
    groups: Sequence[Sequence[int]] = field(init=False, repr=False, compare=False)
    """Terms whose Kronecker products are merged, by their number."""

    def __post_init__(self) -> None:
        self._check()
        put = object.__setattr__
        put(self, "terms", dict(self.terms))
        put(self, "unknowns", {name: tuple(shape) for name, shape in dict(self.unknowns).items()})
        put(self, "choice", None)
        if self.method == "auto":
            if self.sizes is None:
                raise ValueError("`sizes` must be given for method 'auto', the number of points of each term, got None")
            put(self, "choice", choose(self.network, self.terms, self.sizes, unknowns=self.unknowns))
        direction, rule = preset(self.method if self.choice is None else self.choice.method)
        if self.damping is not None:
            direction = replace(direction, damping=self.damping)
        put(self, "direction", direction)
        put(self, "rule", rule if self.step_rule is None else self.step_rule)
        propagations = {name: Propagation(self.network, term.derivatives) for name, term in self.terms.items()}
        put(self, "loss", Loss(propagations, self.terms, direction.columns))
        put(self, "groups", groups([term.derivatives.order for term in self.terms.values()]))

    def _check(self) -> None:
        if not isinstance(self.network, Sequential):
            raise TypeError(f"`network` must be a kfcore.taylor.Sequential, got {self.network!r}")
        if not isinstance(self.terms, Mapping) or not self.terms or not all(isinstance(t, Term) for t in self.terms.values()):
            raise TypeError(f"`terms` must map names to kfcore.pinn.Term, got {self.terms!r}")
        for name, layer in self.network.layers.items():
            if name == UNKNOWNS:
                raise ValueError(f"`network` must have no layer called {UNKNOWNS!r}: it is the key of the unknowns among the parameters")
            if layer.bias == "separate" or layer.sharing != "expand" or layer.stack:
                raise ValueError(
                    f"`network` must have layers with bias 'joint' or None, sharing 'expand' and no stack, got {layer!r} for {name!r}"
                )
        if self.precision not in ("float64", "model"):
            raise ValueError(f"`precision` must be 'float64' or 'model', got {self.precision!r}")

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the matrices by layer, and of the unknowns."""
        found = {name: layer.shape for name, layer in self.network.layers.items()}
        size = sum(math.prod(shape) for shape in self.unknowns.values())
        return found | {UNKNOWNS: (1, size)} if size else found

    @property
    def why(self) -> str:
        """The method in a sentence, with the reason where it was chosen."""
        return f"{type(self.direction).__name__} with {type(self.rule).__name__}" + (f": {self.choice.reason}" if self.choice else "")

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def init(self, params: Params) -> State:
        """The first state, beside the parameters.

        Raises
        ------
        ValueError, TypeError
            If the parameters do not fit, or the library has no float64 where that is wanted.
        """
        self._check_unknowns(params)
        weight = params[next(iter(self.network.layers))]["weight"]
        xp = namespace(weight)
        like = xp.zeros((), dtype=self._dtype(xp, weight), device=device(weight))
        self.network.check(params, xp.zeros((1, self.network.inputs), dtype=weight.dtype, device=device(weight)))
        last = [xp.zeros(s, dtype=like.dtype, device=device(like)) for s in self.shapes.values()] if uses_last(self.rule) else []
        adaptive = self.direction.rule.adaptive
        none = xp.zeros((), dtype=xp.int32, device=device(like))
        return State(
            counter(xp),
            self.direction.init(xp, self.shapes, len(self.terms), like),
            tuple(last),
            scalar(xp, self.rule.start, like),
            scalar(xp, 1.0 if adaptive is None else adaptive.initial, like),
            xp.full_like(like, float("nan")),
            none,
            none,
        )

    def step(self, params: Params, state: State, batches: Mapping[str, Any]) -> tuple[dict[str, dict[str, Array]], State, Info]:
        """One step on ``batches``, points by term: arrays ``[N, d]`` or :class:`Points`.

        Where the loss or the step is not finite the parameters stay as they are, and it is counted.

        Raises
        ------
        ValueError, TypeError
            If the parameters or batches do not fit the network and the terms.
        """
        points = self._points(batches)
        self._check_unknowns(params)
        like, adaptive = state.damping, self.direction.rule.adaptive
        xp, dtype = namespace(like), like.dtype
        lin = self.loss.linearised(params, points, dtype)
        losses = lin.losses()
        loss = _sum(xp, losses)
        gradient = lin.pull(lin.residuals)
        damping = like if adaptive is not None else scalar(xp, self.direction.rule.at(host(state.steps)), like)
        last = dict(zip(gradient, state.last, strict=True)) if state.last else None
        made = Directed(lin, gradient, damping, state.steps, self.groups, last or {})
        direction, inner = self.direction.direct(xp, state.direction, made)

        def at(v: Vector, rates: Sequence[Array]) -> list[Array]:
            return [_sum(xp, found) for found in self.values(params, points, [{n: r * x for n, x in v.items()} for r in rates], dtype)]

        around = Around(lin, gradient, damping, loss, at)
        move = self.rule.decide(xp, around, direction, last, state)
        update = combined(move, direction, last)
        ratio, stands = xp.full_like(like, float("nan")), xp.isfinite(loss)
        if adaptive is not None or rejects(self.rule, adaptive):
            promised = around.model(xp, [update]).value(xp.ones_like(loss)[None]) if move.promised is None else move.promised
            after = at(update, [xp.ones_like(loss)])[0] if move.after is None else move.after
            rise = xp.where(xp.isfinite(after), after - loss, xp.full_like(loss, math.inf))
            ratio, good = judged(xp, rise, loss, promised, adaptive)
            stands = stands & good if rejects(self.rule, adaptive) else stands
        fine = xp.isfinite(scalar(xp, total(xp, list(update.values())), loss)) & xp.isfinite(loss)
        kept = truth(xp, fine & stands)
        moved = self.moved(params, {n: select(xp, kept, x, xp.zeros_like(x)) for n, x in update.items()})
        strength = state.damping
        if adaptive is not None:
            due = ((host(state.steps) + 1) % adaptive.every) == 0
            adapt = truth(xp, fine & (due | ~stands))
            strength = select(xp, adapt, adaptive.adapted(xp, damping, ratio), damping)
        new = State(
            state.steps + 1,
            select(xp, truth(xp, fine), inner, state.direction),
            tuple(select(xp, kept, update[n], x) for n, x in zip(gradient, state.last, strict=True)) if last else (),
            select(xp, truth(xp, fine), move.exponent, state.exponent),
            strength,
            ratio,
            count_failure(xp, state.skipped, truth(xp, fine)),
            count_failure(xp, state.rejected, truth(xp, stands | ~fine)),
        )
        zero = xp.zeros_like(move.rate)
        rate, momentum = (select(xp, kept, x, zero) for x in (move.rate, move.momentum))
        return moved, new, Info(loss, losses, rate, momentum, damping, ratio, fine & stands)

    def values(self, params: Params, points: Mapping[str, Points], updates: Sequence[Vector], dtype: Any) -> list[dict[str, Array]]:
        """The loss by term at the parameters plus each of ``updates``."""
        together = self.rule.together if isinstance(self.rule, LineSearch) else 1
        moved = [self.moved(params, update) for update in updates]
        found = []
        for start in range(0, len(moved), together):
            found += self.loss.values(moved[start : start + together], points, dtype)
        return found

    def evaluate(self, params: Params, batches: Mapping[str, Any]) -> dict[str, Array]:
        """The loss by term, weights included, on points by term."""
        weight = params[next(iter(self.network.layers))]["weight"]
        return self.loss.values([params], self._points(batches), self._dtype(namespace(weight), weight))[0]

    def moved(self, params: Params, update: Vector) -> dict[str, dict[str, Array]]:
        """The parameters plus ``update``, in their own dtype and layout."""
        found: dict[str, dict[str, Array]] = {}
        for name, layer in self.network.layers.items():
            parts = layer.parameters_of({"": update[name]})
            found[name] = {role: x + cast(namespace(x), parts[role], x.dtype) for role, x in params[name].items()}
        if UNKNOWNS in update:
            start, flat = 0, update[UNKNOWNS][0, :]
            found[UNKNOWNS] = {}
            for name, shape in self.unknowns.items():
                x, size = params[UNKNOWNS][name], math.prod(shape)
                xp = namespace(x)
                found[UNKNOWNS][name] = x + cast(xp, xp.reshape(flat[start : start + size], shape), x.dtype)
                start += size
        return found

    # -- checks --------------------------------------------------------------------------------------------------------

    def _points(self, batches: Mapping[str, Any]) -> dict[str, Points]:
        if set(batches) != set(self.terms):
            raise ValueError(f"`batches` must be of the terms {', '.join(self.terms)}, got {', '.join(map(str, batches)) or 'nothing'}")
        return {name: batch(name, batches[name]) for name in self.terms}

    def _check_unknowns(self, params: Params) -> None:
        given = {name: tuple(x.shape) for name, x in params.get(UNKNOWNS, {}).items()}
        if given != dict(self.unknowns):
            raise ValueError(f"`params[{UNKNOWNS!r}]` must have the shapes {dict(self.unknowns)}, got {given}")

    def _dtype(self, xp: Namespace, weight: Array) -> Any:
        """In which all is accumulated and inverted."""
        if self.precision == "model":
            return weight.dtype if weight.dtype == xp.float64 else xp.float32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = xp.zeros((), dtype=xp.float64, device=device(weight)).dtype
        if found != xp.float64:
            raise ValueError(
                "`precision` must be 'model' where the library has no float64, got 'float64'; enable it if you can (in JAX by "
                "jax.config.update('jax_enable_x64', True)): in float32 the factors of these losses lose most of their digits"
            )
        return found


def _sum(xp: Namespace, losses: Mapping[str, Array]) -> Array:
    return xp.sum(xp.stack(list(losses.values())))
