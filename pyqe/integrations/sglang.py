"""Quality of what SGLang wrote, from the fields of its answers: SGLang itself need not be here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyqe.heads import HeadMismatchError, SigmoidHead


@torch.no_grad()
def token_quality(answer: Mapping[str, Any], head: SigmoidHead) -> NDArray[np.float32]:
    """Sigmoid Head probabilities of the tokens of one answer.

    Args:
        answer: what ``Engine.generate(..., return_hidden_states=True)`` or ``POST /generate`` with that field gives for
            one prompt, of an engine with ``enable_return_hidden_states``. With ``return_logprob=True`` too where the
            head starts from the LM's log-probabilities; they must be the model's own, that is, from greedy decoding or
            an engine with ``SGLANG_RETURN_ORIGINAL_LOGPROB=1`` in its environment.
        head: a full head of that model, or one on log-probabilities.

    Returns:
        float32 [T] in [0, 1] for the T ``output_ids``; NaN where a hidden state is not finite.

    Raises:
        KeyError: a field is missing from the answer.
        HeadMismatchError: the hidden states have another size than the head's.
        ValueError: hidden states that are not one a token (speculative decoding, a request that was retracted), or a
            head on logits, which SGLang does not return.

    Example:
        See docs/integrations.md.
    """
    token_ids = torch.tensor(answer["output_ids"], dtype=torch.int64)
    hidden = _hidden_of(answer, len(token_ids), head).to(head.scale.device)
    base = None
    if head.config.base == "logit":
        raise ValueError("head: expected one on log-probabilities or a full one, got one on logits")
    if head.config.base == "logprob":
        base = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]], device=hidden.device)
        if len(base) != len(token_ids):
            raise ValueError(f"answer: expected {len(token_ids)} output_token_logprobs, got {len(base)}")
    logits = head(hidden, token_ids.to(hidden.device), base)
    quality: NDArray[np.float32] = torch.sigmoid(logits).masked_fill(~logits.isfinite(), torch.nan).cpu().numpy()
    return quality


def _hidden_of(answer: Mapping[str, Any], count: int, head: SigmoidHead) -> torch.Tensor:
    """Hidden states [T, D] that predict the T tokens.

    SGLang lists those of the prompt as one or several matrices, whose last row predicts the first token, then one
    vector a step. What was read again after a retraction, or drafted, would be something else.
    """
    parts = [torch.tensor(part, dtype=torch.float32) for part in answer["meta_info"]["hidden_states"]]
    prompts = [part for part in parts if part.dim() == 2]
    rows = [*(part[-1] for part in prompts[-1:]), *parts[len(prompts) :]]
    if len(rows) != count or any(row.dim() != 1 for row in rows):
        raise ValueError(
            f"answer: expected hidden states of the prompt and of {max(count - 1, 0)} steps after it, one a token, got "
            f"shapes {[list(part.shape) for part in parts]!s:.200}"
        )
    size = head.config.hidden_size
    if any(len(row) != size for row in rows):
        raise HeadMismatchError(f"hidden_size: the head has {size}, the answer {len(rows[0])}")
    return torch.stack(rows) if rows else torch.empty(0, size)
