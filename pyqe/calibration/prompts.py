"""Prompts that ask a model for its confidence in words; :mod:`pyqe.calibration.parsing` reads the replies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

Style = Literal["incremental", "direct"]
Messages = list[dict[str, str]]


def stated_distribution(labels: Sequence[str], question: str, *, style: Style = "incremental") -> str:
    """A prompt for the probabilities of all labels.

    Args:
        labels: K > 1 different labels.
        question: what is asked, with the text that it is about.
        style: "incremental": for the label, then the confidence in it, then the probabilities of all labels, then the
            same as a dict; "direct": for the dict alone.

    Raises:
        ValueError: fewer than two labels, or alike; unknown style.

    Source: Wang et al. 2024 (arXiv 2410.06707) for the steps; the wording is pyqe's own.

    Example:
        >>> print(stated_distribution(["joy", "anger"], "Which emotion? 'What a day!'", style="direct"))
        Which emotion? 'What a day!'
        <BLANKLINE>
        Labels: joy, anger
        <BLANKLINE>
        How probable is each of the labels? Reply with nothing but a JSON object that has every label as a key and its \
probability as a number between 0 and 1. The numbers must add up to 1. The form is:
        {"joy": <probability>, "anger": <probability>}
    """
    names = list(labels)
    if isinstance(labels, str) or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"labels: expected two or more different ones, got {labels!r:.200}")
    if style not in ("incremental", "direct"):
        raise ValueError(f"style: expected 'incremental' or 'direct', got {style!r}")
    form = "{" + ", ".join(f"{json.dumps(name, ensure_ascii=False)}: <probability>" for name in names) + "}"
    steps = _INCREMENTAL if style == "incremental" else _DIRECT
    return f"{question}\n\nLabels: {', '.join(names)}\n\n{steps}\n{form}"


_DIRECT = (
    "How probable is each of the labels? Reply with nothing but a JSON object that has every label as a key and its "
    "probability as a number between 0 and 1. The numbers must add up to 1. The form is:"
)
_INCREMENTAL = """\
Reply in four steps, each on lines of its own:
1. The label that fits best.
2. Your confidence that this label is right, as a number between 0 and 1.
3. The probability of each of the labels, as a number between 0 and 1, one label a line. They must add up to 1.
4. The probabilities of step 3 once more, as a JSON object of this form:"""


def stated_confidence(question: str) -> str:
    r"""A prompt for an answer and the confidence in it.

    Args:
        question: what is asked.

    Source: the form of Tian et al. 2023 (arXiv 2305.14975), answer and probability on a line each; the wording is
    pyqe's own.

    Example:
        >>> stated_confidence("Who wrote Emma?").splitlines()[0]
        'Who wrote Emma?'
    """
    return f"{question}\n\n{_CONFIDENCE}"


_CONFIDENCE = """\
Give your best answer, as short as it can be, and the probability that it is right, between 0 and 1. Reply with these \
two lines and nothing else:
Answer: <answer>
Probability: <probability>"""


def messages(prompt: str, system: str | None = None) -> Messages:
    """A prompt as the messages that chat templates and chat APIs take.

    Args:
        prompt: what the user says.
        system: what the system says before, if anything.

    Example:
        >>> messages("Who wrote Emma?")
        [{'role': 'user', 'content': 'Who wrote Emma?'}]
    """
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]
