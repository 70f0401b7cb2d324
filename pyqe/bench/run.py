"""Runs suites and gathers what they measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from pyqe.backends import available_backends
from pyqe.bench import gpu, machine
from pyqe.bench.case import Case, Rival, Settings
from pyqe.bench.measure import Device, DeviceLostError, Measurement, Processor, measure
from pyqe.bench.suites import SUITES

SCHEMA = 2
_MATMUL = "bare matmul"

Build = Callable[[], Case]


def planned(suites: Sequence[str], settings: Settings) -> dict[str, Build]:
    """The cases of some suites, unbuilt, by what they are called in a report.

    Example:
        >>> list(planned(["sampling"], Settings()))
        ['sampling: negatives, SmolLM2-135M bf16 N 1024']
    """
    cases = {_key(suite, build): build for suite in suites for build in SUITES[suite](settings)}
    wanted = settings.only or ("",)
    return {key: build for key, build in cases.items() if any(part in key for part in wanted)}


def _key(suite: str, build: Build) -> str:
    assert isinstance(build, partial)
    options = [f"{name} {value}" for name, value in build.keywords.items()]
    what = [build.func.__name__.replace("_", " "), *map(str, build.args), *options]
    return f"{suite}: {', '.join(what)}"


def run(
    suites: Sequence[str],
    settings: Settings,
    *,
    on_start: Callable[[dict[str, Any], int], object],
    on_case: Callable[[dict[str, Any], dict[str, Any]], object],
    on_progress: Callable[[str], object],
    earlier: Mapping[str, Any] | None = None,
    budget: float = float("inf"),
) -> dict[str, Any]:
    """Run suites.

    Args:
        suites: their names.
        settings: what to measure.
        on_start: called with the report so far (machine and ceilings) and the number of cases.
        on_case: called with the report so far and the case that it has just got.
        on_progress: called with what is being done.
        earlier: a report whose cases are kept and not measured again; whatever else it holds stays too.
        budget: seconds after which no further case starts.

    Returns:
        the report, as plain data: ``docs/benchmarks.md`` says what is in it. ``lost`` says that the device was lost
        and the rest needs a new process.
    """
    deadline = time.monotonic() + budget
    plan = planned(suites, settings)
    on_progress("ceilings")
    dtypes = settings.dtypes or ("bf16", "fp32")
    device, description, ceilings = _device(settings, dtypes)
    report: dict[str, Any] = {
        **(earlier or {}),
        "schema": SCHEMA,
        "complete": False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "suites": list(suites),
        "repeats": settings.repeats,
        "quick": settings.quick,
        "device": settings.device,
        "machine": description,
        "ceilings": ceilings,
        "cases": list((earlier or {}).get("cases", [])),
        "lost": False,
    }
    done = {case["key"] for case in report["cases"]}
    left = {key: build for key, build in plan.items() if key not in done}
    on_start(report, len(left))
    for key, build in left.items():
        if time.monotonic() > deadline:
            return report
        try:
            result = {"key": key, **_run_case(build, settings, device, ceilings, on_progress)}
        except DeviceLostError as error:
            report["lost"] = True
            failed = {"rival": "pyqe", "note": None, "missing": f"failed: {error}"}
            result = {"key": key, "suite": key.split(":")[0], "name": key, "description": "", "rivals": [failed]}
        report["cases"].append(result)
        on_case(report, result)
        if report["lost"]:
            return report
    report["complete"] = True
    return report


def failures(report: Mapping[str, Any]) -> list[str]:
    """What went wrong with pyqe, whose failures are no fact about a rival that one reads and passes over."""
    return [
        f"{case['suite']}, {case['name']}, {row['rival']}: {row['missing']}"
        for case in report["cases"]
        for row in case["rivals"]
        if row["rival"].startswith("pyqe") and (row["missing"] or "").startswith("failed")
    ]


def _device(settings: Settings, dtypes: Sequence[str]) -> tuple[Device, dict[str, Any], dict[str, Any]]:
    """What calls are timed on, its description and its ceilings."""
    if not settings.on_gpu:
        return Processor(), machine.describe(), machine.ceilings(dtypes, quick=settings.quick)
    device = gpu.Gpu()
    return device, {**machine.describe(), "gpu": gpu.describe()}, device.ceilings(dtypes)


def _with_backends(case: Case) -> Case:
    """The case with a rival for each backend that a GPU has, behind the one that chooses by itself."""
    ours = case.rivals[0]
    if ours.missing or not case.by_backend:
        return case
    names = [name for name, backend in available_backends().items() if backend.devices != frozenset({"cpu"})]
    forced = [replace(ours, name=f"{ours.name}, {name}", backend=name, note="") for name in names]
    return replace(case, rivals=[ours, *map(_if_there, forced), *case.rivals[1:]])


def _if_there(rival: Rival) -> Rival:
    return replace(rival, missing=available_backends()[rival.backend].unavailable or "")


def _run_case(
    build: Build,
    settings: Settings,
    device: Device,
    limits: dict[str, Any],
    on_progress: Callable[[str], object],
) -> dict[str, Any]:
    on_progress("inputs")
    case = _with_backends(build()) if settings.on_gpu else build()
    title = f"{case.suite}, {case.name}"
    found = measure(case, settings, device, lambda text: on_progress(f"{title}: {text}"))
    medians = {item.rival.name: item.quartiles[1] for item in found if not item.missing}
    return {
        "suite": case.suite,
        "name": case.name,
        "description": case.description,
        **case.facts,
        "logit_bytes": case.logit_bytes or None,
        "decides": case.decides or None,
        "rivals": [_row(item, case, medians, limits) for item in found],
    }


def _row(item: Measurement, case: Case, medians: dict[str, float], limits: dict[str, Any]) -> dict[str, Any]:
    """A rival's figures; None where there are none."""
    rival = item.rival
    row: dict[str, Any] = {"rival": rival.name, "note": rival.note or None, "missing": item.missing or None}
    if item.missing:
        return row
    low, middle, high = item.quartiles
    work = rival.work or case.work
    peak = limits["matmul_gflop_s"].get(case.facts.get("dtype"))
    gflop_s, gb_s = work.flops / middle / 1e9 or None, work.bytes / middle / 1e9 or None
    bandwidth = "copy" if "copy_gb_s" in limits else "read"
    return {
        **row,
        "backend": rival.backend or None,
        "backends": item.backends,
        "seconds": item.seconds,
        "q1": low,
        "median": middle,
        "q3": high,
        "times_pyqe": middle / medians["pyqe"] if "pyqe" in medians else None,
        "times_matmul": middle / medians[_MATMUL] if _MATMUL in medians else None,
        "gflop_s": gflop_s,
        "of_matmul": gflop_s / peak if gflop_s and peak else None,
        "gb_s": gb_s,
        f"of_{bandwidth}": gb_s / limits[f"{bandwidth}_gb_s"] if gb_s else None,
        "extra_bytes": item.extra_bytes,
        "of_logits": item.extra_bytes / case.logit_bytes if item.extra_bytes is not None and case.logit_bytes else None,
        "difference": item.difference,
        "values": item.values,
    }
