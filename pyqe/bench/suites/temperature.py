"""Fitting a temperature to labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyqe import functional as F
from pyqe.bench.case import Case, Outcome, Rival, Settings, Shape, Work, optional

_TRUE_TEMPERATURE, _LOGIT_STD = 1.7, 3.0
_SIZES = ((100_000, 4), (20_000, 1000))
_LARGE = (100_000, 1000)
_QUICK = ((2_000, 4), (500, 50))


def cases(settings: Settings) -> list[Callable[[], Case]]:
    sizes = _QUICK if settings.quick else _SIZES + ((_LARGE,) if settings.large else ())
    if not settings.on_gpu:
        return [partial(fit, rows, classes) for rows, classes in sizes]
    rows, classes = _QUICK[-1] if settings.quick else _LARGE
    heads = settings.shapes(models=("Llama-3-8B",), n=(4096,))
    return [
        partial(one_pass, rows, classes, settings.device),
        *(partial(of_a_head, shape) for shape in heads),
        *(partial(fit, rows, classes, settings.device) for rows, classes in sizes),
    ]


def labelled_logits(rows: int, classes: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits [rows, classes] and labels that ``softmax(logits / 1.7)`` gives."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator, device=device).mul_(_LOGIT_STD)
    labels = torch.multinomial(torch.softmax(logits / _TRUE_TEMPERATURE, -1), 1, generator=generator)[:, 0]
    return logits, labels


def lbfgs(logits: Tensor, labels: Tensor) -> Outcome:
    log_temperature = torch.zeros((), device=logits.device, requires_grad=True)
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


def fit(rows: int, classes: int, device: str = "cpu") -> Case:
    logits, labels = labelled_logits(rows, classes, device)

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

    rivals = [Rival("pyqe", newton), Rival("torch L-BFGS", lbfgs)]
    if device == "cpu":
        rivals += [
            optional("netcal", "netcal.scaling", "TemperatureScaling", netcal, "from probabilities, in float64"),
            optional("scikit-learn", "sklearn.calibration", "_TemperatureScaling", sklearn),
        ]
    else:
        rivals += [Rival(name, missing="runs on the CPU alone") for name in ("netcal", "scikit-learn")]
    return Case(
        "temperature",
        "fit",
        {"n": rows, "v": classes, "dtype": "fp32"},
        lambda: (logits, labels),
        rivals,
        Work(bytes=4 * rows * classes),
        description=f"T of logits whose labels come from T = {_TRUE_TEMPERATURE}",
    )


# --- a single evaluation of the NLL with its derivatives


def _evaluation(result: Any) -> Outcome:
    return {"nll": result.nll, "first": result.first, "second": result.second}


def one_pass(rows: int, classes: int, device: str) -> Case:
    logits, labels = labelled_logits(rows, classes, device)
    beta = torch.tensor(1 / _TRUE_TEMPERATURE, dtype=torch.float64, device=device)

    def fused(logits: Tensor, labels: Tensor) -> Outcome:
        return _evaluation(F.temperature_nll(logits, labels, beta))

    def eager(logits: Tensor, labels: Tensor) -> Outcome:
        logprobs = torch.log_softmax(beta.float() * logits, -1)
        probs = logprobs.exp()
        mean = (probs * logits).sum(-1)
        variance = (probs * logits.square()).sum(-1) - mean.square()
        first = mean - logits.gather(1, labels[:, None])[:, 0]
        results = (-logprobs.gather(1, labels[:, None])[:, 0], first, variance)
        return dict(zip(("nll", "first", "second"), (result.double().mean() for result in results), strict=True))

    return Case(
        "temperature",
        "one pass",
        {"n": rows, "v": classes, "dtype": "fp32"},
        lambda: (logits, labels),
        [Rival("pyqe", fused), Rival("eager", eager)],
        Work(bytes=4 * rows * classes),
        description="NLL of softmax(z / T) with first and second derivative",
        decides="temperature_nll",
    )


def of_a_head(shape: Shape) -> Case:
    """The same without the logits."""
    weight, beta = shape.weight(), torch.tensor(1 / _TRUE_TEMPERATURE, dtype=torch.float64, device=shape.device)

    def fused(hidden: Tensor, labels: Tensor) -> Outcome:
        return _evaluation(F.linear_temperature_nll(hidden, weight, labels, beta))

    return Case(
        "temperature",
        "one pass of a head",
        shape.facts(),
        lambda: (shape.hidden(), shape.ids()),
        [Rival("pyqe", fused), Rival("bare matmul", lambda hidden, labels: {"logits": hidden @ weight.T})],
        shape.head_work(),
        shape.logit_bytes,
        "NLL of softmax(z / T) with first and second derivative, z of a head",
        "linear_temperature_nll",
    )
