"""Runs the scripts in benchmarks/reproduce."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "reproduce"
RESULTS = FOLDER.parent / "results" / "reproduce"


def run(script: str, *arguments: str, data: str | None) -> subprocess.CompletedProcess[str]:
    """A script, with ``data`` as PYQE_DATA, or without one."""
    environment = {key: value for key, value in os.environ.items() if key != "PYQE_DATA"}
    environment |= {"PYQE_DATA": data} if data is not None else {}
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
