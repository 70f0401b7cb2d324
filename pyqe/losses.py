"""The Sigmoid Head loss as a module."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pyqe import functional as F
from pyqe.dominant import DominantRule
from pyqe.functional.losses import Reduction, check_reduction, count_excluded
from pyqe.heads import SigmoidHead
from pyqe.lm_head import LMHead
from pyqe.negatives import NegativeSampler

_SKIPPED = -1


class SigmoidHeadLoss(nn.Module):
    r"""Binary cross-entropy of a Sigmoid Head: reference tokens are right, tokens that cannot be are wrong.

    With a ``sampler`` each reference token (label 1) comes with its sampled negatives (label 0); without one every
    token of the vocabulary outside the dominant set of ``exclude`` is a negative.

    Annotated targets: label 1 marks a right token (it gets negatives as usual), 0 a wrong one (that token alone, as a
    negative of weight ``error_weight``), -1 a token to skip. Optionally a ranking term,
    :math:`\mathrm{mean}_{d \ne y} \max(0, z_d - z_y + \mathrm{margin})` over the dominant tokens d, is added.

    Args:
        sampler: draws the negatives; None for the vocabulary-wide loss.
        exclude: dominant tokens of the vocabulary-wide loss, None for no exclusion, and of the ranking term, where None
            is the sampler's rule, else ``DominantRule.jump("first")``.
        pos_weight: weight of the positives, or "balance": as many as there are negatives.
        error_weight: weight of a token annotated as wrong.
        ranking_weight: factor of the ranking term; 0 leaves it out.
        ranking_margin: its margin.
        ignore_index: target of positions to leave out.
        reduction: "mean" over all pairs (position, token), "sum", or "none": a sum for each position, [...].
        sparse_grad: sparse gradient for the rows of the head's weight (sampled loss only).

    Raises:
        ValueError: unknown reduction or ``pos_weight``; ``sparse_grad`` without a sampler.

    Source: Dinh & Niehues 2026 (arXiv 2601.00680).

    Example:
        >>> from pyqe.heads import FullHead, HeadConfig
        >>> lm_head = LMHead(torch.randn(9, 4))
        >>> head = FullHead(HeadConfig("full", vocab_size=9, hidden_size=4))
        >>> _ = torch.nn.init.zeros_(head.weight)
        >>> loss = SigmoidHeadLoss(NegativeSampler(("uniform",), num_negatives=3))
        >>> round(loss(head, torch.randn(2, 4), torch.tensor([1, 2]), lm_head).item(), 4)
        0.6931
    """

    def __init__(
        self,
        sampler: NegativeSampler | None = None,
        *,
        exclude: DominantRule | None = None,
        pos_weight: float | Literal["balance"] = 1.0,
        error_weight: float = 10.0,
        ranking_weight: float = 0.0,
        ranking_margin: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        sparse_grad: bool = False,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if isinstance(pos_weight, str) and pos_weight != "balance":
            raise ValueError(f"pos_weight: expected a number or 'balance', got {pos_weight!r}")
        if sparse_grad and sampler is None:
            raise ValueError("sparse_grad: the vocabulary-wide loss touches every row; expected a sampler")
        self.sampler = sampler
        self.exclude = exclude if exclude is not None or sampler is None else sampler.exclude
        self.pos_weight = pos_weight
        self.error_weight = error_weight
        self.ranking_weight = ranking_weight
        self.ranking_margin = ranking_margin
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.sparse_grad = sparse_grad

    def forward(
        self,
        head: SigmoidHead,
        hidden: Tensor,
        targets: Tensor,
        lm_head: LMHead,
        *,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        logsumexp: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            head: the head that is trained.
            hidden: [..., D], what feeds the LM's output embedding; position i predicts ``targets`` i.
            targets: int64 [...].
            lm_head: the frozen LM's head.
            labels: [...] of 1, 0, -1 (see the class), or None for 1 everywhere.
            weights: [...] factors, or None.
            logsumexp: [...] of the LM, where it is known already.
            generator: for the negatives.

        Raises:
            ValueError: shapes that do not match, labels other than 1, 0, -1.
        """
        shape = targets.shape
        for name, tensor in (("labels", labels), ("weights", weights), ("logsumexp", logsumexp)):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)} as targets, got {list(tensor.shape)}")
        labels = torch.ones_like(targets) if labels is None else labels
        if not bool(((labels == 0) | (labels == 1) | (labels == _SKIPPED)).all()):
            raise ValueError("labels: expected 1 (right), 0 (wrong) and -1 (skipped)")
        kept = (targets != self.ignore_index) & (labels != _SKIPPED)
        hidden, targets, right = hidden[kept], targets[kept], labels[kept] == 1
        weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights[kept]
        logsumexp = None if logsumexp is None else logsumexp[kept]
        if self.sampler is None:
            losses, pairs = self._vocabulary(head, hidden, targets, lm_head, right, weights, logsumexp)
        else:
            negatives = lm_head.sample_negatives(hidden, targets, self.sampler, generator)
            negatives = negatives.masked_fill(~right[:, None], -1)
            losses, pairs = self._sampled(head, hidden, targets, negatives, lm_head, right, weights, logsumexp)
        result = self._reduce(losses, pairs, kept)
        if self.ranking_weight:
            excess, pairs = self._ranking(head, hidden, targets, lm_head, right, logsumexp)
            result = result + self.ranking_weight * self._reduce(excess, pairs, kept)
        return result

    def _reduce(self, losses: Tensor, pairs: Tensor, kept: Tensor) -> Tensor:
        """Sums of the kept positions (or their total) by the reduction."""
        if self.reduction == "none":
            result = losses.new_zeros(kept.shape)
            result[kept] = losses
            return result
        return losses.sum() / pairs.clamp(min=1) if self.reduction == "mean" else losses.sum()

    def _sampled(
        self,
        head: SigmoidHead,
        hidden: Tensor,
        targets: Tensor,
        negatives: Tensor,
        lm_head: LMHead,
        right: Tensor,
        weights: Tensor,
        logsumexp: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Losses [N] of the positions, and the number of pairs."""
        ids = torch.cat([targets[:, None], negatives], 1)
        logits = self._token_logits(head, hidden, ids, lm_head, logsumexp)
        pair_labels = torch.zeros_like(logits)
        pair_labels[:, 0] = right.to(logits.dtype)
        pair_weights = weights[:, None] * torch.where(right, 1.0, self.error_weight)[:, None]
        losses = F.sampled_bce(
            logits,
            ids,
            pair_labels,
            pos_weight=self._pos_weight(negatives.shape[1]),
            weights=pair_weights,
            reduction="none",
        )
        return losses.sum(1), (ids >= 0).sum()

    def _token_logits(
        self, head: SigmoidHead, hidden: Tensor, ids: Tensor, lm_head: LMHead, logsumexp: Tensor | None
    ) -> Tensor:
        """Logits of the pairs. Padding takes the first id's place: NaN times no gradient would still be NaN."""
        ids = torch.where(ids < 0, ids[:, :1], ids)
        with torch.no_grad():
            base = head.base_of(hidden, ids, lm_head, logsumexp)
        return head(hidden, ids, base, sparse_grad=self.sparse_grad)

    def _pos_weight(self, negatives: int) -> float:
        return float(negatives) if self.pos_weight == "balance" else float(self.pos_weight)

    def _vocabulary(
        self,
        head: SigmoidHead,
        hidden: Tensor,
        targets: Tensor,
        lm_head: LMHead,
        right: Tensor,
        weights: Tensor,
        logsumexp: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Losses, of the positions [N] for reduction "none", else in total, and the number of pairs."""
        nothing = torch.empty(len(targets), 0, dtype=torch.int64, device=targets.device)
        dominant = self._dominant(hidden, lm_head) if self.exclude is not None else nothing
        terms = head.linear_terms(hidden, lm_head, logsumexp)
        losses = F.linear_vocab_bce(
            terms.hidden,
            terms.weight,
            targets.masked_fill(~right, self.ignore_index),
            exclude=dominant,
            bias=terms.bias,
            scale=terms.scale,
            shift=terms.shift,
            pos_weight=self._pos_weight(lm_head.vocab_size - 1),
            weights=weights,
            ignore_index=self.ignore_index,
            reduction="none" if self.reduction == "none" else "sum",
        )
        per_row = lm_head.vocab_size - count_excluded(dominant, targets)
        pairs = torch.where(right, per_row, 1).sum()
        if bool(right.all()):
            return losses, pairs
        wrong, _ = self._sampled(head, hidden, targets, nothing, lm_head, right, weights, logsumexp)
        wrong = wrong.masked_fill(right, 0.0)
        return losses + (wrong if self.reduction == "none" else wrong.sum()), pairs

    def _dominant(self, hidden: Tensor, lm_head: LMHead) -> Tensor:
        """Dominant ids [N, M], no wider than needed."""
        dominant = lm_head.softmax_stats(hidden, dominant=self.exclude or DominantRule.jump("first")).dominant
        assert dominant is not None
        widest = int(dominant.size.max()) if dominant.size.numel() else 0
        return dominant.ids[:, :widest]

    def _ranking(
        self,
        head: SigmoidHead,
        hidden: Tensor,
        targets: Tensor,
        lm_head: LMHead,
        right: Tensor,
        logsumexp: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Sums [N] over the dominant tokens of each position, and the number of pairs."""
        ids = torch.cat([targets[:, None], self._dominant(hidden, lm_head)], 1)
        logits = self._token_logits(head, hidden, ids, lm_head, logsumexp)
        others = (ids[:, 1:] >= 0) & (ids[:, 1:] != targets[:, None]) & right[:, None]
        excess = torch.relu(logits[:, 1:] - logits[:, :1] + self.ranking_margin)
        return (excess * others).sum(1), others.sum()
