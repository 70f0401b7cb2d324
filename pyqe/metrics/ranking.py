"""Whether right answers have more confidence than wrong ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats
from sklearn.metrics import average_precision_score

from pyqe._arrays import Floats, Integers, Missing
from pyqe.metrics._inputs import answers

_LEVELS = 4096  # of confidence, that resamples tell apart where there are more
_RESAMPLED_BY_ROW = 100_000  # more rows than these are drawn as counts of levels, which costs the same for any number


@dataclass(frozen=True)
class AurocTest:
    """AUROC, and how far it can be trusted; all NaN where the answers are all right or all wrong.

    Attributes:
        auroc: probability that a right answer has more confidence than a wrong one; ties count half.
        p_value: of the two-sided Mann-Whitney U test: that chance alone gives an AUROC as far from .5.
        low: lower end of the bootstrap percentile interval of the AUROC; NaN where there is no interval.
        high: its upper end.
    """

    auroc: float
    p_value: float
    low: float
    high: float


def auroc(correct: Any, confidence: Any, *, missing: Missing = "raise") -> float:
    """Area under the ROC curve: probability that a right answer has more confidence than a wrong one.

    Args:
        correct: [N], 0 or 1.
        confidence: [N], any finite numbers.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Returns:
        A number in [0, 1]; ties count half. NaN where the answers are all right or all wrong.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Example:
        >>> auroc([1, 1, 0], [0.9, 0.4, 0.4])
        0.75
    """
    right, sure = answers(correct, confidence, missing=missing, binary=True)
    return _auroc(right, stats.rankdata(sure))


def auroc_test(
    correct: Any,
    confidence: Any,
    *,
    n_bootstrap: int = 1000,
    confidence_level: float = 0.95,
    seed: int | np.random.Generator = 0,
    missing: Missing = "raise",
) -> AurocTest:
    """AUROC with its Mann-Whitney p-value and bootstrap percentile interval.

    Args:
        correct: [N], 0 or 1.
        confidence: [N], any finite numbers.
        n_bootstrap: resamples; 0: no interval. The rows are sorted once, not once for each.
        confidence_level: of the interval.
        seed: of the resamples.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Source: Plaut et al. 2024 (arXiv 2402.13213), who count p < 1e-4 as significant.

    Example:
        >>> result = auroc_test([1, 1, 1, 0, 0, 0], [0.9, 0.8, 0.4, 0.5, 0.2, 0.1])
        >>> round(result.auroc, 3), round(result.p_value, 3)
        (0.889, 0.2)
    """
    if n_bootstrap < 0:
        raise ValueError(f"n_bootstrap: expected 0 or more, got {n_bootstrap}")
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level: expected a number between 0 and 1, got {confidence_level}")
    right, sure = answers(correct, confidence, missing=missing, binary=True)
    if right.min() == right.max():
        return AurocTest(np.nan, np.nan, np.nan, np.nan)
    ranks = stats.rankdata(sure)
    area = _auroc(right, ranks)
    p_value = float(stats.mannwhitneyu(sure[right == 1], sure[right == 0]).pvalue)
    if not n_bootstrap:
        return AurocTest(area, p_value, np.nan, np.nan)
    resampled = _bootstrap(right, ranks, n_bootstrap, np.random.default_rng(seed))
    tail = (1 - confidence_level) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return AurocTest(area, p_value, float(low), float(high))


def average_precision(
    correct: Any,
    confidence: Any,
    *,
    positive: Literal["correct", "wrong"] = "correct",
    missing: Missing = "raise",
) -> float:
    """Area under the precision-recall curve, as the mean of the precisions (AUPR).

    Args:
        correct: [N], 0 or 1.
        confidence: [N], any finite numbers.
        positive: what is looked for: right answers, from the top of the confidences, or wrong ones, from the bottom.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Returns:
        A number in [0, 1]; NaN where there is nothing to look for. A random order gives the share of the positives.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Example:
        >>> average_precision([1, 1, 0], [0.9, 0.8, 0.3], positive="wrong")
        1.0
    """
    if positive not in ("correct", "wrong"):
        raise ValueError(f"positive: expected 'correct' or 'wrong', got {positive!r}")
    right, sure = answers(correct, confidence, missing=missing, binary=True)
    truth, score = (right, sure) if positive == "correct" else (1 - right, -sure)
    return float(average_precision_score(truth, score)) if truth.any() else np.nan


def _auroc(right: Floats, ranks: Floats) -> float:
    positives = right.sum()
    negatives = len(right) - positives
    if positives == 0 or negatives == 0:
        return np.nan
    return float((ranks @ right - positives * (positives + 1) / 2) / (positives * negatives))


def _bootstrap(right: Floats, ranks: Floats, n_bootstrap: int, generator: np.random.Generator) -> Floats:
    """AUROC of resamples of the rows [n_bootstrap]; NaN where one has right or wrong answers alone.

    Only how often each level of confidence comes, among right and among wrong answers, has to be drawn.
    """
    n = len(right)
    levels, level = np.unique(ranks, return_inverse=True)
    if len(levels) > _LEVELS:  # neighbours are merged; what this does to the AUROC itself is put right below
        level = (ranks * (_LEVELS / (n + 1))).astype(np.int64)
    n_levels = int(level.max()) + 1
    cells = level + n_levels * right.astype(np.int64)
    count = np.bincount(cells, minlength=2 * n_levels)
    areas = np.array(
        [_level_auroc(_resample(cells, count, generator).reshape(2, n_levels)) for _ in range(n_bootstrap)]
    )
    return areas + (_auroc(right, ranks) - _level_auroc(count.reshape(2, n_levels)))


def _resample(cells: Integers, count: Integers, generator: np.random.Generator) -> Integers:
    """How often each cell comes in a resample of the rows."""
    n = len(cells)
    if n > _RESAMPLED_BY_ROW:
        return generator.multinomial(n, count / n)
    return np.bincount(cells[generator.integers(n, size=n)], minlength=len(count))


def _level_auroc(count: Integers) -> float:
    """AUROC from the number of wrong and of right answers at each level [2, levels], by ascending confidence."""
    wrong, right = count
    pairs = int(wrong.sum()) * int(right.sum())
    return float(right @ (wrong.cumsum() - wrong / 2)) / pairs if pairs else np.nan
