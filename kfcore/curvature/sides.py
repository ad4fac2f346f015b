"""What methods share whose statistics are sums over the rows of each side of a layer: what is captured, checked and reduced."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kfcore._array import Array, Namespace, cast, device, factor_dtype, namespace
from kfcore.curvature.base import Method, Needs, check_captured
from kfcore.layers import Layer
from kfcore.layers.base import check_mask
from kfcore.statistics import KroneckerStatistics, Use, input_moment, output_moment, tiled


@dataclass(frozen=True, kw_only=True)
class Sided(Method):
    """Base of the methods that reduce the two sides of a layer apart. What is summed of each are the first or the second moments."""

    _of_inputs: ClassVar[Callable[..., Any]] = staticmethod(input_moment)
    _of_outputs: ClassVar[Callable[..., Any]] = staticmethod(output_moment)

    def requires(self, layer: Layer) -> Needs:
        """Inputs, and output gradients unless the Fisher type is forward-only; at once only if the layer says so."""
        if self.fisher == "forward":
            return Needs.INPUTS
        return Needs.INPUTS | Needs.OUTPUT_GRADS | (Needs.TOGETHER if layer.together else Needs.NOTHING)

    def reduce(
        self,
        layer: Layer,
        state: Any,
        inputs: Array | None = None,
        output_grads: Array | None = None,
        *,
        mask: Array | None = None,
        grad: Array | None = None,
        terms: float | Array = 1.0,
    ) -> KroneckerStatistics:
        """Sums over the rows of each side; a side that is not given is left out and can be added later by ``+``.

        Only a layer whose output factor is made of both sides (:attr:`kfcore.layers.Layer.together`) wants them in one call. A mask
        belongs to every call.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what came and what is allowed; a ``mask`` too that is not boolean, has another shape than the positions,
            or comes with a layer that knows none (:attr:`kfcore.layers.Layer.unmaskable`).
        """
        return self._moments(state.average.weight, Use(layer, inputs, output_grads, mask))

    def reduce_all(self, uses: Sequence[Use], state: Any) -> KroneckerStatistics:
        """The sums of all uses; a side that is not given is left out and can be added later by ``+``.

        Uses are further positions of the same examples: they make more rows, not more examples.
        """
        found = functools.reduce(operator.add, [self._moments(state.average.weight, use) for use in uses])
        return found._replace(output_count=found.output_count / len(uses)) if len(uses) > 1 else found

    def _moments(self, like: Array, use: Use) -> KroneckerStatistics:
        """Sums over the rows of both sides, or of the side that is there."""
        layer, inputs, output_grads, mask = use
        a = g = None
        rows = examples = 0.0
        if inputs is not None:
            xp = check_captured("inputs", inputs, like, layer.input_kind)
            if mask is not None:
                check_mask(layer, mask, inputs.shape if layer.input_kind == "ids" else inputs.shape[:-1], "inputs", inputs)
            a, rows = self._of_inputs(xp, layer, inputs, like.dtype, mask)
        if output_grads is not None and self.fisher != "forward":
            xp = check_captured("output_grads", output_grads, like)
            if mask is not None:
                lead = output_grads.ndim - 3
                whole = mask if inputs is None else tiled(xp, mask, output_grads.shape[lead], lead)
                check_mask(layer, whole, output_grads.shape[:-1], "output_grads", output_grads)
            g, examples = self._of_outputs(xp, layer, output_grads, like.dtype, inputs, mask)
        return KroneckerStatistics(a, rows, g, examples)


def like_of(like: Array) -> tuple[Namespace, Array]:
    """The namespace of ``like`` and a 0-d array of the dtype that factors beside it have."""
    xp = namespace(like)
    return xp, xp.zeros((), dtype=factor_dtype(xp, like.dtype), device=device(like))


def checked_statistics(average: tuple[Any, ...], statistics: KroneckerStatistics) -> None:
    """Raise unless ``statistics`` have all that a running average has."""
    sums = (statistics.inputs, statistics.outputs)
    missing = [s for s, v, t in zip(("inputs", "output_grads"), average, sums, strict=True) if v is not None and t is None]
    if missing:
        raise ValueError(f"`statistics` lack the {' and the '.join(missing)}: give them to `reduce` too, and add the results")


def checked_grad(layer: Layer, grad: Array, dtype: Any) -> tuple[Namespace, Array]:
    """``grad`` in ``dtype``; raise unless it has the layer's shape."""
    xp = namespace(grad)
    if tuple(grad.shape[-2:]) != layer.shape:
        raise ValueError(f"`grad` must have shape [..., {layer.shape[0]}, {layer.shape[1]}], got {tuple(grad.shape)}")
    return xp, cast(xp, grad, dtype)
