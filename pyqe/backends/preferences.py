"""Which GPU backend is the faster one, from a table of measurements kept as data (``preferences.json``)."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import torch


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    text = files("pyqe.backends").joinpath("preferences.json").read_text(encoding="utf-8")
    return json.loads(text)["operations"]


# places of the arguments that ask for single tokens: top_k, dominant and sigmoid_top_k
_CANDIDATES = {"linear_softmax_stats": (7, 10), "linear_joint_stats": (7, 10, 16), "linear_sigmoid_stats": (6,)}


def _variant(operation: str, args: tuple[Any, ...]) -> str:
    """Name of the operation in the table: statistics that need single tokens have an entry of their own."""
    asked = any(args[place] for place in _CANDIDATES.get(operation, ()) if place < len(args))
    return f"{operation}, candidates" if asked else operation


def backend_for(operation: str, rows: int, dtype: torch.dtype, args: tuple[Any, ...]) -> str:
    """Name of the backend to try first for an operation on so many rows of a dtype on a GPU.

    It is that of the first entry that holds: one without ``max_rows`` holds for any number of rows, one without
    ``dtypes`` for all of them.

    Example:
        >>> backend_for("linear_softmax_stats", 8, torch.bfloat16, ())
        'cuda'
    """
    name = str(dtype).removeprefix("torch.")
    for entry in _table().get(_variant(operation, args), ()):
        if rows <= entry.get("max_rows", rows) and name in entry.get("dtypes", (name,)):
            return str(entry["backend"])
    return "cuda"
