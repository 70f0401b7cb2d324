"""``model.generate``: how it is called, and what it leaves behind matched with the hidden states of its steps."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FinishReason = Literal["eos", "stop", "length"]

_INPUTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids", "encoder_outputs")
# Their forward passes are not one a token, or not of the sequence that is written.
_UNSUPPORTED = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "use_mtp",
    "custom_generate",
    "prefill_chunk_size",
    "guidance_scale",
)

_REPLACING = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


def check_options(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Refuse options of ``generate`` that prompts and the matching of tokens with hidden states leave no room for.

    Raises:
        TypeError: an input among them.
        NotImplementedError: as :func:`check_decoding`.
    """
    given = [name for name in _INPUTS if name in options]
    if given:
        raise TypeError(f"generate: {', '.join(given)} come from prompts and cannot be given")
    check_decoding(model, options)


def check_decoding(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Refuse options of ``generate`` under which tokens could not be matched with hidden states.

    Raises:
        NotImplementedError: assisted generation, classifier-free guidance and the like.
    """
    for name in _UNSUPPORTED:
        value = option(model, options, name)
        if value not in (None, False) and (name, value) != ("guidance_scale", 1):
            raise NotImplementedError(
                f"generate: {name}={value!r:.80}: only decoding with one forward pass a token can be scored"
            )
    if option(model, options, "cache_implementation") == "paged":
        raise NotImplementedError("generate: cache_implementation='paged': use generate_batch, see pyqe.attach")


def option(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """An option as ``generate`` takes it: from its arguments, the ``generation_config`` given, or the model's own."""
    if name in options:
        return options[name]
    value = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if value is None else value


def stop_ids(model: PreTrainedModel, options: dict[str, Any]) -> list[int]:
    """Every EOS id that this generation honours."""
    stop = option(model, options, "eos_token_id")
    return [] if stop is None else [int(token) for token in torch.as_tensor(stop).reshape(-1)]


class StopRecorder(StoppingCriteria):  # type: ignore[misc]
    """Applies the caller's stopping criteria and stop strings, and remembers where each row met one first.

    ``generate`` goes on writing into a finished row while others are not, padding or (without an EOS id) more text.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: dict[str, Any]
    ) -> None:
        given = options.get("stopping_criteria") or []
        self.criteria = StoppingCriteriaList(given)
        # Of these kinds, which any step may ask again, generate must see the caller's own: they replace its own.
        self.listed = StoppingCriteriaList([*(item for item in given if isinstance(item, _REPLACING)), self])
        strings = option(model, options, "stop_strings")
        if strings is not None and tokenizer is not None:  # without one, generate has the word
            self.criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
        self.lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row is done, bool [rows]."""
        done: Tensor = self.criteria(input_ids, scores, **kwargs)
        if self.lengths is None:
            self.lengths = torch.full_like(input_ids[:, 0], -1)
        if self.lengths.shape == done.shape:  # in beam search rows are other sequences from step to step: see below
            self.lengths = torch.where(done & (self.lengths < 0), input_ids.shape[1], self.lengths)
        return done


def generate_options(options: dict[str, Any], recorder: StopRecorder, **own: Any) -> dict[str, Any]:
    """The caller's options of ``generate`` with the recorder for their stopping criteria, and options of our own.

    Those go into a ``generation_config`` that the caller gives: transformers 5 warns of a mix.
    """
    result = {**options, "stopping_criteria": recorder.listed}
    if options.get("generation_config") is None:
        return result | own
    result["generation_config"] = copy.deepcopy(options["generation_config"])
    result["generation_config"].update(**own)
    return result


def sequence_ends(output: Any, start: int, recorder: StopRecorder) -> list[int | None]:
    """For every sequence the number of new tokens after which a stopping criterion ended it, or None."""
    beams = getattr(output, "beam_indices", None)
    if beams is None:
        lengths = [-1] * len(output.sequences) if recorder.lengths is None else recorder.lengths.tolist()
        return [None if length < 0 else length - start for length in lengths]
    lengths = (beams >= 0).sum(1).tolist()
    written = (output.sequences[i : i + 1, : start + length] for i, length in enumerate(lengths))
    return [
        length if bool(recorder.criteria(ids, None)) else None for length, ids in zip(lengths, written, strict=True)
    ]


def check_steps(output: Any, start: int, captured: Sequence[Tensor]) -> None:
    """Check that there was one forward pass for each token of all sequences.

    Raises:
        NotImplementedError: there was not, so that the scores would be other tokens'.
    """
    rows, columns = output.sequences.shape
    found = (len(captured), len(captured[0]) if captured else 0)
    if getattr(output, "beam_indices", None) is None and found != (columns - start, rows):
        raise NotImplementedError(
            f"generate: {found[0]} forward passes of {found[1]} rows for {rows} sequences of {columns - start} tokens; "
            "only decoding with one forward pass a token can be scored"
        )


def trim(
    sequences: Sequence[list[int]], ends: Sequence[int | None], stop: Collection[int]
) -> tuple[list[list[int]], list[FinishReason]]:
    """Sequences up to their first EOS (left out) or their end, and how each ended.

    Example:
        >>> trim([[5, 2, 0, 0], [5, 6, 7, 8], [5, 6, 0, 0]], ends=[None, None, 2], stop=[2])
        ([[5], [5, 6, 7, 8], [5, 6]], ['eos', 'length', 'stop'])
    """
    kept: list[list[int]] = []
    reasons: list[FinishReason] = []
    for row, end in zip(sequences, ends, strict=True):
        row = row[:end]
        eos = next((i for i, token in enumerate(row) if token in stop), None)
        kept.append(row[:eos])
        reasons.append("eos" if eos is not None else "length" if end is None else "stop")
    return kept, reasons


def text_spans(model: PreTrainedModel, options: dict[str, Any], kept: Sequence[list[int]]) -> list[range]:
    """Where the text is in sequences as :func:`trim` keeps them: all but a BOS token that ``generate`` put first."""
    is_seq2seq = model.config.is_encoder_decoder
    forced = option(model, options, "forced_bos_token_id") if is_seq2seq else None
    return [range(int(bool(row) and row[0] == forced), len(row)) for row in kept]


def generated_hidden(output: Any, captured: Sequence[Tensor], spans: Sequence[range]) -> Tensor:
    """Hidden states [M, D] that predicted the tokens of each sequence at the steps ``spans[i]``, one after the other.

    In beam search the row of a sequence changes from step to step; ``beam_indices`` says which it was.
    """
    steps = torch.stack(list(captured))  # [T, rows, D]
    beams = getattr(output, "beam_indices", None)
    parts = []
    for i, span in enumerate(spans):
        time = torch.arange(span.start, span.stop, device=steps.device)
        row = torch.full_like(time, i) if beams is None else beams[i, span.start : span.stop].to(steps.device)
        parts.append(steps[time, row])
    return torch.cat(parts)
