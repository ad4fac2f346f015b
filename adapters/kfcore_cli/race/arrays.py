"""A contender over the Python array API: the hand-written backward pass and three optimizers in a few lines each.

Nothing is written in place, so that any array library can use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

import kfcore
from kfcore_cli.race import rules
from kfcore_cli.race.batches import as_array
from kfcore_cli.race.interfaces import Array, Weights
from kfcore_cli.race.network import Network

Params = Mapping[str, Mapping[str, Array]]


class Update(Protocol):
    """How gradients change weights."""

    state: Any
    """Nest of arrays."""

    def observe(self, name: str, inputs: Array, output_grads: Array) -> None:
        """See what a layer saw in the backward pass."""
        ...

    def __call__(self, params: Params, grads: Params, terms: float) -> Params:
        """New weights."""
        ...


class ArrayContender:
    """A network in training in the namespace ``xp``.

    Parameters
    ----------
    xp, network, weights, rule, dtype
        See :class:`kfcore_cli.race.interfaces.Backend`.
    to_host
        Turns an array into a NumPy array.
    wait
        Returns when the device has done all its work.
    """

    def __init__(
        self,
        xp: Any,
        network: Network,
        weights: Weights,
        rule: rules.Rule,
        dtype: str,
        *,
        to_host: Callable[[Array], np.ndarray] = np.array,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.xp, self.network, self.to_host, self.wait = xp, network, to_host, wait
        self.dtype = getattr(xp, dtype)
        self.params: Params = _map(lambda w: xp.asarray(w, dtype=self.dtype), weights)
        self.update = _update(xp, network, self.params, rule)

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """One step on a minibatch."""
        xp = self.xp
        inputs, targets = as_array(xp, x, self.dtype), as_array(xp, y, self.dtype)
        grads = self.network.gradients(xp, self.params, inputs, targets, self.update.observe)
        self.params = self.update(self.params, grads, float(math.prod(y.shape)))
        self.wait()

    def weights(self) -> Weights:
        """Copy of the weights on the host."""
        return _map(self.to_host, self.params)

    def state_bytes(self) -> int:
        """Bytes in all arrays of the state."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in _leaves(self.update.state))


class _Plain:
    """An optimizer that sees gradients only."""

    def observe(self, name: str, inputs: Array, output_grads: Array) -> None:
        pass


class _SGD(_Plain):
    def __init__(self, rule: rules.SGD, params: Params) -> None:
        self.rule, self.state = rule, None

    def __call__(self, params: Params, grads: Params, terms: float) -> Params:
        mu = self.rule.momentum
        self.state = grads if self.state is None else _map(lambda b, g: mu * b + g, self.state, grads)
        return _map(lambda w, b: w - self.rule.lr * b, params, self.state)


class _Adam(_Plain):
    def __init__(self, xp: Any, rule: rules.Adam, params: Params) -> None:
        self.xp, self.rule, self.count = xp, rule, 0
        self.state = (_map(xp.zeros_like, params), _map(xp.zeros_like, params))

    def __call__(self, params: Params, grads: Params, terms: float) -> Params:
        xp, rule = self.xp, self.rule
        self.count += 1
        first = _map(lambda m, g: m + (1.0 - rule.beta1) * (g - m), self.state[0], grads)
        second = _map(lambda v, g: rule.beta2 * v + (1.0 - rule.beta2) * (g * g), self.state[1], grads)
        self.state = (first, second)
        rate = rule.lr / (1.0 - rule.beta1**self.count)
        root = math.sqrt(1.0 - rule.beta2**self.count)
        return _map(lambda w, m, v: w - rate * (m / (xp.sqrt(v) / root + rule.eps)), params, first, second)


class _Curvature:
    def __init__(self, xp: Any, network: Network, rule: rules.Curvature, params: Params) -> None:
        described = network.curvature()
        optimizer = kfcore.Optimizer(rule.method, described, learning_rate=rule.lr, momentum=rule.momentum, clip=rule.clip)
        self.recorder = kfcore.Recorder(optimizer, params)
        self.xp, self.layers = xp, {layer.name: layer for layer in network.layers if layer.name in described}

    @property
    def state(self) -> Any:
        return self.recorder.state

    def observe(self, name: str, inputs: Array, output_grads: Array) -> None:
        layer = self.layers.get(name)
        if layer is not None:
            seen = layer.captured(self.xp, inputs) if hasattr(layer, "captured") else inputs
            self.recorder.record(name, seen, output_grads)

    def __call__(self, params: Params, grads: Params, terms: float) -> Params:
        return self.recorder.step(params, grads, terms=terms)


def _update(xp: Any, network: Network, params: Params, rule: rules.Rule) -> Update:
    if isinstance(rule, rules.SGD):
        return _SGD(rule, params)
    return _Adam(xp, rule, params) if isinstance(rule, rules.Adam) else _Curvature(xp, network, rule, params)


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    """``function`` of the leaves of nested dictionaries with equal keys."""
    if isinstance(trees[0], Mapping):
        return {key: _map(function, *(tree[key] for tree in trees)) for key in trees[0]}
    return function(*trees)


def _leaves(tree: Any) -> list[Array]:
    """All arrays in a nest of dictionaries and tuples."""
    if tree is None:
        return []
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple) else None
    return [tree] if parts is None else [leaf for part in parts for leaf in _leaves(part)]
