"""``pyqe choice``, through the entry point."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner, Result

from pyqe.choice import ChoiceScorer, Question
from pyqe.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

OK, FAILED, USAGE, SOME_ROWS_FAILED = 0, 1, 2, 3
QUESTIONS = [
    {
        "id": f"q{number}",
        "question": f"What comes after {number}{' or so' * (number % 3)}?",
        "choices": [str(number), str(number + 1), "x"][: 2 + number % 2],
        "answer": 1,
        "subject": "sums",
    }
    for number in range(12)
]
SHOTS = [{"question": f"Is {name} an animal?", "choices": ["yes", "no"], "answer": 0} for name in ("a cat", "a dog")]


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny.model(vocab_size=len(tiny.answer_tokenizer()), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def folder(lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with its tokenizer."""
    place = tmp_path_factory.mktemp("models") / "llama"
    lm.save_pretrained(place)
    tiny.answer_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with questions and demonstrations in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_text(jsonl(QUESTIONS))
    (tmp_path / "shots.jsonl").write_text(jsonl(SHOTS))
    return tmp_path


@pytest.fixture
def call(folder: Path, here: Path) -> Callable[..., Result]:
    """Runs the command in this process."""

    def run(*arguments: object, stdin: str = "") -> Result:
        return CliRunner().invoke(main, ["choice", "-m", str(folder), *map(str, arguments)], input=stdin)

    return run


def jsonl(items: Sequence[object]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_rows_are_the_questions_with_their_scores(call: Callable[..., Result], lm: Any) -> None:
    result = call("questions.jsonl", "--batch-size", 4)
    assert result.exit_code == OK, result.stderr
    scored = ChoiceScorer(lm, tiny.answer_tokenizer()).score(QUESTIONS)
    expected = [
        {"line": line, **question, **score.scores()}
        for line, (question, score) in enumerate(zip(QUESTIONS, scored, strict=True), 1)
    ]
    assert rows(result.stdout) == expected
    assert "pyqe: 12 rows, 0 failed, 12 prompts in" in result.stderr
    assert "pyqe: 12 questions: accuracy 0." in result.stderr
    assert all(name in result.stderr for name in ("mean MSP 0.", "format mass 0.", "mean confidence 0."))


def test_without_answers_there_is_no_accuracy(call: Callable[..., Result]) -> None:
    unanswered = [{name: field for name, field in question.items() if name != "answer"} for question in QUESTIONS]
    result = call(stdin=jsonl(unanswered))
    assert result.exit_code == OK
    assert "accuracy" not in result.stderr
    assert "mean MSP" in result.stderr
    assert all(row["correct"] is None for row in rows(result.stdout))


def test_bad_rows_are_reported_by_number(call: Callable[..., Result], here: Path) -> None:
    good = jsonl(QUESTIONS[:1])
    lines = [good, "\n", "nonsense\n", jsonl([{"question": "x"}]), jsonl([{**QUESTIONS[1], "answer": 7}]), good]
    long = jsonl([{"question": "x" * 3000, "choices": ["y", "z"]}])
    (here / "bad.jsonl").write_text("".join([*lines, long]))
    result = call("bad.jsonl")
    assert result.exit_code == SOME_ROWS_FAILED
    found = rows(result.stdout)
    assert [row["line"] for row in found] == list(range(1, 8))
    assert [row["status"] for row in found] == ["ok", "empty", "failed", "failed", "failed", "ok", "failed"]
    assert [row["prediction"] is None for row in found] == [False, True, True, True, True, False, True]
    for line, reason in (
        (3, "not JSON"),
        (4, "expected a field 'choices', got 'question'"),
        (5, "answer: expected an index from 0 to"),
        (7, "do not fit the context of 1024"),
    ):
        assert f"pyqe: line {line}: " in result.stderr
        assert reason in result.stderr
        assert reason in found[line - 1]["reason"]
    assert "7 rows, 4 failed" in result.stderr
    assert "pyqe: 2 questions: " in result.stderr


@pytest.mark.parametrize("bad", ["nonsense\n", jsonl([{"question": "x" * 3000, "choices": ["y", "z"]}])])
def test_strict_stops_at_a_bad_row(call: Callable[..., Result], here: Path, bad: str) -> None:
    (here / "bad.jsonl").write_text(jsonl(QUESTIONS[:1]) + bad)
    result = call("bad.jsonl", "--strict", "-o", "out.jsonl")
    assert result.exit_code == FAILED
    assert "pyqe: error: line 2: " in result.stderr
    assert not (here / "out.jsonl").exists()


def test_demonstrations(call: Callable[..., Result], lm: Any, here: Path) -> None:
    scorer = ChoiceScorer(lm, tiny.answer_tokenizer())
    for arguments, shots in (([], SHOTS), (["--shots", 2], SHOTS), (["--shots", 1], SHOTS[:1]), (["--shots", 0], [])):
        result = call("questions.jsonl", "--shots-from", "shots.jsonl", *arguments)
        assert result.exit_code == OK, result.stderr
        expected = [score.distribution.tolist() for score in scorer.score(QUESTIONS, shots=shots)]
        assert [row["distribution"] for row in rows(result.stdout)] == expected
    (here / "both.jsonl").write_text(jsonl([QUESTIONS[0], SHOTS[0]]))
    result = call("both.jsonl", "--shots-from", "shots.jsonl")
    assert result.exit_code == SOME_ROWS_FAILED
    assert "line 2: it is one of the demonstrations" in result.stderr


def test_bad_demonstrations(call: Callable[..., Result], here: Path) -> None:
    result = call("questions.jsonl", "--shots", 3, "--shots-from", "shots.jsonl")
    assert result.exit_code == FAILED
    assert "expected 3 questions, got 2" in result.stderr
    (here / "unanswered.jsonl").write_text(jsonl([*SHOTS, {"question": "x", "choices": ["y", "z"]}]))
    result = call("questions.jsonl", "--shots-from", "unanswered.jsonl")
    assert result.exit_code == FAILED
    assert "--shots-from unanswered.jsonl: line 3: answer: expected one in a demonstration" in result.stderr
    assert call("questions.jsonl", "--shots", 2, "--shots-from", "unanswered.jsonl").exit_code == OK
    assert "nosuch.jsonl: No such file" in call("questions.jsonl", "--shots-from", "nosuch.jsonl").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shots", 2], "--shots needs --shots-from"),
        (["--method", "text", "--permutations", "cyclic"], "--permutations needs --method letter"),
        (["--method", "text", "--greedy-tokens", 3], "--greedy-tokens needs --method letter"),
        (["--permutations", "some"], "expected a positive number, 'cyclic' or 'all', got 'some'"),
        (["--permutations", "0"], "expected a positive number"),
        (["--json"], "--json needs --output FILE"),
        (["--style", "x"], "Invalid value for '--style'"),
        (["--to", "tsv"], "Invalid value for '--to'"),
    ],
)
def test_wrong_usage(call: Callable[..., Result], arguments: list[Any], message: str) -> None:
    result = call("questions.jsonl", *arguments)
    assert result.exit_code == USAGE
    assert message in result.stderr


