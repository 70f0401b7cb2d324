"""Whether answers given with confidence c are right in a share c of the cases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, special

from pyqe._arrays import Floats, Integers, Missing, vector
from pyqe.metrics._inputs import answers, distributions
from pyqe.metrics._quantiles import quantiles

Strategy = Literal["uniform", "quantile"]

_FEW_BINS = 256  # up to here a comparison for each edge beats a search: 1 ms for 10 bins of a million, not 18
_SMOOTHING_POINTS = 1 << 14  # of the grid of smooth_calibration_error: finer than any width it can choose


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Accuracy against confidence, by bins of confidence; NaN where a bin is empty.

    Attributes:
        edges: float64 [B + 1]. A bin holds its lower edge; the last one holds its upper edge too.
        count: int64 [B], answers in each bin.
        accuracy: float64 [B], their mean correctness.
        confidence: float64 [B], their mean confidence.
        low: float64 [B], lower end of Wilson's interval of the accuracy.
        high: float64 [B], its upper end.
    """

    edges: Floats
    count: Integers
    accuracy: Floats
    confidence: Floats
    low: Floats
    high: Floats

    @property
    def gap(self) -> Floats:
        """float64 [B], accuracy minus confidence: below 0 where the answers are overconfident."""
        return self.accuracy - self.confidence


