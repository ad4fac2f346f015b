"""Problems, methods and backends by name: the modules of three packages, of which only those asked for are imported."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Literal

from kfcore_cli.errors import UsageError

Kind = Literal["problems", "methods", "backends"]


def names(kind: Kind) -> tuple[str, ...]:
    """Names of all there is, with the hyphens of the command line; imports none of it."""
    package = importlib.import_module(f"kfcore_cli.race.{kind}")
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(package.__path__)))


def check(kind: Kind, name: str) -> str:
    """``name``, or the error that lists what is allowed."""
    if name not in names(kind):
        raise UsageError(f"--{_option(kind)} must name {', '.join(names(kind))}, got {name!r}")
    return name


def split(kind: Kind, text: str) -> tuple[str, ...]:
    """Names separated by commas as a tuple of known ones, each once."""
    parts = tuple(dict.fromkeys(part for part in (p.strip() for p in text.split(",")) if part))
    if not parts:
        raise UsageError(f"--{_option(kind)} must name at least one of {', '.join(names(kind))}, got nothing")
    return tuple(check(kind, part) for part in parts)


def load(kind: Kind, name: str) -> Any:
    """The object that the module of this name exposes as ``problem``, ``method`` or ``backend``."""
    module = importlib.import_module(f"kfcore_cli.race.{kind}.{check(kind, name).replace('-', '_')}")
    return getattr(module, kind.removesuffix("s"))


def _option(kind: Kind) -> str:
    return "problem" if kind == "problems" else kind
