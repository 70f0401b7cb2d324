"""Token logits, their gradients and vocabulary BCE on the Triton kernels; the arguments are those of reference.py.

Ids out of range give NaN in their row and add nothing to a gradient of the weight. Only
:func:`token_logits_grad_rows`, whose results have as many rows as there are tokens, waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyqe.backends import reference
from pyqe.backends.operands import (
    check_rows,
    check_shape,
    checked_head,
    checked_hidden,
    on_its_device,
    rows_of,
    sorted_pairs,
)
from pyqe.kernels import token_logits
from pyqe.kernels.vocab_bce import vocab_bce


@on_its_device
def linear_token_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> Tensor:
    reference.check_ids("token_ids", token_ids, len(weight))
    check_rows(len(hidden), token_ids=token_ids)
    hidden, weight, bias = checked_head(hidden, weight, bias)
    return token_logits.token_logits(hidden, weight, token_ids, bias)


@on_its_device
def token_logits_grad_hidden(grad: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    reference.check_ids("token_ids", token_ids, len(weight))
    check_shape("grad", grad, *token_ids.shape)
    return token_logits.grad_hidden(grad.float().contiguous(), rows_of(weight), token_ids)


@on_its_device
def token_logits_grad_rows(grad: Tensor, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    hidden = checked_hidden(grad, hidden, token_ids)
    pairs, starts, row_ids = sorted_pairs(token_ids)
    out = hidden.new_empty(len(row_ids), hidden.shape[1])
    places = torch.arange(len(row_ids), device=row_ids.device)
    rows = torch.repeat_interleave(places, starts.diff(), output_size=len(pairs))
    token_logits.add_pairs(grad.float().contiguous(), hidden, rows, pairs, out)
    return row_ids, out


@on_its_device
def token_logits_grad_weight(grad: Tensor, hidden: Tensor, token_ids: Tensor, vocab_size: int) -> Tensor:
    reference.check_ids("token_ids", token_ids, vocab_size)
    hidden = checked_hidden(grad, hidden, token_ids)
    tokens, pairs = torch.sort(token_ids.reshape(-1), stable=True)
    out = hidden.new_zeros(vocab_size, hidden.shape[1])
    token_logits.add_pairs(grad.float().contiguous(), hidden, tokens, pairs, out)
    return out


@on_its_device
def linear_vocab_bce(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    targets: Tensor,
    exclude_ids: Tensor | None,
    row_weights: Tensor,
    pos_weight: float,
    grad_hidden: bool,
    grad_weight: bool,
) -> tuple[Tensor, ...]:
    reference.check_optional_ids(len(weight), targets=targets, exclude=exclude_ids)
    rows = {"scale": scale, "shift": shift, "targets": targets, "exclude_ids": exclude_ids, "row_weights": row_weights}
    check_rows(len(hidden), **rows)
    head = checked_head(hidden, weight, bias)
    return vocab_bce(*head, scale, shift, targets, exclude_ids, row_weights, pos_weight, grad_hidden, grad_weight)
