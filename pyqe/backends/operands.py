"""What the backends with kernels of their own look at before pointers go across: the libraries trust them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def on_its_device(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation with its first tensor's GPU as the current one: kernels start on that."""

    @wraps(operation)
    def run(first: Tensor, *args: Any) -> Any:
        if first.device.type == "cpu" or first.device.index == torch.cuda.current_device():
            return operation(first, *args)
        with torch.cuda.device(first.device):
            return operation(first, *args)

    return run


def rows_of(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows, which may be any (non-negative) distance apart."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


def floats(tensor: Tensor | None) -> Tensor | None:
    """The same in float32, contiguous."""
    return None if tensor is None else tensor.float().contiguous()


def check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Raise ValueError unless the tensor has that shape; None has any."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")


def check_rows(n: int, **tensors: Tensor | None) -> None:
    """Raise ValueError unless each tensor has n rows; None has any."""
    for name, tensor in tensors.items():
        if tensor is not None and len(tensor) != n:
            raise ValueError(f"{name}: expected {n} rows, got {len(tensor)}")


def checked_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three with contiguous rows; ValueError where they do not fit together."""
    operands = (("hidden", hidden, [*hidden.shape[:1], weight.shape[1]]), ("bias", bias, [weight.shape[0]]))
    for name, tensor, shape in operands:
        if tensor is not None and (list(tensor.shape) != shape or tensor.dtype != weight.dtype):
            raise ValueError(f"{name}: expected {shape} in {weight.dtype}, got {list(tensor.shape)} in {tensor.dtype}")
    return rows_of(hidden), rows_of(weight), None if bias is None else bias.contiguous()


def row_terms(n: int, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of n rows in float32; ValueError unless there is one for each row."""
    check_shape("scale", scale, n)
    check_shape("shift", shift, n)
    return floats(scale), floats(shift)


def checked_hidden(grad: Tensor, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """hidden with contiguous rows; ValueError where the three do not fit together."""
    check_shape("grad", grad, *token_ids.shape)
    check_shape("hidden", hidden, len(token_ids), hidden.shape[-1])
    return rows_of(hidden)


def sorted_pairs(token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (as places in the flattened ids) sorted by token, where each token's pairs start, and the tokens.

    Waits for the device, as it has to count the tokens.
    """
    tokens, pairs = torch.sort(token_ids.reshape(-1), stable=True)
    padding = int(torch.searchsorted(tokens, 0))
    row_ids, counts = torch.unique_consecutive(tokens[padding:], return_counts=True)
    starts = torch.zeros(len(row_ids) + 1, dtype=torch.int64, device=token_ids.device)
    torch.cumsum(counts, 0, out=starts[1:])
    return pairs[padding:].contiguous(), starts, row_ids.contiguous()
