"""Probabilities out of what a language model wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pyqe._arrays import Floats
from pyqe.calibration._pairing import SAME, Pair, Reading, is_doubtful, read, read_text
from pyqe.calibration._tokens import Token, Value, plain, tokens

Status = Literal["ok", "repaired", "failed"]

_ROUNDING = 0.011  # by which stated probabilities may miss a sum of 1
_REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|can ?not|can't|unable to|not able to|won't|refuse|decline|as an ai|not appropriate|"
    r"not comfortable)\b",
    re.IGNORECASE,
)


# --- results


@dataclass(frozen=True, eq=False)
class ParsedDistribution:
    """Probabilities that a model stated.

    Attributes:
        probs: float64 [K], in the order of the labels, sum 1; NaN if ``status`` is "failed".
        status: "ok": as stated, but for rounding; "repaired": with a reasonable reading of what was not as it should
            be; "failed": there is none.
        problems: a sentence for each thing that was not as it should be.
    """

    probs: Floats
    status: Status
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParsedConfidence:
    """A confidence that a model stated.

    Attributes:
        confidence: in [0, 1]; NaN if ``status`` is "failed".
        status: as of :class:`ParsedDistribution`.
        problems: a sentence for each thing that was not as it should be.
    """

    confidence: float
    status: Status
    problems: tuple[str, ...] = ()


class DistributionParseError(ValueError):
    """A text did not state a distribution as it should; ``parsed`` is what could be made of it."""

    def __init__(self, parsed: ParsedDistribution) -> None:
        super().__init__("; ".join(parsed.problems))
        self.parsed = parsed


class ConfidenceParseError(ValueError):
    """A text did not state a confidence as it should; ``parsed`` is what could be made of it."""

    def __init__(self, parsed: ParsedConfidence) -> None:
        super().__init__("; ".join(parsed.problems))
        self.parsed = parsed


# --- distributions


def parse_distribution(text: str, labels: Sequence[str], *, strict: bool = False) -> ParsedDistribution:
    r"""The distribution over labels that a model's reply states.

    Reads dicts and lists in Python's or JSON's notation, alone, in code fences or in prose; ``A: 60%``, ``60% for A``,
    bullets, Markdown tables; percentages, fractions, ``~60%``, ``about 60 percent``, decimal commas; labels in any
    case. The last dict counts, or else the last number beside each label. Nothing is evaluated, and the time is in
    proportion to the length.

    What it repairs, and says so: numbers that miss a sum of 1 by more than .01 are divided by it; those that are
    percentages without saying so are taken as such; a range counts as its middle, a bound as its number; labels without
    a number share what is left to 1; labels that are not in ``labels`` are left out. What it does not read: negative
    numbers, more than 100%, numbers that could belong to several labels, words such as "likely".

    Args:
        text: the reply.
        labels: K > 1 labels that differ in more than case, "_", "-" and spaces.
        strict: raise unless the status is "ok".

    Raises:
        TypeError: not a string, or no strings.
        ValueError: labels that are empty or alike.
        DistributionParseError: with ``strict``, a status other than "ok".

    Source: the replies that Wang et al. 2024 (arXiv 2410.06707) ask for; the rules are pyqe's own.

    Example:
        >>> reply = "```json\n{'Joy': '70%', 'anger': 0.2, 'fear': 1/10}\n```"
        >>> parsed = parse_distribution(reply, ["joy", "fear", "anger"])
        >>> parsed.probs, parsed.status
        (array([0.7, 0.1, 0.2]), 'ok')
        >>> parsed = parse_distribution("Joy: about 60%, anger 20-40%.", ["joy", "fear", "anger"])
        >>> parsed.probs, parsed.status
        (array([0.6, 0.1, 0.3]), 'repaired')
        >>> print(*parsed.problems, sep="\n")
        anger: '20-40%' is a range; its middle was taken
        fear: no number; gets 0.1 of what is left
    """
    names = _checked_labels(labels)
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {type(text).__name__}")
    reading = read(tokens(plain(text), names), len(names))
    parsed = _distribution(reading, names, text)
    if strict and parsed.status != "ok":
        raise DistributionParseError(parsed)
    return parsed


def _checked_labels(labels: Sequence[str]) -> list[str]:
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"labels: expected a list of strings, got {labels!r:.80}")
    names = [plain(label).strip() for label in labels]
    keys = [re.sub(r"[\s_-]+", " ", name).casefold() for name in names]
    if len(keys) < 2 or not all(key.strip() for key in keys) or len(set(keys)) < len(keys):
        raise ValueError(f"labels: expected two or more that differ in more than case, got {list(labels)!r:.200}")
    return names


def _distribution(reading: Reading, names: list[str], text: str) -> ParsedDistribution:
    """The distribution that pairs of labels and numbers make."""
    problems = list(reading.problems)
    try:
        values = _values(reading, names, text, problems)
        probs = _on_one_scale(values, problems)
        total = float(np.nansum(probs))
        probs = _completed(probs, names, 1 - total - sum(value.fraction for value in reading.others), problems)
        if not probs.sum() > 0:
            raise _UnreadableError("all numbers are 0")
    except _UnreadableError as reason:
        return ParsedDistribution(np.full(len(names), math.nan), "failed", (*problems, str(reason)))
    if abs(probs.sum() - 1) > _ROUNDING:
        problems.append(f"the numbers add up to {total:.4g}; divided by that")
    return ParsedDistribution(probs / probs.sum(), "repaired" if problems else "ok", tuple(problems))


class _UnreadableError(Exception):
    """There is no reasonable reading; the message says why."""


def _values(reading: Reading, names: list[str], text: str, problems: list[str]) -> list[Value | None]:
    """A number for each label, None where it has none; ``problems`` is added to, here and below."""
    pairs: list[list[Pair]] = [[] for _ in names]
    for pair in reading.pairs:
        pairs[pair.label].append(pair)
    values = []
    for name, stated in zip(names, pairs, strict=True):
        value, reason = _settled(stated)
        problems += [f"{name}: {problem}" for problem in [reason, *_notes(value)] if problem]
        values.append(value)
    if not any(values):
        raise _UnreadableError(_nothing(text, "no label has a number"))
    for name, value in zip(names, values, strict=True):
        if value and value.error:
            raise _UnreadableError(f"{name}: {value.text!r:.40} {value.error}")
    return values


def _settled(pairs: list[Pair]) -> tuple[Value | None, str]:
    """The number of a label out of all that are stated for it, and what is wrong about that."""
    # What is far from a label and above 1 counts something else
    pairs = [pair for pair in pairs if pair.certain or pair.value.scaled or pair.value.number <= 1]
    if not pairs:
        return None, ""
    taken = next((pair for pair in reversed(pairs) if pair.certain), pairs[-1])
    stated = [pair.value.fraction for pair in pairs if not math.isnan(pair.value.number)]
    if stated and max(stated) - min(stated) > SAME:
        return taken.value, f"stated more than once; {taken.value.text!r:.40} was taken"
    return taken.value, "" if taken.certain else f"{taken.value.text!r:.40} may be about something else"


def _notes(value: Value | None) -> list[str]:
    return [] if value is None else [f"{value.text!r:.40} {note}" for note in value.notes]


def _nothing(text: str, reason: str) -> str:
    """Why there is no number."""
    return "the model refused" if _REFUSAL.search(text) else reason


def _on_one_scale(values: list[Value | None], problems: list[str]) -> Floats:
    """Numbers as fractions, NaN for those that are missing."""
    numbers = np.array([math.nan if value is None else value.number for value in values])
    bare = np.array([value is not None and not value.scaled for value in values])
    if not (numbers[bare] > 1).any():
        return numbers
    others = ~bare & ~np.isnan(numbers)
    if others.any() or abs(np.nansum(numbers) - 100) <= 100 * _ROUNDING:
        problems.append("numbers above 1 were taken as percentages")
        return np.where(bare, numbers / 100, numbers)
    return numbers


def _completed(probs: Floats, names: list[str], left: float, problems: list[str]) -> Floats:
    """Missing numbers replaced by equal shares of what is left."""
    missing = np.isnan(probs)
    if not missing.any():
        return probs
    share = max(0.0, left) / int(missing.sum())
    lost = [name for name, gone in zip(names, missing, strict=True) if gone]
    problems += [f"{name}: no number; gets {share:.4g} of what is left" for name in lost]
    return np.where(missing, share, probs)


# --- single confidences


# In the place of labels
_CONFIDENCE_WORDS = (
    "probability",
    "prob",
    "confidence",
    "confident",
    "certainty",
    "certain",
    "likelihood",
    "likely",
    "chance",
    "sure",
)


_NO_CONFIDENCE = re.compile(r"\bconfidence (?:interval|bound|limit)s?\b", re.IGNORECASE)
_TO_TEN = re.compile(r"(?<![\w.])[01] ?(?:-|–|to|and) ?(?:5|7|10|100)(?![\w.])", re.IGNORECASE)  # a scale's ends


def parse_confidence(text: str, *, strict: bool = False) -> ParsedConfidence:
    r"""The confidence that a model's reply states.

    It is the number beside a word such as "probability", "confidence", "sure" or "chance", the last one if there are
    several; or else, with a problem, a number at the very end of the text.

    Args:
        text: the reply.
        strict: raise unless the status is "ok".

    Raises:
        TypeError: not a string.
        ConfidenceParseError: with ``strict``, a status other than "ok".

    Example:
        >>> parse_confidence("Guess: Paris\nProbability: 0.85")
        ParsedConfidence(confidence=0.85, status='ok', problems=())
        >>> parse_confidence("Paris, I'm about 90% sure.").confidence
        0.9
        >>> parse_confidence("Paris, 0.95")
        ParsedConfidence(confidence=0.95, status='repaired', problems=("no word says what '0.95' is",))
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {type(text).__name__}")
    problems: list[str] = []
    try:
        confidence = _confidence(tokens(plain(text), _CONFIDENCE_WORDS), text, problems)
        parsed = ParsedConfidence(confidence, "repaired" if problems else "ok", tuple(problems))
    except _UnreadableError as reason:
        parsed = ParsedConfidence(math.nan, "failed", (*problems, str(reason)))
    if strict and parsed.status != "ok":
        raise ConfidenceParseError(parsed)
    return parsed


