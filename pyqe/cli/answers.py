"""Answers with a confidence, from the rows of any of the formats that eval and calibrate read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyqe.cli.options import Decorator, option_group
from pyqe.cli.rows import Row, complain, read_rows

if TYPE_CHECKING:
    from pyqe.readers import Answer

Check = Callable[["Found"], None]

_PERCENTAGES = 10  # as many rows that look like it, and most of all so far, are no mistake in single rows


@dataclass(frozen=True)
class AnswerOptions:
    """Where answers come from, and which fields are read.

    Raises:
        click.UsageError: options that exclude each other.
    """

    source: str
    input_form: str
    confidence: str | None
    correct: str | None
    gold: str
    choices: tuple[str, ...]
    group: str | None
    strict: bool

    def __post_init__(self) -> None:
        if self.confidence is not None and self.input_form in ("lm-eval", "openai"):
            message = f"--confidence: rows of {self.input_form} have one of their own; leave out one of the two."
            raise click.UsageError(message, click.get_current_context())

    def read(self, record: dict[str, Any], judged: bool) -> Answer:
        """The answer of a record, with its correctness if ``judged``.

        Raises:
            ValueError: the record has none.
        """
        from pyqe import readers

        form = self.input_form
        if form == "auto":
            form = "jsonl" if self.confidence is not None else readers.format_of(record)
        if form == "lm-eval":
            return readers.from_lm_eval(record, correct=(self.correct or "acc") if judged else None)
        if form == "openai":
            gold, correct = (self.gold, self.correct) if judged else (None, None)
            return readers.from_logprobs(record, choices=self.choices, gold=gold, correct=correct)
        correct = (self.correct or "correct") if judged else None
        return readers.from_fields(record, confidence=self.confidence or "confidence", correct=correct)

    @property
    def name(self) -> str:
        """Of the input, for headings."""
        return "stdin" if self.source == "-" else Path(self.source).name


def _split_choices(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    choices = tuple(choice.strip() for choice in value.split(","))
    if len(set(choices)) < max(2, len(choices)) or not all(choices):
        raise click.BadParameter(f"expected two different choices or more, got {value!r}", ctx, parameter)
    return choices


def answer_options(name: str, kind: type[AnswerOptions], *more: Decorator) -> Decorator:
    """The input argument and the options that say what is read, with ``more`` of them, as ``name``, a ``kind``."""
    return option_group(
        name,
        kind,
        click.argument("source", metavar="[INPUT]", default="-"),
        click.option(
            "--from",
            "input_form",
            type=click.Choice(["auto", "jsonl", "lm-eval", "openai"]),
            default="auto",
            show_default=True,
            help="jsonl: fields of your own; lm-eval: samples that lm-evaluation-harness logs; openai: responses with "
            "logprobs, of vLLM too; auto: by what is in a row.",
        ),
        click.option("--confidence", metavar="FIELD", help="Number from 0 to 1; default 'confidence'."),
        click.option("--correct", metavar="FIELD", help="true, false or 0 to 1; default 'correct', for lm-eval 'acc'."),
        click.option(
            "--gold",
            metavar="FIELD",
            default="gold",
            show_default=True,
            help="For openai: the right choice or its number, unless --correct is given.",
        ),
        click.option(
            "--choices",
            metavar="LIST",
            default="A,B,C,D",
            show_default=True,
            callback=_split_choices,
            help="For openai: the token that is one of these is the answer.",
        ),
        *more,
        click.option("--group", metavar="FIELD", help="Group of a row, such as its data set."),
        click.option("--strict", is_flag=True, help="Stop at the first bad row instead of reporting it."),
    )


@dataclass(frozen=True)
class Found:
    """A row with its answer, or None, and its group, if groups were asked for."""

    row: Row
    answer: Answer | None = None
    group: str | None = None


@dataclass
class Answers:
    """What was read.

    Attributes:
        answers: in order.
        groups: of each, if groups were asked for.
        rows: number of rows that are not blank.
        failed: number of those that are bad.
    """

    answers: list[Answer] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    rows: int = 0
    failed: int = 0

    @property
    def confidence(self) -> list[float]:
        """[N]."""
        return [answer.confidence for answer in self.answers]

    @property
    def correct(self) -> list[float]:
        """[N], of answers that are judged."""
        return [answer.correct for answer in self.answers if answer.correct is not None]

    def counting(self, each: Iterable[Found]) -> Iterator[Found]:
        """Take note of each."""
        for found in each:
            self.rows += found.row.status != "empty"
            self.failed += found.row.status == "failed"
            if found.answer is not None:
                self.answers.append(found.answer)
                if found.group is not None:
                    self.groups.append(found.group)
            yield found

    def finish(self) -> None:
        """Say how much was read.

        Raises:
            click.exceptions.Exit: with code 3 if rows failed.
        """
        click.echo(f"pyqe: {self.rows} rows, {self.failed} failed", err=True)
        if self.failed:
            raise click.exceptions.Exit(3)


def read_answers(options: AnswerOptions, check: Check | None = None) -> Answers:
    """All judged answers; bad rows are reported and left out.

    Raises:
        OSError: the input cannot be read.
        BadRowError: with ``strict``.
        ValueError: no answer at all, or percentages for probabilities.
    """
    answers = Answers()
    for _ in answers.counting(each_answer(options, True, check)):
        pass
    if not answers.answers:
        raise ValueError(f"{options.name}: expected one good row at least, got none of {answers.rows}")
    return answers


def each_answer(options: AnswerOptions, judged: bool, check: Check | None = None) -> Iterator[Found]:
    """Each row with its answer; a bad one is reported.

    Args:
        options: what is read.
        judged: whether answers need a correctness.
        check: raises a ValueError for an answer that is of no use.

    Raises:
        as :func:`read_answers`.
    """
    from pyqe.readers import PercentageError

    rows = percentages = 0
    for row in _rows(options.source):
        found = Found(row)
        if row.status == "ok":
            try:
                answer = options.read(row.fields, judged)
                group = None if options.group is None else _group(row.fields, options.group)
                found = Found(row, answer, group)
                if check is not None:
                    check(found)
            except ValueError as error:
                percentages += isinstance(error, PercentageError)
                found = Found(Row(row.line, row.fields, "failed", str(error)))
        rows += row.status != "empty"
        if found.row.status == "failed":
            complain(row.line, found.row.reason, options.strict)
        if percentages >= _PERCENTAGES and 2 * percentages > rows:
            break
        yield found
    if 2 * percentages > rows:
        raise ValueError(f"{options.name}: most confidences are above 1; percentages have to be divided by 100 first")


def _rows(source: str) -> Iterator[Row]:
    """Lines of JSON, or the items of a file that is one JSON list or object."""
    if Path(source).suffix.lower() == ".json":
        try:
            document = json.loads(Path(source).read_text(encoding="utf-8-sig"))
        except ValueError:  # lines of JSON, perhaps
            return read_rows(source, "jsonl", "", lambda fields: None)
        items = document if isinstance(document, list) else [document]
        if not all(isinstance(item, dict) for item in items):
            raise ValueError(f"{source}: expected JSON objects, in a list or one a line")
        return (Row(number, item) for number, item in enumerate(items, 1))
    return read_rows(source, "jsonl", "", lambda fields: None)


def _group(record: dict[str, Any], path: str) -> str:
    from pyqe.readers import field as field_of

    value = field_of(record, path)
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"{path}: expected a string or a number, got {json.dumps(value):.60}")
