"""The examples in docstrings and on the pages of docs run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
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
    and (module.name != "pyqe.integrations.lm_polygraph" or importlib.util.find_spec("lm_polygraph"))
]

LM_PAGES = ("choice.md", "training.md")  # need the real language model
PAGES = [
    pytest.param(page, marks=[pytest.mark.lm] if page.name in LM_PAGES else [], id=page.name)
    for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    if code_blocks(page.read_text(encoding="utf-8"), "python")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_pages_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if page.name in LM_PAGES:
        request.getfixturevalue("smollm2")  # skips where it is not installed
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in code_blocks(page.read_text(encoding="utf-8"), "python"):
        exec(compile(block, page.name, "exec"), namespace)
