"""The library of CUDA kernels: loading it, and what every call of it needs.

For tests, the same kernels run on the CPU: with ``PYQE_CUDA_EMULATOR`` set to a folder that holds ``_cuda`` built with
CMake's ``PYQE_CUDA_EMULATED``, this backend serves CPU tensors on an emulator of CUDA's threads.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import Tensor

EMULATOR = os.environ.get("PYQE_CUDA_EMULATOR")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

library: Any = None
_import_error: ImportError | None = None
try:
    if EMULATOR:
        sys.path.insert(0, EMULATOR)
        try:
            library = importlib.import_module("_cuda")
        finally:
            sys.path.remove(EMULATOR)
    else:
        library = importlib.import_module("pyqe._cuda")
except ImportError as error:
    _import_error = error


def unavailable() -> str | None:
    """Why the library cannot be used, or None."""
    if _import_error is not None:
        return f"the CUDA library did not load: {_import_error}"
    return library.obstacle() or None


def stream(tensor: Tensor) -> int:
    """torch's current stream on the tensor's device."""
    return 0 if EMULATOR else torch.cuda.current_stream(tensor.device).cuda_stream


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def row_pointer(matrix: Tensor, row: int) -> int:
    """Where a row starts; slicing would cost a tensor."""
    return matrix.data_ptr() + row * matrix.stride(0) * matrix.element_size()
