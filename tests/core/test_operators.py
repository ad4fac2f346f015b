"""The operator view of a block against its dense matrix, for every method."""

import numpy as np
import pytest

import kfcore as kf
from kfcore.scales import example_gradients
from kfcore.statistics import Use

LAYERS = {
    "linear": kf.Linear(4, 3),
    "column": kf.Bias(5),
    "table": kf.Embedding(6, 3),
    "norm": kf.Norm(4),
    "full norm": kf.Norm(3, block="full"),
}
METHODS = {
    "factored": kf.KFAC(damping=0.3),
    "plain": kf.KFAC(damping=kf.Damping(0.3, kind="plain")),
    "exact": kf.KFAC(damping=kf.Damping(0.3, kind="exact")),
    "tracked": kf.KFAC(damping=0.3, basis=kf.Tracked(smallest=1)),
    "forward": kf.KFAC(damping=0.3, fisher="forward"),
    "ekfac": kf.EKFAC(damping=0.3),
}


def captured(rng, layer, n=6, s=2):
    width = layer.features if isinstance(layer, kf.Embedding | kf.Norm) else layer.shape[0]
    grads = rng.normal(size=(n, s, width))
    if isinstance(layer, kf.Embedding):
        return rng.integers(0, layer.num, size=(n, s)), grads
    seen = width if isinstance(layer, kf.Norm) else 1 if isinstance(layer, kf.Bias) else layer.in_features
    return rng.normal(size=(n, s, seen)), grads


def trained(rng, method, layer):
    state = method.init(layer, np.zeros(()))
    for _ in range(3):
        state = method.observe(state, method.reduce(layer, state, *captured(rng, layer)))
        state = method.refresh(layer, state)
    return state


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_everything_is_that_of_the_dense_matrix(rng, method, layer):
    state = trained(rng, method, layer)
    operator = method.operator(layer, state)
    dense = operator.dense()
    np.testing.assert_allclose(dense, method.dense(layer, state), atol=1e-12)
    np.testing.assert_allclose(operator.trace(), np.trace(dense), rtol=1e-12)
    np.testing.assert_allclose(operator.frobenius(), np.linalg.norm(dense), rtol=1e-12)
    np.testing.assert_allclose(operator.eigenvalues(), np.linalg.eigvalsh(dense), atol=1e-12)
    x = rng.normal(size=(2, *layer.shape))
    flat = x.reshape(2, -1)
    np.testing.assert_allclose(operator.matvec(x).reshape(2, -1), flat @ dense, atol=1e-12)
    certain = operator.damped(0.7)
    matrix = dense + 0.7 * np.eye(len(dense))
    np.testing.assert_allclose(certain.dense(), matrix, atol=1e-12)
    np.testing.assert_allclose(certain.logdet(), np.linalg.slogdet(matrix)[1], rtol=1e-12)
    np.testing.assert_allclose(certain.solve(x).reshape(2, -1), np.linalg.solve(matrix, flat.T).T, atol=1e-12)
    noise = np.eye(len(dense)).reshape(-1, *layer.shape)
    for inverse, covariance in ((True, np.linalg.inv(matrix)), (False, matrix)):
        root = certain.sample(noise, inverse=inverse).reshape(len(dense), -1)
        np.testing.assert_allclose(root.T @ root, covariance, atol=1e-11)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_damped_operator_is_what_a_step_solves_with(rng, method, layer):
    state = trained(rng, method, layer)
    grad = rng.normal(size=layer.shape)
    operator = method.operator(layer, state, damped=True)
    np.testing.assert_allclose(operator.solve(grad), method.precondition(layer, state, grad), atol=1e-10)
    assert np.abs(operator.damped(0.01).solve(grad) - method.precondition(layer, state, grad)).max() > 1e-6


def test_a_diagonal_method_has_its_entries_for_eigenvalues(rng):
    method, grad = kf.Diagonal(damping=0.2, power=0.5), rng.normal(size=(2, 3))
    block = kf.blocks_of(kf.KFAC(), {}, {"w": (2, 3)}, method)["w"]
    state = method.init(block.layer, grad)
    state = method.refresh(block.layer, method.observe(state, method.reduce(block.layer, state, grad=grad, terms=4.0)))
    np.testing.assert_allclose(method.operator(block.layer, state).dense(), np.diag(4.0 * grad.ravel() ** 2), rtol=1e-14)
    solved = method.operator(block.layer, state, damped=True).solve(grad.reshape(6, 1))
    np.testing.assert_allclose(solved.reshape(2, 3), method.precondition(block.layer, state, grad), rtol=1e-14)


@pytest.mark.parametrize("dense", [True, False])
def test_the_distance_from_the_exact_block(rng, monkeypatch, dense):
    monkeypatch.setattr("kfcore.operators.DENSE", 4096 if dense else 0)
    operator = kf.KFAC().operator(LAYERS["linear"], trained(rng, kf.KFAC(), LAYERS["linear"]))
    gradients = rng.normal(size=(7, 3, 5))
    exact = np.einsum("pi,pj->ij", gradients.reshape(7, -1), gradients.reshape(7, -1)) / 3.0
    expected = np.linalg.norm(exact - operator.dense()) / np.linalg.norm(exact)
    assert operator.distance(gradients, 3.0) == pytest.approx(expected, rel=1e-10)
    values, basis = np.linalg.eigh(operator.dense())
    roots = (basis * np.sqrt(np.maximum(values, 0.0))).T.reshape(-1, 3, 5)
    assert operator.distance(roots, 1.0) < (1e-12 if dense else 1e-7)


def test_gradients_of_single_examples_are_sums_over_positions_and_uses(rng):
    layer, mask = kf.Linear(4, 3), rng.random((6, 2)) < 0.7
    x, z = rng.normal(size=(2, 6, 2, 4))
    g, h = rng.normal(size=(2, 3, 6, 2, 3))
    one = np.ones((6, 2, 1))
    expected = np.einsum("knso,nsi,ns->knoi", g, np.concatenate([x, one], -1), mask) + np.einsum(
        "knso,nsi->knoi", h, np.concatenate([z, one], -1)
    )
    uses = [Use(layer, x, g.reshape(18, 2, 3)[:18], None), Use(kf.Linear(4, 3, sharing="reduce"), z, h.reshape(18, 2, 3))]
    plain = example_gradients(np, uses, np.float64)
    uses[0] = uses[0]._replace(output_grads=g.reshape(18, 2, 3) * np.tile(mask, (3, 1))[..., None])
    np.testing.assert_allclose(example_gradients(np, uses, np.float64), expected, atol=1e-13)
    assert np.abs(plain - expected).max() > 1e-2
    ids, rows = rng.integers(0, 5, size=(6, 2)), rng.normal(size=(6, 2, 3))
    table = example_gradients(np, [Use(kf.Embedding(5, 3), ids, rows)], np.float64)
    np.testing.assert_allclose(table, np.einsum("nso,nsi->noi", rows, np.eye(5)[ids])[None], atol=1e-13)


def test_what_does_not_fit_is_refused(rng):
    operator = kf.BlockOperator(None, None, np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"`x` must have shape \[..., 2, 3\], got \(3, 2\)"):
        operator.matvec(np.ones((3, 2)))
    with pytest.raises(ValueError, match="`damping` must be zero or more"):
        operator.damped(-1.0)
