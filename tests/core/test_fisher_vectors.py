"""The vectors of a loss have its output Hessian as their second moment, and its terms are counted right."""

import numpy as np
import pytest

import kfcore as kf


def log_softmax(f):
    return f - f.max(axis=-1, keepdims=True) - np.log(np.exp(f - f.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True))


def cross_entropy(f, y, smoothing=0.0, ignore=None, axis=-1):
    """Sum over the terms, written out from its definition."""
    log_p = log_softmax(np.moveaxis(f, axis, -1))
    classes = log_p.shape[-1]
    wanted = (1.0 - smoothing) * np.eye(classes)[np.where(y == ignore, 0, y)] + smoothing / classes
    return -(wanted * log_p).sum(axis=-1)[y != ignore if ignore is not None else ...].sum()


CROSS_ENTROPIES = [
    ("plain", (4, 3), -1, {}),
    ("axis one of two", (4, 3), 1, {}),
    ("tokens", (3, 4, 3), -1, {}),
    ("channels first", (3, 4, 2, 2), 1, {}),
    ("smoothed", (3, 4, 3), -1, {"label_smoothing": 0.2}),
    ("ignoring", (3, 4, 3), -1, {"ignore_index": -100}),
    ("ignoring a class, channels first, smoothed", (3, 4, 5), 1, {"ignore_index": 2, "label_smoothing": 0.1}),
]


def cases():
    """Name, description of the loss, the sum of its terms as a function of the outputs, outputs, targets, terms."""
    rng = np.random.default_rng(3)
    made = []
    for name, shape, axis, options in CROSS_ENTROPIES:
        f = 2.0 * rng.normal(size=shape)
        y = rng.integers(0, shape[axis], np.moveaxis(f, axis, -1).shape[:-1])
        ignore = options.get("ignore_index")
        if ignore is not None:
            y.flat[::3] = ignore
        terms = y.size if ignore is None else (y != ignore).sum()
        loss = kf.CrossEntropy(axis=axis, **options)

        def total(f, y=y, options=options, ignore=ignore, axis=axis):
            return cross_entropy(f, y, options.get("label_smoothing", 0.0), ignore, axis)

        made.append((name, loss, total, f, y, terms))
    for shape in ((4, 3), (2, 3, 2)):
        f, y = rng.normal(size=shape), rng.normal(size=shape)
        made.append((f"squared {shape}", kf.MSE(), lambda f, y=y: ((f - y) ** 2).sum(), f, y, f.size))
        y = rng.integers(0, 2, shape)
        made.append((f"binary {shape}", kf.BCEWithLogits(), lambda f, y=y: (np.logaddexp(0.0, f) - y * f).sum(), f, y, f.size))
    return made


CASES = pytest.mark.parametrize(("name", "loss", "total", "f", "y", "terms"), cases(), ids=[c[0] for c in cases()])


def hessian(total, f, h=1e-3):
    """Central differences of fourth order for the second derivatives of ``total``."""
    weights = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
    size = f.size
    result = np.zeros((size, size))
    units = np.eye(size).reshape(size, *f.shape)
    for i in range(size):
        for j in range(i + 1):
            for a, wa in weights.items():
                for b, wb in weights.items():
                    result[i, j] += wa * wb * total(f + h * (a * units[i] + b * units[j])) / h**2
            result[j, i] = result[i, j]
    return result


def per_example(matrix, n):
    """Only the blocks of an example with itself."""
    size = len(matrix) // n
    return matrix * np.kron(np.eye(n), np.ones((size, size)))


def second_moment(vectors, n):
    """``sum_v v v^T``, of each example with itself, as one matrix over all outputs."""
    return per_example(sum(np.outer(v.reshape(-1), v.reshape(-1)) for v in vectors), n)


@CASES
def test_exact_vectors_have_the_hessian_of_the_summed_terms(ref, name, loss, total, f, y, terms):
    vectors = list(kf.fisher_vectors("exact", loss, f, y))
    want = hessian(total, f)
    assert ref.distance(want, per_example(want, len(f))) < 1e-7
    assert all(v.shape == f.shape for v in vectors)
    assert ref.distance(second_moment(vectors, len(f)), want) < 1e-6
    assert ref.distance(second_moment([1.01 * v for v in vectors], len(f)), want) > 1e-2


@CASES
def test_drawn_vectors_have_the_hessian_on_average_and_no_mean(ref, name, loss, total, f, y, terms, rng, drawer):
    copies = 20_000
    wide, labels = (np.repeat(z[:, None], copies, axis=1).reshape(-1, *z.shape[1:]) for z in (f, y))
    (v,) = kf.fisher_vectors("mc", loss, wide, labels, draw=drawer(rng))
    v = v.reshape(len(f), copies, -1)
    want = hessian(total, f)
    moments = np.einsum("nki,nkj->nij", v, v) / copies
    got = np.zeros_like(want)
    size = v.shape[-1]
    for n in range(len(f)):
        got[n * size : (n + 1) * size, n * size : (n + 1) * size] = moments[n]
    assert ref.distance(got, want) < 0.03
    assert ref.distance(1.06 * got, want) > 0.03
    assert np.abs(v.mean(axis=1)).max() < 6 * np.sqrt(max(1.0, np.diag(want).max()) / copies)


