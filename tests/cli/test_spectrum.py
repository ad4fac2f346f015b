"""``kfcore spectrum`` on files of the library."""

import numpy as np
import pytest
from typer.testing import CliRunner

import kfcore as kf
from kfcore_cli.app import app
from kfcore_cli.spectrum.command import spectra


def _show(*arguments):
    return CliRunner().invoke(app, ["spectrum", *map(str, arguments)], env={"COLUMNS": "140"})


def checkpoint(path, method):
    rng = np.random.default_rng(3)
    optimizer = kf.Optimizer(method, {"fc": kf.Linear(6, 3), "table": kf.Embedding(5, 2)}, learning_rate=0.1)
    params = {
        "fc": {"weight": rng.normal(size=(3, 6)), "bias": np.zeros(3)},
        "table": {"weight": rng.normal(size=(5, 2))},
        "scale": np.ones(2),
    }
    x, g = rng.normal(size=(4, 6)), rng.normal(size=(4, 3))
    ids, dy = rng.integers(0, 5, size=(4, 1)), rng.normal(size=(4, 1, 2))
    grads = {
        "fc": {"weight": g.T @ x, "bias": g.sum(0)},
        "table": {"weight": rng.normal(size=(5, 2))},
        "scale": rng.normal(size=2),
    }
    state = optimizer.init(params)
    _, state = optimizer.step(params, grads, {"fc": (x, g), "table": (ids, dy)}, state)
    kf.save(path, optimizer.bind(params), state)
    return state.curvature.blocks


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()], ids=["kfac", "ekfac"])
def test_a_table_and_a_picture_of_a_checkpoint(tmp_path, method):
    blocks = checkpoint(tmp_path / "run.safetensors", method)
    result = _show(tmp_path / "run.safetensors", "--out", tmp_path / "new" / "spectrum.png")
    assert result.exit_code == 0, result.output
    assert "3 blocks after 1 steps" in result.output
    assert (tmp_path / "new" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    top = np.linalg.eigvalsh(blocks["fc"].average.values[0])[-1]
    (line,) = [line for line in result.output.splitlines() if line.split()[:3] == ["fc", method.name, "A"]]
    assert f"{top:.2e}" in line
    # four examples span at most four of seven directions
    assert line.split()[-1] == "3"
    assert sum(line.split()[:3] == ["fc", "ekfac", "S"] for line in result.output.splitlines()) == (method.name == "ekfac")


def test_the_spectra_are_sorted_and_of_everything(tmp_path):
    blocks = checkpoint(tmp_path / "run.safetensors", kf.EKFAC())
    found = {(one.block, one.part): one.values for one in spectra(*kf.checkpoint.read(tmp_path / "run.safetensors"))}
    assert set(found) == {("fc", "A"), ("fc", "G"), ("fc", "S"), ("table", "A"), ("table", "G"), ("table", "S"), ("scale", "h")}
    np.testing.assert_allclose(found["table", "A"], np.sort(blocks["table"].average.values[0])[::-1], rtol=1e-14)
    np.testing.assert_allclose(found["fc", "S"], np.sort(blocks["fc"].scales.values[0].ravel())[::-1], rtol=1e-14)
    assert all((np.diff(values) <= 0).all() for values in found.values())


def test_factors_of_rank_one_have_one_eigenvalue_that_is_not_zero(tmp_path):
    for method, parts in ((kf.MAC(first="rank-one"), "A"), (kf.Eva(), "AG")):
        blocks = checkpoint(tmp_path / "run.safetensors", method)
        found = {(one.block, one.part): one.values for one in spectra(*kf.checkpoint.read(tmp_path / "run.safetensors"))}
        for name in ("fc", "table"):
            for part, mean in zip(parts, blocks[name].average.values, strict=False):
                np.testing.assert_allclose(found.pop((name, part)), [mean @ mean], rtol=1e-13)
        assert set(found) == ({("scale", "h")} if method.name == "eva" else set()), "a plain gradient has no spectrum"


def test_what_is_no_checkpoint_is_one_line_and_code_two(tmp_path):
    (tmp_path / "other").write_bytes(b"no file of ours")
    for path in (tmp_path / "other", tmp_path / "none"):
        result = _show(path)
        assert result.exit_code == 2
        assert "kfcore spectrum: `path`" in result.output
        assert "Traceback" not in result.output
