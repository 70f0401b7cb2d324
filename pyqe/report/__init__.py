"""HTML reports of scored texts: a self-contained page with heat maps, least sure places and a histogram."""

from pyqe.report.html import render_report, write_report
from pyqe.report.page import ReportTable

__all__ = ["ReportTable", "render_report", "write_report"]
