"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The real language model in float32, and its tokenizer."""
    from pyqe.cli.options import load_model

    try:
        return load_model("smollm2", "float32", "cpu")
    except FileNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_head(smollm2: tuple[Any, Any]) -> Any:
    """An untrained low-rank head of the real language model."""
    import pyqe

    return pyqe.SigmoidHead.from_lm_head(*smollm2, kind="low_rank", rank=4)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the CUDA kernels, ``_cuda``, built for the CPU."""
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
