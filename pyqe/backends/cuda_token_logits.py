"""Token logits and their gradients on the CUDA backend."""

from __future__ import annotations

import torch
from torch import Tensor

from pyqe.backends import reference
from pyqe.backends.cuda_library import CODES, library, pointer, stream
from pyqe.backends.operands import check_shape, checked_head, checked_hidden, on_its_device, rows_of, sorted_pairs


@on_its_device
def linear_token_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> Tensor:
    hidden, weight, bias = checked_head(hidden, weight, bias)
    check_shape("token_ids", token_ids, len(hidden), token_ids.shape[-1])
    reference.check_ids("token_ids", token_ids, weight.shape[0])
    ids = token_ids.contiguous()
    logits = torch.empty(ids.shape, device=hidden.device)
    library.token_logits(
        hidden=hidden.data_ptr(),
        weight=weight.data_ptr(),
        bias=pointer(bias),
        token_ids=ids.data_ptr(),
        logits=logits.data_ptr(),
        n=ids.shape[0],
        k=ids.shape[1],
        dim=hidden.shape[1],
        vocab=weight.shape[0],
        hidden_stride=hidden.stride(0),
        weight_stride=weight.stride(0),
        dtype=CODES[hidden.dtype],
        stream=stream(hidden),
    )
    return logits


@on_its_device
def token_logits_grad_hidden(grad: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    check_shape("grad", grad, *token_ids.shape)
    reference.check_ids("token_ids", token_ids, weight.shape[0])
    weight, ids, grad = rows_of(weight), token_ids.contiguous(), grad.float().contiguous()
    grad_hidden = weight.new_empty(ids.shape[0], weight.shape[1])
    library.token_logits_grad_hidden(
        grad=grad.data_ptr(),
        weight=weight.data_ptr(),
        token_ids=ids.data_ptr(),
        grad_hidden=grad_hidden.data_ptr(),
        n=ids.shape[0],
        k=ids.shape[1],
        dim=weight.shape[1],
        vocab=weight.shape[0],
        weight_stride=weight.stride(0),
        dtype=CODES[weight.dtype],
        stream=stream(weight),
    )
    return grad_hidden


def _grad_rows(grad: Tensor, hidden: Tensor, k: int, pairs: Tensor, starts: Tensor) -> Tensor:
    """Gradients [R, D] of the rows that have the pairs from starts [R + 1] on."""
    grad = grad.float().contiguous()
    rows = hidden.new_empty(len(starts) - 1, hidden.shape[1])
    library.token_logits_grad_rows(
        grad=grad.data_ptr(),
        hidden=hidden.data_ptr(),
        pairs=pairs.data_ptr(),
        row_starts=starts.data_ptr(),
        grad_rows=rows.data_ptr(),
        rows=rows.shape[0],
        k=k,
        dim=rows.shape[1],
        hidden_stride=hidden.stride(0),
        dtype=CODES[hidden.dtype],
        stream=stream(hidden),
    )
    return rows


@on_its_device
def token_logits_grad_rows(grad: Tensor, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    hidden = checked_hidden(grad, hidden, token_ids)
    pairs, starts, row_ids = sorted_pairs(token_ids)
    return row_ids, _grad_rows(grad, hidden, token_ids.shape[1], pairs, starts)


@on_its_device
def token_logits_grad_weight(grad: Tensor, hidden: Tensor, token_ids: Tensor, vocab_size: int) -> Tensor:
    hidden = checked_hidden(grad, hidden, token_ids)
    reference.check_ids("token_ids", token_ids, vocab_size)
    # 32 bits are half the passes of the sort; ids out of range go to its two ends
    tokens, pairs = torch.sort(token_ids.reshape(-1).clamp(-1, vocab_size).int(), stable=True)
    vocabulary = torch.arange(vocab_size + 1, dtype=torch.int32, device=tokens.device)
    return _grad_rows(grad, hidden, token_ids.shape[1], pairs, torch.searchsorted(tokens, vocabulary))
