"""Accuracy by confidence as a step function or a monotone curve."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from sklearn.isotonic import IsotonicRegression

from pyqe._arrays import Floats
from pyqe.calibration.base import ConfidenceCalibrator, count, numbers
from pyqe.metrics.calibration import Strategy, bin_numbers, reliability_curve


class HistogramBinning(ConfidenceCalibrator):
    """The accuracy of the bin that a confidence falls into.

    A confidence in a bin that was empty in ``fit`` stays what it is: nothing is known about it.

    Args:
        n_bins: number of bins.
        strategy: "uniform", bins of equal width, or "quantile", of equal mass but for ties.

    Attributes:
        edges_: float64 [B + 1]; a bin holds its lower edge, the last one its upper edge too.
        values_: float64 [B], NaN where the bin was empty.
        n_features_in_: 1.

    Source: Zadrozny & Elkan 2001; bins are those of :func:`pyqe.metrics.reliability_curve`.

    Example:
        >>> HistogramBinning(n_bins=2).fit([0.9, 0.8, 0.7, 0.2], [1, 1, 0, 0]).transform([1.0, 0.1]).round(3)
        array([0.667, 0.   ])
    """

    _learned: ClassVar = {"edges_": numbers, "values_": numbers, "n_features_in_": count}

    def __init__(self, *, n_bins: int = 10, strategy: Strategy = "uniform") -> None:
        self.n_bins = n_bins
        self.strategy = strategy

    def _fit(self, confidence: Floats, correct: Floats) -> None:
        curve = reliability_curve(correct, confidence, n_bins=self.n_bins, strategy=self.strategy)
        self.edges_, self.values_ = curve.edges, curve.accuracy

    def _calibrated(self, confidence: Floats) -> Floats:
        values = self.values_[bin_numbers(confidence, self.edges_)]
        return np.where(np.isnan(values), confidence, values)


class IsotonicCalibration(ConfidenceCalibrator):
    """The non-decreasing curve with the least squared error, linear between its points.

    Values of exactly 0 and 1 come out where the least or most confident answers were all wrong or right; their
    log-likelihood can be infinite.

    Attributes:
        confidences_: float64 [M], where the curve bends, ascending; flat outside.
        values_: float64 [M], non-decreasing.
        n_features_in_: 1.

    Source: Zadrozny & Elkan 2002; scikit-learn's ``IsotonicRegression``.

    Example:
        >>> IsotonicCalibration().fit([0.9, 0.8, 0.6, 0.6], [1, 1, 1, 0]).transform([0.95, 0.7, 0.1])
        array([1.  , 0.75, 0.5 ])
    """

    _learned: ClassVar = {"confidences_": numbers, "values_": numbers, "n_features_in_": count}

    def _fit(self, confidence: Floats, correct: Floats) -> None:
        curve = IsotonicRegression(y_min=0, y_max=1, increasing=True, out_of_bounds="clip").fit(confidence, correct)
        self.confidences_, self.values_ = curve.X_thresholds_, curve.y_thresholds_

    def _calibrated(self, confidence: Floats) -> Floats:
        return np.interp(confidence, self.confidences_, self.values_)
