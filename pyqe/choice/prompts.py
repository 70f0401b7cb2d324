"""Multiple-choice questions, and the prompts made of them."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pyqe.encoding import Prompt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Style = Literal["letter", "parenthesis"]
Method = Literal["letter", "text"]
Permutations = int | Literal["cyclic", "all"]

STYLES: tuple[Style, ...] = ("letter", "parenthesis")
METHODS: tuple[Method, ...] = ("letter", "text")
_MOST_ORDERS = 5040  # of seven choices


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        question: its text.
        choices: the options' texts, 2 to 26.
        answer: index of the right one, or None where it is not known.
        id: whatever names it.

    Example:
        >>> Question.from_dict({"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1, "subject": "sums"})
        Question(question='2 + 2 =', choices=('3', '4'), answer=1, id=None)
    """

    question: str
    choices: Sequence[str]
    answer: int | None = None
    id: str | int | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Question:
        """A question of fields ``question``, ``choices``, and perhaps ``answer`` and ``id``; others are passed over.

        Raises:
            ValueError: they are no question; the message names the field.
        """
        problem = question_problem(fields)
        if problem is not None:
            raise ValueError(problem)
        return cls(fields["question"], tuple(fields["choices"]), fields.get("answer"), fields.get("id"))


def question_problem(fields: Mapping[str, Any]) -> str | None:
    """What is wrong with the fields ``question``, ``choices`` and ``answer`` (which may be missing), or None.

    Example:
        >>> question_problem({"question": "Who?", "choices": ["me"]})
        'choices: expected 2 to 26, got 1'
    """
    for name in ("question", "choices"):
        if name not in fields:
            return f"expected a field {name!r}, got {', '.join(map(repr, fields)) or 'no fields'}"
    question, choices, answer = fields["question"], fields["choices"], fields.get("answer")
    if not isinstance(question, str) or not question.strip():
        return f"question: expected a text, got {question!r:.40}"
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        return f"choices: expected a list of texts, got {choices!r:.40}"
    if not 2 <= len(choices) <= len(LETTERS):
        return f"choices: expected 2 to {len(LETTERS)}, got {len(choices)}"
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            return f"choices[{number}]: expected a text, got {choice!r:.40}"
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(choices)):
        return f"answer: expected an index from 0 to {len(choices) - 1}, or null, got {answer!r:.40}"
    return None


def shot_problem(fields: Mapping[str, Any]) -> str | None:
    """What is wrong with a question that is to be a demonstration, or None."""
    missing = None if fields.get("answer") is not None else "answer: expected one in a demonstration, got none"
    return question_problem(fields) or missing


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Questions of a JSON-lines file; blank lines are passed over.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no question; the message has its number.
    """
    questions = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    raise TypeError(f"expected a JSON object, got {type(fields).__name__}")
                questions.append(Question.from_dict(fields))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: line {number}: {error}") from error
    return questions


@dataclass(frozen=True)
class PromptFormat:
    r"""How a question is put to the model.

    Attributes:
        style: "letter" for options "A. text" and answers "A"; "parenthesis" for "(A) text" and "(A)".
        chat: whether as chat messages.
        listed: whether the options are in the prompt; without them the answer is an option's text.
        instruction: what comes first; None for a default that suits the rest.

    Example:
        >>> question = Question("2 + 2 =", ["3", "4"], answer=1)
        >>> print(PromptFormat(instruction="").prompt(question))
        Question: 2 + 2 =
        A. 3
        B. 4
        Answer:
    """

    style: Style = "letter"
    chat: bool = False
    listed: bool = True
    instruction: str | None = None

    def prompt(self, question: Question, shots: Sequence[Question] = (), order: Sequence[int] | None = None) -> Prompt:
        """Text, or chat messages, up to where the answer begins.

        Args:
            question: its choices are shown in ``order``.
            shots: questions with answers that come before, their choices as they are.
            order: indices of the choices; default as they are.
        """
        instruction = f"{self._instruction}\n\n" if self._instruction else ""
        if not self.chat:
            blocks = [f"{self._block(shot)}\nAnswer:{self.answer_text(shot)}" for shot in shots]
            return instruction + "\n\n".join([*blocks, f"{self._block(question, order)}\nAnswer:"])
        messages = []
        for shot in shots:
            messages.append({"role": "user", "content": self._block(shot)})
            messages.append({"role": "assistant", "content": self.answer_text(shot)})
        messages.append({"role": "user", "content": self._block(question, order)})
        messages[0]["content"] = instruction + messages[0]["content"]
        return messages

    def answer_text(self, question: Question) -> str:
        """What the model should write for a question whose answer is known."""
        assert question.answer is not None
        if not self.listed:
            return self.before_answer + question.choices[question.answer]
        return self.before_answer + self.label(question.answer)

    @property
    def before_answer(self) -> str:
        """White space between the prompt and the answer."""
        return "" if self.chat else " "

    def label(self, index: int) -> str:
        """The answer at a position, such as "A" or "(A)"."""
        return LETTERS[index] if self.style == "letter" else f"({LETTERS[index]})"

    def _block(self, question: Question, order: Sequence[int] | None = None) -> str:
        lines = [f"Question: {question.question}"]
        if self.listed:
            shown = [question.choices[index] for index in order or range(len(question.choices))]
            ends = "." if self.style == "letter" else ""
            lines += [f"{self.label(position)}{ends} {choice}" for position, choice in enumerate(shown)]
        return "\n".join(lines)

    @property
    def _instruction(self) -> str:
        if self.instruction is not None:
            return self.instruction
        if self.chat and self.listed:
            wanted = "letter" if self.style == "letter" else "letter in parentheses"
            return f"Answer the following multiple choice question with the {wanted} of the right choice, nothing else."
        if self.chat:
            return "Answer the following question."
        return f"The following are {'multiple choice ' if self.listed else ''}questions (with answers)."


def orders(question: Question, permutations: Permutations, seed: int) -> list[tuple[int, ...]]:
    """Different orders of a question's choices, the given one first.

    Args:
        question: its texts and the seed decide which orders are drawn, whatever other questions there are.
        permutations: how many, drawn at random (all, if there are no more); "cyclic": each choice once at each
            position; "all".
        seed: of the draw.

    Raises:
        ValueError: "all" of more than seven choices.

    Example:
        >>> orders(Question("?", ["x", "y", "z"]), "cyclic", seed=0)
        [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    """
    count = len(question.choices)
    given = tuple(range(count))
    if permutations == "cyclic":
        return [given[start:] + given[:start] for start in range(count)]
    total = math.factorial(count)
    if permutations == "all" and total > _MOST_ORDERS:
        raise ValueError(f"permutations: {count} choices have {total} orders; expected 'cyclic' or a number")
    wanted = total if permutations == "all" else min(int(permutations), total)
    if wanted == total:
        return list(itertools.permutations(given))
    drawn = {given: None}  # a dict keeps the order of the draw
    generator = random.Random(repr((seed, question.question, tuple(question.choices))))
    while len(drawn) < wanted:
        drawn[tuple(generator.sample(given, count))] = None
    return list(drawn)
