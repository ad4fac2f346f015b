"""Masked positions are as if they had not been there: results with a mask are those of examples of their own length."""

import array_api_strict as strict
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kfcore as kf
from kfcore.curvature import kronecker
from kfcore.statistics import Moment, rows_of

RTOL = 1e-12
N, S = 6, 4
LAYERS = {
    "expand": kf.Linear(3, 2),
    "expand without bias": kf.Linear(3, 2, None),
    "expand, wide": kf.Linear(40, 30),
    "reduce": kf.Linear(3, 2, "joint", "reduce"),
    "reduce without bias": kf.Linear(3, 2, None, "reduce"),
    "reduce, wide": kf.Linear(8, 7, "joint", "reduce"),
    "bias": kf.Bias(2),
    "norm": kf.Norm(3),
    "norm, full": kf.Norm(3, bias=False, block="full"),
    "table": kf.Embedding(5, 3),
    "table with padding": kf.Embedding(5, 3, padding=1),
    "table with padding of its own": kf.Embedding(5, 3, padding=5),
}
LAYER = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def captured(rng, layer, n=N, s=S, stack=()):
    """Inputs, output gradients and a mask: of some of the first example, none of the second, all of the third, any of the others."""
    mask = rng.random((*stack, n, s)) < 0.6
    mask[..., :1, :1], mask[..., :1, 1:2], mask[..., 1:2, :], mask[..., 2:3, :] = True, False, False, True
    if isinstance(layer, kf.Embedding):
        return rng.integers(0, layer.num, (*stack, n, s)), rng.normal(size=(*stack, n, s, layer.features)), mask
    out = layer.size if isinstance(layer, kf.Norm) else layer.shape[0]
    return rng.normal(size=(*stack, n, s, getattr(layer, "in_features", out))), rng.normal(size=(*stack, n, s, out)), mask


def spoilt(x, g, mask):
    """The same with what nobody should look at: ids of no row, NaN, infinities."""
    if x.ndim == mask.ndim:
        return np.where(mask, x, -100), np.where(mask[..., None], g, np.nan)
    return np.where(mask[..., None], x, np.inf), np.where(mask[..., None], g, np.nan)


def shortened(x, g, mask):
    """One record an example that has positions, of its own length."""
    return [(a[m][None], b[m][None]) for a, b, m in zip(x, g, mask, strict=True) if m.any()]


def added(parts):
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def off(ref, some, other):
    """How far statistics are apart: sums relatively, counts absolutely."""
    pairs = ((some.input_sum, other.input_sum), (some.output_sum, other.output_sum))
    sums = [ref.distance(a, b) for a, b in pairs if a is not None or b is not None]
    counts = [np.abs(a - b).max() for a, b in ((some.input_count, other.input_count), (some.output_count, other.output_count))]
    return max(*sums, *counts)


# -- statistics ----------------------------------------------------------------------------------------------------------


@LAYER
@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact", "forward"])
def test_statistics_are_those_of_examples_of_their_own_length(ref, rng, layer, fisher):
    method = kf.KFAC(fisher=fisher)
    state = method.init(layer, np.zeros(()))
    x, g, mask = captured(rng, layer)
    expected = added([method.reduce(layer, state, a, b) for a, b in shortened(x, g, mask)])
    for a, b in ((x, g), spoilt(x, g, mask)):
        found = method.reduce(layer, state, a, b, mask=mask)
        assert off(ref, found, expected) < RTOL
        assert isinstance(found.input_count, float), "a number of the host's"
    # without output gradients, a layer whose input is the constant 1 has nothing but a number of examples
    for wrong in (None,) if fisher == "forward" and layer.shape[1] == 1 else (None, ~mask, np.roll(mask, 1, axis=0)):
        assert off(ref, method.reduce(layer, state, x, g, mask=wrong), expected) > 1e-2
    solvers = [method.refresh(layer, method.observe(state, s)).solver for s in (found, expected)]
    assert all(ref.distance(p, q) < 1e-10 for p, q in zip(*solvers, strict=True) if p is not None)


