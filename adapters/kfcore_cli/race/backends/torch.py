"""PyTorch on the CPU: modules, autograd, and the optimizers of ``torch.optim`` and kfcore's adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kfcore_cli.errors import UsageError, missing
from kfcore_cli.race import rules
from kfcore_cli.race.interfaces import Layer, Weights
from kfcore_cli.race.layers import Activation, Dense
from kfcore_cli.race.losses import Kind
from kfcore_cli.race.network import Network, Skip

try:
    import torch
except ModuleNotFoundError as error:
    raise missing("--backends torch", "torch", "pip install 'kfcore[torch]'") from error

import kfcore_torch

ACTIVATIONS = {"tanh": torch.nn.Tanh, "sigmoid": torch.nn.Sigmoid, "relu": torch.nn.ReLU}
LOSSES: dict[Kind, Callable[..., torch.Tensor]] = {
    "cross-entropy": lambda z, y: torch.nn.functional.cross_entropy(z.flatten(0, -2), y.flatten()),
    "squared error": torch.nn.functional.mse_loss,
    "binary cross-entropy": torch.nn.functional.binary_cross_entropy_with_logits,
}


class Torch:
    """Everything PyTorch's own way."""

    packages = ("torch",)

    def contender(self, network: Network, weights: Weights, rule: rules.Rule, dtype: str) -> TorchContender:
        """A module for each layer, of its name."""
        return TorchContender(network, weights, rule, dtype)


class Chain(torch.nn.Sequential):
    """The modules of a network's layers, connected as the network says."""

    def __init__(self, network: Network, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        for number, layer in enumerate(network.layers):
            if not isinstance(layer, Skip):
                self.add_module(layer.name or f"activation{number}", _module(layer, dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The network's outputs."""
        modules = iter(self)
        return self.network.through(lambda _, x: next(modules)(x), x)[-1]


class TorchContender:
    """A module in training."""

    def __init__(self, network: Network, weights: Weights, rule: rules.Rule, dtype: str) -> None:
        self.dtype = getattr(torch, dtype)
        self.module = Chain(network, self.dtype)
        self.module.load_state_dict({f"{name}.{role}": torch.tensor(w) for name, own in weights.items() for role, w in own.items()})
        self.layers = tuple(weights)
        self.loss = LOSSES[network.loss.kind]
        self.optimizer = _optimizer(self.module, network, rule)

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """The usual four lines."""
        loss = self.loss(self.module(self.tensor(x)), self.tensor(y))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def tensor(self, x: np.ndarray) -> torch.Tensor:
        """Inputs or targets: numbers in the dtype of the module, integers as they are."""
        found = torch.from_numpy(x)
        return found.to(self.dtype) if found.is_floating_point() else found

    def weights(self) -> Weights:
        """Copy of the module's parameters."""
        modules = dict(self.module.named_children())
        return {name: {role: p.detach().numpy().copy() for role, p in modules[name].named_parameters()} for name in self.layers}

    def state_bytes(self) -> int:
        """Bytes in all tensors of the optimizer's state."""
        curvature = isinstance(self.optimizer, kfcore_torch.Optimizer)
        return _bytes(self.optimizer.engine.state if curvature else self.optimizer.state_dict()["state"])


def _module(layer: Layer, dtype: torch.dtype) -> torch.nn.Module:
    if isinstance(layer, Dense):
        return torch.nn.Linear(layer.in_features, layer.out_features, dtype=dtype)
    if isinstance(layer, Activation):
        return ACTIVATIONS[layer.kind]()
    if not hasattr(layer, "torch_module"):
        raise UsageError(
            f"--backends torch has no layer {type(layer).__name__}: give that layer a method `torch_module()`, or leave torch out"
        )
    return layer.torch_module().to(dtype)


def _optimizer(module: torch.nn.Module, network: Network, rule: rules.Rule) -> torch.optim.Optimizer:
    if isinstance(rule, rules.SGD):
        return torch.optim.SGD(module.parameters(), lr=rule.lr, momentum=rule.momentum)
    if isinstance(rule, rules.Adam):
        return torch.optim.Adam(module.parameters(), lr=rule.lr, betas=(rule.beta1, rule.beta2), eps=rule.eps)
    return kfcore_torch.Optimizer(module, rule.method, lr=rule.lr, momentum=rule.momentum, clip=rule.clip, loss=network.loss.curvature())


def _bytes(tree: Any) -> int:
    """Bytes in the tensors of a nest of dictionaries and sequences."""
    if isinstance(tree, torch.Tensor):
        return math.prod(tree.shape) * tree.element_size()
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(_bytes(part) for part in parts)


backend = Torch()
