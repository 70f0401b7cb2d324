"""pyqe eval"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from pyqe.cli.answers import AnswerOptions, Answers, answer_options, read_answers
from pyqe.cli.options import config_option
from pyqe.cli.tables import text_table

if TYPE_CHECKING:
    from pyqe.choice.study import Evaluation


@click.command("eval")
@answer_options("options", AnswerOptions)
@click.option("--bins", type=click.IntRange(1), default=10, show_default=True, help="Bins of confidence.")
@click.option(
    "--penalty",
    "penalties",
    type=click.FloatRange(0),
    multiple=True,
    default=(1, 2),
    show_default=True,
    help="Cost of a wrong answer, for abstention; may be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all figures of each group.")
@click.option("--report", metavar="FILE", help="Write the figures with charts as an HTML page, too.")
@config_option
def command(options: AnswerOptions, bins: int, penalties: tuple[float, ...], as_json: bool, report: str | None) -> None:
    """Tell how good the confidences in INPUT are (default stdin): calibration, ranking, abstention.

    A JSON line needs a confidence and whether the answer is right: fields of your own, also inside others ("a.b"), what
    pyqe choice writes, samples of lm-evaluation-harness (--log_samples), where the confidence is the share of the best
    choice in the softmax of the log-likelihoods, or responses of OpenAI's API or vLLM with logprobs, where it is the
    probability of the answer's token. A file .json may also be a list of such objects.

    \b
    pyqe eval scored.jsonl --group subject --report report.html
    pyqe eval answers.jsonl --confidence stated.p --correct judge.score
    pyqe eval samples_mmlu_2026-01-01.jsonl
    """
    from pyqe.choice.study import evaluate

    found = read_answers(options)
    groups = found.groups if options.group is not None else None
    settings: dict[str, Any] = {"groups": groups, "n_bins": bins, "penalties": penalties}
    evaluation = evaluate(found.confidence, found.correct, **settings)
    if as_json:
        click.echo(json.dumps(_document(found, evaluation), ensure_ascii=False))
    else:
        click.echo(_text(found, evaluation, bins))
    if report is not None:
        from pyqe.report import write_calibration_report

        summary = {"Input": options.name, "Rows": f"{found.rows:,}, {found.failed:,} failed"}
        title = f"Calibration of {options.name}"
        write_calibration_report(report, found.confidence, found.correct, title=title, summary=summary, **settings)
    found.finish()


def _document(found: Answers, evaluation: Evaluation) -> dict[str, Any]:
    document: dict[str, Any] = {"rows": found.rows, "failed": found.failed, "confidence": _mean(found.confidence)}
    mass = _choice_mass(found)
    if mass is not None:
        document["choice_mass"] = mass
    document |= evaluation.to_dict()
    for name, confidences in _by_group(found).items():
        document["groups"][name]["confidence"] = _mean(confidences)
    return document


def _text(found: Answers, evaluation: Evaluation, bins: int) -> str:
    from pyqe.report import figures

    rows = [list(row) for row in figures.figure_rows(evaluation, _mean(found.confidence), bins)]
    mass = _choice_mass(found)
    if mass is not None:
        rows.append(["Mean probability of all choices, at least", figures.shown(mass)])
    tables = [rows]
    if evaluation.abstention:
        tables.append([["abstention: wrong costs", *figures.ABSTENTION_COLUMNS[1:]]])
        tables[-1] += figures.abstention_rows(evaluation)
    if evaluation.groups:
        tables.append([["group", *figures.GROUP_COLUMNS]])
        for name, confidences in _by_group(found).items():
            tables[-1].append([name, *figures.group_row(evaluation.groups[name], _mean(confidences))])
    return "\n\n".join(map(text_table, tables))


def _by_group(found: Answers) -> dict[str, list[float]]:
    """The confidences of each group, in the order of their names."""
    groups: dict[str, list[float]] = {name: [] for name in sorted(set(found.groups))}
    for answer, name in zip(found.answers, found.groups, strict=False):
        groups[name].append(answer.confidence)
    return groups


def _choice_mass(found: Answers) -> float | None:
    """Mean of what all choices have together, where the rows show it."""
    masses = [answer.mass for answer in found.answers if answer.mass is not None]
    return _mean(masses) if masses else None


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
