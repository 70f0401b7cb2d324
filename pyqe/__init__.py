"""pyqe: token-level quality of language model output."""

from __future__ import annotations

__version__ = "0.1.0"
from pyqe.backends import use_backend
