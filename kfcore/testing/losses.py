"""The losses: terms, Fisher vectors from given noise, square roots of output Hessians."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfcore import KFAC, MSE, BCEWithLogits, CrossEntropy, Linear, fisher_vectors
from kfcore.testing import reference
from kfcore.testing.backend import Backend, assert_close

N, C, T = 4, 3, 2
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Of ordinary numbers."""
    return 1.0 / (1.0 + np.exp(-x))


class LossTests:
    """Every loss against its formula."""

    backend: Backend

    def _vectors(self, loss: Any, outputs: np.ndarray, targets: np.ndarray | None, noise: np.ndarray, dtype: str) -> tuple[Any, Any, Any]:
        """Terms, sample, and the sum over the columns of the squares ``v v^T`` of each example."""
        b = self.backend

        def run(outputs: Any, targets: Any, noise: Any) -> Any:
            sample = loss.sample(outputs, targets, lambda kind, shape: noise)
            return sample, tuple(loss.sqrt_hessian(outputs, targets))

        sample, columns = b.call(run, *b.put((outputs, targets, noise), dtype))
        assert_close(columns, tuple(np.zeros(outputs.shape, dtype) for _ in columns), b, np.inf, f"{loss}: columns")
        flat = [b.to_numpy(column).astype(np.float64).reshape(len(outputs), -1) for column in columns]
        return loss.terms(b.put(outputs, dtype), b.put(targets)), sample, sum(np.einsum("ni,nj->nij", v, v) for v in flat)

    def _judge(self, loss: Any, got: Any, sample: np.ndarray, hessian: np.ndarray, dtype: str) -> None:
        assert_close(got[1], sample.astype(dtype), self.backend, TOLERANCE[dtype], f"{loss} in {dtype}: sample")
        error = np.abs(got[2] - hessian).max()
        assert error < 10 * TOLERANCE[dtype], f"{self.backend.name}: {loss} in {dtype}: columns do not give the Hessian, off by {error:.3g}"

    def test_cross_entropy(self) -> None:
        """Classes last and second, with and without ignored positions."""
        rng = np.random.default_rng(20)
        logits, uniform = rng.normal(size=(N, T, C)), rng.uniform(size=(N, T))
        targets = rng.integers(0, C, size=(N, T))
        targets[1, 0] = targets[3, 1] = -1
        p = reference.softmax(logits)
        labels = (np.cumsum(p, axis=-1) <= uniform[..., None]).sum(axis=-1)
        sample = p - np.eye(C)[labels]
        hessian = np.zeros((N, T, C, T, C))
        for t in range(T):
            hessian[:, t, :, t, :] = p[:, t, :, None] * np.eye(C) - p[:, t, :, None] * p[:, t, None, :]
        for axis, ignore, dtype in ((-1, None, "float64"), (-1, -1, "float64"), (1, -1, "float64"), (1, None, "float32")):
            loss = CrossEntropy(axis=axis, ignore_index=ignore)
            kept = np.ones((N, T)) if ignore is None else (targets != ignore).astype(float)
            outputs = np.moveaxis(logits, -1, axis)
            got = self._vectors(loss, outputs, targets, uniform, dtype)
            desired = hessian * kept[:, :, None, None, None]
            if axis == 1:
                desired = desired.transpose(0, 2, 1, 4, 3)
            wanted = np.moveaxis(sample * kept[..., None], -1, axis)
            self._judge(loss, got, wanted, desired.reshape(N, T * C, T * C), dtype)
            if ignore is None:
                assert got[0] == N * T
            else:
                assert_close(got[0], np.asarray(kept.sum(), dtype), self.backend, what=f"{loss}: terms")

    def test_mse(self) -> None:
        """Hessian 2 at every number."""
        rng = np.random.default_rng(21)
        outputs, normal = rng.normal(size=(2, N, T, C))
        hessian = np.broadcast_to(2.0 * np.eye(T * C), (N, T * C, T * C))
        for dtype in ("float32",) if self.backend.thrifty else TOLERANCE:
            got = self._vectors(MSE(), outputs, None, normal, dtype)
            self._judge(MSE(), got, np.sqrt(2.0) * normal, hessian, dtype)
            assert got[0] == N * T * C

    def test_binary_cross_entropy(self) -> None:
        """Hessian ``p (1 - p)`` at every number."""
        rng = np.random.default_rng(22)
        outputs, uniform = rng.normal(size=(N, T, C)), rng.uniform(size=(N, T, C))
        p = sigmoid(outputs)
        hessian = np.eye(T * C) * (p * (1 - p)).reshape(N, T * C, 1)
        for dtype in ("float32",) if self.backend.thrifty else TOLERANCE:
            got = self._vectors(BCEWithLogits(), outputs, None, uniform, dtype)
            self._judge(BCEWithLogits(), got, p - (uniform < p), hessian, dtype)
            assert got[0] == N * T * C

    def test_fisher_vectors_into_a_block(self) -> None:
        """Exact and Monte Carlo output factors of the last layer, from outputs to the average."""
        rng = np.random.default_rng(23)
        logits, inputs, uniform = rng.normal(size=(N, 1, C)), rng.normal(size=(N, 1, 2)), rng.uniform(size=(N, 1))
        p = reference.softmax(logits)[:, 0]
        labels = (np.cumsum(p, axis=-1) <= uniform).sum(axis=-1)
        drawn = p - np.eye(C)[labels]
        exact = (np.einsum("ni,ij->nij", p, np.eye(C)) - np.einsum("ni,nj->nij", p, p)).mean(axis=0)
        b, layer = self.backend, Linear(2, C)
        for fisher, desired in (("exact", exact), ("mc", np.einsum("ni,nj->ij", drawn, drawn) / N)):
            method = KFAC(fisher=fisher)  # pyright: ignore[reportArgumentType]

            def run(state: Any, logits: Any, inputs: Any, noise: Any, method: KFAC = method) -> Any:
                total = method.reduce(layer, state, inputs, None)
                for vector in fisher_vectors(method.fisher, CrossEntropy(), logits, draw=lambda kind, shape: noise):  # pyright: ignore
                    total = total + method.reduce(layer, state, None, vector)
                return method.observe(state, total.over(float(N)))

            state = b.call(run, method.init(layer, b.put(np.zeros(()))), *b.put((logits, inputs, uniform)))
            assert_close(state.average.values[1], desired, b, 1e-10, f"output factor, fisher={fisher}")
