"""The verbs of the methods, one block at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfcore import KFAC, Conv, Damping, Diagonal, Embedding, Linear, Method, Norm
from kfcore._array import namespace
from kfcore.curvature.diagonal import Tensor
from kfcore.layers import Bias, Layer
from kfcore.testing import reference
from kfcore.testing.backend import Backend, assert_close

TOLERANCE = {"float64": 1e-9, "float32": 5e-4}
DECAY = 0.8
CONVOLUTIONS: tuple[tuple[Conv, tuple[int, ...]], ...] = (
    (Conv(2, 3, (3,), padding="same", padding_mode="circular", bias=None, layout="io", channels="last"), (5,)),
    (Conv(4, 6, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=2), (5, 6)),
    (Conv(4, 6, (2, 3), 2, padding=1, groups=2, transposed=True, output_padding=(1, 0), layout="io"), (3, 4)),
    (Conv(2, 2, (2, 2, 1), padding=((1, 0), (1, 1), (0, 0)), padding_mode="reflect", groups=2, sharing="reduce"), (3, 3, 2)),
    (Conv(2, 3, (3, 3), padding=((1, -1), (2, 1)), input_dilation=(2, 1), channels="last"), (3, 4)),
    (Conv(2, 3, (2,), 2, padding="same", padding_mode="replicate", sharing="reduce"), (5,)),
    (Conv(4, 2, (2, 1), 2, padding=1, groups=2, transposed=True, layout="io", leading=(3,)), (2, 3)),
)
"""Convolutions with sizes of an input, which between them use every parameter."""


def captures(rng: np.random.Generator, layer: Any, leading: tuple[int, ...] = (), batches: int = 2) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random captures ``(inputs, output_grads)`` of a few batches with five examples of three positions."""
    out, inp = (layer.features, 2) if isinstance(layer, Bias) else (layer.out_features, layer.in_features)
    return [(rng.normal(size=(*leading, 5, 3, inp)), rng.normal(size=(*leading, 5, 3, out))) for _ in range(batches)]


def _in_form(form: str, x: np.ndarray) -> np.ndarray:
    """A factor as it is stored: a diagonal one as a vector."""
    return np.diagonal(x, axis1=-2, axis2=-1).copy() if form == "diagonal" else x


