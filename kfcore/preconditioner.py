"""The curvature of a whole model: names -> layers -> blocks, when each verb is due, and one call for many equal blocks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kfcore import schedule
from kfcore._array import Array, cond, counter, device, host, known, namespace, scalar, to_numpy
from kfcore.curvature.base import Method
from kfcore.curvature.diagonal import Diagonal, Tensor
from kfcore.damping import check_positive
from kfcore.layers import Layer, check_layers
from kfcore.statistics import GradientRows

Values = Mapping[str, Any] | float | None
"""One number for all blocks, one a block by name, or ``None`` for what the method says."""


@dataclass(frozen=True)
class Block:
    """One diagonal block of the curvature: a name, its geometry, and the method that approximates it."""

    name: str
    layer: Layer
    method: Method
    leading: tuple[int, ...] = ()


class PreconditionerState(NamedTuple):
    """Curvature of a model: arrays only."""

    steps: Array
    """Steps taken, 0-d int32, readable on the host."""
    observed: Array
    """Times that statistics were taken since the first that were finite in every block, 0-d int32, readable on the host."""
    refreshed: Array
    """Steps since then at which something was refreshed, likewise."""
    blocks: dict[str, Any]
    """State of each block by name."""


class Preconditioner:
    """Applies the verbs of a method to every block of a model.

    It works on matrices, one a block; mapping them from and to the parameters of a model is the business of
    :class:`kfcore.Optimizer` and of the adapters.

    Parameters
    ----------
    blocks
        The blocks by name, see :func:`blocks_of`. Under a method that refreshes late, :meth:`refresh` comes before :meth:`precondition` and
        :meth:`refresh_late` behind it.
    group
        Stack blocks of equal geometry into one call when refreshing and applying. Worth it where launches cost (GPUs, compiled
        programs); on a CPU the batched routines of the libraries are loops and stacking only copies.
    spread
        Refresh block k at steps equal to k modulo ``refresh_every`` instead of all at once: the same average cost without the
        spikes. All are refreshed at step 0.
    """

    def __init__(self, blocks: Mapping[str, Block], *, group: bool = False, spread: bool = False) -> None:
        self.blocks = dict(blocks)
        self._methods = list({id(block.method): block.method for block in self.blocks.values()}.values())
        self._seeing = any(block.method.requires(block.layer) for block in self.blocks.values())
        self.group = group
        self.spread = spread

    def init(self, like: Mapping[str, Array]) -> PreconditionerState:
        """State that has seen nothing; ``like`` gives an array of each block's library, device and dtype."""
        states = {n: b.method.init(b.layer, like[n], b.leading) for n, b in self.blocks.items()}
        xp = namespace(next(iter(like.values())))
        return PreconditionerState(counter(xp), counter(xp), counter(xp), states)

    def stats_due(self, count: int | Array) -> Any:
        """Whether statistics are due at step ``count``, for any block."""
        return functools.reduce(operator.or_, [schedule.due(m.stats_every, host(count)) for m in self._methods])

    def observe(self, state: PreconditionerState, statistics: Mapping[str, Any]) -> PreconditionerState:
        """Take the statistics, by block, of the blocks for which they are due; the others keep their averages."""
        blocks, count = dict(state.blocks), host(state.steps)
        for name, new in statistics.items():
            method = self._block(name).method

            def take(old: Any, method: Method = method, new: Any = new) -> Any:
                return method.observe(old, new, schedule.at(method.stats_decay, count))

            blocks[name] = cond(schedule.due(method.stats_every, count), take, _same, blocks[name])
        if known(state.observed) or not statistics:
            return state._replace(blocks=blocks, observed=state.observed + (1 if statistics else 0))
        # whether the very first were any good is in the arrays: until all are, look (afterwards nobody waits for a device)
        weights = [blocks[name].average.weight for name in statistics]
        seen = functools.reduce(operator.and_, [namespace(weight).all(weight > 0) for weight in weights])
        if known(state.observed) == 0:
            seen = int(to_numpy(seen))
        else:
            xp = namespace(state.observed)
            seen = xp.astype(seen, xp.int32)
        return state._replace(blocks=blocks, observed=state.observed + seen)

    def refresh(self, state: PreconditionerState, damping: Values = None) -> PreconditionerState:
        """Refresh the blocks that are due, with the damping of their methods at this step or with the ones given."""
        if self._seeing and known(state.observed) == 0 and not any(to_numpy(block.dropped).any() for block in state.blocks.values()):
            raise ValueError("`state` has no statistics to refresh from: call `reduce` and `observe` first")
        self._check_damping(damping)
        count, observed, fresh = host(state.steps), host(state.observed), host(state.refreshed) == 0
        first = (observed > 0) & fresh
        # until the first refresh of all there is nothing to measure in, and no reason to be late
        due = [((due & fresh if self._late(groups) else due) | first, groups) for due, groups in self._due(state, count)]
        return self._refreshed(state, damping, due)

    def refresh_late(self, state: PreconditionerState, refreshed: Array, damping: Values = None) -> PreconditionerState:
        """After the directions: refresh the blocks that are due under methods that do so late (:attr:`kfcore.Method.late`).

        ``refreshed`` is the counter before this step's :meth:`refresh`, whose first one is for these blocks too.
        """
        again = host(refreshed) > 0
        due = [(due & again, groups) for due, groups in self._due(state, host(state.steps)) if self._late(groups)]
        if not due:
            return state
        # a step counts once, whatever it refreshes before and after
        late = self._refreshed(state._replace(refreshed=refreshed), damping, due)
        return late._replace(refreshed=namespace(refreshed).maximum(state.refreshed, late.refreshed))

    def _late(self, groups: list[list[str]]) -> bool:
        return self.blocks[groups[0][0]].method.late

    def _refreshed(self, state: PreconditionerState, damping: Values, due_groups: list[tuple[Any, list[list[str]]]]) -> PreconditionerState:
        blocks, count, observed = dict(state.blocks), host(state.steps), host(state.observed)
        any_due = False
        for due, groups in due_groups:
            if due is False:
                continue
            any_due = any_due | due
            method = self.blocks[groups[0][0]].method
            layers = [self.blocks[names[0]].layer for names in groups]
            values = [[self._damping(name, damping, count) for name in names] for names in groups]
            stacked = [_stack([blocks[name] for name in names]) for names in groups]

            def run(old: Any, method: Method = method, layers: list[Layer] = layers, values: list[Any] = values) -> Any:
                given = [one[0] if len(one) == 1 else _numbers(one, state) for one, state in zip(values, old, strict=True)]
                return method.refresh_all(layers, old, given)

            for names, fresh in zip(groups, cond(due, run, _same, stacked), strict=True):
                blocks.update(zip(names, _unstack(fresh, len(names)), strict=True))
        counted = any_due & (observed > 0)
        if isinstance(counted, bool):
            return state._replace(blocks=blocks, refreshed=state.refreshed + 1 if counted else state.refreshed)
        return state._replace(blocks=blocks, refreshed=state.refreshed + namespace(counted).astype(counted, state.refreshed.dtype))

    def precondition(
        self, state: PreconditionerState, grads: Mapping[str, Array], rows: Mapping[str, GradientRows] | None = None
    ) -> dict[str, Array]:
        """Directions of ``grads``, by block. Blocks without a gradient have no direction; ``rows`` are those of some gradients."""
        directions: dict[str, Array] = {}
        for names in self._groups(state):
            names = [name for name in names if name in grads]
            if not names:
                continue
            block = self.blocks[names[0]]
            stacked = _stack([state.blocks[name] for name in names])
            thin = _stack_rows([rows.get(name) for name in names]) if rows else None
            direction = block.method.precondition(block.layer, stacked, _stack([grads[name] for name in names]), thin)
            directions.update(zip(names, _unstack(direction, len(names)), strict=True))
        return {name: directions[name] for name in grads}

    def dense(self, state: PreconditionerState) -> dict[str, Array]:
        """The matrix each block stands for, undamped."""
        return {n: b.method.dense(b.layer, state.blocks[n]) for n, b in self.blocks.items()}

    def _groups(self, state: PreconditionerState) -> list[list[str]]:
        """Names of blocks that share a call: equal matrices of one dtype under one method."""
        if not self.group:
            return [[name] for name in self.blocks]
        groups: dict[Any, list[str]] = {}
        for name, block in self.blocks.items():
            alone = name if isinstance(block.layer, Tensor) or block.leading else None
            weight = state.blocks[name].average.weight
            geometry = block.layer.shape, block.layer.forms
            groups.setdefault((alone, geometry, block.method, str(weight.dtype), str(device(weight))), []).append(name)
        return list(groups.values())

    def _due(self, state: PreconditionerState, count: Any) -> list[tuple[Any, list[list[str]]]]:
        """Groups of blocks that are refreshed together: those of one method, or, spread over the steps, each group alone."""
        together: dict[tuple[int, int], list[list[str]]] = {}
        for index, names in enumerate(self._groups(state)):
            together.setdefault((id(self.blocks[names[0]].method), index if self.spread else 0), []).append(names)
        return [
            (schedule.due(self.blocks[groups[0][0]].method.refresh_every, count, offset), groups)
            for (_, offset), groups in together.items()
        ]

    def _check_damping(self, damping: Values) -> None:
        unknown = [name for name in damping if name not in self.blocks] if isinstance(damping, Mapping) else []
        if unknown:
            raise ValueError(f"`damping` names the unknown block {unknown[0]!r}; known: {', '.join(self.blocks)}")

    def _block(self, name: str) -> Block:
        if name not in self.blocks:
            raise KeyError(f"`statistics` name the unknown block {name!r}; known: {', '.join(self.blocks)}")
        return self.blocks[name]

    def _damping(self, name: str, damping: Values, count: Array) -> Any:
        value = damping.get(name) if isinstance(damping, Mapping) else damping
        value = self.blocks[name].method.rule.at(count) if value is None else value
        if isinstance(value, (int, float)):
            check_positive("damping", value)
        return value