@LAYER
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**16),
    live=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5),
    cut=st.integers(0, 5),
)
def test_any_mask_any_cut_into_micro_batches(ref, layer, seed, live, cut):
    mask = np.array(live)
    x, g, _ = captured(np.random.default_rng(seed), layer, *mask.shape)
    method = kf.KFAC()
    state = method.init(layer, np.zeros(()))
    parts = [method.reduce(layer, state, *spoilt(x[p], g[p], mask[p]), mask=mask[p]) for p in (slice(0, cut), slice(cut, None))]
    whole = method.reduce(layer, state, x, g, mask=mask)
    assert off(ref, parts[0] + parts[1], whole) < RTOL
    if mask.any():
        assert off(ref, whole, added([method.reduce(layer, state, a, b) for a, b in shortened(x, g, mask)])) < RTOL
    else:
        assert (whole.input_count, whole.output_count) == (0.0, 0.0)
        assert not whole.input_sum.any()
        assert not whole.output_sum.any()


@LAYER
def test_a_mask_of_all_positions_changes_nothing(ref, rng, layer):
    method = kf.KFAC()
    state = method.init(layer, np.zeros(()))
    for n in (2, N):
        x, g, _ = captured(rng, layer, n)
        without = method.reduce(layer, state, x, g)
        found = method.reduce(layer, state, x, g, mask=np.ones(g.shape[:-1], bool))
        assert off(ref, found, without) < 1e-15
        for side, other in ((found.inputs, without.inputs), (found.outputs, without.outputs)):
            assert type(side) is type(other)
            assert not isinstance(side, Moment) or (side.rows is None) == (other.rows is None)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS.values() if not layer.together], ids=str)
def test_the_sides_may_come_one_at_a_time(ref, rng, layer):
    method = kf.KFAC()
    state = method.init(layer, np.zeros(()))
    x, g, mask = captured(rng, layer)
    both = method.reduce(layer, state, x, g, mask=mask)
    assert off(ref, method.reduce(layer, state, x, mask=mask) + method.reduce(layer, state, None, g, mask=mask), both) == 0.0
    assert off(ref, method.reduce(layer, state, x, mask=mask) + method.reduce(layer, state, None, g), both) > 1e-2


@pytest.mark.parametrize("kind", ["exact", "factored"])
@LAYER
def test_stacked_layers_have_masks_of_their_own(ref, rng, model, layer, kind):
    """Each is as it would be alone, also where one has no position: it keeps what it had, and says so."""
    method = kf.KFAC(damping=kf.Damping(0.1, kind))
    x, g, mask = captured(rng, layer, stack=(2,))
    grad = rng.normal(size=(2, *layer.shape))
    state = method.init(layer, np.zeros(()), (2,))
    state = method.refresh(layer, method.observe(state, method.reduce(layer, state, *spoilt(x, g, mask), mask=mask)))
    direction = method.precondition(layer, state, grad)
    for k in range(2):
        alone = method.init(layer, np.zeros(()))
        alone = method.observe(alone, added([method.reduce(layer, alone, a, b) for a, b in shortened(x[k], g[k], mask[k])]))
        assert all(ref.distance(p[k], q) < RTOL for p, q in zip(state.average.values, alone.average.values, strict=True))
        assert ref.distance(direction[k], method.precondition(layer, method.refresh(layer, alone), grad[k])) < 1e-10
    mask[1] = False
    after = method.observe(state, method.reduce(layer, state, x, g, mask=mask))
    assert after.dropped.tolist() == [0, 1]
    assert after.average.weight.tolist() == [1.95, 1.0]
    assert all(np.array_equal(new[1], old[1]) for new, old in zip(after.average.values, state.average.values, strict=True))


@LAYER
def test_a_batch_without_a_position_leaves_the_state_as_it_was(rng, model, layer):
    method = kf.KFAC()
    state = method.init(layer, np.zeros(()))
    x, g, mask = captured(rng, layer)
    state = method.observe(state, method.reduce(layer, state, x, g, mask=mask))
    nothing = method.reduce(layer, state, *spoilt(x, g, mask & False), mask=mask & False)
    for statistics in (nothing, nothing.over(0.1)):
        after = method.observe(state, statistics)
        assert model.same(after.average, state.average)
        assert int(after.dropped) == 1


def test_a_nan_at_a_position_that_is_real_is_still_seen(rng, model):
    method, layer = kf.KFAC(), kf.Linear(3, 2)
    state = method.init(layer, np.zeros(()))
    for side in (0, 1):
        x, g, mask = captured(rng, layer)
        (x, g)[side][0, 0, 0] = np.nan
        assert int(method.observe(state, method.reduce(layer, state, x, g, mask=mask)).dropped) == 1


