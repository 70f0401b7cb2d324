"""The figures of aligned models and of stated probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reproduce import RESULTS, run


def figures(path: Path) -> dict[str, Any]:
    return {figure["name"]: figure for figure in json.loads(path.read_text(encoding="utf-8"))["figures"]}


def test_temperatures_of_aligned_models(data_folder: Path, tmp_path: Path) -> None:
    result = run("aligned.py", "-o", str(tmp_path / "aligned.json"), data=str(data_folder))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 of 8 as published" in result.stdout
    assert figures(tmp_path / "aligned.json") == figures(RESULTS / "aligned.json")


def test_stated_probabilities(data_folder: Path, tmp_path: Path) -> None:
    result = run("stated.py", "-o", str(tmp_path / "stated.json"), data=str(data_folder))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MISMATCH" not in result.stdout
    found, committed = figures(tmp_path / "stated.json"), figures(RESULTS / "stated.json")
    assert list(found) == list(committed)
    # of optimisers, whose last digits are the machine's
    same = [name for name in found if "T of" not in name and "eps" not in name]
    different = [name for name in same if found[name] != committed[name]]
    assert not different


@pytest.mark.parametrize("script", ["aligned.py", "stated.py"])
def test_missing_data(script: str) -> None:
    result = run(script, data=None)
    assert result.returncode == 2
    assert "PYQE_DATA is not set" in result.stderr
