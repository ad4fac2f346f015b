"""Tables: exact blocks, padding, damping, and a vector of counts wherever a dense layer has a matrix."""

import tracemalloc

import array_api_strict as strict
import numpy as np
import pytest

import kfcore as kf
from kfcore import factors
from kfcore.preconditioner import Preconditioner
from kfcore.statistics import DiagonalMoment, rows_of
from kfcore.testing.reference import tokens

RTOL = 1e-10
NUM, FEATURES = 6, 3
CASES = [("exact", "mean"), ("plain", "mean"), *[("factored", norm) for norm in ("mean", "trace", "frobenius", "spectral", "median")]]


def one_hot(ids, num=NUM):
    return (ids[..., None] == np.arange(num)).astype(float)


def batch(rng, n=7, s=4, num=NUM, features=FEATURES):
    return rng.integers(0, num, (n, s)), rng.normal(size=(n, s, features))


def observed(method, layer, *batches, leading=()):
    state = method.init(layer, np.zeros(()), leading)
    for ids, g in batches:
        state = method.observe(state, method.reduce(layer, state, ids, g))
    return state


# -- exact blocks ------------------------------------------------------------------------------------------------------


def readout(ref, rng, ids, loss, fisher, y=None, error=None):
    """Dense block of the library and the exact one, of a table read by a dense layer: ``f = table[id] W^T``, positions kept."""
    table, weight = rng.normal(size=(NUM, FEATURES)), rng.normal(size=(2, FEATURES))
    f = table[ids] @ weight.T
    terms = ref.count_terms(loss, f)
    # df / d vec(matrix [features, num]) is weight (x) one-hot, row-major
    jacobian = np.einsum("cf,nsk->nscfk", weight, one_hot(ids)).reshape(len(ids), -1, FEATURES * NUM)
    if fisher == "exact":
        exact = np.einsum("nai,nab,nbj->ij", jacobian, ref.output_hessians(loss, f), jacobian) / terms
        vectors = kf.fisher_vectors("exact", {"mse": kf.MSE(), "ce": kf.CrossEntropy()}[loss], f, None)
    else:
        vectors = [ref.output_gradients(loss, f, y)]
        rows = np.einsum("na,nai->ni", vectors[0].reshape(len(ids), -1), jacobian)
        exact = rows.T @ rows / terms
    method, layer = kf.KFAC(fisher=fisher), kf.Embedding(NUM, FEATURES)
    state, total = method.init(layer, table), None
    for v in vectors:
        new = method.reduce(layer, state, ids, (1.01 if error == "vectors" else 1.0) * v @ weight)
        total = new if total is None else total + new
    total = total.over(terms * (1.01 if error == "terms" else 1.0))
    return method.dense(layer, method.observe(state, total)), exact


@pytest.mark.parametrize("error", [None, "vectors", "terms"])
@pytest.mark.parametrize("positions", [1, 5])
def test_a_table_read_by_a_dense_layer_has_the_ggn_block_exactly(ref, rng, positions, error):
    block, exact = readout(ref, rng, rng.integers(0, NUM, (8, positions)), "mse", "exact", error=error)
    assert (ref.distance(block, exact) < RTOL) == (error is None)
    assert error is None or ref.distance(block, exact) > 1e-3


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_one_token_has_exact_blocks_under_any_loss(ref, rng, fisher):
    for loss, y in (("ce", np.array([[1]])), ("mse", np.ones((1, 1, 2)))):
        block, exact = readout(ref, rng, np.array([[4]]), loss, fisher, y)
        assert ref.distance(block, exact) < RTOL
        assert ref.distance(readout(ref, rng, np.array([[4]]), loss, fisher, y, "vectors")[0], exact) > 1e-3


