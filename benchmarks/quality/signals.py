"""What is known about each token: scores of the softmax and of a Sigmoid Head, as logarithms of numbers in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyqe.dominant import DominantRule
from pyqe.heads import SigmoidHead
from pyqe.lm_head import LMHead
from pyqe.training import HiddenStateDataset

Floats = NDArray[np.float64]

GAMMA = 0.01  # of the weighted BoostedProb, as its authors have it
MARGIN = 1e-3  # of the combination that keeps the order
_ROWS, _VOCABULARY_ROWS = 4096, 512  # in one go: with single tokens' logits, with all of them


def softmax_signals(states: HiddenStateDataset, lm_head: LMHead, ids: Tensor | None = None) -> dict[str, Floats]:
    """Scores of the tokens [N] that the states predict, or of other ``ids`` [N, K], by name.

    Those of the whole distribution, MSP and entropy, are [N] always.
    """
    ids = states.labels if ids is None else ids
    parts = [_softmax_part(states.hidden[rows], ids[rows], lm_head) for rows in _slices(len(ids), _ROWS)]
    return {name: torch.cat([part[name] for part in parts]).double().numpy() for name in parts[0]}


def _softmax_part(hidden: Tensor, ids: Tensor, lm_head: LMHead) -> dict[str, Tensor]:
    stats = lm_head.softmax_stats(hidden, token_ids=ids, entropy=True, dominant=DominantRule.jump("last"))
    assert stats.token_logprob is not None
    assert stats.entropy is not None
    return {
        "softmax probability": stats.token_logprob,
        "MSP": stats.max_logprob,
        "negative entropy": -stats.entropy,
        "BoostedProb": _log(stats.boosted_prob(ids), stats.token_logprob),
        "weighted BoostedProb": _log(stats.boosted_prob(ids, gamma=GAMMA), stats.token_logprob),
    }


def _log(boosted: Tensor, logprob: Tensor) -> Tensor:
    """Where a probability has underflowed, its logarithm is known."""
    return torch.where(boosted > 0, boosted.log(), logprob)


@torch.no_grad()
def head_logits(
    head: SigmoidHead,
    states: HiddenStateDataset,
    lm_head: LMHead,
    ids: Tensor | None = None,
    layer_hidden: Tensor | None = None,
) -> Floats:
    """A head's logits of the tokens that the states predict, or of others.

    Args:
        head: the head.
        states: of the language model.
        lm_head: its head.
        ids: [N] or [N, K] in place of the labels.
        layer_hidden: [N, D] of the layer that the head reads, if it reads another than the LM's head does.
    """
    ids = states.labels if ids is None else ids
    parts = []
    for rows in _slices(len(ids), _ROWS):
        base = head.base_of(states.hidden[rows], ids[rows], lm_head, states.logsumexp[rows])
        parts.append(head((states.hidden if layer_hidden is None else layer_hidden)[rows], ids[rows], base))
    return torch.cat(parts).double().numpy()


@torch.no_grad()
def order_preserving_logs(head: SigmoidHead, states: HiddenStateDataset, lm_head: LMHead) -> Floats:
    """Logs [N] of :func:`pyqe.functional.order_preserving` of the head's probabilities, for one token of each row.

    A single token's needs no sorted vocabulary: the minimum over all tokens that the LM prefers is enough.
    """
    return np.concatenate(list(_order_preserving_parts(head, states, lm_head)))


def _order_preserving_parts(head: SigmoidHead, states: HiddenStateDataset, lm_head: LMHead) -> Iterator[Any]:
    for rows in _slices(len(states.labels), _VOCABULARY_ROWS):
        terms = head.linear_terms(states.hidden[rows], lm_head, states.logsumexp[rows])
        hidden = terms.hidden if terms.scale is None else terms.scale * terms.hidden
        scores = torch.nn.functional.linear(hidden, terms.weight, terms.bias)
        ids = states.labels[rows, None]
        own = scores.gather(1, ids)
        logits = lm_head.logits(states.hidden[rows])
        preferred = logits > logits.gather(1, ids)
        ceiling = scores.masked_fill_(~preferred, torch.inf).amin(1, keepdim=True)
        shift = terms.shift[:, None] if terms.shift.dim() else terms.shift
        own, ceiling = (torch.nn.functional.logsigmoid((x + shift).double()) for x in (own, ceiling))
        ceiling = torch.where(preferred.any(1, keepdim=True), ceiling + np.log1p(-MARGIN), torch.inf)
        yield torch.minimum(own, ceiling)[:, 0].numpy()


def log_sigmoid(logits: Floats) -> Floats:
    return -np.logaddexp(0, -logits)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, start + size)
