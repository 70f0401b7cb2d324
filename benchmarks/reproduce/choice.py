"""SmolLM2-135M-Instruct on four multiple-choice sets: answer and format uncertainty, with and without demonstrations.

PYQE_DATA=/path/to/data python benchmarks/reproduce/choice.py [-o choice.json] [--folder build/choice] [--limit N]

What is asked (He et al. 2023, arXiv 2310.11732; Plaut et al. 2024, arXiv 2402.13213):

* Does the format mass, the probability that an answer comes at all, rise with demonstrations?
* Does the confidence tell right answers from wrong ones, and is it calibrated: that over the choices alone ("answer"),
  the letter's in the whole softmax ("letter"), the maximum softmax probability ("MSP"), and that of the greedy answer,
  which is wrong with confidence 0 where it names no choice ("greedy")?
* What is abstention worth?

Nothing is published about this model; the figures are what they are. One bar is held: the LM's head takes less than 5 %
of the time. Demonstrations are five questions of the same set, drawn with a seed, which are in no evaluation. Scored
rows are kept in the folder, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from data import MissingDataError, data_path

from pyqe._files import atomic_path
from pyqe.choice import Question, evaluate, read_questions

SETS = {
    "ARC-C": "arc_challenge_dev",
    "CSQA": "csqa_dev",
    "OBQA": "openbookqa_test",
    "MMLU": "mmlu_half",
}
N_SHOTS, SEED, CHUNK, BATCH = 5, 0, 128, 16
HEAD_BAR = 0.05
OF_SETS = ("n", "accuracy", "auroc", "ece", "aurc")  # figures of each set, beside those of all
PENALTIES = {1.0: "balanced", 2.0: "conservative"}


@dataclass(frozen=True)
class Setting:
    """How questions are put, and how many of each set at most."""

    name: str
    shots: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    permutations: Any = 1
    most: int | None = None

    @property
    def file_name(self) -> str:
        return f"{self.name.replace(' ', '-')}-{self.shots}"


SETTINGS = (
    Setting("text", 0, {"chat": False}),
    Setting("text", 5, {"chat": False}),
    Setting("chat", 0, {"chat": True}),
    Setting("chat", 5, {"chat": True}),
    Setting("parenthesis", 0, {"chat": False, "style": "parenthesis"}),
    Setting("parenthesis", 5, {"chat": False, "style": "parenthesis"}),
    # One pass for each choice: on a part of the questions
    Setting("full text", 0, {"chat": False, "method": "text"}, most=300),
    Setting("rotations", 5, {"chat": False}, "cyclic", most=300),
)


@dataclass
class Clock:
    """Seconds spent, in all and inside parts of it."""

    total: float = 0.0
    model: float = 0.0
    head: float = 0.0

    @contextmanager
    def part(self, owner: Any, method: str, name: str) -> Iterator[None]:
        """Adds the time of every call of a method."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = original(*args, **options)
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)
            return result

        setattr(owner, method, timed)
        try:
            yield
        finally:
            setattr(owner, method, original)


# --- running the model


def questions_of(name: str) -> tuple[list[Question], list[Question]]:
    """Demonstrations, and the questions to be answered, in an order that mixes the file."""
    questions = read_questions(data_path(f"mcq/{SETS[name]}.jsonl"))
    random.Random(SEED).shuffle(questions)
    return questions[:N_SHOTS], questions[N_SHOTS:]


def scored_rows(setting: Setting, name: str, folder: Path, limit: int | None, load: Callable[[], Any]) -> list[Any]:
    """A row of scores for each question, of which those that the folder has are not computed again."""
    from pyqe.choice import ChoiceScorer

    shots, questions = questions_of(name)
    shots, questions = shots[: setting.shots], questions[:limit][: setting.most]
    scorer = ChoiceScorer(*load(), **setting.options)
    header = {"prompt": scorer.form.prompt(questions[0], shots), "dtype": str(scorer.model.dtype)}
    path = folder / f"{SETS[name]}-{setting.file_name}.jsonl"
    rows = kept_rows(path, header)
    with path.open("a", encoding="utf-8") as stream:
        for start in range(len(rows), len(questions), CHUNK):
            chunk = questions[start : start + CHUNK]
            scored, clock = timed_score(scorer, chunk, shots, setting)
            share = {key: value / len(chunk) for key, value in vars(clock).items()}
            new = [{**result.scores(), "answer": result.question.answer, "seconds": share} for result in scored]
            stream.write("".join(json.dumps(row) + "\n" for row in new))
            stream.flush()
            rows += new
            print(
                f"\r{name}, {setting.name}, {setting.shots} shots: {len(rows)}/{len(questions)}",
                end="",
                file=sys.stderr,
            )
    print(file=sys.stderr)
    return rows[: len(questions)]