@dataclass(frozen=True)
class BrierDecomposition:
    """Parts of the Brier score, which is reliability - resolution + uncertainty + within_bin.

    Attributes:
        reliability: mean squared gap between accuracy and confidence of the bins; 0 is best.
        resolution: variance of the bins' accuracy; the more the better.
        uncertainty: variance of the correctness; the model's confidences have no part in it.
        within_bin: what bins hide: variance of the confidences inside them, minus twice their covariance with the
            correctness. 0 where each bin has a single confidence.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float


def reliability_curve(
    correct: Any,
    confidence: Any,
    *,
    n_bins: int | ArrayLike = 10,
    strategy: Strategy = "uniform",
    confidence_level: float = 0.95,
    missing: Missing = "raise",
) -> ReliabilityCurve:
    """The data of a reliability diagram.

    Args:
        correct: [N], in [0, 1].
        confidence: [N], in [0, 1].
        n_bins: B; or the edges of the bins, ascending, which must span the confidences.
        strategy: bins of equal width in [0, 1] ("uniform"), or between quantiles of the confidences ("quantile"): equal
            mass but for ties, which are kept in one bin, so that the order of the rows is of no account.
        confidence_level: of the intervals.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Example:
        >>> curve = reliability_curve([0, 1, 1, 1], [0.5, 0.5, 1.0, 1.0], n_bins=2)
        >>> curve.count, curve.gap
        (array([0, 4]), array([nan,  0.]))
    """
    right, sure = answers(correct, confidence, missing=missing, probability=True)
    edges, count, accuracy, mean = _binned(right, sure, n_bins, strategy)
    low, high = _wilson_interval(accuracy, count, confidence_level)
    return ReliabilityCurve(edges, count, accuracy, mean, low, high)


def expected_calibration_error(
    correct: Any,
    confidence: Any,
    *,
    n_bins: int | ArrayLike = 10,
    strategy: Strategy = "uniform",
    weighted: bool = True,
    missing: Missing = "raise",
) -> float:
    """Mean distance between accuracy and confidence, by bins of confidence (ECE).

    Args:
        correct: [N], in [0, 1].
        confidence: [N], in [0, 1]; exactly 1 counts.
        n_bins: number of bins, or their edges; see :func:`reliability_curve`.
        strategy: "uniform" or "quantile"; see :func:`reliability_curve`.
        weighted: each bin counts by its size; otherwise all that are not empty count alike.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Returns:
        A number in [0, 1]. It rises with the number of bins and is above 0 for a calibrated model too: compare figures
        with the same settings only.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Source: Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599). ``strategy="quantile", weighted=False`` is the
    calibration error of Plaut et al. 2024 (arXiv 2402.13213), who leave out answers with a confidence of exactly 1.

    Example:
        >>> expected_calibration_error([1, 1, 0, 1], [1.0, 1.0, 0.5, 0.5])
        0.0
    """
    right, sure = answers(correct, confidence, missing=missing, probability=True)
    return _calibration_error(right, sure, n_bins, strategy, weighted)


def maximum_calibration_error(
    correct: Any,
    confidence: Any,
    *,
    n_bins: int | ArrayLike = 10,
    strategy: Strategy = "uniform",
    missing: Missing = "raise",
) -> float:
    """Largest distance between accuracy and confidence of a bin (MCE).

    Arguments and errors are those of :func:`expected_calibration_error`.

    Source: Naeini et al. 2015.

    Example:
        >>> maximum_calibration_error([1, 1, 0, 1], [1.0, 1.0, 0.75, 0.75])
        0.25
    """
    right, sure = answers(correct, confidence, missing=missing, probability=True)
    _, _, accuracy, mean = _binned(right, sure, n_bins, strategy)
    return float(np.nanmax(np.abs(accuracy - mean)))


def classwise_calibration_error(
    labels: Any, probs: Any, *, n_bins: int | ArrayLike = 10, strategy: Strategy = "uniform", missing: Missing = "raise"
) -> float:
    """ECE of each class's probability, bins weighted by size, mean over the classes.

    Args:
        labels: [N], class numbers.
        probs: [N, K], in [0, 1].
        n_bins: number of bins, or their edges; see :func:`reliability_curve`.
        strategy: "uniform" or "quantile"; see :func:`reliability_curve`.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Source: Kull et al. 2019 (arXiv 1910.12656).

    Example:
        >>> classwise_calibration_error([0, 1], [[1.0, 0.0], [0.5, 0.5]])
        0.25
    """
    return _classwise(labels, probs, n_bins, strategy, weighted=True, missing=missing)


def adaptive_calibration_error(
    labels: Any, probs: Any, *, n_bins: int | ArrayLike = 10, missing: Missing = "raise"
) -> float:
    """Calibration error of each class's probability in bins of equal mass, mean over bins and classes (ACE).

    Arguments and errors are those of :func:`classwise_calibration_error`. Ties stay in one bin.

    Source: Nixon et al. 2019 (arXiv 1904.01685).

    Example:
        >>> adaptive_calibration_error([0, 1], [[1.0, 0.0], [0.5, 0.5]], n_bins=2)
        0.25
    """
    return _classwise(labels, probs, n_bins, "quantile", weighted=False, missing=missing)


def top_label(labels: Any, probs: Any, *, missing: Missing = "raise") -> tuple[NDArray[np.bool_], Floats]:
    """Correctness and confidence of the most probable class, for the metrics that take those.

    Args:
        labels: [N], class numbers.
        probs: [N, K], in [0, 1]; of equal ones the first is taken.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Returns:
        bool [N] and float64 [N].

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Example:
        >>> top_label([0, 1], [[0.75, 0.25], [0.5, 0.5]])
        (array([ True, False]), array([0.75, 0.5 ]))
    """
    numbers, table = distributions(labels, probs, missing=missing)
    return table.argmax(axis=1) == numbers, table.max(axis=1)


def smooth_calibration_error(correct: Any, confidence: Any, *, missing: Missing = "raise") -> float:
    r"""Calibration error without bins: the gap smoothed by a kernel as wide as the result (smECE).

    With :math:`r(t) = \frac1N \sum_i K_\sigma(t, c_i) (y_i - c_i)`, where :math:`K_\sigma` is a Gaussian reflected at 0
    and 1, it is the :math:`\sigma` at which :math:`\int_0^1 |r(t)| dt = \sigma`. Unlike ECE, it changes little where
    confidences change little.

    Args:
        correct: [N], in [0, 1].
        confidence: [N], in [0, 1].
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Returns:
        A number in [0, 1], to about 1e-4.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Source: Blasiok and Nakkiran 2023 (arXiv 2309.12236).

    Example:
        >>> round(smooth_calibration_error([1, 1, 1, 0], [0.5, 0.5, 0.5, 0.5]), 2)
        0.25
    """
    right, sure = answers(correct, confidence, missing=missing, probability=True)
    points = _SMOOTHING_POINTS
    cell = np.minimum((sure * points).astype(np.int64), points - 1)
    gaps = np.bincount(cell, weights=right - sure, minlength=points) / len(sure)
    # A reflected Gaussian is diagonal in the cosine transform: cos(pi k t) shrinks by exp(-(pi k sigma)^2 / 2)
    spectrum = fft.dct(gaps)
    exponent = -0.5 * (np.pi * np.arange(points)) ** 2
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        width = (low + high) / 2
        error = float(np.abs(fft.idct(spectrum * np.exp(exponent * width**2))).sum())
        low, high = (width, high) if error > width else (low, width)
    return (low + high) / 2


def brier_score(correct: Any, confidence: Any, *, missing: Missing = "raise") -> float:
    """Mean squared distance between confidence and correctness, in [0, 1].

    Args:
        correct: [N], in [0, 1].
        confidence: [N], in [0, 1].
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Source: Brier 1950.

    Example:
        >>> brier_score([1, 0], [0.75, 0.25])
        0.0625
    """
    right, sure = answers(correct, confidence, missing=missing, probability=True)
    return float(np.mean((sure - right) ** 2))


def brier_decomposition(
    correct: Any,
    confidence: Any,
    *,
    n_bins: int | ArrayLike = 10,
    strategy: Strategy = "uniform",
    missing: Missing = "raise",
) -> BrierDecomposition:
    """The Brier score taken apart, by bins of confidence.

    Arguments and errors are those of :func:`expected_calibration_error`.

    Source: Murphy 1973; Stephenson et al. 2008 for what is within the bins.

    Example:
        >>> brier_decomposition([1, 1, 0, 1], [1.0, 1.0, 0.5, 0.5])
        BrierDecomposition(reliability=0.0, resolution=0.0625, uncertainty=0.1875, within_bin=0.0)
    """
    right, sure = answers(correct, confidence, missing=missing, probability=True)
    edges, bins = _assign(sure, n_bins, strategy)
    count, accuracy, mean = _bin_means(right, sure, bins, len(edges) - 1)
    filled = count > 0
    share, gap = count[filled] / len(right), (accuracy - mean)[filled]
    around = sure - mean[bins]
    return BrierDecomposition(
        reliability=float(share @ gap**2),
        resolution=float(share @ (accuracy[filled] - right.mean()) ** 2),
        uncertainty=float(right.var()),
        within_bin=float(np.mean(around**2 - 2 * around * (right - accuracy[bins]))),
    )


def negative_log_likelihood(labels: Any, probs: Any, *, eps: float = 0.0, missing: Missing = "raise") -> float:
    """Mean of -log of the label's probability, in nats.

    Args:
        labels: [N], class numbers.
        probs: [N, K], in [0, 1]; taken as they are, whatever their sum.
        eps: floor of the label's probability: without one, a single 0 makes the mean infinite. Report it.
        missing: "raise": NaN is an error; "omit": rows with NaN are left out.

    Raises:
        TypeError, ValueError: wrong type, shape or range; no rows.

    Example:
        >>> round(negative_log_likelihood([0, 1], [[0.5, 0.5], [0.5, 0.5]]), 4)
        0.6931
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"eps: expected a number in [0, 1], got {eps}")
    numbers, table = distributions(labels, probs, missing=missing)
    chosen = np.maximum(table[np.arange(len(table)), numbers], eps)
    with np.errstate(divide="ignore"):
        return float(-np.log(chosen).mean())


