"""Curvature of residuals with derivatives, against dense matrices and whole steps in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import SkipTest

import numpy as np

from kfcore import pinn, taylor
from kfcore._array import namespace
from kfcore.pinn import joint
from kfcore.pinn.kronecker import factors
from kfcore.pinn.terms import evaluated, pulled
from kfcore.testing.backend import Backend, assert_close

Arr = np.ndarray


def check_cotangents(
    residual: pinn.Residual,
    derivatives: taylor.Derivatives,
    points: pinn.Points,
    outputs: int = 1,
    unknowns: Mapping[str, Arr] | None = None,
    rtol: float = 1e-7,
) -> None:
    """Raise ``AssertionError``, naming what of the jet, unless a residual's cotangents are its derivatives.

    By central differences of sixth order at a random jet of a network with so many ``outputs``, in NumPy and float64.
    """
    rng, n, k = np.random.default_rng(0), len(points.x), derivatives.count
    shapes: dict[str, tuple[int, ...]] = {"value": (), "first": (k,)}
    for name, operator in derivatives.operators:
        kind = type(operator).__name__
        shapes[name] = (k, k) if kind == "Hessian" else (k,) if kind == "Each" else ()
    parts = {name: rng.normal(size=(n, *middle, outputs)) for name, middle in shapes.items()}
    unknown = {name: np.asarray(x, dtype=np.float64) for name, x in (unknowns or {}).items()}

    def jet(parts: Mapping[str, Arr]) -> taylor.Jet:
        return taylor.Jet(parts["value"], parts["first"], {name: parts[name] for name, _ in derivatives.operators})

    def at(parts: Mapping[str, Arr], unknown: Mapping[str, Arr]) -> Arr:
        return evaluated(namespace(points.x), "checked", term, points, jet(parts), unknown)

    term = pinn.Term(residual, derivatives)
    found = pulled(namespace(points.x), "checked", term, points, jet(parts), unknown)
    given = {"value": found.cotangents.value, "first": found.cotangents.first, **found.cotangents.operators}
    h, weights = 1e-3, ((1, 0.75), (2, -0.15), (3, 1.0 / 60.0))
    every = [(True, *item) for item in parts.items()] + [(False, *item) for item in unknown.items()]
    for inside, name, x in every:
        claimed = given.get(name) if inside else found.unknowns.get(name)
        for entry in np.ndindex(x.shape[1:] if inside else x.shape):
            place = (slice(None), *entry) if inside else entry
            slope: Any = 0.0
            for step, weight in weights:
                for sign in (1, -1):
                    moved = x.copy()
                    moved[place] += sign * step * h
                    changed = ({**parts, name: moved}, unknown) if inside else (parts, {**unknown, name: moved})
                    slope = slope + sign * weight / h * at(*changed)
            claim = np.zeros_like(slope) if claimed is None else claimed[(slice(None), slice(None), *entry)]
            error, top = np.abs(slope - claim).max(), max(1.0, np.abs(slope).max())
            assert error <= rtol * top, f"derivatives by {name!r}{list(entry)} are off by {error:.3g} where the largest is {top:.3g}"


class PinnTests:
    """Jacobians, factors, inverses of sums of Kronecker products, steps."""

    backend: Backend

    def test_inverse_of_two_products(self) -> None:
        """Of two layers at once, and with leading axes; one product with exact damping; what four are merged into."""
        rng, b, lam = np.random.default_rng(60), self.backend, np.asarray(1e-2)

        def factor(n: int, *lead: int) -> Arr:
            x = rng.normal(size=(*lead, n + 2, n))
            return np.swapaxes(x, -1, -2) @ x

        layers = [[(factor(n, *lead), factor(m, *lead)) for _ in range(2)] for n, m, lead in ((3, 4, ()), (2, 3, (2,)))]
        grads = [rng.normal(size=(4, 3)), rng.normal(size=(2, 3, 2))]

        def run(layers: Any, grads: Any, lam: Any) -> Any:
            xp = namespace(lam)
            two, ok = joint.invert(xp, layers, lam, "plain")
            one, fine = joint.invert(xp, [layer[:1] for layer in layers], lam, "exact")
            tikhonov, _ = joint.invert(xp, layers[:1], lam, "exact")
            found = [[joint.apply(xp, s, x) for s, x in zip(every, grads, strict=True)] for every in (two, one)]
            solved = joint.solve(xp, tikhonov[0], layers[0], lam, grads[0])
            return found, solved, ok, fine, joint.nearest(xp, [*layers[1], *layers[1][:1]])

        found, solved, ok, fine, merged = b.call(run, *b.put((layers, grads, lam)))

        def dense(pairs: list[tuple[Arr, Arr]], x: Arr, plain: float, exact: float) -> Arr:
            if x.ndim == 3:
                return np.stack([dense([(a[i], g[i]) for a, g in pairs], x[i], plain, exact) for i in range(len(x))])
            whole = sum(np.kron(g + plain * np.eye(len(g)), a + plain * np.eye(len(a))) for a, g in pairs) + exact * np.eye(x.size)
            return np.linalg.solve(whole, x.ravel()).reshape(x.shape)

        both = [dense(pairs, x, 1e-2, 0.0) for pairs, x in zip(layers, grads, strict=True)]
        single = [dense(pairs[:1], x, 0.0, 1e-2) for pairs, x in zip(layers, grads, strict=True)]
        assert_close(found, [both, single], b, 1e-9, "inverses")
        assert_close(solved, dense(layers[0], grads[0], 0.0, 1e-2), b, 1e-6, "exact damping of a sum")
        assert_close([ok, fine], [[np.asarray(True), np.ones(2, dtype=bool)]] * 2, b, what="success")
        a, g = (b.to_numpy(x) for x in merged)
        for i in range(2):
            pairs = [(x[i], y[i]) for x, y in (*layers[1], *layers[1][:1])]
            u, _, v = np.linalg.svd(sum(np.outer(y.ravel(), x.ravel()) for x, y in pairs))
            product = np.outer(g[i].ravel(), a[i].ravel())
            off = np.abs(product / np.linalg.norm(product) - np.outer(u[:, 0], v[0])).max()
            assert off < 1e-8, f"{b.name}: the merged product is {off:.3g} off the nearest"

    def test_products_with_the_jacobian_of_residuals(self) -> None:
        """Kernel, both products, factors and losses of two terms."""
        b = self.backend
        optimizer, params, batches = _problem()
        rng = np.random.default_rng(61)
        w = rng.normal(size=(9,))
        like = {name: rng.normal(size=shape) for name, shape in optimizer.shapes.items()}

        def run(params: Any, batches: Any, w: Any, v: Any) -> Any:
            xp = namespace(w)
            points = {name: pinn.Points(x) for name, x in batches.items()}
            lin = optimizer.loss.linearised(params, points, w.dtype)
            sides = {name: tuple(factors(xp, side)[::2] for side in lin.sides(name)) for name in optimizer.network.layers}
            return lin.jacobian(), lin.residuals, lin.kernel(), lin.pull(w), lin.push(v), sides, lin.losses()

        found = b.call(run, *b.put((params, batches, w, like)))
        j, rho, *rest = run(params, batches, w, like)
        kernel, pulled, pushed = j @ j.T, (j.T @ w), j @ np.concatenate([x.ravel() for x in like.values()])
        sizes = np.cumsum([np.prod(s) for s in optimizer.shapes.values()])[:-1]
        parts = {n: p.reshape(s) for (n, s), p in zip(optimizer.shapes.items(), np.split(pulled, sizes), strict=True)}
        assert_close(found[:5], (j, rho, kernel, parts, pushed), b, 1e-10, "products")
        assert_close(found[5:], tuple(rest[3:]), b, 1e-10, "factors and losses")

    def test_steps_on_residuals(self) -> None:
        """Steps of Kronecker factors by the quadratic model with adaptive damping, and in the space of the residuals by a search."""
        b = self.backend
        if b.no_whole_step:
            raise SkipTest(b.no_whole_step)
        given, params, batches = _problem()
        search = pinn.LineSearch(1, smallest=-5, together=2)
        cases = [("kfac*", None), (pinn.SampleSpace(1e-3, momentum=0.5), search)]
        for method, rule in (cases[1:] if b.eager else cases[:1]) if b.thrifty else cases:
            optimizer = pinn.Optimizer(given.network, given.terms, method, step_rule=rule)
            step = b.wrap(optimizer.step)
            desired = moved = None
            for library in ("numpy", "own"):
                put = (lambda x: x) if library == "numpy" else b.put
                at, points = put(params), put(batches)
                state = optimizer.init(at)
                for _ in range(2):
                    at, state, _ = (optimizer.step if library == "numpy" else step)(at, state, points)
                desired, moved = (at, None) if library == "numpy" else (desired, at)
            assert_close(moved, desired, b, 1e-8, f"steps of {optimizer.why}")


def _problem() -> tuple[pinn.Optimizer, dict[str, dict[str, Arr]], dict[str, Arr]]:
    """Poisson's equation on a few points."""
    rng = np.random.default_rng(62)
    network = taylor.Sequential.mlp((2, 4, 3, 1), "tanh")
    laplace = taylor.Derivatives(2, operators={"laplacian": taylor.laplacian(2)})
    inside = pinn.Term(pinn.LinearOperator({"laplacian": -1.0, "first[1]": lambda points: points.x[:, 0]}, 2.0), laplace, 0.5)
    border = pinn.Term(pinn.LinearOperator({"value": 1.0}), taylor.Derivatives(2, ()))
    params = {k: {r: rng.normal(size=s) for r, s in layer.parameters.items()} for k, layer in network.layers.items()}
    batches = {"inside": rng.uniform(size=(6, 2)), "border": rng.uniform(size=(3, 2))}
    return pinn.Optimizer(network, {"inside": inside, "border": border}, "engd-w"), params, batches
