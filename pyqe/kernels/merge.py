"""Puts the partial results of scan.py and rows.py together, in the order of the vocabulary, and derives the statistics.

Partials are [slots, parts, N] in float32; ids and counts are kept there bit for bit. One program merges some rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyqe.kernels.accumulate import LOG2E, fold_best, merge_moments, merge_soft_labels, merge_softmax, moments_power
from pyqe.kernels.common import UNFUSED, Config
from pyqe.kernels.results import MomentRows, SigmoidRows, SoftmaxRows

CONFIG = Config({"ROWS": 16, "PARTS": 128}, num_warps=4)


@triton.jit
def _slot(partials, slot, parts, rows, n_parts, n_rows, missing):
    """A tile [rows, parts] of one slot."""
    place = (slot * n_parts + parts[None, :]).to(tl.int64) * n_rows + rows[:, None]
    return tl.load(partials + place, mask=(parts < n_parts)[None, :] & (rows < n_rows)[:, None], other=missing)


@triton.jit
def _integers(tile):
    return tile.to(tl.int32, bitcast=True)


@triton.jit
def _finish_tokens(
    valid, rows, row_mask, vocab_size, ids, ids_stride, n_ids, caught, logits, logits_stride
):  # fmt: skip
    """NaN for ids out of range and rows that are not valid; logits that exist already are looked up."""
    for k in range(n_ids):
        wanted = tl.load(ids + rows.to(tl.int64) * ids_stride + k, mask=row_mask, other=-1)
        inside = (wanted >= 0) & (wanted < vocab_size)
        place = caught + rows.to(tl.int64) * n_ids + k
        if logits is None:
            z = tl.load(place, mask=inside, other=0.0)
        else:
            z = tl.load(logits + rows.to(tl.int64) * logits_stride + wanted, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, tl.where(inside & valid, z, float("nan")), mask=row_mask)


@triton.jit(do_not_specialize=["n_rows", "n_parts", "vocab_size", "n_ids", "ids_stride", "logits_stride"])
def softmax_kernel(
    partials, max_logit, max_logprob, argmax, entropy, tempered_logsumexp,  # [slots, n_parts, N], then [N] each
    ids, caught, logits,  # [N, n_ids], [N, n_ids], [N, V] or None
    n_rows, n_parts, vocab_size, n_ids, ids_stride, logits_stride, temperature,
    ENTROPY: tl.constexpr, TEMPERED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    best, best_id = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.int32)
    total = tl.zeros([ROWS], tl.float32)
    weighted, tempered = total, total
    tempered_scale = LOG2E / temperature
    for start in range(0, n_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        bests = _slot(partials, 0, parts, rows, n_parts, n_rows, float("-inf"))
        best_ids = _integers(_slot(partials, 1, parts, rows, n_parts, n_rows, 0.0))
        totals = _slot(partials, 2, parts, rows, n_parts, n_rows, 0.0)
        weighteds, tempereds = totals, totals
        if ENTROPY:
            weighteds = _slot(partials, 3, parts, rows, n_parts, n_rows, 0.0)
        if TEMPERED:
            tempereds = _slot(partials, 3 + ENTROPY, parts, rows, n_parts, n_rows, 0.0)
        old_best = best
        best, best_id = fold_best(bests, best_ids, best, best_id)
        total, weighted, tempered = merge_softmax(
            bests, totals, weighteds, tempereds, old_best, best, total, weighted, tempered, tempered_scale,
            ENTROPY, TEMPERED,
        )  # fmt: skip
    valid = total > 0  # false for NaN as well
    nan = float("nan")
    log_total = tl.log(tl.where(valid, total, 1.0))
    tl.store(max_logit + rows, tl.where(valid, best, nan), mask=row_mask)
    tl.store(max_logprob + rows, tl.where(valid, -log_total, nan), mask=row_mask)
    tl.store(argmax + rows, tl.where(valid, best_id, -1).to(tl.int64), mask=row_mask)
    if ENTROPY:
        nats = tl.maximum(log_total - weighted / total, 0.0)
        tl.store(entropy + rows, tl.where(valid, nats, nan), mask=row_mask)
    if TEMPERED:
        logsumexp = best / temperature + tl.log(tempered)
        tl.store(tempered_logsumexp + rows, tl.where(valid, logsumexp, nan), mask=row_mask)
    _finish_tokens(valid, rows, row_mask, vocab_size, ids, ids_stride, n_ids, caught, logits, logits_stride)


@triton.jit(do_not_specialize=["n_rows", "n_parts", "vocab_size", "n_ids", "ids_stride", "logits_stride"])
def sigmoid_kernel(
    partials, max_logit, argmax, sum_prob, count_above,  # [slots, n_parts, N], then [N] each
    ids, caught, logits,  # [N, n_ids], [N, n_ids], [N, V] or None
    n_rows, n_parts, vocab_size, n_ids, ids_stride, logits_stride,
    COUNT: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    best, best_id = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.int32)
    # Tiles, added up at the end: Triton 3.6 fails on a loop whose sums over a tile are all that is carried.
    totals, aboves = tl.zeros([ROWS, PARTS], tl.float32), tl.zeros([ROWS, PARTS], tl.int32)
    for start in range(0, n_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        bests = _slot(partials, 0, parts, rows, n_parts, n_rows, float("-inf"))
        best_ids = _integers(_slot(partials, 1, parts, rows, n_parts, n_rows, 0.0))
        best, best_id = fold_best(bests, best_ids, best, best_id)
        totals += _slot(partials, 2, parts, rows, n_parts, n_rows, 0.0)
        if COUNT:
            aboves += _integers(_slot(partials, 3, parts, rows, n_parts, n_rows, 0.0))
    total, above = tl.sum(totals, 1), tl.sum(aboves, 1)
    valid = total == total
    tl.store(max_logit + rows, tl.where(valid, best, float("nan")), mask=row_mask)
    tl.store(argmax + rows, tl.where(valid, best_id, -1).to(tl.int64), mask=row_mask)
    tl.store(sum_prob + rows, total, mask=row_mask)
    if COUNT:
        tl.store(count_above + rows, tl.where(valid, above, -1).to(tl.int64), mask=row_mask)
    _finish_tokens(valid, rows, row_mask, vocab_size, ids, ids_stride, n_ids, caught, logits, logits_stride)


@triton.jit
def _label_logit(label, rows, vocab_size, caught, logits, logits_stride, slope):
    """The label's logit, its sign as the accumulators have it; NaN for a label out of range."""
    inside = (label >= 0) & (label < vocab_size)
    if logits is None:
        z = tl.load(caught + rows, mask=inside, other=0.0)
    else:
        z = tl.load(logits + rows.to(tl.int64) * logits_stride + label, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(slope < 0, -z, z)
    return tl.where(inside, z, float("nan"))


@triton.jit(do_not_specialize=["n_rows", "n_parts", "vocab_size", "labels_stride", "logits_stride"])
def moments_kernel(
    partials, losses, first, second,  # [slots, n_parts, N], then [N] each
    labels, caught, logits,  # [N, 1] or None, [N, 1] or None, [N, V] or None
    beta, n_rows, n_parts, vocab_size, labels_stride, logits_stride,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """NLL of each row under softmax(beta z) and its derivatives in beta; for negative beta the sums are of -z."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    slope = tl.load(beta)
    power = moments_power(slope)
    best, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    mean, spread, target, mass = total, total, total, total
    for start in range(0, n_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        bests = _slot(partials, 0, parts, rows, n_parts, n_rows, float("-inf"))
        old_best = best
        best = tl.maximum(best, tl.max(bests, 1))
        total, mean, spread = merge_moments(
            bests,
            _slot(partials, 1, parts, rows, n_parts, n_rows, 0.0),
            _slot(partials, 2, parts, rows, n_parts, n_rows, 0.0),
            _slot(partials, 3, parts, rows, n_parts, n_rows, 0.0),
            old_best, best, total, mean, spread, power,
        )  # fmt: skip
        if labels is None:
            target, mass = merge_soft_labels(
                bests,
                _slot(partials, 4, parts, rows, n_parts, n_rows, 0.0),
                _slot(partials, 5, parts, rows, n_parts, n_rows, 0.0),
                old_best, best, target, mass,
            )  # fmt: skip
    if labels is not None:
        label = tl.load(labels + rows.to(tl.int64) * labels_stride, mask=row_mask, other=-1)
        target = _label_logit(label, rows, vocab_size, caught, logits, logits_stride, slope) - best
    valid = total > 0
    nan = float("nan")
    log_total = tl.log(tl.where(valid, total, 1.0))
    slant = mean - target
    tl.store(losses + rows, tl.where(valid, log_total - tl.abs(slope) * target, nan), mask=row_mask)
    tl.store(first + rows, tl.where(valid, tl.where(slope < 0, -slant, slant), nan), mask=row_mask)
    tl.store(second + rows, tl.where(valid, spread / total, nan), mask=row_mask)


def _grid(n: int) -> tuple[int]:
    return (triton.cdiv(n, CONFIG.blocks["ROWS"]),)


def _logits_stride(logits: Tensor | None) -> int:
    return 0 if logits is None else logits.stride(0)


def finish_softmax(partials: Tensor, out: SoftmaxRows, vocab_size: int, logits: Tensor | None = None) -> None:
    """Fill ``out`` from partials [slots, parts, N]; logits [N, V] if they exist, else the tokens' are there already."""
    _, n_parts, n = partials.shape
    softmax_kernel[_grid(n)](
        partials, out.max_logit, out.max_logprob, out.argmax, out.entropy, out.tempered,
        out.ids, out.token_logits, logits,
        n, n_parts, vocab_size, out.n_ids, out.ids_stride, _logits_stride(logits), out.temperature,
        ENTROPY=out.entropy is not None, TEMPERED=out.tempered is not None,
        **CONFIG.options, **UNFUSED,
    )  # fmt: skip


def finish_sigmoid(partials: Tensor, out: SigmoidRows, vocab_size: int, logits: Tensor | None = None) -> None:
    """The same for sigmoid statistics."""
    _, n_parts, n = partials.shape
    sigmoid_kernel[_grid(n)](
        partials, out.max_logit, out.argmax, out.sum_prob, out.above,
        out.ids, out.token_logits, logits,
        n, n_parts, vocab_size, out.n_ids, out.ids_stride, _logits_stride(logits),
        COUNT=out.above is not None,
        **CONFIG.options, **UNFUSED,
    )  # fmt: skip


def finish_moments(
    partials: Tensor, out: MomentRows, beta: Tensor, vocab_size: int, logits: Tensor | None = None
) -> None:
    """The same for the terms of a temperature's likelihood; the logits of labels are NaN where they are no ids."""
    _, n_parts, n = partials.shape
    moments_kernel[_grid(n)](
        partials, out.losses, out.first, out.second,
        out.ids, out.token_logits, logits,
        beta, n, n_parts, vocab_size, out.ids_stride, _logits_stride(logits),
        **CONFIG.options, **UNFUSED,
    )  # fmt: skip
