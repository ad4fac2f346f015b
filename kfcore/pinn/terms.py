"""Terms of a physics-informed loss: residuals made of a network's derivatives at points, and their derivatives by the jet.

A loss is ``sum_t weight_t / (2 N_t) sum_n |r_tn|^2``. A residual says what it is of a jet, and what its derivative with respect to the
jet is (its *cotangents*), which is all the reverse pass needs: no autodiff is involved here, and an adapter that has one may lend it
behind the same protocol.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from kfcore._array import Array, Namespace, cast, device, namespace
from kfcore.damping import check_positive
from kfcore.taylor import Derivatives, Jet

Unknowns: TypeAlias = Mapping[str, Array]
"""Trainable parameters outside of the network, by name: those an inverse problem asks for."""


class Points(NamedTuple):
    """Where a term is evaluated."""

    x: Array
    """``[N, d]``."""
    data: Mapping[str, Array] = {}
    """What else the residual needs at these points: measurements, normals, right-hand sides."""
    coefficients: Mapping[str, Array] | None = None
    """Of operators that are :class:`kfcore.taylor.Pointwise`."""
    directions: Array | None = None
    """Where the derivatives are along :class:`kfcore.taylor.PointwiseDirections`."""


class Pulled(NamedTuple):
    """A residual with its derivatives."""

    value: Array
    """``[N]``, or ``[N, M]`` of M equations."""
    cotangents: Jet
    """Derivatives by the jet, each array with a leading axis M in front of the jet's own (none where ``value`` is ``[N]``)."""
    unknowns: Mapping[str, Array] = {}
    """Derivatives by the unknowns that it depends on, ``[N, *shape]`` or ``[M, N, *shape]``."""


@runtime_checkable
class Residual(Protocol):
    """What a term asks of a residual."""

    @property
    def used(self) -> Sequence[str] | None:
        """What of the jet it depends on, as :meth:`kfcore.taylor.Derivatives.labels` takes it; all that has cotangents if ``None``.

        The columns that nothing depends on are dropped.
        """
        ...

    def value(self, points: Points, jet: Jet, unknowns: Unknowns) -> Array:
        """``[N]`` or ``[N, M]``."""
        ...

    def pulled(self, points: Points, jet: Jet, unknowns: Unknowns) -> Pulled:
        """The same with its derivatives."""
        ...


Function: TypeAlias = Callable[[Points, Jet, Unknowns], Any]


@dataclass(frozen=True)
class Nonlinear:
    """A residual that is any function of the jet, with its derivatives written out.

    Parameters
    ----------
    function
        ``(points, jet, unknowns)`` -> residuals ``[N]`` or ``[N, M]``.
    cotangents
        ``(points, jet, unknowns)`` -> a :class:`kfcore.taylor.Jet` with the derivatives of each residual by the jet at its point, arrays of
        the jet's shapes (``M`` in front for ``[N, M]``), ``None`` for zeros; where it depends on unknowns a pair of that and of
        the derivatives by them, ``{name: [N, *shape]}`` (``M`` in front likewise). :func:`kfcore.testing.check_cotangents` tries them.
    used
        What of the jet it depends on, if not on all that has cotangents.
    """

    function: Function
    cotangents: Function
    used: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("function", "cotangents"):
            if not callable(getattr(self, name)):
                raise TypeError(f"`{name}` of Nonlinear must be callable as {name}(points, jet, unknowns), got {getattr(self, name)!r}")

    def value(self, points: Points, jet: Jet, unknowns: Unknowns) -> Array:
        """As the protocol says."""
        return self.function(points, jet, unknowns)

    def pulled(self, points: Points, jet: Jet, unknowns: Unknowns) -> Pulled:
        """As the protocol says."""
        found = self.cotangents(points, jet, unknowns)
        jet_part, others = (found, {}) if isinstance(found, Jet) else found
        return Pulled(self.function(points, jet, unknowns), jet_part, others)


Coefficient: TypeAlias = Any
"""A number, ``[M][out]`` numbers, or a function of :class:`Points` that gives ``[N]`` or ``[N, M, out]``."""


