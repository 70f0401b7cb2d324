"""Statistics, negatives and temperature on the Triton kernels; the arguments are those of reference.py.

Statistics of whole rows come straight from the scan. Where single tokens are wanted (top_k, dominant tokens,
negatives), rows go through in chunks of a fixed size whose logits the scan also writes into one buffer.

Nothing here waits for the device, except the samplers: :func:`reference.sample_rows` looks, after each round of draws,
which rows need another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyqe.backends import reference
from pyqe.backends.operands import check_rows, checked_head, floats, on_its_device, rows_of
from pyqe.dominant import DominantRule
from pyqe.kernels.common import INTERPRETED
from pyqe.kernels.results import MomentRows, SigmoidRows, SoftmaxRows
from pyqe.kernels.rows import best_tokens, reduce_rows
from pyqe.kernels.scan import Head, copy_buffer, scan

# Rows whose logits are kept at a time: 131 MB for a vocabulary of 128256, and two blocks of rows for each range.
CHUNK_ROWS = 64 if INTERPRETED else 256
SCAN_ROWS = 32768  # rows whose partial results are kept at a time, 80 MB for that vocabulary


def _chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _joined_ids(n: int, token_ids: Tensor | None, choice_ids: Tensor | None) -> Tensor | None:
    """Token ids [N, K] and choices [N, C] (or [1, C] for all rows) beside each other."""
    given = [rows_of(ids.expand(n, -1)) for ids in (token_ids, choice_ids) if ids is not None]
    return torch.cat(given, 1) if len(given) == 2 else given[0] if given else None


class _Ranking:
    """Single tokens of N rows: those of the greatest logits, and the dominant ones."""

    def __init__(self, like: Tensor, n: int, vocab_size: int, top_k: int, rule: DominantRule | None = None) -> None:
        self.k, self.rule = min(top_k, vocab_size), rule
        self.max_size = rule.max_size(vocab_size) if rule else 0
        self.width = max(self.k, min(self.max_size + 1, vocab_size) if rule else 0)

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return like.new_empty(shape, dtype=dtype)

        one = (n,) if rule else (n, 0)
        self.topk_logits, self.topk_ids = empty(n, self.k, dtype=torch.float32), empty(n, self.k)
        self.dominant_ids, self.size, self.mass = empty(n, self.max_size), empty(*one), empty(*one, dtype=torch.float32)
        self._keys = empty(min(n, CHUNK_ROWS), vocab_size) if self.width else None

    def fill(self, rows: slice, logits: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor] | None:
        """Greatest logits of the rows, which are a chunk; ``maximum`` is NaN where a row is invalid."""
        if self._keys is None:
            return None
        values, ids = best_tokens(logits, self.width, self._keys[: len(logits)])
        invalid = maximum.isnan()[:, None]
        self.topk_logits[rows] = values[:, : self.k].masked_fill(invalid, torch.nan)
        self.topk_ids[rows] = ids[:, : self.k].masked_fill(invalid, -1)
        return values, ids

    def fill_dominant(self, rows: slice, best: tuple[Tensor, Tensor] | None, stats: SoftmaxRows) -> None:
        if self.rule is None or best is None:
            return
        n = len(stats.max_logit)

        def padded(tensor: Tensor) -> Tensor:
            """Always as many rows: torch's order of summation depends on their number."""
            return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, CHUNK_ROWS - n))

        logits, ids = (padded(tensor[:, : self.max_size + 1]) for tensor in best)
        entropy = padded(stats.entropy) if self.rule.kind == "eta" and stats.entropy is not None else None
        found = reference.dominant_of_sorted(
            logits, ids, self.max_size, padded(stats.max_logit), padded(-stats.max_logprob), entropy, self.rule
        )
        self.dominant_ids[rows], self.size[rows], self.mass[rows] = (tensor[:n] for tensor in found)


