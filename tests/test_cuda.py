"""The CUDA kernels: on an emulator of CUDA's threads where there is no GPU, and what nvcc says of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_conformance(emulator: Path, order: str) -> None:
    """A kernel that lacks a barrier gives other results when its threads run in reverse."""
    environment = {**os.environ, "PYQE_CUDA_EMULATOR": str(emulator), "PYQE_EMULATOR_ORDER": order}
    tests = ["tests/test_conformance.py", "tests/test_negatives.py"]
    suite = [sys.executable, "-m", "pytest", *tests, "-k", "cuda", "-x", "--no-header"]
    result = subprocess.run(suite, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
