"""pyqe choice"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from pyqe.choice.prompts import METHODS, STYLES, Permutations, Question, question_problem, shot_problem
from pyqe.cli.options import ModelOptions, config_option, model_options, option_group
from pyqe.cli.pipeline import Fields, Streams, Task, run, stream_options
from pyqe.cli.rows import Row, read_rows


@dataclass(frozen=True)
class Asking:
    """How questions are put to the model.

    Raises:
        click.UsageError: options that exclude each other.
    """

    style: Any
    method: Any
    chat: bool | None
    instruction: str | None
    shots: int | None
    shots_from: str | None
    permutations: Permutations
    greedy_tokens: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        ctx = click.get_current_context()
        if self.shots and self.shots_from is None:
            raise click.UsageError("--shots needs --shots-from FILE with the demonstrations.", ctx)
        if self.method == "text" and self.permutations != 1:
            raise click.UsageError("--permutations needs --method letter: no choices are listed otherwise.", ctx)
        if self.method == "text" and self.greedy_tokens:
            raise click.UsageError("--greedy-tokens needs --method letter: no choices are listed otherwise.", ctx)

    def demonstrations(self) -> list[Question]:
        """The first questions of the file for demonstrations.

        Raises:
            OSError: it cannot be read.
            ValueError: a bad row, or fewer than are wanted.
        """
        if self.shots_from is None or self.shots == 0:
            return []
        found = []
        for row in read_rows(self.shots_from, "jsonl", "question", shot_problem):
            if row.status == "failed":
                raise ValueError(f"--shots-from {self.shots_from}: line {row.line}: {row.reason}")
            if row.status == "ok":
                found.append(Question.from_dict(row.fields))
            if len(found) == self.shots:
                return found
        if self.shots is not None:
            raise ValueError(f"--shots-from {self.shots_from}: expected {self.shots} questions, got {len(found)}")
        return found


def _permutations(ctx: click.Context, parameter: click.Parameter, value: str) -> Permutations:
    if value == "cyclic":
        return "cyclic"
    if value == "all":
        return "all"
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"expected a positive number, 'cyclic' or 'all', got {value!r}", ctx, parameter)
    return int(value)


_asking_options = option_group(
    "asking",
    Asking,
    click.option(
        "--style", type=click.Choice(STYLES), default="letter", show_default=True, help="Of answers: A, or (A)."
    ),
    click.option(
        "--method",
        type=click.Choice(METHODS),
        default="letter",
        show_default=True,
        help="letter: choices are listed and their letters compared; text: each choice is read as the answer.",
    ),
    click.option(
        "--chat/--no-chat", default=None, help="Whether to use the model's chat template; default if it has one."
    ),
    click.option("--instruction", metavar="TEXT", help="What the prompt begins with, instead of the default."),
    click.option(
        "--shots", type=click.IntRange(0), help="Demonstrations before each question; default the whole file."
    ),
    click.option("--shots-from", metavar="FILE", help="Questions with answers, JSON lines: the first ones are shown."),
    click.option(
        "--permutations",
        metavar="N|cyclic|all",
        default="1",
        show_default=True,
        callback=_permutations,
        help="Orders of the choices to average over: the given one and N - 1 random ones, each rotation, or all.",
    ),
    click.option(
        "--greedy-tokens",
        type=click.IntRange(0),
        default=0,
        help="Generate as many tokens and take the greedy answer from the text.",
    ),
    click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Prompts at a time."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of random orders."),
)


@click.command("choice")
@stream_options("jsonl", output_forms=("jsonl",))
@model_options
@_asking_options
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout (with --output FILE).")
@click.option(
    "--report", metavar="FILE", help="Write how good the confidences are as an HTML page (questions with answers)."
)
@config_option
def command(streams: Streams, language_model: ModelOptions, asking: Asking, as_json: bool, report: str | None) -> None:
    """Answer the multiple-choice questions in INPUT (default stdin), with the model's uncertainty.

    A JSON line needs "question" and "choices", a list of 2 to 26 texts, and may have "answer", the index of the right
    one; its other fields are passed through, unless a result has their name. Each row gives one output row, in order,
    with the input's line number as "line": prediction, its renormalised probability as "confidence", distribution over
    the choices, format mass (probability that an answer comes at all), MSP, greedy answer. A blank line has status
    "empty", a bad one "failed", with the reason.

    \b
    pyqe choice questions.jsonl -m smollm2 -o scored.jsonl
    pyqe choice test.jsonl -m smollm2 --no-chat --shots 5 --shots-from dev.jsonl -o scored.jsonl
    """
    if as_json and streams.output == "-":
        raise click.UsageError("--json needs --output FILE: stdout has the rows.", click.get_current_context())
    shots = asking.demonstrations()
    fields = Fields("question", ("question", "choices", "answer"), question_problem)
    run(
        streams,
        fields,
        asking.batch_size,
        lambda: _task(language_model, asking, shots),
        _Summary(as_json, report, streams.source),
    )


def _task(language_model: ModelOptions, asking: Asking, shots: Sequence[Question]) -> Task:
    from pyqe.choice.scorer import ChoiceScorer

    model, tokenizer = language_model.load()
    scorer = ChoiceScorer(
        model,
        tokenizer,
        style=asking.style,
        method=asking.method,
        chat=asking.chat,
        instruction=asking.instruction,
    )

    def work(rows: Sequence[Row], on_progress: Callable[[int], object]) -> list[list[dict[str, Any]]]:
        scored = scorer.score(
            [row.fields for row in rows],
            shots=shots,
            batch_size=asking.batch_size,
            permutations=asking.permutations,
            seed=asking.seed,
            greedy_tokens=asking.greedy_tokens,
            on_progress=on_progress,
        )
        return [[result.scores()] for result in scored]

    return Task(lambda fields: None, work, _unseen, unit="prompts")


def _unseen(row: Row) -> dict[str, Any]:
    """The result of a row that the model does not see."""
    from pyqe.choice.scored import ScoredChoice

    return ScoredChoice(Question("", ()), status=row.status, reason=row.reason).scores()


class _Summary:
    """Means over the rows that have scores, and the page about those whose answer is known."""

    def __init__(self, as_json: bool, page: str | None, source: str) -> None:
        self._as_json = as_json
        self._page = page
        self._source = "stdin" if source == "-" else source
        self._answers: list[tuple[float, bool]] = []  # confidence, and whether it is right
        self._values: dict[str, list[float]] = {name: [] for name in _SUMMARISED}
        self._rows = 0

    def add(self, row: dict[str, Any]) -> None:
        """Take a row's numbers."""
        self._rows += row["status"] == "ok"
        for name, values in self._values.items():
            if row.get(name) is not None:
                values.append(float(row[name]))
        if row.get("confidence") is not None and row.get("correct") is not None:
            self._answers.append((row["confidence"], row["correct"]))

    def report(self) -> None:
        """One line on stderr, and a JSON object on stdout if wanted."""
        means = {name: sum(values) / len(values) if values else None for name, values in self._values.items()}
        shown = [f"{_SUMMARISED[name]} {mean:.3f}" for name, mean in means.items() if mean is not None]
        click.echo(f"pyqe: {self._rows} questions: {', '.join(shown) or 'no scores'}", err=True)
        if self._as_json:
            answered = len(self._values["correct"])
            click.echo(json.dumps({"questions": self._rows, "answers": answered, **means}))
        if self._page is not None:
            self._write_page(self._page)

    def _write_page(self, path: str) -> None:
        from pyqe.report import write_calibration_report

        if not self._answers:
            click.echo("pyqe: no report: no question with an answer has a score", err=True)
            return
        confidence, correct = zip(*self._answers, strict=True)
        summary = {"Input": self._source, "Questions": f"{self._rows:,}, {len(correct):,} with an answer"}
        write_calibration_report(path, confidence, correct, title=f"Calibration of {self._source}", summary=summary)


_SUMMARISED = {
    "correct": "accuracy",
    "greedy_correct": "greedy accuracy",
    "confidence": "mean confidence",
    "msp": "mean MSP",
    "format_mass": "format mass",
}
