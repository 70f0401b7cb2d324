"""Checks of arguments, and their form as matrices of N rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pyqe.backends.reference import compute_dtype
from pyqe.dominant import DominantRule
from pyqe.functional._sharded import is_sharded

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floats(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_ids(ids: Tensor, name: str) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {ids.dtype}")


def head_matrix(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Check a head's arguments; hidden as a matrix [N, D], in the weight's dtype if that is the wider one."""
    check_floats(hidden=hidden, weight=weight, bias=bias)
    if is_sharded(hidden):
        raise TypeError("hidden: expected a plain tensor, the same on every process, got a DTensor (see full_tensor)")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected [V, D] with V, D > 0, got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden: expected [..., {weight.shape[1]}], got shape {tuple(hidden.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias: expected [{weight.shape[0]}] in {weight.dtype}, got {list(bias.shape)} in {bias.dtype}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device} as hidden, got {tensor.device}")
    if hidden.dtype != weight.dtype:
        if torch.promote_types(hidden.dtype, weight.dtype) != weight.dtype:
            raise TypeError(f"hidden: expected {weight.dtype} as weight or narrower, got {hidden.dtype}")
        hidden = hidden.to(weight.dtype)
    return hidden.reshape(-1, weight.shape[1])


def logit_matrix(logits: Tensor) -> Tensor:
    check_floats(logits=logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected [..., V] with V > 0, got shape {tuple(logits.shape)}")
    return logits.reshape(-1, logits.shape[-1])


def id_matrix(ids: Tensor, rows: torch.Size, name: str = "token_ids") -> Tensor:
    """Ids of shape [...] or [..., K] as a matrix [N, K]."""
    check_ids(ids, name)
    if ids.shape == rows:
        return ids.reshape(-1, 1)
    if ids.dim() == len(rows) + 1 and ids.shape[:-1] == rows:
        return ids.reshape(rows.numel(), ids.shape[-1])
    raise ValueError(f"{name}: expected {list(rows)} or {[*rows, 'K']}, got {list(ids.shape)}")


def optional_ids(ids: Tensor | None, rows: torch.Size) -> Tensor | None:
    return None if ids is None else id_matrix(ids, rows)


def check_top_k(top_k: int) -> None:
    if top_k < 0:
        raise ValueError(f"top_k: expected 0 or more, got {top_k}")


def number_like(value: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A number as a tensor on the device of ``like``; a plain one is filled in there, as copying it would wait."""
    if isinstance(value, (int, float)):
        return torch.full((), value, dtype=dtype, device=like.device)
    return torch.as_tensor(value, dtype=dtype, device=like.device)


def per_row(value: Tensor | float | None, rows: torch.Size, like: Tensor, name: str) -> Tensor | None:
    """A number per row [N], from one that broadcasts to the rows [...]."""
    if value is None:
        return None
    tensor = number_like(value, like, compute_dtype(like))
    try:
        return tensor.expand(rows).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {list(rows)}, got {list(tensor.shape)}"
        ) from None


def rule_spec(rule: DominantRule | None) -> str:
    return "" if rule is None else str(rule)


def row_labels(labels: Tensor, rows: torch.Size) -> Tensor:
    """Labels of hidden states [..., D], as [N]."""
    if labels.dtype == torch.int64 and labels.shape == rows:
        return labels.reshape(-1)
    raise ValueError(f"labels: expected int64 {list(rows)}, got {labels.dtype} {list(labels.shape)}")


def class_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels of logits [..., C]: classes, as [N], or probabilities, as a matrix [N, C]."""
    if labels.dtype == torch.int64 and labels.shape == logits.shape[:-1]:
        return labels.reshape(-1)
    if labels.is_floating_point() and labels.shape == logits.shape:
        return labels.reshape(-1, logits.shape[-1])
    raise ValueError(
        f"labels: expected int64 {list(logits.shape[:-1])} or floats {list(logits.shape)}, "
        f"got {labels.dtype} {list(labels.shape)}"
    )
