"""EKFAC one block at a time, layer kind by layer kind, and eigenbases that are followed."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import numpy as np

from kfcore import EKFAC, KFAC, Bias, Conv, Damping, Embedding, Linear, Norm, Tracked
from kfcore.testing import reference
from kfcore.testing.backend import Backend, assert_close, numpy_backend

Arr = np.ndarray


def _linear(rng: np.random.Generator, layer: Linear, s: int, vectors: int = 1) -> tuple[Arr, Arr, Arr]:
    x, g = rng.normal(size=(5, s, layer.in_features)), rng.normal(size=(vectors * 5, s, layer.out_features))
    rows = np.concatenate([x, np.ones((5, s, 1))], axis=-1) if layer.bias == "joint" else x
    return x, g, _sums(rows, g)


def _sums(rows: Arr, g: Arr) -> Arr:
    """The gradient ``[..., K N, out, in]`` of every example and Fisher vector from rows ``[..., N, S, in]``."""
    vectors = g.shape[-3] // rows.shape[-3]
    return np.einsum("...nso,...nsi->...noi", g, np.concatenate([rows] * vectors, axis=-3))


def cases(rng: np.random.Generator) -> list[tuple[Any, Arr, Arr, Arr]]:
    """Layers with captured inputs and output gradients, and the gradients of the examples by their definition."""
    found: list[tuple[Any, Arr, Arr, Arr]] = []
    layer = Conv(4, 6, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=2)
    x, g = rng.normal(size=(5, 5, 6, 4)), rng.normal(size=(5, 8, 6))
    rows = reference.patches(reference.padded(x, ((2, 2), (1, 1))), (3, 2), (2, 3), (1, 2))
    rows = rows.reshape(5, 8, 6, 2, 2).transpose(3, 0, 1, 4, 2).reshape(2, 5, 8, 12)
    rows = np.concatenate([rows, np.ones((2, 5, 8, 1))], axis=-1)
    found.append((layer, x, g, _sums(rows, g.reshape(5, 8, 2, 3).transpose(2, 0, 1, 3))))

    layer = Embedding(6, 3, padding=2, stack=(2,))
    ids, g = rng.integers(0, 6, size=(2, 5, 4), dtype=np.int32), rng.normal(size=(2, 5, 4, 3))
    ids[:, 0] = (2, 1, 1, 2)
    rows = (ids[..., None] == np.arange(6)) * (ids != 2)[..., None]
    found.append((layer, ids, g, _sums(rows.astype(float), g)))

    layer, x, g = Norm(3), rng.normal(size=(5, 4, 3)), rng.normal(size=(10, 4, 3))
    each = np.concatenate([(np.concatenate([x, x]) * g).sum(axis=1), g.sum(axis=1)], axis=-1)
    found.append((layer, x, g, each[..., None]))

    linear = Linear(4, 3)
    found.append((linear, *_linear(rng, linear, 3)))
    linear = Linear(4, 3, sharing="reduce")
    found.append((linear, *_linear(rng, linear, 8, vectors=2)))
    linear = Linear(4, 3, bias=None)
    found.append((linear, *_linear(rng, linear, 1, vectors=2)))
    found.append((Norm(3, block="full"), x, g[:5], each[:5, :, None]))
    found.append((Bias(3), rng.normal(size=(5, 2, 4)), g[:5], g[:5].sum(axis=1)[..., None]))
    return found


class EigenbasisTests:
    """EKFAC, and bases under :class:`kfcore.Tracked`."""

    backend: Backend

    def test_ekfac_of_every_layer(self) -> None:
        """Scales in the basis of the state, its dense matrix, and a direction that solves with it."""
        b, method, every = self.backend, EKFAC(damping=0.3), cases(np.random.default_rng(40))
        for layer, x, g, examples in every[:3] if b.thrifty else every:
            grad = examples.sum(axis=-3)

            def run(x: Any, g: Any, grad: Any, layer: Any = layer) -> Any:
                state = method.init(layer, g, layer.stack if not isinstance(layer, Bias) else ())
                state = method.refresh(layer, method.observe(state, method.reduce(layer, state, x, g)))
                first = method.precondition(layer, state, grad)
                state = method.observe(state, method.reduce(layer, state, x, g))
                return state, first, method.precondition(layer, state, grad), method.dense(layer, state)

            state, first, direction, dense = b.get(b.call(run, *b.put((x, g, grad))))
            left, right = (
                np.eye(n) if basis is None else basis
                for n, basis in zip(layer.shape, (state.solver.output_basis, state.solver.input_basis), strict=True)
            )
            turned = np.swapaxes(left, -1, -2)[..., None, :, :] @ examples @ right[..., None, :, :]
            scales = (turned**2).mean(axis=-3)
            what = f"{b.name}: EKFAC of {layer}"
            _close(state.scales.values[0], scales, f"{what}: scales")
            kfac = state.solver.output_values[..., :, None] * state.solver.input_values[..., None, :]
            flat = grad.reshape(-1, grad[(0,) * (grad.ndim - 2)].size)
            for found, values in ((first, kfac), (direction, scales)):
                basis = _kron(left, right).reshape(-1, flat.shape[-1], flat.shape[-1])
                matrix = (basis * values.reshape(len(flat), 1, -1)) @ np.swapaxes(basis, -1, -2)
                desired = np.linalg.solve(matrix + 0.3 * np.eye(flat.shape[-1]), flat[..., None])
                _close(found.reshape(desired.shape), desired, f"{what}: direction")
            _close(dense.reshape(matrix.shape), matrix, f"{what}: dense")

    def test_tracked_basis(self) -> None:
        """Stacked factors that drift: orthogonal bases, the ways and the directions of plain NumPy, none the same as decomposed."""
        if self.backend.no_whole_step:
            raise SkipTest(self.backend.no_whole_step)
        steps = ("refine",) if self.backend.thrifty else ("refine", "qr")
        layer = Linear(11, 9, bias=None)
        for step in steps:
            method = KFAC(damping=Damping(0.3, "exact"), basis=Tracked(smallest=4, block=3, tolerance=2e-3, step=step), stats_decay=1.0)
            rng = np.random.default_rng(41)
            sizes = np.linspace(1.0, 3.0, 11)
            walk = [(sizes * rng.normal(size=(2, 30, 1, 11)), sizes[:9] * rng.normal(size=(2, 30, 1, 9))) for _ in range(6)]
            grad = rng.normal(size=(2, 9, 11))
            (state, direction), (desired, wanted) = (self._followed(b, method, layer, walk, grad) for b in (self.backend, numpy_backend()))
            what = f"{self.backend.name}: Tracked(step={step!r})"
            assert np.array_equal(state.solver.ways, desired.solver.ways), f"{what}: ways {state.solver.ways}, not {desired.solver.ways}"
            assert desired.solver.ways[..., 1].min() > 3, f"{what}: no basis was improved"
            _close(direction, wanted, f"{what}: direction")
            for basis in (state.solver.input_basis, state.solver.output_basis):
                apart = np.abs(np.swapaxes(basis, -1, -2) @ basis - np.eye(basis.shape[-1])).max()
                assert apart < 1e-13, f"{what}: basis off orthogonality by {apart:.3g}"
            empty = method.init(layer, self.backend.put(np.zeros(())), (2,))
            kept = self.backend.call(lambda state, method=method: method.refresh(layer, state), empty)
            assert_close(kept.kept, np.ones(2, np.int32), self.backend, what=f"{what}: refreshes without statistics")

    def _followed(self, b: Backend, method: KFAC, layer: Linear, walk: list[tuple[Arr, Arr]], grad: Arr) -> tuple[Any, Arr]:
        """State and direction after each batch was observed and the bases refreshed."""

        def step(state: Any, a: Any, g: Any) -> Any:
            return method.refresh(layer, method.observe(state, method.reduce(layer, state, a, g)))

        run, state = b.wrap(step), method.init(layer, b.put(np.zeros(())), (2,))
        for batch in walk:
            state = run(state, *b.put(batch))
        direction = b.call(lambda state, grad: method.precondition(layer, state, grad), state, b.put(grad))
        return b.get(state), b.get(direction)


def _kron(left: Arr, right: Arr) -> Arr:
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    n = left.shape[-1] * right.shape[-1]
    return product.reshape(*product.shape[:-4], n, n)


def _close(x: Arr, desired: Arr, what: str) -> None:
    error, top = float(np.abs(x - desired).max()), float(np.abs(desired).max())
    assert error <= 1e-9 * top, f"{what}: off by {error:.3g} where the largest is {top:.3g}"
