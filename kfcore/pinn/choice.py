"""Methods by name, and which of them fits a problem's sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from kfcore.damping import Damping, LevenbergMarquardt
from kfcore.pinn.kronecker import Kronecker
from kfcore.pinn.rules import LineSearch, Quadratic, Rule
from kfcore.pinn.samples import ConjugateGradients, Direction, SampleSpace
from kfcore.pinn.terms import LinearOperator, Term
from kfcore.taylor import Sequential

METHODS = ("kfac", "kfac*", "engd-w", "spring", "hessian-free")
"""The methods that have names."""


class Choice(NamedTuple):
    """A method and why."""

    method: str
    reason: str


def preset(method: str | Direction) -> tuple[Direction, Rule]:
    """Direction and rule of a method by its name, or those that go with a direction."""
    if isinstance(method, Kronecker | ConjugateGradients):
        return method, Quadratic()
    if isinstance(method, SampleSpace):
        return method, LineSearch()
    if method == "kfac":
        return Kronecker(), LineSearch(momentum=0.9)
    if method == "kfac*":
        return Kronecker(Damping(_adaptive(), "factored")), Quadratic()
    if method == "engd-w":
        return SampleSpace(), LineSearch()
    if method == "spring":
        return SampleSpace(momentum=0.9), LineSearch()
    if method == "hessian-free":
        return ConjugateGradients(_adaptive(), preconditioner=Kronecker(Damping(_adaptive(), "factored"))), Quadratic()
    raise ValueError(f"`method` must be auto, {', '.join(METHODS)}, or a direction such as kfcore.pinn.Kronecker(), got {method!r}")


def _adaptive() -> LevenbergMarquardt:
    """From a damping that is safe at the beginning down to rounding errors."""
    return LevenbergMarquardt(1.0, every=1, factor=0.7, floor=1e-15)


def choose(
    network: Sequential,
    terms: Mapping[str, Term],
    sizes: Mapping[str, int],
    *,
    unknowns: Mapping[str, tuple[int, ...]] | None = None,
    equations: Mapping[str, int] | None = None,
    memory: float = 2e9,
    seconds: float = 10.0,
    speed: float = 3e10,
) -> Choice:
    """A method for so many points, with its reason.

    Exact Gauss-Newton steps need fewer than anything else, and are taken as long as a step is affordable: with R residuals and
    D parameters it takes ``min(R, D)^2`` numbers of memory, and ``R D min(R, D)`` multiplications. Beyond that Kronecker factors, whose
    cost grows with R and D apart.

    Parameters
    ----------
    sizes
        Points of each term.
    unknowns
        Shapes of the unknowns.
    equations
        Of each term, where they are not one for every output of the network.
    memory
        Bytes that the matrix may take with two copies.
    seconds, speed
        What a step may take, at so many multiplications a second.
    """
    if set(sizes) != set(terms):
        raise ValueError(f"`sizes` must be of the terms {', '.join(terms)}, got {', '.join(map(str, sizes)) or 'nothing'}")
    d = sum(math.prod(layer.shape) for layer in network.layers.values()) + sum(math.prod(s) for s in (unknowns or {}).values())
    r = 0
    for name, term in terms.items():
        m = (equations or {}).get(name, network.outputs if isinstance(term.residual, LinearOperator) else 1)
        r += m * sizes[name]
    side = min(r, d)
    held, work = 3 * 8 * side**2, float(r) * d * side + side**3 / 3
    about = f"{r:,} residuals and {d:,} parameters"
    if held > memory:
        return Choice("kfac*", f"{about}: the exact matrix would take {held / 1e9:.1f} GB, more than the {memory / 1e9:.1f} GB allowed")
    if work > seconds * speed:
        return Choice("kfac*", f"{about}: an exact step would take about {work / speed:.0f} s, more than the {seconds:.0f} s allowed")
    return Choice("spring", f"{about}: an exact step takes {held / 1e9:.2f} GB and about {work / speed:.2g} s")
