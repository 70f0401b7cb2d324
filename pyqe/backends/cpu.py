"""Operations of the C++ library, ``pyqe._C``: pointers, sizes and strides of contiguous rows go across."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from pyqe import _C

    _import_error = None
except ImportError as error:  # the package runs on the reference backend without it; `pyqe doctor` says why
    _import_error = str(error)

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CENTER_CODES = {"none": 0, "mean": 1, "logsumexp": 2}
DTYPES = frozenset(_DTYPE_CODES)


def unavailable() -> str | None:
    """Why the library cannot be used, or None."""
    return None if _import_error is None else f"the C++ library did not load: {_import_error}"


def features() -> list[str]:
    """Instruction sets of this processor that matter here; none without the library."""
    return [] if _import_error is not None else _C.cpu_features()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows, which may be any (non-negative) distance apart."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def _check_pair(name: str, tensor: Tensor, dim: int, dtype: torch.dtype) -> None:
    """The library trusts what it is given: look before pointers go across."""
    if tensor.shape[1] != dim or tensor.dtype != dtype:
        raise ValueError(f"{name}: expected [..., {dim}] in {dtype}, got {list(tensor.shape)} in {tensor.dtype}")


def _check_grad(grad: Tensor, token_ids: Tensor) -> None:
    if grad.shape != token_ids.shape:
        raise ValueError(f"grad: expected {list(token_ids.shape)} as token_ids, got {list(grad.shape)}")


def linear_token_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> Tensor:
    _check_pair("hidden", hidden, weight.shape[1], weight.dtype)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias: expected [{weight.shape[0]}] in {weight.dtype}, got {list(bias.shape)} in {bias.dtype}"
        )
    if len(token_ids) != len(hidden):
        raise ValueError(f"token_ids: expected {len(hidden)} rows as hidden, got {len(token_ids)}")
    hidden, weight, ids = _rows(hidden), _rows(weight), token_ids.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty(ids.shape, dtype=torch.float32)
    _C.token_logits_forward(
        hidden.data_ptr(),
        weight.data_ptr(),
        _pointer(bias),
        ids.data_ptr(),
        out.data_ptr(),
        n=ids.shape[0],
        k=ids.shape[1],
        dim=hidden.shape[1],
        vocab=weight.shape[0],
        hidden_stride=hidden.stride(0),
        weight_stride=weight.stride(0),
        dtype=_DTYPE_CODES[hidden.dtype],
        threads=torch.get_num_threads(),
    )
    return out


def token_logits_grad_hidden(grad: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    _check_grad(grad, token_ids)
    weight, ids, grad = _rows(weight), token_ids.contiguous(), grad.float().contiguous()
    out = torch.empty(ids.shape[0], weight.shape[1], dtype=weight.dtype)
    _C.token_logits_backward_hidden(
        grad.data_ptr(),
        weight.data_ptr(),
        ids.data_ptr(),
        out.data_ptr(),
        n=ids.shape[0],
        k=ids.shape[1],
        dim=weight.shape[1],
        vocab=weight.shape[0],
        weight_stride=weight.stride(0),
        dtype=_DTYPE_CODES[weight.dtype],
        threads=torch.get_num_threads(),
    )
    return out


def _sorted_pairs(token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (as places in the flattened ids) sorted by token, where each token's pairs start, and the tokens."""
    tokens, pairs = torch.sort(token_ids.reshape(-1), stable=True)
    padding = int(torch.searchsorted(tokens, 0))
    row_ids, counts = torch.unique_consecutive(tokens[padding:], return_counts=True)
    starts = torch.zeros(len(row_ids) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=starts[1:])
    return pairs[padding:].contiguous(), starts, row_ids.contiguous()


