"""The temperature fit: against other optimisers, on data without an optimum, on bad rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor

import pyqe
from pyqe import functional as F
from pyqe.backends import available_backends
from pyqe.functional.temperature_fit import _minimise, _Point

BACKENDS = [name for name, backend in available_backends().items() if backend.unavailable is None]


def normal(n: int, classes: int) -> Tensor:
    return 3 * torch.randn(n, classes)


def one_large(n: int, classes: int) -> Tensor:
    """Near-certain predictions."""
    return torch.randn(n, classes).scatter_add_(1, torch.randint(classes, (n, 1)), torch.full((n, 1), 9.0))


def stated(n: int, classes: int) -> Tensor:
    """Probabilities as an LM states them: many zeros, all of them multiples of 0.05."""
    probs = torch.distributions.Dirichlet(torch.full((classes,), 0.3)).sample((n,))
    return F.inverse_softmax((20 * probs).round() / 20, eps=1e-4)


def labels_at(logits: Tensor, temperature: float) -> Tensor:
    return torch.multinomial(torch.softmax(logits.double() / temperature, 1), 1)[:, 0]


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """Where the derivative of the mean NLL in the inverse temperature vanishes, in float64."""
    z = logits.double()
    target = z.gather(1, labels[:, None])[:, 0] if labels.dim() == 1 else (labels.double() * z).sum(1)

    def slope(log_beta: float) -> float:
        return float((torch.softmax(math.exp(log_beta) * z, 1) * z).sum(1).mean() - target.mean())

    return math.exp(-brentq(slope, -6.9, 6.9, xtol=1e-13))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [normal, one_large, stated])
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 1.6, 5.0, 40.0])
@pytest.mark.parametrize(("n", "classes"), [(3000, 4), (400, 100)])
def test_same_temperature_as_root_finding_in_float64(
    backend: str, make: Callable[[int, int], Tensor], temperature: float, n: int, classes: int
) -> None:
    logits = make(n, classes)
    labels = labels_at(logits, temperature)
    if make is one_large and temperature <= 0.7:
        labels[0] = (logits[0].argmax() + 1) % classes  # else separable
    with pyqe.use_backend(backend):
        fit = F.fit_temperature(logits, labels)
        assert fit.nll == pytest.approx(float(F.temperature_nll(logits, labels, 1 / fit.temperature).nll), rel=1e-6)
    assert fit.converged
    # near uniform probabilities the slope is small against the float32 rounding of logits
    precision = 1e-6 if temperature < 10 else 1e-5
    assert fit.temperature == pytest.approx(best_temperature(logits, labels), rel=precision)
    assert fit.nll_before == pytest.approx(float(torch.nn.functional.cross_entropy(logits.double(), labels)), rel=1e-6)
    assert fit.nll <= fit.nll_before


def test_same_temperature_as_lbfgs() -> None:
    logits = normal(2000, 6)
    labels = labels_at(logits, 1.7)
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"max_iter": 100, "tolerance_change": 1e-15, "tolerance_grad": 1e-12}
    optimizer = torch.optim.LBFGS([log_temperature], line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits.double() / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert F.fit_temperature(logits, labels).temperature == pytest.approx(math.exp(log_temperature.item()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 2.5])
def test_the_temperature_of_the_data_is_recovered(dtype: torch.dtype, temperature: float) -> None:
    logits = normal(40_000, 5).to(dtype)
    labels = labels_at(logits, temperature)
    fit = F.fit_temperature(logits, labels)
    assert fit.temperature == pytest.approx(temperature, rel=0.03)
    assert fit.temperature == pytest.approx(best_temperature(logits, labels), rel=1e-6)
    batched = F.fit_temperature(logits.reshape(100, 400, 5), labels.reshape(100, 400))
    assert batched == fit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_soft_labels(dtype: torch.dtype) -> None:
    logits = normal(500, 7)
    labels = labels_at(logits, 1.5)
    one_hot = torch.nn.functional.one_hot(labels, 7).to(dtype)
    assert F.fit_temperature(logits, one_hot).temperature == pytest.approx(
        F.fit_temperature(logits, labels).temperature, rel=1e-9
    )
    soft = torch.softmax(logits / 2.5, 1).to(dtype)
    assert F.fit_temperature(logits, soft).temperature == pytest.approx(
        2.5, rel=1e-6 if dtype != torch.bfloat16 else 0.01
    )


def test_columns_as_rows_and_gradients_are_accepted() -> None:
    logits = normal(300, 4)
    labels = labels_at(logits, 1.5)
    expected = F.fit_temperature(logits, labels)
    assert F.fit_temperature(logits.T.contiguous().T, labels) == expected
    assert F.fit_temperature(logits.clone().requires_grad_(), labels) == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0.2, 5.0))
def test_scaled_logits_have_a_scaled_temperature(seed: int, classes: int, scale: float) -> None:
    torch.manual_seed(seed)
    logits = normal(200, classes).double()
    labels = labels_at(logits, 1.4)
    fit, scaled = F.fit_temperature(logits, labels), F.fit_temperature(scale * logits, labels)
    assert scaled.temperature == pytest.approx(scale * fit.temperature, rel=1e-7)
    assert scaled.nll == pytest.approx(fit.nll, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 90), st.floats(0.01, 20.0), st.booleans())
def test_nll_is_convex_and_its_derivatives_fit_it(seed: int, classes: int, beta: float, soft: bool) -> None:
    torch.manual_seed(seed)
    logits = 2 * torch.randn(30, classes)
    labels = torch.rand(30, classes).softmax(1) if soft else torch.randint(classes, (30,))
    step = 1e-2 * beta
    below, here, above = (F.temperature_nll(logits, labels, beta + k * step) for k in (-1, 0, 1))
    assert here.second >= -1e-6
    assert below.first <= here.first + 1e-6
    assert here.first <= above.first + 1e-6
    assert float(above.nll - below.nll) == pytest.approx(2 * step * float(here.first), rel=1e-2, abs=1e-5)
    assert float(above.first - below.first) == pytest.approx(2 * step * float(here.second), rel=1e-2, abs=1e-5)


# --- from hidden states


def head(n: int, d: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, d), torch.randn(v, d), torch.randn(v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("temperature", [0.5, 1.3, 4.0])
def test_linear_fit_is_the_fit_of_the_logits(backend: str, softcap: float | None, temperature: float) -> None:
    hidden, weight, bias = head(900, 6, 1500)
    logits = 0.7 * (hidden.double() @ weight.double().T + bias.double())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    labels = labels_at(logits, temperature)
    expected = F.fit_temperature(logits, labels)
    with pyqe.use_backend(backend):
        fit = F.linear_fit_temperature(
            hidden.reshape(30, 30, 6),
            weight,
            labels.reshape(30, 30),
            bias,
            logit_scale=0.7,
            logit_softcap=softcap,
        )
    assert fit.converged
    assert fit.temperature == pytest.approx(expected.temperature, rel=1e-6)
    assert fit.nll == pytest.approx(expected.nll, rel=1e-6)
    assert fit.nll_before == pytest.approx(expected.nll_before, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 2.5])
def test_linear_fit_recovers_the_temperature_of_the_data(dtype: torch.dtype, temperature: float) -> None:
    hidden, weight = (tensor.to(dtype) for tensor in head(5000, 8, 1100)[:2])
    labels = labels_at(hidden.double() @ weight.double().T, temperature)
    fit = F.linear_fit_temperature(hidden, weight, labels)
    assert fit.temperature == pytest.approx(temperature, rel=0.03)


def test_linear_fit_counts_bad_rows() -> None:
    hidden, weight, bias = head(100, 4, 50)
    labels = torch.arange(100) % 49
    hidden[17], labels[60], bias[30] = torch.nan, -1, -torch.inf  # rows 30 and 79 have the label 30
    with pytest.raises(ValueError, match=r"hidden, labels: .* got 4 of 100 rows .* first is row 17"):
        F.linear_fit_temperature(hidden, weight, labels, bias)


def test_linear_fit_of_bad_arguments() -> None:
    hidden, weight, _ = head(3, 4, 5)
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="hidden: expected one row or more, got shape"):
        F.linear_fit_temperature(hidden[:0], weight, labels[:0])
    for bad in (labels[:2], labels.int(), torch.full((3, 5), 0.2)):
        with pytest.raises(ValueError, match=r"labels: expected int64 \[3\], got"):
            F.linear_fit_temperature(hidden, weight, bad)
    with pytest.raises(IndexError, match=r"labels\[1\].*got 5"):
        F.linear_fit_temperature(hidden, weight, torch.tensor([0, 5, 0]))


# --- no optimum


def test_separable_data_ends_at_the_lowest_temperature() -> None:
    logits = normal(50, 4)
    fit = F.fit_temperature(logits, logits.argmax(1))
    assert not fit.converged
    assert fit.temperature == pytest.approx(1e-3)
    assert fit.nll == pytest.approx(0, abs=1e-3)


def test_logits_that_mislead_end_at_the_highest_temperature() -> None:
    logits = normal(50, 4)
    fit = F.fit_temperature(logits, logits.argmin(1))
    assert not fit.converged
    assert fit.temperature == pytest.approx(1e3)
    assert fit.nll == pytest.approx(math.log(4), abs=0.02)


def test_optimum_beyond_the_range() -> None:
    logits = 2e4 * normal(2000, 4)
    assert not F.fit_temperature(logits, labels_at(logits, 2e4)).converged
    logits = 1e-4 * normal(2000, 4)
    assert not F.fit_temperature(logits, labels_at(logits, 1e-4)).converged


@pytest.mark.parametrize("logits", [[[0.0, 0.0, 0.0]], [[200.0, 0.0, 0.0]], [[5.0]]])
def test_constant_likelihood_leaves_the_temperature_alone(logits: list[list[float]]) -> None:
    tensor = torch.tensor(logits)
    fit = F.fit_temperature(tensor, torch.zeros(1, dtype=torch.int64))
    assert (fit.temperature, fit.converged) == (1.0, False)
    assert fit.nll == fit.nll_before


def test_single_row() -> None:
    logits = torch.tensor([2.0, 0.0])
    assert F.fit_temperature(logits[None], torch.tensor([[0.75, 0.25]])).temperature == pytest.approx(
        2 / math.log(3), rel=1e-6
    )
    assert F.fit_temperature(logits, torch.tensor(0)).temperature == pytest.approx(1e-3)
    assert F.fit_temperature(logits, torch.tensor(1)).temperature == pytest.approx(1e3)


def test_an_optimum_that_rounding_blurs_is_found() -> None:
    logits = 1e-3 * torch.randn(40, 300)
    fit = F.fit_temperature(logits, torch.softmax(logits.double() / 30, 1))
    assert fit.converged
    assert fit.temperature == pytest.approx(30, rel=0.01)

    def jump(beta: float) -> _Point:
        return _Point(beta, nll=1.0, first=1e-4 if beta > 0.3 else -1e-4, second=1.0)

    beta, nll, converged = _minimise(jump, jump(1.0))
    assert converged
    assert beta == pytest.approx(0.3, rel=1e-5)
    assert nll == 1.0


def test_masked_classes_do_not_matter() -> None:
    logits = normal(500, 6)
    labels = labels_at(logits[:, :5], 1.5)
    expected = F.fit_temperature(logits[:, :5], labels).temperature
    logits[:, 5] = -torch.inf
    assert F.fit_temperature(logits, labels).temperature == pytest.approx(expected, rel=1e-7)


# --- bad data


def test_bad_rows_are_counted() -> None:
    logits, labels = normal(100, 4), torch.zeros(100, dtype=torch.int64)
    logits[17, 2], logits[40, 0], logits[41], labels[60] = torch.nan, torch.inf, -torch.inf, -1
    logits[80, 0] = -torch.inf  # its label has probability 0
    with pytest.raises(ValueError, match=r"got 5 of 100 rows .* first is row 17"):
        F.fit_temperature(logits, labels)
    soft = torch.full((100, 4), 0.25)
    soft[80] = torch.tensor([0.0, 0.5, 0.25, 0.25])  # does not need the class of probability 0
    with pytest.raises(ValueError, match=r"got 3 of 100 rows .* first is row 17"):
        F.fit_temperature(logits, soft)


def test_bad_arguments() -> None:
    logits, labels = normal(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="one row or more, got shape"):
        F.fit_temperature(logits[:0], labels[:0])
    with pytest.raises(ValueError, match="labels: expected int64"):
        F.fit_temperature(logits, labels[:2])
    with pytest.raises(IndexError, match=r"labels\[1\].*got 4"):
        F.fit_temperature(logits, torch.tensor([0, 4, 0]))
    with pytest.raises(TypeError, match="logits"):
        F.fit_temperature(logits.int(), labels)
    for bad in ([0.5, 0.5, 0.5, 0.5], [-0.5, 0.5, 0.5, 0.5], [torch.nan, 0.5, 0.5, 0.0]):
        soft = torch.full((3, 4), 0.25)
        soft[2] = torch.tensor(bad)
        with pytest.raises(ValueError, match=r"labels: expected probabilities that sum to 1, got .* in row 2"):
            F.fit_temperature(logits, soft)


def test_same_bits_for_any_number_of_threads() -> None:
    logits = normal(60_000, 5)
    labels = labels_at(logits, 1.5)
    threads = torch.get_num_threads()
    fits = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            fits.append(F.fit_temperature(logits, labels))
    finally:
        torch.set_num_threads(threads)
    assert fits[0] == fits[1] == fits[2]
