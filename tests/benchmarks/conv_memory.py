"""Input factor of a convolution: peak extra memory and time, streamed against the patch matrix held whole, in NumPy and in PyTorch.

Memory is what is live at the peak beyond the captured array, the result included, as a multiple of that array's bytes: NumPy's by
``tracemalloc``, PyTorch's by counting the storages that every operation allocates and frees. Both forms run in turns in one process, on one
thread; times are CPU times, so that other processes do not enter.

    python tests/benchmarks/conv_memory.py [--quick] [--out FILE.json]
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as torch_xp
import numpy as np
import torch
from interleaved import options, write
from torch.utils._python_dispatch import TorchDispatchMode

import kfcore as kf
from kfcore.linalg import gram
from kfcore_torch import kernels

CASES = {
    "3x3, 256 channels, 32x32, batch 64": (kf.Conv(256, 256, (3, 3), padding=1), (64, 256, 32, 32)),
    "3x3, 64 channels, 32x32, batch 64": (kf.Conv(64, 64, (3, 3), padding=1), (64, 64, 32, 32)),
    "7x7 stride 2, 3 channels, 112x112, batch 32": (kf.Conv(3, 64, (7, 7), stride=2, padding=3), (32, 3, 112, 112)),
    "3x3 depthwise, 128 channels, 32x32, batch 64": (kf.Conv(128, 128, (3, 3), padding=1, groups=128), (64, 128, 32, 32)),
    "3x3, 64 channels, 256x256, batch 1": (kf.Conv(64, 64, (3, 3), padding=1), (1, 64, 256, 256)),
}
QUICK = ("3x3, 64 channels, 32x32, batch 64",)


class Storages(TorchDispatchMode):
    """Bytes of the storages that operations under it have made, live now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._seen(x.untyped_storage(), given)
        return result

    def _seen(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in given or key in self.known or not size:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def numpy_peak(run: Callable[[], Any]) -> int:
    """Peak of what NumPy allocates during a call."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = run()
        del kept
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def torch_peak(run: Callable[[], Any]) -> int:
    """The same of PyTorch."""
    gc.collect()
    with Storages() as storages:
        kept = run()
    del kept
    return storages.peak


def forms(layer: kf.Conv, xp: Any, x: Any) -> dict[str, Callable[[], Any]]:
    """The input factor from the captured array, both ways."""
    captured, _ = layer.capture(x, None)
    return {
        "streamed": lambda: layer.input_gram(xp, captured, x.dtype),
        "whole": lambda: gram(xp, layer.input_rows(xp, captured, x.dtype)),
    }


def row(layer: kf.Conv, shape: tuple[int, ...], library: str, repetitions: int) -> dict[str, float]:
    """Memory as multiples of the captured array, and median CPU times in milliseconds."""
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    xp, put, peak = (np, x, numpy_peak) if library == "numpy" else (torch_xp, torch.from_numpy(x), torch_peak)
    runs = forms(layer, xp, put)
    found: dict[str, float] = {f"{name}_memory": peak(run) / x.nbytes for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append((time.process_time() - start) * 1e3)
    found |= {f"{name}_ms": statistics.median(own) for name, own in times.items()}
    one, two = (np.asarray(run()) for run in runs.values())
    return found | {"difference": float(np.abs(one - two).max() / np.abs(two).max())}


def main() -> None:
    arguments = options(__doc__)
    torch.set_num_threads(1)
    kernels.register()
    result: dict[str, object] = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "kfcore": kf.__version__,
    }
    for name in QUICK if arguments.quick else CASES:
        layer, shape = CASES[name]
        print(f"{name}: float32, one thread, {4 * np.prod(shape) / 2**20:.0f} MiB captured")
        for library in ("numpy", "torch"):
            found = row(layer, shape, library, 3)
            result[f"{name}, {library}"] = found
            print(
                f"  {library:7}extra memory {found['streamed_memory']:5.2f} x streamed, {found['whole_memory']:6.2f} x whole;"
                f"  time {found['streamed_ms']:8.1f} ms, {found['whole_ms']:8.1f} ms"
                f" ({found['streamed_ms'] / found['whole_ms']:.2f});  relative difference {found['difference']:.1e}"
            )
    write(arguments.out, result)


if __name__ == "__main__":
    main()
