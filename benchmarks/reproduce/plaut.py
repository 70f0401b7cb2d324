"""Every figure of the main table of Plaut, Nguyen and Trinh 2024 (arXiv 2402.13213), and its correlations.

PYQE_DATA=/path/to/data python benchmarks/reproduce/plaut.py [-o plaut.json]

What the paper does not say, and the figures depend on:

* Accuracy and AUROC of a model are means over its ten series (five datasets, two prompts); its calibration error is
  that of all its answers pooled, the one in the correlation the mean over the series, with bins of equal width.
* Answers with a confidence of exactly 1 are in no bin, as the last bin is open. pyqe counts them: see the last lines.
* Questions for choosing the threshold: of each dataset, the answers to both prompts are put in the order of the
  authors' files (500 questions each, sorted by name: first prompt of 0 to 500, second prompt of 0 to 500, first prompt
  of 1000 to 1500, and so on, as text is sorted), then shuffled by Python's ``random`` with seed 2549900867. The first
  20 are for training, all others are scored; a model has one threshold, and each dataset counts alike.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from data import Reproduction, data_path, main
from numpy.typing import NDArray

from pyqe.choice import AbstentionPolicy, CorrelationStudy, Evaluation, correlation_study, evaluate
from pyqe.metrics import expected_calibration_error, reliability_curve

# accuracy, AUROC of MSP and of the maximum logit, calibration error, balanced and conservative score without and with
# abstention
PUBLISHED = """
Falcon-7b      29.1 51.8 51.7 .08 -41.9 -1.1 -112.9 -2.7
Falcon-40b     44.2 59.6 55.1 .14 -11.6  1.9  -67.4 -0.4
Llama-7b       40.6 57.3 55.9 .30 -19.0 -6.4  -78.5 -6.6
Llama-13b      46.7 60.1 58.0 .30  -6.6  4.9  -59.9 -2.5
Llama-70b      58.3 69.4 63.3 .31  16.6 21.4  -25.1  7.7
Llama3-8b      58.6 71.2 68.9 .19  17.1 23.5  -24.3 10.3
Llama3-70b     78.4 81.7 72.6 .22  56.8 56.8   35.2 46.5
Mistral        56.9 63.5 62.7 .40  13.7 17.0  -29.4 -1.5
Mixtral        69.0 61.6 62.4 .32  38.0 38.4    7.1 15.8
Solar          67.2 59.9 65.2 .23  34.4 35.0    1.5  9.4
Yi-6b          52.1 66.8 61.7 .15   4.2 14.5  -43.6  4.9
Yi-34b         69.0 67.5 66.4 .05  37.8 39.6    6.8 18.8
gpt-3.5-turbo  67.3 75.7 -    .21  34.5 38.8    1.7 27.0
gpt-4-turbo    86.6 85.5 -    .11  73.3 73.6   60.0 65.2
"""
SCORES = ("balanced", "balanced, abstaining", "conservative", "conservative, abstaining")
SIGNIFICANT = {"msp": ("119", 140), "max_logit": ("93", 120)}
CORRELATIONS = {"AUROC, r": ".831", "calibration error, r": "-.209", "calibration error, p": ".47"}

DATASETS = ("arc", "hellaswag", "mmlu", "truthfulqa", "winogrande")
PROMPTS = ("first", "second")
FILE = 500  # questions in each of the authors' files
SEED = 2549900867
N_TRAIN = 20  # of each dataset

Answers = tuple[NDArray[np.float64], NDArray[np.bool_]]  # confidence and correctness


def series(data: Mapping[str, Any], model: str, kind: str) -> dict[tuple[str, str], Answers]:
    """Confidence and correctness of a model's answers, by dataset and prompt; empty where it has no such confidence."""
    found = {}
    for dataset in DATASETS:
        for prompt in PROMPTS:
            name = f"{dataset}|{model}|{prompt}"
            if f"{name}|{kind}" in data:
                raw = kind == "max_logit" and f"{name}|grade_raw" in data
                grade = data[f"{name}|{'grade_raw' if raw else 'grade'}"]
                found[dataset, prompt] = data[f"{name}|{kind}"].astype(np.float64), grade == 1
    return found


def pooled(parts: list[Answers]) -> Answers:
    confidence, correct = zip(*parts, strict=True)
    return np.concatenate(confidence), np.concatenate(correct)


def shuffled(n_questions: int) -> list[int]:
    """The order of a dataset's answers, the second prompt's coming after those of the first, before the split."""
    starts = sorted(range(0, n_questions, FILE), key=lambda start: f"q{start}to{start + FILE}")
    order = [
        prompt * n_questions + question
        for start in starts
        for prompt in range(len(PROMPTS))
        for question in range(start, min(start + FILE, n_questions))
    ]
    random.seed(SEED)
    random.shuffle(order)
    return order


