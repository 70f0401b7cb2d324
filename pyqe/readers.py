"""Answers with their confidence, from records that other programs write.

Each reader takes one record, a ``dict`` as ``json.loads`` gives it, and says what it takes as the confidence. A record
that it cannot read is a ``ValueError`` whose message names the field, what was expected and what came.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyqe._arrays import ABOVE_ONE, Inputs

LETTERS = ("A", "B", "C", "D")

_AROUND = " \t\n()[].:*\"'▁Ġ"  # a choice in its token; the last two are how some tokenizers write a space


class PercentageError(ValueError):
    """A number from 1 to 100 in place of a probability."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        confidence: in [0, 1].
        correct: in [0, 1], 1 for a right answer; None where it is not known.
        scores: [K], probabilities or logits of the choices among which the answer was taken, where the record has them.
        label: the right choice's number, from 0, where the record has it.
        mass: in [0, 1], probability of all tokens that name a choice, where the record shows it.
    """

    confidence: float
    correct: float | None = None
    scores: tuple[float, ...] | None = None
    label: int | None = None
    mass: float | None = None


def field(record: Mapping[str, Any], path: str) -> Any:
    """A field by its dotted path; a number counts the items of a list from 0. A field with the whole name goes first.

    Raises:
        ValueError: there is none.

    Example:
        >>> field({"answers": [{"p": 0.9}], "a.b": 1}, "answers.0.p"), field({"a.b": 1}, "a.b")
        (0.9, 1)
    """
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise ValueError(f"expected a field {path!r}, got {', '.join(map(repr, record)) or 'no fields'}")
    return value


def from_fields(
    record: Mapping[str, Any], *, confidence: str = "confidence", correct: str | None = "correct"
) -> Answer:
    """An answer of any record that has a confidence and a correctness.

    Args:
        record: of any kind.
        confidence: path of a number in [0, 1]; see :func:`field`.
        correct: path of true or false, 1 or 0, or a grade between; None: it is not wanted.

    Raises:
        PercentageError: a confidence above 1, up to 100: percentages are not converted.
        ValueError: a field is missing, or is something else.

    Example:
        >>> from_fields({"confidence": 0.9, "grade": {"right": True}}, correct="grade.right")
        Answer(confidence=0.9, correct=1.0, scores=None, label=None, mass=None)
    """
    sure = _probability(field(record, confidence), confidence)
    return Answer(sure, None if correct is None else _correctness(field(record, correct), correct))


def from_distribution(
    record: Mapping[str, Any], *, scores: str = "probs", label: str | None = "label", inputs: Inputs
) -> Answer:
    """An answer of any record that has the probabilities or logits of all classes.

    The answer is the class with the largest, the confidence its probability: of probabilities that do not sum to 1, its
    share of the sum; of logits, its softmax.

    Args:
        record: of any kind.
        scores: path of a list of numbers; see :func:`field`.
        label: path of the right class's number, from 0; None: it is not wanted.
        inputs: "probs" or "logits": which of them the numbers are.

    Raises:
        PercentageError: a probability above 1, up to 100.
        ValueError: a field is missing, or is something else.

    Example:
        >>> from_distribution({"probs": [0.2, 0.6, 0.2], "label": 1}, inputs="probs")
        Answer(confidence=0.6, correct=1.0, scores=(0.2, 0.6, 0.2), label=1, mass=None)
    """
    values = field(record, scores)
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{scores}: expected a list of two numbers or more, got {_shown(values)}")
    number = _probability if inputs == "probs" else _number
    numbers = tuple(number(value, f"{scores}.{place}") for place, value in enumerate(values))
    if inputs == "probs" and not any(numbers):
        raise ValueError(f"{scores}: expected probabilities, got nothing but 0")
    confidence = max(numbers) / sum(numbers) if inputs == "probs" else _largest_share(numbers)
    if label is None:
        return Answer(min(confidence, 1.0), None, numbers)
    right = field(record, label)
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(numbers):
        raise ValueError(f"{label}: expected a number from 0 to {len(numbers) - 1}, got {_shown(right)}")
    return Answer(min(confidence, 1.0), float(numbers.index(max(numbers)) == right), numbers, right)


def from_lm_eval(sample: Mapping[str, Any], *, correct: str | None = "acc") -> Answer:
    r"""An answer of a multiple-choice sample that lm-evaluation-harness logs (``--log_samples``).

    The answer is the choice with the largest log-likelihood :math:`l_i`, the confidence its share
    :math:`\max_i \exp(l_i) / \sum_j \exp(l_j)` of what the choices have together, so that it is at least 1 / K.
    ``acc`` says whether it is right; ``acc_norm`` is about another choice, the best by length.

    Args:
        sample: a line of ``samples_TASK_DATE.jsonl``, with ``filtered_resps``: for each choice its log-likelihood and
            whether it is greedy, as numbers or, in newer versions, as text. Where log-likelihoods without the question
            follow (``acc_mutual_info``), they are passed over.
        correct: path of the correctness; None: it is not wanted.

    Returns:
        ``scores`` are the log-likelihoods, ``label`` is ``target`` where that is a choice's number.

    Raises:
        ValueError: a field is missing; fewer than two choices, as in tasks that generate text or score a single
            continuation, which have no confidence.

    Example:
        >>> from_lm_eval({"filtered_resps": [["-0.1", "True"], ["-2.3", "False"]], "target": "0", "acc": 1.0}).correct
        1.0
    """
    choices = field(sample, "filtered_resps")
    if "acc_mutual_info" in sample and isinstance(choices, list) and len(choices) % 2 == 0:
        choices = choices[: len(choices) // 2]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("filtered_resps: expected log-likelihoods of two choices or more, got none")
    logits = tuple(_log_likelihood(choice, number) for number, choice in enumerate(choices))
    right = None if correct is None else _correctness(field(sample, correct), correct)
    target = str(sample.get("target"))
    label = int(target) if target.isdecimal() and int(target) < len(logits) else None
    return Answer(_largest_share(logits), right, logits, label)


def from_logprobs(
    record: Mapping[str, Any],
    *,
    choices: Sequence[str] = LETTERS,
    gold: str | None = "gold",
    correct: str | None = None,
) -> Answer:
    """An answer of a response with log-probabilities, as OpenAI's API and vLLM's server give it.

    The answer is the first token that is a choice (" B", "B", "(B" and "B." are "B") and is not followed by a word, or
    else the only choice there, the confidence that token's probability in the softmax over the whole vocabulary.
    ``mass`` is the sum over all tokens that are a choice, of those that ``top_logprobs`` shows there: a lower bound.

    Args:
        record: a chat completion (``choices[0].logprobs.content``) or a completion
            (``choices[0].logprobs.token_logprobs``), or a record that has it as ``response`` (``response.body`` in
            the output of batches).
        choices: what an answer can be.
        gold: path of the right choice in the record: one of ``choices``, or its number from 0; None: it is not wanted.
        correct: path of the correctness instead, as for :func:`from_fields`.

    Raises:
        ValueError: a field is missing; several completions; an echoed prompt; no token is a choice, or words follow
            on several.

    Example:
        >>> token = {"token": "B", "logprob": -0.1, "top_logprobs": [{"token": "B", "logprob": -0.1}]}
        >>> response = {"choices": [{"logprobs": {"content": [token]}}]}
        >>> from_logprobs({"response": response, "gold": "B"}).correct
        1.0
    """
    tokens = list(_tokens(_logprobs(record)))
    place, answer = _answer([token for token, _, _ in tokens], choices)
    token, logprob, alternatives = tokens[place]
    seen = {token: logprob, **alternatives}
    mass = math.fsum(math.exp(one) for name, one in seen.items() if _as_choice(name, choices) is not None)
    if correct is not None:
        right: float | None = _correctness(field(record, correct), correct)
        label = None
    else:
        label = None if gold is None else _gold(field(record, gold), gold, choices)
        right = None if label is None else float(answer == label)
    return Answer(math.exp(logprob), right, label=label, mass=min(mass, 1.0))


def format_of(record: Mapping[str, Any]) -> str:
    """What a record looks like: "lm-eval", "openai" or, if neither, "jsonl", one with fields of its own.

    Example:
        >>> format_of({"filtered_resps": [], "doc": {}}), format_of({"confidence": 0.5})
        ('lm-eval', 'jsonl')
    """
    if "filtered_resps" in record and "doc" in record:
        return "lm-eval"
    completions = _response(record).get("choices")
    if isinstance(completions, list) and completions and isinstance(completions[0], Mapping):
        return "openai"
    return "jsonl"


def _number(value: Any, name: str) -> float:
    number = _finite(value)
    if number is None:
        raise ValueError(f"{name}: expected a number, got {_shown(value)}")
    return number


def _probability(value: Any, name: str) -> float:
    number = _number(value, name)
    if 1 + ABOVE_ONE < number <= 100:
        raise PercentageError(f"{name}: expected a number from 0 to 1, got {number:g}; divide a percentage by 100")
    if not 0 <= number <= 1 + ABOVE_ONE:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {number:g}")
    return min(number, 1.0)


def _correctness(value: Any, name: str) -> float:
    right = float(value) if isinstance(value, bool) else _finite(value)
    if right is None or not 0 <= right <= 1:
        raise ValueError(f"{name}: expected true, false or a number from 0 to 1, got {_shown(value)}")
    return right


def _finite(value: Any) -> float | None:
    """A JSON number, if it is one that a float can be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _shown(value: Any) -> str:
    """A value for an error."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _largest_share(logits: Sequence[float]) -> float:
    """The largest of their softmax."""
    highest = max(logits)
    return 1 / math.fsum(math.exp(logit - highest) for logit in logits)


def _log_likelihood(choice: Any, number: int) -> float:
    """Of ``[log-likelihood, is greedy]``."""
    try:
        value = float(choice[0])
    except (TypeError, ValueError, LookupError, OverflowError):
        value = math.nan
    if not isinstance(choice, list) or len(choice) != 2 or not math.isfinite(value):
        expected = "[log-likelihood, is greedy] for each choice"
        raise ValueError(f"filtered_resps: expected {expected}, got {_shown(choice)} as item {number}")
    return value


def _response(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The response itself, if the record holds one."""
    for name in ("response", "body"):
        inside = record.get(name)
        if isinstance(inside, Mapping):
            record = inside
    return record


