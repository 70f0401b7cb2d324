"""What the figures were taken on, and the ceilings they are held against."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyqe.bench.case import DTYPES
from pyqe.cli.doctor import examine

_READ_BYTES, _READS = 2**30, 9
_MATMUL_SIZES, _PRODUCTS, _SLOW_SECONDS = (1024, 2048, 4096), 5, 1.0
_RIVAL_PACKAGES = ("boostedprob", "cut-cross-entropy", "liger-kernel", "netcal", "scikit-learn", "trl")


def describe() -> dict[str, Any]:
    """Processor, instruction sets, threads and versions."""
    facts = examine()
    return {
        "processor": _processor_name(),
        "amx_bf16": "amx_bf16" in facts["cpu"].get("features", ()),
        "load_average": os.getloadavg()[0],
        "rivals": {name: _version(name) for name in _RIVAL_PACKAGES},
        **facts,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def read_memory(tensor: Tensor) -> Tensor:
    """Read a contiguous tensor once, with all threads: its bytes as integers, which no dtype slows down.

    torch's maximum comes to within its noise of a loop of vector loads in C, 34 GB/s on two Zen 4 cores; its integer
    sum (1.7 GB/s) and its matrix-vector product (10 to 19) do not.
    """
    flat = tensor.detach().reshape(-1)
    return flat[: len(flat) // 8 * 8].view(torch.int64).max()


def ceilings(dtypes: Iterable[str], *, quick: bool = False) -> dict[str, Any]:
    """The most that this machine does now: GB/s of reading memory, GFLOP/s of a matrix product in each dtype."""
    matrix_sizes = _MATMUL_SIZES[:1] if quick else _MATMUL_SIZES
    return {
        "read_gb_s": _read_rate(_READ_BYTES // 8 if quick else _READ_BYTES),
        "matmul_gflop_s": {name: max(_matmul_rates(DTYPES[name], matrix_sizes)) for name in dtypes},
    }


def _read_rate(size: int) -> float:
    buffer = torch.ones(size // 8, dtype=torch.int64)
    return size / min(_seconds(lambda: read_memory(buffer)) for _ in range(_READS)) / 1e9


def _matmul_rates(dtype: torch.dtype, sizes: tuple[int, ...]) -> Iterator[float]:
    for size in sizes:
        factors = [torch.randn(size, size).to(dtype) for _ in range(2)]
        seconds = min(_seconds(partial(torch.matmul, *factors)) for _ in range(_PRODUCTS))
        yield 2 * size**3 / seconds / 1e9
        if 8 * seconds > _SLOW_SECONDS:  # twice the size takes eight times as long
            return


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
