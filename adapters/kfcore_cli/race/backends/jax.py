"""JAX: one compiled step, gradients by autodiff of the layers' own ``forward``, and the optimizers of optax and kfcore's adapter.

The file's name hides nothing: ``import jax`` is absolute, and finds the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import kfcore
from kfcore_cli.errors import UsageError, missing
from kfcore_cli.race import rules
from kfcore_cli.race.batches import as_array
from kfcore_cli.race.interfaces import Array, Layer, Weights
from kfcore_cli.race.losses import Kind
from kfcore_cli.race.network import Network

try:
    import jax
    import jax.numpy as jnp
    import optax
except ModuleNotFoundError as error:
    raise missing("--backends jax", error.name or "jax", "pip install 'kfcore[jax]'") from error

try:
    from jax import enable_x64
except ImportError:  # JAX 0.6 has it there only
    from jax.experimental import enable_x64

import kfcore_jax

LOSSES: dict[Kind, Callable[[Array, Array], Array]] = {
    "cross-entropy": lambda z, y: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, y)),
    "squared error": lambda z, y: jnp.mean(optax.squared_error(z, y)),
    "binary cross-entropy": lambda z, y: jnp.mean(optax.sigmoid_binary_cross_entropy(z, y)),
}


class JAX:
    """Everything JAX's own way, on its default device."""

    packages = ("jax", "optax")

    def __init__(self) -> None:
        self._program: Program | None = None

    def contender(self, network: Network, weights: Weights, rule: rules.Rule, dtype: str) -> JAXContender:
        """A tree of weights ``[out, in]`` by layer name and role; contenders of one kind that follow each other share their program."""
        known = self._program
        if known is None or not (known.network is network and known.rule is rule and known.dtype == dtype):
            self._program = known = Program(network, rule, dtype)
        return JAXContender(known, weights)


class Program:
    """What is compiled: made once, so that what a contender for warming up has compiled serves the one that is timed.

    JAX computes in float32 unless told otherwise, and says which for a whole process; :meth:`precision` is entered around every call
    instead, so that contenders of either dtype, and whatever else uses JAX in the process, do not disturb each other.
    """

    def __init__(self, network: Network, rule: rules.Rule, dtype: str) -> None:
        self.network, self.rule, self.dtype = network, rule, dtype
        self.model: kfcore_jax.Model | None = None
        self.optimizer: Any = None
        self.init: Any = None
        self.step = jax.jit(self._step, donate_argnums=(0, 1))

    def precision(self) -> Any:
        """Context in which arrays may, or may not, be float64."""
        return enable_x64(self.dtype == "float64")

    def begin(self, params: Any, x: Array, y: Array) -> Any:
        """First state of the optimizer; for the program's first contender the optimizer is made before, which takes a minibatch."""
        if self.optimizer is None:
            self.optimizer = self._optimizer(params, x, y)
            self.init = jax.jit(self.optimizer.init)
        return self.init(params)

    def outputs(self, params: Any, x: Array) -> Array:
        """The network's outputs, by the portable code of its layers."""

        def apply(layer: Layer, x: Array) -> Array:
            try:
                own = params.get(layer.name, {})
                return layer.jax_forward(own, x) if hasattr(layer, "jax_forward") else layer.forward(jnp, own, x)  # pyright: ignore
            except (TypeError, AttributeError, IndexError) as error:
                kind, reason = type(layer).__name__, str(error).partition("\n")[0]
                raise UsageError(
                    f"--backends jax cannot trace the layer {kind}, whose `forward` must do with the namespace it is given and write "
                    f"nothing in place ({type(error).__name__}: {reason}): mend it, or leave jax out"
                ) from error

        return self.network.through(apply, x)[-1]

    def loss(self, params: Any, x: Array, y: Array) -> Array:
        """The loss of a minibatch."""
        return LOSSES[self.network.loss.kind](self.outputs(params, x), y)

    def _step(self, params: Any, state: Any, x: Array, y: Array) -> tuple[Any, Any]:
        if self.model is None:
            updates, state = self.optimizer.update(jax.grad(self.loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state
        _, grads, records = self.model.value_grad_and_records(params, x, y)
        method = self.rule.method
        if method.fisher in ("mc", "exact"):
            key = jax.random.fold_in(jax.random.key(0), state.curvature.steps)
            records = self.model.fisher_records(self.outputs, method, self.network.loss.curvature(), params, x, targets=y, key=key)
        updates, state = self.optimizer.update(grads, state, params, records=records)
        return optax.apply_updates(params, updates), state

    def _optimizer(self, params: Any, x: Array, y: Array) -> optax.GradientTransformation:
        rule = self.rule
        if isinstance(rule, rules.SGD):
            return optax.sgd(rule.lr, momentum=rule.momentum)
        if isinstance(rule, rules.Adam):
            return optax.adam(rule.lr, b1=rule.beta1, b2=rule.beta2, eps=rule.eps)
        self.model = kfcore_jax.trace(self.loss, params, x, y, loss=self.network.loss.curvature())
        _check(self.network, self.model)
        return kfcore_jax.optimizer(rule.method, self.model, learning_rate=rule.lr, momentum=rule.momentum, clip=rule.clip)


class JAXContender:
    """A tree of weights in training."""

    def __init__(self, program: Program, weights: Weights) -> None:
        self.program, self.state = program, None
        with program.precision():
            self.params = jax.tree.map(lambda w: jnp.array(w, dtype=program.dtype), weights)

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """The compiled step; weights and state are written over the last ones."""
        program = self.program
        with program.precision():
            inputs, targets = as_array(jnp, x, program.dtype), as_array(jnp, y, program.dtype)
            if self.state is None:
                self.state = program.begin(self.params, inputs, targets)
            self.params, self.state = jax.block_until_ready(program.step(self.params, self.state, inputs, targets))

    def weights(self) -> Weights:
        """Copy of the weights on the host."""
        return jax.tree.map(np.array, self.params)

    def state_bytes(self) -> int:
        """Bytes in all arrays of the optimizer's state."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.state))


def _check(network: Network, model: kfcore_jax.Model) -> None:
    """Refuse a layer that says of itself something else than what was found in its program, however its weight is stored."""
    own = network.curvature()
    for name in own | model.layers:
        found, described = model.layers.get(name), own.get(name)
        if isinstance(found, kfcore.Linear) and isinstance(described, kfcore.Linear):
            found = replace(found, layout=described.layout)
        if isinstance(found, kfcore.Conv) and isinstance(described, kfcore.Conv):
            found = replace(found, layout=described.layout, channels=described.channels)
        if found != described:
            raise UsageError(
                f"--backends jax finds {found or 'nothing that kfcore knows'} in the layer {name}, whose `curvature()` says "
                f"{described}: make the two agree, or leave jax out"
            )


backend = JAX()
