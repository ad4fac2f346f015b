"""The methods that keep means of rows: one block at a time, and a whole optimizer, against dense matrices in NumPy."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy
import numpy as np

from kfcore import FOOF, MAC, SMAC, Damping, Embedding, Eva, Gradient, Linear, Method, Optimizer
from kfcore._array import namespace
from kfcore.layers import Bias, Layer, Norm
from kfcore.model import flatten
from kfcore.testing import reference
from kfcore.testing.backend import Backend, assert_close
from kfcore.testing.verbs import CONVOLUTIONS, DECAY, TOLERANCE

Arr = np.ndarray
KINDS = {"mac": MAC, "smac": SMAC, "eva": Eva, "foof": FOOF}
N, STEPS = 6, 8


def sides(kind: str, rows: Arr, grads: Arr) -> tuple[Arr, Arr]:
    """What is averaged of one batch: of input rows ``[..., n, in]`` and output gradients ``[..., N, S, out]`` of single examples."""
    a = np.einsum("...ni,...nj->...ij", rows, rows) / rows.shape[-2] if kind == "foof" else rows.mean(axis=-2)
    if kind == "smac":
        return a, (grads**2).sum(axis=-2).mean(axis=-2)
    return a, grads.sum(axis=-2).mean(axis=-2)


def damped(kind: str, a: Arr, g: Arr, damping: float, decoupled: bool = True) -> Arr:
    """The matrix whose inverse is applied, dense."""
    eye_a, eye_g = np.eye(a.shape[-1]), np.eye(len(g))
    if kind == "eva":
        return np.kron(np.outer(g, g), np.outer(a, a)) + damping * np.kron(eye_g, eye_a)
    right = (a if kind == "foof" else np.outer(a, a)) + damping * eye_a
    left = np.diag(g) + damping * eye_g if kind == "smac" else eye_g
    return np.kron(left, right) / (damping if decoupled else 1.0)


def direction(kind: str, a: Arr, g: Arr, grad: Arr, damping: float, decoupled: bool = True) -> Arr:
    """Its inverse applied to ``grad [..., out, in]``."""
    if grad.ndim > 2:
        return np.stack([direction(kind, x, y, z, damping, decoupled) for x, y, z in zip(a, g, grad, strict=True)])
    return np.linalg.solve(damped(kind, a, g, damping, decoupled), grad.reshape(-1)).reshape(grad.shape)


class MeanTrajectory(reference.Trajectory):
    """One of these methods on :func:`reference.network`, the first layer as its ``first`` says."""

    def __init__(self, params: dict[str, Any], kind: str, first: str, **options: Any) -> None:
        super().__init__(params, **options)
        self.kind, self.first = kind, first

    def _kind(self, name: str) -> str:
        return "foof" if name == "fc1" and self.first != "rank-one" else self.kind

    def _look(self, records: dict[str, tuple[Arr, Arr]], grads: dict[str, Any], o: dict[str, Any]) -> None:
        for name, (a, g) in records.items():
            rows = np.hstack([a, np.ones((len(a), 1))])
            self.seen.setdefault(name, []).append(sides(self._kind(name), rows, len(a) * g[:, None]))
        self.seen.setdefault("scale", []).append((len(records["fc1"][0]) * grads["scale"] ** 2,))

    def _direction(self, name: str, grad: Arr, due: bool, o: dict[str, Any]) -> Arr:
        if name == "scale":
            if self.kind == "eva":
                return grad / (self._averages(name, o)[0] + o["damping"])
            return grad if self.kind == "mac" else grad / o["damping"]
        of_first = name == "fc1" and self.first != "rank-one"
        if of_first and self.kind != "foof":
            due = self.count % (10 * o["refresh_every"]) == 0
        if due:
            self.used[name] = average(self.seen[name], 1.0 if of_first and self.kind != "foof" else o["stats_decay"])
        decoupled = self.first == "decoupled" if of_first else self.kind in ("mac", "smac")
        a, g = self.used[name]
        return direction(self._kind(name), a, g, grad, o["damping"], decoupled)


def average(seen: list[Any], decay: float) -> tuple[Arr, Arr]:
    """Running averages of both sides."""
    a, g = (reference.average(list(values), decay) for values in zip(*seen, strict=True))
    return a, g


class MeanTests:
    """MAC, SMAC, Eva, FOOF and Gradient."""

    backend: Backend

    def _kinds_of_layers(self) -> list[tuple[Any, Any, Arr]]:
        """Layers with inputs of five examples, and masks of those that may have one."""
        rng = np.random.default_rng(40)
        mask = rng.random((5, 3)) < 0.6
        mask[0], mask[1], mask[2, 0] = True, False, True
        ids = rng.integers(0, 6, size=(5, 3), dtype=np.int32)
        cases: list[tuple[Any, Any, Any]] = [
            (Linear(4, 3), rng.normal(size=(5, 3, 4)), None),
            (Linear(4, 3, None, "reduce", stack=(2,)), rng.normal(size=(2, 5, 3, 4)), None),
            (Linear(4, 3, sharing="reduce"), rng.normal(size=(5, 3, 4)), mask),
            (Linear(4, 3), np.where(mask[..., None], rng.normal(size=(5, 3, 4)), np.nan), mask),
            (Embedding(6, 3, padding=2), ids, None),
            (Embedding(6, 3), np.where(mask, ids, np.int32(-7)), mask),
            (Bias(3), rng.normal(size=(5, 3, 4)), None),
            (Norm(3), rng.normal(size=(5, 3, 3)), mask),
        ]
        for layer, spatial in CONVOLUTIONS[:2] if self.backend.thrifty else CONVOLUTIONS:
            cases.append((layer, rng.normal(size=(*layer.leading, 5, *spatial, layer.in_channels)), None))
        return cases

    def test_sums_of_input_rows(self) -> None:
        """By every layer kind, without the rows: means of images before their patches, counts of ids, masks."""
        b, cases = self.backend, self._kinds_of_layers()

        def run(arrays: Any) -> Any:
            found = []
            for (layer, _, _), (x, mask) in zip(cases, arrays, strict=True):
                found.append(layer.input_sum(namespace(x), x, namespace(x).float64, mask))
            return found

        found = b.call(run, b.put([(x, mask) for _, x, mask in cases]))
        for (layer, x, mask), total in zip(cases, found, strict=True):
            desired = layer.input_rows(array_api_compat.numpy, x, np.float64, mask).sum(axis=-2)
            assert_close(total, desired, b, 1e-12, f"input_sum of {layer}")

    def _check_means(self, method: Method, layer: Layer, dtype: str = "float64", leading: tuple[int, ...] = ()) -> None:
        """Two batches, a direction, and the matrices that it and the averages stand for."""
        b, rng, kind = self.backend, np.random.default_rng(41), method.name
        decoupled = bool(getattr(method, "decoupled", False))
        out, inp = layer.shape
        joint = getattr(layer, "bias", None) == "joint"
        batches = [(rng.normal(size=(*leading, 5, 3, inp - joint)), rng.normal(size=(*leading, 5, 3, out))) for _ in range(2)]
        grad = rng.normal(size=(*leading, out, inp))
        # the gradient of a bias is summed over positions before it is squared
        of_examples = [g.sum(axis=-2, keepdims=True) if isinstance(layer, Bias) else g for _, g in batches]
        rows = [layer.input_rows(array_api_compat.numpy, a, np.float64) for a, _ in batches]
        seen = [sides(kind, a, g) for a, g in zip(rows, of_examples, strict=True)]
        means = average(seen, DECAY)

        def run(like: Any, batches: Any, grad: Any) -> Any:
            state = method.init(layer, like, leading)
            before = method.precondition(layer, state, grad)
            for a, g in batches:
                state = method.observe(state, method.reduce(layer, state, a, g))
            state = method.refresh(layer, state)
            operator = method.operator(layer, state, damped=True)
            return state.average.values, before, method.precondition(layer, state, grad), operator.matvec(grad)

        values, before, found, product = b.call(run, b.put(np.zeros(()), dtype), b.put(batches, dtype), b.put(grad, dtype))
        what = f"{method} of {layer} in {dtype}"
        assert_close(before, grad.astype(dtype), b, 0.0, f"{what}: before the first refresh")
        wanted = (means[0], None if method.fisher == "forward" else means[1])
        assert_close(values, tuple(None if v is None else v.astype(dtype) for v in wanted), b, TOLERANCE[dtype], f"{what}: averages")
        desired = direction(kind, *means, grad, 0.3, decoupled)
        assert_close(found, desired.astype(dtype), b, TOLERANCE[dtype], f"{what}: direction")
        if not leading:
            forward = (damped(kind, *means, 0.3, decoupled) @ grad.reshape(-1)).reshape(grad.shape)
            assert_close(product, forward.astype(dtype), b, 5 * TOLERANCE[dtype], f"{what}: damped operator")

    def test_directions_by_means(self) -> None:
        """Every method, decoupled or not, both dtypes, stacked; one output, and one input that is constant."""
        layer = Linear(4, 3)
        self._check_means(SMAC(damping=0.3, stats_decay=DECAY), layer)
        self._check_means(Eva(damping=0.3, stats_decay=DECAY), layer)
        if self.backend.thrifty:
            return
        self._check_means(FOOF(damping=0.3, stats_decay=DECAY, decoupled=True), layer)
        self._check_means(FOOF(damping=Damping(0.3, "exact"), stats_decay=DECAY, decoupled=True), layer)
        for kind in KINDS.values():
            self._check_means(kind(damping=0.3, stats_decay=DECAY), layer, "float32")
            self._check_means(kind(damping=0.3, stats_decay=DECAY), Linear(4, 1, None, stack=(2,)), leading=(2,))
            self._check_means(kind(damping=0.3, stats_decay=DECAY), Bias(3))
        self._check_means(MAC(damping=0.3, stats_decay=DECAY, decoupled=False), layer)
        self._check_means(SMAC(damping=0.3, stats_decay=DECAY, decoupled=False), layer)

    def test_directions_of_a_table(self) -> None:
        """A mean that is the shares of the rows, without padding."""
        b, rng, layer, method = self.backend, np.random.default_rng(42), Embedding(6, 3, padding=2), MAC(damping=0.3)
        ids, grad = rng.integers(0, 6, size=(5, 4), dtype=np.int32), rng.normal(size=(3, 6))

        def run(like: Any, ids: Any, grad: Any) -> Any:
            state = method.init(layer, like)
            state = method.refresh(layer, method.observe(state, method.reduce(layer, state, ids)))
            return state.average.values[0], method.precondition(layer, state, grad)

        mean, found = b.call(run, b.put(np.zeros(())), b.put(ids), b.put(grad))
        shares = np.array([(ids == k).sum() * (k != 2) for k in range(6)]) / (ids != 2).sum()
        assert_close(mean, shares, b, 1e-12, "shares of the rows of a table")
        assert_close(found, direction("mac", shares, np.ones(3), grad, 0.3), b, 1e-10, "direction of a table")

    def test_plain_gradients(self) -> None:
        """The gradient, or that over the damping once it is refreshed."""
        b, layer, grad = self.backend, Norm(3), np.random.default_rng(43).normal(size=(6, 1))
        for method, scale in ((Gradient(damping=0.3), 1.0), (Gradient(damping=0.3, decoupled=False), 1.0 / 0.3)):

            def run(like: Any, grad: Any, method: Gradient = method) -> Any:
                state = method.refresh(layer, method.init(layer, like))
                return method.precondition(layer, state, grad), method.operator(layer, state, damped=True).solve(grad)

            for found in b.call(run, b.put(np.zeros(())), b.put(grad)):
                assert_close(found, scale * grad, b, 1e-12, f"{method}")

    def test_steps_by_means(self) -> None:
        """Some steps of every method with a parameter of no layer, first layers of every kind, grouped, scheduled, every form of a step."""
        cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            ("mac", {}, {"stats_every": 2, "refresh_every": 2, "weight_decay": 0.01, "nesterov": "delayed"}),
            ("eva", {}, {"refresh_every": 3, "clip": 1e-3, "decay": "coupled", "weight_decay": 0.01}),
            ("smac", {"first": "decoupled"}, {"group": True, "momentum": 0.0}),
            ("mac", {"first": "rank-one"}, {"group": True, "damping": lambda t: 1.0 / (1.0 + t), "stats_decay": 0.8}),
            ("foof", {}, {"refresh_every": 2}),
        ]
        for kind, own, options in cases[:1] if self.backend.thrifty else cases:
            self._train_means(kind, own, dict(options))

    def _train_means(self, kind: str, own: dict[str, Any], options: dict[str, Any]) -> None:
        b, rng, group = self.backend, np.random.default_rng(44), options.pop("group", False)
        sizes = (4, 4, 4)
        options = {"damping": 0.5, "stats_every": 1, "refresh_every": 1} | options
        nesterov = options.pop("nesterov", False)
        first = own.get("first", "covariance") if kind in ("mac", "smac") else "rank-one"
        truth = MeanTrajectory(reference.random_params(rng, sizes), kind, first, **options)
        truth.options["nesterov"] = (lambda t: t > 0) if nesterov == "delayed" else nesterov
        chosen = {name: options.pop(name) for name in ("damping", "stats_every", "refresh_every", "stats_decay") if name in options}
        layers = {"fc1": Linear(*sizes[:2]), "fc2": Linear(*sizes[1:])}
        optimizer = Optimizer(KINDS[kind](**chosen, **own), layers, group=group, nesterov=nesterov, **options)
        params = b.put(truth.params)
        state = optimizer.init(params)
        step = optimizer.step if b.no_whole_step else b.wrap(optimizer.step)
        for i in range(STEPS):
            x, y = rng.normal(size=(N, sizes[0])) + 1.0, rng.normal(size=(N, sizes[2]))
            grads, records = reference.network(truth.params, x, y)
            params, state = step(params, b.put(grads), b.put(records), state)
            truth.step(x, y)
            assert_close(flatten(params), flatten(truth.params), b, 1e-9, f"step {i} of {kind} with {own} and {options}: params")
        assert optimizer.diagnostics(state)["kept_refreshes"] == optimizer.diagnostics(state)["dropped_statistics"] == {}
