"""A backend: how the kit makes arrays of a library, reads them, runs functions on them, and compares them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import kfcore
from kfcore._array import Array, Namespace, device, library, namespace

Function = Callable[..., Any]


def unchanged(function: Function) -> Function:
    """The transform of a library that runs eagerly."""
    return function


@dataclass(frozen=True)
class Backend:
    """A library, a device and a way of running functions, as the kit sees them.

    Parameters
    ----------
    name
        For messages.
    library
        Short name of the array library, as :func:`kfcore.register_kernel` takes it.
    asarray
        Makes an array of the library, on the device under test, from a NumPy array, keeping its dtype.
    array_type
        What every array that comes back must be an instance of.
    to_numpy
        Reads an array back.
    transform
        Wraps a pure function of nests of arrays, for libraries that trace or compile.
    eager
        Whether the host sees values inside ``transform``.
    no_whole_step
        Why a whole optimizer step cannot run inside ``transform``; empty if it can.
    thrifty
        Take a sample of the combinations of shapes and dtypes where each costs a compilation.
    """

    name: str
    library: str
    asarray: Callable[[np.ndarray], Array]
    array_type: type | tuple[type, ...]
    to_numpy: Callable[[Array], np.ndarray] = kfcore.to_numpy
    transform: Callable[[Function], Function] = unchanged
    eager: bool = True
    no_whole_step: str = ""
    thrifty: bool = False

    def __str__(self) -> str:
        return self.name

    def put(self, tree: Any, dtype: str | None = None) -> Any:
        """A nest of NumPy arrays in the library; floating-point arrays in ``dtype`` where given."""

        def convert(x: np.ndarray) -> Array:
            floating = np.issubdtype(x.dtype, np.floating)
            return self.asarray(np.array(x, dtype=dtype if floating and dtype else x.dtype, order="C"))

        return mapped(convert, tree)

    def get(self, tree: Any) -> Any:
        """A nest of arrays of the library as NumPy arrays."""
        return mapped(self.to_numpy, tree)

    def wrap(self, function: Function) -> Function:
        """``function`` under ``transform``, checked not to write into its arguments."""
        transformed = self.transform(function)

        def run(*args: Any) -> Any:
            before = [x.copy() for _, x in leaves(self.get(args))]
            result = transformed(*args)
            for (path, now), old in zip(leaves(self.get(args)), before, strict=True):
                if not np.array_equal(now, old, equal_nan=True):
                    raise AssertionError(f"{self.name}: argument {path[1:]} was written into")
            return result

        return run

    def call(self, function: Function, *args: Any) -> Any:
        """``wrap(function)(*args)``."""
        return self.wrap(function)(*args)


def numpy_backend() -> Backend:
    """NumPy itself."""
    return Backend("numpy", "numpy", np.array, (np.ndarray, np.generic))


def read_only_numpy_backend() -> Backend:
    """NumPy arrays that cannot be written: every argument, and every result before it is handed on."""

    def frozen(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            x = x.view()
            x.flags.writeable = False
        return x

    def transform(function: Function) -> Function:
        return lambda *args: mapped(frozen, function(*mapped(frozen, args)))

    return Backend("read-only numpy", "numpy", lambda x: frozen(np.array(x)), (np.ndarray, np.generic), transform=transform)


def array_api_backend(xp: Namespace, *, device: Any = None, name: str | None = None, **fields: Any) -> Backend:
    """Any library with a standard ``asarray``; ``fields`` are those of :class:`Backend`, such as ``transform``.

    ``xp`` is the library's own module or its array-api-compat namespace; data pass through ``asarray(list, dtype=, device=)`` if the
    library refuses NumPy arrays.
    """

    def put(x: np.ndarray) -> Array:
        dtype = getattr(xp, x.dtype.name)
        try:
            return xp.asarray(x, dtype=dtype, device=device)
        except (TypeError, ValueError, NotImplementedError):
            return xp.asarray(x.tolist(), dtype=dtype, device=device)

    probe = put(np.zeros(1))
    found = library(namespace(probe))
    label = name or (found if device is None else f"{found} on {device}")
    return Backend(label, found, put, fields.pop("array_type", type(probe)), **fields)


# -- nests of arrays ---------------------------------------------------------------------------------------------------


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """``function`` of every leaf of a nest of mappings, tuples and lists; ``None`` stays."""
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [mapped(function, value) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return function(tree)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nest with their paths."""
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, (tuple, list)):
        items = list(zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True))
    else:
        if tree is not None:
            yield path, tree
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{key}")


# -- comparison --------------------------------------------------------------------------------------------------------


def assert_close(actual: Any, desired: Any, backend: Backend, rtol: float = 1e-10, what: str = "result", *, anywhere: bool = False) -> None:
    """Raise ``AssertionError``, naming what broke, unless nests of arrays agree in everything.

    Every leaf of ``actual`` must be an array of the backend's library, on its device, of the dtype and shape of the NumPy array at the
    same place of ``desired``, and within ``rtol`` of it relative to its largest entry. ``anywhere`` leaves the device open: some counters
    live on the host.
    """
    got, want = dict(leaves(actual, what)), dict(leaves(desired, what))
    if sorted(got) != sorted(want):
        raise AssertionError(f"{backend.name}: structure: got {sorted(got)}, expected {sorted(want)}")
    for path, x in got.items():
        _assert_leaf(x, np.asarray(want[path]), backend, rtol, f"{backend.name}: {path}", anywhere)


def _assert_leaf(x: Any, desired: np.ndarray, backend: Backend, rtol: float, where: str, anywhere: bool) -> None:
    if not isinstance(x, backend.array_type):
        raise AssertionError(f"{where}: array type: got {type(x).__module__}.{type(x).__name__}, expected {backend.array_type}")
    found = library(namespace(x))
    if found != backend.library:
        raise AssertionError(f"{where}: namespace: got {found}, expected {backend.library}")
    home = device(backend.asarray(np.zeros(1)))
    if not anywhere and device(x) != home:
        raise AssertionError(f"{where}: device: got {device(x)}, expected {home}")
    value = backend.to_numpy(x)
    if value.dtype != desired.dtype:
        raise AssertionError(f"{where}: dtype: got {value.dtype}, expected {desired.dtype}")
    if value.shape != desired.shape:
        raise AssertionError(f"{where}: shape: got {value.shape}, expected {desired.shape}")
    if desired.dtype.kind not in "fc":
        if not np.array_equal(value, desired):
            raise AssertionError(f"{where}: values: got {value.tolist()}, expected {desired.tolist()}")
        return
    if not np.array_equal(np.isfinite(value), np.isfinite(desired)):
        raise AssertionError(
            f"{where}: finite entries: got {np.isfinite(value).sum()} of {value.size}, expected {np.isfinite(desired).sum()}"
        )
    finite = np.isfinite(desired)
    error = float(np.max(np.abs(value[finite] - desired[finite]), initial=0.0))
    top = float(np.max(np.abs(desired[finite]), initial=0.0))
    if error > rtol * top:
        raise AssertionError(f"{where}: values: off by {error:.3g} where the largest is {top:.3g}, allowed are {rtol:g} of that")
