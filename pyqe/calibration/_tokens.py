"""Numbers that a language model wrote, and the words around them, as tokens.

Every quantifier that another pattern follows is bounded, so that the time is in proportion to the length of the text
whatever is in it.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["label", "value", "link", "comma", "newline", "open", "close", "word"]


@dataclass(frozen=True)
class Value:
    """A stated number.

    Attributes:
        number: as a fraction if ``scaled``, else as it stands; NaN if it cannot be read.
        scaled: a percentage or a fraction: not on a scale to be guessed.
        text: as it was written.
        notes: what is not exact about it.
        error: why it is no probability, or None.
    """

    number: float
    scaled: bool
    text: str
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def fraction(self) -> float:
        """A guess at the number in [0, 1], good enough to compare."""
        return self.number / 100 if not self.scaled and self.number > 1 else self.number


@dataclass(frozen=True)
class Token:
    """A piece of the text.

    Attributes:
        kind: of it; quotes, emphasis, parentheses and the like are left out.
        text: in lower case, but for labels.
        label: its number, of a label.
        value: of a number.
        ends: whether a sentence ends right behind it.
    """

    kind: Kind
    text: str
    label: int = -1
    value: Value | None = None
    ends: bool = False


_FRACTIONS = (  # numerator and denominator
    ("½", 12), ("⅓", 13), ("⅔", 23), ("¼", 14), ("¾", 34), ("⅕", 15), ("⅖", 25), ("⅗", 35), ("⅘", 45), ("⅙", 16),
    ("⅚", 56), ("⅛", 18), ("⅜", 38), ("⅝", 58), ("⅞", 78),
)  # fmt: skip
_PLAIN = str.maketrans(
    {
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
        **dict.fromkeys("\t\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", " "),  # of no width
        **dict.fromkeys("—‒―", "–"),
        **dict.fromkeys("−‐‑", "-"),
        **dict.fromkeys("“”„«»", '"'),
        **dict.fromkeys("‘’‚", "'"),
        **{char: f" {parts // 10}/{parts % 10} " for char, parts in _FRACTIONS},
        "⁄": "/",
        "∕": "/",
        "٪": "%",
        "\r": "\n",
        "\u2028": "\n",
    }
)

_SENTENCE_END = re.compile(r"""["'*_)]{0,4}[.!?]["'*_)]{0,4}(?=\s|$)""")
_GIVEN = re.compile(r"((?<![^\W_])(?:p|pr|prob|probability) ?\([^()|\n]{1,100})\|", re.IGNORECASE)  # P(A | text)
_DIGITS = "[0-9]{1,12}"
_DECIMALS = "[0-9]{1,30}(?![0-9])"
# A comma is decimal unless what follows it turns out to be a key: {1:0,2:1}
_NUMBER = rf"""(?:{_DIGITS}(?:\.{_DECIMALS}|,{_DECIMALS}(?!\ {{0,3}}["']?\ {{0,3}}[:=]))?|(?<![^\W_])\.{_DECIMALS})"""
_NUMBER += "(?:e[-+]?[0-9]{1,3})?"
_PERCENT = r"(?:[ *_`]{0,3}(?:%|(?:percent|per\ cent|pct)(?![^\W\d_])))"
# Not inside a word, a version, a date or a power of ten
_END = r"(?![^\W_]|\.[^\W_]|\ {0,2}/\ {0,2}[0-9]|\ {0,2}(?:[x×^]|\*\*?)\ {0,2}[0-9])"
_BOUND = r"(?:less|more|greater|lower|higher)\ than|under|over|below|above|up\ to|at\ least|at\ most"
_VALUE = rf"""
    (?P<bound>(?:(?<![0-9%])[<>≤≥]=?|(?<![^\W_])(?:{_BOUND}))\ {{0,3}})?
    (?P<sign>[-+–])?
    (?:
        (?P<part>{_NUMBER})\ {{0,3}}(?:/|out\ of)\ {{0,3}}(?P<whole>{_DIGITS}){_END}
      | (?P<some>{_DIGITS})\ in\ (?P<all>{_DIGITS}){_END}
      | (?P<first>{_NUMBER})(?P<first_percent>{_PERCENT})?\ {{0,3}}(?:[-–]|to(?![^\W_]))\ {{0,3}}
        (?P<second>{_NUMBER})(?:(?P<second_percent>{_PERCENT})|{_END})
      | (?P<centre>{_NUMBER})(?P<centre_percent>{_PERCENT})?\ {{0,3}}(?:±|\+/?-)\ {{0,3}}
        {_NUMBER}(?:(?P<width_percent>{_PERCENT})|{_END})
      | (?P<single>{_NUMBER})(?:(?P<percent>{_PERCENT})|{_END})
    )
  | (?<![^\W_])between\ {{1,3}}(?P<low>{_NUMBER})(?P<low_percent>{_PERCENT})?\ {{1,3}}and\ {{1,3}}
    (?P<high>{_NUMBER})(?:(?P<high_percent>{_PERCENT})|{_END})
"""
_ENUMERATOR = r"(?P<enumerator>^[ >*\#-]{0,8}[0-9]{1,3}[.)](?=[ *_])|(?<=[,;]\ )[0-9]{1,2}\)(?=\ ))"
_ENDS = (("first", "second"), ("low", "high"))  # of ranges
_WORDS = r"""
  | (?P<junk>(?:(?<![^\W_])(?<!\.)\.)?[0-9](?:[^\W_]|[.,/^](?=[0-9]))*)
  | (?P<word>[^\W\d_](?:[^\W_]|'(?=[^\W\d_]))*)
  | (?P<newline>\n)
  | (?P<comma>[,;])
  | (?P<link>[:=|→]|->|=>|–|(?<=\ )-(?=\ ))
  | (?P<open>[{\[])
  | (?P<close>[}\]])
"""


def plain(text: str) -> str:
    """Text with one form for every kind of space, dash, quote, digit and fraction, without escapes; P(A|x) in words."""
    text = re.sub(r"\\([%_\"'])", r"\1", unicodedata.normalize("NFC", text).translate(_PLAIN))
    return _GIVEN.sub(r"\1 given ", text)


def tokens(text: str, labels: Sequence[str] = ()) -> list[Token]:
    """The tokens of a plain text; labels in any case, with "_", "-" or spaces between their words."""
    found: list[Token] = []
    end = 0
    for match in _pattern(tuple(labels)).finditer(text):
        if match.lastgroup != "enumerator":
            token = _token(match, text)
            if not (found and _repeats(token, found[-1]) and "(" in text[end : match.start()]):
                found.append(token)
        end = match.end()
    return found


def _repeats(token: Token, before: Token) -> bool:
    """Whether two numbers are the same, as in ``0.7 (70%)``."""
    return bool(token.value and before.value and token.value.fraction == before.value.fraction)


def _token(match: re.Match[str], text: str) -> Token:
    kind, content = match.lastgroup or "", match.group()
    ends = _SENTENCE_END.match(text, match.end()) is not None
    if kind.startswith("label"):
        return Token("label", content, label=int(kind[5:]), ends=ends)
    if kind in ("word", "newline", "comma", "link", "open", "close"):
        return Token(kind, content.lower(), ends=ends)  # type: ignore[arg-type]
    return Token("value", content, value=_value(match, text), ends=ends)


def _value(match: re.Match[str], text: str) -> Value:
    """The number that a match is, or why it is none."""
    groups, written = match.groupdict(), match.group().strip()
    percent = any(groups[name] for name in groups if name.endswith("percent"))
    try:
        number, scaled = _number(groups)
    except (ValueError, ZeroDivisionError) as reason:
        return Value(math.nan, False, written, error=str(reason))
    number, scaled = (number / 100, True) if percent and not scaled else (number, scaled)
    error = None
    if (groups["sign"] or "+") != "+" and not _is_dash(match.start("sign"), text):
        error = "is negative"
    elif number > (1 if scaled else 100):
        error = "is more than 100%" if percent else "is more than 1"
    return Value(number, scaled, written, _notes(match, text), error)


def _number(groups: dict[str, str | None]) -> tuple[float, bool]:
    """The number, and whether it is a fraction of a whole; percentages are yet to be divided."""
    part, whole = groups["part"] or groups["some"], groups["whole"] or groups["all"]
    if part and whole:
        return _float(part) / _float(whole), True
    if any(groups[f"{first}_percent"] and not groups[f"{second}_percent"] for first, second in _ENDS):
        raise ValueError("mixes percentages and other numbers")
    stated = [value for names in _ENDS for name in names if (value := groups[name])]
    stated = stated or [value for name in ("single", "centre") if (value := groups[name])]
    if not stated:
        raise ValueError("cannot be read")
    if list(map(_float, stated)) in ([0, 1], [0, 100]):
        raise ValueError("is the whole range")
    return sum(map(_float, stated)) / len(stated), False


def _notes(match: re.Match[str], text: str) -> tuple[str, ...]:
    """What is not exact."""
    notes = []
    if match["first"] or match["low"]:
        notes.append("is a range; its middle was taken")
    if match["centre"]:
        notes.append("has a margin, which was left out")
    wrapped = match.group().startswith("<") and text[match.end() : match.end() + 1] == ">"
    if match["bound"] and not wrapped:
        notes.append("is a bound; it was taken as the number")
    return tuple(notes)


def _float(number: str) -> float:
    whole, comma, decimals = number.partition(",")
    if comma and len(decimals) == 3 and whole.strip("0"):
        raise ValueError("may be thousands or have a decimal comma")
    return float(number.replace(",", "."))


def _is_dash(position: int, text: str) -> bool:
    """Whether a "-" right before a number joins it to what is before, as in ``A-0.6``, rather than being its sign."""
    return position > 0 and (text[position - 1].isalnum() or text[position - 1] in "\"')]*`_")


@lru_cache(maxsize=64)
def _pattern(labels: tuple[str, ...]) -> re.Pattern[str]:
    # the longest first: "very good" before "good"
    order = sorted(range(len(labels)), key=lambda index: -len(labels[index]))
    alternatives = [f"(?P<label{index}>{_label(labels[index])})" for index in order]
    return re.compile(
        "|".join([_ENUMERATOR, *alternatives, _VALUE + _WORDS]), re.VERBOSE | re.IGNORECASE | re.MULTILINE
    )


_LINKED = r"""(?=["'*`\)\] ]{0,4}(?:[:=|→]|->))"""
# English words that are also options of a question, and what may follow them as such
_ARTICLES = {"A": "is|has|with|at|gets|would|should|and|or|given", "I": "is|has|with|at|gets|and|or|given"}


def _label(label: str) -> str:
    """Pattern of a label."""
    words = [re.escape(word) for word in re.split(r"[\s_-]+", label.strip()) if word] or [re.escape(label.strip())]
    pattern = r"[\s_-]{1,3}".join(words)
    if label.strip().removeprefix("-").isdecimal():  # else it is a number like others
        pattern = re.escape(label.strip())
        return rf"""(?:(?<![^\W_])(?<![./-]){pattern}(?:(?=["'])|{_LINKED})|^{pattern}(?=\ [-–]\ ))"""
    # not part of a longer word: non-toxic is not toxic, C++ not C
    start = r"(?<![^\W_])(?<![^\W\d_][-'.&/])" if label[0].isalnum() else ""
    end = r"(?![^\W_]|[+\#@]|[-.'&/][^\W\d_])" if label[-1].isalnum() else r"(?![^\W\d_])"
    if len(label) > 1 or not label.isalpha():
        return start + pattern + end
    if label == "a":
        return rf"{start}a(?:{_LINKED}|(?=\)))"
    article = _ARTICLES.get(label)
    end += "" if article is None else rf"(?!\ {{1,3}}(?!(?:{article})(?![^\W_]))(?-i:[a-z]))"
    return rf"{start}(?:(?-i:{pattern})|{pattern}{_LINKED}){end}"
