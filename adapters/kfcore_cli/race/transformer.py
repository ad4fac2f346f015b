"""Layers of a causal transformer on tokens, and the network made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import kfcore
from kfcore_cli.errors import missing
from kfcore_cli.race.interfaces import Array
from kfcore_cli.race.layers import Dense
from kfcore_cli.race.losses import Loss
from kfcore_cli.race.network import Network, residual

try:
    from scipy.special import erf
except ModuleNotFoundError as error:
    raise missing("the GELU of a transformer", "scipy", "pip install 'kfcore[cli]'") from error

SPREAD = 0.02
"""Standard deviation of both tables at the start, as in GPT-2 (Radford et al. 2019)."""


@dataclass(frozen=True)
class Embedding:
    """Rows of a table, ``y = table[x]`` for ids ``x``."""

    name: str
    num: int
    features: int

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Table ``[num, features]``."""
        return {"weight": rng.normal(0.0, SPREAD, (self.num, self.features))}

    def forward(self, xp: Any, params: Mapping[str, Array], x: Array) -> Array:
        """Ids ``[N, T]`` to ``[N, T, features]``."""
        return xp.reshape(xp.take(params["weight"], xp.reshape(x, (-1,)), axis=0), (*x.shape, self.features))

    def backward(self, xp: Any, params: Mapping[str, Array], x: Array, y: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """No gradient at the ids, and that of the table: sums by id, as a product with one-hot rows."""
        one_hot = xp.astype(xp.reshape(x, (-1, 1)) == xp.arange(self.num, dtype=x.dtype), dy.dtype)
        return None, {"weight": one_hot.T @ xp.reshape(dy, (-1, self.features))}

    def curvature(self) -> kfcore.Embedding:
        """As kfcore knows it."""
        return kfcore.Embedding(self.num, self.features)

    def torch_module(self) -> Any:
        """As PyTorch knows it."""
        from torch.nn import Embedding

        return Embedding(self.num, self.features)

    def jax_forward(self, params: Mapping[str, Array], x: Array) -> Array:
        """As JAX knows it."""
        return params["weight"][x]


@dataclass(frozen=True)
class Positions:
    """A learned vector for every place of a context, added to what is there: ``y_t = x_t + table[t]``.

    To kfcore it is no layer: the places are the same in all examples, so that what is taken from the table has no axis of examples.
    """

    name: str
    places: int
    features: int

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Table ``[places, features]``."""
        return {"weight": rng.normal(0.0, SPREAD, (self.places, self.features))}

    def forward(self, xp: Any, params: Mapping[str, Array], x: Array) -> Array:
        """``[N, places, features]`` to the same."""
        return x + params["weight"]

    def backward(self, xp: Any, params: Mapping[str, Array], x: Array, y: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """Gradients at the input and of the table."""
        return dy, {"weight": xp.sum(dy, axis=0)}

    def curvature(self) -> None:
        """It has none."""
        return

    def torch_module(self) -> Any:
        """A module with the table for its weight."""
        from kfcore_cli.race.modules import Positions

        return Positions(self.places, self.features)

    def jax_forward(self, params: Mapping[str, Array], x: Array) -> Array:
        """Taken from the table, as a user of JAX would write it."""
        from jax.numpy import arange

        return x + params["weight"][arange(self.places)]


@dataclass(frozen=True)
class LayerNorm:
    """``y = weight xhat + bias`` with ``xhat = (x - mean) / sqrt(var + eps)`` over the features (Ba et al. 2016)."""

    name: str
    features: int
    eps: float = 1e-5

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A scale of one and a shift of zero, ``[features]`` each."""
        return {"weight": np.ones(self.features), "bias": np.zeros(self.features)}

    def forward(self, xp: Any, params: Mapping[str, Array], x: Array) -> Array:
        """``[N, T, features]`` to the same."""
        return self.captured(xp, x) * params["weight"] + params["bias"]

    def backward(self, xp: Any, params: Mapping[str, Array], x: Array, y: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """Gradients at the input and of scale and shift."""
        xhat, root = self._normalised(xp, x)
        own = {"weight": xp.sum(dy * xhat, axis=(0, 1)), "bias": xp.sum(dy, axis=(0, 1))}
        g = dy * params["weight"]
        g = g - xp.mean(g, axis=-1, keepdims=True) - xhat * xp.mean(g * xhat, axis=-1, keepdims=True)
        return g / root, own

    def captured(self, xp: Any, x: Array) -> Array:
        """``xhat``, which :class:`kfcore.Norm` takes for its input."""
        return self._normalised(xp, x)[0]

    def curvature(self) -> kfcore.Norm:
        """As kfcore knows it."""
        return kfcore.Norm(self.features)

    def torch_module(self) -> Any:
        """As PyTorch knows it."""
        from torch.nn import LayerNorm

        return LayerNorm(self.features, self.eps)

    def _normalised(self, xp: Any, x: Array) -> tuple[Array, Array]:
        """``xhat``, and what the centred ``x`` was divided by."""
        centred = x - xp.mean(x, axis=-1, keepdims=True)
        root = xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return centred / root, root


@dataclass(frozen=True)
class Attention:
    """Causal attention of several heads (Vaswani et al. 2017), without its projections: a dense layer before it and one behind.

    From queries, keys and values side by side, ``[N, T, 3 features]``, to ``[N, T, features]``.
    """

    heads: int
    name: None = None

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """No parameters."""
        return {}

    def forward(self, xp: Any, params: Mapping[str, Array], x: Array) -> Array:
        """Values weighed by the softmax of ``q k / sqrt(head)`` over all places up to one's own."""
        p, _, _, v = self._weights(xp, x)
        return self._merged(xp, p @ v)

    def backward(self, xp: Any, params: Mapping[str, Array], x: Array, y: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """Gradient at queries, keys and values."""
        p, q, k, v = self._weights(xp, x)
        g = self._heads(xp, dy)
        dp = g @ v.mT
        ds = p * (dp - xp.sum(p * dp, axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
        return xp.concat([self._merged(xp, part) for part in (ds @ k, ds.mT @ q, p.mT @ g)], axis=-1), {}

    def curvature(self) -> None:
        """It has none."""
        return

    def torch_module(self) -> Any:
        """As PyTorch knows it."""
        from kfcore_cli.race.modules import Attention

        return Attention(self.heads)

    def _weights(self, xp: Any, x: Array) -> tuple[Array, Array, Array, Array]:
        """Weights ``[N, heads, T, T]``, and queries, keys and values ``[N, heads, T, head]``."""
        features, places = x.shape[-1] // 3, xp.arange(x.shape[1])
        q, k, v = (self._heads(xp, x[..., i * features : (i + 1) * features]) for i in range(3))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = xp.where(places[None, :] <= places[:, None], scores, xp.full_like(scores, -math.inf))
        p = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        return p / xp.sum(p, axis=-1, keepdims=True), q, k, v

    def _heads(self, xp: Any, x: Array) -> Array:
        """``[N, T, features]`` as ``[N, heads, T, head]``."""
        return xp.permute_dims(xp.reshape(x, (*x.shape[:2], self.heads, x.shape[-1] // self.heads)), (0, 2, 1, 3))

    @staticmethod
    def _merged(xp: Any, x: Array) -> Array:
        """The inverse of :meth:`_heads`."""
        x = xp.permute_dims(x, (0, 2, 1, 3))
        return xp.reshape(x, (*x.shape[:2], -1))


@dataclass(frozen=True)
class GELU:
    """``x Phi(x)``, ``Phi`` being the normal distribution function itself and not its approximation by a tanh (Hendrycks and Gimpel 2016).

    The array API has no error function; that of SciPy takes NumPy's arrays.
    """

    name: None = None

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """No parameters."""
        return {}

    def forward(self, xp: Any, params: Mapping[str, Array], x: Array) -> Array:
        """The function's value."""
        return x * self._phi(x)

    def backward(self, xp: Any, params: Mapping[str, Array], x: Array, y: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """``Phi(x) + x phi(x)`` times ``dy``."""
        return dy * (self._phi(x) + x * xp.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)), {}

    def curvature(self) -> None:
        """It has none."""
        return

    def torch_module(self) -> Any:
        """As PyTorch knows it."""
        from torch.nn import GELU

        return GELU(approximate="none")

    def jax_forward(self, params: Mapping[str, Array], x: Array) -> Array:
        """As JAX knows it, whose default is the approximation."""
        from jax.nn import gelu

        return gelu(x, approximate=False)

    @staticmethod
    def _phi(x: Array) -> Array:
        return 0.5 + 0.5 * erf(x / math.sqrt(2.0))


def transformer(num: int, places: int, width: int, heads: int, blocks: int) -> Network:
    """Logits of the next of ``num`` tokens at each of ``places``: pre-norm blocks of attention and a GELU network four times as wide."""
    layers = [Embedding("tokens", num, width), Positions("positions", places, width)]
    for i in range(1, blocks + 1):
        attention = Dense(f"qkv{i}", width, 3 * width), Attention(heads), Dense(f"out{i}", width, width)
        mlp = Dense(f"up{i}", width, 4 * width), GELU(), Dense(f"down{i}", 4 * width, width)
        layers += (*residual(LayerNorm(f"norm{i}a", width), *attention), *residual(LayerNorm(f"norm{i}b", width), *mlp))
    return Network((*layers, LayerNorm("norm", width), Dense("head", width, num)), Loss("cross-entropy"))
