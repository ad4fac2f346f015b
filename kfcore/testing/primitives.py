"""The primitives: the portable reference and, where the library has one, the registered kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kfcore import _array, primitives
from kfcore._array import namespace
from kfcore.patches import Window
from kfcore.testing import reference
from kfcore.testing.backend import Backend, assert_close

DTYPES = ("float64", "float32")
TOLERANCE = {"float64": 1e-10, "float32": 2e-4}
LEADING = ((), (3,), (2, 2))
SAMPLE = (((), "float64"), ((2, 2), "float32"))

WINDOWS = (
    (Window((3,), (1,), (1,), ((0, 0),)), (5,)),
    (Window((3, 2), (2, 3), (1, 2), ((0, 0), (0, 0))), (7, 9)),
    (Window((2, 1, 2), (1, 2, 1), (2, 1, 1), ((0, 0), (0, 0), (0, 0))), (4, 3, 3)),
)
"""Windows over one, two and three axes, with sizes of an input; none is symmetric."""


def implementations(name: str, library: str) -> dict[str, Callable[..., Any]]:
    """The reference of a primitive, and the kernel that a library registered for it if any."""
    found = {"reference": primitives()[name]}
    kernel = _array._kernels.get((name, library))
    return found | ({} if kernel is None else {"kernel": kernel})


def definite(rng: np.random.Generator, leading: tuple[int, ...], n: int) -> np.ndarray:
    """Well-conditioned symmetric positive definite matrices with distinct eigenvalues."""
    basis, _ = np.linalg.qr(rng.normal(size=(*leading, n, n)))
    values = np.sort(rng.uniform(0.5, 1.0, size=(*leading, n)) + np.arange(n), axis=-1)
    exact = (basis * values[..., None, :]) @ np.swapaxes(basis, -1, -2)
    return 0.5 * (exact + np.swapaxes(exact, -1, -2))


class PrimitiveTests:
    """Each primitive, batched and not, in both dtypes."""

    backend: Backend

    def _cases(self, name: str, *static: Any) -> Iterator[tuple[str, Callable[..., Any], tuple[int, ...], str]]:
        """Implementations, leading axes and dtypes; ``static`` are further arguments that are no arrays."""
        every = tuple((leading, dtype) for leading in LEADING for dtype in DTYPES)
        for which, function in implementations(name, self.backend.library).items():
            for leading, dtype in SAMPLE if self.backend.thrifty else every:

                def run(*args: Any, function: Callable[..., Any] = function) -> Any:
                    return function(namespace(*args), *args, *static)

                yield f"{name} ({which}, leading {leading}, {dtype})", self.backend.wrap(run), leading, dtype

    def _compare(self, what: str, actual: Any, desired: Any, dtype: str) -> None:
        desired = np.asarray(desired)
        assert_close(actual, desired if desired.dtype == bool else desired.astype(dtype), self.backend, TOLERANCE[dtype], what)

    def test_every_primitive_is_covered(self) -> None:
        """A primitive that was added to the library must be added here."""
        uncovered = [name for name in primitives() if not hasattr(self, f"test_{name}")]
        assert not uncovered, f"no conformance test for the primitives {', '.join(uncovered)}"

    def test_truth(self) -> None:
        """The flag, as an array or, where it is one flag, as a bool."""
        for which, function in implementations("truth", self.backend.library).items():
            for flag in (True, False, [True, False]):
                result = self.backend.call(lambda x, function=function: function(namespace(x), x), self.backend.put(np.asarray(flag)))
                what = f"{self.backend.name}: truth ({which}) of {flag}: got {result}"
                assert not isinstance(result, bool) or isinstance(flag, bool), what
                assert np.array_equal(result if isinstance(result, bool) else self.backend.to_numpy(result), flag), what
            assert function(namespace(self.backend.put(np.zeros(1))), True) is True

    def test_branches(self) -> None:
        """Where the library says that it can branch on what is in an array, it can."""
        for which, function in implementations("branches", self.backend.library).items():
            for value in (1.0, -1.0):

                def run(x: Any, function: Callable[..., Any] = function) -> Any:
                    xp = namespace(x)
                    positive = xp.any(x > 0)
                    if function(xp, x):
                        return _array.cond(positive, lambda x: 2.0 * x, lambda x: x - 2.0, x)
                    return xp.where(positive, 2.0 * x, x - 2.0)

                if which == "reference" and self.backend.library == "torch" and self.backend.no_whole_step:
                    continue  # what a compiler does to torch only its kernel knows
                result = self.backend.call(run, self.backend.put(np.asarray([value, -3.0])))
                desired = [2.0, -6.0] if value > 0 else [-3.0, -5.0]
                self._compare(f"branches ({which}) of {value}", result, desired, "float64")

    def test_number(self) -> None:
        """The number, as an array or as a float."""
        for which, function in implementations("number", self.backend.library).items():
            for value in (np.asarray(0.25), np.asarray([0.25, 4.0])):
                result = self.backend.call(lambda x, function=function: function(namespace(x), x), self.backend.put(value))
                got = result if isinstance(result, float) else self.backend.to_numpy(result)
                assert np.array_equal(got, value), f"{self.backend.name}: number ({which}) of {value}: got {result}"

    def test_append(self) -> None:
        """One more column, of numbers or of one number."""
        rng = np.random.default_rng(11)
        for what, run, leading, dtype in self._cases("append"):
            x, column = rng.normal(size=(*leading, 3, 2)), rng.normal(size=(*leading, 3))
            self._compare(what, run(*self.backend.put((x, column), dtype)), np.concatenate([x, column[..., None]], axis=-1), dtype)
        for which, function in implementations("append", self.backend.library).items():
            x = rng.normal(size=(3, 2))
            result = self.backend.call(lambda x, function=function: function(namespace(x), x, 1.0), self.backend.put(x))
            self._compare(f"append ({which}) of ones", result, np.concatenate([x, np.ones((3, 1))], axis=-1), "float64")

    def test_erf(self) -> None:
        """Against the host's, from zero to where it is one."""
        for what, run, leading, dtype in self._cases("erf"):
            count = math.prod(leading)
            x = np.linspace(-7.0, 7.0, 57 * count).reshape(*leading, -1)
            self._compare(what, run(self.backend.put(x, dtype)), np.vectorize(math.erf)(x), dtype)

    def test_gram(self) -> None:
        """Sum of outer products of the rows."""
        rng = np.random.default_rng(1)
        for what, run, leading, dtype in self._cases("gram"):
            x = rng.normal(size=(*leading, 7, 3))
            self._compare(what, run(self.backend.put(x, dtype)), np.einsum("...ni,...nj->...ij", x, x), dtype)

    def test_energy(self) -> None:
        """Sum of the squares, of contiguous rows and of columns taken out of wider ones."""
        rng = np.random.default_rng(12)
        for what, run, leading, dtype in self._cases("energy"):
            x = rng.normal(size=(*leading, 7, 3))
            self._compare(what, run(self.backend.put(x, dtype)), np.sum(x * x, axis=(-2, -1)), dtype)
            wide = self.backend.put(x, dtype)[..., :2]
            self._compare(f"{what} of columns", run(wide), np.sum(x[..., :2] ** 2, axis=(-2, -1)), dtype)

    def test_absorb(self) -> None:
        """A running average with the moment of rows taken in; rows that are not finite leave it as it was."""
        rng = np.random.default_rng(13)
        for what, run, leading, dtype in self._cases("absorb"):
            old, rows = rng.normal(size=(*leading, 3, 3)), rng.normal(size=(*leading, 2, 3))
            keep, weight = rng.uniform(size=leading), rng.uniform(size=leading)
            new = keep[..., None, None] * old + weight[..., None, None] * np.einsum("...ni,...nj->...ij", rows, rows)
            arrays = self.backend.put((old, rows, keep, weight, np.ones(leading, dtype=bool)), dtype)
            self._compare(what, run(*arrays), new, dtype)
            arrays = self.backend.put((old, rows * np.nan, keep, weight, np.zeros(leading, dtype=bool)), dtype)
            self._compare(f"{what}, not ok", run(*arrays), old, dtype)
        old, rows = rng.normal(size=(3, 3)), rng.normal(size=(2, 3))
        for which, function in implementations("absorb", self.backend.library).items():
            for ok, new in ((True, 0.25 * old + 2.0 * rows.T @ rows), (False, old)):

                def run(old: Any, rows: Any, ok: bool = ok, function: Callable[..., Any] = function) -> Any:
                    return function(namespace(old), old, rows, 0.25, 2.0, ok)

                self._compare(f"absorb ({which}) on the host, {ok}", self.backend.call(run, *self.backend.put((old, rows))), new, "float64")

    def test_sandwich(self) -> None:
        """Two-sided product, of small matrices and of the odd width that a joint bias makes."""
        rng = np.random.default_rng(2)
        for what, run, leading, dtype in self._cases("sandwich"):
            odd = ((3, 3), (3, 257), (257, 257))
            for shapes in (((2, 3), (3, 4), (4, 5)), *([] if leading else [odd])):
                args = [rng.normal(size=(*leading, *shape)) for shape in shapes]
                desired = args[0] @ args[1] @ args[2]
                self._compare(f"{what} of {shapes}", run(*self.backend.put(args, dtype)), desired, dtype)

    def test_deflate(self) -> None:
        """A vector taken out of the rows of a matrix, which may be a transposed view."""
        rng = np.random.default_rng(27)
        for what, run, leading, dtype in self._cases("deflate"):
            x, u = rng.normal(size=(*leading, 3, 4)), rng.normal(size=(*leading, 4))
            desired = x @ (np.eye(4) - u[..., :, None] * u[..., None, :])
            self._compare(what, run(*self.backend.put((x, u), dtype)), desired, dtype)

    def test_total(self) -> None:
        """Sum over arrays of several shapes and dtypes, as a float or in the dtype of the first; a NaN among them is seen."""
        rng = np.random.default_rng(9)
        arrays = [rng.normal(size=(2, 3)), rng.normal(size=4).astype("float32"), rng.normal(size=())]
        for which, function in implementations("total", self.backend.library).items():
            for bad in (0.0, np.nan):
                what = f"total ({which}) with {bad}"
                result = self.backend.call(
                    lambda *x, function=function: function(namespace(x[0]), list(x)), *self.backend.put((*arrays[:2], arrays[2] + bad))
                )
                desired = sum(float(x.sum()) for x in arrays) + bad
                if isinstance(result, float):
                    assert np.isclose(result, desired, rtol=1e-6, equal_nan=True), f"{what}: got {result}"
                else:
                    self._compare(what, result, desired, "float64")

    def test_scale_all(self) -> None:
        """Each array times its own factor, a float or 0-d."""
        rng = np.random.default_rng(10)
        arrays = [rng.normal(size=(2, 3)), rng.normal(size=4)]
        for which, function in implementations("scale_all", self.backend.library).items():
            for factors in ([0.5, -2.0], [np.asarray(0.5), np.asarray(-2.0)]):
                floats = [f for f in factors if isinstance(f, float)]

                def run(*args: Any, function: Callable[..., Any] = function, floats: list[float] = floats) -> Any:
                    return function(namespace(args[0]), list(args[:2]), floats or list(args[2:]))

                result = self.backend.call(run, *self.backend.put((*arrays, *([] if floats else factors))))
                for got, x, factor in zip(result, arrays, factors, strict=True):
                    self._compare(f"scale_all ({which})", got, x * factor, "float64")

    def test_trace(self) -> None:
        """Sum of the diagonal, of each matrix of a stack its own."""
        rng = np.random.default_rng(8)
        for what, run, leading, dtype in self._cases("trace"):
            x = rng.normal(size=(*leading, 3, 3))
            self._compare(what, run(self.backend.put(x, dtype)), np.einsum("...ii->...", x), dtype)

    def test_shift(self) -> None:
        """A multiple of the identity is added, to each matrix of a stack its own."""
        rng = np.random.default_rng(7)
        for what, run, leading, dtype in self._cases("shift"):
            x, value = rng.normal(size=(*leading, 3, 3)), rng.uniform(0.5, 1.0, size=leading)
            args = self.backend.put((x, np.asarray(value)), dtype)
            self._compare(what, run(*args), x + np.multiply.outer(value, np.eye(3)), dtype)
        x = rng.normal(size=(2, 3, 3))
        for which, function in implementations("shift", self.backend.library).items():
            result = self.backend.call(lambda x, function=function: function(namespace(x), x, 0.25), self.backend.put(x))
            self._compare(f"shift ({which}) by one number", result, x + 0.25 * np.eye(3), "float64")

    def test_blend(self) -> None:
        """A weighted sum where it is wanted; NaN and infinities of the rest stay out, and the old value is kept bit for bit."""
        rng = np.random.default_rng(3)
        for what, run, leading, dtype in self._cases("blend"):
            old, new = rng.normal(size=(2, *leading, 3, 4))
            keep, weight = rng.uniform(0.1, 1.0, size=(2, *leading))
            count = math.prod(leading)
            for bad in (None, np.nan, np.inf):
                ok = np.asarray(bad is None) if not leading else (np.arange(count) % 2 == 0).reshape(leading) | (bad is None)
                arrived = new if bad is None else np.where(ok[..., None, None], new, bad)
                args = self.backend.put((old, arrived, keep, weight, ok), dtype)
                result = run(*args)
                with np.errstate(invalid="ignore"):
                    mixed = keep[..., None, None] * old + weight[..., None, None] * arrived
                self._compare(f"{what} with {bad}", result, np.where(ok[..., None, None], mixed, old), dtype)
                kept = self.backend.to_numpy(result)[~ok]
                assert np.array_equal(kept, old.astype(dtype)[~ok]), f"{what} with {bad}: changed the old value where not ok"
            args = (old, new, np.asarray(0.25), np.asarray(2.0), np.asarray(True))
            self._compare(f"{what}, the rest 0-d", run(*self.backend.put(args, dtype)), 0.25 * old + 2.0 * new, dtype)
        for which, function in implementations("blend", self.backend.library).items():
            for ok in (True, False):

                def run(old: Any, new: Any, ok: bool = ok, function: Callable[..., Any] = function) -> Any:
                    return function(namespace(old), old, new, 0.25, 2.0, ok)

                old, new = rng.normal(size=(2, 3, 4))
                result = self.backend.call(run, *self.backend.put((old, new if ok else np.nan * new)))
                self._compare(f"blend ({which}) of floats, {ok}", result, 0.25 * old + 2.0 * new if ok else old, "float64")

    def test_invert(self) -> None:
        """Inverse and success of definite matrices."""
        rng = np.random.default_rng(4)
        for what, run, leading, dtype in self._cases("invert"):
            x = definite(rng, leading, 4)
            inverse, ok = run(self.backend.put(x, dtype))
            self._compare(what, inverse, np.linalg.inv(x), dtype)
            self._compare(f"{what}: ok", ok, np.ones(leading, dtype=bool), dtype)

    def test_invert_of_an_indefinite_matrix(self) -> None:
        """Either it is reported, or what comes out is finite; its neighbours in a stack are not spoiled."""
        rng = np.random.default_rng(5)
        for what, run, leading, dtype in self._cases("invert"):
            x = definite(rng, leading, 4)
            x[(0,) * len(leading)] = np.diag([2.0, 1.0, -3.0, -4.0])
            inverse, ok = self.backend.get(run(self.backend.put(x, dtype)))
            assert np.all(~ok | np.isfinite(inverse).all(axis=(-2, -1))), f"{self.backend.name}: {what}: not finite, yet ok"
            if leading:
                assert ok.reshape(-1)[1:].all(), f"{self.backend.name}: {what}: the neighbours of a bad matrix are not ok"
                difference = np.abs(inverse - np.linalg.inv(x)).reshape(-1, 16)[1:].max()
                assert difference < 10 * TOLERANCE[dtype], (
                    f"{self.backend.name}: {what}: the neighbours of a bad matrix are off by {difference}"
                )

    def test_invert_of_what_has_no_inverse(self) -> None:
        """Nothing raises: zeros and NaN are told, each for itself."""
        self._told("invert", np.linalg.inv, singular=True)

    def test_definite(self) -> None:
        """Definite matrices are, those below zero, singular or not finite are not."""
        rng = np.random.default_rng(19)
        for what, run, leading, dtype in self._cases("definite"):
            x = definite(rng, leading, 4)
            self._compare(what, run(self.backend.put(x, dtype)), np.ones(leading, dtype=bool), dtype)
            for bad in (-x, 0.0 * x, np.nan * x, x - 2.0 * np.eye(4)):
                self._compare(f"{what} of {bad}", run(self.backend.put(bad, dtype)), np.zeros(leading, dtype=bool), dtype)

    def test_eigh_of_what_has_no_eigenvectors(self) -> None:
        """Nothing raises: NaN is told, for each matrix by itself; zeros have any basis."""
        self._told("eigh", np.linalg.eigvalsh, singular=False)

    def _told(self, name: str, desired: Callable[[np.ndarray], np.ndarray], *, singular: bool) -> None:
        x = definite(np.random.default_rng(18), (4,), 4)
        x[1], x[2, 0, 3], x[2, 3, 0] = 0.0, np.nan, np.nan
        good = np.asarray([True, not singular, False, True])
        for which, function in implementations(name, self.backend.library).items():
            if which == "reference" and self.backend.library == "torch" and self.backend.no_whole_step:
                continue  # what a compiled program of torch raises nobody can catch: it has a kernel for that
            run = self.backend.wrap(lambda x, function=function: function(namespace(x), x))
            result, *_, ok = run(self.backend.put(x))
            self._compare(f"{name} ({which}): ok", ok, good, "float64")
            self._compare(f"{name} ({which})", result[3, ...], desired(x[3]), "float64")
            for at in (1, 2):
                ok = run(self.backend.put(x[at]))[-1]
                self._compare(f"{name} ({which}) of the matrix {at} alone: ok", ok, good[at], "float64")

    def test_invert_all(self) -> None:
        """Of several sizes, stacks and not, each as if alone; a bad one is reported alone."""
        rng = np.random.default_rng(14)
        good = [definite(rng, (), 3), definite(rng, (2,), 4), definite(rng, (), 3), definite(rng, (), 4)]
        bad = [good[0], good[1], good[2] * np.nan, good[3]]
        for which, function in implementations("invert_all", self.backend.library).items():
            run = self.backend.wrap(lambda *x, function=function: function(namespace(x[0]), list(x)))
            for (inverse, ok), x in zip(run(*self.backend.put(tuple(good))), good, strict=True):
                self._compare(f"invert_all ({which})", inverse, np.linalg.inv(x), "float64")
                self._compare(f"invert_all ({which}): ok", ok, np.ones(x.shape[:-2], dtype=bool), "float64")
            said = [bool(np.all(self.backend.to_numpy(ok))) for _, ok in run(*self.backend.put(tuple(bad)))]
            assert said == [True, True, False, True], f"{self.backend.name}: invert_all ({which}) of a NaN among others: ok {said}"

    def test_eigh_all(self) -> None:
        """Of several sizes, stacks and not, each as if alone."""
        rng = np.random.default_rng(15)
        matrices = [definite(rng, (), 3), definite(rng, (2,), 4), definite(rng, (), 3), definite(rng, (), 4)]
        for which, function in implementations("eigh_all", self.backend.library).items():
            run = self.backend.wrap(lambda *x, function=function: function(namespace(x[0]), list(x)))
            for (values, vectors, ok), x in zip(run(*self.backend.put(tuple(matrices))), matrices, strict=True):
                self._compare(f"eigh_all ({which}): values", values, np.linalg.eigvalsh(x), "float64")
                self._compare(f"eigh_all ({which}): ok", ok, np.ones(x.shape[:-2], dtype=bool), "float64")
                v, q = self.backend.get((values, vectors))
                assert np.allclose((q * v[..., None, :]) @ np.swapaxes(q, -1, -2), x, atol=1e-9), f"eigh_all ({which}): not rebuilt"

    def test_counts(self) -> None:
        """Of each row its own, with ids outside of the table and a dtype too narrow for its size; of no ids none."""
        rng = np.random.default_rng(17)
        for what, run, leading, _ in self._cases("counts", 5):
            ids = rng.integers(-2, 8, size=(*leading, 40))
            ids[..., 0] = 2**31 - 1
            desired = (ids[..., None] == np.arange(5)).sum(axis=-2).astype(np.int32)
            assert_close(run(self.backend.put(ids.astype(np.int32))), desired, self.backend, what=what)
            none = np.zeros((*leading, 0), np.int32)
            assert_close(run(self.backend.put(none)), np.zeros((*leading, 5), np.int32), self.backend, what=f"{what} of none")
        for which, function in implementations("counts", self.backend.library).items():
            ids = rng.integers(-3, 100, size=60, dtype=np.int8)
            run = self.backend.wrap(lambda x, function=function: function(namespace(x), x, 200))
            desired = np.bincount(ids[ids >= 0], minlength=200).astype(np.int32)
            assert_close(run(self.backend.put(ids)), desired, self.backend, what=f"counts ({which}) of int8")

    def test_fold(self) -> None:
        """Sums over parts along axes of their own, whatever divides the number of entries."""
        rng = np.random.default_rng(21)
        for which, function in implementations("fold", self.backend.library).items():
            for step in (1, 3, 4, 6, 10):
                x, y = rng.normal(size=(6, 3)), rng.normal(size=(2, 6))

                def run(x: Any, y: Any, function: Callable[..., Any] = function, step: int = step) -> Any:
                    xp = namespace(x, y)
                    return function(xp, lambda x, y: y @ x, [x, y], [0, 1], step)

                what = f"{self.backend.name}: fold ({which}) by {step}"
                self._compare(what, self.backend.wrap(run)(*self.backend.put((x, y), "float64")), y @ x, "float64")

    def test_squares(self) -> None:
        """Squared gradients of examples with one position, few, and more than are taken by pairs."""
        rng = np.random.default_rng(18)
        for what, run, leading, dtype in self._cases("squares"):
            for positions in (1, 3, 11):
                g, a = rng.normal(size=(*leading, 5, positions, 3)), rng.normal(size=(*leading, 5, positions, 4))
                desired = (np.einsum("...bsp,...bsq->...bpq", g, a) ** 2).sum(axis=-3)
                self._compare(f"{what}, {positions} positions", run(*self.backend.put((g, a), dtype)), desired, dtype)

    def test_rotated_squares(self) -> None:
        """The same of gradients that are rotated as they are squared."""
        rng = np.random.default_rng(19)
        for what, run, leading, dtype in self._cases("rotated_squares"):
            g, a = rng.normal(size=(*leading, 5, 7, 3)), rng.normal(size=(*leading, 5, 7, 4))
            left, right = np.linalg.qr(rng.normal(size=(*leading, 3, 3)))[0], np.linalg.qr(rng.normal(size=(*leading, 4, 4)))[0]
            grads = left.swapaxes(-1, -2)[..., None, :, :] @ np.einsum("...bsp,...bsq->...bpq", g, a) @ right[..., None, :, :]
            self._compare(what, run(*self.backend.put((g, a, left, right), dtype)), (grads**2).sum(axis=-3), dtype)

    def test_gather_sum(self) -> None:
        """Rows of one id added up, ids outside of the table left out; of no rows zeros."""
        rng = np.random.default_rng(20)
        for which, function in implementations("gather_sum", self.backend.library).items():
            for leading in ((), (2,)):
                for dtype in ("float32", "float64"):
                    rows, ids = rng.normal(size=(*leading, 30, 3)), rng.integers(-2, 8, size=(*leading, 30)).astype(np.int32)
                    desired = np.einsum("...nv,...nd->...vd", ids[..., None] == np.arange(5), rows)
                    run = self.backend.wrap(lambda rows, ids, function=function: function(namespace(rows), rows, ids, 5))
                    what = f"{self.backend.name}: gather_sum ({which}), {dtype}, leading axes {leading}"
                    self._compare(what, run(self.backend.put(rows, dtype), self.backend.put(ids)), desired, dtype)
                    none = run(self.backend.put(rows[..., :0, :], dtype), self.backend.put(ids[..., :0]))
                    self._compare(f"{what} of none", none, np.zeros_like(desired), dtype)

    def test_thin_product(self) -> None:
        """Product of few rows, of any width and of the odd one that a joint bias makes."""
        rng = np.random.default_rng(16)
        for what, run, leading, dtype in self._cases("thin_product"):
            for p, q in ((3, 4), (2, 17)):
                left, right = rng.normal(size=(*leading, 5, p)), rng.normal(size=(*leading, 5, q))
                desired = np.einsum("...np,...nq->...pq", left, right)
                self._compare(f"{what} of {p} and {q}", run(*self.backend.put((left, right), dtype)), desired, dtype)

    def test_eigh(self) -> None:
        """Ascending values, an orthonormal basis in columns, the matrix rebuilt; values below zero clipped."""
        rng = np.random.default_rng(6)
        for what, run, leading, dtype in self._cases("eigh"):
            x = definite(rng, leading, 4)
            values, vectors, ok = run(self.backend.put(x, dtype))
            self._compare(f"{what}: values", values, np.linalg.eigvalsh(x), dtype)
            self._compare(f"{what}: ok", ok, np.ones(leading, dtype=bool), dtype)
            assert_close(vectors, np.zeros(x.shape, dtype), self.backend, np.inf, f"{what}: vectors")
            v, q = self.backend.get((values, vectors))
            rebuilt = np.einsum("...ik,...k,...jk->...ij", q, v, q)
            error = np.abs(rebuilt - x).max()
            assert error < 10 * TOLERANCE[dtype], f"{self.backend.name}: {what}: vectors do not rebuild the matrix, off by {error:.3g}"
            gram = np.einsum("...ki,...kj->...ij", q, q)
            assert np.abs(gram - np.eye(4)).max() < TOLERANCE[dtype], f"{self.backend.name}: {what}: vectors are not orthonormal"
            shifted = x - 2.0 * np.eye(4)
            values, _, _ = run(self.backend.put(shifted, dtype))
            self._compare(f"{what}: clipped values", values, np.maximum(np.linalg.eigvalsh(shifted), 0.0), dtype)

    def test_patches(self) -> None:
        """The positions under every offset of a kernel, in order; the input as it is, and as a view with its axes turned."""
        rng = np.random.default_rng(12)
        for window, spatial in WINDOWS:
            for what, run, leading, dtype in self._cases("patches", window):
                x = rng.normal(size=(*leading, *spatial, 4))
                desired = reference.patches(x, window.kernel, window.stride, window.dilation)
                self._compare(f"{what} of {window}", run(self.backend.put(x, dtype)), desired, dtype)
            for which, function in implementations("patches", self.backend.library).items():
                x = rng.normal(size=(2, 4, *spatial))

                def turned(x: Any, function: Callable[..., Any] = function, window: Window = window) -> Any:
                    xp = namespace(x)
                    return function(xp, xp.permute_dims(x, (0, *range(2, x.ndim), 1)), window)

                desired = reference.patches(np.moveaxis(x, 1, -1), window.kernel, window.stride, window.dilation)
                result = self.backend.call(turned, self.backend.put(x))
                self._compare(f"patches ({which}) of channels first, {window}", result, desired, "float64")

    def test_patch_moments(self) -> None:
        """Sums over all patches by group; of few examples at once, of a batch in several pieces, and of an example in slabs."""
        rng = np.random.default_rng(13)
        small = Window((3, 2), (2, 1), (1, 2), ((2, 1), (0, 1)))
        large = Window((5, 5), (1, 1), (1, 1), ((2, 2), (2, 2)))
        cases = [(small, (3, 5, 4, 6), 1), (small, (2, 3, 5, 4, 6), 3), (large, (3, 32, 32, 16), 1), (large, (1, 64, 64, 12), 2)]
        for which, function in implementations("patch_moments", self.backend.library).items():
            for window, shape, groups in cases:

                def run(x: Any, function: Callable[..., Any] = function, window: Window = window, groups: int = groups) -> Any:
                    xp = namespace(x)
                    return function(xp, x, window, groups, xp.float64)

                x = rng.normal(size=shape)
                found = reference.patches(reference.padded(x, window.padding), window.kernel, window.stride, window.dilation)
                # [..., N, outputs, K, C] as [..., groups, N outputs, K c]
                rows = found.reshape(*shape[:-4], -1, found.shape[-2], groups, shape[-1] // groups)
                rows = np.moveaxis(rows, -2, -4).reshape(*shape[:-4], groups, rows.shape[-4], -1)
                moment, first = self.backend.call(run, self.backend.put(x, "float32"))
                what = f"patch_moments ({which}) of {shape} in {groups} groups under {window}"
                desired = np.swapaxes(rows, -1, -2) @ rows
                assert_close(moment, desired, self.backend, 1e-6, f"{what}: second")
                assert_close(first, rows.sum(axis=-2), self.backend, 1e-5, f"{what}: first")
