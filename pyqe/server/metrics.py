"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_QUALITIES = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("pyqe_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "pyqe_request_seconds",
            "From a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_rows = Histogram("pyqe_batch_rows", "Rows of a batch.", buckets=_ROWS, registry=registry)
        self.tokens = Counter("pyqe_tokens", "Tokens read (prompt), written and scored.", ["kind"], registry=registry)
        self.quality = Histogram(
            "pyqe_sequence_quality", "Quality of answers and texts.", buckets=_QUALITIES, registry=registry
        )
        self._waiting = Gauge("pyqe_waiting_rows", "Rows that wait for the model.", registry=registry)

    def watch_queue(self, waiting: Callable[[], float]) -> None:
        """Ask for the length of the queue whenever somebody looks."""
        self._waiting.set_function(waiting)

    def add(self, quality: float | None, **tokens: int) -> None:
        """Count an answer or text: its quality, and tokens by kind."""
        if quality is not None:
            self.quality.observe(quality)
        for kind, count in tokens.items():
            self.tokens.labels(kind).inc(count)

    def text(self) -> bytes:
        """All of them in Prometheus's format."""
        return generate_latest(self._registry)
