"""Ten thousand steps of EKFAC with ``Tracked`` bases, float32, in PyTorch: all of it finite, the bases orthonormal, and no more memory?

Two networks on scikit-learn's digits, refreshed every ten steps, all bases of 32 to 513 vectors followed: a classifier whose loss goes to
nothing, and its curvature with it, and an autoencoder whose loss does not. Of every basis, after each refresh, ``max |Q^T Q - I|`` is taken
in float64. Memory is what Python allocated and what the process holds, after every tenth of the steps.

    python tests/benchmarks/long_run.py [--quick] [--out FILE.json]
"""

from __future__ import annotations

import gc
import math
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import torch
from interleaved import options, write
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kfcore as kf
from kfcore_torch import Optimizer

STEPS, BATCH, EVERY = 10_000, 64, 10


def classifier() -> nn.Module:
    """Factors of 65, 513, 512, 65, 64 and 10 features."""
    return nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64), nn.Tanh(), nn.Linear(64, 10))


def autoencoder() -> nn.Module:
    """Factors of up to 301 features; the code of 8 is below what is followed."""
    widths = [nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 8), nn.Linear(8, 300), nn.Tanh(), nn.Linear(300, 64)]
    return nn.Sequential(*widths)


def skew(basis: Tensor) -> float:
    """``max |Q^T Q - I|``."""
    wide = basis.double()
    return float((wide.T @ wide - torch.eye(len(wide), dtype=torch.float64)).abs().max())


def resident() -> int:
    """Bytes of the process in memory; where the system does not tell, the most there ever were."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory() -> dict[str, int]:
    """Bytes that Python allocated, and that the process holds."""
    gc.collect()
    return {"traced": tracemalloc.get_traced_memory()[0], "resident": resident()}


def run(net: nn.Module, loss: kf.Loss, criterion: Any, inputs: Tensor, targets: Tensor, steps: int, damping: float) -> dict[str, Any]:
    """What became of the bases, the loss and the memory."""
    method = kf.EKFAC(damping=damping, refresh_every=EVERY, basis=kf.Tracked(smallest=32))
    optimizer = Optimizer(net, method, lr=0.1, momentum=0.9, clip=1e-3, loss=loss)
    generator = torch.Generator().manual_seed(0)
    worst, last, held = (0.0,), 0.0, []
    tracemalloc.start()
    for step in range(1, steps + 1):
        rows = torch.randint(len(inputs), (BATCH,), generator=generator)
        error = criterion(net(inputs[rows]), targets[rows])
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if step % EVERY == 1:
            solvers = {name: state.solver for name, state in optimizer.engine.state.curvature.blocks.items()}
            sides = {(name, side): getattr(solver, f"{side}_basis") for name, solver in solvers.items() for side in ("input", "output")}
            skews = [(skew(basis), step, *where) for where, basis in sides.items()]
            worst, last = max(worst, *skews), max(skews)[0]
            if not math.isfinite(error.item()) or not all(p.isfinite().all() for p in net.parameters()):
                raise SystemExit(f"not finite at step {step}")
        if step % (steps // 10) == 0:
            held.append(memory())
    tracemalloc.stop()
    blocks = optimizer.engine.state.curvature.blocks
    with torch.no_grad():
        reached = float(criterion(net(inputs), targets))
    diagnostics = optimizer.diagnostics()
    return {
        "steps": steps,
        "loss": reached,
        "skew": {"worst": worst, "last": last},
        "ways": {name: state.solver.ways.tolist() for name, state in blocks.items()},
        "diagnostics": {name: value for name, value in diagnostics.items() if isinstance(value, int | float | str | dict)},
        "memory": held,
    }


def main() -> None:
    arguments = options(__doc__)
    torch.set_num_threads(1)
    steps = STEPS // 10 if arguments.quick else STEPS
    digits: Any = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
    tasks = {
        "classifier": (classifier, kf.CrossEntropy(), nn.functional.cross_entropy, labels, 1e-3),
        "autoencoder": (autoencoder, kf.MSE(), nn.functional.mse_loss, images, 1e-3),
    }
    result: dict[str, Any] = {"torch": torch.__version__, "kfcore": kf.__version__}
    for name, (build, loss, criterion, targets, damping) in tasks.items():
        torch.manual_seed(0)
        result[name] = found = run(build(), loss, criterion, images, targets, steps, damping)
        (worst, *where), last = found["skew"]["worst"], found["skew"]["last"]
        print(f"{name}: {steps} steps, loss {found['loss']:.2e}; max |Q^T Q - I| {worst:.1e} (at {where}), at the end {last:.1e}")
        print(f"  refreshes that left, improved, decomposed: {found['ways']}; {found['diagnostics']}")
        for what in ("traced", "resident"):
            every = ", ".join(f"{held[what] / 2**20:.2f}" for held in found["memory"])
            print(f"  {what:8} MiB: {every}", flush=True)
        write(arguments.out, result)


if __name__ == "__main__":
    main()
