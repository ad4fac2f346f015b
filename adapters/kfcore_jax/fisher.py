"""Fisher types other than the empirical one: vectors of the loss at the outputs of a network, to be pulled back through it."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from kfcore import Loss, Method, fisher_vectors


def vectors_of(
    method: Method, loss: Loss, outputs: jax.Array, targets: jax.Array | None, key: jax.Array | None = None, mask: jax.Array | None = None
) -> tuple[jax.Array, float | jax.Array]:
    """All vectors ``[K, *outputs.shape]`` and the terms of the loss, without those that ``mask [N, S]`` hides if outputs have its axes."""
    terms = loss.terms(outputs, targets)
    if method.fisher == "mc":
        assert key is not None
        sample = lambda key: loss.sample(outputs, targets, _Draw(key, outputs.dtype))  # noqa: E731
        vectors = jax.vmap(sample)(jax.random.split(key, method.mc_samples))
    else:
        columns = list(fisher_vectors("exact", loss, outputs, targets))
        if not columns:
            raise ValueError("`loss` has no columns for these outputs: there are no vectors to pull back")
        vectors = jnp.stack(columns)
    if mask is not None and outputs.shape[:2] == mask.shape:
        real = mask.reshape(*mask.shape, *(1,) * (outputs.ndim - 2))
        vectors = jnp.where(real, vectors, 0)
        terms = jnp.sum(mask) * (terms / mask.size) if isinstance(terms, float) else terms
    return vectors.astype(outputs.dtype), terms


class _Draw:
    """Random numbers from a key that is split anew for every call."""

    def __init__(self, key: jax.Array, dtype: Any) -> None:
        self.key, self.dtype = key, jnp.float64 if dtype == jnp.float64 else jnp.float32

    def __call__(self, kind: Literal["uniform", "normal"], shape: tuple[int, ...]) -> jax.Array:
        self.key, own = jax.random.split(self.key)
        return (jax.random.uniform if kind == "uniform" else jax.random.normal)(own, shape, self.dtype)
