"""Sigmoid statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from pyqe.functional._arguments import check_top_k, head_matrix, logit_matrix, optional_ids, per_row
from pyqe.functional._sharded import operator
from pyqe.functional.results import SigmoidStats


def sigmoid_result(
    columns: tuple[Tensor, ...],
    rows: torch.Size,
    token_ids: Tensor | None,
    top_k: int,
    threshold: float | None,
) -> SigmoidStats:
    max_logit, argmax, sum_prob, count_above, token, topk, topk_ids = columns
    return SigmoidStats(
        max_logit=max_logit.reshape(rows),
        argmax=argmax.reshape(rows),
        sum_prob=sum_prob.reshape(rows),
        count_above=None if threshold is None else count_above.reshape(rows),
        token_logit=None if token_ids is None else token.reshape(token_ids.shape),
        topk_logits=topk.reshape(rows + topk.shape[1:]) if top_k else None,
        topk_ids=topk_ids.reshape(rows + topk_ids.shape[1:]) if top_k else None,
    )


def sigmoid_stats(
    logits: Tensor, *, token_ids: Tensor | None = None, top_k: int = 0, threshold: float | None = None
) -> SigmoidStats:
    """Sigmoid statistics of logits [..., V] that exist already; see :func:`linear_sigmoid_stats`.

    Example:
        >>> sigmoid_stats(torch.tensor([0.0, 0.0, -200.0]), threshold=0.4).count_above
        tensor(2)
    """
    matrix, rows = logit_matrix(logits), logits.shape[:-1]
    check_top_k(top_k)
    ids = optional_ids(token_ids, rows)
    columns = torch.ops.pyqe.sigmoid_stats(matrix, ids, top_k, threshold)
    return sigmoid_result(columns, rows, token_ids, top_k, threshold)


def linear_sigmoid_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | float | None = None,
    shift: Tensor | float | None = None,
    token_ids: Tensor | None = None,
    top_k: int = 0,
    threshold: float | None = None,
) -> SigmoidStats:
    """Sigmoid statistics of ``scale * hidden @ weight.T + bias + shift`` without keeping it. Not differentiable.

    Args:
        hidden: [..., D].
        weight: [V, D] of the Sigmoid Head.
        bias: [V] or None.
        scale: number(s) that broadcast to [...]; None is 1.
        shift: number(s) that broadcast to [...]; None is 0.
        token_ids: int64 [...] or [..., K]: tokens whose logits are wanted; -1 gives NaN.
        top_k: how many of the largest logits to return.
        threshold: probability in [0, 1] of ``count_above``; its logit is what logits are compared with.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
        IndexError: an id outside [0, V) other than -1 (CPU).

    Example:
        >>> linear_sigmoid_stats(torch.zeros(1, 2), torch.randn(6, 2)).sum_prob  # six tokens, .5 each
        tensor([3.])
    """
    matrix, rows = head_matrix(hidden, weight, bias), hidden.shape[:-1]
    check_top_k(top_k)
    ids = optional_ids(token_ids, rows)
    affine = (per_row(scale, rows, matrix, "scale"), per_row(shift, rows, matrix, "shift"))
    columns = operator("linear_sigmoid_stats", weight)(matrix, weight, bias, *affine, ids, top_k, threshold)
    return sigmoid_result(columns, rows, token_ids, top_k, threshold)


def order_preserving(probs: Tensor, scores: Tensor, *, margin: float = 1e-3) -> Tensor:
    r"""Scores lowered so that they never rank a token above one that the LM prefers.

    Tokens are visited by descending probability: :math:`C_1 = A_1`,
    :math:`C_i = \min(A_i, (1 - \mathrm{margin}) \min_{j<i} A_j)`.

    Args:
        probs: [..., V], softmax probabilities (or logits: only their order counts).
        scores: [..., V], sigmoid probabilities A in [0, 1].
        margin: in [0, 1).

    Returns:
        [..., V], in the order of the inputs.

    Source: Dinh & Niehues 2026 (arXiv 2601.00680).

    Example:
        >>> order_preserving(torch.tensor([0.6, 0.2, 0.1, 0.1]), torch.tensor([0.5, 0.9, 0.9, 0.2]))
        tensor([0.5000, 0.4995, 0.4995, 0.2000])
    """
    if probs.shape != scores.shape:
        raise ValueError(f"scores: expected shape {tuple(probs.shape)} as probs, got {tuple(scores.shape)}")
    order = torch.sort(probs, dim=-1, descending=True, stable=True).indices
    ranked = scores.gather(-1, order)
    ceiling = (1.0 - margin) * torch.cummin(ranked, -1).values[..., :-1]
    ranked = torch.cat([ranked[..., :1], torch.minimum(ranked[..., 1:], ceiling)], -1)
    return torch.empty_like(ranked).scatter_(-1, order, ranked)
