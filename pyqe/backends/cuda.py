"""CUDA kernels behind the operations.

For tests, the same kernels run on the CPU: with ``PYQE_CUDA_EMULATOR`` set to a folder that holds ``_cuda`` built with
CMake's ``PYQE_CUDA_EMULATED``, this backend serves CPU tensors on an emulator of CUDA's threads.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_EMULATOR = os.environ.get("PYQE_CUDA_EMULATOR")
DEVICES = frozenset({"cpu" if _EMULATOR else "cuda"})
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CENTERS = {"none": 0, "mean": 1, "logsumexp": 2}

_cuda: Any = None
_import_error: ImportError | None = None
try:
    if _EMULATOR:
        sys.path.insert(0, _EMULATOR)
        try:
            _cuda = importlib.import_module("_cuda")
        finally:
            sys.path.remove(_EMULATOR)
    else:
        _cuda = importlib.import_module("pyqe._cuda")
except ImportError as error:
    _import_error = error


def unavailable() -> str | None:
    """Why the CUDA library cannot be used, or None."""
    if _import_error is not None:
        return f"the CUDA library did not load: {_import_error}"
    return _cuda.obstacle() or None


def _stream(tensor: Tensor) -> int:
    """torch's current stream on the tensor's device."""
    return 0 if _EMULATOR else torch.cuda.current_stream(tensor.device).cuda_stream


def _on_its_device(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation with its first tensor's device as the current one: kernels start on that."""

    @wraps(operation)
    def run(first: Tensor, *args: Any) -> Any:
        if _EMULATOR or first.device.index == torch.cuda.current_device():
            return operation(first, *args)
        with torch.cuda.device(first.device):
            return operation(first, *args)

    return run


def _rows(matrix: Tensor) -> Tensor:
    """The same matrix with elements of a row next to each other; rows may be apart."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


@_on_its_device
def inverse_softmax(probs: Tensor, eps: float, center: str) -> Tensor:
    probs = _rows(probs)
    logits = torch.empty(probs.shape, device=probs.device)
    _cuda.inverse_softmax(
        probs=probs.data_ptr(),
        logits=logits.data_ptr(),
        n=probs.shape[0],
        classes=probs.shape[1],
        stride=probs.stride(0),
        eps=eps,
        center=_CENTERS[center],
        dtype=_CODES[probs.dtype],
        stream=_stream(probs),
    )
    return logits


OPERATIONS: dict[str, Callable[..., Any]] = {"inverse_softmax": inverse_softmax}
