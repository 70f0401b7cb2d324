"""pyqe calibrate"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import IO, TYPE_CHECKING, Any, Literal

import click

from pyqe.cli.answers import AnswerOptions, Answers, Found, answer_options, each_answer, read_answers
from pyqe.cli.options import config_option
from pyqe.cli.rows import chunks
from pyqe.cli.tables import text_table

if TYPE_CHECKING:
    from pyqe.calibration import Calibrator
    from pyqe.readers import Answer
    from pyqe.report import ReportTable

METHODS = ("temperature", "platt", "isotonic", "histogram", "kde", "vector")
_OF_DISTRIBUTIONS = ("temperature", "vector")
_CHUNK = 4096  # rows that are calibrated together
_FITTED_HERE = (
    "After calibration: on the very rows that the calibrator was fitted to, which flatters it; pyqe calibrate apply "
    "--report tells how it does on others."
)


@dataclass(frozen=True)
class CalibrateOptions(AnswerOptions):
    """Where confidences or whole distributions come from."""

    probs: str | None
    labels: str
    inputs: Literal["probs", "logits"] | None

    @property
    def whole(self) -> bool:
        """Whether whole distributions are calibrated, not single confidences."""
        return self.probs is not None or self.inputs == "logits"

    def read(self, record: dict[str, Any], judged: bool) -> Answer:
        from pyqe import readers

        if self.probs is None:
            answer = super().read(record, judged)
            if self.whole and judged and answer.label is None:
                raise ValueError("target: expected a choice's number")
            return answer
        label = self.labels if judged else None
        return readers.from_distribution(record, scores=self.probs, label=label, inputs=self.inputs or "probs")


def _options(inputs: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return answer_options(
        "options",
        CalibrateOptions,
        click.option("--probs", metavar="FIELD", help="List of the classes' probabilities or logits, one for each."),
        click.option(
            "--labels",
            metavar="FIELD",
            default="label",
            show_default=True,
            help="With --probs: the right class's number, from 0.",
        ),
        click.option(
            "--inputs",
            type=click.Choice(["probs", "logits"]),
            hidden=not inputs,
            help="What a temperature or vector is fitted to: probabilities, or logits (with --probs, or the "
            "log-likelihoods of --from lm-eval).",
        ),
    )


_report_option = click.option("--report", metavar="FILE", help="Write figures and charts, before and after, as a page.")
_bins_option = click.option("--bins", type=click.IntRange(1), default=10, show_default=True, help="Bins of confidence.")


@click.group("calibrate")
def command() -> None:
    """Learn to make confidences mean what they say, and apply it.

    \b
    pyqe calibrate fit dev.jsonl --method platt -o calibrator
    pyqe calibrate fit dev.jsonl --method temperature --inputs probs --probs stated --labels gold -o calibrator
    pyqe calibrate apply test.jsonl -m calibrator -o calibrated.jsonl --report report.html
    """


@command.command("fit")
@_options(inputs=True)
@click.option("--method", type=click.Choice(METHODS), required=True, help="temperature and vector take --probs, too.")
@click.option("--per-group", is_flag=True, help="A temperature of its own for each --group.")
@click.option("--eps", type=click.FloatRange(0, 0.5, max_open=True), help="Floor for probabilities of 0.")
@_bins_option
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Where the calibrator goes.")
@_report_option
@config_option
def fit(
    options: CalibrateOptions,
    method: str,
    per_group: bool,
    eps: float | None,
    bins: int,
    output: str,
    report: str | None,
) -> None:
    """Fit a calibrator to the judged answers in INPUT (default stdin).

    Rows are those of pyqe eval: a confidence and whether the answer is right. temperature and vector also take whole
    distributions: --probs and --labels, or the log-likelihoods of lm-evaluation-harness. What is learned and the
    figures before and after, on these same rows, are printed.

    \b
    pyqe calibrate fit dev.jsonl --method isotonic -o calibrator
    pyqe calibrate fit samples_mmlu.jsonl --from lm-eval --method temperature --inputs logits -o calibrator
    """
    _check_usage(options, method, per_group, eps)
    found = read_answers(options, check=_SameClasses() if options.whole else None)
    calibrator = _calibrator(method, options, eps, bins)
    groups = {"groups": found.groups} if per_group else {}
    with _spoken_warnings():
        if options.whole:
            calibrator.fit(_scores(found.answers), [answer.label for answer in found.answers], **groups)
        else:
            calibrator.fit(found.confidence, found.correct, **groups)
    calibrator.save_pretrained(output)
    after = _Calibrated()
    after.add(calibrator, options, found.answers, found.groups if per_group else None)
    learned, tables = _learned(calibrator)
    click.echo(_text(found, after, learned, tables, bins))
    if report is not None:
        _write_report(report, options, found, after, learned, tables, bins, note=_FITTED_HERE)
    found.finish()


@command.command("apply")
@_options(inputs=False)
@click.option("-m", "--calibrator", "folder", required=True, metavar="FOLDER", help="What calibrate fit wrote.")
@click.option("-o", "--output", default="-", show_default=True, metavar="FILE", help="'-' is stdout.")
@_bins_option
@_report_option
@config_option
def apply(options: CalibrateOptions, folder: str, output: str, bins: int, report: str | None) -> None:
    """Calibrate the confidences in INPUT (default stdin).

    Each row gives one row, in order, with the input's line number as "line" and its fields: "calibrated" is the
    confidence after calibration, of whole distributions "calibrated_probs" has the distribution. A bad row has status
    "failed", with the reason. Answers need not be judged, unless there is to be a report.

    \b
    pyqe calibrate apply test.jsonl -m calibrator -o calibrated.jsonl
    pyqe eval calibrated.jsonl --confidence calibrated
    """
    from pyqe import calibration

    if options.inputs is not None:
        raise click.UsageError("--inputs: the calibrator knows.", click.get_current_context())
    calibrator = calibration.load(folder)
    options = _as_fitted(options, calibrator)
    found, after = Answers(), _Calibrated()

    def calibrated() -> Iterator[dict[str, Any]]:
        each = found.counting(each_answer(options, report is not None, _known(calibrator, options)))
        for chunk in chunks(each, _CHUNK):
            good = [one for one in chunk if one.answer is not None]
            groups = [one.group for one in good] if _has_groups(calibrator) else None
            results = iter(after.add(calibrator, options, [one.answer for one in good if one.answer], groups))
            for one in chunk:
                result = {"calibrated": None} if one.answer is None else next(results)
                line = {"line": one.row.line}
                yield line | one.row.fields | result | line | {"status": one.row.status, "reason": one.row.reason}

    _write_rows(calibrated(), output)
    if report is not None:
        _write_report(report, options, found, after, *_learned(calibrator), bins)
    found.finish()


# --- what is asked for


def _check_usage(options: CalibrateOptions, method: str, per_group: bool, eps: float | None) -> None:
    """Refuse options that do not go together.

    Raises:
        click.UsageError: they do not.
    """
    if method in _OF_DISTRIBUTIONS:
        if options.inputs is None:
            problem = f"--method {method} needs --inputs probs or --inputs logits: which of them its input is."
        elif options.inputs == "logits" and options.probs is None and options.input_form != "lm-eval":
            problem = "--inputs logits needs --probs FIELD, or --from lm-eval: a confidence is a probability."
        elif method == "vector" and not options.whole:
            problem = "--method vector needs whole distributions: --probs FIELD, or --inputs logits --from lm-eval."
        else:
            problem = ""
    else:
        needless = [f"--{name}" for name in ("probs", "inputs") if getattr(options, name) is not None]
        problem = f"--method {method} is for single confidences, without {needless[0]}." if needless else ""
    if per_group and (method != "temperature" or options.group is None):
        problem = problem or "--per-group is for --method temperature with --group FIELD."
    if eps is not None and method not in ("temperature", "vector", "platt"):
        problem = problem or f"--method {method} has no --eps."
    if problem:
        raise click.UsageError(problem, click.get_current_context())


def _calibrator(method: str, options: CalibrateOptions, eps: float | None, bins: int) -> Any:
    from pyqe import calibration

    floor = {} if eps is None else {"eps": eps}
    if method == "platt":
        return calibration.PlattScaling(**floor)
    if method == "isotonic":
        return calibration.IsotonicCalibration()
    if method == "histogram":
        return calibration.HistogramBinning(n_bins=bins)
    if method == "kde":
        return calibration.KernelDensityCalibration()
    kind: Any = calibration.VectorScaling if method == "vector" else calibration.TemperatureScaling
    return kind(inputs=options.inputs, **floor)


def _as_fitted(options: CalibrateOptions, calibrator: Calibrator) -> CalibrateOptions:
    """The options with the calibrator's kind of input.

    Raises:
        click.UsageError: the options cannot give it that.
    """
    inputs = getattr(calibrator, "inputs", None)
    name, problem = type(calibrator).__name__, ""
    if options.probs is not None and inputs is None:
        problem = f"--probs: this {name} is for single confidences."
    elif options.probs is None and inputs == "logits" and options.input_form != "lm-eval":
        problem = f"this {name} is for logits: --probs FIELD, or --from lm-eval."
    elif options.probs is None and name == "VectorScaling" and inputs == "probs":
        problem = f"this {name} is for whole distributions: --probs FIELD."
    elif _has_groups(calibrator) and options.group is None:
        problem = f"this {name} has a temperature for each group: --group FIELD."
    if problem:
        raise click.UsageError(problem, click.get_current_context())
    return replace(options, inputs=inputs)


def _has_groups(calibrator: Calibrator) -> bool:
    return isinstance(getattr(calibrator, "temperature_", None), dict)


class _SameClasses:
    """Refuses distributions over another number of classes than the first."""

    def __init__(self, classes: int | None = None) -> None:
        self._classes = classes

    def __call__(self, found: Found) -> None:
        scores = found.answer.scores if found.answer is not None else None
        if scores is None:
            raise ValueError("expected a distribution over classes, got a single confidence")
        if self._classes is None:
            self._classes = len(scores)
        if len(scores) != self._classes:
            raise ValueError(f"expected {self._classes} classes, as before, got {len(scores)}")


def _known(calibrator: Any, options: CalibrateOptions) -> Callable[[Found], None]:
    """Refuses rows that the calibrator knows nothing of."""
    classes = _SameClasses(getattr(calibrator, "n_features_in_", None))
    groups = calibrator.temperature_ if _has_groups(calibrator) else None

    def check(found: Found) -> None:
        if options.whole:
            classes(found)
        if groups is not None and found.group not in groups:
            raise ValueError(
                f"{options.group}: expected a group that the calibrator was fitted to, got {found.group!r}"
            )

    return check


# --- what comes out


class _Calibrated:
    """Confidences before and after, of the rows that had one, and correctness after, which a vector can change."""

    def __init__(self) -> None:
        self.confidence: list[float] = []
        self.correct: list[float] = []

    def add(
        self, calibrator: Any, options: CalibrateOptions, answers: Sequence[Answer], groups: Sequence[Any] | None
    ) -> list[dict[str, Any]]:
        """Calibrate answers; the new fields of each."""
        if not answers:
            return []
        settings = {} if groups is None else {"groups": groups}
        if not options.whole:
            numbers = calibrator.transform([answer.confidence for answer in answers], **settings).tolist()
            self.confidence += numbers
            self.correct += [answer.correct for answer in answers if answer.correct is not None]
            return [{"calibrated": number} for number in numbers]
        probs = calibrator.transform(_scores(answers), **settings)
        largest = probs.max(axis=1).tolist()
        self.confidence += largest
        for answer, best in zip(answers, probs.argmax(axis=1).tolist(), strict=True):
            if answer.label is not None:
                self.correct.append(float(best == answer.label))
        return [
            {"calibrated": number, "calibrated_probs": row} for number, row in zip(largest, probs.tolist(), strict=True)
        ]


def _scores(answers: Iterable[Answer]) -> Any:
    """float64 [N, K]."""
    import numpy as np

    return np.array([answer.scores for answer in answers], dtype=np.float64)


def _learned(calibrator: Any) -> tuple[dict[str, str], list[ReportTable]]:
    """What a calibrator has learned: names and values, and a table of the groups if it has some."""
    from pyqe.report import ReportTable

    learned = {"Calibrator": type(calibrator).__name__}
    tables = []
    if _has_groups(calibrator):
        temperatures = calibrator.temperature_
        learned["Temperature"] = f"{min(temperatures.values()):.3f} to {max(temperatures.values()):.3f} (1 before)"
        rows = [
            [group, f"{value:.3f}", f"{calibrator.nll_before_[group]:.3f}", f"{calibrator.nll_[group]:.3f}"]
            for group, value in temperatures.items()
        ]
        tables.append(ReportTable("Temperatures", ["group", "temperature", "NLL before", "NLL after"], rows))
    elif hasattr(calibrator, "temperature_"):
        learned["Temperature"] = f"{calibrator.temperature_:.3f} (1 before)"
    if hasattr(calibrator, "nll_") and not tables:
        learned["NLL where fitted"] = f"{calibrator.nll_:.3f} nats ({calibrator.nll_before_:.3f} before)"
    if hasattr(calibrator, "slope_"):
        learned |= {"Slope": f"{calibrator.slope_:.3f}", "Intercept": f"{calibrator.intercept_:.3f}"}
    floor = getattr(calibrator, "eps_", getattr(calibrator, "eps", 0.0))  # the one used; 0 of logits
    if floor:
        learned["Floor of probabilities"] = f"{floor:g}"
    return learned, tables


def _text(found: Answers, after: _Calibrated, learned: dict[str, str], tables: Sequence[ReportTable], bins: int) -> str:
    from pyqe.choice.study import evaluate
    from pyqe.report.figures import figure_rows

    columns = [
        figure_rows(evaluate(confidence, correct, n_bins=bins), sum(confidence) / len(confidence), bins)
        for confidence, correct in ((found.confidence, found.correct), (after.confidence, after.correct))
    ]
    figures = [[name, value, then] for (name, value), (_, then) in zip(*columns, strict=True)]
    groups = [[list(table.columns), *([str(cell) for cell in row] for row in table.rows)] for table in tables]
    parts: list[list[list[str]]] = [[list(item) for item in learned.items()], *groups]
    return "\n\n".join(map(text_table, [*parts, [["on these same rows", "before", "after"], *figures]]))


def _write_report(
    path: str,
    options: CalibrateOptions,
    found: Answers,
    after: _Calibrated,
    learned: dict[str, str],
    tables: Sequence[ReportTable],
    bins: int,
    note: str = "",
) -> None:
    from pyqe.report import write_calibration_report

    write_calibration_report(
        path,
        found.confidence,
        found.correct,
        groups=found.groups if options.group is not None else None,
        calibrated=after.confidence,
        calibrated_correct=after.correct,
        n_bins=bins,
        title=f"Calibration of {options.name}",
        summary={**learned, "Input": options.name, "Rows": f"{found.rows:,}, {found.failed:,} failed"},
        tables=tables,
        note=note,
    )


def _write_rows(rows: Iterable[dict[str, Any]], output: str) -> None:
    """JSON lines to stdout, or to a file that is there when it is whole."""
    from pyqe._files import atomic_path

    def write(stream: IO[bytes]) -> None:
        for row in rows:
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))

    if output == "-":
        write(sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    with atomic_path(output) as path, path.open("wb") as stream:
        write(stream)


@contextmanager
def _spoken_warnings() -> Iterator[None]:
    """Warnings as lines on stderr, the same one once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message, _ in groupby(str(warning.message) for warning in caught):
        click.echo(f"pyqe: {message}", err=True)
