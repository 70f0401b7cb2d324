"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import pyqe

MODULES = [
    module.name
    for module in pkgutil.walk_packages(pyqe.__path__, "pyqe.")
    if not module.name.endswith(("__main__", "._C"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
