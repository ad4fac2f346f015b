"""What the self-checks of all adapters compare, on rows made by hand."""

import numpy as np
import pytest

import kfcore as kf
from kfcore.checking import compare, exactly, examples_of, tolerance_of
from kfcore.statistics import Use

K, N, S, OUT, IN = 3, 2, 2, 3, 4
RNG = np.random.default_rng(0)


def rows(*stack, n=N, s=S):
    """Inputs, and output gradients of all vectors ``[*stack, K, n, s, out]``."""
    return RNG.normal(size=(*stack, n, s, IN)), RNG.normal(size=(*stack, K, n, s, OUT))


def gradients(a, g):
    """``[*stack, K N, out, in]``."""
    each = np.einsum("...knso,...nsi->...knoi", g, a)
    return each.reshape(*each.shape[:-4], -1, OUT, IN)


def captured(layer, a, g):
    """All vectors behind each other, as one array."""
    lead = len(layer.stack)
    return {"fc": [Use(layer, a, g.reshape(*g.shape[:lead], -1, *g.shape[lead + 2 :]))]}


def check(layer, seen, exact, *, method=None, dependent=lambda: False, left_out=None):
    method = exactly(method or kf.KFAC())
    options = {"examples": N, "terms": 5.0, "tolerance": 1e-8, "left_out": left_out or {}, "dependent": dependent}
    model = kf.Model({"fc": layer})
    return compare(model, kf.blocks_of(method, model.layers), seen, exact, **options)


@pytest.mark.parametrize("stack", [(), (2, 2)])
@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC(scales="gradient")], ids=["kfac", "ekfac"])
def test_the_distance_is_that_of_the_matrices(stack, method):
    """The farthest of stacked blocks; with vectors that come one by one as with all at once."""
    layer, (a, g) = kf.Linear(IN, OUT, None, stack=stack), rows(*stack)
    exact = gradients(a, g)
    whole = check(layer, [captured(layer, a, g)], {"fc": exact}, method=method)["fc"]
    each = check(layer, [captured(layer, a, x[..., None, :, :, :]) for x in np.moveaxis(g, -4, 0)], {"fc": exact}, method=method)["fc"]
    assert whole.uses == each.uses == "2 x 2"
    assert whole.gradient < 1e-14
    assert whole.distance == pytest.approx(each.distance, rel=1e-10)
    if method.name == "ekfac":
        return
    found = []
    for x, y, of_one in zip(a.reshape(-1, N * S, IN), g.reshape(-1, K * N * S, OUT), exact.reshape(-1, K * N, OUT * IN), strict=True):
        f = of_one.T @ of_one / 5.0
        found.append(np.linalg.norm(np.kron(y.T @ y / 5.0, x.T @ x / (N * S)) - f) / np.linalg.norm(f))
    assert whole.distance == pytest.approx(max(found), rel=1e-10)
    assert len(set(found)) == len(found)


def test_several_entries_of_an_example_add_up():
    """Frames, say, behind each other: their gradients can be told apart from others, but not the block."""
    layer, (a, g) = kf.Linear(IN, OUT, None), rows(n=2 * N)
    each = np.einsum("knso,nsi->knoi", g, a).reshape(K, N, 2, OUT, IN)
    row = check(layer, [captured(layer, a, g)], {"fc": each.sum(2).reshape(-1, OUT, IN)})["fc"]
    assert (row.uses, row.note, row.gradient < 1e-14) == ("4 x 2", "", True)
    assert np.isnan(row.distance)
    row = check(layer, [captured(layer, a, g)], {"fc": np.roll(each, 1, axis=2)[:, ::-1].sum(2).reshape(-1, OUT, IN)})["fc"]
    assert row.wrong
    assert row.note.endswith("examples are mixed")


def test_examples_that_depend_on_each_other_are_asked_for_once_and_late():
    layer, (a, g), asked = kf.Linear(IN, OUT, None), rows(), []

    def dependent():
        asked.append(True)
        return True

    exact = gradients(a, g)
    assert not check(layer, [captured(layer, a, g)], {"fc": exact}, dependent=dependent)["fc"].note
    assert not asked
    swapped = exact.reshape(K, N, OUT, IN)[:, ::-1].reshape(exact.shape)
    found = check(layer, [captured(layer, a, g)], {"fc": swapped}, dependent=dependent)
    assert asked == [True]
    assert found["fc"].note.startswith("examples depend on each other")
    assert not found.wrong()
    assert check(layer, [captured(layer, a, g)], {"fc": 1.01 * exact}, dependent=dependent).wrong()


def test_the_table_comes_before_the_error(capsys):
    layer, (a, g) = kf.Linear(IN, OUT, None), rows()
    found = check(layer, [captured(layer, a, g)], {"fc": gradients(a, 2.0 * g)}, left_out={"other": "a bare parameter"})
    with pytest.raises(AssertionError, match=r"^fc: gradients from what was captured are 5\.0e-01 off autodiff's"):
        found.settled(show=True)
    assert capsys.readouterr().out.splitlines()[-1] == "other: no block (a bare parameter)"
    with pytest.raises(AssertionError):
        found.settled(show=False)
    assert capsys.readouterr().out == ""
    right = check(layer, [captured(layer, a, g)], {"fc": gradients(a, g)})
    assert right.settled(show=False) is right
    assert check(layer, [], {}, left_out={"fc": "moved to the fallback"}).rows == ()


def test_the_number_of_examples_is_that_of_most_layers_which_divides_the_outputs():
    def of(*sizes):
        return {str(k): [Use(None, np.zeros((n, 1, IN)), np.zeros((K * n, 1, OUT)))] for k, n in enumerate(sizes)}

    assert examples_of(of(2, 2, 6), (6, 3)) == 2
    assert examples_of(of(2, 6), (6, 3)) == 6
    assert examples_of(of(4, 4, 3), (6, 3)) == 3
    assert examples_of(of(2, 2), (6, 3), 3) == 3
    assert examples_of({}, (6, 3)) == 1
    with pytest.raises(ValueError, match=r"`outputs` must have the 4 examples of the layers on their first axis, got \(6, 3\)"):
        examples_of(of(4), (6, 3))
    assert [tolerance_of(np, np.dtype(d)) for d in ("float64", "float32", "float16")] == [1e-6, 1e-2, 0.1]