def test_factors_are_the_share_of_each_token_and_the_moment_of_the_gradients(ref, rng):
    ids, g = batch(rng)
    a, b = observed(kf.KFAC(), kf.Embedding(NUM, FEATURES), (ids, g)).average.values
    assert a.shape == (NUM,)
    assert np.allclose(a, np.bincount(ids.reshape(-1), minlength=NUM) / ids.size, rtol=1e-15)
    assert ref.distance(b, np.einsum("nsi,nsj->ij", g, g) / len(g)) < 1e-14
    # a dense layer on one-hot inputs is the same block, and has the whole matrix
    dense = observed(kf.KFAC(), kf.Linear(NUM, FEATURES, None), (one_hot(ids), g))
    assert ref.distance(np.diag(a), dense.average.values[0]) < 1e-15
    assert ref.distance(b, dense.average.values[1]) < 1e-15


@pytest.mark.parametrize("path", ["io", "oi"])
def test_an_optimizer_is_that_of_the_dense_layer_on_one_hot_inputs(ref, rng, path):
    """Tables of either layout beside a dense layer, step by step; a gradient one percent off is seen."""

    def run(layer, scale=1.0):
        optimizer = kf.Optimizer(kf.KFAC(damping=0.1, refresh_every=2), {"table": layer}, learning_rate=0.2)
        turned = getattr(layer, "layout", "oi") == "io"
        draw = np.random.default_rng(3)
        w = draw.normal(size=(NUM, FEATURES))
        params = {"table": {"weight": w if turned else w.T}}
        state = optimizer.init(params)
        for _ in range(5):
            ids, g = batch(draw, s=1)
            grad = one_hot(ids).reshape(-1, NUM).T @ g.reshape(-1, FEATURES) * scale
            records = {"table": (ids if isinstance(layer, kf.Embedding) else one_hot(ids), g)}
            params, state = optimizer.step(params, {"table": {"weight": grad if turned else grad.T}}, records, state)
        return params["table"]["weight"] if turned else params["table"]["weight"].T

    want = run(kf.Linear(NUM, FEATURES, None))
    assert ref.distance(run(kf.Embedding(NUM, FEATURES, layout=path)), want) < RTOL
    assert ref.distance(run(kf.Embedding(NUM, FEATURES, layout=path), 1.01), want) > 1e-4


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, NUM - 1, NUM])
def test_padding_leaves_both_factors(ref, rng, padding):
    """As if the examples were shorter; whatever the gradient there is, NaN included."""
    ids, g = rng.integers(1, NUM - 1, (7, 4)), rng.normal(size=(7, 4, FEATURES))
    ids[0], ids[1, 2:], ids[5, 0] = padding, padding, padding
    live = ids != padding
    layer, method = kf.Embedding(NUM, FEATURES, padding), kf.KFAC()
    for spoilt in (g, np.where(live[..., None], g, np.nan)):
        a, b = observed(method, layer, (ids, spoilt)).average.values
        assert np.allclose(a, np.bincount(ids[live], minlength=NUM)[:NUM] / live.sum(), rtol=1e-15)
        assert ref.distance(b, g[live].T @ g[live] / 7) < 1e-14
    other = observed(method, kf.Embedding(NUM + 1, FEATURES), (ids, g)).average.values
    assert ref.distance(other[0][:NUM], a) > 1e-2
    assert ref.distance(other[1], b) > 1e-2


def test_a_batch_of_padding_alone_leaves_the_state_as_it_was(rng, model):
    layer, method = kf.Embedding(NUM, FEATURES, 2), kf.KFAC()
    state = observed(method, layer, batch(rng))
    after = method.observe(state, method.reduce(layer, state, np.full((3, 4), 2), rng.normal(size=(3, 4, FEATURES))))
    assert model.same(after.average, state.average)
    assert (int(after.dropped), int(state.dropped)) == (1, 0)


def test_rows_of_padding_are_not_moved_by_the_others(rng):
    layer, method = kf.Embedding(NUM, FEATURES, 2), kf.KFAC(damping=0.1)
    state = method.refresh(layer, observed(method, layer, batch(rng)))
    grad = rng.normal(size=(FEATURES, NUM))
    grad[:, 2] = 0.0
    assert not method.precondition(layer, state, grad)[:, 2].any()


