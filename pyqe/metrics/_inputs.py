"""What the metrics are given, checked and in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyqe._arrays import Floats, Integers, Missing, class_labels, matrix, present, vector


def answers(
    correct: Any, confidence: Any, *, missing: Missing, probability: bool = False, binary: bool = False
) -> tuple[Floats, Floats]:
    """Correctness and confidence of each answer, both [N], N > 0.

    Args:
        correct: [N], in [0, 1].
        confidence: [N].
        missing: what to do with NaN; "omit" leaves out rows that have it in either.
        probability: whether confidence must be in [0, 1], not just finite.
        binary: whether correctness must be 0 or 1.

    Raises:
        TypeError, ValueError: not so, or nothing is left.
    """
    right = vector(correct, "correct", low=0, high=1, missing=missing)
    low, high = (0.0, 1.0) if probability else (-np.inf, np.inf)
    sure = vector(confidence, "confidence", low=low, high=high, length=len(right), missing=missing)
    if missing == "omit":
        rows = present(right, sure)
        right, sure = right[rows], sure[rows]
    if not len(right):
        raise ValueError("correct: expected one row at least, got none")
    if binary and not ((right == 0) | (right == 1)).all():
        raise ValueError(f"correct: expected 0 or 1, got {right[(right != 0) & (right != 1)][0]:g}")
    return right, sure


def distributions(labels: Any, probs: Any, *, missing: Missing) -> tuple[Integers, Floats]:
    """Class numbers [N] and probabilities [N, K], N > 0; "omit" leaves out rows with NaN in either.

    Raises:
        TypeError, ValueError: something else, or nothing is left.
    """
    table = matrix(probs, "probs", low=0, high=1, missing=missing)
    numbers = vector(labels, "labels", length=len(table), missing=missing)
    if missing == "omit":
        rows = present(numbers, table)
        numbers, table = numbers[rows], table[rows]
    if not len(table):
        raise ValueError("probs: expected one row at least, got none")
    return class_labels(numbers, "labels", classes=table.shape[1]), table
