"""The recipes of the study: one that is chosen, and what becomes of it when one thing changes.

Each is trained and scored on every task; which is best is decided on the development splits alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.quality.train import Recipe

CHOSEN = Recipe(text=(("postedits", 150_000),))

# The authors' own, word for word: a copy of the unembedding, without scale and shift that could move.
LITERAL = Recipe(kind="full", start=(1.0, 0.0), lr=1e-4, scale_lr=0.0, epochs=3.0)

_MANY = 500_000  # tokens: all there are of post-edits

_GROUPS: dict[str, dict[str, Recipe]] = {
    "head": {
        "full": replace(CHOSEN, kind="full", lr=3e-4),
        "rescaling": replace(CHOSEN, kind="rescaling"),
        "rescaling of the logit": replace(CHOSEN, kind="rescaling", base="logit"),
        "literal recipe of the authors": LITERAL,
    },
    "base": {"logit": replace(CHOSEN, base="logit")},
    "rank": {f"rank {rank}": replace(CHOSEN, rank=rank) for rank in (1, 4, 8, 16, 64, 128, 256)},
    "source": {
        "softmax": replace(CHOSEN, sources=("softmax",)),
        "unigram": replace(CHOSEN, sources=("unigram",)),
        "uniform": replace(CHOSEN, sources=("uniform",)),
        "uniform and softmax": replace(CHOSEN, sources=("uniform", "softmax")),
        "mixture of unigram and softmax": replace(CHOSEN, combination="mixture"),
        "product of unigram and softmax": replace(CHOSEN, combination="product"),
    },
    "temperature": {f"T {t:g}": replace(CHOSEN, temperature=t) for t in (1.0, 4.0)},
    "exclusion": {
        "nothing": replace(CHOSEN, exclude=None),
        "last cut": replace(CHOSEN, exclude="jump:last"),
        "top 5": replace(CHOSEN, exclude="top_k:5"),
        "nothing, T 1": replace(CHOSEN, exclude=None, temperature=1.0),
    },
    "negatives": {f"{n} negatives": replace(CHOSEN, num_negatives=n) for n in (2, 4, 20, 50)},
    "loss": {
        "whole vocabulary": replace(CHOSEN, loss="vocabulary"),
        "whole vocabulary, nothing excluded": replace(CHOSEN, loss="vocabulary", exclude=None),
        "ranking term": replace(CHOSEN, ranking_weight=1.0),
        "balanced": replace(CHOSEN, pos_weight="balance"),
    },
    "learning rate": {f"lr {lr:g}": replace(CHOSEN, lr=lr) for lr in (1e-4, 3e-4, 3e-3)},
    "epochs": {f"{epochs:g} epochs": replace(CHOSEN, epochs=epochs) for epochs in (1.0, 4.0)},
    "text": {
        "50 k tokens": replace(CHOSEN, text=(("postedits", 50_000),)),
        "300 k tokens": replace(CHOSEN, text=(("postedits", 300_000),)),
        "all post-edits": replace(CHOSEN, text=(("postedits", _MANY),)),
        "novels": replace(CHOSEN, text=(("novels", 150_000),)),
        "half post-edits, half novels": replace(CHOSEN, text=(("postedits", 75_000), ("novels", 75_000))),
    },
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
