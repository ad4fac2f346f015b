"""MAC against its definition: worked numbers, and what holds of every layer. Dense matrices are the reference throughout."""

import numpy as np
import pytest

import kfcore as kf
from kfcore.checkpoint import to_arrays
from kfcore.curvature.diagonal import Tensor

INPUTS = np.array([[1.0, 0.0], [3.0, 2.0], [0.0, 1.0], [4.0, 1.0]])
GRAD = np.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]])
MEAN = np.array([2.0, 1.0, 1.0])
SECOND = np.array([[6.5, 2.5, 2.0], [2.5, 1.5, 1.0], [2.0, 1.0, 1.0]])
EXACT = {"rtol": 1e-12, "atol": 1e-12}
TEN = {"rtol": 1e-10, "atol": 1e-10}


def fitted(method, layer, *batches, dtype=np.float64, **options):
    """State that has seen batches of inputs, or of inputs and output gradients."""
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    state = method.init(layer, np.zeros((), dtype), layer.stack)
    for batch in batches:
        state = method.observe(state, method.reduce(layer, state, *batch, **options))
    return method.refresh(layer, state)


def rows_of(layer, inputs):
    """Input rows by the layer, which the tests of layers compare with their definition."""
    import array_api_compat.numpy as xp

    return layer.input_rows(xp, inputs, np.float64)


def mac_of(mean, grad, rho):
    return grad @ np.linalg.inv(np.outer(mean, mean) + rho * np.eye(len(mean))) * rho


# -- worked numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (kf.MAC(damping=1.0), [[-1, 1, 2], [-5 / 7, 1 / 7, 8 / 7]]),
        (kf.MAC(damping=3.0), [[-5 / 9, 11 / 9, 20 / 9], [-7 / 9, 1 / 9, 10 / 9]]),
        (
            kf.MAC(damping=3.0, decoupled=False),
            [[-5 / 27, 11 / 27, 20 / 27], [-7 / 27, 1 / 27, 10 / 27]],
        ),
        (kf.FOOF(damping=1.0), [[-19 / 35, 23 / 35, 60 / 35], [-13 / 35, 1 / 35, 30 / 35]]),
    ],
)
def test_the_worked_example_of_a_dense_layer(method, expected):
    layer = kf.Linear(2, 2)
    state = fitted(method, layer, INPUTS[:, None])
    found = method.precondition(layer, state, GRAD)
    np.testing.assert_allclose(found, expected, **EXACT)
    assert np.abs(found - 1.01 * np.asarray(expected)).max() > 1e-3
    operator = method.operator(layer, state, damped=True)
    np.testing.assert_allclose(operator.solve(GRAD), expected, **EXACT)
    np.testing.assert_allclose(np.linalg.solve(operator.dense(), GRAD.reshape(-1)), np.reshape(expected, -1), **EXACT)
    factor = SECOND if method.name == "foof" else np.outer(MEAN, MEAN)
    np.testing.assert_allclose(method.dense(layer, state), np.kron(np.eye(2), factor), **EXACT)


def test_the_numbers_beside_the_worked_example():
    layer, method = kf.Linear(2, 2), kf.MAC(damping=1.0)
    state = fitted(method, layer, INPUTS[:, None])
    (mean, _), direction = state.average.values, method.precondition(layer, state, GRAD)
    np.testing.assert_allclose(mean, MEAN, **EXACT)
    projection = method.precondition(kf.Linear(2, 3), state, np.eye(3))
    np.testing.assert_allclose(np.linalg.eigvalsh(projection), [1 / 7, 1, 1], **EXACT)
    np.testing.assert_allclose(direction @ mean, [1, -1 / 7], **EXACT)
    assert (direction * GRAD).sum() == pytest.approx(8.857142857143, abs=1e-11)
    assert (direction**2).sum() == pytest.approx(7.836734693878, abs=1e-11)
    for rho, values in ((1.0, [0, 0.195363495425, 0.376065076005]), (3.0, [0, 0.091007780381, 0.199523996533])):
        mac, foof = kf.MAC(damping=rho), kf.FOOF(damping=rho, decoupled=True)
        one, other = (m.precondition(kf.Linear(2, 3), fitted(m, layer, INPUTS[:, None]), np.eye(3)) for m in (mac, foof))
        np.testing.assert_allclose(np.linalg.eigvalsh(one - other), values, atol=1e-11)


