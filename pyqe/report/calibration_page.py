"""Render how good confidences are, before and after calibration, as one self-contained HTML page.

The page has no script: charts are drawn here, and each has a table of what it shows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from pyqe import metrics
from pyqe._arrays import Floats, group_names, vector
from pyqe.report.figures import (
    ABSTENTION_COLUMNS,
    ABSTENTION_NOTE,
    GROUP_COLUMNS,
    abstention_rows,
    figure_rows,
    group_row,
    shown,
)
from pyqe.report.page import ReportTable, counted, render_page, root_ticks, write_page

if TYPE_CHECKING:
    from pyqe.choice.study import Evaluation

SIZE = 400.0  # width of a chart's plot; templates add the margins
STRIP = 56.0  # height of the bars of counts below the reliability diagram
HALF = 110.0  # height of either half of the histogram
HISTOGRAM_BINS = 20
CURVE_POINTS = 200
COUNTED_BINS = 12  # up to here there is room for the counts as numbers
COVERAGES = tuple(range(10, 101, 10))  # per cent, of the table of risks


@dataclass(frozen=True)
class _Series:
    """Answers with the confidences of one kind.

    Attributes:
        key: class of its marks in the style sheet, "only", "before" or "after".
        label: in legends.
        confidence: float64 [N].
        correct: float64 [N].
        evaluation: of them.
    """

    key: str
    label: str
    confidence: Floats
    correct: Floats
    evaluation: Evaluation


def render_calibration_report(
    confidence: Any,
    correct: Any,
    *,
    groups: Any = None,
    calibrated: Any = None,
    calibrated_correct: Any = None,
    n_bins: int = 10,
    penalties: Sequence[float] = (1, 2),
    title: str = "Calibration",
    summary: Mapping[str, str] | None = None,
    tables: Sequence[ReportTable] = (),
    note: str = "",
) -> str:
    """Render how good confidences are as one HTML page that needs nothing else.

    It has a reliability diagram with counts and 95 % intervals, a histogram of right and of wrong answers, the
    risk-coverage curve, all figures of :func:`pyqe.choice.evaluate`, and the main ones of each group.

    Args:
        confidence: [N], in [0, 1].
        correct: [N], 0 or 1, or graded between.
        groups: [N], names.
        calibrated: [N], in [0, 1], confidences after calibration, which are set against the others.
        calibrated_correct: [N], where calibration changed the answers; otherwise ``correct`` holds for both.
        n_bins: of the reliability diagram and the calibration errors.
        penalties: of wrong answers, for abstention.
        title: heading of the page.
        summary: names and values for the header, such as the model and the temperature.
        tables: further tables for the header.
        note: a sentence below the figures.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    >>> page = render_calibration_report([0.9, 0.8, 0.6, 0.3], [1, 1, 0, 0], title="Four answers")
    >>> "<h1>Four answers</h1>" in page, "<script" in page
    (True, False)
    """
    settings = {"groups": groups, "n_bins": n_bins, "penalties": penalties}
    if calibrated is None:
        series = [_series("only", "answers by confidence", confidence, correct, settings)]
    else:
        after = correct if calibrated_correct is None else calibrated_correct
        series = [
            _series("before", "before calibration", confidence, correct, settings),
            _series("after", "after calibration", calibrated, after, settings),
        ]
    names = None if groups is None else group_names(groups, "groups", length=len(series[0].correct))
    return render_page(
        "calibration.html.jinja",
        ["page.css", "calibration.css"],
        title=title,
        lead=_lead(series),
        facts=_facts(series),
        summary=dict(summary or {}),
        tables=tables,
        note=note,
        series=series,
        figures=_figure_table(series, n_bins),
        abstention=_abstention_table(series),
        reliability=_reliability(series, n_bins),
        histograms=[_histogram(one) for one in series],
        risk=_risk(series),
        groups=None if names is None else _group_table(series, *names),
    )


def write_calibration_report(
    path: str | os.PathLike[str],
    confidence: Any,
    correct: Any,
    *,
    groups: Any = None,
    calibrated: Any = None,
    calibrated_correct: Any = None,
    n_bins: int = 10,
    penalties: Sequence[float] = (1, 2),
    title: str = "Calibration",
    summary: Mapping[str, str] | None = None,
    tables: Sequence[ReportTable] = (),
    note: str = "",
) -> None:
    """Write the page of :func:`render_calibration_report`, whose arguments these are, to ``path``, whole or not at all.

    Raises:
        TypeError, ValueError: as :func:`render_calibration_report`.
        OSError: the folder does not exist or can't be written; an older file stays as it was.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = pathlib.Path(folder) / "calibration.html"
    ...     write_calibration_report(page, [0.9, 0.8, 0.6, 0.3], [1, 1, 0, 0], calibrated=[0.7, 0.6, 0.5, 0.2])
    ...     "after calibration" in page.read_text(encoding="utf-8")
    True
    """
    page = render_calibration_report(
        confidence,
        correct,
        groups=groups,
        calibrated=calibrated,
        calibrated_correct=calibrated_correct,
        n_bins=n_bins,
        penalties=penalties,
        title=title,
        summary=summary,
        tables=tables,
        note=note,
    )
    write_page(path, page)


def _series(key: str, label: str, confidence: Any, correct: Any, settings: Mapping[str, Any]) -> _Series:
    from pyqe.choice.study import evaluate

    sure = vector(confidence, "calibrated" if key == "after" else "confidence", low=0, high=1)
    right = vector(correct, "correct", low=0, high=1, length=len(sure))
    return _Series(key, label, sure, right, evaluate(sure, right, **settings))


# Words and tables -------------------------------------------------------------------------------------------


def _lead(series: Sequence[_Series]) -> str:
    """What the page shows, in a sentence or two."""
    first = series[0]
    text = f"{_per_cent(first.correct.mean())} of the answers are right, {_verdict(first)}."
    return text if len(series) == 1 else f"{text} After calibration: {_verdict(series[1])}."


def _verdict(one: _Series) -> str:
    gap = float(one.confidence.mean() - one.correct.mean())
    mean = f"mean confidence is {_per_cent(one.confidence.mean())}"
    if abs(gap) < 0.005:
        return f"{mean}, within half a point"
    return f"{mean}, {100 * abs(gap):.1f} points too {'high' if gap > 0 else 'low'}"


def _per_cent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _facts(series: Sequence[_Series]) -> list[str]:
    first = series[0].evaluation
    facts = [counted(first.n, "answer")]
    if first.groups:
        facts.append(counted(len(first.groups), "group"))
    return facts


def _figure_table(series: Sequence[_Series], n_bins: int) -> ReportTable:
    columns = [figure_rows(one.evaluation, float(one.confidence.mean()), n_bins) for one in series]
    rows = [[cells[0][0], *(value for _, value in cells)] for cells in zip(*columns, strict=True)]
    return ReportTable("Figures", ["", *(["value"] if len(series) == 1 else ["before", "after"])], rows)


def _abstention_table(series: Sequence[_Series]) -> ReportTable:
    rows = []
    for one in series:
        label = [] if len(series) == 1 else [one.key]
        rows += [[*label, *row] for row in abstention_rows(one.evaluation)]
    label = [] if len(series) == 1 else ["calibration"]
    return ReportTable("Abstention", [*label, *ABSTENTION_COLUMNS], rows, note=ABSTENTION_NOTE)


def _group_table(series: Sequence[_Series], names: Any, numbers: Any) -> ReportTable:
    """The main figures of each group; after calibration those which it is for."""
    first, after = series[0], series[1:]
    rows = []
    for number, name in enumerate(names.tolist()):
        members = numbers == number
        cells = group_row(first.evaluation.groups[str(name)], float(first.confidence[members].mean()))
        for one in after:
            evaluation = one.evaluation.groups[str(name)]
            cells += [shown(float(one.confidence[members].mean())), shown(evaluation.ece), shown(evaluation.brier)]
        rows.append([str(name), *cells])
    added = [f"{name} after" for name in ("confidence", "ECE", "Brier")] if after else []
    return ReportTable("Groups", ["group", *GROUP_COLUMNS, *added], rows)


# Charts -----------------------------------------------------------------------------------------------------


def _reliability(series: Sequence[_Series], n_bins: int) -> dict[str, Any]:
    """Accuracy against confidence of each bin, with intervals, and the counts below."""
    curves = [metrics.reliability_curve(one.correct, one.confidence, n_bins=n_bins) for one in series]
    most = max(int(curve.count.max()) for curve in curves)
    step = SIZE / n_bins
    wide = (step - 3) / len(series)
    drawn = []
    for place, (one, curve) in enumerate(zip(series, curves, strict=True)):
        bins = []
        for number in range(n_bins):
            count = int(curve.count[number])
            tall = STRIP * count / most
            bar = (number * step + 1.5 + place * wide, STRIP - tall, wide, tall)
            bins.append(
                {
                    "range": f"{curve.edges[number]:.3g}–{curve.edges[number + 1]:.3g}",
                    "count": count,
                    "short": _short(count),
                    "bar": bar,
                    "middle": (number + 0.5) * step,
                    **(_dot(curve, number) if count else {"numbers": ["–"] * 4}),
                }
            )
        drawn.append({"key": one.key, "label": one.label, "bins": bins, "lines": _lines(bins)})
    return {"size": SIZE, "strip": STRIP, "series": drawn, "has_counts": n_bins <= COUNTED_BINS}


def _dot(curve: metrics.ReliabilityCurve, number: int) -> dict[str, Any]:
    """Where a bin's mark stands, and the numbers it stands for."""
    accuracy, confidence = float(curve.accuracy[number]), float(curve.confidence[number])
    low, high = float(curve.low[number]), float(curve.high[number])
    return {
        "x": SIZE * confidence,
        "y": SIZE * (1 - accuracy),
        "top": SIZE * (1 - high),
        "bottom": SIZE * (1 - low),
        "numbers": [shown(confidence), shown(accuracy), shown(low), shown(high)],
    }


