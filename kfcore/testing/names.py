"""Which names of the array API the sources of the library use, for checks that need no device."""

from __future__ import annotations

import ast
from pathlib import Path

import kfcore
from kfcore._array import Namespace


def names_used(package: Path | None = None) -> list[str]:
    """Names such as ``"sum"`` and ``"linalg.eigh"`` read from a namespace anywhere in the sources of a package (this one by default)."""
    root = Path(kfcore.__file__).parent if package is None else package
    found: set[str] = set()
    for file in sorted(root.rglob("*.py")):
        if "testing" in file.relative_to(root).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and (name := _name(node)):
                found.add(name)
    return sorted(found - {"linalg", "__name__"})


def names_missing(xp: Namespace) -> list[str]:
    """Those of :func:`names_used` that ``xp`` lacks."""
    return [name for name in names_used() if not _has(xp, name)]


def _name(node: ast.Attribute) -> str | None:
    owner = node.value
    if isinstance(owner, ast.Attribute) and owner.attr == "linalg" and _is_namespace(owner.value):
        return f"linalg.{node.attr}"
    return node.attr if _is_namespace(owner) else None


def _is_namespace(node: ast.expr) -> bool:
    if isinstance(node, ast.Name):
        return node.id == "xp"
    if isinstance(node, ast.Attribute):
        return node.attr in ("xp", "_xp")
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "namespace"


def _has(xp: Namespace, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(xp, part):
            return False
        xp = getattr(xp, part)
    return True
