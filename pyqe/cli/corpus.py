"""Scoring a corpus, shard by shard: in this process, in those of a torchrun job, or on a Ray cluster."""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import click

from pyqe import __version__
from pyqe.cli import parquet
from pyqe.cli.options import Decorator, option_group
from pyqe.cli.output import Counts, is_special
from pyqe.cli.pipeline import CHUNK_BATCHES, Fields, Load, Streams, Task, answer, say_counts
from pyqe.cli.processes import Processes, is_restarted_by_torchrun, size_of_job
from pyqe.cli.rows import BadRowError, Row, chunks, complain, is_parquet
from pyqe.cli.shards import Parts, Shard, cut, file_state, find_files, parts_folder


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is divided, and who works on it.

    Raises:
        click.UsageError: options of Ray without it.
    """

    engine: Literal["local", "ray"]
    workers: int | None
    gpus_per_worker: float | None
    shard_rows: int

    def __post_init__(self) -> None:
        if self.engine != "ray" and (self.workers is not None or self.gpus_per_worker is not None):
            message = "--workers and --gpus-per-worker need --engine ray."
            raise click.UsageError(message, click.get_current_context())


corpus_options: Decorator = option_group(
    "corpus",
    CorpusOptions,
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="local: this process, or those of torchrun; ray: workers on a cluster (pip install 'pyqe[ray]').",
    ),
    click.option("--workers", type=click.IntRange(1), help="Ray: how many; default one a GPU, else one a node."),
    click.option(
        "--gpus-per-worker",
        type=click.FloatRange(0),
        metavar="NUMBER",
        help="Ray: GPUs for each, or a part of one; default 1 if the cluster has any.",
    ),
    click.option(
        "--shard-rows",
        type=click.IntRange(1),
        default=1024,
        show_default=True,
        help="Rows of a corpus that are done, and after a crash redone, together.",
    ),
)


@dataclass(frozen=True)
class Job:
    """What a worker has to know beside its shard.

    Attributes:
        parts: where results go.
        form: their format, "jsonl" or "parquet".
        fields: what is read of a row.
        chunk: rows that go to the model together.
        several_files: rows tell which they are from.
        strict: stop at the first bad row.
    """

    parts: Parts
    form: str
    fields: Fields
    chunk: int
    several_files: bool
    strict: bool


@dataclass(frozen=True)
class Done:
    """A shard that is scored: numbers of rows, of those that failed, and of tokens; bad rows with the reason."""

    number: int
    rows: int
    failed: int
    units: int
    complaints: Sequence[tuple[int, str]] = ()


def is_corpus(streams: Streams, options: CorpusOptions) -> bool:
    """Whether rows are cut into shards: several processes or files, Parquet, a folder as output, parts to resume."""
    source, output = streams.source, streams.output
    return (
        options.engine == "ray"
        or size_of_job() > 1
        or is_restarted_by_torchrun()
        or "parquet" in (streams.input_form, streams.output_form)
        or is_parquet(source)
        or os.path.isdir(source)
        or _is_pattern(source)
        or is_parquet(output)
        or output.endswith("/")
        or os.path.isdir(output)
        or (streams.resume and parts_folder(output).is_dir())
    )


def _is_pattern(source: str) -> bool:
    return glob.has_magic(source) and not os.path.exists(source)


def run(
    streams: Streams, fields: Fields, batch_size: int, load: Load, options: CorpusOptions, settings: dict[str, Any]
) -> None:
    """Send the rows of a corpus through a task and write one result row for each, in the order of the input.

    Args:
        streams: where from and to.
        fields: what is read of a row.
        batch_size: rows in a forward pass.
        load: makes the task; can be pickled.
        options: who works.
        settings: what must be the same, beside the input, where an interrupted run goes on.

    Raises:
        click.exceptions.Exit: with code 3 if rows failed.
        click.UsageError: nothing to read or write; Ray in a torchrun job.
        BadRowError: with ``strict``.
        OSError: input or output cannot be opened, the disk is full.
        ValueError: ``resume`` of another run.
    """
    form = _output_form(streams, options)
    processes = Processes()
    plan = processes.share(lambda: _prepare(streams, form, options, settings))
    job = Job(plan.parts, form, fields, CHUNK_BATCHES * batch_size, plan.several_files, streams.strict)
    # Each in its turn: texts of one kind, such as the long ones, often stand together
    todo = plan.todo[processes.rank :: processes.size]
    started = time.monotonic()
    with plan.parts:
        finished = _on_ray(todo, job, load, options) if options.engine == "ray" else _here(todo, job, load)
        counts = processes.gather(_follow(finished, todo, plan.several_files, shown=processes.rank == 0))
        if counts is None:
            return
        plan.parts.finish(len(plan.shards))
    total = Counts(*map(sum, zip(*map(astuple, counts), strict=True)))
    say_counts(total, plan.kept, "tokens", max(time.monotonic() - started, 1e-9))
    if (total.failed or plan.kept.failed) and not is_restarted_by_torchrun():
        raise click.exceptions.Exit(3)


def _output_form(streams: Streams, options: CorpusOptions) -> str:
    output, context = streams.output, click.get_current_context()
    if "-" in (streams.source, output) or (is_special(output) and not os.path.isdir(output)):
        raise click.UsageError("A corpus needs a file, folder or pattern as INPUT, a file or folder as -o.", context)
    if options.engine == "ray" and size_of_job() > 1:
        raise click.UsageError("--engine ray starts its workers itself: leave out torchrun.", context)
    form = "parquet" if is_parquet(output) else streams.output_form
    if form not in ("jsonl", "parquet"):
        raise click.UsageError("--to: the scores of a corpus are written as jsonl or parquet.", context)
    return form


@dataclass(frozen=True)
class _Plan:
    """All shards, those that are to be scored, and what the others hold."""

    parts: Parts
    shards: list[Shard]
    todo: list[Shard]
    kept: Counts
    several_files: bool


def _prepare(streams: Streams, form: str, options: CorpusOptions, settings: dict[str, Any]) -> _Plan:
    parts = Parts(streams.output, form)
    files = [name for name in find_files(streams.source) if parts.folder not in Path(name).resolve().parents]
    if not files:
        raise FileNotFoundError(f"{streams.source}: nothing but {parts.folder}, of an earlier run")
    if os.path.realpath(streams.output) in map(os.path.realpath, files):
        raise ValueError(f"{streams.output}: the output is one of the files of the input")
    shards = cut(files, streams.input_form, options.shard_rows)
    states = [file_state(path) for path in files]
    asked = {"input": states, "shard-rows": options.shard_rows, "from": streams.input_form, "to": form, **settings}
    parts.begin({"pyqe": __version__, **asked}, resume=streams.resume, restarting=is_restarted_by_torchrun())
    finished = {shard.number: parts.finished(shard.number) for shard in shards}
    before = [counts for counts in finished.values() if counts is not None]
    kept = Counts(sum(counts["rows"] for counts in before), sum(counts["failed"] for counts in before))
    todo = [shard for shard in shards if finished[shard.number] is None]
    return _Plan(parts, shards, todo, kept, several_files=files != [streams.source])


def _here(todo: Sequence[Shard], job: Job, load: Load) -> Iterator[Done]:
    """Score shards in this process; if there are none, no model is loaded."""
    if todo:
        task = load()
        for shard in todo:
            yield score_shard(shard, job, task)


def _on_ray(todo: Sequence[Shard], job: Job, load: Load, options: CorpusOptions) -> Iterator[Done]:
    from pyqe.cli.ray_engine import score_on_ray

    return score_on_ray(todo, job, load, options.workers, options.gpus_per_worker)


def _follow(finished: Iterable[Done], todo: Sequence[Shard], several_files: bool, shown: bool) -> Counts:
    """What shards hold that are finished one after the other; their bad rows are reported."""
    from tqdm import tqdm

    counts, names = Counts(), {shard.number: shard.name for shard in todo}
    total = sum(shard.rows for shard in todo)
    with tqdm(total=total, unit=" rows", disable=None if shown else True, dynamic_ncols=True) as bar:
        for done in finished:
            for line, reason in done.complaints:
                complain(line, f"{reason} ({names[done.number]})" if several_files else reason, strict=False)
            counts.rows += done.rows
            counts.failed += done.failed
            counts.units += done.units
            bar.update(done.rows)
    return counts


# --- one shard


def score_shard(shard: Shard, job: Job, task: Task) -> Done:
    """Score a shard's rows and write them; of a shard that is done already only say so.

    Raises:
        BadRowError: with ``strict``.
        OSError: the input cannot be read, the disk is full.
        RuntimeError: the input has changed meanwhile; the shard has ended several processes.
    """
    before = job.parts.finished(shard.number)
    if before is not None:  # by a worker that died with other shards of its block undone
        return Done(shard.number, before["rows"], before["failed"], before["units"])
    job.parts.attempt(shard.number)
    units: list[int] = []
    complaints: list[tuple[int, str]] = []

    def on_failed(line: int, reason: str | None) -> None:
        if job.strict:
            complain(line, reason, strict=True)
        complaints.append((line, str(reason)))

    pieces, rows, failed = [], 0, 0
    for chunk, table in _chunks(shard, job):
        try:
            results, bad = answer(chunk, task, job.fields.kept, units.append, on_failed)
        except BadRowError as error:
            raise BadRowError(f"{shard.name}: {error}") from error
        pieces.append(_rendered(chunk, table, results, shard, job))
        rows, failed = rows + len(chunk), failed + bad
    if rows != shard.rows:
        raise RuntimeError(f"{shard.name}: {shard.rows} rows from {shard.first} on have become {rows} meanwhile")
    pieces = pieces or [_rendered([], None, [], shard, job)]
    job.parts.write(shard.number, pieces, {"rows": rows, "failed": failed, "units": sum(units)})
    return Done(shard.number, rows, failed, sum(units), complaints)


def _chunks(shard: Shard, job: Job) -> Iterator[tuple[list[Row], Any]]:
    """Rows that go to the model together, and as a table where they come from Parquet."""
    table = shard.table() if shard.form == "parquet" else None
    if table is None:
        rows = shard.lines(job.fields.main, job.fields.check)
    else:
        rows = parquet.rows_of_table(table, shard.first, job.fields.check)
    for chunk in chunks(rows, job.chunk):
        yield chunk, None if table is None else table.slice(chunk[0].line - shard.first, len(chunk))


def _rendered(rows: Sequence[Row], table: Any, results: list[dict[str, Any]], shard: Shard, job: Job) -> Any:
    """Results as they are written: bytes of JSON lines, or a table."""
    if job.several_files:
        file = {"file": shard.name}
        results = [file | result | file for result in results]
    if job.form == "jsonl":
        return "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results).encode("utf-8")
    given = parquet.table_of_rows(rows) if table is None else table
    return parquet.with_results(given, results, ("file", "line") if job.several_files else ("line",))
