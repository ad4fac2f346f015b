"""What the curvature of every layer looks like, as plain numbers for a log. Nothing here is on a step's path."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy

from kfcore._array import Array, to_numpy
from kfcore.operators import BlockOperator
from kfcore.optimizer import ModelOptimizer, OptimizerState


def measures(
    optimizer: ModelOptimizer,
    state: OptimizerState,
    *,
    grads: Mapping[str, Array] | None = None,
    directions: Mapping[str, Array] | None = None,
    before: OptimizerState | None = None,
) -> dict[str, float]:
    """Numbers that say how a method fares, by ``"BLOCK/NAME"``: ready for TensorBoard and its like.

    Of every block: ``eigenvalue_max`` and ``eigenvalue_mean`` of the undamped matrix F it stands for; ``effective_rank``,
    ``tr(F)^2 / |F|^2``, between 1 and the number of weights; ``condition``, the ratio of the extreme eigenvalues of what a step solves
    with; and ``damping_over_mean``, by how much the mean eigenvalue of that is above F's, which is the damping in units of the mean
    curvature: far above 1 the step is plain gradient descent, far below it trusts directions that were hardly seen. Stacked blocks have
    an index, ``"BLOCK[0]/NAME"``.

    Parameters
    ----------
    optimizer
        Of the state: ``optimizer.bind(params)`` of a :class:`kfcore.Optimizer`, ``core`` of an adapter's engine.
    grads, directions
        By parameter, as :meth:`kfcore.ModelOptimizer.directions` gives them: adds ``cosine``, of the angle between the two.
    before
        An earlier state: adds ``rotation``, the root of the mean squared sine of the angles by which the eigenvectors of the input and the
        output factor have turned since, each weighed by its eigenvalue; for methods that keep eigenbases.

    Decomposes matrices of every block: for logging now and then, not every step.
    """
    found: dict[str, float] = {}
    shown = [None if x is None else optimizer.model.matrices(x) for x in (grads, directions)]
    for name, block in optimizer.preconditioner.blocks.items():
        own = state.curvature.blocks[name]
        pure = block.method.operator(block.layer, own)
        damped = block.method.operator(block.layer, own, damped=True)
        older = None if before is None else before.curvature.blocks[name]
        turned = _rotation(own, older)
        pair = None if shown[0] is None or shown[1] is None or name not in shown[0] else [to_numpy(x[name]) for x in shown if x is not None]
        for at, label in _stacked(name, pure):
            values, full = to_numpy(pure.values)[at], to_numpy(damped.values)[at]
            found |= {f"{label}/{key}": value for key, value in spectrum(values, full).items()}
            if pair is not None:
                found[f"{label}/cosine"] = _cosine(*(x[at] for x in pair))
            if turned is not None:
                found[f"{label}/rotation"] = float(turned[at])
    return found


def spectrum(values: numpy.ndarray, damped: numpy.ndarray | None = None) -> dict[str, float]:
    """Numbers of :func:`measures` that eigenvalues alone tell, those of ``damped`` too if given."""
    values = numpy.asarray(values, numpy.float64)
    total, square, mean = float(values.sum()), float((values**2).sum()), float(values.mean())
    numbers = {
        "eigenvalue_max": float(values.max()),
        "eigenvalue_mean": mean,
        "effective_rank": total * total / square if square > 0 else 0.0,
    }
    if damped is not None:
        low, high = float(damped.min()), float(damped.max())
        numbers["condition"] = high / low if low > 0 else math.inf
        numbers["damping_over_mean"] = float(numpy.asarray(damped, numpy.float64).mean()) / mean - 1.0 if mean > 0 else math.inf
    return numbers


def _stacked(name: str, operator: BlockOperator) -> Iterator[tuple[tuple[int, ...], str]]:
    """Indices of the blocks in a stack, and what each is called."""
    leading = tuple(operator.values.shape[:-2])
    for at in numpy.ndindex(*leading):
        yield at, name + "".join(f"[{i}]" for i in at)


def _cosine(x: numpy.ndarray, y: numpy.ndarray) -> float:
    size = float(numpy.linalg.norm(x) * numpy.linalg.norm(y))
    return float((x * y).sum()) / size if size > 0 else 0.0


def _rotation(new: Any, old: Any) -> numpy.ndarray | None:
    """See :func:`measures`; the larger of both sides."""
    sides = []
    for side in ("input", "output"):
        now, then = (getattr(getattr(state, "solver", None), f"{side}_basis", None) for state in (new, old))
        if now is None or then is None:
            continue
        weights = to_numpy(getattr(new.solver, f"{side}_values")).astype(numpy.float64)
        overlap = numpy.swapaxes(to_numpy(now), -1, -2).astype(numpy.float64) @ to_numpy(then)
        sines = 1.0 - numpy.max(overlap**2, axis=-1)
        total = weights.sum(axis=-1)
        sides.append(numpy.sqrt(numpy.maximum((weights * sines).sum(axis=-1), 0.0) / numpy.where(total > 0, total, 1.0)))
    return numpy.maximum.reduce(sides) if sides else None
