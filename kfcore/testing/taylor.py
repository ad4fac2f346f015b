"""Derivatives through networks and their reverse pass, against the chain rule written out for all derivatives at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kfcore import Linear, taylor
from kfcore._array import namespace
from kfcore.testing import reference
from kfcore.testing.backend import Backend, assert_close, mapped, numpy_backend

Arr = np.ndarray
TOLERANCE = {"float64": 1e-10, "float32": 5e-5}


def check_activation(activation: taylor.Activation | str, points: Arr | None = None, rtol: float = 1e-7) -> None:
    """Raise ``AssertionError``, naming the order, unless each derivative of an activation is that of the one before.

    By central differences of sixth order in NumPy and float64, at ``points [n]``: some between -4 and 4 if not given, and none where
    a derivative jumps. Every ``order`` that it allows is asked for, and must give the same.
    """
    made = taylor.Sequential([("fc", Linear(1, 1)), activation]).steps[1]
    assert isinstance(made, taylor.Activation)
    z = np.linspace(-3.93, 4.0, 34) if points is None else np.asarray(points, dtype=np.float64)
    xp, h = namespace(z), 2e-3
    found = made(xp, z, made.highest)
    shifted = {k: made(xp, z + k * h, made.highest) for k in (-3, -2, -1, 1, 2, 3)}
    for order in range(made.highest + 1):
        every = made(xp, z, order)
        for k, s in enumerate(every):
            where = f"{made.name}: derivative {k} of {order}"
            assert np.shape(s) == z.shape, f"{where}: shape {np.shape(s)}, not {z.shape}"
            assert np.allclose(s, found[k], rtol=1e-14, atol=1e-14), f"{where}: not that of {made.highest}"
        if order:
            f = {k: s[order - 1] for k, s in shifted.items()}
            slope = (45.0 * (f[1] - f[-1]) - 9.0 * (f[2] - f[-2]) + f[3] - f[-3]) / (60.0 * h)
            error = np.abs(slope - found[order]).max()
            top = max(1.0, np.abs(slope).max())
            assert error <= rtol * top, f"{made.name}: derivative {order} is off by {error:.3g} where the largest is {top:.3g}"


def operators(jets: tuple[Arr, ...], every: Mapping[str, Any], coefficients: Mapping[str, Arr]) -> dict[str, Arr]:
    """What the operators are of the derivatives that :func:`kfcore.testing.reference.jets` gives."""
    found = {}
    for name, operator in every.items():
        along = np.einsum("nkko->nko", jets[2]) if operator.order == 2 else jets[operator.order]
        if isinstance(operator, taylor.Hessian):
            found[name] = jets[2]
        elif isinstance(operator, taylor.Each):
            found[name] = along
        else:
            c = coefficients[name] if isinstance(operator, taylor.Pointwise) else np.asarray(operator.coefficients)[None]
            found[name] = np.einsum("nk,nko->no", *_long(c, along)) if c.ndim == 2 else np.einsum("nkl,nklo->no", *_long(c, jets[2]))
    return found


def _long(c: Arr, x: Arr) -> tuple[Arr, Arr]:
    return np.broadcast_to(c, (len(x), *c.shape[1:])), x


class TaylorTests:
    """Activations, jets, and gradients of everything in a jet."""

    backend: Backend

    def test_activations(self) -> None:
        """Values by their formulas, derivatives by differences in NumPy and then in the library."""
        z, b = np.linspace(-3.93, 4.0, 34), self.backend
        phi = np.vectorize(lambda x: 0.5 * (1.0 + math.erf(x / math.sqrt(2.0))))(z)
        inner = math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)
        values = {
            "gelu": z * phi,
            "gelu_tanh": 0.5 * z * (1.0 + np.tanh(inner)),
            "identity": z,
            "relu": np.maximum(z, 0.0),
            **{f"relu^{k}": np.maximum(z, 0.0) ** k for k in (2, 3, 4)},
            "sigmoid": 1.0 / (1.0 + np.exp(-z)),
            "silu": z / (1.0 + np.exp(-z)),
            "sin": np.sin(z),
            "softplus": np.log1p(np.exp(z)),
            "tanh": np.tanh(z),
        }
        uncovered = sorted(set(taylor.ACTIVATIONS) ^ set(values))
        assert not uncovered, f"no conformance test for the activations {', '.join(uncovered)}"
        for name in values:
            check_activation(name)

        def run(z: Any) -> Any:
            return {name: tuple(activation(namespace(z), z, 5)) for name, activation in taylor.ACTIVATIONS.items()}

        derived = run(z)
        for dtype in ("float32",) if b.thrifty else TOLERANCE:
            found, rtol = b.call(run, b.put(z, dtype)), TOLERANCE["float64"] if dtype == "float64" else 1e-3
            put = functools.partial(numpy_backend().put, dtype=dtype)
            for name, value in values.items():
                assert_close(found[name][0], put(value), b, rtol, f"{name} in {dtype}")
                assert_close(found[name], put(derived[name]), b, rtol, f"{name} in {dtype}, derivatives")

    def test_laplacian(self) -> None:
        """The forward Laplacian and a partial one, from both weight layouts, and what they leave of the last layer's columns."""
        every = {"laplacian": taylor.laplacian(2), "part": taylor.laplacian(2, of=(1,))}
        cases: Any = (("float64", "oi"), ("float32", "io"))
        for dtype, layout in cases[1:] if self.backend.thrifty else cases:
            derivatives = taylor.Derivatives(2, operators=every)
            self._propagated(derivatives, taylor.Sequential.mlp((2, 4, 2), "tanh", layout=layout), dtype, ("laplacian",))

    def test_operators_of_second_order(self) -> None:
        """All kinds at once: constant and pointwise, diagonal and not, summed and not; along vectors."""
        matrix = [[0.5, -1.0], [0.0, -2.0]]
        every = {
            "hessian": taylor.Hessian(),
            "mixed": taylor.Weighted(matrix),
            "each": taylor.Each(),
            "indefinite": taylor.Weighted((2.0, -0.5)),
            "diagonal": taylor.Pointwise(),
            "matrix": taylor.Pointwise("matrix"),
        }
        derivatives = taylor.Derivatives(3, ((1.0, 0.0, -1.0), (0.5, 2.0, 0.0)), every)
        self._propagated(derivatives, taylor.Sequential.mlp((3, 3, 3) if self.backend.thrifty else (3, 4, 3, 2), "sin"))

    def test_orders_up_to_four(self) -> None:
        """Along directions of each point's own, with leading axes of independent networks."""
        every = {
            "third": taylor.Weighted((0.0, 1.0), 3),
            "fourth": taylor.Weighted((1.0, -0.5), 4),
            "each": taylor.Each(4),
            "at points": taylor.Pointwise(order=3),
        }
        derivatives = taylor.Derivatives(2, taylor.PointwiseDirections(2), every)
        self._propagated(derivatives, taylor.Sequential.mlp((2, 2, 2) if self.backend.thrifty else (2, 3, 1), "tanh", stack=(2,)))

    def _propagated(
        self,
        derivatives: taylor.Derivatives,
        network: taylor.Sequential,
        dtype: str = "float64",
        used: tuple[str, ...] | None = None,
    ) -> None:
        """Jet, gradients of two random functions of it point by point, and their weighted sums over points."""
        rng, b, before, count = np.random.default_rng(50), self.backend, (*network.stack, 5), derivatives.count
        params = {k: {r: rng.normal(size=s) for r, s in layer.parameters.items()} for k, layer in network.layers.items()}
        x, weights = rng.normal(size=(*before, network.inputs)), rng.normal(size=(2, *before))
        shapes = {"diagonal": (count,), "matrix": (count, count)}
        coefficients = {k: rng.normal(size=(*before, *shapes[o.form])) for k, o in derivatives.operators if isinstance(o, taylor.Pointwise)}
        own = isinstance(derivatives.directions, taylor.PointwiseDirections)
        directions = rng.normal(size=(*before, count, network.inputs)) if own else None
        p = taylor.Propagation(network, derivatives)
        cotangents: Any = mapped(
            lambda a: rng.normal(size=(2, *a.shape)), p.jet(params, x, coefficients=coefficients, directions=directions)
        )
        kinds: Any = ("live",) if b.thrifty and used is None else ("live", "all")

        def run(params: Any, x: Any, coefficients: Any, directions: Any, cotangents: Any, weights: Any) -> Any:
            jet, trace = p.forward(params, x, coefficients=coefficients, directions=directions)
            kept: dict[str, Any] = {kind: p.reverse(params, trace, cotangents, used=used, columns=kind) for kind in kinds}
            points = {kind: {name: c.output_grads.mT @ c.rows() for name, c in columns.items()} for kind, columns in kept.items()}
            return jet, points, p.gradients(kept["live"], weights)

        arrays = (params, x, coefficients, directions, cotangents, weights)
        jet, points, gradients = b.call(run, *b.put(arrays, dtype))
        if used is not None:
            cotangents = taylor.Jet(None, None, {name: cotangents.operators[name] for name in used})
        oi = {k: {"weight": layer.to_oi(params[k]["weight"]), "bias": params[k]["bias"]} for k, layer in network.layers.items()}
        desired, each = _reference(network, derivatives, oi, x, coefficients, directions, cotangents)
        sums = {k: np.einsum("m...n,m...nij->...ij", weights, g) for k, g in each.items()}
        what, rtol, put = f"{derivatives.operators} in {dtype}", TOLERANCE[dtype], functools.partial(numpy_backend().put, dtype=dtype)
        assert_close(jet, put(desired), b, rtol, f"{what}: jet")
        assert_close(points, put(dict.fromkeys(kinds, each)), b, rtol, f"{what}: gradients of points")
        assert_close(gradients, put({k: network.layers[k].parameters_of({"": g}) for k, g in sums.items()}), b, rtol, f"{what}: gradients")