def test_the_worked_example_of_smac_and_eva():
    layer = kf.Linear(2, 2)
    squares, means = (np.tile(g, (4, 1, 1)) for g in ([[3**0.5, 0.0]], [[1.0, -2.0]]))
    smac, eva = kf.SMAC(damping=1.0), kf.Eva(damping=1.0)
    found = smac.precondition(layer, fitted(smac, layer, (INPUTS[:, None], squares)), GRAD)
    np.testing.assert_allclose(found, [[-1 / 4, 1 / 4, 1 / 2], [-5 / 7, 1 / 7, 8 / 7]], **EXACT)
    found = eva.precondition(layer, fitted(eva, layer, (INPUTS[:, None], means)), GRAD)
    np.testing.assert_allclose(found, np.array([[13, 53, 84], [5, 18, 49]]) / 31, **EXACT)


def test_the_worked_example_of_the_running_mean():
    layer, method = kf.Linear(2, 2), kf.MAC(stats_decay=0.95)
    state = method.init(layer, np.zeros(()))
    corrected = [[2, 1, 1], [3.025641025641, 0.487179487179, 1], [1.964943032428, 1.368098159509, 1]]
    for batch, expected in zip(([2.0, 1.0], [4.0, 0.0], [0.0, 3.0]), corrected, strict=True):
        state = method.observe(state, method.reduce(layer, state, np.tile(batch, (3, 2, 1))))
        np.testing.assert_allclose(state.average.values[0], expected, atol=2e-12)


@pytest.mark.parametrize(("padding", "mean", "count"), [(0, [3, 4, 6, 7], 4), (1, [2.8125] * 4, 16)])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_worked_example_of_a_convolution(padding, mean, count, sharing):
    layer, method = kf.Conv(1, 1, (2, 2), padding=padding, bias=None, sharing=sharing), kf.MAC()
    image = np.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    state = method.init(layer, np.zeros(()))
    statistics = method.reduce(layer, state, np.concatenate([image, image]))
    np.testing.assert_allclose(method.observe(state, statistics).average.values[0], mean, **EXACT)
    assert statistics.input_count == (2 * count if sharing == "expand" else 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"decay": "coupled"}, [0.949, 0.852151, 0.714134749]),
        ({"decay": "decoupled"}, [0.949, 0.853051, 0.716697949]),
        ({"decay": "decoupled", "nesterov": "delayed"}, [0.949, 0.812551, 0.639788449]),
    ],
)
def test_the_worked_example_of_momentum_and_decay(options, expected):
    step = kf.StepSize(learning_rate=0.1, momentum=0.9, weight_decay=0.01, **options)
    params, direction = {"p": np.ones(1)}, {"p": np.full(1, 0.5)}
    state = kf.stepsize.init(step, params)
    for count, value in enumerate(expected):
        updates, state = kf.stepsize.apply(step, params, direction, direction, state, count)
        params = {"p": params["p"] + updates["p"]}
        assert params["p"][0] == pytest.approx(value, abs=1e-14)


def test_nesterov_of_pytorch_differs_at_the_first_step_only():
    params, direction = {"p": np.ones(1)}, {"p": np.full(1, 0.5)}
    moved = {}
    for kind in (True, "delayed"):
        step = kf.StepSize(learning_rate=0.1, momentum=0.9, nesterov=kind)
        state, moved[kind] = kf.stepsize.init(step, params), []
        for count in range(3):
            updates, state = kf.stepsize.apply(step, params, direction, direction, state, count)
            moved[kind].append(updates["p"][0])
    assert moved[True][0] == pytest.approx(1.9 * moved["delayed"][0])
    assert moved[True][1:] == moved["delayed"][1:]


# -- what always holds -------------------------------------------------------------------------------------------------

