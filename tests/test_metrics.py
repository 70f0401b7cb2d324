"""Calibration, ranking and selection, against other libraries, definitions and each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import permutations
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from netcal.metrics import ECE, MCE
from scipy import stats
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve

from pyqe import metrics
from pyqe.metrics._quantiles import quantiles

SINGLE = [  # of correctness and confidence
    metrics.reliability_curve,
    metrics.expected_calibration_error,
    metrics.maximum_calibration_error,
    metrics.smooth_calibration_error,
    metrics.brier_score,
    metrics.brier_decomposition,
    metrics.auroc,
    metrics.auroc_test,
    metrics.average_precision,
    metrics.risk_coverage_curve,
    metrics.aurc,
    metrics.prediction_rejection_ratio,
    metrics.threshold_curve,
    lambda correct, confidence, **options: metrics.decision_score(correct, confidence, 0.5, **options),
]
BY_CLASS = [  # of labels and probabilities
    metrics.classwise_calibration_error,
    metrics.adaptive_calibration_error,
    metrics.negative_log_likelihood,
    lambda labels, probs, **options: metrics.top_label(labels, probs, **options)[1],
]
PROBABILITY = SINGLE[:6]


def sample(n: int, seed: int = 0, *, levels: int | None = None) -> tuple[Any, Any]:
    """Overconfident answers; with ``levels``, many of equal confidence."""
    generator = np.random.default_rng(seed)
    confidence = generator.random(n)
    if levels is not None:
        confidence = np.round(confidence * levels) / levels
    return (generator.random(n) < confidence**1.5).astype(int), confidence


def class_sample(n: int, classes: int, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.ones(classes), size=n)
    return generator.integers(classes, size=n), probs


def flat(result: Any) -> Any:
    """The numbers of a result."""
    if isinstance(result, (float, np.ndarray)):
        return np.atleast_1d(result)
    return np.concatenate([np.atleast_1d(value) for value in vars(result).values()])


# --- what all have in common


@pytest.mark.parametrize("metric", SINGLE)
@pytest.mark.parametrize("levels", [None, 20])
def test_the_dtype_of_the_input_makes_no_difference(metric: Callable[..., Any], levels: int | None) -> None:
    correct, confidence = sample(300, levels=levels)
    expected = flat(metric(correct, confidence))
    single = confidence.astype(np.float32)
    inputs = [
        (correct.astype(bool), single),
        (torch.tensor(correct), torch.tensor(single, requires_grad=True)),
        (correct.tolist(), np.repeat(single, 2)[::2]),
    ]
    for given_correct, given_confidence in inputs:
        np.testing.assert_allclose(flat(metric(given_correct, given_confidence)), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("metric", SINGLE)
def test_the_order_of_the_rows_makes_no_difference(metric: Callable[..., Any]) -> None:
    correct, confidence = sample(200, levels=10)
    order = np.random.default_rng(1).permutation(200)
    if metric is metrics.auroc_test:  # all but what is drawn
        metric = lambda *arguments: metrics.auroc_test(*arguments, n_bootstrap=0)  # noqa: E731
    np.testing.assert_allclose(flat(metric(correct[order], confidence[order])), flat(metric(correct, confidence)))


@pytest.mark.parametrize("metric", [*SINGLE, *BY_CLASS])
def test_nan_raises_or_is_left_out(metric: Callable[..., Any]) -> None:
    first, second = class_sample(50, 3) if metric in BY_CLASS else sample(50)
    broken, labels = second.copy(), first.astype(float)
    broken[3], labels[7] = np.nan, np.nan
    rows = np.delete(np.arange(50), [3, 7])
    for arguments in ((first, broken), (labels, second)):
        with pytest.raises(ValueError, match="got nan in row"):
            metric(*arguments)
    np.testing.assert_array_equal(flat(metric(labels, broken, missing="omit")), flat(metric(first[rows], second[rows])))
    with pytest.raises(ValueError, match="one row at least"):
        metric([None, 1], [second[0], None] if second.ndim == 1 else broken[3:5] * np.nan, missing="omit")


@pytest.mark.parametrize("metric", [*SINGLE, *BY_CLASS])
def test_what_cannot_be_used_raises(metric: Callable[..., Any]) -> None:
    first, second = class_sample(5, 3) if metric in BY_CLASS else sample(5)
    with pytest.raises(ValueError, match="one row at least"):
        metric(first[:0], second[:0])
    with pytest.raises(ValueError, match="rows"):
        metric(first, second[:4])
    with pytest.raises(ValueError, match="shape"):
        metric(first[None], second)
    with pytest.raises(TypeError, match="numbers"):
        metric(first, second.astype(str))
    with pytest.raises(ValueError, match="got inf in row 0"):
        metric(first, np.where(np.arange(5) == 0, np.inf, second.T).T)


@pytest.mark.parametrize("metric", PROBABILITY)
@pytest.mark.parametrize("confidence", [[1.0001, 0.5], [-0.1, 0.5]])
def test_a_probability_is_between_0_and_1(metric: Callable[..., Any], confidence: list[float]) -> None:
    with pytest.raises(ValueError, match=r"confidence: expected numbers in \[0, 1\]"):
        metric([0, 1], confidence)


def test_truth_comes_first() -> None:
    for name in metrics.__all__:
        parameters = list(inspect.signature(getattr(metrics, name)).parameters)
        if name.islower():
            assert parameters[:2] in (["correct", "confidence"], ["labels", "probs"]), name


# --- calibration


def binned(correct: Any, confidence: Any, edges: Any) -> list[tuple[int, float]]:
    """Size and gap of the bins that are not empty, by definition; numbers that float32 cannot tell apart are equal."""
    edges, single = edges.astype(np.float32), confidence.astype(np.float32)
    bins = []
    for k in range(len(edges) - 1):
        last = k == len(edges) - 2
        inside = (single >= edges[k]) & ((single <= edges[k + 1]) if last else (single < edges[k + 1]))
        if inside.any():
            bins.append((inside.sum(), abs(correct[inside].mean() - confidence[inside].mean())))
    return bins


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
@pytest.mark.parametrize("n_bins", [1, 3, 10, 300])
@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_calibration_errors_by_definition(n: int, n_bins: int, strategy: Any) -> None:
    correct, confidence = sample(n)
    shares = np.linspace(0, 1, n_bins + 1)
    edges = shares if strategy == "uniform" else np.quantile(confidence, shares)
    sizes, gaps = np.transpose(binned(correct, confidence, edges))
    options = {"n_bins": n_bins, "strategy": strategy}
    error = metrics.expected_calibration_error
    assert error(correct, confidence, **options) == pytest.approx(np.average(gaps, weights=sizes))
    assert error(correct, confidence, weighted=False, **options) == pytest.approx(gaps.mean())
    assert metrics.maximum_calibration_error(correct, confidence, **options) == pytest.approx(gaps.max())


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_reliability_as_scikit_learn_has_it(strategy: str) -> None:
    correct, confidence = sample(500)
    curve = metrics.reliability_curve(correct, confidence, strategy=strategy)  # type: ignore[arg-type]
    accuracy, mean = calibration_curve(correct, confidence, n_bins=10, strategy=strategy)
    np.testing.assert_allclose(curve.accuracy, accuracy)
    np.testing.assert_allclose(curve.confidence, mean)
    assert curve.count.sum() == 500


def test_ece_as_netcal_has_it() -> None:
    correct, confidence = sample(2000)
    assert metrics.expected_calibration_error(correct, confidence, n_bins=15) == pytest.approx(
        ECE(15).measure(confidence, correct), abs=1e-12
    )
    assert metrics.maximum_calibration_error(correct, confidence, n_bins=15) == pytest.approx(
        MCE(15).measure(confidence, correct), abs=1e-12
    )


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_a_confidence_of_exactly_1_counts(strategy: Any) -> None:
    assert metrics.expected_calibration_error([0, 0], [1.0, 1.0], strategy=strategy) == 1
    assert metrics.expected_calibration_error([1, 0], [1.0, 0.0], strategy=strategy) == 0
    assert metrics.reliability_curve([0, 0, 1], [1.0, 1.0, 0.0], strategy=strategy).count.sum() == 3


@pytest.mark.parametrize("n_bins", [2, 3, 5, 7, 10, 20, 100])
def test_decimals_lie_in_the_bin_that_they_open(n_bins: int) -> None:
    for k in range(1, n_bins):
        edge = k / n_bins
        for confidence in (edge, float(np.float32(edge)), k * (1 / n_bins), np.nextafter(edge, 0)):
            assert metrics.reliability_curve([1], [confidence], n_bins=n_bins).count[k] == 1
        assert metrics.reliability_curve([1], [edge - 1e-6], n_bins=n_bins).count[k - 1] == 1


def test_bins_by_edges() -> None:
    correct, confidence = sample(200)
    edges = metrics.reliability_curve(correct, confidence, strategy="quantile").edges
    for weighted in (False, True):
        error = metrics.expected_calibration_error(correct, confidence, n_bins=edges, weighted=weighted)
        assert error == metrics.expected_calibration_error(correct, confidence, strategy="quantile", weighted=weighted)
    for wrong, message in (
        ([0.5], "two or more ascending edges"),
        ([1, 0], "two or more ascending edges"),
        ([0, 0.5], "edges that span the confidences"),
        (0, "expected 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=f"n_bins: .*{message}"):
            metrics.expected_calibration_error(correct, confidence, n_bins=wrong)
    with pytest.raises(ValueError, match="strategy: 'quantile' makes edges of its own"):
        metrics.expected_calibration_error(correct, confidence, n_bins=[0, 1], strategy="quantile")
    with pytest.raises(ValueError, match="strategy: expected 'uniform' or 'quantile', got 'mass'"):
        metrics.expected_calibration_error(correct, confidence, strategy="mass")  # type: ignore[arg-type]


def test_intervals_of_the_reliability_curve() -> None:
    correct = np.repeat([1, 0, 1], [7, 3, 4])
    curve = metrics.reliability_curve(correct, np.repeat([0.6, 0.6, 1.0], [7, 3, 4]), n_bins=4, confidence_level=0.9)
    for k, (hits, n) in {2: (7, 10), 3: (4, 4)}.items():
        expected = stats.binomtest(hits, n).proportion_ci(0.9, method="wilson")
        assert (curve.low[k], curve.high[k]) == pytest.approx((expected.low, expected.high))
    assert np.isnan([curve.accuracy[0], curve.confidence[0], curve.low[0], curve.high[0]]).all()
    with pytest.raises(ValueError, match="confidence_level"):
        metrics.reliability_curve(correct, correct, confidence_level=1)


def test_graded_correctness_counts_in_part() -> None:
    assert metrics.expected_calibration_error([0.5, 0.5], [0.5, 0.5]) == 0
    assert metrics.brier_score([0.5, 1], [0.5, 1]) == 0
    assert metrics.aurc([0.5, 0.5], [0.1, 0.2]) == 0.5
    for metric in (metrics.auroc, metrics.auroc_test, metrics.average_precision):
        with pytest.raises(ValueError, match=r"correct: expected 0 or 1, got 0.5"):
            metric([0.5, 1], [0.5, 1])


def test_classwise_errors_by_definition() -> None:
    labels, probs = class_sample(400, 4)
    classwise, adaptive = [], []
    for k in range(4):
        correct = (labels == k).astype(float)
        sizes, gaps = np.transpose(binned(correct, probs[:, k], np.linspace(0, 1, 11)))
        classwise.append(np.average(gaps, weights=sizes))
        order = np.argsort(probs[:, k])
        parts = np.array_split(order, 10)  # no ties: equal mass
        adaptive.append(np.mean([abs(correct[part].mean() - probs[part, k].mean()) for part in parts]))
    assert metrics.classwise_calibration_error(labels, probs) == pytest.approx(np.mean(classwise))
    assert metrics.adaptive_calibration_error(labels, probs) == pytest.approx(np.mean(adaptive))


def test_top_label() -> None:
    labels, probs = class_sample(100, 5)
    correct, confidence = metrics.top_label(labels, probs.astype(np.float32))
    np.testing.assert_array_equal(correct, probs.argmax(1) == labels)
    np.testing.assert_array_equal(confidence, probs.max(1).astype(np.float32).astype(float))
    for wrong in ([5], [-1]):
        with pytest.raises(ValueError, match="labels: expected numbers from 0 to 4"):
            metrics.top_label(wrong, probs[:1])
    with pytest.raises(TypeError, match="labels"):
        metrics.top_label([0.5], probs[:1])


def smoothed_error(correct: Any, confidence: Any, width: float) -> float:
    """The integral at a width, with the reflected kernel summed over its images."""
    t = (np.arange(2000) + 0.5) / 2000
    images = np.concatenate([confidence + 2 * k for k in range(-3, 4)] + [-confidence + 2 * k for k in range(-3, 4)])
    kernel = stats.norm.pdf(t[:, None], images, width)
    return float(np.abs(kernel @ np.tile(correct - confidence, 14)).mean() / len(confidence))


@pytest.mark.parametrize(("n", "seed"), [(5, 0), (50, 1), (400, 2)])
def test_smooth_calibration_error_is_its_own_width(n: int, seed: int) -> None:
    correct, confidence = sample(n, seed)
    error = metrics.smooth_calibration_error(correct, confidence)
    assert smoothed_error(correct, confidence, error) == pytest.approx(error, abs=1e-4)


@pytest.mark.parametrize(("confidence", "expected"), [(0.5, 0.3), (1.0, 0.2), (0.8, 0.0), (0.0, 0.8)])
def test_smooth_calibration_error_of_a_single_confidence(confidence: float, expected: float) -> None:
    error = metrics.smooth_calibration_error(np.repeat([1, 0], [80, 20]), np.full(100, confidence))
    assert error == pytest.approx(expected, abs=1e-4)


def test_brier_score_and_nll_as_scikit_learn_has_them() -> None:
    correct, confidence = sample(300)
    assert metrics.brier_score(correct, confidence) == pytest.approx(sklearn.brier_score_loss(correct, confidence))
    labels, probs = class_sample(300, 4)
    expected = sklearn.log_loss(labels, probs, labels=range(4))
    assert metrics.negative_log_likelihood(labels, probs) == pytest.approx(expected)


def test_nll_of_a_zero_is_infinite_without_a_floor() -> None:
    assert metrics.negative_log_likelihood([0], [[0.0, 1.0]]) == np.inf
    assert metrics.negative_log_likelihood([0], [[0.0, 1.0]], eps=1e-3) == pytest.approx(np.log(1e3))
    with pytest.raises(ValueError, match="eps"):
        metrics.negative_log_likelihood([0], [[0.0, 1.0]], eps=-1)


binary = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.floats(0, 1)), min_size=1, max_size=60)


@settings(deadline=None)
@given(rows=binary, n_bins=st.integers(1, 12), strategy=st.sampled_from(["uniform", "quantile"]))
def test_parts_of_the_brier_score_add_up(rows: Any, n_bins: int, strategy: Any) -> None:
    correct, confidence = np.transpose(rows)
    parts = metrics.brier_decomposition(correct, confidence, n_bins=n_bins, strategy=strategy)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin
    assert total == pytest.approx(metrics.brier_score(correct, confidence), abs=1e-12)
    assert min(parts.reliability, parts.resolution, parts.uncertainty) >= 0
    assert parts.resolution <= parts.uncertainty + 1e-12


@settings(deadline=None)
@given(rows=binary, n_bins=st.integers(1, 12), strategy=st.sampled_from(["uniform", "quantile"]))
def test_calibration_errors_are_ordered(rows: Any, n_bins: int, strategy: Any) -> None:
    correct, confidence = np.transpose(rows)
    options = {"n_bins": n_bins, "strategy": strategy}
    expected = metrics.expected_calibration_error(correct, confidence, **options)
    largest = metrics.maximum_calibration_error(correct, confidence, **options)
    assert abs(correct.mean() - confidence.mean()) - 1e-12 <= expected <= largest + 1e-12 <= 1 + 1e-12
    assert metrics.reliability_curve(correct, confidence, **options).count.sum() == len(correct)


@settings(max_examples=200, deadline=None)
@given(
    values=arrays.arrays(np.float64, st.integers(1, 50), elements=st.floats(0, 1)),
    shares=arrays.arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1)),
)
def test_quantiles_are_those_of_numpy(values: Any, shares: Any) -> None:
    np.testing.assert_allclose(quantiles(values, shares), np.quantile(values, shares), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("power", [0.01, 1, 30])
def test_quantiles_of_many(power: float) -> None:
    values = np.random.default_rng(0).random(100_000) ** power
    values[::7] = 1
    shares = np.arange(11) / 10
    np.testing.assert_allclose(quantiles(values, shares), np.quantile(values, shares), rtol=1e-12)


# --- ranking


@pytest.mark.parametrize("levels", [None, 5])
def test_ranking_as_scikit_learn_has_it(levels: int | None) -> None:
    correct, confidence = sample(400, levels=levels)
    assert metrics.auroc(correct, confidence) == pytest.approx(sklearn.roc_auc_score(correct, confidence))
    assert metrics.average_precision(correct, confidence) == pytest.approx(
        sklearn.average_precision_score(correct, confidence)
    )
    assert metrics.average_precision(correct, confidence, positive="wrong") == pytest.approx(
        sklearn.average_precision_score(1 - correct, -confidence)
    )
    with pytest.raises(ValueError, match="positive: expected 'correct' or 'wrong', got 'right'"):
        metrics.average_precision(correct, confidence, positive="right")  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(-3, 3)), min_size=1, max_size=20),
    scale=st.floats(0.01, 100),
)
def test_auroc_by_definition(rows: Any, scale: float) -> None:
    correct, confidence = np.transpose(rows)
    pairs = np.sign(confidence[correct == 1][:, None] - confidence[correct == 0])
    area = metrics.auroc(correct, confidence * scale)
    assert area == pytest.approx((pairs.mean() + 1) / 2) if pairs.size else np.isnan(area)


@pytest.mark.parametrize("correct", [[1, 1, 1], [0, 0, 0]])
def test_one_class_has_no_ranking(correct: list[int]) -> None:
    confidence = [0.1, 0.2, 0.3]
    assert np.isnan(metrics.auroc(correct, confidence))
    assert np.isnan(flat(metrics.auroc_test(correct, confidence))).all()
    assert np.isnan(metrics.prediction_rejection_ratio(correct, confidence))
    assert np.isnan(metrics.average_precision(correct, confidence)) == (correct[0] == 0)
    assert np.isnan(metrics.average_precision(correct, confidence, positive="wrong")) == (correct[0] == 1)


@pytest.mark.parametrize(("n", "levels"), [(12, None), (300, None), (300, 4)])
def test_mann_whitney(n: int, levels: int | None) -> None:
    correct, confidence = sample(n, levels=levels)
    result = metrics.auroc_test(correct, confidence, n_bootstrap=0)
    expected = stats.mannwhitneyu(confidence[correct == 1], confidence[correct == 0])
    assert result.p_value == pytest.approx(expected.pvalue)
    assert result.auroc == metrics.auroc(correct, confidence)
    assert np.isnan([result.low, result.high]).all()


def test_bootstrap_interval_by_definition() -> None:
    correct, confidence = sample(250, levels=30)
    generator = np.random.default_rng(5)
    resampled = []
    for _ in range(2000):
        rows = generator.integers(250, size=250)
        resampled.append(metrics.auroc(correct[rows], confidence[rows]))
    expected = np.quantile(resampled, [0.05, 0.95])
    result = metrics.auroc_test(correct, confidence, n_bootstrap=2000, confidence_level=0.9)
    assert (result.low, result.high) == pytest.approx(expected, abs=0.006)


def test_bootstrap_interval_of_many_rows() -> None:
    correct, confidence = sample(150_000)  # merged into levels
    result = metrics.auroc_test(correct, confidence, n_bootstrap=200)
    error = np.sqrt(result.auroc * (1 - result.auroc) / 75_000)
    assert result.low < result.auroc < result.high
    assert error < result.high - result.low < 4 * error
    assert (result.low + result.high) / 2 == pytest.approx(result.auroc, abs=error)


def test_the_seed_decides_the_interval() -> None:
    correct, confidence = sample(100)
    first, again, other = (metrics.auroc_test(correct, confidence, seed=seed, n_bootstrap=50) for seed in (1, 1, 2))
    assert first == again != other
    with pytest.raises(ValueError, match="n_bootstrap"):
        metrics.auroc_test(correct, confidence, n_bootstrap=-1)
    with pytest.raises(ValueError, match="confidence_level"):
        metrics.auroc_test(correct, confidence, confidence_level=0)


# --- selection


@pytest.mark.parametrize("levels", [None, 8])
def test_risk_and_coverage_by_definition(levels: int | None) -> None:
    correct, confidence = sample(100, levels=levels)
    curve = metrics.risk_coverage_curve(correct, confidence)
    np.testing.assert_array_equal(curve.threshold, np.unique(confidence)[::-1])
    for threshold, coverage, risk in zip(curve.threshold, curve.coverage, curve.risk, strict=True):
        answered = confidence >= threshold
        assert coverage == pytest.approx(answered.mean())
        assert risk == pytest.approx(1 - correct[answered].mean())


@pytest.mark.parametrize("levels", [None, 8])
def test_thresholds_as_scikit_learn_has_them(levels: int | None) -> None:
    correct, confidence = sample(100, levels=levels)
    curve = metrics.threshold_curve(correct, confidence)
    precision, recall, threshold = sklearn.precision_recall_curve(correct, confidence)
    np.testing.assert_allclose(curve.threshold, threshold)
    np.testing.assert_allclose(curve.precision, precision[:-1])
    np.testing.assert_allclose(curve.recall, recall[:-1])
    for k in (0, len(threshold) // 2):
        assert curve.f1[k] == pytest.approx(sklearn.f1_score(correct, confidence >= threshold[k]))
        assert curve.coverage[k] == pytest.approx(np.mean(confidence >= threshold[k]))


def test_thresholds_without_a_right_answer() -> None:
    curve = metrics.threshold_curve([0, 0], [0.5, 0.7])
    assert np.isnan(curve.recall).all()
    assert (curve.precision == 0).all()
    assert (curve.f1 == 0).all()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2)), min_size=1, max_size=6))
def test_ties_are_averaged_over_their_orders(rows: Any) -> None:
    correct, confidence = np.transpose(rows)
    n = np.arange(1, len(rows) + 1)
    risks = [
        np.mean(1 - correct[list(order)].cumsum() / n)
        for order in permutations(range(len(rows)))
        if (np.diff(confidence[list(order)]) <= 0).all()
    ]
    assert metrics.aurc(correct, confidence) == pytest.approx(np.mean(risks))


def test_prediction_rejection_ratio_by_definition() -> None:
    correct, confidence = sample(60)
    n = np.arange(1, 61)

    def area(order: Any) -> Any:
        return (correct[np.argsort(-order)].cumsum() / n)[30:].mean()

    expected = (area(confidence) - correct.mean()) / (area(correct) - correct.mean())
    assert metrics.prediction_rejection_ratio(correct, confidence, max_rejection=0.5) == pytest.approx(expected)
    assert metrics.prediction_rejection_ratio(correct, correct) == 1
    assert metrics.prediction_rejection_ratio(correct, np.zeros(60)) == pytest.approx(0)
    assert metrics.prediction_rejection_ratio(correct, -correct) < 0
    assert metrics.prediction_rejection_ratio([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1], max_rejection=0.01) == 1
    with pytest.raises(ValueError, match="max_rejection"):
        metrics.prediction_rejection_ratio(correct, confidence, max_rejection=0)


@settings(deadline=None)
@given(rows=binary, threshold=st.floats(0, 1), wrong=st.floats(-5, 0))
def test_decision_score_by_definition(rows: Any, threshold: float, wrong: float) -> None:
    correct, confidence = np.transpose(rows)
    payoffs = [0.25 if c < threshold else (2 if y else wrong) for y, c in rows]
    score = metrics.decision_score(correct, confidence, threshold, right=2, wrong=wrong, abstain=0.25)
    assert score == pytest.approx(np.mean(payoffs))


def test_decision_score_at_the_ends() -> None:
    correct, confidence = sample(100)
    always, never = (metrics.decision_score(correct, confidence, threshold) for threshold in (-np.inf, np.inf))
    assert always == pytest.approx(2 * correct.mean() - 1)
    assert never == 0
    with pytest.raises(ValueError, match="threshold: expected a number, got nan"):
        metrics.decision_score(correct, confidence, np.nan)


# --- real answers


def test_figures_of_real_softmax_outputs(data_folder: Any) -> None:
    with np.load(data_folder / "cifar_softmax" / "lenet5_cifar10.npz") as data:
        correct, confidence = metrics.top_label(data["label"], data["probs"])
    second_half = slice(len(correct) // 2, None)
    error = metrics.expected_calibration_error(correct[second_half], confidence[second_half])
    assert error == pytest.approx(0.119, abs=0.02)
    halved = metrics.expected_calibration_error(correct, confidence.astype(np.float16))
    assert halved == pytest.approx(metrics.expected_calibration_error(correct, confidence), abs=1e-3)
