"""Losses of the Sigmoid Head."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pyqe.backends.reference import compute_dtype
from pyqe.dominant import DominantRule
from pyqe.functional._arguments import check_ids, head_matrix, id_matrix, number_like, per_row
from pyqe.functional._sharded import operator
from pyqe.functional.softmax import linear_dominant_tokens
from pyqe.functional.token_logits import linear_token_logits

Reduction = Literal["none", "mean", "sum"]


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")


def sampled_bce(
    logits: Tensor,
    token_ids: Tensor,
    labels: Tensor,
    *,
    pos_weight: float = 1.0,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Binary cross-entropy of token logits against labels, over the pairs (position, token) that take part.

    Differentiable in ``logits``.

    Args:
        logits: [..., K].
        token_ids: int64 [..., K]; pairs with -1 take no part.
        labels: [..., K] in [0, 1].
        pos_weight: weight of the positives.
        weights: factor of each pair's loss, broadcasts to [..., K].
        reduction: "mean" over the pairs that take part (0 if none does), "sum", or "none" ([..., K]).

    Raises:
        ValueError: unknown reduction.

    Example:
        >>> sampled_bce(torch.zeros(2), torch.tensor([3, -1]), torch.tensor([1, 0]), reduction="none")
        tensor([0.6931, 0.0000])
    """
    check_reduction(reduction)
    present = token_ids >= 0
    logits = logits.masked_fill(~present, 0.0)
    losses = binary_cross_entropy_with_logits(
        logits,
        labels.to(logits.dtype),
        pos_weight=number_like(pos_weight, logits, logits.dtype),
        reduction="none",
    )
    losses = losses * (present if weights is None else present * weights)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / present.sum().clamp(min=1)


def linear_sampled_bce(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    negatives: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | float = 1.0,
    shift: Tensor | float = 0.0,
    pos_weight: float = 1.0,
    reduction: Reduction = "mean",
    sparse_grad: bool = False,
) -> Tensor:
    r"""The Sigmoid Head loss: BCE of the target (label 1) and its sampled negatives (label 0).

    .. math:: \text{mean over pairs of } -[y \log\sigma(z) + (1 - y) \log(1 - \sigma(z))],
              \quad z = \text{scale} \cdot \langle h, w_v \rangle + b_v + \text{shift}

    Differentiable in hidden, weight, bias, scale and shift.

    Args:
        hidden: [..., D].
        weight: [V, D] of the Sigmoid Head.
        targets: int64 [...]; negative ids (-1, or ``ignore_index`` -100) take the whole position out.
        negatives: int64 [..., K], padded with -1.
        bias: [V] or None.
        scale, shift: numbers.
        pos_weight: weight of the positives; the authors' ``balance`` is K.
        reduction: "mean" over the pairs that take part, "sum", or "none" ([..., 1 + K], 0 for the others).
        sparse_grad: see :func:`linear_token_logits`.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
        IndexError: an id out of range (CPU).

    Source: Dinh & Niehues 2026 (arXiv 2601.00680).

    Example:
        >>> targets, negatives = torch.tensor([1, -100]), torch.tensor([[0], [2]])
        >>> loss = linear_sampled_bce(torch.zeros(2, 3), torch.randn(5, 3), targets, negatives)
        >>> round(loss.item(), 4)  # one position, two logits of 0
        0.6931
    """
    check_ids(targets, "targets")
    if targets.shape != hidden.shape[:-1] or negatives.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets, negatives: expected {list(hidden.shape[:-1])} and {[*hidden.shape[:-1], 'K']}, "
            f"got {list(targets.shape)} and {list(negatives.shape)}"
        )
    ids = torch.cat([targets[..., None], negatives], -1)
    ids = ids.masked_fill(targets[..., None] < 0, -1)
    labels = torch.zeros_like(ids)
    labels[..., 0] = 1
    logits = scale * linear_token_logits(hidden, weight, ids, sparse_grad=sparse_grad).masked_fill(ids < 0, 0.0) + shift
    if bias is not None:
        ones = torch.ones_like(hidden[..., :1], dtype=bias.dtype)  # as logits, which may be sharded
        logits = logits + linear_token_logits(ones, bias[:, None], ids).masked_fill(ids < 0, 0.0)
    return sampled_bce(logits, ids, labels, pos_weight=pos_weight, reduction=reduction)