def test_padding_needs_both_sides_at_once_and_tables_without_it_do_not(rng):
    ids, g = batch(rng)
    method = kf.KFAC()
    for padding, needs in (
        (None, kf.Needs.INPUTS | kf.Needs.OUTPUT_GRADS),
        (2, kf.Needs.TOGETHER | kf.Needs.INPUTS | kf.Needs.OUTPUT_GRADS),
    ):
        layer = kf.Embedding(NUM, FEATURES, padding)
        assert method.requires(layer) == needs
        assert kf.KFAC(fisher="forward").requires(layer) == kf.Needs.INPUTS
        state = method.init(layer, g)
        method.reduce(layer, state, ids)
        if padding is None:
            apart = method.reduce(layer, state, None, g) + method.reduce(layer, state, ids)
            both = method.reduce(layer, state, ids, g)
            assert np.array_equal(apart.input_sum, both.input_sum)
            assert np.array_equal(apart.output_sum, both.output_sum)
        else:
            with pytest.raises(ValueError, match=r"`inputs` must be given with `output_grads`.*Embedding.*None"):
                method.reduce(layer, state, None, g)


# -- damping -----------------------------------------------------------------------------------------------------------


def assembled(a, g, rule, value):
    """The damped matrix from its definition, ``G (x) diag(a)`` row-major."""
    sizes = {"mean": np.mean, "trace": np.sum, "frobenius": np.linalg.norm, "spectral": np.max, "median": np.median}
    spectra = a, np.linalg.eigvalsh(g)
    value = value * a.mean() * spectra[1].mean() if rule.relative else value
    eye_a, eye_g = np.eye(len(a)), np.eye(len(g))
    if rule.kind == "plain":
        return np.kron(g + value * eye_g, np.diag(a) + value * eye_a)
    if rule.kind == "exact" or 1 in (len(a), len(g)):
        return np.kron(g, np.diag(a)) + value * np.kron(eye_g, eye_a)
    pi = np.sqrt(sizes[rule.norm](spectra[0]) / sizes[rule.norm](spectra[1]))
    return np.kron(g + np.sqrt(value) / pi * eye_g, np.diag(a) + pi * np.sqrt(value) * eye_a)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("num", "features"), [(NUM, FEATURES), (1, 3), (5, 1), (1, 1)])
@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_preconditioning_solves_with_the_damped_matrix(ref, rng, kind, norm, num, features, relative):
    ids, g = batch(rng, 16, 3, num, features)
    layer, method = kf.Embedding(num, features), kf.KFAC(damping=kf.Damping(0.02, kind, norm, relative))
    state = observed(method, layer, (ids, g))
    a, b = state.average.values
    grad = rng.normal(size=(features, num))

    def off(damping=None, scale=1.0):
        seen = observed(method, layer, (ids, scale * g))
        return ref.distance(method.precondition(layer, method.refresh(layer, seen, damping), grad), want)

    want = np.linalg.solve(assembled(a, b, method.rule, 0.02), grad.reshape(-1)).reshape(grad.shape)
    assert ref.distance(method.dense(layer, state), np.kron(b, np.diag(a))) < 1e-14
    assert off() < RTOL
    assert off(0.0202) > 1e-6
    assert off(scale=1.01) > 1e-4


