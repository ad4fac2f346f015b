"""The training loss around the parameters, as a rule with a quadratic model asks for it: see :class:`kfcore.Objective`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfcore._array import factor_dtype
from kfcore.optimizer import added
from kfcore_jax.layout import Layout, leaves_of, path_of

Predict = Callable[[Any], Any]
LossFunction = Callable[[Any], jax.Array]


class Objective:
    """The loss of a batch, ``loss_fn(predict(params))``, around ``params``.

    Parameters
    ----------
    predict
        The network on the batch: parameters -> outputs, an array or a tree of arrays of real floating point.
    loss_fn
        Outputs -> the scalar loss.
    layout, params
        Of the model, all of it.
    across
        What becomes of an array of this part of the batch in all of them.
    """

    def __init__(
        self, predict: Predict, loss_fn: LossFunction, layout: Layout, params: Any, across: Callable[[jax.Array], jax.Array]
    ) -> None:
        self._predict, self._loss_fn, self._layout, self._params, self._across = predict, loss_fn, layout, params, across
        self._trained = {path: x for path, x in leaves_of(params).items() if path in layout.places}

    def gram(self, vectors: Sequence[Mapping[str, jax.Array]]) -> jax.Array:
        """``J`` applied to each vector in forward mode, and the Hessian of the loss with respect to the outputs between the results."""
        outputs, push = jax.linearize(self._outputs_of, self._trained)
        for x in jax.tree.leaves(outputs):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise TypeError(f"`predict` must give arrays of real floating point, got {x.dtype}")
        along = [push(self._tangent(v)) for v in vectors]
        curved = [jax.jvp(jax.grad(self._scalar), (outputs,), (u,))[1] for u in along]
        return self._across(jnp.stack([jnp.stack([_inner(u, h) for h in curved]) for u in along]))

    def loss(self, update: Mapping[str, jax.Array] | None) -> jax.Array:
        """At what the optimizer would make of the parameters."""
        places = self._layout.places
        moved = {path: x if update is None else added(x, places[path].back(update[places[path].name])) for path, x in self._trained.items()}
        return self._across(self._scalar(self._outputs_of(moved)))

    def _outputs_of(self, trained: Mapping[str, jax.Array]) -> Any:
        return self._predict(jax.tree_util.tree_map_with_path(lambda keys, x: trained.get(path_of(keys), x), self._params))

    def _scalar(self, outputs: Any) -> jax.Array:
        value = self._loss_fn(outputs)
        if jnp.shape(value) != ():
            raise ValueError(f"`loss_fn` must give a scalar, got an array of shape {jnp.shape(value)}")
        return value

    def _tangent(self, vector: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """A vector as the user has the parameters, in their dtypes."""
        places = self._layout.places
        return {path: places[path].back(vector[places[path].name]).astype(x.dtype) for path, x in self._trained.items()}


def _inner(one: Any, other: Any) -> jax.Array:
    """``<one, other>`` over all leaves, in float32 at least."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    wide = [(x.astype(factor_dtype(jnp, x.dtype)), y.astype(factor_dtype(jnp, y.dtype))) for x, y in pairs]
    return sum((jnp.sum(x * y) for x, y in wide), jnp.zeros((), wide[0][0].dtype))
