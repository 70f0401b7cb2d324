"""Evaluation of a model's confidences, and the study over many models."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pyqe import metrics
from pyqe.choice import AbstentionPolicy, Evaluation, correlation_study, evaluate


def sample(n: int, seed: int = 0, power: float = 1.5) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    confidence = generator.random(n)
    return confidence, (generator.random(n) < confidence**power).astype(int)


def test_figures_are_those_of_the_metrics() -> None:
    confidence, correct = sample(300)
    result = evaluate(confidence, correct, n_bins=5)
    assert (result.n, result.omitted, result.groups) == (300, 0, {})
    assert result.accuracy == correct.mean()
    assert result.auroc == metrics.auroc_test(correct, confidence)
    assert result.average_precision == metrics.average_precision(correct, confidence)
    assert result.aurc == metrics.aurc(correct, confidence)
    assert result.prediction_rejection_ratio == metrics.prediction_rejection_ratio(correct, confidence)
    assert result.ece == metrics.expected_calibration_error(correct, confidence, n_bins=5)
    assert result.calibration_error == metrics.expected_calibration_error(
        correct, confidence, n_bins=5, strategy="quantile", weighted=False
    )
    assert result.maximum_calibration_error == metrics.maximum_calibration_error(correct, confidence, n_bins=5)
    assert result.smooth_calibration_error == metrics.smooth_calibration_error(correct, confidence)
    assert result.brier == metrics.brier_score(correct, confidence)


def test_each_group_is_evaluated_on_its_own() -> None:
    confidence, correct = sample(90)
    groups = np.array(["a", "b", "c"])[np.arange(90) % 3]
    result = evaluate(confidence, correct, groups=groups)
    assert list(result.groups) == ["a", "b", "c"]
    for name, part in result.groups.items():
        assert part == evaluate(confidence[groups == name], correct[groups == name])
    without = evaluate(confidence, correct)
    assert (result.auroc, result.ece) == (without.auroc, without.ece)


def test_abstention_is_scored_on_other_questions_than_it_is_chosen_on() -> None:
    confidence, correct = sample(400)
    groups = np.repeat(["a", "b"], [100, 300])
    result = evaluate(confidence, correct, groups=groups, penalties=(1, 3), seed=7)
    assert [one.wrong_penalty for one in result.abstention] == [1, 3]
    assert evaluate(confidence, correct, groups=groups, penalties=(1, 3), seed=7) == result
    thresholds = {evaluate(confidence, correct, seed=seed, n_bootstrap=0).abstention[1].threshold for seed in range(5)}
    assert len(thresholds) > 1
    for one in result.abstention:
        base = np.mean([correct[groups == name].mean() * (1 + one.wrong_penalty) for name in "ab"]) - one.wrong_penalty
        assert one.base_score == pytest.approx(100 * base, abs=25)  # but for the 40 that it is chosen on
        answered = confidence >= one.threshold
        assert one.coverage == pytest.approx(answered.mean(), abs=0.1)
        policy = AbstentionPolicy(one.wrong_penalty)
        policy.threshold_ = one.threshold
        assert one.score == pytest.approx(policy.score(confidence, correct, groups), abs=15)
        assert one.score > one.base_score


@pytest.mark.parametrize(("n", "n_train", "results"), [(1, 20, 0), (2, 20, 2), (3, 0, 0), (30, 20, 2)])
def test_few_questions(n: int, n_train: int, results: int) -> None:
    confidence, correct = sample(n)
    assert len(evaluate(confidence, correct, n_train=n_train).abstention) == results


def test_what_is_missing_is_counted() -> None:
    confidence, correct = sample(60)
    groups = np.repeat(["a", "b", "c"], 20)
    broken = confidence.copy()
    broken[[3, 25]] = np.nan
    broken[40:] = np.nan
    with pytest.raises(ValueError, match=r"confidence: .*got nan in row 3 \(22 such rows\)"):
        evaluate(broken, correct)
    result = evaluate(broken, correct, groups=groups, missing="omit")
    assert (result.n, result.omitted) == (38, 22)
    assert [(part.n, part.omitted) for part in result.groups.values()] == [(19, 1), (19, 1), (0, 20)]
    assert np.isnan(result.groups["c"].accuracy)
    rows = ~np.isnan(broken)
    assert result.auroc == evaluate(confidence[rows], correct[rows]).auroc
    with pytest.raises(ValueError, match="one row at least"):
        evaluate(broken[40:], correct[40:], missing="omit")


def test_confidences_that_are_no_probabilities() -> None:
    confidence, correct = sample(100)
    result = evaluate(np.log(confidence), correct, probability=False)
    expected = evaluate(confidence, correct)
    assert result.auroc == expected.auroc
    assert result.aurc == expected.aurc
    assert np.isnan([result.ece, result.brier, result.smooth_calibration_error]).all()
    assert len(result.abstention) == 2
    with pytest.raises(ValueError, match=r"confidence: expected numbers in \[0, 1\]"):
        evaluate(np.log(confidence), correct)
    with pytest.raises(ValueError, match=r"correct: expected 0 or 1, got 0\.5"):
        evaluate([0.5, 0.6], [0.5, 1])


def test_the_dictionary_is_json() -> None:
    confidence, correct = sample(50)
    result = evaluate(confidence, np.ones(50), groups=np.arange(50) % 2)
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["accuracy"] == 1
    assert stored["auroc"] == {"auroc": None, "p_value": None, "low": None, "high": None}
    assert stored["abstention"][0]["threshold"] == "-inf"
    assert stored["groups"]["1"]["n"] == 25
    assert evaluate(confidence, correct).to_dict()["ece"] == evaluate(confidence, correct).ece


def test_study_over_models() -> None:
    models = {f"model {k}": evaluate(*sample(200, k, power=1 / (1 + k)), n_bootstrap=0) for k in range(6)}
    study = correlation_study(models)
    accuracy, auroc, ece = np.transpose([(one.accuracy, one.auroc.auroc, one.ece) for one in models.values()])
    assert study.n_models == 6
    assert (study.auroc.r, study.auroc.p_value) == pytest.approx(tuple(stats.pearsonr(accuracy, auroc)))
    assert (study.ece.r, study.ece.p_value) == pytest.approx(tuple(stats.pearsonr(accuracy, ece)))
    several = {name: [one, one] for name, one in models.items()}
    assert correlation_study(several).ece.r == pytest.approx(study.ece.r)


def test_models_that_cannot_be_studied() -> None:
    one = evaluate(*sample(50), n_bootstrap=0)
    with pytest.raises(ValueError, match="three models or more, got 2"):
        correlation_study({"a": one, "b": one})
    with pytest.raises(ValueError, match="of c is not defined"):
        correlation_study({"a": one, "b": one, "c": [one, Evaluation(0, 3)]})
