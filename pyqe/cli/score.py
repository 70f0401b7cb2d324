"""pyqe score"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from pyqe.cli.corpus import CorpusOptions, corpus_options, is_corpus
from pyqe.cli.corpus import run as run_corpus
from pyqe.cli.options import EstimatorOptions, config_option, estimator_options
from pyqe.cli.pipeline import Fields, Streams, Task, run, stream_options, without_tokens
from pyqe.cli.processes import local_device
from pyqe.cli.rows import FORMATS, BadRowError, Row, check_chat, check_text
from pyqe.cli.shards import file_state

if TYPE_CHECKING:
    from pyqe.estimator import QualityEstimator


@click.command("score")
@stream_options("jsonl", "text", "tsv", "parquet", output_forms=(*FORMATS, "parquet"))
@estimator_options
@corpus_options
@click.option("--max-length", type=click.IntRange(2), help="Tokens in a window; default the model's context.")
@click.option("--overlap", type=click.IntRange(0), help="Tokens that windows of a long text share; default half.")
@config_option
def command(
    streams: Streams, chosen: EstimatorOptions, corpus: CorpusOptions, max_length: int | None, overlap: int | None
) -> None:
    """Score every token of the texts in INPUT (default stdin).

    A JSON line needs "text" and may have "prompt", a text or a list of chat messages; its other fields are passed
    through, unless a result has their name. A line of plain text is a text, a TSV line is source TAB target (the source
    becomes the prompt, or the encoder's input). Each row gives one output row, in order, with the input's line number
    as "line"; a blank line has status "empty", a bad one "failed", with the reason.

    INPUT can also be a Parquet file, a folder or a pattern such as 'texts/*.jsonl'; OUTPUT a Parquet file or a folder,
    with a "/" at its end. The processes of a torchrun job share the rows, as the workers of --engine ray do.

    \b
    pyqe score texts.jsonl -m smollm2 --head head -o scores.jsonl
    echo "The cat sat on the mat." | pyqe score -m smollm2 --to tsv
    torchrun --nproc-per-node 4 -m pyqe score texts.parquet -m MODEL -o scores/
    """
    if streams.output_form == "text":
        chosen.require_quality("--to text")
    limits = {"max_length": max_length, "overlap": overlap}
    fields = Fields("text", ("text", "prompt"), check_text)
    if not is_corpus(streams, corpus):
        run(streams, fields, chosen.batch_size, partial(_task, chosen, limits, streams.strict))
        return
    chosen = replace(chosen, device=local_device(chosen.device), **_absolute(chosen))
    names = {"model": chosen.model_name, "head": chosen.head_name}
    settings: dict[str, Any] = {**names, "dtype": chosen.dtype, "signals": chosen.signals, **limits}
    settings |= {f"files of the {what}": _files(name) for what, name in names.items() if name is not None}
    run_corpus(streams, fields, chosen.batch_size, partial(_task, chosen, limits, streams.strict), corpus, settings)


def _files(folder: str) -> list[tuple[str, int, int]]:
    """States of a folder's files: what is trained again is another head."""
    if not os.path.isdir(folder):
        return []
    return sorted(file_state(entry.path) for entry in os.scandir(folder) if entry.is_file())


def _absolute(chosen: EstimatorOptions) -> dict[str, Any]:
    """Names of folders as they are from anywhere: workers may have another current folder."""
    names = {"model_name": chosen.model_name, "head_name": chosen.head_name}
    return {key: os.path.abspath(name) for key, name in names.items() if name is not None and os.path.isdir(name)}


def _task(chosen: EstimatorOptions, limits: dict[str, int | None], strict: bool) -> Task:
    options = {"signals": chosen.signals, "batch_size": chosen.batch_size, **limits}
    return score_task(chosen.estimator(), options, strict)


def score_task(estimator: QualityEstimator, options: dict[str, Any], strict: bool) -> Task:
    """Rows with "text" and perhaps "prompt", scored.

    Args:
        estimator: scores them.
        options: of its ``score``.
        strict: a text that does not fit the model's context is an error.
    """
    from pyqe.estimator import TextTooLongError

    is_seq2seq = estimator.model.config.is_encoder_decoder

    def check(fields: dict[str, Any]) -> str | None:
        if fields.get("prompt") is None:
            return "prompt: expected the source, as the model is an encoder-decoder" if is_seq2seq else None
        return check_chat(estimator.tokenizer, fields["prompt"])

    def work(rows: Sequence[Row], on_progress: Callable[[int], object]) -> list[list[dict[str, Any]]]:
        texts, prompts = zip(*((row.fields["text"], row.fields.get("prompt")) for row in rows), strict=True)
        try:
            scored = estimator.score(texts, prompts, strict=strict, on_progress=on_progress, **options)
        except TextTooLongError as error:
            raise BadRowError(f"line {rows[error.index].line}: {error.problem}") from error
        return [[result.to_dict()] for result in scored]

    return Task(check, work, without_tokens)
