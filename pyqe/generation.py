"""What ``model.generate`` leaves behind, matched with the hidden states of its steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generation_output(
    model: PreTrainedModel, output: Any, prompt_length: int, captured: Sequence[Tensor]
) -> list[list[int]]:
    """The generated part of every sequence.

    Raises:
        NotImplementedError: the forward passes do not match the tokens one to one, as in assisted generation.
    """
    start = 1 if model.config.is_encoder_decoder else prompt_length
    sequences = output.sequences[:, start:]
    beams = getattr(output, "beam_indices", None)
    steps, rows = len(captured), len(captured[0]) if captured else 0
    if beams is None and (steps != sequences.shape[1] or rows != sequences.shape[0]):
        raise NotImplementedError(
            f"generate: {steps} forward passes of {rows} rows for {sequences.shape[0]} sequences of "
            f"{sequences.shape[1]} tokens; only decoding with one forward pass a token can be scored"
        )
    return sequences.tolist()


def trim(
    sequences: Sequence[list[int]], stop_ids: Collection[int], pad_id: int
) -> tuple[list[list[int]], list[Literal["eos", "length"]]]:
    """Sequences up to their first stop token (left out) or their padding, and how each ended.

    Example:
        >>> trim([[5, 2, 0, 0], [5, 6, 7, 8]], stop_ids=[2], pad_id=0)
        ([[5], [5, 6, 7, 8]], ['eos', 'length'])
    """
    kept, reasons = [], []
    for row in sequences:
        end = next((i for i, token in enumerate(row) if token in stop_ids), None)
        reasons.append("length" if end is None else "eos")
        if end is None:  # finished by another criterion, then padded
            end = len(row)
            while end and row[end - 1] == pad_id:
                end -= 1
        kept.append(row[:end])
    return kept, reasons  # type: ignore[return-value]


def generated_hidden(output: Any, captured: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Hidden states [M, D] that predicted the first ``lengths[i]`` tokens of each sequence, one after the other.

    In beam search the row of a sequence changes from step to step; ``beam_indices`` says which it was.
    """
    steps = torch.stack(list(captured))  # [T, rows, D]
    beams = getattr(output, "beam_indices", None)
    parts = []
    for i, length in enumerate(lengths):
        time = torch.arange(length, device=steps.device)
        row = torch.full_like(time, i) if beams is None else beams[i, :length].to(steps.device)
        parts.append(steps[time, row])
    return torch.cat(parts)
