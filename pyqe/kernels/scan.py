r"""Statistics of a head's logits: a matrix product whose epilogue reduces, so that no logit reaches memory.

A program takes a block of rows and a range of TILES tiles of tokens. Programs that run side by side share the range, so
its weights are read from memory once and from L2 by the others. For each tile [BLOCK_N, BLOCK_V] in registers

    z = cap((<h_n, w_v> + b_v) * logit_scale)              of the language model's head
    y = scale_n z + token_bias_v + shift_n + <p_n, f_v>    of a Sigmoid Head on it, or on the bare product

go into the accumulators of accumulate.py, and the logits of the tokens asked for are written out as they come by. Each
program leaves one partial result per row; merge.py puts them together. The width of a range is fixed, so is the order
of all sums: a row's result does not depend on the other rows, and two runs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    fold_softmax,
    moments_power,
    store_slots,
)
from pyqe.kernels.common import UNFUSED, config_for, input_precision, product, product_kind
from pyqe.kernels.merge import finish_moments, finish_sigmoid, finish_softmax
from pyqe.kernels.results import MomentRows, SigmoidRows, SoftmaxRows

_RANK_BLOCK = tl.constexpr(16)  # the narrowest product of tensor cores in all dtypes


@triton.jit
def _leading_bits(x):
    """The part of a float32 number that tf32 holds."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _add_low_rank(y, projected, factors, rows, columns, rank):
    """Add ``projected @ factors.T``, with 21 bits of precision from three tf32 products.

    They accumulate in y's own registers; an exact float32 product would need as many again.
    """
    place = tl.arange(0, _RANK_BLOCK)
    for start in range(0, rank, _RANK_BLOCK):
        inside = place < rank - start
        p_place = projected + rows.to(tl.int64)[:, None] * rank + (start + place)[None, :]
        f_place = factors + columns.to(tl.int64)[None, :] * rank + (start + place)[:, None]
        p = tl.load(p_place, mask=inside[None, :], other=0.0)
        f = tl.load(f_place, mask=inside[:, None], other=0.0)
        p_lead, f_lead = _leading_bits(p), _leading_bits(f)
        y = tl.dot(p - p_lead, f_lead, y, input_precision="tf32")
        y = tl.dot(p_lead, f - f_lead, y, input_precision="tf32")
        y = tl.dot(p_lead, f_lead, y, input_precision="tf32")
    return y


@triton.jit
def _cap(z, softcap):
    """``softcap * tanh(z / softcap)``, off by up to 1e-7 softcap: there is no tanh that the interpreter knows too."""
    t = tl.exp2(tl.abs(z) * (-2 * LOG2E / softcap))
    tanh = (1.0 - t) / (1.0 + t)
    return tl.where(z < 0, -tanh, tanh) * softcap


@triton.jit
def _catch(z, start, ids, ids_stride, n_ids, caught, rows, row_mask, BLOCK_V: tl.constexpr):
    """Write the logits of the rows' tokens that lie in this tile; most tiles have none, which costs a look."""
    column = tl.arange(0, BLOCK_V)
    for k in range(n_ids):
        wanted = tl.load(ids + rows.to(tl.int64) * ids_stride + k, mask=row_mask, other=-1) - start
        here = (wanted >= 0) & (wanted < BLOCK_V)
        if tl.max(here.to(tl.int32), 0) > 0:
            chosen = column[None, :] == tl.where(here, wanted, -1).to(tl.int32)[:, None]
            found = tl.sum(tl.where(chosen, z, 0.0), 1)
            tl.store(caught + rows.to(tl.int64) * n_ids + k, found, mask=here)


@triton.jit
def _copy_tile(z, copy, copy_stride, rows, columns):
    """Without masks, which would cost a register each: the copy is as large as whole tiles."""
    tl.store(copy + rows.to(tl.int64)[:, None] * copy_stride + columns[None, :], z)


@triton.jit
def _end_of_vocabulary(z, columns, start, vocab_size, BLOCK_V: tl.constexpr):
    """Minus infinity past the last token; only the last tile looks."""
    if start + BLOCK_V > vocab_size:
        z = tl.where((columns < vocab_size)[None, :], z, float("-inf"))
    return z


@triton.jit
def _by_token(vector, columns, vocab_size):
    return tl.load(vector + columns, mask=columns < vocab_size, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["n_rows", "vocab_size", "n_ids", "n_token_ids", "rank", "n_ranges", "ids_stride"])