LAYERS = [
    (kf.Linear(3, 2), (6, 4, 3)),
    (kf.Linear(3, 2, None, "reduce"), (6, 4, 3)),
    (kf.Conv(2, 3, (2, 2), stride=(1, 2), padding=1, dilation=(1, 2)), (5, 4, 5, 2)),
    (kf.Conv(2, 3, (3,), padding=2, padding_mode="circular", sharing="reduce"), (5, 6, 2)),
    (kf.Conv(2, 3, (2, 2), 2, padding=1, transposed=True, output_padding=1), (5, 3, 4, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: type(x).__name__ if isinstance(x, (kf.Linear, kf.Conv)) else None)
@pytest.mark.parametrize("rho", [0.03, 1.0, 3.0])
def test_a_direction_is_that_of_the_damped_matrix(rng, layer, shape, rho):
    inputs, (m, d) = rng.normal(size=shape) + 0.5, layer.shape
    grad, mean = rng.normal(size=layer.shape), rows_of(layer, inputs).mean(axis=0)
    method = kf.MAC(damping=rho)
    state = fitted(method, layer, inputs)
    found = method.precondition(layer, state, grad)
    block = np.outer(mean, mean) + rho * np.eye(d)
    np.testing.assert_allclose(found, rho * grad @ np.linalg.inv(block), **TEN)
    np.testing.assert_allclose(found.reshape(-1), rho * np.linalg.solve(np.kron(np.eye(m), block), grad.reshape(-1)), **TEN)
    assert np.abs(found - mac_of(1.01 * mean, grad, rho)).max() > 1e-5
    share = rho / (rho + mean @ mean)
    projection = method.precondition(layer, fitted(method, layer, inputs), np.eye(d)[: layer.shape[0]])
    assert projection.shape == layer.shape
    np.testing.assert_allclose(found @ mean, share * grad @ mean, **TEN)
    assert np.linalg.norm(found) <= np.linalg.norm(grad)
    assert (found * grad).sum() >= share * (grad**2).sum() > 0
    np.testing.assert_allclose(state.solver.rest, share, **TEN)
    operator = method.operator(layer, state, damped=True)
    np.testing.assert_allclose(operator.solve(grad), found, **TEN)
    np.testing.assert_allclose(operator.eigenvalues()[: m * (d - 1)], 1.0, **TEN)


def test_infinite_damping_and_a_mean_of_zero_give_the_gradient(rng):
    layer, grad = kf.Linear(3, 2, None), rng.normal(size=(2, 3))
    x = rng.normal(size=(6, 1, 3))
    method = kf.MAC(damping=1e12)
    np.testing.assert_allclose(method.precondition(layer, fitted(method, layer, x), grad), grad, atol=1e-11)
    for name in ("mac", "smac", "eva"):
        method = {"mac": kf.MAC(), "smac": kf.SMAC(), "eva": kf.Eva(damping=1.0)}[name]
        state = fitted(method, layer, (np.concatenate([x, -x]), np.zeros((12, 1, 2))))
        np.testing.assert_allclose(method.precondition(layer, state, grad), grad, **EXACT)


def test_equal_rows_make_it_foof(rng):
    layer, grad, x = kf.Linear(3, 2), rng.normal(size=(2, 4)), np.tile(rng.normal(size=3), (5, 2, 1))
    mac, foof, decoupled = kf.MAC(damping=0.3), kf.FOOF(damping=0.3), kf.FOOF(damping=0.3, decoupled=True)
    one, other, third = (m.precondition(layer, fitted(m, layer, x), grad) for m in (mac, foof, decoupled))
    np.testing.assert_allclose(one, 0.3 * other, **TEN)
    np.testing.assert_allclose(one, third, **TEN)


@pytest.mark.parametrize("rho", [0.01, 1.0, 30.0])
def test_it_is_never_below_decoupled_foof(rng, rho):
    layer, x = kf.Linear(5, 6), rng.normal(size=(9, 2, 5)) + rng.normal(size=5)
    mac, foof = kf.MAC(damping=rho), kf.FOOF(damping=rho, decoupled=True)
    one, other = (m.precondition(layer, fitted(m, layer, x), np.eye(6)) for m in (mac, foof))
    values = np.linalg.eigvalsh(one - other)
    assert values.min() > -1e-12
    assert values.max() > 1e-3


def test_foof_is_kfac_of_the_inputs_alone(rng):
    layer, grad, x = kf.Linear(4, 3), rng.normal(size=(3, 5)), rng.normal(size=(6, 2, 4))
    for damping in (0.3, kf.Damping(0.3, "exact")):
        foof, kfac = kf.FOOF(damping=damping), kf.KFAC(damping=damping, fisher="forward")
        one, other = (m.precondition(layer, fitted(m, layer, x), grad) for m in (foof, kfac))
        np.testing.assert_array_equal(one, other)
        decoupled = kf.FOOF(damping=damping, decoupled=True)
        state = fitted(decoupled, layer, x)
        np.testing.assert_allclose(decoupled.precondition(layer, state, grad), 0.3 * one, **TEN)
        np.testing.assert_allclose(decoupled.operator(layer, state, damped=True).solve(grad), 0.3 * one, **TEN)


def test_decoupled_foof_leaves_what_it_never_saw(rng):
    layer, x = kf.Linear(4, 1, None), np.zeros((3, 1, 4))
    x[..., 0] = 1.0
    for damping in (1e-30, kf.Damping(1e-30, "exact")):
        method = kf.FOOF(damping=damping, decoupled=True)
        found = method.precondition(layer, fitted(method, layer, x), np.ones((1, 4)))
        np.testing.assert_allclose(found[0, 1:], 1.0, rtol=1e-9)
        assert found[0, 0] < 1e-12


def test_the_correction_is_exact_from_the_first_update(rng):
    layer, method = kf.Linear(3, 2), kf.MAC(stats_decay=0.9)
    state = method.init(layer, np.zeros(()))
    for _ in range(7):
        state = method.observe(state, method.reduce(layer, state, rng.normal(size=(4, 2, 3))))
        assert state.average.values[0][-1] == pytest.approx(1.0, abs=1e-14)
    constant = np.array([2.0, -1.0, 0.5])
    state = method.init(layer, np.zeros(()))
    for _ in range(7):
        state = method.observe(state, method.reduce(layer, state, np.tile(constant, (4, 2, 1))))
        np.testing.assert_allclose(state.average.values[0], [*constant, 1.0], **EXACT)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_convolution_is_a_dense_layer_on_its_patches(rng, groups, mode):
    layer = kf.Conv(4, 4, (3, 2), (2, 1), (2, 1), mode, (1, 2), groups)
    inputs, grad = rng.normal(size=(5, 6, 5, 4)) + 0.3, rng.normal(size=(*layer.stack, *layer.shape))
    patches = rows_of(layer, inputs)  # [groups, n, d], with the 1 of the bias
    flat, method = kf.Linear(layer.shape[1], layer.shape[0], None), kf.MAC(damping=0.7)
    found = method.precondition(layer, fitted(method, layer, inputs), grad)
    each = zip(np.reshape(patches, (groups, -1, layer.shape[1])), np.reshape(grad, (groups, *layer.shape)), strict=True)
    expected = [method.precondition(flat, fitted(method, flat, rows[:, None]), g) for rows, g in each]
    np.testing.assert_allclose(np.reshape(found, np.shape(expected)), expected, **TEN)
    if groups > 1:
        shared = mac_of(np.reshape(patches, (-1, layer.shape[1])).mean(axis=0), grad[0], 0.7)
        assert np.abs(shared - expected[0]).max() > 1e-4, "each group has a mean of its own"


def test_a_one_by_one_convolution_is_a_dense_layer_on_pixels(rng):
    conv, dense, method = kf.Conv(3, 2, (1, 1)), kf.Linear(3, 2), kf.MAC()
    x, grad = rng.normal(size=(4, 5, 6, 3)), rng.normal(size=(2, 4))
    one = method.precondition(conv, fitted(method, conv, x), grad)
    np.testing.assert_allclose(one, method.precondition(dense, fitted(method, dense, x.reshape(4, 30, 3)), grad), **TEN)


def test_the_order_of_samples_and_of_outputs_does_not_matter(rng):
    layer, method = kf.Linear(3, 4), kf.MAC()
    x, grad, order = rng.normal(size=(6, 2, 3)), rng.normal(size=(4, 4)), [2, 0, 3, 1]
    found = method.precondition(layer, fitted(method, layer, x), grad)
    np.testing.assert_allclose(method.precondition(layer, fitted(method, layer, x[::-1]), grad[order]), found[order], **EXACT)


def test_kinds_of_weight_sharing_have_one_mean_and_masks_weigh_positions(rng):
    x = rng.normal(size=(5, 4, 3))
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], bool)
    means = {}
    for sharing in ("expand", "reduce"):
        layer = kf.Linear(3, 2, sharing=sharing)
        state = fitted(kf.MAC(), layer, x)
        np.testing.assert_allclose(state.average.values[0], [*x.mean(axis=(0, 1)), 1.0], **EXACT)
        spoilt = np.where(mask[..., None], x, np.nan)
        means[sharing] = fitted(kf.MAC(), layer, spoilt, mask=mask).average.values[0]
    np.testing.assert_allclose(means["expand"], [*x[mask].mean(axis=0), 1.0], **EXACT)
    of_examples = [row[m].mean(axis=0) for row, m in zip(x, mask, strict=True) if m.any()]
    np.testing.assert_allclose(means["reduce"], [*np.mean(of_examples, axis=0), 1.0], **EXACT)


