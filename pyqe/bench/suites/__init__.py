"""The suites by name; each gives its cases, unbuilt, for the settings."""

from __future__ import annotations

from collections.abc import Callable

from pyqe.bench.case import Case, Settings
from pyqe.bench.suites import generate, head, logits, loss, overhead, sampling, temperature

SUITES: dict[str, Callable[[Settings], list[Callable[[], Case]]]] = {
    "head": head.cases,
    "sampling": sampling.cases,
    "loss": loss.cases,
    "logits": logits.cases,
    "temperature": temperature.cases,
    "generate": generate.cases,
    "overhead": overhead.cases,
    "crossover": head.crossover,
}
