"""Calibrators: against scikit-learn, netcal and scipy, on known temperatures, at the edges, and as files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from netcal.scaling import TemperatureScaling as NetcalScaling
from numpy.typing import NDArray
from scipy import optimize, stats
from scipy.special import expit, log_softmax, logit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.isotonic import IsotonicRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

import pyqe
from pyqe import calibration
from pyqe import functional as F
from pyqe.calibration import (
    Calibrator,
    ConstantTemperature,
    DistilledTemperature,
    HistogramBinning,
    IsotonicCalibration,
    KernelDensityCalibration,
    PlattScaling,
    TemperatureScaling,
    VectorScaling,
    inverse_softmax,
    temperature_scale,
)

Floats = NDArray[np.float64]


def labelled_logits(rows: int = 3000, classes: int = 5, temperature: float = 1.7, seed: int = 0) -> tuple[Floats, Any]:
    """Logits, and labels that their softmax at a temperature gives."""
    random = np.random.default_rng(seed)
    logits = 3 * random.standard_normal((rows, classes))
    return logits, labels_of(softmax(logits / temperature, axis=1), random)


def labels_of(probs: Floats, random: np.random.Generator) -> NDArray[np.int64]:
    return (probs.cumsum(1) > random.random((len(probs), 1))).argmax(1)


def answers(rows: int = 2000, seed: int = 0) -> tuple[Floats, Floats]:
    """Confidences that say too much, and whether the answers were right."""
    random = np.random.default_rng(seed)
    confidence = random.beta(5, 1.5, rows)
    return confidence, (random.random(rows) < expit(0.5 * logit(confidence) - 0.5)).astype(float)


# --- inverse softmax and temperature

distributions = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 5), st.integers(2, 8)), elements=st.floats(1e-6, 1.0)
).map(lambda table: table / table.sum(1, keepdims=True))


@given(distributions, st.sampled_from(["none", "mean", "logsumexp"]))
def test_softmax_undoes_inverse_softmax(probs: Floats, center: Any) -> None:
    np.testing.assert_allclose(softmax(inverse_softmax(probs, center=center), axis=1), probs, rtol=1e-10)


@given(distributions, st.floats(0.1, 10))
def test_temperature_scale_divides_logits(probs: Floats, temperature: float) -> None:
    logits = np.log(probs) + 3.0
    expected = softmax(logits / temperature, axis=1)
    np.testing.assert_allclose(temperature_scale(probs, temperature), expected, rtol=1e-9, atol=1e-15)


@given(distributions, st.floats(0.1, 10), st.floats(0.01, 100))
def test_what_probabilities_add_up_to_is_of_no_account(probs: Floats, temperature: float, total: float) -> None:
    np.testing.assert_allclose(
        temperature_scale(total * probs, temperature), temperature_scale(probs, temperature), rtol=1e-9, atol=1e-15
    )


@given(distributions, st.floats(0.1, 10), st.randoms(use_true_random=False))
def test_order_of_classes_is_of_no_account(probs: Floats, temperature: float, dice: Any) -> None:
    order = list(range(probs.shape[1]))
    dice.shuffle(order)
    np.testing.assert_allclose(
        temperature_scale(probs[:, order], temperature), temperature_scale(probs, temperature)[:, order], rtol=1e-12
    )


@given(distributions, st.floats(0.1, 5), st.floats(1.01, 3))
def test_temperature_is_monotone(probs: Floats, temperature: float, factor: float) -> None:
    cool, warm = temperature_scale(probs, temperature), temperature_scale(probs, temperature * factor)
    assert (warm.max(1) <= cool.max(1) + 1e-12).all()
    assert (np.diff(np.take_along_axis(cool, probs.argsort(1), 1), axis=1) >= -1e-15).all()


def test_golden_vectors() -> None:
    p = [0.7, 0.2, 0.1]
    assert softmax(p).round(3).tolist() == [0.464, 0.281, 0.255]  # of probabilities: not this
    assert temperature_scale(p, 0.5).round(3).tolist() == [0.907, 0.074, 0.019]
    assert temperature_scale(p, 2.0).round(3).tolist() == [0.523, 0.279, 0.198]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.5, 0.5], np.float64),
        ([1, 0], np.float64),
        (np.array([0.5, 0.5], np.float16), np.float32),
        (np.array([0.5, 0.5], np.float32), np.float32),
        (np.array([0.5, 0.5])[::-1], np.float64),
        (np.array([0.5, 0.5], np.longdouble), np.float64),
        (torch.tensor([0.5, 0.5]), torch.float32),
        (torch.tensor([0.5, 0.5]).bfloat16(), torch.float32),
        (torch.tensor([0.5, 0.5]).double(), torch.float64),
        (torch.tensor([1, 0]), torch.float64),
    ],
)
def test_kinds_of_input(values: Any, dtype: Any) -> None:
    scaled = temperature_scale(values, 2.0, eps=0.01)
    assert isinstance(scaled, torch.Tensor if isinstance(values, torch.Tensor) else np.ndarray)
    assert inverse_softmax(values).dtype == scaled.dtype == dtype
    fixed = ConstantTemperature(2.0, inputs="probs", eps=0.01).transform(
        values[None] if hasattr(values, "dtype") else [values]
    )
    assert fixed.dtype == dtype
    assert torch.as_tensor(fixed[0] - scaled).abs().max() < 1e-6


def test_inputs_stay_as_they_are() -> None:
    frozen = np.array([[0.5, 0.5], [0.9, 0.1]])
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        temperature_scale(frozen, [[1.0], [2.0]])
        TemperatureScaling(inputs="probs").fit(frozen, [[0.5, 0.5], [0.8, 0.2]]).transform(frozen)
    assert frozen.tolist() == [[0.5, 0.5], [0.9, 0.1]]


# --- temperature scaling


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_temperature_is_that_of_scipy(dtype: Any, temperature: float) -> None:
    logits, labels = labelled_logits(temperature=temperature)

    def nll(log_temperature: float) -> float:
        return -log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(len(labels)), labels].mean()

    expected = optimize.minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
    probs = softmax(logits, axis=1)
    for scaling, X in (("logits", logits), ("probs", probs), ("probs", 7 * probs / 10)):
        fitted = TemperatureScaling(inputs=scaling).fit(X.astype(dtype), labels)  # type: ignore[arg-type]
        assert fitted.temperature_ == pytest.approx(np.exp(expected.x), abs=1e-4)
        assert fitted.nll_ == pytest.approx(expected.fun, rel=1e-5)
        assert fitted.nll_before_ == pytest.approx(nll(0.0), rel=1e-5)
        assert fitted.converged_ is True
        assert fitted.n_features_in_ == 5
        np.testing.assert_allclose(
            fitted.transform(X.astype(dtype)), softmax(logits / fitted.temperature_, axis=1), atol=1e-5
        )


def test_temperature_is_that_of_netcal() -> None:
    logits, labels = labelled_logits()
    probs = softmax(logits, axis=1)
    theirs = 1 / NetcalScaling().fit(probs, labels).temperature[0]
    assert TemperatureScaling(inputs="probs").fit(probs, labels).temperature_ == pytest.approx(theirs, abs=1e-4)


class GivenScores(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Whose scores are its inputs."""

    def fit(self, X: Any, y: Any) -> GivenScores:
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, X: Any) -> Any:
        return X if X.shape[1] > 1 else X[:, 0]

    def predict(self, X: Any) -> Any:
        return self.classes_[X.argmax(1) if X.shape[1] > 1 else (X[:, 0] > 0).astype(int)]


