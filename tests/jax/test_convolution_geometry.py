"""Descriptions of XLA's convolutions: rows rebuild what autodiff finds, for what ``lax`` and Flax can say about a convolution."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfcore as kf
from kfcore import patches, primitives
from kfcore_jax import kernels

NUMBERS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def deviation(layer, function, spatial, channels):
    """Largest relative deviation of the weight's gradient made of rows from autodiff's."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, *spatial, channels)))
    weight = jnp.asarray(rng.normal(size=layer.parameters["weight"]))
    y, pull = jax.vjp(lambda w: function(x, w), weight)
    v = jnp.asarray(rng.normal(size=y.shape))
    want = layer.matrices({"weight": pull(v)[0]})[""]
    inputs, grads = layer.capture(x, v)
    a, g = layer.input_rows(jnp, inputs, x.dtype), layer.output_rows(jnp, grads, x.dtype)
    assert jnp.array_equal(layer.parameters_of(layer.matrices({"weight": weight}))["weight"], weight)
    return float(jnp.linalg.norm(g.mT @ a - want) / jnp.linalg.norm(want))


def describe(kernel, inp, out, **how):
    return kf.Conv(inp, out, kernel, bias=None, layout="io", channels="last", **how)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "spread", "dilation"),
    [
        ((3,), (2,), ((1, 2),), (1,), (1,)),
        ((3,), (2,), ((1, 2),), (3,), (1,)),
        ((3, 2), (2, 3), ((2, 1), (0, 3)), (1, 1), (1, 2)),
        ((3, 2), (2, 1), ((2, -1), (-1, 3)), (2, 3), (1, 2)),
        ((2, 1, 3), (1, 2, 1), ((0, 1), (0, 0), (2, 2)), (2, 1, 2), (1, 1, 1)),
    ],
)
def test_general_convolutions(kernel, stride, padding, spread, dilation, groups):
    layer = describe(kernel, 4, 6, stride=stride, padding=padding, input_dilation=spread, dilation=dilation, groups=groups)

    def function(x, w):
        numbers = NUMBERS[len(kernel)]
        return lax.conv_general_dilated(x, w, stride, padding, spread, dilation, numbers, feature_group_count=groups)

    assert deviation(layer, function, (5, 6, 4)[: len(kernel)], 4) < 1e-12


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation"), list(itertools.product((5, 6, 7), (1, 2, 3), (1, 2, 3), (1, 2))))
def test_same_is_that_of_xla(size, kernel, stride, dilation):
    layer = describe((kernel,), 2, 3, stride=stride, padding="same", dilation=dilation)
    assert layer.window((size,)).padding == tuple(lax.padtype_to_pads((size,), (dilation * (kernel - 1) + 1,), (stride,), "SAME"))
    assert (
        deviation(layer, lambda x, w: lax.conv_general_dilated(x, w, (stride,), "SAME", None, (dilation,), NUMBERS[1]), (size,), 2) < 1e-12
    )


@pytest.mark.parametrize(("stride", "kernel", "padding"), list(itertools.product((1, 2, 3), (2, 3, 4), ("SAME", "VALID"))))
def test_the_transposed_convolution_of_lax_and_flax_is_one_with_a_dilated_input(stride, kernel, padding):
    # the paddings of lax.conv_transpose, which are not part of its result
    if padding == "SAME":
        total = kernel + stride - 2
        low = kernel - 1 if stride > kernel - 1 else -(-total // 2)
        pads = (low, total - low)
    else:
        pads = (kernel - 1, kernel + stride - 2 - kernel + 1 + max(kernel - stride, 0))
    layer = describe((kernel,), 2, 3, padding=(pads,), input_dilation=stride)
    assert deviation(layer, lambda x, w: lax.conv_transpose(x, w, (stride,), padding, dimension_numbers=NUMBERS[1]), (5,), 2) < 1e-12


def test_a_kernel_stored_transposed_is_that_of_keras():
    def function(x, w):
        return lax.conv_transpose(x, w, (2, 3), "VALID", dimension_numbers=NUMBERS[2], transpose_kernel=True)

    # XLA keeps the output positions that a stride larger than the kernel leaves empty at the end, as an output padding does
    layer = describe((3, 2), 4, 6, stride=(2, 3), transposed=True, output_padding=(0, 1))
    assert layer.parameters["weight"] == (3, 2, 6, 4)
    assert deviation(layer, function, (4, 3), 4) < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(6, 24, 24, 16), (7, 24, 24, 16), (1, 48, 48, 16)])
def test_the_scan_sums_what_the_reference_sums(shape, groups):
    window = patches.Window((5, 5), (1, 1), (1, 1), ((2, 2), (2, 2)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    assert patches.at_once(x, window) < max(2, shape[0])
    got = jax.jit(lambda x: kernels.patch_moments(jnp, x, window, groups, jnp.float64))(x)
    want = primitives()["patch_moments"](jnp, x, window, groups, jnp.float64)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert jnp.linalg.norm(a - b) < 1e-12 * jnp.linalg.norm(b)


def test_the_program_of_a_large_batch_is_small_and_takes_little_memory():
    layer = describe((3, 3), 16, 8, padding=1)
    x = jax.ShapeDtypeStruct((64, 32, 32, 16), jnp.float32)
    compiled = jax.jit(lambda x: layer.input_gram(jnp, x, jnp.float32)).lower(x).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 3 * x.size * 4
    whole = jax.jit(lambda x: layer.input_rows(jnp, x, jnp.float32).mT @ layer.input_rows(jnp, x, jnp.float32)).lower(x).compile()
    assert whole.memory_analysis().temp_size_in_bytes > 8 * x.size * 4


def test_a_batch_on_several_devices_stays_where_it_is():
    code = """
import re, jax, jax.numpy as jnp, kfcore as kf
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kfcore_jax import kernels
kernels.register()
layer = kf.Conv(16, 8, (3, 3), padding=1, channels="last")
sharding = NamedSharding(Mesh(jax.devices(), ("data",)), PartitionSpec("data"))
x = jax.ShapeDtypeStruct((64, 32, 32, 16), jnp.float32, sharding=sharding)
compiled = jax.jit(lambda x: layer.input_gram(jnp, x, jnp.float32)).lower(x).compile()
print(len(jax.devices()), sorted(set(re.findall(r"(all-[a-z]+|collective-[a-z]+)[a-z0-9.-]*[(]", compiled.as_text()))))
"""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "4 ['all-reduce']"
