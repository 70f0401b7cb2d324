"""Statistics of logits that exist already, in one read, and the order of their tokens.

A program takes a tile [BLOCK_N, BLOCK_V] of rows and tokens at a time, TILES of them, and leaves partial results as
scan.py does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyqe.kernels.accumulate import (
    LOG2E,
    as_float,
    fold_best,
    fold_moments,
    fold_sigmoid,
    fold_soft_labels,
    fold_softmax,
    moments_power,
    store_slots,
)
from pyqe.kernels.common import INTERPRETED, UNFUSED, Config
from pyqe.kernels.merge import finish_moments, finish_sigmoid, finish_softmax
from pyqe.kernels.results import MomentRows, SigmoidRows, SoftmaxRows

TILE = 1024 if INTERPRETED else 4096  # elements
TILES = 2


@triton.jit(do_not_specialize=["n_rows", "vocab_size", "n_parts"])
def rows_kernel(
    logits, soft_labels,  # [N, V], [N, V] in float32 or None
    partials, beta,  # [slots, n_parts, N], one float32 number
    n_rows, vocab_size, n_parts, logits_stride, labels_stride, tempered_scale, threshold,
    SOFTMAX: tl.constexpr, ENTROPY: tl.constexpr, TEMPERED: tl.constexpr, MOMENTS: tl.constexpr,
    SIGMOID: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % n_parts
    rows = (tl.program_id(0) // n_parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < n_rows
    first = part * (TILES * BLOCK_V)
    best, best_id = tl.full([BLOCK_N], float("-inf"), tl.float32), tl.zeros([BLOCK_N], tl.int32) + first
    total, above = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.int32)
    weighted, tempered, target, mass = total, total, total, total
    if MOMENTS:
        slope = tl.load(beta)
        power = moments_power(slope)
    for tile in range(TILES):
        columns = first + tile * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = row_mask[:, None] & (columns < vocab_size)[None, :]
        place = rows.to(tl.int64)[:, None] * logits_stride + columns[None, :]
        z = tl.load(logits + place, mask=inside, other=float("-inf")).to(tl.float32)
        old_best = best
        if MOMENTS:
            z = tl.where(z == float("inf"), float("nan"), z)
            z = tl.where(inside, tl.where(slope < 0, -z, z), float("-inf"))
            best = tl.maximum(best, tl.max(z, 1))
            total, weighted, tempered = fold_moments(z, old_best, best, total, weighted, tempered, power)
        else:
            best, best_id = fold_best(z, columns[None, :], best, best_id)
        if SOFTMAX:
            total, weighted, tempered = fold_softmax(
                z, old_best, best, total, weighted, tempered, tempered_scale, ENTROPY, TEMPERED
            )
        if SIGMOID:
            total, above = fold_sigmoid(z, total, above, threshold, COUNT)
        if soft_labels is not None:
            label_place = rows.to(tl.int64)[:, None] * labels_stride + columns[None, :]
            labels = tl.load(soft_labels + label_place, mask=inside, other=0.0)
            target, mass = fold_soft_labels(z, labels, old_best, best, target, mass)

    plane = n_parts.to(tl.int64) * n_rows
    partials += part.to(tl.int64) * n_rows + rows
    if SOFTMAX:
        store_slots(partials, plane, row_mask, best, as_float(best_id), total, weighted, tempered, ENTROPY, TEMPERED)
    if SIGMOID:
        store_slots(partials, plane, row_mask, best, as_float(best_id), total, as_float(above), total, COUNT, False)
    if MOMENTS:
        store_slots(partials, plane, row_mask, best, total, weighted, tempered, tempered, True, False)
        if soft_labels is not None:
            tl.store(partials + 4 * plane, target, mask=row_mask)
            tl.store(partials + 5 * plane, mass, mask=row_mask)


def rows_config(vocab_size: int) -> Config:
    """A tile of few tokens takes several rows."""
    width = min(TILE, max(16, triton.next_power_of_2(vocab_size)))
    return Config({"BLOCK_N": TILE // width, "BLOCK_V": width, "TILES": 1 if width < TILE else TILES}, num_warps=4)


def reduce_rows(
    logits: Tensor,
    softmax: SoftmaxRows | None = None,
    sigmoid: SigmoidRows | None = None,
    moments: MomentRows | None = None,
    beta: Tensor | None = None,
) -> None:
    """Fill the statistics asked for, one of the three, of logits [N, V] with N > 0 and contiguous rows."""
    n, vocab_size = logits.shape
    config = rows_config(vocab_size)
    n_parts = triton.cdiv(vocab_size, config.blocks["BLOCK_V"] * config.blocks["TILES"])
    wanted = softmax or sigmoid or moments
    assert wanted is not None
    labels = moments.soft_labels if moments else None
    partials = logits.new_empty(wanted.slots, n_parts, n, dtype=torch.float32)
    rows_kernel[(triton.cdiv(n, config.blocks["BLOCK_N"]) * n_parts,)](
        logits, labels, partials, beta,
        n, vocab_size, n_parts, logits.stride(0), 0 if labels is None else labels.stride(0),
        LOG2E.value / (softmax.temperature if softmax else 1.0), sigmoid.threshold if sigmoid else 0.0,
        SOFTMAX=softmax is not None, ENTROPY=softmax is not None and softmax.entropy is not None,
        TEMPERED=softmax is not None and softmax.tempered is not None, MOMENTS=moments is not None,
        SIGMOID=sigmoid is not None, COUNT=sigmoid is not None and sigmoid.above is not None,
        **config.options, **UNFUSED,
    )  # fmt: skip
    if softmax:
        finish_softmax(partials, softmax, vocab_size, logits)
    elif sigmoid:
        finish_sigmoid(partials, sigmoid, vocab_size, logits)
    elif moments and beta is not None:
        finish_moments(partials, moments, beta, vocab_size, logits)


@triton.jit(do_not_specialize=["vocab_size"])
def keys_kernel(logits, keys, vocab_size, logits_stride, BLOCK_V: tl.constexpr):
    """Integers in the order of the logits; of equal ones the lower id is the greater."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < vocab_size
    z = tl.load(logits + row * logits_stride + columns, mask=inside, other=0.0).to(tl.float32)
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)  # minus zero is equal to zero
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    tl.store(keys + row * vocab_size + columns, (order << 32) | (0x7FFFFFFF - columns), mask=inside)


def best_tokens(logits: Tensor, k: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The k greatest logits of each row [N, k], descending, and their ids; equals in the order of their ids.

    ``torch.topk`` promises no order among equals, and takes any of them: so it gets keys [N, V], int64, that differ.
    """
    n, vocab_size = logits.shape
    keys_kernel[(triton.cdiv(vocab_size, TILE), n)](
        logits, keys, vocab_size, logits.stride(0), BLOCK_V=TILE, num_warps=4, **UNFUSED
    )
    best = torch.topk(keys, k, dim=1).values
    order = (best >> 32).int()
    bits = torch.where(order < 0, order ^ 0x7FFFFFFF, order)
    return bits.view(torch.float32), 0x7FFFFFFF - (best & 0x7FFFFFFF)
