"""Directions by Kronecker factors of every term and layer: KFAC for physics-informed networks.

Of a term and a layer, ``A`` is the mean of ``z z^T`` over points and columns, ``B`` the mean over points of the sum over columns (and
equations) of ``g g^T``, the weight of the term in it, with ``g`` gradients of residuals and not of the loss (Dangel, Mueller and
Zeinhofer 2024). Terms add up, and so a layer's block is a sum of Kronecker products.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, NamedTuple

from kfcore._array import Array, Namespace, Schedule, cond, device, host, number, select
from kfcore.curvature.base import count_failure
from kfcore.damping import Damping, LevenbergMarquardt
from kfcore.linalg import damped, gram
from kfcore.linalg import invert as invert_one
from kfcore.pinn import joint
from kfcore.pinn.joint import Joint
from kfcore.pinn.linearised import UNKNOWNS, Linearised, Side, Vector
from kfcore.statistics import Moment, RunningAverage, observe, unseen


class KroneckerState(NamedTuple):
    """Running averages and what was made of them, one entry a layer."""

    averages: tuple[RunningAverage, ...]
    """Of each layer the factors ``(A_1, B_1, A_2, B_2, ...)`` of its terms."""
    unknowns: RunningAverage | None
    """Gauss-Newton matrix of the unknowns."""
    solvers: tuple[Joint, ...]
    inverse: Array | None
    """Of the unknowns, damped."""
    dropped: Array
    """How many layers' statistics were not finite, over all steps; int32."""
    failed: Array
    """How many factorisations failed, int32; the older ones were kept."""


