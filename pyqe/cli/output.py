"""Rows out: JSON lines, one quality a line, or one token a line; a file is there when it is whole."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import click

from pyqe.cli.rows import Format, Row


@dataclass
class Counts:
    """Input rows done, those of them that failed, and units of progress (tokens, prompts)."""

    rows: int = 0
    failed: int = 0
    units: int = 0


class Output:
    """Where result rows go: stdout, or a file that is renamed from ``NAME.partial`` when everything is written.

    Use as a context manager; an exception leaves what is written in ``NAME.partial``.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str, form: Format) -> None:
        self._form = form
        self._name = "stdout" if path == "-" else path
        self._target = None if path == "-" or is_special(path) else Path(path).resolve()  # a link stays one
        self._partial = None if self._target is None else self._target.with_name(self._target.name + ".partial")
        self._keeps = False
        self._header_due = form == "tsv"

    def keep_finished(
        self, rows: Iterator[Row], size: int, names: Sequence[str], on_result: Callable[[dict[str, Any]], object]
    ) -> Counts:
        """Keep what an interrupted run has done, and pass over those input rows.

        Only chunks that are surely whole stay; the last one is done again, as its last row may lack sequences.

        Args:
            rows: the input.
            size: rows in a chunk.
            names: the fields that must be the same in input and output.
            on_result: called with each result row that stays.

        Raises:
            ValueError: the partial output does not belong to this input, or is damaged.
        """
        if self._partial is None or self._form != "jsonl":
            raise click.UsageError("--resume needs a JSON lines file as --output.", click.get_current_context())
        counts = Counts()
        if not self._partial.exists():
            return counts
        last = max((row["line"] for row, _ in _finished_rows(self._partial)), default=1)
        lines, end, current = (last - 1) // size * size, 0, Row(0)
        for result, at in _finished_rows(self._partial):
            if result["line"] > lines:
                break
            if result["line"] != current.line:
                current = next(rows, Row(0))
                counts.rows += 1
                counts.failed += result.get("status") == "failed"
            if not _belongs(result, current, names):
                raise ValueError(f"--resume: {self._partial} belongs to another input: line {result['line']} differs")
            on_result(result)
            end = at
        os.truncate(self._partial, end)
        self._keeps = True
        return counts

    def __enter__(self) -> Output:
        if self._name == "stdout":
            self._stream: IO[bytes] = sys.stdout.buffer
        else:
            self._stream = (self._partial or Path(self._name)).open("ab" if self._keeps else "wb")
        return self

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows and flush them.

        Raises:
            OSError: the disk is full, for example.
        """
        try:
            self._stream.write("".join(map(self._render, rows)).encode("utf-8"))
            self._stream.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._name) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._name == "stdout":
            return
        if error is None:
            self._stream.close()
            if self._partial is not None and self._target is not None:
                os.replace(self._partial, self._target)
            return
        with suppress(OSError):  # of a disk that is full: the error is on its way already
            self._stream.close()
        if self._partial is not None:
            self._report_partial(self._partial)

    def _report_partial(self, partial: Path) -> None:
        if partial.stat().st_size == 0:
            partial.unlink()
            return
        hint = "; --resume goes on from there" if self._form == "jsonl" else ""
        click.echo(f"pyqe: what is done so far is in {partial}{hint}", err=True)

    def _render(self, row: dict[str, Any]) -> str:
        if self._form == "jsonl":
            return json.dumps(row, ensure_ascii=False) + "\n"
        if self._form == "text":
            return "nan\n" if row["quality"] is None else f"{row['quality']:.6f}\n"
        return self._table(row)

    def _table(self, row: dict[str, Any]) -> str:
        """One line for each token: where it is, itself (escaped as in JSON), and its signals."""
        from pyqe.scored import SIGNALS

        signals = [signal for signal in SIGNALS if f"token_{signal}" in row]
        places = [name for name in ("line", "sequence") if name in row]
        lines = []
        if self._header_due and signals:
            lines.append([*places, "token", *signals])
            self._header_due = False
        for i, token in enumerate(row["tokens"]):
            scores = [row[f"token_{signal}"][i] for signal in signals]
            shown = json.dumps(token, ensure_ascii=False)[1:-1]
            numbers = ("nan" if score is None else f"{score:.6g}" for score in scores)
            lines.append([*(str(row[name]) for name in places), shown, *numbers])
        return "".join("\t".join(line) + "\n" for line in lines)


def _finished_rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows of a partial output with the position of their end; one that was cut off is left out.

    Raises:
        ValueError: a row is no result row.
    """
    end = 0
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.endswith(b"\n"):
                return
            end += len(raw)
            try:
                row = json.loads(raw)
                row["line"] += 0
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"--resume: {path}: line {number} is not what pyqe writes: {error!r}") from error
            yield row, end


def _belongs(result: dict[str, Any], row: Row, names: Sequence[str]) -> bool:
    """Whether a result row was made from an input row."""
    same = all(result.get(name) == row.fields[name] for name in names if name in row.fields)
    return same and result["line"] == row.line and (row.status == "ok" or result.get("reason") == row.reason)


def is_special(path: str) -> bool:
    """Whether the path is a device, a pipe, a folder or an open file's number, which must not be renamed to."""
    if path.startswith(("/dev/std", "/dev/fd/", "/proc/")):  # links, perhaps to files
        return True
    return os.path.exists(path) and not os.path.isfile(path)
