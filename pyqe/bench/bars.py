"""A report as a page of Markdown; of a GPU's report also what the kernels are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyqe.bench.table import case_lines, machine_lines

Report = Mapping[str, Any]
Row = dict[str, Any]
_MODELS = {"logits": "Qwen3-0.6B", "overhead": "128x64"}  # of a suite; of all others Llama-3-8B

Figure = Callable[[Row, Callable[[str], Row]], float]  # of pyqe's row, and of others' by name


@dataclass(frozen=True)
class Bar:
    """A case, a figure of it, and the limit that it is held to.

    Args:
        suite, name, n, dtype: of the case, whose model is that of :data:`_MODELS`.
        what: the figure in words.
        figure: the figure; KeyError where a rival that it needs has none.
        limit: the bar.
        at_most: whether the figure must not exceed the limit; else it must reach it.
        form: how the figure is written.
    """

    suite: str
    name: str
    n: int
    what: str
    figure: Figure
    limit: float
    at_most: bool = False
    form: str = "{:.0%}"
    dtype: str = "bf16"

    def judge(self, report: Report) -> tuple[str, str, str, str]:
        """Case, figure in words, figure and verdict."""
        case = f"{self.suite}, {self.name}, N {self.n}, {self.dtype}"
        bar = f"{self.what} {'<=' if self.at_most else '>='} {self.form.format(self.limit)}"
        try:
            figure = self._measured(report)
        except KeyError as error:
            return case, bar, "", f"not measured: {error.args[0]}"
        met = figure <= self.limit if self.at_most else figure >= self.limit
        return case, bar, self.form.format(figure), "met" if met else "**not met**"

    def _measured(self, report: Report) -> float:
        wanted = {"suite": self.suite, "name": self.name, "n": self.n, "dtype": self.dtype}
        wanted["model"] = _MODELS.get(self.suite, "Llama-3-8B")
        for case in report["cases"]:
            if all(case.get(name) == value for name, value in wanted.items()):
                rows = {row["rival"]: row for row in case["rivals"]}
                return self.figure(_there(rows, "pyqe"), lambda name, rows=rows: _there(rows, name))  # type: ignore[misc]
        raise KeyError("no such case")


def _there(rows: Mapping[str, Row], name: str) -> Row:
    if name not in rows:
        raise KeyError(f"no {name}")
    if rows[name]["missing"]:
        raise KeyError(f"{name}: {rows[name]['missing']}")
    return rows[name]


def _own(field: str) -> Figure:
    return lambda ours, others: ours[field]


def _over(rival: str) -> Figure:
    return lambda ours, others: ours["median"] / others(rival)["median"]


def _under(rival: str) -> Figure:
    return lambda ours, others: others(rival)["median"] / ours["median"]


def _memory_over(rival: str) -> Figure:
    return lambda ours, others: ours["extra_bytes"] / max(others(rival)["extra_bytes"], 1)


def _beyond(rival: str) -> Figure:
    return lambda ours, others: 1e6 * (ours["median"] - others(rival)["median"])


def _bars() -> Iterator[Bar]:
    matmul, times = "time over the bare matmul's", "{:.2f}x"
    yield Bar("head", "softmax stats", 4096, matmul, _over("bare matmul"), 1.25, True, times)
    yield Bar("head", "sigmoid stats", 4096, matmul, _over("bare matmul"), 1.2, True, times)
    bce = ("loss", "vocabulary BCE", 4096)
    yield Bar(*bce, "GFLOP/s of 6 N V D", _own("gflop_s"), 500e3, form="{:,.0f}")
    for rival in ("Liger", "CCE"):
        yield Bar(*bce, f"times as fast as {rival}'s cross-entropy", _under(rival), 1.0, form=times)
    yield Bar(*bce, "memory beyond gradients, of the logits", _own("of_logits"), 0.02, True, "{:.1%}")
    for suite, name, speed in (("sampling", "negatives", 10.0), ("loss", "training step", 5.0)):
        yield Bar(suite, name, 4096, "times as fast as the authors'", _under("authors"), speed, form="{:.1f}x")
        yield Bar(suite, name, 4096, "memory, of the authors'", _memory_over("authors"), 0.02, True, "{:.1%}")
    for name in ("token logits", "token gradients"):
        yield Bar("head", name, 4096, "of the copy bandwidth", _own("of_copy"), 0.7)
    for n in (1, 8, 64):
        yield Bar("head", "both heads", n, "of the copy bandwidth", _own("of_copy"), 0.85)
    for dtype in ("bf16", "fp32"):
        for name in ("plain", "entropy", "padded rows", "top-k", "dominant", "sigmoid"):
            yield Bar("logits", name, 512, "of the copy bandwidth", _own("of_copy"), 0.85, dtype=dtype)
    for name in ("softmax stats", "sigmoid stats", "row stats", "token logits", "vocabulary BCE"):
        microseconds = "{:.1f} us"
        yield Bar("overhead", name, 4, "host time", lambda ours, _: 1e6 * ours["median"], 20.0, True, microseconds)
        graph = "host time beyond a graph of one torch call"
        yield Bar("overhead", f"{name}, graph", 4, graph, _beyond("torch linear"), 1.0, True, microseconds)


BARS = tuple(_bars())


def markdown(report: Report) -> str:
    """The machine, the bars of a GPU, then every case."""
    lines = ["# pyqe beside its rivals", "", *(f"    {line}" for line in machine_lines(dict(report))), ""]
    complete = "" if report["complete"] else "; **not all cases have run**"
    lines.append(f"{report['date']}, {report['repeats']} rounds{complete}")
    if report["device"] == "cuda":
        lines += ["", "| case | bar | measured | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(bar.judge(report))} |" for bar in BARS]
    for case in report["cases"]:
        lines += ["", *(f"    {line}" for line in case_lines(case))]
    return "\n".join(lines) + "\n"
