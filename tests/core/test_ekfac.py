"""EKFAC against the exact block: identities of the paper, exact cases, and what becomes of scales and statistics."""

import numpy as np
import pytest

import kfcore as kf
from kfcore.eigenbasis import transport
from kfcore.statistics import KroneckerStatistics, Moment, Use

TOL = 1e-11


def seen(method, layer, state, x, g, count=None):
    statistics = method.reduce(layer, state, x, g)
    return method.observe(state, statistics if count is None else statistics.over(count))


def measured(method, layer, x, g, count=None):
    """State after two passes over the same data: one for the basis, one for the scales in it."""
    state = method.init(layer, np.zeros(()), layer.stack)
    return seen(method, layer, method.refresh(layer, seen(method, layer, state, x, g, count)), x, g, count)


def exact_block(ref, layer, x, g):
    """``F`` of an example's gradients, and these as rows."""
    rows = ref.example_gradients(ref.augmented(x, layer.bias == "joint"), g)
    return rows.T @ rows / len(rows), rows


def bases(layer, state):
    left, right = state.solver.output_basis, state.solver.input_basis
    return np.kron(np.eye(layer.shape[0]) if left is None else left, np.eye(layer.shape[1]) if right is None else right)


def kfac_of(state):
    return state.solver.output_values[..., :, None] * state.solver.input_values[..., None, :]


LAYERS = [(kf.Linear(4, 3), 1), (kf.Linear(4, 3, None), 3), (kf.Linear(4, 3), 9), (kf.Linear(4, 3, sharing="reduce"), 5)]


@pytest.mark.parametrize(("layer", "positions"), LAYERS)
def test_the_identities_of_the_best_diagonal(ref, rng, captures, layer, positions):
    method = kf.EKFAC(damping=0.3)
    x, g = captures(rng, n=40, s=positions, inp=4, out=3)
    x[..., 1] *= 3.0
    g = g * (1.0 + x[..., 1:2] ** 2)  # inputs and gradients depend on each other, or KFAC would do as well
    state = measured(method, layer, x, g)
    block, _ = exact_block(ref, layer, x, g)
    u, s = bases(layer, state), state.scales.values[0]
    np.testing.assert_allclose(s.ravel(), np.diag(u.T @ block @ u), rtol=1e-10)
    dense, kfac = method.dense(layer, state), u @ np.diag(kfac_of(state).ravel()) @ u.T
    np.testing.assert_allclose(kfac, kf.KFAC().dense(layer, measured(kf.KFAC(), layer, x, g)), atol=1e-10 * np.abs(kfac).max())
    assert np.trace(dense) == pytest.approx(np.trace(block), rel=1e-12)
    assert abs(np.trace(kfac) / np.trace(block) - 1.0) > 0.02
    size = np.linalg.norm(block)
    error, worse = np.linalg.norm(block - dense), np.linalg.norm(block - kfac)
    assert error < 0.95 * worse
    assert error**2 == pytest.approx(size**2 - (s**2).sum(), abs=1e-10 * size**2)
    assert worse**2 - error**2 == pytest.approx(((s - kfac_of(state)) ** 2).sum(), abs=1e-10 * size**2)
    for place in np.ndindex(*s.shape):
        for factor in (0.99, 1.01):
            other = s.copy()
            other[place] *= factor
            moved = state._replace(scales=state.scales._replace(values=(other,)))
            assert np.linalg.norm(block - method.dense(layer, moved)) > error


@pytest.mark.parametrize(("layer", "positions"), LAYERS)
def test_a_direction_solves_with_the_dense_matrix(rng, captures, layer, positions):
    method = kf.EKFAC(damping=0.3)
    x, g = captures(rng, n=9, s=positions, inp=4, out=3)
    state = measured(method, layer, x, g)
    grad = rng.normal(size=layer.shape)
    matrix = method.dense(layer, state) + 0.3 * np.eye(grad.size)
    found = method.precondition(layer, state, grad)
    np.testing.assert_allclose(found.ravel(), np.linalg.solve(matrix, grad.ravel()), rtol=0, atol=TOL)
    stacked = method.precondition(layer, state, np.stack([grad, 2.0 * grad]))
    np.testing.assert_allclose(stacked, np.stack([found, 2.0 * found]), atol=TOL)


