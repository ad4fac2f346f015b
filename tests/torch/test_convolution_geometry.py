"""Descriptions of PyTorch's convolutions: rows rebuild what autograd finds, over the geometries that its modules have."""

import numpy as np
import pytest
import torch

import kfcore as kf
from kfcore import patches
from kfcore_torch import kernels

# a remark of PyTorch on its own speed
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

nn = torch.nn
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def describe(module, **how):
    """The description of a module, from its own attributes."""
    transposed = isinstance(module, tuple(TRANSPOSED.values()))
    return kf.Conv(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.padding_mode,
        module.dilation,
        module.groups,
        transposed,
        module.output_padding if transposed else 0,
        bias=module.bias is not None if "bias" not in how else how.pop("bias"),
        **how,
    )


def deviation(module, x, **how):
    """Largest relative deviation of the gradients made of rows from autograd's, and of the streamed moment from the rows' own."""
    layer = describe(module, **how)
    outputs = module(x)
    v = torch.randn_like(outputs)
    grads = torch.autograd.grad(outputs, list(module.parameters()), v)
    matrices = layer.matrices(dict(zip(layer.parameters, grads, strict=True)))
    xp = kf._array.namespace(x)
    inputs, output_grads = layer.capture(x, v)
    worst = 0.0
    for suffix, part in layer.blocks().items():
        a, g = part.input_rows(xp, inputs, torch.float64), part.output_rows(xp, output_grads, torch.float64)
        worst = max(worst, float((g.mT @ a - matrices[suffix]).norm() / matrices[suffix].norm()))
        moment = part.input_gram(xp, inputs, torch.float64)
        count = part.input_count(inputs)
        assert count == a.shape[-2]
        worst = max(worst, float((moment - a.mT @ a).norm() / moment.norm()))
    assert all(torch.equal(p, q) for p, q in zip(grads, layer.parameters_of(matrices).values(), strict=True))
    return worst


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_input(module, *spatial):
    return torch.randn(3, module.in_channels, *spatial, dtype=torch.float64)


GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)},
    {"padding": "valid"},
    {"padding": "same", "dilation": (2, 1)},
]


@pytest.mark.parametrize("bias", ["joint", "separate", None])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("how", GEOMETRIES, ids=str)
def test_two_axes(how, mode, groups, bias):
    module = nn.Conv2d(4, 8, (3, 2), groups=groups, padding_mode=mode, bias=bias is not None, dtype=torch.float64, **how)
    assert deviation(module, random_input(module, 7, 9), bias=bias) < 1e-12


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (1, "same"), (2, 0), (2, 1)])
@pytest.mark.parametrize(("axes", "dilation"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_one_and_three_axes(axes, stride, padding, dilation, groups):
    module = PLAIN[axes](4, 8, 2, stride, padding, dilation, groups, dtype=torch.float64)
    assert deviation(module, random_input(module, *(5, 4, 6)[:axes])) < 1e-12


@pytest.mark.parametrize("bias", ["joint", "separate", None])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "output_padding", "dilation"),
    [((3, 2), 1, 0, 0, 1), ((3, 2), (2, 3), (2, 1), (1, 2), (1, 2)), ((2, 1), 3, 2, 1, 1), ((1, 4), (2, 1), (0, 3), (1, 0), 1)],
)
def test_transposed(kernel, stride, padding, output_padding, dilation, groups, bias):
    module = nn.ConvTranspose2d(4, 8, kernel, stride, padding, output_padding, groups, bias is not None, dilation, dtype=torch.float64)
    assert deviation(module, random_input(module, 4, 5), bias=bias) < 1e-12


@pytest.mark.parametrize("axes", [1, 3])
def test_transposed_over_one_and_three_axes(axes):
    module = TRANSPOSED[axes](4, 6, 3, 2, 1, 1, groups=2, dtype=torch.float64)
    assert deviation(module, random_input(module, *(3, 4, 2)[:axes])) < 1e-12


@pytest.mark.parametrize("wrong", [{"stride": 2}, {"padding": 2}, {"dilation": 2}, {"kernel_size": (2, 3)}, {"padding_mode": "circular"}])
def test_a_wrong_description_is_seen(wrong):
    module = nn.Conv2d(4, 8, (3, 2), 1, 1, dtype=torch.float64)
    x = random_input(module, 7, 9)
    outputs = module(x)
    v = torch.randn_like(outputs)
    (grad,) = torch.autograd.grad(outputs, [module.weight], v)
    arguments = {"kernel_size": (3, 2), "stride": 1, "padding": 1, "dilation": 1, "padding_mode": "zeros"} | wrong
    layer = kf.Conv(4, 8, arguments.pop("kernel_size"), bias=None, **arguments)
    xp = kf._array.namespace(x)
    try:
        inputs, output_grads = layer.capture(x, v)
    except ValueError as error:
        assert "`output_grads`" in str(error)  # noqa: PT017
    else:
        rows = layer.output_rows(xp, output_grads, x.dtype).mT @ layer.input_rows(xp, inputs, x.dtype)
        assert (rows - layer.matrices({"weight": grad})[""]).norm() > 0.05 * grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_narrow_inputs_have_factors_in_single_precision(sharing, dtype):
    layer = kf.Conv(4, 8, (3, 3), padding=1, groups=2, sharing=sharing)
    inputs, _ = layer.capture(torch.randn(3, 4, 5, 6).to(dtype), None)
    xp = kf._array.namespace(inputs)
    moment = layer.input_gram(xp, inputs, torch.float32)
    assert moment.dtype == torch.float32
    exact = layer.input_gram(xp, inputs.double(), torch.float64)
    assert (moment - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("transform", ["compile", "vmap"])
def test_the_kernel_of_patches_under_transforms(transform):
    window = patches.Window((3, 2), (2, 1), (1, 2), ((0, 0), (0, 0)))
    x = torch.randn(2, 3, 7, 6, 4)
    expected = patches.patches.reference(kf._array.namespace(x), x, window)

    def run(x):
        return kernels.patches(None, x, window)

    if transform == "vmap":
        assert torch.equal(torch.vmap(run)(x), expected)
    else:
        torch._dynamo.reset()
        assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(x), expected)
        torch._dynamo.reset()


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_the_memory_of_the_input_does_not_matter(order):
    module = nn.Conv2d(4, 8, 3, padding=1, dtype=torch.float64)
    x = random_input(module, 5, 6)
    if order == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    assert deviation(module, x) < 1e-12
    before = x.clone()
    layer = describe(module)
    layer.input_gram(kf._array.namespace(x), layer.capture(x, None)[0], x.dtype)
    assert np.array_equal(x.numpy(), before.numpy())