@dataclass(frozen=True)
class LinearOperator:
    """``r = sum_c coefficient_c column_c - source``, linear in the jet: no derivatives need to be written.

    Parameters
    ----------
    coefficients
        By column: ``"value"``, ``"first[0]"``, an operator's name, ``"name[0]"`` of ``Each`` or ``"name[0,1]"`` of ``Hessian``. A number
        stands for itself at every point and for each output of the network alike (M = outputs); rows ``[M][out]`` mix
        outputs; a function of :class:`Points` gives numbers ``[N]`` or ``[N, M, out]`` at the points.
    source
        A number, or a function of :class:`Points` that gives ``[N]`` or ``[N, M]``.

    Examples
    --------
    ``-Lap u = f`` and ``u = g`` on the boundary:

    >>> poisson = LinearOperator({"laplacian": -1.0}, source=lambda points: points.data["f"])
    >>> boundary = LinearOperator({"value": 1.0}, source=lambda points: points.data["g"])

    """

    coefficients: Mapping[str, Coefficient]
    source: float | Callable[[Points], Array] = 0.0
    used: Sequence[str] | None = field(init=False, repr=False, compare=False)
    """The columns with coefficients."""

    def __post_init__(self) -> None:
        if not isinstance(self.coefficients, Mapping) or not self.coefficients:
            raise ValueError(f"`coefficients` of LinearOperator must map columns to coefficients, got {self.coefficients!r}")
        object.__setattr__(self, "coefficients", dict(self.coefficients))
        object.__setattr__(self, "used", tuple(self.coefficients))

    def value(self, points: Points, jet: Jet, unknowns: Unknowns) -> Array:
        """``[N, M]``."""
        xp = namespace(jet.value)
        matrices = self._matrices(xp, points, jet)
        total: Any = 0.0
        for name, c in matrices.items():
            # c [N or 1, M, out] times [N, out]
            total = total + xp.sum(c * _column(jet, name)[..., None, :], axis=-1)
        return total if self._source_is_zero else total - self._given(xp, points, jet)

    def pulled(self, points: Points, jet: Jet, unknowns: Unknowns) -> Pulled:
        """As the protocol says."""
        xp, n = namespace(jet.value), _values(jet).shape[0]
        pieces: dict[str, dict[tuple[int, ...], Array]] = {}
        for label, c in self._matrices(xp, points, jet).items():
            name, place = _parsed(label)
            c = xp.permute_dims(c, (1, 0, 2))
            pieces.setdefault(name, {})[place] = xp.broadcast_to(c, (c.shape[0], n, c.shape[2]))
        made = {name: _placed(xp, found, _part(jet, name)) for name, found in pieces.items()}
        value, first = made.pop("value", None), made.pop("first", None)
        return Pulled(self.value(points, jet, unknowns), Jet(value, first, made))

    @property
    def _source_is_zero(self) -> bool:
        return not callable(self.source) and self.source == 0

    def _given(self, xp: Namespace, points: Points, jet: Jet) -> Any:
        """The source, ``[N, M]`` or a number."""
        if not callable(self.source):
            return float(self.source)
        found, n = cast(xp, self.source(points), _values(jet).dtype), _values(jet).shape[0]
        if tuple(found.shape[:1]) != (n,) or found.ndim not in (1, 2):
            raise ValueError(f"`source` must give shape [{n}] or [{n}, M], got {tuple(found.shape)}")
        return found[:, None] if found.ndim == 1 else found

    def _matrices(self, xp: Namespace, points: Points, jet: Jet) -> dict[str, Array]:
        """Coefficients ``[N or 1, M, out]``, all with the same M."""
        like, found = _values(jet), {}
        n, out = like.shape
        for label, c in self.coefficients.items():
            c = c(points) if callable(c) else xp.asarray(c, dtype=like.dtype, device=device(like))
            c = cast(xp, c, like.dtype)
            if c.ndim == 0 or (tuple(c.shape) == (n,) and callable(self.coefficients[label])):
                eye = xp.eye(out, dtype=like.dtype, device=device(like))
                c = c[..., None, None] * eye[None, ...]
            elif c.ndim == 2:
                c = c[None, ...]
            if c.ndim != 3 or c.shape[0] not in (1, n) or c.shape[2] != out:
                raise ValueError(
                    f"`coefficients` of {label!r} must be a number, [M][{out}] numbers, or a function that gives [{n}] or [{n}, M, {out}], "
                    f"got shape {tuple(c.shape)}"
                )
            found[label] = c
        if len({c.shape[1] for c in found.values()}) > 1:
            raise ValueError(f"`coefficients` must all be of the same number M of equations, got {[c.shape[1] for c in found.values()]}")
        return found


@dataclass(frozen=True)
class Term:
    """One term of the loss, ``weight / (2 N) sum_n |r_n|^2``.

    Parameters
    ----------
    residual
        :class:`LinearOperator`, :class:`Nonlinear`, or what else follows :class:`Residual`.
    derivatives
        Which derivatives of the network it needs. ``Derivatives(d, ())`` for one of the value alone (boundary, initial, measured data).
    weight
        Positive.
    """

    residual: Residual
    derivatives: Derivatives
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.residual, Residual):
            raise TypeError(f"`residual` of Term must have `used`, `value` and `pulled` (see kfcore.pinn.Residual), got {self.residual!r}")
        if not isinstance(self.derivatives, Derivatives):
            raise TypeError(f"`derivatives` of Term must be a kfcore.taylor.Derivatives, got {self.derivatives!r}")
        check_positive("weight", self.weight)
        if self.residual.used is not None:
            self.derivatives.labels(*self.residual.used)