@pytest.mark.parametrize(("layer", "positions"), [*LAYERS, (kf.Bias(3), 2)])
def test_until_scales_are_measured_it_is_kfac_with_exact_damping(rng, captures, fitted, layer, positions):
    x, g = captures(rng, n=9, s=positions, inp=4, out=3)
    grad = rng.normal(size=layer.shape)
    for relative in (False, True):
        rule = kf.Damping(0.3, "exact", relative=relative)
        method, other = kf.EKFAC(damping=rule), kf.KFAC(damping=rule)
        state, kfac = fitted(method, layer, x, g), fitted(other, layer, x, g)
        np.testing.assert_allclose(method.dense(layer, state), other.dense(layer, kfac), atol=TOL)
        np.testing.assert_allclose(method.precondition(layer, state, grad), other.precondition(layer, kfac, grad), atol=TOL)
        assert float(state.scales.weight) == 0.0
    fresh = method.init(layer, x)
    assert np.array_equal(method.precondition(layer, fresh, grad), grad)


def test_signs_and_order_of_eigenvectors_change_nothing(rng, captures):
    method, layer = kf.EKFAC(damping=0.3), kf.Linear(4, 3)
    x, g = captures(rng, n=9, s=2, inp=4, out=3)
    state = method.refresh(layer, seen(method, layer, method.init(layer, x), x, g))
    solver = state.solver
    p, q = rng.permutation(5), rng.permutation(3)
    turned = solver._replace(
        input_basis=solver.input_basis[:, p] * np.array([1, -1, 1, -1, -1.0]),
        input_values=solver.input_values[p],
        output_basis=solver.output_basis[:, q] * np.array([-1, 1, -1.0]),
        output_values=solver.output_values[q],
    )
    other = state._replace(solver=turned, scales=state.scales._replace(values=(state.scales.values[0][q][:, p],)))
    grad = rng.normal(size=layer.shape)
    for _ in range(3):
        np.testing.assert_allclose(method.precondition(layer, state, grad), method.precondition(layer, other, grad), atol=TOL)
        np.testing.assert_allclose(method.dense(layer, state), method.dense(layer, other), atol=TOL)
        x, g = captures(rng, n=9, s=2, inp=4, out=3)
        state, other = seen(method, layer, state, x, g), seen(method, layer, other, x, g)
    state, other = method.refresh(layer, state), method.refresh(layer, other)
    np.testing.assert_allclose(method.precondition(layer, state, grad), method.precondition(layer, other, grad), atol=TOL)


# -- exact cases -------------------------------------------------------------------------------------------------------


def two_passes(ref, net, x, loss, fisher, layers, y=None, **options):
    """By layer, dense EKFAC and KFAC blocks from vectors pulled back through a net, the vectors of an example behind each other."""
    f, trace = net.forward(x)
    losses = {"mse": kf.MSE(), "ce": kf.CrossEntropy()}
    vectors = [ref.output_gradients(loss, f, y)] if fisher == "empirical" else kf.fisher_vectors(fisher, losses[loss], f, None)
    pulls = [net.pull(trace, v) for v in vectors]
    method, other = kf.EKFAC(fisher=fisher, **options), kf.KFAC(fisher=fisher)
    found = []
    for i, layer in enumerate(layers):
        g = np.concatenate([p[i] for p in pulls])
        count = ref.count_terms(loss, f)
        ekfac = method.dense(layer, measured(method, layer, trace[0][i], g, count))
        state = other.init(layer, x)
        kfac = other.dense(layer, other.observe(state, other.reduce(layer, state, trace[0][i], g).over(count)))
        found.append((ekfac, kfac))
    return found


def linears(net, sharing="expand"):
    bias = net.biases[0] is not None
    return [kf.Linear(w.shape[1], w.shape[0], "joint" if bias else None, sharing) for w in net.weights]


