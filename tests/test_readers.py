"""Readers of answers: what they take as the confidence, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyqe import readers
from pyqe.readers import PercentageError, field, format_of, from_distribution, from_fields, from_lm_eval, from_logprobs


def sample(*log_likelihoods: float, **fields: Any) -> dict[str, Any]:
    """A line as lm-evaluation-harness 0.4.13 writes it, numbers as text."""
    pairs = [[str(value), str(value == max(log_likelihoods))] for value in log_likelihoods]
    return {
        "doc_id": 0,
        "doc": {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "arithmetic"},
        "target": "1",
        "arguments": {f"gen_args_{number}": {"arg_0": "2 + 2?", "arg_1": " A"} for number in range(len(pairs))},
        "resps": [[pair] for pair in pairs],
        "filtered_resps": pairs,
        "filter": "none",
        "metrics": ["acc"],
        "acc": 1.0,
        **fields,
    }


def chat(*tokens: tuple[str, float, dict[str, float]]) -> dict[str, Any]:
    """A chat completion with the fields that OpenAI's API gives."""
    content = [
        {
            "token": token,
            "logprob": logprob,
            "bytes": list(token.encode()),
            "top_logprobs": [{"token": name, "logprob": value, "bytes": None} for name, value in tops.items()],
        }
        for token, logprob, tops in tokens
    ]
    message = {"role": "assistant", "content": "".join(token for token, _, _ in tokens)}
    choice = {"index": 0, "message": message, "logprobs": {"content": content, "refusal": None}}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice | {"finish_reason": "stop"}]}


def completion(tokens: list[str], logprobs: list[float | None], tops: list[dict[str, float] | None]) -> dict[str, Any]:
    """A completion as vLLM's server gives it."""
    inside = {"text_offset": [0] * len(tokens), "tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops}
    return {"object": "text_completion", "choices": [{"index": 0, "text": "".join(tokens), "logprobs": inside}]}


# --- fields


def test_fields_inside_others() -> None:
    record = {"a": {"b": [{"c": 1}]}, "a.b": 2, "n": None}
    assert field(record, "a.b.0.c") == 1
    assert field(record, "a.b") == 2
    assert field(record, "n") is None


@pytest.mark.parametrize("path", ["x", "a.x", "a.b.7", "a.b.-1", "a.b.0.c.d", ""])
def test_missing_field(path: str) -> None:
    with pytest.raises(ValueError, match=r"expected a field .*, got 'a'"):
        field({"a": {"b": [{"c": 1}]}}, path)


@pytest.mark.parametrize(
    ("value", "correct"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.0, 0.0)]
)
def test_correctness(value: Any, correct: float) -> None:
    assert from_fields({"confidence": 1, "correct": value}) == readers.Answer(1.0, correct)


@pytest.mark.parametrize("value", ["true", "yes", "1", None, -1, 2, math.nan, [1], {}, 10**400])
def test_no_correctness(value: Any) -> None:
    with pytest.raises(ValueError, match="correct: expected true, false or a number from 0 to 1, got "):
        from_fields({"confidence": 0.5, "correct": value})


@pytest.mark.parametrize("value", [None, "0.5", True, math.nan, math.inf, [0.5], {}, 10**400, -0.01, 101, 1e9])
def test_no_confidence(value: Any) -> None:
    with pytest.raises(ValueError, match="confidence: expected a number") as caught:
        from_fields({"confidence": value, "correct": 1})
    assert not isinstance(caught.value, PercentageError)


@pytest.mark.parametrize("value", [1.01, 2, 85, 100])
def test_percentages_are_not_guessed(value: float) -> None:
    with pytest.raises(PercentageError, match="divide a percentage by 100"):
        from_fields({"confidence": value, "correct": 1})


def test_rounding_above_one() -> None:
    assert from_fields({"confidence": 1.0000001}, correct=None).confidence == 1.0


# --- distributions


def test_probabilities_and_logits() -> None:
    probs = from_distribution({"probs": [0.1, 0.3, 0.1], "label": 2}, inputs="probs")
    assert probs.confidence == pytest.approx(0.6)
    assert (probs.correct, probs.label, probs.scores) == (0.0, 2, (0.1, 0.3, 0.1))
    logits = from_distribution({"z": [2.0, 0.0], "gold": {"index": 0}}, scores="z", label="gold.index", inputs="logits")
    assert logits.confidence == pytest.approx(1 / (1 + math.exp(-2)))
    assert logits.correct == 1.0
    assert from_distribution({"probs": [0.5, 0.5]}, label=None, inputs="probs").correct is None