def test_a_table_has_the_shares_of_its_rows(rng):
    layer, ids, grad = kf.Embedding(5, 2, padding=4), np.array([[0, 1, 1], [4, 1, 3]]), rng.normal(size=(2, 5))
    shares = np.array([1, 3, 0, 1, 0]) / 5
    method = kf.MAC(damping=0.2)
    found = method.precondition(layer, fitted(method, layer, ids), grad)
    np.testing.assert_allclose(found, mac_of(shares, grad, 0.2), **TEN)
    np.testing.assert_array_equal(found[:, [2, 4]], grad[:, [2, 4]])


def test_a_separate_bias_has_a_constant_input(rng):
    layers, x, g = {"fc": kf.Linear(3, 2, "separate")}, rng.normal(size=(6, 3)), rng.normal(size=(6, 2)) / 6
    params = {"fc": {"weight": np.zeros((2, 3)), "bias": np.zeros(2)}}
    grads = {"fc": {"weight": g.T @ x, "bias": g.sum(axis=0)}}
    optimizer = kf.Optimizer(kf.MAC(damping=3.0, first="rank-one"), layers, learning_rate=1.0, momentum=0.0)
    new, _ = optimizer.step(params, grads, {"fc": (x, None)}, optimizer.init(params))
    np.testing.assert_allclose(new["fc"]["bias"], -0.75 * grads["fc"]["bias"], **EXACT)
    np.testing.assert_allclose(new["fc"]["weight"], -mac_of(x.mean(axis=0), grads["fc"]["weight"], 3.0), **EXACT)


