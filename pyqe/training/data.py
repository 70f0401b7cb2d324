"""Training data: texts as blocks of tokens, and their hidden states computed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from pyqe._files import atomic_path
from pyqe.encoding import Prompt, encode
from pyqe.lm_head import LMHead, capture_hidden, check_logits, evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORE_INDEX = -100


class TextDataset(Dataset[dict[str, Tensor]]):
    """Texts as blocks of at most ``block_size`` tokens with labels for :class:`SigmoidHeadTrainer`.

    Each text starts with the tokenizer's BOS token (if it has one) or with its prompt, which gets no labels. A longer
    text goes on in a next block. Short texts are packed into one block, one after the other, when they have no prompt.

    Args:
        tokenizer: the LM's.
        texts: what to learn from.
        prompts: what came before each text, or None.
        block_size: tokens in a block; at least 2.

    Raises:
        ValueError: lengths differ, or ``block_size`` is too small.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Iterable[str],
        prompts: Iterable[Prompt | None] | None = None,
        *,
        block_size: int = 256,
    ) -> None:
        if block_size < 2:
            raise ValueError(f"block_size: expected 2 or more, got {block_size}")
        self.blocks: list[tuple[list[int], list[int]]] = []  # tokens, and labels of the same length
        bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        if prompts is None:
            pieces = [(bos, encode(tokenizer, text, None, is_target=False).text_ids) for text in texts]
            self._add([pair for before, ids in pieces for pair in _labelled(before, ids)], block_size)
            return
        for text, prompt in zip(texts, prompts, strict=True):
            item = encode(tokenizer, text, prompt, is_target=False)
            self._add(_labelled(item.prompt_ids or bos, item.text_ids), block_size)

    def _add(self, pairs: list[tuple[int, int]], block_size: int) -> None:
        for start in range(0, len(pairs), block_size):
            ids, labels = map(list, zip(*pairs[start : start + block_size], strict=True))
            if any(label != IGNORE_INDEX for label in labels[1:]):
                self.blocks.append((ids, labels))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, labels = self.blocks[index]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    @property
    def targets(self) -> Tensor:
        """int64: every label, for unigram counts."""
        return torch.tensor(
            [x for _, labels in self.blocks for x in labels[1:] if x != IGNORE_INDEX], dtype=torch.int64
        )


def _labelled(before: Sequence[int], ids: Sequence[int]) -> list[tuple[int, int]]:
    """Tokens with their labels; what comes before the text has none."""
    return [*((token, IGNORE_INDEX) for token in before), *((token, token) for token in ids)]


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad items of different lengths on the right into a batch; labels with -100, everything else with 0."""
    batch = {
        name: pad_sequence(
            [item[name] for item in items],
            batch_first=True,
            padding_value=IGNORE_INDEX if name == "labels" else 0,
        )
        for name in items[0]
    }
    if "input_ids" in batch and "attention_mask" not in batch:
        batch["attention_mask"] = pad_sequence([torch.ones_like(item["input_ids"]) for item in items], batch_first=True)
    return batch


class HiddenStateDataset(Dataset[dict[str, Tensor]]):
    """Hidden states of a frozen LM with the tokens they predict, so that epochs cost no forward pass of the LM.

    Args:
        hidden: [N, D], in the LM's dtype.
        labels: int64 [N].
        logsumexp: float32 [N], the LM's normaliser.
        rows: positions in an item.
    """

    def __init__(self, hidden: Tensor, labels: Tensor, logsumexp: Tensor, *, rows: int = 256) -> None:
        self.hidden, self.labels, self.logsumexp, self.rows = hidden, labels, logsumexp, rows

    @classmethod
    def compute(
        cls,
        lm: PreTrainedModel,
        dataset: TextDataset,
        *,
        batch_size: int = 8,
        rows: int = 256,
        on_progress: Callable[[int], object] | None = None,
    ) -> HiddenStateDataset:
        """Run a causal LM over the dataset once.

        Args:
            lm: the model.
            dataset: its blocks.
            batch_size: blocks in a forward pass.
            rows: positions in an item of the result.
            on_progress: called with the number of positions after each batch.

        Raises:
            ValueError: an encoder-decoder, an empty dataset, a model that changes its logits in an unknown way.
        """
        if lm.config.is_encoder_decoder or len(dataset) == 0:
            raise ValueError("expected a causal LM and a dataset that is not empty; encoder-decoders train from tokens")
        lm_head = LMHead.from_model(lm)
        parts = []
        with evaluation(lm):
            check_logits(lm, lm_head)
            for start in range(0, len(dataset), batch_size):
                batch = collate([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
                batch = {name: tensor.to(lm_head.weight.device) for name, tensor in batch.items()}
                with capture_hidden(lm, skip_logits=True) as captured:
                    lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                labels = batch["labels"][:, 1:]
                hidden = captured[0][:, :-1][labels != IGNORE_INDEX]
                labels = labels[labels != IGNORE_INDEX]
                parts.append((hidden.cpu(), labels.cpu(), lm_head.softmax_stats(hidden).logsumexp.float().cpu()))
                if on_progress is not None:
                    on_progress(len(labels))
        hidden, labels, logsumexp = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(hidden, labels, logsumexp, rows=rows)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        part = slice(index * self.rows, (index + 1) * self.rows)
        return {"hidden": self.hidden[part], "labels": self.labels[part], "logsumexp": self.logsumexp[part]}

    @property
    def targets(self) -> Tensor:
        """int64: every label, for unigram counts."""
        return self.labels

    def split(self, fraction: float) -> tuple[HiddenStateDataset, HiddenStateDataset]:
        """The first positions for training and the last ``fraction`` of the items for evaluation."""
        at = max(len(self) - max(round(fraction * len(self)), 1), 1) * self.rows
        tensors = (self.hidden, self.labels, self.logsumexp)
        first = HiddenStateDataset(*(tensor[:at] for tensor in tensors), rows=self.rows)
        return first, HiddenStateDataset(*(tensor[at:] for tensor in tensors), rows=self.rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        tensors: dict[str, Any] = {"hidden": self.hidden, "labels": self.labels, "logsumexp": self.logsumexp}
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, rows: int = 256) -> HiddenStateDataset:
        """Read what :meth:`save` wrote."""
        return cls(**load_file(Path(path)), rows=rows)
