"""Shards on Ray Data (``pip install pyqe[ray]``): a pool of actors, each of which loads the model once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pyqe.cli.corpus import Done, Job, score_shard
from pyqe.cli.pipeline import Load
from pyqe.cli.shards import Shard

_BLOCKS = 100  # of shards for each worker: few enough to schedule, enough for all to end together
_RETRIES = 3  # of a block whose worker has died: rows that kill every worker must not do so for ever


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
        RuntimeError: workers died again and again.
    """
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
        ray.data.DataContext.get_current().enable_progress_bars = False
        pool = _pool(ray.nodes(), len(todo), workers, gpus_per_worker)
        blocks = min(len(todo), _BLOCKS * pool["concurrency"])
        shards = ray.data.from_items([asdict(shard) for shard in todo], override_num_blocks=blocks)
        how = {"batch_size": 1, "batch_format": "pyarrow", "max_task_retries": _RETRIES, **pool}
        finished = shards.map_batches(_Worker, fn_constructor_args=(job, load), **how)
        for row in finished.iter_rows():
            yield Done(**row)
    finally:
        if not was_running:
            ray.shutdown()


class _Worker:
    """Scores shards in an actor."""

    def __init__(self, job: Job, load: Load) -> None:
        self._job, self._task = job, load()

    def __call__(self, shards: Any) -> Any:
        done = [asdict(score_shard(Shard(**row), self._job, self._task)) for row in shards.to_pylist()]
        return {name: [row[name] for row in done] for name in done[0]}


def _pool(
    nodes: Sequence[dict[str, Any]], shards: int, workers: int | None, gpus_per_worker: float | None
) -> dict[str, Any]:
    """How many actors, and what each takes."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(found.get("GPU", 0) for found in resources)
    cpus = [found["CPU"] for found in resources if found.get("CPU")]
    share = float(gpus > 0) if gpus_per_worker is None else gpus_per_worker
    workers = min(shards, workers or (int(gpus // share) if share else len(cpus)))
    if share:
        return {"concurrency": workers, "num_gpus": share}
    return {"concurrency": workers, "num_cpus": max(1, int(min(*cpus, sum(cpus) / workers)))}
