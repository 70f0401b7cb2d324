"""The examples in docstrings and on the pages of docs run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from pages import code_blocks

import pyqe

MODULES = [
    module.name
    for module in pkgutil.walk_packages(pyqe.__path__, "pyqe.")
    if not module.name.endswith(("__main__", "._C"))
]

PAGES = [
    page
    for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    if code_blocks(page.read_text(encoding="utf-8"), "python")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_pages_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in code_blocks(page.read_text(encoding="utf-8"), "python"):
        exec(compile(block, page.name, "exec"), namespace)
