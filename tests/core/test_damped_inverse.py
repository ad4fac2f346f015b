"""Applied inverses against a dense solve with the assembled damped matrix, for every kind and norm."""

import numpy as np
import pytest

import kfcore as kf

NORMS = {
    "mean": lambda m: np.trace(m) / len(m),
    "trace": np.trace,
    "frobenius": np.linalg.norm,
    "spectral": lambda m: np.linalg.eigvalsh(m)[-1],
    "median": lambda m: np.median(np.linalg.eigvalsh(m)),
}
CASES = [("exact", "mean"), ("plain", "mean"), *[("factored", norm) for norm in NORMS]]
LAYERS = [
    kf.Linear(3, 2),
    kf.Linear(3, 2, None),
    kf.Linear(2, 4, sharing="reduce"),
    kf.Linear(3, 1),
    kf.Linear(1, 3, None),
    kf.Linear(1, 1, None),
    kf.Bias(3),
]


def assembled(a, g, rule, value):
    """The damped matrix from its definition, ``G (x) A`` row-major."""
    if rule.relative:
        value = value * np.trace(a) * np.trace(g) / (len(a) * len(g))
    eye_a, eye_g = np.eye(len(a)), np.eye(len(g))
    if rule.kind == "plain":
        return np.kron(g + value * eye_g, a + value * eye_a)
    if rule.kind == "exact" or 1 in (len(a), len(g)):
        return np.kron(g, a) + value * np.kron(eye_g, eye_a)
    pi = np.sqrt(NORMS[rule.norm](a) / NORMS[rule.norm](g))
    return np.kron(g + np.sqrt(value) / pi * eye_g, a + pi * np.sqrt(value) * eye_a)


def factors(layer, x, g):
    """``A`` and ``G`` of a layer from the convention written down in the documentation."""
    n, s = x.shape[:2]
    if isinstance(layer, kf.Bias):
        total = g.sum(axis=1)
        return np.ones((1, 1)), total.T @ total / n
    if layer.sharing == "reduce":
        x, g, s = x.mean(axis=1, keepdims=True), g.sum(axis=1, keepdims=True), 1
    if layer.bias:
        x = np.concatenate([x, np.ones((n, s, 1))], axis=-1)
    return np.einsum("nsi,nsj->ij", x, x) / (n * s), np.einsum("nsi,nsj->ij", g, g) / n


def features(layer):
    return (layer.features, layer.features) if isinstance(layer, kf.Bias) else (layer.in_features, layer.out_features)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{type(layer).__name__}{layer.shape[0]}x{layer.shape[1]}")
@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_preconditioning_solves_with_the_damped_matrix(ref, rng, captures, fitted, kind, norm, layer, relative):
    inp, out = features(layer)
    x, g = captures(rng, 16, 3, inp, out)
    method = kf.KFAC(damping=kf.Damping(0.02, kind, norm, relative))
    state = fitted(method, layer, x, g)
    a, b = factors(layer, x, g)
    assert ref.distance(method.dense(layer, state), np.kron(b, a)) < 1e-12
    grad = rng.normal(size=layer.shape)
    want = np.linalg.solve(assembled(a, b, method.rule, 0.02), grad.reshape(-1)).reshape(layer.shape)
    assert ref.distance(method.precondition(layer, state, grad), want) < 1e-10
    assert ref.distance(method.precondition(layer, fitted(method, layer, 1.01 * x, 1.01 * g), grad), want) > 1e-4
    assert ref.distance(method.precondition(layer, fitted(method, layer, x, g, 0.0202), grad), want) > 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_the_factored_inverse_does_not_depend_on_how_scale_is_shared(ref, rng, captures, fitted, norm):
    x, g = captures(rng, 16)
    layer, grad = kf.Linear(3, 2, None), rng.normal(size=(2, 3))
    method = kf.KFAC(damping=kf.Damping(0.05, "factored", norm))
    direction, moved = (method.precondition(layer, fitted(method, layer, x / c, c * g), grad) for c in (1.0, 7.3))
    assert ref.distance(moved, direction) < 1e-10
    assert ref.distance(method.precondition(layer, fitted(method, layer, x / 7.3, 1.01 * 7.3 * g), grad), direction) > 1e-3


