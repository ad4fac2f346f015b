"""The columns of a set of derivatives, and the sums over directions that activations add to them.

In this module and in :mod:`kfcore.taylor.rules` a *part* is an array ``[..., N, s, h]`` with all columns of one order: 1 of order 0, K of
order 1, and one for each operator of order 2, 3, 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy

from kfcore._array import Array, Namespace, cast, device

Rows: TypeAlias = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Diagonal:
    """Columns ``sum_k c_mk X_k`` of arrays ``X_k`` that belong to directions: constant rows of coefficients, or one that is given."""

    labels: tuple[str, ...]
    directions: int
    rows: Rows | None = None

    @property
    def support(self) -> tuple[frozenset[int], ...]:
        """For each column the directions that enter it."""
        if self.rows is None:
            return (frozenset(range(self.directions)),)
        return tuple(frozenset(k for k, c in enumerate(row) if c) for row in self.rows)

    def restricted(self, directions: tuple[int, ...]) -> Diagonal:
        """Over some directions alone, outside of which its coefficients vanish."""
        rows = self.rows if self.rows is None else tuple(tuple(row[k] for k in directions) for row in self.rows)
        return Diagonal(self.labels, len(directions), rows)

    def coefficients(self, xp: Namespace, given: Mapping[str, Array], like: Array) -> Array | None:
        """``[m, K]`` or ``[..., N, 1, K]``; ``None`` for the identity, and for a plain sum."""
        if self.rows is None:
            return cast(xp, given[self.labels[0]], like.dtype)[..., None, :]
        if self._each or self._sum:
            return None
        return xp.asarray(self.rows, dtype=like.dtype, device=device(like))

    def combine(self, xp: Namespace, x: Array, c: Array | None) -> Array:
        """``x [..., N, K, h]`` -> ``[..., N, m, h]``."""
        if c is None:
            return x if self._each else xp.sum(x, axis=-2, keepdims=True)
        return xp.sum(c.mT * x, axis=-2, keepdims=True) if len(self.labels) == 1 else c @ x

    def spread(self, c: Array | None, g: Array) -> Array:
        """Transpose of :meth:`combine`: ``g [..., N, m, h]`` -> ``[..., N, K, h]``, or something that broadcasts to it."""
        if c is None:
            return g
        return c.mT * g if len(self.labels) == 1 else c.mT @ g

    def quadratic(self, xp: Namespace, first: Array, c: Array | None) -> Array:
        """``sum_k c_mk G_k^2`` of ``G [..., N, K, h]``."""
        return self.combine(xp, first * first, c)

    def pull(self, xp: Namespace, first: Array, c: Array | None, g: Array) -> Array:
        """Gradient of ``sum_m g_m quadratic_m`` by ``G``, ``[..., N, K, h]``."""
        return 2.0 * first * self.spread(c, g)

    @property
    def _each(self) -> bool:
        return self.rows == tuple(tuple(float(i == k) for k in range(self.directions)) for i in range(self.directions))

    @property
    def _sum(self) -> bool:
        return self.rows == ((1.0,) * self.directions,)


@dataclass(frozen=True)
class Matrix:
    """One column ``sum_kl c_kl G_k G_l``, its matrix constant or given."""

    labels: tuple[str, ...]
    directions: int
    rows: Rows | None = None

    @property
    def support(self) -> tuple[frozenset[int], ...]:
        """The directions that enter the column."""
        if self.rows is None:
            return (frozenset(range(self.directions)),)
        return (frozenset(k for row in self.rows for k, c in enumerate(row) if c) | {k for k, row in enumerate(self.rows) if any(row)},)

    def coefficients(self, xp: Namespace, given: Mapping[str, Array], like: Array) -> Array:
        """The symmetric part, ``[K, K]`` or ``[..., N, K, K]``."""
        if self.rows is None:
            c = cast(xp, given[self.labels[0]], like.dtype)
        else:
            c = xp.asarray(self.rows, dtype=like.dtype, device=device(like))
        return 0.5 * (c + c.mT)

    def quadratic(self, xp: Namespace, first: Array, c: Array) -> Array:
        """``[..., N, 1, h]``."""
        return xp.sum((c @ first) * first, axis=-2, keepdims=True)

    def pull(self, xp: Namespace, first: Array, c: Array, g: Array) -> Array:
        """As of :class:`Diagonal`."""
        return 2.0 * (c @ first) * g


@dataclass(frozen=True)
class Pairs:
    """All products ``G_k G_l`` with k <= l, l running fastest."""

    labels: tuple[str, ...]
    directions: int

    @property
    def support(self) -> tuple[frozenset[int], ...]:
        """For each column the directions that enter it."""
        return tuple(frozenset(pair) for pair in pairs(self.directions))

    def coefficients(self, xp: Namespace, given: Mapping[str, Array], like: Array) -> Array:
        """What the products of each pair, in both orders, count in the gradient: 2 on the diagonal, ``[K K, 1]``."""
        weights = [[1.0 + (k == i)] for i in range(self.directions) for k in range(self.directions)]
        return xp.asarray(weights, dtype=like.dtype, device=device(like))

    def quadratic(self, xp: Namespace, first: Array, c: Array) -> Array:
        """``[..., N, K (K + 1) / 2, h]``."""
        return xp.concat([first[..., k : k + 1, :] * first[..., k:, :] for k in range(self.directions)], axis=-2)

    def pull(self, xp: Namespace, first: Array, c: Array, g: Array) -> Array:
        """As of :class:`Diagonal`."""
        both = c * pick(xp, g, square(self.directions))
        both = xp.reshape(both, (*both.shape[:-2], self.directions, self.directions, both.shape[-1]))
        return xp.sum(both * first[..., None, :, :], axis=-2)


Run: TypeAlias = Diagonal | Matrix | Pairs


def pairs(n: int) -> tuple[tuple[int, int], ...]:
    """``(k, l)`` with k <= l < n, l running fastest."""
    return tuple((k, j) for k in range(n) for j in range(k, n))


def square(n: int) -> tuple[int, ...]:
    """For each entry of a symmetric matrix its place among the :func:`pairs`."""
    place = {pair: i for i, pair in enumerate(pairs(n))}
    return tuple(place[min(k, j), max(k, j)] for k in range(n) for j in range(n))


def pick(xp: Namespace, x: Array, places: tuple[int, ...]) -> Array:
    """Columns of ``x [..., s, h]`` at ``places``: a view where they are neighbours."""
    if not places:
        return x[..., :0, :]
    first = places[0]
    if places == tuple(range(first, first + len(places))):
        return x if len(places) == x.shape[-2] else x[..., first : first + len(places), :]
    return xp.take(x, xp.asarray(places, dtype=xp.int32, device=device(x)), axis=-2)


def place(xp: Namespace, x: Array, places: tuple[int, ...], size: int) -> Array:
    """Transpose of :func:`pick`: ``x [..., n, h]`` at different ``places`` among ``size`` columns, zeros elsewhere."""
    if places == tuple(range(size)):
        return x
    zero = xp.zeros((*x.shape[:-2], 1, x.shape[-1]), dtype=x.dtype, device=device(x))
    sources = [places.index(i) + 1 if i in places else 0 for i in range(size)]
    return xp.take(xp.concat([zero, x], axis=-2), xp.asarray(sources, dtype=xp.int32, device=device(x)), axis=-2)


@dataclass(frozen=True)
class Plan:
    """Columns and the runs that compute those of order 2, 3, 4.

    Orders above 2 of a sum need the lower ones of each of its directions by themselves. These are columns too, ``D2[k]`` and ``D3[k]``,
    unless they are wanted anyway.
    """

    count: int
    runs: tuple[tuple[Run, ...], ...]
    """By order - 2."""
    places: tuple[tuple[str, int, tuple[int, ...]], ...]
    """Operators by name: order, and places of their columns among those of this order."""
    curved: tuple[tuple[int, ...], tuple[int, ...]]
    """Directions in the sums of order 3, and in those of order 4."""
    second: tuple[tuple[int, ...], tuple[int, ...]]
    """For both, places of their pure second derivatives among the columns of order 2."""
    third: tuple[int, ...]
    """For those of order 4, places of their pure third derivatives."""

    parts: tuple[tuple[str, ...], ...] = field(init=False, repr=False, compare=False)
    """Labels by order."""
    sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """How many columns of each order there are."""
    labels: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """All of them."""
    orders: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Of each column."""
    public: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """Those that are wanted, and not only needed for others."""

    def __post_init__(self) -> None:
        parts = [("value",), tuple(f"first[{k}]" for k in range(self.count))]
        parts += [tuple(label for run in runs for label in run.labels) for runs in self.runs]
        object.__setattr__(self, "parts", tuple(parts))
        object.__setattr__(self, "sizes", tuple(map(len, parts)))
        object.__setattr__(self, "labels", tuple(label for part in parts for label in part))
        object.__setattr__(self, "orders", tuple(order for order, part in enumerate(parts) for _ in part))
        wanted = {parts[order][i] for _, order, places in self.places for i in places}
        object.__setattr__(self, "public", tuple(c for c, m in zip(self.labels, self.orders, strict=True) if m < 2 or c in wanted))

    @staticmethod
    def of(count: int, operators: Mapping[str, Any]) -> Plan:
        """For so many directions and operators of :mod:`kfcore.taylor.derivatives`."""
        built = [_Columns(order) for order in (2, 3, 4)]
        places = []
        for name, operator in operators.items():
            columns = built[operator.order - 2]
            start = columns.size
            columns.add(_run(name, operator, count))
            places.append((name, operator.order, tuple(range(start, columns.size))))
        fourth = built[2].directions
        third = built[1].pure(fourth, count)
        directions = built[1].directions
        second = tuple(built[0].pure(chosen, count) for chosen in (directions, fourth))
        runs = (
            tuple(built[0].runs),
            tuple(run.restricted(directions) for run in built[1].runs if isinstance(run, Diagonal)),
            tuple(run.restricted(fourth) for run in built[2].runs if isinstance(run, Diagonal)),
        )
        return Plan(count, runs, tuple(places), (directions, fourth), (second[0], second[1]), third)

    def coefficients(self, xp: Namespace, given: Mapping[str, Array], like: Array) -> tuple[Array | None, ...]:
        """Of all runs, one after the other."""
        return tuple(run.coefficients(xp, given, like) for runs in self.runs for run in runs)

    def split(self, coefficients: tuple[Array | None, ...], order: int) -> list[tuple[Run, Array | None, slice]]:
        """The runs of an order, each with its coefficients and with the columns of the part that are its own."""
        before = sum(len(runs) for runs in self.runs[: order - 2])
        found, start = [], 0
        for i, run in enumerate(self.runs[order - 2]):
            found.append((run, coefficients[before + i], slice(start, start + len(run.labels))))
            start += len(run.labels)
        return found

    def sources(self, label: str) -> frozenset[str]:
        """Columns that enter this one at an activation, besides itself and the value."""
        order = self.orders[self.labels.index(label)]
        if order < 2:
            return frozenset()
        support = dict(zip(self.parts[order], (s for run in self.runs[order - 2] for s in run.support), strict=True))[label]
        if order == 2:
            return frozenset(self.parts[1][k] for k in support)
        found = set()
        for i in support:
            found |= {self.parts[1][self.curved[order - 3][i]], self.parts[2][self.second[order - 3][i]]}
            if order == 4:
                found.add(self.parts[3][self.third[i]])
        return frozenset(found)


