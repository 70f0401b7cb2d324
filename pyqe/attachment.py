"""``pyqe.attach``: the ``generate`` of a model that is in use already returns quality beside the text."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyqe.continuous import BatchScorer, one_batch_at_a_time
from pyqe.generation import (
    StopRecorder,
    check_decoding,
    check_steps,
    generate_options,
    option,
    sequence_ends,
    stop_ids,
    text_spans,
    trim,
)
from pyqe.heads import SigmoidHead
from pyqe.lm_head import LMHead, around_forward, one_thread_at_a_time, output_embedding, restore_attribute
from pyqe.scored import Signal
from pyqe.signals import check_signals, scores_of_logits
from pyqe.streamer import QualityStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def attach(
    model: PreTrainedModel,
    head: SigmoidHead | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    signals: Collection[Signal] | None = None,
) -> Attachment:
    """Let ``model.generate(..., return_dict_in_generate=True)`` return token quality beside its usual fields.

    The output keeps its class and gets, as attributes and keys:

    * ``token_quality``, ``token_prob``, ``token_entropy``: float32 [B, T], for each of the T new tokens of the B
      sequences, its EOS included; NaN where a sequence has ended.
    * ``sequence_quality``: float32 [B], the mean over a sequence without its EOS; NaN where nothing else was written.

    ``model.generate_batch`` with ``ContinuousBatchingConfig(return_logprobs=True)`` gives each result the same scores,
    as lists, beside its ``logprobs``. CUDA graphs and asynchronous batches are off then.

    Scores are taken from step to step: softmax signals from the logits that the model computes anyway, before
    temperature and other logits processors, in the model's dtype; the quality of a full head from one dot product.
    Nothing is kept but numbers for each step and sequence (in beam search, for each candidate). Greedy search, sampling
    and beam search, several sequences, any prompts and caches, also where the forward pass is compiled. Without
    ``return_dict_in_generate`` nothing changes. One thread generates at a time.

    Args:
        model: any Hugging Face model that generates with an output embedding. A second head replaces the first.
        head: a Sigmoid Head of that model, or None for the softmax signals alone.
        tokenizer: to check that the head was made for it.
        signals: some of "quality", "prob", "max_prob", "entropy", "boosted_prob" (of ``DominantRule.jump("last")``);
            default quality (with a head), prob and entropy.

    Returns:
        a context manager that detaches at its end, for those who want it.

    Raises:
        HeadMismatchError: the head belongs to another vocabulary, hidden size or tokenizer.
        ValueError: unknown signals, the quality without a head; a model without an output embedding.

    ``generate`` then raises NotImplementedError, with ``return_dict_in_generate`` alone, for decoding that is not one
    forward pass a token (assisted generation and the like).

    Example:
        See the README.
    """
    model = _uncompiled(model)
    default: tuple[Signal, ...] = ("prob", "entropy") if head is None else ("quality", "prob", "entropy")
    attachment = Attachment(model, head, check_signals(default if signals is None else signals, head))
    attachment.check_head(tokenizer)
    if _attached(model) is not None:
        detach(model)
    attachment.install()
    return attachment


def detach(model: PreTrainedModel) -> None:
    """Give a model its own ``generate`` back.

    Raises:
        ValueError: nothing is attached.
    """
    attachment = _attached(_uncompiled(model))
    if attachment is None:
        raise ValueError(f"model: expected one with pyqe.attach, got a plain {type(model).__name__}")
    attachment.remove()


def _uncompiled(model: PreTrainedModel) -> PreTrainedModel:
    """The model that ``torch.compile(model)`` wraps: its ``generate`` is the one that runs."""
    return getattr(model, "_orig_mod", model)


def _attached(model: PreTrainedModel) -> Attachment | None:
    found = vars(model).get("generate")
    return found if isinstance(found, Attachment) else None


def _by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call: those that have no name, and the others by theirs."""
    parameters = inspect.signature(function).parameters.values()
    names = [item.name for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD]
    return args[len(names) :], dict(zip(names, args, strict=False)) | kwargs


