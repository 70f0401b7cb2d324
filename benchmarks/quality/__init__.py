"""A study of the Sigmoid Head's quality on text that people judged, from raw text to a report.

PYQE_DATA=/path/to/data python -m benchmarks.quality [-o results] [--limit N]
"""
