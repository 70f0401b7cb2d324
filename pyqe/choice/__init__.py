"""Multiple choice: answer and format uncertainty, abstention."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyqe.choice.abstention import AbstentionPolicy
    from pyqe.choice.answers import parse_answer
    from pyqe.choice.prompts import PromptFormat, Question, read_questions
    from pyqe.choice.scored import ScoredChoice
    from pyqe.choice.scorer import ChoiceScorer
    from pyqe.choice.study import AbstentionResult, CorrelationStudy, Evaluation, correlation_study, evaluate

_HOMES: dict[str, str] = {
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


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'pyqe.choice' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