def sklearn_calibrated(X: Floats, y: Any, method: str) -> Floats:
    frozen = pytest.importorskip("sklearn.frozen")
    estimator = frozen.FrozenEstimator(GivenScores().fit(X, y))
    return CalibratedClassifierCV(estimator, method=method, ensemble=False).fit(X, y).predict_proba(X)


def test_temperature_is_that_of_scikit_learn() -> None:
    logits, labels = labelled_logits()
    try:
        theirs = sklearn_calibrated(logits, labels, "temperature")
    except ValueError as error:
        pytest.skip(f"scikit-learn has none yet: {error}")
    ours = TemperatureScaling(inputs="logits").fit(logits, labels)
    np.testing.assert_allclose(ours.transform(logits), theirs, atol=2e-5)
    # log p is z / T but for a number a row, which a difference of classes does without
    slopes = np.log(theirs[:, 0] / theirs[:, 1]) / (logits[:, 0] - logits[:, 1])
    assert ours.temperature_ == pytest.approx(1 / np.median(slopes), abs=1e-4)


def test_large_logits_keep_their_digits() -> None:
    logits, labels = labelled_logits()
    expected = TemperatureScaling(inputs="logits").fit(logits, labels).temperature_
    assert F.fit_temperature(torch.tensor(logits), torch.tensor(labels)).temperature == pytest.approx(
        expected, rel=1e-8
    )
    large = TemperatureScaling(inputs="logits").fit(logits + 1e6, labels)
    assert large.temperature_ == pytest.approx(expected, rel=1e-7)


def test_temperature_on_torch() -> None:
    logits, labels = labelled_logits()
    tensor = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    scaling = TemperatureScaling(inputs="logits").fit(tensor, torch.tensor(labels))
    assert scaling.temperature_ == pytest.approx(F.fit_temperature(tensor.detach(), torch.tensor(labels)).temperature)
    probs = scaling.transform(tensor)
    assert probs.dtype == torch.float32
    probs[:, 0].sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.abs().sum() > 0
    strided = torch.tensor(np.repeat(logits, 2, axis=1))[:, ::2]
    assert TemperatureScaling(inputs="logits").fit(strided, labels).temperature_ == pytest.approx(
        scaling.temperature_, rel=1e-5
    )


def test_soft_labels() -> None:
    logits, _ = labelled_logits(rows=200)
    soft = softmax(logits / 2.2, axis=1)
    for kind in (np.asarray, torch.tensor):
        scaling = TemperatureScaling(inputs="logits").fit(logits, kind(soft))
        assert scaling.temperature_ == pytest.approx(2.2, rel=1e-6)


