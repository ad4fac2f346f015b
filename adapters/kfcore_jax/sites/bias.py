"""Biases: a parameter that is added to the output of a product or convolution."""

from __future__ import annotations

import math

import numpy as np

from kfcore_jax.sites.convolution import Convolution
from kfcore_jax.sites.dense import Dense
from kfcore_jax.views import Each, Reshape, Shape, View, apply


def bias_view(use: Dense | Convolution, seen_by: View, added_by: View, shape: Shape, sum_shape: Shape) -> View | None:
    """The way from a parameter to ``[*stack, out]``, if it is added to every row of the output alike and to each feature once.

    ``seen_by`` and ``added_by`` are the views of the output and of the parameter, of this ``shape``, that the sum has.

    Both sides of the sum are labelled with integers: the output by feature, with stride zero along its rows, the parameter by entry.
    """
    site = use.site
    last = max((i for i, step in enumerate(added_by) if isinstance(step, Each)), default=-1) + 1
    before, after = added_by[:last], added_by[last:]
    if tuple(step.depth for step in before if isinstance(step, Each)) != site.stacked:
        return None
    slice_shape = apply(before, np.broadcast_to(np.int8(0), shape)).shape[len(site.stacked) :]
    batch, rows, outs = use.output_axes
    own = tuple(site.output[a] for a in (*batch, *outs))
    size = math.prod(own)
    if math.prod(slice_shape) != size:
        return None
    features = np.arange(size).reshape(own).reshape([1 if a in rows else n for a, n in enumerate(site.output)])
    seen = apply(seen_by, np.broadcast_to(features, site.output))
    added = apply(after, np.arange(size).reshape(slice_shape))
    if seen.shape != sum_shape or added.ndim != len(sum_shape):
        return None
    repeated = [n == 1 or stride == 0 for n, stride in zip(seen.shape, seen.strides, strict=True)]
    once = [n == 1 or stride == 0 for n, stride in zip(added.shape, added.strides, strict=True)]
    if any(r and not o for r, o in zip(repeated, once, strict=True)):
        return None
    pick = tuple(0 if r else slice(None) for r in repeated)
    seen, added = seen[pick], np.broadcast_to(added, sum_shape)[pick]
    if seen.size != size or not np.array_equal(seen, added):
        return None
    final = (*use.stack[len(site.stacked) :], use.outs)
    return before if slice_shape == final else (*before, Reshape(slice_shape, final))
