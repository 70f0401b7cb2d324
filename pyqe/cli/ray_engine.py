"""Shards on Ray Data (``pip install pyqe[ray]``): a pool of actors, each of which loads the model once."""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import click

from pyqe.cli.corpus import Done, Job, score_shard
from pyqe.cli.errors import EXPECTED_ERRORS, one_line
from pyqe.cli.pipeline import Load
from pyqe.cli.shards import Shard

_BLOCKS = 100  # of shards for each worker: few enough to schedule, enough for all to end together


def score_on_ray(
    todo: Sequence[Shard], job: Job, load: Load, workers: int | None, gpus_per_worker: float | None
) -> Iterator[Done]:
    """Score shards on the cluster that RAY_ADDRESS names, or that runs here; else on one of this machine alone.

    Args:
        todo: the shards; what a worker that dies has begun is done again by another.
        job: what to do.
        load: makes a worker's task.
        workers: how many; default one for each GPU (or part of one), else one for each node.
        gpus_per_worker: default 1 if the cluster has any.

    Raises:
        ImportError: there is no Ray.
        ValueError: no worker fits the cluster as it is, and it is not said how many there should be.
        RuntimeError: what a worker has raised; Ray's own errors.
    """
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # the progress is ours to tell
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"--engine ray needs Ray Data (pip install 'pyqe[ray]'): {error}") from error
    if not todo:
        return
    was_running = ray.is_initialized()
    if not was_running:
        ray.init(logging_level=logging.ERROR)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = -1  # a block of shards may take hours
        pool = _pool(ray.nodes(), len(todo), workers, gpus_per_worker)
        blocks = min(len(todo), _BLOCKS * pool["compute"].max_size)
        shards = ray.data.from_items([asdict(shard) for shard in todo], override_num_blocks=blocks)
        how = {"batch_size": 1, "batch_format": "pyarrow", **pool}
        finished = shards.map_batches(_Worker, fn_constructor_args=(job, load), **how)
        for row in finished.iter_rows():
            if row["error"]:
                raise RuntimeError(row["error"]) from RuntimeError(row["trace"])
            yield Done(**json.loads(row["done"]))
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray: {error}") from error
    finally:
        if not was_running:
            ray.shutdown()


class _Worker:
    """Scores shards in an actor."""

    def __init__(self, job: Job, load: Load) -> None:
        self._job, self._load = job, cache(load)

    def __call__(self, shards: Any) -> Any:
        (row,) = shards.to_pylist()
        try:
            done = score_shard(Shard(**row), self._job, self._load())
        except EXPECTED_ERRORS as error:  # Ray would wrap it, and print a page
            return {"done": [""], "error": [one_line(error)], "trace": [traceback.format_exc()]}
        return {"done": [json.dumps(asdict(done))], "error": [""], "trace": [""]}


def _pool(
    nodes: Sequence[dict[str, Any]], shards: int, workers: int | None, gpus_per_worker: float | None
) -> dict[str, Any]:
    """How many actors, and what each takes."""
    from ray.data import ActorPoolStrategy

    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = [found["GPU"] for found in resources if found.get("GPU")]
    cpus = [found["CPU"] for found in resources if found.get("CPU")]
    share = float(bool(gpus)) if gpus_per_worker is None else gpus_per_worker
    room = sum(int(found // share) for found in gpus) if share else len(cpus)  # an actor lives on one node
    if room == 0:
        found = f"no node has {share:g} GPUs for a worker" if share else "no node has a CPU"
        if workers is None:
            raise ValueError(f"workers: {found}")
        click.echo(f"pyqe: {found}; waiting for one that has", err=True)  # where the cluster grows when asked to
    workers = min(shards, workers or room)
    if share:
        return {"compute": ActorPoolStrategy(size=workers), "num_gpus": share}
    return {"compute": ActorPoolStrategy(size=workers), "num_cpus": max(1, int(min([*cpus, sum(cpus) / workers])))}
