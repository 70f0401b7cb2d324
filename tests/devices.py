"""Where the tensors of a test live."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pyqe.backends import available_backends

_MAKERS = {
    *(torch.arange, torch.empty, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint),
    *(torch.randn, torch.randperm, torch.tensor, torch.zeros),
}


def device_of(backend: str) -> str:
    """Type of the device that a backend is tested on: a GPU only where it serves nothing else."""
    devices = available_backends()[backend].devices
    return "cpu" if devices is None or "cpu" in devices else next(iter(devices))


class TensorsOn(TorchFunctionMode):
    """Makes the tensors of a file on a device, wherever the file names none.

    What the file calls makes its own as ever: unlike ``torch.device(...)`` as a context, this hides no forgotten
    ``device=`` of the package.
    """

    def __init__(self, device: str, file: str) -> None:
        super().__init__()
        self._device, self._file = device, file

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func not in _MAKERS or "device" in kwargs:
            return func(*args, **kwargs)
        ours = sys._getframe(1).f_code.co_filename == self._file
        return func(*args, **kwargs, **({"device": self._device} if ours else {}))