@dataclass(frozen=True)
class Kronecker:
    """Directions ``-F^-1 gradient`` with a sum of Kronecker products in each layer.

    One term is inverted by its eigenbases, two by simultaneous diagonalisation. Of more, those whose derivatives are of the highest order
    are merged into one Kronecker product (the nearest, :func:`kfcore.pinn.joint.nearest`), and the others into another; where all are of
    one order, the first is kept apart. Unknowns outside of layers are a small dense block.

    Parameters
    ----------
    damping
        ``lambda``, or a :class:`kfcore.Damping`: ``kind="plain"`` (``lambda`` added to every factor, as the paper has it; where both
        factors are singular no more than ``lambda^2`` is added to the block, which is why its values are tiny), ``"factored"``, or
        ``"exact"`` (Tikhonov: ``lambda`` added to the sum). A number is plain.
    stats_decay
        In [0, 1].
    stats_every, refresh_every
        In steps.
    columns
        ``"live"`` leaves columns out that cannot contribute to a gradient; ``"all"`` counts them in ``A`` as the paper does.
    """

    damping: float | Schedule | LevenbergMarquardt | Damping = 1e-8
    _: KW_ONLY
    stats_decay: float = 0.95
    stats_every: int = 1
    refresh_every: int = 1
    columns: Literal["live", "all"] = "live"
    rule: Damping = field(init=False, repr=False, compare=False)
    """The damping."""

    def __post_init__(self) -> None:
        given = self.damping
        rule = given if isinstance(given, Damping) else Damping(given, "plain")
        if rule.relative or rule.norm != "mean":
            raise ValueError(f"`damping` of Kronecker must be absolute and divided by mean eigenvalues, got {given!r}")
        object.__setattr__(self, "rule", rule)
        if not isinstance(self.stats_decay, numbers.Real) or not 0 <= self.stats_decay <= 1:
            raise ValueError(f"`stats_decay` must lie in [0, 1], got {self.stats_decay!r}")
        for name in ("stats_every", "refresh_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a positive int, got {value!r}")
        if self.columns not in ("live", "all"):
            raise ValueError(f"`columns` must be 'live' or 'all', got {self.columns!r}")

    def init(self, xp: Namespace, shapes: Mapping[str, tuple[int, int]], terms: int, like: Array) -> KroneckerState:
        """Nothing seen; ``shapes`` of the matrices by layer, and of the unknowns."""
        averages, solvers = [], []
        for name, (out, inputs) in shapes.items():
            if name != UNKNOWNS:
                averages.append(unseen(xp, like, ((inputs, inputs), (out, out)) * terms))
                zero = [xp.zeros(s, dtype=like.dtype, device=device(like)) for s in ((out, out), (inputs, inputs))]
                solvers.append(Joint(zero[0], zero[1], xp.ones((out, inputs), dtype=like.dtype, device=device(like))))
        p = shapes.get(UNKNOWNS, (1, 0))[1]
        unknowns = unseen(xp, like, ((p, p),)) if p else None
        inverse = xp.zeros((p, p), dtype=like.dtype, device=device(like)) if p else None
        none = xp.zeros((), dtype=xp.int32, device=device(like))
        return KroneckerState(tuple(averages), unknowns, tuple(solvers), inverse, none, none)

    def observe(self, xp: Namespace, state: KroneckerState, lin: Linearised, steps: Array) -> KroneckerState:
        """``state`` with the factors of ``lin``, if they are due."""
        due = self.stats_every == 1 or (host(steps) % self.stats_every) == 0
        return cond(due, lambda state: self._observed(xp, state, lin), lambda state: state, state)

    def _observed(self, xp: Namespace, state: KroneckerState, lin: Linearised) -> KroneckerState:
        averages, dropped = [], state.dropped
        names = next(iter(lin.pieces.values())).layers
        for name, average in zip(names, state.averages, strict=True):
            totals, counts = [], []
            for side in lin.sides(name):
                a, count, b = factors(xp, side)
                totals += [Moment(a), Moment(b)]
                counts += [count, 1.0]
            found, ok = observe(xp, average, tuple(totals), tuple(counts), self.stats_decay)
            averages.append(found)
            dropped = count_failure(xp, dropped, ok)
        unknowns = state.unknowns
        if unknowns is not None:
            unknowns, ok = observe(xp, unknowns, (Moment(lin.unknowns_gram()),), (1.0,), self.stats_decay)
            dropped = count_failure(xp, dropped, ok)
        return state._replace(averages=tuple(averages), unknowns=unknowns, dropped=dropped)

    def refresh(
        self, xp: Namespace, state: KroneckerState, groups: Sequence[Sequence[int]], damping: Array, steps: Array
    ) -> KroneckerState:
        """``state`` with solvers of its averages, if they are due."""
        due = self.refresh_every == 1 or (host(steps) % self.refresh_every) == 0
        return cond(due, lambda state: self.refreshed(xp, state, groups, damping), lambda state: state, state)

    def refreshed(self, xp: Namespace, state: KroneckerState, groups: Sequence[Sequence[int]], damping: Array) -> KroneckerState:
        """``state`` with solvers of its averages."""
        merged = [joint.grouped(xp, pairs(average), groups) for average in state.averages]
        found, fine = joint.invert(xp, merged, damping, self.rule.kind)
        solvers, failed = [], state.failed
        for average, new, ok, old in zip(state.averages, found, fine, state.solvers, strict=True):
            ok = ok & (average.weight > 0)
            solvers.append(select(xp, ok, new, old))
            failed = count_failure(xp, failed, ok)
        inverse = state.inverse
        if state.unknowns is not None and inverse is not None:
            new, ok = invert_one(xp, damped(xp, state.unknowns.values[0], number(xp, damping)))
            inverse, failed = select(xp, ok, new, inverse), count_failure(xp, failed, ok)
        return state._replace(solvers=tuple(solvers), inverse=inverse, failed=failed)

    def apply(self, xp: Namespace, state: KroneckerState, damping: Array, v: Vector) -> dict[str, Array]:
        """``F^-1 v``."""
        found: dict[str, Array] = {}
        layers = [name for name in v if name != UNKNOWNS]
        exact = self.rule.kind == "exact"
        for name, average, solver in zip(layers, state.averages, state.solvers, strict=True):
            several = exact and len(average.values) > 2
            found[name] = joint.solve(xp, solver, pairs(average), damping, v[name]) if several else joint.apply(xp, solver, v[name])
        if UNKNOWNS in v:
            found[UNKNOWNS] = v[UNKNOWNS] @ state.inverse
        return found

    def direct(self, xp: Namespace, state: Any, given: Directed) -> tuple[dict[str, Array], KroneckerState]:
        """The direction, and the new state."""
        state = self.observe(xp, state, given.lin, given.steps)
        state = self.refresh(xp, state, given.groups, given.damping, given.steps)
        found = self.apply(xp, state, given.damping, given.gradient)
        return {name: -x for name, x in found.items()}, state


class Directed(NamedTuple):
    """What directions are made from."""

    lin: Linearised
    gradient: Vector
    """``J^T rho``."""
    damping: Array
    """``lambda``, 0-d."""
    steps: Array
    """How many were made before."""
    groups: Sequence[Sequence[int]]
    """Terms that are merged."""
    last: Vector
    """The last update."""


def factors(xp: Namespace, side: Side) -> tuple[Array, float, Array]:
    """Sum of ``z z^T``, the number of rows in it, and ``B``, of one layer in one term."""
    z, g = (xp.reshape(x, (-1, x.shape[-1])) for x in side)
    return gram(xp, z), float(z.shape[0]), gram(xp, g)


def pairs(average: RunningAverage) -> list[joint.Pair]:
    """The factors ``(A, B)`` by term."""
    return list(zip(average.values[::2], average.values[1::2], strict=True))


def groups(orders: Sequence[int]) -> list[list[int]]:
    """Terms that are merged, from the orders of their derivatives: one group, or two."""
    if len(orders) == 1:
        return [[0]]
    top = max(orders)
    first = [i for i, order in enumerate(orders) if order == top]
    rest = [i for i, order in enumerate(orders) if order != top]
    return [first, rest] if rest else [[0], list(range(1, len(orders)))]