@pytest.mark.parametrize("kind", ["exact", "factored"])
def test_forward_only_divides_by_the_damped_shares(ref, rng, kind):
    ids, _ = batch(rng)
    layer, method = kf.Embedding(NUM, FEATURES), kf.KFAC(damping=kf.Damping(0.1, kind), fisher="forward")
    state = method.init(layer, np.zeros(()))
    grad = rng.normal(size=(FEATURES, NUM))
    assert np.array_equal(method.precondition(layer, state, grad), grad)
    state = method.refresh(layer, method.observe(state, method.reduce(layer, state, ids)))
    share = np.bincount(ids.reshape(-1), minlength=NUM) / ids.size
    assert ref.distance(method.precondition(layer, state, grad), grad / (share + 0.1)) < 1e-14
    assert ref.distance(method.precondition(layer, state, grad), grad / (share + 0.101)) > 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_tokens_that_never_came_and_tiny_damping_leave_directions_finite(rng, kind, norm, dtype):
    ids, g = np.full((2, 3), 1), (1e-10 * rng.normal(size=(2, 3, FEATURES))).astype(dtype)
    layer, method = kf.Embedding(1000, FEATURES), kf.KFAC(damping=kf.Damping(1e-12, kind, norm))
    state = method.init(layer, g)
    state = method.refresh(layer, method.observe(state, method.reduce(layer, state, ids, g)))
    grad = np.zeros((FEATURES, 1000), dtype)
    grad[:, 1] = g.sum(axis=(0, 1))
    direction = method.precondition(layer, state, grad)
    assert int(state.kept) == 0
    assert np.isfinite(direction).all()
    assert (direction * grad).sum() > 0


# -- the verbs over batches ----------------------------------------------------------------------------------------------


def test_factors_do_not_know_the_size_of_the_batch(ref, rng):
    ids, g = batch(rng)
    layer, method = kf.Embedding(NUM, FEATURES, 1), kf.KFAC()
    once = observed(method, layer, (ids, g)).average.values
    thrice = observed(method, layer, (np.tile(ids, (3, 1)), np.tile(g, (3, 1, 1)))).average.values
    assert all(ref.distance(x, y) < 1e-14 for x, y in zip(thrice, once, strict=True))
    assert ref.distance(1.01 * thrice[0], once[0]) > 1e-3


@pytest.mark.parametrize("padding", [None, 3])
def test_micro_batches_and_ranks_add_up(ref, rng, padding):
    ids, g = batch(rng)
    layer, method = kf.Embedding(NUM, FEATURES, padding), kf.KFAC()
    state = method.init(layer, g)
    whole = method.reduce(layer, state, ids, g)
    parts = [method.reduce(layer, state, ids[p], g[p]) for p in (slice(0, 2), slice(2, 2), slice(2, 7))]
    total = parts[0] + parts[1] + parts[2]
    assert isinstance(total.inputs, DiagonalMoment)
    assert np.array_equal(total.input_sum, whole.input_sum)
    assert total.input_count == whole.input_count
    assert ref.distance(total.output_sum, whole.output_sum) < 1e-14
    doubled = whole.weighing(2.0).across(lambda value: 3.0 * value)
    assert np.array_equal(doubled.input_sum, 3.0 * whole.input_sum)
    assert ref.distance(doubled.output_sum, 6.0 * whole.output_sum) < 1e-15
    assert rows_of(whole, 1.0) is None


def test_nan_is_dropped_and_counted(rng, model):
    layer, method = kf.Embedding(NUM, FEATURES), kf.KFAC()
    state = observed(method, layer, batch(rng))
    ids, g = batch(rng)
    g[2, 1, 0] = np.nan
    after = method.observe(state, method.reduce(layer, state, ids, g))
    assert model.same(after.average, state.average)
    assert int(after.dropped) == 1
    empty = method.refresh(layer, method.init(layer, g))
    assert int(empty.kept) == 1
    assert np.array_equal(empty.solver.input, np.ones(NUM))


@pytest.mark.parametrize("kind", ["exact", "factored"])
@pytest.mark.parametrize("padding", [None, 0])
def test_stacked_tables_are_tables(ref, rng, kind, padding):
    method = kf.KFAC(damping=kf.Damping(0.1, kind))
    layer, alone = kf.Embedding(NUM, FEATURES, padding, stack=(2,)), kf.Embedding(NUM, FEATURES, padding)
    ids, g = rng.integers(0, NUM, (2, 7, 4)), rng.normal(size=(2, 7, 4, FEATURES))
    ids[1, :3] = 0  # so that the two have different numbers of live positions
    grad = rng.normal(size=(2, FEATURES, NUM))
    state = method.refresh(layer, observed(method, layer, layer.capture(ids, g), leading=(2,)))
    direction = method.precondition(layer, state, grad)
    for k in range(2):
        one = method.refresh(alone, observed(method, alone, (ids[k], g[k])))
        assert ref.distance(direction[k], method.precondition(alone, one, grad[k])) < 1e-13
        assert ref.distance(method.dense(layer, state)[k], method.dense(alone, one)) < 1e-14
    g[1, 0, 0] = np.nan
    ids[1, 0, 0] = 1
    after = method.observe(state, method.reduce(layer, state, ids, g))
    assert after.dropped.tolist() == [0, 1]
    assert after.average.weight.tolist() == [1.95, 1.0]
    assert all(np.array_equal(new[1], old[1]) for new, old in zip(after.average.values, state.average.values, strict=True))


