"""A loss linearised at the parameters: residuals, and products with their Jacobian from what each layer saw.

With ``rho`` all residuals of all terms, each times ``sqrt(weight / N)``, the loss is ``1/2 |rho|^2``, its gradient ``J^T rho`` and its
Gauss-Newton matrix ``J^T J``. Of a term, ``J`` is known layer by layer as ``sum_s g_ns [z_ns, o_s]^T`` (:class:`kfcore.taylor.Columns`),
and so are all products with it, without another pass through the network.

Vectors in the space of the parameters are mappings from layers to matrices ``[out, in + 1]``, and from ``"unknowns"`` to ``[1, p]``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from kfcore._array import Array, Namespace, cast, device, is_real_floating, namespace
from kfcore.linalg import gram, total
from kfcore.pinn.terms import Points, Pulled, Term, evaluated, pulled
from kfcore.taylor import Activation, Jet, Propagation, Sequential

Vector: TypeAlias = Mapping[str, Array]
UNKNOWNS = "unknowns"
"""Their key among the parameters and in vectors."""
SLAB = 2**24
"""Largest number of entries of the pieces in which a Jacobian is formed."""


class Side(NamedTuple):
    """One layer in one term."""

    rows: Array
    """``[z, o] [N, S, in + 1]``."""
    grads: Array
    """``[M, N, S, out]``, times ``sqrt(weight / N)``."""


class Piece(NamedTuple):
    """One term."""

    residuals: Array
    """``[M, N]``, times ``sqrt(weight / N)``."""
    layers: Mapping[str, Side]
    unknowns: Array | None
    """``[M, N, p]``, times the same."""


@dataclass(frozen=True)
class Linearised:
    """All terms at some parameters, on some points.

    Parameters
    ----------
    pieces
        By term.
    dtype
        In which products are made.
    """

    pieces: Mapping[str, Piece]
    dtype: Any

    @property
    def xp(self) -> Namespace:
        """Of the arrays."""
        return namespace(next(iter(self.pieces.values())).residuals)

    @property
    def residuals(self) -> Array:
        """``rho [R]``, term by term, in each equation by equation."""
        return self._joined([piece.residuals for piece in self.pieces.values()])

    def losses(self) -> dict[str, Array]:
        """By term, weights included, 0-d."""
        return {name: 0.5 * self.xp.sum(cast(self.xp, p.residuals, self.dtype) ** 2) for name, p in self.pieces.items()}

    def pull(self, w: Array) -> dict[str, Array]:
        """``J^T w`` of ``w [R]``."""
        xp = self.xp
        found: list[dict[str, Array]] = []
        for piece, part in self._parts(w):
            own = {}
            for name, (z, g) in piece.layers.items():
                weighted = xp.sum(cast(xp, part, g.dtype)[..., None, None] * g, axis=0)
                own[name] = cast(xp, _flat(xp, weighted).mT @ _flat(xp, z), self.dtype)
            if piece.unknowns is not None:
                own[UNKNOWNS] = xp.reshape(part, (1, -1)) @ _last(xp, cast(xp, piece.unknowns, self.dtype))
            found.append(own)
        return {name: functools.reduce(operator.add, [own[name] for own in found if name in own]) for name in found[0]}

    def push(self, v: Vector) -> Array:
        """``J v [R]``."""
        xp, parts = self.xp, []
        for piece in self.pieces.values():
            sums = []
            for name, (z, g) in piece.layers.items():
                moved = xp.reshape(_flat(xp, z) @ cast(xp, v[name], z.dtype).mT, g.shape[1:])
                sums.append(cast(xp, xp.sum(moved * g, axis=(-2, -1)), self.dtype))
            if piece.unknowns is not None:
                sums.append(xp.sum(cast(xp, piece.unknowns, self.dtype) * v[UNKNOWNS][0, :], axis=-1))
            parts.append(functools.reduce(operator.add, sums))
        return self._joined(parts)

    def kernel(self) -> Array:
        """``J J^T [R, R]``."""
        xp, pieces = self.xp, list(self.pieces.values())
        blocks = {}
        for i, one in enumerate(pieces):
            for k, other in enumerate(pieces[i:], start=i):
                parts = [_products(xp, *(self._wide(p.layers[name]) for p in (one, other)), same=i == k) for name in one.layers]
                if one.unknowns is not None and other.unknowns is not None:
                    parts.append(_times(*(_last(xp, cast(xp, p, self.dtype)) for p in (one.unknowns, other.unknowns)), same=i == k))
                blocks[i, k] = functools.reduce(operator.add, parts)
                if i != k:
                    blocks[k, i] = blocks[i, k].mT
        n = range(len(pieces))
        return blocks[0, 0] if len(n) == 1 else xp.concat([xp.concat([blocks[i, k] for k in n], axis=1) for i in n], axis=0)

    def jacobian(self) -> Array:
        """``J [R, D]``: layer by layer, each matrix row by row; the unknowns at the end."""
        xp, found = self.xp, []
        for piece in self.pieces.values():
            columns = []
            for side in piece.layers.values():
                z, g = self._wide(side)
                each = g.mT @ z
                columns.append(xp.reshape(each, (math.prod(each.shape[:2]), math.prod(each.shape[2:]))))
            if piece.unknowns is not None:
                columns.append(_last(xp, cast(xp, piece.unknowns, self.dtype)))
            found.append(xp.concat(columns, axis=-1))
        return found[0] if len(found) == 1 else xp.concat(found, axis=0)

    def sides(self, name: str) -> list[Side]:
        """A layer in all terms."""
        return [self._wide(piece.layers[name]) for piece in self.pieces.values()]

    def unknowns_gram(self) -> Array:
        """``J^T J`` of the unknowns, ``[p, p]``."""
        wide = [_last(self.xp, cast(self.xp, p.unknowns, self.dtype)) for p in self.pieces.values() if p.unknowns is not None]
        return functools.reduce(operator.add, [gram(self.xp, x) for x in wide])

    def flat(self, v: Vector) -> Array:
        """A vector as ``[D]``, in the order of :meth:`jacobian`."""
        return self.xp.concat([self.xp.reshape(x, (-1,)) for x in v.values()])

    def unflat(self, x: Array, like: Vector) -> dict[str, Array]:
        """Inverse of :meth:`flat`."""
        found, start = {}, 0
        for name, v in like.items():
            size = math.prod(v.shape)
            found[name] = self.xp.reshape(x[start : start + size], v.shape)
            start += size
        return found

    def _wide(self, side: Side) -> Side:
        return Side(*(cast(self.xp, x, self.dtype) for x in side))

    def _joined(self, parts: Sequence[Array]) -> Array:
        flat = [cast(self.xp, self.xp.reshape(x, (-1,)), self.dtype) for x in parts]
        return flat[0] if len(flat) == 1 else self.xp.concat(flat)

    def _parts(self, w: Array) -> list[tuple[Piece, Array]]:
        """Each term with its part ``[M, N]`` of ``w [R]``."""
        found, start = [], 0
        for piece in self.pieces.values():
            shape = piece.residuals.shape
            size = math.prod(shape)
            found.append((piece, self.xp.reshape(w[start : start + size], shape)))
            start += size
        return found


@dataclass(frozen=True)
class Loss:
    """The terms of a loss on one network.

    Parameters
    ----------
    propagations, terms
        By term.
    columns
        Of :meth:`kfcore.taylor.Propagation.reverse`.
    dtype
        In which products are made.
    """

    propagations: Mapping[str, Propagation]
    terms: Mapping[str, Term]
    columns: Literal["live", "all"]

    def linearised(self, params: Mapping[str, Mapping[str, Array]], batches: Mapping[str, Points], dtype: Any) -> Linearised:
        """One forward and one reverse pass of each term."""
        pieces = {}
        unknowns = params.get(UNKNOWNS, {})
        for name, term in self.terms.items():
            points, p = batches[name], self.propagations[name]
            xp = namespace(points.x)
            jet, trace = p.forward(params, points.x, coefficients=points.coefficients, directions=points.directions)
            found = pulled(xp, name, term, points, jet, unknowns)
            scale = math.sqrt(term.weight / points.x.shape[0])
            c = found.cotangents
            scaled = c._replace(
                value=None if c.value is None else scale * c.value,
                first=None if c.first is None else scale * c.first,
                operators={k: scale * a for k, a in c.operators.items()},
            )
            columns = p.reverse(params, trace, scaled, used=term.residual.used, columns=self.columns)
            layers = {k: Side(columns[k].rows(bool(layer.bias)), columns[k].output_grads) for k, layer in p.network.layers.items()}
            pieces[name] = Piece(scale * found.value, layers, _by_unknowns(xp, found, unknowns, scale))
        return Linearised(pieces, dtype)

    def values(
        self, several: Sequence[Mapping[str, Mapping[str, Array]]], batches: Mapping[str, Points], dtype: Any
    ) -> list[dict[str, Array]]:
        """The loss by term, weights included, 0-d, at each of ``several`` parameters: in one pass, as stacked networks."""
        found: list[dict[str, Array]] = [{} for _ in several]
        for name, term in self.terms.items():
            points, scale = batches[name], 0.5 * term.weight / batches[name].x.shape[0]
            for i, jet in enumerate(self._jets(self.propagations[name], several, points)):
                xp = namespace(points.x)
                r = evaluated(xp, name, term, points, jet, several[i].get(UNKNOWNS, {}))
                found[i][name] = scale * xp.sum(cast(xp, r, dtype) ** 2)
        return found

    def _jets(self, p: Propagation, several: Sequence[Mapping[str, Mapping[str, Array]]], points: Points) -> list[Jet]:
        if len(several) == 1:
            return [p.jet(several[0], points.x, coefficients=points.coefficients, directions=points.directions)]
        xp, k = namespace(points.x), len(several)

        def repeated(x: Array) -> Array:
            return xp.broadcast_to(x, (k, *x.shape))

        stacked = {n: {role: xp.stack([one[n][role] for one in several]) for role in several[0][n]} for n in p.network.layers}
        jet = _stacked(p, k).jet(
            stacked,
            repeated(points.x),
            coefficients=None if points.coefficients is None else {n: repeated(c) for n, c in points.coefficients.items()},
            directions=None if points.directions is None else repeated(points.directions),
        )
        value, first = jet.value, jet.first
        assert value is not None
        assert first is not None
        return [Jet(value[i, ...], first[i, ...], {n: x[i, ...] for n, x in jet.operators.items()}) for i in range(k)]


def _stacked(p: Propagation, k: int) -> Propagation:
    """Of ``k`` networks at once."""
    steps = [step if isinstance(step, Activation) else (step[0], replace(step[1], stack=(k,))) for step in p.network.steps]
    return Propagation(Sequential(steps), p.derivatives)


def batch(name: str, given: Any) -> Points:
    """What a user gives for a term as :class:`Points`."""
    points = given if isinstance(given, Points) else Points(given)
    x = points.x
    if x.ndim != 2 or not is_real_floating(namespace(x), x):
        raise ValueError(f"`batches` of term {name!r} must be points [N, d] of floating point numbers, got {x.dtype} {tuple(x.shape)}")
    if x.shape[0] < 1:
        raise ValueError(f"`batches` of term {name!r} must hold at least one point, got shape {tuple(x.shape)}")
    return points


def dot(xp: Namespace, v: Vector, u: Vector) -> Any:
    """``<v, u>``, 0-d or a number of the host."""
    return total(xp, [v[name] * u[name] for name in v])


def _by_unknowns(xp: Namespace, found: Pulled, unknowns: Mapping[str, Array], scale: float) -> Array | None:
    """``[M, N, p]``, zeros for those the term does not depend on."""
    if not unknowns:
        return None
    m, n = found.value.shape
    parts = []
    for name, x in unknowns.items():
        size = math.prod(x.shape)
        d = found.unknowns.get(name)
        if d is None:
            parts.append(xp.zeros((m, n, size), dtype=x.dtype, device=device(x)))
        else:
            parts.append(xp.reshape(scale * cast(xp, d, x.dtype), (m, n, size)))
    return xp.concat(parts, axis=-1)


def _products(xp: Namespace, one: Side, other: Side, same: bool) -> Array:
    """``J_1 J_2^T [R_1, R_2]`` of one layer, formed or not: whatever costs less."""
    (z, g), (w, h) = one, other
    (m, n, s, out), (k, i, t, _), width = g.shape, h.shape, z.shape[-1]
    # products of columns, which are elementwise at the end, against products of whole gradients
    apart = s * t * (width + m * k * out + 8 * m * k)
    formed = m * k * out * width // (2 if same else 1)
    if apart < formed and n * s * i * t * m * k <= SLAB:
        inputs = xp.reshape(_flat(xp, z) @ _flat(xp, w).mT, (1, n, s, 1, i, t))
        grads = xp.reshape(_last(xp, g) @ _last(xp, h).mT, (m, n, s, k, i, t))
        found = inputs * grads
        if s * t > 1:
            found = xp.sum(found, axis=(2, 5))
        return xp.reshape(found, (m * n, k * i))
    step = max(1, SLAB // (max(m * n, k * i) * width))
    total: Any = None
    for start in range(0, out, step):
        sides = []
        for x, y in (one, other)[: 1 if same else 2]:
            each = y[..., start : min(start + step, out)].mT @ x
            sides.append(xp.reshape(each, (math.prod(each.shape[:2]), math.prod(each.shape[2:]))))
        part = _times(sides[0], sides[-1], same)
        total = part if total is None else total + part
    return total


def _times(x: Array, y: Array, same: bool) -> Array:
    """``x y^T``; where both are the same a library may make use of the symmetry."""
    return gram(namespace(x), x.mT) if same else x @ y.mT


def _flat(xp: Namespace, x: Array) -> Array:
    """``[..., N, S, d]`` as rows ``[..., N S, d]``."""
    return xp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))


def _last(xp: Namespace, x: Array) -> Array:
    """All axes but the last as one."""
    return xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