def evaluated(xp: Namespace, name: str, term: Term, points: Points, jet: Jet, unknowns: Unknowns) -> Array:
    """The residuals ``[M, N]`` of a term."""
    return _turned(name, term.residual.value(points, jet, unknowns), jet)


def pulled(xp: Namespace, name: str, term: Term, points: Points, jet: Jet, unknowns: Unknowns) -> Pulled:
    """:meth:`Residual.pulled` checked, and with M in front of everything."""
    found = term.residual.pulled(points, jet, unknowns)
    if not isinstance(found, Pulled):
        raise TypeError(f"`pulled` of the residual of term {name!r} must give a kfcore.pinn.Pulled, got {type(found).__name__}")
    value = _turned(name, found.value, jet)
    m, n = value.shape

    def lead(x: Array | None, like: Array, what: str) -> Array | None:
        # cotangents of one equation may come without its axis
        x = x if x is None or x.ndim == like.ndim + 1 or m > 1 else x[None, ...]
        if x is not None and tuple(x.shape) != (m, *like.shape):
            raise ValueError(f"`cotangents` of {what!r} of term {name!r} must have shape {(m, *like.shape)}, got {tuple(x.shape)}")
        return x

    c = found.cotangents
    unknown = set(c.operators) - set(jet.operators)
    if unknown:
        raise ValueError(f"`cotangents` of term {name!r} must be of operators of its derivatives, got {', '.join(sorted(unknown))}")
    operators = {k: lead(a, jet.operators[k], k) for k, a in c.operators.items() if a is not None}
    cotangents = Jet(lead(c.value, jet.value, "value"), lead(c.first, jet.first, "first"), operators)
    others = {}
    for key, d in found.unknowns.items():
        if key not in unknowns:
            raise ValueError(f"derivatives by unknowns of term {name!r} must be of {', '.join(sorted(unknowns)) or 'none'}, got {key!r}")
        shape = tuple(unknowns[key].shape)
        d = d[None, ...] if d.ndim == 1 + len(shape) and m == 1 else d
        if tuple(d.shape) != (m, n, *shape):
            raise ValueError(f"derivatives of term {name!r} by {key!r} must have shape {(m, n, *shape)}, got {tuple(d.shape)}")
        others[key] = d
    return Pulled(value, cotangents, others)


def _turned(name: str, value: Array, jet: Jet) -> Array:
    """Residuals as ``[M, N]``."""
    like = _values(jet)
    xp, n = namespace(like, value), like.shape[0]
    if value.ndim not in (1, 2) or value.shape[0] != n or 0 in value.shape:
        raise ValueError(f"residuals of term {name!r} must have shape [{n}] or [{n}, M], got {tuple(value.shape)}")
    value = cast(xp, value, like.dtype)
    return value[None, ...] if value.ndim == 1 else value.mT


def _values(jet: Jet) -> Array:
    """``u [N, out]``, which every jet of a network has."""
    assert jet.value is not None
    return jet.value


def _parsed(label: str) -> tuple[str, tuple[int, ...]]:
    """``"name[0,1]"`` as its name and numbers."""
    found = re.fullmatch(r"(.*?)(?:\[(\d+(?:,\d+)*)\])?", label)
    assert found is not None
    return found[1], tuple(int(k) for k in found[2].split(",")) if found[2] else ()


def _part(jet: Jet, name: str) -> Array:
    return getattr(jet, name) if name in ("value", "first") else jet.operators[name]


def _column(jet: Jet, label: str) -> Array:
    """One column ``[N, out]``."""
    name, place = _parsed(label)
    part = _part(jet, name)
    if part.ndim - 2 != len(place):
        raise ValueError(f"`coefficients` must name single columns, such as '{name}[0]', got {label!r}")
    return part[(slice(None), *place, ...)]


def _placed(xp: Namespace, found: Mapping[tuple[int, ...], Array], like: Array) -> Array:
    """Columns ``[M, N, out]`` at their places in an array ``[M, *like]``, zeros elsewhere."""
    counts = like.shape[1:-1]
    if not counts:
        return found[()]
    one = next(iter(found.values()))
    flat = xp.zeros_like(one)
    places = {sum(k * (counts[1] if len(counts) > 1 and i == 0 else 1) for i, k in enumerate(p)): c for p, c in found.items()}
    total = counts[0] * (counts[1] if len(counts) > 1 else 1)
    stacked = xp.stack([places.get(i, flat) for i in range(total)], axis=2)
    return xp.reshape(stacked, (one.shape[0], one.shape[1], *counts, one.shape[2]))
