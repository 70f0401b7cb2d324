"""Integrations: the tests of integrations/vllm, and SGLang's answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from pyqe import HeadMismatchError, QualityEstimator, SigmoidHead
from pyqe.integrations.sglang import token_quality

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations/vllm/tests"))
pytest.register_assert_rewrite("test_pyqe_vllm")
from test_pyqe_vllm import *  # noqa: E402, F403

HEADS_OF_SGLANG: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "low_rank", "base": "logprob"},
    {"kind": "rescaling", "base": "logprob"},
]


def sglang_answer(model: Any, prompt: list[int], tokens: list[int], chunk: int = 100) -> dict[str, Any]:
    """The answer of SGLang 0.5.23 to a request with ``return_hidden_states`` and ``return_logprob``, as lists."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([prompt + tokens])).last_hidden_state[0]
        logprobs = model.lm_head(hidden).log_softmax(-1)
    before = hidden[: len(prompt)]
    chunks = [before[start : start + chunk].tolist() for start in range(0, len(prompt), chunk)]
    entries = [[logprobs[len(prompt) - 1 + i, token].item(), token, None] for i, token in enumerate(tokens)]
    return {
        "text": "",
        "output_ids": tokens,
        "meta_info": {
            "hidden_states": chunks + hidden[len(prompt) : -1].tolist(),
            "output_token_logprobs": entries,
            "completion_tokens": len(tokens),
        },
    }


@pytest.mark.parametrize("options", HEADS_OF_SGLANG, ids=lambda options: options["kind"])
@pytest.mark.parametrize("chunk", [100, 2])
def test_quality_of_sglang_answers(options: dict[str, Any], chunk: int) -> None:
    model = tiny.model()
    made = tiny.head(model, tiny.tokenizer(), **options)
    prompt, tokens = [1, 40, 50, 60, 70], [33, 44, 55, 2]
    (expected,) = QualityEstimator(model, tiny.tokenizer(), made).score_ids([tokens], [prompt], signals=["quality"])
    found = token_quality(sglang_answer(model, prompt, tokens, chunk), made)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.token_quality, rtol=1e-4)


def test_sglang_answers_that_cannot_be_scored() -> None:
    model = tiny.model()
    made = tiny.head(model, tiny.tokenizer())
    answer = sglang_answer(model, [1, 40], [33, 44, 55])
    states = answer["meta_info"]["hidden_states"]
    for wrong in (states[:-1], [*states, states[-1]], [*states[:-1], states[0]], []):
        with pytest.raises(ValueError, match="one a token"):
            token_quality({**answer, "meta_info": {"hidden_states": wrong}}, made)
    with pytest.raises(KeyError, match="hidden_states"):
        token_quality({"output_ids": [5], "meta_info": {}}, made)
    with pytest.raises(ValueError, match="on logits"):
        token_quality(answer, tiny.head(model, tiny.tokenizer(), kind="rescaling", base="logit"))
    logprobs = SigmoidHead.from_lm_head(model, kind="rescaling")
    with pytest.raises(ValueError, match="expected 3 output_token_logprobs, got 1"):
        token_quality({**answer, "meta_info": {"hidden_states": states, "output_token_logprobs": [[-1, 3]]}}, logprobs)
    with pytest.raises(HeadMismatchError, match="the head has 16, the answer 32"):
        token_quality(answer, SigmoidHead.from_lm_head(tiny.model(hidden_size=16)))
    assert token_quality({"output_ids": [], "meta_info": {"hidden_states": []}}, made).shape == (0,)


def test_sglang_states_that_are_not_finite_have_no_quality() -> None:
    model = tiny.model()
    answer = sglang_answer(model, [1, 40], [33, 44])
    answer["meta_info"]["hidden_states"][-1][0] = float("nan")
    assert np.isnan(token_quality(answer, tiny.head(model, tiny.tokenizer()))).tolist() == [False, True]
