"""Times the rivals of a case in turn, takes their memory in a run of its own, and compares what they computed."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyqe.backends.registry import served_by
from pyqe.bench.case import Case, Outcome, Rival, Settings

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RIVAL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, ImportError, AttributeError, MemoryError)


@dataclass
class Measurement:
    """What one rival of a case did.

    Attributes:
        rival: who.
        missing: why there are no figures, or "".
        backends: pyqe's backend by operation.
        seconds: of each round.
        extra_bytes: peak memory beyond inputs and outputs; None where it cannot be told.
        difference: from pyqe's results, relative to their largest value; None where nothing can be compared.
        values: numbers that the rival computed.
    """

    rival: Rival
    missing: str = ""
    backends: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    difference: float | None = None
    values: dict[str, float] = field(default_factory=dict)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the seconds."""
        if len(self.seconds) == 1:
            return (self.seconds[0],) * 3
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high


class Processor:
    """How calls are timed and their memory is taken on the CPU."""

    def seconds(self, call: Callable[[], Outcome]) -> float:
        """Seconds that the call takes; freeing its results is not counted."""
        start = time.perf_counter()
        outcome = call()
        end = time.perf_counter()
        del outcome
        return end - start

    def extra_bytes(self, call: Callable[[], Outcome]) -> int | None:
        """Peak of the resident memory during the call, beyond what was there before and what it returns.

        What a rival keeps from call to call (code, threads, a workspace) is there before. None where the kernel does
        not tell.
        """
        with suppress(OSError, AttributeError):  # glibc only: give free memory back, so that its use is seen again
            ctypes.CDLL(None).malloc_trim(0)
        try:
            _CLEAR_REFS.write_text("5", encoding="ascii")  # resets the peak
            before = _resident("VmRSS")
        except OSError:
            return None
        outcome = call()
        return max(_resident("VmHWM") - before - _tensor_bytes(outcome), 0)


def _resident(name: str) -> int:
    """Bytes that the kernel tells for this process."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _tensor_bytes(outcome: Outcome) -> int:
    """Bytes of the results; views of the same memory count once."""
    storages = (value.untyped_storage() for value in outcome.values() if isinstance(value, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(
    case: Case, settings: Settings, device: Processor, on_progress: Callable[[str], object]
) -> list[Measurement]:
    """Measure every rival: a round to warm up and compare, timed rounds A B C, B C A, ..., a round for the memory."""
    torch.manual_seed(0)
    measurements = [Measurement(rival, missing=_obstacle(rival, settings)) for rival in case.rivals]
    _warm_up(case, measurements, on_progress)
    running = [item for item in measurements if not item.missing]
    with _no_garbage_collection():
        for number in range(settings.repeats):
            inputs = case.inputs()
            for item in running[number % len(running) :] + running[: number % len(running)]:  # nobody is always first
                on_progress(f"{item.rival.name}, round {number + 1} of {settings.repeats}")
                item.seconds.append(device.seconds(partial(_run, item.rival, *inputs)))
        inputs = case.inputs()
        for item in running:
            on_progress(f"{item.rival.name}, memory")
            item.extra_bytes = device.extra_bytes(partial(_run, item.rival, *inputs))
    return measurements


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect now rather than while somebody's time is taken: with what torch imports it takes half a second."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _run(rival: Rival, *inputs: Any) -> Outcome:
    assert rival.run is not None
    return rival.run(*inputs)


def _obstacle(rival: Rival, settings: Settings) -> str:
    if rival.name in settings.without:
        return "left out"
    return rival.missing


def _warm_up(case: Case, measurements: list[Measurement], on_progress: Callable[[str], object]) -> None:
    """Run everybody once: compile, find out who fails, which backend serves, and how far the results agree."""
    inputs = case.inputs()
    ours: Outcome | None = None
    for item in measurements:
        if item.missing:
            continue
        on_progress(f"{item.rival.name}, warm-up")
        try:
            with served_by() as item.backends:
                outcome = _run(item.rival, *inputs)
        except _RIVAL_ERRORS as error:
            if item.rival.name == "pyqe":
                raise
            item.missing = f"failed: {type(error).__name__}: {' '.join(str(error).split()):.200}"
            continue
        if any(not bool(value.isfinite().all()) for value in outcome.values() if isinstance(value, Tensor)):
            if item.rival.name == "pyqe":
                raise ValueError(f"{case.suite}, {case.name}: expected finite results of pyqe, got NaN or infinity")
            item.missing = "failed: its results are not finite"
            continue
        item.values = {name: value for name, value in outcome.items() if isinstance(value, float)}
        if item.rival.name == "pyqe":
            ours = outcome
        elif ours is not None:
            item.difference = difference(outcome, ours)


def difference(outcome: Outcome, ours: Outcome) -> float | None:
    """Largest difference of the results that both have, relative to the largest value of each of pyqe's."""
    shared = [(value, ours[name]) for name, value in outcome.items() if isinstance(value, Tensor) and name in ours]
    return max((_relative_difference(*pair) for pair in shared), default=None)


def _relative_difference(theirs: Tensor, ours: Tensor) -> float:
    theirs, ours = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (theirs, ours))
    return float((theirs - ours).abs().max() / ours.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
