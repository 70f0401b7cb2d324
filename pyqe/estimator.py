"""Token-level quality of given text, and of text while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyqe import encoding
from pyqe.dominant import DominantRule
from pyqe.encoding import Encoded, Prompt, Window
from pyqe.functional import SoftmaxStats
from pyqe.generation import generated_hidden, generation_output, trim
from pyqe.heads import SigmoidHead
from pyqe.lm_head import LMHead, capture_hidden, check_logits
from pyqe.scored import SIGNALS, ScoredText, Signal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["QualityEstimator", "ScoredText", "TextTooLongError"]

_ROW_PADDING = 64  # rows of a call are padded to a multiple, so that small products take the same path in the BLAS


class TextTooLongError(ValueError):
    """A text does not fit the model's context, and windows were not wanted or are not possible."""


class QualityEstimator:
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
        self.model = model
        self.tokenizer = tokenizer
        self.lm_head = LMHead.from_model(model)
        self.rule = rule or DominantRule.jump("last")
        self.head = head
        if head is not None:
            head.check_compatible(self.lm_head, tokenizer)
            head.to(self.lm_head.weight.device)
        self._logits_checked = False

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
            batch_size: texts in a forward pass.
            add_bos: put the tokenizer's BOS token, if it has one, before a text without a prompt. Otherwise its first
                token has no context and no score.
            max_length: tokens in a window; default the model's context.
            overlap: tokens that two windows of a longer text share; default half a window.
            strict: raise for texts longer than a window instead of taking several.
            on_progress: called with the number of tokens scored after each batch.

        Returns:
            one :class:`ScoredText` for each text, in order.

        Raises:
            TypeError: texts is a string, or holds something else than strings.
            ValueError: lengths differ, unknown signals, an encoder-decoder without prompts.
            TextTooLongError: with ``strict``.
        """
        chosen = self._signals(signals)
        prompts = self._check_texts(texts, prompts)
        is_seq2seq = self.model.config.is_encoder_decoder
        encoded = [
            encoding.encode(self.tokenizer, text, prompt, is_target=is_seq2seq)
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        results = [self._result(item, chosen) for item in encoded]
        context = min(max_length or self.context, self.context)
        windows: list[Window] = []
        for index, item in enumerate(encoded):
            found = self._windows(index, item, results[index], context, overlap, add_bos)
            if strict and (len(found) > 1 or results[index].status == "failed"):
                raise TextTooLongError(f"text {index}: {len(item.text_ids)} tokens do not fit {context}")
            windows += found
        self._check_logits()
        with self._inference():
            for batch in encoding.batches(windows, batch_size):
                hidden, targets = self._hidden_of(batch)
                self._fill(results, batch, self._signals_of(hidden, targets, chosen))
                if on_progress is not None:
                    on_progress(sum(len(window.targets) for window in batch))
        for result in results:
            _conclude(result, chosen)
        return results

    @property
    def context(self) -> int:
        """The longest input in tokens that both the model and the tokenizer take."""
        config = self.model.config.get_text_config(decoder=True)
        lengths = [getattr(config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        return int(min(length for length in (*lengths, 2**31) if length))

    def _signals(self, signals: Collection[Signal] | None) -> tuple[Signal, ...]:
        if signals is None:
            return SIGNALS if self.head is not None else SIGNALS[1:]
        if isinstance(signals, str) or not signals or not set(signals) <= set(SIGNALS):
            raise ValueError(f"signals: expected some of {', '.join(SIGNALS)}, got {signals!r}")
        if "quality" in signals and self.head is None:
            raise ValueError("signals: 'quality' needs a Sigmoid Head, and this estimator has none")
        return tuple(signal for signal in SIGNALS if signal in signals)

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

    def _windows(
        self, index: int, item: Encoded, result: ScoredText, context: int, overlap: int | None, add_bos: bool
    ) -> list[Window]:
        if not item.text_ids:
            return []
        if self.model.config.is_encoder_decoder:
            if max(len(item.text_ids), len(item.prompt_ids)) > context:
                result.status, result.reason = "failed", f"longer than the model's context of {context} tokens"
                return []
            return [encoding.decoder_window(index, item, self._decoder_start())]
        bos = self.tokenizer.bos_token_id if add_bos else None
        overlap = context // 2 if overlap is None else overlap
        if not 0 <= overlap < context:
            raise ValueError(f"overlap: expected a number in [0, {context}), got {overlap}")
        windows = list(encoding.causal_windows(index, item, context, bos, overlap))
        if len(windows) > 1:
            result.reason = f"longer than {context} tokens: scored in {len(windows)} windows"
        return windows

    def _decoder_start(self) -> int:
        for config in (self.model.generation_config, self.model.config):
            start = getattr(config, "decoder_start_token_id", None)
            if start is not None:
                return int(start)
        raise ValueError("model: its config names no decoder_start_token_id")

    def _check_logits(self) -> None:
        if not self._logits_checked:
            with self._inference():
                check_logits(self.model, self.lm_head)
            self._logits_checked = True

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode without gradients; the model's mode is put back."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.train(was_training)

    def _hidden_of(self, batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Hidden states [M, D] that predict the batch's scored tokens, and those tokens [M]."""
        length, encoder_length = batch[0].bucket
        ids, mask = self._padded([window.input_ids for window in batch], length)
        if batch[0].encoder_ids is None:
            inputs = {"input_ids": ids, "attention_mask": mask}
        else:
            encoder_ids, encoder_mask = self._padded([window.encoder_ids or [] for window in batch], encoder_length)
            inputs = {
                "input_ids": encoder_ids,
                "attention_mask": encoder_mask,
                "decoder_input_ids": ids,
                "decoder_attention_mask": mask,
            }
        with capture_hidden(self.model, skip_logits=True) as captured:
            self.model(**inputs, use_cache=False)
        hidden = captured[0]
        rows = torch.cat([hidden[i, window.positions.start : window.positions.stop] for i, window in enumerate(batch)])
        targets = torch.tensor([token for window in batch for token in window.targets], device=hidden.device)
        return rows, targets

    def _padded(self, rows: Sequence[list[int]], length: int) -> tuple[Tensor, Tensor]:
        """Ids [B, L] padded on the right, and their mask."""
        ids = torch.full((len(rows), length), self._pad_id(), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row, dtype=torch.int64), 1
        device = self.lm_head.weight.device
        return ids.to(device), mask.to(device)

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)

    def _signals_of(self, hidden: Tensor, token_ids: Tensor, signals: Collection[Signal]) -> dict[Signal, np.ndarray]:
        """Scores [M] of each signal for the tokens [M] that the hidden states [M, D] predict."""
        count = len(hidden)
        missing = -count % _ROW_PADDING
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, missing))
        token_ids = torch.nn.functional.pad(token_ids, (0, missing), value=-1)
        stats = self._softmax_stats(hidden, token_ids, signals)
        scores: dict[str, Tensor] = {}
        if "quality" in signals:
            scores["quality"] = self._quality(hidden, token_ids, stats)
        if stats is not None:
            scores |= _softmax_signals(stats, token_ids, signals)
        return {signal: scores[signal][:count].float().cpu().numpy() for signal in signals}

    def _softmax_stats(self, hidden: Tensor, token_ids: Tensor, signals: Collection[Signal]) -> SoftmaxStats | None:
        """The softmax statistics that the signals need, or None: the quality of most heads needs none."""
        on_logprob = "quality" in signals and self.head is not None and self.head.config.base == "logprob"
        if not on_logprob and set(signals) == {"quality"}:
            return None
        return self.lm_head.softmax_stats(
            hidden,
            token_ids=token_ids,
            entropy="entropy" in signals,
            dominant=self.rule if "boosted_prob" in signals else None,
        )

    def _quality(self, hidden: Tensor, token_ids: Tensor, stats: SoftmaxStats | None) -> Tensor:
        """Sigmoid probabilities [M]; NaN where a logit is not finite, which must not look confident."""
        assert self.head is not None
        on_logprob = self.head.config.base == "logprob" and stats is not None
        base = stats.token_logprob if on_logprob and stats else self.head.base_of(hidden, token_ids, self.lm_head)
        logits = self.head(hidden, token_ids, base)
        valid = logits.isfinite() if stats is None else logits.isfinite() & stats.max_logprob.isfinite()
        return torch.sigmoid(logits).masked_fill(~valid, torch.nan)

    def _fill(self, results: Sequence[ScoredText], batch: Sequence[Window], scores: dict[Signal, np.ndarray]) -> None:
        start = 0
        for window in batch:
            count = len(window.targets)
            for signal, values in scores.items():
                row = getattr(results[window.index], f"token_{signal}")
                row[window.first : window.first + count] = values[start : start + count]
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
        if isinstance(prompts, str):
            raise TypeError("prompts: expected a list of prompts, got one string")
        given = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids"} & set(generate_kwargs)
        if given:
            raise TypeError(f"generate: {', '.join(sorted(given))} come from prompts and cannot be given")
        self._check_logits()
        results: list[ScoredText] = []
        with self._inference():
            for start in range(0, len(prompts), batch_size):
                batch = self._generate_batch(prompts[start : start + batch_size], chosen, generate_kwargs)
                results += batch
                if on_progress is not None:
                    on_progress(sum(len(result.token_ids) for result in batch))
        return results

    def _generate_batch(
        self, prompts: Sequence[Prompt], signals: tuple[Signal, ...], generate_kwargs: dict[str, Any]
    ) -> list[ScoredText]:
        encoded = [encoding.prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        rows = [ids or self._empty_prompt() for _, ids in encoded]
        length = max(map(len, rows))
        ids, mask = self._padded([row[::-1] for row in rows], length)
        options = {"pad_token_id": self._pad_id(), **generate_kwargs, "return_dict_in_generate": True}
        with capture_hidden(self.model, skip_logits=False, last_only=True) as captured:
            output = self.model.generate(input_ids=ids.flip(1), attention_mask=mask.flip(1), **options)
        sequences = generation_output(self.model, output, length, captured)
        stop_ids = _stop_ids(self.model, generate_kwargs)
        kept, reasons = trim(sequences, stop_ids, options["pad_token_id"])
        hidden = generated_hidden(output, captured, [len(row) for row in kept])
        results = []
        for i, (row, reason) in enumerate(zip(kept, reasons, strict=True)):
            results.append(self._generated(row, encoded[i * len(encoded) // len(kept)][0], signals, reason))
        token_ids = torch.tensor([token for row in kept for token in row], dtype=torch.int64, device=hidden.device)
        scores = self._signals_of(hidden, token_ids, signals)
        windows = [Window(i, [], None, 0, range(0), row) for i, row in enumerate(kept)]
        self._fill(results, windows, scores)
        for result in results:
            _conclude(result, signals)
        return results

    def _empty_prompt(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [int(bos) if bos is not None else self._pad_id()]

    def _generated(
        self, token_ids: list[int], prompt: str | None, signals: Collection[Signal], finish_reason: Any
    ) -> ScoredText:
        parts = encoding.pieces(self.tokenizer, token_ids)
        text = "".join(parts)
        result = self._result(Encoded(text, prompt, [], token_ids, encoding.locate(text, parts)), signals)
        result.finish_reason = finish_reason
        return result


def _softmax_signals(stats: SoftmaxStats, token_ids: Tensor, signals: Collection[Signal]) -> dict[str, Tensor]:
    """Scores [M] of the softmax signals that were asked for."""
    scores: dict[str, Tensor] = {"max_prob": stats.max_logprob.exp()}
    if stats.token_logprob is not None:
        scores["prob"] = stats.token_logprob.exp()
    if stats.entropy is not None:
        scores["entropy"] = stats.entropy
    if "boosted_prob" in signals:
        scores["boosted_prob"] = stats.boosted_prob(token_ids)
    return scores


def _stop_ids(model: PreTrainedModel, generate_kwargs: dict[str, Any]) -> list[int]:
    """Every EOS id that this generation honours."""
    config = generate_kwargs.get("generation_config") or model.generation_config
    stop = generate_kwargs.get("eos_token_id", config.eos_token_id)
    if stop is None:
        return []
    return [int(token) for token in torch.as_tensor(stop).reshape(-1)]


def _conclude(result: ScoredText, signals: Collection[Signal]) -> None:
    """Set the status from the scores that are there."""
    if not result.token_ids:
        result.status, result.reason = "empty", result.reason or "no tokens"
        return
    missing = np.any([np.isnan(getattr(result, f"token_{signal}")) for signal in signals], axis=0)
    if not missing.any() or result.status == "failed":
        return
    result.status = "failed" if missing.all() else "partial"
    if missing.sum() == 1 and missing[0]:
        result.reason = "the first token has no context (no BOS token, no prompt)"
    else:
        result.reason = f"logits that are not finite at {missing.sum()} of {len(missing)} tokens"
