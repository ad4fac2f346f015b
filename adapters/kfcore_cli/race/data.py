"""From files that other packages bring to standardised training and test parts."""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from kfcore_cli.errors import UsageError, missing
from kfcore_cli.race.interfaces import Data


def packaged_file(what: str, package: str, path: str) -> Path:
    """A file of an installed distribution, found without importing it."""
    found = Path(str(_installed(what, package).locate_file(path)))
    if not found.is_file():
        raise _lacking(what, package, f"the file {path}")
    return found


def packaged_files(what: str, package: str, pattern: str) -> list[Path]:
    """All files of an installed distribution whose paths match a pattern, sorted by these."""
    installed = _installed(what, package)
    found = sorted(str(path) for path in installed.files or () if path.match(pattern))
    if not found:
        raise _lacking(what, package, f"files {pattern}")
    return [Path(str(installed.locate_file(path))) for path in found]


def _installed(what: str, package: str) -> Distribution:
    try:
        return distribution(package)
    except PackageNotFoundError as error:
        raise missing(what, package, _install(package)) from error


def _lacking(what: str, package: str, files: str) -> UsageError:
    return UsageError(f"{what} needs {files} of the package {package}, and the installed version has none: {_install(package)} --upgrade")


def _install(package: str) -> str:
    return f"pip install --no-deps {package}"


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


def windows(ids: np.ndarray, places: int, measured: int = 256) -> Data:
    """Stretches of so many ids, each with the ids that follow its own one place further on.

    The first nine tenths are the training part: a row for every place at which a window may begin, as views of one array. The
    rest is the test part, whose loss, as that of the training part, is ``measured`` on at most so many windows that are evenly spread and,
    where there are ids enough, disjoint.
    """
    cut = len(ids) * 9 // 10
    train, test = (np.lib.stride_tricks.sliding_window_view(part, places + 1) for part in (ids[:cut], ids[cut:]))
    probe, kept = (np.unique(np.linspace(0, len(part) - 1, measured).astype(np.int64)) for part in (train, test))
    test = test[kept]
    return Data(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:], probe)