def _lines(bins: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines through the marks of bins beside each other; an empty bin interrupts them."""
    runs = groupby(bins, key=lambda one: one["count"] > 0)
    return [" ".join(f"{one['x']:.1f},{one['y']:.1f}" for one in run) for filled, run in runs if filled]


def _short(count: int) -> str:
    """A count in at most four characters: 950, 1.2k, 43k, 2.1M."""
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}" if count < 9.95 * unit else f"{count / unit:.0f}{name}"
    return str(count)


def _histogram(one: _Series) -> dict[str, Any]:
    """How many answers have which confidence: right ones upwards, wrong ones downwards.

    Heights go with the square root of the count, as confidences pile up in few bins and the others would vanish.
    Graded answers count in parts for either side.
    """
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    right = np.histogram(one.confidence, edges, weights=one.correct)[0]
    wrong = np.histogram(one.confidence, edges, weights=1 - one.correct)[0]
    most = float(max(right.max(), wrong.max()))
    step = SIZE / HISTOGRAM_BINS
    bins = []
    for number in range(HISTOGRAM_BINS):
        up, down = (HALF * math.sqrt(max(0.0, float(count[number])) / most) for count in (right, wrong))
        bins.append(
            {
                "x": number * step + 1,
                "range": f"{edges[number]:.2f}–{edges[number + 1]:.2f}",
                "up": up,
                "down": down,
                "right": f"{right[number]:,.10g}",
                "wrong": f"{wrong[number]:,.10g}",
            }
        )
    ticks = [(f"{value:,}", HALF * math.sqrt(value / most)) for value in root_ticks(int(most), HALF)]
    return {"key": one.key, "label": one.label, "bins": bins, "wide": step - 2, "half": HALF, "ticks": ticks}


def _risk(series: Sequence[_Series]) -> dict[str, Any]:
    """Risk-coverage curves, what a perfect order would give, and the risk where all is answered."""
    height = SIZE * 0.6
    first = series[0]
    orders = [(one.key, one.label, one.correct, one.confidence) for one in series]
    orders.append(("ideal", "in a perfect order", first.correct, first.correct))
    coverage = np.linspace(0.01, 1, CURVE_POINTS)  # below the hundredth part there is only noise
    drawn = [(key, label, _risk_at(coverage, right, sure), right, sure) for key, label, right, sure in orders]
    always = float(1 - first.correct.mean())
    top = min(1.0, math.ceil(10 * max(0.01, *(float(risk.max()) for _, _, risk, _, _ in drawn))) / 10)
    curves = []
    for key, label, risk, right, sure in drawn:
        points = zip(SIZE * coverage, height * (1 - risk / top), strict=True)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        risks = [shown(value) for value in _risk_at(np.array(COVERAGES) / 100, right, sure).tolist()]
        curves.append({"key": key, "label": label, "path": path, "risks": risks})
    return {
        "curves": curves,
        "height": height,
        "always": height * (1 - always / top),
        "ticks": [(f"{value:.3g}", height * (1 - value / top)) for value in _round_ticks(top)],
        "coverages": COVERAGES,
    }


def _round_ticks(top: float) -> list[float]:
    """0 to ``top``, which is a multiple of .1, in five steps or fewer."""
    step = next(step for step in (0.02, 0.05, 0.1, 0.2) if top <= 5 * step + 1e-9)
    return [number * step for number in range(int(top / step + 1e-9) + 1)]


def _risk_at(coverage: Floats, correct: Floats, confidence: Floats) -> Floats:
    """Share of wrong answers among the most confident ones; of equal confidences all orders count alike."""
    curve = metrics.risk_coverage_curve(correct, confidence)
    hits = np.append(0, curve.coverage * (1 - curve.risk))
    risk: Floats = 1 - np.interp(coverage, np.append(0, curve.coverage), hits) / coverage
    return np.maximum(risk, 0)
