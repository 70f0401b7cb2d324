"""Entry point: the group of commands, and how errors become exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import click

from pyqe import __version__
from pyqe.cli import bench, calibrate, choice, demo, doctor, eval, generate, report, score, serve, train
from pyqe.cli.errors import EXPECTED_ERRORS, one_line

FAILED, INTERRUPTED = 1, 130


class Group(click.Group):
    """Turns exceptions into one line on stderr and an exit code; ``PYQE_DEBUG=1`` shows the traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)  # ends quietly with 1 where the reader of stdout has gone
        except EXPECTED_ERRORS as error:
            if os.environ.get("PYQE_DEBUG") == "1":
                traceback.print_exc()
            click.echo(f"pyqe: error: {one_line(error)}", err=True)
            _give_up_stdout()
            sys.exit(FAILED)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("pyqe: interrupted", err=True)
            ctx.exit(INTERRUPTED)


def _give_up_stdout() -> None:
    """Let go of what stdout cannot take: at its end Python would try again, say so, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Token-level quality of language model output.

    \b
    pyqe demo                                     train, score and report on a small real LM
    pyqe train -m MODEL texts.txt -o head         train a Sigmoid Head on a frozen LM
    pyqe score texts.jsonl -m MODEL --head head   a quality for every token of given text
    pyqe generate prompts.txt -m MODEL            generate, with a quality for every token
    pyqe serve -m MODEL --head head               serve it over HTTP as OpenAI does
    pyqe choice questions.jsonl -m MODEL          answer multiple-choice questions, with the model's uncertainty
    pyqe report scores.jsonl -o report.html       what score or generate wrote, as a page
    pyqe eval answers.jsonl                       how good their confidences are
    pyqe calibrate fit|apply                      confidences made to mean what they say
    pyqe bench                                    pyqe beside its rivals, measured on this machine
    pyqe doctor                                   what this machine offers, and what is missing

    Data goes to stdout or to a file, everything else to stderr. Exit codes: 0 all well, 1 failure, 2 wrong usage, 3
    some rows failed (they are in the output, with the reason), 130 interrupted. PYQE_DEBUG=1 shows where an error comes
    from.
    """


for module in (demo, train, score, generate, serve, choice, report, eval, calibrate, bench, doctor):
    main.add_command(module.command)
