"""Deep networks by hand, and their curvature from its definition: what the library is compared with.

Nothing here uses the library. A net maps ``x [N, S, d]`` through dense layers with one activation between them; positions may be
pooled after some layer. Curvature blocks are row-major matrices ``1 / terms sum_n J_n^T H_n J_n`` with ``J_n`` the Jacobian of all
outputs of example n by the layer's weight, obtained by pulling unit vectors back one at a time.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

ACTIVATIONS = {
    "linear": (lambda z: z, lambda z: np.ones_like(z)),
    "tanh": (np.tanh, lambda z: 1.0 - np.tanh(z) ** 2),
    "sigmoid": (lambda z: 1.0 / (1.0 + np.exp(-z)), lambda z: np.exp(-z) / (1.0 + np.exp(-z)) ** 2),
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: (z > 0).astype(z.dtype)),
}


@dataclass(frozen=True)
class Net:
    """Weights ``[out, in]`` with biases ``[out]`` or ``None``; ``pools`` maps a layer index to "sum" or "mean" over positions after it."""

    weights: list
    biases: list
    activation: str = "linear"
    pools: dict = field(default_factory=dict)

    @classmethod
    def random(cls, rng, sizes, *, bias=False, activation="linear", pools=None):
        weights = [rng.normal(size=(o, i)) / np.sqrt(i) for i, o in pairwise(sizes)]
        biases = [0.3 * rng.normal(size=o) if bias else None for o in sizes[1:]]
        return cls(weights, biases, activation, pools or {})

    def forward(self, x):
        """Outputs, and what the backward pass needs: the layers' inputs and pre-activations."""
        function, _ = ACTIVATIONS[self.activation]
        inputs, outputs = [], []
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs.append(x)
            z = x @ w.T + (0.0 if b is None else b)
            outputs.append(z)
            x = function(z) if i < len(self.weights) - 1 else z
            if i in self.pools:
                x = (np.sum if self.pools[i] == "sum" else np.mean)(x, axis=1, keepdims=True)
        return x, (inputs, outputs)

    def pull(self, trace, v):
        """Gradients of ``<v, f>`` at the output ``[N, S, out]`` of every layer."""
        _, derivative = ACTIVATIONS[self.activation]
        _, outputs = trace
        grads = [None] * len(self.weights)
        for i in reversed(range(len(self.weights))):
            z = outputs[i]
            if i in self.pools:
                v = np.broadcast_to(v, z.shape) / (z.shape[1] if self.pools[i] == "mean" else 1)
            if i < len(self.weights) - 1:
                v = v * derivative(z)
            grads[i] = v
            v = v @ self.weights[i]
        return grads


def augmented(a, joint):
    """Inputs with a last feature 1 for a joint bias."""
    return np.concatenate([a, np.ones((*a.shape[:-1], 1))], axis=-1) if joint else a


def example_gradients(a, g):
    """``vec(sum_s g a^T)`` of every example, row-major: ``[N, out in]``."""
    return np.einsum("nso,nsi->noi", g, a).reshape(len(a), -1)


def jacobians(net, x, *, joint=False):
    """By layer, the Jacobian ``[N, outputs, out in]`` of each example's outputs by the weight (and joint bias)."""
    f, trace = net.forward(x)
    flat = f.reshape(len(f), -1)
    rows = [[] for _ in net.weights]
    for j in range(flat.shape[1]):
        unit = np.zeros_like(flat)
        unit[:, j] = 1.0
        for layer, g in enumerate(net.pull(trace, unit.reshape(f.shape))):
            rows[layer].append(example_gradients(augmented(trace[0][layer], joint), g))
    return [np.stack(r, axis=1) for r in rows]


def output_hessians(loss, f):
    """Hessian ``[N, outputs, outputs]`` of the summed terms of each example by its outputs ``[N, S, C]``."""
    n, s, c = f.shape
    hessians = np.zeros((n, s, c, s, c))
    for i in range(n):
        for t in range(s):
            if loss == "mse":
                block = 2.0 * np.eye(c)
            elif loss == "bce":
                p = 1.0 / (1.0 + np.exp(-f[i, t]))
                block = np.diag(p * (1.0 - p))
            else:
                p = np.exp(f[i, t] - f[i, t].max())
                p /= p.sum()
                block = np.diag(p) - np.outer(p, p)
            hessians[i, t, :, t, :] = block
    return hessians.reshape(n, s * c, s * c)


