"""The queue of rows, and the thread that runs the model."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pyqe.server.errors import ApiError, ClosedError, QueueFullError, ServerError
from pyqe.server.limits import Limits
from pyqe.server.model import ServedModel
from pyqe.server.rows import Row, ScoreRow

logger = logging.getLogger("pyqe.server")


class Engine:
    """Batches of what is waiting, one after the other, on a thread of its own.

    A batch has what has waited longest and, of its kind, what is nearest to that in length, as much as there is room
    for: little padding, and nothing waits forever. Rows report as soon as they are done; the next batch starts when all
    are.

    Args:
        model: which nobody else may run.
        limits: of batches and queue.
        on_batch: called with the number of rows of each batch.
    """

    def __init__(self, model: ServedModel, limits: Limits, on_batch: Callable[[int], object]) -> None:
        self.model = model
        self.limits = limits
        self._on_batch = on_batch
        self._queue: deque[Row] = deque()
        self._running: Sequence[Row] = ()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pyqe-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return sum(not row.cancelled for row in self._queue)

    @property
    def is_ready(self) -> bool:
        """Whether it takes rows."""
        return self._thread.is_alive() and not self._closed

    def submit(self, rows: Sequence[Row]) -> None:
        """Put rows into the queue, all or none.

        Raises:
            ClosedError: there is no engine any more.
            QueueFullError: there is no room.
        """
        with self._changed:
            if not self.is_ready:
                raise ClosedError
            if len(self._queue) + len(rows) > self.limits.queue_size:
                self._queue = deque(row for row in self._queue if not row.cancelled)
            if len(self._queue) + len(rows) > self.limits.queue_size:
                raise QueueFullError
            self._queue += rows
            self._changed.notify()

    def close(self, seconds: float = 5.0) -> None:
        """Stop: rows that wait are refused, those that are written are cut short."""
        with self._changed:
            self._closed = True
            rows, self._queue = [*self._queue, *self._running], deque()
            self._changed.notify()
        _refuse(rows, ClosedError())  # before they are cancelled: those are done without a word
        for row in rows:
            row.cancelled = True
        self._thread.join(seconds)

    def _run(self) -> None:
        while batch := self._next_batch():
            self._on_batch(len(batch))
            try:
                self._work(batch)
            except Exception as error:  # whatever it is, the next batch may be well
                logger.error("a batch of %d failed", len(batch), exc_info=error)
                _refuse(batch, ServerError())

    def _work(self, batch: Sequence[Any]) -> None:
        if isinstance(batch[0], ScoreRow):
            self.model.run_scores(batch)
        else:
            self.model.write(batch)

    def _next_batch(self) -> Sequence[Row]:
        """Rows to run now, when there are some; none when the engine closes."""
        with self._changed:
            self._running = ()
            while not self._closed:
                self._running = self._take()
                if self._running:
                    break
                self._changed.wait()
            return self._running

    def _take(self) -> Sequence[Row]:
        """The oldest row and those of its kind that are nearest in length and fit; rows that nobody waits for go."""
        waiting = [row for row in self._queue if not row.cancelled]
        alike = (row for row in waiting if row.kind == waiting[0].kind)
        batch: list[Row] = []
        for row in sorted(alike, key=lambda row: abs(row.reads - waiting[0].reads)):
            padded = max(other.reads for other in [*batch, row]) + max(other.writes for other in [*batch, row])
            if len(batch) == self.limits.batch_size or padded * (len(batch) + 1) > self.limits.batch_tokens:
                break
            batch.append(row)
        self._queue = deque(row for row in waiting if row not in batch)
        return batch


def _refuse(rows: Sequence[Row], error: ApiError) -> None:
    for row in rows:
        if not row.done:
            row.report(error)
