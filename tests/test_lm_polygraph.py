"""Estimators for lm-polygraph, inside lm-polygraph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from pyqe import QualityEstimator, SigmoidHead

lm_polygraph = pytest.importorskip("lm_polygraph")

from lm_polygraph.defaults.register_default_stat_calculators import register_default_stat_calculators  # noqa: E402
from lm_polygraph.estimators import BoostedProbSequence  # noqa: E402
from lm_polygraph.ue_metrics import PredictionRejectionArea  # noqa: E402
from lm_polygraph.utils.builder_enviroment_stat_calculator import BuilderEnvironmentStatCalculator  # noqa: E402

from pyqe.integrations.lm_polygraph import BoostedProb, SigmoidHeadQuality  # noqa: E402

TEXTS = ["The cat sat", "A dog, and another", "one two three four five", "x", "Héllo wörld"]


@pytest.fixture(autouse=True)
def _threads(one_thread: None) -> None:
    """Small models."""


@pytest.fixture(scope="module")
def model() -> Any:
    """With eager attention, as lm-polygraph asks for attention weights."""
    lm = tiny.model("llama", attn_implementation="eager", max_position_embeddings=128)
    return lm_polygraph.WhiteboxModel(lm, tiny.tokenizer_with(padding_side="left"), "tiny")


@pytest.fixture(scope="module", params=["full", "low_rank"])
def head(request: pytest.FixtureRequest, model: Any) -> SigmoidHead:
    return tiny.head(model.model, model.tokenizer, kind=request.param)


def run(model: Any, estimators: list[Any], batch_size: int = 3, max_new_tokens: int = 8) -> Any:
    """UEManager over the texts."""
    manager = lm_polygraph.UEManager(
        lm_polygraph.Dataset(TEXTS, [""] * len(TEXTS), batch_size=batch_size),
        model,
        estimators,
        available_stat_calculators=register_default_stat_calculators("Whitebox"),
        builder_env_stat_calc=BuilderEnvironmentStatCalculator(model),
        generation_metrics=[],
        ue_metrics=[],
        processors=[],
        ignore_exceptions=False,
        verbose=False,
        max_new_tokens=max_new_tokens,
        save_stats=["greedy_tokens"],
    )
    manager()
    return manager


def test_estimate_uncertainty(model: Any, head: SigmoidHead) -> None:
    output = lm_polygraph.estimate_uncertainty(model, SigmoidHeadQuality(head), TEXTS[0])
    assert output.estimator == "SigmoidHeadQuality"
    assert 0.0 < output.uncertainty < 1.0
    token_level = lm_polygraph.estimate_uncertainty(model, SigmoidHeadQuality(head, level="token"), TEXTS[0])
    assert len(token_level.uncertainty) == len(token_level.generation_tokens)


def test_manager_gives_one_minus_the_quality_of_what_it_generated(model: Any, head: SigmoidHead) -> None:
    levels = [SigmoidHeadQuality(head), SigmoidHeadQuality(head, level="token")]
    manager = run(model, levels)
    estimator = QualityEstimator(model.model, model.tokenizer, head)
    prompts = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    scored = estimator.score_ids(manager.stats["greedy_tokens"], prompts, signals=["quality"])
    qualities = [item.token_quality for item in scored]
    found = manager.estimations["sequence", "SigmoidHeadQuality"]
    np.testing.assert_allclose(found, [1 - row.mean() for row in qualities], rtol=1e-5)
    for row, quality in zip(manager.estimations["token", "SigmoidHeadQualityToken"], qualities, strict=True):
        np.testing.assert_allclose(row, 1 - quality[:-1], rtol=1e-5)


def test_lower_quality_is_more_uncertain(model: Any, head: SigmoidHead) -> None:
    """In lm-polygraph's own metric, with the quality as the truth: as good as can be."""
    manager = run(model, [SigmoidHeadQuality(head)])
    uncertainty = manager.estimations["sequence", "SigmoidHeadQuality"]
    estimator = QualityEstimator(model.model, model.tokenizer, head)
    prompts = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    scored = estimator.score_ids(manager.stats["greedy_tokens"], prompts, signals=["quality"])
    quality = np.array([item.token_quality.mean() for item in scored])
    area = PredictionRejectionArea()
    assert area(uncertainty, quality) == area(-quality, quality) > area(quality, quality)


def test_batch_size_changes_nothing(model: Any, head: SigmoidHead) -> None:
    one, many = (
        run(model, [SigmoidHeadQuality(head)], batch_size=size).estimations["sequence", "SigmoidHeadQuality"]
        for size in (1, 5)
    )
    np.testing.assert_allclose(one, many, rtol=1e-4)


def test_boosted_prob_ranks_as_theirs(model: Any) -> None:
    manager = run(model, [BoostedProb(), BoostedProb("token"), BoostedProbSequence()])
    ours, theirs = (manager.estimations["sequence", name] for name in ("BoostedProb", "BoostedProbSequence"))
    np.testing.assert_allclose(ours, 1 + np.array(theirs), rtol=1e-3)  # theirs without EOS at the first two tokens
    assert [len(row) + 1 for row in manager.estimations["token", "BoostedProbToken"]] == [
        len(row) for row in manager.stats["greedy_tokens"]
    ]


def test_estimators_share_a_pass(model: Any, head: SigmoidHead, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    score_ids = QualityEstimator.score_ids
    monkeypatch.setattr(QualityEstimator, "score_ids", lambda *args, **kw: calls.append(1) or score_ids(*args, **kw))
    run(model, [SigmoidHeadQuality(head), SigmoidHeadQuality(head, level="token")], batch_size=5)
    assert len(calls) == 1


def test_no_score_is_most_uncertain(model: Any, head: SigmoidHead) -> None:
    """lm-polygraph ranks NaN as most certain."""
    broken = SigmoidHead.from_lm_head(model.model, kind="rescaling")
    with torch.no_grad():
        broken.scale.fill_(torch.nan)
    stats = {"model": model, "input_texts": TEXTS[:2], "greedy_tokens": [[5, 6], []]}
    assert SigmoidHeadQuality(broken)(dict(stats)).tolist() == [np.inf, np.inf]
    assert [row.tolist() for row in SigmoidHeadQuality(broken, level="token")(dict(stats))] == [[np.inf], []]
    assert SigmoidHeadQuality(head)(dict(stats))[1] == np.inf  # nothing was generated


def test_errors(model: Any, head: SigmoidHead) -> None:
    with pytest.raises(ValueError, match="level"):
        BoostedProb("claim")  # type: ignore[arg-type]
    stats = {"model": lm_polygraph.BlackboxModel(model_path="x"), "input_texts": ["a"], "greedy_tokens": [[5]]}
    with pytest.raises(ValueError, match="WhiteboxModel"):
        BoostedProb()(stats)
