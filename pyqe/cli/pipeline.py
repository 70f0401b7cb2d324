"""The loop that score, generate and choice share: rows in, chunks through the model, rows out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import click

from pyqe.cli.options import Decorator, option_group
from pyqe.cli.output import Counts, Output
from pyqe.cli.rows import FORMATS, Check, Format, Row, chunks, complain, read_rows

CHUNK_BATCHES = 8  # batches whose rows are sorted by length together, and written together


@dataclass(frozen=True)
class Streams:
    """Where rows come from and go to."""

    source: str
    output: str
    input_form: str
    output_form: Format
    strict: bool
    resume: bool


@dataclass(frozen=True)
class Task:
    """What a command does with rows once its model is loaded.

    Attributes:
        check: what the model cannot do with a row's fields, or None.
        work: gives one or more result rows for each of some good rows; calls its second argument with numbers of
            units as it goes.
        unseen: the result of a row that the model does not see.
        unit: what progress is counted in.
    """

    check: Check
    work: Callable[[Sequence[Row], Callable[[int], object]], list[list[dict[str, Any]]]]
    unseen: Callable[[Row], dict[str, Any]]
    unit: str = "tokens"


Load = Callable[[], Task]


class Summary(Protocol):
    """What is to be said of all result rows together."""

    def add(self, row: dict[str, Any]) -> object:
        """Take a row that is written, or that an interrupted run has written."""

    def report(self) -> object:
        """Say it, at the end."""


@dataclass(frozen=True)
class Fields:
    """What a command reads of a row.

    Attributes:
        main: the field that a line of plain text is.
        kept: fields of the input that result rows repeat unchanged.
        check: what is wrong with them.
    """

    main: str
    kept: tuple[str, ...]
    check: Check


def stream_options(*input_forms: Format, output_forms: Sequence[Format] = FORMATS) -> Decorator:
    """The input argument, and --output, --from, --to, --strict, --resume, as ``streams``.

    Where there is only one format, --from or --to is not shown.
    """
    only = input_forms[0] if len(input_forms) == 1 else None
    whole = ", ".join(form for form in output_forms if form not in ("text", "tsv"))
    return option_group(
        "streams",
        Streams,
        click.argument("source", metavar="[INPUT]", default="-"),
        click.option("-o", "--output", default="-", show_default=True, metavar="FILE", help="'-' is stdout."),
        click.option(
            "--from",
            "input_form",
            type=click.Choice(input_forms if only else ["auto", *input_forms]),
            default=only or "auto",
            show_default=True,
            hidden=only is not None,
            help="auto goes by the name (.jsonl, .json, .ndjson, .txt, .tsv), else by whether the first line is JSON.",
        ),
        click.option(
            "--to",
            "output_form",
            type=click.Choice(output_forms),
            default="jsonl",
            show_default=True,
            hidden=len(output_forms) == 1,
            help=f"{whole}: everything; text: one quality a row; tsv: one token a line, escaped as in JSON.",
        ),
        click.option("--strict", is_flag=True, help="Stop at the first bad row instead of reporting it."),
        click.option(
            "--resume", is_flag=True, help="Go on after an interrupted run, from OUTPUT.partial or OUTPUT.parts."
        ),
    )


def run(streams: Streams, fields: Fields, batch_size: int, load: Load, summary: Summary | None = None) -> None:
    """Send rows through a task and write the results, in the order of the input.

    Input and output are opened, and what is to be resumed is checked, before the model is loaded.

    Raises:
        click.exceptions.Exit: with code 3 if rows failed.
        BadRowError: with ``strict``.
        OSError: input or output cannot be opened, the disk is full.
        ValueError: ``resume`` with another input.
    """
    size = CHUNK_BATCHES * batch_size
    rows = read_rows(streams.source, streams.input_form, fields.main, fields.check)
    on_result = _ignore if summary is None else summary.add
    output = Output(streams.output, streams.output_form)
    kept = output.keep_finished(rows, size, fields.kept, on_result) if streams.resume else Counts()
    with output:
        task = load()
        counts, seconds = _process(rows, size, task, output, fields, streams.strict, on_result)
    say_counts(counts, kept, task.unit, seconds)
    if summary is not None:
        summary.report()
    if counts.failed + kept.failed:
        raise click.exceptions.Exit(3)


def say_counts(counts: Counts, kept: Counts, unit: str, seconds: float) -> None:
    """The last line of a run: what it did, and what an earlier one had done."""
    before = f", {kept.rows} from an earlier run" if kept.rows else ""
    click.echo(
        f"pyqe: {counts.rows} rows{before}, {counts.failed + kept.failed} failed, {counts.units} {unit} in "
        f"{seconds:.1f} s ({counts.units / seconds:.0f} {unit}/s)",
        err=True,
    )


def _process(
    rows: Iterator[Row],
    size: int,
    task: Task,
    output: Output,
    fields: Fields,
    strict: bool,
    on_result: Callable[[dict[str, Any]], object],
) -> tuple[Counts, float]:
    """Numbers of what was done, and the seconds that it took."""
    from tqdm import tqdm

    counts, started = Counts(), time.monotonic()
    with tqdm(unit=f" {task.unit}", disable=None, dynamic_ncols=True) as bar:

        def on_progress(units: int) -> None:
            counts.units += units  # the bar does not count where it is not shown
            bar.update(units)

        for chunk in chunks(rows, size):
            written, failed = answer(chunk, task, fields.kept, on_progress, partial(complain, strict=strict))
            counts.rows += len(chunk)
            counts.failed += failed
            output.write(written)
            for result in written:
                on_result(result)
    return counts, max(time.monotonic() - started, 1e-9)


def answer(
    rows: Sequence[Row],
    task: Task,
    kept: Sequence[str],
    on_progress: Callable[[int], object],
    on_failed: Callable[[int, str | None], object],
) -> tuple[list[dict[str, Any]], int]:
    """Result rows of a chunk, in order, and how many of its rows failed.

    Args:
        rows: the chunk.
        task: what to do with them.
        kept: fields of the input that result rows repeat unchanged.
        on_progress: called with numbers of units.
        on_failed: called with the number of a row that fails, and the reason.
    """
    rows = [_judged(row, task.check) for row in rows]
    for row in rows:
        if row.status == "failed":
            on_failed(row.line, row.reason)
    good = [row for row in rows if row.status == "ok"]
    answers = iter(task.work(good, on_progress) if good else [])
    pairs = [(row, next(answers) if row.status == "ok" else [task.unseen(row)]) for row in rows]
    failed = sum(_count_failed(row, results, on_failed) for row, results in pairs)
    return [_result_row(row, result, kept) for row, results in pairs for result in results], failed


def _judged(row: Row, check: Check) -> Row:
    """The row, failed if it was good and the model cannot take it."""
    reason = check(row.fields) if row.status == "ok" else None
    return row if reason is None else Row(row.line, row.fields, "failed", reason)


def _ignore(row: dict[str, Any]) -> None:
    pass


def without_tokens(row: Row) -> dict[str, Any]:
    """The result of a text that the model does not see."""
    from pyqe.scored import ScoredText

    return ScoredText("", status=row.status, reason=row.reason).to_dict()


def _count_failed(row: Row, results: Sequence[dict[str, Any]], on_failed: Callable[[int, str | None], object]) -> int:
    """1 if a result is failed, which is reported unless the row was already."""
    reasons = [result["reason"] for result in results if result["status"] == "failed"]
    if reasons and row.status == "ok":
        on_failed(row.line, reasons[0])
    return 1 if reasons else 0


def _result_row(row: Row, result: dict[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """Line, the input's fields, the result's (which win), and those of the input that stay as they are."""
    line = {"line": row.line}
    return line | row.fields | result | line | {name: row.fields[name] for name in kept if name in row.fields}
