"""Refreshing an eigenbasis: decomposed anew, followed, and by one step of orthogonal iteration, in PyTorch on one thread.

The factors change as a network's do while it trains: running averages of activations with a power-law spectrum, ten batches of 128
between refreshes, whose directions turn slowly. All ways see the same factors in turns. Written beside the times: the mass off the diagonal
of ``Q^T A Q``, relative to ``A``, that each leaves at the last refresh, and what a basis that is never refreshed would have.

    python tests/benchmarks/basis_tracking.py [--quick] [--out FILE.json]
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from interleaved import options, write

import kfcore_torch
from kfcore import Tracked, linalg
from kfcore._array import namespace
from kfcore.eigenbasis import follow

WAYS = {
    "followed, as for EKFAC": (Tracked(), False),
    "with exact quotients, as for KFAC": (Tracked(), True),
    "orthogonal iteration (QR)": (Tracked(step="qr", sweeps=1), False),
}


def factors(n: int, count: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Running averages, ten batches apart."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    mix = 10.0 * draw(n, n) / np.float32(n**0.5) * np.arange(1, n + 1, dtype=np.float32) ** np.float32(-0.7)
    turn = draw(n, n) / np.float32(n**0.5)
    average = np.zeros((n, n), np.float32)
    for _ in range(count):
        rows = np.tanh(draw(1280, n) @ mix.T)
        average = np.float32(0.6) * average + np.float32(0.4 / len(rows)) * (rows.T @ rows)
        mix = mix + np.float32(0.01) * (turn - turn.T) @ mix
        yield torch.from_numpy(average.copy())


def mass(x: torch.Tensor, basis: torch.Tensor) -> float:
    """Share of ``x`` that is off the diagonal in a basis."""
    turned = (basis.T.double() @ x.double() @ basis.double()) ** 2
    return float(((turned.sum() - turned.diagonal().sum()).clamp(min=0.0) / turned.sum()) ** 0.5)


def race(n: int, count: int) -> dict[str, object]:
    """Milliseconds of every way, and what it leaves."""
    every = factors(n, count + 2)
    next(every)
    start = torch.linalg.eigh(next(every))[1]
    bases = dict.fromkeys(WAYS, start)
    times: dict[str, list[float]] = {name: [] for name in ("eigh", *WAYS)}
    turns: dict[str, list[int]] = {name: [0, 0, 0] for name in WAYS}
    x = start
    for turn, x in enumerate(every):
        xp = namespace(x)
        begin = time.perf_counter()
        linalg.eigh(xp, x)
        times["eigh"].append(time.perf_counter() - begin)
        for name, (how, exact) in WAYS.items():
            begin = time.perf_counter()
            found = follow(xp, how, x, bases[name], torch.tensor(turn + 1), exact=exact)
            times[name].append(time.perf_counter() - begin)
            assert found.basis is not None
            bases[name] = found.basis
            turns[name] = [a + b for a, b in zip(turns[name], found.way.tolist(), strict=True)]
    reference = statistics.median(times["eigh"])
    print(f"\nn = {n}, {count} refreshes; a basis never refreshed: {mass(x, start):.1e} off the diagonal")
    result: dict[str, object] = {}
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        low, high = min(seconds), max(seconds)
        left = "" if name == "eigh" else f"  {mass(x, bases[name]):.1e} off the diagonal; left, improved, decomposed: {turns[name]}"
        print(f"{name:34s} {1e3 * middle:8.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})  {middle / reference:5.2f} of eigh{left}")
        result[name] = {"ms": [1e3 * s for s in seconds], "ratio": middle / reference}
    return result


def main() -> None:
    """Both sizes, or the smaller with ``--quick``."""
    given = options(__doc__)
    torch.set_num_threads(1)
    kfcore_torch.__name__  # noqa: B018  registers the kernels
    sizes = {512: 6} if given.quick else {1024: 20, 2048: 10}
    write(given.out, {"machine": platform.processor(), "torch": torch.__version__, "n": {n: race(n, count) for n, count in sizes.items()}})


if __name__ == "__main__":
    main()