def _reference(
    network: taylor.Sequential,
    derivatives: taylor.Derivatives,
    params: Mapping[str, Mapping[str, Arr]],
    x: Arr,
    coefficients: Mapping[str, Arr],
    directions: Any,
    cotangents: Any,
) -> tuple[taylor.Jet, dict[str, Arr]]:
    """The jet, and the gradients of each function at each point by ``[W b]``, ``[2, *stack, N, out, in + 1]``. Weights ``[out, in]``."""
    if x.ndim == 3:
        found: list[Any] = []
        for i in range(len(x)):
            one: tuple[Any, Any, Any, Any] = mapped(lambda a, i=i: a[i], (params, x, coefficients, directions))
            found.append(_reference(network, derivatives, *one, mapped(lambda a, i=i: a[:, i], cotangents)))
        jets, grads = zip(*found, strict=True)
        operated = {k: np.stack([j.operators[k] for j in jets]) for k in jets[0].operators}
        whole = taylor.Jet(np.stack([j.value for j in jets]), np.stack([j.first for j in jets]), operated)
        return whole, {k: np.stack([g[k] for g in grads], axis=1) for k in grads[0]}
    kinds = [s.name for s in network.steps if isinstance(s, taylor.Activation)]
    if directions is None:
        rows = [np.eye(x.shape[-1])[k] if isinstance(k, int) else np.asarray(k) for k in derivatives.directions]
        directions = np.broadcast_to(np.stack(rows), (len(x), len(rows), x.shape[-1]))

    def jet(joint: Mapping[str, Arr]) -> taylor.Jet:
        found = reference.jets([w[:, :-1] for w in joint.values()], [w[:, -1] for w in joint.values()], kinds, x, directions)
        return taylor.Jet(found[0], found[1], operators(found, dict(derivatives.operators), coefficients))

    joint = {k: np.concatenate([p["weight"], p["bias"][:, None]], axis=-1) for k, p in params.items()}
    grads = {k: np.zeros((2, len(x), *w.shape)) for k, w in joint.items()}
    for k, w in joint.items():
        for entry in np.ndindex(w.shape):
            moved = {j: a.astype(complex) for j, a in joint.items()}
            moved[k][entry] += 1e-30j  # an imaginary step has no rounding errors
            grads[k][(..., *entry)] = np.imag(_product(cotangents, jet(moved))) / 1e-30
    return jet(joint), grads


def _product(cotangents: taylor.Jet, jet: taylor.Jet) -> Arr:
    """Of both, summed over everything but functions and points: ``[2, N]``."""
    pairs = [(cotangents.value, jet.value), (cotangents.first, jet.first)]
    pairs += [(c, jet.operators[k]) for k, c in cotangents.operators.items()]
    products = [c * a for c, a in pairs if c is not None]
    return np.asarray(sum(p.reshape(*p.shape[:2], -1).sum(axis=-1) for p in products))
