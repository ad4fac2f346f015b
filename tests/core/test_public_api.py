"""The names the package promises, and what importing it does not do."""

import inspect
import subprocess
import sys
import types

import pytest

import kfcore as kf

PUBLIC = [name for name in kf.__all__ if name != "__version__"]


def test_all_lists_exactly_the_public_names():
    names = {n for n, v in vars(kf).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)}
    assert set(kf.__all__) == names | {"__version__"}
    assert len(kf.__all__) == len(set(kf.__all__))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    value = getattr(kf, name)
    documented = [value]
    if inspect.isclass(value):
        documented += [m for n, m in vars(value).items() if not n.startswith("_") and (inspect.isfunction(m) or isinstance(m, property))]
    for thing in documented:
        doc = inspect.getdoc(thing)
        assert doc, thing
        assert len(doc) > 8, thing
        # the signature that dataclasses write in place of a text is none
        assert not doc.startswith(f"{name}("), thing


def test_public_things_say_that_they_belong_to_the_package():
    assert all(getattr(kf, name).__module__.startswith("kfcore") for name in PUBLIC)


def test_importing_imports_no_framework():
    code = "import sys, kfcore; print([m for m in ('torch', 'jax', 'cupy', 'tensorflow', 'thinc') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_one():
    assert kf.__version__.count(".") == 2
