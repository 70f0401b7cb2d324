"""Which GPU backend is the faster one, from a table of measurements kept as data (``preferences.json``)."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    text = files("pyqe.backends").joinpath("preferences.json").read_text(encoding="utf-8")
    return json.loads(text)["operations"]


def _variant(operation: str, args: tuple[Any, ...]) -> str:
    """Name of the operation in the table: statistics that need single tokens have an entry of their own."""
    if operation in ("linear_softmax_stats", "linear_joint_stats") and len(args) > 10 and (args[7] or args[10]):
        return f"{operation}, candidates"
    if operation == "linear_sigmoid_stats" and len(args) > 6 and args[6]:
        return f"{operation}, candidates"
    return operation


def backend_for(operation: str, rows: int, args: tuple[Any, ...]) -> str:
    """Name of the backend to try first for an operation on so many rows of a GPU.

    Example:
        >>> backend_for("linear_softmax_stats", 8, ())
        'cuda'
    """
    entries = _table().get(_variant(operation, args), ())
    return next((entry["backend"] for entry in entries if rows <= entry.get("max_rows", rows)), "cuda")
