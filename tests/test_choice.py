"""Multiple choice: prompts, answers, and scores against plain full logits."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import answer_tokenizer as tokenizer
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, OPTConfig

from pyqe.choice import ChoiceScorer, PromptFormat, Question, parse_answer, read_questions
from pyqe.choice.answers import find_answer
from pyqe.choice.letters import LetterTokens
from pyqe.choice.prompts import LETTERS, orders, question_problem
from pyqe.encoding import prompt_text
from pyqe.lm_head import output_embedding
from pyqe.prefix import SharedPrefix

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = [
    Question("What is the capital of France?", ["Rome", "Paris", "Berlin"], 1, "fr"),
    Question("2 + 2 =", ["3", "4"], 1, 4),
    Question("Which of these is an animal?", ["a stone", "a spoon", "a dog", "a cloud", "a chair"], 2),
    Question("What comes after two, in the list one two three four five six?", ["four", "three", "one", "x"], 1),
    Question("Who sat on the mat?", ["the dog", "the cat", "the mat"]),
]
SHOTS = [Question("What is one and one?", ["two", "three"], 0), Question("Is a cat a dog?", ["yes", "no", "maybe"], 1)]
ROOM = {"llama": "max_position_embeddings", "gpt2": "n_positions"}


@cache
def model(kind: str = "llama", **options: Any) -> Any:
    room = {ROOM.get(kind, "max_position_embeddings"): 1024}
    return tiny.model(kind, vocab_size=len(tokenizer(joins=True)) + 5, **room, **options)


def scorer(kind: str = "llama", *, joins: bool = False, **options: Any) -> ChoiceScorer:
    return ChoiceScorer(model(kind), tokenizer(chat=bool(options.get("chat")), joins=joins), **options)


def full_logprobs(lm: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-softmax [L, V] of a model's own logits, one sequence without padding, in double precision."""
    with torch.no_grad():
        return lm(torch.tensor([list(ids)]), use_cache=False).logits[0].double().log_softmax(-1)


def prompt_of(subject: ChoiceScorer, question: Question, shots: Sequence[Question], order: Any = None) -> list[int]:
    text, is_chat = prompt_text(subject.tokenizer, subject.form.prompt(question, shots, order))
    return list(subject.tokenizer(text, add_special_tokens=not is_chat)["input_ids"])


def ids_of(subject: ChoiceScorer, piece: str) -> list[int]:
    """Every token whose text is the piece, white space around it left out."""
    lookup = subject.tokenizer
    return [i for i in range(len(lookup)) if lookup.decode([i]).strip() == piece]


def plain_distribution(
    subject: ChoiceScorer, question: Question, shots: Sequence[Question] = (), order: Any = None
) -> tuple[np.ndarray, float, float]:
    """Letters' probabilities, not renormalised, format mass and MSP from the model's own full softmax."""
    ids = prompt_of(subject, question, shots, order)
    letters = LETTERS[: len(question.choices)]
    if subject.form.style == "letter":
        probs = full_logprobs(subject.model, ids)[-1].exp()
        found = np.array([probs[ids_of(subject, letter)].sum().item() for letter in letters])
        return found, found.sum(), probs.max().item()
    opening = ids_of(subject, "(")
    written = subject.tokenizer(subject.form.before_answer + "(")["input_ids"][-1]
    both = full_logprobs(subject.model, [*ids, written])[-2:].exp()
    labels = np.array([both[0, ids_of(subject, f"({letter}")].sum().item() for letter in letters])
    after = np.array([both[1, ids_of(subject, letter)].sum().item() for letter in letters])
    start = both[0, opening].sum().item()
    joined = subject.tokenizer.decode(subject.tokenizer(subject.form.before_answer + "(A)")["input_ids"][0]) == "(A"
    return labels + start * after, start + labels.sum(), both[0 if joined else 1].max().item()


