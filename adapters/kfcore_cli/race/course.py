"""The run of one contender: timed steps, and between them the measurements that are not timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from kfcore_cli.race.batches import batches
from kfcore_cli.race.interfaces import Contender, Data, Problem, Weights

POINTS = 40
COMPARED_AFTER = 100
"""Step after which weights are compared between backends: later ones tell how chaotic the training is, not how equal the arithmetic."""

Snapshot = tuple[int, Weights]
Watch = Callable[[float, int, float, float], None]
"""Told the fraction done, the steps, the latest training loss and the seconds."""


@dataclass
class Run:
    """What became of one contender."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Loss of the training part, or of its probe, after that many steps and seconds."""
    scores: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    """Time of every step."""
    state_bytes: int = 0
    compared: Snapshot | None = None
    """Weights for the comparison of backends and their step: the agreed one, or the last of a shorter run."""
    final: Snapshot | None = None
    """The last weights and their step."""

    def reached(self, target: float) -> tuple[float, float] | None:
        """Seconds and steps to a training loss, between two measurements interpolated in the logarithm of the loss."""
        for i, loss in enumerate(self.losses):
            if loss <= target:
                if i == 0:
                    return self.seconds[0], self.steps[0]
                before = self.losses[i - 1]
                part = math.log(before / target) / math.log(before / max(loss, 1e-300))
                ends = ((s[i - 1], s[i]) for s in (self.seconds, self.steps))
                seconds, steps = (a + part * (b - a) for a, b in ends)
                return seconds, steps
        return None


def run(
    make: Callable[[], Contender], problem: Problem, data: Data, seed: int, *, seconds: float | None, steps: int | None, watch: Watch
) -> Run:
    """Train a contender for so many seconds or steps, whichever is given; ``make`` gives it in its initial state.

    It is measured at the start, at the end, and at times that are closer at the beginning, where the loss falls fastest. A first
    contender makes two steps and is thrown away, so that compiling and loading do not count. Training stops when the loss is not
    finite.
    """
    _warm_up(make(), problem, data, seed)
    contender, result = make(), Run()
    marks = [(k / POINTS) ** 1.5 for k in range(POINTS + 1)]
    elapsed, done, fraction = 0.0, 0, 0.0
    for index in batches(len(data.train_x), problem.batch_size, seed):
        if fraction >= marks[0]:
            marks = [mark for mark in marks if mark > fraction]
            loss = _measure(result, contender, problem, data, done, elapsed)
            watch(fraction, done, loss, elapsed)
            if not marks or not math.isfinite(loss):
                break
        x, y = data.train_x[index], data.train_y[index]
        # a diverging contender is told by its loss, not by warnings
        with np.errstate(all="ignore"):
            start = time.perf_counter()
            contender.step(x, y)
            took = time.perf_counter() - start
        elapsed, done = elapsed + took, done + 1
        result.milliseconds.append(1e3 * took)
        fraction = min(1.0, done / steps if steps is not None else elapsed / seconds)
        if done == COMPARED_AFTER:
            result.compared = done, contender.weights()
    result.final = done, contender.weights()
    result.compared = result.compared or result.final
    result.state_bytes = contender.state_bytes()
    return result


def deviation(weights: Weights, reference: Weights) -> float:
    """Largest difference of two sets of weights, each array relative to its own largest entry."""
    worst = 0.0
    for name, own in reference.items():
        for role, expected in own.items():
            unit = float(np.max(np.abs(expected))) or 1.0
            worst = max(worst, float(np.max(np.abs(weights[name][role] - expected))) / unit)
    return worst


def _warm_up(contender: Contender, problem: Problem, data: Data, seed: int) -> None:
    for index in islice(batches(len(data.train_x), problem.batch_size, seed), 2):
        with np.errstate(all="ignore"):
            contender.step(data.train_x[index], data.train_y[index])


def _measure(result: Run, contender: Contender, problem: Problem, data: Data, steps: int, seconds: float) -> float:
    """Append a point to the curves, computed in NumPy and float64 for every contender, and return the training loss."""
    weights = {name: {role: w.astype(np.float64) for role, w in own.items()} for name, own in contender.weights().items()}
    network = problem.network
    with np.errstate(all="ignore"):
        inputs, targets = data.measured
        loss = float(network.loss.value(np, network.outputs(np, weights, inputs), targets))
        score = problem.score(network.outputs(np, weights, data.test_x), data.test_y)
    for curve, value in ((result.steps, steps), (result.seconds, seconds), (result.losses, loss), (result.scores, score)):
        curve.append(value)
    return loss