def test_one_temperature_a_group() -> None:
    logits, labels = labelled_logits(temperature=1.5)
    more_logits, more_labels = labelled_logits(temperature=3.0, seed=1)
    X, y = np.concatenate([logits, more_logits]), np.concatenate([labels, more_labels])
    groups = np.array(["news", "law"]).repeat(3000)
    order = np.random.default_rng(0).permutation(6000)
    scaling = TemperatureScaling(inputs="logits").fit(X[order], y[order], groups=groups[order])
    alone = {
        "news": TemperatureScaling(inputs="logits").fit(logits, labels),
        "law": TemperatureScaling(inputs="logits").fit(more_logits, more_labels),
    }
    assert scaling.temperature_ == {name: pytest.approx(one.temperature_, rel=1e-9) for name, one in alone.items()}
    assert set(scaling.nll_) == set(scaling.converged_) == {"news", "law"}
    assert all(type(name) is str for name in scaling.temperature_)
    np.testing.assert_allclose(scaling.transform(logits[:5], groups=["news"] * 5), alone["news"].transform(logits[:5]))
    with pytest.raises(ValueError, match="groups: expected a group for every row"):
        scaling.transform(logits)
    with pytest.raises(ValueError, match="groups: expected those of fit, got 'art'"):
        scaling.transform(logits[:1], groups=["art"])
    with pytest.raises(ValueError, match="groups: expected None, as in fit"):
        alone["news"].transform(logits[:1], groups=["news"])
    with pytest.raises(ValueError, match="groups: expected 3000 rows"):
        TemperatureScaling(inputs="logits").fit(logits, labels, groups=["news"])


def test_single_confidences() -> None:
    confidence, correct = answers()
    scaling = TemperatureScaling(inputs="probs").fit(confidence, correct)
    table = np.stack([1 - confidence, confidence], 1)
    expected = TemperatureScaling(inputs="probs").fit(table, correct.astype(int))
    assert scaling.temperature_ == pytest.approx(expected.temperature_, rel=1e-9)
    assert scaling.n_features_in_ == 2
    np.testing.assert_allclose(scaling.transform(confidence), expected.transform(table)[:, 1], rtol=1e-12)
    assert scaling.transform(confidence[:, None]).shape == (2000, 1)
    assert scaling.predict_proba(confidence).shape == (2000, 2)
    assert scaling.transform(torch.tensor(confidence, dtype=torch.float32)).dtype == torch.float32
    odds = TemperatureScaling(inputs="logits").fit(logit(confidence), correct)
    assert odds.temperature_ == pytest.approx(scaling.temperature_, rel=1e-6)
    np.testing.assert_allclose(odds.transform(logit(confidence)), scaling.transform(confidence), rtol=1e-6)
    graded = TemperatureScaling(inputs="probs").fit([0.9, 0.9], [1.0, 0.5])
    assert graded.transform([0.9]) == pytest.approx([0.75], rel=1e-6)


def test_the_floor_changes_nothing_but_zeros() -> None:
    random = np.random.default_rng(0)
    probs = softmax(30 * random.standard_normal((500, 6)), axis=1)
    labels = labels_of(probs, random)
    scaling = TemperatureScaling(inputs="probs").fit(probs, labels)
    assert scaling.eps_ == probs.min() < 1e-20
    exact = TemperatureScaling(inputs="logits").fit(np.log(probs), labels)
    assert scaling.temperature_ == pytest.approx(exact.temperature_, rel=1e-9)
    assert exact.eps_ == 0
    probs[0, probs[0].argmin()] = 0
    assert TemperatureScaling(inputs="probs").fit(probs, labels).eps_ == probs[probs > 0].min()
    assert TemperatureScaling(inputs="probs").fit([[0.5, 0.5], [1, 0]], [0, 1]).eps_ == 1e-12
    assert TemperatureScaling(inputs="probs", eps=0.01).fit([[0.5, 0.5], [1, 0]], [0, 1]).eps_ == 0.01
    single = np.array([[1.0, 1e-45], [0.5, 0.5]], np.float32)
    assert TemperatureScaling(inputs="probs").fit(single, [0, 1]).eps_ == np.finfo(np.float32).tiny


def test_zeros_need_a_floor() -> None:
    X, y = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.5, 0.5]], [0, 0, 1, 1]
    temperatures = [TemperatureScaling(inputs="probs", eps=eps).fit(X, y).temperature_ for eps in (1e-12, 1e-3)]
    np.testing.assert_allclose(temperatures, [np.log(1e12) / np.log(2), np.log(1e3) / np.log(2)], rtol=1e-6)
    with pytest.raises(ValueError, match="finite NLL"):
        TemperatureScaling(inputs="probs", eps=0.0).fit(X, y)


@pytest.mark.parametrize(
    ("X", "y", "reason", "temperature"),
    [
        ([[0.9, 0.1], [0.2, 0.8]], [0, 1], "rises towards T = 0", 1e-3),
        ([[0.9, 0.1], [0.2, 0.8]], [1, 0], "rises towards infinite T", 1e3),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 0], "does not depend on it", 1.0),
        ([[1.0], [0.7]], [1, 1], "rises towards T = 0", 1e-3),
    ],
)
def test_no_temperature_is_best(X: Any, y: Any, reason: str, temperature: float) -> None:
    with pytest.warns(ConvergenceWarning, match=reason) as caught:
        scaling = TemperatureScaling(inputs="probs").fit(X, y)
    assert caught[0].filename == __file__
    assert scaling.temperature_ == pytest.approx(temperature)
    assert scaling.converged_ is False
    with pytest.warns(ConvergenceWarning, match="in group 7"):
        TemperatureScaling(inputs="probs").fit(X, y, groups=[7, 7])