class _Columns:
    """The columns of one order while they are being collected."""

    def __init__(self, order: int) -> None:
        self.order, self.runs = order, list[Run]()

    @property
    def size(self) -> int:
        return sum(len(run.labels) for run in self.runs)

    @property
    def directions(self) -> tuple[int, ...]:
        """All that enter."""
        return tuple(sorted(k for k in frozenset[int]().union(*(s for run in self.runs for s in run.support))))

    def add(self, run: Run) -> None:
        """Constant diagonals are computed together."""
        last = self.runs[-1] if self.runs else None
        if isinstance(run, Diagonal) and isinstance(last, Diagonal) and run.rows is not None and last.rows is not None:
            self.runs[-1] = Diagonal(last.labels + run.labels, run.directions, last.rows + run.rows)
        else:
            self.runs.append(run)

    def pure(self, directions: tuple[int, ...], count: int) -> tuple[int, ...]:
        """Places of the columns that are one direction's alone, added where they are missing."""
        found = []
        for k in directions:
            unit = tuple(float(i == k) for i in range(count))
            rows = [row for run in self.runs for row in (run.rows if isinstance(run, Diagonal) and run.rows else (None,) * len(run.labels))]
            if unit not in rows:
                rows.append(unit)
                self.add(Diagonal((f"D{self.order}[{k}]",), count, (unit,)))
            found.append(rows.index(unit))
        return tuple(found)


def _run(name: str, operator: Any, count: int) -> Run:
    """The columns of an operator."""
    kind = type(operator).__name__
    if kind == "Hessian":
        return Pairs(tuple(f"{name}[{k},{j}]" for k, j in pairs(count)), count)
    if kind == "Each":
        rows = tuple(tuple(float(i == k) for k in range(count)) for i in range(count))
        return Diagonal(tuple(f"{name}[{k}]" for k in range(count)), count, rows)
    if kind == "Pointwise":
        return Diagonal((name,), count) if operator.form == "diagonal" else Matrix((name,), count)
    c = numpy.asarray(operator.coefficients)
    if c.ndim == 2 and numpy.any(c != numpy.diag(numpy.diag(c))):
        return Matrix((name,), count, tuple(map(tuple, c.tolist())))
    return Diagonal((name,), count, (tuple((numpy.diag(c) if c.ndim == 2 else c).tolist()),))
