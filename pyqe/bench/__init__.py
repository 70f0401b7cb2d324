"""The benchmark suite behind ``pyqe bench``: pyqe beside its rivals, interleaved in one run on one machine.

A suite is a list of cases; a case is one piece of work on inputs of one shape, done by every rival.
:mod:`pyqe.bench.measure` times them and takes their memory; :mod:`pyqe.bench.table` and :mod:`pyqe.bench.plots` show
what comes out.
"""

from __future__ import annotations

from pyqe.bench.case import Case, Rival, Settings, Shape
from pyqe.bench.run import run
from pyqe.bench.suites import SUITES

__all__ = ["SUITES", "Case", "Rival", "Settings", "Shape", "run"]
