"""Triton kernels behind the operations, for GPUs; in Triton's interpreter with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_CAPABILITY = (8, 0)  # bfloat16 on tensor cores
DEVICES = frozenset({"cpu"} if _INTERPRETED else {"cuda"})
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def unavailable() -> str | None:
    """Why Triton cannot be used, or None."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if _INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.cuda.get_device_capability() < _CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or more, got {torch.cuda.get_device_name()}"
    return None


def _operation(module: str, name: str) -> Callable[..., Any]:
    """An operation of one of the modules beside this one, which is imported when first called: Triton takes .5 s."""
    implementation: Callable[..., Any] | None = None

    def run(*args: Any) -> Any:
        nonlocal implementation
        if implementation is None:
            implementation = getattr(import_module(f"pyqe.backends.{module}"), name)
        return implementation(*args)

    return run


_NAMES = {
    "triton_statistics": (
        "softmax_stats",
        "linear_softmax_stats",
        "sigmoid_stats",
        "linear_sigmoid_stats",
        "linear_joint_stats",
        "linear_sample_negatives",
        "temperature_nll",
        "linear_temperature_nll",
    ),
    "triton_losses": (
        "linear_token_logits",
        "token_logits_grad_hidden",
        "token_logits_grad_rows",
        "token_logits_grad_weight",
        "linear_vocab_bce",
    ),
}
# inverse_softmax is missing: a pass over few probabilities, which torch's own kernels serve as well.
OPERATIONS: dict[str, Callable[..., Any]] = {
    name: _operation(module, name) for module, names in _NAMES.items() for name in names
}
