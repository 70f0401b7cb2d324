"""What the backends with kernels of their own look at before pointers go across: the libraries trust them."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows, which may be any (non-negative) distance apart."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def check_pair(name: str, tensor: Tensor, dim: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless a matrix has that width and dtype."""
    if tensor.shape[1] != dim or tensor.dtype != dtype:
        raise ValueError(f"{name}: expected [..., {dim}] in {dtype}, got {list(tensor.shape)} in {tensor.dtype}")


def check_grad(grad: Tensor, token_ids: Tensor) -> None:
    """Raise ValueError unless there is a gradient for each id."""
    if grad.shape != token_ids.shape:
        raise ValueError(f"grad: expected {list(token_ids.shape)} as token_ids, got {list(grad.shape)}")


def checked_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with contiguous rows; ValueError where they do not fit together."""
    check_pair("hidden", hidden, weight.shape[1], weight.dtype)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias: expected [{weight.shape[0]}] in {weight.dtype}, got {list(bias.shape)} in {bias.dtype}"
        )
    return rows_of(hidden), rows_of(weight), None if bias is None else bias.contiguous()


def checked_hidden(grad: Tensor, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """hidden with contiguous rows; ValueError where the three do not fit together."""
    check_grad(grad, token_ids)
    if len(hidden) != len(token_ids):
        raise ValueError(f"hidden: expected {len(token_ids)} rows as token_ids, got {len(hidden)}")
    return rows_of(hidden)


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless labels are [N], or [N, C] as the logits."""
    if labels.shape != logits.shape[: labels.dim()]:
        raise ValueError(f"labels: expected {len(logits)} rows as logits, got {list(labels.shape)}")


def sorted_pairs(token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (as places in the flattened ids) sorted by token, where each token's pairs start, and the tokens."""
    tokens, pairs = torch.sort(token_ids.reshape(-1), stable=True)
    padding = int(torch.searchsorted(tokens, 0))
    row_ids, counts = torch.unique_consecutive(tokens[padding:], return_counts=True)
    starts = torch.zeros(len(row_ids) + 1, dtype=torch.int64, device=token_ids.device)
    torch.cumsum(counts, 0, out=starts[1:])
    return pairs[padding:].contiguous(), starts, row_ids.contiguous()