def test_blocks_of_equal_shape_and_other_forms_are_not_stacked(rng):
    """A table, a dense layer of its shape, and a second table: the tables go together, and directions are those of each alone."""
    layers = {"a": kf.Embedding(NUM, FEATURES), "b": kf.Linear(NUM, FEATURES, None), "c": kf.Embedding(NUM, FEATURES)}
    method = kf.KFAC(damping=0.1)
    blocks = {name: kf.Block(name, layer, method) for name, layer in layers.items()}
    grads = {name: rng.normal(size=(FEATURES, NUM)) for name in layers}
    found = {}
    for group in (False, True):
        preconditioner = Preconditioner(blocks, group=group)
        state = preconditioner.init(grads)
        draw = np.random.default_rng(0)
        statistics = {}
        for name, layer in layers.items():
            ids, g = batch(draw)
            inputs = ids if name != "b" else one_hot(ids)
            statistics[name] = method.reduce(layer, state.blocks[name], inputs, g)
        state = preconditioner.refresh(preconditioner.observe(state, statistics))
        found[group] = preconditioner.precondition(state, grads)
    assert preconditioner._groups(state) == [["a", "c"], ["b"]]
    assert all(np.allclose(found[True][n], found[False][n], rtol=1e-13) for n in layers)


# -- a whole optimizer, files, reports, memory ----------------------------------------------------------------------------


def text_model(kind="factored", layout="io", padding=0, **options):
    layers = {"embed": kf.Embedding(NUM, FEATURES, padding, layout), "norm": kf.Norm(FEATURES), "head": kf.Linear(FEATURES, 2)}
    method = kf.KFAC(damping=kf.Damping(0.1, kind), refresh_every=2)
    return kf.Optimizer(method, layers, **({"learning_rate": 0.1} | options))


def text_params(rng, layout="io"):
    table = rng.normal(size=(NUM, FEATURES))
    return {
        "embed": {"weight": table if layout == "io" else table.T.copy()},
        "norm": {"weight": 1.0 + 0.1 * rng.normal(size=FEATURES), "bias": 0.1 * rng.normal(size=FEATURES)},
        "head": {"weight": rng.normal(size=(2, FEATURES)), "bias": np.zeros(2)},
    }


def text_backward(params, ids, y, layout="io"):
    return tokens(params, ids, y, 0, layout)


def text_run(optimizer, params, state, batches, layout="io"):
    for ids, y in batches:
        params, state = optimizer.step(params, *text_backward(params, ids, y, layout), state)
    return params, state


def text_batches(rng, count):
    return [(rng.integers(0, NUM, (5, 4)), rng.normal(size=(5, 4, 2))) for _ in range(count)]


