"""How good confidences are: calibration, ranking, selection.

Truth comes first, as in scikit-learn: ``correct`` [N] says how right each answer is (0 or 1, bool, or graded between),
``confidence`` [N] how sure the model was. Metrics of whole distributions take ``labels`` [N] and ``probs`` [N, K].
Lists, NumPy arrays, torch tensors of any dtype and device, and pandas columns will do; arithmetic is in float64. NaN
(None in a list) is an error, or left out where ``missing="omit"`` says so.
"""

from __future__ import annotations

from pyqe.metrics.calibration import (
    BrierDecomposition,
    ReliabilityCurve,
    adaptive_calibration_error,
    brier_decomposition,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    negative_log_likelihood,
    reliability_curve,
    smooth_calibration_error,
    top_label,
)
from pyqe.metrics.ranking import AurocTest, auroc, auroc_test, average_precision
from pyqe.metrics.selection import (
    RiskCoverageCurve,
    ThresholdCurve,
    aurc,
    decision_score,
    prediction_rejection_ratio,
    risk_coverage_curve,
    threshold_curve,
)

__all__ = [
    "AurocTest",
    "BrierDecomposition",
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "ThresholdCurve",
    "adaptive_calibration_error",
    "aurc",
    "auroc",
    "auroc_test",
    "average_precision",
    "brier_decomposition",
    "brier_score",
    "classwise_calibration_error",
    "decision_score",
    "expected_calibration_error",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "prediction_rejection_ratio",
    "reliability_curve",
    "risk_coverage_curve",
    "smooth_calibration_error",
    "threshold_curve",
    "top_label",
]
