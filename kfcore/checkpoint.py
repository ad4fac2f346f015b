"""State <-> named arrays and a header: one safetensors file that every framework reads, written at once or not at all.

Layout of a file: tensors named ``curvature/BLOCK/PATH``, ``momentum/PARAMETER`` (weights as ``[out, in]``, those of convolutions as
``[out, in, *kernel]``, whatever the model's layout) and ``control/NAME`` (of a quadratic model), and in the metadata one JSON text under
``"kfcore"`` with the format, the counters, and kind, shape and configuration of every block. Reading executes nothing.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from kfcore._array import Array, from_numpy, to_numpy
from kfcore._version import __version__
from kfcore.optimizer import ModelOptimizer, OptimizerState
from kfcore.preconditioner import PreconditionerState
from kfcore.stepsize import StepState

FORMAT = 1
COUNTERS = ("steps", "observed", "refreshed")


class CheckpointError(ValueError):
    """A file that cannot be loaded into this optimizer, with the reason; nothing was changed."""


def save(path: str | os.PathLike[str], optimizer: ModelOptimizer, state: OptimizerState) -> None:
    """Write ``state`` to ``path``: to a temporary file beside it, which then takes its place.

    Raises
    ------
    OSError
        If the file cannot be written; an older file at ``path`` is then untouched.
    """
    write(path, *to_arrays(optimizer, state))


def load(
    path: str | os.PathLike[str], optimizer: ModelOptimizer, like: OptimizerState, *, names: Mapping[str, str] | None = None
) -> OptimizerState:
    """The state in a file, as arrays of the library, device and dtypes of ``like``, a state of ``optimizer``.

    Parameters
    ----------
    names
        Where the file's model has other names: by layer, block or parameter of ``optimizer`` what it is called there, such as
        ``{"Dense_0": "layers.0"}``. A name stands for all that begin with it and a dot.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, not a checkpoint of this library, or of another model or method.
    """
    return from_arrays(optimizer, like, *renamed(*read(path), names or {}))


def write(path: str | os.PathLike[str], arrays: Mapping[str, numpy.ndarray], header: Mapping[str, Any]) -> None:
    """Write what :func:`to_arrays` gave, with any further entries in the header."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(serialize(dict(arrays), metadata={"kfcore": json.dumps(header)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> tuple[dict[str, numpy.ndarray], Any]:
    """The arrays and the header in a file, not yet checked against an optimizer; see :func:`load` for the errors."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"`path` must be a checkpoint file, got {str(path)!r}, where there is none")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"`path` is truncated or not a safetensors file of arrays: {error}") from error
    if "kfcore" not in metadata:
        raise CheckpointError("`path` is a safetensors file, but not one that kfcore wrote: its metadata has no 'kfcore'")
    try:
        return arrays, json.loads(metadata["kfcore"])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"`path` has a damaged kfcore header: {error}") from error


def to_arrays(optimizer: ModelOptimizer, state: OptimizerState) -> tuple[dict[str, numpy.ndarray], dict[str, Any]]:
    """A state as named NumPy arrays and a header of JSON types."""
    return {name: to_numpy(x) for name, x in named(optimizer, state).items()}, header_of(optimizer, state)


def header_of(optimizer: ModelOptimizer, state: OptimizerState) -> dict[str, Any]:
    """The header alone: format, version, counters, and kind, shape and configuration of every block."""
    blocks = {
        name: {"method": block.method.name, "shape": list(block.layer.shape), "config": block.method.config()}
        for name, block in optimizer.preconditioner.blocks.items()
    }
    return {
        "format": FORMAT,
        "version": __version__,
        **{name: int(to_numpy(getattr(state.curvature, name))) for name in COUNTERS},
        "blocks": blocks,
    }


def from_arrays(
    optimizer: ModelOptimizer, like: OptimizerState, arrays: Mapping[str, numpy.ndarray], header: Mapping[str, Any]
) -> OptimizerState:
    """Inverse of :func:`to_arrays`, after everything has been checked against ``like``."""
    _check_header(header)
    expected, found = optimizer.preconditioner.blocks, header["blocks"]
    _same_names("blocks", expected, found)
    for name, block in expected.items():
        here, there = [block.method.name, *block.layer.shape], [found[name]["method"], *found[name]["shape"]]
        if here != there:
            raise CheckpointError(f"block {name!r} is {here[0]} {tuple(here[1:])} here but {there[0]} {tuple(there[1:])} in the checkpoint")
    loaded = _fitted(named(optimizer, like), arrays)
    blocks = {name: _rebuild(block, f"curvature/{name}", loaded) for name, block in like.curvature.blocks.items()}
    momentum = _layouts(optimizer, {n: loaded[f"momentum/{n}"] for n in like.step.momentum}, back=True)
    counters = [from_numpy(numpy.asarray(header[k], dtype=numpy.int32), like.curvature.steps) for k in COUNTERS]
    curvature = PreconditionerState(counters[0], counters[1], counters[2], blocks)
    control = _rebuild(like.step.control, "control", loaded)
    return OptimizerState(curvature, StepState(momentum, loaded["skipped"], control))


def save_state(path: str | os.PathLike[str], state: Any, kind: str) -> None:
    """Write any nest of tuples of arrays, such as a :class:`kfcore.pinn.State`, as :func:`save` does; ``kind`` is what it is one of."""
    arrays: dict[str, Array] = {}
    _collect(state, "state", arrays)
    write(path, {name: to_numpy(x) for name, x in arrays.items()}, {"format": FORMAT, "version": __version__, "kind": kind})


def load_state(path: str | os.PathLike[str], like: Any, kind: str) -> Any:
    """What :func:`save_state` wrote, as arrays of the library, device and dtypes of ``like``, a nest of the same form.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, not a checkpoint of this library, of another kind or of another form.
    """
    arrays, header = read(path)
    if not isinstance(header, Mapping) or header.get("format") != FORMAT or header.get("kind") != kind:
        came = header.get("kind") if isinstance(header, Mapping) else header
        raise CheckpointError(f"`path` must be a checkpoint of kind {kind!r} in format {FORMAT}, got {came!r}")
    targets: dict[str, Array] = {}
    _collect(like, "state", targets)
    return _rebuild(like, "state", _fitted(targets, arrays))


def translated(name: str, names: Mapping[str, str]) -> str:
    """``name`` by ``names``, of which an entry stands for all that begin with it and a dot; the longest that fits counts."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        head = ".".join(parts[:k])
        if head in names:
            return ".".join([names[head], *parts[k:]])
    return name


