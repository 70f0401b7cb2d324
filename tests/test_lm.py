"""The whole path on a real language model, SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyqe
from pyqe import demo
from pyqe.scored import SIGNALS

pytestmark = pytest.mark.lm

TEXTS = ["The cat sat on the mat.", "Water boils at 100 °C.", "I", "One, two, three, four, five, six, seven and eight."]


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_scores_do_not_depend_on_the_batch_by_a_bit(smollm2: tuple[Any, Any], kind: Any) -> None:
    head = pyqe.SigmoidHead.from_lm_head(*smollm2, kind=kind)
    estimator = pyqe.QualityEstimator(*smollm2, head)
    with pyqe.use_backend("reference"):
        together = estimator.score(TEXTS, batch_size=16)
        alone = [estimator.score([text])[0] for text in TEXTS]
    for one, other in zip(together, alone, strict=True):
        for signal in SIGNALS:
            name = f"token_{signal}"
            assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True), (one.text, name)


def test_probabilities_are_those_of_the_models_own_logits(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    scored = pyqe.QualityEstimator(model, tokenizer).score(TEXTS[:1])[0]
    ids = torch.tensor([[tokenizer.bos_token_id, *scored.token_ids]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
    expected = logprobs.exp().gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(scored.token_prob, expected, rtol=1e-4)
    np.testing.assert_allclose(scored.token_entropy, -(logprobs.exp() * logprobs).sum(1), rtol=1e-4)
    assert "".join(scored.tokens) == TEXTS[0]


def test_generated_scores_are_those_of_the_given_text(smollm2: tuple[Any, Any], smollm2_head: Any) -> None:
    estimator = pyqe.QualityEstimator(*smollm2, smollm2_head)
    prompts = ["The capital of France is", "Once upon"]
    for generated in estimator.generate(prompts, max_new_tokens=6, num_beams=2):
        given = estimator.score([generated.text], [generated.prompt])[0]
        assert given.token_ids == generated.token_ids
        for signal in SIGNALS:
            name = f"token_{signal}"
            np.testing.assert_allclose(getattr(generated, name), getattr(given, name), rtol=1e-3, atol=1e-5)


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A short one: training lowers the held-out loss, errors are told apart, the second run does not train."""
    monkeypatch.setattr(demo, "TOKENS", 3072)
    monkeypatch.setattr(demo, "EPOCHS", 2)
    said: list[str] = []
    demo.run(tmp_path, retrain=False, say=said.append)
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    before = float(next(line for line in said if line.startswith("held-out loss")).split()[2])
    assert config["training"]["held_out_loss"] < before
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == len(demo.MARKED_SENTENCES) + len(demo.PROMPTS)
    assert demo.error_auroc(rows[: len(demo.MARKED_SENTENCES)])["quality"] > 0.7
    assert "Paris" in rows[len(demo.MARKED_SENTENCES)]["text"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for expected in ("Finding the planted errors", "banana", "Sigmoid Head", "<svg"):
        assert expected in page
    table = capsys.readouterr().out
    assert "* banana" in table
    assert "AUROC of planted errors: Sigmoid Head" in table
    said.clear()
    demo.run(tmp_path, retrain=False, say=said.append)
    assert not any(line.startswith("held-out loss") for line in said)
