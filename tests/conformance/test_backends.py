"""Every backend against plain NumPy."""

import pytest

from kfcore.testing import Conformance


class TestBackend(Conformance):
    @pytest.fixture(autouse=True)
    def _backend(self, backend):
        self.backend = backend
