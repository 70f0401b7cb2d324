"""The CUDA kernels: on an emulator of CUDA's threads where there is no GPU, and what nvcc says of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from shares import run_shared


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_conformance(emulator: Path, order: str) -> None:
    """A kernel that lacks a barrier gives other results when its threads run in reverse."""
    tests = ["tests/test_conformance.py", "tests/test_negatives.py"]
    run_shared(*tests, "-k", "cuda", "-x", PYQE_CUDA_EMULATOR=str(emulator), PYQE_EMULATOR_ORDER=order)


@cache
def _cuobjdump(option: str, module: Path) -> dict[str, str]:
    """What cuobjdump says, of all files, by the GPU that the module has code for."""
    knobs = pytest.importorskip("triton.knobs")
    command = [knobs.nvidia.cuobjdump.path, option, str(module)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = defaultdict(str)
    for part in said.split("\nFatbin elf code:\n")[1:]:
        text = part.split("\nFatbin ptx code:\n")[0]
        found[re.findall(r"^arch = (\w+)", text, re.MULTILINE)[0]] += text
    return found


def test_registers_of_what_nvcc_compiles(nvcc_module: Path) -> None:
    """No kernel spills or has an array in memory; 168 registers leave 12 warps to a multiprocessor."""
    usage = _cuobjdump("-res-usage", nvcc_module)
    assert usage.keys() == {"sm_80", "sm_90a"}
    for said in usage.values():
        assert all(
            name in said for name in ("find_candidates", "decode", "inverse_softmax", "read_segments", "dot_rows")
        )
        kernels = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
        assert len(kernels) == said.count("REG:") > 0
        assert [name for name, _, stack, local in kernels if (stack, local) != ("0", "0")] == []
        assert [(name, registers) for name, registers, _, _ in kernels if int(registers) > 168] == []


@pytest.mark.parametrize("kernel", ["dot_rows.*Lb1E", "add_weight_rows.*Li[48]E", "add_hidden_rows.*Li[48]E"])
def test_rows_that_nvcc_keeps_in_flight(nvcc_module: Path, kernel: str) -> None:
    """Eight loads of 16 bytes start before the first sum: a gather is as fast as its loads are many."""
    for said in _cuobjdump("-sass", nvcc_module).values():
        functions = [part for part in said.split("Function : ")[1:] if re.match(rf"\S*{kernel}", part)]
        assert len(functions) == 3  # dtypes
        for function in functions:
            names = re.findall(r"/\*[0-9a-f]{4,5}\*/ +(?:@!?U?P\d+ )?([A-Z0-9_.]+)", function)
            assert re.search(r"(LDG\.E\.128\S* ){8}", " ".join(names)), function.split()[0]


def test_module_that_nvcc_built_says_whether_there_is_a_device(nvcc_module: Path) -> None:
    program = "import _cuda; print(_cuda.obstacle())"
    environment = {**os.environ, "PYTHONPATH": str(nvcc_module.parent)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    if not Path("/dev/nvidiactl").exists():
        assert re.search("driver|device", result.stdout)
