"""Triton kernels behind the operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DEVICES = frozenset({"cuda"})
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def unavailable() -> str | None:
    """Why Triton cannot be used, or None."""
    return "not built"


OPERATIONS: dict[str, Callable[..., Any]] = {}
