"""Builds the extension modules `pyqe._C` and `pyqe._cuda` with CMake; everything else is in pyproject.toml.

The build needs a C++17 compiler, and nothing of torch: the module takes raw pointers. Environment variables:

* `CXX`: the compiler, as usual.
* `PYQE_WERROR=1`: compiler warnings are errors.
* `PYQE_CUDA`: `on` builds the CUDA kernels (`pyqe._cuda`) and fails without nvcc, `off` does not, `auto` (the default)
  builds them where nvcc is found; a GPU is not needed.
* `PYQE_CUDA_ARCHS`: what to build them for, as CMake's CMAKE_CUDA_ARCHITECTURES; A100 and H100 by default, and PTX.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def require_compiler() -> None:
    """Says what is missing before CMake does so at length."""
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in candidates):
        raise SystemExit(
            f"pyqe: no C++ compiler found (looked for {', '.join(candidates)}). "
            "Install one that knows C++17, such as g++ 9 or clang 12, or name it in the variable CXX."
        )


def build_cuda() -> bool:
    """Whether the CUDA kernels are built."""
    wish = os.environ.get("PYQE_CUDA", "auto")
    if wish not in ("auto", "on", "off"):
        raise SystemExit(f"pyqe: PYQE_CUDA: expected auto, on or off, got {wish!r}")
    found = shutil.which(os.environ.get("CUDACXX", "nvcc")) is not None
    if wish == "on" and not found:
        raise SystemExit(
            "pyqe: PYQE_CUDA=on, but nvcc is not found: put it on the PATH, or name it in the variable CUDACXX."
        )
    return found and wish != "off"


class CMakeBuild(build_ext):
    """Runs CMake with Ninja; `build/` keeps the objects, so a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        require_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # Under build isolation ninja and pybind11 are somewhere else each time: tell CMake anew.
        configuration = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PYQE_VERSION": self.distribution.get_version(),
            "PYQE_CUDA": "ON" if build_cuda() else "OFF",
            "PYQE_WERROR": "ON" if os.environ.get("PYQE_WERROR") == "1" else "OFF",
        }
        if "PYQE_CUDA_ARCHS" in os.environ:
            configuration["PYQE_CUDA_ARCHS"] = os.environ["PYQE_CUDA_ARCHS"]
        options = [f"-D{name}={value}" for name, value in configuration.items()]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


names = ["pyqe._C", *(["pyqe._cuda"] if build_cuda() else [])]  # the first build makes both
setup(ext_modules=[Extension(name, sources=[]) for name in names], cmdclass={"build_ext": CMakeBuild})