def blocks_of(
    method: Method, layers: Mapping[str, Any], others: Mapping[str, tuple[int, ...]] | None = None, fallback: Method | None = None
) -> dict[str, Block]:
    """Blocks of named layers under ``method``, and of ``others``, parameters by shape, under ``fallback``.

    A layer with a separate bias gives the two blocks ``NAME.weight`` and ``NAME.bias``.
    """
    check_layers(layers)
    blocks = {}
    shared: dict[Method, Method] = {}  # equal methods are due together, which is told by identity
    for name, of_layer in method.assign(layers).items():
        own = shared.setdefault(of_layer, of_layer)
        for suffix, part in layers[name].blocks().items():
            blocks[name + suffix] = Block(name + suffix, part, own, part.stack)
    fallback = default_fallback(method) if fallback is None else fallback
    if not isinstance(fallback, Method):
        raise TypeError(f"`fallback` must be a curvature method such as kfcore.Diagonal(), got {fallback!r}")
    fallback = shared.setdefault(fallback, fallback)
    for name, shape in (others or {}).items():
        if name in blocks:
            raise ValueError(f"`others` repeats the name {name!r} of a layer's block")
        blocks[name] = Block(name, Tensor(tuple(shape)), fallback)
    return blocks


def default_fallback(method: Method) -> Method:
    """What ``method`` says (:meth:`kfcore.Method.others`), or the diagonal method with its damping and schedules."""
    return method.others() or Diagonal(
        damping=method.damping, stats_every=method.stats_every, refresh_every=method.stats_every, stats_decay=method.stats_decay
    )