@pytest.mark.parametrize(
    ("positions", "pools", "sharing"),
    [(1, {}, "expand"), (5, {}, "expand"), (5, {2: "sum"}, "reduce"), (5, {0: "mean"}, "reduce")],
)
@pytest.mark.parametrize("bias", [False, True])
def test_deep_linear_nets_are_exact_where_kfac_is(ref, rng, positions, pools, sharing, bias):
    net = ref.Net.random(rng, (4, 3, 3, 2), bias=bias, pools=pools)
    x = rng.normal(size=(6, positions, 4))
    exact = ref.ggn_blocks(net, x, "mse", joint=bias)
    for (ekfac, _), block in zip(two_passes(ref, net, x, "mse", "exact", linears(net, sharing)), exact, strict=True):
        assert ref.distance(ekfac, block) < 1e-10
        assert ref.distance(ekfac * 1.01, block) > 5e-3


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_one_example_is_exact(ref, rng, loss, activation):
    net = ref.Net.random(rng, (4, 5, 3), bias=True, activation=activation)
    x = rng.normal(size=(1, 1, 4))
    y = ref.targets(rng, loss, net.forward(x)[0])
    for fisher in ("exact", "empirical"):
        blocks = ref.ggn_blocks(net, x, loss, joint=True) if fisher == "exact" else ref.empirical_blocks(net, x, loss, y, joint=True)
        for (ekfac, _), block in zip(two_passes(ref, net, x, loss, fisher, linears(net), y), blocks, strict=True):
            assert ref.distance(ekfac, block) < 1e-10


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_other_nets_are_closer_than_kfac_has_them(ref, rng, loss, sharing, fisher):
    net = ref.Net.random(rng, (4, 5, 4, 3), bias=True, activation="tanh", pools={1: "mean"})
    x = rng.normal(size=(8, 3, 4))
    y = ref.targets(rng, loss, net.forward(x)[0])
    blocks = ref.ggn_blocks(net, x, loss, joint=True) if fisher == "exact" else ref.empirical_blocks(net, x, loss, y, joint=True)
    for i, ((ekfac, kfac), block) in enumerate(zip(two_passes(ref, net, x, loss, fisher, linears(net, sharing), y), blocks, strict=True)):
        if (i, loss, fisher) == (2, "mse", "exact"):  # of a last layer behind which nothing depends on the example
            assert max(ref.distance(ekfac, block), ref.distance(kfac, block)) < 1e-10
        else:
            assert np.linalg.norm(ekfac - block) < (1.0 - 1e-6) * np.linalg.norm(kfac - block)
        assert np.trace(ekfac) == pytest.approx(np.trace(block), rel=1e-11)


def test_a_convolution_straight_to_the_loss_is_exact(ref, rng):
    layer = kf.Conv(4, 6, (3, 2), (2, 3), (2, 1), dilation=(1, 2), groups=2, bias=None)
    x = rng.normal(size=(4, 4, 5, 6))
    inputs, _ = layer.capture(x, None)
    columns = np.swapaxes(layer.input_rows(np, inputs, np.float64).reshape(2, 4, 8, 12), 0, 1)  # [N, groups, S, columns]
    vectors = np.eye(8 * 6).reshape(48, 1, 8, 6).repeat(4, axis=1).reshape(48 * 4, 8, 6)
    method = kf.EKFAC(fisher="exact")
    dense = method.dense(layer, measured(method, layer, inputs, vectors, count=4.0))
    moments = np.einsum("nqsi,nqsj->qij", columns, columns) / 4.0
    for k in range(2):
        assert ref.distance(dense[k], np.kron(np.eye(3), moments[k])) < 1e-10


def test_a_weight_used_twice_on_one_example_is_exact_only_if_its_uses_add_up(ref, rng, captures):
    layer, method = kf.Linear(3, 2, None), kf.EKFAC()
    (x, g), (y, h) = captures(rng, n=1, s=1), captures(rng, n=1, s=1)
    rows = ref.example_gradients(x, g) + ref.example_gradients(y, h)

    def run(reduce):
        state = method.init(layer, x)
        for _ in range(2):
            state = method.refresh(layer, method.observe(state, reduce(state)))
        state = method.observe(state, reduce(state))
        return np.trace(method.dense(layer, state)), state

    together, state = run(lambda state: method.reduce_all([Use(layer, x, g), Use(layer, y, h)], state))
    assert together == pytest.approx((rows**2).sum(), rel=1e-12)
    np.testing.assert_allclose(state.average.values[1], g[0].T @ g[0] + h[0].T @ h[0], rtol=1e-12)
    apart, _ = run(lambda state: method.reduce(layer, state, x, g) + method.reduce(layer, state, y, h))
    assert abs(apart / together - 1.0) > 0.01


# -- scales --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def history(rng):
    """Three batches of a layer that differ a lot."""
    return kf.Linear(4, 3), [(rng.normal(size=(7, 2, 4)) * size, rng.normal(size=(7, 2, 3))) for size in (1.0, 2.0, 0.5)]


