"""The claims of the EKFAC paper on its autoencoder: loss against epochs and against seconds, every optimizer at the best of a grid.

George et al. 2018, section 4: 784-1000-500-250-30 and its mirror image, sigmoid units, minibatches of 200, eigenbases and inverses anew
every 50 steps. Here on MNIST-5k in PyTorch, float32, one thread; seconds are of processor time, of the steps alone. Every optimizer is
tried at nine settings on seed 0, and that of the lowest training loss runs on seeds 1 to 3. Contenders that only refresh more often, or
find their bases in another way, take the settings of their like. What is found goes into the file of ``--out`` at once and is not done
again.

    python tests/benchmarks/ekfac_paper.py --out FILE.json [--quick] [--draw PICTURE.png]
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import options, write
from tuned_training import train

import kfcore as kf
from kfcore_cli.race.interfaces import Weights
from kfcore_cli.race.network import Network, mlp
from kfcore_cli.race.problems.mnist_autoencoder import MNISTAutoencoder
from kfcore_torch import Optimizer

EPOCH = 20
"""Steps: 4,000 images."""
EPOCHS, TUNED = (84, 12), (20, 5)
"""Epochs of a run, and of one of the grid: without and with curvature, for about as many seconds."""
CURVATURE = {"clip": (1e-4, 1e-3, 1e-2), "damping": (1e-4, 1e-3, 1e-2)}
"""The rate is that of the race, 0.3 for KFAC and EKFAC alike: while the clip holds it does not matter."""
SHOWN = ("sgd", "adam", "kfac-50", "exact-50", "ekfac-50", "ra-50")
"""In the picture, with the colours of the race's."""


class Sigmoid(Network):
    """Begun with four times the weights of a tanh network (Glorot and Bengio 2010): with less SGD and Adam stay at the mean image."""

    def init(self, seed: int) -> Weights:
        """Initial weights, the same for every contender."""
        made = super().init(seed)
        return {name: {role: 4.0 * w if role == "weight" else w for role, w in own.items()} for name, own in made.items()}


class PaperAutoencoder(MNISTAutoencoder):
    """The paper's sizes and units; the code is linear, the loss the binary cross-entropy a pixel."""

    network = Sigmoid(*vars(mlp((784, 1000, 500, 250, 30, 250, 500, 1000, 784), "sigmoid", "binary cross-entropy", (4,))).values())
    batch_size = 200


@dataclass(frozen=True)
class Contender:
    """An optimizer of a module at a point of a grid."""

    title: str
    make: Callable[..., torch.optim.Optimizer]
    grid: Mapping[str, tuple[float, ...]]
    epochs: int
    tuned: int = 0
    like: str | None = None
    """Whose best settings it takes, in place of a grid of its own."""
    seeds: tuple[int, ...] = (1, 2, 3)

    def points(self) -> Iterator[dict[str, float]]:
        """Settings to try."""
        return (dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values()))


def sgd(module: torch.nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum)


def adam(module: torch.nn.Module, lr: float, beta1: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=lr, betas=(beta1, 0.999))


def curvature(title: str, method: Callable[..., kf.Method], every: int, like: str | None = None, **more: Any) -> Contender:
    """A method of kfcore with statistics at every step and the rate and the momentum of the race."""

    def make(module: torch.nn.Module, clip: float, damping: float) -> torch.optim.Optimizer:
        made, loss = method(damping=damping, refresh_every=every, **more), PROBLEM.network.loss.curvature()
        return Optimizer(module, made, lr=0.3, momentum=0.9, clip=clip, loss=loss)

    if every == 1:
        return Contender(title, make, {}, TUNED[1], like=like, seeds=(1,))
    return Contender(title, make, CURVATURE, EPOCHS[1], TUNED[1], like)


def exact(damping: float, **more: Any) -> kf.Method:
    return kf.KFAC(damping=kf.Damping(damping, kind="exact"), **more)


