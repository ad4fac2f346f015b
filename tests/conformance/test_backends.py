"""Every backend against plain NumPy."""

import pytest

from kfcore.testing import Conformance

# array-api-compat caches namespaces, which dynamo traces through; its results do not depend on the cache
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")


class TestBackend(Conformance):
    @pytest.fixture(autouse=True)
    def _backend(self, backend):
        self.backend = backend
