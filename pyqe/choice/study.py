"""All figures about the confidences of a model, and how they go together over many models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pyqe import metrics
from pyqe._arrays import Floats, Integers, Missing, group_names, present, vector
from pyqe.choice.abstention import AbstentionPolicy

_UNDEFINED = metrics.AurocTest(math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class AbstentionResult:
    """What abstaining below a threshold is worth, on questions that had no part in choosing it.

    Attributes:
        wrong_penalty: c; a right answer is worth 1, a wrong one -c, none 0.
        threshold: of the confidence.
        base_score: 100 times the mean score where all questions are answered.
        score: 100 times the mean score with abstention.
        coverage: share of the questions that are answered.
    """

    wrong_penalty: float
    threshold: float
    base_score: float
    score: float
    coverage: float


@dataclass(frozen=True)
class Evaluation:
    """Figures about a series of answers; NaN where one is not defined (no answers, all right, no probabilities).

    Attributes:
        n: answers that count.
        omitted: rows left out because something was missing.
        accuracy: share of right answers.
        auroc: probability that a right answer has more confidence than a wrong one, with its Mann-Whitney p-value and
            bootstrap interval.
        average_precision: area under the precision-recall curve of the right answers.
        aurc: area under the risk-coverage curve.
        prediction_rejection_ratio: what the order by confidence gives of what a perfect order would.
        ece: expected calibration error, bins of equal width weighted by size.
        calibration_error: the same with bins of equal mass that count alike.
        maximum_calibration_error: over the bins of ``ece``.
        smooth_calibration_error: without bins.
        brier: mean squared distance between confidence and correctness.
        abstention: one result for each penalty; none where there are too few answers.
        groups: the evaluation of each group.
    """

    n: int
    omitted: int
    accuracy: float = math.nan
    auroc: metrics.AurocTest = _UNDEFINED
    average_precision: float = math.nan
    aurc: float = math.nan
    prediction_rejection_ratio: float = math.nan
    ece: float = math.nan
    calibration_error: float = math.nan
    maximum_calibration_error: float = math.nan
    smooth_calibration_error: float = math.nan
    brier: float = math.nan
    abstention: tuple[AbstentionResult, ...] = ()
    groups: dict[str, Evaluation] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has neither NaN nor infinity: None and "inf" or "-inf"."""
        return dict(_for_json(asdict(self)))


@dataclass(frozen=True)
class Correlation:
    """Pearson's r, and its two-sided p-value."""

    r: float
    p_value: float


@dataclass(frozen=True)
class CorrelationStudy:
    """Whether models that are right more often know better when they are.

    Attributes:
        n_models: number of models.
        auroc: of accuracy with AUROC.
        ece: of accuracy with expected calibration error.
    """

    n_models: int
    auroc: Correlation
    ece: Correlation


def evaluate(
    confidence: Any,
    correct: Any,
    *,
    groups: Any = None,
    probability: bool = True,
    n_bins: int = 10,
    penalties: Sequence[float] = (1, 2),
    n_train: int = 20,
    n_bootstrap: int = 1000,
    seed: int = 0,
    missing: Missing = "raise",
) -> Evaluation:
    """Accuracy, ranking, calibration and abstention.

    Args:
        confidence: [N].
        correct: [N], 0 or 1.
        groups: [N], names (of datasets, say); each is evaluated on its own, too.
        probability: whether confidences are probabilities: calibration errors and the Brier score are for those alone.
        n_bins: of the calibration errors.
        penalties: of wrong answers, for abstention.
        n_train: questions of each group, drawn at random, but half of it at the most, on which the threshold for
            abstention is chosen; the others are scored, and all groups count alike.
        n_bootstrap: resamples for the interval of the AUROC; 0: none.
        seed: of what is drawn.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out, and counted.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Source: Plaut et al. 2024 (arXiv 2402.13213).

    Example:
        >>> result = evaluate([0.9, 0.8, 0.7, 0.4], [1, 1, 0, 0])
        >>> result.accuracy, result.auroc.auroc
        (0.5, 1.0)
    """
    sure = vector(confidence, "confidence", missing=missing)
    right = vector(correct, "correct", low=0, high=1, length=len(sure), missing=missing)
    names, numbers = group_names(np.zeros(len(sure)) if groups is None else groups, "groups", length=len(sure))
    rows = present(sure, right)
    if not rows.any():
        raise ValueError("confidence: expected one row at least, got none")
    settings = _Settings(probability, n_bins, tuple(penalties), n_train, n_bootstrap, seed)
    parts = {}
    for number, name in enumerate(names if groups is not None else ()):
        part = numbers == number
        parts[str(name)] = _evaluate(sure[part], right[part], rows[part], numbers[part], settings)
    return replace(_evaluate(sure, right, rows, numbers, settings), groups=parts)


