"""Scores of tokens, from the hidden states that predict them and the LM's softmax statistics."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pyqe import functional as F
from pyqe.dominant import DominantRule
from pyqe.functional import SoftmaxStats
from pyqe.heads import Base, SigmoidHead
from pyqe.scored import SIGNALS, Signal


def check_signals(signals: Collection[Signal], head: SigmoidHead | None) -> tuple[Signal, ...]:
    """The signals in their order.

    Raises:
        ValueError: none, an unknown one, or the quality without a head.
    """
    if isinstance(signals, str) or not signals or not set(signals) <= set(SIGNALS):
        raise ValueError(f"signals: expected some of {', '.join(SIGNALS)}, got {signals!r}")
    if "quality" in signals and head is None:
        raise ValueError("signals: 'quality' needs a Sigmoid Head, and there is none")
    return tuple(signal for signal in SIGNALS if signal in signals)


def base_wanted(signals: Collection[Signal], head: SigmoidHead | None) -> Base | None:
    """What of the LM the quality starts from: the tokens' "logit" or "logprob"; None where it needs neither."""
    return head.config.base if head is not None and "quality" in signals else None


def softmax_options(signals: Collection[Signal], head: SigmoidHead | None, rule: DominantRule) -> dict[str, Any] | None:
    """Options of the softmax statistics that the signals need, or None: the quality of most heads needs none."""
    if base_wanted(signals, head) != "logprob" and set(signals) == {"quality"}:
        return None
    return {"entropy": "entropy" in signals, "dominant": rule if "boosted_prob" in signals else None}


def token_scores(
    signals: Collection[Signal],
    head: SigmoidHead | None,
    hidden: Tensor,
    token_ids: Tensor,
    stats: SoftmaxStats | None,
    token_logits: Tensor | None,
) -> dict[Signal, Tensor]:
    """Scores of each signal, float32, shaped as the tokens.

    Args:
        signals: which.
        head: for the quality.
        hidden: [M, D], what enters the LM's output embedding.
        token_ids: int64 [M] or [M, K]; -1 gives NaN, but for the entropy and the largest probability.
        stats: [M] of the LM with these tokens, taken with :func:`softmax_options`.
        token_logits: the LM's logits of the tokens, where :func:`base_wanted` says so.
    """
    scores: dict[Signal, Tensor] = {}
    if "quality" in signals:
        assert head is not None
        base = token_logits if head.config.base != "logprob" or stats is None else stats.token_logprob
        scores["quality"] = _quality(head(hidden, token_ids, base), stats)
    if stats is not None:
        scores |= _softmax_scores(stats, token_ids, signals)
    return {signal: scores[signal].float() for signal in signals}


@torch.no_grad()
def scores_of_logits(
    signals: Collection[Signal], head: SigmoidHead | None, hidden: Tensor, logits: Tensor, token_ids: Tensor
) -> dict[Signal, Tensor]:
    """Scores [M, K] of tokens [M, K], from hidden states [M, D] and logits [M, V] that exist already; -1 gives NaN."""
    if head is not None and head.scale.device != hidden.device:
        head.to(hidden.device)
    token_ids = token_ids.masked_fill(token_ids >= logits.shape[-1], -1)  # padding may be no token of the model's
    options = softmax_options(signals, head, DominantRule.jump("last"))
    stats = None if options is None else F.softmax_stats(logits, token_ids=token_ids, **options)
    on_logit = base_wanted(signals, head) == "logit"
    token_logits = logits.gather(1, token_ids.clamp(min=0)).float() if on_logit else None
    return token_scores(signals, head, hidden, token_ids, stats, token_logits)


def _quality(logits: Tensor, stats: SoftmaxStats | None) -> Tensor:
    """Sigmoid probabilities; NaN where a logit is not finite, which must not look confident."""
    valid = logits.isfinite()
    if stats is not None:
        valid &= _of_rows(stats.max_logprob, logits).isfinite()
    return torch.sigmoid(logits).masked_fill(~valid, torch.nan)


def _softmax_scores(stats: SoftmaxStats, token_ids: Tensor, signals: Collection[Signal]) -> dict[Signal, Tensor]:
    scores: dict[Signal, Tensor] = {}
    if "max_prob" in signals:
        scores["max_prob"] = _of_rows(stats.max_logprob.exp(), token_ids)
    if "prob" in signals and stats.token_logprob is not None:
        scores["prob"] = stats.token_logprob.exp()
    if stats.entropy is not None:
        scores["entropy"] = _of_rows(stats.entropy, token_ids)
    if "boosted_prob" in signals:
        scores["boosted_prob"] = stats.boosted_prob(token_ids)
    return scores


def _of_rows(values: Tensor, like: Tensor) -> Tensor:
    """Values [M] of rows for each of their tokens, [M] or [M, K]."""
    return values if like.dim() == values.dim() else values[:, None].expand_as(like)
