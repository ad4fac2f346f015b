"""Losses as the Fisher matrix sees them: how many terms, how labels are drawn from the model, the root of the output Hessian.

A loss is a mean (or a sum) over *terms*. With ``f`` the outputs of the network and ``l`` a term, a Fisher vector ``v`` is an array of
the shape of ``f`` such that the vectors of one term satisfy ``sum_v v v^T = Hessian_f l`` (exact) or do so in expectation (Monte
Carlo). Pulled back to the output of a layer it becomes the ``g`` of the factor ``G``; nothing is divided by the number of examples.
See Kunstner et al. 2019 and the tutorial arXiv 2507.05127, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from kfcore._array import Array, Namespace, cast, device, factor_dtype, namespace

Draw = Callable[[Literal["uniform", "normal"], tuple[int, ...]], Array]
"""``draw(kind, shape)``: uniform numbers in [0, 1) or standard normal ones, in the library and on the device of the outputs."""


class Loss(Protocol):
    """What a Fisher type other than the empirical one must know of a loss."""

    def terms(self, outputs: Array, targets: Array | None = None) -> float | Array:
        """Number of terms in the loss of this batch."""
        ...

    def sample(self, outputs: Array, targets: Array | None, draw: Draw) -> Array:
        """Gradient by the outputs of the sum of all terms, at labels drawn from the model."""
        ...

    def sqrt_hessian(self, outputs: Array, targets: Array | None = None) -> Iterable[Array]:
        """Columns of the square root of the Hessian of the terms by the outputs, one at a time, each of the outputs' shape."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy of logits, as ``torch.nn.functional.cross_entropy``.

    A term is one position with a label. Label smoothing and soft targets do not enter: the Hessian ``diag(p) - p p^T`` does not
    depend on the labels.

    Parameters
    ----------
    axis
        Axis of the classes: -1, or 1 for PyTorch's layout ``[N, C, d1, ...]``.
    label_smoothing
        As in the training loss; accepted so that one description serves both.
    ignore_index
        Positions with this target are no terms.
    """

    axis: int = -1
    label_smoothing: float = 0.0
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.axis, int) or self.axis == 0:
            raise ValueError(f"`axis` must be an int other than 0, the axis of the examples, got {self.axis!r}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"`label_smoothing` must lie in [0, 1), got {self.label_smoothing!r}")

    def terms(self, outputs: Array, targets: Array | None = None) -> float | Array:
        """Positions whose target is not ignored: a float, or a 0-d array where targets are looked at."""
        xp, logits = self._logits(outputs)
        if self.ignore_index is None:
            return float(math.prod(logits.shape[:2]))
        return xp.sum(xp.astype(self._kept(xp, logits, targets), logits.dtype))

    def sample(self, outputs: Array, targets: Array | None, draw: Draw) -> Array:
        """``p - e_y`` with labels ``y ~ p``, drawn by inverting the distribution function."""
        xp, logits = self._logits(outputs)
        p = _softmax(xp, logits)
        cumulative = xp.cumulative_sum(p, axis=-1)
        u = xp.reshape(cast(xp, draw("uniform", tuple(p.shape[:-1])), p.dtype), (*p.shape[:-1], 1))
        label = xp.sum(xp.astype(cumulative <= u * cumulative[..., -1:], xp.int64 if p.dtype == xp.float64 else xp.int32), axis=-1)
        classes = xp.arange(p.shape[-1], dtype=label.dtype, device=device(p))
        hit = xp.astype(xp.minimum(label[..., None], classes[-1]) == classes, p.dtype)
        return self._restore(xp, self._masked(xp, logits, targets, p - hit), outputs)

    def sqrt_hessian(self, outputs: Array, targets: Array | None = None) -> Iterator[Array]:
        """``sqrt(p_c) (e_c - p)`` for every class of every position."""
        xp, logits = self._logits(outputs)
        p = _softmax(xp, logits)
        eye = xp.eye(p.shape[-1], dtype=p.dtype, device=device(p))
        positions = xp.arange(p.shape[1], device=device(p))
        for t in range(p.shape[1]):
            here = xp.astype(positions == t, p.dtype)[None, :, None]
            for c in range(p.shape[-1]):
                column = here * xp.sqrt(p[..., c : c + 1]) * (eye[c, :] - p)
                yield self._restore(xp, self._masked(xp, logits, targets, column), outputs)

    def _logits(self, outputs: Array) -> tuple[Namespace, Array]:
        """Logits as ``[N, positions, classes]``, at least float32."""
        xp = namespace(outputs)
        if outputs.ndim < 2:
            raise ValueError(f"`outputs` must have shape [N, ..., classes], got {tuple(outputs.shape)}")
        logits = xp.moveaxis(cast(xp, outputs, factor_dtype(xp, outputs.dtype)), self.axis, -1)
        return xp, xp.reshape(logits, (logits.shape[0], math.prod(logits.shape[1:-1]), logits.shape[-1]))

    def _restore(self, xp: Namespace, vector: Array, outputs: Array) -> Array:
        moved = list(outputs.shape)
        classes = moved.pop(self.axis)
        return xp.moveaxis(xp.reshape(vector, (*moved, classes)), -1, self.axis)

    def _kept(self, xp: Namespace, logits: Array, targets: Array | None) -> Array:
        if targets is None:
            raise ValueError("`targets` must be given: `ignore_index` is set, and only they tell which positions count")
        return xp.reshape(targets, tuple(logits.shape[:2])) != self.ignore_index

    def _masked(self, xp: Namespace, logits: Array, targets: Array | None, vector: Array) -> Array:
        if self.ignore_index is None:
            return vector
        return xp.where(self._kept(xp, logits, targets)[..., None], vector, xp.zeros_like(vector))


@dataclass(frozen=True)
class MSE:
    """Squared error ``(f - y)^2``, as ``torch.nn.functional.mse_loss``: every number compared is a term, with Hessian 2."""

    per_entry: ClassVar[bool] = True

    def terms(self, outputs: Array, targets: Array | None = None) -> float:
        """All entries of the outputs."""
        return float(math.prod(outputs.shape))

    def sample(self, outputs: Array, targets: Array | None, draw: Draw) -> Array:
        """``sqrt(2) z``, ``z`` standard normal: the gradient at targets of variance 1/2 about the outputs."""
        xp = namespace(outputs)
        noise = draw("normal", tuple(outputs.shape))
        return math.sqrt(2.0) * cast(xp, noise, factor_dtype(xp, outputs.dtype))

    def sqrt_hessian(self, outputs: Array, targets: Array | None = None) -> Iterator[Array]:
        """``sqrt(2)`` at one output entry of every example at a time."""
        xp = namespace(outputs)
        like = xp.ones(outputs.shape, dtype=factor_dtype(xp, outputs.dtype), device=device(outputs))
        return _one_entry_each(xp, math.sqrt(2.0) * like)


@dataclass(frozen=True)
class BCEWithLogits:
    """Binary cross-entropy of logits, as ``torch.nn.functional.binary_cross_entropy_with_logits``: every logit is a term."""

    per_entry: ClassVar[bool] = True

    def terms(self, outputs: Array, targets: Array | None = None) -> float:
        """All entries of the outputs."""
        return float(math.prod(outputs.shape))

    def sample(self, outputs: Array, targets: Array | None, draw: Draw) -> Array:
        """``p - y`` with ``y`` one with probability ``p``."""
        xp = namespace(outputs)
        p = _sigmoid(xp, cast(xp, outputs, factor_dtype(xp, outputs.dtype)))
        u = cast(xp, draw("uniform", tuple(outputs.shape)), p.dtype)
        return p - xp.astype(u < p, p.dtype)

    def sqrt_hessian(self, outputs: Array, targets: Array | None = None) -> Iterator[Array]:
        """``sqrt(p (1 - p))`` at one output entry of every example at a time."""
        xp = namespace(outputs)
        logits = cast(xp, outputs, factor_dtype(xp, outputs.dtype))
        return _one_entry_each(xp, xp.sqrt(_sigmoid(xp, logits) * _sigmoid(xp, -logits)))


@dataclass(frozen=True)
class CustomLoss:
    """Any other loss, from functions of ``(outputs, targets)``.

    Parameters
    ----------
    count_terms
        Number of terms in the loss of a batch.
    draw_gradient
        ``(outputs, targets, draw)`` -> gradient of the summed terms at labels drawn from the model; for ``fisher="mc"``.
    hessian_columns
        -> columns of the square root of the output Hessian, each of the outputs' shape; for ``fisher="exact"``.
    """

    count_terms: Callable[[Array, Array | None], float | Array]
    draw_gradient: Callable[[Array, Array | None, Draw], Array] | None = None
    hessian_columns: Callable[[Array, Array | None], Iterable[Array]] | None = None

    def terms(self, outputs: Array, targets: Array | None = None) -> float | Array:
        """As given."""
        return self.count_terms(outputs, targets)

    def sample(self, outputs: Array, targets: Array | None, draw: Draw) -> Array:
        """As given."""
        if self.draw_gradient is None:
            raise ValueError("`draw_gradient` of this CustomLoss is not given; fisher='mc' needs it")
        return self.draw_gradient(outputs, targets, draw)

    def sqrt_hessian(self, outputs: Array, targets: Array | None = None) -> Iterable[Array]:
        """As given."""
        if self.hessian_columns is None:
            raise ValueError("`hessian_columns` of this CustomLoss is not given; fisher='exact' needs it")
        return self.hessian_columns(outputs, targets)


def fisher_vectors(
    fisher: Literal["mc", "exact"], loss: Loss, outputs: Array, targets: Array | None = None, *, draw: Draw | None = None, samples: int = 1
) -> Iterator[Array]:
    """The arrays to pull back through the network for a Fisher type, one at a time: ``samples`` draws, or all columns."""
    if fisher == "exact":
        yield from loss.sqrt_hessian(outputs, targets)
        return
    if fisher != "mc":
        raise ValueError(f"`fisher` must be 'mc' or 'exact' to have vectors of its own, got {fisher!r}")
    if draw is None:
        raise ValueError("`draw` must be given: fisher='mc' draws labels from the model")
    for _ in range(samples):
        yield loss.sample(outputs, targets, draw)


def _softmax(xp: Namespace, logits: Array) -> Array:
    shifted = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    return shifted / xp.sum(shifted, axis=-1, keepdims=True)


def _sigmoid(xp: Namespace, x: Array) -> Array:
    small = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, xp.ones_like(x), small) / (1.0 + small)


def _one_entry_each(xp: Namespace, values: Array) -> Iterator[Array]:
    """``values [N, ...]`` with all but one entry of every example set to zero, for each entry in turn."""
    flat = xp.reshape(values, (values.shape[0], math.prod(values.shape[1:])))
    entries = xp.arange(flat.shape[1], device=device(values))
    for j in range(flat.shape[1]):
        yield xp.reshape(flat * xp.astype(entries == j, flat.dtype), values.shape)