def test_half_precision_is_summed_in_the_dtype_of_the_factors(ref, rng):
    method, layer = kf.KFAC(), kf.Linear(3, 2, "joint", "reduce")
    x, g, mask = captured(rng, layer)
    state = method.init(layer, np.zeros((), np.float16))
    half = method.reduce(layer, state, x.astype(np.float16), g.astype(np.float16), mask=mask)
    assert half.input_sum.dtype == half.output_sum.dtype == np.float32
    wide = [v.astype(np.float16).astype(np.float64) for v in (x, g)]
    assert off(ref, half, method.reduce(layer, method.init(layer, np.zeros(())), *wide, mask=mask)) < 1e-6


def test_what_is_kept_shares_no_memory_with_what_was_captured(rng):
    method, layer = kf.KFAC(), kf.Linear(40, 30, None)
    state = method.init(layer, np.zeros(()))
    x, g, mask = captured(rng, layer)
    kept = method.reduce(layer, state, x, g, mask=mask)
    before = kept.inputs.rows.copy(), kept.outputs.rows.copy()
    x[...], g[...], mask[...] = np.nan, np.nan, False
    assert np.array_equal(kept.inputs.rows, before[0])
    assert np.array_equal(kept.outputs.rows, before[1])


# -- exact blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, "no mask", "one position", "terms"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ragged_examples_have_the_ggn_block_of_a_deep_linear_network_exactly(ref, rng, sharing, error):
    """Examples of several lengths in one array: a loss of every position (expand), or of the mean over an example's positions (reduce)."""
    x, mask = rng.normal(size=(N, S, 3)), np.arange(S) < np.array([2, 1, 4, 3, 4, 1])[:, None]
    net = ref.Net.random(rng, [3, 3, 2], bias=True, pools={0: "mean"} if sharing == "reduce" else {})
    alone = [a[m][None] for a, m in zip(x, mask, strict=True)]
    count = [ref.count_terms("mse", net.forward(a)[0]) for a in alone]
    exact = sum(n * ref.ggn_blocks(net, a, "mse", joint=True)[0] for n, a in zip(count, alone, strict=True)) / sum(count)
    # the same pulled back through the array that holds them all, where masked positions are given something to see
    w = net.weights[1]
    lengths = mask.sum(axis=1)[:, None, None]
    pulled = np.einsum("ci,cn->ni", w, np.sqrt(2.0) * np.eye(2))  # one row for each column of the root of the Hessian
    method, layer = kf.KFAC(fisher="exact"), kf.Linear(3, 3, "joint", sharing)
    state, parts = method.init(layer, x), []
    seen = {"no mask": None, "one position": mask & (np.arange(N * S).reshape(N, S) != 0)}.get(error, mask)
    for row in pulled:
        if sharing == "reduce":
            vectors = [np.where(mask[..., None], row / lengths, 7.0)]
        else:  # a vector for each position of the loss
            vectors = [np.where(mask[..., None], row * (np.arange(S) == t)[:, None], 7.0) for t in range(S)]
        parts += [method.reduce(layer, state, x, v, mask=seen) for v in vectors]
    total = added(parts).over(sum(count) * (1.01 if error == "terms" else 1.0))
    block = method.dense(layer, method.observe(state, total))
    assert (ref.distance(block, exact) < 1e-10) == (error is None)
    assert error is None or ref.distance(block, exact) > 1e-3


