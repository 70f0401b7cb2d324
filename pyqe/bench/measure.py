"""Times the rivals of a case in turn, takes their memory in a run of its own, and compares what they computed."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pyqe.backends.registry import UnservedError, served_by, use_backend
from pyqe.bench.case import Case, Outcome, Rival, Settings

try:
    from triton.errors import TritonError
except ImportError:  # not on this platform

    class TritonError(Exception):  # type: ignore[no-redef]
        """Nobody raises it."""


T = TypeVar("T")

HOST_CALLS = 100  # in a row, when the host is timed
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RIVAL_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ImportError,
    AttributeError,
    AssertionError,
    MemoryError,
    OSError,
    TritonError,
)
_LEAST_ROUNDS = 3
_WRONG = 1e-2  # of the largest value, beyond what rounding to bfloat16 explains


class DeviceLostError(RuntimeError):
    """The device serves this process no longer: a kernel went wrong in a way that only a new process gets over."""


class Device(Protocol):
    """How calls are timed, and their memory is taken.

    Attributes:
        limit: seconds of timed calls after which a rival need not take part in further rounds, once it has been in
            three.
    """

    limit: float

    def seconds(self, call: Callable[[], Outcome]) -> float:
        """Seconds that the work takes; freeing its results is not counted."""

    def host_seconds(self, call: Callable[[], Outcome]) -> float:
        """Seconds for which the call keeps the host busy, whether the work is done then or not."""

    def extra_bytes(self, call: Callable[[], Outcome]) -> int | None:
        """Peak of the memory during the call, beyond what was there before and what it returns."""

    def check(self) -> None:
        """Raise :class:`DeviceLostError` where nothing more can be measured."""


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
    """The CPU."""

    limit = float("inf")

    def seconds(self, call: Callable[[], Outcome]) -> float:
        start = time.perf_counter()
        outcome = call()
        end = time.perf_counter()
        del outcome
        return end - start

    def host_seconds(self, call: Callable[[], Outcome]) -> float:
        return time_host(call)

    def check(self) -> None:
        """A processor is never lost."""

    def extra_bytes(self, call: Callable[[], Outcome]) -> int | None:
        """Peak of the resident memory.

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
        return max(_resident("VmHWM") - before - tensor_bytes(outcome), 0)


def time_host(call: Callable[[], object]) -> float:
    """Seconds of a call, as the mean of many in a row."""
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    return (time.perf_counter() - start) / HOST_CALLS


def _resident(name: str) -> int:
    """Bytes that the kernel tells for this process."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def tensor_bytes(outcome: Outcome) -> int:
    """Bytes of the results; views of the same memory count once."""
    storages = (value.untyped_storage() for value in outcome.values() if isinstance(value, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(case: Case, settings: Settings, device: Device, on_progress: Callable[[str], object]) -> list[Measurement]:
    """Measure every rival: a round to warm up and compare, timed rounds A B C, B C A, ..., a round for the memory.

    Raises:
        DeviceLostError: nothing more can be measured in this process.
    """
    torch.manual_seed(0)
    measurements = [Measurement(rival, missing=_obstacle(rival, settings)) for rival in case.rivals]
    _warm_up(case, measurements, device, on_progress)
    clock = device.host_seconds if case.host else device.seconds
    with _no_garbage_collection():
        for number in range(settings.repeats):
            inputs = case.inputs()
            running = [item for item in measurements if _takes_part(item, device)]
            first = number % max(len(running), 1)
            for item in running[first:] + running[:first]:  # nobody is always first
                on_progress(f"{item.rival.name}, round {number + 1} of {settings.repeats}")
                seconds = _attempt(item, device, partial(clock, partial(_run, item.rival, *inputs)))
                item.seconds += [] if seconds is None else [seconds]
        inputs = case.inputs()
        for item in measurements:
            if not item.missing:
                on_progress(f"{item.rival.name}, memory")
                call = partial(_run, item.rival, *inputs)
                item.extra_bytes = _attempt(item, device, partial(device.extra_bytes, call))
    return measurements


def _takes_part(item: Measurement, device: Device) -> bool:
    return not item.missing and (len(item.seconds) < _LEAST_ROUNDS or sum(item.seconds) < device.limit)


def _attempt(item: Measurement, device: Device, call: Callable[[], T]) -> T | None:
    """What the call gives on the rival's backend; None where it fails, and the rival is missing then."""
    try:
        with use_backend(item.rival.backend) if item.rival.backend else nullcontext():
            return call()
    except UnservedError as error:
        item.missing = str(error)
    except RIVAL_ERRORS as error:
        item.missing = f"failed: {type(error).__name__}: {' '.join(str(error).split()):.200}"
        device.check()
    return None


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


def _warm_up(case: Case, measurements: list[Measurement], device: Device, on_progress: Callable[[str], object]) -> None:
    """Run everybody once: compile, find out who fails, which backend serves, and how far the results agree."""
    inputs = case.inputs()
    ours: Outcome | None = None
    for item in measurements:
        if item.missing:
            continue
        on_progress(f"{item.rival.name}, warm-up")
        with served_by() as item.backends:
            outcome = _attempt(item, device, partial(_checked, item.rival, *inputs))
        if outcome is None:
            continue
        item.values = {name: value for name, value in outcome.items() if isinstance(value, float)}
        if item.rival.name == "pyqe":
            ours = outcome
        elif ours is not None:
            item.difference = difference(outcome, ours)
            if item.rival.backend and (difference(_floats(outcome), ours) or 0.0) > _WRONG:
                item.missing = f"failed: differs from pyqe's own choice by {item.difference:.1e} of the largest value"


def _checked(rival: Rival, *inputs: Any) -> Outcome:
    """The rival's results.

    Raises:
        ValueError: they are not finite.
    """
    outcome = _run(rival, *inputs)
    if any(not bool(value.isfinite().all()) for value in outcome.values() if isinstance(value, Tensor)):
        raise ValueError("its results are not finite")
    return outcome


def _floats(outcome: Outcome) -> Outcome:
    """The results without ids, among which a tie or a draw may differ."""
    return {name: value for name, value in outcome.items() if isinstance(value, Tensor) and value.is_floating_point()}


def difference(outcome: Outcome, ours: Outcome) -> float | None:
    """Largest difference of the results that both have, relative to the largest value of each of pyqe's."""
    shared = [(value, ours[name]) for name, value in outcome.items() if isinstance(value, Tensor) and name in ours]
    return max((_relative_difference(*pair) for pair in shared), default=None)


def _relative_difference(theirs: Tensor, ours: Tensor) -> float:
    theirs, ours = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (theirs, ours))
    return float((theirs - ours).abs().max() / ours.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
