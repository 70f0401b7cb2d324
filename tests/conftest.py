"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(trylast=True)  # of what -k has left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one share of the tests where PYQE_TEST_SHARE ("0/8" to "7/8") says which: processes divide them so."""
    if "PYQE_TEST_SHARE" not in os.environ:
        return
    number, count = map(int, os.environ["PYQE_TEST_SHARE"].split("/"))
    shares: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        shares[zlib.crc32(item.nodeid.encode()) % count == number].append(item)
    config.hook.pytest_deselected(items=shares[False])
    items[:] = shares[True]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads only get into each other's way in models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of real data, which PYQE_DATA names; see docs/metrics.md."""
    folder = os.environ.get("PYQE_DATA")
    if not folder:
        pytest.skip("PYQE_DATA is not set: the folder of real data")
    return Path(folder)


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


def _program(name: str) -> str:
    """Path of a program, which may have come with a package of this Python."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return shutil.which(name, path=os.pathsep.join(folders)) or name


def _build_cuda(name: str, folder: Path, **options: str) -> Path:
    """The folder, with the CUDA kernels, ``_cuda``, in it; objects are kept in ``build/``."""
    pybind11 = pytest.importorskip("pybind11")
    build, cmake = ROOT / "build" / name, _program("cmake")
    configuration = {
        **options,
        "PYQE_WERROR": "ON",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder,
        "CMAKE_MAKE_PROGRAM": _program("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defined = [f"-D{key}={value}" for key, value in configuration.items()]
    subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *defined], check=True, capture_output=True)
    subprocess.run([cmake, "--build", build, "--target", "_cuda"], check=True)
    return folder


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the CUDA kernels built for the CPU."""
    return _build_cuda("cuda-emulator", tmp_path_factory.mktemp("emulator"), PYQE_CUDA_EMULATED="ON")


def _built_with_package() -> Path | None:
    """The CUDA kernels of the package, if the tests' own would be the same."""
    sources = [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    built = next((ROOT / "pyqe").glob("_cuda*.so"), None)
    alike = os.environ.get("PYQE_WERROR") == "1" and "PYQE_CUDA_ARCHS" not in os.environ
    return built if built is not None and alike and built.stat().st_mtime > newest else None


@pytest.fixture(scope="session")
def nvcc_module() -> Path:
    """The CUDA kernels as nvcc compiles them, warnings being errors."""
    built = _built_with_package()
    if built is not None:
        return built
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here")
    folder = ROOT / "build" / "cuda" / "module"
    _build_cuda("cuda", folder, PYQE_CUDA="ON", PYQE_CUDA_ARCHS="80-real;90a-real")
    return next(folder.glob("_cuda*.so"))
