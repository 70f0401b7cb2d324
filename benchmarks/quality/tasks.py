"""Texts to learn from, and sentences that people judged.

All of it is stored as words with a space between each two; it is put together as English is written before a language
model sees it ("cat ." is no English: the softmax probability of what follows says more about the spaces).
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sacremoses import MosesDetokenizer
from tqdm import tqdm

from benchmarks.reproduce.data import data_path

TEXTS = ("postedits", "novels")
SPLITS = ("dev", "test", "et-en")  # what recipes are chosen on, what they are held to, another language pair
RIGHT, WRONG, UNJUDGED = 0, 1, -1
_SHUFFLE_SEED = 0

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sentence:
    """A sentence with judgements.

    Attributes:
        words: as the data has them.
        bad: for each word, WRONG, RIGHT or UNJUDGED.
        split: one of SPLITS.
        da: mean of the annotators' z-scores of the whole translation.
        hter: share of it that a post-editor changed.
        nmt: log-probability of each token by the model that translated.
        nmt_word: the word that each of those belongs to.
    """

    words: list[str]
    bad: list[int]
    split: str
    da: float | None = None
    hter: float | None = None
    nmt: list[float] = field(default_factory=list)
    nmt_word: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """Judged sentences; if ``paired``, each two of them are a right and a wrong one with the same beginning."""

    name: str
    sentences: list[Sentence]
    paired: bool = False


@cache
def _detokenizer() -> Any:
    return MosesDetokenizer(lang="en")


def detokenize(words: Sequence[str]) -> str:
    """Words as English is written.

    Example:
        >>> detokenize(["I", "ca", "n't", ",", "she", "said", "."])
        "I can't, she said."
    """
    text = str(_detokenizer().detokenize(list(words)))
    return text.replace(" n't", "n't")  # which it does not know


def word_spans(words: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Characters [start, end) of each word in the text.

    Raises:
        ValueError: the text differs from the words in more than spaces.

    Example:
        >>> word_spans(["a", "b", "."], "a b.")
        [(0, 1), (2, 3), (3, 4)]
    """
    spans, position = [], 0
    for word in words:
        while text[position : position + 1] == " ":
            position += 1
        if not text.startswith(word, position):
            raise ValueError(f"text: expected {word!r} at {position}, got {text!r}")
        spans.append((position, position + len(word)))
        position += len(word)
    return spans


def some(items: Sequence[Item], limit: int | None) -> list[Item]:
    """All items, or ``limit`` of them from all over."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[number * len(items) // limit] for number in range(limit)]


# --- texts to learn from


def training_texts(name: str) -> list[str]:
    """Post-edited sentences of Wikipedia or paragraphs of novels, in a random order that is always the same."""
    texts = list(_postedits() if name == "postedits" else _novels())
    random.Random(_SHUFFLE_SEED).shuffle(texts)
    return texts


def _postedits() -> Iterator[str]:
    lines = data_path("text/english_postedits_train.txt").read_text(encoding="utf-8").splitlines()
    for line in tqdm(lines, desc="post-edits", unit=" sentences", disable=None):
        if line.strip():
            yield detokenize(line.split())


def _novels() -> Iterator[str]:
    for path in sorted(data_path("text").glob("*_*-*.txt")):
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            if paragraph.strip():
                yield " ".join(paragraph.split())


# --- tasks


def tasks(limit: int | None = None) -> dict[str, Task]:
    """All tasks, by name.

    Args:
        limit: sentences (pairs) of each file.
    """
    return {task.name: task for task in (_realec(limit), _mlqe(limit), _blimp(limit))}


def _realec(limit: int | None) -> Task:
    """Learners' English, a judgement for each word; even sentences are for development."""
    text = data_path("realec/realec_half.tsv").read_text(encoding="utf-8")
    blocks = [[line.split("\t") for line in block.splitlines()] for block in text.split("\n\n") if block.strip()]
    sentences = [
        Sentence([word for word, _ in block], [_bad(mark == "i") for _, mark in block], SPLITS[number % 2])
        for number, block in enumerate(some(blocks, limit))
    ]
    return Task("realec", sentences)


def _mlqe(limit: int | None) -> Task:
    """Translations into English, a judgement for each word and two for each sentence."""
    files = {"ro-en.dev": "dev", "ro-en.test": "test", "et-en.dev": "et-en"}
    sentences = []
    for name, split in files.items():
        for row in some(_rows(data_path(f"mlqe_pe/{name}.jsonl.gz")), limit):
            tokens = len(row["bpe_word"])  # one fewer than log-probabilities: the end of the sentence has one
            sentences.append(
                Sentence(
                    words=row["mt"].split(" "),
                    bad=[_bad(mark == "1") for mark in row["bad"]],
                    split=split,
                    da=row["da_z"],
                    hter=row["hter"],
                    nmt=row["logp"][:tokens],
                    nmt_word=row["bpe_word"],
                )
            )
    return Task("mlqe", sentences)


def _blimp(limit: int | None) -> Task:
    """Beginnings of sentences with a right and a wrong next word; whole kinds of errors are for development."""
    rows = [row for row in _rows(data_path("blimp/blimp_75x67.jsonl.gz")) if row["prefix"] is not None]
    kinds = sorted({row["uid"] for row in rows})
    sentences = []
    for row in some(rows, limit):
        before = row["prefix"].split(" ")
        for word, mark in ((row["word_good"], RIGHT), (row["word_bad"], WRONG)):
            marks = [UNJUDGED] * len(before) + [mark]
            sentences.append(Sentence([*before, word], marks, SPLITS[kinds.index(row["uid"]) % 2]))
    return Task("blimp", sentences, paired=True)


def _bad(wrong: bool) -> int:
    return WRONG if wrong else RIGHT


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
