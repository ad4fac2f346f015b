"""All conformance tests in one class, and a way to run them without a test runner."""

from __future__ import annotations

import traceback
from unittest import SkipTest

from kfcore.testing.backend import Backend
from kfcore.testing.eigenbases import EigenbasisTests
from kfcore.testing.losses import LossTests
from kfcore.testing.means import MeanTests
from kfcore.testing.optimizers import OptimizerTests
from kfcore.testing.pinn import PinnTests
from kfcore.testing.primitives import PrimitiveTests
from kfcore.testing.taylor import TaylorTests
from kfcore.testing.verbs import MethodTests


class Conformance(PrimitiveTests, MethodTests, MeanTests, EigenbasisTests, LossTests, OptimizerTests, TaylorTests, PinnTests):
    """Everything the library promises of a backend, each test compared with plain NumPy in float64.

    Subclass it in a test module and give the class (or, in a fixture, the instance) a ``backend``; pytest and unittest collect the
    methods ``test_*``. Or call :func:`run`.
    """


def tests() -> list[str]:
    """Names of the tests."""
    return [name for name in dir(Conformance) if name.startswith("test_")]


def run(backend: Backend) -> dict[str, str]:
    """Run all tests on a backend: by test, ``"ok"``, ``"skipped: why"`` or the error's last line and place."""
    suite = Conformance()
    suite.backend = backend
    results = {}
    for name in tests():
        try:
            getattr(suite, name)()
            results[name] = "ok"
        except SkipTest as reason:
            results[name] = f"skipped: {reason}"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            results[name] = f"{type(error).__name__}: {error} ({place.name}, line {place.lineno})"
    return results
