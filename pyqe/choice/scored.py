"""Scored questions: what the choice scorer returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pyqe.choice.prompts import Question

Floats = NDArray[np.float64]


@dataclass(eq=False)
class ScoredChoice:
    """A question with what the model makes of its C choices. Fields that a method does not give are None.

    Where the choices were shown in several orders, ``logprobs`` is the log of the mean probability over the orders and
    ``distribution`` the mean distribution, both in the question's own order; MSP, maximal logit and the greedy answer
    belong to the question as it is.

    Attributes:
        question: the question.
        distribution: float64 [C], the choices' probabilities renormalised to sum 1.
        logprobs: float64 [C], log-probability of each choice: of its letter in the softmax over the whole vocabulary
            (all tokens that are that letter, with or without a space, together), or of its text.
        mean_logprobs: float64 [C], log-probability a token of each choice's text (method "text").
        prediction: index of the most probable choice; the first of several that are.
        format_mass: in [0, 1], total probability of the choices' letters, or of the opening parenthesis.
        msp: in [0, 1], maximum softmax probability over the whole vocabulary at the position of the answer's letter.
        max_logit: the largest logit there.
        argmax: id of the most probable token there.
        greedy_text: the most probable token after the prompt (and after "(", if it is that), or what was generated.
        greedy_answer: index of the choice that ``greedy_text`` names, or None.
        greedy_msp: the MSP where that letter stands; 0 where ``greedy_text`` names no choice.
        orders: in how many orders the choices were shown.
        agreement: share of the orders whose own prediction is ``prediction``.
        status: "ok", or "failed" with nothing but the question.
        reason: why it failed.
    """

    question: Question
    distribution: Floats | None = None
    logprobs: Floats | None = None
    mean_logprobs: Floats | None = None
    prediction: int | None = None
    format_mass: float | None = None
    msp: float | None = None
    max_logit: float | None = None
    argmax: int | None = None
    greedy_text: str | None = None
    greedy_answer: int | None = None
    greedy_msp: float | None = None
    orders: int | None = None
    agreement: float | None = None
    status: Literal["ok", "failed", "empty"] = "ok"
    reason: str | None = None

    @property
    def confidence(self) -> float | None:
        """In [0, 1]: renormalised probability of the prediction."""
        return None if self.distribution is None else float(self.distribution.max())

    @property
    def correct(self) -> bool | None:
        """Whether the prediction is the answer; None where either is missing."""
        return self._is_answer(self.prediction)

    @property
    def greedy_correct(self) -> bool | None:
        """Whether the greedy answer is the answer (one that names no choice is wrong); None where it is not known."""
        return (
            None
            if self.greedy_text is None
            else self._is_answer(-1 if self.greedy_answer is None else self.greedy_answer)
        )

    def set_logprobs(self, logprobs: Floats) -> None:
        """Distribution and prediction from the choices' log-probabilities [orders, C].

        Where all choices of an order have probability 0, the question fails.
        """
        totals = np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
        if not np.isfinite(totals).all():
            self.fail("no choice has a probability above 0")
            return
        distributions = np.exp(logprobs - totals)
        self.distribution = distributions.mean(axis=0)
        self.logprobs = np.logaddexp.reduce(logprobs, axis=0) - np.log(len(logprobs))
        self.prediction = int(self.distribution.argmax())
        self.orders = len(logprobs)
        self.agreement = float((distributions.argmax(axis=1) == self.prediction).mean())

    def fail(self, reason: str) -> None:
        """Nothing but a reason."""
        self.status, self.reason = "failed", reason

    def _is_answer(self, index: int | None) -> bool | None:
        return None if index is None or self.question.answer is None else index == self.question.answer

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; null where there is nothing."""
        return {
            "id": self.question.id,
            "question": self.question.question,
            "choices": list(self.question.choices),
            "answer": self.question.answer,
            **self.scores(),
        }

    def scores(self) -> dict[str, Any]:
        """As :meth:`to_dict`, without the question."""
        return {
            "prediction": self.prediction,
            "correct": self.correct,
            "confidence": self.confidence,
            "distribution": _numbers(self.distribution),
            "logprobs": _numbers(self.logprobs),
            "mean_logprobs": _numbers(self.mean_logprobs),
            "format_mass": self.format_mass,
            "msp": self.msp,
            "max_logit": self.max_logit,
            "argmax": self.argmax,
            "greedy_text": self.greedy_text,
            "greedy_answer": self.greedy_answer,
            "greedy_correct": self.greedy_correct,
            "greedy_msp": self.greedy_msp,
            "orders": self.orders,
            "agreement": self.agreement,
            "status": self.status,
            "reason": self.reason,
        }


def _numbers(values: Floats | None) -> list[float | None] | None:
    """-inf, the log of a probability that underflows, has no place in JSON."""
    return None if values is None else [float(value) if np.isfinite(value) else None for value in values]