def kept_rows(path: Path, header: dict[str, Any]) -> list[Any]:
    """Rows that a file has, if they were made with the same prompts; otherwise it is begun anew."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    if not whole or whole[0] != header:
        whole = [header]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in whole), encoding="utf-8")
    return whole[1:]


def timed_score(
    scorer: Any, chunk: Sequence[Question], shots: Sequence[Question], setting: Setting
) -> tuple[Any, Clock]:
    from pyqe.lm_head import LMHead

    clock = Clock()
    started = time.perf_counter()
    with clock.part(type(scorer.model), "forward", "model"), clock.part(LMHead, "softmax_stats", "head"):
        scored = scorer.score(chunk, shots=shots, batch_size=BATCH, permutations=setting.permutations, seed=SEED)
    clock.total = time.perf_counter() - started
    return scored, clock


# --- figures


def series(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Confidences and correctness, by what the confidence is."""
    correct = np.array([row["correct"] for row in rows], dtype=float)
    found = {"answer": (np.array([row["confidence"] for row in rows]), correct)}
    if rows[0]["mean_logprobs"] is not None:
        means = [np.array(row["mean_logprobs"]) for row in rows]
        sure = np.array([1 / np.exp(mean - mean.max()).sum() for mean in means])
        right = np.array([mean.argmax() == row["answer"] for mean, row in zip(means, rows, strict=True)], dtype=float)
        return {**found, "answer a token": (sure, right)}
    letter = np.minimum([math.exp(row["logprobs"][row["prediction"]]) for row in rows], 1.0)
    found |= {"letter": (letter, correct), "MSP": (np.array([row["msp"] for row in rows]), correct)}
    greedy = np.array([row["greedy_correct"] for row in rows], dtype=float)
    return {**found, "greedy": (np.array([row["greedy_msp"] for row in rows]), greedy)}


def entropy(rows: Sequence[dict[str, Any]]) -> float:
    """Mean entropy over the choices, in nats."""
    found = [np.array(row["distribution"]) for row in rows]
    return float(np.mean([-(probs * np.log(np.maximum(probs, 1e-300))).sum() for probs in found]))