def _logprobs(record: Mapping[str, Any]) -> Mapping[str, Any]:
    completions = field(_response(record), "choices")
    if not isinstance(completions, list) or len(completions) != 1 or not isinstance(completions[0], Mapping):
        count = len(completions) if isinstance(completions, list) else "no list"
        raise ValueError(f"choices: expected one completion, got {count}")
    logprobs = completions[0].get("logprobs")
    if not isinstance(logprobs, Mapping):
        raise ValueError("choices.0.logprobs: expected log-probabilities, got none: ask the server for them")  # noqa: TRY004
    return logprobs


def _tokens(logprobs: Mapping[str, Any]) -> Iterable[tuple[str, float, dict[str, float]]]:
    """Each token with its log-probability, and the most probable tokens in its place with theirs."""
    try:
        if logprobs.get("content") is not None:
            for item in logprobs["content"]:
                tops = {top["token"]: _logprob(top["logprob"]) for top in item.get("top_logprobs") or ()}
                yield item["token"], _logprob(item["logprob"]), tops
            return
        tokens = logprobs["tokens"]
        numbers, tops_of = logprobs["token_logprobs"], logprobs.get("top_logprobs") or [None] * len(tokens)
        if numbers and numbers[0] is None:
            raise ValueError("logprobs: expected the answer alone, got the prompt with it: ask for echo=false")
        for token, logprob, tops in zip(tokens, numbers, tops_of, strict=True):
            yield token, _logprob(logprob), {name: _logprob(one) for name, one in (tops or {}).items()}
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"logprobs: expected 'content', or 'tokens' and 'token_logprobs', as the API gives them, got {error!r}"
        ) from None