def correlation_study(evaluations: Mapping[str, Evaluation | Sequence[Evaluation]]) -> CorrelationStudy:
    """Correlation, over models, of accuracy with AUROC and with calibration error.

    Args:
        evaluations: of each model one, or several (one for each dataset, say) whose figures are averaged.

    Raises:
        ValueError: fewer than three models, or one whose AUROC or calibration error is not defined.

    Source: Plaut et al. 2024 (arXiv 2402.13213).

    Example:
        >>> good, fair = evaluate([0.9, 0.8, 0.3], [1, 1, 0]), evaluate([0.9, 0.8, 0.3], [1, 0, 0])
        >>> poor = evaluate([0.9, 0.8, 0.3], [0, 1, 0])
        >>> round(correlation_study({"good": good, "fair": fair, "poor": poor}).auroc.r, 2)
        0.5
    """
    if len(evaluations) < 3:
        raise ValueError(f"evaluations: expected three models or more, got {len(evaluations)}")
    means = []
    for model, given in evaluations.items():
        series = [given] if isinstance(given, Evaluation) else given
        means.append(np.mean([(one.accuracy, one.auroc.auroc, one.ece) for one in series], axis=0))
        if np.isnan(means[-1]).any():
            raise ValueError(f"evaluations: AUROC or calibration error of {model} is not defined")
    accuracy, auroc, ece = np.transpose(means)
    return CorrelationStudy(len(means), _correlation(accuracy, auroc), _correlation(accuracy, ece))


@dataclass(frozen=True)
class _Settings:
    """Arguments of :func:`evaluate` that hold for each group."""

    probability: bool
    n_bins: int
    penalties: tuple[float, ...]
    n_train: int
    n_bootstrap: int
    seed: int


def _evaluate(
    sure: Floats, right: Floats, rows: NDArray[np.bool_], numbers: Integers, settings: _Settings
) -> Evaluation:
    """The evaluation of those rows in which nothing is missing; ``numbers`` are those of the groups."""
    omitted = len(rows) - int(rows.sum())
    if omitted == len(rows):
        return Evaluation(0, omitted)
    sure, right, numbers = sure[rows], right[rows], numbers[rows]
    generator = np.random.default_rng(settings.seed)
    return Evaluation(
        n=len(sure),
        omitted=omitted,
        accuracy=float(right.mean()),
        auroc=metrics.auroc_test(right, sure, n_bootstrap=settings.n_bootstrap, seed=generator),
        average_precision=metrics.average_precision(right, sure),
        aurc=metrics.aurc(right, sure),
        prediction_rejection_ratio=metrics.prediction_rejection_ratio(right, sure),
        abstention=_abstention(sure, right, numbers, settings, generator),
        **(_calibration(right, sure, settings.n_bins) if settings.probability else {}),
    )


def _calibration(right: Floats, sure: Floats, n_bins: int) -> dict[str, Any]:
    return {
        "ece": metrics.expected_calibration_error(right, sure, n_bins=n_bins),
        "calibration_error": metrics.expected_calibration_error(
            right, sure, n_bins=n_bins, strategy="quantile", weighted=False
        ),
        "maximum_calibration_error": metrics.maximum_calibration_error(right, sure, n_bins=n_bins),
        "smooth_calibration_error": metrics.smooth_calibration_error(right, sure),
        "brier": metrics.brier_score(right, sure),
    }


def _abstention(
    sure: Floats, right: Floats, numbers: Integers, settings: _Settings, generator: np.random.Generator
) -> tuple[AbstentionResult, ...]:
    train = np.zeros(len(sure), dtype=bool)
    for number in np.unique(numbers):
        members = generator.permutation(np.flatnonzero(numbers == number))
        train[members[: min(settings.n_train, len(members) // 2)]] = True
    if not train.any():
        return ()
    test = ~train
    results = []
    for penalty in settings.penalties:
        policy, always = AbstentionPolicy(penalty), AbstentionPolicy(penalty)
        policy.fit(sure[train], right[train], numbers[train])
        always.threshold_ = -math.inf
        base, score = (one.score(sure[test], right[test], numbers[test]) for one in (always, policy))
        coverage = float(policy.predict(sure[test]).mean())
        results.append(AbstentionResult(penalty, policy.threshold_, base, score, coverage))
    return tuple(results)


def _correlation(x: Floats, y: Floats) -> Correlation:
    result = stats.pearsonr(x, y)
    return Correlation(float(result.statistic), float(result.pvalue))


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _for_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