def count_excluded(exclude_ids: Tensor, targets: Tensor) -> Tensor:
    """How many tokens each row [N] leaves out: distinct ids of [N, M] other than -1 and the target [N]."""
    ids = exclude_ids.masked_fill(exclude_ids == targets[:, None], -1).sort(1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return ((ids >= 0) & first).sum(1)


def _kept_rows(value: Tensor | float | None, kept: Tensor, rows: torch.Size, like: Tensor, name: str) -> Tensor | None:
    numbers = per_row(value, rows, like, name)
    return None if numbers is None else numbers.masked_fill(~kept, 0.0)


def _kept_weights(weights: Tensor, kept: Tensor, rows: torch.Size) -> Tensor:
    if weights.shape != rows:
        raise ValueError(f"weights: expected {list(rows)}, got {list(weights.shape)}")
    return weights.reshape(-1).masked_fill(~kept, 0.0)


def linear_vocab_bce(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    exclude: Tensor | DominantRule | None = None,
    lm_weight: Tensor | None = None,
    lm_bias: Tensor | None = None,
    lm_logit_scale: float = 1.0,
    lm_logit_softcap: float | None = None,
    bias: Tensor | None = None,
    scale: Tensor | float | None = None,
    shift: Tensor | float | None = None,
    pos_weight: float = 1.0,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Sigmoid Head loss over the whole vocabulary, dominant tokens masked; one pass, no [N, V] buffer.

    Per position: BCE of every token v, label 1 for the target, else 0, with
    :math:`z_v = \text{scale} \cdot \langle h, w_v \rangle + b_v + \text{shift}`; excluded tokens other than the target
    take no part. Differentiable in hidden, weight, bias, scale and shift. The gradients are computed together with the
    loss ("mean" and "sum"); "none" takes a second pass.

    Args:
        hidden: [..., D].
        weight: [V, D] of the Sigmoid Head.
        targets: int64 [...].
        exclude: int64 [..., M] ids padded with -1, or a rule that is applied to the LM's softmax (needs ``lm_weight``).
        lm_weight, lm_bias, lm_logit_scale, lm_logit_softcap: the LM's head, for a rule; see
            :func:`linear_softmax_stats`.
        bias: [V] or None.
        scale, shift: number(s) that broadcast to [...].
        pos_weight: weight of the positives.
        weights: [...], factor of each position's loss, or None.
        ignore_index: target of positions to leave out, beside -1.
        reduction: "mean" over the pairs (position, token) that take part, "sum", or "none" ([...], sums per position).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; a rule without ``lm_weight``.
        IndexError: an id out of range (CPU).

    Source: Dinh & Niehues 2026 (arXiv 2601.00680), with every non-dominant token as a negative.

    Example:
        >>> loss = linear_vocab_bce(torch.zeros(1, 3), torch.randn(5, 3), torch.tensor([1]), reduction="sum")
        >>> round(loss.item(), 4)  # five logits of 0
        3.4657
    """
    rows = hidden.shape[:-1]
    matrix = head_matrix(hidden, weight, bias)
    check_ids(targets, "targets")
    if targets.shape != rows:
        raise ValueError(f"targets: expected {list(rows)}, got {list(targets.shape)}")
    check_reduction(reduction)
    if isinstance(exclude, DominantRule):
        if lm_weight is None:
            raise ValueError("lm_weight: expected the LM head's weight, as exclude is a rule; got None")
        options: dict[str, Any] = {"logit_scale": lm_logit_scale, "logit_softcap": lm_logit_softcap}
        exclude = linear_dominant_tokens(hidden, lm_weight, exclude, bias=lm_bias, **options).ids
    exclude_ids = None if exclude is None else id_matrix(exclude, rows, "exclude")
    flat = targets.reshape(-1)
    kept = (flat != ignore_index) & (flat != -1)
    flat = flat.masked_fill(~kept, -1)
    matrix = matrix.masked_fill(~kept[:, None], 0.0)  # zero weight alone would not stop a NaN
    row_weights = kept.to(compute_dtype(matrix))
    if weights is not None:
        row_weights = row_weights * _kept_weights(weights, kept, rows)
    if reduction == "mean":
        pairs = kept.sum() * weight.shape[0]
        if exclude_ids is not None:
            pairs = pairs - (count_excluded(exclude_ids, flat) * kept).sum()
        row_weights = row_weights / pairs.clamp(min=1)
    total, losses, *_ = operator("linear_vocab_bce", weight)(
        matrix,
        weight,
        bias,
        _kept_rows(scale, kept, rows, matrix, "scale"),
        _kept_rows(shift, kept, rows, matrix, "shift"),
        flat,
        exclude_ids,
        row_weights,
        pos_weight,
        torch.is_grad_enabled() and matrix.requires_grad,
        torch.is_grad_enabled() and weight.requires_grad,
    )
    return (losses * row_weights).reshape(rows) if reduction == "none" else total