# -- optimizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact", "forward"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_whole_steps_are_those_of_examples_of_their_own_length(ref, rng, fisher, reduction):
    """All layer kinds at once, by records of one array or one record an example, and through a recorder."""
    layers = {
        "dense": kf.Linear(3, 2),
        "apart": kf.Linear(3, 2, "separate"),
        "pooled": kf.Linear(3, 2, "separate", "reduce", layout="io"),
        "norm": kf.Norm(3),
        "table": kf.Embedding(5, 3),
    }
    optimizer = kf.Optimizer(kf.KFAC(damping=0.1, fisher=fisher, refresh_every=1), layers, learning_rate=0.1, loss_reduction=reduction)
    start = {name: {role: rng.normal(size=s) for role, s in layer.parameters.items()} for name, layer in layers.items()}
    masked, short, full = ((start, optimizer.init(start)) for _ in range(3))
    recorder, recorded = kf.Recorder(optimizer, start), start
    terms = 9.0 if fisher == "exact" else None
    for _ in range(3):
        grads = {name: {role: rng.normal(size=p.shape) for role, p in roles.items()} for name, roles in start.items()}
        mask = captured(rng, layers["dense"])[2]
        whole = {name: captured(rng, layer)[:2] for name, layer in layers.items()}
        records = {name: (*spoilt(*arrays, mask), mask) for name, arrays in whole.items()}
        parts = {name: shortened(*arrays, mask) for name, arrays in whole.items()}
        masked = optimizer.step(masked[0], grads, records, masked[1], terms=terms)
        short = optimizer.step(short[0], grads, parts, short[1], terms=terms)
        full = optimizer.step(full[0], grads, whole, full[1], terms=terms)
        for name, record in records.items():
            recorder.record(name, *record)
        recorded = recorder.step(recorded, grads, terms=terms)
    for name, roles in short[0].items():
        for role, value in roles.items():
            assert ref.distance(masked[0][name][role], value) < 1e-11, (name, role)
            assert np.array_equal(recorded[name][role], masked[0][name][role]), (name, role)
            # normalisations have no input factor to speak of, and their forward-only block is the identity
            assert fisher == "forward" or ref.distance(full[0][name][role], value) > 1e-4, (name, role)
    assert optimizer.diagnostics(masked[1])["dropped_statistics"] == {}


@pytest.mark.parametrize(
    "layer", [kf.Linear(3, 2, stack=(2,)), kf.Embedding(5, 3, stack=(2,)), kf.Norm(3, stack=(2,)), kf.Conv(3, 2, (1,), leading=(2,))]
)
def test_the_examples_of_stacked_layers_are_counted_as_those_of_one(ref, rng, layer):
    """The number of terms that is assumed is that of the examples, whatever stands before them, and of those with a position."""
    optimizer = kf.Optimizer(kf.KFAC(damping=0.1), {"layer": layer})
    params = {"layer": {role: rng.normal(size=s) for role, s in layer.parameters.items()}}
    state = optimizer.init(params)
    if isinstance(layer, kf.Conv):
        x, g, mask = rng.normal(size=(2, N, 3, S)), rng.normal(size=(2, N, 2, S)), None
    else:
        x, g, mask = captured(rng, layer, stack=(2,))
    cases = [((x, g), float(N))]
    if mask is not None:
        mask[:] = mask[0]
        cases.append(((x, g, mask), float(mask[0].any(axis=-1).sum())))
    for record, terms in cases:
        assumed, _ = optimizer.step(params, params, {"layer": record}, state)
        said, _ = optimizer.step(params, params, {"layer": record}, state, terms=terms)
        more, _ = optimizer.step(params, params, {"layer": record}, state, terms=terms + 1.0)
        assert all(np.array_equal(assumed["layer"][role], value) for role, value in said["layer"].items())
        assert any(ref.distance(more["layer"][role], value) > 1e-4 for role, value in said["layer"].items())
    if mask is not None:
        mask[1, 0] = False
        with pytest.raises(ValueError, match=r"`terms` must be given.*masks of layer"):
            optimizer.step(params, params, {"layer": (x, g, mask)}, state)


def test_terms_must_be_given_where_the_host_cannot_read_masks(ref, rng):
    layer = kf.Linear(3, 2)
    optimizer = kf.Optimizer(kf.KFAC(damping=0.1), {"fc": layer}, learning_rate=0.1)
    x, g, mask = captured(rng, layer)
    host = {"fc": {"weight": rng.normal(size=(2, 3)), "bias": rng.normal(size=2)}}
    want, _ = optimizer.step(host, host, {"fc": (x, g, mask)}, optimizer.init(host))
    params = {"fc": {role: strict.asarray(p) for role, p in host["fc"].items()}}
    records = {"fc": tuple(strict.asarray(v) for v in (*spoilt(x, g, mask), mask))}
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"`terms` must be given.*masks of fc"):
        optimizer.step(params, params, records, state)
    found, _ = optimizer.step(params, params, records, state, terms=float(mask.any(axis=1).sum()))
    assert all(ref.distance(np.asarray(found["fc"][role]), value) < 1e-12 for role, value in want["fc"].items())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [None, "their own", "everywhere"])