def renamed(arrays: Mapping[str, Any], header: Any, names: Mapping[str, str]) -> tuple[dict[str, Any], Any]:
    """What :func:`read` gave with the names of another model: ``names`` leads from these to those in the file."""
    if len(set(names.values())) < len(names):
        raise ValueError(f"`names` must lead to different names in the file, got {dict(names)}")
    here = {there: name for name, there in names.items()}

    def key_of(key: str) -> str:
        kind, _, rest = key.partition("/")
        name, slash, field = rest.partition("/")
        return f"{kind}/{translated(name, here)}{slash}{field}" if rest and kind != "control" else key

    _check_header(header)
    blocks = {translated(name, here): block for name, block in header["blocks"].items()}
    return {key_of(key): x for key, x in arrays.items()}, {**header, "blocks": blocks}


def named(optimizer: ModelOptimizer, state: OptimizerState) -> dict[str, Array]:
    """The arrays of a state by name, in the library they are in; the counters are in the header."""
    named: dict[str, Array] = {"skipped": state.step.skipped}
    for name, block in state.curvature.blocks.items():
        _collect(block, f"curvature/{name}", named)
    _collect(state.step.control, "control", named)
    return named | {f"momentum/{n}": x for n, x in _layouts(optimizer, state.step.momentum).items()}


def _layouts(optimizer: ModelOptimizer, params: Mapping[str, Array], *, back: bool = False) -> dict[str, Array]:
    """Weights turned from the model's layout to ``[out, in]`` (a kernel's to ``[out, in, *kernel]``), or back."""
    turned = dict(params)
    for name, layer in optimizer.model.layers.items():
        weight = optimizer.model.roles(name).get("weight")
        if weight in turned:
            turned[weight] = layer.from_oi(turned[weight]) if back else layer.to_oi(turned[weight])
    return turned


def _fitted(targets: Mapping[str, Array], arrays: Mapping[str, numpy.ndarray]) -> dict[str, Array]:
    """``arrays`` beside ``targets`` of the same names, shapes and kinds."""
    _same_names("arrays", targets, arrays)
    loaded = {}
    for name, target in targets.items():
        value = arrays[name]
        if tuple(value.shape) != tuple(target.shape):
            raise CheckpointError(f"array {name!r} must have shape {tuple(target.shape)}, got {tuple(value.shape)}")
        kind = to_numpy(target).dtype
        if value.dtype.kind != kind.kind:
            raise CheckpointError(f"array {name!r} must have a dtype like {kind}, got {value.dtype}")
        loaded[name] = from_numpy(value.astype(kind), target)
    return loaded


def _collect(tree: Any, path: str, named: dict[str, Array]) -> None:
    if tree is None:
        return
    if isinstance(tree, tuple):
        for key, value in _items(tree):
            _collect(value, f"{path}/{key}", named)
    else:
        named[path] = tree


def _rebuild(tree: Any, path: str, named: Mapping[str, Array]) -> Any:
    if tree is None:
        return None
    if isinstance(tree, tuple):
        parts = [_rebuild(value, f"{path}/{key}", named) for key, value in _items(tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return named[path]


def _items(tree: Any) -> list[tuple[Any, Any]]:
    keys = tree._fields if hasattr(tree, "_fields") else range(len(tree))
    return list(zip(keys, tree, strict=True))


def _check_header(header: Any) -> None:
    if not isinstance(header, Mapping) or header.get("format") != FORMAT:
        came = header.get("format") if isinstance(header, Mapping) else header
        raise CheckpointError(f"the header of the checkpoint has format {came!r}; this version of kfcore reads format {FORMAT}")
    for name in COUNTERS:
        if not isinstance(header.get(name), int):
            raise CheckpointError(f"the header of the checkpoint has no number {name!r}, but {header.get(name)!r}")
    blocks = header.get("blocks")
    if not isinstance(blocks, Mapping) or not all(isinstance(b, Mapping) and {"method", "shape"} <= set(b) for b in blocks.values()):
        raise CheckpointError("the header of the checkpoint does not describe its blocks by method and shape")


def _same_names(what: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        parts = [f"lacks {', '.join(missing[:5])}"] * bool(missing) + [f"has the unknown {', '.join(unknown[:5])}"] * bool(unknown)
        raise CheckpointError(f"the checkpoint is of another model: among its {what} it {' and '.join(parts)}")
