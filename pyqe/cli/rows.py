"""Rows in: JSON lines, plain text and TSV, one bad line never taking the others along."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, TypeVar

Format = Literal["jsonl", "text", "tsv", "parquet"]
FORMATS: tuple[Format, ...] = ("jsonl", "text", "tsv")  # of lines
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
}

Item = TypeVar("Item")

Check = Callable[[dict[str, Any]], str | None]
"""What is wrong with a row's fields, or None."""


@dataclass(frozen=True)
class Row:
    """One input row: its fields, or why there is nothing to do with it.

    Attributes:
        line: its number in the input, from 1.
        fields: what it holds; nothing where it cannot be read.
        status: "ok", "empty" (a blank line) or "failed".
        reason: why it is not "ok".
    """

    line: int
    fields: dict[str, Any] = field(default_factory=dict)
    status: Literal["ok", "empty", "failed"] = "ok"
    reason: str | None = None


class BadRowError(ValueError):
    """A bad row under ``--strict``."""


def read_rows(path: str, form: str, name: str, check: Check) -> Iterator[Row]:
    """Rows of a file ('-' is stdin), which is opened at once.

    Args:
        path: where from.
        form: "jsonl" (an object a line), "text" (the field ``name``), "tsv" (``prompt TAB text``) or "auto": by the
            path's suffix, and where that says nothing JSON lines if the first line that is not blank starts with "{".
        name: the field that a line of plain text is.
        check: what is wrong with a row.

    Raises:
        OSError: the file cannot be read.
        ValueError: TSV where there is no target.
    """
    form = _form_by_name(path, form)
    if form == "tsv" and name != "text":
        raise ValueError(f"{path}: TSV is source TAB target, and there is no target here; --from tells another format")
    if form == "parquet":
        raise ValueError(f"{path}: Parquet is read by 'pyqe score' alone")
    source: AbstractContextManager[IO[bytes]]
    source = nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")  # noqa: SIM115  # closed by _rows
    return _rows(source, form, name, check)


def _rows(source: AbstractContextManager[IO[bytes]], form: str, name: str, check: Check) -> Iterator[Row]:
    with source as stream:
        lines: Iterable[bytes] = stream
        if form == "auto":
            form, lines = _recognised(stream)
        yield from rows_of_lines(lines, 1, form, name, check)


def rows_of_lines(lines: Iterable[bytes], first: int, form: str, name: str, check: Check) -> Iterator[Row]:
    """Rows of consecutive lines of a file, the first of which has the number ``first``."""
    for number, raw in enumerate(lines, first):
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        yield _row(number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, form, name, check)


def form_of_file(path: str, form: str) -> str:
    """The format of a file, where ``form`` is "auto" as in :func:`read_rows`.

    Raises:
        OSError: the file cannot be read.
    """
    form = _form_by_name(path, form)
    if form != "auto":
        return form
    with open(path, "rb") as stream:
        return _recognised(stream)[0]


def _form_by_name(path: str, form: str) -> str:
    return SUFFIXES.get(Path(path).suffix.lower(), "auto") if form == "auto" else form


def is_parquet(path: str) -> bool:
    """Whether a file's name says so."""
    return _form_by_name(path, "auto") == "parquet"


def _recognised(stream: Iterable[bytes]) -> tuple[Format, Iterable[bytes]]:
    """The format that the first line which is not blank shows, and all lines."""
    read = []
    for raw in stream:
        read.append(raw)
        if raw.strip():
            break
    first = read[-1].removeprefix(codecs.BOM_UTF8).lstrip() if read else b""
    return "jsonl" if first.startswith(b"{") else "text", chain(read, stream)


def _row(number: int, raw: bytes, form: str, name: str, check: Check) -> Row:
    fields: dict[str, Any] = {}
    try:
        text = raw.decode("utf-8")
        if not (text.strip() if form == "jsonl" else text):
            return Row(number, status="empty", reason="empty line")
        fields = _parse(text, form, name)
        reason = check(fields)
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 at byte {error.start + 1}"
    except ValueError as error:
        reason = str(error)
    return Row(number, fields) if reason is None else Row(number, fields, "failed", reason)


def _parse(text: str, form: str, name: str) -> dict[str, Any]:
    if form == "text":
        return {name: text}
    if form == "tsv":
        cells = text.split("\t")
        if len(cells) != 2:
            raise ValueError(f"expected source TAB target, got {len(cells)} columns")
        return {"prompt": cells[0], "text": cells[1]}
    try:
        fields = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")  # noqa: TRY004
    if "\\ud" in text.lower():
        _check_surrogates(fields)
    return fields


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _check_surrogates(fields: dict[str, Any]) -> None:
    """JSON can escape half a character, which no tokenizer takes and no UTF-8 file can hold."""
    try:
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half of a surrogate pair") from error


def check_text(fields: dict[str, Any]) -> str | None:
    """What is wrong with a row that needs "text" and may have "prompt", or None."""
    if "text" not in fields:
        return _missing("text", fields)
    if not isinstance(fields["text"], str):
        return f"text: expected a string, got {_kind(fields['text'])}"
    return None if fields.get("prompt") is None else check_prompt(fields)


def check_prompt(fields: dict[str, Any]) -> str | None:
    """What is wrong with a row that needs "prompt", or None."""
    if "prompt" not in fields:
        return _missing("prompt", fields)
    prompt = fields["prompt"]
    if isinstance(prompt, str):
        return None
    if not isinstance(prompt, list) or not prompt:
        return f"prompt: expected a string or a list of messages, got {_kind(prompt)}"
    for number, message in enumerate(prompt, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f'prompt: expected {{"role": text, "content": text}}, got another thing as message {number}'
    return None


def check_chat(tokenizer: Any, prompt: Any) -> str | None:
    """Why the tokenizer cannot make a prompt of chat messages, or None."""
    if isinstance(prompt, str):
        return None
    if not getattr(tokenizer, "chat_template", None):
        return "prompt: the model has no chat template for messages"
    from jinja2 import TemplateError

    try:
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        return f"prompt: the model's chat template refuses it: {error}"
    return None


def _missing(name: str, fields: dict[str, Any]) -> str:
    return f"expected a field {name!r}, got {', '.join(map(repr, fields)) or 'no fields'}"


def _kind(value: Any) -> str:
    """A JSON value's type in words."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {bool: "true or false", int: "a number", float: "a number", dict: "an object", str: "a string"}
    return names[type(value)]


def complain(line: int, reason: str | None, strict: bool) -> None:
    """Say on stderr that a row is bad.

    Raises:
        BadRowError: with ``strict``.
    """
    from tqdm import tqdm

    message = f"line {line}: {reason}"
    if strict:
        raise BadRowError(message)
    tqdm.write(f"pyqe: {message}", file=sys.stderr)  # above a progress bar, if there is one


def chunks(rows: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive rows, ``size`` at a time."""
    chunk: list[Item] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
