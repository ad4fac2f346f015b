"""Directions by the exact Gauss-Newton matrix: solved in the space of the residuals, or by conjugate gradients.

``(J^T J + lambda I)^-1 J^T = J^T (J J^T + lambda I)^-1``: with R residuals and D parameters the smaller of two systems is solved (energy
natural gradients after Woodbury, and SPRING: Guzman-Cordero et al. 2025, arXiv 2505.12149; Goldshlager et al. 2024, arXiv 2401.10190).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from kfcore._array import Array, Namespace, Schedule, device, scalar
from kfcore.curvature.base import count_failure
from kfcore.damping import Damping, LevenbergMarquardt
from kfcore.linalg import gram, shift, symmetrise, trace
from kfcore.pinn.kronecker import Directed, Kronecker, KroneckerState
from kfcore.pinn.linearised import Vector, dot


class SampleState(NamedTuple):
    """What :class:`SampleSpace` carries on."""

    momentum: tuple[Array, ...]
    """``phi`` by layer, if there is momentum."""
    decay: Array
    """``momentum^(2 k)`` after k steps, 0-d."""
    raised: Array
    """How often the damping was raised to what the dtype can carry, int32."""


@dataclass(frozen=True)
class SampleSpace:
    """Exact Gauss-Newton directions, ``phi = J^T (J J^T + lambda I)^-1 (-rho - momentum J phi_last) + momentum phi_last``.

    Without momentum it is energy natural gradient descent, with momentum SPRING, whose direction is ``phi / sqrt(1 - momentum^(2 k))`` at
    step k. The damping is raised to rounding errors of the matrix, and counted, where it is below them.

    Parameters
    ----------
    damping
        ``lambda``; a function of the step number; or a :class:`kfcore.LevenbergMarquardt`.
    momentum
        In [0, 1).
    side
        Solve for residuals (``"samples"``, R x R) or for parameters (``"parameters"``, D x D); whichever is smaller if ``"auto"``.
    """

    damping: float | Schedule | LevenbergMarquardt = 1e-8
    _: KW_ONLY
    momentum: float = 0.0
    side: Literal["auto", "samples", "parameters"] = "auto"
    rule: Damping = field(init=False, repr=False, compare=False)
    """The damping."""
    columns: Literal["live"] = field(init=False, repr=False, default="live")
    """Others contribute nothing."""

    def __post_init__(self) -> None:
        if isinstance(self.damping, Damping):
            raise TypeError(f"`damping` of SampleSpace must be a number, a function or LevenbergMarquardt, got {self.damping!r}")
        object.__setattr__(self, "rule", Damping(self.damping, "exact"))
        if not isinstance(self.momentum, numbers.Real) or not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` of SampleSpace must lie in [0, 1), got {self.momentum!r}")
        if self.side not in ("auto", "samples", "parameters"):
            raise ValueError(f"`side` must be 'auto', 'samples' or 'parameters', got {self.side!r}")

    def init(self, xp: Namespace, shapes: Mapping[str, tuple[int, int]], terms: int, like: Array) -> SampleState:
        """Nothing done."""
        zeros = [xp.zeros(s, dtype=like.dtype, device=device(like)) for s in shapes.values()] if self.momentum else []
        return SampleState(tuple(zeros), xp.ones_like(like), xp.zeros((), dtype=xp.int32, device=device(like)))

    def direct(self, xp: Namespace, state: Any, given: Directed) -> tuple[dict[str, Array], SampleState]:
        """The direction, and the new state."""
        lin, mu = given.lin, float(self.momentum)
        last = dict(zip(given.gradient, state.momentum, strict=True)) if mu else None
        target = -lin.residuals if last is None else -lin.residuals - mu * lin.push(last)
        size = sum(math.prod(x.shape) for x in given.gradient.values())
        if self.side == "parameters" or (self.side == "auto" and size < target.shape[0]):
            j = lin.jacobian()
            found, enough = _solved(xp, gram(xp, j), given.damping, (target[None, :] @ j)[0, :])
            phi = lin.unflat(found, given.gradient)
        else:
            found, enough = _solved(xp, lin.kernel(), given.damping, target)
            phi = lin.pull(found)
        raised = count_failure(xp, state.raised, enough)
        if last is None:
            return phi, state._replace(raised=raised)
        phi = {name: x + mu * last[name] for name, x in phi.items()}
        decay = state.decay * mu**2
        over = xp.sqrt(1.0 - decay)
        return {name: x / over for name, x in phi.items()}, SampleState(tuple(phi.values()), decay, raised)


@dataclass(frozen=True)
class ConjugateGradients:
    """Directions ``-(J^T J + lambda I)^-1 gradient`` by conjugate gradients on the exact matrix, from what layers saw and no other pass.

    Preconditioned by the Kronecker inverse; one iteration gives its direction again, a handful go most of the way to the exact one.

    Parameters
    ----------
    damping
        ``lambda`` of the exact matrix: a number, a function of the step number or a :class:`kfcore.LevenbergMarquardt`.
    iterations
        Of conjugate gradients in each step.
    preconditioner
        Its damping is its own where that is a number; else it is ``lambda``.
    """

    damping: float | Schedule | LevenbergMarquardt = 1e-8
    _: KW_ONLY
    iterations: int = 10
    preconditioner: Kronecker = field(default_factory=lambda: Kronecker(Damping(1e-8, "factored")))
    rule: Damping = field(init=False, repr=False, compare=False)
    """The damping."""

    def __post_init__(self) -> None:
        if isinstance(self.damping, Damping):
            raise TypeError(f"`damping` of ConjugateGradients must be a number, a function or LevenbergMarquardt, got {self.damping!r}")
        object.__setattr__(self, "rule", Damping(self.damping, "exact"))
        if not isinstance(self.iterations, int) or isinstance(self.iterations, bool) or self.iterations < 1:
            raise ValueError(f"`iterations` must be a positive int, got {self.iterations!r}")
        if not isinstance(self.preconditioner, Kronecker):
            raise TypeError(f"`preconditioner` must be a Kronecker, got {self.preconditioner!r}")

    @property
    def columns(self) -> Literal["live", "all"]:
        """Of the preconditioner."""
        return self.preconditioner.columns

    def init(self, xp: Namespace, shapes: Mapping[str, tuple[int, int]], terms: int, like: Array) -> KroneckerState:
        """Of the preconditioner."""
        return self.preconditioner.init(xp, shapes, terms, like)

    def direct(self, xp: Namespace, state: Any, given: Directed) -> tuple[dict[str, Array], KroneckerState]:
        """The direction, and the new state."""
        inner, own = self.preconditioner, given.damping
        if isinstance(inner.damping, numbers.Real) or isinstance(inner.rule.value, numbers.Real):
            own = scalar(xp, float(inner.rule.value), given.damping)  # pyright: ignore[reportArgumentType]
        state = inner.observe(xp, state, given.lin, given.steps)
        state = inner.refresh(xp, state, given.groups, own, given.steps)

        def product(v: Vector) -> tuple[dict[str, Array], Any]:
            moved = given.lin.push(v)
            back = given.lin.pull(moved)
            curved = xp.sum(moved * moved) + given.damping * _array(xp, dot(xp, v, v), own)
            return {name: x + given.damping * v[name] for name, x in back.items()}, curved

        r = {name: -x for name, x in given.gradient.items()}
        y = {name: xp.zeros_like(x) for name, x in r.items()}
        z = inner.apply(xp, state, own, r)
        p, rz = z, _array(xp, dot(xp, r, z), own)
        for _ in range(self.iterations):
            moved, curved = product(p)
            step = _ratio(xp, rz, curved)
            y = {name: x + step * p[name] for name, x in y.items()}
            r = {name: x - step * moved[name] for name, x in r.items()}
            z = inner.apply(xp, state, own, r)
            new = _array(xp, dot(xp, r, z), own)
            beta = _ratio(xp, new, rz)
            p, rz = {name: x + beta * p[name] for name, x in z.items()}, new
        return y, state


Direction = Kronecker | SampleSpace | ConjugateGradients


def with_damping(direction: Direction, damping: Any) -> Direction:
    """The same with another damping."""
    return replace(direction, damping=damping)


def _solved(xp: Namespace, matrix: Array, damping: Array, right: Array) -> tuple[Array, Array]:
    """``(matrix + damping I)^-1 right``, and whether the damping was above the rounding errors of the matrix."""
    least = float(xp.finfo(matrix.dtype).eps) * trace(xp, matrix) + float(xp.finfo(matrix.dtype).smallest_normal)
    whole = shift(xp, symmetrise(matrix), xp.maximum(damping, least))
    return xp.linalg.solve(whole, right[:, None])[:, 0], damping >= least


def _ratio(xp: Namespace, x: Array, y: Array) -> Array:
    return xp.where(y > 0, x / xp.where(y > 0, y, xp.ones_like(y)), xp.zeros_like(x))


def _array(xp: Namespace, value: Any, like: Array) -> Array:
    return scalar(xp, value, like)