# --- questions and prompts


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "expected a field 'question', got no fields"),
        ({"question": "x", "answer": 0}, "expected a field 'choices', got 'question', 'answer'"),
        ({"question": 3, "choices": ["x", "y"]}, "question: expected a text, got 3"),
        ({"question": " ", "choices": ["x", "y"]}, "question: expected a text"),
        ({"question": "x", "choices": "xy"}, "choices: expected a list of texts"),
        ({"question": "x", "choices": []}, "choices: expected 2 to 26, got 0"),
        ({"question": "x", "choices": ["x"]}, "choices: expected 2 to 26, got 1"),
        ({"question": "x", "choices": ["x"] * 27}, "choices: expected 2 to 26, got 27"),
        ({"question": "x", "choices": ["x", None]}, r"choices[1]: expected a text, got None"),
        ({"question": "x", "choices": ["x", ""]}, r"choices[1]: expected a text, got ''"),
        (
            {"question": "x", "choices": ["x", "y"], "answer": 2},
            "answer: expected an index from 0 to 1, or null, got 2",
        ),
        ({"question": "x", "choices": ["x", "y"], "answer": True}, "answer: expected an index"),
        ({"question": "x", "choices": ["x", "y"], "answer": "B"}, "answer: expected an index"),
    ],
)
def test_bad_questions(fields: dict[str, Any], problem: str) -> None:
    assert (question_problem(fields) or "").startswith(problem)
    with pytest.raises(ValueError, match=r"expected"):
        Question.from_dict(fields)


def test_read_questions(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": "x", "choices": ["y", "z"], "answer": 1, "subject": "s"},
        {"question": "x", "choices": ["ä", "z"]},
    ]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_questions(path) == [Question("x", ("y", "z"), 1), Question("x", ("ä", "z"))]
    path.write_text('{"question": "x", "choices": ["y", "z"]}\n{"question": "x"}\n')
    with pytest.raises(ValueError, match="line 2: expected a field 'choices'"):
        read_questions(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="line 1: expected a JSON object, got list"):
        read_questions(path)


def test_mcq_files(data_folder: Path) -> None:
    files = sorted((data_folder / "mcq").glob("*.jsonl"))
    assert files
    for path in files:
        questions = read_questions(path)
        assert questions
        assert all(question.answer is not None for question in questions)


def test_prompts() -> None:
    question, shot = Question("Q?", ["x", "y", "z"]), Question("S?", ["u", "v"], 1)
    head = "The following are multiple choice questions (with answers).\n\n"
    assert PromptFormat().prompt(question) == head + "Question: Q?\nA. x\nB. y\nC. z\nAnswer:"
    assert PromptFormat(style="parenthesis").prompt(question, [shot], order=[2, 0, 1]) == head + (
        "Question: S?\n(A) u\n(B) v\nAnswer: (B)\n\nQuestion: Q?\n(A) z\n(B) x\n(C) y\nAnswer:"
    )
    assert PromptFormat(listed=False, instruction="").prompt(question, [shot]) == (
        "Question: S?\nAnswer: v\n\nQuestion: Q?\nAnswer:"
    )
    assert PromptFormat(chat=True, instruction="Do it.").prompt(question, [shot]) == [
        {"role": "user", "content": "Do it.\n\nQuestion: S?\nA. u\nB. v"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "Question: Q?\nA. x\nB. y\nC. z"},
    ]


def test_orders() -> None:
    question = Question("?", list("wxyz"))
    assert orders(question, 1, 0) == [(0, 1, 2, 3)]
    assert np.array(orders(question, "cyclic", 0)).sum(0).tolist() == [6] * 4
    assert len(set(orders(question, "all", 0))) == len(orders(question, 99, 0)) == 24
    drawn = orders(question, 6, seed=3)
    assert drawn == orders(question, 6, seed=3)
    assert len(set(drawn)) == 6
    assert drawn[0] == (0, 1, 2, 3)
    assert drawn != orders(question, 6, seed=4)
    assert drawn != orders(Question("!", list("wxyz")), 6, seed=3)
    with pytest.raises(ValueError, match="8 choices have 40320 orders"):
        orders(Question("?", list("stuvwxyz")), "all", 0)


