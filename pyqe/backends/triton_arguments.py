"""What the operations on the Triton kernels do about their arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def on_device(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: make it that of the first tensor."""

    @wraps(operation)
    def run(first: Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(first):
            return operation(first, *args)

    return run


def check_rows(n: int, **tensors: Tensor | None) -> None:
    """The kernels trust what they are given."""
    for name, tensor in tensors.items():
        if tensor is not None and len(tensor) != n:
            raise ValueError(f"{name}: expected {n} rows, got {len(tensor)}")
