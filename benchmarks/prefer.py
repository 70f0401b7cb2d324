"""Writes the table of preferred GPU backends, ``pyqe/backends/preferences.json``, from measurements.

python benchmarks/prefer.py gpu.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parent.parent / "pyqe" / "backends" / "preferences.json"

Times = Mapping[int, Mapping[str, Iterable[float]]]  # over the best backend's, by number of rows and backend


def relative_times(report: Mapping[str, Any], *, float32: bool) -> dict[str, Times]:
    """Times of the backends over the best one's, by entry of the table; a backend that failed has none.

    float32 is apart from the other dtypes, as its products may do without tensor cores.
    """
    found: dict[str, dict[int, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for case in report["cases"]:
        medians = {row["backend"]: row["median"] for row in case["rivals"] if not row["missing"] and row.get("backend")}
        if case.get("decides") and medians and (case["dtype"] == "fp32") == float32:
            best = min(medians.values())
            for backend, median in medians.items():
                found[case["decides"]][case["n"]][backend].append(median / best)
    return found


def entries(times: Times) -> list[dict[str, Any]]:
    """The fastest backend by number of rows, as the table has it.

    Several cases with as many rows (shapes, bf16 and fp16) count alike, by the mean of the logarithms. Between two
    numbers of rows with different winners the border is their geometric mean.

    Example:
        >>> entries({1: {"cuda": [1.0], "triton": [2.0]}, 256: {"cuda": [1.5], "triton": [1.0]}})
        [{'max_rows': 16, 'backend': 'cuda'}, {'backend': 'triton'}]
    """

    def cost(ratios: Iterable[float]) -> float:
        logarithms = [math.log(ratio) for ratio in ratios]
        return sum(logarithms) / len(logarithms)

    winners: list[tuple[int, str]] = []
    for rows, backends in sorted(times.items()):
        most = max(len(list(ratios)) for ratios in backends.values())
        complete = {name: cost(ratios) for name, ratios in backends.items() if len(list(ratios)) == most}
        winners.append((rows, min(complete, key=complete.__getitem__)))
    table: list[dict[str, Any]] = []
    for (rows, backend), (next_rows, following) in pairwise(winners):
        if backend != following:
            table.append({"max_rows": round(math.sqrt(rows * next_rows)), "backend": backend})
    return [*table, {"backend": winners[-1][1]}]


def updated(table: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """The table with the entries that the report has measured; the others stay, those of other dtypes too."""
    halves, floats = (relative_times(report, float32=float32) for float32 in (False, True))
    measured: dict[str, list[dict[str, Any]]] = {}
    for name in {**halves, **floats}:
        kept: list[dict[str, Any]] = table["operations"].get(name, [])
        own, rest = ([entry for entry in kept if ("dtypes" in entry) == special] for special in (True, False))
        if name in floats:
            own = [{"dtypes": ["float32"], **entry} for entry in entries(floats[name])]
        measured[name] = own + (entries(halves[name]) if name in halves else rest)
    source = f"Measured on {report['machine']['gpu']['name']}, {report['date'][:10]}: {', '.join(sorted(measured))}."
    return {"source": source, "operations": {**table["operations"], **measured}}


def text(table: Mapping[str, Any]) -> str:
    """The table as JSON, an operation a line."""
    lines = [f"    {json.dumps(name)}: {json.dumps(rows)}" for name, rows in table["operations"].items()]
    operations = ",\n".join(lines)
    return f'{{\n  "source": {json.dumps(table["source"])},\n  "operations": {{\n{operations}\n  }}\n}}\n'


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="of `pyqe bench --device cuda --json`")
    parser.add_argument("--table", type=Path, default=TABLE, help="default: the package's own")
    arguments = parser.parse_args(words)
    report = json.loads(arguments.report.read_text(encoding="utf-8"))
    table = json.loads(arguments.table.read_text(encoding="utf-8"))
    arguments.table.write_text(text(updated(table, report)), encoding="utf-8")


if __name__ == "__main__":
    main()