def test_the_plain_inverse_depends_on_how_scale_is_shared(ref, rng, captures, fitted):
    x, g = captures(rng, 16)
    layer, grad = kf.Linear(3, 2, None), rng.normal(size=(2, 3))
    method = kf.KFAC(damping=kf.Damping(0.05, "plain"))
    direction, moved = (method.precondition(layer, fitted(method, layer, x / c, c * g), grad) for c in (1.0, 7.3))
    assert ref.distance(moved, direction) > 1e-2


@pytest.mark.parametrize("kind", ["exact", "factored", "plain"])
@pytest.mark.parametrize("k", [1e-3, 40.0])
def test_relative_damping_makes_directions_inverse_to_the_scale_of_the_curvature(ref, rng, captures, fitted, kind, k):
    x, g = captures(rng, 16)
    layer, grad = kf.Linear(3, 2), rng.normal(size=(2, 4))
    rule = kf.Damping(0.1, "exact" if kind == "plain" else kind, relative=True)
    method = kf.KFAC(damping=rule)
    one, scaled = (method.precondition(layer, fitted(method, layer, x, np.sqrt(c) * g), grad) for c in (1.0, k))
    assert ref.distance(k * scaled, one) < 1e-10
    assert ref.distance(1.01 * k * scaled, one) > 1e-3


def test_the_order_of_the_factors_is_row_major(ref, rng, captures, fitted):
    x, g = captures(rng, 16)
    layer, method = kf.Linear(3, 2, None), kf.KFAC()
    dense = method.dense(layer, fitted(method, layer, x, g))
    a, b = factors(layer, x, g)
    step = rng.normal(size=(2, 3))
    assert ref.distance((dense @ step.reshape(-1)).reshape(2, 3), b @ step @ a) < 1e-12
    assert ref.distance(np.kron(a, b), dense) > 1e-2


@pytest.mark.parametrize("norm", NORMS)
def test_no_norm_of_a_rank_deficient_factor_is_rounding_noise(ref, rng, fitted, norm):
    """Three examples of eight features: the median eigenvalue is zero up to rounding, and must not decide the direction."""
    x, g = rng.normal(size=(3, 1, 8)), rng.normal(size=(3, 1, 2))
    layer, grad = kf.Linear(8, 2, None), np.einsum("nso,nsi->oi", g, x) / 3
    method = kf.KFAC(damping=kf.Damping(0.05, "factored", norm))
    direction = method.precondition(layer, fitted(method, layer, x, g), grad)
    assert 0.01 < np.linalg.norm(direction) / np.linalg.norm(grad) < 1000
    for _ in range(5):
        turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
        turned = method.precondition(layer, fitted(method, layer, x @ turn, g), grad @ turn) @ turn.T
        assert ref.distance(turned, direction) < 1e-8


def test_before_the_first_refresh_the_direction_is_the_gradient(rng):
    grad = rng.normal(size=(2, 4))
    for kind in ("exact", "factored", "plain"):
        for fisher in ("empirical", "forward"):
            method, layer = kf.KFAC(damping=kf.Damping(0.1, kind), fisher=fisher), kf.Linear(3, 2)
            assert np.allclose(method.precondition(layer, method.init(layer, grad), grad), grad, rtol=1e-15)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("relative", [False, True])
def test_the_diagonal_divides_by_terms_times_the_squared_gradient(ref, rng, power, relative):
    grad = rng.normal(size=5)
    method = kf.Diagonal(damping=kf.Damping(0.1, relative=relative), power=power)
    optimizer = kf.ModelOptimizer(kf.KFAC(), kf.Model({}, {"p": (5,)}), kf.StepSize(learning_rate=1.0, momentum=0.0), fallback=method)
    updates, _ = optimizer.update({"p": grad}, {"p": grad}, optimizer.init({"p": grad}), None, terms=7.0)
    h = 7.0 * grad**2
    want = grad / (h + 0.1 * (h.mean() if relative else 1.0)) ** power
    assert ref.distance(-updates["p"], want) < 1e-12
    assert ref.distance(-updates["p"], grad / (1.01 * h + 0.1 * (h.mean() if relative else 1.0)) ** power) > 1e-4 or power == 0