def in_basis(ref, layer, state, x, g):
    u = bases(layer, state)
    block, _ = exact_block(ref, layer, x, g)
    return np.diag(u.T @ block @ u).reshape(layer.shape)


def test_scales_are_averaged_or_those_of_the_last_batch(ref, history):
    layer, batches = history
    for kind, weights in (("average", (0.64, 0.8, 1.0)), ("batch", (0.0, 0.0, 1.0))):
        method = kf.EKFAC(scales=kind, stats_decay=0.8)
        state = method.refresh(layer, seen(method, layer, method.init(layer, np.zeros(())), *batches[0]))
        for batch in batches:
            state = seen(method, layer, state, *batch)
        desired = sum(w * in_basis(ref, layer, state, *batch) for w, batch in zip(weights, batches, strict=True)) / sum(weights)
        np.testing.assert_allclose(state.scales.values[0], desired, rtol=1e-11)


def test_a_basis_that_moves_takes_the_scales_along(ref, history):
    layer, batches = history
    for kind in ("transport", "reset", "measure"):
        method = kf.EKFAC(moved=kind, stats_decay=0.8)
        state = measured(method, layer, *batches[0])
        before = seen(method, layer, state, *batches[1])
        after = method.refresh(layer, before)
        assert np.abs(after.solver.input_basis - before.solver.input_basis).max() > 0.01
        u, old = bases(layer, after), method.dense(layer, before)
        wanted = np.diag(u.T @ old @ u).reshape(layer.shape) if kind == "transport" else kfac_of(after)
        np.testing.assert_allclose(after.scales.values[0], wanted, atol=TOL)
        if kind == "transport":
            assert np.trace(method.dense(layer, after)) == pytest.approx(np.trace(old), rel=1e-12)
        weight = 0.0 if kind == "measure" else 1.8
        assert float(after.scales.weight) == pytest.approx(weight)
        last = seen(method, layer, after, *batches[2])
        new = in_basis(ref, layer, after, *batches[2])
        share = 1.0 / (0.8 * weight + 1.0)
        np.testing.assert_allclose(last.scales.values[0], (1.0 - share) * wanted + share * new, rtol=1e-11)


def test_transport_is_the_diagonal_of_the_old_matrix_in_the_new_basis(rng):
    u, v = np.linalg.qr(rng.normal(size=(2, 2, 3, 3)))[0]  # [stack, n, n], old and new
    p, q = np.linalg.qr(rng.normal(size=(2, 2, 4, 4)))[0]
    scales = rng.uniform(size=(2, 3, 4))
    found = transport(np, scales, (u, v), (p, q))
    for k in range(2):
        old, new = np.kron(u[k], p[k]), np.kron(v[k], q[k])
        wanted = np.diag(new.T @ old @ np.diag(scales[k].ravel()) @ old.T @ new).reshape(3, 4)
        np.testing.assert_allclose(found[k], wanted, atol=1e-14)
    np.testing.assert_allclose(transport(np, scales, (None, None), (p, q)).sum(axis=-1), scales.sum(axis=-1), rtol=1e-13)
    np.testing.assert_allclose(transport(np, scales, (u, u), (p, p)), scales, atol=1e-14)


def test_scales_of_the_mean_gradient_are_off_by_the_square_of_its_mean(ref, rng):
    """``M E gbar^2 = E g^2 + (M - 1) (E g)^2`` over all batches of M that a population of three can give."""
    layer, m = kf.Linear(2, 2, None), 2
    population = rng.normal(size=(3, 1, 2)), 0.5 + rng.normal(size=(3, 1, 2))
    method = kf.EKFAC(scales="gradient", stats_decay=1.0)
    state = method.init(layer, np.zeros(()))
    state = method.refresh(layer, without_scales(method, layer, state, *population))
    u = bases(layer, state)
    _, rows = exact_block(ref, layer, *population)
    turned = rows @ u
    for i in range(3):
        for j in range(3):
            mean = 0.5 * (rows[i] + rows[j])
            both = method.reduce(layer, state, *(x[[i, j]] for x in population))
            state = method.observe(state, both + method.reduce(layer, state, grad=mean.reshape(2, 2), terms=float(m)))
    desired = (turned**2).mean(axis=0) + (m - 1) * turned.mean(axis=0) ** 2
    np.testing.assert_allclose(state.scales.values[0].ravel(), desired, rtol=1e-11)