@pytest.mark.parametrize(
    ("arguments", "X", "y", "error", "message"),
    [
        ({"inputs": "probabilities"}, [[0.5, 0.5]], [0], ValueError, "inputs: expected 'probs' or 'logits'"),
        (
            {"inputs": "probs"},
            [[70.0, 30.0]],
            [0],
            ValueError,
            r"X: expected probabilities in \[0, 1\], got 70 in row 0",
        ),
        ({"inputs": "probs"}, [[0.5, 0.5], [-2.0, 1.0]], [0, 0], ValueError, "got -2 in row 1"),
        ({"inputs": "probs"}, [[0.5, 0.5], [np.nan, 1.0]], [0, 0], ValueError, "got nan in row 1"),
        ({"inputs": "probs"}, [[0.5, 0.5], [0.0, 0.0]], [0, 0], ValueError, "nothing but 0 in row 1"),
        ({"inputs": "logits"}, [[0.5, np.nan]], [0], ValueError, "finite NLL"),
        ({"inputs": "logits"}, [[0.5, np.inf]], [0], ValueError, "finite NLL"),
        ({"inputs": "logits"}, np.zeros((0, 3)), [], ValueError, "one row or more"),
        ({"inputs": "probs"}, np.zeros((0, 3)), [], ValueError, "one row or more"),
        ({"inputs": "logits"}, [[0.5, 0.5]], [2], ValueError, "y: expected numbers from 0 to 1"),
        ({"inputs": "logits"}, [[0.5, 0.5]], [0, 1], ValueError, "y: expected 1 rows"),
        ({"inputs": "logits"}, [[0.5, 0.5]], [0.5], TypeError, "y: expected class numbers, got 0.5"),
        ({"inputs": "logits"}, [[0.5, 0.5]], [[0.5, 0.2]], ValueError, "sum to 1"),
        ({"inputs": "logits"}, [[0.5, 0.5]], [[1.0, 0, 0]], ValueError, r"y: expected \[1\] or \[1, 2\]"),
        ({"inputs": "probs"}, [0.5, 0.7], [0, 2], ValueError, r"y: expected numbers in \[0, 1\]"),
        ({"inputs": "logits"}, [["a", "b"]], [0], TypeError, "X: expected numbers"),
        ({"inputs": "logits"}, np.zeros((2, 2, 2)), [0], ValueError, "X: expected shape"),
    ],
)
def test_bad_arguments(arguments: Any, X: Any, y: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        TemperatureScaling(**arguments).fit(X, y)


def test_bad_rows_are_never_scaled() -> None:
    scaling = ConstantTemperature(2.0, inputs="logits")
    with pytest.raises(ValueError, match=r"X: expected finite logits, got \[nan, 0.0\] in row 1"):
        scaling.transform([[0.0, 0.0], [np.nan, 0.0]])
    assert scaling.transform([[0.0, -np.inf]]).tolist() == [[1.0, 0.0]]  # a class that is ruled out
    assert scaling.transform(np.zeros((0, 3))).shape == (0, 3)


# --- distilled and constant temperature


def test_distillation_finds_the_temperature_between_two_models() -> None:
    logits, _ = labelled_logits()
    for kind in (np.asarray, torch.tensor):
        distilled = DistilledTemperature(inputs="logits", teacher_inputs="logits").fit(kind(2.5 * logits), kind(logits))
        assert distilled.temperature_ == pytest.approx(2.5, rel=1e-6)
        assert distilled.kl_ == pytest.approx(0, abs=1e-7)
        assert distilled.kl_before_ > 0.1
        assert distilled.agreement_ == 1.0
    probs = softmax(logits, axis=1)
    other = DistilledTemperature(inputs="logits", teacher_inputs="probs").fit(2.5 * logits, probs)
    assert other.temperature_ == pytest.approx(2.5, rel=1e-6)


def test_distillation_on_items_that_agree() -> None:
    random = np.random.default_rng(0)
    base, aligned = (3 * random.standard_normal((500, 4)) for _ in range(2))
    aligned += base
    agree = base.argmax(1) == aligned.argmax(1)
    arguments = {"inputs": "logits", "teacher_inputs": "logits"}
    distilled = DistilledTemperature(**arguments, agreement_only=True).fit(aligned, base)  # type: ignore[arg-type]
    alone = DistilledTemperature(**arguments).fit(aligned[agree], base[agree])  # type: ignore[arg-type]
    everything = DistilledTemperature(**arguments).fit(aligned, base)  # type: ignore[arg-type]
    assert distilled.temperature_ == alone.temperature_ < everything.temperature_
    assert distilled.agreement_ == everything.agreement_ == agree.mean()
    halves = DistilledTemperature(**arguments, agreement_only=True)  # type: ignore[arg-type]
    halves.fit(np.tile(aligned, (2, 1)), np.tile(base, (2, 1)), groups=np.repeat([True, False], 500))
    assert halves.temperature_ == {name: pytest.approx(alone.temperature_) for name in (True, False)}
    with pytest.raises(ValueError, match=r"got none of .* in group False"):
        halves.fit(aligned, base, groups=agree)


def test_bad_arguments_of_distillation() -> None:
    distilled = DistilledTemperature(inputs="logits", teacher_inputs="logits", agreement_only=True)
    with pytest.raises(ValueError, match="the same top class, got none of 1"):
        distilled.fit([[1.0, 0.0]], [[0.0, 1.0]])
    with pytest.raises(ValueError, match=r"X, teacher: expected \[N, K\] for both, got \[1, 2\] and \[1, 3\]"):
        distilled.fit([[1.0, 0.0]], [[0.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match="one row or more"):
        distilled.fit(np.zeros((0, 2)), np.zeros((0, 2)))
    with pytest.raises(ValueError, match="teacher: expected probabilities"):
        DistilledTemperature(inputs="logits", teacher_inputs="probs").fit([[1.0, 0.0]], [[3.0, 1.0]])


def test_constant_temperature() -> None:
    assert ConstantTemperature(inputs="logits").temperature_ == 2.5
    scaled = ConstantTemperature(2.5, inputs="logits").fit().transform([[5.0, 0.0]])
    np.testing.assert_allclose(scaled, softmax([[2.0, 0.0]], axis=1))
    for bad in (0.0, -1.0, np.nan, True):
        with pytest.raises(ValueError, match="temperature: expected a positive number"):
            ConstantTemperature(bad, inputs="logits").transform([[5.0, 0.0]])


# --- single confidences

ALL: list[Any] = [PlattScaling(), IsotonicCalibration(), HistogramBinning(), KernelDensityCalibration()]
named = pytest.mark.parametrize("calibrator", ALL, ids=lambda one: type(one).__name__)


@named
def test_confidences_become_accuracies(calibrator: Any) -> None:
    confidence, correct = answers(20_000)
    truth = expit(0.5 * logit(confidence) - 0.5)
    calibrated = clone(calibrator).fit(confidence[:10_000], correct[:10_000]).transform(confidence[10_000:])
    assert np.abs(calibrated - truth[10_000:]).mean() < 0.03 < np.abs(confidence - truth).mean()


@named
def test_kinds_of_confidences(calibrator: Any) -> None:
    confidence, correct = answers(100)
    confidence = (64 * confidence).round() / 64  # bfloat16 has these too
    fitted = clone(calibrator).fit(confidence, correct)
    expected = fitted.transform(confidence)
    assert expected.dtype == np.float64
    assert ((expected >= 0) & (expected <= 1)).all()
    assert fitted.n_features_in_ == 1
    for kind, dtype in (
        (list, np.float64),
        (lambda values: values.astype(np.float32), np.float32),
        (lambda values: values[:, None], np.float64),
        (lambda values: torch.tensor(values, dtype=torch.float32, requires_grad=True), torch.float32),
        (lambda values: torch.tensor(values).bfloat16(), torch.float32),
    ):
        values = kind(confidence)
        calibrated = clone(calibrator).fit(values, correct).transform(values)
        assert calibrated.dtype == dtype
        assert tuple(calibrated.shape) == np.shape(values)
        np.testing.assert_allclose(np.ravel(calibrated), expected, atol=1e-6)
        both = fitted.predict_proba(values)
        assert tuple(both.shape) == (100, 2)
        np.testing.assert_allclose(np.asarray(both.sum(1)), 1.0, rtol=1e-6)
    assert fitted.transform([]).shape == (0,)


@named
def test_graded_answers(calibrator: Any) -> None:
    """A grade of 1/2 counts like a right and a wrong answer, up to Platt's targets and Scott's rule, which count."""
    random = np.random.default_rng(0)
    confidence = random.random(400)
    grades = random.choice([0.0, 0.5, 1.0], 400)
    halves = clone(calibrator).fit(confidence, grades).transform(confidence)
    twice = np.concatenate([(grades > 0), (grades == 1)]).astype(float)
    whole = clone(calibrator).fit(np.tile(confidence, 2), twice).transform(confidence)
    np.testing.assert_allclose(halves, whole, atol=0.02)


@named
def test_bad_confidences(calibrator: Any) -> None:
    one = clone(calibrator)
    with pytest.raises(ValueError, match="got 3 answers that are all right"):
        one.fit([0.1, 0.5, 0.9], [1, 1, 1])
    with pytest.raises(ValueError, match="got 1 answers that are all wrong"):
        one.fit([0.1], [0])
    with pytest.raises(ValueError, match="got no answers"):
        one.fit([], [])
    for bad in (1.5, -0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"confidence: expected numbers in \[0, 1\].* in row 1"):
            one.fit([0.5, bad], [0, 1])
    with pytest.raises(ValueError, match=r"correct: expected numbers in \[0, 1\]"):
        one.fit([0.5, 0.5], [0, -1])
    with pytest.raises(ValueError, match=r"confidence: expected shape \[N\] or \[N, 1\]"):
        one.fit([[0.5, 0.5]], [1])
    with pytest.raises(ValueError, match="correct: expected 2 rows"):
        one.fit([0.5, 0.5], [0])
    fitted = clone(calibrator).fit([0.2, 0.4, 0.6, 0.8], [0, 1, 0, 1])
    with pytest.raises(ValueError, match="in row 0"):
        fitted.transform([np.nan])


def test_platt_is_that_of_scikit_learn() -> None:
    confidence, correct = answers()
    platt = PlattScaling(eps=1e-9).fit(confidence, correct)
    theirs = sklearn_calibrated(logit(confidence)[:, None], correct.astype(int), "sigmoid")
    np.testing.assert_allclose(platt.predict_proba(confidence), theirs, atol=2e-5)
    assert platt.slope_ == pytest.approx(0.5, abs=0.1)
    assert platt.intercept_ == pytest.approx(-0.5, abs=0.2)


def test_platt_where_confidence_separates_or_says_nothing() -> None:
    platt = PlattScaling().fit([0.6, 0.7, 0.8, 0.9], [0, 0, 1, 1])
    assert np.isfinite([platt.slope_, platt.intercept_]).all()
    np.testing.assert_array_less(platt.transform([0.6, 0.7]), 0.5)
    assert PlattScaling().fit([0.6, 0.7, 0.8, 0.9], [1, 1, 0, 0]).slope_ < 0
    with pytest.warns(ConvergenceWarning, match="all confidences are the same") as caught:
        platt = PlattScaling().fit([0.9] * 8, [1, 1, 0, 0] * 2)
    assert caught[0].filename == __file__
    assert platt.slope_ == 1.0
    assert platt.transform([0.9]) == pytest.approx([0.5])
    for eps in (0.0, 0.5, -1.0):
        with pytest.raises(ValueError, match=r"eps: expected a number between 0 and 0\.5"):
            PlattScaling(eps=eps).fit([0.1, 0.9], [0, 1])


def test_isotonic_is_that_of_scikit_learn() -> None:
    confidence, correct = answers()
    theirs = IsotonicRegression(out_of_bounds="clip").fit(confidence, correct)
    ours = IsotonicCalibration().fit(confidence, correct)
    at = np.linspace(0, 1, 501)
    np.testing.assert_allclose(ours.transform(at), theirs.predict(at), atol=1e-12)
    assert (np.diff(ours.transform(at)) >= 0).all()
    assert IsotonicCalibration().fit([0.9, 0.1], [0, 1]).transform([0.0, 1.0]).tolist() == [0.5, 0.5]


def test_histogram_binning() -> None:
    binning = HistogramBinning(n_bins=4).fit([0.0, 0.25, 0.3, 0.75, 1.0], [0, 1, 0, 1, 0])
    assert binning.edges_.tolist() == [0, 0.25, 0.5, 0.75, 1]
    np.testing.assert_array_equal(binning.values_, [0, 0.5, np.nan, 0.5])
    assert binning.transform([0.1, 0.25, 0.6, 0.75, 1.0]).tolist() == [0, 0.5, 0.6, 0.5, 0.5]  # .6: an empty bin
    tenths = HistogramBinning().fit([0.65, 0.7], [0, 1])
    assert tenths.transform([0.69, 0.7, 7 * 0.1, np.float32(0.7)]).tolist() == [0, 1, 1, 1]
    confidence, correct = answers(1000)
    quantile = HistogramBinning(n_bins=5, strategy="quantile").fit(confidence, correct)
    calibrated = quantile.transform(confidence)
    for low, high in zip(quantile.edges_, quantile.edges_[1:], strict=False):
        inside = (confidence >= low) & (
            (confidence < high) | (confidence == confidence.max()) & (high == confidence.max())
        )
        assert inside.sum() == pytest.approx(200, abs=1)
        np.testing.assert_allclose(calibrated[inside], correct[inside].mean())
    with pytest.raises(ValueError, match="n_bins"):
        HistogramBinning(n_bins=0).fit(confidence, correct)


def test_kernel_densities_are_those_of_scipy() -> None:
    confidence, correct = answers(500)
    confidence = confidence.round(2)  # ties
    right, wrong = confidence[correct == 1], confidence[correct == 0]
    at = np.linspace(0.3, 1, 50)
    densities = stats.gaussian_kde(right)(at), stats.gaussian_kde(wrong)(at)
    equal = KernelDensityCalibration(priors="equal").fit(confidence, correct)
    np.testing.assert_allclose(equal.transform(at), densities[0] / sum(densities), rtol=1e-9)
    weighted = len(right) * densities[0], len(wrong) * densities[1]
    data = KernelDensityCalibration().fit(confidence, correct)
    np.testing.assert_allclose(data.transform(at), weighted[0] / sum(weighted), rtol=1e-9)


def test_kernel_densities_far_from_all_data() -> None:
    calibration = KernelDensityCalibration(bandwidth=0.001).fit([0.9, 0.901, 0.8, 0.799], [1, 1, 0, 0])
    assert calibration.transform([0.0, 0.85, 1.0]).tolist() == pytest.approx([0.0, 0.5, 1.0], abs=1e-9)


def test_bad_arguments_of_kernel_densities() -> None:
    with pytest.raises(ValueError, match=r"different ones among the wrong answers.*got 1 throughout; give a number"):
        KernelDensityCalibration().fit([0.5, 0.6, 1.0, 1.0], [1, 1, 0, 0])
    assert np.isfinite(KernelDensityCalibration(bandwidth=0.1).fit([0.5, 1.0, 1.0], [1, 0, 0]).transform([0.7])).all()
    for bad in (0.0, -1.0, np.nan, "silverman"):
        with pytest.raises(ValueError, match="bandwidth: expected 'scott' or a positive number"):
            KernelDensityCalibration(bandwidth=bad).fit([0.5, 1.0], [1, 0])
    with pytest.raises(ValueError, match="priors: expected 'data' or 'equal'"):
        KernelDensityCalibration(priors="none").fit([0.5, 1.0], [1, 0])  # type: ignore[arg-type]


# --- vector scaling


def test_vector_scaling_is_the_optimum() -> None:
    random = np.random.default_rng(0)
    logits = 2 * random.standard_normal((2000, 3))
    scale, shift = np.array([0.5, 1.0, 1.5]), np.array([0.5, -1.0, 0.5])
    labels = labels_of(softmax(scale * logits + shift, axis=1), random)
    ours = VectorScaling(inputs="logits").fit(logits, labels)

    def nll(parameters: Floats) -> float:
        return -log_softmax(parameters[:3] * logits + parameters[3:], axis=1)[np.arange(2000), labels].mean()

    theirs = optimize.minimize(nll, np.array([1.0, 1, 1, 0, 0, 0]), method="BFGS")
    assert ours.nll_ == pytest.approx(theirs.fun, abs=1e-9)
    assert ours.nll_before_ == pytest.approx(nll(np.array([1.0, 1, 1, 0, 0, 0])))
    np.testing.assert_allclose(ours.scale_, theirs.x[:3], atol=1e-3)
    np.testing.assert_allclose(ours.shift_, theirs.x[3:] - theirs.x[3:].mean(), atol=1e-3)
    np.testing.assert_allclose(ours.scale_, scale, atol=0.2)
    soft = VectorScaling(inputs="logits").fit(logits, softmax(scale * logits + shift, axis=1))
    np.testing.assert_allclose(soft.scale_, scale, atol=1e-5)
    np.testing.assert_allclose(soft.shift_, shift, atol=1e-5)
    probs = VectorScaling(inputs="probs").fit(torch.tensor(softmax(logits, axis=1)).float(), labels)
    calibrated = probs.predict_proba(torch.tensor(softmax(logits, axis=1)).float())
    assert calibrated.dtype == torch.float32
    np.testing.assert_allclose(calibrated.sum(1), 1, rtol=1e-5)


def test_vector_scaling_where_nothing_is_best() -> None:
    logits, _ = labelled_logits(rows=100)
    with pytest.warns(ConvergenceWarning, match="no finite scales and shifts are best") as caught:
        scaling = VectorScaling(inputs="logits").fit(logits, logits.argmax(1))
    assert caught[0].filename == __file__
    assert np.isfinite(scaling.scale_).all()
    assert (scaling.transform(logits).argmax(1) == logits.argmax(1)).all()
    with pytest.raises(ValueError, match="got none of class 2"):
        VectorScaling(inputs="logits").fit([[1.0, 0, 0], [0, 1.0, 0]], [0, 1])
    with pytest.raises(ValueError, match="finite logits"):
        VectorScaling(inputs="probs", eps=0.0).fit([[1.0, 0.0], [0.5, 0.5]], [0, 1])
    for bad in ([[1.0], [0.5]], [0.5, 0.5]):
        with pytest.raises(ValueError, match=r"X: expected shape \[N, K\] with K > 1"):
            VectorScaling(inputs="probs").fit(bad, [0, 1])
    with pytest.raises(ValueError, match="one row or more"):
        VectorScaling(inputs="logits").fit(np.zeros((0, 2)), [])


# --- as scikit-learn's estimators

LOGITS, LABELS = labelled_logits(rows=60, classes=3)
CONFIDENCE, CORRECT = answers(60)
FITTED: list[Any] = [
    TemperatureScaling(inputs="logits", eps=0.1 + 0.2).fit(LOGITS, LABELS),
    TemperatureScaling(inputs="logits").fit(LOGITS, LABELS, groups=["a", 'b "2"'] * 30),
    TemperatureScaling(inputs="logits").fit(LOGITS, LABELS, groups=[1, 2] * 30),
    DistilledTemperature(inputs="logits", teacher_inputs="logits").fit(2 * LOGITS, LOGITS),
    ConstantTemperature(1 / 3, inputs="logits"),
    VectorScaling(inputs="logits").fit(LOGITS, LABELS),
    PlattScaling().fit(CONFIDENCE, CORRECT),
    IsotonicCalibration().fit(CONFIDENCE, CORRECT),
    HistogramBinning(n_bins=7).fit(CONFIDENCE, CORRECT),
    KernelDensityCalibration(bandwidth=0.1).fit(CONFIDENCE, CORRECT),
]
fitted = pytest.mark.parametrize("calibrator", FITTED, ids=lambda one: type(one).__name__)


def outputs(calibrator: Any) -> Any:
    if isinstance(calibrator, calibration.ConfidenceCalibrator):
        return calibrator.transform(np.linspace(0, 1, 1001))
    temperature = getattr(calibrator, "temperature_", None)
    groups = list(temperature) * 30 if isinstance(temperature, dict) else None
    return calibrator.transform(LOGITS, groups=groups) if groups else calibrator.transform(LOGITS)


@fitted
def test_estimators_are_scikit_learns(calibrator: Any) -> None:
    new = clone(calibrator)
    assert new.get_params() == calibrator.get_params()
    assert repr(new) == repr(calibrator)
    assert type(calibrator).__name__ in repr(calibrator)
    name, value = next(iter(calibrator.get_params().items()), (None, None))
    if name is not None:
        assert new.set_params(**{name: value}).get_params()[name] == value
    with pytest.raises(ValueError, match="Invalid parameter"):
        new.set_params(nothing=1)
    if not isinstance(new, ConstantTemperature):
        for use in (new.transform, new.predict_proba):
            with pytest.raises(NotFittedError):
                use([0.5, 0.5])
        with pytest.raises(NotFittedError):
            new.save_pretrained("nowhere")
        if isinstance(getattr(calibrator, "temperature_", 1.0), float) and calibrator.n_features_in_ > 1:
            with pytest.raises(ValueError, match="X: expected 3 classes, as in fit, got 4"):
                calibrator.transform(np.ones((2, 4)))


def test_a_fit_that_failed_is_none() -> None:
    density = KernelDensityCalibration()
    with pytest.raises(ValueError, match="give a number"):
        density.fit([0.5, 0.6, 1.0, 1.0], [1, 1, 0, 0])
    with pytest.raises(NotFittedError):
        density.transform([0.5])
    scaling = TemperatureScaling(inputs="probs")
    for y, groups in ([0.5, None], [0, "a"]):
        with pytest.raises((TypeError, ValueError)):
            scaling.fit([[0.5, 0.5]], [y], groups=groups)
    with pytest.raises(ValueError, match="one row or more"):
        scaling.fit(np.zeros((0, 2)), [], groups=[])
    with pytest.raises(NotFittedError):
        scaling.transform([[0.5, 0.5]])


def test_calibrators_in_pipelines() -> None:
    pipeline = make_pipeline(FunctionTransformer(lambda X: softmax(X, axis=1)), TemperatureScaling(inputs="probs"))
    assert pipeline.fit(LOGITS, LABELS).predict_proba(LOGITS).shape == (60, 3)
    assert pipeline[-1].temperature_ == pytest.approx(FITTED[0].temperature_, rel=1e-6)
    assert IsotonicCalibration().fit_transform(CONFIDENCE, CORRECT).shape == (60,)
    column = make_pipeline(FunctionTransformer(), PlattScaling()).fit(CONFIDENCE[:, None], CORRECT)
    assert column.transform(CONFIDENCE[:, None]).shape == (60, 1)
    assert column.predict_proba(CONFIDENCE[:, None]).shape == (60, 2)


# --- files


@fitted
def test_files_keep_calibrators_exactly(calibrator: Any, tmp_path: Path) -> None:
    calibrator.save_pretrained(tmp_path / "new" / "folder")
    for loaded in (
        calibration.load(tmp_path / "new" / "folder"),
        type(calibrator).from_pretrained(tmp_path / "new" / "folder"),
    ):
        assert type(loaded) is type(calibrator)
        assert loaded.get_params() == calibrator.get_params()
        assert sorted(vars(loaded)) == sorted(vars(calibrator))
        for name, value in vars(calibrator).items():
            np.testing.assert_equal(getattr(loaded, name), value)
        np.testing.assert_array_equal(outputs(loaded), outputs(calibrator))
    document = json.loads((tmp_path / "new" / "folder" / "calibrator.json").read_text())
    assert document["pyqe_version"] == pyqe.__version__
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["calibrator.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: expected 1, got 2; is it from a newer pyqe"),
        ({"version": None}, "version: expected 1, got None"),
        ({"class": "Pickle"}, "class: 'Pickle' is none of pyqe's calibrators"),
        ({"class": "load"}, "class: 'load' is none"),
        ({"class": "Calibrator"}, "class: 'Calibrator' is none"),
        ({"class": ["PlattScaling"]}, "is none of"),
        ({"class": "IsotonicCalibration"}, "parameters: expected none"),
        ({"parameters": {"eps": 0.1, "os": 1}}, "parameters: expected eps, got"),
        ({"parameters": None}, "parameters: expected eps"),
        ({"learned": {}}, "learned: expected slope_, intercept_, n_features_in_"),
        ({"learned": {"slope_": "1", "intercept_": 0.0, "n_features_in_": 1}}, "expected a number, got '1'"),
        ({"learned": {"slope_": True, "intercept_": 0.0, "n_features_in_": 1}}, "expected a number, got True"),
        ({"learned": {"slope_": float("nan"), "intercept_": 0.0, "n_features_in_": 1}}, "expected a finite number"),
        ({"learned": {"slope_": 1.0, "intercept_": 0.0, "n_features_in_": 1.5}}, "expected a count"),
    ],
)
def test_files_that_are_not_ours(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    PlattScaling().fit(CONFIDENCE, CORRECT).save_pretrained(tmp_path)
    path = tmp_path / "calibrator.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as error:
        calibration.load(tmp_path)
    assert str(path) in str(error.value)


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        calibration.load(tmp_path)
    TemperatureScaling(inputs="logits").fit(LOGITS, LABELS).save_pretrained(tmp_path)
    path = tmp_path / "calibrator.json"
    with pytest.raises(ValueError, match="expected a PlattScaling, got a TemperatureScaling"):
        PlattScaling.from_pretrained(tmp_path)
    whole = json.loads(path.read_text())
    for name, value, message in (
        ("temperature_", -1.0, "expected a positive number"),
        ("temperature_", {"groups": [["a"]]}, "not enough values"),
        ("temperature_", {}, "no 'groups'"),
        ("converged_", 1, "expected true or false"),
    ):
        path.write_text(json.dumps({**whole, "learned": {**whole["learned"], name: value}}))
        with pytest.raises(ValueError, match=message):
            Calibrator.from_pretrained(tmp_path)
    for text, message in (
        ("{", "Expecting"),
        ("[]", "expected a JSON object"),
        ("{}", "no 'version'"),
        ("", "Expecting"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            calibration.load(tmp_path)


def test_a_failed_write_leaves_the_file(tmp_path: Path) -> None:
    PlattScaling().fit(CONFIDENCE, CORRECT).save_pretrained(tmp_path)
    before = (tmp_path / "calibrator.json").read_text()
    broken = PlattScaling().fit(CONFIDENCE, CORRECT)
    broken.slope_ = np.inf
    with pytest.raises(ValueError, match="JSON compliant"):
        broken.save_pretrained(tmp_path)
    assert (tmp_path / "calibrator.json").read_text() == before
