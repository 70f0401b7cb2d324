"""Logits of given tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyqe.functional import _ops
from pyqe.functional._arguments import head_matrix, id_matrix
from pyqe.functional._sharded import is_sharded, operator


class _SparseTokenLogits(torch.autograd.Function):
    """The operator with a sparse gradient of the weight (and a dense one of hidden and bias)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight, token_ids)
        ctx.bias_dtype = None if bias is None else bias.dtype
        result: Tensor = torch.ops.pyqe.linear_token_logits(hidden, weight, token_ids, bias)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad
        grad_hidden = torch.ops.pyqe.token_logits_grad_hidden(grad, weight, token_ids) if needs_hidden else None
        grad_weight = None
        if needs_weight:
            ids = token_ids.masked_fill(token_ids >= len(weight), -1)  # on a GPU nothing has refused them
            row_ids, rows = torch.ops.pyqe.token_logits_grad_rows(grad, hidden, ids)
            grad_weight = torch.sparse_coo_tensor(
                row_ids[None], rows, weight.shape, is_coalesced=True, check_invariants=False
            )
        grad_bias = _ops.grad_bias(grad, token_ids, weight.shape[0], ctx.bias_dtype) if needs_bias else None
        return grad_hidden, grad_weight, None, grad_bias


def linear_token_logits(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = None,
    *,
    sparse_grad: bool = False,
) -> Tensor:
    r"""Logits of given tokens: :math:`\langle h, w_{id} \rangle + b_{id}`, O(N K D) instead of O(N V D).

    Differentiable in hidden, weight and bias.

    Args:
        hidden: [..., D], float32, bfloat16, float16 or float64; no wider than ``weight``.
        weight: [V, D].
        token_ids: int64 [...] or [..., K]; -1 is padding and gives NaN (and no gradient).
        bias: [V] in the weight's dtype, or None.
        sparse_grad: the weight's gradient is a coalesced sparse tensor of the touched rows (as
            ``torch.nn.functional.embedding(sparse=True)`` gives one; not under ``torch.compile``).

    Returns:
        float32 (float64 for float64 inputs), shaped as ``token_ids``.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
        IndexError: an id outside [0, V) other than -1 (CPU).
        NotImplementedError: ``sparse_grad`` with a sharded weight, each process of which has few rows.

    Example:
        >>> hidden, weight = torch.ones(1, 2), torch.tensor([[1.0, 0.0], [2.0, 3.0]])
        >>> linear_token_logits(hidden, weight, torch.tensor([[1, 0]]))
        tensor([[5., 1.]])
    """
    matrix = head_matrix(hidden, weight, bias)
    ids = id_matrix(token_ids, hidden.shape[:-1])
    if sparse_grad and is_sharded(weight):
        raise NotImplementedError("sparse_grad: not with a sharded weight")
    if sparse_grad:
        logits = _SparseTokenLogits.apply(matrix, weight, ids, bias)  # type: ignore[no-untyped-call]
    else:
        logits = operator("linear_token_logits", weight)(matrix, weight, ids, bias)
    return logits.reshape(token_ids.shape)
