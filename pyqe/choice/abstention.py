"""When to answer and when to abstain."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from pyqe._arrays import Floats, Integers, group_names, vector
from pyqe._files import atomic_path
from pyqe.metrics import decision_score

_FILE = "abstention.json"
_COVERAGES = 20  # shares of the questions, at which the risk is tested


class AbstentionPolicy(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Answers where confidence is a threshold or more, and abstains elsewhere.

    Args:
        wrong_penalty: c >= 0: a right answer is worth 1, a wrong one -c, none 0. 1 is called balanced, 2 conservative.
        method: how the threshold is found.

            * "score": it maximises the mean score, over -inf (answer all), 200 steps from 0 to 1 and 100 more from .99;
              where confidences are not all in [0, 1], 200 steps from the least (0, if that is less) to the largest. Of
              equally good ones the lowest is taken.
            * "risk": it is the lowest (of 20, at equal steps of coverage) whose risk, the share of wrong ones among the
              answers, is known to be ``target_risk`` at most; ``wrong_penalty`` has no part in it.
        target_risk: for "risk".
        confidence_level: for "risk": the probability, over the labelled questions, that the risk is what is promised.
            This holds for any number of labelled questions, if they are drawn as the later ones are and wrong answers
            do not become more frequent as confidence rises.

    Attributes:
        threshold_: float; -inf: answers all, inf: answers nothing, as no threshold is known to have the target risk.

    Source: Plaut et al. 2024 (arXiv 2402.13213) for "score". For "risk" Geifman and El-Yaniv 2017 (arXiv 1705.08500),
    with tests in sequence (Angelopoulos et al. 2021, arXiv 2110.01052; Wiens 2003) instead of their union bound.

    Example:
        >>> policy = AbstentionPolicy(wrong_penalty=2).fit([0.9, 0.8, 0.6, 0.5], [1, 1, 0, 1])
        >>> policy.predict([0.7, 0.3])
        array([ True, False])
        >>> policy.score([0.9, 0.8, 0.6, 0.5], [1, 1, 0, 1])
        50.0
    """

    threshold_: float

    def __init__(
        self,
        wrong_penalty: float = 1.0,
        method: Literal["score", "risk"] = "score",
        *,
        target_risk: float | None = None,
        confidence_level: float = 0.95,
    ) -> None:
        self.wrong_penalty = wrong_penalty
        self.method = method
        self.target_risk = target_risk
        self.confidence_level = confidence_level

    def fit(self, confidence: Any, correct: Any, groups: Any = None) -> AbstentionPolicy:
        """Finds the threshold.

        Args:
            confidence: [N], any finite numbers.
            correct: [N], 0 or 1; for "score" graded in [0, 1] will do.
            groups: [N], names; for "score": the mean score of each group (a dataset, say) counts alike.

        Raises:
            TypeError, ValueError: wrong type, shape or range; no rows; parameters that make no sense.
        """
        self._check_parameters()
        sure, right = _rows(confidence, correct)
        if self.method == "risk" and self.target_risk is not None:
            if groups is not None:
                raise ValueError("groups: expected None for method 'risk', which is about all questions together")
            self.threshold_ = self._certified_threshold(sure, right, self.target_risk)
        else:
            self.threshold_ = self._best_threshold(sure, right, _group_numbers(groups, len(sure)))
        return self

    def predict(self, confidence: Any) -> NDArray[np.bool_]:
        """Whether to answer, bool [N].

        Raises:
            sklearn.exceptions.NotFittedError: before ``fit``.
            TypeError, ValueError: wrong type or shape, NaN.
        """
        return vector(confidence, "confidence") >= self._threshold()

    def score(self, confidence: Any, correct: Any, groups: Any = None) -> float:
        """100 times the mean score of a question: 100 if all are answered and right, 0 if none is answered.

        Args:
            confidence: [N].
            correct: [N], in [0, 1].
            groups: [N]; the mean over the groups' scores is taken.

        Raises:
            sklearn.exceptions.NotFittedError: before ``fit``.
            TypeError, ValueError: wrong type, shape or range; no rows.
        """
        threshold = self._threshold()
        sure, right = _rows(confidence, correct)
        numbers = _group_numbers(groups, len(sure))
        scores = [
            decision_score(right[numbers == number], sure[numbers == number], threshold, wrong=-self.wrong_penalty)
            for number in range(int(numbers.max()) + 1)
        ]
        return 100 * float(np.mean(scores))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``abstention.json`` into a folder, which is made if need be.

        Raises:
            sklearn.exceptions.NotFittedError: before ``fit``.
            OSError: it cannot be written.
        """
        threshold = self._threshold()
        stored = threshold if math.isfinite(threshold) else str(threshold)  # JSON has no infinity
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_path(Path(folder) / _FILE) as temporary:
            parameters = {
                name: value.item() if isinstance(value, np.generic) else value
                for name, value in self.get_params().items()
            }
            text = json.dumps({"parameters": parameters, "threshold": stored}, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> AbstentionPolicy:
        """A policy that :meth:`save_pretrained` has written.

        Raises:
            OSError: the file is missing.
            ValueError: it is not such a file.
        """
        path = Path(folder) / _FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            policy = cls(**stored["parameters"])
            policy._check_parameters()
            policy.threshold_ = float(stored["threshold"])
            if math.isnan(policy.threshold_):
                raise ValueError("threshold: expected a number, got nan")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected an abstention policy ({error})") from None
        return policy

    def _check_parameters(self) -> None:
        if self.method not in ("score", "risk"):
            raise ValueError(f"method: expected 'score' or 'risk', got {self.method!r}")
        if not 0 <= self.wrong_penalty < math.inf:
            raise ValueError(f"wrong_penalty: expected a number of 0 or more, got {self.wrong_penalty}")
        if not 0 < self.confidence_level < 1:
            raise ValueError(f"confidence_level: expected a number between 0 and 1, got {self.confidence_level}")
        if self.method == "risk" and (self.target_risk is None or not 0 < self.target_risk < 1):
            raise ValueError(f"target_risk: expected a number between 0 and 1, got {self.target_risk}")

    def _threshold(self) -> float:
        if not hasattr(self, "threshold_"):
            raise NotFittedError("AbstentionPolicy: call fit first")
        return self.threshold_

    def _best_threshold(self, sure: Floats, right: Floats, groups: Integers) -> float:
        thresholds = _grid(float(sure.min()), float(sure.max()))
        payoff = right - self.wrong_penalty * (1 - right)
        score = np.zeros(len(thresholds))
        for number in range(int(groups.max()) + 1):
            chosen = groups == number
            order = np.argsort(sure[chosen])
            left_out = np.append(0, payoff[chosen][order].cumsum())
            score += (left_out[-1] - left_out[np.searchsorted(sure[chosen][order], thresholds)]) / len(order)
        # Sums in another order differ by rounding, which must not decide between equals
        return float(thresholds[(score >= score.max() - 1e-9 * (1 + self.wrong_penalty)).argmax()])

    def _certified_threshold(self, sure: Floats, right: Floats, target_risk: float) -> float:
        """The lowest threshold whose risk is shown to be at most the target.

        "Its risk is above the target" is tested from the highest threshold down. The first test may be wrong with half
        the probability that there is, 1 - confidence_level, the others share the rest; one that rejects hands its part
        on to the next (the fallback procedure), so that 1 - confidence_level bounds the probability of any false
        rejection. What is tested is answering strictly above the k-th largest confidence: given that one, the answers
        above it are a random sample of all such answers.
        """
        if not ((right == 0) | (right == 1)).all():
            raise ValueError(f"correct: expected 0 or 1, got {right[(right != 0) & (right != 1)][0]:g}")
        order = np.argsort(-sure)
        sure, wrong = sure[order], np.append(0, (1 - right[order]).cumsum())
        n, error = len(sure), 1 - self.confidence_level
        fewest = math.ceil(math.log(error / 2) / math.log1p(-target_risk))  # below, not even no wrong answer would do
        start = max(fewest, min(3 * fewest, n // 3))  # later, so that one wrong answer does not end it
        threshold, available = math.inf, 0.0
        for step in range(_COVERAGES if start <= n else 0):
            k = start + (n - start) * step // (_COVERAGES - 1)
            border = float(sure[k]) if k < n else -math.inf
            answered = int(np.searchsorted(-sure, -border))
            available += error / 2 / (_COVERAGES - 1 if step else 1)
            # Clopper and Pearson's upper bound of the risk is the target where this probability is what is available
            if special.bdtr(wrong[answered], answered, target_risk) <= available:
                threshold = float(np.nextafter(border, math.inf)) if k < n else border
            else:
                available = 0.0
        return threshold


def _rows(confidence: Any, correct: Any) -> tuple[Floats, Floats]:
    sure = vector(confidence, "confidence")
    right = vector(correct, "correct", low=0, high=1, length=len(sure))
    if not len(sure):
        raise ValueError("confidence: expected one row at least, got none")
    return sure, right


def _group_numbers(groups: Any, length: int) -> Integers:
    return np.zeros(length, dtype=np.int64) if groups is None else group_names(groups, "groups", length=length)[1]


def _grid(least: float, largest: float) -> Floats:
    """Candidate thresholds, ascending."""
    if least >= 0 and largest <= 1:
        return np.unique(np.concatenate([[-np.inf], np.linspace(0, 1, 200), np.linspace(0.99, 1, 100)]))
    return np.append(-np.inf, np.linspace(min(least, 0), largest, 200))