def _classwise(
    labels: Any, probs: Any, n_bins: int | ArrayLike, strategy: Strategy, *, weighted: bool, missing: Missing
) -> float:
    numbers, table = distributions(labels, probs, missing=missing)
    errors = [
        _calibration_error((numbers == k).astype(np.float64), column, n_bins, strategy, weighted)
        for k, column in enumerate(np.ascontiguousarray(table.T))
    ]
    return float(np.mean(errors))


def _calibration_error(
    right: Floats, sure: Floats, n_bins: int | ArrayLike, strategy: Strategy, weighted: bool
) -> float:
    _, count, accuracy, mean = _binned(right, sure, n_bins, strategy)
    gap = np.abs(accuracy - mean)
    return float(np.nansum(gap * count) / len(right)) if weighted else float(np.nanmean(gap))


def _binned(
    right: Floats, sure: Floats, n_bins: int | ArrayLike, strategy: Strategy
) -> tuple[Floats, Integers, Floats, Floats]:
    """Edges, counts, accuracy and mean confidence of the bins."""
    edges, bins = _assign(sure, n_bins, strategy)
    return (edges, *_bin_means(right, sure, bins, len(edges) - 1))


def _bin_means(right: Floats, sure: Floats, bins: Integers, n_bins: int) -> tuple[Integers, Floats, Floats]:
    count = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(bins, weights=right, minlength=n_bins) / count
        return count, accuracy, np.bincount(bins, weights=sure, minlength=n_bins) / count


