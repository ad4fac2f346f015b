"""What methods share whose blocks are diagonal, or a Kronecker product, in a basis made of two small factors."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kfcore import factors, ladder
from kfcore._array import Array, Namespace, device, namespace, readable, scalar
from kfcore.curvature.sides import Sided
from kfcore.eigenbasis import Basis, Decomposed, Eigh, Tracked
from kfcore.factors import MATRICES
from kfcore.layers import Layer
from kfcore.linalg import carried, thin_product
from kfcore.statistics import GradientRows, spans


class Eigenbases(NamedTuple):
    """Eigendecomposed factors and the damping they are applied with; ``None`` stands for the identity.

    A factor of diagonal form has its own entries for values, in their order, and the identity for a basis.
    """

    input_basis: Array | None
    input_values: Array
    output_basis: Array | None
    output_values: Array | None
    damping: Array
    ways: Array
    """How often the bases of both factors were left as they were, improved, and decomposed anew, ``[..., 3]``, int32."""

    @property
    def products(self) -> Array:
        """Eigenvalues of the product of both factors, ``[..., out, in]``; ``[..., 1, in]`` where the output factor is the identity."""
        right = self.input_values[..., None, :]
        return right if self.output_values is None else self.output_values[..., :, None] * right


@dataclass(frozen=True, kw_only=True)
class Kronecker(Sided):
    """Base of the methods with one factor for each side of a layer.

    Parameters
    ----------
    basis
        How eigenbases are found: :class:`kfcore.Eigh` or :class:`kfcore.Tracked`.
    """

    basis: Basis | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis is not None and not isinstance(self.basis, Eigh | Tracked):
            raise TypeError(f"`basis` must be kfcore.Eigh() or kfcore.Tracked(), got {self.basis!r}")

    def refresh(self, layer: Layer, state: Any, damping: float | Array | None = None) -> Any:
        """:meth:`refresh_all` of one block."""
        return self.refresh_all([layer], [state], [damping])[0]

    @abc.abstractmethod
    def refresh_all(self, layers: Sequence[Layer], states: Sequence[Any], dampings: Sequence[float | Array | None]) -> list[Any]:
        """Recompute what :meth:`precondition` applies, for several blocks, whose factors the library may take together."""

    def _shapes(self, layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Shapes of the input and the output factor; that of a forward-only Fisher matrix is no array."""
        (output, inp), (rows, columns) = layer.forms, layer.shape
        return factors.shape(inp, columns), None if self.fisher == "forward" else factors.shape(output, rows)

    def _unturned(self, layer: Layer, like: Array, leading: tuple[int, ...]) -> Eigenbases:
        """Bases and values that are the identity, without damping."""
        xp, shapes = namespace(like), self._shapes(layer)
        bases = [
            None if shape is None or form == "diagonal" else factors.identity(xp, form, like, shape[0], leading)
            for form, shape in zip(layer.forms[::-1], shapes, strict=True)
        ]
        ones = [None if shape is None else xp.ones((*leading, shape[0]), dtype=like.dtype, device=device(like)) for shape in shapes]
        zero = xp.zeros(leading, dtype=like.dtype, device=device(like))
        ways = xp.zeros((*leading, 3), dtype=xp.int32, device=device(like))
        return Eigenbases(bases[0], ones[0], bases[1], ones[1], zero, ways)  # pyright: ignore[reportArgumentType]


def no_rungs(xp: Namespace, like: Array, leading: tuple[int, ...]) -> Array:
    """Counters of rungs at zero, beside ``like``."""
    return xp.zeros((*leading, ladder.RUNGS), dtype=xp.int32, device=device(like))


def two_sided(xp: Namespace, layer: Layer, left: Array | None, grad: Array, right: Array | None, rows: GradientRows | None) -> Array:
    """``left grad right``, by the rows of the gradient where that is cheaper by a quarter at least."""
    if rows is not None and left is not None and right is not None and layer.forms == MATRICES:
        (out, inp), n = layer.shape, rows.inputs.shape[-2]
        cheaper = n * (out * out + inp * inp + out * inp) < 0.75 * out * inp * (out + inp)
        if cheaper and (rows.known or (readable(xp, grad) and spans(xp, rows, grad) is True)):
            return thin_product(xp, rows.scale * (rows.output_grads @ left.mT), rows.inputs @ right)
    return factors.sandwich(xp, layer.forms, left, grad, right)


def eigenbases(xp: Namespace, old: Any, found: tuple[Decomposed, Decomposed | None], damping: float | Array) -> tuple[Eigenbases, Array]:
    """What is applied, of decomposed factors and the damping of their product, and whether both succeeded."""
    a, g = found
    top = xp.max(a.values, axis=-1)
    if g is None:
        return Eigenbases(a.basis, a.values, None, None, carried_array(xp, damping, top), old.ways + a.way), a.ok
    value = carried_array(xp, damping, top * xp.max(g.values, axis=-1))
    return Eigenbases(a.basis, a.values, g.basis, g.values, value, old.ways + a.way + g.way), a.ok & g.ok


def carried_array(xp: Namespace, damping: float | Array, size: Array) -> Array:
    """:func:`kfcore.linalg.carried` as an array ``[...]``."""
    return scalar(xp, carried(xp, damping, size, size.dtype), size)


def transposed(basis: Array | None) -> Array | None:
    """The inverse of a basis; ``None`` is the identity."""
    return None if basis is None else basis.mT
