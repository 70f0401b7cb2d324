"""A CUDA device: how calls are timed on it, how their memory is taken, and what it does at the most."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyqe.bench.case import DTYPES, Outcome
from pyqe.bench.measure import DeviceLostError, tensor_bytes, time_host

_COPY_BYTES, _COPIES = 2**31, 15
_MATMUL_SIZE, _PRODUCTS = 8192, 15
_FLUSH_BYTES = 2**29  # ten times the cache of an H100
_MOST_FLUSHES = 64  # on an H100 12 ms, in which the host hands out hundreds of kernels
_HOST_SHARE = 0.01  # of a call's time, that may be the host's
_STATE = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,driver_version"


class Gpu:
    """The current CUDA device. Nothing of its settings is changed.

    A call is timed with events on the current stream, after a read of a buffer that is larger than the cache: inputs
    of an earlier call are gone from it then. The buffer is read and not written, as the cache would write changed
    lines back during the call that is timed.

    The time is the device's where the host has handed out the whole call before the read is over. Where it has not,
    the device may have waited for the host between two kernels: unless that can hardly count, the call is timed once
    more, after as many reads as the host needs. A call that itself waits for the device has its waits counted.
    """

    limit = 1.0

    def __init__(self) -> None:
        self._buffer = torch.ones(_FLUSH_BYTES // 4, device="cuda")
        torch.sum(self._buffer)  # loads the kernel
        self._flush_seconds = min(self._timed(partial(torch.sum, self._buffer), flushes=1)[0] for _ in range(5))

    def seconds(self, call: Callable[[], Outcome]) -> float:
        seconds, host, late = self._timed(call, flushes=1)
        flushes = 1 + math.ceil(2 * host / self._flush_seconds)
        if late and host > _HOST_SHARE * seconds and flushes <= _MOST_FLUSHES:
            seconds, _, _ = self._timed(call, flushes)
        return seconds

    def _timed(self, call: Callable[[], object], flushes: int) -> tuple[float, float, bool]:
        """Seconds of the device, seconds of the host, and whether the device was done with the reads before it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
            torch.sum(self._buffer)
        start.record()
        begin = time.perf_counter()
        outcome = call()
        host = time.perf_counter() - begin
        end.record()
        late = start.query()
        end.synchronize()
        del outcome
        return start.elapsed_time(end) / 1e3, host, late

    def host_seconds(self, call: Callable[[], Outcome]) -> float:
        torch.cuda.synchronize()
        seconds = time_host(call)
        torch.cuda.synchronize()
        return seconds

    def extra_bytes(self, call: Callable[[], Outcome]) -> int:
        """Peak of what torch's allocator has given out. What a library takes past torch is not seen."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome = call()
        torch.cuda.synchronize()
        return max(torch.cuda.max_memory_allocated() - before - tensor_bytes(outcome), 0)

    def check(self) -> None:
        """Raise :class:`DeviceLostError` after an error that stays: every later call would fail with it."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(f"the GPU is lost to this process: {' '.join(str(error).split()):.200}") from error

    def ceilings(self, dtypes: Iterable[str]) -> dict[str, Any]:
        """The most that the device does now: GB/s of a copy, read and written, and GFLOP/s of a product by dtype."""
        return {"copy_gb_s": self._copy_rate(), "matmul_gflop_s": {name: self._matmul_rate(name) for name in dtypes}}

    def _best(self, call: Callable[[], Tensor], times: int) -> float:
        return min(self.seconds(lambda: {"result": call()}) for _ in range(times))

    def _copy_rate(self) -> float:
        source = torch.randint(2**31, (_COPY_BYTES // 4,), dtype=torch.int32, device="cuda")
        target = torch.empty_like(source)
        return 2 * _COPY_BYTES / self._best(partial(target.copy_, source), _COPIES) / 1e9

    def _matmul_rate(self, dtype: str) -> float:
        size = _MATMUL_SIZE
        factors = [torch.randn(size, size, device="cuda").to(DTYPES[dtype]) for _ in range(2)]
        return 2 * size**3 / self._best(partial(torch.matmul, *factors), _PRODUCTS) / 1e9


def describe() -> dict[str, Any]:
    """The device, the software under it, and the state it is in: clocks, power limit, temperature."""
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "l2_mib": round(facts.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "state": _state(),
    }


def _state() -> dict[str, str]:
    """What ``nvidia-smi`` reads; empty where it is missing."""
    query = ["nvidia-smi", f"--query-gpu={_STATE}", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = found.splitlines()  # one for each device of the machine
    number = min(torch.cuda.current_device(), len(lines) - 1)
    return dict(zip(_STATE.split(","), (part.strip() for part in lines[number].split(",")), strict=False))
