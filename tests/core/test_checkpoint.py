"""A state goes through a file unchanged, or not at all."""

import json
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import kfcore as kf
from kfcore.checkpoint import translated

METHODS = {
    "factored": lambda: kf.KFAC(damping=0.1, refresh_every=3),
    "exact": lambda: kf.KFAC(damping=kf.Damping(0.1, "exact"), refresh_every=3),
    "forward": lambda: kf.KFAC(damping=0.1, fisher="forward"),
}


def optimizer_of(model, method="factored", layout="oi", sizes=(4, 5, 3), bias="joint", **options):
    return kf.Optimizer(METHODS[method](), model.layers(layout, sizes, bias), **({"learning_rate": 0.05, "clip": 1e-2} | options))


@pytest.fixture
def saved(model, tmp_path):
    """A file after five steps, with everything that made it."""
    rng = np.random.default_rng(2)
    optimizer, params = optimizer_of(model), model.params(rng)
    params, state = model.run(optimizer, params, optimizer.init(params), [model.batch(rng) for _ in range(5)])
    path = tmp_path / "state.safetensors"
    kf.save(path, optimizer.bind(params), state)
    return path, optimizer, params, state


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_run(rng, model, tmp_path, method, momentum, dtype, bias):
    batches = [tuple(z.astype(dtype) for z in model.batch(rng)) for _ in range(27)]
    optimizer, params = optimizer_of(model, method, momentum=momentum, bias=bias), model.params(rng, dtype=dtype)
    params, state = model.run(optimizer, params, optimizer.init(params), batches[:7])
    kf.save(tmp_path / "state", optimizer.bind(params), state)
    other = optimizer_of(model, method, momentum=momentum, bias=bias)
    loaded = kf.load(tmp_path / "state", other.bind(params), other.init(params))
    assert type(loaded) is type(state)
    assert model.same(loaded, state)
    assert [x.dtype for x in model.flat(loaded)] == [x.dtype for x in model.flat(state)]
    assert model.same(model.run(other, params, loaded, batches[7:]), model.run(optimizer, params, state, batches[7:]))


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize(("here", "there"), [("oi", "io"), ("io", "oi")])
def test_models_of_either_layout_read_each_others_file(ref, rng, model, tmp_path, here, there, bias):
    batches = [model.batch(rng) for _ in range(25)]
    optimizer = optimizer_of(model, layout=here, bias=bias)
    params = model.params(rng, here)
    params, state = model.run(optimizer, params, optimizer.init(params), batches[:5], here)
    kf.save(tmp_path / "state", optimizer.bind(params), state)

    def turned(tree):
        return {n: v | {"weight": np.ascontiguousarray(v["weight"].T)} if isinstance(v, dict) else v for n, v in tree.items()}

    other = optimizer_of(model, layout=there, bias=bias)
    loaded = kf.load(tmp_path / "state", other.bind(turned(params)), other.init(turned(params)))
    end, _ = model.run(optimizer, params, state, batches[5:], here)
    other_end, _ = model.run(other, turned(params), loaded, batches[5:], there)
    assert model.same(turned(other_end), end, 1e-12)
    fresh_end, _ = model.run(other, turned(params), other.init(turned(params)), batches[5:], there)
    assert not model.same(turned(fresh_end), end, 1e-4)


@pytest.mark.parametrize("layout", ["oi", "io"])
def test_the_order_of_arrays_in_memory_does_not_matter(rng, model, tmp_path, layout):
    optimizer, params = optimizer_of(model, layout=layout), model.params(rng, layout)
    params, state = model.run(optimizer, params, optimizer.init(params), [model.batch(rng)], layout)

    def ordered(order):
        momentum = {n: np.array(x, order=order) for n, x in state.step.momentum.items()}
        return state._replace(step=state.step._replace(momentum=momentum))

    for order in "CF":
        kf.save(tmp_path / "state", optimizer.bind(params), ordered(order))
        assert model.same(kf.load(tmp_path / "state", optimizer.bind(params), state), state)


def test_a_file_holds_weights_out_by_in_and_a_readable_header(saved):
    path, _, _, state = saved
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["kfcore"])
        names = set(file.keys())
        momentum = file.get_tensor("momentum/fc1.weight")
    assert header["steps"] == 5
    assert header["blocks"]["fc1"]["method"] == "kfac"
    assert header["blocks"]["fc1"]["shape"] == [5, 5]
    assert np.array_equal(momentum, state.step.momentum["fc1.weight"])
    assert "curvature/fc1/average/values/0" in names


def refused(model, path, optimizer, params, like, pattern):
    before = [x.copy() for x in model.flat(like)]
    with pytest.raises(kf.CheckpointError, match=pattern) as caught:
        kf.load(path, optimizer.bind(params), like)
    assert len(str(caught.value)) > 20
    assert model.same(before, like)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.2, 0.5, 0.9, -9, -1])
def test_a_truncated_file_is_refused(model, saved, keep):
    path, optimizer, params, state = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    refused(model, path, optimizer, params, state, "`path` is truncated or not a safetensors file")