def figures(rows_of: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All figures of a setting; ``rows_of`` has the rows of each set."""
    failed = sum(row["status"] != "ok" for rows in rows_of.values() for row in rows)
    rows_of = {name: [row for row in rows if row["status"] == "ok"] for name, rows in rows_of.items()}
    rows = [row for part in rows_of.values() for row in part]
    groups = np.repeat(list(rows_of), [len(part) for part in rows_of.values()])
    of_sets = {name: means(part) for name, part in [*rows_of.items(), ("all", rows)]}
    evaluations = {}
    for kind, (sure, right) in series(rows).items():
        found = evaluate(sure, right, groups=groups, penalties=tuple(PENALTIES)).to_dict()
        kept = {name: {key: part[key] for key in OF_SETS} for name, part in found["groups"].items()}
        evaluations[kind] = {**found, "groups": kept}
    seconds = {key: sum(row["seconds"][key] for row in rows) for key in vars(Clock())}
    shares = {key: seconds[key] / seconds["total"] for key in ("model", "head")}
    return {"failed": failed, "means": of_sets, "evaluations": evaluations, "share_of_time": shares}


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    names = ("correct", "greedy_correct", "format_mass", "confidence", "msp", "agreement")
    known = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    return {
        **{name: float(np.mean(values)) if values else None for name, values in known.items()},
        "answer_entropy": entropy(rows),
    }


# --- output


def tables(results: Sequence[dict[str, Any]]) -> str:
    """What the JSON has, to read."""
    lines = ["Means", ""]
    head = ("prompt", "shots", "set", "n", "acc", "greedy", "format", "answer", "MSP", "entropy", "agree")
    body = []
    for result in results:
        counts = result["evaluations"]["answer"]
        for name, mean in result["means"].items():
            n = counts["n"] if name == "all" else counts["groups"][name]["n"]
            keys = ("correct", "greedy_correct", "format_mass", "confidence", "msp", "answer_entropy", "agreement")
            body.append((result["prompt"], result["shots"], name, n, *(shown(mean[key]) for key in keys)))
    lines += [
        aligned([head, *body]),
        "",
        "Confidence: does it rank (AUROC), is it calibrated (ECE, 10 bins of equal width)?",
    ]
    lines += ["Scores: 100 a right answer, all answered -> with abstention (20 questions a set for the threshold)", ""]
    head = ("prompt", "shots", "confidence", *(f"AUROC {name}" for name in SETS), "all", "95 %", "p", "ECE", "AURC")
    body = []
    for result in results:
        for kind, found in result["evaluations"].items():
            of_sets = [shown(found["groups"][name]["auroc"]["auroc"]) for name in SETS]
            test = found["auroc"]
            interval = f"{shown(test['low'])}-{shown(test['high'])}"
            p_value = "-" if test["p_value"] is None else f"{test['p_value']:.0e}"
            calibrated = (shown(found["ece"]), shown(found["aurc"]))
            scores = [f"{one['base_score']:.1f} -> {one['score']:.1f}" for one in found["abstention"]]
            first = (result["prompt"], result["shots"], kind, *of_sets, shown(test["auroc"]), interval, p_value)
            body.append((*first, *calibrated, *scores))
    lines += [aligned([(*head, *PENALTIES.values()), *body])]
    return "\n".join(lines)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell!s:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def answers(results: Sequence[dict[str, Any]]) -> list[str]:
    """The questions of the first paragraph, answered by the figures."""
    found = {(result["prompt"], result["shots"]): result["means"]["all"]["format_mass"] for result in results}
    lines = []
    for prompt in [prompt for prompt, shots in found if shots and (prompt, 0) in found]:
        none, some = found[prompt, 0], found[prompt, N_SHOTS]
        verdict = "rises" if some > none else "does not rise"
        lines.append(f"format mass, {prompt}: {verdict} with {N_SHOTS} demonstrations ({none:.3f} -> {some:.3f})")
    return lines


def short(value: Any) -> Any:
    """Numbers with six digits."""
    if isinstance(value, dict):
        return {key: short(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def draw(results: Sequence[dict[str, Any]], rows: dict[str, Any], folder: Path) -> None:
    """Figures, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no figures", file=sys.stderr)
        return
    from pyqe.metrics import reliability_curve, risk_coverage_curve

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for result in results:
        label = f"{result['prompt']}, {result['shots']} shots"
        masses = [result["means"][name]["format_mass"] for name in SETS]
        if masses[0] is not None:
            left.plot(list(SETS), masses, marker="o", label=label)
        kind = "answer" if result["prompt"] in ("full text", "rotations") else "MSP"  # MSP is of one order
        sure, correct = rows[label][kind]
        curve = reliability_curve(correct, sure)
        middle.plot(curve.confidence, curve.accuracy, marker="o", label=f"{label} ({kind})")
        risk = risk_coverage_curve(correct, sure)
        enough = risk.coverage >= 0.02  # of fewer answers, chance decides
        right.plot(risk.coverage[enough], 1 - risk.risk[enough], label=f"{label} ({kind})")
    middle.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for axes, title, x, y in (
        (left, "Format mass", "", "mean"),
        (middle, "Reliability, all sets", "confidence", "accuracy"),
        (right, "Abstention, all sets", "coverage", "accuracy of the answers"),
    ):
        axes.set(title=title, xlabel=x, ylabel=y, ylim=(0, 1.02))
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.savefig(folder / "choice.png", dpi=120)
    print(f"figures: {folder / 'choice.png'}")


# --- the command


def reproduce(folder: Path, limit: int | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Figures of every setting, and the confidences that they are of."""
    loaded: list[Any] = []

    def load() -> Any:
        if not loaded:
            from pyqe.cli.options import load_model

            loaded.extend(load_model("smollm2", "bfloat16", "cpu"))
        return loaded

    folder.mkdir(parents=True, exist_ok=True)
    results, confidences = [], {}
    for setting in SETTINGS:
        rows_of = {name: scored_rows(setting, name, folder, limit, load) for name in SETS}
        results.append({"prompt": setting.name, "shots": setting.shots, **figures(rows_of)})
        good = [row for rows in rows_of.values() for row in rows if row["status"] == "ok"]
        confidences[f"{setting.name}, {setting.shots} shots"] = series(good)
    return results, confidences


def main() -> int:
    """Exit code: 1 if the head takes too long, 2 if data or model are missing."""
    parser = argparse.ArgumentParser(description="SmolLM2 on four multiple-choice sets.")
    parser.add_argument("-o", "--output", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--folder", type=Path, default=Path("build/choice"), help="scored rows and drawn figures")
    parser.add_argument("--limit", type=int, help="questions of each set, for a quick pass")
    options = parser.parse_args()
    try:
        results, confidences = reproduce(options.folder, options.limit)
    except (MissingDataError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    shares = {key: [result["share_of_time"][key] for result in results] for key in ("model", "head")}
    ranges = (f"{key} {min(found):.1%} to {max(found):.1%}" for key, found in shares.items())
    verdicts = [*answers(results), f"share of the time: {', '.join(ranges)} (bar for the head {HEAD_BAR:.0%})"]
    print(tables(results), "", *verdicts, sep="\n")
    draw(results, confidences, options.folder)
    if options.output is not None:
        setting = {"model": "SmolLM2-135M-Instruct, bfloat16", "shots": N_SHOTS, "seed": SEED, "limit": options.limit}
        report = {"title": __doc__.splitlines()[0], "setting": setting, "verdicts": verdicts, "results": short(results)}
        with atomic_path(options.output) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(max(shares["head"]) >= HEAD_BAR)


if __name__ == "__main__":
    sys.exit(main())
