"""The loop that score and generate share: rows in, chunks through the model, rows out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import click

from pyqe.cli.rows import FORMATS, Output, Row, chunks, complain, input_format, read_rows

Work = Callable[[Sequence[Row], Callable[[int], object]], list[list[dict[str, Any]]]]

_CHUNK_BATCHES = 8  # batches whose rows are sorted by length together, and written together


def io_options(command: Any) -> Any:
    """The input argument, and --output, --from, --to, --strict, --resume."""
    for option in (
        click.option("--resume", is_flag=True, help="Go on after an interrupted run (OUTPUT.partial)."),
        click.option("--strict", is_flag=True, help="Stop at the first bad row instead of reporting it."),
        click.option(
            "--to",
            "output_form",
            type=click.Choice(FORMATS),
            default="jsonl",
            show_default=True,
            help="jsonl: everything; text: one quality a line; tsv: one token a line.",
        ),
        click.option(
            "--from",
            "input_form",
            type=click.Choice(["auto", *FORMATS]),
            default="auto",
            show_default=True,
            help="auto goes by the file's name (.jsonl, .tsv), else plain text.",
        ),
        click.option("-o", "--output", default="-", show_default=True, metavar="FILE", help="'-' is stdout."),
        click.argument("source", metavar="[INPUT]", default="-"),
    ):
        command = option(command)
    return command


def run(
    work: Work,
    *,
    source: str,
    output: str,
    input_form: str,
    output_form: Any,
    strict: bool,
    resume: bool,
    batch_size: int,
    required: str,
    types: tuple[type, ...] = (str,),
) -> None:
    """Send rows through ``work`` (which gives one or more result rows for each good one) and write the results.

    Raises:
        click.exceptions.Exit: with code 3 if rows failed.
        BadRowError: with ``strict``.
    """
    from tqdm import tqdm

    rows = read_rows(source, input_format(source, input_form), required, types)
    sink = Output(output, output_form, resume=resume)
    started, counts = time.monotonic(), {"rows": 0, "failed": 0, "tokens": 0}
    try:
        with tqdm(unit=" tokens", disable=None, dynamic_ncols=True) as bar:
            for chunk in chunks(_skip(rows, sink), _CHUNK_BATCHES * batch_size):
                results = _results(work, chunk, strict, bar.update)
                sink.write(results)
                counts["rows"] += len(chunk)
                counts["failed"] += sum(result["status"] == "failed" for result in results)
            counts["tokens"] = int(bar.n)
    except BaseException:
        sink.abandon()
        raise
    sink.finish()
    _summarise(counts, time.monotonic() - started, sink.done)
    if counts["failed"]:
        raise click.exceptions.Exit(3)


def _results(
    work: Work, chunk: Sequence[Row], strict: bool, on_progress: Callable[[int], object]
) -> list[dict[str, Any]]:
    """Result rows of a chunk in the order of its rows; a bad row gives one with status "failed"."""
    for row in chunk:
        if row.problem is not None:
            complain(row, strict)
    good = [row for row in chunk if row.problem is None]
    answers = iter(work(good, on_progress) if good else [])
    results: list[dict[str, Any]] = []
    for row in chunk:
        if row.problem is not None:
            failed: dict[str, Any] = {
                "status": "failed",
                "reason": row.problem,
                "quality": None,
                "text": "",
                "tokens": [],
            }
            results.append({"line": row.line, **row.fields, **failed})
            continue
        for answer in next(answers):
            if answer["status"] == "failed":
                complain(Row(row.line, problem=answer["reason"]), strict)
            results.append({"line": row.line, **row.fields, **answer})
    return results


def _skip(rows: Iterator[Row], sink: Output) -> Iterator[Row]:
    """The rows that an interrupted run has not done; several result rows of one input row share its line."""
    if sink.last is None:
        return rows
    line = sink.last["line"]
    before = list(islice(rows, line))
    fields = before[-1].fields if len(before) == line else None
    if fields is None or any(fields[name] != sink.last.get(name) for name in ("text", "prompt") if name in fields):
        raise ValueError(f"--resume: the partial output ends with another text than line {line} of the input")
    return rows


def _summarise(counts: dict[str, int], seconds: float, resumed: int) -> None:
    rate = counts["tokens"] / seconds if seconds else 0.0
    before = f" after {resumed} from an earlier run" if resumed else ""
    click.echo(
        f"pyqe: {counts['rows']} rows{before}, {counts['failed']} failed, {counts['tokens']} tokens in {seconds:.1f} s "
        f"({rate:.0f} tokens/s)",
        err=True,
    )
