"""Every Python block of every page runs, top to bottom, in one namespace a page."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONAL = ("torch", "jax", "optax", "array_api_strict")


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_the_blocks_of_a_page_run(page, monkeypatch, tmp_path):
    source = "\n".join(blocks(page))
    wanted = [m for m in OPTIONAL if re.search(rf"^\s*(import .*\b{m}|from {m})\b", source, re.MULTILINE)]
    missing = [m for m in wanted if not importlib.util.find_spec(m)]
    if missing:
        pytest.skip(f"{page.name} needs {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    exec(compile(source, str(page), "exec"), {"__name__": "__page__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