def _confidence(stream: list[Token], text: str, problems: list[str]) -> float:
    if _NO_CONFIDENCE.search(text):
        raise _UnreadableError("a confidence interval is no confidence")
    lines = read_text(stream)
    value, problem = _settled(lines.pairs)
    named = value is not None
    if value is None and not lines.problems and not is_doubtful(_last_line(stream)):
        value = next((token.value for token in reversed(stream) if token.kind not in ("newline", "close")), None)
        problem = f"no word says what {value.text!r:.40} is" if value and len(stream) > 1 else ""
    if value is None:
        problems += lines.problems
        raise _UnreadableError(_nothing(text, "no number is a confidence"))
    problems += [reason for reason in [problem, *_notes(value)] if reason]
    if value.error:
        raise _UnreadableError(f"{value.text!r:.40} {value.error}")
    if not value.scaled and value.number == 1 and _TO_TEN.search(text):
        raise _UnreadableError(f"{value.text!r:.40} may be out of ten or of a hundred")
    if value.scaled or value.number <= 1:
        return value.number
    if not named or value.number <= 10:  # out of ten, out of a hundred, or the answer itself
        raise _UnreadableError(f"{value.text!r:.40} may be on any scale")
    problems.append(f"{value.text!r:.40} was taken as a percentage")
    return value.number / 100


def _last_line(stream: list[Token]) -> list[Token]:
    """What comes after the last line break that words or numbers follow."""
    ends = [index for index, token in enumerate(stream) if token.kind not in ("newline", "close")]
    last = stream[: ends[-1] + 1] if ends else []
    breaks = [index for index, token in enumerate(last) if token.kind == "newline"]
    return last[breaks[-1] + 1 :] if breaks else last
