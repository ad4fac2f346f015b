"""The one door to array libraries.

Everything the core knows about a particular library passes through here: finding the namespace of an array, reading an
array on the host, and the two narrow hooks by which a library may do better than the portable reference,

* *kernels*, faster versions of a handful of named primitives (see :mod:`kfcore.linalg`), and
* *control flow*, what ``if`` means: a host branch by default, ``jax.lax.cond`` under JAX.

The functions of the core find ``xp`` once per public call and pass it down as their first argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import array_api_compat
import numpy

Array: TypeAlias = Any
"""An array of any library that follows the Python array API."""

Namespace: TypeAlias = Any
"""The module that holds the functions of an array library."""

Schedule: TypeAlias = Callable[[Any], Any]
"""A function of the step number (an int, or a 0-d integer array under a trace)."""

T = TypeVar("T")


_namespaces: dict[tuple[type, ...], Namespace] = {}
"""Namespaces by the types of the arrays: a step asks some twenty times, and looking them up anew costs 2 us each."""
_libraries: dict[str, str] = {}
"""Short names of namespaces, likewise. A memo of functools would do, but compilers of other libraries stumble over it."""


def namespace(*arrays: Array) -> Namespace:
    """Array-API namespace shared by ``arrays``; ``None`` and Python scalars are ignored.

    Raises
    ------
    TypeError
        If nothing in ``arrays`` is an array of a known library, or if libraries are mixed.
    """
    kinds = tuple(map(type, arrays))
    found = _namespaces.get(kinds)
    if found is not None:
        return found
    try:
        xp = array_api_compat.array_namespace(*arrays)
        # NumPy arrays of one of JAX's own dtypes count as JAX: that is true of them, not of their type
        return xp if numpy.ndarray in kinds and library(xp) != "numpy" else _namespaces.setdefault(kinds, xp)
    except TypeError as error:
        names = sorted({f"{kind.__module__}.{kind.__name__}" for kind in kinds})
        raise TypeError(
            f"`arrays` must all belong to one array-API library, got {', '.join(names) or 'nothing'}; "
            "convert them (for example with numpy.asarray) before the call"
        ) from error


def library(xp: Namespace) -> str:
    """Short name of a namespace: ``"numpy"``, ``"torch"``, ``"jax"``, ``"cupy"``, ``"array_api_strict"``, ..."""
    name = _libraries.get(xp.__name__)
    if name is None:
        parts = xp.__name__.split(".")
        name = _libraries.setdefault(xp.__name__, parts[1] if parts[0] == "array_api_compat" else parts[0])
    return name


def device(x: Array) -> Any:
    """Device of ``x`` as its library names it, or ``None`` under a trace."""
    # asking the array itself is five times faster than the general look-up, which only JAX's tracers need
    return array_api_compat.device(x) if library(namespace(x)) == "jax" else x.device


def factor_dtype(xp: Namespace, dtype: Any) -> Any:
    """Dtype of the curvature factors of a model in ``dtype``: ``float64`` stays, everything narrower is ``float32``."""
    return xp.float64 if dtype == xp.float64 else xp.float32


def wider(xp: Namespace, dtype: Any) -> Any:
    """``float64`` for a narrower ``dtype``, or ``None`` where that is not to be had (JAX without ``jax_enable_x64``)."""
    widest = xp.result_type(dtype, xp.float64)
    return None if widest == dtype else widest


def cast(xp: Namespace, x: Array, dtype: Any) -> Array:
    """``x`` in ``dtype``, itself where it already is."""
    return x if x.dtype == dtype else xp.astype(x, dtype)


def scalar(xp: Namespace, value: float | Array, like: Array) -> Array:
    """``value`` as a 0-d array (or as the array it is) in the dtype and on the device of ``like``."""
    if isinstance(value, (int, float, numpy.generic)):
        return xp.full((), float(value), dtype=like.dtype, device=device(like))
    return cast(xp, value, like.dtype)


def own(xp: Namespace, x: Array, source: Array) -> Array:
    """``x``, made of ``source`` and of the same entries or others, without its memory: whoever writes into ``source`` leaves it alone."""
    if library(xp) == "jax" or x.dtype != source.dtype or math.prod(x.shape) != math.prod(source.shape):
        return x
    return xp.asarray(x, copy=True)


def is_real_floating(xp: Namespace, x: Array) -> bool:
    """Whether ``x`` holds real floating-point numbers (half and bfloat16 included)."""
    return bool(xp.isdtype(x.dtype, "real floating"))


def counter(xp: Namespace, value: int = 0) -> Array:
    """A 0-d int32 array that the host can read without waiting for a device.

    It lives on the CPU of its own library where that has one, and is a NumPy array for CuPy.
    """
    if library(xp) == "cupy":
        return numpy.asarray(value, dtype=numpy.int32)
    host = "cpu" if library(xp) == "torch" else None
    return xp.asarray(value, dtype=xp.int32, device=host)


def known(x: int | Array) -> int | None:
    """The integer in ``x``, or ``None`` under a trace, where it has no value yet."""
    return int(x) if isinstance(x, int) or device(x) is not None else None


def host(x: int | Array) -> int | Array:
    """The integer in ``x`` where it has a value, so that schedules are computed by the host, else ``x`` itself."""
    value = known(x)
    return x if value is None else value


def to_numpy(x: Array) -> numpy.ndarray:
    """Copy of ``x`` on the host as a NumPy array in C order."""
    if isinstance(x, numpy.ndarray | numpy.generic | int | float):
        return numpy.array(x, order="C")
    name = library(namespace(x))
    if name == "torch":
        return numpy.array(x.detach().cpu().numpy(), order="C")
    if name == "cupy":
        return x.get(order="C")
    if name == "array_api_strict":
        # the strict library refuses every implicit transfer, so cross over explicitly
        host = namespace(x).asarray(0.0).device
        return numpy.array(numpy.from_dlpack(x.to_device(host)), order="C")
    return numpy.array(x, order="C")


def from_numpy(value: numpy.ndarray, like: Array) -> Array:
    """``value`` in the library and on the device of ``like``, keeping the dtype of ``value``."""
    xp = namespace(like)
    dtype = getattr(xp, value.dtype.name)
    return xp.asarray(value.copy(), dtype=dtype, device=device(like))


# -- hook 1: kernels ---------------------------------------------------------------------------------------------------

_references: dict[str, Callable[..., Any]] = {}
_kernels: dict[tuple[str, str], Callable[..., Any]] = {}


def primitive(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``reference(xp, ...)`` a primitive: a portable definition that a library may override by a kernel."""
    name = reference.__name__
    _references[name] = reference

    def dispatch(xp: Namespace, *args: Any) -> Any:
        return _kernels.get((name, library(xp)), reference)(xp, *args)

    dispatch.__name__, dispatch.__doc__ = name, reference.__doc__
    dispatch.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return dispatch