# --- replies

CAPITALS = ["Rome", "Paris", "New York", "York"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", 1),
        (" b\n", 1),
        ("**B**", 1),
        ("(c)", 2),
        ("B.", 1),
        ("B. Rome", 1),  # the letter goes before the text
        ("The answer is (D), York.", 3),
        ("Answer: C", 2),
        ("C) New York", 2),
        ("Z. no; A: yes", 0),  # letters beyond the choices do not count
        ("I would say paris", 1),
        ("new\n york!", 2),  # not York, which is inside
        ("York, not New York", None),
        ("Rome or Paris", None),
        ("Rome, Rome!", 0),
        ("I think it is B", 1),
        ("B, surely", 1),
        ("A or B", None),
        ("A is right", 0),
        ("A dog", None),
        ("I cannot say", None),
        ("D.C. and the U.S.A. are far", None),
        ("C++", None),
        ("", None),
        ("Parisian", None),
        ("It's A's", None),
        ("\x00\ud800", None),
    ],
)
def test_replies(text: str, answer: int | None) -> None:
    assert parse_answer(text, CAPITALS) == answer


def test_a_letter_inside_an_option_is_no_label() -> None:
    vitamins = ["Vitamin A", "Vitamin C", "Vitamin B"]
    assert parse_answer("Vitamin B. Because it is", vitamins) == 2
    assert parse_answer("B. Vitamin C", vitamins) == 1


def test_replies_with_numbers() -> None:
    numbers = ["8", "80", "-8", "0.8", "24"]
    for index, number in enumerate(numbers):
        assert parse_answer(f"it is {number}.", numbers) == index
        assert parse_answer(f"{number}, of course", numbers) == index
    assert parse_answer("it is 4", numbers) is None
    assert parse_answer("it is 8.5 or 240", numbers) is None


def test_pronoun_is_no_letter() -> None:
    many = [f"option {number}" for number in range(12)]
    assert parse_answer("I think so", many) is None
    assert parse_answer("I", many) == 8


@given(st.text(), st.lists(st.text(min_size=1), min_size=2, max_size=26))
@settings(max_examples=300, deadline=None)
def test_any_reply_gives_an_index_or_none(text: str, choices: list[str]) -> None:
    found = find_answer(text, choices)
    assert found is None or (0 <= found.index < len(choices) and 0 <= found.start < len(text))


@given(st.integers(0, 25), st.sampled_from(["{}", "{}.", "({})", "{}) why", "Answer: {}", "**{}**", "{}: it is so"]))
def test_a_letter_is_read_in_any_form(index: int, form: str) -> None:
    choices = [f"option {number}" for number in range(26)]
    assert parse_answer(form.format(LETTERS[index]), choices) == index


# --- tokens


def test_letters_are_found_with_and_without_a_space() -> None:
    lookup = tokenizer()
    tokens = LetterTokens.find(lookup, len(lookup), PromptFormat())
    assert {lookup.decode([token]) for token in tokens.letters[0]} == {"A", " A"}
    assert {lookup.decode([token]) for token in tokens.letters[25]} == {"Z"}
    assert tokens.forced is None
    tokens = LetterTokens.find(lookup, len(lookup), PromptFormat(style="parenthesis"))
    assert lookup.decode([tokens.forced]) == " ("
    assert {lookup.decode([token]) for token in tokens.opening} == {"(", " ("}
    assert not tokens.joined


def test_a_parenthesis_with_its_letter_can_be_one_token() -> None:
    lookup = tokenizer(joins=True)
    after_space = LetterTokens.find(lookup, len(lookup), PromptFormat(style="parenthesis"))
    assert [lookup.decode([token]) for token in after_space.labels[0]] == ["(A"]
    assert not after_space.joined
    chat = tokenizer(joins=True, chat=True)
    joined = LetterTokens.find(chat, len(chat), PromptFormat(style="parenthesis", chat=True))
    assert joined.joined
    assert chat.decode([joined.forced]) == "("