def test_relative_damping_goes_with_the_scale_of_the_inputs(rng):
    layer, method = kf.Linear(4, 3, None), kf.MAC(damping=kf.Damping(0.5, relative=True))
    x, grad = rng.normal(size=(6, 1, 4)), rng.normal(size=(3, 4))
    mean = x.mean(axis=(0, 1))
    found = method.precondition(layer, fitted(method, layer, x), grad)
    np.testing.assert_allclose(found, mac_of(mean, grad, 0.5 * mean @ mean / 4), **TEN)
    np.testing.assert_allclose(method.precondition(layer, fitted(method, layer, 1e3 * x), grad), found, **TEN)
    eva, g = kf.Eva(damping=kf.Damping(0.5, "exact", relative=True)), rng.normal(size=(6, 1, 3))
    state = fitted(eva, layer, (x, g))
    block = np.kron(np.outer(g.mean(axis=(0, 1)), g.mean(axis=(0, 1))), np.outer(mean, mean))
    block += 0.5 * np.trace(block) / 12 * np.eye(12)
    np.testing.assert_allclose(eva.precondition(layer, state, grad).reshape(-1), np.linalg.solve(block, grad.reshape(-1)), **TEN)
    np.testing.assert_allclose(eva.operator(layer, state, damped=True).dense(), block, **TEN)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e25])
