"""Which option a reply names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyqe.choice.prompts import LETTERS

# "A." "A)" "(A)" "A:", but neither initials ("D.C.", "U.S.A.") nor the end of a word or abbreviation
_LABEL = re.compile(r"\(([A-Za-z])\)|(?<![\w.'’])([A-Z])(?:[):]|\.(?![A-Za-z]\.))")
# "A" alone, but neither the article of "A dog" nor the pronoun of "I think"
_WORD = r"A[ \t]+(?!(?:is|was|or|and|because|since|as|seems|would)\b)[a-z]|I[ \t]+[a-z]"
_BARE = re.compile(rf"(?<![\w.'’-])(?!{_WORD})([A-Z])(?![\w'’+#-]|\.\w)")
_ALONE = re.compile(r"[^\w+#]*([A-Za-z])[^\w+#]*")


@dataclass(frozen=True)
class FoundAnswer:
    """The option that a reply names.

    Attributes:
        index: of the option.
        start: position in the reply of its letter, or of its text.
        end: position after it.
    """

    index: int
    start: int
    end: int


def parse_answer(text: str, choices: Sequence[str]) -> int | None:
    """The option that a reply names, or None where it names none, or several.

    In this order: the first letter written like a label ("B.", "B)", "(B)", "B:"); the text of an option, if it is the
    only one there (upper and lower case and white space do not matter; an option inside a longer one that is there as
    well does not count); a letter by itself, if it is the only one. Letters beyond the options do not count.

    Args:
        text: what the model wrote.
        choices: the options' texts, A first.

    Source: Plaut, Nguyen, Trinh 2024 (arXiv 2402.13213), made strict where a reply is ambiguous.

    Example:
        >>> parse_answer("The answer is B.", ["Rome", "Paris"])
        1
        >>> parse_answer("It must be paris, I think", ["Rome", "Paris"])
        1
        >>> parse_answer("Rome or Paris", ["Rome", "Paris"]) is None
        True
    """
    found = find_answer(text, choices)
    return None if found is None else found.index


def find_answer(text: str, choices: Sequence[str]) -> FoundAnswer | None:
    """As :func:`parse_answer`, with the position of what it went by."""
    letters = LETTERS[: len(choices)]
    mentions = _mentions(text, choices)
    for label in _LABEL.finditer(text):
        group = label.lastindex or 0
        start = label.start(group)
        inside = any(mention.start < start < mention.end for mention in mentions)  # the B of "vitamin B."
        if label[group].upper() in letters and not inside:
            return FoundAnswer(letters.index(label[group].upper()), start, label.end(group))
    named = _only(mentions)
    if named is not None:
        return named
    alone = _ALONE.fullmatch(text)
    bare = [alone] if alone else _BARE.finditer(text)
    return _only(
        FoundAnswer(letters.index(letter[1].upper()), *letter.span(1))
        for letter in bare
        if letter[1].upper() in letters
    )


def _only(found: Iterable[FoundAnswer]) -> FoundAnswer | None:
    """The first one if they all are of one option."""
    first: FoundAnswer | None = None
    for answer in found:
        if first is not None and answer.index != first.index:
            return None
        first = first or answer
    return first


def _mentions(text: str, choices: Sequence[str]) -> list[FoundAnswer]:
    """Where the options' texts are, but for those inside the mention of a longer one."""
    spans = [(match.span(), index) for index, choice in enumerate(choices) for match in _pattern(choice).finditer(text)]
    return [
        FoundAnswer(index, start, end)
        for (start, end), index in spans
        if not any(first <= start and end <= last and last - first > end - start for (first, last), _ in spans)
    ]


def _pattern(choice: str) -> re.Pattern[str]:
    """Finds an option's text as whole words; "8" is neither in "80" nor in "0.8" or "-8"."""
    words = choice.strip().rstrip(".").split()
    body = r"\s+".join(map(re.escape, words)) or r"(?!)"
    return re.compile(rf"(?<!\w)(?<!\d[.,])(?<![-−](?=\d)){body}(?!\w)(?![.,]\d)", re.IGNORECASE)