def test_the_hand_written_gradients_are_those_of_the_loss(rng):
    params, ((ids, y),) = text_params(rng), text_batches(rng, 1)
    grads, _ = text_backward(params, ids, y)

    def loss(params):
        x = params["embed"]["weight"][ids]
        hat = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        f = (hat * params["norm"]["weight"] + params["norm"]["bias"]) @ params["head"]["weight"].T + params["head"]["bias"]
        return 0.5 * (((f - y) ** 2) * (ids != 0)[..., None]).sum() / len(ids)

    for layer, roles in params.items():
        for role, value in roles.items():
            step = rng.normal(size=value.shape)
            moved = [params | {layer: roles | {role: value + sign * 1e-5 * step}} for sign in (1, -1)]
            assert np.isclose((loss(moved[0]) - loss(moved[1])) / 2e-5, (grads[layer][role] * step).sum(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["exact", "factored"])
def test_training_descends_and_a_resumed_run_is_the_run(rng, model, tmp_path, kind):
    batches = text_batches(rng, 1) * 60
    optimizer, params = text_model(kind), text_params(rng)
    before = np.abs(text_backward(params, *batches[0])[1]["head"][1]).sum()
    params, state = text_run(optimizer, params, optimizer.init(params), batches[:20])
    kf.save(tmp_path / "state", optimizer.bind(params), state)
    other = text_model(kind)
    loaded = kf.load(tmp_path / "state", other.bind(params), other.init(params))
    assert model.same(loaded, state)
    assert model.same(text_run(other, params, loaded, batches[20:]), (end := text_run(optimizer, params, state, batches[20:])))
    assert np.abs(text_backward(end[0], *batches[0])[1]["head"][1]).sum() < 0.7 * before
    assert optimizer.diagnostics(end[1])["dropped_statistics"] == {}


def test_models_of_either_layout_read_each_others_file(ref, rng, tmp_path):
    batches = text_batches(rng, 9)
    start, optimizer = text_params(rng), text_model()
    params, state = text_run(optimizer, start, optimizer.init(start), batches[:5])
    kf.save(tmp_path / "state", optimizer.bind(params), state)
    turned = params | {"embed": {"weight": params["embed"]["weight"].T.copy()}}
    other = text_model(layout="oi")
    loaded = kf.load(tmp_path / "state", other.bind(turned), other.init(turned))
    mine, _ = text_run(optimizer, params, state, batches[5:])
    theirs, _ = text_run(other, turned, loaded, batches[5:], "oi")
    assert ref.distance(theirs["embed"]["weight"].T, mine["embed"]["weight"]) < 1e-12
    assert ref.distance(theirs["norm"]["weight"], mine["norm"]["weight"]) < 1e-12


def test_a_file_of_a_dense_layer_is_refused(rng, tmp_path):
    optimizers = [
        kf.Optimizer(kf.KFAC(), {"t": layer}) for layer in (kf.Embedding(NUM, FEATURES), kf.Linear(NUM, FEATURES, None, layout="io"))
    ]
    params = {"t": {"weight": rng.normal(size=(NUM, FEATURES))}}
    kf.save(tmp_path / "state", optimizers[1].bind(params), optimizers[1].init(params))
    with pytest.raises(kf.CheckpointError, match=r"curvature/t/average.*\(6,\).*\(6, 6\)"):
        kf.load(tmp_path / "state", optimizers[0].bind(params), optimizers[0].init(params))


def arrays_of(tree):
    if tree is None:
        return []
    return [x for part in tree for x in arrays_of(part)] if isinstance(tree, tuple) else [tree]


@pytest.mark.parametrize("fisher", ["empirical", "forward"])
@pytest.mark.parametrize("kind", ["exact", "factored", "plain"])
@pytest.mark.parametrize(
    "layer",
    [kf.Embedding(50, 4), kf.Norm(5), kf.Norm(5, block="full"), kf.Norm(5, bias=False)],
    ids=lambda v: f"{type(v).__name__}{v.shape}",
)
def test_the_report_knows_the_bytes(layer, kind, fisher):
    optimizer = kf.Optimizer(kf.KFAC(damping=kf.Damping(0.1, kind), fisher=fisher), {"l": layer}, momentum=0.0)
    params = {"l": {role: np.ones(shape) for role, shape in layer.parameters.items()}}
    state = optimizer.init(params)
    report = optimizer.report(params)
    assert report["l.weight"].factors == layer.shape
    assert report["l.weight"].reason == type(layer).__name__
    assert report["l.weight"].kind == "kfac"
    assert report.bytes == sum(x.nbytes for x in arrays_of(state.curvature.blocks["l"]))
    assert report.fallbacks() == []


@pytest.mark.parametrize("kind", ["exact", "factored", "plain"])
def test_a_large_table_takes_memory_and_work_of_its_size(rng, kind):
    num, features = 50_000, 8
    layer, method = kf.Embedding(num, features), kf.KFAC(damping=kf.Damping(0.1, kind))
    ids, g = rng.integers(0, num, (64, 128)), rng.normal(size=(64, 128, features)).astype(np.float32)
    grad = rng.normal(size=(features, num)).astype(np.float32)
    tracemalloc.start()
    state = method.init(layer, g)
    state = method.refresh(layer, method.observe(state, method.reduce(layer, state, ids, g)))
    held, _ = tracemalloc.get_traced_memory()
    method.precondition(layer, state, grad)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(x.nbytes for x in arrays_of(state)) == method.cost(layer).bytes < 4 * 2 * num + 2000
    assert held < 1.5 * method.cost(layer).bytes
    assert peak < 5 * grad.nbytes, "a matrix of num x num would be 10 GB"
    assert method.cost(layer).step_flops <= 5 * num * features**2
    assert method.cost(layer).refresh_flops < 20 * num


# -- one table in several libraries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("kind", ["exact", "factored"])
def test_the_strictest_library_gives_the_same_numbers(rng, model, kind, padding):
    ids, g = batch(rng)
    grad = rng.normal(size=(FEATURES, NUM))
    layer, method = kf.Embedding(NUM, FEATURES, padding), kf.KFAC(damping=kf.Damping(0.1, kind))

    def run(put):
        state = method.init(layer, put(g))
        state = method.observe(state, method.reduce(layer, state, *layer.capture(put(ids), put(g))))
        state = method.refresh(layer, state)
        return method.precondition(layer, state, put(grad)), method.dense(layer, state)

    assert all(np.allclose(kf.to_numpy(x), y, rtol=1e-12) for x, y in zip(run(strict.asarray), run(np.asarray), strict=True))


def test_one_hot_rows_have_the_counts_for_their_moment(rng):
    ids, _ = batch(rng)
    for padding in (None, 1):
        layer = kf.Embedding(NUM, FEATURES, padding)
        rows = layer.input_rows(np, ids, np.float64)
        live = np.ones(ids.size) if padding is None else ids.reshape(-1) != padding
        assert np.array_equal(rows, one_hot(ids).reshape(-1, NUM) * live[:, None])
        assert np.array_equal(rows.T @ rows, np.diag(layer.input_gram(np, ids, np.float64)))
        assert layer.input_count(ids) == rows.sum()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64])
