"""What calibration does to probabilities: golden vectors, image classifiers, confidences that LMs stated in words.

PYQE_DATA=/path/to/data python benchmarks/reproduce/stated.py [-o stated.json]

* Golden vectors of inverting the softmax (Wang et al. 2024, arXiv 2410.06707).
* Three image classifiers of which nothing but probabilities is kept: temperature from the first half, calibration error
  (15 bins of equal width) of the second half. The temperatures are held to those of netcal and scikit-learn as well, if
  those are installed. The figures known of LeNet-5 (1.38, and .020 after) are not those of the least NLL, which is at
  1.374, say all three; hence the tolerances.
* Stated confidences of single answers, ten LMs on MMLU-Pro and three sets of short answers: each method learns from one
  random half, and ECE (10 bins of equal width) and AUROC are of the other. Answers without a confidence are left out.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from data import Reproduction, data_path, main
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from sklearn.exceptions import ConvergenceWarning

from pyqe import calibration, metrics
from pyqe.calibration import (
    HistogramBinning,
    IsotonicCalibration,
    KernelDensityCalibration,
    PlattScaling,
    TemperatureScaling,
    temperature_scale,
)

Floats = NDArray[np.float64]

# T, and calibration error before and after
CLASSIFIERS = {
    "lenet5_cifar10": (1.38, 0.119, 0.020),
    "wrn16-4_cifar10": (2.06, 0.055, 0.007),
    "densenet100_cifar100": (2.11, 0.147, 0.029),
}
BINS_OF_CLASSIFIERS = 15
SEED = 0
METHODS: dict[str, Callable[[], Any]] = {
    "temperature": lambda: TemperatureScaling(inputs="probs"),
    "Platt": PlattScaling,
    "isotonic": IsotonicCalibration,
    "histogram": HistogramBinning,
    "densities": KernelDensityCalibration,
    "densities, equal priors": lambda: KernelDensityCalibration(priors="equal"),
}
FLOORS = (1e-12, 1e-6, 1e-4, 1e-3, 0.01, 0.02, 0.05)


def reproduce() -> Reproduction:
    result = Reproduction("Calibration of stated probabilities", {"seed of the halves": SEED})
    add_golden_vectors(result)
    for name, expected in CLASSIFIERS.items():
        with np.load(data_path(f"cifar_softmax/{name}.npz")) as data:
            add_classifier(result, name, data["probs"], data["label"].astype(np.int64), *expected)
    add_stated_confidences(result, {**mmlu_pro(), **short_answers()})
    return result


def add_golden_vectors(result: Reproduction) -> None:
    p = np.array([0.7, 0.2, 0.1])
    for name, expected, computed in (
        ("softmax of probabilities", (".464", ".281", ".255"), softmax(p)),
        ("T = .5", (".907", ".074", ".019"), temperature_scale(p, 0.5)),
        ("T = 2", (".523", ".279", ".198"), temperature_scale(p, 2.0)),
    ):
        for index, (published, value) in enumerate(zip(expected, computed, strict=True)):
            result.printed(f"golden: {name}, class {index + 1}", published, value)
    result.printed("golden: most of six classes by softmax of probabilities", ".352", softmax(np.eye(6)[0]).max())


# --- classifiers


def add_classifier(
    result: Reproduction,
    name: str,
    probs: Floats,
    labels: NDArray[np.int64],
    temperature: float,
    before: float,
    after: float,
) -> None:
    half = len(labels) // 2
    scaling = TemperatureScaling(inputs="probs").fit(probs[:half], labels[:half])
    result.within(f"{name}: T", temperature, scaling.temperature_, 0.01)
    tables = probs[half:], scaling.transform(probs[half:])
    errors = [
        metrics.expected_calibration_error(*metrics.top_label(labels[half:], table), n_bins=BINS_OF_CLASSIFIERS)
        for table in tables
    ]
    result.printed(f"{name}: ECE before", f"{before:.3f}", errors[0])
    result.within(f"{name}: ECE after", after, errors[1], 0.003)
    for rival, fit in (("netcal", netcal_temperature), ("scikit-learn", sklearn_temperature)):
        try:
            theirs = fit(probs[:half].astype(np.float64), labels[:half])
        except ImportError as error:
            result.note(f"{name}: T of {rival}", f"not there: {error}")
        else:
            result.within(f"{name}: T of {rival}", scaling.temperature_, theirs, 1e-4, digits=6)
    for floor in (1e-12, 1e-7, 1e-4):
        floored = TemperatureScaling(inputs="probs", eps=floor).fit(probs[:half], labels[:half])
        result.note(f"{name}: T with eps = {floor:g}", f"{floored.temperature_:.3f}")


def netcal_temperature(probs: Floats, labels: NDArray[np.int64]) -> float:
    from netcal.scaling import TemperatureScaling as Theirs

    return 1.0 / float(Theirs().fit(probs, labels).temperature[0])  # what it calls so is 1 / T


def sklearn_temperature(probs: Floats, labels: NDArray[np.int64]) -> float:
    """The fit behind ``CalibratedClassifierCV(method="temperature")``."""
    from sklearn.calibration import _TemperatureScaling

    return 1.0 / float(_TemperatureScaling().fit(log_softmax(np.log(probs), axis=1), labels).beta_)


# --- stated confidences


def mmlu_pro() -> dict[str, tuple[Floats, Floats, int]]:
    """Confidence, correctness and number of answers without a confidence, by model."""
    stated: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    unstated: dict[str, int] = defaultdict(int)
    with gzip.open(data_path("stated_confidence/mmlu_pro_verbal.csv.gz"), "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["verbal_numeric"]:
                stated[row["model"]].append((float(row["verbal_numeric"]), row["gold"] == row["pred"]))
            else:
                unstated[row["model"]] += 1
    return {name: (*np.array(pairs, dtype=float).T, unstated[name]) for name, pairs in stated.items()}


def short_answers() -> dict[str, tuple[Floats, Floats, int]]:
    """The same, of replies as the models wrote them."""
    found = {}
    for name in ("verb_nq_gemma2", "verb_nq_llama8", "verb_sciq_llama8"):
        with gzip.open(data_path(f"stated_confidence/{name}.jsonl.gz"), "rt", encoding="utf-8") as lines:
            replies = [json.loads(line) for line in lines]
        parsed = [calibration.parse_confidence(reply["response"]).confidence for reply in replies]
        read = ~np.isnan(parsed)
        scores = np.array([reply["score"] for reply in replies])
        found[name] = np.array(parsed)[read], scores[read], int((~read).sum())
    return found


def add_stated_confidences(result: Reproduction, series: dict[str, tuple[Floats, Floats, int]]) -> None:
    errors: dict[str, list[float]] = defaultdict(list)
    losses: dict[tuple[str, float], list[float]] = defaultdict(list)
    for name, (confidence, correct, unstated) in series.items():
        order = np.random.default_rng(SEED).permutation(len(confidence))
        train, test = order[: len(order) // 2], order[len(order) // 2 :]
        result.note(f"{name}: answers, without a confidence", f"{len(confidence) + unstated} {unstated}")
        ends = [(confidence == end).mean() for end in (0, 1)]
        result.note(f"{name}: accuracy, share of 0 and of 1", " ".join(f"{x:.3f}" for x in (correct.mean(), *ends)))
        add_scores(result, f"{name}: as stated", correct[test], confidence[test])
        errors["as stated"].append(metrics.expected_calibration_error(correct[test], confidence[test]))
        for method, make in METHODS.items():
            calibrator, calibrated = learn(make(), confidence[train], correct[train], confidence[test])
            at = f", T {calibrator.temperature_:.1f}" if method == "temperature" else ""
            add_scores(result, f"{name}: {method}{at}", correct[test], calibrated)
            errors[method].append(metrics.expected_calibration_error(correct[test], calibrated))
        for floor in FLOORS:
            floored = {"temperature": TemperatureScaling(inputs="probs", eps=floor), "Platt": PlattScaling(eps=floor)}
            for method, calibrator in floored.items():
                _, calibrated = learn(calibrator, confidence[train], correct[train], confidence[test])
                losses[method, floor].append(log_loss(correct[test], calibrated))
    for method, values in errors.items():
        better = sum(np.array(values) < errors["as stated"])
        result.note(f"mean ECE, number of {len(series)} series improved: {method}", f"{np.mean(values):.4f} {better}")
    for (method, floor), values in losses.items():
        result.note(f"mean NLL: {method}, eps = {floor:g}", f"{np.mean(values):.4f}")


def learn(calibrator: Any, confidence: Floats, correct: Floats, at: Floats) -> tuple[Any, Floats]:
    """The calibrator, fitted, and calibrated confidences; no temperature being best is a result too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return calibrator.fit(confidence, correct), calibrator.transform(at)


def add_scores(result: Reproduction, name: str, correct: Floats, confidence: Floats) -> None:
    error = metrics.expected_calibration_error(correct, confidence)
    result.note(f"{name}: ECE, AUROC", f"{error:.3f} {metrics.auroc(correct, confidence):.3f}")


def log_loss(correct: Floats, confidence: Floats) -> float:
    """Mean NLL in nats; confidences no closer to 0 and 1 than 1e-12."""
    sure = confidence.clip(1e-12, 1 - 1e-12)
    return float(-(correct * np.log(sure) + (1 - correct) * np.log1p(-sure)).mean())


if __name__ == "__main__":
    sys.exit(main(reproduce, "Calibration of stated probabilities."))