def primitives() -> dict[str, Callable[..., Any]]:
    """The primitives by name, each as its portable reference."""
    return dict(_references)


def register_kernel(name: str, library: str, function: Callable[..., Any]) -> None:
    """Let ``library`` compute the primitive ``name`` by ``function``.

    Parameters
    ----------
    name
        One of :func:`primitives`.
    library
        Short name of the array library, as :func:`library` gives it: ``"torch"``, ``"jax"``, ``"cupy"``, ...
    function
        Called as the reference is, with ``xp`` first. It must not write into its arguments, and must pass the same
        conformance tests as the reference.
    """
    if name not in _references:
        raise ValueError(f"`name` must be a primitive, got {name!r}; allowed: {', '.join(sorted(_references))}")
    _kernels[name, library] = function


@primitive
def truth(xp: Namespace, flag: bool | Array) -> bool | Array:
    """``flag [...]`` as a bool, if it is 0-d and the host can read it without waiting for a device or ending a trace; else itself.

    What depends on it then takes a branch instead of a selection, which reads and writes whole arrays.
    """
    return flag


@primitive
def number(xp: Namespace, value: Array) -> float | Array:
    """``value`` as a float under the conditions of :func:`truth`, so that arithmetic with it is the host's; else itself."""
    return value


def readable(xp: Namespace, x: Array) -> bool:
    """Whether the host can read single numbers of ``x`` at once."""
    return isinstance(number(xp, x[(0,) * x.ndim]), float)