def without_scales(method, layer, state, x, g):
    """State that has observed both sides, and a gradient that no basis has measured yet."""
    return method.observe(state, method.reduce(layer, state, x, g) + method.reduce(layer, state, grad=np.zeros(layer.shape)))


def test_in_the_identity_the_mean_gradient_makes_it_the_diagonal_method(rng):
    """A basis that never turns: what is left is the second moment of the gradient, entry by entry."""
    layer = kf.Norm(3)
    method, other = kf.EKFAC(damping=0.2, scales="gradient", moved="transport"), kf.Diagonal(damping=0.2)
    flat = kf.blocks_of(kf.KFAC(), {}, {"w": layer.shape}, other)["w"].layer
    x, g = rng.normal(size=(2, 5, 1, 3))
    state = method.refresh(layer, without_scales(method, layer, method.init(layer, np.zeros(())), x, g))
    diagonal = other.init(flat, np.zeros(()))
    for _ in range(4):
        grad = rng.normal(size=layer.shape)
        new = method.reduce(layer, state, x, g) + method.reduce(layer, state, grad=grad, terms=5.0)
        state = method.refresh(layer, method.observe(state, new))
        diagonal = other.refresh(flat, other.observe(diagonal, other.reduce(flat, diagonal, grad=grad, terms=5.0)))
        np.testing.assert_allclose(method.precondition(layer, state, grad), other.precondition(flat, diagonal, grad), rtol=1e-12)


def test_relative_damping_is_in_units_of_the_mean_scale(history):
    layer, batches = history
    method = kf.EKFAC(damping=kf.Damping(0.1, "exact", relative=True))
    state = method.refresh(layer, measured(method, layer, *batches[0]))
    assert float(state.solver.damping) == pytest.approx(0.1 * state.scales.values[0].mean(), rel=1e-12)
    grad = np.arange(15.0).reshape(3, 5)
    scaled = method.refresh(layer, measured(method, layer, batches[0][0], 7.0 * batches[0][1]))
    np.testing.assert_allclose(49.0 * method.precondition(layer, scaled, grad), method.precondition(layer, state, grad), rtol=1e-10)
    nothing = method.refresh(layer, measured(method, layer, *(0.0 * x for x in batches[0])))
    assert np.isfinite(method.precondition(layer, nothing, grad)).all()


# -- statistics ------------------------------------------------------------------------------------------------------------


def test_statistics_merge_scale_and_spread(ref, history):
    layer, batches = history
    x, g = batches[0]
    method = kf.EKFAC()
    state = measured(method, layer, *batches[1])
    whole = method.reduce(layer, state, x, g)
    parts = method.reduce(layer, state, x[:2], g[:2]) + method.reduce(layer, state, x[2:], g[2:])
    np.testing.assert_allclose(parts.scales, whole.scales, rtol=1e-12)
    assert parts.scale_count == whole.scale_count == 7.0
    assert whole.over(3.0).scale_count == 3.0
    np.testing.assert_allclose(whole.weighing(2.0).scales, 2.0 * whole.scales, rtol=1e-14)
    ranks = whole.across(lambda value: 4.0 * value)
    np.testing.assert_allclose(ranks.scales / ranks.scale_count, whole.scales / 7.0, rtol=1e-14)
    assert ranks.scale_count == 28.0
    sides = KroneckerStatistics(Moment(np.eye(2)), 1.0, Moment(np.eye(2)), 1.0).across(lambda value: 2.0 * value)
    assert (sides.scales, sides.scale_count, sides.over(5.0).scale_count) == (None, 0.0, 0.0)
    # examples in another order are the same examples
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(method.reduce(layer, state, x[order], g[order]).scales, whole.scales, rtol=1e-12)
    # and twice the gradients have four times the curvature
    np.testing.assert_allclose(method.reduce(layer, state, x, 2.0 * g).scales, 4.0 * whole.scales, rtol=1e-12)


