"""Recipes for a Sigmoid Head, and training by them."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import pyqe
from benchmarks.quality.states import LanguageModel, hashed, joined
from benchmarks.quality.states import first as first_tokens
from pyqe import functional as F
from pyqe.heads import Base, Kind, SigmoidHead
from pyqe.negatives import Combination, Source
from pyqe.training import HiddenStateDataset, RowAdam

_WARMUP_STEPS = 20
_SHOWN_STEPS = 20  # of which the last loss is the mean


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a head becomes.

    Attributes:
        kind, rank, base: of the head; rank and base where the kind has them.
        token_bias: whether a low-rank head learns a bias of each token.
        start: scale and shift to begin with; None: pyqe's.
        loss: with sampled negatives, or with the whole vocabulary.
        sources, num_negatives, counts, combination, temperature: of the sampler.
        exclude: rule of the tokens that are never negatives, as text; None: there are none.
        ranking_weight: of the ranking term.
        pos_weight: of the positives.
        distil: weight of a term that gives other dominant tokens their BoostedProb as a label.
        lr: at its highest, after 20 steps; a cosine down to 0.
        scale_lr: the same for scale and shift.
        epochs: over the text.
        rows: positions in a step.
        text: how many tokens of each kind of text; fewer if there are fewer.
        layer: of ``hidden_states``, which the correction reads in place of what feeds the LM's head.
        seed: of initial values, order and negatives.
    """

    kind: Kind = "low_rank"
    rank: int = 24
    base: Base = "logprob"
    token_bias: bool = True
    start: tuple[float, float] | None = None
    loss: Literal["sampled", "vocabulary"] = "sampled"
    sources: tuple[Source, ...] = ("unigram", "softmax")
    num_negatives: int = 10
    counts: tuple[int, ...] | None = None
    combination: Combination = "independent"
    temperature: float = 1.0
    exclude: str | None = "jump:first"
    ranking_weight: float = 0.0
    pos_weight: float | Literal["balance"] = 1.0
    distil: float = 0.0
    lr: float = 3e-4
    scale_lr: float = 3e-4
    epochs: float = 1.0
    rows: int = 1024
    text: tuple[tuple[str, int], ...] = (("postedits", 300_000),)
    layer: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class TrainingData:
    """States in training order, the layer's own beside them if the recipe reads one."""

    states: HiddenStateDataset
    layer_hidden: Tensor | None = None

    @property
    def key(self) -> str:
        """Hash of what there is to learn."""
        return hashed([len(self.states.labels), *self.states.labels.tolist()])


def mixture(by_source: dict[str, HiddenStateDataset], recipe: Recipe) -> HiddenStateDataset:
    """The text that a recipe asks for."""
    return joined([first_tokens(by_source[name], tokens) for name, tokens in recipe.text if tokens])


def sampler(recipe: Recipe, labels: Tensor, vocab_size: int) -> pyqe.NegativeSampler:
    """The recipe's negatives, with the frequencies of the training text's tokens."""
    return pyqe.NegativeSampler(
        recipe.sources,
        num_negatives=recipe.num_negatives,
        counts=recipe.counts,
        combination=recipe.combination,
        temperature=recipe.temperature,
        exclude=_rule(recipe),
        unigram_counts=pyqe.NegativeSampler.count_tokens(labels, vocab_size),
    )


def _rule(recipe: Recipe) -> pyqe.DominantRule | None:
    return None if recipe.exclude is None else pyqe.DominantRule.parse(recipe.exclude)


def train(recipe: Recipe, data: TrainingData, lm: LanguageModel) -> tuple[SigmoidHead, dict[str, Any]]:
    """A trained head, and what there is to say about its training: losses, seconds, tokens a second."""
    torch.manual_seed(recipe.seed)
    head = SigmoidHead.from_lm_head(
        lm.model, lm.tokenizer, kind=recipe.kind, rank=recipe.rank, base=recipe.base
    ).requires_grad_(True)
    if recipe.start is not None:
        with torch.no_grad():
            for parameter, value in zip((head.scale, head.shift), recipe.start, strict=True):
                parameter.fill_(value)
    head.config.training = asdict(recipe)
    losses, start = [], time.perf_counter()
    positions = len(data.states.labels)
    steps = math.ceil(positions * recipe.epochs / recipe.rows)
    optimizer, schedule = _optimizer(head, recipe, steps)
    step_loss = _StepLoss(recipe, data, lm)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < min(recipe.rows, positions):
            order = torch.cat([order, torch.randperm(positions, generator=step_loss.generator)])
        rows, order = order[: recipe.rows], order[recipe.rows :]
        optimizer.zero_grad(set_to_none=True)
        loss = step_loss(head, rows)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    facts = {
        "tokens": positions,
        "steps": steps,
        "seconds": seconds,
        "tokens_per_second": positions * recipe.epochs / seconds,
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-_SHOWN_STEPS:])),
        "scale": head.scale.item(),
        "shift": head.shift.item(),
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
    }
    return head.requires_grad_(False), facts


