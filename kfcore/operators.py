"""The matrix that a curvature block stands for, as an operator: products, solutions, traces and samples without the matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from kfcore._array import Array, Namespace, device, namespace, scalar
from kfcore.damping import check_positive
from kfcore.factors import MATRICES, sandwich
from kfcore.linalg import deflate, energy, identity, kron, length


@dataclass(frozen=True)
class Reflection:
    """An orthonormal basis ``H = I - 2 w w^T`` of which only ``w`` is kept; it is its own inverse."""

    vector: Array
    """``w [..., n]``, of length 1."""

    @classmethod
    def onto(cls, x: Array) -> Reflection:
        """The basis whose first vector is ``x [..., n]`` up to length and sign; any, where ``x`` is zero."""
        xp = namespace(x)
        size = length(xp, x)
        unit = x / xp.where(size > 0, size, xp.ones_like(size))[..., None]
        first = xp.astype(xp.arange(x.shape[-1], dtype=xp.int32, device=device(x)) == 0, x.dtype)
        one = xp.ones_like(unit[..., :1])
        w = unit + xp.where(unit[..., :1] >= 0, one, -one) * first  # of the two signs the one that cancels nothing
        return cls(w / length(xp, w)[..., None])

    @property
    def mT(self) -> Reflection:  # noqa: N802
        """The inverse, itself."""
        return self

    def after(self, x: Array) -> Array:
        """``x H`` for ``x [..., m, n]``."""
        return deflate(namespace(x), x, math.sqrt(2.0) * self.vector)

    def dense(self) -> Array:
        """``H [..., n, n]``."""
        return self.after(identity(namespace(self.vector), self.vector, self.vector.shape[-1], tuple(self.vector.shape[:-1])))


Basis: TypeAlias = Array | Reflection | None
"""Orthonormal vectors, the columns of ``[..., n, n]``; ``None`` is the identity."""


@dataclass(frozen=True)
class BlockOperator:
    """``(U_G (x) U_A) diag(values) (U_G (x) U_A)^T``, a symmetric semi-definite matrix on the weights ``[..., out, in]`` of a block.

    Every method's blocks have this form: KFAC's values are the products ``l_G l_A^T``, EKFAC's the scales, those of a diagonal method its
    entries. Vectors are given in the shape of the block's matrix, whose row-major order is that of :meth:`dense`. Leading axes stack
    independent blocks. For Laplace approximations, influence functions and tests; made by :meth:`kfcore.Method.operator`.
    """

    output_basis: Basis
    """``U_G [..., out, out]``."""
    input_basis: Basis
    """``U_A [..., in, in]``."""
    values: Array
    """Eigenvalues ``[..., out, in]``, not negative."""

    def damped(self, damping: float | Array) -> BlockOperator:
        """The operator plus ``damping`` times the identity; a positive number, or one a stacked block, ``[...]``."""
        if isinstance(damping, int | float):
            check_positive("damping", damping, zero=True)
        return replace(self, values=self.values + scalar(namespace(self.values), damping, self.values)[..., None, None])

    def matvec(self, x: Array) -> Array:
        """The operator applied to ``x [..., out, in]``."""
        return self.function(lambda values: values, x)

    def solve(self, x: Array) -> Array:
        """The inverse applied to ``x [..., out, in]``. Where an eigenvalue is zero it is infinite: damp it first."""
        return self.function(lambda values: 1.0 / values, x)

    def function(self, f: Callable[[Array], Array], x: Array) -> Array:
        """``f`` of the operator, which is ``f`` of each eigenvalue, applied to ``x [..., out, in]``."""
        xp = self._checked(x)
        left, right = self.output_basis, self.input_basis
        turned = _between(xp, None if left is None else left.mT, x, right)
        return _between(xp, left, f(self.values) * turned, None if right is None else right.mT)

    def at(self, index: tuple[int, ...]) -> BlockOperator:
        """One of the stacked blocks."""
        return BlockOperator(_picked(self.output_basis, index), _picked(self.input_basis, index), self.values[(*index, ...)])

    def sample(self, noise: Array, *, inverse: bool = True) -> Array:
        """Draws of a normal distribution with mean zero, from standard normal ``noise [..., out, in]``.

        Its covariance is the inverse of the operator, which is a Laplace approximation's, or the operator itself.
        """
        power = -0.5 if inverse else 0.5
        return self.function(lambda values: values**power, noise)

    def eigenvalues(self) -> Array:
        """In ascending order, ``[..., out in]``."""
        xp = namespace(self.values)
        return xp.sort(xp.reshape(self.values, (*self.values.shape[:-2], self.size)), axis=-1)

    def trace(self) -> Array:
        """Sum of the eigenvalues, ``[...]``."""
        return namespace(self.values).sum(self.values, axis=(-2, -1))

    def logdet(self) -> Array:
        """Logarithm of the determinant, ``[...]``; minus infinity where an eigenvalue is zero."""
        xp = namespace(self.values)
        return xp.sum(xp.log(self.values), axis=(-2, -1))

    def frobenius(self) -> Array:
        """Root of the sum of the squares of all entries, ``[...]``."""
        xp = namespace(self.values)
        return xp.sqrt(energy(xp, self.values))

    def dense(self) -> Array:
        """The matrix ``[..., out in, out in]``, in row-major order of the weights. For small blocks."""
        xp, (out, inp) = namespace(self.values), self.values.shape[-2:]
        sides = ((self.output_basis, out), (self.input_basis, inp))
        left, right = (identity(xp, self.values, n) if basis is None else _dense(basis) for basis, n in sides)
        basis = kron(xp, left, right)
        return (basis * xp.reshape(self.values, (*self.values.shape[:-2], 1, self.size))) @ basis.mT

    @property
    def size(self) -> int:
        """Number of weights in a block."""
        return math.prod(self.values.shape[-2:])

    def distance(self, gradients: Array, count: float) -> float:
        """How far the operator is from ``F = 1 / count sum_p vec(G_p) vec(G_p)^T``, in the Frobenius norm and relative to that of F.

        Parameters
        ----------
        gradients
            ``G [P, out, in]``: with one each example and Fisher vector, F is the exact block of the generalised Gauss-Newton matrix.
        count
            Number of terms in the mean that F is.

        Up to a few thousand weights by the matrices themselves; beyond, by inner products, which see distances down to about the
        root of the rounding unit.
        """
        xp = self._checked(gradients)
        flat = xp.reshape(gradients, (gradients.shape[0], self.size)) / math.sqrt(count)
        if self.size <= DENSE:
            exact = flat.mT @ flat
            return _ratio(xp, xp.sum((exact - self.dense()) ** 2), xp.sum(exact**2))
        squared = xp.sum((flat @ flat.mT) ** 2)
        mixed = xp.sum(flat * xp.reshape(self.matvec(gradients), flat.shape)) / math.sqrt(count)
        return _ratio(xp, squared - 2.0 * mixed + energy(xp, self.values), squared)

    def _checked(self, x: Array) -> Namespace:
        if x.ndim < 2 or tuple(x.shape[-2:]) != tuple(self.values.shape[-2:]):
            raise ValueError(f"`x` must have shape [..., {self.values.shape[-2]}, {self.values.shape[-1]}], got {tuple(x.shape)}")
        return namespace(x, self.values)


DENSE = 4096
"""Weights in a block up to which :meth:`BlockOperator.distance` makes matrices."""


def _between(xp: Namespace, left: Basis, x: Array, right: Basis) -> Array:
    """``left x right``."""
    if isinstance(left, Reflection):
        x, left = left.after(x.mT).mT, None
    if isinstance(right, Reflection):
        x, right = right.after(x), None
    return sandwich(xp, MATRICES, left, x, right)


def _dense(basis: Array | Reflection) -> Array:
    return basis.dense() if isinstance(basis, Reflection) else basis


def _picked(basis: Basis, index: tuple[int, ...]) -> Basis:
    if isinstance(basis, Reflection):
        return Reflection(basis.vector[(*index, ...)])
    return None if basis is None else basis[(*index, ...)]


def _ratio(xp: Any, squared: Array, of: Array) -> float:
    squared, of = float(squared), float(of)
    return math.sqrt(max(squared, 0.0) / of) if of > 0 else math.sqrt(max(squared, 0.0))