def test_directions_go_by_the_rows_only_where_these_make_up_the_gradient(ref, rng, monkeypatch, sharing, kind):
    """Masked rows are zero: a loss that leaves out the same positions has the product of the rows for gradient, any other has not."""
    layer = kf.Linear(40, 30, "joint", sharing)
    optimizer = kf.Optimizer(kf.KFAC(damping=1e-2), {"fc": layer}, learning_rate=0.1)
    params = {"fc": {"weight": rng.normal(size=(30, 40)), "bias": rng.normal(size=30)}}
    x, g, mask = captured(rng, layer, 5, 1)
    live = mask if kind == "their own" else np.ones_like(mask)
    dy = np.where(live[..., None], g, 0.0)
    grads = {"fc": {"weight": np.einsum("nso,nsi->oi", dy, x), "bias": dy.sum(axis=(0, 1))}}
    record = (x, g) if kind is None else (x, g, mask)
    taken = []
    thin_product = kronecker.thin_product
    monkeypatch.setattr(kronecker, "thin_product", lambda *rows: taken.append(1) or thin_product(*rows))
    found, _ = optimizer.step(params, grads, {"fc": record}, optimizer.init(params))
    assert len(taken) == (kind != "everywhere")
    monkeypatch.setattr(kronecker, "spans", lambda *_: False)
    long, _ = optimizer.step(params, grads, {"fc": record}, optimizer.init(params))
    assert all(ref.distance(found["fc"][role], value) < 1e-12 for role, value in long["fc"].items())


def test_rows_that_are_kept_are_those_of_live_positions(rng):
    layer, method = kf.Linear(40, 30), kf.KFAC()
    x, g, mask = captured(rng, layer)
    rows = rows_of(method.reduce(layer, method.init(layer, x), *spoilt(x, g, mask), mask=mask), 1.0)
    assert np.array_equal(rows.inputs[:, -1], mask.reshape(-1))
    assert np.allclose(rows.output_grads.T @ rows.inputs[:, :-1], g[mask].T @ x[mask], rtol=1e-12)


# -- tables --------------------------------------------------------------------------------------------------------------


def test_padding_is_a_mask_that_the_ids_tell(ref, rng):
    plain, padded, method = kf.Embedding(5, 3), kf.Embedding(5, 3, padding=1), kf.KFAC()
    state = method.init(plain, np.zeros(()))
    ids, g, mask = captured(rng, plain)
    mask[1, 0], ids[:, 0] = True, 2  # every example has a position
    masked = method.reduce(plain, state, ids, g, mask=ids != 1)
    assert off(ref, method.reduce(padded, state, ids, g), masked) == 0.0
    both = method.reduce(padded, state, ids, g, mask=mask)
    assert off(ref, both, method.reduce(plain, state, ids, g, mask=mask & (ids != 1))) < 1e-15
    assert off(ref, both, masked) > 1e-2
    one_hot = padded.input_rows(np, ids, np.float64, mask)
    assert np.array_equal(np.diag(one_hot.T @ one_hot), padded.input_gram(np, ids, np.float64, mask))
    assert np.array_equal(one_hot.any(axis=1), (mask & (ids != 1)).reshape(-1))


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8])
def test_ids_are_checked_where_they_are_real(rng, dtype):
    layer, method = kf.Embedding(200, 3), kf.KFAC()
    ids, g, mask = np.full((2, 3), 100, dtype), rng.normal(size=(2, 3, 3)), np.array([[True, False, True], [False, True, False]])
    ids[0, 1], ids[1, 0] = np.iinfo(dtype).max, np.iinfo(dtype).min
    state = method.init(layer, g)
    found = method.reduce(layer, state, ids, g, mask=mask)
    assert found.input_sum[100] == found.input_sum.sum() == found.input_count == 3.0
    if dtype != np.int8:
        ids[0, 0] = np.iinfo(dtype).max
        with pytest.raises(ValueError, match="`inputs` must be ids from 0 to 199"):
            method.reduce(layer, state, ids, g, mask=mask)


