"""Convolutions: rows against the definition of the operation, blocks against that of the curvature, and calls that are refused.

The definitions are in ``reference.py``: kernels offset by offset, and transposed ones by spreading every input position. Networks
here are linear, so that their derivatives are their values at unit weights.
"""

import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfcore as kf
from kfcore import patches
from kfcore.statistics import Moment

RTOL = 1e-12
MODES = ["zeros", "reflect", "replicate", "circular"]


def pairs(layer):
    return tuple((p, p) if isinstance(p, int) else p for p in layer.padding)


def apply(ref, layer, x, weight, bias=None):
    """The layer by its definition, of arrays with channels first and a weight in PyTorch's layout."""
    how = {"stride": layer.stride, "padding": pairs(layer), "dilation": layer.dilation, "groups": layer.groups}
    if layer.transposed:
        return ref.convolve_transposed(x, weight, bias, output_padding=layer.output_padding, **how)
    return ref.convolve(x, weight, bias, mode=layer.padding_mode, **how)


def user(layer, x):
    """``x`` with channels first as the user of this layer has it."""
    return x if layer.channels == "first" else np.moveaxis(x, 1, -1)


def user_weight(layer, w):
    """A weight in PyTorch's layout as the user of this layer has it."""
    return w if layer.layout == "oi" else np.moveaxis(w, (0, 1), (-1, -2))


def torch_shape(layer):
    return replace(layer, layout="oi").parameters["weight"]


def check_rows(ref, rng, layer, spatial, error=1.0):
    """Largest deviation of the gradient made of rows from its definition, relative; ``error`` scales the captured inputs."""
    x = rng.normal(size=(2, layer.in_channels, *spatial))
    v = rng.normal(size=apply(ref, layer, x, np.zeros(torch_shape(layer))).shape)
    size = int(np.prod(torch_shape(layer)))
    weight = ref.derivative(lambda w: (v * apply(ref, layer, x, w.reshape(torch_shape(layer)))).sum(), size).reshape(torch_shape(layer))
    grads = {"weight": user_weight(layer, weight)}
    if layer.bias:
        grads["bias"] = v.sum(axis=(0, *range(2, v.ndim)))
    inputs, output_grads = layer.capture(error * user(layer, x), user(layer, v))
    worst, matrices = 0.0, layer.matrices(grads)
    for suffix, part in layer.blocks().items():
        a, g = part.input_rows(np, inputs, np.float64), part.output_rows(np, output_grads, np.float64)
        worst = max(worst, ref.distance(np.swapaxes(g, -1, -2) @ a, matrices[suffix]))
        moment = part.input_gram(np, inputs, np.float64)
        count = part.input_count(inputs)
        assert count == a.shape[-2]
        assert ref.distance(moment, np.swapaxes(a, -1, -2) @ a) < RTOL
    back = layer.parameters_of(matrices)
    assert all(np.array_equal(back[role], grads[role]) for role in grads)
    return worst


GEOMETRIES = {
    "pointwise": (kf.Conv(3, 4, (1, 1)), (2, 3)),
    "one axis": (kf.Conv(3, 4, (3,), 2, 1), (6,)),
    "three axes": (kf.Conv(2, 3, (2, 1, 3), (1, 2, 1), (1, 0, 2), dilation=(2, 1, 1)), (3, 4, 2)),
    "stride, padding and dilation": (kf.Conv(2, 3, (3, 2), (2, 3), (2, 1), dilation=(1, 2)), (5, 6)),
    "padding on one side": (kf.Conv(2, 3, (2, 3), padding=((0, 2), (3, 1))), (3, 4)),
    "cropping": (kf.Conv(2, 3, (2, 2), padding=((-1, 2), (1, -2))), (4, 5)),
    "groups": (kf.Conv(6, 4, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=2), (5, 6)),
    "depthwise": (kf.Conv(3, 6, (3, 3), padding=1, groups=3), (3, 4)),
    "outputs fewer than inputs": (kf.Conv(2, 3, (2, 2), 3), (6, 7)),
    "transposed": (kf.Conv(3, 2, (3, 2), transposed=True), (2, 3)),
    "transposed with everything": (
        kf.Conv(4, 6, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=2, transposed=True, output_padding=(1, 2)),
        (3, 4),
    ),
    "transposed, padding wider than the kernel": (kf.Conv(2, 3, (2,), 3, 2, transposed=True, output_padding=1), (4,)),
    "transposed, padding wider than the input": (kf.Conv(2, 3, (1,), 3, 2, transposed=True, output_padding=2), (2,)),
    "transposed, nothing but output padding": (kf.Conv(2, 3, (1,), 3, ((2, 0),), transposed=True, output_padding=2), (1,)),
    "transposed, three axes": (kf.Conv(2, 2, (2, 1, 2), (1, 2, 2), (1, 0, 0), transposed=True), (2, 2, 3)),
}