class _Softmax:
    """Softmax statistics of N rows: what is asked for, and the results."""

    def __init__(
        self,
        like: Tensor,
        n: int,
        vocab_size: int,
        token_ids: Tensor | None,
        choice_ids: Tensor | None,
        top_k: int,
        temperature: float | None,
        entropy: bool,
        dominant: str,
    ) -> None:
        reference.check_optional_ids(vocab_size, token_ids=token_ids, choice_ids=choice_ids)
        check_rows(n, token_ids=token_ids)
        rule = DominantRule.parse(dominant) if dominant else None
        self.n_tokens = 0 if token_ids is None else token_ids.shape[1]
        self.entropy = entropy
        ids = _joined_ids(n, token_ids, choice_ids)
        needs_entropy = entropy or (rule is not None and rule.kind == "eta")
        self.stats = SoftmaxRows.of(like, n, ids, needs_entropy, temperature)
        self.ranking = _Ranking(like, n, vocab_size, top_k, rule)

    def rank(self, rows: slice, logits: Tensor) -> None:
        part = self.stats.rows(rows)
        self.ranking.fill_dominant(rows, self.ranking.fill(rows, logits, part.max_logit), part)

    def results(self) -> tuple[Tensor, ...]:
        stats, ranking = self.stats, self.ranking

        def none() -> Tensor:  # a new one each time, as an operator's results must not share memory
            return stats.max_logit.new_empty(len(stats.max_logit), 0)

        caught = none() if stats.token_logits is None else stats.token_logits
        tokens, choices = caught[:, : self.n_tokens], caught[:, self.n_tokens :]
        if tokens.shape[1] and choices.shape[1]:
            tokens, choices = tokens.clone(), choices.clone()
        return (
            stats.max_logit,
            stats.max_logprob,
            stats.argmax,
            stats.entropy if self.entropy and stats.entropy is not None else none(),
            tokens if tokens.shape[1] else none(),
            none() if stats.tempered is None else stats.tempered,
            ranking.topk_logits,
            ranking.topk_ids,
            choices if choices.shape[1] else none(),
            ranking.dominant_ids,
            ranking.size,
            ranking.mass,
        )


class _Sigmoid:
    """The same for sigmoid statistics."""

    def __init__(
        self, like: Tensor, n: int, vocab_size: int, token_ids: Tensor | None, top_k: int, threshold: float | None
    ) -> None:
        reference.check_optional_ids(vocab_size, token_ids=token_ids)
        check_rows(n, token_ids=token_ids)
        ids = None if token_ids is None else rows_of(token_ids)
        logit = None if threshold is None else reference.threshold_logit(threshold)
        self.stats = SigmoidRows.of(like, n, ids, logit)
        self.ranking = _Ranking(like, n, vocab_size, top_k)

    def rank(self, rows: slice, logits: Tensor) -> None:
        self.ranking.fill(rows, logits, self.stats.max_logit[rows])

    def results(self) -> tuple[Tensor, ...]:
        stats, n = self.stats, len(self.stats.max_logit)
        return (
            stats.max_logit,
            stats.argmax,
            stats.sum_prob,
            stats.argmax.new_empty(n, 0) if stats.above is None else stats.above,
            stats.max_logit.new_empty(n, 0) if stats.token_logits is None else stats.token_logits,
            self.ranking.topk_logits,
            self.ranking.topk_ids,
        )


def _scan_in_chunks(hidden: Tensor, head: Head, softmax: _Softmax | None, sigmoid: _Sigmoid | None) -> None:
    n, vocab_size = len(hidden), len(head.weight)
    copy, head_copy = (
        copy_buffer(hidden, min(n, CHUNK_ROWS), vocab_size) if asked is not None and asked.ranking.width else None
        for asked in (softmax, sigmoid)
    )
    for rows in _chunks(n, SCAN_ROWS if copy is None and head_copy is None else CHUNK_ROWS):
        scan(
            hidden[rows],
            head.rows(rows),
            softmax=None if softmax is None else softmax.stats.rows(rows),
            sigmoid=None if sigmoid is None else sigmoid.stats.rows(rows),
            copy=copy,
            head_copy=head_copy,
        )
        for asked, buffer in ((softmax, copy), (sigmoid, head_copy)):
            if asked is not None and buffer is not None:
                asked.rank(rows, buffer[: rows.stop - rows.start, :vocab_size])


@on_its_device
def linear_softmax_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    hidden, weight, bias = checked_head(hidden, weight, bias)
    softmax = _Softmax(hidden, len(hidden), len(weight), *options)
    _scan_in_chunks(hidden, Head(weight, bias, logit_scale, logit_softcap), softmax, None)
    return softmax.results()


@on_its_device
def linear_sigmoid_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    hidden, weight, bias = checked_head(hidden, weight, bias)
    check_rows(len(hidden), scale=scale, shift=shift)
    sigmoid = _Sigmoid(hidden, len(hidden), len(weight), *options)
    head = Head(weight, row_scale=floats(scale), row_shift=floats(shift), token_bias=bias)
    _scan_in_chunks(hidden, head, None, sigmoid)
    return sigmoid.results()