# -- axes, and wrong calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "inputs"),
    [
        (kf.Linear(3, 2), (4,), (4, 3)),
        (kf.Linear(3, 2, stack=(2,)), (2, 4, 5, 6), (2, 4, 5, 6, 3)),
        (kf.Norm((3, 2)), (4, 5), (4, 5, 3, 2)),
        (kf.Norm(3, channels="first"), (4, 5, 6), (4, 3, 5, 6)),
        (kf.Norm(3, channels="first", stack=(2,)), (2, 4, 5, 6), (2, 4, 3, 5, 6)),
        (kf.Embedding(2, 3), (4, 5, 6), (4, 5, 6)),
        (kf.Embedding(2, 3), (4,), (4,)),
    ],
)
def test_masks_have_the_axes_of_what_was_captured(rng, layer, shape, inputs):
    mask = rng.random(shape) < 0.5
    if isinstance(layer, kf.Embedding):
        seen = layer.capture(mask.astype(int), None)[0] == 1
    else:
        axis = len(layer.stack) + 1
        entries = (
            mask[..., None, None] if inputs[-2:] == (3, 2) else np.expand_dims(mask, axis) if "first" in str(layer) else mask[..., None]
        )
        seen = layer.capture(np.broadcast_to(entries, inputs).astype(float), None)[0][..., 0] == 1.0
    found = layer.capture_mask(mask, np.zeros(inputs))
    assert found.dtype == bool
    assert np.array_equal(found, seen)
    for wrong in (mask[..., None], mask[:-1]):
        with pytest.raises(ValueError, match=r"`mask` must have shape \(.*one entry for each position of `inputs`"):
            layer.capture_mask(wrong, np.zeros(inputs))


@pytest.mark.parametrize("layer", [kf.Conv(3, 2, (3,), padding=1), kf.Conv(3, 2, (3,), padding=1, bias="separate", sharing="reduce")])
def test_convolutions_refuse_masks_at_every_level(rng, layer):
    x, g, mask = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 2, 5)), np.ones((2, 5), bool)
    optimizer = kf.Optimizer(kf.KFAC(), {"conv": layer})
    params = {"conv": {role: rng.normal(size=s) for role, s in layer.parameters.items()}}
    state, flat = optimizer.init(params), layer.capture(x, g)
    part = next(iter(layer.blocks().values()))
    for call in (
        lambda: optimizer.step(params, params, {"conv": (x, g, mask)}, state),
        lambda: optimizer.reduce(state, "conv", x, g, mask),
        lambda: kf.Recorder(optimizer, params).record("conv", x, g, mask),
        lambda: optimizer.bind(params).reduce(state, "conv", *flat, mask=mask),
        lambda: kf.KFAC().reduce(part, kf.KFAC().init(part, x), None, flat[1], mask=mask),
    ):
        with pytest.raises(ValueError, match="`mask` must be None for Conv: the positions of its output are not those of its input"):
            call()


def test_the_verbs_name_what_is_wrong_with_a_mask(rng):
    method, layer, table = kf.KFAC(), kf.Linear(3, 2), kf.Embedding(5, 2)
    x, g, mask = captured(rng, layer)
    state = method.init(layer, x)
    for sides in ((x, g), (x, None), (None, g)):
        source = "inputs" if sides[0] is not None else "output_grads"
        with pytest.raises(ValueError, match=rf"`mask` must have shape \(6, 4\).*`{source}`, got \(6,\)"):
            method.reduce(layer, state, *sides, mask=mask[:, 0])
        with pytest.raises(ValueError, match=r"`mask` must have shape \(6, 4\).*got \(1, 4\)"):
            method.reduce(layer, state, *sides, mask=mask[:1])
        with pytest.raises(TypeError, match="`mask` must be boolean, True at real positions, got int64"):
            method.reduce(layer, state, *sides, mask=mask.astype(int))
    with pytest.raises(ValueError, match=r"`mask` must have shape \(6, 4\).*got \(6, 4, 1\)"):
        method.reduce(table, method.init(table, x), np.zeros((6, 4), int), g, mask=mask[..., None])
    with pytest.raises(TypeError, match="array_api_strict"):
        method.reduce(layer, state, x, g, mask=strict.asarray(mask))


def test_a_diagonal_block_has_no_positions(rng):
    method, grad = kf.Diagonal(), rng.normal(size=(3, 2))
    layer = kf.curvature.diagonal.Tensor((3, 2))
    state = method.init(layer, grad)
    masked, plain = (method.reduce(layer, state, grad=grad, mask=m) for m in (np.zeros((2, 2), bool), None))
    assert np.array_equal(masked.square_sum, plain.square_sum)
