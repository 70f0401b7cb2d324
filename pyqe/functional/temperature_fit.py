"""The temperature of maximum likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyqe.backends.reference import compute_dtype
from pyqe.functional._arguments import class_labels, head_matrix, logit_matrix, number_like, row_labels
from pyqe.functional._sharded import operator
from pyqe.functional.results import TemperatureFit
from pyqe.functional.softmax import linear_softmax_stats

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
_TOLERANCE = 1e-5  # of a step in log T that is the last one: the error it leaves is about its square
_PATIENCE, _BISECTION = 8, 20  # evaluations after which to look at the end of the range, and to give up Newton's steps
_MAX_EVALUATIONS = 60
_MASS_TOLERANCE = 1e-2  # bfloat16 probabilities of 1000 classes sum to 1 that closely


@dataclass(frozen=True)
class _Point:
    """The mean NLL at an inverse temperature, with its derivatives."""

    beta: float
    nll: float
    first: float
    second: float

    @property
    def step(self) -> float:
        r"""Change of log beta to the optimum, infinite where that is anybody's guess; NaN where the NLL is constant.

        Newton's, in :math:`\beta`, for :math:`\beta L'(\beta) = 0`. This is nearly linear: the mean distance of the
        logits from their maximum is about proportional to the temperature while many classes compete, as the energy of
        a system with many states is.
        """
        curvature = self.beta * self.second
        slope = self.first + curvature
        if curvature > 0 and slope > 0:
            return math.log(curvature / slope)
        return -math.inf * self.first

    def nll_after(self, step: float) -> float:
        change = self.beta * math.expm1(step)
        return self.nll + change * (self.first + change * self.second / 2)


def _minimise(evaluate: Callable[[float], _Point], point: _Point) -> tuple[float, float, bool]:
    """Inverse temperature and NLL of the optimum; and whether it is one, rather than an end of the range.

    Newton's steps inside a bracket. Its ends are those of the range to begin with: the one ahead is evaluated when a
    step leaves the range, or when the steps creep, as they do where no finite temperature is best.
    """
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    untried = {low, high}
    for count in range(1, _MAX_EVALUATIONS):
        step = point.step
        if math.isnan(step):
            break
        if abs(step) < _TOLERANCE:
            return point.beta * math.exp(step), point.nll_after(step), True
        rising = point.first < 0
        low, high = (point.beta, high) if rising else (low, point.beta)
        if high < low * (1 + _TOLERANCE):  # where rounding outweighs the slope
            return point.beta, point.nll, True
        ahead = high if rising else low
        beta = point.beta * math.exp(step)
        inside = low < beta < high
        if ahead in untried and (count == _PATIENCE or not inside):
            untried.remove(ahead)
            end = evaluate(ahead)
            if end.first == 0 or (end.first < 0) == rising:
                return ahead, end.nll, False
        point = evaluate(beta if inside and count < _BISECTION else math.sqrt(low * high))
    return point.beta, point.nll, False


def _check_distributions(labels: Tensor) -> None:
    bad = ~((labels.sum(1) - 1).abs() <= _MASS_TOLERANCE) | (labels < 0).any(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"labels: expected probabilities that sum to 1, got {labels[row].tolist()} in row {row}")


def _infinite_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows [N] whose NLL is not finite, bool."""
    bad = ~logits.amax(1).isfinite()
    if labels.dim() == 2:
        return bad | ((labels > 0) & logits.isneginf()).any(1)
    label_logits = logits.gather(1, labels.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return bad | label_logits.isneginf() | (labels < 0) | (labels >= logits.shape[1])


def _fit(
    nll: Callable[[Tensor], tuple[Tensor, ...]], infinite_rows: Callable[[], Tensor], like: Tensor, names: str
) -> TemperatureFit:
    """The fit, given the NLL with its derivatives at an inverse temperature, float64 on the device of ``like``."""

    def evaluate(beta: float) -> _Point:
        return _Point(beta, *torch.stack(nll(number_like(beta, like, torch.float64))).tolist())

    start = evaluate(1.0)
    if not math.isfinite(start.nll):
        bad = infinite_rows()
        raise ValueError(
            f"{names}: expected rows with a finite NLL, got {int(bad.sum())} of {len(bad)} rows with a logit of "
            f"NaN or +inf, or a label of -1 or of probability 0; the first is row {int(bad.int().argmax())}"
        )
    beta, least, converged = _minimise(evaluate, start)
    return TemperatureFit(1 / beta, least, start.nll, converged)


def fit_temperature(logits: Tensor, labels: Tensor) -> TemperatureFit:
    r"""The temperature T in [0.001, 1000] that minimises the mean NLL of :math:`\mathrm{softmax}(z / T)`.

    Args:
        logits: [..., C]; :func:`inverse_softmax` makes them from probabilities. float64 is slower than the others, and
            no more exact than what T is good for.
        labels: int64 [...], or probabilities [..., C] (soft labels).

    Raises:
        TypeError, ValueError: wrong dtype or shape, no rows, soft labels that do not sum to 1, or rows whose NLL is not
            finite: a logit that is NaN or +inf, a label of -1, a label whose logit is -inf.
        IndexError: a label out of range (CPU).

    Source: Guo et al. 2017 (arXiv 1706.04599), with Newton's method in 1/T in place of L-BFGS.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> fit = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))  # 3 of 4 are right, so p should be 3/4
        >>> round(fit.temperature, 4), torch.softmax(logits[0] / fit.temperature, 0)
        (1.8205, tensor([0.7500, 0.2500]))
    """
    matrix, labels = logit_matrix(logits), class_labels(labels, logits)
    if len(matrix) == 0:
        raise ValueError(f"logits: expected one row or more, got shape {tuple(logits.shape)}")
    if labels.is_floating_point():
        labels = labels.to(compute_dtype(matrix))
        _check_distributions(labels)
    return _fit(
        lambda beta: torch.ops.pyqe.temperature_nll(matrix, labels, beta),
        lambda: _infinite_rows(matrix, labels),
        matrix,
        "logits, labels",
    )


def linear_fit_temperature(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> TemperatureFit:
    """The same for the logits of a head, without keeping them; see :func:`fit_temperature`.

    Every evaluation of the NLL computes the logits anew. Where they fit into memory, keeping them and calling
    :func:`fit_temperature` is faster.

    Args:
        hidden: [..., D].
        weight: [V, D] of the LM's head.
        labels: int64 [...].
        bias, logit_scale, logit_softcap: of the LM's head, as in :func:`linear_softmax_stats`.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, no rows, or rows whose NLL is not finite, as in
            :func:`fit_temperature`.
        IndexError: a label out of range (CPU).

    Example:
        >>> hidden, weight = torch.ones(4, 1), torch.tensor([[2.0], [0.0]])
        >>> round(linear_fit_temperature(hidden, weight, torch.tensor([0, 0, 0, 1])).temperature, 4)
        1.8205
    """
    rows = hidden.shape[:-1]
    matrix, labels = head_matrix(hidden, weight, bias), row_labels(labels, rows)
    if len(matrix) == 0:
        raise ValueError(f"hidden: expected one row or more, got shape {tuple(hidden.shape)}")

    def infinite_rows() -> Tensor:
        stats = linear_softmax_stats(
            matrix, weight, bias, token_ids=labels, logit_scale=logit_scale, logit_softcap=logit_softcap
        )
        assert stats.token_logit is not None
        return ~stats.token_logit.isfinite()

    return _fit(
        lambda beta: operator("linear_temperature_nll", weight)(
            matrix, weight, bias, logit_scale, logit_softcap, labels, beta
        ),
        infinite_rows,
        matrix,
        "hidden, labels",
    )