def test_sizes_whose_squares_leave_single_precision(rng, size):
    layer, grad = kf.Linear(3, 2, None), rng.normal(size=(2, 3)).astype(np.float32)
    x, g = (rng.normal(size=(6, 1, n)).astype(np.float32) for n in (3, 2))
    for method in (kf.MAC(), kf.SMAC(), kf.Eva()):
        state = fitted(method, layer, (np.float32(size) * x, g), dtype=np.float32)
        direction = method.precondition(layer, state, grad)
        a, b = (None if v is None else v.astype(np.float64) for v in state.average.values)
        if method.name == "eva":
            expected = (grad - np.outer(b, a) * (b @ grad @ a) / (0.03 + (a @ a) * (b @ b))) / 0.03
        else:
            expected = grad - np.outer(grad @ a, a) / (1.0 + a @ a)
            expected = expected / (b[:, None] + 1.0) if method.name == "smac" else expected
        assert direction.dtype == np.float32
        np.testing.assert_allclose(direction, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_a_state_is_vectors_and_its_size_is_that_of_the_report(rng):
    layers = {"conv": kf.Conv(3, 8, (3, 3), groups=1), "head": kf.Linear(40, 6), "table": kf.Embedding(30, 5), "norm": kf.Norm(7)}
    params = {name: {role: rng.normal(size=shape) for role, shape in layer.parameters.items()} for name, layer in layers.items()}
    for method in (kf.MAC(first="rank-one"), kf.SMAC(first="rank-one"), kf.Eva()):
        optimizer = kf.Optimizer(method, layers, momentum=0.0)
        state = optimizer.init(params)
        arrays, _ = to_arrays(optimizer.bind(params), state)
        sizes = {name: x.shape for name, x in arrays.items() if name.startswith("curvature/")}
        assert max(len(shape) for shape in sizes.values()) <= 1
        row = optimizer.report(params)
        for name in layers:
            total = sum(x.nbytes for key, x in arrays.items() if key.startswith(f"curvature/{name}/"))
            assert row[f"{name}.weight"].bytes == total
    d = {"conv": 28, "head": 41, "table": 30}
    for name, inp in d.items():
        assert kf.MAC().cost(layers[name]).bytes == 4 * (2 * inp + 3) + 8


def test_the_head_of_a_large_vocabulary_steps_in_vectors():
    vocabulary, width = 50_000, 64
    layers = {"table": kf.Embedding(vocabulary, width), "head": kf.Linear(width, vocabulary, None)}
    rng = np.random.default_rng(0)
    params = {
        "table": {"weight": rng.normal(size=(vocabulary, width)).astype(np.float32)},
        "head": {"weight": rng.normal(size=(vocabulary, width)).astype(np.float32)},
    }
    optimizer = kf.Optimizer(kf.MAC(), layers, learning_rate=1.0, momentum=0.0)
    state = optimizer.init(params)
    ids, h = rng.integers(0, 100, size=(8, 4)), rng.normal(size=(8, 4, width)).astype(np.float32) + 1
    grads = {name: {"weight": rng.normal(size=p["weight"].shape).astype(np.float32)} for name, p in params.items()}
    new, state = optimizer.step(params, grads, {"table": (ids, None), "head": (h, None)}, state)
    held = sum(x.nbytes for x in to_arrays(optimizer.bind(params), state)[0].values())
    assert held < 3 * 4 * (vocabulary + width)
    mean, grad = h.mean(axis=(0, 1)).astype(np.float64), grads["head"]["weight"].astype(np.float64)
    wanted = grad - np.outer(grad @ mean, mean) / (1.0 + mean @ mean)
    np.testing.assert_allclose(params["head"]["weight"] - new["head"]["weight"], wanted, atol=2e-5)
    # analysis, too, goes without a matrix of the vocabulary
    bound = optimizer.bind(params)
    block = bound.preconditioner.blocks["table"]
    operator = block.method.operator(block.layer, state.curvature.blocks["table"], damped=True)
    table = grads["table"]["weight"].T
    np.testing.assert_allclose(operator.solve(table), params["table"]["weight"].T - new["table"]["weight"].T, atol=2e-5)


# -- refreshes, and wrong calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stats", "refresh", "counts"), [(5, 50, {0: 1, 50: 11, 100: 21}), (2, 4, {0: 1, 4: 3, 8: 5})])
def test_a_refresh_has_seen_the_batches_that_were_due(stats, refresh, counts):
    layers = {"fc": kf.Linear(1, 1, None)}
    params = {"fc": {"weight": np.zeros((1, 1))}}
    method = kf.MAC(stats_every=stats, refresh_every=refresh, stats_decay=1.0, first="rank-one")
    optimizer = kf.Optimizer(method, layers, learning_rate=0.0, momentum=0.0)
    state, seen = optimizer.init(params), {}
    for t in range(max(counts) + 1):
        records = {"fc": (np.full((2, 1), float(t)), None)} if optimizer.stats_due(state) else None
        _, state = optimizer.step(params, {"fc": {"weight": np.ones((1, 1))}}, records, state)
        block = state.curvature.blocks["fc"]
        if t in counts:
            seen[t] = int(block.average.weight)
            # plain mean of 0, stats, 2 stats, ...
            mean = stats * (counts[t] - 1) / 2
            np.testing.assert_allclose(block.solver.input, mean / np.sqrt(1.0 + mean**2), **EXACT)
    assert seen == counts


def test_micro_batches_merge_and_are_one_update(rng):
    layer, method, x = kf.Linear(3, 2), kf.MAC(), rng.normal(size=(8, 2, 3))
    state = method.init(layer, np.zeros(()))
    parts = method.reduce(layer, state, x[:3]) + method.reduce(layer, state, x[3:])
    merged = method.observe(state, parts)
    np.testing.assert_allclose(merged.average.values[0], [*x.mean(axis=(0, 1)), 1], **EXACT)
    assert float(merged.average.weight) == 1.0


def test_a_batch_that_is_not_finite_leaves_the_mean(rng):
    layer, method = kf.Linear(3, 2), kf.MAC()
    state = fitted(method, layer, rng.normal(size=(4, 1, 3)))
    bad = method.observe(state, method.reduce(layer, state, np.full((4, 1, 3), np.nan)))
    np.testing.assert_array_equal(bad.average.values[0], state.average.values[0])
    assert bad.dropped == 1


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: kf.MAC(fisher="empirical"), ValueError, "`fisher` of MAC must be 'forward'"),
        (lambda: kf.MAC(first="mean"), ValueError, "`first` must be one of covariance"),
        (lambda: kf.MAC(first_layer=3), TypeError, "`first_layer` must be the name"),
        (lambda: kf.MAC(decoupled=1), TypeError, "`decoupled` must be True or False"),
        (lambda: kf.MAC(damping=0.0), ValueError, "`damping`"),
        (lambda: kf.SMAC(fisher="forward"), ValueError, "`fisher` of SMAC"),
        (lambda: kf.SMAC(damping=kf.Damping(1.0, "exact")), ValueError, "`damping` of SMAC"),
        (lambda: kf.SMAC(damping=kf.Damping(1.0, "plain", relative=True)), ValueError, "`damping` of SMAC"),
        (lambda: kf.Eva(fisher="mc"), ValueError, "`fisher` of Eva"),
        (lambda: kf.Eva(damping=kf.Damping(1.0)), ValueError, "`damping` of Eva"),
        (lambda: kf.FOOF(fisher="empirical"), ValueError, "`fisher` of FOOF"),
        (lambda: kf.FOOF(decoupled="yes"), TypeError, "`decoupled`"),
        (lambda: kf.StepSize(nesterov="late"), ValueError, "`nesterov` must be True, False or 'delayed'"),
        (
            lambda: kf.Optimizer(kf.MAC(first_layer="fc9"), {"fc": kf.Linear(2, 2)}),
            ValueError,
            "`first_layer` must be one of the layers fc",
        ),
    ],
)
def test_wrong_options_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_gradient_of_another_shape_is_refused(rng):
    layer, method = kf.Linear(3, 2), kf.MAC()
    with pytest.raises(ValueError, match="`grad` must have shape"):
        method.precondition(layer, fitted(method, layer, rng.normal(size=(4, 1, 3))), np.ones((2, 3)))
    with pytest.raises(TypeError, match="no statistics"):
        kf.Gradient().reduce(Tensor((2,)), None)
    with pytest.raises(ValueError, match="`terms` must be given for sums"):
        kf.Eva().reduce(layer, kf.Eva().init(layer, np.zeros(())), np.ones((2, 1, 3)), np.ones((2, 1, 2))).over(0.5)