def _accumulate_rows(
    grad: Tensor, hidden: Tensor, k: int, pairs: Tensor, starts: Tensor, row_ids: Tensor | None, out: Tensor
) -> None:
    _C.token_logits_backward_weight(
        grad.data_ptr(),
        hidden.data_ptr(),
        pairs.data_ptr(),
        starts.data_ptr(),
        _pointer(row_ids),
        out.data_ptr(),
        rows=len(starts) - 1,
        k=k,
        dim=hidden.shape[1],
        hidden_stride=hidden.stride(0),
        out_stride=out.stride(0),
        dtype=_DTYPE_CODES[hidden.dtype],
        threads=torch.get_num_threads(),
    )


def _checked_hidden(grad: Tensor, hidden: Tensor, token_ids: Tensor) -> Tensor:
    _check_grad(grad, token_ids)
    if len(hidden) != len(token_ids):
        raise ValueError(f"hidden: expected {len(token_ids)} rows as token_ids, got {len(hidden)}")
    return _rows(hidden)


def token_logits_grad_rows(grad: Tensor, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    pairs, starts, row_ids = _sorted_pairs(token_ids)
    hidden = _checked_hidden(grad, hidden, token_ids)
    out = torch.empty(len(row_ids), hidden.shape[1], dtype=hidden.dtype)
    _accumulate_rows(grad.float().contiguous(), hidden, token_ids.shape[1], pairs, starts, None, out)
    return row_ids, out


def token_logits_grad_weight(grad: Tensor, hidden: Tensor, token_ids: Tensor, vocab_size: int) -> Tensor:
    pairs, starts, row_ids = _sorted_pairs(token_ids)
    hidden = _checked_hidden(grad, hidden, token_ids)
    if len(row_ids) and int(row_ids[-1]) >= vocab_size:
        raise IndexError(f"token_ids: expected ids in [0, {vocab_size}), got {int(row_ids[-1])}")
    out = torch.zeros(vocab_size, hidden.shape[1], dtype=hidden.dtype)
    _accumulate_rows(grad.float().contiguous(), hidden, token_ids.shape[1], pairs, starts, row_ids, out)
    return out


def inverse_softmax(probs: Tensor, eps: float, center: str) -> Tensor:
    probs = _rows(probs if probs.dtype == torch.float32 else probs.float())
    out = torch.empty(probs.shape, dtype=torch.float32)
    _C.inverse_softmax(
        probs.data_ptr(),
        out.data_ptr(),
        n=probs.shape[0],
        classes=probs.shape[1],
        probs_stride=probs.stride(0),
        eps=eps,
        center=_CENTER_CODES[center],
        dtype=_DTYPE_CODES[probs.dtype],
        threads=torch.get_num_threads(),
    )
    return out


def temperature_nll(logits: Tensor, labels: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if labels.shape != logits.shape[: labels.dim()]:
        raise ValueError(f"labels: expected {len(logits)} rows as logits, got {list(labels.shape)}")
    logits = _rows(logits)
    hard = labels.dim() == 1
    labels = labels.contiguous() if hard else _rows(labels.float())
    nll, first, second = _C.temperature_nll(
        logits.data_ptr(),
        labels.data_ptr() if hard else 0,
        0 if hard else labels.data_ptr(),
        n=logits.shape[0],
        classes=logits.shape[1],
        beta=float(beta),
        logits_stride=logits.stride(0),
        soft_labels_stride=0 if hard else labels.stride(0),
        dtype=_DTYPE_CODES[logits.dtype],
        threads=torch.get_num_threads(),
    )
    return (
        torch.tensor(nll, dtype=torch.float64),
        torch.tensor(first, dtype=torch.float64),
        torch.tensor(second, dtype=torch.float64),
    )


OPERATIONS: dict[str, Callable[..., Any]] = {
    "linear_token_logits": linear_token_logits,
    "token_logits_grad_hidden": token_logits_grad_hidden,
    "token_logits_grad_rows": token_logits_grad_rows,
    "token_logits_grad_weight": token_logits_grad_weight,
    "inverse_softmax": inverse_softmax,
    "temperature_nll": temperature_nll,
}
