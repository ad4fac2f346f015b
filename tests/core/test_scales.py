"""Second moments of the gradients of single examples in a basis, against a loop over the examples, for every layer kind and route."""

import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

import kfcore as kf
from kfcore import scales
from kfcore._array import namespace

XP = namespace(np.zeros(1))
RTOL = 1e-12


def orthogonal(rng, leading, n):
    return np.linalg.qr(rng.normal(size=(*leading, n, n)))[0]


def loop(left, right, examples):
    """``sum_n (left^T G_n right)^2``, one example after the other."""
    total = 0.0
    for g in examples:
        total = total + (np.swapaxes(left, -1, -2) @ g @ right) ** 2
    return total


def dense_gradients(layer, x, g):
    """By block suffix, of ``x [N, S, in]`` and ``g [N, S, out]`` the gradient of every example."""
    weight, bias = np.einsum("nso,nsi->noi", g, x), g.sum(axis=1)[..., None]
    if layer.bias == "separate":
        return {".weight": weight, ".bias": bias}
    return {"": np.concatenate([weight, bias], axis=-1) if layer.bias else weight}


def conv_gradients(ref, layer, x, v):
    """The same of a convolution, by the definition of the operation; arrays with channels first."""
    how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    if layer.transposed:
        how["output_padding"] = layer.output_padding
    apply = ref.convolve_transposed if layer.transposed else ref.convolve
    shape = replace(layer, layout="oi").parameters["weight"]
    found = []
    for n in range(len(x)):
        one, seen = x[n : n + 1], v[n : n + 1]
        weight = ref.derivative(lambda w, one=one, seen=seen: (seen * apply(one, w.reshape(shape), **how)).sum(), int(np.prod(shape)))
        grads = {"weight": weight.reshape(shape)} | ({"bias": seen.sum(axis=(0, *range(2, v.ndim)))} if layer.bias else {})
        found.append(layer.matrices(grads))
    return {suffix: np.stack([each[suffix] for each in found]) for suffix in found[0]}


def check(rng, layer, inputs, output_grads, examples):
    """Scales of every block of a layer against its examples' gradients ``[N, ...]``, in random bases."""
    for suffix, part in ({"": layer} if isinstance(layer, kf.Bias) else layer.blocks()).items():
        out, inp = part.shape
        left, right = orthogonal(rng, part.stack, out), orthogonal(rng, part.stack, inp)
        if part.forms[0] == "diagonal":
            left = None
        if part.forms[1] == "diagonal":
            right = None
        found = scales.scales(XP, [(part, inputs, output_grads)], left, right, np.float64)
        desired = loop(np.eye(out) if left is None else left, np.eye(inp) if right is None else right, examples[suffix])
        assert found.shape == desired.shape
        np.testing.assert_allclose(found, desired, rtol=0, atol=RTOL * desired.max())
        assert (found >= 0).all()


@pytest.fixture(params=[1 << 22, 1], ids=["at once", "in parts"])
def room(request, monkeypatch):
    monkeypatch.setattr(scales, "ROOM", request.param)


@pytest.mark.parametrize("positions", [1, 2, scales.PAIRS, scales.PAIRS + 1, 15])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", ["joint", "separate", None])
@pytest.mark.usefixtures("room")
def test_a_dense_layer(rng, captures, bias, sharing, positions):
    layer = kf.Linear(3, 2, bias, sharing)
    x, g = captures(rng, s=positions)
    check(rng, layer, x, g, dense_gradients(layer, x, g))


@pytest.mark.parametrize(("sizes", "rotated"), [((12, 11), False), ((3, 2), True)])
@pytest.mark.usefixtures("room")
def test_many_positions_are_rotated_before_or_after_whichever_is_less(rng, captures, monkeypatch, sizes, rotated):
    called = []

    def told(name, function):
        return lambda *args: called.append(name) or function(*args)

    for name in ("squares", "rotated_squares"):
        monkeypatch.setattr(scales, name, told(name, getattr(scales, name)))
    layer = kf.Linear(*sizes, None)
    x, g = captures(rng, s=scales.PAIRS + 1, inp=sizes[0], out=sizes[1])
    check(rng, layer, x, g, dense_gradients(layer, x, g))
    assert set(called) == {"rotated_squares" if rotated else "squares"}


