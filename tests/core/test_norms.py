"""Scale and shift behind a normalisation: blocks that are the exact second moment of the examples' gradients, for every network."""

import array_api_strict as strict
import numpy as np
import pytest

import kfcore as kf
from kfcore.statistics import DiagonalMoment, rows_of

RTOL = 1e-10
C = 3
NORMS = ["layer", "rms", "group"]
LOSSES = {"mse": kf.MSE(), "ce": kf.CrossEntropy(), "bce": kf.BCEWithLogits()}


def normalised(x, kind):
    """``xhat`` of ``x [N, S, C]``: over the features (layer, rms), or over the positions of each channel (group, one channel each)."""
    axis = 1 if kind == "group" else -1
    centre = 0.0 if kind == "rms" else x.mean(axis=axis, keepdims=True)
    return (x - centre) / np.sqrt(((x - centre) ** 2).mean(axis=axis, keepdims=True) + 1e-5)


class Net:
    """``f = tanh(weight xhat + bias) W^T``, pooled over positions or not; not linear in scale and shift."""

    def __init__(self, rng, kind, *, bias=True, pool=False, n=6, s=4, out=2):
        self.hat = normalised(rng.normal(size=(n, s, C)), kind)
        self.scale, self.shift = 1.0 + 0.3 * rng.normal(size=C), 0.3 * rng.normal(size=C)
        self.readout, self.bias, self.pool = rng.normal(size=(out, C)), bias, pool

    @property
    def theta(self):
        return np.concatenate([self.scale, self.shift]) if self.bias else self.scale

    def outputs(self, theta):
        """``[N, S or 1, out]`` for scale and shift in one vector, which may be complex."""
        h = np.tanh(self.hat * theta[:C] + (theta[C:] if self.bias else self.shift))
        return (h.mean(axis=1, keepdims=True) if self.pool else h) @ self.readout.T

    def jacobians(self):
        """``[N, outputs, parameters]`` by complex steps, exact to rounding."""
        columns = []
        for k in range(len(self.theta)):
            moved = self.theta.astype(complex)
            moved[k] += 1e-30j
            columns.append(self.outputs(moved).imag / 1e-30)
        return np.stack(columns, axis=-1).reshape(len(self.hat), -1, len(self.theta))

    def pull(self, v):
        """Gradient of ``<v, f>`` at the layer's output, ``[N, S, C]``."""
        h = np.tanh(self.hat * self.scale + self.shift)
        v = np.broadcast_to(v, (*h.shape[:-1], v.shape[-1])) / (h.shape[1] if self.pool else 1)
        return (v @ self.readout) * (1.0 - h**2)


def blocks(ref, rng, kind, loss, fisher, block, *, bias=True, pool=False, error=None, path="verbs"):
    """Dense block of the library, and the exact one from its definition."""
    net = Net(rng, kind, bias=bias, pool=pool)
    f, jacobian = net.outputs(net.theta), net.jacobians()
    terms = ref.count_terms(loss, f)
    if fisher == "exact":
        exact = np.einsum("nai,nab,nbj->ij", jacobian, ref.output_hessians(loss, f), jacobian) / terms
        vectors = kf.fisher_vectors("exact", LOSSES[loss], f, None)
    else:
        vectors = [ref.output_gradients(loss, f, ref.targets(rng, loss, f))]
        rows = np.einsum("na,nai->ni", vectors[0].reshape(len(f), -1), jacobian)
        exact = rows.T @ rows / terms
    off = {"inputs": (1.01, 1.0), "vectors": (1.0, 1.01)}.get(error, (1.0, 1.0))
    records = [(off[0] * net.hat, off[1] * net.pull(v)) for v in vectors]
    terms *= 1.01 if error == "terms" else 1.0
    method, layer = kf.KFAC(fisher=fisher), kf.Norm(C, bias, block)
    if path == "optimizer":
        optimizer = kf.Optimizer(method, {"norm": layer}, loss_reduction="sum")
        params = {"norm": {role: np.ones(C) for role in layer.parameters}}
        _, state = optimizer.step(params, params, {"norm": records}, optimizer.init(params), terms=terms)
        return optimizer.bind(params).preconditioner.dense(state.curvature)["norm"], exact
    state, total = method.init(layer, net.hat), None
    for record in records:
        new = method.reduce(layer, state, *record)
        total = new if total is None else total + new
    return method.dense(layer, method.observe(state, total.over(terms))), exact