def scan_kernel(
    hidden, weight, bias,  # [N, D], [V, D], [V]
    row_scale, row_shift, token_bias, projected, factors,  # [N], [N], [V], [N, rank], [V, rank], float32
    ids,  # [N, n_ids]
    caught, head_caught,  # [N, n_ids], [N, n_token_ids]: logits of the ids
    copy, head_copy,  # [N, V], float32
    partials, head_partials,  # [slots, n_ranges, N]
    beta,  # one float32 number
    n_rows, dim, vocab_size, n_ids, n_token_ids, rank, n_ranges, hidden_stride, weight_stride, ids_stride, copy_stride,
    logit_scale, softcap, tempered_scale, threshold,
    SOFTMAX: tl.constexpr, ENTROPY: tl.constexpr, TEMPERED: tl.constexpr, MOMENTS: tl.constexpr,
    SIGMOID: tl.constexpr, COUNT: tl.constexpr, CAPPED: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    n_row_blocks = tl.cdiv(n_rows, BLOCK_N)
    part = tl.program_id(0) // n_row_blocks
    rows = (tl.program_id(0) % n_row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < n_rows
    near_rows = tl.minimum(rows, n_rows - 1)  # rows and tokens past the end repeat the last: loads need no mask
    first = part * (TILES * BLOCK_V)

    best, best_id = tl.full([BLOCK_N], float("-inf"), tl.float32), tl.zeros([BLOCK_N], tl.int32) + first
    total = tl.zeros([BLOCK_N], tl.float32)
    weighted, tempered = total, total
    head_best, head_best_id, head_total, above = best, best_id, total, tl.zeros([BLOCK_N], tl.int32)

    for tile in range(tl.minimum(TILES, tl.cdiv(vocab_size - first, BLOCK_V))):
        start = first + tile * BLOCK_V
        columns = start + tl.arange(0, BLOCK_V)
        near_columns = tl.minimum(columns, vocab_size - 1)
        z = product(
            hidden, weight, near_rows, near_columns, dim, hidden_stride, weight_stride,
            BLOCK_N, BLOCK_V, BLOCK_D, WHOLE_BLOCKS, PRECISION,
        )  # fmt: skip
        if SOFTMAX or MOMENTS or copy is not None:
            if bias is not None:
                z += _by_token(bias, columns, vocab_size)
            z *= logit_scale
            if CAPPED:
                z = _cap(z, softcap)
        if SOFTMAX:
            z = _end_of_vocabulary(z, columns, start, vocab_size, BLOCK_V)
            old_best = best
            best, best_id = fold_best(z, columns[None, :], best, best_id)
            total, weighted, tempered = fold_softmax(
                z, old_best, best, total, weighted, tempered, tempered_scale, ENTROPY, TEMPERED
            )
        if MOMENTS:
            slope = tl.load(beta)
            z = tl.where(z == float("inf"), float("nan"), z)
            z = _end_of_vocabulary(tl.where(slope < 0, -z, z), columns, start, vocab_size, BLOCK_V)
            old_best = best
            best = tl.maximum(best, tl.max(z, 1))
            total, weighted, tempered = fold_moments(z, old_best, best, total, weighted, tempered, moments_power(slope))
        if SOFTMAX or MOMENTS:
            _catch(z, start, ids, ids_stride, n_ids, caught, rows, row_mask, BLOCK_V)
        if copy is not None:
            _copy_tile(z, copy, copy_stride, rows, columns)
        if SIGMOID:
            if row_scale is not None:
                z *= tl.load(row_scale + near_rows)[:, None]
            if token_bias is not None:
                z += _by_token(token_bias, columns, vocab_size)
            if row_shift is not None:
                z += tl.load(row_shift + near_rows)[:, None]
            if projected is not None:
                z = _add_low_rank(z, projected, factors, near_rows, near_columns, rank)
            z = _end_of_vocabulary(z, columns, start, vocab_size, BLOCK_V)
            head_best, head_best_id = fold_best(z, columns[None, :], head_best, head_best_id)
            head_total, above = fold_sigmoid(z, head_total, above, threshold, COUNT)
            _catch(z, start, ids, ids_stride, n_token_ids, head_caught, rows, row_mask, BLOCK_V)
            if head_copy is not None:
                _copy_tile(z, head_copy, copy_stride, rows, columns)

    plane = n_ranges.to(tl.int64) * n_rows
    place = part.to(tl.int64) * n_rows + rows
    if SOFTMAX:
        store_slots(
            partials + place, plane, row_mask, best, as_float(best_id), total, weighted, tempered, ENTROPY, TEMPERED
        )
    if MOMENTS:
        store_slots(partials + place, plane, row_mask, best, total, weighted, tempered, tempered, True, False)
    if SIGMOID:
        store_slots(
            head_partials + place, plane, row_mask,
            head_best, as_float(head_best_id), head_total, as_float(above), head_total, COUNT, False,
        )  # fmt: skip


@dataclass(frozen=True)
class Head:
    """Where the logits come from: z and y above; None where a term is missing."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    row_scale: Tensor | None = None  # [N]
    row_shift: Tensor | None = None  # [N]
    token_bias: Tensor | None = None  # [V]
    projected: Tensor | None = None  # [N, rank]
    factors: Tensor | None = None  # [V, rank]

    def rows(self, rows: slice) -> Head:
        def part(term: Tensor | None) -> Tensor | None:
            return None if term is None else term[rows]

        if self.row_scale is None and self.row_shift is None and self.projected is None:
            return self
        scale, shift, projected = part(self.row_scale), part(self.row_shift), part(self.projected)
        return replace(self, row_scale=scale, row_shift=shift, projected=projected)


def copy_buffer(like: Tensor, n: int, vocab_size: int) -> Tensor:
    """Float32 buffer for the logits of up to n rows, in whole tiles: rows and columns past the end hold anything."""
    blocks = config_for("scan", like).blocks
    rows, width = (
        triton.cdiv(size, blocks[name]) * blocks[name] for size, name in ((n, "BLOCK_N"), (vocab_size, "BLOCK_V"))
    )
    return like.new_empty(rows, width, dtype=torch.float32)


def scan(
    hidden: Tensor,
    head: Head,
    softmax: SoftmaxRows | None = None,
    sigmoid: SigmoidRows | None = None,
    moments: MomentRows | None = None,
    beta: Tensor | None = None,
    copy: Tensor | None = None,
    head_copy: Tensor | None = None,
) -> None:
    """Fill the statistics asked for, of hidden [N, D] with N > 0.

    Args:
        hidden: contiguous rows, as the weight's.
        head: terms of the logits.
        softmax, moments: of z; at most one of them.
        sigmoid: of y. Its ids are the first columns of those of ``softmax``, if both are there.
        beta: a number in float32, for ``moments``.
        copy, head_copy: take z and y, the very numbers that the statistics are of; see :func:`copy_buffer`.
    """
    n, dim = hidden.shape
    vocab_size = head.weight.shape[0]
    config, product = config_for("scan", hidden), product_kind(hidden.dtype)
    n_ranges = triton.cdiv(vocab_size, config.blocks["BLOCK_V"] * config.blocks["TILES"])
    of_lm = moments or softmax
    tokens, copied = of_lm or sigmoid, copy if head_copy is None else head_copy
    lm_partials, head_partials = (
        None if asked is None else hidden.new_empty(asked.slots, n_ranges, n, dtype=torch.float32)
        for asked in (of_lm, sigmoid)
    )
    scan_kernel[(triton.cdiv(n, config.blocks["BLOCK_N"]) * n_ranges,)](
        hidden, head.weight, head.bias,
        head.row_scale, head.row_shift, head.token_bias, head.projected, head.factors,
        tokens.ids if tokens else None,
        of_lm.token_logits if of_lm else None, sigmoid.token_logits if sigmoid else None,
        copy, head_copy, lm_partials, head_partials, beta,
        n, dim, vocab_size, of_lm.n_ids if of_lm else 0, sigmoid.n_ids if sigmoid else 0,
        0 if head.factors is None else head.factors.shape[1], n_ranges,
        hidden.stride(0), head.weight.stride(0), tokens.ids_stride if tokens else 0,
        0 if copied is None else copied.stride(0),
        head.logit_scale, head.softcap or 1.0, LOG2E.value / (softmax.temperature if softmax else 1.0),
        sigmoid.threshold if sigmoid else 0.0,
        SOFTMAX=softmax is not None, ENTROPY=softmax is not None and softmax.entropy is not None,
        TEMPERED=softmax is not None and softmax.tempered is not None, MOMENTS=moments is not None,
        SIGMOID=sigmoid is not None, COUNT=sigmoid is not None and sigmoid.above is not None,
        CAPPED=head.softcap is not None,
        WHOLE_BLOCKS=dim % config.blocks["BLOCK_D"] == 0, PRECISION=input_precision(product),
        **config.options, **UNFUSED,
    )  # fmt: skip
    if softmax and lm_partials is not None:
        finish_softmax(lm_partials, softmax, vocab_size)
    if moments and lm_partials is not None and beta is not None:
        finish_moments(lm_partials, moments, beta, vocab_size)
    if sigmoid and head_partials is not None:
        finish_sigmoid(head_partials, sigmoid, vocab_size)