def test_ids_of_any_integer_dtype(dtype):
    ids = np.array([[3, 120], [3, 0]], dtype)
    layer = kf.Embedding(50_000 if np.iinfo(dtype).bits > 8 else 300, 2, 0)
    found = layer.input_gram(np, ids, np.float64)
    assert (found[3], found[120], found[0], found.sum()) == (2.0, 1.0, 0.0, 3.0)
    assert int(layer.input_count(ids)) == 3


# -- wrong calls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "came"),
    [
        (lambda v: kf.Embedding(v, 2), "num", [0, -1, 2.0, True, None]),
        (lambda v: kf.Embedding(2, v), "features", [0, "3", None]),
        (lambda v: kf.Embedding(4, 2, v), "padding", [-1, 5, 1.0, True, "0"]),
        (lambda v: kf.Embedding(4, 2, layout=v), "layout", ["hwio", None]),
        (lambda v: kf.Embedding(4, 2, sharing=v), "sharing", ["reduce", None]),
        (lambda v: kf.Embedding(4, 2, stack=v), "stack", [2, (0,), [2]]),
    ],
)
def test_a_setting_out_of_range_is_refused(make, name, came):
    for value in came:
        with pytest.raises(ValueError, match=f"`{name}` of Embedding") as caught:
            make(value)
        assert repr(value) in str(caught.value)


def test_reduce_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"'expand'.*no diagonal second moment.*'reduce'"):
        kf.Embedding(4, 2, sharing="reduce")