def test_ranks_have_the_scales_of_the_whole_batch(rng, model):
    params, layers, (x, y) = model.params(rng), model.layers(), model.batch(rng, 8)
    optimizer = kf.Optimizer(kf.EKFAC(damping=0.1), layers)
    state = optimizer.init(params)
    for _ in range(2):
        grads, records = model.gradients(params, x, y)
        _, state = optimizer.step(params, grads, records, state)
    bound = optimizer.bind(params)
    whole = {n: s for name, r in records.items() for n, s in optimizer.reduce(state, name, *r).items()}
    # each of two ranks has a mean over its own four
    parts = []
    for half in (slice(0, 4), slice(4, 8)):
        one = {name: (a[half], 2.0 * g[half]) for name, (a, g) in records.items()}
        parts.append({n: s for name, r in one.items() for n, s in optimizer.reduce(state, name, *r).items()})
    sums = iter([])

    def total(value):
        return 2.0 * value if isinstance(value, float) else next(sums)

    for name in whole:
        weighed = [part[name].weighing(16.0) for part in parts]
        sums = iter([sum(w.inputs.whole() for w in weighed), sum(w.outputs.whole() for w in weighed), sum(w.scales for w in weighed)])
        found, terms = bound.across({name: parts[0][name]}, 4.0, total)
        assert terms == 8.0
        wanted = whole[name].over(1.0 / 8.0)
        np.testing.assert_allclose(found[name].scales / found[name].scale_count, wanted.scales / wanted.scale_count, rtol=1e-12)
        np.testing.assert_allclose(found[name].output_sum / found[name].output_count, 8.0 * whole[name].output_sum, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["inputs", "outputs", "scales"])
@pytest.mark.parametrize("kind", ["average", "batch", "gradient"])
def test_statistics_that_are_not_finite_change_nothing_and_are_counted(rng, history, model, where, bad, kind):
    layer, batches = history
    method = kf.EKFAC(scales=kind)
    state = method.init(layer, np.zeros(()))

    def reduce(x, g):
        found = method.reduce(layer, state, x, g)
        return found if found.scales is not None else found + method.reduce(layer, state, grad=rng.normal(size=layer.shape))

    state = method.observe(state, reduce(*batches[0]))
    state = method.refresh(layer, state)
    state = method.observe(state, reduce(*batches[1]))
    new = reduce(*batches[2])
    if where == "scales":
        new.scales[0, 1] = bad
    else:
        moment = getattr(new, where).whole()
        moment[0, 0] = bad
        new = new._replace(**{where: Moment(moment)})
    after = method.observe(state, new)
    assert model.same(after._replace(dropped=state.dropped), state)
    assert int(after.dropped) == int(state.dropped) + 1


def test_a_stack_drops_the_layer_that_is_not_finite_alone(rng):
    layer, method = kf.Linear(3, 2, stack=(3,)), kf.EKFAC()
    x, g = rng.normal(size=(3, 6, 1, 3)), rng.normal(size=(3, 6, 1, 2))
    state = measured(method, layer, x, g)
    spoiled = g.copy()
    spoiled[1, 0] = np.nan
    after = seen(method, layer, state, 2.0 * x, spoiled)
    assert after.dropped.tolist() == [0, 1, 0]
    assert np.array_equal(after.scales.values[0][1], state.scales.values[0][1])
    assert not np.isclose(after.scales.values[0][[0, 2]], state.scales.values[0][[0, 2]]).any()
    assert method.dense(layer, after).shape == (3, 8, 8)


def test_a_refresh_that_fails_keeps_basis_and_scales_and_is_counted(history, model):
    layer, batches = history
    for basis in (None, kf.Tracked(smallest=1)):
        method = kf.EKFAC(basis=basis)
        empty = method.refresh(layer, method.init(layer, np.zeros(())))
        assert int(empty.kept) == 1
        assert np.array_equal(method.precondition(layer, empty, np.ones((3, 5))), np.ones((3, 5)))
        state = measured(method, layer, *batches[0])
        broken = state._replace(average=state.average._replace(weight=np.zeros(())))
        after = method.refresh(layer, broken)
        assert model.same(after._replace(kept=broken.kept), broken)
        assert int(after.kept) == 1


# -- wrong calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"damping": kf.Damping(0.1)}, "`damping` of EKFAC .* 'exact'.* 'factored'"),
        ({"damping": kf.Damping(0.1, "plain")}, "`damping` of EKFAC .* 'plain'"),
        ({"scales": "mean"}, "`scales` of EKFAC must be one of average, batch, gradient, got 'mean'"),
        ({"moved": None}, "`moved` of EKFAC must be one of transport, reset, measure, got None"),
        ({"fisher": "forward"}, "`fisher` of EKFAC .* got 'forward'"),
        ({"fisher": "mc", "scales": "gradient"}, "`fisher` of EKFAC with scales='gradient' must be 'empirical', got 'mc'"),
    ],
)
def test_a_setting_out_of_range_is_refused(options, pattern):
    with pytest.raises(ValueError, match=pattern):
        kf.EKFAC(**options)


