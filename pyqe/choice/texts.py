"""An answer by the whole text of an option: one forward pass an option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyqe.choice.prompts import PromptFormat, Question
from pyqe.choice.scored import Floats, ScoredChoice
from pyqe.encoding import Window, joint_ids
from pyqe.lm_head import LMHead
from pyqe.runner import pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextMethod:
    """Log-likelihood of each option's text after a prompt that does not list the options."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: PromptFormat) -> None:
        self._tokenizer = tokenizer
        self._form = form

    def problem(self, question: Question) -> str | None:
        """None: any option will do."""
        return None

    def windows(self, question: Question, shots: Sequence[Question], orders: Sequence[Sequence[int]]) -> list[Window]:
        """One forward pass for each option, prompt and option tokenized together."""
        prompt = self._form.prompt(question, shots)
        rows = [joint_ids(self._tokenizer, prompt, self._form.before_answer + choice) for choice in question.choices]
        start = min(length for _, length in rows)  # the same place for all options
        return [Window(0, ids[:-1], None, 0, range(start - 1, len(ids) - 1), ids[start:]) for ids, _ in rows]

    def read(self, lm_head: LMHead, hidden: Tensor, targets: Tensor, batch: Sequence[Window]) -> list[Floats]:
        """Log-probabilities of each option's tokens, from the hidden states that predict them."""
        padded = pad_rows(hidden)
        token_ids = torch.nn.functional.pad(targets, (0, len(padded) - len(targets)), value=-1)
        logprob = lm_head.softmax_stats(padded, token_ids=token_ids).token_logprob
        assert logprob is not None
        ends = np.cumsum([len(window.targets) for window in batch])
        return np.split(logprob.double().cpu().numpy()[: ends[-1]], ends[:-1])

    def conclude(self, result: ScoredChoice, readings: Sequence[Floats], orders: Sequence[Sequence[int]]) -> None:
        """Put what the options of a question give into its result."""
        logprobs = np.array([reading.sum() for reading in readings])
        if np.isnan(logprobs).any():
            result.fail("logits that are not finite")
            return
        result.set_logprobs(logprobs[None])
        if result.status == "failed":
            return
        result.mean_logprobs = np.array([reading.mean() for reading in readings])
