"""Scored texts: what the estimator returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Signal = Literal["quality", "prob", "max_prob", "entropy", "boosted_prob"]
Aggregation = Literal["mean", "min", "product", "mean_log", "sum_log"]
Status = Literal["ok", "partial", "empty", "failed"]
Scores = NDArray[np.float32]

SIGNALS: tuple[Signal, ...] = ("quality", "prob", "max_prob", "entropy", "boosted_prob")


@dataclass(eq=False)
class ScoredText:
    """A text with scores for its T tokens. Higher is better, but for the entropy. NaN means that there is no score.

    Attributes:
        text: the scored (or generated) text.
        prompt: what came before it, or None.
        token_ids: T ids, without the special tokens that begin or end a text.
        tokens: T pieces of the text.
        offsets: T pairs (start, end) of character positions in ``text``. Tokens that share one character (bytes of an
            emoji) share its span.
        token_quality: float32 [T] in [0, 1], Sigmoid Head probability that the token is a right continuation.
        token_prob: float32 [T] in [0, 1], softmax probability of the token.
        token_max_prob: float32 [T] in [0, 1], largest softmax probability at its position (MSP).
        token_entropy: float32 [T] in nats, entropy of the softmax at its position.
        token_boosted_prob: float32 [T] in [0, 1], BoostedProb.
        status: "ok"; "partial" where some tokens have no score; "empty" without tokens; "failed" where all have none.
        reason: why the status is not "ok", or what else there is to know.
        finish_reason: of a generated text: "eos", "stop" (a stop string or stopping criterion) or "length".
    """

    text: str
    prompt: str | None = None
    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    token_quality: Scores | None = None
    token_prob: Scores | None = None
    token_max_prob: Scores | None = None
    token_entropy: Scores | None = None
    token_boosted_prob: Scores | None = None
    status: Status = "ok"
    reason: str | None = None
    finish_reason: Literal["eos", "stop", "length"] | None = None

    def aggregate(self, method: Aggregation = "mean", signal: Signal = "quality") -> float | None:
        """One number for the text, from all its tokens but a first one without context.

        Args:
            method: "mean", "min", "product", "mean_log" or "sum_log"; of the entropy only the first two.
            signal: which token scores.

        Returns:
            the number, or None where tokens have no score (the first one alone may lack it).

        Raises:
            ValueError: unknown names, or an entropy's product or logs.

        Example:
            >>> scored = ScoredText("ab", token_quality=np.array([np.nan, 0.5, 1.0], dtype=np.float32))
            >>> scored.aggregate("mean")
            0.75
        """
        if signal not in SIGNALS:
            raise ValueError(f"signal: expected one of {', '.join(SIGNALS)}, got {signal!r}")
        methods = _AGGREGATIONS if signal != "entropy" else _OF_ENTROPY
        if method not in methods:
            raise ValueError(f"method: expected one of {', '.join(methods)} for {signal}, got {method!r}")
        scores: Scores | None = getattr(self, f"token_{signal}")
        if scores is None or np.isnan(scores).all():
            return None
        if np.isnan(scores[1:]).any():
            return None  # what is missing may be what is wrong; the first token may lack context alone
        with np.errstate(divide="ignore"):  # log 0 = -inf is the right answer
            return float(_AGGREGATIONS[method](scores[~np.isnan(scores)].astype(np.float64)))

    @property
    def quality(self) -> float | None:
        """Mean token quality in [0, 1], or None."""
        return self.aggregate("mean")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; null where there is no score, signals not asked for left out."""
        result: dict[str, Any] = {
            "text": self.text,
            "prompt": self.prompt,
            "quality": self.quality,
            "status": self.status,
            "reason": self.reason,
            "finish_reason": self.finish_reason,
            "token_ids": self.token_ids,
            "tokens": self.tokens,
            "offsets": [list(span) for span in self.offsets],
        }
        for signal in SIGNALS:
            scores = getattr(self, f"token_{signal}")
            if scores is not None:
                result[f"token_{signal}"] = [None if np.isnan(score) else _short(score) for score in scores]
        return result


_AGGREGATIONS: dict[str, Callable[[NDArray[np.float64]], Any]] = {
    "mean": np.mean,
    "min": np.min,
    "product": np.prod,
    "mean_log": lambda scores: np.log(scores).mean(),
    "sum_log": lambda scores: np.log(scores).sum(),
}
_OF_ENTROPY = ("mean", "min")


def _short(score: np.float32) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(score))
