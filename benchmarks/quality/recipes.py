"""The recipes of the study: one that is chosen, and what becomes of it when one thing changes.

Each is trained and scored on every task; which is best is decided on the development splits alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.quality.train import Recipe

CHOSEN = Recipe()
SMALL = replace(CHOSEN, text=(("postedits", 100_000),), epochs=2.0)  # what one thing is changed of: a third of the text

# The authors' own: a copy of the unembedding, without scale and shift that could move.
LITERAL = replace(
    SMALL, kind="full", start=(1.0, 0.0), lr=1e-4, scale_lr=0.0, epochs=3.0, temperature=2.0, exclude="jump:first"
)

_GROUPS: dict[str, dict[str, Recipe]] = {
    "all the text": {  # of the chosen one
        "scale and shift at lr 1e-2": replace(CHOSEN, scale_lr=1e-2),
        "lr 5e-4": replace(CHOSEN, lr=5e-4),
        "nothing excluded": replace(CHOSEN, exclude=None),
        "nothing excluded, lr 5e-4": replace(CHOSEN, exclude=None, lr=5e-4),
    },
    "small": {"a third of the text, twice": SMALL},
    "head": {
        "literal recipe of the authors": LITERAL,
        "full": replace(SMALL, kind="full"),
        "full, lr 1e-3": replace(SMALL, kind="full", lr=1e-3),
        # at learning rates that suit it
        "full, 8 epochs": replace(SMALL, kind="full", lr=1e-3, scale_lr=1e-2, epochs=8.0),
        "full, the authors' negatives": replace(SMALL, kind="full", temperature=2.0, exclude="jump:first"),
        "rescaling": replace(SMALL, kind="rescaling", scale_lr=1e-2),
        "rescaling of the logit": replace(SMALL, kind="rescaling", base="logit", scale_lr=1e-2),
        "low-rank on the logit": replace(SMALL, base="logit"),
        "no bias of tokens": replace(SMALL, token_bias=False),
        "starts at scale .5": replace(SMALL, start=(0.5, 1.0)),
        "reads layer 20 of 30": replace(SMALL, layer=20),
    },
    "temperature": {f"T {t:g}": replace(SMALL, temperature=t) for t in (0.7, 1.5, 4.0)},
    "exclusion": {
        "last cut": replace(SMALL, exclude="jump:last"),
        "nothing": replace(SMALL, exclude=None),
        "first cut, T 2 (the authors')": replace(SMALL, exclude="jump:first", temperature=2.0),
        "last cut, T 2": replace(SMALL, exclude="jump:last", temperature=2.0),
        "nothing, T 2": replace(SMALL, exclude=None, temperature=2.0),
    },
    "learning rate": {f"lr {lr:g}": replace(SMALL, lr=lr) for lr in (1e-4, 1e-3, 3e-3)},
    "text": {
        "30 k tokens": replace(SMALL, text=(("postedits", 30_000),), epochs=4.0),
        "novels": replace(SMALL, text=(("novels", 100_000),)),
        "half post-edits, half novels": replace(SMALL, text=(("postedits", 50_000), ("novels", 50_000))),
        "post-edits and novels, 400 k": replace(CHOSEN, text=(("postedits", 300_000), ("novels", 100_000))),
    },
    "source": {
        "softmax": replace(SMALL, sources=("softmax",)),
        "unigram": replace(SMALL, sources=("unigram",)),
        "uniform": replace(SMALL, sources=("uniform",)),
        "uniform and softmax": replace(SMALL, sources=("uniform", "softmax")),
        "mixture of unigram and softmax": replace(SMALL, combination="mixture"),
        "product of unigram and softmax": replace(SMALL, combination="product"),
    },
    "loss": {
        "whole vocabulary": replace(SMALL, loss="vocabulary", epochs=1.0),
        "ranking term": replace(SMALL, ranking_weight=1.0),
        "balanced": replace(SMALL, pos_weight="balance"),
        "distilled from BoostedProb": replace(SMALL, distil=0.5),
    },
    "negatives": {f"{n} negatives": replace(SMALL, num_negatives=n) for n in (2, 5, 20)},
    "rank": {f"rank {rank}": replace(SMALL, rank=rank) for rank in (1, 4, 8, 16, 64, 256)},
}


def recipes(seeds: int) -> Iterator[tuple[str, str, Recipe]]:
    """Group, name and recipe, the chosen one first.

    Args:
        seeds: how often the chosen one is trained.
    """
    yield "chosen", "chosen", CHOSEN
    for seed in range(1, seeds):
        yield "seed", f"seed {seed}", replace(CHOSEN, seed=seed)
    for group, members in _GROUPS.items():
        for name, recipe in members.items():
            yield group, name, recipe
