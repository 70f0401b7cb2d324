"""Negatives for the Sigmoid Head loss: pyqe's draw and the published selection step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pyqe
from pyqe import functional as F
from pyqe.bench.case import Case, Outcome, Rival, Settings, Shape
from pyqe.dominant import Cut

_TOP, _RATIO, _EPSILON, _PER_SOURCE, TEMPERATURE = 200, 0.3, 0.005, 5, 2.0


def cases(settings: Settings) -> list[Callable[[], Case]]:
    shapes = settings.shapes(models=("SmolLM2-135M",), n=(1024,))
    if settings.on_gpu and not settings.quick:
        shapes = [*settings.shapes(models=("Llama-3-8B",), n=(4096,)), *shapes]
    return [partial(negatives, shape) for shape in dict.fromkeys(shapes)]


def zipf_counts(vocab_size: int, device: str = "cpu") -> Tensor:
    """[V], how often tokens occur in text, roughly: the frequency of a token falls with its rank."""
    return 1.0 / torch.arange(1, vocab_size + 1, dtype=torch.float32, device=device)


def dominant_by_sort(probs: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """Ids [N, 200] of the most probable tokens, and which of them are dominant: up to the first or last large drop.

    Source: Dinh & Niehues 2025 (arXiv 2502.11115).
    """
    top, ids = torch.topk(probs, min(_TOP, probs.shape[1]), sorted=True)
    drops = top[:, :-1] - top[:, 1:]
    large = drops > torch.clamp(_RATIO * top[:, :-1], min=_EPSILON)
    ranks = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    sizes = torch.where(large, ranks[:-1], 0)  # of the dominant set, were the cut here
    size = sizes.amax(1) if cut == "last" else sizes.masked_fill(~large, _TOP).amin(1) * large.any(1)
    return ids, ranks <= size[:, None]


def published_selection(hidden: Tensor, weight: Tensor, unigram: Tensor) -> Tensor:
    """Negatives [N, 10] as the method is described: a distribution over the vocabulary for every row and source.

    Source: Dinh & Niehues 2026 (arXiv 2601.00680). It may draw a row's own target, whose pair is dropped later.
    """
    logits = (hidden @ weight.T).float()
    probs = torch.log_softmax(logits, -1).exp()
    ids, dominant = dominant_by_sort(probs, "first")
    excluded = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, ids, dominant)
    by_unigram = unigram.expand_as(probs).masked_fill(excluded, 0.0)
    by_softmax = torch.softmax(logits / TEMPERATURE, -1).masked_fill(excluded, 0.0)
    draws = [torch.multinomial(source, _PER_SOURCE, replacement=False) for source in (by_unigram, by_softmax)]
    return torch.cat(draws, 1)


def negatives(shape: Shape) -> Case:
    weight, unigram = shape.weight(), zipf_counts(shape.v, shape.device)
    sampler = pyqe.NegativeSampler(temperature=TEMPERATURE, unigram_counts=unigram)

    def fused(hidden: Tensor, ids: Tensor) -> Outcome:
        return {"negatives of pyqe": F.linear_sample_negatives(hidden, weight, ids, sampler)}

    def published(hidden: Tensor, ids: Tensor) -> Outcome:
        return {"negatives as published": published_selection(hidden, weight, unigram)}

    return Case(
        "sampling",
        "negatives",
        shape.facts(),
        lambda: (shape.hidden(), shape.ids()),
        [Rival("pyqe", fused), Rival("authors", published, "selection step as published, in eager torch")],
        shape.head_work(),
        shape.logit_bytes,
        "5 by unigram and 5 by softmax(z / 2), dominant tokens excluded",
        "linear_sample_negatives",
    )
