"""Multiple choice: answer and format uncertainty, abstention."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyqe.choice.abstention import AbstentionPolicy
    from pyqe.choice.study import AbstentionResult, CorrelationStudy, Evaluation, correlation_study, evaluate

_HOMES: dict[str, str] = {
    "AbstentionPolicy": "pyqe.choice.abstention",
    "AbstentionResult": "pyqe.choice.study",
    "CorrelationStudy": "pyqe.choice.study",
    "Evaluation": "pyqe.choice.study",
    "correlation_study": "pyqe.choice.study",
    "evaluate": "pyqe.choice.study",
}

__all__ = [
    "AbstentionPolicy",
    "AbstentionResult",
    "CorrelationStudy",
    "Evaluation",
    "correlation_study",
    "evaluate",
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
