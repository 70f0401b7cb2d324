"""Hidden states of the frozen language model, computed once and kept in parts, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.tasks import Sentence, detokenize, training_texts, word_spans
from pyqe._files import atomic_path
from pyqe.lm_head import LMHead, evaluation
from pyqe.training import HiddenStateDataset, TextDataset
from pyqe.training.data import IGNORE_INDEX, collate

MAX_TOKENS = 255  # of a text; with what comes before it that is a block of 256
PART = 1000  # texts in one file
BATCH = 16  # texts in one forward pass, of about the same length


@dataclass(frozen=True)
class LanguageModel:
    """The frozen language model; ``context`` stands before every text, and each text stands alone."""

    name: str
    model: Any
    tokenizer: Any
    context: str = "<|endoftext|>"

    @property
    def head(self) -> LMHead:
        return LMHead.from_model(self.model)

    @property
    def context_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.context))

    def encode(self, text: str) -> list[int]:
        """The text's tokens, no more than MAX_TOKENS."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])[:MAX_TOKENS]

    def encode_words(self, sentence: Sentence, *, spaced: bool = False) -> tuple[list[int], list[int]]:
        """Tokens of a sentence and the word in which each ends.

        Args:
            sentence: its words.
            spaced: leave a space between each two of them.
        """
        text = " ".join(sentence.words) if spaced else detokenize(sentence.words)
        ends = [end for _, end in word_spans(sentence.words, text)]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        words, word = [], 0
        for _, end in encoded["offset_mapping"]:
            while word < len(ends) - 1 and ends[word] < end:
                word += 1
            words.append(word)
        return list(encoded["input_ids"]), words


class StateCache:
    """Hidden states by what they are of.

    Args:
        lm: the language model.
        folder: where parts are kept; their names hold a hash of the tokens, the model and the layer.
    """

    def __init__(self, lm: LanguageModel, folder: Path) -> None:
        self.lm, self.folder = lm, folder
        folder.mkdir(parents=True, exist_ok=True)

    def states(self, name: str, sequences: Sequence[list[int]]) -> HiddenStateDataset:
        """States that predict each token of each sequence, in their order.

        Args:
            name: for the files and the progress bar.
            sequences: tokens of each text, not empty.
        """
        return joined([HiddenStateDataset.load(path) for path in self._parts(name, sequences, None)])

    def layer_states(self, name: str, sequences: Sequence[list[int]], layer: int) -> Tensor:
        """The same of an earlier layer, ``hidden_states[layer]`` of the model: [N, D]."""
        paths = self._parts(f"{name}-layer{layer}", sequences, layer)
        return torch.cat([HiddenStateDataset.load(path).hidden for path in paths])

    def _parts(self, name: str, sequences: Sequence[list[int]], layer: int | None) -> list[Path]:
        """Files of all parts, computed where they are not there yet."""
        paths = []
        with tqdm(total=sum(map(len, sequences)), unit=" tokens", desc=f"states of {name}", disable=None) as bar:
            for start in range(0, len(sequences), PART):
                part = sequences[start : start + PART]
                key = hashed([self.lm.name, str(self.lm.model.dtype), self.lm.context_id, layer, part])
                paths.append(self.folder / f"{name}-{start // PART:02d}-{key}.safetensors")
                if not paths[-1].exists():
                    compute(self.lm, part, layer).save(paths[-1])
                bar.update(sum(map(len, part)))
        return paths


def compute(lm: LanguageModel, sequences: Sequence[list[int]], layer: int | None = None) -> HiddenStateDataset:
    """States of sequences, in their order; sequences of about one length run together, as padding costs time.

    Args:
        lm: the language model.
        sequences: tokens of each text.
        layer: of ``hidden_states``, in place of what feeds the LM's head; there is no logsumexp then (NaN).
    """
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    dataset = TextDataset(lm.tokenizer, [])
    dataset.blocks = [([lm.context_id, *sequences[i]], [IGNORE_INDEX, *sequences[i]]) for i in order]
    if layer is None:
        states = HiddenStateDataset.compute(lm.model, dataset, batch_size=BATCH)
    else:
        hidden, labels = torch.cat(list(_layer_states(lm, dataset, layer))), dataset.targets
        states = HiddenStateDataset(hidden, labels, torch.full(labels.shape, torch.nan))
    lengths = [len(sequences[i]) for i in order]
    columns = (states.hidden, states.labels, states.logsumexp)
    return HiddenStateDataset(*(_reordered(column, lengths, order) for column in columns))


def _layer_states(lm: LanguageModel, dataset: TextDataset, layer: int) -> Iterator[Tensor]:
    with evaluation(lm.model):
        for start in range(0, len(dataset), BATCH):
            batch = collate([dataset[i] for i in range(start, min(start + BATCH, len(dataset)))])
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            result = lm.model.base_model(**inputs, use_cache=False, output_hidden_states=True)
            yield result.hidden_states[layer][:, :-1][batch["labels"][:, 1:] != IGNORE_INDEX]


def _reordered(column: Tensor, lengths: list[int], order: list[int]) -> Tensor:
    """Pieces of ``lengths``, piece k of which belongs at ``order[k]``."""
    pieces: list[Tensor] = [column] * len(order)
    for piece, number in zip(column.split(lengths), order, strict=True):
        pieces[number] = piece
    return torch.cat(pieces)


def joined(parts: Sequence[HiddenStateDataset]) -> HiddenStateDataset:
    """All states of several datasets."""
    if len(parts) == 1:
        return parts[0]
    return HiddenStateDataset(*(torch.cat([getattr(x, k) for x in parts]) for k in ("hidden", "labels", "logsumexp")))


def first(states: HiddenStateDataset, tokens: int) -> HiddenStateDataset:
    """The first states, no more than there are."""
    return HiddenStateDataset(states.hidden[:tokens], states.labels[:tokens], states.logsumexp[:tokens])


@dataclass(frozen=True)
class Texts:
    """Token sequences to train on, and post-edits that no head is trained on."""

    training: dict[str, list[list[int]]]
    held_out: list[list[int]]
    held_out_texts: list[str]


def texts(lm: LanguageModel, names: Sequence[str], held_out: int, limit: int | None) -> Texts:
    """Training text as tokens.

    Args:
        lm: whose tokens.
        names: of TEXTS.
        held_out: how many post-edits are kept for calibration and ambiguity.
        limit: texts of each kind, and of those held out.
    """
    postedits = training_texts("postedits")
    kept, postedits = postedits[:held_out][:limit], postedits[held_out:][:limit]
    by_name = {name: postedits if name == "postedits" else training_texts(name)[:limit] for name in names}
    training = {name: [ids for ids in map(lm.encode, found) if ids] for name, found in by_name.items()}
    return Texts(training, [lm.encode(text) for text in kept], kept)


def enough(sequences: list[list[int]], tokens: int) -> list[list[int]]:
    """The first sequences, whole parts of them, that have as many tokens, or all."""
    total, stop = 0, 0
    while stop < len(sequences) and total < tokens:
        total += sum(map(len, sequences[stop : stop + PART]))
        stop += PART
    return sequences[:stop]


# --- files


def hashed(content: Any) -> str:
    """16 hex digits of something that JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
