"""The backends under conformance. Each is a context: its library is imported, and its hooks registered, inside it alone."""

import importlib.util
from contextlib import contextmanager, nullcontext

import pytest

from kfcore import _array
from kfcore import testing as kt


def _need(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    return __import__(library)


@contextmanager
def hooks(*, kernels=None, control_flow=None):
    """The registered hooks replaced by these for a while."""
    saved = _array._kernels.copy(), _array._control_flow.copy()
    try:
        for current, new in ((_array._kernels, kernels), (_array._control_flow, control_flow)):
            if new is not None:
                current.clear()
                current.update(new)
        yield
    finally:
        for current, old in zip((_array._kernels, _array._control_flow), saved, strict=True):
            current.clear()
            current.update(old)


@contextmanager
def _strict(device=None):
    xp = _need("array_api_strict")
    where = None if device is None else xp.Device(device)
    yield kt.array_api_backend(xp, device=where, name=f"array-api-strict on {device or 'the default device'}")


@contextmanager
def _torch():
    torch = _need("torch")
    with hooks(kernels={}):
        yield kt.array_api_backend(torch, name="torch, reference primitives")


@contextmanager
def _torch_kernels():
    torch = _need("torch")
    from kfcore_torch import kernels

    with hooks(kernels={}):
        kernels.register()
        yield kt.array_api_backend(torch, name="torch, kernels of kfcore_torch")


@contextmanager
def _torch_compile():
    torch = _need("torch")

    def transform(function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="eager")

    fields = {"transform": transform, "eager": False, "thrifty": True}
    reason = "schedules branch on the host, which a full graph excludes"
    with _torch_kernels():
        yield kt.array_api_backend(torch, name="torch, compiled with fullgraph=True", no_whole_step=reason, **fields)
    torch._dynamo.reset()


def _jax(jit):
    @contextmanager
    def context():
        jax = _need("jax")
        # programs here run a few times on a few numbers: nearly all of the time would go into optimising them
        before = jax.config.jax_enable_x64
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            from kfcore_jax import kernels

            with hooks(kernels={}, control_flow={}):
                kernels.register()
                fields = {"transform": jax.jit, "eager": False} if jit else {}
                fields["thrifty"] = True
                yield kt.array_api_backend(jax.numpy, name=f"jax {'under jit' if jit else 'eager'}", array_type=jax.Array, **fields)
        finally:
            jax.config.update("jax_enable_x64", before)
            jax.config.update("jax_disable_most_optimizations", False)

    return context


@contextmanager
def _cupy():
    cupy = _need("cupy")
    if not cupy.is_available():
        pytest.skip("cupy finds no CUDA device")
    from array_api_compat import cupy as xp

    yield kt.array_api_backend(xp)


BACKENDS = {
    "numpy": lambda: nullcontext(kt.numpy_backend()),
    "numpy-read-only": lambda: nullcontext(kt.read_only_numpy_backend()),
    "strict": _strict,
    "strict-device1": lambda: _strict("device1"),
    "torch": _torch,
    "torch-kernels": _torch_kernels,
    "torch-compile": _torch_compile,
    "jax": _jax(False),
    "jax-jit": _jax(True),
    "cupy": _cupy,
}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu) if name == "cupy" else name for name in BACKENDS], scope="module")
def backend(request):
    with BACKENDS[request.param]() as made:
        yield made


@pytest.fixture
def with_kernels():
    """Register kernels, by ``(name, library)``, for a while."""
    return lambda kernels: hooks(kernels=kernels)