@pytest.mark.parametrize("channels", ["first", "last"])
@pytest.mark.parametrize("layout", ["oi", "io"])
@pytest.mark.parametrize("bias", ["joint", "separate", None])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_rows_rebuild_the_gradient(ref, rng, name, bias, layout, channels):
    layer, spatial = GEOMETRIES[name]
    layer = replace(layer, bias=bias, layout=layout, channels=channels)
    assert check_rows(ref, rng, layer, spatial) < RTOL
    if name == "groups":
        assert check_rows(ref, rng, replace(layer, bias=None), spatial, error=1.01) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [2, (1, 3), ((0, 3), (2, 0))])
def test_every_padding_mode_pads_as_numpy_does(ref, rng, padding, mode):
    layer = kf.Conv(2, 3, (2, 3), (1, 2), padding, mode)
    assert check_rows(ref, rng, layer, (4, 5)) < RTOL
    others = [replace(layer, padding_mode=other) for other in MODES if other != mode]
    x = rng.normal(size=(2, 2, 4, 5))
    here = layer.input_rows(np, layer.capture(x, None)[0], np.float64)
    assert all(np.abs(here - o.input_rows(np, o.capture(x, None)[0], np.float64)).max() > 0.1 for o in others)


@pytest.mark.parametrize(("size", "stride"), list(itertools.product((5, 6, 7), (1, 2, 3))))
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2)])
def test_same_keeps_the_size_over_the_stride(ref, rng, size, stride, kernel, dilation):
    layer = kf.Conv(2, 3, (kernel,), stride, "same", dilation=dilation)
    ((low, high),) = layer.window((size,)).padding
    assert 0 <= high - low <= 1
    assert layer.window((size,)).outputs((size,)) == (-(-size // stride),)
    x = rng.normal(size=(2, 2, size))
    explicit = replace(layer, padding=((low, high),))
    for part in (layer, explicit):
        assert part.capture(x, None)[0].shape == (2, size, 2)
    assert np.array_equal(*(p.input_rows(np, p.capture(x, None)[0], np.float64) for p in (layer, explicit)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_rebuild_the_gradient_of_any_geometry(ref, data):
    axes = data.draw(st.integers(1, 3))
    each = lambda low, high: tuple(data.draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))  # noqa: E731
    groups, transposed = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    pads = tuple(zip(each(0, 2), each(0, 2), strict=True))
    layer = kf.Conv(
        groups * data.draw(st.integers(1, 2)),
        groups * data.draw(st.integers(1, 2)),
        kernel,
        stride,
        pads,
        dilation=dilation,
        groups=groups,
        transposed=transposed,
        output_padding=tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)) if transposed else 0,
        bias=data.draw(st.sampled_from(["joint", "separate", None])),
        layout=data.draw(st.sampled_from(["oi", "io"])),
        channels=data.draw(st.sampled_from(["first", "last"])),
    )
    spatial = tuple(d * (k - 1) + 1 + n for k, d, n in zip(kernel, dilation, each(0, 2), strict=True))
    if min(layer.window(spatial).outputs(spatial)) < 1:
        return
    assert check_rows(ref, np.random.default_rng(data.draw(st.integers(0, 99))), layer, spatial) < RTOL


def test_reduce_means_the_patches_and_sums_the_gradients(rng):
    for groups, bias in itertools.product((1, 2), ("joint", None)):
        expand = kf.Conv(4, 6, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=groups, bias=bias)
        reduce = replace(expand, sharing="reduce")
        x, v = rng.normal(size=(3, 4, 5, 6)), rng.normal(size=(3, 6, 4, 2))
        (a, g), (mean, total) = (
            (layer.input_rows(np, inputs, np.float64), layer.output_rows(np, grads, np.float64))
            for layer in (expand, reduce)
            for inputs, grads in [layer.capture(x, v)]
        )
        lead = expand.stack
        assert np.allclose(mean, a.reshape(*lead, 3, 8, -1).mean(axis=-2), rtol=0, atol=1e-14)
        assert np.allclose(total, g.reshape(*lead, 3, 8, -1).sum(axis=-2), rtol=0, atol=1e-14)
        moment = reduce.input_gram(np, reduce.capture(x, None)[0], np.float64)
        count = reduce.input_count(reduce.capture(x, None)[0])
        assert count == 3
        assert np.allclose(moment, np.swapaxes(mean, -1, -2) @ mean, rtol=0, atol=1e-13)


# -- exact blocks ------------------------------------------------------------------------------------------------------


def block_of(layer, x, vectors, terms, error=None, average_groups=False):
    """The library's weight block from records of the vectors pulled back to the layer's output, one each."""
    method = kf.KFAC(fisher="exact")
    part = layer.blocks()["" if layer.bias != "separate" else ".weight"]
    state = method.init(part, np.zeros(()), part.stack)
    total = None
    for v in vectors:
        scale = {"inputs": (1.01, 1.0), "vectors": (1.0, 1.01)}.get(error, (1.0, 1.0))
        inputs, grads = layer.capture(scale[0] * user(layer, x), scale[1] * user(layer, v))
        new = method.reduce(part, state, inputs, grads)
        total = new if total is None else total + new
    if average_groups:
        total = total._replace(inputs=Moment(np.broadcast_to(total.input_sum.mean(axis=0), total.input_sum.shape)))
    return method.dense(part, method.observe(state, total.over(terms * (1.01 if error == "terms" else 1.0))))


def matrix_derivative(ref, layer, function):
    """Derivative ``[outputs, *stack, rows columns]`` of a linear ``function(weight, bias)`` by the layer's matrices, row-major."""
    shapes = {"weight": torch_shape(layer)} | ({"bias": (layer.out_channels,)} if layer.bias == "joint" else {})
    sizes = [int(np.prod(shape)) for shape in shapes.values()]

    def run(vector):
        parts = np.split(vector, np.cumsum(sizes)[:-1])
        values = {role: part.reshape(shape) for (role, shape), part in zip(shapes.items(), parts, strict=True)}
        return function(values["weight"], values.get("bias")).reshape(-1)

    jacobian = ref.derivative(run, sum(sizes))
    plain = replace(layer, bias="joint" if layer.bias == "joint" else None)

    def row(j):
        parts = np.split(j, np.cumsum(sizes)[:-1])
        values = {r: part.reshape(shape) for (r, shape), part in zip(shapes.items(), parts, strict=True)}
        matrix = plain.matrices(values | {"weight": user_weight(layer, values["weight"])})[""]
        return matrix.reshape(*layer.stack, -1)

    return np.stack([row(j) for j in jacobian])


def blocks_of_net(ref, layers, weights, x, pool, index, **how):
    """The library's block and the exact one, by group, of one layer of a linear net, with squared error over all outputs.

    Both are built from unit vectors at the outputs: the generalised Gauss-Newton matrix of a mean over the numbers compared.
    """
    hidden = x
    for layer, w in zip(layers[:index], weights[:index], strict=True):
        hidden = apply(ref, layer, hidden, w)
    layer = layers[index]

    def tail(z):
        for later, w in zip(layers[index + 1 :], weights[index + 1 :], strict=True):
            z = apply(ref, later, z, w)
        return z.sum(axis=tuple(range(2, z.ndim))) if pool else z

    z = apply(ref, layer, hidden, weights[index])
    examples = len(x)
    # the tail is linear and the same for every example: its derivative, output by output, is what is pulled back
    pulls = ref.derivative(lambda unit: tail(unit.reshape(1, *z.shape[1:])).reshape(-1), z[0].size)
    outputs = len(pulls)
    jacobian = matrix_derivative(ref, layer, lambda w, b: tail(apply(ref, layer, hidden, w, b)))
    jacobian = jacobian.reshape(examples * outputs, *layer.stack, -1)
    terms = float(examples * outputs)
    exact = 2.0 * np.einsum("j...a,j...b->...ab", jacobian, jacobian) / terms
    vectors = [np.broadcast_to(np.sqrt(2.0) * pull.reshape(1, *z.shape[1:]), z.shape) for pull in pulls]
    return block_of(layer, hidden, vectors, terms, **how), exact


STRAIGHT = {
    "plain": kf.Conv(2, 3, (3, 2), padding=1),
    "grouped": kf.Conv(4, 6, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=2),
    "depthwise": kf.Conv(3, 6, (2, 2), groups=3),
    "circular": kf.Conv(2, 3, (3, 3), 1, 2, "circular"),
    "reflecting": kf.Conv(2, 2, (3, 2), 2, ((1, 2), (0, 1)), "reflect"),
    "transposed": kf.Conv(4, 2, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=2, transposed=True, output_padding=(1, 2)),
    "channels last": kf.Conv(2, 3, (3, 2), padding="same", layout="io", channels="last"),
}


def explicit(layer, spatial=(5, 6)):
    """The layer with its padding in numbers, which the reference needs."""
    return replace(layer, padding=layer.window(spatial).padding) if layer.padding == "same" else layer


@pytest.mark.parametrize("bias", ["joint", None])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", STRAIGHT)
def test_a_linear_convolution_has_kfac_blocks_by_group(ref, rng, name, sharing, bias):
    layer = replace(explicit(STRAIGHT[name]), sharing=sharing, bias=bias)
    x, weight = rng.normal(size=(3, layer.in_channels, 5, 6)), rng.normal(size=torch_shape(layer))
    pool = sharing == "reduce"
    block, exact = blocks_of_net(ref, [layer], [weight], x, pool, 0)
    assert block.shape == exact.shape == (*layer.stack, *(np.prod(layer.shape),) * 2)
    assert ref.distance(block, exact) < RTOL
    for error in ("inputs", "vectors", "terms"):
        # a joint bias, whose input is exactly 1, may outweigh the rest
        assert ref.distance(blocks_of_net(ref, [layer], [weight], x, pool, 0, error=error)[0], exact) > 2e-4
    if layer.groups > 1:
        averaged, _ = blocks_of_net(ref, [layer], [weight], x, pool, 0, average_groups=True)
        assert ref.distance(averaged, exact) > 0.01
    other = replace(layer, sharing="expand" if pool else "reduce")
    assert ref.distance(blocks_of_net(ref, [other], [weight], x, pool, 0)[0], exact) > 0.05


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_groups_do_not_see_each_other(ref, rng, sharing):
    layer = replace(STRAIGHT["grouped"], sharing=sharing, bias=None)
    x = rng.normal(size=(3, 4, 5, 6))
    jacobian = matrix_derivative(ref, layer, lambda w, b: apply(ref, layer, x, w))
    if sharing == "reduce":
        jacobian = jacobian.reshape(3 * 6, -1, *jacobian.shape[1:]).sum(axis=1)
    assert np.abs(np.einsum("ja,jb->ab", jacobian[:, 0], jacobian[:, 1])).max() == 0.0


def two_convolutions(rng, mode="zeros", groups=1):
    layers = [kf.Conv(2, 4, (3, 3), 1, 1, mode, bias=None), kf.Conv(4, 2, (3, 3), 1, 1, mode, groups=groups, bias=None)]
    return [replace(layer, sharing="reduce") for layer in layers], [rng.normal(size=torch_shape(layer)) for layer in layers]


@pytest.mark.parametrize("groups", [1, 2])
def test_the_second_of_two_convolutions_before_a_sum_is_exact_and_the_first_is_not(ref, rng, groups):
    layers, weights = two_convolutions(rng, groups=groups)
    x = rng.normal(size=(3, 2, 4, 5))
    distances = [ref.distance(*blocks_of_net(ref, layers, weights, x, True, i)) for i in range(2)]
    assert distances[1] < RTOL
    # at the border the padding makes the gradients of the first layer's positions differ
    assert distances[0] > 1e-3


def test_both_of_two_circular_convolutions_before_a_sum_are_exact(ref, rng):
    layers, weights = two_convolutions(rng, "circular")
    x = rng.normal(size=(3, 2, 4, 5))
    for i in range(2):
        assert ref.distance(*blocks_of_net(ref, layers, weights, x, True, i)) < RTOL
        assert ref.distance(*blocks_of_net(ref, layers, weights, x, True, i, error="inputs")) > 5e-3


@pytest.mark.parametrize(("spatial", "positions"), [((5,), 3), ((5, 7), 15)])
def test_constant_inputs_and_a_sum_make_the_block_as_many_times_kfac_expand_as_there_are_positions(ref, rng, spatial, positions):
    layer = kf.Conv(2, 3, (3,) * len(spatial), bias="joint")
    x = np.broadcast_to(rng.normal(size=(1, 2, *(1,) * len(spatial))), (4, 2, *spatial))
    weight = rng.normal(size=torch_shape(layer))
    expand, exact = blocks_of_net(ref, [layer], [weight], x, True, 0)
    reduce, _ = blocks_of_net(ref, [replace(layer, sharing="reduce")], [weight], x, True, 0)
    assert ref.distance(positions * expand, exact) < RTOL
    assert ref.distance(reduce, exact) < RTOL
    assert ref.distance(expand, exact) > 0.5


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_block_of_a_separate_bias_is_exact(ref, rng, groups, sharing):
    layer = kf.Conv(4, 6, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=groups, bias="separate", sharing=sharing)
    x, v = rng.normal(size=(3, 4, 5, 6)), rng.normal(size=(3, 6, 4, 2))
    method = kf.KFAC()
    bias = layer.blocks()[".bias"]
    state = method.init(bias, np.zeros(()), bias.stack)
    block = method.dense(bias, method.observe(state, method.reduce(bias, state, *layer.capture(x, v))))
    gradients = v.sum(axis=(2, 3))
    assert block.shape == (6, 6)
    assert ref.distance(block, gradients.T @ gradients / 3) < RTOL
    assert ref.distance(1.01 * block, gradients.T @ gradients / 3) > 5e-3


# -- the streamed second moment ----------------------------------------------------------------------------------------

STREAMED = [
    (kf.Conv(4, 2, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=2), (7, 4, 9, 8)),
    (kf.Conv(3, 3, (3, 3), 2, "same", groups=3, bias=None), (4, 3, 7, 6)),
    (kf.Conv(3, 2, (3, 3), padding=1, padding_mode="circular"), (5, 3, 6, 7)),
    (kf.Conv(2, 2, (4,), 3, ((1, 2),), channels="last"), (5, 40, 2)),
    (kf.Conv(2, 2, (2, 2, 2), (3, 1, 2), 1), (2, 2, 8, 4, 5)),
    (kf.Conv(2, 3, (3, 2), (2, 3), 1, transposed=True, output_padding=1), (3, 2, 4, 5)),
]


@pytest.mark.parametrize("room", [1, 100, 700, 3000])
@pytest.mark.parametrize(("layer", "shape"), STREAMED)
def test_the_streamed_moment_is_that_of_the_rows(ref, rng, monkeypatch, layer, shape, room):
    monkeypatch.setattr(patches, "room", lambda x: room)
    inputs, _ = layer.capture(rng.normal(size=shape), None)
    pieces = []
    rows_of = patches._rows
    monkeypatch.setattr(patches, "_rows", lambda *args: pieces.append(rows_of(*args)) or pieces[-1])
    moment = layer.input_gram(np, inputs, np.float64)
    count = layer.input_count(inputs)
    means = replace(layer, sharing="reduce").input_rows(np, inputs, np.float64)
    sizes = [piece.size for piece in pieces]
    assert len(pieces) > (room == 1)
    least = sum(sizes) // len(inputs) // layer.window(inputs.shape[1:-1]).outputs(inputs.shape[1:-1])[0]
    assert max(sizes) <= max(room, least), "a piece is larger than the room and than a row of outputs"
    monkeypatch.setattr(patches, "_rows", rows_of)
    rows = layer.input_rows(np, inputs, np.float64)
    assert count == rows.shape[-2]
    assert ref.distance(means, rows.reshape(*rows.shape[:-2], len(inputs), -1, rows.shape[-1]).mean(axis=-2)) < RTOL
    assert ref.distance(moment, np.swapaxes(rows, -1, -2) @ rows) < RTOL
    assert ref.distance(moment * 1.01, np.swapaxes(rows, -1, -2) @ rows) > 5e-3


@pytest.mark.parametrize("joint", ["joint", None])
def test_a_large_batch_is_streamed_in_single_precision(ref, rng, joint):
    layer = kf.Conv(16, 4, (5, 5), padding=2, bias=joint)
    x = rng.normal(size=(8, 16, 24, 24)).astype(np.float32)
    inputs, _ = layer.capture(x, None)
    assert patches.at_once(inputs, layer.window((24, 24))) < 8
    moment = layer.input_gram(np, inputs, np.float32)
    count = layer.input_count(inputs)
    assert moment.dtype == np.float32
    rows = layer.input_rows(np, inputs, np.float64)
    assert count == len(rows) == 8 * 24 * 24
    assert ref.distance(moment, rows.T @ rows) < 1e-6


def test_streaming_takes_little_memory(rng, monkeypatch):
    monkeypatch.setattr(patches, "ROOM", 1)
    layer = kf.Conv(32, 4, (3, 3), padding=1)
    inputs, _ = layer.capture(rng.normal(size=(64, 32, 16, 16)).astype(np.float32), None)

    def peak(run):
        tracemalloc.start()
        try:
            run()
            return tracemalloc.get_traced_memory()[1] / inputs.nbytes
        finally:
            tracemalloc.stop()

    assert peak(lambda: layer.input_gram(np, inputs, np.float32)) < 2.0
    assert peak(lambda: replace(layer, sharing="reduce").input_gram(np, inputs, np.float32)) < 2.0
    assert peak(lambda: layer.input_rows(np, inputs, np.float32)) > 9.0


def test_no_examples_have_no_moment(rng):
    layer = kf.Conv(4, 2, (3, 3), groups=2)
    moment = layer.input_gram(np, layer.capture(np.zeros((0, 4, 5, 5)), None)[0], np.float64)
    count = layer.input_count(layer.capture(np.zeros((0, 4, 5, 5)), None)[0])
    assert count == 0
    assert moment.shape == (2, 19, 19)
    assert not moment.any()


@pytest.mark.parametrize(("layer", "shape"), STREAMED)
def test_stacked_layers_are_each_its_own(rng, layer, shape):
    inputs = np.stack([layer.capture(rng.normal(size=shape), None)[0] for _ in range(3)])
    for part in (layer, replace(layer, sharing="reduce")):
        for compute in (lambda x, p=part: p.input_rows(np, x, np.float64), lambda x, p=part: p.input_gram(np, x, np.float64)):
            assert np.allclose(compute(inputs), np.stack([compute(x) for x in inputs]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", ["first", "last"])
@pytest.mark.parametrize("layout", ["oi", "io"])
@pytest.mark.parametrize("bias", ["joint", "separate", None])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_layer_with_leading_axes_is_that_many_layers(rng, name, bias, layout, channels):
    one, spatial = GEOMETRIES[name]
    one = replace(one, bias=bias, layout=layout, channels=channels)
    all_of = replace(one, leading=(3, 2))
    outputs = one.window(spatial).outputs(spatial)
    sizes = ((one.in_channels, spatial), (one.out_channels, outputs))
    x, v = (np.stack([user(one, rng.normal(size=(2, channels, *space))) for _ in range(6)]) for channels, space in sizes)
    params = {role: rng.normal(size=(6, *shape)) for role, shape in one.parameters.items()}
    fold = lambda x: x.reshape(3, 2, *x.shape[1:])  # noqa: E731
    assert all_of.parameters == {role: (3, 2, *shape) for role, shape in one.parameters.items()}
    assert all_of.stack == (3, 2, *one.stack)
    together = {role: fold(p) for role, p in params.items()}
    matrices, files = all_of.matrices(together), all_of.to_oi(together["weight"])
    back = all_of.parameters_of(matrices)
    inputs, grads = all_of.capture(fold(x), fold(v))
    for role, p in together.items():
        assert np.array_equal(back[role], p)
    assert np.array_equal(all_of.from_oi(files), together["weight"])
    for k in range(6):
        single = {role: p[k] for role, p in params.items()}
        place = divmod(k, 2)
        assert np.array_equal(files[place], one.to_oi(single["weight"]))
        seen = one.capture(x[k], v[k])
        assert np.array_equal(inputs[place], seen[0])
        assert np.array_equal(grads[place], seen[1])
        for suffix, matrix in one.matrices(single).items():
            assert np.array_equal(matrices[suffix][place], matrix)
    for suffix, part in all_of.blocks().items():
        alone = one.blocks()[suffix]
        assert (part.shape, part.stack) == (alone.shape, (3, 2, *alone.stack))
        assert part.input_count(inputs) == alone.input_count(inputs[0, 0])
        for compute in ("input_rows", "input_gram", "output_rows"):
            given_ = grads if compute == "output_rows" else inputs
            expected = [[getattr(alone, compute)(np, given_[i, j], np.float64) for j in range(2)] for i in range(3)]
            assert np.allclose(getattr(part, compute)(np, given_, np.float64), expected, rtol=0, atol=1e-12)


# -- a whole optimizer -------------------------------------------------------------------------------------------------


def steps(ref, layer, x, y, params, count=3, **options):
    """A few steps on the mean squared error of one convolution; the layer's own layouts everywhere."""
    optimizer = kf.Optimizer(kf.KFAC(damping=0.1, refresh_every=2), {"conv": layer}, learning_rate=0.1, **options)
    state = optimizer.init({"conv": params})
    for _ in range(count):
        plain = replace(layer, layout="oi", bias=layer.bias and "joint")
        weight = np.moveaxis(params["weight"], (-1, -2), (0, 1)) if layer.layout == "io" else params["weight"]
        v = (apply(ref, layer, x, weight, params.get("bias")) - y) / y.size
        inputs, grads = layer.capture(user(layer, x), user(layer, v))
        a, g = plain.input_rows(np, inputs, np.float64), plain.output_rows(np, grads, np.float64)
        found = replace(layer, bias=plain.bias).parameters_of({"": np.swapaxes(g, -1, -2) @ a})
        new, state = optimizer.step({"conv": params}, {"conv": found}, {"conv": (user(layer, x), user(layer, v))}, state, terms=y.size)
        params = new["conv"]
    return params, optimizer, state


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("groups", [1, 2])
def test_stacked_layers_take_the_steps_that_each_takes_alone(rng, groups, bias):
    one = kf.Conv(4, 4, (3, 2), 2, 1, groups=groups, bias=bias)
    layer = replace(one, leading=(3,))
    params, grads = ({role: rng.normal(size=shape) for role, shape in layer.parameters.items()} for _ in range(2))
    x, v = rng.normal(size=(3, 5, 4, 4, 5)), rng.normal(size=(3, 5, 4, 2, 3))

    def run(layer, params, grads, x, v):
        optimizer = kf.Optimizer(kf.KFAC(damping=0.1, refresh_every=2), {"conv": layer}, learning_rate=0.1, momentum=0.9, clip=None)
        state = optimizer.init({"conv": params})
        for k in range(3):
            new, state = optimizer.step({"conv": params}, {"conv": grads}, {"conv": ((k + 1) * x, v)}, state, terms=5)
            params = new["conv"]
        return params

    together = run(layer, params, grads, x, v)
    for k in range(3):
        alone = run(one, {r: p[k] for r, p in params.items()}, {r: g[k] for r, g in grads.items()}, x[k], v[k])
        for role, value in alone.items():
            assert np.allclose(together[role][k], value, rtol=1e-12, atol=1e-12)
            assert np.abs(value - params[role][k]).max() > 1e-3
    assert np.abs(together["weight"][0] - together["weight"][1]).max() > 1e-3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", ["joint", "separate", None])
def test_layouts_of_the_user_take_the_same_steps_and_share_files(ref, rng, tmp_path, bias, groups, transposed):
    layer = kf.Conv(4, 6, (3, 2), 2, 1, groups=groups, bias=bias, transposed=transposed, output_padding=int(transposed))
    x, weight = rng.normal(size=(5, 4, 4, 5)), 0.1 * rng.normal(size=torch_shape(layer))
    y = rng.normal(size=apply(ref, layer, x, weight).shape)
    ends, saved = [], []
    for layout, channels in (("oi", "first"), ("io", "last")):
        own = replace(layer, layout=layout, channels=channels)
        params = {"weight": user_weight(own, weight)} | ({"bias": np.zeros(6)} if bias else {})
        start, optimizer, state = steps(ref, own, x, y, params)
        path = tmp_path / layout
        kf.save(path, optimizer.bind({"conv": params}), state)
        turned = np.moveaxis(start["weight"], (-1, -2), (0, 1)) if layout == "io" else start["weight"]
        ends.append(np.concatenate([turned.ravel(), start.get("bias", np.zeros(0))]))
        saved.append((path, optimizer.bind({"conv": params}), state))
    assert np.allclose(*ends, rtol=0, atol=1e-12)
    assert np.abs(ends[0][: weight.size] - weight.ravel()).max() > 1e-3
    (path, _, _), (_, optimizer, state) = saved
    loaded = kf.load(path, optimizer, state)
    for name, momentum in state.step.momentum.items():
        assert np.abs(momentum).max() > 0
        assert np.allclose(loaded.step.momentum[name], momentum, rtol=0, atol=1e-12)


def test_layers_of_different_numbers_of_groups_share_an_optimizer(rng):
    layers = {f"g{groups}": kf.Conv(6, 6, (2,), groups=groups, bias="separate") for groups in (1, 2, 3)}
    optimizer = kf.Optimizer(kf.KFAC(damping=0.1), layers)
    params = {name: {role: rng.normal(size=shape) for role, shape in layer.parameters.items()} for name, layer in layers.items()}
    records = {name: (rng.normal(size=(4, 6, 3)), rng.normal(size=(4, 6, 2))) for name in layers}
    new, state = optimizer.step(params, params, records, optimizer.init(params))
    assert (int(state.curvature.observed), int(state.curvature.refreshed)) == (1, 1)
    assert all(np.abs(new[name]["weight"] - params[name]["weight"]).max() > 0 for name in layers)


def test_the_report_counts_all_groups(rng):
    layer = kf.Conv(8, 8, (3, 3), groups=4)
    optimizer = kf.Optimizer(kf.KFAC(), {"conv": layer})
    params = {"conv": {role: np.zeros(shape) for role, shape in layer.parameters.items()}}
    state = optimizer.init(params)
    block = state.curvature.blocks["conv"]
    assert block.average.values[0].shape == (4, 19, 19)
    assert block.average.values[1].shape == (4, 2, 2)
    arrays = [block.average.weight, *block.average.values, block.solver.input, block.solver.output, block.dropped, block.kept, block.rungs]
    assert optimizer.report(params).bytes == sum(a.nbytes for a in [*arrays, *state.step.momentum.values()])


# -- wrong calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "came", "rest"),
    [
        ("kernel", [3, (), (1, 2, 3, 4), (0,), (2.0,), [3, 3], (True,)], {}),
        ("in_channels", [0, 2.0, None], {}),
        ("out_channels", [-1, True], {}),
        ("groups", [0, 3, 1.0], {}),
        ("stride", [0, (1,), (1, 1, 1), (1, 0), 1.5, None], {}),
        ("dilation", [0, (2,), "1"], {}),
        ("padding", [-1, (1,), (1, 2, 3), ((1,), (2,)), ((1, 2),), "full", 1.5, None, ((1, 1.0), (0, 0)), (-1, 0)], {}),
        ("padding", ["same"], {"transposed": True}),
        ("padding", ["same"], {"input_dilation": 2}),
        ("padding", [((-1, 0), (0, 0))], {"padding_mode": "circular"}),
        ("padding_mode", ["constant", None, 0], {}),
        ("padding_mode", ["reflect"], {"transposed": True}),
        ("padding_mode", ["circular"], {"input_dilation": 2}),
        ("transposed", ["yes", None], {}),
        ("output_padding", [-1, 1.0, (1,)], {"transposed": True}),
        ("output_padding", [2], {"transposed": True, "stride": 2}),
        ("output_padding", [1], {}),
        ("input_dilation", [0, (1,)], {}),
        ("input_dilation", [2], {"transposed": True}),
        ("bias", ["yes", 3], {}),
        ("sharing", ["sum", None], {}),
        ("layout", ["hwio", None], {}),
        ("leading", [3, (0,), [2], (2.0,)], {}),
        ("channels", ["middle", None], {}),
    ],
)
def test_a_setting_out_of_range_is_refused(name, came, rest):
    for value in came:
        arguments = {"in_channels": 4, "out_channels": 4, "kernel": (3, 3)} | rest | {name: value}
        with pytest.raises(ValueError, match=f"`{name}`") as caught:
            kf.Conv(**arguments)
        assert repr(value) in str(caught.value) or str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "inputs", "grads", "pattern"),
    [
        (kf.Conv(3, 4, (3, 3)), (2, 5, 5, 3), None, r"`inputs`.*\[N, 3, H, W\].*\(2, 5, 5, 3\)"),
        (kf.Conv(3, 4, (3, 3), channels="last"), (2, 3, 5, 5), None, r"`inputs`.*\[N, H, W, 3\].*\(2, 3, 5, 5\)"),
        (kf.Conv(3, 4, (3,)), (2, 3, 5, 5), None, r"`inputs`.*\[N, 3, L\]"),
        (kf.Conv(3, 4, (3, 3)), (3, 5, 5), None, r"`inputs`.*\[N, 3, H, W\].*\(3, 5, 5\)"),
        (kf.Conv(3, 4, (3, 3)), (2, 3, 2, 5), None, r"`inputs`.*kernel \(3, 3\).*\(2, 3, 2, 5\)"),
        (kf.Conv(3, 4, (3, 3)), (2, 3, 5, 5), (2, 4, 3, 5), r"`output_grads`.*\[2, 4, 3, 3\].*\(2, 3, 5, 5\).*\(2, 4, 3, 5\)"),
        (kf.Conv(3, 4, (3, 3)), (2, 3, 5, 5), (3, 4, 3, 3), r"`output_grads`.*\[2, 4, 3, 3\]"),
        (kf.Conv(3, 4, (3, 3)), (2, 3, 5, 5), (2, 3, 3, 3), r"`output_grads`.*\[N, 4, H, W\]"),
        (kf.Conv(3, 4, (3, 3), channels="last"), (2, 5, 5, 3), (2, 5, 5, 4), r"`output_grads`.*\[2, 3, 3, 4\]"),
        (kf.Conv(3, 4, (3, 3), leading=(2,)), (3, 2, 3, 5, 5), None, r"`inputs`.*\[2, N, 3, H, W\].*\(3, 2, 3, 5, 5\)"),
        (kf.Conv(3, 4, (3, 3), leading=(2,)), (2, 3, 5, 5), None, r"`inputs`.*\[2, N, 3, H, W\]"),
        (kf.Conv(3, 4, (3, 3), leading=(2,)), (2, 6, 3, 5, 5), (2, 6, 4, 3, 5), r"`output_grads`.*\[2, 6, 4, 3, 3\]"),
        (kf.Conv(3, 4, (3, 3), padding=4, padding_mode="reflect"), (2, 3, 4, 9), None, r"`inputs`.*'reflect'.*\(3, 8\)"),
        (kf.Conv(3, 4, (3, 3), padding=5, padding_mode="circular"), (2, 3, 4, 9), None, r"`inputs`.*'circular'.*\(4, 9\)"),
    ],
)
def test_captured_arrays_of_another_shape_are_refused(layer, inputs, grads, pattern):
    with pytest.raises(ValueError, match=pattern):
        layer.capture(np.zeros(inputs), None if grads is None else np.zeros(grads))


def test_descriptions_are_values():
    layer = kf.Conv(4, 6, (3, 2), 2, 1, bias=True)
    assert layer == kf.Conv(4, 6, (3, 2), (2, 2), ((1, 1), (1, 1)), bias="joint")
    assert hash(layer) == hash(replace(layer))
    assert replace(layer, bias=False).blocks() == {"": replace(layer, bias=None)}
    assert kf.Conv(4, 6, (3, 2), padding="valid") == kf.Conv(4, 6, (3, 2))
    assert layer.shape == (6, 25)
    assert replace(layer, groups=2).shape == (3, 13)
    assert replace(layer, groups=2).stack == (2,)
