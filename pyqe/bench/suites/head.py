"""Statistics of a head without its logits: softmax, sigmoid, both, and single tokens, with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pyqe
from pyqe import functional as F
from pyqe.bench.case import Case, Outcome, Rival, Settings, Shape, Work, compiled_rival, optional
from pyqe.bench.machine import read_memory

_DECODING_N = 64  # up to here reading the weight is most of the work, so a plain read of it stands beside
_TRL_CHUNK = 32768  # as its trainers call it
_TRAINED_TOKENS = 11  # a target and ten negatives
_TOP_K = 20


def cases(settings: Settings) -> list[Callable[[], Case]]:
    kinds = (softmax_stats, sigmoid_stats, both_heads, low_rank_head, token_logits)
    if not settings.on_gpu:
        shapes = settings.shapes(models=("Llama-3.2-1B",), n=(1, 8, 512))
        return [partial(case, shape) for shape in shapes for case in kinds]
    largest, *decoding = settings.shapes(models=("Llama-3-8B",), n=(4096, 64, 8, 1))
    several = [partial(token_logits, largest, tokens=_TRAINED_TOKENS), partial(token_gradients, largest)]
    return [
        *(partial(case, shape) for shape in (largest, *decoding) for case in kinds[:4]),
        *several,
        partial(candidates, largest),
    ]


def crossover(settings: Settings) -> list[Callable[[], Case]]:
    """pyqe's backends on numbers of rows between decoding and a batch: for the table of preferences."""
    shapes = settings.shapes(models=("Llama-3-8B",), n=(64, 128, 256, 1024))
    kinds = (softmax_stats, sigmoid_stats, low_rank_head, candidates)
    return [partial(among_backends, kind.__name__, shape) for shape in shapes for kind in kinds]


def among_backends(kind: str, shape: Shape) -> Case:
    """A case of this module without those who stand beside pyqe; the bare product stays."""
    case: Case = globals()[kind](shape)
    return replace(
        case, suite="crossover", rivals=[rival for rival in case.rivals if rival.name in ("pyqe", "bare matmul")]
    )


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