def output_gradients(loss, f, y):
    """Gradient of the summed terms by the outputs ``[N, S, C]``; ``y`` holds numbers, or class numbers for "ce"."""
    if loss == "mse":
        return 2.0 * (f - y)
    if loss == "bce":
        return 1.0 / (1.0 + np.exp(-f)) - y
    p = np.exp(f - f.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True) - np.eye(f.shape[-1])[y]


def count_terms(loss, f):
    """Number of terms: positions for "ce", numbers otherwise."""
    return float(f.size // f.shape[-1] if loss == "ce" else f.size)


def targets(rng, loss, f):
    """Some labels for outputs of this shape."""
    if loss == "mse":
        return rng.normal(size=f.shape)
    return rng.integers(0, 2, f.shape).astype(float) if loss == "bce" else rng.integers(0, f.shape[-1], f.shape[:-1])


def ggn_blocks(net, x, loss, *, joint=False):
    """Generalised Gauss-Newton matrix of the mean loss, one diagonal block a layer."""
    f, _ = net.forward(x)
    hessians = output_hessians(loss, f)
    return [np.einsum("nai,nab,nbj->ij", j, hessians, j) / count_terms(loss, f) for j in jacobians(net, x, joint=joint)]


def empirical_blocks(net, x, loss, y, *, joint=False):
    """Second moment of the examples' gradients (each summed over its terms), over the number of terms."""
    f, trace = net.forward(x)
    blocks = []
    for a, g in zip(trace[0], net.pull(trace, output_gradients(loss, f, y)), strict=True):
        vectors = example_gradients(augmented(a, joint), g)
        blocks.append(vectors.T @ vectors / count_terms(loss, f))
    return blocks


def distance(x, y):
    """Relative distance in the Frobenius norm, zero for two zeros."""
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape, (x.shape, y.shape)
    top = np.linalg.norm(y)
    return np.linalg.norm(x - y) / (top if top > 0 else 1.0)


# -- convolutions ------------------------------------------------------------------------------------------------------

PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def convolve(x, w, b=None, *, stride, padding, dilation, groups=1, mode="zeros"):
    """``y[n, o, p] = sum_{i, k} w[o, i, k] x[n, i, stride p + dilation k] + b[o]``, offset by offset; channels first, pairs of paddings."""
    x = x[(..., *(slice(max(0, -low), n - max(0, -high)) for n, (low, high) in zip(x.shape[2:], padding, strict=True)))]
    x = np.pad(x, [(0, 0), (0, 0), *((max(0, low), max(0, high)) for low, high in padding)], mode=PAD_MODES[mode])
    outputs = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], w.shape[2:], stride, dilation, strict=True)]
    y = np.zeros((len(x), groups, len(w) // groups, *outputs))
    for k in np.ndindex(*w.shape[2:]):
        cut = tuple(slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, n, s in zip(k, dilation, outputs, stride, strict=True))
        part = x[(slice(None), slice(None), *cut)].reshape(len(x), groups, -1, *outputs)
        y += np.einsum("goi,ngi...->ngo...", w[(..., *k)].reshape(groups, len(w) // groups, -1), part)
    y = y.reshape(len(x), len(w), *outputs)
    return y if b is None else y + b.reshape(-1, *(1,) * len(outputs))


def convolve_transposed(x, w, b=None, *, stride, padding, dilation, output_padding, groups=1):
    """The adjoint of a convolution, every input position spread over the outputs: ``w [in, out / groups, *kernel]``, pairs of paddings."""
    spatial, kernel = x.shape[2:], w.shape[2:]
    full = [(n - 1) * s + d * (k - 1) + 1 + o for n, s, d, k, o in zip(spatial, stride, dilation, kernel, output_padding, strict=True)]
    y = np.zeros((len(x), groups, w.shape[1], *full))
    for place in np.ndindex(*spatial):
        for k in np.ndindex(*kernel):
            target = tuple(p * s + o * d for p, s, o, d in zip(place, stride, k, dilation, strict=True))
            part = x[(..., *place)].reshape(len(x), groups, -1)
            y[(..., *target)] += np.einsum("gio,ngi->ngo", w[(..., *k)].reshape(groups, -1, w.shape[1]), part)
    y = y.reshape(len(x), groups * w.shape[1], *full)
    y = y[(..., *(slice(low, n - high) for n, (low, high) in zip(full, padding, strict=True)))]
    return y if b is None else y + b.reshape(-1, *(1,) * len(full))


def derivative(function, size):
    """Matrix ``[*outputs, size]`` of a linear function of a vector, column by column."""
    return np.stack([function(unit) for unit in np.eye(size)], axis=-1)