def _logprob(value: Any) -> float:
    """Rounding can take a log-probability above 0; -9999 stands for less than can be said."""
    return min(_number(value, "logprob"), 0.0)


def _answer(tokens: Sequence[Any], choices: Sequence[str]) -> tuple[int, int]:
    """Which token is the answer, and which choice it is; "A good answer is B" does not say "A"."""
    found = [(place, answer) for place, one in enumerate(tokens) if (answer := _as_choice(one, choices)) is not None]
    for place, answer in found:
        rest = str(tokens[place + 1]) if place + 1 < len(tokens) else ""
        word_follows = rest.strip()[:1].isalnum() and "\n" not in rest
        if not (word_follows and str(tokens[place])[-1:].isalnum()):
            return place, answer
    if len({answer for _, answer in found}) == 1:
        return found[0]
    got = "several that words follow on" if found else "none"
    raise ValueError(f"logprobs: expected a token that is one of {', '.join(choices)}, got {got}")


def _as_choice(token: Any, choices: Sequence[str]) -> int | None:
    """The number of the choice that a token is."""
    if not isinstance(token, str):
        return None
    bare = token.strip().strip(_AROUND)
    return choices.index(bare) if bare in choices else None


def _gold(value: Any, name: str, choices: Sequence[str]) -> int:
    if isinstance(value, str) and value.strip() in choices:
        return choices.index(value.strip())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise ValueError(
        f"{name}: expected one of {', '.join(choices)}, or a number below {len(choices)}, got {_shown(value)}"
    )
