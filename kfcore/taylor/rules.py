"""How an activation acts on the columns of a point, and the transpose of its derivative.

With ``a, b, c, e, f`` the derivatives of order 0 to 4 along a direction before the activation, and ``s_k`` those of ``s`` at ``a``,
behind it they are

    s_0,   s_1 b,   s_2 b^2 + s_1 c,   s_3 b^3 + 3 s_2 b c + s_1 e,   s_4 b^4 + 6 s_3 b^2 c + s_2 (3 c^2 + 4 b e) + s_1 f

(Faa di Bruno). All is linear in the highest order but for terms of lower ones, so that sums over directions can be carried as sums.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kfcore._array import Array, Namespace
from kfcore.taylor.activations import Activation
from kfcore.taylor.plan import Diagonal, Plan, pick, place


class Parts(NamedTuple):
    """Columns by order, ``[..., N, s, h]`` each; ``None`` where none are carried, or where all are zero whatever the data."""

    value: Array | None
    first: Array | None
    second: Array | None
    third: Array | None
    fourth: Array | None


Coefficients = tuple[Array | None, ...]


def push(xp: Namespace, plan: Plan, activation: Activation, y: Parts, coefficients: Coefficients) -> Parts:
    """Columns behind an activation from those before it."""
    order = 1 if activation.piecewise_linear else max(plan.orders)
    s = activation(xp, y.value, order)
    found = [s[0], *(None if part is None else s[1] * part for part in y[1:])]
    if order < 2 or y.first is None:
        return Parts(*found)
    quadratics = [run.quadratic(xp, y.first, c) for run, c, _ in plan.split(coefficients, 2)]  # pyright: ignore[reportArgumentType]
    if quadratics:
        found[2] = _sum([s[2] * _concat(xp, quadratics), found[2]])
    if order >= 3 and plan.runs[1]:
        found[3] = _sum([_combined(xp, plan, coefficients, 3, _third_terms(xp, plan, s, y)), found[3]])
    if order >= 4:
        found[4] = _sum([_combined(xp, plan, coefficients, 4, _fourth_terms(xp, plan, s, y)), found[4]])
    return Parts(*found)


def pull(xp: Namespace, plan: Plan, activation: Activation, y: Parts, coefficients: Coefficients, g: Parts) -> Parts:
    """Gradients with respect to the columns before an activation, from ``g`` with respect to those behind it.

    ``g`` may have leading axes of its own, one entry for each of several gradients.
    """
    if activation.piecewise_linear:
        slope = activation(xp, y.value, 1)[1]
        return Parts(*(None if part is None else slope * part for part in g))
    order = max(i for i, part in enumerate(g) if part is not None)
    s = activation(xp, y.value, order + 1)
    found: list[list[Array]] = [[] if part is None else [s[1] * part] for part in g]
    for part, above in zip(y[1:], g[1:], strict=True):
        if part is not None and above is not None:
            found[0].append(s[2] * _over(xp, part * above))
    if order < 2 or y.first is None:
        return Parts(*map(_sum, found))
    first = y.first
    if g.second is not None:
        runs = plan.split(coefficients, 2)
        pulled = _sum([run.pull(xp, first, c, g.second[..., own, :]) for run, c, own in runs])  # pyright: ignore[reportArgumentType]
        found[1].append(s[2] * pulled)
        # a quadratic form is half of its gradient times its argument
        found[0].append(0.5 * s[3] * _over(xp, first * pulled))
    if g.third is not None:
        _pull_third(xp, plan, s, y, _spread(plan, coefficients, 3, g.third), found)
    if g.fourth is not None:
        _pull_fourth(xp, plan, s, y, _spread(plan, coefficients, 4, g.fourth), found)
    return Parts(*map(_sum, found))


def _third_terms(xp: Namespace, plan: Plan, s: Sequence[Array], y: Parts) -> Array:
    """``s_3 b^3 + 3 s_2 b c`` of each direction in a sum of order 3, ``[..., N, n, h]``."""
    b, c = pick(xp, y.first, plan.curved[0]), _picked(xp, y.second, plan.second[0])
    return b * (s[3] * (b * b) if c is None else s[3] * (b * b) + 3.0 * s[2] * c)


def _fourth_terms(xp: Namespace, plan: Plan, s: Sequence[Array], y: Parts) -> Array:
    """``s_4 b^4 + 6 s_3 b^2 c + s_2 (3 c^2 + 4 b e)`` of each direction in a sum of order 4, ``[..., N, n, h]``."""
    b, c, e = _lower(xp, plan, y)
    square = b * b
    found = s[4] * (square * square)
    if c is not None:
        found = found + 6.0 * s[3] * (square * c) + 3.0 * s[2] * (c * c)
    return found if e is None else found + 4.0 * s[2] * (b * e)


def _pull_third(xp: Namespace, plan: Plan, s: Sequence[Array], y: Parts, r: Array, found: list[list[Array]]) -> None:
    """What the terms of order 3 add to the gradients, ``r`` being the gradient with respect to those of each direction."""
    b, c = pick(xp, y.first, plan.curved[0]), _picked(xp, y.second, plan.second[0])
    square = b * b
    to_value, to_first = s[4] * (square * b), 3.0 * s[3] * square
    if c is not None:
        to_value, to_first = to_value + 3.0 * s[3] * (b * c), to_first + 3.0 * s[2] * c
    found[0].append(_over(xp, r * to_value))
    found[1].append(place(xp, r * to_first, plan.curved[0], plan.sizes[1]))
    found[2].append(place(xp, 3.0 * s[2] * (b * r), plan.second[0], plan.sizes[2]))


def _pull_fourth(xp: Namespace, plan: Plan, s: Sequence[Array], y: Parts, r: Array, found: list[list[Array]]) -> None:
    """The same of order 4."""
    b, c, e = _lower(xp, plan, y)
    square = b * b
    to_value, to_first, to_second = s[5] * (square * square), 4.0 * s[4] * (square * b), 6.0 * s[3] * square
    if c is not None:
        to_value = to_value + 6.0 * s[4] * (square * c) + 3.0 * s[3] * (c * c)
        to_first = to_first + 12.0 * s[3] * (b * c)
        to_second = to_second + 6.0 * s[2] * c
    if e is not None:
        to_value = to_value + 4.0 * s[3] * (b * e)
        to_first = to_first + 4.0 * s[2] * e
    found[0].append(_over(xp, r * to_value))
    found[1].append(place(xp, r * to_first, plan.curved[1], plan.sizes[1]))
    found[2].append(place(xp, r * to_second, plan.second[1], plan.sizes[2]))
    found[3].append(place(xp, 4.0 * s[2] * (b * r), plan.third, plan.sizes[3]))


def _lower(xp: Namespace, plan: Plan, y: Parts) -> tuple[Array, Array | None, Array | None]:
    """First, second and third derivatives along the directions in the sums of order 4."""
    return pick(xp, y.first, plan.curved[1]), _picked(xp, y.second, plan.second[1]), _picked(xp, y.third, plan.third)


def _picked(xp: Namespace, part: Array | None, places: tuple[int, ...]) -> Array | None:
    return None if part is None else pick(xp, part, places)


def _combined(xp: Namespace, plan: Plan, coefficients: Coefficients, order: int, terms: Array) -> Array:
    """Sums over directions, ``[..., N, n, h]`` -> ``[..., N, m, h]``, all columns of an order."""
    return _concat(xp, [run.combine(xp, terms, c) for run, c, _ in plan.split(coefficients, order) if isinstance(run, Diagonal)])


def _spread(plan: Plan, coefficients: Coefficients, order: int, g: Array) -> Array:
    """Transpose of :func:`_combined`, ``[..., N, n, h]`` or something that broadcasts to it."""
    found = _sum([run.spread(c, g[..., own, :]) for run, c, own in plan.split(coefficients, order) if isinstance(run, Diagonal)])
    assert found is not None
    return found


def _over(xp: Namespace, x: Array) -> Array:
    """Sum over the columns, which stay as one."""
    return xp.sum(x, axis=-2, keepdims=True)


def _concat(xp: Namespace, parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-2)


def _sum(terms: Iterable[Array | None]) -> Array | None:
    """Of all that are there."""
    there = [term for term in terms if term is not None]
    return functools.reduce(operator.add, there) if there else None
