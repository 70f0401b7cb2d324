"""pyqe report"""

from __future__ import annotations

import click

from pyqe.cli.options import config_option
from pyqe.cli.rows import complain, read_rows


@click.command("report")
@click.argument("source", metavar="[INPUT]", default="-")
@click.option("-o", "--output", default="report.html", show_default=True, metavar="FILE")
@click.option("--title", default="Token quality", show_default=True)
@click.option("--strict", is_flag=True, help="Stop at the first bad row instead of reporting it.")
@config_option
def command(source: str, output: str, title: str, strict: bool) -> None:
    """Make one self-contained HTML page of what score or generate wrote (JSON lines; default stdin).

    \b
    pyqe score texts.txt -m smollm2 --head head | pyqe report -o report.html
    """
    from pyqe.report import write_report

    texts, bad = [], 0
    for row in read_rows(source, "jsonl", "tokens", (list,)):
        if row.problem is None:
            texts.append(row.fields)
        else:
            complain(row, strict)
            bad += 1
    write_report(output, texts, title=title)
    click.echo(f"pyqe: wrote {output}: {len(texts)} texts", err=True)
    if bad:
        raise click.exceptions.Exit(3)
