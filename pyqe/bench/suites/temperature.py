"""Fitting a temperature to labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyqe import functional as F
from pyqe.bench.case import Case, Outcome, Rival, Settings, Work, optional

_TRUE_TEMPERATURE, _LOGIT_STD = 1.7, 3.0
_SIZES = ((100_000, 4), (20_000, 1000))
_LARGE = (100_000, 1000)
_QUICK = ((2_000, 4), (500, 50))


def cases(settings: Settings) -> list[Callable[[], Case]]:
    sizes = _QUICK if settings.quick else _SIZES + ((_LARGE,) if settings.large else ())
    return [partial(fit, rows, classes) for rows, classes in sizes]


def labelled_logits(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits [rows, classes] and labels that ``softmax(logits / 1.7)`` gives."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).mul_(_LOGIT_STD)
    labels = torch.multinomial(torch.softmax(logits / _TRUE_TEMPERATURE, -1), 1, generator=generator)[:, 0]
    return logits, labels


def lbfgs(logits: Tensor, labels: Tensor) -> Outcome:
    log_temperature = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return _temperature(log_temperature.detach().exp())


def _temperature(value: Any) -> Outcome:
    """As a number for the report and a tensor to compare."""
    number = float(value)
    return {"T": number, "temperature": torch.tensor(number, dtype=torch.float64)}


def fit(rows: int, classes: int) -> Case:
    logits, labels = labelled_logits(rows, classes)

    def newton(logits: Tensor, labels: Tensor) -> Outcome:
        return _temperature(F.fit_temperature(logits, labels).temperature)

    def netcal(scaling: Any) -> Callable[..., Outcome]:
        probs, numpy_labels = torch.softmax(logits.double(), -1).numpy(), labels.numpy()

        def run(logits: Tensor, labels: Tensor) -> Outcome:
            calibrator = scaling().fit(probs, numpy_labels)
            return _temperature(1.0 / calibrator.temperature[0])  # what it calls so is 1 / T

        return run

    def sklearn(scaling: Any) -> Callable[..., Outcome]:
        def run(logits: Tensor, labels: Tensor) -> Outcome:
            return _temperature(1.0 / scaling().fit(logits.numpy(), labels.numpy()).beta_)

        return run

    rivals = [
        Rival("pyqe", newton),
        Rival("torch L-BFGS", lbfgs),
        optional("netcal", "netcal.scaling", "TemperatureScaling", netcal, "from probabilities, in float64"),
        optional("scikit-learn", "sklearn.calibration", "_TemperatureScaling", sklearn),
    ]
    return Case(
        "temperature",
        "fit",
        {"n": rows, "v": classes, "dtype": "fp32"},
        lambda: (logits, labels),
        rivals,
        Work(bytes=4 * rows * classes),
        description=f"T of logits whose labels come from T = {_TRUE_TEMPERATURE}",
    )
