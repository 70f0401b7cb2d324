"""Scores as a step of a Ray Dataset (``pip install pyqe[ray]``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyqe.cli import parquet
from pyqe.cli.pipeline import answer
from pyqe.cli.rows import check_text
from pyqe.cli.score import score_task

if TYPE_CHECKING:
    import pyarrow as pa

    from pyqe.estimator import QualityEstimator


class RayScorer:
    """Adds scores to the rows of a Ray Dataset, for ``Dataset.map_batches``.

    Rows need a column "text" and may have "prompt", a text or a list of chat messages. Added, or replaced, are
    "quality", "status" ("ok", "partial", "empty", "failed"), "reason" (why it is not "ok"), "finish_reason",
    "token_ids", "tokens", "offsets" and "token_quality", "token_prob", "token_max_prob", "token_entropy",
    "token_boosted_prob", as in :class:`pyqe.ScoredText`; null where there is none. A row that cannot be scored stays,
    with status "failed".

    Args:
        load: makes the estimator; called once in each worker.
        **options: of :meth:`pyqe.QualityEstimator.score`: signals, batch_size, max_length, overlap.

    Example:
        >>> ds.map_batches(  # doctest: +SKIP
        ...     pyqe.RayScorer, fn_constructor_args=[load], batch_format="pyarrow", batch_size=128,
        ...     compute=ray.data.ActorPoolStrategy(size=4), num_gpus=1,
        ... )
    """

    def __init__(self, load: Callable[[], QualityEstimator], **options: Any) -> None:
        self._task = score_task(load(), options, strict=False)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The rows [N] with their scores.

        Raises:
            TypeError: the batch is no pyarrow table.
            ValueError: there is no column "text".
        """
        if not hasattr(batch, "to_pylist"):
            raise TypeError(f'batch_format: expected "pyarrow", got batches of type {type(batch).__name__}')
        rows = list(parquet.rows_of_table(batch, 1, check_text))
        results, _ = answer(rows, self._task, (), lambda units: None, lambda line, reason: None)
        return parquet.with_results(batch, results)
