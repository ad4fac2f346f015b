"""A step by the quadratic model of the loss: the dampings it is made with, its coefficients, and what the loss says to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kfcore._array import Array, Namespace, cast, cond, host, namespace, scalar, select, truth
from kfcore.curvature.base import count_failure
from kfcore.damping import LevenbergMarquardt
from kfcore.model import Model as Layers
from kfcore.preconditioner import Preconditioner, PreconditionerState, Values
from kfcore.quadratic import Control, Model, Objective, inner, judged, minimum
from kfcore.statistics import GradientRows
from kfcore.stepsize import StepSize, StepState, all_finite, nonzero, plain

Arrays = Mapping[str, Array]


class Prepared(NamedTuple):
    """What a step is made from, before anything is refreshed."""

    grads: Arrays
    """Of the mean loss with its weight decay, by parameter."""
    matrices: Arrays
    """The same by block."""
    curvature: PreconditionerState
    """With the statistics of this step."""
    rows: Mapping[str, GradientRows]
    """Of the gradients, by block, where they are known."""


class Trial(NamedTuple):
    """Directions under one damping of the factors, and their model."""

    directions: tuple[Array, ...]
    blocks: tuple[Any, ...]
    refreshed: Array | None
    model: Model
    coefficients: Array
    value: Array
    """Of the model at the coefficients."""


@dataclass(frozen=True)
class AroundParameters:
    """The mean loss on a batch, weight decay included, around the parameters."""

    objective: Objective
    over: float | Array
    """Divides what the objective gives."""
    params: Arrays
    decays: Mapping[str, Any]

    def gram(self, vectors: list[Arrays], like: Array) -> Array:
        """``<v_i, C v_j>`` without the decay, ``[k, k]``, in the dtype of ``like``."""
        xp, k = namespace(like), len(vectors)
        found = self.objective.gram(vectors)
        if tuple(found.shape) != (k, k):
            raise ValueError(f"`gram` of the objective must give shape ({k}, {k}) for {k} vectors, got {tuple(found.shape)}")
        return cast(xp, found, like.dtype) / self.over

    def rise(self, update: Arrays, like: Array) -> tuple[Array, Array]:
        """How much it grows by ``update``, and the loss before, both 0-d in the dtype of ``like``."""
        xp = namespace(like)
        before, after = (scalar(xp, self.objective.loss(u), like) / self.over for u in (None, update))
        rise = after - before
        if any(nonzero(decay) for decay in self.decays.values()):
            twice = {n: cast(xp, self.params[n], u.dtype) + cast(xp, self.params[n], u.dtype) + u for n, u in update.items()}
            rise = rise + 0.5 * inner(xp, [update], [twice], self.decays)[0, 0]
        return rise, before


@dataclass(frozen=True)
class ModelledStep:
    """Steps of a rule with a :class:`kfcore.QuadraticModel`.

    Parameters
    ----------
    step, layers, preconditioner
        Of the optimizer.
    rule
        What adapts the damping of its methods, if anything does.
    direct
        ``(prepared, dampings by block)`` -> directions by parameter and the refreshed curvature.
    """

    step: StepSize
    layers: Layers
    preconditioner: Preconditioner
    rule: LevenbergMarquardt | None
    direct: Callable[[Prepared, Values], tuple[dict[str, Array], PreconditionerState]]

    def update(
        self, prepared: Prepared, loss: AroundParameters, state: StepState, settings: Mapping[str, Any], damping: Values
    ) -> tuple[dict[str, Array], PreconditionerState, StepState]:
        """Updates by parameter, the curvature, and the new state of the rule.

        Parameters
        ----------
        settings
            Of this step, see :func:`kfcore.stepsize.settings`.
        damping
            As given for this step: one number, one a block by name, or ``None``.
        """
        how, old = self.step.quadratic, state.control
        assert how is not None
        assert old is not None
        xp = namespace(old.damping)
        last = {name: state.momentum[name] for name in prepared.grads} if state.momentum else None
        factor = _one(settings["learning_rate"])
        fixed = (None if how.learning_rate else -factor, None if how.momentum else plain(settings["momentum"]))
        found, gamma = self._search(prepared, loss, last, fixed, old, damping)

        w = found.coefficients * scalar(xp, factor, found.value) if how.learning_rate else found.coefficients
        if settings["clip"] is not None:
            w = w * _bound(xp, settings["clip"], found.model.divergence(w))
        moved = dict(zip(prepared.grads, found.directions, strict=True))
        moved = {n: cast(xp, w[0], d.dtype) * d for n, d in moved.items()}
        if last is not None:
            moved = {n: u + cast(xp, w[1], u.dtype) * cast(xp, last[n], u.dtype) for n, u in moved.items()}
        fine = truth(xp, all_finite(xp, moved, [w[0]]))
        moved = _where(xp, fine, moved)

        def look(moved: Arrays) -> tuple[Array, Array]:
            return self._judged(xp, loss, moved, found.model.value(w))

        due = self.rule is not None and ((host(prepared.curvature.steps) + 1) % self.rule.every) == 0
        unseen = (old.ratio, xp.ones_like(old.ratio) > 0)
        ratio, stands = look(moved) if how.reject else cond(due, look, lambda _: unseen, moved)
        stands = truth(xp, stands) if how.reject else True
        strength = old.damping
        if self.rule is not None:
            adapt = due if stands is True else due | ~stands if not isinstance(stands, bool) else True
            strength = select(xp, adapt, self.rule.adapted(xp, old.damping, ratio), old.damping)

        moved, kept = _where(xp, stands, moved), _both(fine, stands)
        buffers = {n: select(xp, kept, cast(xp, moved[n], b.dtype), b) if n in moved else b for n, b in state.momentum.items()}
        second = xp.zeros_like(w[0]) if last is None else w[1]
        control = Control(strength, gamma, -w[0], second, ratio, count_failure(xp, old.rejected, stands))
        curvature = prepared.curvature._replace(
            blocks=dict(zip(self.preconditioner.blocks, found.blocks, strict=True)),
            refreshed=found.refreshed,
            steps=prepared.curvature.steps + 1,
        )
        return moved, curvature, StepState(buffers, count_failure(xp, state.skipped, fine), control)

    def _search(
        self, prepared: Prepared, loss: AroundParameters, last: Arrays | None, fixed: tuple[Any, Any], old: Control, damping: Values
    ) -> tuple[Trial, Array]:
        """The directions to take, and ``gamma`` of the damping of their factors."""
        xp, methods = namespace(old.damping), {n: block.method for n, block in self.preconditioner.blocks.items()}
        given = self._dampings(damping, old, prepared.curvature.steps)
        decays = {block: loss.decays[p] for p, (block,) in self.layers.block_names().items() if p in loss.decays}
        # a relative damping is in other units than the decay
        raised = {n: v if methods[n].rule.relative else v + decays.get(n, 0.0) for n, v in given.items()}

        def attempt(gamma: Array, split: bool = True) -> Trial:
            squares = {n: gamma * gamma for n, method in methods.items() if method.factored} if split else {}
            directions, curvature = self.direct(prepared, raised | squares)
            vectors: list[Arrays] = [directions] if last is None else [directions, last]
            model = self._model(prepared, loss, vectors, given, curvature, old.damping)
            w = minimum(xp, model, *fixed)
            return Trial(
                tuple(directions[n] for n in prepared.grads),
                tuple(curvature.blocks[n] for n in methods),
                curvature.refreshed,
                model,
                w,
                model.value(w),
            )

        if self.rule is None or self.rule.search_every is None or not any(method.factored for method in methods.values()):
            return attempt(old.factored, split=False), old.factored
        wide = self.rule.factor ** (self.rule.search_every / 2)

        def search(gamma: Array) -> tuple[Trial, Array]:
            best, kept = attempt(gamma), gamma
            refreshed = best.refreshed  # the same of all, and the host's
            for other in (gamma * wide, gamma / wide):
                trial = attempt(other)
                better = truth(xp, trial.value < best.value)
                found = trial._replace(refreshed=None), best._replace(refreshed=None)
                best, kept = select(xp, better, (found[0], other), (found[1], kept))
            return best._replace(refreshed=refreshed), kept

        due = (host(prepared.curvature.steps) % self.rule.search_every) == 0
        return cond(due, search, lambda gamma: (attempt(gamma), gamma), old.factored)

    def _dampings(self, damping: Values, old: Control, steps: Array) -> dict[str, Any]:
        """``lambda`` of every block, as its rule reads it."""
        found = {}
        for name, block in self.preconditioner.blocks.items():
            value = damping.get(name) if isinstance(damping, Mapping) else damping
            if value is None:
                value = block.method.rule.at(host(steps)) if block.method.rule.adaptive is None else old.damping
            found[name] = value
        return found

    def _model(
        self,
        prepared: Prepared,
        loss: AroundParameters,
        vectors: list[Arrays],
        dampings: Mapping[str, Any],
        curvature: PreconditionerState,
        like: Array,
    ) -> Model:
        """The model along ``vectors``."""
        xp, blocks = namespace(like), self.preconditioner.blocks
        absolute, relative = dict(loss.decays), {}
        for parameter, (name,) in self.layers.block_names().items():
            method = blocks[name].method
            if parameter not in absolute or not method.tikhonov:
                continue
            if method.rule.relative:
                relative[name] = dampings[name] * method.unit(blocks[name].layer, curvature.blocks[name])
            else:
                absolute[parameter] = absolute[parameter] + dampings[name]
        penalty = inner(xp, vectors, vectors, absolute)
        if relative:
            matrices = [self.layers.matrices(v) for v in vectors]
            penalty = penalty + inner(xp, matrices, matrices, relative)
        slopes = inner(xp, vectors, [prepared.grads], dict.fromkeys(prepared.grads, 1.0))[:, 0]
        return Model(loss.gram(vectors, like), cast(xp, penalty, like.dtype), cast(xp, slopes, like.dtype))

    def _judged(self, xp: Namespace, loss: AroundParameters, moved: Arrays, promised: Array) -> tuple[Array, Array]:
        """The ratio of the loss's change to the one ``promised``, and whether the step may stand."""
        rise, before = loss.rise(moved, promised)
        return judged(xp, rise, before, promised, self.rule)


def _one(value: Any) -> Any:
    """The learning rate, which must be the same for all parameters."""
    if not isinstance(value, Mapping):
        return plain(value)
    rates = [plain(v) for v in value.values()]
    if any(rate is not rates[0] and rate != rates[0] for rate in rates):
        raise ValueError(f"`learning_rate` must be the same for all parameters with `quadratic`, got {sorted(set(map(float, rates)))}")
    return rates[0]


def _bound(xp: Namespace, clip: Any, divergence: Array) -> Array:
    """``min(1, sqrt(clip / divergence))``."""
    positive, one = divergence > 0, xp.ones_like(divergence)
    return xp.where(positive, xp.minimum(xp.sqrt(scalar(xp, clip, one) / xp.where(positive, divergence, one)), one), one)


def _where(xp: Namespace, ok: bool | Array, arrays: Arrays) -> dict[str, Array]:
    """``arrays``, or zeros where not ``ok``."""
    return dict(arrays) if ok is True else {n: select(xp, ok, x, xp.zeros_like(x)) for n, x in arrays.items()}


def _both(one: bool | Array, other: bool | Array) -> bool | Array:
    if isinstance(one, bool):
        return other if one else False
    return one if other is True else one & other