def _optimizer(head: SigmoidHead, recipe: Recipe, steps: int) -> tuple[RowAdam, torch.optim.lr_scheduler.LambdaLR]:
    affine = [head.scale, head.shift]
    fixed = {"scale", "shift"} | (set() if recipe.token_bias else {"token_bias"})
    rest = [parameter for name, parameter in head.named_parameters() if name not in fixed]
    groups: list[dict[str, Any]] = [{"params": affine, "lr": recipe.scale_lr}]
    optimizer = RowAdam(groups + ([{"params": rest}] if rest else []), lr=recipe.lr)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class _StepLoss:
    """The loss of some of the positions."""

    def __init__(self, recipe: Recipe, data: TrainingData, lm: LanguageModel) -> None:
        self.data, self.lm_head, self.distil = data, lm.head, recipe.distil
        self.generator = torch.Generator().manual_seed(recipe.seed)
        negatives = None
        if recipe.loss == "sampled":
            negatives = sampler(recipe, data.states.labels, self.lm_head.vocab_size)
        if data.layer_hidden is not None and (negatives is None or recipe.ranking_weight):
            raise ValueError("layer: expected the sampled loss without a ranking term")
        self.loss = pyqe.SigmoidHeadLoss(
            negatives,
            exclude=_rule(recipe),
            pos_weight=recipe.pos_weight,
            ranking_weight=recipe.ranking_weight,
            sparse_grad=recipe.kind == "full" and negatives is not None,
        )

    def __call__(self, head: SigmoidHead, rows: Tensor) -> Tensor:
        states = self.data.states
        hidden, targets, logsumexp = states.hidden[rows], states.labels[rows], states.logsumexp[rows]
        if self.data.layer_hidden is not None:
            return self._of_layer(head, self.data.layer_hidden[rows], hidden, targets, logsumexp)
        loss = self.loss(head, hidden, targets, self.lm_head, logsumexp=logsumexp, generator=self.generator)
        if self.distil:
            loss = loss + self.distil * self._distilled(head, hidden, targets, logsumexp)
        return loss

    def _distilled(self, head: SigmoidHead, hidden: Tensor, targets: Tensor, logsumexp: Tensor) -> Tensor:
        """Cross-entropy with BoostedProb, the dominant tokens' total probability, as the label of each of them."""
        dominant = self.lm_head.softmax_stats(hidden, dominant=pyqe.DominantRule.jump("first")).dominant
        assert dominant is not None
        ids = dominant.ids[:, : max(int(dominant.size.max()), 1)]
        others = (ids >= 0) & (ids != targets[:, None])
        ids = torch.where(others, ids, targets[:, None])
        logits = head(hidden, ids, head.base_of(hidden, ids, self.lm_head, logsumexp))
        labels = dominant.mass[:, None].clamp(0, 1).expand_as(logits)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return (losses * others).sum() / others.sum().clamp(min=1)

    def _of_layer(self, head: SigmoidHead, layer: Tensor, hidden: Tensor, targets: Tensor, logsumexp: Tensor) -> Tensor:
        """The sampled loss of a head that reads one layer and whose negatives and base come from the last."""
        assert self.loss.sampler is not None
        negatives = self.lm_head.sample_negatives(hidden, targets, self.loss.sampler, self.generator)
        ids = torch.cat([targets[:, None], negatives], 1)
        known = torch.where(ids < 0, ids[:, :1], ids)
        logits = head(layer, known, head.base_of(hidden, known, self.lm_head, logsumexp))
        labels = torch.zeros_like(logits)
        labels[:, 0] = 1
        return F.sampled_bce(logits, ids, labels)