def test_a_basis_must_be_one():
    for method in (kf.EKFAC, kf.KFAC):
        with pytest.raises(TypeError, match=r"`basis` must be kfcore\.Eigh\(\) or kfcore\.Tracked\(\), got 'tracked'"):
            method(basis="tracked")


def test_the_verbs_name_what_is_wrong(rng, captures):
    method, layer = kf.EKFAC(), kf.Linear(3, 2)
    x, g = captures(rng)
    state = method.init(layer, x)
    for given_ in ((x, None), (None, g)):
        with pytest.raises(ValueError, match="`inputs` and `output_grads` must be given together"):
            method.reduce(layer, state, *given_)
        with pytest.raises(ValueError, match="`inputs` and `output_grads` must be given together"):
            method.reduce_all([Use(layer, x, g), Use(layer, *given_)], state)
    both = method.reduce(layer, state, x, g)
    with pytest.raises(ValueError, match="`statistics` lack the scales"):
        method.observe(state, both._replace(scales=None))
    with pytest.raises(ValueError, match="`statistics` lack the inputs"):
        method.observe(state, both._replace(inputs=None))
    with pytest.raises(ValueError, match=r"`grad` must have shape \[..., 2, 4\], got \(2, 3\)"):
        method.precondition(layer, state, np.ones((2, 3)))


@pytest.mark.parametrize("stack", [(), (2,)])
def test_scales_are_level_in_the_null_space_of_a_factor_and_nowhere_else(rng, stack):
    layer, method = kf.Linear(5, 4, None, stack=stack), kf.EKFAC(damping=0.1)
    a, g = rng.normal(size=(*stack, 9, 1, 5)), rng.normal(size=(*stack, 9, 1, 4))
    a[..., 3:], g[..., 2:] = 0.0, 0.0
    state = method.init(layer, a, stack)
    state = method.refresh(layer, method.observe(state, method.reduce(layer, state, a, g)))
    null_in, null_out = (v < 1e-12 for v in (state.solver.input_values, state.solver.output_values))
    assert (null_in.sum(-1) == 2).all()
    assert (null_out.sum(-1) == 2).all()
    # examples that reach into what the factors have not seen
    x, v = rng.normal(size=(*stack, 7, 1, 5)), rng.normal(size=(*stack, 7, 1, 4))
    found = method.reduce(layer, state, x, v).scales
    for k in np.ndindex(*stack):
        left, right = state.solver.output_basis[k], state.solver.input_basis[k]
        raw = sum((left.T @ np.outer(dy, row) @ right) ** 2 for dy, row in zip(v[k][:, 0], x[k][:, 0], strict=True))
        desired = raw.copy()
        desired[:, null_in[k]] = desired[:, null_in[k]].mean(axis=1, keepdims=True)
        desired[null_out[k]] = desired[null_out[k]].mean(axis=0, keepdims=True)
        np.testing.assert_allclose(found[k], desired, rtol=1e-12)
        assert np.abs(desired / raw - 1.0).max() > 0.1
        np.testing.assert_allclose(found[k].sum(), raw.sum(), rtol=1e-12)


def test_another_basis_of_a_null_space_is_as_good(rng):
    layer, method = kf.Linear(5, 4, None), kf.EKFAC(damping=0.1)
    a, g = rng.normal(size=(9, 1, 5)), rng.normal(size=(9, 1, 4))
    a[..., 3:] = 0.0
    state = method.init(layer, a)
    state = method.refresh(layer, method.observe(state, method.reduce(layer, state, a, g)))
    null = state.solver.input_values < 1e-12
    basis = state.solver.input_basis.copy()
    basis[:, null] = basis[:, null] @ np.linalg.qr(rng.normal(size=(2, 2)))[0]
    other = state._replace(solver=state.solver._replace(input_basis=basis))
    x, v = rng.normal(size=(7, 1, 5)), rng.normal(size=(7, 1, 4))
    one, two = (method.dense(layer, method.observe(s, method.reduce(layer, s, x, v))) for s in (state, other))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-12 * np.abs(one).max())