@pytest.mark.parametrize("style", ["letter", "parenthesis"])
def test_a_space_of_its_own_belongs_to_the_prompt(style: Any) -> None:
    lookup = tiny.SlowTokenizer(more="QAWBC0123:.()?\n", model_max_length=1024)
    subject = ChoiceScorer(tiny.model(vocab_size=len(lookup), max_position_embeddings=1024), lookup, style=style)
    assert subject._method.tokens.space == (lookup.convert_tokens_to_ids(" "),)
    result = subject.score([QUESTIONS[0]])[0]
    ids = [*prompt_of(subject, QUESTIONS[0], ()), *subject._method.tokens.space]
    letters = lookup.convert_tokens_to_ids(["A", "B", "C"])
    opening = lookup.convert_tokens_to_ids("(")
    probs = full_logprobs(subject.model, [*ids, opening]).exp()
    if style == "letter":
        np.testing.assert_allclose(np.exp(result.logprobs), probs[-2, letters], rtol=1e-4)
    else:
        assert result.format_mass == pytest.approx(probs[-2, opening].item(), rel=1e-4)
        np.testing.assert_allclose(result.distribution, probs[-1, letters] / probs[-1, letters].sum(), rtol=1e-4)


def test_tokens_beyond_the_model_are_left_out() -> None:
    lookup = tokenizer()
    last = max(LetterTokens.find(lookup, len(lookup), PromptFormat()).letters[0])
    assert last not in LetterTokens.find(lookup, last, PromptFormat()).letters[0]


