"""Runs suites and gathers what they measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

from pyqe.bench.case import Case, Settings
from pyqe.bench.machine import ceilings, describe
from pyqe.bench.measure import Measurement, Processor, measure
from pyqe.bench.suites import SUITES

SCHEMA = 1


def run(
    suites: Sequence[str],
    settings: Settings,
    *,
    on_start: Callable[[dict[str, Any], int], object],
    on_case: Callable[[dict[str, Any], dict[str, Any]], object],
    on_progress: Callable[[str], object],
) -> dict[str, Any]:
    """Run suites.

    Args:
        suites: their names.
        settings: what to measure.
        on_start: called with the report so far (machine and ceilings) and the number of cases.
        on_case: called with the report so far and the case that it has just got.
        on_progress: called with what is being done.

    Returns:
        the report, as plain data: ``docs/benchmarks.md`` says what is in it.
    """
    builders = [build for suite in suites for build in SUITES[suite](settings)]
    on_progress("ceilings")
    dtypes = settings.dtypes or ("bf16", "fp32")
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "suites": list(suites),
        "repeats": settings.repeats,
        "quick": settings.quick,
        "machine": describe(),
        "ceilings": ceilings(dtypes, quick=settings.quick),
        "cases": [],
    }
    on_start(report, len(builders))
    device = Processor()
    for build in builders:
        result = _run_case(build, settings, device, report["ceilings"], on_progress)
        report["cases"].append(result)
        on_case(report, result)
    report["complete"] = True
    return report


def _run_case(
    build: Callable[[], Case],
    settings: Settings,
    device: Processor,
    limits: dict[str, Any],
    on_progress: Callable[[str], object],
) -> dict[str, Any]:
    on_progress("inputs")
    case = build()
    title = f"{case.suite}, {case.name}"
    found = measure(case, settings, device, lambda text: on_progress(f"{title}: {text}"))
    ours = found[0].quartiles[1] if found[0].seconds else None
    return {
        "suite": case.suite,
        "name": case.name,
        "description": case.description,
        **case.facts,
        "logit_bytes": case.logit_bytes or None,
        "rivals": [_row(item, case, ours, limits) for item in found],
    }


def _row(item: Measurement, case: Case, ours: float | None, limits: dict[str, Any]) -> dict[str, Any]:
    """A rival's figures; None where there are none."""
    rival = item.rival
    row: dict[str, Any] = {"rival": rival.name, "note": rival.note or None, "missing": item.missing or None}
    if item.missing:
        return row
    low, middle, high = item.quartiles
    work = rival.work or case.work
    peak = limits["matmul_gflop_s"].get(case.facts.get("dtype"))
    gflop_s, gb_s = work.flops / middle / 1e9 or None, work.bytes / middle / 1e9 or None
    return {
        **row,
        "backends": item.backends,
        "seconds": item.seconds,
        "q1": low,
        "median": middle,
        "q3": high,
        "times_pyqe": middle / ours if ours else None,
        "gflop_s": gflop_s,
        "of_matmul": gflop_s / peak if gflop_s and peak else None,
        "gb_s": gb_s,
        "of_read": gb_s / limits["read_gb_s"] if gb_s else None,
        "extra_bytes": item.extra_bytes,
        "of_logits": item.extra_bytes / case.logit_bytes if item.extra_bytes is not None and case.logit_bytes else None,
        "difference": item.difference,
        "values": item.values,
    }
