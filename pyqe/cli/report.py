"""pyqe report"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from pyqe.cli.options import config_option
from pyqe.cli.rows import Row, check_prompt, complain, read_rows


@click.command("report")
@click.argument("source", metavar="[INPUT]", default="-")
@click.option("-o", "--output", default="report.html", show_default=True, metavar="FILE", help="'-' is stdout.")
@click.option("--title", default="Token quality", show_default=True, help="Heading of the page.")
@click.option("--strict", is_flag=True, help="Stop at the first bad row instead of reporting it.")
@config_option
def command(source: str, output: str, title: str, strict: bool) -> None:
    """Make one self-contained HTML page of what score or generate wrote (JSON lines; default stdin).

    Rows that failed there are on the page, with the reason. Rows that are no scores are reported and left out.

    \b
    pyqe score texts.txt -m smollm2 --head head | pyqe report -o report.html
    """
    rows = [row for row in read_rows(source, "jsonl", "text", _check) if row.status != "empty"]
    page, shown = _render(rows, title, strict)
    _write(page.encode("utf-8"), output)
    click.echo(f"pyqe: wrote {'stdout' if output == '-' else output}: {shown} texts", err=True)
    if shown < len(rows):
        raise click.exceptions.Exit(3)


def _check(fields: dict[str, Any]) -> str | None:
    names = [name for name in ("text", "tokens") if name not in fields]
    return f"expected a row that pyqe score or generate wrote, got none of {', '.join(names)}" if names else None


def _render(rows: Sequence[Row], title: str, strict: bool) -> tuple[str, int]:
    """The page, and how many rows are on it; the others are reported."""
    from pyqe.report import render_report

    if all(row.status == "ok" for row in rows):
        try:
            return render_report([_shown(row.fields) for row in rows], title=title), len(rows)
        except (ValueError, TypeError):
            pass  # which rows, and why, is found out below
    texts = []
    for row in rows:
        reason = row.reason or _problem(row.fields)
        if reason is None:
            texts.append(_shown(row.fields))
        else:
            complain(row.line, reason, strict)
    return render_report(texts, title=title), len(texts)


def _problem(fields: dict[str, Any]) -> str | None:
    """Why a record cannot be shown, or None."""
    from pyqe.report import render_report

    try:
        render_report([_shown(fields)])
    except (ValueError, TypeError) as error:
        return str(error).removeprefix("texts[0]: ")
    return None


def _write(page: bytes, output: str) -> None:
    """Write to stdout, a device, or a file that is replaced at the end."""
    from pyqe._files import atomic_path

    if output == "-":
        sys.stdout.buffer.write(page)
        sys.stdout.buffer.flush()
    else:
        with atomic_path(output) as path:
            path.write_bytes(page)


def _shown(fields: dict[str, Any]) -> dict[str, Any]:
    """A record for the page: messages of a prompt as text, and a text that was none, which is why it failed, empty."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and check_prompt(fields) is None:
        fields = fields | {"prompt": "\n".join(f"{message['role']}: {message['content']}" for message in prompt)}
    if fields.get("status") == "failed" and not isinstance(fields["text"], str):
        fields = fields | {"text": ""}
    return fields
