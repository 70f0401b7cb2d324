"""Compiles kernels for GPUs that need not be there, and says what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from pyqe.kernels.common import Config

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes that one block may use


@dataclass(frozen=True)
class Compiled:
    """Resources of a compiled kernel, per thread but for the shared memory."""

    shared: int  # bytes
    registers: int
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    spills_in_product: int  # instructions in the first of the innermost loops with a matrix product
    ptx: str
    ttgir: str

    @property
    def tensor_cores(self) -> bool:
        return "wgmma.mma_async" in self.ptx or "mma.sync" in self.ptx


def compile_for(
    architecture: str,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    config: Config,
    **options: Any,
) -> Compiled:
    """Compile a kernel as its launcher would for tensors whose addresses, strides and hidden size are multiples of 16.

    The launcher tells the compiler so unless the kernel asks it not to.

    Args:
        architecture: "sm_80" or "sm_90".
        kernel: of ``triton.jit``.
        types: Triton's type of every argument that is no constant, such as ``"*bf16"``, ``"i32"`` or ``"fp32"``.
        constants: values of the others but for the config's.
        config: block sizes, warps and stages.
        options: further options of the compiler, as given at launch.
    """
    constants = {**constants, **config.blocks}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in kernel.params
        if signature[parameter.name].startswith("*")
        or (not parameter.do_not_specialize and (parameter.name.endswith("_stride") or parameter.name == "dim"))
    }
    capability = int(architecture.removeprefix("sm_"))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **options}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
    flags = [] if options.get("enable_fp_fusion", True) else ["--fmad=false"]
    resources = _assemble(compiled.asm["ptx"], [get_ptxas(capability).path, "-v", "-lineinfo", *flags])
    in_product = _spills_in_first_product(_disassemble(compiled.asm["cubin"]))
    return Compiled(compiled.metadata.shared, *resources, in_product, compiled.asm["ptx"], compiled.asm["ttgir"])


def _assemble(ptx: str, command: list[str]) -> tuple[int, int, int]:
    """Registers, and bytes of spill stores and loads, that ptxas reports: Triton keeps only its last product."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if target is None:
        raise ValueError("ptx: expected a .target line")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [*command, f"--gpu-name={target.group(1)}", str(source), "-o", str(source.with_suffix(".cubin"))]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    numbers = [re.search(rf"(\d+) {what}", report) for what in ("registers", "bytes spill stores", "bytes spill loads")]
    if None in numbers:
        raise RuntimeError(f"ptxas: no resources in its report: {report}")
    registers, stores, loads = (int(number.group(1)) for number in numbers if number)
    return registers, stores, loads


def _disassemble(cubin: bytes) -> list[tuple[int, str]]:
    """Addresses and instructions."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(binary)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)
    return [(int(address, 16), instruction) for address, instruction in found]


def _spills_in_first_product(instructions: list[tuple[int, str]]) -> int:
    """Local loads and stores in the first loop that multiplies on tensor cores and holds no other loop."""
    loops = []
    for address, instruction in instructions:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
        if branch and int(branch.group(1), 16) < address:
            loops.append((int(branch.group(1), 16), address))
    for first, last in sorted(loops):
        body = [instruction for address, instruction in instructions if first <= address <= last]
        innermost = not any(first <= other[0] and other[1] <= last for other in loops if other != (first, last))
        if innermost and any(re.search(r"\bH?G?MMA", instruction) for instruction in body):
            return sum(bool(re.search(r"\b(LDL|STL)\b", instruction)) for instruction in body)
    return 0
