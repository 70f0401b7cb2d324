"""Statistics of logits that exist already, as a serving engine hands them over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pyqe
from pyqe import functional as F
from pyqe.bench.case import DTYPES, LOGIT_STD, Case, Outcome, Rival, Settings, Shape, Work, compiled_rival, optional
from pyqe.bench.machine import read_memory
from pyqe.bench.suites.sampling import dominant_by_sort

_TOP_K, _PADDING = 20, 192
_DESCRIPTIONS = {
    "plain": "logsumexp and maximum",
    "entropy": "entropy, token's log-probability",
    "padded rows": f"entropy, token's log-probability, of rows {_PADDING} entries longer than V",
    "top-k": f"the {_TOP_K} largest, logsumexp",
    "dominant": "dominant tokens and their mass",
    "sigmoid": "maximum, sum of probabilities, token's logit",
}


def cases(settings: Settings) -> list[Callable[[], Case]]:
    if not settings.on_gpu:
        return [partial(softmax_stats, shape) for shape in settings.shapes(("Qwen3-0.6B",), (512,), ("fp32",))]
    shapes = settings.shapes(("Qwen3-0.6B",), (512,), ("bf16", "fp32"))
    return [
        *(partial(row_stats, shape, kind) for shape in shapes for kind in ROW_STATS),
        *(partial(softmax_stats, shape) for shape in shapes),
    ]


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


def _logits(shape: Shape, padding: int = 0) -> Tensor:
    """[N, V], in rows that are longer by some padding."""
    rows = torch.randn(shape.n, shape.v + padding, device=shape.device)
    return rows.mul_(LOGIT_STD).to(DTYPES[shape.dtype])[:, : shape.v]


def _read(logits: Tensor, ids: Tensor) -> Outcome:
    return {"read": read_memory(logits)}


def softmax_stats(shape: Shape) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return _logits(shape), shape.ids()

    rivals = [
        Rival("pyqe", fused),
        Rival("eager", eager),
        compiled_rival(eager, shape.device, on_gpu=False),
        optional("boostedprob", "boostedprob", "calculate_boostedprob", _package, "BoostedProb only"),
        Rival("memory read", _read, "of the logits"),
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
        "softmax_stats",
    )


# --- one kind of statistics at a time, and the way an engine lays logits out


def _eager_entropy(logits: Tensor, ids: Tensor) -> Outcome:
    logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
    return {"entropy": -(logprobs.exp() * logprobs).sum(-1), "token_logprob": logprobs.gather(1, ids[:, None])[:, 0]}


def _entropy(logits: Tensor, ids: Tensor) -> Outcome:
    stats = F.softmax_stats(logits, token_ids=ids, entropy=True)
    return {"entropy": stats.entropy, "token_logprob": stats.token_logprob}


def _plain(logits: Tensor, ids: Tensor) -> Outcome:
    return {"logsumexp": F.softmax_stats(logits).logsumexp}


def _eager_plain(logits: Tensor, ids: Tensor) -> Outcome:
    return {"logsumexp": torch.logsumexp(logits.float(), -1)}


def _top(logits: Tensor, ids: Tensor) -> Outcome:
    return {"topk": F.softmax_stats(logits, top_k=_TOP_K).topk_logits}


def _eager_top(logits: Tensor, ids: Tensor) -> Outcome:
    return {"topk": torch.topk(logits, _TOP_K, -1).values.float(), "maximum": logits.amax(-1)}


def _dominant(logits: Tensor, ids: Tensor) -> Outcome:
    return {"mass": F.dominant_tokens(logits, pyqe.DominantRule()).mass}


def _eager_dominant(logits: Tensor, ids: Tensor) -> Outcome:
    probs = torch.softmax(logits, -1, dtype=torch.float32)
    top, dominant = dominant_by_sort(probs, "last")
    return {"mass": (probs.gather(1, top) * dominant).sum(1)}


def _sigmoid(logits: Tensor, ids: Tensor) -> Outcome:
    return {"sum_prob": F.sigmoid_stats(logits, token_ids=ids).sum_prob}


def _eager_sigmoid(logits: Tensor, ids: Tensor) -> Outcome:
    return {"sum_prob": torch.sigmoid(logits.float()).sum(-1), "maximum": logits.amax(-1)}


ROW_STATS: dict[str, tuple[Callable[..., Outcome], Callable[..., Outcome]]] = {
    "plain": (_plain, _eager_plain),
    "entropy": (_entropy, _eager_entropy),
    "padded rows": (_entropy, _eager_entropy),
    "top-k": (_top, _eager_top),
    "dominant": (_dominant, _eager_dominant),
    "sigmoid": (_sigmoid, _eager_sigmoid),
}


def _selective(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Outcome]:
    def run(logits: Tensor, ids: Tensor) -> Outcome:
        logprobs, entropy = function(logits, ids)
        return {"token_logprob": logprobs.float(), "entropy": entropy.float()}

    return run


def row_stats(shape: Shape, kind: str) -> Case:
    """One kind of :data:`ROW_STATS`; an engine's rows are padded to a multiple of the tensor-parallel size or of 64."""
    ours, torchs = ROW_STATS[kind]
    rivals = [Rival("pyqe", ours), Rival("eager", torchs)]
    if kind == "entropy":
        trl = "trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy"
        rivals.append(compiled_rival(torchs, shape.device, on_gpu=shape.dtype == "bf16"))
        if shape.device != "cpu":  # where it has no kernel
            rivals.append(optional("trl", *trl, _selective))
    if kind != "padded rows":
        rivals.append(Rival("memory read", _read, "of the logits"))
    return Case(
        "logits",
        kind,
        {**shape.facts(), "d": None},
        lambda: (_logits(shape, _PADDING if kind == "padded rows" else 0), shape.ids()),
        rivals,
        Work(bytes=shape.n * shape.v * shape.itemsize),
        shape.logit_bytes,
        _DESCRIPTIONS[kind],
        "sigmoid_stats" if kind == "sigmoid" else "softmax_stats",
    )
