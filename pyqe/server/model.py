"""The model as the server runs it: batches of rows, each with options of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from pyqe import encoding
from pyqe import functional as F
from pyqe.attachment import Attachment, StepScorer
from pyqe.encoding import Prompt
from pyqe.estimator import QualityEstimator
from pyqe.generation import check_decoding, generate_options, option, stop_ids
from pyqe.scored import Signal
from pyqe.server.rows import LEAST_LOGPROB, Sampling, ScoreNews, ScoreRow, Token, WriteRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyqe.heads import SigmoidHead


class ServedModel(QualityEstimator):
    """A model with its head; one thread runs it, and one at a time may tokenize meanwhile.

    Raises:
        NotImplementedError: the model's own generation config asks for decoding that cannot be scored.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: SigmoidHead | None = None
    ) -> None:
        super().__init__(model, tokenizer, head)
        check_decoding(model, {})
        self._start = super()._decoder_start() if model.config.is_encoder_decoder else []
        signals: tuple[Signal, ...] = ("prob",) if head is None else ("quality", "prob")
        self._attachment = Attachment(model, head, signals)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, never none."""
        return encoding.prompt_ids(self.tokenizer, prompt)[1] or self._empty_prompt()

    def write_row(self, index: int, prompt_ids: list[int], sampling: Sampling) -> WriteRow:
        """A row for an answer."""
        reads = len(prompt_ids)
        return WriteRow(index=index, reads=reads, prompt_ids=prompt_ids, sampling=sampling, tokenizer=self.tokenizer)

    def score_row(self, index: int, text: str, prompt: Prompt | None, signals: tuple[Signal, ...] | None) -> ScoreRow:
        """A row for a text."""
        encoded = self._encode(text, prompt, add_bos=True)
        return ScoreRow(index=index, reads=max(self._length(encoded), 0), encoded=encoded, signals=signals)

    def _decoder_start(self) -> list[int]:
        """Known beforehand: tokenizers of encoder-decoders change their mode for it, while others may tokenize."""
        return self._start

    def try_out(self) -> None:
        """Write two tokens and score a text, so that a model that cannot is known before anybody asks."""
        row = self.write_row(0, self.prompt_ids(""), Sampling(max_tokens=2))
        row.report = lambda news: None
        self.write([row])
        self.score(["a"], ["a"])

    def run_scores(self, rows: Sequence[ScoreRow]) -> None:
        """Score texts that want the same signals."""
        encoded, signals = [row.encoded for row in rows], self._signals(rows[0].signals)
        for row, scored in zip(rows, self._score(encoded, signals, len(rows)), strict=True):
            row.done = True
            row.report(ScoreNews(row.index, scored))

    def write(self, rows: Sequence[WriteRow]) -> None:
        """Write answers; each reports its tokens, and its end as soon as it is there."""
        left = not self.model.config.is_encoder_decoder
        prompts = [row.prompt_ids for row in rows]
        options: dict[str, Any] = {
            "max_new_tokens": max(row.sampling.max_tokens for row in rows),
            "do_sample": False,  # the processor draws
            "num_beams": 1,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
            "tokenizer": self.tokenizer,  # for stop strings of the model's own
            "logits_processor": LogitsProcessorList([_Drawing(rows)]),
        }
        with self._inference():
            ids, mask = self._padded(prompts, max(map(len, prompts)), left=left)
            steps = _Steps(self._attachment, options, rows)
            options = generate_options(options, steps, pad_token_id=self._pad_id())
            with steps.watching():
                self.model.generate(input_ids=ids, attention_mask=mask, **options)
        for row in rows:
            row.finish("length")  # of an end that the model's generation config has


class _Drawing(LogitsProcessor):  # type: ignore[misc]
    """Leaves nothing but the drawn token to rows that sample, so that the most probable token is that."""

    def __init__(self, rows: Sequence[WriteRow]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sampled = [i for i, row in enumerate(self.rows) if row.samples and not row.done]
        if not sampled:
            return scores
        tokens = torch.cat([self.rows[i].draw(input_ids[i : i + 1], scores[i : i + 1]) for i in sampled])
        scores = scores.clone()
        scores[sampled] = -torch.inf
        scores[sampled, tokens] = 0.0
        return scores


class _Steps(StepScorer):
    """Hands the tokens of every step to their rows, and ends rows that are done."""

    def __init__(self, attachment: Attachment, options: dict[str, Any], rows: Sequence[WriteRow]) -> None:
        super().__init__(attachment, options)
        self.rows = rows
        self.stop = set(stop_ids(attachment.model, options))
        is_seq2seq = attachment.model.config.is_encoder_decoder
        self.forced = option(attachment.model, options, "forced_bos_token_id") if is_seq2seq else None
        self.top = max(row.sampling.top_logprobs for row in rows)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        alternatives = self._alternatives() if self.top else [[]] * len(self.rows)
        ended: Tensor = super().__call__(input_ids, scores, **kwargs)
        token_ids, found = self.tokens.pop()[:, 0].tolist(), self.scores.pop()[:, 0].tolist()
        for row, token_id, values, top, is_end in zip(
            self.rows, token_ids, found, alternatives, ended.tolist(), strict=True
        ):
            if row.cancelled:
                row.done = True
            elif not row.done:
                quality = values[0] if "quality" in self.attachment.signals else torch.nan
                token = Token(token_id, values[-1], quality, top[: row.sampling.top_logprobs])
                is_prefix = token_id == self.forced and row.written == 0
                is_eos = token_id in self.stop
                row.add(token, is_text=not (is_eos or is_prefix), is_end=is_end or is_eos)
        return ended | torch.tensor([row.done for row in self.rows], device=ended.device)

    @torch.no_grad()
    def _alternatives(self) -> list[list[tuple[int, float]]]:
        """The most probable tokens of each row, with their log-probabilities."""
        if self._logits is None:
            return []
        stats = F.softmax_stats(self._logits, top_k=min(self.top, self._logits.shape[-1]))
        assert stats.topk_ids is not None
        assert stats.topk_logprobs is not None
        return [
            [(token, max(value, LEAST_LOGPROB)) for token, value in zip(*pair, strict=True) if token >= 0]
            for pair in zip(stats.topk_ids.tolist(), stats.topk_logprobs.tolist(), strict=True)
        ]
