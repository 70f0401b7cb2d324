"""Places where several continuations are right: the softmax must divide its probability, a Sigmoid Head need not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.signals import Floats, head_logits, log_sigmoid, softmax_signals
from benchmarks.quality.states import LanguageModel, StateCache
from pyqe.heads import SigmoidHead
from pyqe.negatives import NegativeSampler
from pyqe.training import HiddenStateDataset

MIN_WORDS = 2  # of a beginning: after one word nearly everything can follow
ALTERNATIVES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, None))
ENTROPY_EDGES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, np.inf)  # nats
SHOWN = ("softmax probability", "BoostedProb", "Sigmoid Head")
_SEED = 0


@dataclass(frozen=True)
class Place:
    """A beginning that several sentences share.

    Attributes:
        ids: its tokens.
        following: tokens that follow it, each seen in a sentence.
    """

    ids: tuple[int, ...]
    following: tuple[int, ...]


def places(lm: LanguageModel, texts: Sequence[str]) -> list[Place]:
    """Beginnings of MIN_WORDS words or more that occur twice or more; sentences that are alike count once."""
    counts: dict[tuple[int, ...], Counter[int]] = {}
    for text in sorted(set(texts)):
        encoded = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = tuple(encoded["input_ids"])
        for number, (start, _) in enumerate(encoded["offset_mapping"]):
            inside = text[start].isalnum() and text[start - 1 : start].isalnum()  # of a word
            if not inside and len(text[:start].split()) >= MIN_WORDS:
                counts.setdefault(ids[:number], Counter())[ids[number]] += 1
    return [Place(ids, tuple(following)) for ids, following in counts.items() if following.total() > 1]


def by_alternatives(
    found: Sequence[Place], cache: StateCache, head: SigmoidHead, sampler: NegativeSampler
) -> list[dict[str, Any]]:
    """Mean scores of right next tokens, and of negatives, by how many right ones are known.

    Args:
        found: the places.
        cache: for the states.
        head: the Sigmoid Head.
        sampler: its negatives; none of them is known to be right.

    Returns:
        For each bin of ALTERNATIVES with places in it: ``name``, ``places``, and for "right" and "negatives" the mean
        of each score of SHOWN.
    """
    number = np.array([len(place.following) for place in found for _ in place.following])
    states = _of_places(found, cache)
    known = [list(place.following) for place in found for _ in place.following]
    scores = _scores(states, cache.lm, head, sampler, known)
    rows = []
    for low, high in ALTERNATIVES:
        kept = (number >= low) & (number <= (np.inf if high is None else high))
        name = str(low) if low == high else f"{low}+" if high is None else f"{low}-{high}"
        n_places = sum(low <= len(place.following) <= (np.inf if high is None else high) for place in found)
        if kept.any():
            rows.append({"name": name, "places": n_places, **_means(scores, kept)})
    return rows


def by_entropy(
    states: HiddenStateDataset, lm: LanguageModel, head: SigmoidHead, sampler: NegativeSampler
) -> list[dict[str, Any]]:
    """The same for the tokens of text, by the entropy of the LM's distribution."""
    entropy = -softmax_signals(states, lm.head)["negative entropy"]
    scores = _scores(states, lm, head, sampler, [[]] * len(states.labels))
    rows = []
    for low, high in pairwise(ENTROPY_EDGES):
        kept = (entropy >= low) & (entropy < high)
        name = f"{low:g}+" if high == np.inf else f"{low:g}-{high:g}"
        if kept.any():
            rows.append({"name": name, "places": int(kept.sum()), **_means(scores, kept)})
    return rows


def _of_places(found: Sequence[Place], cache: StateCache) -> HiddenStateDataset:
    """States that predict each token that follows each place."""
    sequences = [[*place.ids, place.following[0]] for place in found]
    states = cache.states("ambiguity", sequences)
    last = torch.tensor([len(sequence) for sequence in sequences]).cumsum(0) - 1
    rows = last.repeat_interleave(torch.tensor([len(place.following) for place in found]))
    labels = torch.tensor([token for place in found for token in place.following])
    return HiddenStateDataset(states.hidden[rows], labels, states.logsumexp[rows])


def _scores(
    states: HiddenStateDataset,
    lm: LanguageModel,
    head: SigmoidHead,
    sampler: NegativeSampler,
    known: Sequence[Sequence[int]],
) -> dict[str, dict[str, Floats]]:
    """Probabilities [N] of the states' tokens, and mean ones [N] of their negatives."""
    negatives = _negatives(states, lm, sampler, known)
    probs: dict[str, dict[str, Floats]] = {}
    for of, ids in {"right": states.labels, "negatives": negatives.clamp(min=0)}.items():
        logs = softmax_signals(states, lm.head, ids)
        logs["Sigmoid Head"] = log_sigmoid(head_logits(head, states, lm.head, ids))
        probs[of] = {name: np.exp(logs[name]) for name in SHOWN}
    probs["negatives"] = {name: _row_means(values, negatives) for name, values in probs["negatives"].items()}
    return probs


def _negatives(
    states: HiddenStateDataset, lm: LanguageModel, sampler: NegativeSampler, known: Sequence[Sequence[int]]
) -> Tensor:
    """[N, K], -1 where there is none or it is known to be right."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = lm.head.sample_negatives(states.hidden, states.labels, sampler, generator)
    for row, tokens in zip(drawn, known, strict=True):
        if tokens:
            row[torch.isin(row, torch.tensor(tokens))] = -1
    return drawn


def _row_means(values: Floats, ids: Tensor) -> Floats:
    kept = ids.numpy() >= 0
    sums, numbers = np.where(kept, values, 0.0).sum(1), kept.sum(1)
    return np.divide(sums, numbers, out=np.full(len(sums), np.nan), where=numbers > 0)


def _means(scores: dict[str, dict[str, Floats]], kept: Any) -> dict[str, dict[str, float]]:
    return {
        of: {name: float(np.nanmean(values[kept])) for name, values in found.items()} for of, found in scores.items()
    }
