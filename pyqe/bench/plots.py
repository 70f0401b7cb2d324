"""Reports as pictures: time against the number of rows, memory against the size of the vocabulary."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pyqe._files import atomic_path

_FORMATS = ("png", "svg")


def check() -> None:
    """Check that plots can be drawn, before an hour is spent on measuring.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--plots needs matplotlib (pip install 'pyqe[bench]'): {error}") from error


def write_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what a report has two points or more of, as PNG and SVG.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases = [case for case in report["cases"] if case.get("n") and case.get("v")]
    written: list[Path] = []
    for group, members in _groups(cases, _one_vocabulary):
        lines = _lines(members, "n", "median", 1e3)
        written += _draw(folder, "speed", group, lines, "rows N", "milliseconds, median")
    for group, members in _groups(cases, _one_number_of_rows):
        lines = _lines(members, "v", "extra_bytes", 1e-6)
        written += _draw(folder, "memory", group, lines, "vocabulary V", "MB beyond inputs and outputs")
    return written


def _one_vocabulary(case: dict[str, Any]) -> tuple[str, ...]:
    return case["suite"], case["name"], case.get("model") or f"V{case['v']}", case["dtype"]


def _one_number_of_rows(case: dict[str, Any]) -> tuple[str, ...]:
    return case["suite"], case["name"], f"N{case['n']}", case["dtype"]


def _groups(
    cases: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], tuple[str, ...]]
) -> Iterable[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    groups = defaultdict(list)
    for case in cases:
        groups[key(case)].append(case)
    return groups.items()


def _lines(cases: list[dict[str, Any]], x: str, y: str, scale: float) -> dict[str, list[tuple[float, float]]]:
    """Points of each rival, in order of x."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for case in sorted(cases, key=lambda case: case[x]):
        for row in case["rivals"]:
            if row.get(y) is not None:
                lines[row["rival"]].append((case[x], row[y] * scale))
    return {name: points for name, points in lines.items() if len({point[0] for point in points}) > 1}


def _draw(
    folder: Path,
    kind: str,
    group: tuple[str, ...],
    lines: dict[str, list[tuple[float, float]]],
    x_label: str,
    y_label: str,
) -> list[Path]:
    from matplotlib.figure import Figure

    if not lines:
        return []
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if name == "pyqe" else 1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog" if kind == "memory" else "log")  # memory may be 0
    axes.set(xlabel=x_label, ylabel=y_label, title=", ".join(group))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    name = "-".join([kind, *group]).replace(" ", "_").lower()
    paths = [folder / f"{name}.{form}" for form in _FORMATS]
    for path in paths:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    return paths