def _liger(fused: Callable[..., Tensor]) -> Callable[..., Outcome]:
    def run(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        return {"token_logprob": -fused(hidden, weight, ids, reduction="none")}

    return run


def _liger_scaled(function: Any) -> Callable[..., Outcome]:
    def run(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        loss, entropy = function.apply(hidden, weight, ids, return_entropy=True)
        return {"token_logprob": -loss, "entropy": entropy.float()}

    return run


def _gpu_rivals(shape: Shape) -> list[Rival]:
    """Those whose kernels need a GPU."""
    if shape.device == "cpu":
        return []
    functions, scaled = "liger_kernel.transformers.functional", "liger_kernel.ops"
    return [
        optional("Liger", functions, "liger_fused_linear_cross_entropy", _liger, "log-probability only"),
        optional("Liger, scaled", scaled, "LigerFusedLinearScaledCrossEntropyFunction", _liger_scaled, "no maximum"),
        optional("CCE", "cut_cross_entropy", "linear_cross_entropy", _cross_entropy, "log-probability only"),
    ]


# --- cases


def _case(shape: Shape, name: str, description: str, rivals: list[Rival], heads: int = 1, decides: str = "") -> Case:
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
        decides,
    )


def _matmul() -> Rival:
    return Rival("bare matmul", _bare_matmul, "logits only")


def softmax_stats(shape: Shape) -> Case:
    trl = optional("trl", "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", _chunked, "top-1 flag, no maximum")
    module, name = "torch.nn.functional", "linear_cross_entropy"
    rivals = [
        Rival("pyqe", fused_softmax),
        Rival("eager", eager_softmax),
        compiled_rival(eager_softmax, shape.device, on_gpu=shape.n > _DECODING_N),
        trl,
        optional(name, module, name, _cross_entropy, "log-probability only"),
        *_gpu_rivals(shape),
        _matmul(),
        *_reads(shape),
    ]
    description = "maximum, entropy, token's log-probability"
    return _case(shape, "softmax stats", description, rivals, decides="linear_softmax_stats")


def sigmoid_stats(shape: Shape) -> Case:
    rivals = [
        Rival("pyqe", fused_sigmoid),
        Rival("eager", eager_sigmoid),
        compiled_rival(eager_sigmoid, shape.device, on_gpu=shape.n > _DECODING_N),
        _matmul(),
        *_reads(shape),
    ]
    description = "maximum, sum of probabilities, token's logit"
    return _case(shape, "sigmoid stats", description, rivals, decides="linear_sigmoid_stats")


def candidates(shape: Shape) -> Case:
    """What needs single tokens out of the vocabulary."""

    def fused(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        rule = pyqe.DominantRule()
        stats = F.linear_softmax_stats(hidden, weight, token_ids=ids, top_k=_TOP_K, entropy=True, dominant=rule)
        return {"entropy": stats.entropy, "topk": stats.topk_logits, "boosted_prob": stats.boosted_prob(ids)}

    def eager(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        logprobs = torch.log_softmax(hidden @ weight.T, -1, dtype=torch.float32)
        return {"entropy": -(logprobs.exp() * logprobs).sum(-1), "top": logprobs.topk(_TOP_K).values}

    rivals = [Rival("pyqe", fused), Rival("eager", eager, "no dominant tokens"), _matmul()]
    description = f"entropy, {_TOP_K} largest logits, BoostedProb"
    return _case(shape, "candidates", description, rivals, decides="linear_softmax_stats, candidates")


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
        compiled_rival(eager, shape.device, on_gpu=False),
        *_reads(shape, heads=2),
    ]
    description = "softmax stats of one weight, sigmoid stats of another"
    return replace(_case(shape, "both heads", description, rivals, heads=2), by_backend=False)


_RANK = 32


def _fused_low_rank(hidden: Tensor, lm: Tensor, projection: Tensor, factors: Tensor, ids: Tensor) -> Outcome:
    softmax, sigmoid = F.linear_joint_stats(
        hidden, lm, projected=hidden.float() @ projection, factors=factors, token_ids=ids, entropy=True
    )
    return {"max_logprob": softmax.max_logprob, "entropy": softmax.entropy, "sum_prob": sigmoid.sum_prob}


def _eager_low_rank(hidden: Tensor, lm: Tensor, projection: Tensor, factors: Tensor, ids: Tensor) -> Outcome:
    logits = (hidden @ lm.T).float()
    logprobs = torch.log_softmax(logits, -1)
    quality = logits + hidden.float() @ projection @ factors.T
    return {
        "max_logprob": logprobs.max(-1).values,
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
        "sum_prob": torch.sigmoid(quality).sum(-1),
    }


def low_rank_head(shape: Shape) -> Case:
    """The LM's head and a low-rank head on top of its logits: in one pass, and as people write it."""

    def one(hidden: Tensor, lm: Tensor, projection: Tensor, factors: Tensor, ids: Tensor) -> Outcome:
        return fused_softmax(hidden, lm, ids)

    def matmul(hidden: Tensor, lm: Tensor, projection: Tensor, factors: Tensor, ids: Tensor) -> Outcome:
        return _bare_matmul(hidden, lm, ids)

    def inputs() -> tuple[Tensor, ...]:
        projection = torch.randn(shape.d, _RANK, device=shape.device) / shape.d**0.5
        factors = torch.randn(shape.v, _RANK, device=shape.device) / _RANK**0.5
        return shape.hidden(), shape.weight(), projection, factors, shape.ids()

    rivals = [
        Rival("pyqe", _fused_low_rank),
        Rival("pyqe, one head", one, "softmax stats only"),
        Rival("eager", _eager_low_rank),
        compiled_rival(_eager_low_rank, shape.device, on_gpu=False),
        Rival("bare matmul", matmul, "logits of the LM only"),
    ]
    return Case(
        "head",
        "low-rank head",
        shape.facts(),
        inputs,
        rivals,
        shape.head_work(),
        shape.logit_bytes,
        f"softmax stats, and sigmoid stats of a head of rank {_RANK} on the logits",
        "linear_joint_stats",
    )


# --- single tokens


def _row_work(shape: Shape, tokens: int) -> Work:
    """Products with the weight rows of so many tokens a row; those that are drawn twice are read once."""
    distinct = shape.v * (1 - (1 - 1 / shape.v) ** (shape.n * tokens))
    return Work(flops=2 * shape.n * tokens * shape.d, bytes=(distinct + shape.n) * shape.d * shape.itemsize)


def token_logits(shape: Shape, tokens: int = 1) -> Case:
    def fused(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        return {"token_logit": F.linear_token_logits(hidden, weight, ids)}

    def all_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        return {"token_logit": (hidden @ weight.T).gather(1, ids).float()}

    def gathered(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        return {"token_logit": (hidden[:, None].float() * weight[ids].float()).sum(-1)}

    rows, weight = _row_work(shape, tokens), shape.weight()
    return Case(
        "head",
        "token logits",
        {**shape.facts(), "k": tokens},
        lambda: (shape.hidden(), weight, torch.randint(shape.v, (shape.n, tokens), device=shape.device)),
        [
            Rival("pyqe", fused, work=rows),
            Rival("eager", all_logits, "all logits, then a gather"),
            Rival("eager, gathered rows", gathered, work=rows),
        ],
        shape.head_work(),
        shape.logit_bytes,
        f"logits of K = {tokens} token{'s' * (tokens > 1)} a row",
        "linear_token_logits",
    )


def token_gradients(shape: Shape, tokens: int = _TRAINED_TOKENS) -> Case:
    """The backward pass alone, with the gradient of the weight as the rows that were touched."""

    def fused(grad: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        rows, touched = torch.ops.pyqe.token_logits_grad_rows(grad, hidden, ids)
        return {
            "grad_hidden": torch.ops.pyqe.token_logits_grad_hidden(grad, weight, ids),
            "row_ids": rows,
            "grad_rows": touched,
        }

    def eager(grad: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
        row_ids, places = torch.unique(ids, return_inverse=True)
        products = grad[:, :, None] * hidden[:, None].float()
        touched = grad.new_zeros(len(row_ids), shape.d).index_add_(0, places.reshape(-1), products.reshape(-1, shape.d))
        return {
            "grad_hidden": (grad[:, :, None] * weight[ids].float()).sum(1).to(hidden.dtype),
            "row_ids": row_ids,
            "grad_rows": touched.to(hidden.dtype),
        }

    def inputs() -> tuple[Tensor, ...]:
        ids = torch.randint(shape.v, (shape.n, tokens), device=shape.device)
        return torch.randn(shape.n, tokens, device=shape.device), shape.hidden(), weight, ids

    weight, forward = shape.weight(), _row_work(shape, tokens)
    return Case(
        "head",
        "token gradients",
        {**shape.facts(), "k": tokens},
        inputs,
        [Rival("pyqe", fused), Rival("eager", eager)],
        Work(flops=2 * forward.flops, bytes=2 * forward.bytes),  # both operands are read, both gradients written
        shape.logit_bytes,
        f"gradients of the hidden states and of the weight rows of K = {tokens} tokens",
    )
