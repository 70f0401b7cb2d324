"""The figures of an evaluation as text, for pages and terminals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqe.choice.study import Evaluation

ABSTENTION_COLUMNS = ("wrong costs", "all answered", "with abstention", "answered", "from")
ABSTENTION_NOTE = (
    "Mean score of 100 where a right answer is worth 1, a wrong one what is said, and none 0, on questions that had no "
    "part in choosing the confidence from which to answer."
)
GROUP_COLUMNS = ("answers", "accuracy", "confidence", "ECE", "Brier", "AUROC", "AURC")


def figure_rows(evaluation: Evaluation, confidence: float, n_bins: int) -> list[tuple[str, str]]:
    """Name and value of each figure.

    Args:
        evaluation: of some answers.
        confidence: their mean confidence.
        n_bins: of the calibration errors.
    """
    auroc = evaluation.auroc
    return [
        ("Answers", f"{evaluation.n:,}"),
        ("Accuracy", shown(evaluation.accuracy)),
        ("Mean confidence", shown(confidence)),
        (f"ECE, {n_bins} bins of equal width", shown(evaluation.ece)),
        (f"ECE, {n_bins} bins of equal mass, unweighted", shown(evaluation.calibration_error)),
        (f"Maximum calibration error, {n_bins} bins", shown(evaluation.maximum_calibration_error)),
        ("Smooth calibration error", shown(evaluation.smooth_calibration_error)),
        ("Brier score", shown(evaluation.brier)),
        ("AUROC", shown(auroc.auroc)),
        ("AUROC, 95 % interval", "–" if math.isnan(auroc.low) else f"{shown(auroc.low)} to {shown(auroc.high)}"),
        ("Mann-Whitney p", _shown_p(auroc.p_value)),
        ("Average precision", shown(evaluation.average_precision)),
        ("AURC", shown(evaluation.aurc)),
        ("Prediction rejection ratio", shown(evaluation.prediction_rejection_ratio)),
    ]


def abstention_rows(evaluation: Evaluation) -> list[list[str]]:
    """What stands in ``ABSTENTION_COLUMNS``, for each penalty."""
    return [
        [
            f"{result.wrong_penalty:g}",
            f"{result.base_score:.1f}",
            f"{result.score:.1f}",
            f"{100 * result.coverage:.0f} %",
            shown(result.threshold) if math.isfinite(result.threshold) else "none",
        ]
        for result in evaluation.abstention
    ]


def group_row(evaluation: Evaluation, confidence: float) -> list[str]:
    """What stands in ``GROUP_COLUMNS``."""
    figures = (
        evaluation.accuracy,
        confidence,
        evaluation.ece,
        evaluation.brier,
        evaluation.auroc.auroc,
        evaluation.aurc,
    )
    return [f"{evaluation.n:,}", *map(shown, figures)]


def shown(value: float) -> str:
    """Three decimals, which is what the figures of a few thousand answers can bear."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def _shown_p(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "< 1e-300" if value == 0 else f"{value:.2g}"