PROBLEM = PaperAutoencoder()
DATA = PROBLEM.load()
CONTENDERS = {
    "kfac-50": curvature("KFAC", kf.KFAC, 50),
    "ekfac-50": curvature("EKFAC", kf.EKFAC, 50),
    "adam": Contender("Adam", adam, {"lr": (3e-4, 1e-3, 3e-3), "beta1": (0.8, 0.9, 0.95)}, EPOCHS[0], TUNED[0]),
    "sgd": Contender("SGD", sgd, {"lr": (1.0, 3.0, 10.0), "momentum": (0.8, 0.9, 0.95)}, EPOCHS[0], TUNED[0]),
    "ekfac-10": curvature("EKFAC", kf.EKFAC, 10, "ekfac-50"),
    "tracked-10": curvature("EKFAC, Tracked", kf.EKFAC, 10, "ekfac-50", basis=kf.Tracked()),
    "kfac-10": curvature("KFAC", kf.KFAC, 10, "kfac-50"),
    "ra-50": curvature("EKFAC-ra", kf.EKFAC, 50, scales="gradient"),
    "exact-50": curvature("KFAC, exact damping", exact, 50),
    "kfac-1": curvature("KFAC", kf.KFAC, 1, "kfac-50"),
    "ekfac-1": curvature("EKFAC", kf.EKFAC, 1, "ekfac-50"),
}


class Notes:
    """Curves by what was run, in a file from the start."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.found: dict[str, Any] = json.loads(out.read_text()) if out and out.exists() else {}

    def curve(self, name: str, point: Mapping[str, float], seed: int, epochs: int) -> list[dict[str, float]]:
        """That of a run, made now if it was not before."""
        key = f"{name} {json.dumps(point)} seed {seed} epochs {epochs}"
        if key not in self.found:
            make = partial(CONTENDERS[name].make, **point)
            self.found[key] = train(PROBLEM, DATA, make, seed, epochs * EPOCH, EPOCH)
            write(self.out, self.found)
            last = self.found[key][-1]
            print(f"  {key}: {last['loss']:.4f} after {last['seconds']:.1f} s", flush=True)
        return self.found[key]


def best(notes: Notes, name: str, cut: int) -> dict[str, float]:
    """The settings of lowest training loss in the grid."""
    found = CONTENDERS[name]
    if found.like:
        return best(notes, found.like, cut)
    return min(found.points(), key=lambda point: notes.curve(name, point, 0, max(1, found.tuned // cut))[-1]["loss"])


def middle(curves: list[list[dict[str, float]]], what: str) -> np.ndarray:
    """Median over the seeds at every epoch."""
    return np.median([[point[what] for point in curve] for curve in curves], axis=0)


def row(name: str, point: dict[str, float], curves: list[list[dict[str, float]]]) -> str:
    """Losses after as many epochs as methods of curvature make, and after all of a longer run."""
    found = f"{name:12} {point!s:34}"
    for epochs in dict.fromkeys((min(EPOCHS[1], len(curves[0])), len(curves[0]))):
        losses, scores, seconds = ([curve[epochs - 1][what] for curve in curves] for what in ("loss", "score", "seconds"))
        found += f"  {epochs:3} epochs {statistics.median(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
        found += f" test {statistics.median(scores):.4f} {statistics.median(seconds):6.1f} s"
    return found


def draw(path: Path, curves: Mapping[str, list[list[dict[str, float]]]]) -> None:
    """Training loss against epochs and against seconds: the median over the seeds, and their range."""
    from matplotlib.figure import Figure

    from kfcore_cli.race.picture import COLOURS

    figure = Figure(figsize=(10.5, 4.4), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, colour in zip(SHOWN, COLOURS, strict=False):
        if name not in curves:
            continue
        losses, seconds = middle(curves[name], "loss"), middle(curves[name], "seconds")
        every = np.array([[point["loss"] for point in curve] for curve in curves[name]])
        for axis, at in zip(axes, (np.arange(1, len(losses) + 1), seconds), strict=True):
            axis.plot(at, losses, color=colour, linewidth=1.8, label=CONTENDERS[name].title)
            axis.fill_between(at, every.min(axis=0), every.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    longest = max(float(middle(curves[name], "seconds")[-1]) for name in SHOWN if name in curves)
    for axis, label, end in zip(axes, ("epochs", "seconds of processor time"), (EPOCHS[1], longest), strict=True):
        axis.set(yscale="log", xlabel=label, xlim=(0, end))
        axis.grid(True, color="0.92", which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("training loss (binary cross-entropy a pixel)")
    axes[1].legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    given = options(__doc__, draw="")
    torch.set_num_threads(1)
    cut, notes = 10 if given.quick else 1, Notes(given.out)
    curves: dict[str, list[list[dict[str, float]]]] = {}
    for name, contender in CONTENDERS.items():
        point = best(notes, name, cut)
        curves[name] = [notes.curve(name, point, seed, max(1, contender.epochs // cut)) for seed in contender.seeds]
        print(row(name, point, curves[name]), flush=True)
    if given.draw:
        draw(Path(given.draw), curves)


if __name__ == "__main__":
    main()
