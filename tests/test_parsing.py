"""What is read out of replies: right, or with a problem, or not at all; never wrong without a word."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqe.calibration import (
    ConfidenceParseError,
    DistributionParseError,
    ParsedDistribution,
    parse_confidence,
    parse_distribution,
    prompts,
)

LABELS = ["positive", "neutral", "negative"]
PROBS = [0.7, 0.2, 0.1]


def assert_reads(reply: str, probs: Sequence[float], status: str, labels: Sequence[str] = LABELS) -> ParsedDistribution:
    parsed = parse_distribution(reply, labels)
    assert parsed.status == status, parsed
    np.testing.assert_allclose(parsed.probs, probs, atol=1e-9)
    assert bool(parsed.problems) == (status != "ok")
    return parsed


# --- distributions as they should be


@pytest.mark.parametrize(
    "reply",
    [
        '{"positive": 0.7, "neutral": 0.2, "negative": 0.1}',
        "{'positive': 0.7, 'neutral': 0.2, 'negative': 0.1}",
        "{positive: 0.7, neutral: 0.2, negative: 0.1}",
        '{"positive": "70%", "neutral": "20 %", "negative": "10 percent"}',
        '{"POSITIVE": .7, "Neutral": 2e-1, "negative": 1/10}',
        "Sure!\n```json\n{\n  'positive': 0.70,\n  'neutral': 0.20,\n  'negative': 0.10,\n}\n```\nAnything else?",
        "My answer is {'positive': 0.7, 'neutral': 0.2, 'negative': 0.1}, as 2 of 3 words are good.",
        '{"probabilities": {"positive": 0.7, "neutral": 0.2, "negative": 0.1}, "confidence": 0.65}',
        '{"positive": {"probability": 0.7}, "neutral": {"probability": 0.2}, "negative": {"probability": 0.1}}',
        '[{"label": "positive", "probability": 0.7}, {"label": "neutral", "probability": 0.2}, '
        '{"label": "negative", "probability": 0.1, "reason": "1 bad word"}]',
        '{"label": "positive", "p": 0.7}\n{"label": "neutral", "p": 0.2}\n{"label": "negative", "p": 0.1}',
        '[("positive", 0.7), ("neutral", 0.2), ("negative", 0.1)]',
        "positive: 70%\nneutral: 20%\nnegative: 10%",
        "- **Positive**: 70%\n- **Neutral**: 20%\n- **Negative**: 10%\n\nTotal: 100%",
        "* Positive - 0.7\n* Neutral - 0.2\n* Negative - 0.1",
        "1. Positive: 70%\n2. Neutral: 20%\n3. Negative: 10%",
        "1) positive = 0.7; 2) neutral = 0.2; 3) negative = 0.1",
        "| Label | Probability |\n|:---|---:|\n| Positive | 70% |\n| Neutral | 20% |\n| Negative | 10% |",
        "| Positive | Neutral | Negative |\n|---|---|---|\n| 0.7 | 0.2 | 0.1 |",
        "label,probability\npositive,0.7\nneutral,0.2\nnegative,0.1",
        "positive ...... 0.7\nneutral.......0.2\nnegative ...... 0.1",
        "positive\t0.7\nneutral\t0.2\nnegative\t0.1",
        "Positive\n0.7\n\nNeutral\n0.2\n\nNegative\n0.1",
        "positive:\n  0.7\nneutral:\n  0.2\nnegative:\n  0.1",
        "positive, neutral, negative: 0.7, 0.2, 0.1",
        "positive 70% neutral 20% negative 10%",
        "70% positive, 20% neutral, 10% negative",
        "I'd say 70% for positive, 20% for neutral and 10% for negative.",
        "There is a 70% chance of positive, a 20% chance of neutral and 10% of negative.",
        "The probability of positive is about 0.7, that of neutral ~0.2 and that of negative approximately 0.1.",
        "P(positive) = 0.7, P(neutral | text) = 0.2, P(negative) = 0.1",
        r"$P(\text{positive}) = 70\%$, $P(\text{neutral}) = 20\%$, $P(\text{negative}) = 10\%$",
        "Positive → 70%\nNeutral → 20%\nNegative → 10%",
        "Positive — 70 %\nNeutral — 20 %\nNegative — 10 %",  # not breaking spaces
        "positive: 0,7; neutral: 0,2; negative: 0,1",
        "positive: 0,7, neutral: 0,2, negative: 0,1",
        "positive: 7/10, neutral: 2 out of 10, negative: 1 in 10",
        "positive: 70% (0.7), neutral: 20% (0.2), negative: 10% (0.1)",
        "positive：７０％、neutral：２０％、negative：１０％",
        "“positive”: 0.7, “neutral”: 0.2, “negative”: 0.1",
        "Label: positive\nConfidence: 70%\n\npositive: 0.7\nneutral: 0.2\nnegative: 0.1\n\n"
        '{"positive": 0.7, "neutral": 0.2, "negative": 0.1}',
        "First {'positive': 0.7, 'neutral': 0.2, 'negative': 0.1}, or {'text': 'nothing'}.",
        "{'positive': <0.7>, 'neutral': <0.2>, 'negative': <0.1>}",
    ],
)
def test_forms_that_models_use(reply: str) -> None:
    assert_reads(reply, PROBS, "ok")


def test_order_is_that_of_the_labels() -> None:
    assert_reads("negative: 0.1, positive: 0.7, neutral: 0.2", PROBS, "ok")


def test_rounding_is_no_problem() -> None:
    assert_reads("positive: 0.33, neutral: 0.33, negative: 0.33", [1 / 3] * 3, "ok")
    assert_reads("positive: 1, neutral: 0, negative: 0.0", [1, 0, 0], "ok")


@pytest.mark.parametrize(
    ("labels", "reply", "probs"),
    [
        (["A", "B"], "A: 60%\nB: 40%", [0.6, 0.4]),
        (["A", "B"], "A good guess is A: 0.6 and B: 0.4.", [0.6, 0.4]),
        (["A", "B"], "(a) 60%, (b) 40%", None),
        (["A", "B"], "a: 60%, b: 40%", [0.6, 0.4]),
        (["A", "B"], "A. Paris: 60%\nB. Rome: 40%", [0.6, 0.4]),
        (["A", "B"], "A) Paris (60%)\nB) Rome (40%)", None),
        (["I", "J"], "I think it is J.\nI: 0.4, J: 0.6", [0.4, 0.6]),
        (["1", "2", "3"], '{"1": 0.1, "2": 0.2, "3": 0.7}', [0.1, 0.2, 0.7]),
        (["1", "2", "3"], "{1:0,2:0.3,3:0.7}", [0, 0.3, 0.7]),
        (["1 star", "2 stars"], "1 star: 0.1, 2 stars: 0.9", [0.1, 0.9]),
        (["good", "very good"], "Very good: 0.7, good: 0.3", [0.3, 0.7]),
        (["not_toxic", "toxic"], "Not toxic: 0.7, toxic: 0.3", [0.7, 0.3]),
        (["non-toxic", "toxic"], "non toxic: 0.7, toxic: 0.3", [0.7, 0.3]),
        (["yes", "no"], "No: 0.3, yes: 0.7", [0.7, 0.3]),
        (["True", "False"], '{"true": 0.9, "false": 0.1}', [0.9, 0.1]),
        (["C", "C++", "C#"], "C: 0.1, C++: 0.2, C#: 0.7", [0.1, 0.2, 0.7]),
        (["N/A", "other"], "n/a 10%, other 90%", [0.1, 0.9]),
        (["früh", "spät"], "FRÜH: 0,25\nSpät: 0,75", [0.25, 0.75]),
        (["😀", "😡"], "😀: 0.8 😡: 0.2", [0.8, 0.2]),
        (["(A)", "(B)"], "(A) 80% (B) 20%", [0.8, 0.2]),
        (["a", "b"], "a: 80%, b: 20%", [0.8, 0.2]),
        (["a", "b"], "I'd give a 20% chance to b and 80% to a.", None),
        (["A", "B"], "A 20% chance for B, 80% for A.", None),
        (["C", "E"], "Vitamin C: 0.5, e.g. 0.5", None),
        (["A", "B"], '{"answer": "A", "probs": {"A": 0.8, "B": 0.2}}', [0.8, 0.2]),
        (["A", "B"], "P(A|x): 0.8, P(B|x): 0.2", [0.8, 0.2]),
        (["A", "B"], '{"A": {"count": 1, "prob": 0.88}, "B": {"count": 0, "prob": 0.12}}', [0.88, 0.12]),
        (["A", "B"], '{"A": {"rank": 1, "prob": 0.88}, "B": {"rank": 2, "prob": 0.12}}', [0.88, 0.12]),
        (["A", "B"], '{"A": {"logit": 1, "prob": 0.88}, "B": {"logit": 0, "prob": 0.12}}', [0.88, 0.12]),
        (["A", "B"], '{"A": {"score": 1, "prob": 0.88}, "B": {"score": 0, "prob": 0.12}}', [0.88, 0.12]),
        (["A", "B"], '{"A": {"logit": 1}, "B": {"logit": 0}}', None),
        (["A", "B"], '{"A": {"min": 0.1, "max": 0.3}, "B": {"min": 0.7, "max": 0.9}}', None),
        (["1", "2"], "1 - 0.6\n2 - 0.4", [0.6, 0.4]),
        (["-1", "0", "1"], "-1: 0.2, 0: 0.3, 1: 0.5", [0.2, 0.3, 0.5]),
        (["joy", "sadness", "love"], "joy 70%, sadness 20%, love 10% (total 100%)", [0.7, 0.2, 0.1]),
        (["total", "partial"], '{"total": 1, "partial": 0}', [1, 0]),
        (["A", "B"], "- label: A\n  probability: 0.8\n- label: B\n  probability: 0.2", [0.8, 0.2]),
    ],
)
def test_labels_of_all_kinds(labels: list[str], reply: str, probs: list[float] | None) -> None:
    if probs is None:
        assert parse_distribution(reply, labels).status != "ok"
    else:
        assert_reads(reply, probs, "ok", labels)


# --- what has a problem


@pytest.mark.parametrize(
    ("reply", "probs", "problem"),
    [
        ("positive: 0.7, neutral: 0.2, negative: 0.3", np.array([7, 2, 3]) / 12, "add up to 1.2"),
        ("positive: 70, neutral: 20, negative: 10", PROBS, "taken as percentages"),
        ("positive: 7, neutral: 2, negative: 1", PROBS, "add up to 10"),
        ("positive: 70%, neutral: 20, negative: 10%", PROBS, "taken as percentages"),
        ("positive: 60-80%, neutral: 0.2, negative: 0.1", PROBS, "'60-80%' is a range"),
        ("positive: 0.6 to 0.8, neutral: 0.2, negative: 0.1", PROBS, "is a range"),
        ("positive: between 60 and 80%, neutral: 0.2, negative: 0.1", PROBS, "is a range"),
        ("positive: 70% ± 5%, neutral: 0.2, negative: 0.1", PROBS, "margin"),
        ("positive: >70%, neutral: 0.2, negative: 0.1", PROBS, "'>70%' is a bound"),
        ("positive: 0.7, neutral: 0.2, negative: less than 10%", PROBS, "is a bound"),
        ("positive: 0.7, neutral: 0.2", PROBS, "negative: no number"),
        ("positive: 0.7, negative: 0.3", [0.7, 0, 0.3], "neutral: no number"),
        ("positive: 0.4", [0.4, 0.3, 0.3], "neutral: no number"),
        ("positive: 0.7, neutral: 0.2, negative: unlikely", PROBS, "negative: no number"),
        ('{"positive": 0.7, "neutral": 0.2, "negative": null}', PROBS, "negative: no number"),
        ('{"positive": 0.7, "neutral": 0.2, "negative": NaN}', PROBS, "negative: no number"),
        ("{'positive': 0.5, 'neutral': 0.25, 'negative': 0.25, 'mixed': 0.2}", [0.5, 0.25, 0.25], "'mixed' is none"),
        ("positive: 0.5\nneutral: 0.2\nnegative: 0.1\npositive: 0.7", PROBS, "positive: stated more than once"),
        ("positive: 0.5, neutral: 0.3, negative: 0.2. Or {'positive': .7, 'neutral': .2, 'negative': .1}", PROBS,
         "outside the dict"),
        ("[0.7, 0.2, 0.1]", PROBS, "taken in their order"),
        ("0.7, 0.2, 0.1", PROBS, "taken in their order"),
        ('{"positive": 0.7, "neutral": 0.2, "negative": 0.1', PROBS, "cut off"),
        ("positive: 0.7 (up from 0.5), neutral: 0.2, negative: 0.1", PROBS, "not clear"),
        ("| positive | 0.7 | 12 |\n| neutral | 0.2 | 3 |\n| negative | 0.1 | 4 |", PROBS, "not clear"),
    ],
)  # fmt: skip
def test_repairs_are_said(reply: str, probs: Sequence[float], problem: str) -> None:
    parsed = assert_reads(reply, probs, "repaired")
    assert any(problem in reason for reason in parsed.problems), parsed.problems


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("", "no label has a number"),
        (" \n\t ", "no label has a number"),
        ("Positive, I think.", "no label has a number"),
        ("I'm sorry, but I can't assign probabilities to emotions.", "refused"),
        ("As an AI language model I cannot do this.", "refused"),
        ("positive: high, neutral: low, negative: low", "no label has a number"),
        ("positive: 0, neutral: 0, negative: 0", "all numbers are 0"),
        ("positive: 0.9, neutral: -0.1, negative: 0.2", "'-0.1' is negative"),
        ("positive: 0.9, neutral: –0.1, negative: 0.2", "is negative"),
        ("positive: 120%, neutral: 0.1, negative: 0.1", "'120%' is more than 100%"),
        ("positive: 5/4, neutral: 0.1, negative: 0.1", "'5/4' is more than 1"),
        ("positive: 1945, neutral: 0.1, negative: 0.1", "'1945' is more than 1"),
        ("positive: 1,000, neutral: 0.1, negative: 0.1", "decimal comma"),
        ("positive: 0.7.1, neutral: 0.2, negative: 0.1", "cannot be read"),
        ("positive: 1/0, neutral: 0.2, negative: 0.1", "zero"),
        ("positive: 60% to 0.8, neutral: 0.2, negative: 0.1", "mixes"),
        ("60% positive 30% neutral 0% negative 10", "no label has a number"),
        ("0.7, 0.2", "no label has a number"),
    ],
)
def test_what_cannot_be_read(reply: str, problem: str) -> None:
    parsed = parse_distribution(reply, LABELS)
    assert parsed.status == "failed"
    assert parsed.probs.shape == (3,)
    assert np.isnan(parsed.probs).all()
    assert problem in parsed.problems[-1]


@pytest.mark.parametrize(
    "reply",
    [
        "not positive: 0.3, neutral: 0.6, negative: 0.1",
        "non-positive: 0.3, neutral: 0.6, negative: 0.1",
        "positive: 0.7, anything other than positive: 0.3",
        "positive is wrong with 0.7, neutral: 0.2, negative: 0.1",
        "positive: 0.7 wrong, neutral: 0.2, negative: 0.1",
        "The words positive, 3 of them, and neutral, 4 of them, and negative, 1 of them.",
        "positive and neutral: 0.2, positive: 0.7, negative: 0.1",
        "positive, neutral: 0.2\npositive: 0.7\nnegative: 0.1",
        "P(positive|neutral) = 0.2, P(positive) = 0.7, P(negative) = 0.1",
        "positive: 0.7, neutral: 0.2, negative: 50% of the remaining 0.2",
        "positive: 0.7, neutral: 0.2, negative: 0.l",
        "positive: 0.7, neutral: 0.2, negative: .0.1",
        "positive: 0,7; neutral: 0,2; negative: ,1",
        "very positive: 0.7, neutral: 0.2, negative: 0.1",
        "positive or neutral: 0.9, negative: 0.1",
        "C++: 0.7, positive: 0.7, neutral: 0.2, negative: 0.2",
        "positive. In 0.7 of all films, neutral: 0.2, negative: 0.1",
    ],
)
def test_doubtful_numbers_are_never_taken_without_a_word(reply: str) -> None:
    assert parse_distribution(reply, LABELS).status != "ok"


@pytest.mark.parametrize(
    "reply",
    [
        "A has a 30% chance of being wrong; B has a 70% chance of being wrong",
        "A: 30% chance that it is wrong\nB: 70% chance that it is wrong",
        "P(error|A): 0.3, P(error|B): 0.7",
        "Probabilities of exclusion:\nA: 0.9\nB: 0.1",
        'Probabilities that it is not the answer: {"A": 0.9, "B": 0.1}',
    ],
)
def test_numbers_for_the_opposite_are_not_taken(reply: str) -> None:
    assert parse_distribution(reply, ["A", "B"]).status == "failed"


def test_strict_raises_with_what_was_read() -> None:
    assert parse_distribution("A: 0.5, B: 0.5", ["A", "B"], strict=True).status == "ok"
    with pytest.raises(DistributionParseError, match="B: no number") as error:
        parse_distribution("A: 0.75", ["A", "B"], strict=True)
    assert error.value.parsed.probs.tolist() == [0.75, 0.25]
    with pytest.raises(DistributionParseError, match="refused"):
        parse_distribution("Sorry, no.", ["A", "B"], strict=True)
    assert issubclass(DistributionParseError, ValueError)


def test_arguments() -> None:
    with pytest.raises(TypeError, match="text: expected a string, got NoneType"):
        parse_distribution(None, LABELS)  # type: ignore[arg-type]
    for labels in ("positive", [1, 2]):
        with pytest.raises(TypeError, match="labels: expected a list of strings"):
            parse_distribution("", labels)  # type: ignore[arg-type]
    for labels in ([], ["A"], ["A", ""], ["A", "a"], ["very good", "Very_Good"]):
        with pytest.raises(ValueError, match="labels: expected two or more"):
            parse_distribution("", labels)
    with pytest.raises(TypeError, match="text: expected a string"):
        parse_confidence(b"0.5")  # type: ignore[arg-type]


# --- single confidences


@pytest.mark.parametrize(
    ("reply", "confidence"),
    [
        ("Guess: Paris\nProbability: 0.85", 0.85),
        ("**Guess:** Paris\n**Probability:** 0.85 \n", 0.85),
        ("Answer: 42\nConfidence: 85%", 0.85),
        ("Confidence level: 85 percent", 0.85),
        ("Paris. I'm about 85% sure.", 0.85),
        ("Confidence: 85%. I'm not aware of errors.", 0.85),
        ("**Confidence: 85%.** Not certain, though.", 0.85),
        ("I am 85% confident that it is Paris.", 0.85),
        ("The probability that Paris is the capital is 0.85.", 0.85),
        ("Probability that Paris is the capital: 0.85", 0.85),
        ("Probability:\n0.85", 0.85),
        ("{'answer': 4, 'confidence': 0.85}", 0.85),
        ("Confidence: 17/20", 0.85),
        ("Confidence: 0,85", 0.85),
        ("0.85", 0.85),
        ("85%", 0.85),
        ("Probability: 1", 1.0),
        ("Probability: 0.0", 0.0),
        ("There's a 70% chance of rain, but my confidence is 70%.", 0.7),
    ],
)
def test_confidences(reply: str, confidence: float) -> None:
    parsed = parse_confidence(reply)
    assert parsed.status == "ok", parsed
    assert parsed.confidence == pytest.approx(confidence, abs=1e-12)


@pytest.mark.parametrize(
    ("reply", "confidence", "problem"),
    [
        ("Paris, 0.85", 0.85, "no word says"),
        ("Paris\n0.85", 0.85, "no word says"),
        ("Confidence: 85", 0.85, "taken as a percentage"),
        ("Confidence (0-100): 85", 0.85, "taken as a percentage"),
        ("Confidence: 80-90%", 0.85, "range"),
        ("Confidence: over 85%", 0.85, "bound"),
        ("Confidence: 50%. On reflection, confidence: 85%", 0.85, "more than once"),
    ],
)
def test_confidences_with_a_problem(reply: str, confidence: float, problem: str) -> None:
    parsed = parse_confidence(reply)
    assert parsed.status == "repaired", parsed
    assert parsed.confidence == pytest.approx(confidence, abs=1e-12)
    assert any(problem in reason for reason in parsed.problems)
    with pytest.raises(ConfidenceParseError, match=problem):
        parse_confidence(reply, strict=True)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Paris",
        "In 1945",
        "16.0",
        "Confidence: high",
        "Confidence: 8",
        "Confidence: -0.5",
        "Confidence: 150%",
        "Confidence: 0.5 → 0.9",
        "Probability that I am wrong: 0.2",
        "Probability of error: 5%",
        "Confidence: 1 on a scale of 1 to 10",
        "Confidence: 1 (0-100)",
        "Confidence interval: 0.95",
        "uncertainty: 0.2",
        '{"uncertainty": 0.2}',
        "doubt: 0.9",
        "unlikely: 0.2",
        "P(False) = 0.7",
        "80% (not 90%)",
        "There is a 5% probability that this is not correct",
        "Probability: 0.3 that it is false",
        "I am only 30% sure this is wrong",
        "I'm not 90% sure.",
        "I'm sorry, I can't tell.",
        "1789.0.9",
    ],
)
def test_no_confidence(reply: str) -> None:
    parsed = parse_confidence(reply)
    assert parsed.status == "failed"
    assert math.isnan(parsed.confidence)
    assert parsed.problems


def test_confidences_that_models_stated(data_folder: Path) -> None:
    """Whatever the data's own parser reads is read as the same; all but a few of the rest are read too."""
    read, unread = 0, 0
    for path in sorted((data_folder / "stated_confidence").glob("verb_*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for reply in map(json.loads, lines):
                parsed = parse_confidence(reply["response"])
                if reply["verbal_p"] >= 0:
                    assert parsed.confidence == pytest.approx(reply["verbal_p"], abs=1e-9), reply["response"]
                    read += 1
                else:
                    unread += parsed.status == "failed"
    assert read == 2855
    assert unread == 24  # of 145: no number, or one such as 1789.0.9


# --- what comes in any form, and with a defect

Render = Callable[[Sequence[str], Sequence[str]], str]


def _lines(form: str, between: str = "\n", around: str = "{}") -> Render:
    def render(labels: Sequence[str], numbers: Sequence[str]) -> str:
        items = (form.format(label, number) for label, number in zip(labels, numbers, strict=True))
        return around.replace("{}", between.join(items))

    return render


RENDERS: list[Render] = [
    _lines('"{}": {}', ", ", "{{}}"),
    _lines("  '{}': {}", ",\n", "Here it is:\n```python\n{\n{}\n}\n```\nI hope that this helps."),
    _lines('{{"label": "{}", "probability": {}}}', ", ", "[{}]"),
    _lines("{}: {}"),
    _lines("- **{}**: {}", "\n", "The probabilities are:\n\n{}\n"),
    _lines("| {} | {} |", "\n", "| Label | Probability |\n|---|---|\n{}"),
    _lines("{} = {}", "; "),
    _lines("{} {}", ", "),
    _lines("{} - {}"),
    _lines("the probability of {} is {}", ", ", "I think that {}."),
]
REVERSE = _lines("{1} for {0}", ", ", "I'd say {}.")
POOL = [
    "positive",
    "neutral",
    "negative",
    "joy",
    "very good",
    "not_sure",
    "A",
    "B",
    "C++",
    "yes",
    "no",
    "früh",
    "class 3",
]

label_sets = st.lists(st.sampled_from(POOL), min_size=2, max_size=5, unique=True)
forms = st.sampled_from([*RENDERS, REVERSE])


@st.composite
def weights(draw: st.DrawFn, count: int) -> list[int]:
    """Whole percentages that add up to 100."""
    cuts = sorted(draw(st.lists(st.integers(0, 100), min_size=count - 1, max_size=count - 1)))
    return [high - low for low, high in zip([0, *cuts], [*cuts, 100], strict=True)]


@st.composite
def replies(draw: st.DrawFn) -> tuple[list[str], list[str], list[int], Render]:
    labels = draw(label_sets)
    percents = draw(weights(len(labels)))
    write = draw(st.sampled_from(["{}%", "{} percent", "point", "comma", "/100"]))
    if write == "point":
        numbers = [f"{percent / 100:.2f}" for percent in percents]
    elif write == "comma":
        numbers = [f"{percent / 100:.2f}".replace(".", ",") for percent in percents]
    elif write == "/100":
        numbers = [f"{percent}/100" for percent in percents]
    else:
        numbers = [write.format(percent) for percent in percents]
    return labels, numbers, percents, draw(forms)


@settings(max_examples=500, deadline=None)
@given(replies())
def test_every_form_is_read(reply: tuple[list[str], list[str], list[int], Render]) -> None:
    labels, numbers, percents, render = reply
    assert_reads(render(labels, numbers), np.array(percents) / 100, "ok", labels)


@settings(max_examples=500, deadline=None)
@given(replies(), st.data())
def test_a_changed_number_changes_the_result_or_is_a_problem(
    reply: tuple[list[str], list[str], list[int], Render], data: st.DataObject
) -> None:
    labels, numbers, _, render = reply
    before = parse_distribution(render(labels, numbers), labels)
    index = data.draw(st.integers(0, len(labels) - 1))
    number = numbers[index]
    at = data.draw(st.integers(0, len(re.match(r"[\d.,/%]+", number).group()) - 1))  # type: ignore[union-attr]
    changes = {
        "digit": re.sub(r"\d", lambda match: str(9 - int(match.group())), number, count=1),
        "sign": "-" + number,
        "twice": number + " or " + number[:at] + "7" + number[at:],
        "insert": number[:at] + data.draw(st.sampled_from("0123456789.,%/-")) + number[at:],
        "delete": number[:at] + number[at + 1 :],
        "word": "small",
        "power": number + "e-5",
        "junk": number.replace("0", "O").replace("1", "l"),
        "range": number + " to 90%",
    }
    changed = changes[data.draw(st.sampled_from(sorted(changes)))]
    after = parse_distribution(render(labels, [*numbers[:index], changed, *numbers[index + 1 :]]), labels)
    if after.status != "ok":
        return
    if np.array_equal(after.probs, before.probs):  # as with a dot in front of a number: its digits must be the same
        assert re.findall(r"\d", changed) == re.findall(r"\d", number) or _number(changed) == _number(number), changed
        return
    others = sum(map(_number, [*numbers[:index], *numbers[index + 1 :]]))
    assert after.probs[index] == pytest.approx(_number(changed) / (_number(changed) + others), abs=1e-9), changed


def _number(text: str) -> float:
    """The number that a person sees there."""
    text = text.replace(",", ".")
    if "/" in text:
        part, whole = text.split("/")
        return float(part) / float(whole)
    if "%" in text or "percent" in text:
        return float(text.replace("%", "").replace("percent", "")) / 100
    return float(text)


@settings(max_examples=300, deadline=None)
@given(replies(), st.data())
def test_a_changed_label_is_a_problem(
    reply: tuple[list[str], list[str], list[int], Render], data: st.DataObject
) -> None:
    labels, numbers, _, render = reply
    index = data.draw(st.integers(0, len(labels) - 1))
    changed = [*labels[:index], labels[index] + "x", *labels[index + 1 :]]
    assert parse_distribution(render(changed, numbers), labels).status != "ok"
    short = render([*labels[:index], *labels[index + 1 :]], [*numbers[:index], *numbers[index + 1 :]])
    assert parse_distribution(short, labels).status != "ok"


@settings(max_examples=300, deadline=None)
@given(replies(), st.data())
def test_a_reply_that_was_cut_off_is_read_as_it_was_or_is_a_problem(
    reply: tuple[list[str], list[str], list[int], Render], data: st.DataObject
) -> None:
    labels, numbers, percents, render = reply
    text = render(labels, numbers)
    parsed = parse_distribution(text[: data.draw(st.integers(0, len(text)))], labels)
    if parsed.status == "ok":
        np.testing.assert_allclose(parsed.probs, np.array(percents) / 100, atol=0.011)


def test_thousands_of_damaged_replies() -> None:
    """No crash, and a result is a distribution or none."""
    dice = random.Random(0)
    sets = [dice.sample(POOL, count) for count in (2, 3, 4, 5) * 5]
    characters = "0123456789.,%:{}[]|\"'-–/ \n\tabAN~<>=*()№½％\u200b"
    for _ in range(6000):
        labels = dice.choice(sets)
        numbers = [dice.choice(["0.5", "50%", "1/2", "10-20%", "<1%", "0", "1e-9", "half"]) for _ in labels]
        text = list(dice.choice(RENDERS)(labels, numbers))
        for _ in range(dice.randint(1, 8)):
            at = dice.randrange(len(text) + 1)
            kind = dice.random()
            if kind < 0.4:
                text[at:at] = dice.choice(characters)
            elif kind < 0.7:
                del text[at : at + dice.randint(1, 5)]
            else:
                text[at:at] = text[dice.randrange(len(text) + 1) :][:20]
        reply = "".join(text)
        parsed = parse_distribution(reply, labels)
        assert (parsed.status == "ok") == (not parsed.problems), reply
        if parsed.status == "failed":
            assert np.isnan(parsed.probs).all(), reply
        else:
            assert parsed.probs.min() >= 0, reply
            assert parsed.probs.sum() == pytest.approx(1), reply
        confidence = parse_confidence(reply)
        assert (confidence.status == "failed") == math.isnan(confidence.confidence), reply
        assert math.isnan(confidence.confidence) or 0 <= confidence.confidence <= 1, reply


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    parse_distribution(text, LABELS)
    parse_confidence(text)


@pytest.mark.timeout(60)  # a step that takes time in proportion to the square would need hours
@pytest.mark.parametrize(
    "unit",
    ["1", " ", "A:", "{", "0.1 ", "A ", "[A:1,", "between ", "1/", "1,", "1.1", "1 to ", "a'", "\n ", "not A 1 ", "A\n",
     "very_", "<", "- ", "A 1|"],
)  # fmt: skip
def test_long_replies(unit: str) -> None:
    for text in (unit * 8_000, "A: " + unit * 8_000 + "1"):
        parse_distribution(text, ["A", "B", "very good", "1"])
        parse_confidence("probability " + text)


# --- prompts


def test_prompts_ask_for_what_is_read() -> None:
    labels = ["joy", 'so-called "anger"']
    for style in ("incremental", "direct"):
        prompt = prompts.stated_distribution(labels, "Which emotion?", style=style)
        form = json.loads(prompt.splitlines()[-1].replace("<probability>", "0.5"))
        assert list(form) == labels
        assert prompt.startswith("Which emotion?\n")
        assert parse_distribution(prompt, labels).status == "failed"  # a reply that repeats the prompt
        reply = json.dumps(dict(zip(labels, [0.25, 0.75], strict=True)))
        assert_reads(reply, [0.25, 0.75], "ok", labels)
    assert [step in prompts.stated_distribution(["A", "B"], "Q") for step in ("1.", "2.", "3.", "4.")] == [True] * 4
    assert parse_confidence(prompts.stated_confidence("Q")).status == "failed"
    assert prompts.messages("Q", system="S") == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
    ]


def test_a_reply_in_steps() -> None:
    reply = '1. joy\n2. 0.8\n3.\njoy: 0.8\nanger: 0.2\n4. {"joy": 0.8, "anger": 0.2}'
    assert_reads(reply, [0.8, 0.2], "ok", ["joy", "anger"])


def test_prompt_arguments() -> None:
    for labels in (["A"], ["A", "A"], "AB"):
        with pytest.raises(ValueError, match="labels: expected two or more"):
            prompts.stated_distribution(labels, "Q")
    with pytest.raises(ValueError, match="style: expected 'incremental' or 'direct', got 'chain'"):
        prompts.stated_distribution(["A", "B"], "Q", style="chain")  # type: ignore[arg-type]
