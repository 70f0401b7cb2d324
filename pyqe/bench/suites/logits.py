"""Statistics of logits that exist already, as a serving engine hands them over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pyqe
from pyqe import functional as F
from pyqe.bench.case import DTYPES, LOGIT_STD, Case, Outcome, Rival, Settings, Shape, Work, compiled, optional
from pyqe.bench.machine import read_memory
from pyqe.bench.suites.sampling import dominant_by_sort


def cases(settings: Settings) -> list[Callable[[], Case]]:
    return [partial(softmax_stats, shape) for shape in settings.shapes(("Qwen3-0.6B",), (512,), ("fp32",))]


def eager(logits: Tensor, ids: Tensor) -> Outcome:
    logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
    probs = logprobs.exp()
    top, dominant = dominant_by_sort(probs, "last")
    mass = (probs.gather(1, top) * dominant).sum(1)
    token_logprob = logprobs.gather(1, ids[:, None])[:, 0]
    is_dominant = ((top == ids[:, None]) & dominant).any(1)
    return {
        "entropy": -(probs * logprobs).sum(-1),
        "token_logprob": token_logprob,
        "boosted_prob": torch.where(is_dominant, mass, token_logprob.exp()),
    }


def fused(logits: Tensor, ids: Tensor) -> Outcome:
    stats = F.softmax_stats(logits, token_ids=ids, entropy=True, dominant=pyqe.DominantRule())
    return {"entropy": stats.entropy, "token_logprob": stats.token_logprob, "boosted_prob": stats.boosted_prob(ids)}


def _package(calculate_boostedprob: Callable[..., Tensor]) -> Callable[..., Outcome]:
    return lambda logits, ids: {"boosted_prob": calculate_boostedprob(torch.log_softmax(logits.float(), -1), ids)}


def softmax_stats(shape: Shape) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return torch.randn(shape.n, shape.v).mul_(LOGIT_STD).to(DTYPES[shape.dtype]), shape.ids()

    rivals = [
        Rival("pyqe", fused),
        Rival("eager", eager),
        Rival("torch.compile", compiled(eager)),
        optional("boostedprob", "boostedprob", "calculate_boostedprob", _package, "BoostedProb only"),
        Rival("memory read", lambda logits, ids: {"read": read_memory(logits)}, "of the logits"),
    ]
    return Case(
        "logits",
        "softmax stats",
        {**shape.facts(), "d": None},
        inputs,
        rivals,
        Work(bytes=shape.n * shape.v * shape.itemsize),
        shape.logit_bytes,
        "entropy, token's log-probability, BoostedProb",
    )
