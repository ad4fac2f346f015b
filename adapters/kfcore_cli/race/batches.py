"""The order in which every contender sees the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def batches(n: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of minibatches without end: every epoch a new shuffle of ``n`` rows, cut into whole batches.

    The rows left over sit out the epoch, so that all batches have one size.
    """
    rng = np.random.default_rng([seed, 1])
    size = min(size, n)
    while True:
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            yield order[start : start + size]


def as_array(xp: Any, x: np.ndarray, dtype: Any) -> Any:
    """What a contender in the namespace ``xp`` makes of inputs or targets: numbers in its ``dtype``, integers as they are."""
    return xp.asarray(x) if np.issubdtype(x.dtype, np.integer) else xp.asarray(x, dtype=dtype)
