"""Softmax statistics, dominant tokens and BoostedProb."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyqe.dominant import DominantRule
from pyqe.functional._arguments import (
    check_ids,
    check_top_k,
    head_matrix,
    id_matrix,
    logit_matrix,
    optional_ids,
    rule_spec,
)
from pyqe.functional._sharded import operator
from pyqe.functional.results import DominantTokens, SoftmaxStats


def softmax_result(
    columns: tuple[Tensor, ...],
    rows: torch.Size,
    token_ids: Tensor | None,
    top_k: int,
    temperature: float | None,
    entropy: bool,
    choice_ids: Tensor | None,
    dominant: DominantRule | None,
) -> SoftmaxStats:
    max_logit, max_logprob, argmax, row_entropy, token, tempered, topk, topk_ids, choice, members, size, mass = columns

    def by_row(column: Tensor) -> Tensor:
        return column.reshape(rows + column.shape[1:])

    return SoftmaxStats(
        max_logit=by_row(max_logit),
        max_logprob=by_row(max_logprob),
        argmax=by_row(argmax),
        entropy=by_row(row_entropy) if entropy else None,
        token_logit=None if token_ids is None else token.reshape(token_ids.shape),
        tempered_logsumexp=None if temperature is None else by_row(tempered),
        topk_logits=by_row(topk) if top_k else None,
        topk_ids=by_row(topk_ids) if top_k else None,
        choice_logits=None if choice_ids is None else by_row(choice),
        dominant=None if dominant is None else DominantTokens(by_row(members), by_row(size), by_row(mass)),
    )


def choice_matrix(choice_ids: Tensor | None, rows: torch.Size) -> Tensor | None:
    """Choice ids as a matrix [N, C], or [1, C] for all rows."""
    if choice_ids is None or choice_ids.dim() != 1:
        return None if choice_ids is None else id_matrix(choice_ids, rows, "choice_ids")
    check_ids(choice_ids, "choice_ids")
    return choice_ids[None]


def check_softmax_options(top_k: int, temperature: float | None) -> None:
    check_top_k(top_k)
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive, finite number, got {temperature}")


def softmax_stats(
    logits: Tensor,
    *,
    token_ids: Tensor | None = None,
    top_k: int = 0,
    temperature: float | None = None,
    choice_ids: Tensor | None = None,
    entropy: bool = False,
    dominant: DominantRule | None = None,
) -> SoftmaxStats:
    """Softmax statistics of logits [..., V] that exist already; see :func:`linear_softmax_stats`.

    Example:
        >>> stats = softmax_stats(torch.tensor([0.5, 0.4, 0.05, 0.05]).log(), token_ids=torch.tensor(0))
        >>> round(stats.token_logprob.exp().item(), 4)
        0.5
    """
    matrix, rows = logit_matrix(logits), logits.shape[:-1]
    check_softmax_options(top_k, temperature)
    ids, choices = optional_ids(token_ids, rows), choice_matrix(choice_ids, rows)
    columns = torch.ops.pyqe.softmax_stats(matrix, ids, choices, top_k, temperature, entropy, rule_spec(dominant))
    return softmax_result(columns, rows, token_ids, top_k, temperature, entropy, choice_ids, dominant)


def linear_softmax_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    top_k: int = 0,
    temperature: float | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    choice_ids: Tensor | None = None,
    entropy: bool = False,
    dominant: DominantRule | None = None,
) -> SoftmaxStats:
    """Softmax statistics of ``hidden @ weight.T + bias`` without keeping the [N, V] logits. Not differentiable.

    Maximum, logsumexp and argmax always; the rest is computed when asked for.

    Args:
        hidden: [..., D].
        weight: [V, D].
        bias: [V] or None.
        token_ids: int64 [...] or [..., K]: tokens whose logits are wanted; -1 gives NaN.
        top_k: how many of the largest logits to return.
        temperature: T of ``tempered_logsumexp``; > 0.
        logit_scale: factor that the model applies to its logits (Cohere's ``logit_scale``, 1 / Granite's
            ``logits_scaling``).
        logit_softcap: c of ``c * tanh(logits / c)`` that the model applies after that (Gemma).
        choice_ids: int64 [C] or [..., C]: answer tokens of a multiple choice.
        entropy: whether to compute it.
        dominant: rule of the dominant tokens.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range.
        IndexError: an id outside [0, V) other than -1 (CPU).

    Example:
        >>> hidden, weight = torch.zeros(2, 3), torch.randn(4, 3)
        >>> linear_softmax_stats(hidden, weight, entropy=True).entropy.exp()  # uniform over four tokens
        tensor([4., 4.])
    """
    matrix, rows = head_matrix(hidden, weight, bias), hidden.shape[:-1]
    check_softmax_options(top_k, temperature)
    ids, choices = optional_ids(token_ids, rows), choice_matrix(choice_ids, rows)
    columns = operator("linear_softmax_stats", weight)(
        matrix,
        weight,
        bias,
        logit_scale,
        logit_softcap,
        ids,
        choices,
        top_k,
        temperature,
        entropy,
        rule_spec(dominant),
    )
    return softmax_result(columns, rows, token_ids, top_k, temperature, entropy, choice_ids, dominant)


def dominant_tokens(logits: Tensor, rule: DominantRule | None = None) -> DominantTokens:
    """Dominant tokens of logits [..., V]; see :func:`linear_dominant_tokens`.

    Example:
        >>> probs = torch.tensor([0.5, 0.4, 0.05, 0.05])
        >>> dominant_tokens(probs.log()).size
        tensor(2)
    """
    dominant = softmax_stats(logits, dominant=rule or DominantRule()).dominant
    assert dominant is not None
    return dominant


def linear_dominant_tokens(
    hidden: Tensor,
    weight: Tensor,
    rule: DominantRule | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> DominantTokens:
    """Tokens that may be right as well as the most probable one; see :class:`pyqe.DominantRule`.

    Args:
        hidden: [..., D].
        weight: [V, D] of the LM's head.
        rule: default ``DominantRule.jump("last")``.
        bias, logit_scale, logit_softcap: of the LM's head, as in :func:`linear_softmax_stats`.

    Returns:
        ids [..., M] with M = ``rule.max_size(V)``, their number and their total probability.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.

    Example:
        >>> hidden, weight = torch.ones(1, 1), torch.tensor([[0.5], [0.4], [0.05], [0.05]]).log()
        >>> linear_dominant_tokens(hidden, weight, DominantRule.top_k(2)).ids
        tensor([[0, 1]])
    """
    dominant = linear_softmax_stats(
        hidden,
        weight,
        bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        dominant=rule or DominantRule(),
    ).dominant
    assert dominant is not None
    return dominant


def boosted_prob(logits: Tensor, token_ids: Tensor, rule: DominantRule | None = None, *, gamma: float = 0.0) -> Tensor:
    """BoostedProb from logits [..., V]; see :func:`linear_boosted_prob`.

    Example:
        >>> boosted_prob(torch.tensor([0.5, 0.4, 0.05, 0.05]).log(), torch.tensor([1, 2]))
        tensor([0.9000, 0.0500])
    """
    return softmax_stats(logits, token_ids=token_ids, dominant=rule or DominantRule()).boosted_prob(token_ids, gamma)


def linear_boosted_prob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    rule: DominantRule | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    gamma: float = 0.0,
) -> Tensor:
    """BoostedProb: total probability of the dominant tokens for a token among them, else its own probability.

    Args:
        hidden: [..., D].
        weight: [V, D] of the LM's head.
        token_ids: int64 [...] or [..., K], the emitted tokens.
        rule: default ``DominantRule.jump("last")``.
        bias, logit_scale, logit_softcap: of the LM's head, as in :func:`linear_softmax_stats`.
        gamma: power of the weighted variant ``mass * p ** gamma`` (the authors use 0.01).

    Returns:
        float in [0, 1], shaped as ``token_ids``; NaN where the id is -1.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
        IndexError: an id outside [0, V) other than -1 (CPU).

    Source: Dinh & Niehues 2025 (arXiv 2502.11115).

    Example:
        >>> hidden, weight = torch.ones(1, 1), torch.tensor([[0.5], [0.4], [0.05], [0.05]]).log()
        >>> linear_boosted_prob(hidden, weight, torch.tensor([1]))
        tensor([0.9000])
    """
    stats = linear_softmax_stats(
        hidden,
        weight,
        bias,
        token_ids=token_ids,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        dominant=rule or DominantRule(),
    )
    return stats.boosted_prob(token_ids, gamma)