def split(answers: Mapping[tuple[str, str], Answers]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``AbstentionPolicy.fit`` and of ``.score``."""
    parts: tuple[list[Any], list[Any]] = [], []
    for dataset in DATASETS:
        confidence, correct = pooled([answers[dataset, prompt] for prompt in PROMPTS])
        order = shuffled(len(confidence) // len(PROMPTS))
        for part, chosen in zip(parts, (order[:N_TRAIN], order[N_TRAIN:]), strict=True):
            part.append((confidence[chosen], correct[chosen], np.full(len(chosen), dataset)))
    train, test = (
        dict(zip(("confidence", "correct", "groups"), map(np.concatenate, zip(*part, strict=True)), strict=True))
        for part in parts
    )
    return train, test


def scores(answers: Mapping[tuple[str, str], Answers], wrong_penalty: float) -> tuple[float, float]:
    """Score without and with abstention."""
    train, test = split(answers)
    policy, always = AbstentionPolicy(wrong_penalty).fit(**train), AbstentionPolicy(wrong_penalty)
    always.threshold_ = -math.inf
    return always.score(**test), policy.score(**test)


def table_error(answers: Answers, *, last_bin_closed: bool = False) -> float:
    """Calibration error as the table has it, or with those answers that it leaves out."""
    confidence, correct = answers
    edges = reliability_curve(correct, confidence, strategy="quantile").edges
    if last_bin_closed:
        return expected_calibration_error(correct, confidence, n_bins=edges, weighted=False)
    edges[0], edges[-1] = 0, 1
    counted = confidence < 1
    return expected_calibration_error(correct[counted], confidence[counted], n_bins=edges, weighted=False)


def series_error(answers: Answers, *, last_bin_closed: bool = False) -> float:
    """Calibration error as the correlation has it, or with those answers that it leaves out."""
    confidence, correct = answers
    counted = confidence < (np.inf if last_bin_closed else 1)
    return expected_calibration_error(correct[counted], confidence[counted], weighted=False)


def reproduce() -> Reproduction:
    result = Reproduction(
        "Plaut et al. 2024: MSP of 14 LLMs on five datasets, two prompts",
        {"questions for a threshold": N_TRAIN * len(DATASETS), "seed": SEED},
    )
    rows = [line.split() for line in PUBLISHED.strip().splitlines()]
    with np.load(data_path("plaut_msp/zero_shot.npz")) as data:
        answers = {(row[0], kind): series(data, row[0], kind) for row in rows for kind in SIGNIFICANT}
    evaluations = {
        (model, kind): [
            evaluate(*one, probability=kind == "msp", penalties=(), n_bootstrap=0) for one in found.values()
        ]
        for (model, kind), found in answers.items()
    }
    for model, accuracy, msp, logit, error, *published_scores in rows:
        of_msp, of_logit = evaluations[model, "msp"], evaluations[model, "max_logit"]
        result.printed(f"{model}: accuracy", accuracy, 100 * mean(of_msp, "accuracy"))
        result.printed(f"{model}: AUROC of MSP", msp, 100 * mean(of_msp, "auroc"))
        if of_logit:
            result.printed(f"{model}: AUROC of maximum logit", logit, 100 * mean(of_logit, "auroc"))
        found = answers[model, "msp"]
        result.printed(f"{model}: calibration error", error, table_error(pooled(list(found.values()))))
        computed = (*scores(found, 1), *scores(found, 2))
        for name, published, score in zip(SCORES, published_scores, computed, strict=True):
            result.printed(f"{model}: score, {name}", published, score)
    add_significance(result, evaluations)
    study = correlations(answers, evaluations)
    for (name, published), value in zip(
        CORRELATIONS.items(), (study.auroc.r, study.ece.r, study.ece.p_value), strict=True
    ):
        result.printed(f"accuracy and {name}", published, value)
    closed = correlations(answers, evaluations, last_bin_closed=True)
    result.note("accuracy and calibration error, r, last bin closed", f"{closed.ece.r:.3f}")
    for model in ("Llama3-70b", "Mixtral"):
        error = table_error(pooled(list(answers[model, "msp"].values())), last_bin_closed=True)
        result.note(f"{model}: calibration error, last bin closed", f"{error:.2f}")
    return result


def mean(evaluations: list[Evaluation], figure: str) -> float:
    values = [one.auroc.auroc if figure == "auroc" else getattr(one, figure) for one in evaluations]
    return float(np.mean(values))


def add_significance(result: Reproduction, evaluations: Mapping[tuple[str, str], list[Evaluation]]) -> None:
    for kind, (published, total) in SIGNIFICANT.items():
        tests = [one.auroc for (_, of), found in evaluations.items() if of == kind for one in found]
        significant = sum(test.p_value < 1e-4 for test in tests)
        result.printed(f"{kind}: series with p < 1e-4, of {total}", published, significant)
        result.printed(f"{kind}: series", str(total), len(tests))


def correlations(
    answers: Mapping[tuple[str, str], Mapping[tuple[str, str], Answers]],
    evaluations: Mapping[tuple[str, str], list[Evaluation]],
    *,
    last_bin_closed: bool = False,
) -> CorrelationStudy:
    """Of MSP, over the models."""
    models = {
        model: [
            replace(evaluation, ece=series_error(one, last_bin_closed=last_bin_closed))
            for evaluation, one in zip(found, answers[model, kind].values(), strict=True)
        ]
        for (model, kind), found in evaluations.items()
        if kind == "msp"
    }
    return correlation_study(models)


if __name__ == "__main__":
    sys.exit(main(reproduce, "Reproduces Plaut et al. 2024."))
