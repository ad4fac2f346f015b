"""The kit must fail a library or a kernel that is wrong: one test a defect, and the tests that see it."""

from dataclasses import replace

import numpy as np
import pytest

from kfcore import primitives
from kfcore import testing as kt
from kfcore.testing.backend import mapped

REFERENCE = primitives()


def transposed_vectors(xp, x):
    values, vectors, ok = REFERENCE["eigh"](xp, x)
    return values, vectors.mT, ok


def in_place_blend(xp, old, new, keep, weight, ok):
    old[...] = REFERENCE["blend"](xp, old, new, keep, weight, ok)
    return old


def mixing_blend(xp, old, new, keep, weight, ok):
    """Without selection: NaN times zero is NaN."""
    keep, weight, ok = (np.asarray(v)[..., None, None] for v in (keep, weight, ok))
    return np.where(ok, keep, 1.0) * old + np.where(ok, weight, 0.0) * new


def inaccurate_invert(xp, x):
    inverse, ok = REFERENCE["invert"](xp, x)
    return 1.01 * inverse, ok


def careless_invert(xp, x):
    inverse, ok = REFERENCE["invert"](xp, x)
    bad = np.diagonal(inverse, axis1=-2, axis2=-1).min(axis=-1) < 0
    return np.where(bad[..., None, None], np.nan, inverse), np.ones_like(ok)


def unbatched_gram(xp, x):
    return np.tensordot(x, x, axes=(tuple(range(x.ndim - 1)),) * 2)


def narrow_sandwich(xp, left, x, right):
    return (left @ x @ right).astype(np.float32)


def reversed_patches(xp, x, window):
    return REFERENCE["patches"](xp, x, window)[..., ::-1, :]


def patches_without_dilation(xp, x, window):
    found = REFERENCE["patches"](xp, x, replace(window, dilation=(1,) * window.axes))
    return found[
        (..., *(slice(n) for n in REFERENCE["patches"](xp, x, window).shape[x.ndim - 1 - window.axes : -2]), slice(None), slice(None))
    ]


def moments_of_the_first_piece(xp, x, window, groups, dtype):
    size = np.prod(x.shape[-2 - window.axes :]) > 20_000
    return REFERENCE["patch_moments"](xp, x[(..., slice(1), *(slice(None),) * (window.axes + 1))] if size else x, window, groups, dtype)


def counts_that_wrap(xp, ids, num):
    return REFERENCE["counts"](xp, ids % num, num)


def counts_over_rows(xp, ids, num):
    return np.broadcast_to(REFERENCE["counts"](xp, ids.reshape(-1), num), (*ids.shape[:-1], num))


def squares_of_each_position(xp, g, a):
    return np.einsum("...bsp,...bsq->...pq", g**2, a**2)


def erf_by_tanh(xp, x):
    return np.tanh(np.sqrt(4.0 / np.pi) * (x + 0.08943 * x**3))


KERNELS = {
    erf_by_tanh: ("erf", ["test_erf", "test_activations"]),
    squares_of_each_position: ("squares", ["test_squares", "test_ekfac_of_every_layer"]),
    counts_that_wrap: ("counts", ["test_counts", "test_kfac_embedding"]),
    counts_over_rows: ("counts", ["test_counts", "test_kfac_embedding"]),
    transposed_vectors: ("eigh", ["test_eigh", "test_kfac_damping_kinds", "test_step_with_clip_and_coupled_decay"]),
    in_place_blend: ("blend", ["test_blend", "test_kfac_damping_kinds"]),
    mixing_blend: ("blend", ["test_blend"]),
    inaccurate_invert: ("invert", ["test_invert", "test_kfac_damping_norms", "test_step_with_momentum_and_decoupled_decay"]),
    careless_invert: ("invert", ["test_invert_of_an_indefinite_matrix"]),
    unbatched_gram: ("gram", ["test_gram", "test_kfac_stacked_layers"]),
    reversed_patches: ("patches", ["test_patches", "test_kfac_convolution"]),
    patches_without_dilation: ("patches", ["test_patches", "test_kfac_convolution"]),
    moments_of_the_first_piece: ("patch_moments", ["test_patch_moments"]),
    narrow_sandwich: ("sandwich", ["test_sandwich", "test_kfac_damping_kinds"]),
}


def failed(backend):
    return {name for name, result in kt.run(backend).items() if result != "ok"}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wrong_kernel_fails(kernel, with_kernels):
    name, expected = KERNELS[kernel]
    with with_kernels({(name, "numpy"): kernel}):
        assert set(expected) <= failed(kt.numpy_backend())


def test_a_library_that_returns_other_arrays_fails():
    class Own(np.ndarray):
        pass

    def leak(function):
        return lambda *args: mapped(lambda x: x.view(np.ndarray) if isinstance(x, Own) else x, function(*args))

    backend = replace(kt.numpy_backend(), asarray=lambda x: np.array(x).view(Own), array_type=Own, transform=leak)
    assert {"test_gram", "test_kfac_damping_kinds", "test_mse"} <= failed(backend)


def test_a_transform_that_writes_into_its_arguments_fails():
    def spoil(function):
        def run(*args):
            result = function(*args)
            mapped(lambda x: x.fill(0) if isinstance(x, np.ndarray) else x, args)
            return result

        return run

    assert len(failed(replace(kt.numpy_backend(), transform=spoil))) > len(kt.tests()) / 2


@pytest.mark.parametrize(
    ("actual", "word"),
    [
        ([1.0, 2.0], "array type"),
        (np.float32([1.0, 2.0]), "dtype"),
        (np.array([[1.0, 2.0]]), "shape"),
        (np.array([1.0, 2.0001]), "values"),
        (np.array([1.0, np.nan]), "finite"),
    ],
)
def test_messages_name_what_broke(actual, word):
    if isinstance(actual, list):
        actual = memoryview(np.array(actual))
    with pytest.raises(AssertionError, match=word):
        kt.assert_close(actual, np.array([1.0, 2.0]), kt.numpy_backend())


def test_a_wrong_device_is_named():
    strict = pytest.importorskip("array_api_strict")
    backend = kt.array_api_backend(strict, device=strict.Device("device1"))
    with pytest.raises(AssertionError, match="device: got"):
        kt.assert_close(strict.zeros(2), np.zeros(2), backend)


def test_a_missing_leaf_is_named():
    with pytest.raises(AssertionError, match="structure"):
        kt.assert_close({"a": np.zeros(1)}, {"b": np.zeros(1)}, kt.numpy_backend())
