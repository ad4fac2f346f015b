"""Which derivatives of a network are wanted, and the columns that have to be carried for them.

With directions ``v_1 .. v_K`` and ``D_k`` the derivative along ``v_k``, the columns of a point are the value, all ``D_k``, and one for
every *operator*: a sum ``sum_kl c_kl D_k D_l``, or ``sum_k c_k D_k^m`` with m = 2, 3 or 4. A sum is one column however many terms it has
(Dangel et al. 2025, "Collapsing Taylor mode"; for the Laplacian this is the forward Laplacian of Li et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy

from kfcore.taylor.plan import Plan

Row: TypeAlias = tuple[float, ...]
Order: TypeAlias = Literal[2, 3, 4]


@dataclass(frozen=True)
class Weighted:
    """``sum_k c_k D_k^order``, or ``sum_kl c_kl D_k D_l``, with the same coefficients at all points: one column.

    Parameters
    ----------
    coefficients
        K numbers, or for order 2 also K rows of K numbers, definite or not; only the symmetric part of a matrix matters.
    order
        2, 3 or 4.
    """

    coefficients: Sequence[Any]
    order: Order = 2

    def __post_init__(self) -> None:
        _check_order("Weighted", self.order)
        try:
            array = numpy.asarray(self.coefficients, dtype=numpy.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`coefficients` of Weighted must be numbers or rows of numbers, got {self.coefficients!r}") from error
        square = array.ndim == 2 and array.shape[0] == array.shape[1] and self.order == 2
        if not (array.ndim == 1 or square) or not numpy.all(numpy.isfinite(array)) or not numpy.any(array):
            raise ValueError(
                "`coefficients` of Weighted must be K numbers or (order 2) K rows of K numbers, finite and not all zero, got "
                f"{self.coefficients!r} for order {self.order}"
            )
        object.__setattr__(self, "coefficients", tuple(map(tuple, array.tolist())) if square else tuple(array.tolist()))


@dataclass(frozen=True)
class Pointwise:
    """The same sums with coefficients of each point's own, given with the points: one column.

    Parameters
    ----------
    form
        ``"diagonal"`` for ``sum_k c_k(x) D_k^order`` (coefficients ``[N, K]``), or ``"matrix"`` for ``sum_kl c_kl(x) D_k D_l``
        (``[N, K, K]``, of which the symmetric part matters). Coefficients are not differentiated.
    order
        2, 3 or 4; 2 for a matrix.
    """

    form: Literal["diagonal", "matrix"] = "diagonal"
    order: Order = 2

    def __post_init__(self) -> None:
        _check_order("Pointwise", self.order)
        if self.form not in ("diagonal", "matrix"):
            raise ValueError(f"`form` of Pointwise must be 'diagonal' or 'matrix', got {self.form!r}")
        if self.form == "matrix" and self.order != 2:
            raise ValueError(f"`order` of Pointwise must be 2 for form 'matrix', got {self.order!r}")


@dataclass(frozen=True)
class Each:
    """``D_k^order`` for every direction, nothing summed: K columns.

    Parameters
    ----------
    order
        2, 3 or 4.
    """

    order: Order = 2

    def __post_init__(self) -> None:
        _check_order("Each", self.order)


@dataclass(frozen=True)
class Hessian:
    """``D_k D_l`` for all pairs: K (K + 1) / 2 columns."""

    order: Literal[2] = 2


Operator: TypeAlias = Weighted | Pointwise | Each | Hessian


@dataclass(frozen=True)
class PointwiseDirections:
    """Directions of each point's own, ``[N, count, d]``, given with the points; they are not differentiated.

    Parameters
    ----------
    count
        How many.
    """

    count: int


def laplacian(directions: int, of: Sequence[int] | None = None) -> Weighted:
    """``sum_k D_k^2`` over all of so many directions, or over those in ``of`` (a partial Laplacian, as in the heat equation)."""
    chosen = range(directions) if of is None else of
    if any(not 0 <= k < directions for k in chosen) or len(set(chosen)) != len(chosen):
        raise ValueError(f"`of` must hold different numbers from 0 to {directions - 1}, got {of!r}")
    return Weighted([float(k in chosen) for k in range(directions)])


def _check_order(kind: str, order: object) -> None:
    if order not in (2, 3, 4):
        raise ValueError(f"`order` of {kind} must be 2, 3 or 4, got {order!r}")


@dataclass(frozen=True)
class Derivatives:
    """The derivatives of a network that are wanted.

    Parameters
    ----------
    inputs
        Number d of coordinates of a point.
    directions
        ``None`` for all coordinates, numbers of coordinates such as ``(0, 2)``, vectors such as ``((1.0, 0.0, -1.0),)``, or
        :class:`PointwiseDirections`. A coordinate that enters no derivative need not be among them; ``()`` leaves the value alone.
    operators
        By name: :class:`Weighted` (see :func:`laplacian`), :class:`Pointwise`, :class:`Each` or :class:`Hessian`.

    Examples
    --------
    >>> heat = Derivatives(3, operators={"laplacian": laplacian(3, of=(1, 2))})
    >>> heat.columns
    ('value', 'first[0]', 'first[1]', 'first[2]', 'laplacian')

    """

    inputs: int
    directions: Any = None
    operators: Any = ()
    count: int = field(init=False, repr=False, compare=False)
    """Number K of directions."""
    plan: Plan = field(init=False, repr=False, compare=False)
    """The columns, and how they are computed."""

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, int) or isinstance(self.inputs, bool) or self.inputs < 1:
            raise ValueError(f"`inputs` of Derivatives must be a positive int, got {self.inputs!r}")
        directions = _directions(self.directions, self.inputs)
        object.__setattr__(self, "directions", directions)
        operators = tuple(dict(self.operators).items())
        object.__setattr__(self, "operators", operators)
        object.__setattr__(self, "count", directions.count if isinstance(directions, PointwiseDirections) else len(directions))
        for name, operator in operators:
            self._check(name, operator)
        object.__setattr__(self, "plan", Plan.of(self.count, dict(operators)))

    def _check(self, name: object, operator: object) -> None:
        if not isinstance(name, str) or not name or name in ("value", "first") or "[" in name:
            raise ValueError(f"`operators` must be named by strings without '[' other than 'value' and 'first', got {name!r}")
        if not isinstance(operator, Weighted | Pointwise | Each | Hessian):
            raise TypeError(f"`operators` must be Weighted, Pointwise, Each or Hessian, got {operator!r} for {name!r}")
        if not self.count:
            raise ValueError(f"`directions` must not be empty where there are operators, got operator {name!r}")
        if isinstance(operator, Weighted) and len(operator.coefficients) != self.count:
            raise ValueError(
                f"`coefficients` of operator {name!r} must be {self.count} numbers or rows, one for each direction, got "
                f"{len(operator.coefficients)}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Labels of the columns, in their order."""
        return self.plan.labels

    @property
    def order(self) -> int:
        """Highest order of a derivative: 0 to 4."""
        return max(self.plan.orders)

    def labels(self, *names: str) -> tuple[str, ...]:
        """Columns that ``"value"``, ``"first"``, an operator or a column stands for, of several names together.

        Raises
        ------
        ValueError
            If there is no such name.
        """
        found: set[str] = set()
        for name in names:
            group = {name} & set(self.columns) or {c for c in self.plan.public if c.startswith(f"{name}[")}
            if not group:
                allowed = ", ".join(("value", "first", *(n for n, _ in self.operators)))
                raise ValueError(f"`used` must name {allowed} or one of their columns {self.columns}, got {name!r}")
            found |= group
        return tuple(c for c in self.columns if c in found)

    @classmethod
    def factored(cls, matrix: Sequence[Any], name: str = "operator", tolerance: float = 1e-12) -> Derivatives:
        """``sum_ij c_ij d_i d_j`` with as many directions as the matrix has rank: ``C = sum_k sign_k v_k v_k^T``, ``sign_k = +-1``.

        First derivatives are along the ``v_k``, and no others are carried.

        Parameters
        ----------
        matrix
            ``C [d][d]``, definite or not; its symmetric part is taken.
        name
            Of the operator.
        tolerance
            Eigenvalues up to this share of the largest count as zero.
        """
        c = numpy.asarray(matrix, dtype=numpy.float64)
        if c.ndim != 2 or c.shape[0] != c.shape[1] or not numpy.all(numpy.isfinite(c)) or not numpy.any(c + c.T):
            raise ValueError(f"`matrix` must be square, finite and, symmetrised, not zero, got {matrix!r}")
        values, vectors = numpy.linalg.eigh(0.5 * (c + c.T))
        kept = numpy.abs(values) > tolerance * numpy.abs(values).max()
        directions = tuple(map(tuple, (vectors * numpy.sqrt(numpy.abs(values))).T[kept].tolist()))
        return cls(len(c), directions, {name: Weighted(numpy.sign(values[kept]).tolist())})


def _directions(given: Any, inputs: int) -> tuple[int, ...] | tuple[Row, ...] | PointwiseDirections:
    """Directions as they are kept: coordinates, vectors, or their number."""
    if given is None:
        return tuple(range(inputs))
    if isinstance(given, PointwiseDirections):
        if not isinstance(given.count, int) or given.count < 1:
            raise ValueError(f"`count` of PointwiseDirections must be a positive int, got {given.count!r}")
        return given
    entries = tuple(given)
    if all(isinstance(k, int) and not isinstance(k, bool) for k in entries):
        if any(not 0 <= k < inputs for k in entries) or len(set(entries)) != len(entries):
            raise ValueError(f"`directions` of Derivatives must be different coordinates from 0 to {inputs - 1}, got {given!r}")
        return entries
    try:
        array = numpy.asarray(entries, dtype=numpy.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`directions` of Derivatives must be coordinates or vectors of {inputs} numbers, got {given!r}") from error
    if array.ndim != 2 or array.shape[1] != inputs or not numpy.all(numpy.isfinite(array)):
        raise ValueError(f"`directions` of Derivatives must be coordinates or finite vectors of {inputs} numbers, got {given!r}")
    return tuple(map(tuple, array.tolist()))
