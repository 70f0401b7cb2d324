"""HTML reports: scored texts with heat maps, and how good confidences are before and after calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqe._lazy import lazy_getattr
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

_PAGE = "pyqe.report.calibration_page"
__getattr__ = lazy_getattr(__name__, {"render_calibration_report": _PAGE, "write_calibration_report": _PAGE})
