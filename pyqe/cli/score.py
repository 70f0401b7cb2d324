"""pyqe score"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from pyqe.cli.options import config_option, estimator_options, load_estimator, split_signals
from pyqe.cli.pipeline import io_options, run
from pyqe.cli.rows import Row


@click.command("score")
@io_options
@estimator_options
@click.option("--max-length", type=click.IntRange(2), help="Tokens in a window; default the model's context.")
@click.option("--overlap", type=click.IntRange(0), help="Tokens that windows of a long text share; default half.")
@config_option
def command(
    source: str,
    output: str,
    input_form: str,
    output_form: str,
    strict: bool,
    resume: bool,
    model_name: str,
    dtype: str,
    device: str,
    head_name: str | None,
    signals: str | None,
    batch_size: int,
    max_length: int | None,
    overlap: int | None,
) -> None:
    """Score every token of the texts in INPUT (default stdin).

    A JSON line needs "text" and may have "prompt"; its other fields are passed through. A line of plain text is a text,
    a TSV line is source TAB target (the source becomes the prompt, or the encoder's input).

    \b
    echo "The cat sat on the mat." | pyqe score -m smollm2 --to tsv
    pyqe score texts.jsonl -m smollm2 --head head -o scores.jsonl
    """
    estimator = load_estimator(model_name, head_name, dtype, device)
    chosen = split_signals(signals)

    def work(rows: Sequence[Row], on_progress: Callable[[int], object]) -> list[list[dict[str, Any]]]:
        scored = estimator.score(
            [row.fields["text"] for row in rows],
            [row.fields.get("prompt") for row in rows],
            signals=chosen,
            batch_size=batch_size,
            max_length=max_length,
            overlap=overlap,
            strict=strict,
            on_progress=on_progress,
        )
        return [[result.to_dict()] for result in scored]

    run(
        work,
        source=source,
        output=output,
        input_form=input_form,
        output_form=output_form,
        strict=strict,
        resume=resume,
        batch_size=batch_size,
        required="text",
    )
