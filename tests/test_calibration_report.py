"""The page about confidences: what it shows, that nothing can break out of it, and how it is written."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import NASTY, Page

from pyqe.metrics import reliability_curve, risk_coverage_curve
from pyqe.report import ReportTable, render_calibration_report, write_calibration_report


def answers(n: int = 500) -> tuple[Any, Any, Any]:
    """Overconfident confidences, correctness and groups."""
    generator = np.random.default_rng(0)
    confidence = generator.random(n)
    return confidence, generator.random(n) < confidence**2, np.where(np.arange(n) % 3, "b", "a")


def test_nothing_from_outside() -> None:
    source = render_calibration_report(*answers()[:2], calibrated=answers()[0] ** 2)
    assert "<script" not in source
    assert not re.findall(r"(?:src|href)=\"(?!#|data:,)", source)
    assert "default-src 'none'" in source
    assert "script-src 'none'" in source
    assert not re.findall(r"url\(|@import|style=\"", source)


def test_structure() -> None:
    confidence, correct, groups = answers()
    page = Page(render_calibration_report(confidence, correct, groups=groups, calibrated=confidence**2, title="T"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert page.by_tag["h1"] == ["T"]
    anchors = [str(a["href"])[1:] for tag, a in page.tags if tag == "a"]
    assert anchors == ["reliability", "figures", "histogram", "risk", "abstention", "groups"]
    assert set(anchors) <= set(ids)


def test_charts_have_names_and_tables() -> None:
    page = Page(render_calibration_report(*answers()[:2], calibrated=answers()[0] ** 2))
    charts = [a for tag, a in page.tags if tag == "svg"]
    assert len(charts) == 4
    for chart in charts:
        assert chart["role"] == "img"
        title, desc = str(chart["aria-labelledby"]).split()
        assert [tag for tag, a in page.tags if a.get("id") in (title, desc)] == ["title", "desc"]
    assert len(page.by_tag["details"]) == 3


@pytest.mark.parametrize("text", NASTY)
def test_no_text_adds_markup(text: str) -> None:
    confidence, correct, _ = answers(20)

    def render(value: str) -> Page:
        return Page(
            render_calibration_report(
                confidence,
                correct,
                groups=[value] * 20,
                calibrated=confidence,
                title=value,
                summary={value: value},
                tables=[ReportTable(value, [value], [[value]])],
                note=value,
            )
        )

    expected, page = render("plain"), render(text)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in expected.tags]
    assert page.by_tag["h1"] == [text]


def test_bins_are_those_of_the_metrics() -> None:
    confidence, correct, _ = answers()
    page = Page(render_calibration_report(confidence, correct, n_bins=5))
    curve = reliability_curve(correct, confidence, n_bins=5)
    rows = [line for line in page.by_tag["tr"] if re.match(r"0(\.\d)?–", line)][:5]
    assert len(rows) == 5
    for number, row in enumerate(rows):
        assert f"{curve.count[number]}{curve.confidence[number]:.3f}{curve.accuracy[number]:.3f}" in row
        assert row.endswith(f"{curve.low[number]:.3f}{curve.high[number]:.3f}")


def test_marks_stand_where_the_numbers_say() -> None:
    page = Page(render_calibration_report([0.75] * 4 + [0.25] * 4, [1, 1, 1, 0, 1, 0, 0, 0], n_bins=4))
    circles = [(a["cx"], a["cy"]) for tag, a in page.tags if tag == "circle"]
    assert circles == [("100.0", "300.0"), ("300.0", "100.0")]
    lines = [str(a["points"]) for tag, a in page.tags if tag == "polyline"]
    assert lines[:2] == ["100.0,300.0", "300.0,100.0"]  # the empty bin between interrupts it


def test_histogram_counts() -> None:
    page = Page(render_calibration_report([0.0, 0.049, 0.05, 1.0, 1.0], [1, 0, 1, 1, 0]))
    titles = [text for text in page.by_tag["title"] if "right," in text]
    assert len(titles) == 20
    assert titles[0] == "0.00–0.05: 1 right, 1 wrong"
    assert titles[1] == "0.05–0.10: 1 right, 0 wrong"
    assert titles[-1] == "0.95–1.00: 1 right, 1 wrong"


def test_risks() -> None:
    confidence, correct, _ = answers()
    page = Page(render_calibration_report(confidence, correct))
    rows = [line for line in page.by_tag["tr"] if re.match(r"\d+ %", line)]
    curve = risk_coverage_curve(correct, confidence)
    assert len(rows) == 10
    for row, coverage in zip(rows, range(10, 101, 10), strict=True):
        risk = float(curve.risk[curve.coverage.searchsorted(coverage / 100 - 1e-9)])
        ideal = max(0.0, 1 - correct.mean() / (coverage / 100))
        assert row == f"{coverage} %{risk:.3f}{ideal:.3f}"


def test_equal_confidences_have_one_risk() -> None:
    page = Page(render_calibration_report([0.5] * 4, [1, 0, 0, 1]))
    rows = [line for line in page.by_tag["tr"] if re.match(r"\d+ %", line)]
    assert all(" %0.500" in row for row in rows)


def test_figures_before_and_after() -> None:
    confidence, correct, groups = answers()
    source = render_calibration_report(confidence, correct, groups=groups, calibrated=confidence**2)
    page = Page(source)
    assert any("beforeafter" in row for row in page.by_tag["tr"])
    after = [row for row in page.by_tag["tr"] if row.startswith("Mean confidence")]
    assert after == [f"Mean confidence{confidence.mean():.3f}{(confidence**2).mean():.3f}"]
    assert any(row.startswith("groupanswers") and row.endswith("ECE afterBrier after") for row in page.by_tag["tr"])
    assert len([row for row in page.by_tag["tr"] if re.match(r"[ab]\d", row)]) == 2
    assert "points too high" in source


def test_calibration_can_change_the_answers() -> None:
    confidence, correct, _ = answers(50)
    page = Page(
        render_calibration_report(
            confidence, correct, calibrated=confidence, calibrated_correct=np.ones(50, dtype=bool)
        )
    )
    assert [row for row in page.by_tag["tr"] if row.startswith("Accuracy")] == [f"Accuracy{correct.mean():.3f}1.000"]


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_one_class_and_few_answers(n: int, right: int) -> None:
    source = render_calibration_report([1.0] * n, [right] * n, groups=["a"] * n, calibrated=[0.0] * n)
    page = Page(source)
    assert [row for row in page.by_tag["tr"] if row.startswith("AUROC–")] == ["AUROC––"]
    assert "AUROC, 95 % interval––" in page.by_tag["tr"]
    assert not re.search(r"\bnan\b", source)


@pytest.mark.parametrize("n_bins", [1, 12, 13, 100])
def test_counts_as_numbers_where_there_is_room(n_bins: int) -> None:
    page = Page(render_calibration_report(*answers()[:2], n_bins=n_bins))
    assert len(page.by_class.get("count", [])) == (n_bins + 1 if n_bins <= 12 else 0)


def test_large_counts_are_short() -> None:
    page = Page(render_calibration_report(np.full(12345, 0.5), np.arange(12345) % 2, n_bins=2))
    assert page.by_class["count"] == ["n", "0", "12k"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence": [1.5]}, "confidence: expected numbers in"),
        ({"confidence": [float("nan")]}, "confidence: expected numbers in"),
        ({"correct": [2]}, "correct: expected numbers in"),
        ({"correct": [1, 0]}, "correct: expected 1 rows"),
        ({"calibrated": [-0.1]}, "calibrated: expected numbers in"),
        ({"groups": ["a", "b"]}, "groups: expected 1 rows"),
        ({"n_bins": 0}, "n_bins: expected 1 or more"),
        ({"confidence": [], "correct": []}, "expected one row at least"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_calibration_report(**{"confidence": [0.5], "correct": [1], **arguments})


def test_the_same_page_again() -> None:
    assert render_calibration_report(*answers()[:2]) == render_calibration_report(*answers()[:2])


def test_size_does_not_grow_with_the_answers() -> None:
    assert len(render_calibration_report(*answers(50_000)[:2])) < 100_000


def test_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "calibration.html"
    confidence, correct, groups = answers(50)
    write_calibration_report(path, confidence, correct, groups=groups)
    assert path.read_text(encoding="utf-8") == render_calibration_report(confidence, correct, groups=groups)

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_calibration_report(path, confidence, correct)
    assert os.listdir(tmp_path) == ["calibration.html"]