@pytest.mark.parametrize(
    ("ids", "grads", "error", "pattern"),
    [
        (np.zeros((5, 4)), np.zeros((5, 4, 3)), TypeError, "'t'.*`inputs`.*integers.*float64"),
        (np.zeros((), int), np.zeros((5, 4, 3)), ValueError, r"'t'.*`inputs`.*\[N, ...\].*\(\)"),
        (np.zeros((5, 4), int), np.zeros((5, 4, 2)), ValueError, r"'t'.*`output_grads`.*\[N, ..., 3\].*\(5, 4, 2\)"),
        (np.zeros((5, 4), int), np.zeros((5, 3, 3)), ValueError, r"'t'.*`output_grads`.*`inputs`.*\(5, 3, 3\).*\(5, 4\)"),
        (np.full((5, 4), 6), np.zeros((5, 4, 3)), ValueError, "'t'.*`inputs`.*from 0 to 5.*from 6 to 6"),
        (np.array([[0], [-1]]), np.zeros((2, 1, 3)), ValueError, "'t'.*`inputs`.*from 0 to 5.*from -1 to 0"),
        (np.array([[2**32 + 1]]), np.zeros((1, 1, 3)), ValueError, f"'t'.*`inputs`.*to {2**32 + 1}"),
    ],
)
def test_a_wrong_record_is_refused(ids, grads, error, pattern):
    optimizer = kf.Optimizer(kf.KFAC(), {"t": kf.Embedding(NUM, FEATURES)})
    params = {"t": {"weight": np.zeros((NUM, FEATURES))}}
    with pytest.raises(error, match=f"(?s){pattern}"):
        optimizer.step(params, params, {"t": (ids, grads)}, optimizer.init(params), terms=5)


def test_a_wrong_call_of_the_verbs_is_refused(rng):
    ids, g = batch(rng)
    layer, method = kf.Embedding(NUM, FEATURES, 1), kf.KFAC()
    state = method.init(layer, g)
    for inputs, error, pattern in (
        (g, TypeError, "`inputs` must be integers, got float64"),
        (ids[0], ValueError, r"`inputs` must have shape \[..., N, S\], got \(4,\)"),
        (ids[:, :2], ValueError, r"`inputs`.*\(7, 4\).*\(7, 2\)"),
    ):
        with pytest.raises(error, match=pattern):
            method.reduce(layer, state, inputs, g)
    with pytest.raises(ValueError, match=r"`grad`.*\[..., 3, 6\].*\(6, 3\)"):
        method.precondition(layer, state, np.zeros((NUM, FEATURES)))


def test_the_algebra_of_a_diagonal_is_that_of_its_matrix(ref, rng):
    x, m = rng.uniform(0.1, 2.0, (2, 5)), rng.normal(size=(2, 5, 4))
    full = factors.dense(np, "diagonal", x)
    assert np.array_equal(full, x[..., None] * np.eye(5))
    for function in (factors.trace, factors.mean, factors.frobenius, factors.eigenvalues):
        assert ref.distance(function(np, "diagonal", x), function(np, "matrix", full)) < 1e-14
    (inverse, ok, _), (whole, *_) = factors.invert_all(np, [("diagonal", x), ("matrix", full)])
    assert ok.all()
    assert ref.distance(factors.dense(np, "diagonal", inverse), whole) < 1e-14
    for forms, left in ((("diagonal", "matrix"), x), (("matrix", "matrix"), full)):
        assert ref.distance(factors.sandwich(np, forms, left, m, np.eye(4)), full @ m) < 1e-14
    for forms, right in ((("matrix", "diagonal"), x), (("matrix", "matrix"), full)):
        assert (
            ref.distance(
                factors.sandwich(np, forms, None, np.swapaxes(m, -1, -2), right),
                np.swapaxes(full @ m, -1, -2),
            )
            < 1e-14
        )
    bad = factors.invert_all(np, [("diagonal", np.array([[1.0, np.inf], [1.0, 2.0], [-1.0, 1.0]]))])[0][1]
    assert bad.tolist() == [False, True, False]