class Attachment:
    """What stands in for the ``generate`` of a model; see :func:`attach`."""

    def __init__(self, model: PreTrainedModel, head: SigmoidHead | None, signals: tuple[Signal, ...]) -> None:
        self.model = model
        self.head = head
        self.signals = signals

    def install(self) -> None:
        """Take the place of the model's ``generate`` and ``generate_batch``."""
        self._own = {name: vars(self.model).get(name) for name in ("generate", "generate_batch")}
        self._generate, self._generate_batch = self.model.generate, self.model.generate_batch
        functools.update_wrapper(self, self._generate)
        self.model.generate, self.model.generate_batch = self, self.generate_batch

    def remove(self) -> None:
        """Put them back."""
        for name, own in self._own.items():
            restore_attribute(self.model, name, own)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        if _attached(self.model) is self:
            self.remove()

    def check_head(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Check that the head fits the model as it is now.

        Raises:
            HeadMismatchError: it does not fit.
        """
        lm_head = LMHead.from_model(self.model)
        if self.head is not None:
            self.head.check_compatible(lm_head, tokenizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate``, whose arguments these are."""
        args, options = _by_name(self._generate, args, kwargs)
        returned = option(self.model, options, "return_dict_in_generate")
        if not returned and not isinstance(options.get("streamer"), QualityStreamer):
            return self._generate(*args, **options)
        check_decoding(self.model, options)
        self.check_head()
        scorer = StepScorer(self, options)
        with one_thread_at_a_time(self.model), scorer.watching():
            output = self._generate(*args, **generate_options(options, scorer))
        if returned:
            for name, value in scorer.scores_of(output).items():
                output[name] = value
        return output

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate_batch``, whose arguments these are."""
        args, options = _by_name(self._generate_batch, args, kwargs)
        config = options.get("continuous_batching_config")
        if config is None or not config.return_logprobs:
            return self._generate_batch(*args, **options)
        options["continuous_batching_config"] = one_batch_at_a_time(config)
        self.check_head()
        scorer = BatchScorer(self.model, self.score)
        with one_thread_at_a_time(self.model), scorer.watching():
            results = self._generate_batch(*args, **options)
        scorer.add_to(results, options)
        return results

    def score(self, hidden: Tensor, logits: Tensor, token_ids: Tensor) -> dict[Signal, Tensor]:
        """Scores [M, K] of tokens [M, K], from hidden states [M, D] and logits [M, V]; -1 gives NaN."""
        return scores_of_logits(self.signals, self.head, hidden, logits, token_ids)


class StepScorer(StopRecorder):
    """Scores the candidates of every step of one ``generate``: its tokens, or in beam search those that may become one.

    ``generate`` asks it for each step whether sequences have ended, when the step's tokens are chosen and the forward
    pass's tensors are still there.

    Attributes:
        start: length of the prompt, known after the first step.
        tokens: for each step the candidates [G, K] of G groups of beams (with one beam: sequences, and K = 1).
        scores: for each step float32 [rows, K, S] for S signals.
    """

    def __init__(self, attachment: Attachment, options: dict[str, Any]) -> None:
        super().__init__(attachment.model, options.get("tokenizer"), options)
        self.attachment = attachment
        self.beams = int(option(attachment.model, options, "num_beams") or 1)
        streamer = options.get("streamer")
        self.streamer = streamer if isinstance(streamer, QualityStreamer) else None
        if self.streamer is not None and "quality" not in attachment.signals:
            raise ValueError("streamer: expected 'quality' among the signals of pyqe.attach")
        self.options = options
        self.start: int | None = None
        self.tokens: list[Tensor] = []
        self.scores: list[Tensor] = []
        self._forget()

    def _forget(self) -> None:
        self._hidden: Tensor | None = None
        self._logits: Tensor | None = None
        self._passes: list[None] = []  # a list, as a compiled forward pass would be compiled anew for another number

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the model's forward passes inside the ``with`` block."""

        def see_hidden(output: Any, hidden: Tensor) -> None:
            self._hidden = hidden[:, -1]
            self._passes.append(None)

        def see_logits(output: Any, *args: Any, **kwargs: Any) -> None:
            self._logits = output.logits[:, -1]

        model = self.attachment.model
        with around_forward(output_embedding(model), see_hidden), around_forward(model, see_logits):
            try:
                yield
            finally:
                self._forget()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Score the tokens [candidates] that end ``input_ids``; then as any stopping criterion."""
        if self._hidden is None or self._logits is None:
            raise NotImplementedError("generate: runs another model than that of pyqe.attach; attach to that one")
        if len(self._passes) != 1:
            raise NotImplementedError(
                f"generate: {len(self._passes)} forward passes for a token; "
                "only decoding with one forward pass a token can be scored"
            )
        hidden, logits = self._hidden, self._logits
        self._forget()
        if self.start is None:
            self.start = input_ids.shape[1] - 1
        tokens = input_ids[:, -1].to(logits.device, copy=True).reshape(len(logits) // self.beams, -1)
        found = self.attachment.score(hidden, logits, tokens.repeat_interleave(self.beams, 0))
        self.tokens.append(tokens)
        self.scores.append(torch.stack([found[signal] for signal in self.attachment.signals], -1))
        if self.streamer is not None:
            self.streamer.scored.append(found["quality"].item())
        return super().__call__(input_ids, scores, **kwargs)

    def scores_of(self, output: Any) -> dict[str, Tensor]:
        """The fields that ``output`` gets: float32 [B, T] and [B]."""
        assert self.start is not None
        new = output.sequences[:, self.start :]
        check_steps(output, self.start, self.scores[: new.shape[1]])  # one more may have been undone
        model, options = self.attachment.model, self.options
        kept, reasons = trim(new.tolist(), sequence_ends(output, self.start, self), stop_ids(model, options))
        written = [range(len(row) + (reason == "eos")) for row, reason in zip(kept, reasons, strict=True)]
        scores = self._chosen(new, getattr(output, "beam_indices", None))
        scores = scores.masked_fill(~_mask(written, new)[..., None], torch.nan)
        result = {f"token_{name}": scores[..., i] for i, name in enumerate(self.attachment.signals)}
        if "token_quality" in result:
            text = _mask(text_spans(model, options, kept), new)
            quality = torch.where(text, result["token_quality"].double(), 0.0)
            result["sequence_quality"] = (quality.sum(1) / text.sum(1)).float()
        return result

    def _chosen(self, new: Tensor, beam_indices: Tensor | None) -> Tensor:
        """Scores [B, T, S] of the new tokens [B, T] among all candidates'.

        In beam search the row of a sequence changes from step to step; ``beam_indices`` says which it was.
        """
        time = torch.arange(new.shape[1], device=new.device)
        rows = torch.arange(len(new), device=new.device)[:, None].expand_as(new)
        if beam_indices is not None:
            rows = beam_indices.long().clamp(min=0)  # -1 where the sequence has ended
        tokens = torch.stack(self.tokens).to(new.device)  # [T, G, K]
        scores = torch.stack(self.scores).to(new.device)  # [T, rows, K, S]
        place = (tokens[time, rows // self.beams] == new[..., None]).int().argmax(-1)
        return scores[time, rows, place]


def _mask(spans: Sequence[range], new: Tensor) -> Tensor:
    """Whether a place of the new tokens [B, T] is inside its sequence's span, bool [B, T]."""
    time = torch.arange(new.shape[1], device=new.device)
    start, stop = torch.tensor([[span.start, span.stop] for span in spans], device=new.device).T[..., None]
    return (time >= start) & (time < stop)