class MethodTests:
    """KFAC and Diagonal through reduce, observe, refresh, precondition, dense."""

    backend: Backend

    def _fit(self, method: Method, layer: Layer, batches: list[Any], dtype: str, leading: tuple[int, ...] = ()) -> Any:
        """State that has seen the batches, refreshed; every verb a call of its own, the first two together where thrifty."""
        b = self.backend
        reduce = b.wrap(lambda state, a, g: method.reduce(layer, state, a, g))
        observe = b.wrap(method.observe)
        both = b.wrap(lambda state, a, g: method.observe(state, method.reduce(layer, state, a, g)))
        state = method.init(layer, b.put(np.zeros(()), dtype), leading)
        for batch in batches:
            put = b.put(batch, dtype)
            state = both(state, *put) if b.thrifty else observe(state, reduce(state, *put))
        return b.call(lambda state: method.refresh(layer, state), state)

    def _check(
        self,
        method: KFAC,
        layer: Layer,
        batches: list[Any],
        expected: list[tuple[np.ndarray, np.ndarray]],
        dtype: str,
        leading: tuple[int, ...] = (),
    ) -> None:
        """Averages, direction and dense block against the factors of each batch."""
        b, tolerance = self.backend, TOLERANCE[dtype]
        rule = method.rule
        what = f"KFAC({rule.kind}, {rule.norm}, relative={rule.relative}, fisher={method.fisher}) of {layer} in {dtype}"
        a, g = (reference.average(list(values), DECAY) for values in zip(*expected, strict=True))
        grad = np.random.default_rng(9).normal(size=(*leading, *layer.shape))
        state = self._fit(method, layer, batches, dtype, leading)
        output, inp = (_in_form(form, x.astype(dtype)) for form, x in zip(layer.forms, (g, a), strict=True))
        wanted = (inp, None if method.fisher == "forward" else output)
        assert_close(state.average.values, wanted, b, tolerance, f"{what}: averages")
        assert_close(state.dropped, np.zeros(leading, np.int32), b, what=f"{what}: dropped")
        assert_close(state.kept, np.zeros(leading, np.int32), b, what=f"{what}: kept")
        direction = b.call(lambda state, grad: method.precondition(layer, state, grad), state, b.put(grad, dtype))
        kind = "exact" if method.fisher == "forward" else rule.kind
        desired = reference.direction(a, g, grad, 0.3, kind, rule.norm, rule.relative)
        assert_close(direction, desired.astype(dtype), b, tolerance, f"{what}: direction")
        if not leading and not (b.thrifty and rule.kind != "plain"):
            dense = b.call(lambda state: method.dense(layer, state), state)
            assert_close(dense, np.kron(g, a).astype(dtype), b, tolerance, f"{what}: dense")

    def _kfac(self, layer: Any, damping: Damping, dtype: str = "float64", fisher: Any = "empirical", leading: tuple[int, ...] = ()) -> None:
        rng = np.random.default_rng(8)
        batches = captures(rng, layer, leading)
        joint = layer.bias == "joint"
        expected = [reference.factors(*batch, layer.sharing, joint) for batch in batches]
        if fisher == "forward":
            expected = [(a, np.broadcast_to(np.eye(layer.out_features), g.shape)) for a, g in expected]
        self._check(KFAC(damping=damping, stats_decay=DECAY, fisher=fisher), layer, batches, expected, dtype, leading)

    def test_kfac_damping_kinds(self) -> None:
        """Exact, factored and plain, in both dtypes unless thrifty."""
        for kind in ("exact", "factored", "plain"):
            for dtype in ("float64",) if self.backend.thrifty else TOLERANCE:
                self._kfac(Linear(4, 3), Damping(0.3, kind), dtype)

    def test_kfac_damping_norms(self) -> None:
        """Every norm in the split of factored damping."""
        every = ("mean", "trace", "frobenius", "spectral", "median")
        for unit in ("frobenius", "median") if self.backend.thrifty else every:
            self._kfac(Linear(4, 3), Damping(0.3, norm=unit))

    def test_kfac_relative_damping(self) -> None:
        """In units of the block's mean eigenvalue."""
        for kind in ("exact", "factored"):
            self._kfac(Linear(4, 3), Damping(0.3, kind, relative=True))

    def test_kfac_forward(self) -> None:
        """The output factor is the identity, and is not stored."""
        for kind in ("exact", "factored"):
            self._kfac(Linear(4, 3), Damping(0.3, kind), fisher="forward")

    def test_kfac_weight_sharing(self) -> None:
        """Expand and reduce."""
        for sharing in ("expand", "reduce"):
            self._kfac(Linear(4, 3, sharing=sharing), Damping(0.3))

    def test_kfac_without_bias(self) -> None:
        """The inputs as they are; one output is the case in which factored damping is exact."""
        self._kfac(Linear(4, 3, bias=None), Damping(0.3))
        self._kfac(Linear(4, 1, bias=None), Damping(0.3))

    def test_kfac_separate_bias(self) -> None:
        """The bias' own block, whose input factor is 1."""
        rng = np.random.default_rng(10)
        layer = Bias(3)
        batches = captures(rng, layer)
        expected = [(np.ones((1, 1)), reference.factors(a, g, "reduce", joint=False)[1]) for a, g in batches]
        for kind in ("exact", "factored"):
            method = KFAC(damping=Damping(0.3, kind), stats_decay=DECAY)
            self._check(method, layer, batches, expected, "float64")
        assert set(Linear(4, 3, bias="separate").blocks()) == {".weight", ".bias"}

    def test_kfac_stacked_layers(self) -> None:
        """Leading axes stand for layers of equal shape."""
        for kind in ("exact", "factored"):
            self._kfac(Linear(4, 3), Damping(0.3, kind), leading=(2,))

    def test_kfac_embedding(self) -> None:
        """An input factor that is a vector of counts: kinds and norms of damping, both dtypes, stacked, forward only, with padding."""
        cases: list[tuple[dict[str, Any], Damping, str, tuple[int, ...], Any]] = [
            ({}, Damping(0.3), "float64", (), "empirical"),
            ({"padding": 2}, Damping(0.3, "exact", relative=True), "float64", (2,), "empirical"),
            ({"padding": 6}, Damping(0.3, norm="median"), "float32", (), "empirical"),
            ({}, Damping(0.3, "plain"), "float64", (), "empirical"),
            ({}, Damping(0.3, norm="spectral", relative=True), "float64", (2,), "empirical"),
            ({}, Damping(0.3, norm="frobenius"), "float64", (), "empirical"),
            ({"padding": 0}, Damping(0.3), "float64", (), "forward"),
            ({}, Damping(0.3, "exact"), "float64", (), "forward"),
        ]
        for options, damping, dtype, leading, fisher in cases[:3] if self.backend.thrifty else cases:
            rng = np.random.default_rng(18)
            layer = Embedding(6, 3, stack=leading, **options)
            batches, expected = [], []
            for _ in range(2):
                ids, g = rng.integers(0, 6, size=(*leading, 5, 3), dtype=np.int32), rng.normal(size=(*leading, 5, 3, 3))
                ids[..., 0, :2] = options.get("padding", 0)
                batches.append((ids, g))
                expected.append(reference.table_factors(ids, g, 6, options.get("padding")))
            if fisher == "forward":
                expected = [(a, np.broadcast_to(np.eye(3), g.shape)) for a, g in expected]
            self._check(KFAC(damping=damping, stats_decay=DECAY, fisher=fisher), layer, batches, expected, dtype, leading)

    def test_kfac_norm(self) -> None:
        """Scale and shift: the second moment of each example's gradient, whole and its diagonal."""
        cases = [
            (Norm(3), Damping(0.3), ()),
            (Norm(3, block="full"), Damping(0.3, relative=True), ()),
            (Norm(3, bias=False, stack=(2,)), Damping(0.3, "exact"), (2,)),
            (Norm(3, bias=False, block="full", stack=(2,)), Damping(0.3), (2,)),
            (Norm(1, bias=False), Damping(0.3), ()),
            (Norm(3, block="full"), Damping(0.3, "exact"), ()),
            (Norm(3), Damping(0.3, "exact", relative=True), ()),
            (Norm(3), Damping(0.3, "plain"), ()),
        ]
        for layer, damping, leading in cases[:3] if self.backend.thrifty else cases:
            rng = np.random.default_rng(19)
            batches, expected = [], []
            for _ in range(2):
                x, g = rng.normal(size=(2, *leading, 5, 4, layer.size))
                batches.append((x, g))
                expected.append(reference.norm_factors(x, g, bias=layer.bias, full=layer.block == "full"))
            self._check(KFAC(damping=damping, stats_decay=DECAY), layer, batches, expected, "float64", leading)

    def test_kfac_masks(self) -> None:
        """Factors of every layer kind where positions, and a whole example, are none: those of examples of their own length."""
        b, rng, method = self.backend, np.random.default_rng(21), KFAC()

        def joint(sharing: str) -> Any:
            return lambda a, g: reference.factors(a, g, sharing)

        cases: list[tuple[Any, Any, str]] = [
            (Linear(4, 3, stack=(2,)), joint("expand"), "positions"),
            (Linear(9, 8, sharing="reduce"), joint("reduce"), "examples"),
            (Norm(3), reference.norm_factors, "examples"),
            (Embedding(6, 3, padding=6), lambda a, g: reference.table_factors(a, g, 6), "positions"),
            (Linear(9, 8), joint("expand"), "positions"),
            (Linear(4, 3, sharing="reduce", stack=(2,)), joint("reduce"), "examples"),
            (Bias(3), lambda a, g: (np.ones((1, 1)), reference.factors(a, g, "reduce")[1]), "examples"),
        ]
        cases = cases[:4] if b.thrifty else cases
        data, expected = [], []
        for layer, factors_of, by in cases:
            mask = rng.random((*layer.stack, 5, 3)) < 0.6
            mask[..., 0, :], mask[..., 1, :], mask[..., 2, 0] = True, False, True
            width = layer.size if isinstance(layer, Norm) else layer.shape[0]
            g = rng.normal(size=(*mask.shape, width))
            if isinstance(layer, Embedding):
                x = rng.integers(0, 6, size=mask.shape, dtype=np.int32)
                spoilt = np.where(mask, x, np.int32(-7))
            else:
                x = rng.normal(size=(*mask.shape, getattr(layer, "in_features", width)))
                spoilt = np.where(mask[..., None], x, np.nan)
            a, moment = reference.shortened(factors_of, x, g, mask, by)
            expected.append(tuple(_in_form(form, side) for form, side in zip(layer.forms, (moment, a), strict=True))[::-1])
            data.append((spoilt, np.where(mask[..., None], g, np.inf), mask))

        def run(like: Any, data: Any) -> Any:
            states = [method.init(layer, like, layer.stack) for layer, _, _ in cases]
            seen = zip(cases, states, data, strict=True)
            return [
                method.observe(state, method.reduce(layer, state, x, g, mask=mask)).average.values
                for (layer, _, _), state, (x, g, mask) in seen
            ]

        for dtype in ("float64",) if b.thrifty else TOLERANCE:
            found = b.call(run, b.put(np.zeros(()), dtype), b.put(data, dtype))
            for (layer, _, _), values, wanted in zip(cases, found, expected, strict=True):
                desired = tuple(side.astype(dtype) for side in wanted)
                assert_close(values, desired, b, TOLERANCE[dtype], f"masked {layer} in {dtype}: averages")

    def test_table_and_norm_layers(self) -> None:
        """What was captured and the parameters as matrices, and the parameters back, as with NumPy arrays."""
        rng = np.random.default_rng(20)
        table = rng.integers(0, 6, size=(2, 3, 2), dtype=np.int32)
        cases: list[tuple[Any, np.ndarray, np.ndarray]] = [
            (Embedding(6, 3), table, rng.normal(size=(2, 3, 2, 3))),
            (Embedding(6, 3, padding=1, layout="oi", stack=(2,)), table, rng.normal(size=(2, 3, 2, 3))),
            (Norm((3, 2)), *rng.normal(size=(2, 4, 5, 3, 2))),
            (Norm(3, bias=False, channels="first", block="full"), *rng.normal(size=(2, 4, 3, 5, 2))),
        ]
        for layer, x, g in cases:
            params = {role: rng.normal(size=shape) for role, shape in layer.parameters.items()}

            def run(x: Any, g: Any, params: Any, layer: Any = layer) -> Any:
                xp, (a, b) = namespace(x), layer.capture(x, g)
                matrices = layer.matrices(params)
                rows = layer.input_rows(xp, a, b.dtype), layer.output_rows(xp, b, b.dtype, a)
                return rows, layer.input_gram(xp, a, b.dtype), matrices, layer.parameters_of(matrices)

            desired = run(x, g, params)
            actual = self.backend.call(run, *self.backend.put((x, g, params)))
            assert_close(actual, desired, self.backend, 1e-12, f"{layer}")
            assert_close(actual[-1], params, self.backend, 0.0, f"{layer}: parameters back")

    def test_kfac_convolution(self) -> None:
        """Patches as rows, and one block for each group; expand, which streams the input factor, and reduce."""
        rng = np.random.default_rng(15)
        for sharing in ("expand", "reduce"):
            layer = Conv(4, 6, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=2, sharing=sharing)
            batches, expected = [], []
            for _ in range(2):
                x, g = rng.normal(size=(5, 5, 6, 4)), rng.normal(size=(5, 8, 6))
                rows = reference.patches(reference.padded(x, ((2, 2), (1, 1))), (3, 2), (2, 3), (1, 2))
                # [N, outputs, K, groups, c] as [groups, N, outputs, c K], and [N, outputs, groups, o] as [groups, N, outputs, o]
                rows = rows.reshape(5, 8, 6, 2, 2).transpose(3, 0, 1, 4, 2).reshape(2, 5, 8, 12)
                batches.append((x, g))
                expected.append(reference.factors(rows, g.reshape(5, 8, 2, 3).transpose(2, 0, 1, 3), sharing))
            self._check(KFAC(damping=Damping(0.3), stats_decay=DECAY), layer, batches, expected, "float64", layer.stack)

    def test_convolution_layer(self) -> None:
        """What was captured and the parameters as matrices, and the parameters back, as with NumPy arrays."""
        rng = np.random.default_rng(16)
        for layer, spatial in CONVOLUTIONS:
            x = rng.normal(size=(*layer.leading, 2, *spatial, layer.in_channels))
            outputs = layer.window(spatial).outputs(spatial)
            g = rng.normal(size=(*layer.leading, 2, *outputs, layer.out_channels))
            if layer.channels == "first":
                x, g = (np.moveaxis(v, -1, len(layer.leading) + 1) for v in (x, g))
            params = {role: rng.normal(size=shape) for role, shape in layer.parameters.items()}

            def run(x: Any, g: Any, params: Any, layer: Conv = layer) -> Any:
                xp, captured = namespace(x), layer.capture(x, g)
                matrices = layer.matrices(params)
                gram = layer.input_gram(xp, captured[0], x.dtype)
                rows = layer.input_rows(xp, captured[0], x.dtype), layer.output_rows(xp, captured[1], x.dtype)
                return rows, gram, matrices, layer.parameters_of(matrices)

            desired = run(np.ascontiguousarray(x), np.ascontiguousarray(g), params)
            actual = self.backend.call(run, *self.backend.put((x, g, params)))
            assert_close(actual, desired, self.backend, 1e-12, f"{layer}")
            assert_close(actual[-1], params, self.backend, 0.0, f"{layer}: parameters back")

    def test_kfac_before_the_first_refresh(self) -> None:
        """The direction is the gradient."""
        b, layer = self.backend, Linear(4, 3)
        grad = np.random.default_rng(11).normal(size=layer.shape)
        for kind in ("exact", "factored"):
            method = KFAC(damping=Damping(0.3, kind))
            state = method.init(layer, b.put(np.zeros(())))
            direction = b.call(lambda state, grad, m=method: m.precondition(layer, state, grad), state, b.put(grad))
            assert_close(direction, grad, b, what=f"unrefreshed KFAC({kind})")

    def test_kfac_merges_statistics(self) -> None:
        """Statistics of two halves add up to those of the batch, also when the sides come one at a time."""
        b, layer, method = self.backend, Linear(4, 3), KFAC()
        ((a, g),) = captures(np.random.default_rng(12), layer, batches=1)
        state = method.init(layer, b.put(np.zeros(())))

        def apart(state: Any, a: Any, g: Any) -> Any:
            first = method.reduce(layer, state, a[:2, ...], None) + method.reduce(layer, state, None, g[:2, ...])
            return method.observe(state, first + method.reduce(layer, state, a[2:, ...], g[2:, ...]))

        state = b.call(apart, state, *b.put((a, g)))
        assert_close(state.average.values, reference.factors(a, g), b, 1e-10, "merged averages")

    def test_kfac_drops_statistics_that_are_not_finite(self) -> None:
        """The average stays, the counter says so."""
        b, layer, method = self.backend, Linear(4, 3), KFAC(damping=0.3)
        good, bad = captures(np.random.default_rng(13), layer)
        bad[1][0, 0, 0] = np.nan
        state = self._fit(method, layer, [good, bad], "float64")
        assert_close(state.average.values, reference.factors(*good), b, 1e-10, "averages after NaN")
        assert_close(state.dropped, np.asarray(1, np.int32), b, what="dropped")
        empty = b.call(lambda state: method.refresh(layer, state), method.init(layer, b.put(np.zeros(()))))
        assert_close(empty.kept, np.asarray(1, np.int32), b, what="kept refreshes of an empty state")

    def test_diagonal(self) -> None:
        """A parameter of any shape; absolute and relative damping, two powers, both dtypes."""
        rng = np.random.default_rng(14)
        grads = rng.normal(size=(2, 3, 2))
        layer = Tensor((3, 2))
        for power, relative, dtype in ((1.0, False, "float64"), (0.5, True, "float64"), (1.0, True, "float32")):
            method = Diagonal(damping=Damping(0.3, relative=relative), power=power, stats_decay=DECAY)
            what = f"Diagonal(power={power}, relative={relative}) in {dtype}"
            b = self.backend
            state = method.init(layer, b.put(grads[0], dtype))
            see = b.wrap(lambda state, grad, m=method: m.observe(state, m.reduce(layer, state, grad=grad, terms=7.0)))
            for grad in grads:
                state = see(state, b.put(grad, dtype))
            state = b.call(lambda state, m=method: m.refresh(layer, state), state)
            h = reference.average([7.0 * g**2 for g in grads], DECAY)
            desired = grads[1] / (h + 0.3 * (h.mean() if relative else 1.0)) ** power
            direction = b.call(lambda state, grad, m=method: m.precondition(layer, state, grad), state, b.put(grads[1], dtype))
            assert_close(direction, desired.astype(dtype), b, TOLERANCE[dtype], what)
            dense = b.call(lambda state, m=method: m.dense(layer, state), state)
            assert_close(dense, np.diag(h.reshape(-1)).astype(dtype), b, TOLERANCE[dtype], f"{what}: dense")
