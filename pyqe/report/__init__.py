"""HTML reports of scored texts: a self-contained page with heat maps, least sure places and a histogram."""

from pyqe.report.html import ReportTable, render_report, write_report

__all__ = ["ReportTable", "render_report", "write_report"]