@pytest.mark.parametrize("path", ["verbs", "optimizer"])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("kind", NORMS)
def test_the_full_block_is_exact_and_the_diagonal_its_diagonal(ref, kind, fisher, loss, bias, pool, path):
    block, exact = blocks(ref, np.random.default_rng(7), kind, loss, fisher, "full", bias=bias, pool=pool, path=path)
    assert ref.distance(block, exact) < RTOL
    diagonal, _ = blocks(ref, np.random.default_rng(7), kind, loss, fisher, "diagonal", bias=bias, pool=pool, path=path)
    assert ref.distance(diagonal, np.diag(np.diag(exact))) < RTOL


@pytest.mark.parametrize("error", ["inputs", "vectors", "terms"])
@pytest.mark.parametrize("block", ["full", "diagonal"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_one_percent_off_is_seen(ref, rng, fisher, block, error):
    found, exact = blocks(ref, rng, "layer", "ce", fisher, block, error=error)
    exact = exact if block == "full" else np.diag(np.diag(exact))
    assert 1e-3 < ref.distance(found, exact) < 0.1


def test_squares_of_single_positions_are_something_else(ref, rng):
    """The gradient of an example is summed over its positions before it is squared."""
    x, g = rng.normal(size=(2, 6, 4, C))
    layer, method = kf.Norm(C), kf.KFAC()
    state = method.init(layer, x)
    right = method.reduce(layer, state, x, g).output_sum
    apart = method.reduce(layer, state, x.reshape(24, 1, C), g.reshape(24, 1, C)).output_sum
    assert ref.distance(right[:C], ((x * g).sum(axis=1) ** 2).sum(axis=0)) < 1e-14
    assert ref.distance(apart, right) > 0.1


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("block", ["full", "diagonal"])
@pytest.mark.parametrize("features", [1, C])
@pytest.mark.parametrize(("kind", "norm"), [("exact", "mean"), ("factored", "mean"), ("factored", "spectral")])
def test_damping_is_added_to_the_block_exactly(ref, rng, kind, norm, features, block, relative):
    x, g = rng.normal(size=(2, 9, 4, features))
    layer, method = kf.Norm(features, features > 1, block), kf.KFAC(damping=kf.Damping(0.02, kind, norm, relative))
    state = method.init(layer, x)
    state = method.refresh(layer, method.observe(state, method.reduce(layer, state, x, g)))
    dense, grad = method.dense(layer, state), rng.normal(size=layer.shape)
    value = 0.02 * (np.trace(dense) / len(dense) if relative else 1.0)
    want = np.linalg.solve(dense + value * np.eye(len(dense)), grad)
    assert ref.distance(method.precondition(layer, state, grad), want) < RTOL
    assert ref.distance(method.precondition(layer, method.refresh(layer, state, 0.0202), grad), want) > 1e-6
    assert method.cost(layer).bytes == method.cost(kf.Bias(len(dense))).bytes or block == "diagonal"


@pytest.mark.parametrize("block", ["full", "diagonal"])
def test_plain_damping_goes_to_both_factors_as_for_any_layer(ref, rng, block):
    x, g = rng.normal(size=(2, 9, 4, C))
    layer, method = kf.Norm(C, block=block), kf.KFAC(damping=kf.Damping(0.02, "plain"))
    state = method.init(layer, x)
    state = method.refresh(layer, method.observe(state, method.reduce(layer, state, x, g)))
    dense, grad = method.dense(layer, state), rng.normal(size=layer.shape)
    want = np.linalg.solve(1.02 * (dense + 0.02 * np.eye(2 * C)), grad)
    assert ref.distance(method.precondition(layer, state, grad), want) < RTOL


@pytest.mark.parametrize("block", ["full", "diagonal"])
def test_batches_of_any_size_and_micro_batches_give_the_same(ref, rng, block):
    x, g = rng.normal(size=(2, 7, 4, C))
    layer, method = kf.Norm(C, block=block), kf.KFAC()
    state = method.init(layer, x)
    whole = method.reduce(layer, state, x, g)
    total = (
        method.reduce(layer, state, x[:2], g[:2]) + method.reduce(layer, state, x[2:2], g[2:2]) + method.reduce(layer, state, x[2:], g[2:])
    )
    assert ref.distance(total.output_sum, whole.output_sum) < 1e-14
    assert total.output_count == whole.output_count == 7
    assert total.input_sum == whole.input_sum == total.input_count == 7
    assert isinstance(whole.outputs, DiagonalMoment) == (block == "diagonal")
    assert ref.distance(whole.weighing(2.0).across(lambda value: 3.0 * value).output_sum, 6.0 * whole.output_sum) < 1e-15
    once = method.observe(state, whole).average.values[1]
    thrice = method.observe(state, method.reduce(layer, state, np.tile(x, (3, 1, 1)), np.tile(g, (3, 1, 1)))).average.values[1]
    assert ref.distance(thrice, once) < 1e-14
    assert ref.distance(1.01 * thrice, once) > 1e-3
    assert block == "full" or rows_of(method.reduce(layer, state, x[:1], g[:1]), 1.0) is None


@pytest.mark.parametrize("block", ["full", "diagonal"])
def test_nan_is_dropped_and_counted(rng, model, block):
    layer, method = kf.Norm(C, block=block), kf.KFAC()
    x, g = rng.normal(size=(2, 7, 4, C))
    state = method.init(layer, x)
    state = method.observe(state, method.reduce(layer, state, x, g))
    for spoilt in ((x * np.inf, g), (x, np.nan * g)):
        with np.errstate(invalid="ignore"):
            after = method.observe(state, method.reduce(layer, state, *spoilt))
        assert model.same(after.average, state.average)
        assert int(after.dropped) == 1


def test_scale_and_shift_come_together(rng):
    x, g = rng.normal(size=(2, 7, 4, C))
    layer, method = kf.Norm(C), kf.KFAC()
    assert method.requires(layer) == kf.Needs.INPUTS | kf.Needs.OUTPUT_GRADS | kf.Needs.TOGETHER
    state = method.init(layer, x)
    with pytest.raises(ValueError, match=r"`inputs` must be given with `output_grads`.*Norm.*None"):
        method.reduce(layer, state, None, g)
    with pytest.raises(ValueError, match=r"`inputs`.*\(7, 4, 3\).*\(7, 3, 3\)"):
        method.reduce(layer, state, x[:, 1:], g)


@pytest.mark.parametrize("block", ["full", "diagonal"])
def test_scale_and_shift_may_be_seen_at_two_places(ref, rng, block):
    """The scale multiplies ``u``, a factor of ``xhat``, and the shift is added later; each is seen with its own gradients."""
    x, u, g = rng.normal(size=(3, 7, 4, C))
    layer, method = kf.Norm(C, block=block), kf.KFAC()
    state = method.init(layer, x)
    together = method.reduce(layer, state, u * x, g)
    apart = method.reduce(layer, state, *(np.concatenate(pair, axis=-1) for pair in ((u, np.ones_like(u)), (x * g, g))))
    assert ref.distance(apart.output_sum, together.output_sum) < 1e-14
    wrong = method.reduce(layer, state, *(np.concatenate(pair, axis=-1) for pair in ((u, 1.01 * np.ones_like(u)), (x * g, g))))
    assert ref.distance(wrong.output_sum, together.output_sum) > 1e-3
    alone = kf.Norm(C, bias=False, block=block)
    shift = method.reduce(alone, method.init(alone, x), np.ones_like(g), g)
    want = together.output_sum[C:, C:] if block == "full" else together.output_sum[C:]
    assert ref.distance(shift.output_sum, want) < 1e-14


def test_channels_first_and_features_of_several_axes_are_the_same_layer(ref, rng):
    x, g = rng.normal(size=(2, 7, 4, 5, 6))
    last = kf.Norm(6)
    first = kf.Norm(6, channels="first")
    for a, b in zip(first.capture(np.moveaxis(x, -1, 1), np.moveaxis(g, -1, 1)), last.capture(x, g), strict=True):
        assert a.shape == (7, 20, 6)
        assert np.array_equal(a, b)
    several = kf.Norm((5, 6))
    assert several.parameters == {"weight": (5, 6), "bias": (5, 6)}
    assert several.shape == (60, 1)
    for a, b in zip(several.capture(x, g), (x, g), strict=True):
        assert np.array_equal(a, b.reshape(7, 4, 30))
    grads = {"weight": (x * g).sum(axis=(0, 1)), "bias": g.sum(axis=(0, 1))}
    a, b = several.capture(x, g)
    matrix = several.matrices(grads)[""]
    assert ref.distance(several.output_rows(np, b, b.dtype, a).sum(axis=0), matrix[:, 0]) < 1e-14
    assert all(np.array_equal(back, grads[role]) for role, back in several.parameters_of({"": matrix}).items())
    assert kf.Norm(6).capture(x[:, 0, 0], g[:, 0, 0])[0].shape == (7, 1, 6)


def test_stacked_layers_are_layers(ref, rng):
    x, g = rng.normal(size=(2, 2, 7, 4, C))
    for block in ("full", "diagonal"):
        layer, alone, method = kf.Norm(C, block=block, stack=(2,)), kf.Norm(C, block=block), kf.KFAC(damping=0.1)
        assert layer.parameters["weight"] == (2, C)
        state = method.init(layer, x, (2,))
        state = method.refresh(layer, method.observe(state, method.reduce(layer, state, *layer.capture(x, g))))
        params = {"weight": rng.normal(size=(2, C)), "bias": rng.normal(size=(2, C))}
        direction = method.precondition(layer, state, layer.matrices(params)[""])
        assert {role: v.shape for role, v in layer.parameters_of({"": direction}).items()} == layer.parameters
        for k in range(2):
            one = method.init(alone, x)
            one = method.refresh(alone, method.observe(one, method.reduce(alone, one, x[k], g[k])))
            matrix = alone.matrices({role: v[k] for role, v in params.items()})[""]
            assert ref.distance(direction[k], method.precondition(alone, one, matrix)) < 1e-13


def test_a_number_times_an_activation_is_a_norm_of_one_feature(ref, rng):
    x, g = rng.normal(size=(2, 6, 20, 1))
    layer, method = kf.Norm(1, bias=False), kf.KFAC(damping=0.1)
    state = method.init(layer, x)
    state = method.refresh(layer, method.observe(state, method.reduce(layer, state, x, g)))
    square = ((x * g).sum(axis=(1, 2)) ** 2).mean()
    assert np.isclose(method.precondition(layer, state, np.array([[2.0]])).item(), 2.0 / (square + 0.1), rtol=1e-13)


@pytest.mark.parametrize("block", ["full", "diagonal"])
def test_the_strictest_library_gives_the_same_numbers(rng, block):
    x, g = rng.normal(size=(2, 7, C, 4))
    layer, method, grad = kf.Norm(C, block=block, channels="first"), kf.KFAC(damping=0.1), rng.normal(size=(2 * C, 1))

    def run(put):
        state = method.init(layer, put(x))
        state = method.observe(state, method.reduce(layer, state, *layer.capture(put(x), put(g))))
        state = method.refresh(layer, state)
        return method.precondition(layer, state, put(grad)), method.dense(layer, state)

    assert all(np.allclose(kf.to_numpy(x), y, rtol=1e-12) for x, y in zip(run(strict.asarray), run(np.asarray), strict=True))


@pytest.mark.parametrize(
    ("make", "name", "came"),
    [
        (lambda v: kf.Norm(v), "features", [0, -1, 2.0, True, None, (), (2, 0), [3]]),
        (lambda v: kf.Norm(2, v), "bias", ["joint", None, 1]),
        (lambda v: kf.Norm(2, block=v), "block", ["dense", None]),
        (lambda v: kf.Norm(2, channels=v), "channels", ["middle", None]),
        (lambda v: kf.Norm(v, channels="first"), "features", [(2, 3)]),
        (lambda v: kf.Norm(2, stack=v), "stack", [2, (0,)]),
    ],
)
def test_a_setting_out_of_range_is_refused(make, name, came):
    for value in came:
        with pytest.raises(ValueError, match=f"`{name}` of Norm") as caught:
            make(value)
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "x", "g", "pattern"),
    [
        (kf.Norm(3), np.ones((5, 4, 2)), np.ones((5, 4, 2)), r"`inputs`.*\[N, ..., 3\].*\(5, 4, 2\)"),
        (kf.Norm(3), np.ones((5, 4, 3)), np.ones((5, 1, 3)), r"`inputs` and `output_grads`.*\(5, 4, 3\).*\(5, 1, 3\)"),
        (kf.Norm((4, 3)), np.ones((5, 3, 4)), np.ones((5, 3, 4)), r"`inputs`.*\[N, ..., 4, 3\].*\(5, 3, 4\)"),
        (kf.Norm(3, channels="first"), np.ones((5, 4, 3)), np.ones((5, 4, 3)), r"`inputs`.*\[N, 3, ...\].*\(5, 4, 3\)"),
        (kf.Norm(3, stack=(2,)), np.ones((5, 4, 3)), np.ones((5, 4, 3)), r"`inputs`.*\[2, N, ..., 3\].*\(5, 4, 3\)"),
        (kf.Norm(3), np.ones((5, 4, 3), int), np.ones((5, 4, 3)), r"`inputs`.*real floating.*int64"),
    ],
)
def test_a_wrong_record_is_refused(layer, x, g, pattern):
    optimizer = kf.Optimizer(kf.KFAC(), {"n": layer})
    params = {"n": {role: np.ones(shape) for role, shape in layer.parameters.items()}}
    with pytest.raises((ValueError, TypeError), match=f"'n'.*{pattern}"):
        optimizer.step(params, params, {"n": (x, g)}, optimizer.init(params), terms=5)