@pytest.mark.parametrize("size", [0, 3, 8, 64, 5000])
def test_random_bytes_are_refused(model, saved, rng, size):
    path, optimizer, params, state = saved
    path.write_bytes(rng.bytes(size))
    refused(model, path, optimizer, params, state, "`path`")


def test_files_of_others_are_refused(model, saved, tmp_path):
    path, optimizer, params, state = saved
    save_file({"weight": np.ones(3)}, path)
    refused(model, path, optimizer, params, state, "not one that kfcore wrote")
    save_file({"weight": np.ones(3)}, path, metadata={"kfcore": "{"})
    refused(model, path, optimizer, params, state, "damaged")
    refused(model, tmp_path / "nowhere", optimizer, params, state, "`path`.*nowhere")
    refused(model, tmp_path, optimizer, params, state, "`path`")


def test_a_file_of_a_dtype_that_numpy_lacks_is_refused(model, saved):
    path, optimizer, params, state = saved
    header = json.dumps({"weight": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(model, path, optimizer, params, state, "`path`|kfcore")


def rewritten(path, change):
    """The file again, its arrays and header changed."""
    with safe_open(path, framework="numpy") as file:
        arrays, header = {n: file.get_tensor(n) for n in list(file.keys())}, json.loads(file.metadata()["kfcore"])
    arrays, header = change(arrays, header)
    save_file(arrays, path, metadata={"kfcore": json.dumps(header)})


def without(name):
    return lambda a, h: (a, {k: v for k, v in h.items() if k != name})


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda a, h: ({n: x for n, x in a.items() if n != "skipped"}, h), "lacks skipped"),
        (lambda a, h: ({n: x for n, x in a.items() if "fc1/solver" not in n}, h), "lacks curvature/fc1/solver"),
        (lambda a, h: (a | {"more": np.ones(2)}, h), "unknown more"),
        (lambda a, h: (a | {"skipped": np.ones(())}, h), "skipped.*dtype.*float64"),
        (lambda a, h: (a | {"momentum/scale": np.ones(2)}, h), r"momentum/scale.*\(5,\).*\(2,\)"),
        (lambda a, h: (a, h | {"format": 99}), "format 99"),
        (without("format"), "format"),
        (without("steps"), "steps"),
        (without("observed"), "observed"),
        (without("blocks"), "blocks"),
        (lambda a, h: (a, h | {"steps": "many"}), "steps"),
        (lambda a, h: (a, h | {"steps": None}), "steps"),
        (lambda a, h: (a, [1, 2]), "header"),
        (lambda a, h: (a, h | {"blocks": {n: {} for n in h["blocks"]}}), "block"),
        (lambda a, h: (a, h | {"blocks": 3}), "block"),
    ],
)
def test_a_file_with_parts_missing_or_damaged_is_refused(model, saved, change, pattern):
    path, optimizer, params, state = saved
    rewritten(path, change)
    refused(model, path, optimizer, params, state, f"(?s){pattern}")


@pytest.mark.parametrize(
    ("other", "sizes", "rename", "pattern"),
    [
        ({"sizes": (4, 6, 3)}, (4, 6, 3), None, r"'fc1'.*\(6, 5\).*\(5, 5\)"),
        ({"method": "exact"}, None, None, "lacks.*solver"),
        ({"method": "forward"}, None, None, "unknown"),
        ({"bias": "separate"}, None, None, "fc1.weight"),
        ({"momentum": 0.0}, None, None, "momentum"),
        ({}, None, "fc3", "fc3"),
    ],
)
def test_a_file_of_another_model_or_method_is_refused(model, saved, rng, other, sizes, rename, pattern):
    path = saved[0]
    optimizer, params = optimizer_of(model, **other), model.params(rng, sizes=sizes or (4, 5, 3))
    if rename:
        layers, params[rename] = model.layers(), params.pop("fc2")
        layers[rename] = layers.pop("fc2")
        optimizer = kf.Optimizer(kf.KFAC(), layers)
    refused(model, path, optimizer, params, optimizer.init(params), pattern)


@pytest.mark.parametrize("broken", ["serialize", "fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(model, saved, monkeypatch, broken):
    path, optimizer, params, state = saved
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr("kfcore.checkpoint.serialize" if broken == "serialize" else f"os.{broken}", fail)
    with pytest.raises(OSError, match="disk is full"):
        kf.save(path, optimizer.bind(params), state._replace(curvature=state.curvature._replace(steps=np.int32(99))))
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_a_saved_file_has_the_permissions_of_any_other_new_file(saved):
    path = saved[0]
    other = path.with_name("other")
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize(
    ("name", "expected"),
    [("enc.0.fc.weight", "first.fc.weight"), ("enc.1.fc.weight", "encoder.1.fc.weight"), ("enc", "encoder"), ("encoder.0", "encoder.0")],
)
def test_a_name_stands_for_all_below_it_and_the_longest_counts(name, expected):
    assert translated(name, {"enc": "encoder", "enc.0": "first"}) == expected
