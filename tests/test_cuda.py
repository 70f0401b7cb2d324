"""The CUDA kernels: on an emulator of CUDA's threads where there is no GPU, and what nvcc says of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``_cuda`` built for the CPU."""
    pybind11 = pytest.importorskip("pybind11")
    folder, build = tmp_path_factory.mktemp("emulator"), ROOT / "build" / "cuda-emulator"
    options = {
        "PYQE_CUDA_EMULATED": "ON",
        "PYQE_WERROR": "ON",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder,
        "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defined], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], check=True)
    return folder


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_conformance(emulator: Path, order: str) -> None:
    """A kernel that lacks a barrier gives other results when its threads run in reverse."""
    environment = {**os.environ, "PYQE_CUDA_EMULATOR": str(emulator), "PYQE_EMULATOR_ORDER": order}
    suite = [sys.executable, "-m", "pytest", "tests/test_conformance.py", "-k", "cuda", "-x", "--no-header"]
    result = subprocess.run(suite, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
