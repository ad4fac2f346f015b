"""Cost of an optimizer step against plain SGD in PyTorch: the same net and data, arms interleaved in one process, one thread.

A block is ten whole steps (forward, backward, update), so that every block holds one refresh. Ratios are taken within a repetition.

    python tests/benchmarks/step_cost.py [--quick] [--out FILE.json]
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from interleaved import BLOCK, line, measure, options, state, write
from torch import nn

import kfcore as kf
from kfcore_torch import Optimizer

BATCH = 128
METHODS = {
    "kfac": kf.KFAC(damping=1e-2, refresh_every=BLOCK),
    "kfac, exact damping": kf.KFAC(damping=kf.Damping(1e-2, kind="exact"), refresh_every=BLOCK),
    "kfac, forward-only": kf.KFAC(damping=1e-2, refresh_every=BLOCK, fisher="forward"),
}


def arm(width: int, method: kf.Method | None) -> tuple[Callable[[], None], Callable[[], tuple[int, int]]]:
    """A function that makes one step, and one that tells the measured and the reported bytes of the optimizer's state."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    x, y = torch.randn(BATCH, 64), torch.randint(10, (BATCH,))
    if method is None:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    else:
        optimizer = Optimizer(net, method, lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    def size() -> tuple[int, int]:
        if not isinstance(optimizer, Optimizer):
            measured = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
            return measured, measured
        return sum(t.nbytes for t in optimizer.state_dict()["kfcore"]["arrays"].values()), optimizer.report().bytes

    return step, size


def race(width: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Rows of :func:`interleaved.measure` with the bytes of every arm's state."""
    arms = {"sgd": arm(width, None)} | {name: arm(width, method) for name, method in METHODS.items()}
    for step, _ in arms.values():
        for _ in range(BLOCK):
            step()
    rows = measure({name: step for name, (step, _) in arms.items()}, repetitions)
    for name, (_, size) in arms.items():
        rows[name]["state_bytes"], rows[name]["reported_bytes"] = size()
    return rows


def main() -> None:
    arguments = options(__doc__)
    torch.set_num_threads(1)
    result: dict[str, object] = {"torch": torch.__version__, "machine": platform.machine(), "kfcore": kf.__version__}
    for width, repetitions in ((128, 40), (512, 12), (1024, 12)):
        rows = race(width, 5 if arguments.quick else repetitions)
        result[f"64-{width}-{width}-10"] = rows
        print(f"64-{width}-{width}-10, batch {BATCH}, float32, one thread, statistics every step, refresh every {BLOCK}")
        for name, row in rows.items():
            print(line(name, row) + state(row))
    write(arguments.out, result)


if __name__ == "__main__":
    main()
