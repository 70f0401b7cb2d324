"""The README's examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import code_blocks

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2_head: Any) -> Path:
    """Where the demo has been run, as far as the examples can tell."""
    path = tmp_path_factory.mktemp("readme")
    smollm2_head.save_pretrained(path / "demo-output" / "head")
    return path


def test_the_two_commands_come_first() -> None:
    first = code_blocks(README, "sh")[0]
    assert re.findall(r"^make \w+", first, flags=re.MULTILINE) == ["make demo", "make test"]


@pytest.mark.lm
def test_python_examples(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {}
    for block in code_blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert "' mat'" in capsys.readouterr().out
    assert (folder / "my-head" / "model.safetensors").is_file()


@pytest.mark.lm
def test_command_line_examples(folder: Path) -> None:
    script = "set -e\n" + code_blocks(README, "sh")[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "kitchen" in (folder / "report.html").read_text()
