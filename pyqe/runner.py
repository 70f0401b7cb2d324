"""Forward passes of a language model that end in hidden states instead of logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyqe.encoding import Window
from pyqe.lm_head import LMHead, capture_hidden, check_logits, evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyqe.prefix import SharedPrefix

_ROW_PADDING = 64  # rows of a call are padded to a multiple, so that small products take the same path in the BLAS


class ModelRunner:
    """A model with its tokenizer, and what a forward pass needs of both.

    Attributes:
        model, tokenizer: as they came.
        lm_head: the model's head as it was when it ran last.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._read_lm_head()
        self._logits_checked = False

    @property
    def context(self) -> int:
        """The longest input in tokens that both the model and the tokenizer take."""
        return int(min(self._positions, self.tokenizer.model_max_length))

    @property
    def _positions(self) -> int:
        """The longest input, padding included, that the model takes."""
        config = self.model.config.get_text_config(decoder=True)
        return int(getattr(config, "max_position_embeddings", None) or 2**31)

    def _read_lm_head(self) -> None:
        """Take the model's head as it is now: it may have been moved, cast or resized since the last call."""
        self.lm_head = LMHead.from_model(self.model)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """What a forward pass needs: evaluation mode, no gradients, the LM head as it is now, its logits checked."""
        with evaluation(self.model):
            self._read_lm_head()
            if not self._logits_checked:
                check_logits(self.model, self.lm_head)
                self._logits_checked = True
            yield

    def _hidden_of(self, batch: Sequence[Window], prefix: SharedPrefix | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states [M, D] at the batch's positions, and its targets [M] (or none).

        Args:
            batch: windows of one padded length.
            prefix: what stands before every window (of a decoder-only model); positions are counted after it.
        """
        before = 0 if prefix is None else len(prefix.token_ids)
        length, encoder_length = (min(length, self._positions - before) for length in batch[0].bucket)
        ids, mask = self._padded([window.input_ids for window in batch], length)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if prefix is not None:
            inputs |= prefix.inputs(mask)
        if self.model.config.is_encoder_decoder:
            encoder_ids, encoder_mask = self._padded([window.encoder_ids or [] for window in batch], encoder_length)
            inputs |= {"input_ids": encoder_ids, "attention_mask": encoder_mask}
            inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        with capture_hidden(self.model, skip_logits=True) as captured:
            self.model(**inputs)
        hidden = captured[0]
        rows = torch.cat([hidden[i, window.positions.start : window.positions.stop] for i, window in enumerate(batch)])
        targets = [token for window in batch for token in window.targets]
        return rows, torch.tensor(targets, dtype=torch.int64, device=hidden.device)

    def _padded(self, rows: Sequence[list[int]], length: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Ids [B, L] padded on the right (or left), and their mask."""
        padding = [[0] * (length - len(row)) for row in rows]
        pad = self._pad_id()
        ids, mask = [], []
        for row, zeros in zip(rows, padding, strict=True):
            pads, ones = [pad] * len(zeros), [1] * len(row)
            ids.append(pads + row if left else row + pads)
            mask.append(zeros + ones if left else ones + zeros)
        device = self.lm_head.weight.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _pad_id(self) -> int:
        """The tokenizer's padding, or another token where it has none or the model has no embedding for it."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in ids if token is not None and token < self.lm_head.vocab_size)


def pad_rows(hidden: Tensor) -> Tensor:
    """Hidden states [M, D] with rows of zeros to a round number, so that a row's statistics depend on it alone."""
    return torch.nn.functional.pad(hidden, (0, 0, 0, -len(hidden) % _ROW_PADDING))
