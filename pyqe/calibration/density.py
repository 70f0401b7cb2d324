"""Accuracy by confidence from the densities of the confidences of right and wrong answers."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from scipy.special import expit, logit, logsumexp

from pyqe._arrays import Floats
from pyqe.calibration.base import ConfidenceCalibrator, count, number, numbers, positive

_BLOCK = 1 << 22  # kernel values at a time, 32 MB


class KernelDensityCalibration(ConfidenceCalibrator):
    r"""Share of the right answers in the density at a confidence: :math:`d_+(c) / (d_+(c) + d_-(c))`.

    :math:`d_\pm` are Gaussian kernel densities of the confidences of right and wrong answers, each times its prior.

    Args:
        priors: "data": the shares of right and wrong answers, which makes the result the probability of being right by
            Bayes' rule. "equal": 1/2 each, the formula as published; calibrated only where half of the answers are
            right.
        bandwidth: standard deviation of the kernels, in units of confidence; "scott": the standard deviation of the
            confidences of the class times :math:`n^{-1/5}`, separately for right and wrong answers.

    Attributes:
        right_, wrong_: float64 [M], the distinct confidences of right and wrong answers.
        right_weights_, wrong_weights_: float64 [M], how many answers (or grades) each stands for.
        right_bandwidth_, wrong_bandwidth_: the bandwidths.
        log_prior_odds_: log odds of the priors.
        n_features_in_: 1.

    ``transform`` takes time in proportion to N times the number of distinct confidences.

    Raises (in ``fit``):
        ValueError: "scott" where the right or the wrong answers all have the same confidence: give a number.

    Source: the baseline of He et al. 2023 (arXiv 2310.11732).

    Example:
        >>> calibration = KernelDensityCalibration(bandwidth=0.1).fit([0.9, 0.8, 0.9, 0.2], [1, 1, 0, 0])
        >>> calibration.transform([0.85, 0.1]).round(3)
        array([0.667, 0.   ])
    """

    _learned: ClassVar = {
        "right_": numbers,
        "wrong_": numbers,
        "right_weights_": numbers,
        "wrong_weights_": numbers,
        "right_bandwidth_": positive,
        "wrong_bandwidth_": positive,
        "log_prior_odds_": number,
        "n_features_in_": count,
    }

    def __init__(self, *, priors: Literal["data", "equal"] = "data", bandwidth: float | str = "scott") -> None:
        self.priors = priors
        self.bandwidth = bandwidth

    def _fit(self, confidence: Floats, correct: Floats) -> None:
        if self.priors not in ("data", "equal"):
            raise ValueError(f"priors: expected 'data' or 'equal', got {self.priors!r}")
        right, wrong = _distinct(confidence, correct), _distinct(confidence, 1 - correct)
        self.right_bandwidth_ = self._bandwidth(*right, "right")
        self.wrong_bandwidth_ = self._bandwidth(*wrong, "wrong")
        self.right_, self.right_weights_ = right
        self.wrong_, self.wrong_weights_ = wrong
        self.log_prior_odds_ = float(logit(correct.mean())) if self.priors == "data" else 0.0

    def _bandwidth(self, values: Floats, weights: Floats, which: str) -> float:
        if self.bandwidth != "scott":
            if not isinstance(self.bandwidth, int | float) or not 0 < self.bandwidth < np.inf:
                raise ValueError(f"bandwidth: expected 'scott' or a positive number, got {self.bandwidth!r}")
            return float(self.bandwidth)
        total = weights.sum()
        if len(values) < 2 or total <= 1:
            raise ValueError(
                f"confidence: expected different ones among the {which} answers, from which bandwidth='scott' is "
                f"computed, got {values[0]:g} throughout; give a number as bandwidth"
            )
        deviation = values - np.average(values, weights=weights)
        return float(np.sqrt((weights * deviation**2).sum() / (total - 1)) * total**-0.2)

    def _calibrated(self, confidence: Floats) -> Floats:
        right = _log_density(confidence, self.right_, self.right_weights_, self.right_bandwidth_)
        wrong = _log_density(confidence, self.wrong_, self.wrong_weights_, self.wrong_bandwidth_)
        return expit(right - wrong + self.log_prior_odds_)


def _distinct(confidence: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The distinct confidences of some weight, and their weights."""
    values, index = np.unique(confidence, return_inverse=True)
    total: Floats = np.bincount(index, weights).astype(np.float64)
    return values[total > 0], total[total > 0]


def _log_density(at: Floats, values: Floats, weights: Floats, bandwidth: float) -> Floats:
    """Logs, as far from all data both densities vanish in float64 while their ratio does not."""
    rows = max(1, _BLOCK // len(values))
    log_weights = np.log(weights / weights.sum()) - np.log(bandwidth)
    blocks = [
        logsumexp(log_weights - ((block[:, None] - values) / bandwidth) ** 2 / 2, axis=1)
        for block in np.split(at, range(rows, len(at), rows))
    ]
    return np.concatenate(blocks)
