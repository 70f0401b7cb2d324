"""What the pages of reports share: one file without network or outside resources, tables, numbers as text."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pyqe._files import atomic_path

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ReportTable:
    """An extra table of the report, such as the AUROC of two signals side by side.

    Args:
        title: heading of the table.
        columns: names of the columns.
        rows: one sequence of cells for each row; floats are shown with four significant digits.
        note: a sentence below the table.

    Raises:
        ValueError: a row has another number of cells than there are columns.

    >>> ReportTable("AUROC", ["signal", "AUROC"], [["sigmoid", 0.81], ["softmax", 0.72]]).columns
    ['signal', 'AUROC']
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: rows[{number}] must have {len(self.columns)} cells, one for each "
                    f"column, got {len(row)}"
                )


def render_page(template: str, styles: Sequence[str], script: str | None = None, **values: Any) -> str:
    """A page from a template that extends ``page.html.jinja``.

    A content security policy with the hashes of our own style and script keeps everything else from running or
    loading.

    Args:
        template: name of the template.
        styles: names of style sheets, in order.
        script: name of the script, if there is one.
        values: what the template needs.
    """
    style = "".join(map(_asset, styles))
    code = None if script is None else _asset(script)
    page = (
        _environment()
        .get_template(template)
        .render(
            style=Markup(style),
            style_hash=_content_hash(style),
            script=None if code is None else Markup(code),
            script_hash=None if code is None else _content_hash(code),
            **values,
        )
    )
    return _showable(page)


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        OSError: the folder does not exist or can't be written; an older file stays as it was.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def counted(number: int, noun: str) -> str:
    """``1 text``, ``1,200 texts``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shown_number(value: float | None) -> str:
    """A score as the page shows it."""
    if value is None:
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.3f}"


def root_ticks(top: int, height: float) -> list[int]:
    """Round counts up to ``top``, at least 22 units apart on a square-root axis of ``height``."""
    powers = [10**power * factor for power in range(len(str(top))) for factor in (1, 2, 5)]
    ticks, position = [0], 0.0
    for value in powers:
        at = height * math.sqrt(value / top)
        if value <= top and at - position >= 22:
            ticks.append(value)
            position = at
    return ticks


def _cell(value: object) -> str:
    """A cell of a ``ReportTable`` as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_numeric(value: object) -> bool:
    """Whether a cell is to be aligned as a number; a dash stands for one that is missing."""
    text = str(value).rstrip("% ").replace(",", "")
    try:
        float("nan" if text == "–" else text)
    except ValueError:
        return False
    return True


def _showable(page: str) -> str:
    """Replace what HTML can't carry: control characters by their pictures, lone surrogates by U+FFFD.

    A carriage return becomes a character reference, since a parser turns a bare one into a newline.
    """

    def replacement(match: re.Match[str]) -> str:
        code = ord(match[0])
        if code == 0x0D:
            return "&#13;"
        if code == 0x7F:
            return "\u2421"
        return chr(0x2400 + code) if code < 0x20 else "\ufffd"

    return re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", replacement, page)


def _asset(name: str) -> str:
    """A file beside this module."""
    return (_HERE / name).read_text(encoding="utf-8")


def _content_hash(source: str) -> str:
    """The source expression of the content security policy that allows exactly ``source``."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _environment() -> Environment:
    """Jinja2 with escaping on and undefined names as errors."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=shown_number, cell=_cell)
    environment.tests["numeric"] = _is_numeric
    return environment
