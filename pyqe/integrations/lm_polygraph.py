"""Estimators for lm-polygraph. Higher means more uncertain there."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pyqe.estimator import QualityEstimator
from pyqe.heads import SigmoidHead
from pyqe.scored import Signal

try:
    from lm_polygraph.estimators.estimator import Estimator
except ModuleNotFoundError as error:
    raise ImportError(
        f"pyqe.integrations.lm_polygraph needs lm-polygraph (pip install lm-polygraph): {error}"
    ) from error

Level = Literal["sequence", "token"]


class _ScoreEstimator(Estimator):  # type: ignore[misc]
    """One minus the score of lm-polygraph's greedy tokens, from one more forward pass that computes no logits.

    lm-polygraph's statistics hold no hidden states at single tokens, so the tokens that it generated are read again.
    Estimators with the same head share that pass.
    """

    signal: Signal

    def __init__(self, head: SigmoidHead | None, level: Level) -> None:
        if level not in ("sequence", "token"):
            raise ValueError(f"level: expected 'sequence' or 'token', got {level!r}")
        super().__init__(["greedy_tokens"], level)
        self.head = head

    def __str__(self) -> str:
        return type(self).__name__ + ("Token" if self.level == "token" else "")

    def __call__(self, stats: dict[str, Any]) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        """Uncertainties of a batch.

        Args:
            stats: with "model", "input_texts" and "greedy_tokens", as UEManager fills it.

        Returns:
            in [0, 1], or inf where there is no score: lm-polygraph ranks NaN as most certain. At the level "sequence"
            float64 [B], from the mean of all tokens; at "token" an array for each text, without the last token, which
            lm-polygraph leaves out.

        Raises:
            ValueError: the model is no WhiteboxModel of a causal LM, or the head does not belong to it.
        """
        scores = self._scores(stats)
        if self.level == "token":
            return [_uncertainty(row[:-1]) for row in scores]
        return _uncertainty(np.array([row.mean() if len(row) else np.nan for row in scores]))

    def _scores(self, stats: dict[str, Any]) -> list[NDArray[np.float64]]:
        name = f"pyqe_{self.signal}_{id(self.head)}"
        if name not in stats:
            model = stats["model"]
            if getattr(model, "model_type", None) != "CausalLM":
                raise ValueError(f"model: expected a WhiteboxModel of a causal LM, got {type(model).__name__}")
            prompts = [model.tokenize([text])["input_ids"][0].tolist() for text in stats["input_texts"]]
            estimator = QualityEstimator(model.model, model.tokenizer, self.head)
            scored = estimator.score_ids(stats["greedy_tokens"], prompts, signals=[self.signal])
            stats[name] = [np.asarray(getattr(item, f"token_{self.signal}"), dtype=np.float64) for item in scored]
        found: list[NDArray[np.float64]] = stats[name]
        return found


class SigmoidHeadQuality(_ScoreEstimator):
    """One minus the Sigmoid Head's probability that a token is a right continuation.

    Args:
        head: a Sigmoid Head of the model.
        level: "sequence" (of the mean quality) or "token".

    Raises:
        ValueError: another level.

    Source: Dinh & Niehues 2026 (arXiv 2601.00680).

    Example:
        See docs/integrations.md.
    """

    signal = "quality"

    def __init__(self, head: SigmoidHead, level: Level = "sequence") -> None:
        super().__init__(head, level)


class BoostedProb(_ScoreEstimator):
    """One minus BoostedProb, without lm-polygraph's [T, V] log-probabilities.

    lm-polygraph's own ``BoostedProbSequence`` is minus the same mean. The distribution is the model's own; theirs lacks
    the tokens that lm-polygraph forbids (EOS at the first two places, newlines unless they are allowed).

    Args:
        level: "sequence" (of the mean) or "token".

    Raises:
        ValueError: another level.

    Source: Dinh & Niehues 2025 (arXiv 2502.11115).
    """

    signal = "boosted_prob"

    def __init__(self, level: Level = "sequence") -> None:
        super().__init__(None, level)


def _uncertainty(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.nan_to_num(1.0 - scores, nan=np.inf)