CONVOLUTIONS = {
    "one axis": (kf.Conv(3, 4, (3,), 2, 1), (6,)),
    "two axes": (kf.Conv(2, 3, (3, 2), (2, 3), (2, 1), dilation=(1, 2), bias=None), (5, 6)),
    "groups": (kf.Conv(6, 4, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=2), (5, 6)),
    "groups, bias apart": (kf.Conv(6, 4, (2,), groups=2, bias="separate"), (4,)),
    "depthwise": (kf.Conv(3, 6, (3, 3), padding=1, groups=3), (3, 4)),
    "transposed": (kf.Conv(4, 6, (3, 2), (2, 3), (2, 1), groups=2, transposed=True, output_padding=(1, 2)), (3, 4)),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.usefixtures("room")
def test_a_convolution(ref, rng, name, sharing):
    layer, spatial = CONVOLUTIONS[name]
    layer = replace(layer, sharing=sharing)
    x = rng.normal(size=(4, layer.in_channels, *spatial))
    v = rng.normal(size=(4, layer.out_channels, *layer.window(spatial).outputs(spatial)))
    check(rng, layer, *layer.capture(x, v), conv_gradients(ref, layer, x, v))


def table_gradients(layer, ids, g):
    found = np.zeros((len(ids), layer.features, layer.num))
    for n, s in itertools.product(*map(range, ids.shape)):
        if ids[n, s] != layer.padding:
            found[n, :, ids[n, s]] += g[n, s]
    return {"": found}


@pytest.mark.parametrize("padding", [None, 2, 7])
@pytest.mark.usefixtures("room")
def test_a_table_adds_up_what_a_row_got_in_an_example(rng, padding):
    layer = kf.Embedding(7, 3, padding=padding)
    ids, g = rng.integers(0, 7, size=(5, 6)), rng.normal(size=(5, 6, 3))
    ids[0], ids[1, :4] = (2, 1, 2, 1, 1, 2), 3
    if padding == 7:
        ids[:, -1] = 7
    check(rng, layer, ids, g, table_gradients(layer, ids, g))


def test_what_cancels_in_a_row_leaves_nothing(rng):
    ids, g = np.full((1, 2), 3), rng.normal(size=(1, 1, 3)) * np.array([[[1.0], [-1.0]]])
    assert not scales.scales(XP, [(kf.Embedding(7, 3), ids, g)], orthogonal(rng, (), 3), None, np.float64).any()


@pytest.mark.parametrize("block", ["diagonal", "full"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("room")
def test_a_normalisation(rng, block, bias):
    x, g = rng.normal(size=(2, 5, 9, 3))
    each = [(x * g).sum(axis=1), *([g.sum(axis=1)] if bias else [])]
    check(rng, kf.Norm(3, bias, block), x, g, {"": np.concatenate(each, axis=-1)[..., None]})


def test_a_bias_alone(rng, captures):
    x, g = captures(rng, s=4)
    check(rng, kf.Bias(2), x, g, {"": g.sum(axis=1)[..., None]})


@pytest.mark.parametrize("positions", [1, 3, 9])
@pytest.mark.usefixtures("room")
def test_stacked_layers_are_each_its_own(ref, rng, positions):
    for layer in (kf.Linear(3, 2, stack=(2,)), kf.Embedding(5, 2, padding=1, stack=(2,)), kf.Norm(2, stack=(2,))):
        g = rng.normal(size=(2, 4, positions, 2))
        x = rng.integers(0, 5, size=g.shape[:-1]) if isinstance(layer, kf.Embedding) else rng.normal(size=(*g.shape[:-1], 3))
        x = x[..., :2] if isinstance(layer, kf.Norm) else x
        left = None if isinstance(layer, kf.Norm) else orthogonal(rng, (2,), 2)
        right = None if isinstance(layer, kf.Embedding) else orthogonal(rng, (2,), layer.shape[1])
        together = scales.scales(XP, [(layer, x, g)], left, right, np.float64)
        for k in range(2):
            one = replace(layer, stack=())
            bases = (None if b is None else b[k] for b in (left, right))
            np.testing.assert_allclose(together[k], scales.scales(XP, [(one, x[k], g[k])], *bases, np.float64), rtol=1e-11)
    layer = kf.Conv(4, 2, (2,), groups=2, leading=(3,))
    x, v = rng.normal(size=(3, 4, 4, 5)), rng.normal(size=(3, 4, 2, 4))
    examples = [conv_gradients(ref, replace(layer, leading=()), *each)[""] for each in zip(x, v, strict=True)]
    check(rng, layer, *layer.capture(x, v), {"": np.stack(examples, axis=1)})


@pytest.mark.parametrize("positions", [1, 3, 9])
@pytest.mark.usefixtures("room")
def test_fisher_vectors_of_an_example_are_squared_one_by_one(rng, captures, positions):
    for layer in (kf.Linear(3, 2), kf.Norm(2), kf.Embedding(4, 2, padding=0), kf.Bias(2)):
        x, _ = captures(rng, n=5, s=positions, inp=2 if isinstance(layer, kf.Norm) else 3)
        x = rng.integers(0, 4, size=x.shape[:2]) if isinstance(layer, kf.Embedding) else x
        g = rng.normal(size=(3, 5, positions, 2))
        left = None if isinstance(layer, kf.Norm) else orthogonal(rng, (), layer.shape[0])
        right = None if isinstance(layer, kf.Embedding) else orthogonal(rng, (), layer.shape[1])
        found = scales.scales(XP, [(layer, x, g.reshape(15, positions, 2))], left, right, np.float64)
        desired = sum(scales.scales(XP, [(layer, x, one)], left, right, np.float64) for one in g)
        np.testing.assert_allclose(found, desired, rtol=0, atol=RTOL * desired.max())
        # the factors take them too, also those made of both sides
        method = kf.KFAC(fisher="exact")
        state = method.init(layer, g)
        together = method.reduce(layer, state, x, g.reshape(15, positions, 2))
        apart = [method.reduce(layer, state, x, one) for one in g]
        np.testing.assert_allclose(together.output_sum, sum(part.output_sum for part in apart), rtol=1e-12)
        assert together.output_count == 15.0


@pytest.mark.usefixtures("room")
def test_uses_of_a_weight_add_up_before_they_are_squared(ref, rng, captures):
    layer = kf.Linear(3, 2)
    (x, g), (y, h) = captures(rng, s=1), captures(rng, s=4)
    left, right = orthogonal(rng, (), 2), orthogonal(rng, (), 4)
    found = scales.scales(XP, [(layer, x, g), (layer, y, h)], left, right, np.float64)
    sums = dense_gradients(layer, x, g)[""] + dense_gradients(layer, y, h)[""]
    np.testing.assert_allclose(found, loop(left, right, sums), rtol=1e-11)
    apart = scales.scales(XP, [(layer, x, g)], left, right, np.float64) + scales.scales(XP, [(layer, y, h)], left, right, np.float64)
    assert ref.distance(apart, found) > 0.01

    table = kf.Embedding(4, 2, padding=3)
    ids, more = rng.integers(0, 4, size=(6, 2)), rng.integers(0, 4, size=(6, 3))
    g, h = rng.normal(size=(6, 2, 2)), rng.normal(size=(6, 3, 2))
    found = scales.scales(XP, [(table, ids, g), (table, more, h)], left, None, np.float64)
    sums = table_gradients(table, ids, g)[""] + table_gradients(table, more, h)[""]
    np.testing.assert_allclose(found, loop(left, np.eye(4), sums), rtol=0, atol=1e-12)

    conv = kf.Conv(4, 2, (2,), 2, 1, groups=2)
    other = replace(conv, stride=1, padding=0, dilation=2)
    x, y = rng.normal(size=(5, 4, 6)), rng.normal(size=(5, 4, 7))
    v, w = rng.normal(size=(5, 2, 4)), rng.normal(size=(5, 2, 5))
    left, right = orthogonal(rng, (2,), 1), orthogonal(rng, (2,), 5)
    found = scales.scales(XP, [(conv, *conv.capture(x, v)), (other, *other.capture(y, w))], left, right, np.float64)
    sums = conv_gradients(ref, conv, x, v)[""] + conv_gradients(ref, other, y, w)[""]
    np.testing.assert_allclose(found, loop(left, right, sums), rtol=0, atol=1e-11)


def test_of_no_examples_there_is_nothing(rng, captures):
    cases = [
        (kf.Linear(3, 2), *captures(rng, n=0, s=4)),
        (kf.Conv(4, 4, (3,), groups=2), np.zeros((0, 5, 4)), np.zeros((0, 3, 4))),
        (kf.Embedding(5, 2), np.zeros((0, 4), np.int64), np.zeros((0, 4, 2))),
        (kf.Norm(2), *captures(rng, n=0, s=4, inp=2)),
    ]
    for layer, x, g in cases:
        found = scales.scales(XP, [(layer, x, g)], None, None, np.float64)
        assert found.shape == (*layer.stack, *layer.shape)
        assert not found.any()


def test_single_precision_is_computed_in_single_precision(rng, captures):
    x, g = captures(rng, s=9, dtype=np.float32)
    left, right = (orthogonal(rng, (), n).astype(np.float32) for n in (2, 4))
    found = scales.scales(XP, [(kf.Linear(3, 2), x.astype(np.float16), g)], left, right, np.float32)
    assert found.dtype == np.float32
    wide = scales.scales(XP, [(kf.Linear(3, 2), x.astype(np.float16), g)], *(b.astype(np.float64) for b in (left, right)), np.float64)
    np.testing.assert_allclose(found, wide, rtol=1e-4)


@pytest.mark.parametrize(
    ("uses", "pattern"),
    [
        ([((4, 1, 3), (6, 1, 2))], r"`output_grads` must have as many examples as `inputs`, 4, or a multiple .* got 6"),
        ([((4, 1, 3), (4, 1, 2)), ((4, 1, 3), (8, 1, 2))], r"`uses` .* the same examples .* got 4 and 4, 4 and 8"),
        ([((4, 1, 3), (8, 1, 2)), ((8, 1, 3), (8, 1, 2))], r"`uses` .* the same examples .* got 4 and 8, 8 and 8"),
    ],
)
def test_uses_of_other_examples_are_refused(uses, pattern):
    with pytest.raises(ValueError, match=pattern):
        scales.scales(XP, [(kf.Linear(3, 2), np.zeros(x), np.zeros(g)) for x, g in uses], None, None, np.float64)


def test_room_is_kept(rng, monkeypatch):
    monkeypatch.setattr(scales, "ROOM", 1000)

    def peak(run):
        tracemalloc.start()
        try:
            run()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # without parts the comparisons of all pairs of positions would be 64 x 64 x 64 numbers
    ids, g = rng.integers(0, 5, size=(64, 64)), rng.normal(size=(64, 64, 2))
    assert peak(lambda: scales.scales(XP, [(kf.Embedding(5, 2), ids, g)], np.eye(2), None, np.float64)) < 8 * 64**3 / 4
    # patches are nine times as large as the input, whatever the number of groups
    monkeypatch.setattr(scales, "ROOM", 12_000)
    layer = kf.Conv(32, 32, (3, 3), padding=1, groups=32, bias=None)
    x, v = layer.capture(rng.normal(size=(40, 32, 6, 6)), rng.normal(size=(40, 32, 6, 6)))
    assert peak(lambda: scales.scales(XP, [(layer, x, v)], None, None, np.float64)) < 2 * x.nbytes