def _same(old: Any) -> Any:
    return old


def _stack(trees: list[Any]) -> Any:
    """One tree of arrays with a new leading axis from equal trees; a single tree stays as it is."""
    return trees[0] if len(trees) == 1 else _map(lambda *leaves: namespace(leaves[0]).stack(leaves), *trees)


def _stack_rows(rows: list[GradientRows | None]) -> GradientRows | None:
    """Those of stacked gradients, if all have as many."""
    if len(rows) == 1:
        return rows[0]
    all_rows = [one for one in rows if one is not None]
    if len(all_rows) < len(rows) or len({one.inputs.shape[-2] for one in all_rows}) > 1:
        return None
    xp = namespace(all_rows[0].inputs)
    left = xp.stack([one.scale * one.output_grads for one in all_rows])
    return GradientRows(left, xp.stack([one.inputs for one in all_rows]), known=all(one.known for one in all_rows))


def _unstack(tree: Any, n: int) -> list[Any]:
    return [tree] if n == 1 else [_map(lambda leaf, i=i: leaf[i, ...], tree) for i in range(n)]


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        parts = [_map(function, *branch) for branch in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return function(*trees)


def _numbers(values: list[Any], state: Any) -> Array:
    """Dampings of stacked blocks as one array ``[k]``."""
    like = state.average.weight
    xp = namespace(like)
    return xp.stack([scalar(xp, value, like[0, ...]) for value in values])
