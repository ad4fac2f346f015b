"""What a problem, a method, a backend and the layers of a network must offer; everything else follows from these.

To add one, put a module into ``problems/``, ``methods/`` or ``backends/`` that exposes ``problem``, ``method`` or ``backend``. Nothing else
changes: modules are found by their file names, and only those named on the command line are imported. A module whose package may be
missing raises :func:`kfcore_cli.errors.missing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from kfcore_cli.race.network import Network
    from kfcore_cli.race.rules import Rule

Array = Any
Weights = dict[str, dict[str, np.ndarray]]
"""By layer name the parameters by role, such as ``{"weight": [out, in], "bias": [out]}``."""
Settings = Mapping[str, Any]
"""Hyper-parameters of a method by name."""


@dataclass(frozen=True)
class Data:
    """NumPy arrays: inputs, numbers ``[N, features]`` or ids ``[N, T]``, and targets, labels ``[N, ...]`` or numbers ``[N, outputs]``."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    probe: np.ndarray | None = None
    """Rows of a training part too large to be measured as a whole; the training loss is that of these."""

    @property
    def measured(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets whose loss is the training loss."""
        rows = slice(None) if self.probe is None else self.probe
        return self.train_x[rows], self.train_y[rows]


class Problem(Protocol):
    """Real data, a network for it, and what counts as having learned it."""

    title: str
    """Honest name of the data."""
    network: Network
    batch_size: int
    steps: int
    """Default length of a race."""
    target: float
    """Training loss whose reaching is timed."""
    metric: str
    """What :meth:`score` measures, such as ``"test accuracy"``."""
    settings: Mapping[str, Settings]
    """Tuned hyper-parameters by method name."""

    def load(self) -> Data:
        """The data, always split in the same way."""
        ...

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """The metric of the network's outputs on the test part."""
        ...


class Method(Protocol):
    """An optimizer. A problem's own settings for it come first, then those it brings for a problem, then its default."""

    title: str
    default: Settings
    settings: Mapping[str, Settings]
    """By problem name; for methods that were added after a problem."""

    def rule(self, settings: Settings) -> Rule:
        """The optimizer in the vocabulary that all backends understand."""
        ...


class Contender(Protocol):
    """A network in training."""

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """Make one step on a minibatch; return when its work is done, on whatever device."""
        ...

    def weights(self) -> Weights:
        """Copy of the current weights."""
        ...

    def state_bytes(self) -> int:
        """Size of the optimizer's state, the weights not counted."""
        ...


class Backend(Protocol):
    """An array library or framework."""

    packages: tuple[str, ...]
    """Distributions whose versions belong into the record of a race."""

    def contender(self, network: Network, weights: Weights, rule: Rule, dtype: str) -> Contender:
        """A network with these initial weights, to be trained by ``rule`` in ``dtype``."""
        ...


class Layer(Protocol):
    """One layer of a network in portable array code, ``xp`` being its namespace.

    It may have ``torch_module()``, which the torch backend needs of kinds it does not know; ``jax_forward(params, x)``, which the JAX
    backend takes in place of ``forward`` where JAX has an operation of its own for the layer; and ``captured(xp, x)``, what kfcore takes
    for the layer's input where that is not ``x``.
    """

    name: str | None
    """``None`` for a layer without parameters."""

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Initial parameters by role."""
        ...

    def forward(self, xp: Any, params: Mapping[str, Array], x: Array) -> Array:
        """Output from input."""
        ...

    def backward(self, xp: Any, params: Mapping[str, Array], x: Array, y: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """Gradient at the input, and gradients of the parameters, from the input, the output and the gradient at the output."""
        ...

    def curvature(self) -> Any:
        """Its description in kfcore, such as ``kfcore.Linear``; ``None`` without parameters, or where they get the fallback."""
        ...
