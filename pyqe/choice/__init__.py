"""Multiple choice: answer and format uncertainty, abstention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqe._lazy import lazy_getattr

if TYPE_CHECKING:
    from pyqe.choice.abstention import AbstentionPolicy
    from pyqe.choice.answers import parse_answer
    from pyqe.choice.prompts import PromptFormat, Question, read_questions
    from pyqe.choice.scored import ScoredChoice
    from pyqe.choice.scorer import ChoiceScorer
    from pyqe.choice.study import AbstentionResult, CorrelationStudy, Evaluation, correlation_study, evaluate

_HOMES = {
    "AbstentionPolicy": "pyqe.choice.abstention",
    "AbstentionResult": "pyqe.choice.study",
    "ChoiceScorer": "pyqe.choice.scorer",
    "CorrelationStudy": "pyqe.choice.study",
    "Evaluation": "pyqe.choice.study",
    "PromptFormat": "pyqe.choice.prompts",
    "Question": "pyqe.choice.prompts",
    "ScoredChoice": "pyqe.choice.scored",
    "correlation_study": "pyqe.choice.study",
    "evaluate": "pyqe.choice.study",
    "parse_answer": "pyqe.choice.answers",
    "read_questions": "pyqe.choice.prompts",
}

__all__ = [
    "AbstentionPolicy",
    "AbstentionResult",
    "ChoiceScorer",
    "CorrelationStudy",
    "Evaluation",
    "PromptFormat",
    "Question",
    "ScoredChoice",
    "correlation_study",
    "evaluate",
    "parse_answer",
    "read_questions",
]


__getattr__ = lazy_getattr(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
