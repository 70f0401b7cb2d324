"""HTML reports: scored texts with heat maps, and how good confidences are before and after calibration."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyqe.report.html import render_report, write_report
from pyqe.report.page import ReportTable

if TYPE_CHECKING:
    from pyqe.report.calibration_page import render_calibration_report, write_calibration_report

__all__ = [
    "ReportTable",
    "render_calibration_report",
    "render_report",
    "write_calibration_report",
    "write_report",
]


def __getattr__(name: str) -> Any:  # scikit-learn and scipy, which the other page does without, take a second
    if name not in ("render_calibration_report", "write_calibration_report"):
        raise AttributeError(f"module 'pyqe.report' has no attribute {name!r}")
    return getattr(importlib.import_module("pyqe.report.calibration_page"), name)
