"""Every array-API name in the sources exists in the libraries, also in those that cannot run here."""

import importlib
import importlib.util

import pytest

from kfcore import testing as kt

LIBRARIES = ["array_api_compat.numpy", "array_api_strict", "array_api_compat.torch", "jax.numpy", "array_api_compat.cupy"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_names_exist(name):
    needed = name.removeprefix("array_api_compat.").partition(".")[0]
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    assert kt.names_missing(importlib.import_module(name)) == []


def test_names_are_found():
    names = kt.names_used()
    assert {"sum", "where", "linalg.eigh", "linalg.inv", "float64", "concat", "cumulative_sum"} <= set(names)
    assert not {"einsum", "linalg", "matmul"} & set(names)


def test_a_missing_name_is_told():
    class Poor:
        sum = None

    assert "linalg.eigh" in kt.names_missing(Poor)
    assert "sum" not in kt.names_missing(Poor)