@CASES
def test_terms_are_counted(name, loss, total, f, y, terms):
    assert float(loss.terms(f, y)) == terms


@pytest.mark.parametrize("axis", [-1, 1])
def test_ignored_positions_give_zero_and_only_they(rng, drawer, axis):
    loss = kf.CrossEntropy(axis=axis, ignore_index=-1)
    f = rng.normal(size=(3, 4, 5))
    y = np.zeros(np.moveaxis(f, axis, -1).shape[:-1], dtype=int)
    y[0, 1] = y[2, 3] = -1
    for kind in ("exact", "mc"):
        vectors = [np.moveaxis(v, axis, -1) for v in kf.fisher_vectors(kind, loss, f, y, draw=drawer(rng), samples=3)]
        seen = sum(np.abs(v).sum(axis=-1) for v in vectors)
        assert np.array_equal(seen == 0, y == -1)


def test_each_exact_vector_touches_one_term_of_an_example(rng):
    for loss in (kf.CrossEntropy(), kf.MSE(), kf.BCEWithLogits()):
        for v in loss.sqrt_hessian(rng.normal(size=(3, 4, 5))):
            assert ((np.abs(v).sum(axis=-1) > 0).sum(axis=1) <= 1).all()


def test_labels_at_the_ends_of_the_interval_are_classes_of_positive_probability():
    f = np.array([[-2000.0, 0.0, 1.0, -2000.0]])
    for u in (0.0, np.nextafter(1.0, 0.0)):
        (v,) = kf.fisher_vectors("mc", kf.CrossEntropy(), f, draw=lambda kind, shape, u=u: np.full(shape, u))
        assert v[0, 0] == 0
        assert v[0, 3] == 0
        assert v.min() < 0


def test_extreme_logits_give_finite_vectors(rng, drawer):
    f = np.array([[1e4, -1e4, 0.0], [700.0, 710.0, -800.0]])
    for loss in (kf.CrossEntropy(), kf.BCEWithLogits(), kf.MSE()):
        for kind in ("exact", "mc"):
            assert all(np.isfinite(v).all() for v in kf.fisher_vectors(kind, loss, f, draw=drawer(rng)))


def test_half_precision_outputs_give_vectors_of_single_precision(rng, drawer):
    f = rng.normal(size=(2, 3)).astype(np.float16)
    for loss in (kf.CrossEntropy(), kf.BCEWithLogits(), kf.MSE()):
        for kind in ("exact", "mc"):
            assert all(v.dtype == np.float32 for v in kf.fisher_vectors(kind, loss, f, draw=drawer(rng)))


def test_a_custom_loss_is_asked_for_everything(ref, rng, drawer):
    f = rng.normal(size=(4, 3))
    poisson = kf.CustomLoss(
        count_terms=lambda f, y: float(f.size),
        hessian_columns=lambda f, y: (np.exp(0.5 * f) * np.eye(3)[c] for c in range(3)),
        draw_gradient=lambda f, y, draw: np.exp(f) - np.exp(f) * (1 + np.exp(-0.5 * f) * draw("normal", f.shape)),
    )
    assert poisson.terms(f) == 12
    want = hessian(lambda f: (np.exp(f) - 2 * f).sum(), f)
    assert ref.distance(second_moment(kf.fisher_vectors("exact", poisson, f), 4), want) < 1e-6
    assert len(list(kf.fisher_vectors("mc", poisson, f, draw=drawer(rng), samples=5))) == 5
    bare = kf.CustomLoss(count_terms=lambda f, y: 1.0)
    with pytest.raises(ValueError, match="`hessian_columns`"):
        list(kf.fisher_vectors("exact", bare, f))
    with pytest.raises(ValueError, match="`draw_gradient`"):
        list(kf.fisher_vectors("mc", bare, f, draw=drawer(rng)))


def test_wrong_calls_name_the_parameter(rng):
    f = rng.normal(size=(2, 3))
    with pytest.raises(ValueError, match=r"`fisher`.*'mc' or 'exact'.*'empirical'"):
        list(kf.fisher_vectors("empirical", kf.MSE(), f))
    with pytest.raises(ValueError, match="`draw`"):
        list(kf.fisher_vectors("mc", kf.MSE(), f))
    with pytest.raises(ValueError, match="`targets`"):
        kf.CrossEntropy(ignore_index=0).terms(f)
    with pytest.raises(ValueError, match="`outputs`"):
        list(kf.CrossEntropy().sqrt_hessian(f[0]))
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="`label_smoothing`"):
            kf.CrossEntropy(label_smoothing=wrong)
