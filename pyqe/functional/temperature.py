"""Inverse softmax and temperature."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pyqe.functional._arguments import check_floats, class_labels, head_matrix, logit_matrix, number_like, row_labels
from pyqe.functional._sharded import operator
from pyqe.functional.results import TemperatureNLL


def inverse_softmax(
    probs: Tensor, *, eps: float = 1e-12, center: Literal["none", "mean", "logsumexp"] = "none"
) -> Tensor:
    r"""Logits from probabilities: :math:`z_i = \log \max(p_i, \epsilon) - c`. Differentiable.

    Args:
        probs: [..., C], non-negative; need not sum to 1.
        eps: floor for zeros, >= 0. A real hyper-parameter where a model states zeros: report it.
        center: c is 0 ("none"), the mean of the logs ("mean"), or their logsumexp ("logsumexp": the result are the
            log-probabilities of the renormalised vector). softmax is the same for all three.

    Returns:
        [..., C], float32 or float64; NaN for a row with a negative or NaN entry, or without a finite c.

    Raises:
        TypeError, ValueError: wrong dtype, shape or range.

    Source: Wang et al. 2024 (arXiv 2410.06707).

    Example:
        >>> torch.softmax(inverse_softmax(torch.tensor([0.7, 0.2, 0.1])) / 2, -1)
        tensor([0.5229, 0.2795, 0.1976])
    """
    check_floats(probs=probs)
    if probs.dim() < 1 or probs.shape[-1] == 0:
        raise ValueError(f"probs: expected [..., C] with C > 0, got shape {tuple(probs.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps: expected 0 or more, got {eps}")
    if center not in ("none", "mean", "logsumexp"):
        raise ValueError(f"center: expected 'none', 'mean' or 'logsumexp', got {center!r}")
    logits: Tensor = torch.ops.pyqe.inverse_softmax(probs.reshape(-1, probs.shape[-1]), eps, center)
    return logits.reshape(probs.shape)


def temperature_scale(probs: Tensor, temperature: Tensor | float, *, eps: float = 1e-12) -> Tensor:
    r"""Probabilities at another temperature: :math:`p_i^{1/T} / \sum_j p_j^{1/T}`. Differentiable.

    Args:
        probs: [..., C], non-negative.
        temperature: T > 0, a number or a tensor that broadcasts to [..., 1].
        eps: floor for zeros; see :func:`inverse_softmax`.

    Returns:
        [..., C], rows that sum to 1.

    Source: Wang et al. 2024 (arXiv 2410.06707).

    Example:
        >>> temperature_scale(torch.tensor([0.7, 0.2, 0.1]), 0.5)
        tensor([0.9074, 0.0741, 0.0185])
    """
    if bool((torch.as_tensor(temperature) <= 0).any()):
        raise ValueError(f"temperature: expected positive numbers, got {temperature}")
    return torch.softmax(inverse_softmax(probs, eps=eps) / temperature, -1)


def _inverse_temperature(beta: Tensor | float, like: Tensor) -> Tensor:
    """beta in float64; a tensor without dimensions may stay on the CPU."""
    if isinstance(beta, Tensor) and beta.dim() == 0:
        return beta.double()
    return number_like(beta, like, torch.float64)


def temperature_nll(logits: Tensor, labels: Tensor, beta: Tensor | float = 1.0) -> TemperatureNLL:
    r"""Mean NLL of :math:`\mathrm{softmax}(\beta z)` and its first two derivatives in :math:`\beta = 1/T`, in one pass.

    One row with NaN makes all three NaN; mask such rows before.

    Args:
        logits: [..., C].
        labels: int64 [...], or probabilities [..., C] (soft labels).
        beta: inverse temperature.

    Raises:
        TypeError, ValueError: wrong dtype or shape.
        IndexError: a label out of range (CPU).

    Example:
        >>> temperature_nll(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).nll
        tensor(0.6931, dtype=torch.float64)
    """
    matrix, labels = logit_matrix(logits), class_labels(labels, logits)
    return TemperatureNLL(*torch.ops.pyqe.temperature_nll(matrix, labels, _inverse_temperature(beta, matrix)))


def linear_temperature_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    beta: Tensor | float = 1.0,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> TemperatureNLL:
    r"""The same for the logits z of a head, without keeping them; see :func:`temperature_nll`. Not differentiable.

    Args:
        hidden: [..., D].
        weight: [V, D] of the LM's head.
        labels: int64 [...]; -1 makes the NLL NaN.
        beta: inverse temperature of the logits as the model has them, after ``logit_scale`` and ``logit_softcap``.
        bias, logit_scale, logit_softcap: of the LM's head, as in :func:`linear_softmax_stats`.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
        IndexError: a label outside [0, V) other than -1 (CPU).

    Example:
        >>> hidden, weight = torch.zeros(3, 2), torch.randn(5, 2)  # uniform over five tokens
        >>> linear_temperature_nll(hidden, weight, torch.tensor([0, 4, 2]), 0.5).nll.exp()
        tensor(5.0000, dtype=torch.float64)
    """
    matrix, labels = head_matrix(hidden, weight, bias), row_labels(labels, hidden.shape[:-1])
    options = (logit_scale, logit_softcap, labels, _inverse_temperature(beta, matrix))
    return TemperatureNLL(*operator("linear_temperature_nll", weight)(matrix, weight, bias, *options))