@on_its_device
def linear_joint_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    token_ids: Tensor | None,
    choice_ids: Tensor | None,
    top_k: int,
    temperature: float | None,
    entropy: bool,
    dominant: str,
    scale: Tensor,
    shift: Tensor,
    token_bias: Tensor | None,
    projected: Tensor | None,
    factors: Tensor | None,
    sigmoid_top_k: int,
    threshold: float | None,
) -> tuple[Tensor, ...]:
    hidden, weight, bias = checked_head(hidden, weight, bias)
    n, vocab_size = len(hidden), len(weight)
    check_rows(n, scale=scale, shift=shift, projected=projected)
    check_rows(vocab_size, token_bias=token_bias, factors=factors)
    softmax = _Softmax(hidden, n, vocab_size, token_ids, choice_ids, top_k, temperature, entropy, dominant)
    sigmoid = _Sigmoid(hidden, n, vocab_size, token_ids, sigmoid_top_k, threshold)
    terms = (floats(term) for term in (scale, shift, token_bias, projected, factors))
    _scan_in_chunks(hidden, Head(weight, bias, logit_scale, logit_softcap, *terms), softmax, sigmoid)
    return (*softmax.results(), *sigmoid.results())


@on_its_device
def softmax_stats(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    logits = rows_of(logits)
    softmax = _Softmax(logits, *logits.shape, *options)
    for rows in _chunks(len(logits), CHUNK_ROWS if softmax.ranking.width else SCAN_ROWS):
        reduce_rows(logits[rows], softmax=softmax.stats.rows(rows))
        softmax.rank(rows, logits[rows])
    return softmax.results()


@on_its_device
def sigmoid_stats(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    logits = rows_of(logits)
    sigmoid = _Sigmoid(logits, *logits.shape, *options)
    for rows in _chunks(len(logits), CHUNK_ROWS if sigmoid.ranking.width else SCAN_ROWS):
        reduce_rows(logits[rows], sigmoid=sigmoid.stats.rows(rows))
        sigmoid.rank(rows, logits[rows])
    return sigmoid.results()


# --- negatives ------------------------------------------------------------------------------------------------------


@on_its_device
def linear_sample_negatives(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    targets: Tensor,
    seed: Tensor,
    *options: Any,
) -> Tensor:
    hidden, weight, bias = checked_head(hidden, weight, bias)
    check_rows(len(hidden), targets=targets)
    reference.check_ids("targets", targets, len(weight))
    if len(hidden) == 0:
        return targets.new_empty(0, sum(options[1]))
    head = Head(weight, bias, logit_scale, logit_softcap)
    copy = copy_buffer(hidden, CHUNK_ROWS, len(weight))

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for chunk in _chunks(len(hidden), CHUNK_ROWS):
            scan(hidden[chunk], head, copy=copy)
            for rows in _chunks(chunk.stop - chunk.start, reference.ROW_BLOCK):
                block = copy[rows.start : rows.start + reference.ROW_BLOCK, : len(weight)]
                yield slice(chunk.start + rows.start, chunk.start + rows.stop), block

    return reference.sample_blocks(blocks(), targets, int(seed), *options)


# --- temperature ----------------------------------------------------------------------------------------------------


def _float32(number: Tensor, device: torch.device) -> Tensor:
    """A number on the device, without a copy from pageable memory, which would wait."""
    if number.device == device:
        return number.float()
    return torch.full((), float(number), device=device)


def _means(out: MomentRows) -> tuple[Tensor, Tensor, Tensor]:
    return out.losses.double().mean(), out.first.double().mean(), out.second.double().mean()


@on_its_device
def temperature_nll(logits: Tensor, labels: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = rows_of(logits)
    check_rows(len(logits), labels=labels)
    if labels.dim() == 1:
        reference.check_ids("labels", labels, logits.shape[1])
    else:
        labels = rows_of(labels.float())
    out, beta = MomentRows.of(logits, labels), _float32(beta, logits.device)
    for rows in _chunks(len(logits), SCAN_ROWS):
        reduce_rows(logits[rows], moments=out.rows(rows), beta=beta)
    return _means(out)


@on_its_device
def linear_temperature_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    labels: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = checked_head(hidden, weight, bias)
    check_rows(len(hidden), labels=labels)
    reference.check_ids("labels", labels, len(weight))
    head = Head(weight, bias, logit_scale, logit_softcap)
    out, beta = MomentRows.of(hidden, labels), _float32(beta, hidden.device)
    for rows in _chunks(len(hidden), SCAN_ROWS):
        scan(hidden[rows], head, moments=out.rows(rows), beta=beta)
    return _means(out)
