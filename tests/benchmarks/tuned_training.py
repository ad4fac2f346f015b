"""Training loss of K-FAC, AdamW and SGD after equally many steps, each with the best of an equally large grid, over seeds.

The grid is searched on one seed and the winners run on others, in PyTorch, with the networks and minibatches of ``kfcore race``.
Momentum is 0.9, and the learning rates are constant.

    python tests/benchmarks/tuned_training.py [--problem mnist-conv|shakespeare] [--quick] [--out FILE.json]
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from interleaved import options, write

import kfcore as kf
from kfcore_cli.race import registry
from kfcore_cli.race.backends.torch import TorchContender
from kfcore_cli.race.batches import batches
from kfcore_cli.race.interfaces import Problem
from kfcore_cli.race.rules import SGD
from kfcore_torch import Optimizer

GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "sgd": {"lr": (1e-2, 3e-2, 0.1, 0.3), "weight_decay": (0.0, 1e-4)},
    "adamw": {"lr": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (0.0, 1e-2)},
    "kfac": {"lr": (0.1, 0.3), "damping": (1e-3, 1e-2, 3e-2, 0.1)},
}


def optimizer(name: str, settings: dict[str, float], module: torch.nn.Module) -> torch.optim.Optimizer:
    """K-FAC with what the race uses everywhere, or an optimizer of PyTorch."""
    if name == "adamw":
        return torch.optim.AdamW(module.parameters(), **settings)
    if name == "sgd":
        return torch.optim.SGD(module.parameters(), momentum=0.9, **settings)
    method = kf.KFAC(damping=settings["damping"], stats_every=5, refresh_every=10)
    return Optimizer(module, method, lr=settings["lr"], momentum=0.9, clip=1e-3)


def train(
    problem: Problem, data: Any, make: Callable[[torch.nn.Module], torch.optim.Optimizer], seed: int, steps: int, every: int | None = None
) -> list[dict[str, float]]:
    """Training loss and the metric of the test part after so many steps, in float32, and after every ``every`` steps before.

    ``seconds`` are those of processor time (of one thread, if PyTorch has one) that the steps took, which other work on the machine
    lengthens less than time on the clock.
    """
    torch.manual_seed(seed)
    contender = TorchContender(problem.network, problem.network.init(seed), SGD(lr=0.0, momentum=0.0), "float32")
    contender.optimizer = make(contender.module)
    inputs, targets, test = (contender.tensor(x) for x in (*data.measured, data.test_x))
    seconds, curve = 0.0, []
    for step, index in enumerate(islice(batches(len(data.train_x), problem.batch_size, seed), steps), 1):
        start = time.process_time()
        contender.step(data.train_x[index], data.train_y[index])
        seconds += time.process_time() - start
        if step == steps or (every and step % every == 0):
            with torch.no_grad():
                loss = float(contender.loss(contender.module(inputs), targets))
                score = problem.score(contender.module(test).numpy(), data.test_y)
            curve.append({"step": step, "seconds": seconds, "loss": loss if math.isfinite(loss) else math.inf, "score": score})
    return curve


def main() -> None:
    arguments = options(__doc__, problem="mnist-conv")
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    problem: Problem = registry.load("problems", arguments.problem)
    data, steps = problem.load(), 20 if arguments.quick else problem.steps
    print(f"{problem.title}, {arguments.problem}: {steps} steps of {problem.batch_size}, float32; grid on seed 0, then seeds 1 to 5")
    result: dict[str, Any] = {"problem": arguments.problem, "steps": steps, "torch": torch.__version__, "kfcore": kf.__version__}
    rows = []
    for name, grid in GRIDS.items():
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        tried = [(train(problem, data, partial(optimizer, name, point), 0, steps)[-1], point) for point in points]
        for found, point in tried:
            print(f"  {name:6} {point}  loss {found['loss']:.3e}  {problem.metric} {found['score']:.4f}", flush=True)
        _, best = min(tried, key=lambda run: run[0]["loss"])
        runs = [train(problem, data, partial(optimizer, name, best), seed, steps)[-1] for seed in range(1, 6)]
        losses, scores = ([run[key] for run in runs] for key in ("loss", "score"))
        rows.append(
            f"{name:6} {best!s:36} {statistics.median(losses):.3e} ({min(losses):.3e} to {max(losses):.3e})   "
            f"{statistics.median(scores):.4f} ({min(scores):.4f} to {max(scores):.4f})"
        )
        result[name] = {"grid": [point | found for found, point in tried], "best": best, "seeds": runs}
    print(f"{'':6} {'best of the grid':36} {'training loss, median and range':36} {problem.metric}, median and range")
    print(*rows, sep="\n")
    write(arguments.out, result)


if __name__ == "__main__":
    main()