@primitive
def append(xp: Namespace, x: Array, column: float | Array) -> Array:
    """``x [..., m, n]`` with one more column, ``[..., m]`` or a number: ``[..., m, n + 1]``."""
    last: Array = xp.full(x.shape[:-1], column, dtype=x.dtype, device=device(x)) if isinstance(column, float) else column
    return xp.concat([x, last[..., :, None]], axis=-1)


# numbers that are the host's (see `number`) or 0-d and stacked arrays


def finite(xp: Namespace, value: float | Array) -> bool | Array:
    """Whether a number is finite."""
    return math.isfinite(value) if isinstance(value, float) else xp.isfinite(value)


def root(xp: Namespace, value: float | Array) -> float | Array:
    """Square root of a number that is not negative."""
    return math.sqrt(value) if isinstance(value, float) else xp.sqrt(value)


def larger(xp: Namespace, value: float | Array, other: float | Array) -> float | Array:
    """The larger of two numbers."""
    if isinstance(value, float) and isinstance(other, float):
        return max(value, other)
    like = other if isinstance(value, float) else value
    return xp.maximum(scalar(xp, value, like), scalar(xp, other, like))


def choose(xp: Namespace, flag: bool | Array, value: float | Array, other: float | Array) -> float | Array:
    """``value`` where ``flag``, else ``other``."""
    if isinstance(flag, bool | numpy.bool_):
        return value if flag else other
    like = other if isinstance(value, float) else value
    return xp.where(flag, scalar(xp, value, like), scalar(xp, other, like))


def select(xp: Namespace, ok: bool | Array, new: T, old: T) -> T:
    """``new`` where ``ok [...]``, else ``old``, for equal nests of tuples, arrays and ``None``."""
    if isinstance(ok, bool):
        return new if ok else old
    if new is None:
        return old
    if isinstance(new, tuple):
        parts = [select(xp, ok, n, o) for n, o in zip(new, old, strict=True)]  # pyright: ignore[reportArgumentType]
        return type(new)(*parts) if hasattr(new, "_fields") else type(new)(parts)  # pyright: ignore
    extra = new.ndim - ok.ndim  # pyright: ignore[reportAttributeAccessIssue]
    return xp.where(ok[(...,) + (None,) * extra], new, old)


def _numpy_number(xp: Namespace, value: Array) -> float | Array:
    return float(value) if value.ndim == 0 else value


def _numpy_truth(xp: Namespace, flag: bool | Array) -> bool | Array:
    return bool(flag) if isinstance(flag, bool) or flag.ndim == 0 else flag


register_kernel("truth", "numpy", _numpy_truth)
register_kernel("number", "numpy", _numpy_number)


# -- hook 2: control flow ----------------------------------------------------------------------------------------------

_control_flow: dict[str, Callable[..., Any]] = {}


def register_cond(library: str, function: Callable[..., Any]) -> None:
    """Let ``library`` decide what :func:`cond` does with a predicate that is one of its arrays."""
    _control_flow[library] = function


def cond(predicate: bool | Array, then: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any) -> Any:
    """``then(*operands)`` if ``predicate`` else ``otherwise(*operands)``: on the host, unless the library says how."""
    if not isinstance(predicate, bool | numpy.bool_ | numpy.ndarray):
        chosen = _control_flow.get(library(namespace(predicate)))
        if chosen is not None:
            return chosen(predicate, then, otherwise, *operands)
    return then(*operands) if bool(predicate) else otherwise(*operands)


@primitive
def branches(xp: Namespace, x: Array) -> bool:
    """Whether :func:`cond` can go one of two ways by what is in ``x`` without waiting for a device or ending a trace.

    Where not, both ways are gone and one is selected, or there is only one.
    """
    return library(xp) in _control_flow or (library(xp) != "cupy" and device(x) is not None)