def test_a_chat_template_is_asked_for(call: Callable[..., Result]) -> None:
    result = call("questions.jsonl", "--chat")
    assert result.exit_code == FAILED
    assert "chat: the tokenizer has no chat template" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "made", "scored"),
    [
        (["--style", "parenthesis"], {"style": "parenthesis"}, {}),
        (["--method", "text"], {"method": "text"}, {}),
        (["--instruction", "Say it.", "--no-chat"], {"instruction": "Say it."}, {}),
        (["--permutations", "cyclic"], {}, {"permutations": "cyclic"}),
        (["--permutations", 3, "--seed", 7], {}, {"permutations": 3, "seed": 7}),
        (["--greedy-tokens", 3], {}, {"greedy_tokens": 3}),
    ],
)
def test_options_reach_the_scorer(
    call: Callable[..., Result], lm: Any, arguments: list[Any], made: dict[str, Any], scored: dict[str, Any]
) -> None:
    result = call("questions.jsonl", *arguments)
    assert result.exit_code == OK, result.stderr
    expected = ChoiceScorer(lm, tiny.answer_tokenizer(), **made).score(
        [Question.from_dict(question) for question in QUESTIONS], **scored
    )
    for row, score in zip(rows(result.stdout), expected, strict=True):
        assert {name: row[name] for name in score.scores()} == score.scores()


def test_resume_gives_the_same_file_and_summary(call: Callable[..., Result], here: Path) -> None:
    arguments = ("questions.jsonl", "--batch-size", 1, "--json", "-o", "out.jsonl")
    first = call(*arguments)
    whole = (here / "out.jsonl").read_bytes()
    (here / "out.jsonl.partial").write_bytes(b"".join(whole.splitlines(keepends=True)[:10]) + b'{"line": 1')
    second = call(*arguments, "--resume")
    assert second.exit_code == OK, second.stderr
    assert "8 from an earlier run" in second.stderr
    assert (here / "out.jsonl").read_bytes() == whole
    assert second.stdout == first.stdout
    (here / "out.jsonl.partial").write_bytes(whole.replace(b"What comes after 3", b"What comes before 3"))
    refused = call(*arguments, "--resume")
    assert refused.exit_code == FAILED
    assert "belongs to another input: line 4 differs" in refused.stderr


def test_summary_as_json(call: Callable[..., Result], here: Path) -> None:
    result = call("questions.jsonl", "--json", "-o", "out.jsonl")
    summary = json.loads(result.stdout)
    written = rows((here / "out.jsonl").read_text())
    assert summary["questions"] == summary["answers"] == 12
    assert summary["correct"] == sum(row["correct"] for row in written) / 12
    assert summary["msp"] == pytest.approx(sum(row["msp"] for row in written) / 12)
    (here / "none.jsonl").write_text("")
    result = call("none.jsonl", "--json", "-o", "out.jsonl")
    assert result.exit_code == OK
    assert json.loads(result.stdout) == {
        "questions": 0,
        "answers": 0,
        **dict.fromkeys(("correct", "greedy_correct", "confidence", "msp", "format_mass")),
    }


def test_report(call: Callable[..., Result], here: Path) -> None:
    result = call("questions.jsonl", "-o", "out.jsonl", "--report", "page.html")
    assert result.exit_code == OK, result.stderr
    page = (here / "page.html").read_text()
    assert "Calibration of questions.jsonl" in page
    assert "12, 12 with an answer" in page
    unknown = jsonl([{**question, "answer": None} for question in QUESTIONS])
    result = call("-o", "out.jsonl", "--report", "none.html", stdin=unknown)
    assert (result.exit_code, "no report: no question with an answer" in result.stderr) == (OK, True)
    assert not (here / "none.html").exists()


def test_help() -> None:
    text = CliRunner().invoke(main, ["choice", "--help"]).stdout
    assert "--to" not in text
    assert "--from" not in text.replace("--shots-from", "")
    assert "pyqe choice" in CliRunner().invoke(main, ["--help"]).stdout
