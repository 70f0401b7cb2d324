"""CUDA kernels behind the operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyqe.backends import cuda_sampling, cuda_statistics, cuda_temperature, cuda_token_logits
from pyqe.backends.cuda_library import CODES, EMULATOR, library, stream, unavailable
from pyqe.backends.operands import on_its_device, rows_of

__all__ = ["DEVICES", "DTYPES", "OPERATIONS", "unavailable"]

DEVICES = frozenset({"cpu" if EMULATOR else "cuda"})
DTYPES = frozenset(CODES)

_CENTERS = {"none": 0, "mean": 1, "logsumexp": 2}


@on_its_device
def inverse_softmax(probs: Tensor, eps: float, center: str) -> Tensor:
    probs = rows_of(probs)
    logits = torch.empty(probs.shape, device=probs.device)
    library.inverse_softmax(
        probs=probs.data_ptr(),
        logits=logits.data_ptr(),
        n=probs.shape[0],
        classes=probs.shape[1],
        stride=probs.stride(0),
        eps=eps,
        center=_CENTERS[center],
        dtype=CODES[probs.dtype],
        stream=stream(probs),
    )
    return logits


OPERATIONS: dict[str, Callable[..., Any]] = {
    "inverse_softmax": inverse_softmax,
    "linear_joint_stats": cuda_statistics.linear_joint_stats,
    "linear_sample_negatives": cuda_sampling.linear_sample_negatives,
    "linear_sigmoid_stats": cuda_statistics.linear_sigmoid_stats,
    "linear_softmax_stats": cuda_statistics.linear_softmax_stats,
    "linear_temperature_nll": cuda_temperature.linear_temperature_nll,
    "linear_token_logits": cuda_token_logits.linear_token_logits,
    "sample_negatives": cuda_sampling.sample_negatives,
    "sigmoid_stats": cuda_statistics.sigmoid_stats,
    "softmax_stats": cuda_statistics.softmax_stats,
    "temperature_nll": cuda_temperature.temperature_nll,
    "token_logits_grad_hidden": cuda_token_logits.token_logits_grad_hidden,
    "token_logits_grad_rows": cuda_token_logits.token_logits_grad_rows,
    "token_logits_grad_weight": cuda_token_logits.token_logits_grad_weight,
}
