"""Logits of given tokens and their gradients: rows of ``weight`` and ``hidden`` are gathered, O(N K D).

Bound by memory: every program sums products of gathered rows in a tile [rows, columns] of float32 lanes that are
reduced once, at the end. K decides the tile's shape, N never, so a row's result does not depend on its batch.

The weight's gradient sorts the pairs (position, token) by token, so each of its rows is written once, by the programs
that find the token's first pair: no atomics, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyqe.kernels.common import FUSED, narrowed

_LANES = 8192  # float32 accumulators of a program: 64 registers a thread
_MAX_ROWS = 16


def tile_sizes(gathered: int, dim: int) -> dict[str, int]:
    """Rows and columns of a program's tile where so many rows are summed or multiplied at a time."""
    rows = min(triton.next_power_of_2(max(gathered, 1)), _MAX_ROWS)
    return {"BLOCK_K": rows, "BLOCK_D": min(triton.next_power_of_2(dim), _LANES // rows, 1024)}


@triton.jit(do_not_specialize=["k", "vocab_size"])
def forward_kernel(
    hidden,  # [N, D]
    weight,  # [V, D]
    bias,  # [V] or None
    token_ids,  # [N, K]
    out,  # [N, K] float32
    k,
    dim,
    vocab_size,
    hidden_stride,
    weight_stride,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ids = tl.load(token_ids + row * k + columns, mask=columns < k, other=-1)
    valid = (ids >= 0) & (ids < vocab_size)
    rows = weight + tl.where(valid, ids, 0) * weight_stride
    total = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + row * hidden_stride + d, mask=d < dim, other=0.0).to(tl.float32)
        w = tl.load(rows[:, None] + d[None, :], mask=valid[:, None] & (d < dim)[None, :], other=0.0).to(tl.float32)
        total += h[None, :] * w
    logits = tl.sum(total, 1)
    if bias is not None:
        logits += tl.load(bias + ids, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + row * k + columns, tl.where(valid, logits, float("nan")), mask=columns < k)


@triton.jit(do_not_specialize=["k", "vocab_size"])
def grad_hidden_kernel(
    grad,  # [N, K] float32
    weight,  # [V, D]
    token_ids,  # [N, K]
    out,  # [N, D]
    k,
    dim,
    vocab_size,
    weight_stride,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        ids = tl.load(token_ids + row * k + columns, mask=columns < k, other=-1)
        valid = (ids >= 0) & (ids < vocab_size)
        factor = tl.load(grad + row * k + columns, mask=valid, other=0.0)
        factor = tl.where(valid | (ids == -1), factor, float("nan"))
        rows = weight + tl.where(valid, ids, 0) * weight_stride
        w = tl.load(rows[:, None] + d[None, :], mask=valid[:, None] & (d < dim)[None, :], other=0.0).to(tl.float32)
        total += factor[:, None] * w
    tl.store(out + row * dim + d, narrowed(tl.sum(total, 0), out), mask=d < dim)


@triton.jit(do_not_specialize=["n_pairs", "n_rows", "k"])
def add_pairs_kernel(
    grad,  # [N * K] float32
    hidden,  # [N, D]
    out_rows,  # [P] sorted rows of out; negative ones are padding
    pairs,  # [P] their places in grad
    out,  # [rows, D]
    n_pairs,
    n_rows,
    k,
    dim,
    hidden_stride,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row, if its first pair is this program's; the pairs of a row go through BLOCK_K at a time."""
    first = tl.program_id(0)
    row = tl.load(out_rows + first)
    previous = tl.load(out_rows + first - 1, mask=first > 0, other=-1)
    if (row < 0) | (row == previous) | (row >= n_rows):
        return
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    start = first
    more = True
    while more:
        places = start + tl.arange(0, BLOCK_K)
        inside = tl.load(out_rows + places, mask=places < n_pairs, other=-1) == row
        pair = tl.load(pairs + places, mask=inside, other=0)
        factor = tl.load(grad + pair, mask=inside, other=0.0)
        near = hidden + (pair // k) * hidden_stride
        h = tl.load(near[:, None] + d[None, :], mask=inside[:, None] & (d < dim)[None, :], other=0.0).to(tl.float32)
        total += factor[:, None] * h
        start += BLOCK_K
        more = tl.load(out_rows + start, mask=start < n_pairs, other=-1) == row
    tl.store(out + row * dim + d, narrowed(tl.sum(total, 0), out), mask=d < dim)


def token_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [N, D], weight [V, D] with contiguous rows, token_ids [N, K] -> float32 [N, K]; NaN for other ids."""
    (n, k), (vocab_size, dim) = token_ids.shape, weight.shape
    out = torch.empty(n, k, dtype=torch.float32, device=hidden.device)
    if out.numel():
        tile = tile_sizes(k, dim)
        strides = hidden.stride(0), weight.stride(0)
        forward_kernel[n, triton.cdiv(k, tile["BLOCK_K"])](
            hidden, weight, bias, token_ids.contiguous(), out, k, dim, vocab_size, *strides, **tile, **FUSED
        )
    return out


def grad_hidden(grad: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """grad float32 [N, K], weight [V, D] with contiguous rows -> [N, D]; NaN in rows with an id out of range."""
    (n, k), (vocab_size, dim) = token_ids.shape, weight.shape
    out = torch.empty(n, dim, dtype=weight.dtype, device=weight.device)
    if out.numel():
        tile = tile_sizes(k, dim)
        grad_hidden_kernel[n, triton.cdiv(dim, tile["BLOCK_D"])](
            grad, weight, token_ids.contiguous(), out, k, dim, vocab_size, weight.stride(0), **tile, **FUSED
        )
    return out


def add_pairs(grad: Tensor, hidden: Tensor, out_rows: Tensor, pairs: Tensor, out: Tensor) -> None:
    """Write the sum over a row's pairs of ``grad * hidden`` to that row of ``out``.

    Args:
        grad: float32 [N, K], contiguous.
        hidden: [N, D] with contiguous rows.
        out_rows: int64 [P], the pairs' rows of ``out``, sorted; those outside it are left out.
        pairs: int64 [P], their places in ``grad.reshape(-1)``.
        out: [rows, D], contiguous; rows without a pair stay as they are.
    """
    if out_rows.numel() and out.numel():
        dim = hidden.shape[1]
        tile = tile_sizes(_MAX_ROWS, dim)
        sizes = len(out_rows), len(out), grad.shape[1], dim, hidden.stride(0)
        add_pairs_kernel[len(out_rows), triton.cdiv(dim, tile["BLOCK_D"])](
            grad, hidden, out_rows, pairs, out, *sizes, **tile, **FUSED
        )
