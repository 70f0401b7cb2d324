"""What training a head from raw text costs beside the language model's forward pass alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

import pyqe
from benchmarks.quality.states import BATCH, LanguageModel
from benchmarks.quality.train import Recipe, sampler
from pyqe.heads import SigmoidHead
from pyqe.training import RowAdam, TextDataset, TrainingModule, collate

ROUNDS = 7


def measure(lm: LanguageModel, recipe: Recipe, texts: Sequence[str]) -> dict[str, float]:
    """Tokens a second, medians of interleaved rounds on one batch of packed text.

    Args:
        lm: the language model.
        recipe: of the head.
        texts: enough for a batch of BATCH blocks, else the batch is smaller.

    Returns:
        ``forward``: the model's own forward pass with its logits; ``training``: the whole of a training step, from
        token ids to updated parameters; ``share``: time of training over forward.
    """
    blocks = TextDataset(lm.tokenizer, texts)
    batch = collate([blocks[number] for number in range(min(BATCH, len(blocks)))])
    head = SigmoidHead.from_lm_head(lm.model, lm.tokenizer, kind=recipe.kind, rank=recipe.rank, base=recipe.base)
    loss = pyqe.SigmoidHeadLoss(sampler(recipe, blocks.targets, lm.head.vocab_size))
    module = TrainingModule(lm.model, head, loss)
    optimizer = RowAdam(module.parameters(), lr=recipe.lr)

    def forward() -> None:
        with torch.no_grad():
            lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def training() -> None:
        optimizer.zero_grad(set_to_none=True)
        module(**batch)["loss"].backward()
        optimizer.step()

    alone, whole = _interleaved([forward, training])
    tokens = batch["input_ids"].numel()
    return {"forward": tokens / alone, "training": tokens / whole, "share": whole / alone}


def _interleaved(functions: Sequence[Callable[[], None]]) -> list[float]:
    """Median seconds of each, after a round that does not count."""
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS + 1):
        for times, function in zip(taken, functions, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [median(times[1:]) for times in taken]