def test_large_logits() -> None:
    assert from_distribution({"probs": [1e4, -1e4, 0]}, label=None, inputs="logits").confidence == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"probs": [0.5]}, "probs: expected a list of two numbers"),
        ({"probs": {"A": 1}}, "probs: expected a list of two numbers"),
        ({"probs": [0.5, None]}, "probs.1: expected a number, got null"),
        ({"probs": [0, 0]}, "nothing but 0"),
        ({"probs": [0.5, 50]}, "divide a percentage"),
        ({"probs": [0.5, 0.5], "label": 2}, "label: expected a number from 0 to 1, got 2"),
        ({"probs": [0.5, 0.5], "label": True}, "label: expected a number from 0 to 1, got true"),
        ({"probs": [0.5, 0.5], "label": "A"}, "label: expected a number from 0 to 1"),
    ],
)
def test_bad_distribution(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_distribution({"label": 0, **fields}, inputs="probs")


# --- lm-evaluation-harness


def test_lm_eval_sample() -> None:
    answer = from_lm_eval(sample(-3.0, -1.0, -4.0, -5.0))
    shares = [math.exp(value) for value in (-3, -1, -4, -5)]
    assert answer.confidence == pytest.approx(shares[1] / sum(shares))
    assert (answer.correct, answer.label, answer.scores) == (1.0, 1, (-3.0, -1.0, -4.0, -5.0))


def test_older_lm_eval_sample() -> None:
    """Numbers and booleans, not text; a target that is no number."""
    answer = from_lm_eval(sample(0.0, filtered_resps=[[-1.0, False], [-1.0, False]], acc=0, target=" Paris"))
    assert (answer.confidence, answer.correct, answer.label) == (0.5, 0.0, None)


def test_unconditional_log_likelihoods_are_passed_over() -> None:
    assert from_lm_eval(sample(-3.0, -1.0, -9.0, -8.0, acc_mutual_info=1.0)).scores == (-3.0, -1.0)


def test_log_likelihoods_far_below_zero() -> None:
    assert from_lm_eval(sample(-2000.0, -2001.0)).confidence == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filtered_resps": ["4"]}, "two choices or more"),  # a generated text
        ({"filtered_resps": [["-7.5", "True"]]}, "two choices or more"),  # one continuation
        (
            {"filtered_resps": ["A", "B"]},
            r"expected \[log-likelihood, is greedy\] for each choice, got \"A\" as item 0",
        ),
        ({"filtered_resps": [["-1", "True"], ["nan", "False"]]}, "as item 1"),
        ({"filtered_resps": [["-1", "True"], ["-inf", "False"]]}, "as item 1"),
        ({"acc": None}, "acc: expected true, false or a number"),
    ],
)
def test_bad_lm_eval_sample(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_lm_eval(sample(-1.0, -2.0, **fields))


def test_lm_eval_sample_without_accuracy() -> None:
    record = sample(-1.0, -2.0)
    del record["acc"]
    with pytest.raises(ValueError, match="expected a field 'acc'"):
        from_lm_eval(record)
    assert from_lm_eval(record, correct=None).correct is None


# --- responses with logprobs

B = ("B", math.log(0.6), {"B": math.log(0.6), " B": math.log(0.1), "A": math.log(0.2), "The": math.log(0.05)})


def test_chat_completion() -> None:
    answer = from_logprobs({"response": chat(B), "gold": "B"})
    assert answer.confidence == pytest.approx(0.6)
    assert answer.mass == pytest.approx(0.9)
    assert (answer.correct, answer.label) == (1.0, 1)
    assert from_logprobs(chat(B) | {"gold": 0}).correct == 0.0
    assert from_logprobs(chat(B), gold=None).correct is None
    assert from_logprobs(chat(B) | {"right": 0.5}, correct="right").correct == 0.5


def test_batch_output() -> None:
    line = {"custom_id": "q1", "response": {"status_code": 200, "body": chat(B)}, "error": None, "gold": "B"}
    assert format_of(line) == "openai"
    assert from_logprobs(line).correct == 1.0


def test_completion() -> None:
    record = completion(
        [" The", " answer", " (", "C", ")"], [-0.1, -0.1, -0.2, -0.5, 0.0001], [None] * 3 + [{"C": -0.5}] + [{}]
    )
    answer = from_logprobs(record | {"gold": "C"})
    assert answer.confidence == pytest.approx(math.exp(-0.5))
    assert (answer.correct, answer.mass) == (1.0, answer.confidence)


@pytest.mark.parametrize("token", ["B", " B", "B.", "(B", "\nB", "**B", "B)", "▁B", "ĠB", '"B"'])
def test_ways_to_write_a_choice(token: str) -> None:
    assert from_logprobs(chat(("I", -1.0, {}), (token, -0.5, {})) | {"gold": "B"}).correct == 1.0


@pytest.mark.parametrize("token", ["b", "BB", "Because", "", "-", "E"])
def test_other_tokens_are_no_choice(token: str) -> None:
    with pytest.raises(ValueError, match="expected a token that is one of A, B, C, D, got none"):
        from_logprobs(chat((token, -0.5, {})) | {"gold": "B"})


@pytest.mark.parametrize(
    ("tokens", "choice"),
    [
        (["A", " good", " answer", " is", " B"], "B"),
        (["B", " because", " of", " it"], "B"),  # the only one
        (["B", ",", " as", " A", " is", " wrong"], "B"),
        (["B", "\n", "A", " is", " wrong"], "B"),
        (["B", "<|im_end|>"], "B"),
        (["B.", " A", " is", " wrong"], "B"),
        (["A", " or", " B", " perhaps"], None),
    ],
)
def test_an_article_is_no_answer(tokens: list[str], choice: str | None) -> None:
    record = chat(*((token, -0.5, {}) for token in tokens))
    if choice is not None:
        assert from_logprobs(record | {"gold": choice}).correct == 1.0
        return
    with pytest.raises(ValueError, match="several that words follow on"):
        from_logprobs(record | {"gold": "A"})


def test_choices_can_be_words() -> None:
    record = chat(("Yes", -0.25, {"Yes": -0.25, "no": -1.7})) | {"gold": "no"}
    answer = from_logprobs(record, choices=("Yes", "no"))
    assert (answer.correct, answer.label) == (0.0, 1)
    assert answer.mass == pytest.approx(math.exp(-0.25) + math.exp(-1.7))


def test_logprobs_at_the_limits() -> None:
    """Rounding above 0, and what stands for very unlikely tokens."""
    answer = from_logprobs(chat(("A", 1e-7, {"A": 1e-7, "B": -9999.0})) | {"gold": "A"})
    assert (answer.confidence, answer.mass) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": []}, "choices: expected one completion, got 0"),
        ({"choices": [{}, {}]}, "choices: expected one completion, got 2"),
        ({"choices": "A"}, "choices: expected one completion, got no list"),
        ({"response": None}, "expected a field 'choices'"),
        ({"choices": [{"logprobs": None}]}, "expected log-probabilities, got none"),
        ({"choices": [{"logprobs": {}}]}, "expected 'content', or 'tokens'"),
        ({"choices": [{"logprobs": {"content": [{"token": "A"}]}}]}, "as the API gives them, got KeyError"),
        ({"choices": [{"logprobs": {"content": [{"token": "A", "logprob": None}]}}]}, "logprob: expected a number"),
        (completion(["Q", "A"], [None, -0.5], [None, {}]), "echo=false"),
        (chat(B) | {"gold": "E"}, 'gold: expected one of A, B, C, D, or a number below 4, got "E"'),
        (chat(B) | {"gold": 4}, "gold: expected one of"),
        (chat(B) | {"gold": True}, "gold: expected one of"),
        (chat(B), "expected a field 'gold'"),
    ],
)
def test_bad_response(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_logprobs(record)


# --- all of them


def test_formats() -> None:
    assert format_of(sample(-1.0, -2.0)) == "lm-eval"
    assert format_of(chat(B)) == "openai"
    assert format_of({"response": chat(B), "gold": 0}) == "openai"
    assert format_of({"question": "?", "choices": ["3", "4"], "confidence": 0.5}) == "jsonl"  # of pyqe choice
    assert format_of({"response": "The answer is B.", "confidence": 0.5}) == "jsonl"


FIELDS = ["filtered_resps", "doc", "acc", "target", "gold", "response", "body", "confidence", "correct"]
NAMES = ["choices", "logprobs", "content", "token", "logprob", "top_logprobs", "tokens", "token_logprobs", *FIELDS]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["choices", "filtered_resps", "doc", "confidence", "acc", "response"]), JSON))
def test_anything_is_an_answer_or_an_error(record: dict[str, Any]) -> None:
    assert format_of(record) in ("jsonl", "lm-eval", "openai")
    for read in (from_fields, from_lm_eval, from_logprobs):
        try:
            answer = read(record)
        except ValueError:
            continue
        assert 0 <= answer.confidence <= 1
