"""Networks whose derivatives can be propagated: chains of dense layers and elementwise activations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kfcore._array import Array, namespace
from kfcore.layers import Linear
from kfcore.taylor.activations import Activation, activation

Step: TypeAlias = tuple[str, Linear] | Activation


@dataclass(frozen=True)
class Sequential:
    """A chain of dense layers and activations.

    Parameters
    ----------
    steps
        In their order: a pair of a name and a :class:`kfcore.Linear`, or an activation (one of
        :data:`kfcore.taylor.ACTIVATIONS` by its name, or an :class:`Activation`).

    Examples
    --------
    >>> Sequential([("fc1", Linear(2, 16)), "tanh", ("fc2", Linear(16, 1))]) == Sequential.mlp((2, 16, 1))
    True

    """

    steps: Sequence[Any]

    def __post_init__(self) -> None:
        steps = tuple(_step(step) for step in self.steps)
        object.__setattr__(self, "steps", steps)
        names = [step[0] for step in steps if not isinstance(step, Activation)]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"`steps` of Sequential must hold dense layers of different names, got {names!r}")
        for (name, layer), (other, following) in itertools.pairwise(self.layers.items()):
            if layer.out_features != following.in_features:
                raise ValueError(
                    f"`steps` of Sequential must fit together, got {layer.out_features} outputs of {name!r} for {following.in_features} "
                    f"inputs of {other!r}"
                )
            if layer.stack != following.stack:
                raise ValueError(
                    f"`stack` of all layers must be the same, got {layer.stack} of {name!r} and {following.stack} of {other!r}"
                )

    @classmethod
    def mlp(cls, sizes: Sequence[int], activation: str | Activation = "tanh", **options: Any) -> Sequential:
        """Layers ``fc1``, ``fc2``, ... between so many features, an activation behind each but the last; ``options`` of every Linear."""
        layers = [(f"fc{i}", Linear(a, b, **options)) for i, (a, b) in enumerate(itertools.pairwise(sizes), start=1)]
        return cls([step for layer in layers for step in (layer, activation)][:-1])

    @property
    def layers(self) -> dict[str, Linear]:
        """The dense layers by name, as :class:`kfcore.Optimizer` takes them."""
        return {step[0]: step[1] for step in self.steps if not isinstance(step, Activation)}

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of independent networks."""
        return next(iter(self.layers.values())).stack

    @property
    def inputs(self) -> int:
        """Features at the beginning."""
        return next(iter(self.layers.values())).in_features

    @property
    def outputs(self) -> int:
        """Features at the end."""
        return list(self.layers.values())[-1].out_features

    def check(self, params: Mapping[str, Mapping[str, Array]], x: Array) -> None:
        """Raise unless ``params`` are those of the layers and ``x [*stack, N, d]`` fits them, in one dtype."""
        lead = len(self.stack)
        if x.ndim != lead + 2 or tuple(x.shape[:lead]) != self.stack or x.shape[-1] != self.inputs:
            axes = "".join(f"{n}, " for n in self.stack)
            raise ValueError(f"`x` must have shape [{axes}N, {self.inputs}], got {tuple(x.shape)}")
        for name, layer in self.layers.items():
            given = {role: tuple(p.shape) for role, p in params.get(name, {}).items()}
            if given != layer.parameters:
                raise ValueError(f"`params` of layer {name!r} must have the shapes {layer.parameters}, got {given}")
            for role, p in params[name].items():
                namespace(x, p)
                if p.dtype != x.dtype:
                    raise TypeError(f"`x` must have the dtype of the parameters, got {x.dtype} and {p.dtype} of {role} of {name!r}")


def _step(step: object) -> Step:
    if isinstance(step, str | Activation):
        return activation(step)
    if isinstance(step, Sequence) and len(step) == 2 and isinstance(step[0], str) and isinstance(step[1], Linear):
        return step[0], step[1]
    raise TypeError(
        "`steps` of Sequential must be pairs of a name and a kfcore.Linear, or activations; derivatives go through no other layers, got "
        f"{step!r}"
    )