def _assign(sure: Floats, n_bins: int | ArrayLike, strategy: Strategy) -> tuple[Floats, Integers]:
    """Edges, and the number of each row's bin."""
    edges = _edges(sure, n_bins, strategy)
    return edges, bin_numbers(sure, edges)


def bin_numbers(sure: Floats, edges: Floats) -> Integers:
    """The number of each row's bin; the first and the last one are open towards the outside.

    Compared in float32: 0.7 then lies in the bin that the edge 0.7 opens whether it came as float32, as float64 or as
    the float64 7 * 0.1, which are three numbers.
    """
    inner, single = edges[1:-1].astype(np.float32), sure.astype(np.float32)
    if len(edges) > _FEW_BINS:
        return np.searchsorted(inner, single, side="right")
    bins = np.zeros(len(sure), dtype=np.uint8)
    for edge in inner:
        bins += single >= edge
    return bins.astype(np.int64)


def _edges(sure: Floats, n_bins: int | ArrayLike, strategy: Strategy) -> Floats:
    if strategy not in ("uniform", "quantile"):
        raise ValueError(f"strategy: expected 'uniform' or 'quantile', got {strategy!r}")
    if isinstance(n_bins, (int, np.integer)):
        if n_bins < 1:
            raise ValueError(f"n_bins: expected 1 or more, got {n_bins}")
        shares = np.arange(n_bins + 1) / n_bins
        return shares if strategy == "uniform" else quantiles(sure, shares)
    edges = vector(n_bins, "n_bins")
    if len(edges) < 2 or (np.diff(edges) < 0).any():
        raise ValueError(f"n_bins: expected a number, or two or more ascending edges, got {edges}")
    if strategy != "uniform":
        raise ValueError(f"strategy: {strategy!r} makes edges of its own, n_bins gives others")
    if sure.min() < edges[0] or sure.max() > edges[-1]:
        raise ValueError(
            f"n_bins: expected edges that span the confidences, {sure.min():g} to {sure.max():g}, "
            f"got {edges[0]:g} to {edges[-1]:g}"
        )
    return edges


def _wilson_interval(share: Floats, count: Integers, confidence_level: float) -> tuple[Floats, Floats]:
    """Interval of a share observed in ``count`` cases (Wilson 1927); NaN where there is none."""
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level: expected a number between 0 and 1, got {confidence_level}")
    z = float(special.ndtri((1 + confidence_level) / 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
        half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return np.maximum(middle - half, 0), np.minimum(middle + half, 1)
