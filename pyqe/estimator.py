"""Token-level quality of given text, and of text while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyqe import encoding
from pyqe.dominant import DominantRule
from pyqe.encoding import Encoded, Prompt, Window
from pyqe.generation import (
    FinishReason,
    StopRecorder,
    check_options,
    check_steps,
    generate_options,
    generated_hidden,
    sequence_ends,
    stop_ids,
    text_spans,
    trim,
)
from pyqe.heads import SigmoidHead
from pyqe.lm_head import LMHead, capture_hidden
from pyqe.runner import ModelRunner, pad_rows
from pyqe.scored import SIGNALS, ScoredText, Signal
from pyqe.signals import base_wanted, check_signals, softmax_options, token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["QualityEstimator", "ScoredText", "TextTooLongError"]


class TextTooLongError(ValueError):
    """A text does not fit the model's context, and windows were not wanted.

    Attributes:
        index: its place among the texts.
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"text {index}: {problem}")
        self.index = index
        self.problem = problem


class QualityEstimator(ModelRunner):
    """A language model with a Sigmoid Head: scores for every token of given or generated text.

    The hidden states are taken where they enter the model's output embedding; nothing stays on the model. When text is
    scored the model computes no logits at all: softmax signals come from the fused statistics, the quality of a token
    from one dot product.

    Args:
        model: any Hugging Face causal LM or encoder-decoder, on any one device, in any float dtype.
        tokenizer: its tokenizer.
        head: a Sigmoid Head of that model, or None for the softmax signals alone.
        rule: the dominant tokens of BoostedProb; default ``DominantRule.jump("last")``.

    Raises:
        HeadMismatchError: the head belongs to another vocabulary, hidden size or tokenizer.
        ValueError: the model has no output embedding.

    Example:
        See the README; ``qe.score(["text"])[0].token_quality``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        head: SigmoidHead | None = None,
        *,
        rule: DominantRule | None = None,
    ) -> None:
        self.rule = rule or DominantRule.jump("last")
        self.head = head
        if head is not None:
            head.check_compatible(LMHead.from_model(model), tokenizer)
        super().__init__(model, tokenizer)

    # --- given text

    def score(
        self,
        texts: Sequence[str],
        prompts: Sequence[Prompt | None] | None = None,
        *,
        signals: Collection[Signal] | None = None,
        batch_size: int = 16,
        add_bos: bool = True,
        max_length: int | None = None,
        overlap: int | None = None,
        strict: bool = False,
        on_progress: Callable[[int], object] | None = None,
    ) -> list[ScoredText]:
        """Score the tokens of given texts.

        A text is tokenized apart from its prompt, without special tokens. Texts are batched by length; what else is in
        a batch does not change a text's scores beyond rounding (and not by a bit in float32).

        Args:
            texts: what to score.
            prompts: what came before each text (text or chat messages), or the source of an encoder-decoder.
            signals: some of "quality", "prob", "max_prob", "entropy", "boosted_prob"; default all that there are.
                The quality of a full head alone takes one dot product a token; the others scan the vocabulary.
            batch_size: texts in a forward pass, >= 1.
            add_bos: put the tokenizer's BOS token, if it has one, before a text without a prompt. Otherwise its first
                token has no context and no score.
            max_length: tokens in a window, prompt included; default (and at most) the model's context.
            overlap: tokens that two windows of a longer text share, less than a window; default half of one. A prompt
                that fills the window is cut to its last ``overlap + 1`` tokens.
            strict: raise for texts that do not fit a window with their prompt, instead of taking several.
            on_progress: called with the number of tokens scored after each batch.

        Returns:
            one :class:`ScoredText` for each text, in order.

        Raises:
            TypeError: texts is a string, or holds something else than strings; a prompt is no prompt.
            ValueError: lengths differ, unknown signals, a number out of range, an encoder-decoder without prompts; the
                model changes its logits in a way that is not known.
            TextTooLongError: with ``strict``.
        """
        chosen = self._signals(signals)
        prompts = self._check_texts(texts, prompts)
        _check_positive(batch_size=batch_size, max_length=max_length)
        encoded = [self._encode(text, prompt, add_bos) for text, prompt in zip(texts, prompts, strict=True)]
        return self._score(encoded, chosen, batch_size, max_length, overlap, strict, on_progress)

    def score_ids(
        self,
        token_ids: Sequence[list[int]],
        prompt_ids: Sequence[list[int]],
        *,
        signals: Collection[Signal] | None = None,
        batch_size: int = 16,
    ) -> list[ScoredText]:
        """Score tokens that are there already, such as another program's output; otherwise as :meth:`score`.

        Args:
            token_ids: ids of each text.
            prompt_ids: ids of what came before each (BOS included), or of the source of an encoder-decoder.
            signals, batch_size: as in :meth:`score`.

        Raises:
            ValueError: lengths differ, unknown signals, a number out of range.
        """
        if len(token_ids) != len(prompt_ids):
            raise ValueError(f"prompt_ids: expected one for each of {len(token_ids)} texts, got {len(prompt_ids)}")
        chosen = self._signals(signals)
        _check_positive(batch_size=batch_size)
        encoded = []
        for ids, before in zip(token_ids, prompt_ids, strict=True):
            parts = encoding.pieces(self.tokenizer, ids)
            text = "".join(part for part in parts if part is not None)
            encoded.append(Encoded(text, None, before, ids, encoding.locate(text, parts)))
        return self._score(encoded, chosen, batch_size)

    def _score(
        self,
        encoded: Sequence[Encoded],
        chosen: tuple[Signal, ...],
        batch_size: int,
        max_length: int | None = None,
        overlap: int | None = None,
        strict: bool = False,
        on_progress: Callable[[int], object] | None = None,
    ) -> list[ScoredText]:
        context = min(max_length or self.context, self.context)
        overlap = context // 2 if overlap is None else overlap
        if not 0 <= overlap < context:
            raise ValueError(f"overlap: expected a number in [0, {context}), got {overlap}")
        results = [self._result(item, chosen) for item in encoded]
        windows = [self._windows(index, item, context, overlap, strict) for index, item in enumerate(encoded)]
        with self._inference():
            for batch in encoding.batches([window for found in windows for window in found], batch_size):
                hidden, targets = self._hidden_of(batch)
                places = ((results[window.index], window.first, len(window.targets)) for window in batch)
                self._fill(places, self._signals_of(hidden, targets, chosen))
                if on_progress is not None:
                    on_progress(sum(len(window.targets) for window in batch))
        for item, result, found in zip(encoded, results, windows, strict=True):
            if self._length(item) > context:
                how = "no score" if not found else f"scored in {len(found)} windows"
                _add_reason(result, f"longer than {context} tokens: {how if len(found) != 1 else 'the prompt is cut'}")
            if item.text_ids and not item.prompt_ids:
                _add_reason(result, "the first token has no context (no BOS token, no prompt)")
            _conclude(result, chosen, found[0].first if found else len(item.text_ids))
        return results

    def _signals(self, signals: Collection[Signal] | None) -> tuple[Signal, ...]:
        if signals is None:
            return SIGNALS if self.head is not None else SIGNALS[1:]
        return check_signals(signals, self.head)

    def _check_texts(self, texts: Sequence[str], prompts: Sequence[Prompt | None] | None) -> Sequence[Prompt | None]:
        if isinstance(texts, str):
            raise TypeError("texts: expected a list of strings, got one string")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{index}]: expected a string, got {type(text).__name__}")
        if prompts is None:
            prompts = [None] * len(texts)
        if isinstance(prompts, str) or len(prompts) != len(texts):
            raise ValueError(f"prompts: expected one for each of {len(texts)} texts, got {len(prompts)}")
        if self.model.config.is_encoder_decoder and any(prompt is None for prompt in prompts):
            raise ValueError("prompts: expected the source of every text, as the model is an encoder-decoder")
        return prompts

    def _result(self, item: Encoded, signals: Collection[Signal]) -> ScoredText:
        result = ScoredText(
            text=item.text,
            prompt=item.prompt,
            token_ids=item.text_ids,
            tokens=[item.text[start:end] for start, end in item.offsets],
            offsets=item.offsets,
        )
        for signal in signals:
            setattr(result, f"token_{signal}", np.full(len(item.text_ids), np.nan, dtype=np.float32))
        return result

    def _encode(self, text: str, prompt: Prompt | None, add_bos: bool) -> Encoded:
        """Tokens of a text and of what comes before it: the prompt, else BOS."""
        is_seq2seq = self.model.config.is_encoder_decoder
        item = encoding.encode(self.tokenizer, text, prompt, is_target=is_seq2seq)
        if is_seq2seq and not item.prompt_ids:
            item.prompt_ids = self._empty_prompt()
        elif add_bos and not item.prompt_ids and self.tokenizer.bos_token_id is not None:
            item.prompt_ids = [int(self.tokenizer.bos_token_id)]
        return item

    def _empty_prompt(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [int(bos) if bos is not None else self._pad_id()]

    def _length(self, item: Encoded) -> int:
        """Tokens that the model has to read; the last one of a text is only predicted."""
        if self.model.config.is_encoder_decoder:
            return max(len(item.prompt_ids), len(self._decoder_start()) + len(item.text_ids) - 1)
        return len(item.prompt_ids) + len(item.text_ids) - 1

    def _windows(self, index: int, item: Encoded, context: int, overlap: int, strict: bool) -> list[Window]:
        """The forward passes for a text; none where it is empty or too long for an encoder-decoder."""
        length = self._length(item)
        if strict and length > context:
            raise TextTooLongError(index, f"{length} tokens (prompt included) do not fit {context}")
        if not self.model.config.is_encoder_decoder:
            return list(encoding.causal_windows(index, item, context, overlap))
        if not item.text_ids or length > context:
            return []
        return [encoding.decoder_window(index, item, self._decoder_start())]

    def _decoder_start(self) -> list[int]:
        """What the decoder reads before the text."""
        for config in (self.model.generation_config, self.model.config):
            start = getattr(config, "decoder_start_token_id", None)
            if start is not None:
                return [int(start), *encoding.target_prefix(self.tokenizer)]
        raise ValueError("model: its config names no decoder_start_token_id")

    def _read_lm_head(self) -> None:
        super()._read_lm_head()
        if self.head is not None:
            self.head.check_compatible(self.lm_head)
            self.head.to(self.lm_head.weight.device)

    def _signals_of(self, hidden: Tensor, token_ids: Tensor, signals: Collection[Signal]) -> dict[Signal, np.ndarray]:
        """Scores [M] of each signal for the tokens [M] that the hidden states [M, D] predict."""
        count = len(hidden)
        hidden = pad_rows(hidden)
        token_ids = torch.nn.functional.pad(token_ids, (0, len(hidden) - count), value=-1)
        options = softmax_options(signals, self.head, self.rule)
        stats = None if options is None else self.lm_head.softmax_stats(hidden, token_ids=token_ids, **options)
        on_logit = base_wanted(signals, self.head) == "logit"
        token_logits = self.lm_head.token_logits(hidden, token_ids) if on_logit else None
        scores = token_scores(signals, self.head, hidden, token_ids, stats, token_logits)
        return {signal: scores[signal][:count].cpu().numpy() for signal in signals}

    def _fill(self, places: Iterable[tuple[ScoredText, int, int]], scores: dict[Signal, np.ndarray]) -> None:
        """Put scores [M] into their texts: a text, its first token scored and how many, one after the other."""
        start = 0
        for result, first, count in places:
            for signal, values in scores.items():
                getattr(result, f"token_{signal}")[first : first + count] = values[start : start + count]
            start += count

    # --- generated text

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        signals: Collection[Signal] | None = None,
        batch_size: int = 8,
        on_progress: Callable[[int], object] | None = None,
        **generate_kwargs: Any,
    ) -> list[ScoredText]:
        """Generate with the model and score what it writes.

        Signals come from the raw logits, before temperature and other logits processors. Scores are computed after the
        last token from the hidden states of the steps; greedy search, sampling and beam search, any
        ``num_return_sequences``.

        Args:
            prompts: texts, or chat messages ``[{"role": ..., "content": ...}, ...]`` for the chat template.
            signals: as in :meth:`score`.
            batch_size: prompts in a call of ``model.generate``.
            on_progress: called with the number of tokens generated after each batch.
            **generate_kwargs: options of ``model.generate`` (``max_new_tokens``, ``do_sample``, ``num_beams``, ...).

        Returns:
            one :class:`ScoredText` for each sequence, those of one prompt together, in order. The final EOS token is
            left out; ``finish_reason`` tells whether there was one.

        Raises:
            TypeError: prompts is a string; an input given in ``generate_kwargs``.
            NotImplementedError: a decoding method whose steps are not one forward pass a token (assisted generation).
        """
        chosen = self._signals(signals)
        _check_positive(batch_size=batch_size)
        if isinstance(prompts, str):
            raise TypeError("prompts: expected a list of prompts, got one string")
        check_options(self.model, generate_kwargs)
        results: list[ScoredText] = []
        with self._inference():
            for start in range(0, len(prompts), batch_size):
                batch = self._generate_batch(prompts[start : start + batch_size], chosen, generate_kwargs)
                results += batch
                if on_progress is not None:
                    on_progress(sum(len(result.token_ids) for result in batch))
        return results

    def _generate_batch(
        self, prompts: Sequence[Prompt], signals: tuple[Signal, ...], options: dict[str, Any]
    ) -> list[ScoredText]:
        is_seq2seq = self.model.config.is_encoder_decoder
        encoded = [encoding.prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        rows = [ids or self._empty_prompt() for _, ids in encoded]
        ids, mask = self._padded(rows, max(map(len, rows)), left=not is_seq2seq)
        recorder = StopRecorder(self.model, self.tokenizer, options)
        with capture_hidden(self.model, skip_logits=False, last_only=True) as captured:
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                **{"tokenizer": self.tokenizer}  # for stop strings
                | generate_options(options, recorder, pad_token_id=self._pad_id(), return_dict_in_generate=True),
            )
        start = 1 if is_seq2seq else ids.shape[1]
        check_steps(output, start, captured)
        ends = sequence_ends(output, start, recorder)
        kept, reasons = trim(output.sequences[:, start:].tolist(), ends, stop_ids(self.model, options))
        spans = text_spans(self.model, options, kept)
        kept = [row[span.start :] for row, span in zip(kept, spans, strict=True)]
        hidden = generated_hidden(output, captured, spans)
        results = [
            self._generated(row, encoded[i * len(encoded) // len(kept)][0], signals, reasons[i])
            for i, row in enumerate(kept)
        ]
        token_ids = torch.tensor([token for row in kept for token in row], dtype=torch.int64, device=hidden.device)
        places = ((result, 0, len(result.token_ids)) for result in results)
        self._fill(places, self._signals_of(hidden, token_ids, signals))
        for result in results:
            _conclude(result, signals, 0)
        return results

    def _generated(
        self, token_ids: list[int], prompt: str | None, signals: Collection[Signal], finish_reason: FinishReason
    ) -> ScoredText:
        parts = encoding.pieces(self.tokenizer, token_ids)
        text = "".join(part for part in parts if part is not None)
        result = self._result(Encoded(text, prompt, [], token_ids, encoding.locate(text, parts)), signals)
        result.finish_reason = finish_reason
        return result


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected 1 or more, got {number}")


def _add_reason(result: ScoredText, reason: str) -> None:
    result.reason = reason if result.reason is None else f"{result.reason}; {reason}"


def _conclude(result: ScoredText, signals: Collection[Signal], first: int) -> None:
    """Set the status from the scores that are there; those of the tokens from ``first`` on should be."""
    if not result.token_ids:
        result.status = "empty"
        _add_reason(result, "no tokens")
        return
    missing = np.any([np.isnan(getattr(result, f"token_{signal}")) for signal in signals], axis=0)
    if missing.any():
        result.status = "failed" if missing.all() else "partial"
    if missing[first:].any():
        _add_reason(result, f"logits that are not finite at {missing[first:].sum()} of {len(missing)} tokens")
