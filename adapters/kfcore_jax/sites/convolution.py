"""Convolutions: ``conv_general_dilated`` of the batch with a parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kfcore_jax.program import Path
from kfcore_jax.sites.site import Single, Site, merged
from kfcore_jax.views import Transpose, View


@dataclass(frozen=True)
class Convolution(Single):
    """Geometry of a convolution, in the words of ``lax.conv_general_dilated``; a transposed one has an ``input_dilation``."""

    site: Site
    stack: tuple[int, ...]
    ins: int
    """Channels of the inputs, of all groups."""
    outs: int
    kernel: tuple[int, ...]
    """Sizes of the window."""
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    """Before and behind, in each spatial axis; negative where the inputs are cut."""
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    weight: View
    """From the parameter to ``[*stack, *kernel, in / groups, out]``."""
    numbers: Any
    """``dimension_numbers``: the axes of batch, channels and space of inputs and output; those of out, in and space of the weight."""
    examples: tuple[int, ...] = ()
    """The axis of the batch in the output, where it holds examples, before positions where they are merged with some."""
    count: int = 0
    """Number of examples, where it is known."""

    kind = "convolution"

    def captured(self, inputs: dict[Path, Any], pulled: dict[Path, Any]) -> tuple[Any, Any]:
        """``inputs [*stack, N, *spatial, in]`` and ``output_grads [*stack, N, S, out]`` from what the loops returned of them.

        Rounds of a loop that use the same weight again, and positions merged with the examples, are further entries along N behind their
        example, ``rounds`` of them, since space has an axis for each direction.
        """
        x, dy = inputs[self.site.path], pulled[self.site.path]
        examples, space, channels = self._axes(self.numbers.lhs_spec)
        seen = merged(x, self.site.stacked, [examples, *([axis] for axis in space), channels])
        return seen, merged(dy, self.site.stacked, self._axes(self.numbers.out_spec))

    def gradient(self, inputs: np.ndarray, output_grads: np.ndarray) -> np.ndarray:
        """Of the weight, by the transpose of the convolution with ``inputs``."""
        space = "".join(chr(ord("a") + axis) for axis in range(len(self.kernel)))
        numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
        wide = jnp.result_type(float)
        lead, outputs = len(self.stack), [self.site.output[axis] for axis in self.numbers.out_spec[2:]]
        x = jnp.asarray(inputs, wide).reshape(-1, *inputs.shape[lead:])
        dy = jnp.asarray(output_grads, wide).reshape(len(x), -1, *outputs, self.outs)
        weight = jax.ShapeDtypeStruct((*self.kernel, self.ins // self.groups, self.outs), wide)

        def one(x: jax.Array, dy: jax.Array) -> jax.Array:
            def convolved(w: jax.Array) -> jax.Array:
                return lax.conv_general_dilated(
                    x,
                    w,
                    self.strides,
                    self.padding,
                    self.input_dilation,
                    self.kernel_dilation,
                    numbers,
                    self.groups,
                    precision=lax.Precision.HIGHEST,
                )

            return jax.linear_transpose(convolved, weight)(dy)[0]

        return np.asarray(lax.map(lambda pair: one(*pair), (x, dy)), np.float64).reshape(*self.stack, *weight.shape)

    @property
    def rounds(self) -> int:
        """Rounds of loops, and positions merged with the examples."""
        merged_with = self.site.output[self.numbers.out_spec[0]] // self.count if self.count else 1
        return merged_with * math.prod(self.site.scans[depth] for depth in self.site.shared)

    @property
    def output_axes(self) -> tuple[list[int], list[int], list[int]]:
        """Axes of the output that are stacked (none), rows, and channels."""
        batch, channels, *space = self.numbers.out_spec
        return [], sorted([batch, *space]), [channels]

    def _axes(self, spec: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
        """Axes of the examples, of space and of the channels, once those of the loops stand before them."""
        batch, channels, *space = self.site.behind(spec)
        return [batch, *self.site.shared], space, [channels]


def convolution(site: Site, params: Mapping[str, Any]) -> Convolution | str:
    """Geometry of a convolution with these parameters of its primitive, or why it has none."""
    if params["batch_group_count"] != 1:
        return "conv_general_dilated with groups of the batch"
    numbers = params["dimension_numbers"]
    out, into, *space = numbers.rhs_spec
    order = (*space, into, out)
    return Convolution(
        site=site,
        stack=site.lengths,
        ins=site.inputs[numbers.lhs_spec[1]],
        outs=site.weight[out],
        kernel=tuple(site.weight[a] for a in space),
        strides=tuple(params["window_strides"]),
        padding=tuple((int(low), int(high)) for low, high in params["padding"]),
        input_dilation=tuple(params["lhs_dilation"]),
        kernel_dilation=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
        weight=site.view if order == tuple(sorted(order)) else (*site.view, Transpose(order)),
        numbers=numbers,
    )
