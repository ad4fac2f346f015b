"""Cost of an optimizer step against plain SGD in PyTorch: the same net and data, arms interleaved in one process, one thread.

A block is ten whole steps (forward, backward, update), so that every block holds one refresh. Ratios are taken within a repetition, of
processor time, which is that of the one thread. With ``--soap`` SOAP (Vyas et al. 2024) runs too, the one of
``pip install --no-deps pytorch_optimizer``.

    python tests/benchmarks/step_cost.py [--quick] [--soap] [--out FILE.json]
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

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
    "ekfac": kf.EKFAC(damping=1e-2, refresh_every=BLOCK),
    "ekfac, Tracked": kf.EKFAC(damping=1e-2, refresh_every=BLOCK, basis=kf.Tracked()),
    "ekfac-ra, Tracked": kf.EKFAC(damping=1e-2, refresh_every=BLOCK, basis=kf.Tracked(), scales="gradient"),
}
Make = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)


def soap(net: nn.Module) -> torch.optim.Optimizer:
    """Bases of all sides of all weights by one step of orthogonal iteration every ten steps; biases by Adam, as it does by default."""
    try:
        from pytorch_optimizer import SOAP  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit("--soap needs the package pytorch_optimizer: pip install --no-deps pytorch_optimizer") from error
    return SOAP(net.parameters(), lr=1e-3, precondition_frequency=BLOCK)


def arm(width: int, make: Make | kf.Method) -> tuple[Callable[[], None], Callable[[], tuple[int, int]]]:
    """A function that makes one step, and one that tells the measured and the reported bytes of the optimizer's state."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    x, y = torch.randn(BATCH, 64), torch.randint(10, (BATCH,))
    optimizer = Optimizer(net, make, lr=1e-3, momentum=0.9) if isinstance(make, kf.Method) else make(net)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    def size() -> tuple[int, int]:
        if not isinstance(optimizer, Optimizer):
            measured = sum(_bytes(state) for state in optimizer.state.values())
            return measured, measured
        return sum(t.nbytes for t in optimizer.state_dict()["kfcore"]["arrays"].values()), optimizer.report().bytes

    return step, size


def race(width: int, repetitions: int, more: dict[str, Make]) -> dict[str, dict[str, float]]:
    """Rows of :func:`interleaved.measure` with the bytes of every arm's state."""
    arms = {name: arm(width, make) for name, make in ({"sgd": sgd} | more | METHODS).items()}
    for step, _ in arms.values():
        for _ in range(BLOCK):
            step()
    rows = measure({name: step for name, (step, _) in arms.items()}, repetitions, time.process_time)
    for name, (_, size) in arms.items():
        rows[name]["state_bytes"], rows[name]["reported_bytes"] = size()
    return rows


def _bytes(tree: Any) -> int:
    """Bytes in the tensors of a nest of dictionaries and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    return sum(map(_bytes, tree.values() if isinstance(tree, dict) else tree)) if isinstance(tree, dict | list) else 0


def main() -> None:
    arguments = options(__doc__, soap=False)
    torch.set_num_threads(1)
    result: dict[str, object] = {"torch": torch.__version__, "machine": platform.machine(), "kfcore": kf.__version__}
    for width, repetitions in ((128, 40), (512, 12), (1024, 12)):
        rows = race(width, 5 if arguments.quick else repetitions, {"soap": soap} if arguments.soap else {})
        result[f"64-{width}-{width}-10"] = rows
        print(f"64-{width}-{width}-10, batch {BATCH}, float32, one thread, statistics every step, refresh every {BLOCK}")
        for name, row in rows.items():
            print(line(name, row) + state(row))
    write(arguments.out, result)


if __name__ == "__main__":
    main()
