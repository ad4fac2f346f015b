"""The conformance kit: hand it a library, and it says whether the methods compute there what they promise.

It imports no framework; you pass yours in.

Examples
--------
>>> import kfcore.testing as kt
>>> results = kt.run(kt.numpy_backend())
>>> {name: result for name, result in results.items() if result != "ok"}
{}

"""

from kfcore.testing.backend import Backend, array_api_backend, assert_close, numpy_backend, read_only_numpy_backend
from kfcore.testing.conformance import Conformance, run, tests
from kfcore.testing.names import names_missing, names_used
from kfcore.testing.pinn import check_cotangents
from kfcore.testing.taylor import check_activation

__all__ = [
    "Backend",
    "Conformance",
    "array_api_backend",
    "assert_close",
    "check_activation",
    "check_cotangents",
    "names_missing",
    "names_used",
    "numpy_backend",
    "read_only_numpy_backend",
    "run",
    "tests",
]
