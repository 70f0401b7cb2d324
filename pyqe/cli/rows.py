"""Rows in and rows out: JSON lines, plain text and TSV, one bad line never taking the others along."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import click

Format = Literal["jsonl", "text", "tsv"]
FORMATS: tuple[Format, ...] = ("jsonl", "text", "tsv")
_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv"}
_SIGNALS = ("quality", "prob", "max_prob", "entropy", "boosted_prob")


@dataclass
class Row:
    """One input row: its fields, or why it cannot be used."""

    line: int
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class BadRowError(click.ClickException):
    """A bad row under ``--strict``."""

    exit_code = 1


def input_format(path: str, chosen: str) -> Format:
    """The chosen format, or what the file's name says; plain text if it says nothing."""
    return chosen if chosen != "auto" else _SUFFIXES.get(Path(path).suffix.lower(), "text")  # type: ignore[return-value]


def read_rows(path: str, form: Format, required: str, types: tuple[type, ...] = (str,)) -> Iterator[Row]:
    """Rows of a file ('-' is stdin).

    Args:
        path: where from.
        form: "jsonl" (an object a line), "text" (the required field) or "tsv" (``prompt TAB text``).
        required: the field that a row must have.
        types: what that field may be.

    Raises:
        OSError: the file cannot be read.
    """
    with ExitStack() as stack:
        stream = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        for line, raw in enumerate(stream, 1):
            try:
                fields = _parse(raw.rstrip(b"\r\n").decode("utf-8"), form, required)
            except UnicodeDecodeError as error:
                yield Row(line, problem=f"invalid UTF-8 at byte {error.start + 1}")
            except ValueError as error:
                yield Row(line, problem=str(error))
            else:
                yield Row(line, fields, _check(fields, required, types))


def _parse(text: str, form: Format, required: str) -> dict[str, Any]:
    if form == "text":
        return {required: text}
    if form == "tsv":
        cells = text.split("\t")
        if len(cells) != 2:
            raise ValueError(f"expected source TAB target, got {len(cells)} columns")
        return {"prompt": cells[0], "text": cells[1]}
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")  # noqa: TRY004
    return fields


def _check(fields: dict[str, Any], required: str, types: tuple[type, ...]) -> str | None:
    if required not in fields:
        return f"expected a field {required!r}, got {', '.join(map(repr, fields)) or 'none'}"
    if not isinstance(fields[required], types):
        names = " or ".join(kind.__name__ for kind in types)
        return f"{required}: expected {names}, got {type(fields[required]).__name__}"
    return None


def complain(row: Row, strict: bool) -> None:
    """Say on stderr that a row is bad.

    Raises:
        BadRowError: with ``strict``.
    """
    message = f"line {row.line}: {row.problem}"
    if strict:
        raise BadRowError(message)
    click.echo(f"pyqe: {message}", err=True)


def chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Consecutive rows, ``size`` at a time."""
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Output:
    """Where result rows go: stdout, or a file that is renamed from ``NAME.partial`` when everything is written.

    With ``resume`` the rows that are in ``NAME.partial`` already are kept, and :attr:`done` counts them.
    """

    def __init__(self, path: str, form: Format, *, resume: bool) -> None:
        self.form = form
        self.done = 0
        self.last: dict[str, Any] | None = None
        self._target = None if path == "-" or _is_special(path) else Path(path)
        self._partial = None if self._target is None else self._target.with_name(self._target.name + ".partial")
        if resume and (self._partial is None or form != "jsonl"):
            raise click.UsageError("--resume needs a JSON lines --output file")
        if resume and self._partial is not None and self._partial.exists():
            self._keep_whole_rows(self._partial)
        self._stream: IO[str] = sys.stdout
        if path != "-":
            mode = "a" if self.done else "w"
            self._stream = (self._partial or Path(path)).open(mode, encoding="utf-8", newline="\n")
        self._header_due = form == "tsv"

    def _keep_whole_rows(self, partial: Path) -> None:
        """Count the rows of an interrupted run and cut off one that was not finished."""
        size = 0
        with partial.open("rb") as stream:
            for raw in stream:
                if not raw.endswith(b"\n"):
                    break
                self.last = json.loads(raw)
                self.done, size = self.done + 1, size + len(raw)
        os.truncate(partial, size)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows and flush them.

        Raises:
            OSError: the disk is full, for example.
        """
        for row in rows:
            self._stream.write(self._render(row))
        self._stream.flush()

    def _render(self, row: dict[str, Any]) -> str:
        if self.form == "jsonl":
            return json.dumps(row, ensure_ascii=False) + "\n"
        if self.form == "text":
            return "nan\n" if row.get("quality") is None else f"{row['quality']:.6f}\n"
        signals = [signal for signal in _SIGNALS if row.get(f"token_{signal}") is not None]
        lines = []
        if self._header_due and signals:
            lines.append("\t".join(["line", "token", *signals]))
            self._header_due = False
        for i, token in enumerate(row.get("tokens", ())):
            scores = [row[f"token_{signal}"][i] for signal in signals]
            shown = json.dumps(token, ensure_ascii=False)[1:-1]  # tabs and newlines escaped
            lines.append("\t".join([str(row["line"]), shown, *("nan" if s is None else f"{s:.6g}" for s in scores)]))
        return "".join(line + "\n" for line in lines)

    def finish(self) -> None:
        """Give the file its name."""
        if self._stream is not sys.stdout:
            self._stream.close()
        if self._partial is not None and self._target is not None:
            os.replace(self._partial, self._target)

    def abandon(self) -> None:
        """Close the file; what is written stays in ``NAME.partial``."""
        if self._stream is not sys.stdout:
            self._stream.close()


def _is_special(path: str) -> bool:
    """Whether the path is a device or a pipe, which cannot be renamed to."""
    return os.path.exists(path) and not os.path.isfile(path)
