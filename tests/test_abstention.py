"""When to abstain: the best threshold by definition, and the promise about the risk by simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from pyqe.choice import AbstentionPolicy
from pyqe.metrics import decision_score


def sample(n: int, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    confidence = generator.random(n)
    return confidence, (generator.random(n) < confidence).astype(int)


# --- the best score


def best(confidence: Any, correct: Any, groups: Any, penalty: float, thresholds: Any) -> Any:
    """Score of each threshold, the mean over the groups."""
    names = sorted(set(groups))
    return [
        np.mean(
            [
                decision_score(correct[groups == name], confidence[groups == name], threshold, wrong=-penalty)
                for name in names
            ]
        )
        for threshold in thresholds
    ]


@pytest.mark.parametrize("penalty", [0, 1, 2, 10])
@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("scale", [1, 30])
def test_the_threshold_is_the_best_of_the_grid(penalty: float, n_groups: int, scale: float) -> None:
    confidence, correct = sample(60)
    confidence *= scale
    groups = np.arange(60) ** 2 % n_groups
    grid = np.linspace(0, 1, 200) if scale == 1 else np.linspace(0, confidence.max(), 200)
    grid = np.unique([-np.inf, *grid, *(np.linspace(0.99, 1, 100) if scale == 1 else ())])
    scores = best(confidence, correct, groups, penalty, grid)
    policy = AbstentionPolicy(penalty).fit(confidence, correct, groups)
    assert policy.threshold_ == grid[np.flatnonzero(np.isclose(scores, max(scores)))[0]]
    assert policy.score(confidence, correct, groups) == pytest.approx(100 * max(scores))
    np.testing.assert_array_equal(policy.predict(confidence), confidence >= policy.threshold_)


def test_of_equal_scores_the_lowest_threshold_is_taken() -> None:
    assert AbstentionPolicy().fit([0.9, 0.5], [1, 1]).threshold_ == -np.inf
    assert AbstentionPolicy().fit([0.9, 0.9, 0.5, 0.5], [1, 0, 1, 0]).threshold_ == -np.inf
    # Sums of tenths differ by rounding, but not in what they mean
    assert AbstentionPolicy(0.1).fit(np.full(11, 0.5), [1] + [0] * 10).threshold_ == -np.inf


def test_groups_count_alike() -> None:
    confidence = np.repeat([0.9, 0.5, 0.9, 0.5], [1, 1, 50, 50])
    correct = np.repeat([1, 1, 1, 0], [1, 1, 50, 50])  # the small group loses by abstaining what the large one gains
    groups = np.repeat(["small", "large"], [2, 100])
    pooled, grouped = (AbstentionPolicy(0.9).fit(confidence, correct, of).threshold_ for of in (None, groups))
    assert (pooled > 0.5, grouped) == (True, -np.inf)
    policy = AbstentionPolicy(0.9).fit(confidence, correct, groups)
    assert policy.score(confidence, correct, groups) == pytest.approx(100 * (1 + (1 - 0.9) / 2) / 2)


def test_a_penalty_larger_than_all_is_worth_makes_it_abstain() -> None:
    confidence, correct = sample(500)
    thresholds = [AbstentionPolicy(penalty).fit(confidence, correct).threshold_ for penalty in (0, 1, 2, 10)]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] == -np.inf
    assert thresholds[-1] > 0.85  # about c / (1 + c), as confidence is calibrated


def test_any_numbers_will_do() -> None:
    confidence, correct = sample(200)
    policy = AbstentionPolicy(2).fit(np.log(confidence), correct)  # log-probabilities
    assert policy.threshold_ < 0
    assert policy.score(np.log(confidence), correct) > 100 * decision_score(correct, confidence, 0, wrong=-2)
    same = AbstentionPolicy(2).fit(torch.tensor(confidence), torch.tensor(correct, dtype=torch.bool))
    assert same.threshold_ == AbstentionPolicy(2).fit(confidence, correct).threshold_
    assert AbstentionPolicy().fit([0.5, 0.2], [1, 0.5]).threshold_ == -np.inf  # graded


# --- a risk that is promised

# Share of each of a hundred confidences, and of wrong answers at it
LEVELS = np.arange(1, 101) / 100
UNIFORM = np.full(100, 0.01)
POPULATIONS = {
    "wrong answers become rarer": (UNIFORM, 0.5 * (1 - LEVELS)),
    "a step": (UNIFORM, np.where(LEVELS > 0.4, 0.05, 0.4)),
    "the target, everywhere": (UNIFORM, np.full(100, 0.2)),
    "just above the target": (UNIFORM, np.where(LEVELS > 0.6, 0.2001, 0.5)),
    "hidden bad part": (UNIFORM, np.where(LEVELS > 0.5, 0.19, 0.2105)),
    "the most confident are wrong": (UNIFORM, np.where(LEVELS > 0.95, 0.6, 0.1)),
    "waves": (UNIFORM, 0.2 + 0.15 * np.sin(12 * LEVELS)),
    "few confidences": (np.where(np.arange(100) % 25 == 24, 0.25, 0), 0.5 * (1 - LEVELS)),
    "many of 1": (np.where(LEVELS == 1, 0.604, 0.004), np.where(LEVELS == 1, 0.17, 0.4)),
}
TARGET, CONFIDENCE, TRIALS = 0.2, 0.8, 300


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("n", [40, 200, 1000])
def test_the_risk_is_as_promised_as_often_as_promised(population: str, n: int) -> None:
    shares, errors = POPULATIONS[population]
    tail = np.cumsum(shares[::-1])[::-1]
    risk = np.cumsum((shares * errors)[::-1])[::-1] / np.maximum(tail, 1e-12)
    generator = np.random.default_rng(0)
    policy = AbstentionPolicy(method="risk", target_risk=TARGET, confidence_level=CONFIDENCE)
    broken, coverage = 0, 0.0
    for _ in range(TRIALS):
        drawn = generator.choice(100, n, p=shares)
        threshold = policy.fit(LEVELS[drawn], generator.random(n) >= errors[drawn]).threshold_
        first = int(np.searchsorted(LEVELS, threshold))
        if first < 100 and tail[first] > 0:
            broken += risk[first] > TARGET + 1e-9
            coverage += tail[first] / TRIALS
    allowed = TRIALS * (1 - CONFIDENCE)
    assert broken <= allowed + 3 * np.sqrt(allowed * CONFIDENCE)
    if n == 1000 and population in ("wrong answers become rarer", "a step", "the most confident are wrong"):
        assert coverage > 0.6 * max(tail[risk <= TARGET])  # a promise kept by never answering is worth nothing


def test_what_is_sure_is_answered() -> None:
    policy = AbstentionPolicy(method="risk", target_risk=0.1)
    confidence, _ = sample(200)
    assert policy.fit(confidence, np.ones(200)).threshold_ == -np.inf
    assert policy.fit(confidence, np.zeros(200)).threshold_ == np.inf
    assert not policy.predict([1.0]).any()
    assert policy.score(confidence, np.zeros(200)) == 0
    assert policy.fit(confidence[:10], np.ones(10)).threshold_ == np.inf  # ten right answers show little
    split = policy.fit(confidence, confidence > 0.3).threshold_
    assert 0.2 < split < 0.4
    assert policy.predict([split, 0.2]).tolist() == [True, False]


# --- both


def test_saved_and_loaded(tmp_path: Path) -> None:
    confidence, correct = sample(100)
    for policy in (
        AbstentionPolicy(2).fit(confidence, correct),
        AbstentionPolicy(0).fit(confidence, correct),  # -inf
        AbstentionPolicy(np.int64(2), confidence_level=np.float64(0.9)).fit(confidence, correct),
        AbstentionPolicy(method="risk", target_risk=0.01, confidence_level=0.9).fit(confidence, correct),  # inf
    ):
        policy.save_pretrained(tmp_path / "new" / "folder")
        file = tmp_path / "new" / "folder" / "abstention.json"
        json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN or Infinity, which are not JSON
        loaded = AbstentionPolicy.from_pretrained(tmp_path / "new" / "folder")
        assert loaded.threshold_ == policy.threshold_
        assert loaded.get_params() == policy.get_params()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"parameters": {}, "threshold": "a"}',
        '{"parameters": {}, "threshold": "nan"}',
        '{"parameters": {"a": 1}}',
        '{"parameters": {"wrong_penalty": -1}, "threshold": 0.5}',
        '{"parameters": {"wrong_penalty": "x"}, "threshold": 0.5}',
    ],
)
def test_what_is_no_policy(tmp_path: Path, text: str) -> None:
    (tmp_path / "abstention.json").write_text(text)
    with pytest.raises(ValueError, match=r"abstention\.json: expected an abstention policy"):
        AbstentionPolicy.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        AbstentionPolicy.from_pretrained(tmp_path / "nowhere")


def test_not_fitted(tmp_path: Path) -> None:
    policy = clone(AbstentionPolicy(2).fit([0.5], [1]))
    for call in (
        lambda: policy.predict([0.5]),
        lambda: policy.score([0.5], [1]),
        lambda: policy.save_pretrained(tmp_path),
    ):
        with pytest.raises(NotFittedError, match="call fit first"):
            call()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "best"}, "method: expected 'score' or 'risk', got 'best'"),
        ({"wrong_penalty": -1}, "wrong_penalty: expected a number of 0 or more, got -1"),
        ({"wrong_penalty": float("nan")}, "wrong_penalty"),
        ({"method": "risk"}, "target_risk: expected a number between 0 and 1, got None"),
        ({"method": "risk", "target_risk": 1}, "target_risk"),
        ({"confidence_level": 1}, "confidence_level"),
    ],
)
def test_parameters_that_make_no_sense(parameters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AbstentionPolicy(**parameters).fit([0.5, 0.6], [1, 0])


def test_answers_that_cannot_be_used() -> None:
    policy, risk = AbstentionPolicy(), AbstentionPolicy(method="risk", target_risk=0.1)
    for arguments, message in (
        (([], []), "one row at least"),
        (([0.5, np.nan], [1, 0]), "confidence: .*got nan in row 1"),
        (([0.5], [2]), r"correct: expected numbers in \[0, 1\], got 2.0"),
        (([0.5, 0.6], [1]), "correct: expected 2 rows"),
        (([0.5], [1], ["a", "b"]), "groups: expected 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.fit(*arguments)
    with pytest.raises(ValueError, match="groups: expected None for method 'risk'"):
        risk.fit([0.5], [1], ["a"])
    with pytest.raises(ValueError, match=r"correct: expected 0 or 1, got 0\.5"):
        risk.fit([0.5], [0.5])
    with pytest.raises(ValueError, match="got nan"):
        policy.fit([0.5], [1]).predict([np.nan])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0, 1])), min_size=1, max_size=40),
    st.floats(0, 5),
)
def test_abstaining_is_never_worse_on_what_it_was_fitted_on(rows: Any, penalty: float) -> None:
    confidence, correct = np.transpose(rows)
    policy = AbstentionPolicy(penalty).fit(confidence, correct)
    always = 100 * decision_score(correct, confidence, -np.inf, wrong=-penalty)
    assert policy.score(confidence, correct) >= always - 1e-6