# --- scores


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("style", ["letter", "parenthesis"])
@pytest.mark.parametrize("shots", [[], SHOTS], ids=["zero-shot", "few-shot"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_scores_are_those_of_the_full_softmax(kind: str, style: Any, shots: list[Question], chat: bool) -> None:
    subject = scorer(kind, style=style, chat=chat, joins=chat)
    for result in subject.score(QUESTIONS, shots=shots, batch_size=2):
        probs, mass, msp = plain_distribution(subject, result.question, shots)
        assert result.status == "ok"
        np.testing.assert_allclose(result.distribution, probs / probs.sum(), rtol=2e-4)
        np.testing.assert_allclose(np.exp(result.logprobs), probs, rtol=2e-4)
        assert result.format_mass == pytest.approx(mass, rel=2e-4)
        assert result.msp == pytest.approx(msp, rel=2e-4)
        assert result.prediction == probs.argmax()
        assert result.confidence == pytest.approx(probs.max() / probs.sum(), rel=2e-4)
        assert result.correct == (
            None if result.question.answer is None else result.prediction == result.question.answer
        )


def test_greedy_answer_is_the_most_probable_token() -> None:
    subject = scorer()
    results = subject.score(QUESTIONS)
    for result in results:
        ids = prompt_of(subject, result.question, ())
        with torch.no_grad():
            logits = subject.model(torch.tensor([ids])).logits[0, -1]
        token = int(logits.argmax())
        assert result.greedy_text == subject.tokenizer.decode([token])
        assert result.argmax == token
        assert result.max_logit == pytest.approx(logits.max().item(), rel=1e-4)
        letter = result.greedy_text.strip()
        known = LETTERS[: len(result.question.choices)]
        assert result.greedy_answer == (known.index(letter) if letter and letter in known else None)
        assert result.greedy_msp == (result.msp if result.greedy_answer is not None else 0.0)


def biased(kind: str, piece: str, **options: Any) -> ChoiceScorer:
    """A scorer whose model gives a token's logit 50 more than it would."""
    lm = tiny.model(kind, vocab_size=len(tokenizer()), max_position_embeddings=1024, tie_word_embeddings=False)
    lookup = tokenizer()
    ids = lookup(piece)["input_ids"]
    assert len(ids) == 1
    bias = torch.zeros(len(lookup))
    bias[ids] = 50.0
    lm.lm_head.bias = torch.nn.Parameter(bias)
    return ChoiceScorer(lm, lookup, **options)


def test_greedy_answers_by_letter() -> None:
    results = biased("llama", " B").score(QUESTIONS)
    assert [result.greedy_answer for result in results] == [1] * len(QUESTIONS)
    assert all(result.greedy_msp == result.msp > 0.99 for result in results)
    assert all(result.format_mass > 0.99 for result in results)
    assert [result.greedy_correct for result in results] == [True, True, False, True, None]


def test_a_letter_beyond_the_choices_is_no_answer() -> None:
    result = biased("llama", " E").score(QUESTIONS)[0]
    assert result.greedy_answer is None
    assert result.greedy_correct is False
    assert result.greedy_msp == 0.0
    assert result.msp > 0.99
    assert result.format_mass < 0.01


def test_parenthesis_is_the_format() -> None:
    result = biased("llama", " (", style="parenthesis").score(QUESTIONS)[0]
    assert result.format_mass > 0.99
    assert result.greedy_text.startswith(" (")


def test_results_do_not_depend_on_the_batch() -> None:
    """Not by a bit, whatever else there is."""
    for shots, options in itertools.product([(), SHOTS], [{}, {"style": "parenthesis"}, {"method": "text"}]):
        subject = scorer(**options)
        alone = [subject.score([question], shots=shots)[0] for question in QUESTIONS]
        for batch_size in (1, 3, 16):
            together = subject.score(QUESTIONS[::-1], shots=shots, batch_size=batch_size)[::-1]
            assert [result.to_dict() for result in together] == [result.to_dict() for result in alone]


def other_model(config: Any) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "lm",
    [
        lambda: model("llama"),
        lambda: model("gpt2"),
        lambda: model("gemma2", sliding_window=16),
        lambda: model("cohere"),
        lambda: model("granite"),
        lambda: other_model(BloomConfig(vocab_size=420, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3)),
        lambda: other_model(
            OPTConfig(vocab_size=420, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2)
        ),
    ],
    ids=["llama", "gpt2", "gemma2 with a short window", "cohere", "granite", "bloom", "opt"],
)
def test_shots_are_read_once(lm: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    subject = ChoiceScorer(lm(), tokenizer())
    read: list[int] = []

    def count(module: Any, args: Any, arguments: dict[str, Any]) -> None:
        read.append(arguments["input_ids"].numel())

    handle = subject.model.register_forward_pre_hook(count, with_kwargs=True)
    cached = subject.score(QUESTIONS, shots=SHOTS)
    with_cache, read = sum(read), []
    monkeypatch.setattr(ChoiceScorer, "_prefix", lambda *_: None)
    plain = subject.score(QUESTIONS, shots=SHOTS)
    handle.remove()
    assert with_cache < 0.6 * sum(read)
    for one, other in zip(cached, plain, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
        assert one.msp == pytest.approx(other.msp, rel=2e-5)


def test_prompts_that_do_not_begin_with_the_prefix_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = scorer()
    plain = subject.score(QUESTIONS)
    ids = prompt_of(subject, QUESTIONS[0], ())
    for length in (len(ids) - 1, len(ids)):
        prefix = SharedPrefix.compute(subject.model, ids[:length])
        monkeypatch.setattr(ChoiceScorer, "_prefix", lambda *_, prefix=prefix: prefix)
        for one, other in zip(subject.score(QUESTIONS), plain, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


def test_recurrent_models_read_everything() -> None:
    config = MambaConfig(vocab_size=len(tokenizer()), hidden_size=32, num_hidden_layers=2, state_size=8)
    lm = other_model(config)
    assert SharedPrefix.compute(lm, list(range(20))) is None
    subject = ChoiceScorer(lm, tokenizer())
    for result in subject.score(QUESTIONS, shots=SHOTS):
        probs, mass, _ = plain_distribution(subject, result.question, SHOTS)
        np.testing.assert_allclose(result.distribution, probs / probs.sum(), rtol=1e-3)
        assert result.format_mass == pytest.approx(mass, rel=1e-3)


def test_frequencies_that_change_with_the_length_share_nothing() -> None:
    options = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    assert SharedPrefix.compute(tiny.model("llama", **options), list(range(20))) is None


def test_no_logits_are_computed() -> None:
    subject = scorer(style="parenthesis")
    subject.score(QUESTIONS[:1])  # its logits are checked once
    sizes: list[int] = []
    handle = output_embedding(subject.model).register_forward_hook(lambda *args: sizes.append(args[2].numel()))
    subject.score(QUESTIONS, shots=SHOTS)
    handle.remove()
    assert sizes
    assert not any(sizes)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("shots", [[], SHOTS], ids=["zero-shot", "few-shot"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_text_likelihoods(kind: str, shots: list[Question], chat: bool) -> None:
    subject = scorer(kind, method="text", chat=chat)
    for result in subject.score(QUESTIONS, shots=shots, batch_size=3):
        text, _ = prompt_text(subject.tokenizer, subject.form.prompt(result.question, shots))
        before = subject.tokenizer(text)["input_ids"]
        sums, means = [], []
        for choice in result.question.choices:
            ids = subject.tokenizer(text + ("" if chat else " ") + choice)["input_ids"]
            assert ids[: len(before)] == before
            logprobs = full_logprobs(subject.model, ids)
            tokens = [logprobs[i - 1, ids[i]].item() for i in range(len(before), len(ids))]
            sums.append(sum(tokens))
            means.append(sum(tokens) / len(tokens))
        np.testing.assert_allclose(result.logprobs, sums, rtol=1e-4)
        np.testing.assert_allclose(result.mean_logprobs, means, rtol=1e-4)
        expected = np.exp(np.array(sums) - max(sums))
        np.testing.assert_allclose(result.distribution, expected / expected.sum(), rtol=2e-3)
        assert result.prediction == int(np.argmax(sums))
        assert result.msp is None
        assert result.format_mass is None


@pytest.mark.parametrize("permutations", ["cyclic", "all", 4])
@pytest.mark.parametrize("style", ["letter", "parenthesis"])
def test_orders_are_mapped_back(permutations: Any, style: Any) -> None:
    subject = scorer(style=style)
    question = QUESTIONS[0]
    result = subject.score([question], permutations=permutations, seed=5, shots=SHOTS)[0]
    shown = orders(question, permutations, 5)
    assert result.orders == len(shown)
    distributions, letters, masses = [], [], []
    for order in shown:
        probs, mass, _ = plain_distribution(subject, question, SHOTS, order)
        mapped = np.zeros(3)
        mapped[list(order)] = probs
        letters.append(mapped)
        distributions.append(mapped / probs.sum())
        masses.append(mass)
    np.testing.assert_allclose(result.distribution, np.mean(distributions, axis=0), rtol=2e-4)
    np.testing.assert_allclose(np.exp(result.logprobs), np.mean(letters, axis=0), rtol=2e-4)
    assert result.format_mass == pytest.approx(np.mean(masses), rel=2e-4)
    chosen = np.argmax(distributions, axis=1)
    assert result.agreement == pytest.approx(np.mean(chosen == result.prediction))
    given = subject.score([question], shots=SHOTS)[0]
    assert (result.msp, result.greedy_text) == (given.msp, given.greedy_text)


def test_a_model_that_likes_a_letter_is_undecided_over_all_rotations() -> None:
    results = biased("llama", " B").score(QUESTIONS[:2], permutations="cyclic")
    for result in results:
        np.testing.assert_allclose(result.distribution, 1 / len(result.question.choices), atol=1e-6)
        assert result.agreement == pytest.approx(1 / len(result.question.choices))


def test_bad_questions_fail_alone() -> None:
    subject = scorer()
    long = Question("x" * 2000, ["x", "y"])
    bad: list[Any] = [{"question": "x", "choices": []}, long, {"question": None, "choices": "ab"}, SHOTS[0]]
    mixed = [item for pair in zip(bad, QUESTIONS, strict=False) for item in pair]
    results = subject.score(mixed, shots=SHOTS)
    assert [result.status for result in results] == ["failed", "ok"] * 4
    good = subject.score(QUESTIONS[:4], shots=SHOTS)
    assert [result.to_dict() for result in results[1::2]] == [result.to_dict() for result in good]
    reasons = [result.reason or "" for result in results[::2]]
    assert reasons[0] == "choices: expected 2 to 26, got 0"
    assert "do not fit the context of 1024" in reasons[1]
    assert reasons[3].startswith("it is one of the demonstrations")
    assert results[0].distribution is None
    assert json.dumps([result.to_dict() for result in results])


def test_padding_stays_within_the_context() -> None:
    """A model with learned positions has no embedding beyond them."""
    longest = max(len(prompt_of(scorer("gpt2"), question, SHOTS)) for question in QUESTIONS)
    for positions in (longest, longest - 1):
        lm = tiny.model("gpt2", vocab_size=len(tokenizer()), n_positions=positions)
        results = ChoiceScorer(lm, tokenizer()).score(QUESTIONS, shots=SHOTS)
        assert [result.status for result in results].count("failed") == longest - positions


def test_logits_that_are_not_finite_fail() -> None:
    lm = tiny.model("llama", vocab_size=len(tokenizer()), max_position_embeddings=1024)
    with torch.no_grad():
        lm.get_output_embeddings().weight[7, 0] = torch.nan
    for method in ("letter", "text"):
        result = ChoiceScorer(lm, tokenizer(), method=method).score(QUESTIONS[:1])[0]
        assert (result.status, result.reason) == ("failed", "logits that are not finite")
        assert result.distribution is None
        assert result.msp is None


def test_a_tokenizer_without_letters() -> None:
    slow = tiny.SlowTokenizer(model_max_length=512)
    lm = tiny.model("llama", vocab_size=len(slow), max_position_embeddings=512)
    question = Question("cat or dog", ["cat", "dog"])
    result = ChoiceScorer(lm, slow).score([question])[0]
    assert result.status == "failed"
    assert "no token that is A, B alone; method 'text' needs none" in (result.reason or "")
    assert ChoiceScorer(lm, slow, method="text").score([question])[0].status == "ok"
    with pytest.raises(ValueError, match="style: expected a tokenizer with a token"):
        ChoiceScorer(lm, slow, style="parenthesis")


def test_no_questions() -> None:
    assert scorer().score([]) == []
    assert scorer().score([], shots=SHOTS, greedy_tokens=2, permutations="cyclic") == []


def test_progress_counts_prompts() -> None:
    counts: list[int] = []
    scorer().score(QUESTIONS, permutations="cyclic", batch_size=4, on_progress=counts.append)
    assert sum(counts) == sum(len(question.choices) for question in QUESTIONS)
    assert max(counts) <= 4


def test_generated_answers() -> None:
    subject = scorer()
    plain = subject.score(QUESTIONS)
    results = subject.score(QUESTIONS, greedy_tokens=5, batch_size=2)
    for result, other in zip(results, plain, strict=True):
        np.testing.assert_array_equal(result.distribution, other.distribution)
        ids = prompt_of(subject, result.question, ())
        with torch.no_grad():
            output = subject.model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=5, do_sample=False
            )
        new = [token for token in output[0, len(ids) :].tolist() if token != 2]
        assert result.greedy_text == subject.tokenizer.decode(new, clean_up_tokenization_spaces=False)
        assert result.greedy_answer == parse_answer(result.greedy_text, result.question.choices)
        assert result.greedy_msp == 0.0 or result.greedy_answer is not None


def test_msp_of_a_generated_answer_is_where_its_letter_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyqe.estimator import QualityEstimator, ScoredText

    def reply(*_: Any, **__: Any) -> list[ScoredText]:
        probs = np.array([0.1, 0.2, 0.9, 0.3], dtype=np.float32)
        return [ScoredText("It is B.", offsets=[(0, 2), (2, 5), (5, 7), (7, 8)], token_max_prob=probs)]

    monkeypatch.setattr(QualityEstimator, "generate", reply)
    result = scorer().score(QUESTIONS[:1], greedy_tokens=4)[0]
    assert (result.greedy_answer, result.greedy_correct) == (1, True)
    assert result.greedy_msp == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "x"}, "style: expected one of letter, parenthesis, got 'x'"),
        ({"method": "x"}, "method: expected one of letter, text, got 'x'"),
        ({"chat": True}, "chat: the tokenizer has no chat template"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChoiceScorer(model(), tokenizer(), **options)


def test_encoder_decoders_are_refused() -> None:
    with pytest.raises(ValueError, match="model: expected a decoder-only LM, got T5"):
        ChoiceScorer(tiny.model("t5"), tiny.tokenizer())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected 1 or more"),
        ({"permutations": 0}, ValueError, "permutations: expected 1 or more"),
        ({"permutations": "some"}, ValueError, "permutations: expected 1 or more"),
        ({"permutations": True}, ValueError, "permutations: expected 1 or more"),
        ({"greedy_tokens": -1}, ValueError, "greedy_tokens: expected 0 or more"),
        ({"shots": [QUESTIONS[4]]}, ValueError, r"shots\[0\]: answer: expected one in a demonstration"),
        ({"shots": [SHOTS[0], {"question": "x"}]}, ValueError, r"shots\[1\]: expected a field 'choices'"),
        ({"shots": ["x"]}, TypeError, r"shots\[0\]: expected a Question or its fields, got str"),
        ({"questions": "x"}, TypeError, r"questions\[0\]: expected a Question or its fields, got str"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scorer().score(**{"questions": QUESTIONS, **options})


@pytest.mark.parametrize("options", [{"permutations": 2}, {"permutations": "cyclic"}, {"greedy_tokens": 1}])
def test_texts_have_no_orders_and_no_greedy_answer(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected method 'letter'"):
        scorer(method="text").score(QUESTIONS, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    lm = tiny.model("llama", dtype, vocab_size=len(tokenizer()), max_position_embeddings=1024)
    subject = ChoiceScorer(lm, tokenizer())
    for result in subject.score(QUESTIONS, shots=SHOTS):
        probs, mass, _ = plain_distribution(subject, result.question, SHOTS)
        np.testing.assert_allclose(result.distribution, probs / probs.sum(), atol=0.1)
        assert result.format_mass == pytest.approx(mass, abs=0.05)
        assert math.isclose(result.distribution.sum(), 1.0)


@pytest.mark.lm
def test_demonstrations_raise_the_format_mass(smollm2: tuple[Any, Any]) -> None:
    capitals = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo")]
    questions = [
        Question(f"What is the capital of {land}?", ["Paris", "Rome", "Madrid", "Tokyo"], answer)
        for answer, (land, _) in enumerate(capitals)
    ]
    subject = ChoiceScorer(*smollm2, chat=False)
    without = subject.score(questions[:2])
    with_shots = subject.score(questions[:2], shots=questions[2:])
    assert all(few.format_mass > none.format_mass for few, none in zip(with_shots, without, strict=True))
    for result in with_shots:
        probs, mass, msp = plain_distribution(subject, result.question, questions[2:])
        np.testing.assert_allclose(result.distribution, probs / probs.sum(), rtol=1e-3)
        assert result.format_mass == pytest.approx(mass, rel=1e-3)
        assert result.msp == pytest.approx(msp, rel=1e-3)
