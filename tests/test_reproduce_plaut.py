"""The published figures of Plaut et al. 2024, and what the scripts of that kind share."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "reproduce"


def run(script: str, *arguments: str, data: str | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYQE_DATA"}
    environment |= {"PYQE_DATA": data} if data is not None else {}
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def shared() -> ModuleType:
    """``data.py``."""
    spec = importlib.util.spec_from_file_location("reproduce_data", FOLDER / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_figure_of_the_table(data_folder: Path, tmp_path: Path) -> None:
    result = run("plaut.py", "-o", str(tmp_path / "plaut.json"), data=str(data_folder))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MISMATCH" not in result.stdout
    stored = json.loads((tmp_path / "plaut.json").read_text())
    assert sum(bool(figure["published"]) for figure in stored["figures"]) == 117
    committed = json.loads((FOLDER.parent / "results" / "reproduce" / "plaut.json").read_text())
    assert stored == committed


@pytest.mark.parametrize("data", [None, "nowhere"])
def test_missing_data(tmp_path: Path, data: str | None) -> None:
    result = run("plaut.py", data=None if data is None else str(tmp_path / data))
    assert result.returncode == 2
    assert "plaut_msp/zero_shot.npz" in result.stderr
    assert "PYQE_DATA" in result.stderr


def test_figures_beside_published_ones(shared: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctest.testmod(shared).failed == 0
    result = shared.Reproduction("a title", {"bins": 10})
    result.printed("same", "-.5", -0.46)
    result.printed("other", "1.50", 1.494)
    result.printed("none", "1", float("nan"))
    result.within("near", 2.0, 2.01, 0.02)
    result.bar("bar", "3 ms", "under 4 ms", True)
    result.note("note", "7")
    assert [figure.holds for figure in result.figures] == [True, False, False, True, True, True]
    assert shared.main(lambda: result, "", ["-o", str(tmp_path / "figures.json")]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[:2] == ["a title", "  bins: 10"]
    assert printed.count("MISMATCH") == 2
    assert printed.endswith("3 of 5 as published\n")
    assert json.loads((tmp_path / "figures.json").read_text())["figures"][1]["computed"] == "1.49"
    good = shared.Reproduction("a title")
    good.printed("same", ".5", 0.5)
    assert shared.main(lambda: good, "", []) == 0
