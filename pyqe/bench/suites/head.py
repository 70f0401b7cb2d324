"""Statistics of a head without its logits: softmax, sigmoid, both, and single tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyqe import functional as F
from pyqe.bench.case import Case, Outcome, Rival, Settings, Shape, Work, compiled, optional
from pyqe.bench.machine import read_memory

_DECODING_N = 64  # up to here reading the weight is most of the work, so a plain read of it stands beside
_TRL_CHUNK = 32768  # as its trainers call it


def cases(settings: Settings) -> list[Callable[[], Case]]:
    shapes = settings.shapes(models=("Llama-3.2-1B",), n=(1, 8, 512))
    kinds = (softmax_stats, sigmoid_stats, both_heads, low_rank_head, token_logits)
    return [partial(case, shape) for shape in shapes for case in kinds]


# --- as one writes it in torch


def eager_softmax(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
    logprobs = torch.log_softmax(hidden @ weight.T, -1, dtype=torch.float32)
    return {
        "max_logprob": logprobs.max(-1).values,
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
        "token_logprob": logprobs.gather(1, ids[:, None])[:, 0],
    }


def eager_sigmoid(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
    logits = (hidden @ weight.T).float()
    return {
        "max_logit": logits.max(-1).values,
        "sum_prob": torch.sigmoid(logits).sum(-1),
        "token_logit": logits.gather(1, ids[:, None])[:, 0],
    }


# --- pyqe


def fused_softmax(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
    stats = F.linear_softmax_stats(hidden, weight, token_ids=ids, entropy=True)
    return {"max_logprob": stats.max_logprob, "entropy": stats.entropy, "token_logprob": stats.token_logprob}


def fused_sigmoid(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
    stats = F.linear_sigmoid_stats(hidden, weight, token_ids=ids)
    return {"max_logit": stats.max_logit, "sum_prob": stats.sum_prob, "token_logit": stats.token_logit}


# --- others


def _chunked(function: type[torch.autograd.Function]) -> Callable[..., Outcome]:
    def run(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        outputs = ("entropy", "is_top1")
        logprobs, entropy, *_ = function.apply(hidden, weight, None, ids, 1.0, _TRL_CHUNK, None, 1.0, outputs)
        return {"token_logprob": logprobs, "entropy": entropy}

    return run


def _cross_entropy(linear_cross_entropy: Callable[..., Tensor]) -> Callable[..., Outcome]:
    def run(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        return {"token_logprob": -linear_cross_entropy(hidden, weight, ids, reduction="none")}

    return run


def _bare_matmul(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
    return {"logits": hidden @ weight.T}


def _read(*tensors: Tensor) -> Outcome:
    return {f"read {i}": read_memory(tensor) for i, tensor in enumerate(tensors)}


def _reads(shape: Shape, heads: int = 1) -> list[Rival]:
    """A read of the weights, which bounds the work on few rows."""
    if shape.n > _DECODING_N:
        return []
    return [
        Rival("memory read", lambda hidden, *rest: _read(*rest[:-1]), "of the weights", work=shape.read_work(heads))
    ]


# --- cases


def _case(shape: Shape, name: str, description: str, rivals: list[Rival], heads: int = 1) -> Case:
    weights = [shape.weight(seed) for seed in range(heads)]
    return Case(
        "head",
        name,
        shape.facts(),
        lambda: (shape.hidden(), *weights, shape.ids()),
        rivals,
        shape.head_work(heads),
        shape.logit_bytes,
        description,
    )


def softmax_stats(shape: Shape) -> Case:
    trl = optional("trl", "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", _chunked, "top-1 flag, no maximum")
    module, name = "torch.nn.functional", "linear_cross_entropy"
    rivals = [
        Rival("pyqe", fused_softmax),
        Rival("eager", eager_softmax),
        Rival("torch.compile", compiled(eager_softmax)),
        trl,
        optional(name, module, name, _cross_entropy, "log-probability only"),
        Rival("bare matmul", _bare_matmul, "logits only"),
        *_reads(shape),
    ]
    return _case(shape, "softmax stats", "maximum, entropy, token's log-probability", rivals)


def sigmoid_stats(shape: Shape) -> Case:
    rivals = [
        Rival("pyqe", fused_sigmoid),
        Rival("eager", eager_sigmoid),
        Rival("torch.compile", compiled(eager_sigmoid)),
        Rival("bare matmul", _bare_matmul, "logits only"),
        *_reads(shape),
    ]
    return _case(shape, "sigmoid stats", "maximum, sum of probabilities, token's logit", rivals)


def both_heads(shape: Shape) -> Case:
    def both(softmax: Callable[..., Outcome], sigmoid: Callable[..., Outcome]) -> Callable[..., Outcome]:
        return lambda hidden, lm, quality, ids: softmax(hidden, lm, ids) | sigmoid(hidden, quality, ids)

    def one(hidden: Tensor, lm: Tensor, quality: Tensor, ids: Tensor) -> Outcome:
        return fused_softmax(hidden, lm, ids)

    eager = both(eager_softmax, eager_sigmoid)
    rivals = [
        Rival("pyqe", both(fused_softmax, fused_sigmoid)),
        Rival("pyqe, one head", one, "softmax stats only", work=shape.head_work()),
        Rival("eager", eager),
        Rival("torch.compile", compiled(eager)),
        *_reads(shape, heads=2),
    ]
    return _case(shape, "both heads", "softmax stats of one weight, sigmoid stats of another", rivals, heads=2)


_RANK = 32


def low_rank_head(shape: Shape) -> Case:
    """The LM's head and a low-rank head on top of its logits: in one pass, and as people write it."""

    def fused(hidden: Tensor, lm: Tensor, projection: Tensor, factors: Tensor, ids: Tensor) -> Outcome:
        softmax, sigmoid = F.linear_joint_stats(
            hidden, lm, projected=hidden.float() @ projection, factors=factors, token_ids=ids, entropy=True
        )
        return {"max_logprob": softmax.max_logprob, "entropy": softmax.entropy, "sum_prob": sigmoid.sum_prob}

    def one(hidden: Tensor, lm: Tensor, projection: Tensor, factors: Tensor, ids: Tensor) -> Outcome:
        return fused_softmax(hidden, lm, ids)

    def eager(hidden: Tensor, lm: Tensor, projection: Tensor, factors: Tensor, ids: Tensor) -> Outcome:
        logits = (hidden @ lm.T).float()
        logprobs = torch.log_softmax(logits, -1)
        quality = logits + hidden.float() @ projection @ factors.T
        return {
            "max_logprob": logprobs.max(-1).values,
            "entropy": -(logprobs.exp() * logprobs).sum(-1),
            "sum_prob": torch.sigmoid(quality).sum(-1),
        }

    def inputs() -> tuple[Tensor, ...]:
        projection, factors = torch.randn(shape.d, _RANK) / shape.d**0.5, torch.randn(shape.v, _RANK) / _RANK**0.5
        return shape.hidden(), shape.weight(), projection, factors, shape.ids()

    rivals = [
        Rival("pyqe", fused),
        Rival("pyqe, one head", one, "softmax stats only"),
        Rival("eager", eager),
        Rival("torch.compile", compiled(eager)),
    ]
    description = f"softmax stats, and sigmoid stats of a head of rank {_RANK} on the logits"
    return Case(
        "head", "low-rank head", shape.facts(), inputs, rivals, shape.head_work(), shape.logit_bytes, description
    )


def token_logits(shape: Shape) -> Case:
    def fused(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        return {"token_logit": F.linear_token_logits(hidden, weight, ids)}

    def all_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        return {"token_logit": (hidden @ weight.T).gather(1, ids[:, None])[:, 0].float()}

    def gathered(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        return {"token_logit": (hidden.float() * weight[ids].float()).sum(-1)}

    rows = Work(flops=2 * shape.n * shape.d, bytes=2 * shape.n * shape.d * shape.itemsize)
    rivals = [
        Rival("pyqe", fused, work=rows),
        Rival("eager", all_logits, "all logits, then a gather"),
        Rival("eager, gathered rows", gathered, work=rows),
    ]
    return _case(shape, "token logits", "logit of one token a row", rivals)
