"""What answering only where confidence is high enough gives and costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyqe._arrays import Floats, Missing
from pyqe.metrics._inputs import answers


@dataclass(frozen=True, eq=False)
class RiskCoverageCurve:
    """Risk of the answers whose confidence is a threshold or more; a point for each distinct confidence.

    Attributes:
        threshold: float64 [T], descending.
        coverage: float64 [T], share of the questions that are answered, ascending to 1.
        risk: float64 [T], share of the answers that are wrong.
    """

    threshold: Floats
    coverage: Floats
    risk: Floats


@dataclass(frozen=True, eq=False)
class ThresholdCurve:
    """What answering from a threshold on gives; a point for each distinct confidence.

    Attributes:
        threshold: float64 [T], ascending.
        precision: float64 [T], share of the answers that are right.
        recall: float64 [T], share of all right answers that are given; NaN where there is none.
        coverage: float64 [T], share of the questions that are answered, descending from 1.
        f1: float64 [T], harmonic mean of precision and recall.
    """

    threshold: Floats
    precision: Floats
    recall: Floats
    coverage: Floats
    f1: Floats


def risk_coverage_curve(correct: Any, confidence: Any, *, missing: Missing = "raise") -> RiskCoverageCurve:
    """Risk against coverage, for each threshold on the confidence.

    Args:
        correct: [N], in [0, 1].
        confidence: [N], any finite numbers.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Source: El-Yaniv and Wiener 2010; Geifman and El-Yaniv 2017 (arXiv 1705.08500).

    Example:
        >>> curve = risk_coverage_curve([1, 1, 0, 0], [0.9, 0.8, 0.8, 0.1])
        >>> curve.coverage
        array([0.25, 0.75, 1.  ])
    """
    right, sure = answers(correct, confidence, missing=missing)
    threshold, answered, hits = _by_threshold(right, sure)
    return RiskCoverageCurve(threshold, answered / len(right), 1 - hits / answered)


def aurc(correct: Any, confidence: Any, *, missing: Missing = "raise") -> float:
    """Area under the risk-coverage curve: mean risk over all coverages 1/N, 2/N, ... 1; lower is better.

    Answers of equal confidence come in random order, and the mean over all such orders is taken: the order of the rows
    is of no account.

    Arguments and errors are those of :func:`risk_coverage_curve`.

    Source: Geifman et al. 2019 (arXiv 1805.08206).

    Example:
        >>> aurc([1, 0], [0.9, 0.1]), aurc([1, 0], [0.5, 0.5])
        (0.25, 0.5)
    """
    right, sure = answers(correct, confidence, missing=missing)
    return float(1 - _mean_accuracies(right, sure).mean())


def prediction_rejection_ratio(
    correct: Any, confidence: Any, *, max_rejection: float = 1.0, missing: Missing = "raise"
) -> float:
    """How much of what a perfect order of the answers would give this one gives (PRR).

    Answers are rejected one by one, least confident first; the mean quality of the others, averaged over all
    rejections, is compared with that of a random order (0) and of the order by quality itself (1).

    Args:
        correct: [N], quality in [0, 1].
        confidence: [N], any finite numbers; ties as in :func:`aurc`.
        max_rejection: the share of answers up to which rejections are averaged.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Returns:
        At most 1; below 0 where a random order is better. NaN where all answers have the same quality.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Source: Malinin and Gales 2021 (arXiv 2002.07650), as Vashurin et al. 2025 (arXiv 2406.15627) compute it.

    Example:
        >>> prediction_rejection_ratio([1, 1, 0], [0.9, 0.8, 0.1])
        1.0
    """
    if not 0 < max_rejection <= 1:
        raise ValueError(f"max_rejection: expected a number above 0, at most 1, got {max_rejection}")
    right, sure = answers(correct, confidence, missing=missing)
    if right.min() == right.max():
        return np.nan
    first = len(right) - max(2, round(max_rejection * len(right)))  # one rejection at least, beside none
    ours, best = (_mean_accuracies(right, order)[first:].mean() - right.mean() for order in (sure, right))
    return float(ours / best)


def threshold_curve(correct: Any, confidence: Any, *, missing: Missing = "raise") -> ThresholdCurve:
    """Precision, recall, coverage and F1 for each threshold on the confidence.

    Arguments and errors are those of :func:`risk_coverage_curve`.

    Example:
        >>> curve = threshold_curve([1, 1, 0], [0.9, 0.5, 0.5])
        >>> curve.threshold, curve.recall
        (array([0.5, 0.9]), array([1. , 0.5]))
    """
    right, sure = answers(correct, confidence, missing=missing)
    threshold, answered, hits = (column[::-1] for column in _by_threshold(right, sure))
    total = right.sum()
    recall = hits / total if total else np.full(len(hits), np.nan)
    return ThresholdCurve(threshold, hits / answered, recall, answered / len(right), 2 * hits / (answered + total))


def decision_score(
    correct: Any,
    confidence: Any,
    threshold: float,
    *,
    right: float = 1.0,
    wrong: float = -1.0,
    abstain: float = 0.0,
    missing: Missing = "raise",
) -> float:
    """Mean payoff of answering where confidence is ``threshold`` or more, and of abstaining elsewhere.

    Args:
        correct: [N], in [0, 1]; a graded answer is paid in proportion.
        confidence: [N], any finite numbers.
        threshold: answers from here on; -inf: always, inf: never.
        right: payoff of a right answer.
        wrong: payoff of a wrong one.
        abstain: payoff of none.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows; threshold is NaN.

    Source: Plaut et al. 2024 (arXiv 2402.13213), with wrong = -1 ("balanced") and -2 ("conservative").

    Example:
        >>> decision_score([1, 0, 0, 1], [0.9, 0.8, 0.3, 0.7], 0.5, wrong=-2)
        0.0
    """
    if np.isnan(threshold):
        raise ValueError("threshold: expected a number, got nan")
    hits, sure = answers(correct, confidence, missing=missing)
    payoff = hits * right + (1 - hits) * wrong
    return float(np.where(sure >= threshold, payoff, abstain).mean())


def _by_threshold(right: Floats, sure: Floats) -> tuple[Floats, Floats, Floats]:
    """Distinct confidences, descending; how many answers have as much or more; how many of them are right."""
    order = np.argsort(-sure, kind="stable")
    sure, hits = sure[order], right[order].cumsum()
    last = np.flatnonzero(np.append(sure[1:] != sure[:-1], True))
    return sure[last], (last + 1).astype(np.float64), hits[last]


def _mean_accuracies(right: Floats, sure: Floats) -> Floats:
    """Accuracy of the 1, 2, ... N most confident answers; among ties, the mean over their orders."""
    _, answered, hits = _by_threshold(right, sure)
    n = np.arange(1, len(right) + 1)
    return np.interp(n, np.append(0, answered), np.append(0, hits)) / n
