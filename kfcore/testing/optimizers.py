"""Whole optimizers: ten steps of a small network against the same ten steps in plain NumPy."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import numpy as np

from kfcore import (
    EKFAC,
    KFAC,
    Control,
    CustomLoss,
    Damping,
    Embedding,
    LevenbergMarquardt,
    Linear,
    Method,
    ModelOptimizer,
    Norm,
    Optimizer,
    QuadraticModel,
    StepSize,
)
from kfcore._array import namespace
from kfcore.checkpoint import from_arrays, to_arrays
from kfcore.model import Model, flatten
from kfcore.optimizer import added, merge
from kfcore.testing import reference
from kfcore.testing.backend import Backend, Function, assert_close, leaves

N, STEPS = 6, 10
METHOD_OPTIONS = ("stats_every", "refresh_every", "stats_decay")
EKFAC_OPTIONS = ("scales", "moved")
OPTIMIZER_OPTIONS = ("learning_rate", "momentum", "nesterov", "weight_decay", "decay", "clip", "graft", "spread")


def split(options: dict[str, Any]) -> tuple[KFAC | EKFAC, dict[str, Any]]:
    """Method and optimizer options of the options of a trajectory of the reference; those of EKFAC choose it."""
    kind = EKFAC if any(name in options for name in EKFAC_OPTIONS) else KFAC
    damping = Damping(
        options.get("damping", 1e-3),
        "exact" if kind is EKFAC else options.get("kind", "factored"),
        relative=options.get("relative", False),
    )
    method = kind(damping=damping, **{k: v for k, v in options.items() if k in METHOD_OPTIONS + EKFAC_OPTIONS})
    return method, {k: v for k, v in options.items() if k in OPTIMIZER_OPTIONS}


def linears(sizes: tuple[int, int, int], options: dict[str, Any]) -> dict[str, Linear]:
    """Layer descriptions of :func:`reference.network`."""
    rest = {"bias": options.get("bias", "joint"), "layout": options.get("layout", "oi")}
    return {"fc1": Linear(*sizes[:2], **rest), "fc2": Linear(*sizes[1:], **rest)}


class OptimizerTests:
    """Optimizer, ModelOptimizer, Preconditioner and checkpoints."""

    backend: Backend

    def _wrap_step(self, function: Function) -> Function:
        """A whole step under the transform, or as it is where the backend says that this is not meaningful."""
        return Backend.wrap(self.backend, function) if not self.backend.no_whole_step else self._plain.wrap(function)

    @property
    def _plain(self) -> Backend:
        b = self.backend
        return Backend(b.name, b.library, b.asarray, b.array_type, b.to_numpy)

    def _batches(self, rng: np.random.Generator, sizes: tuple[int, int, int], count: int = STEPS) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(rng.normal(size=(N, sizes[0])), rng.normal(size=(N, sizes[2]))) for _ in range(count)]

    def _skip_if_thrifty(self) -> None:
        if self.backend.thrifty:
            raise SkipTest("compilation costs too much; the other steps cover these options together")

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return (4, 4, 4) if self.backend.thrifty else (4, 5, 3)

    def _train(self, *, dtype: str = "float64", group: bool = False, steps: int = STEPS, **options: Any) -> None:
        """Some steps of both, compared after each; groups need equal layers."""
        b, rng = self.backend, np.random.default_rng(30)
        sizes = (4, 4, 4) if group else self._sizes
        method, rest = split(options)
        layout = options.get("layout", "oi")
        trajectory = reference.EigenTrajectory if isinstance(method, EKFAC) else reference.Trajectory
        truth = trajectory(reference.random_params(rng, sizes, layout), **options)
        optimizer = Optimizer(method, linears(sizes, options), group=group, **rest)
        params = b.put(truth.params, dtype)
        state = optimizer.init(params)
        step = self._wrap_step(optimizer.step)
        traced = not (b.eager or b.no_whole_step)
        for i, (x, y) in enumerate(self._batches(rng, sizes, steps)):
            grads, records = reference.network(_double(b.get(params)), x, y, layout)
            due = traced or bool(optimizer.stats_due(state))
            params, state = step(params, b.put(grads, dtype), b.put(records, dtype) if due else None, state)
            truth.step(x, y)
            desired = {k: v.astype(dtype) for k, v in flatten(truth.params).items()}
            tolerance = 1e-9 if dtype == "float64" else 2e-3
            assert_close(flatten(params), desired, b, tolerance, f"step {i} of {options} group={group}: params")
        nothing = {name: {} for name in ("dropped_statistics", "kept_refreshes", "jittered_factors", "widened_factors")}
        assert optimizer.diagnostics(state) == {"steps": steps, "skipped_steps": 0, **nothing}

    def test_step_with_momentum_and_decoupled_decay(self) -> None:
        """The defaults, with statistics and refreshes that are not always due, in both dtypes."""
        self._skip_if_thrifty()
        for dtype in ("float64", "float32"):
            self._train(damping=0.1, stats_every=2, refresh_every=3, weight_decay=0.01, dtype=dtype)

    def test_step_with_clip_and_coupled_decay(self) -> None:
        """Nesterov momentum, a trust region that is active, exact damping."""
        self._skip_if_thrifty()
        self._train(damping=0.1, kind="exact", clip=1e-3, nesterov=True, weight_decay=0.01, decay="coupled", refresh_every=2)

    def test_step_with_graft(self) -> None:
        """Norms of the gradients, relative damping, no momentum."""
        self._skip_if_thrifty()
        self._train(damping=0.1, relative=True, graft=True, momentum=0.0, refresh_every=1)

    def test_step_with_group(self) -> None:
        """Layers of equal shape in one call, grafted."""
        self._train(damping=0.1, refresh_every=3, group=True, graft=True)

    def test_step_with_spread(self) -> None:
        """Refreshes spread over the steps; exact damping; a separate bias; weights stored as ``[in, out]``."""
        self._train(damping=0.1, kind="exact", spread=True, refresh_every=4, bias="separate", layout="io")

    def test_step_with_schedules(self) -> None:
        """Functions of the step for everything that may be one, and every other option of the step."""
        self._train(
            damping=lambda t: 0.1 / (1.0 + t),
            learning_rate=lambda t: 0.1 / (2.0 + t),
            momentum=lambda t: 0.5 + 0.01 * t,
            weight_decay=lambda t: 0.01 * t,
            clip=lambda t: 0.01 / (1.0 + t),
            nesterov=True,
            decay="coupled",
            stats_every=2,
            refresh_every=3,
        )

    def test_step_with_masks(self) -> None:
        """Batches of several sizes filled up to one with examples that are none, whatever they hold: those without them."""
        b, rng, sizes = self.backend, np.random.default_rng(37), self._sizes
        truth = reference.Trajectory(reference.random_params(rng, sizes), damping=0.1, refresh_every=2)
        optimizer = Optimizer(KFAC(damping=0.1, refresh_every=2), linears(sizes, {}))
        params = b.put(truth.params)
        state = optimizer.init(params)

        def run(params: Any, grads: Any, records: Any, state: Any, mask: Any, terms: Any) -> Any:
            masked = {name: (*record, mask) for name, record in records.items()}
            return optimizer.step(params, grads, masked, state, terms=terms)

        step = self._wrap_step(run)
        for n in (N, N - 2, N - 3):
            x, y = rng.normal(size=(n, sizes[0])), rng.normal(size=(n, sizes[2]))
            grads, records = reference.network(truth.params, x, y)
            filled = {k: tuple(np.concatenate([v, np.full((N - n, v.shape[1]), np.nan)]) for v in r) for k, r in records.items()}
            mask, terms = np.arange(N) < n, np.asarray(float(n))
            params, state = step(params, b.put(grads), b.put(filled), state, b.put(mask), b.put(terms))
            truth.step(x, y)
            assert_close(flatten(params), flatten(truth.params), b, 1e-9, f"step with {n} examples of {N}: params")
        assert optimizer.diagnostics(state)["dropped_statistics"] == {}

    def test_step_with_ekfac(self) -> None:
        """Twenty steps with refreshes behind every third, a joint bias, a trust region."""
        self._train(damping=0.1, scales="average", moved="transport", refresh_every=3, clip=1e-2, steps=20)

    def test_step_with_ekfac_otherwise(self) -> None:
        """Every kind of scales and of moving them, spread, grouped and scheduled; a separate bias; single precision."""
        self._skip_if_thrifty()
        self._train(damping=0.1, scales="batch", moved="reset", refresh_every=2, spread=True, bias="separate", layout="io")
        self._train(damping=0.1, scales="gradient", moved="measure", refresh_every=3, stats_every=2, group=True)
        self._train(damping=lambda t: 0.3 / (1.0 + t), scales="average", moved="measure", refresh_every=1, relative=True)
        self._train(damping=0.1, scales="average", moved="transport", refresh_every=4, dtype="float32")

    def test_step_by_the_quadratic_model(self) -> None:
        """Coefficients, an adaptive damping with its search, steps that are taken back: as NumPy takes them."""
        b, rng, sizes = self.backend, np.random.default_rng(38), self._sizes
        rule = LevenbergMarquardt(0.5, every=2, factor=0.8, search_every=2)
        how = {"quadratic": QuadraticModel(reject=True), "weight_decay": 0.01, "decay": "coupled", "clip": 0.05}
        optimizer = Optimizer(KFAC(damping=rule, refresh_every=2), linears(sizes, {}), **how)

        def run(params: Any, grads: Any, records: Any, state: Any) -> Any:
            xp = namespace(params["fc1"]["weight"])

            def product(vector: Any) -> Any:
                """Of the loss at hand only in its size: a third of the steps promise too much."""
                return {k: product(v) if isinstance(v, dict) else 0.2 * v for k, v in vector.items()}

            def loss(params: Any) -> Any:
                (x, _), (w, v) = records["fc1"], (params[k]["weight"] for k in ("fc1", "fc2"))
                hidden = xp.tanh(x @ w.T + params["fc1"]["bias"])
                return xp.mean((hidden @ v.T + params["fc2"]["bias"]) ** 2)

            return optimizer.step(params, grads, records, state, curvature_product=product, loss=loss)

        host = reference.random_params(rng, sizes)
        params = b.put(host)
        there, state, step = optimizer.init(host), optimizer.init(params), self._wrap_step(run)
        for i, (x, y) in enumerate(self._batches(rng, sizes, 6)):
            grads, records = reference.network(host, x, y)
            host, there = run(host, grads, records, there)
            params, state = step(params, b.put(grads), b.put(records), state)
            assert_close(flatten(params), flatten(host), b, 1e-9, f"step {i} by the quadratic model: params")
            desired = Control(*(np.asarray(x) for x in there.step.control or ()))
            assert_close(state.step.control, desired, b, 1e-9, f"step {i}: control")
        control = optimizer.diagnostics(there)
        assert 0 < control["rejected"] < 6, control
        assert control["damping"] != rule.initial, control
        assert control["factored"] ** 2 != rule.initial, control

    def test_step_of_a_table_and_a_norm(self) -> None:
        """Four steps with a table that has padding, a normalisation and a dense layer, by every kind of factor."""
        b, rng, num, features, damping = self.backend, np.random.default_rng(36), 5, 3, 0.1
        layers = {"embed": Embedding(num, features, padding=0), "norm": Norm(features), "head": Linear(features, 2)}
        optimizer = Optimizer(KFAC(damping=damping, refresh_every=1), layers, learning_rate=0.05, momentum=0.0)
        host: dict[str, Any] = {n: {r: rng.normal(size=s) for r, s in layer.parameters.items()} for n, layer in layers.items()}
        params = b.put(host)
        state, step = optimizer.init(params), self._wrap_step(optimizer.step)
        seen: list[dict[str, Any]] = []
        for i in range(4):
            ids, y = rng.integers(0, num, size=(N, 3), dtype=np.int32), rng.normal(size=(N, 3, 2))
            grads, records = reference.tokens(host, ids, y, padding=0)
            params, state = step(params, b.put(grads), b.put(records), state)
            own = {name: (x, N * g) for name, (x, g) in records.items()}  # of each example's own loss, not of the mean
            seen.append(
                {
                    "embed": reference.table_factors(*own["embed"], num, 0),
                    "norm": reference.norm_factors(*own["norm"]),
                    "head": reference.factors(*own["head"]),
                }
            )
            for name, layer in layers.items():
                a, g = (reference.average([s[name][side] for s in seen], 0.95) for side in (0, 1))
                moved = layer.parameters_of({"": reference.direction(a, g, layer.matrices(grads[name])[""], damping)})
                host[name] = {role: host[name][role] - 0.05 * moved[role] for role in moved}
            assert_close(flatten(params), flatten(host), b, 1e-9, f"step {i} of a table and a norm")
        assert optimizer.diagnostics(state)["dropped_statistics"] == {}

    def test_model_optimizer(self) -> None:
        """Statistics merged from two micro-batches, a scaled loss, overrides; the adapters' level."""
        b, rng, sizes = self.backend, np.random.default_rng(31), self._sizes
        truth = reference.Trajectory(reference.random_params(rng, sizes), damping=0.2, refresh_every=2, learning_rate=0.05)
        model = Model(linears(sizes, {}), {"scale": sizes[1:2]})
        optimizer = ModelOptimizer(KFAC(damping=0.1, refresh_every=2), model, StepSize())
        params = b.put(flatten(truth.params))
        state = optimizer.init(params)

        def update(params: Any, grads: Any, records: Any, state: Any) -> Any:
            def reduce(state: Any) -> dict[str, Any]:
                total: dict[str, Any] = {}
                for name, (a, g) in records.items():
                    for part in (slice(0, 2), slice(2, N)):
                        merge(total, optimizer.reduce(state, name, a[part, None, :], 8.0 * g[part, None, :]))
                return total

            changes = {"damping": 0.2, "learning_rate": 0.05}
            updates, state = optimizer.update(params, grads, state, reduce, terms=float(N), loss_scale=8.0, overrides=changes)
            return {name: added(p, updates[name]) for name, p in params.items()}, state

        run = self._wrap_step(update)
        for x, y in self._batches(rng, sizes, 4):
            grads, records = reference.network(truth.params, x, y)
            params, state = run(params, b.put(flatten(grads)), b.put(records), state)
            truth.step(x, y)
        assert_close(params, flatten(truth.params), b, 1e-9, "params of a ModelOptimizer")

    def _one(self, rng: np.random.Generator, method: Method | None = None) -> tuple[Any, Optimizer, dict[str, Any], Any, Function]:
        sizes = self._sizes
        params = reference.random_params(rng, sizes)
        optimizer = Optimizer(method or KFAC(damping=0.1, refresh_every=2), linears(sizes, {}))
        there = self.backend.put(params)
        return params, optimizer, there, optimizer.init(there), self._wrap_step(optimizer.step)

    def test_nan_leaves_the_weights_finite(self) -> None:
        """NaN in the records alone, in everything, and on the very first batch: counted, and the weights stay numbers."""
        b, rng = self.backend, np.random.default_rng(32)
        ((x, y),) = self._batches(rng, self._sizes, 1)
        _, optimizer, start, fresh, step = self._one(rng)
        for history in (("good", "records", "all", "good"), ("all", "good", "good")):
            params, state = start, fresh
            for kind in history:
                grads, records = reference.network(b.get(params), x, y)
                if kind != "good":
                    records["fc1"][1][...] = np.nan
                if kind == "all":
                    grads["fc1"]["weight"][...] = np.nan
                before = b.get(params)
                params, state = step(params, b.put(grads), b.put(records), state)
                for path, value in leaves(b.get((params, state)), "state"):
                    assert np.isfinite(value).all(), f"{b.name}: {path} is not finite after {kind} of {history}"
                old = dict(leaves(before))
                moved = any(not np.array_equal(old[path], value) for path, value in leaves(b.get(params)))
                assert moved == (kind != "all"), f"{b.name}: params moved: {moved}, after {kind} of {history}"
            found = optimizer.diagnostics(state)
            assert found["skipped_steps"] == history.count("all"), f"{b.name}: {found}"
            assert found["dropped_statistics"]["fc1"] == history.count("all") + history.count("records"), f"{b.name}: {found}"

    def test_checkpoint_round_trip(self) -> None:
        """A state goes to NumPy arrays and back bit for bit, and on in another library as it would have here."""
        self._round_trip(KFAC(damping=0.1, refresh_every=2), 2)

    def test_checkpoint_round_trip_of_ekfac(self) -> None:
        """Scales and the basis they belong to, after a step whose refresh came late."""
        self._round_trip(EKFAC(damping=0.1, refresh_every=2), 3)

    def _round_trip(self, method: Method, steps: int) -> None:
        b, rng = self.backend, np.random.default_rng(33)
        batches = self._batches(rng, self._sizes, steps + 1)
        host, optimizer, params, state, step = self._one(rng, method)
        fresh = optimizer.init(params)
        for x, y in batches[:-1]:
            grads, records = reference.network(b.get(params), x, y)
            params, state = step(params, b.put(grads), b.put(records), state)
        bound = optimizer.bind(params)
        arrays, header = to_arrays(bound, state)
        loaded = from_arrays(bound, fresh, arrays, header)
        assert_close(loaded.curvature.blocks, b.get(state.curvature.blocks), b, 0.0, "loaded blocks")
        assert_close(loaded.step, b.get(state.step), b, 0.0, "loaded step state")
        assert_close(loaded.curvature[:3], b.get(state.curvature[:3]), b, 0.0, "loaded counters", anywhere=True)
        grads, records = reference.network(b.get(params), *batches[-1])
        on, _ = step(params, b.put(grads), b.put(records), loaded)
        there = from_arrays(bound, optimizer.init(host), arrays, header)
        desired, _ = optimizer.step(b.get(params), grads, records, there)
        assert_close(flatten(on), flatten(desired), b, 1e-9, "params after a checkpoint, here and in NumPy")

    def test_preconditioner(self) -> None:
        """Observe, refresh with a damping a block, and precondition by name."""
        b, rng = self.backend, np.random.default_rng(34)
        params, optimizer, there, _, _ = self._one(rng)
        ((x, y),) = self._batches(rng, self._sizes, 1)
        grads, records = reference.network(params, x, y)
        bound = optimizer.bind(there)
        preconditioner, damping = bound.preconditioner, {"fc1": 0.2, "fc2": 0.3, "scale": 0.4}

        def run(state: Any, records: Any, grads: Any) -> Any:
            statistics: dict[str, Any] = {}
            for name, (a, g) in records.items():
                statistics |= bound.reduce(state, name, a[:, None, :], g[:, None, :])
            scale = preconditioner.blocks["scale"]
            statistics["scale"] = scale.method.reduce(scale.layer, state.curvature.blocks["scale"], grad=grads["scale"], terms=2.0)
            curvature = preconditioner.refresh(preconditioner.observe(state.curvature, statistics), damping)
            return curvature, preconditioner.precondition(curvature, bound.model.matrices(grads))

        curvature, directions = self._wrap_step(run)(bound.init(flatten(there)), b.put(records), b.put(flatten(grads)))
        desired = {"scale": grads["scale"] / (2.0 * grads["scale"] ** 2 + 0.4)}
        for name, (a, g) in records.items():
            matrix = np.hstack([grads[name]["weight"], grads[name]["bias"][:, None]])
            desired[name] = reference.direction(*reference.factors(a[:, None], g[:, None]), matrix, damping[name])
        assert_close(directions, {name: desired[name] for name in directions}, b, 1e-9, "directions")
        ones = (np.asarray(0, np.int32), np.asarray(1, np.int32), np.asarray(1, np.int32))
        assert_close(curvature[:3], ones, self.backend, what="counters", anywhere=True)

    def test_custom_loss(self) -> None:
        """Functions of the user's take part in a Fisher type as they are."""
        b = self.backend
        outputs = np.random.default_rng(35).normal(size=(N, 2))
        loss = CustomLoss(lambda outputs, targets: float(outputs.shape[0]), lambda f, y, draw: 3.0 * f, lambda f, y: [2.0 * f])
        sample, columns = b.call(lambda f: (loss.sample(f, None, lambda kind, shape: f), tuple(loss.sqrt_hessian(f))), b.put(outputs))
        assert_close((sample, columns), (3.0 * outputs, (2.0 * outputs,)), b, what="custom loss")
        assert loss.terms(b.put(outputs)) == N


def _double(tree: Any) -> Any:
    return {k: _double(v) if isinstance(v, dict) else v.astype(np.float64) for k, v in tree.items()}
