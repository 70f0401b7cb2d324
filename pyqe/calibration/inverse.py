"""Logits from probabilities, and probabilities at another temperature, of NumPy arrays and torch tensors."""

from __future__ import annotations

from typing import Any, Literal, overload

from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyqe import functional as F
from pyqe.backends.reference import compute_dtype
from pyqe.calibration._inputs import as_given, float_tensor

Center = Literal["none", "mean", "logsumexp"]


@overload
def inverse_softmax(probs: Tensor, *, eps: float = ..., center: Center = ...) -> Tensor: ...


@overload
def inverse_softmax(probs: ArrayLike, *, eps: float = ..., center: Center = ...) -> NDArray[Any]: ...


def inverse_softmax(probs: Any, *, eps: float = 1e-12, center: Center = "none") -> Any:
    r"""Logits from probabilities: :math:`z_i = \log \max(p_i, \epsilon) - c`.

    :func:`pyqe.functional.inverse_softmax` for array-likes as well.

    Args:
        probs: [..., K], non-negative; need not sum to 1.
        eps: floor for zeros, >= 0. A real hyper-parameter where a model states zeros: report it.
        center: c is 0 ("none"), the mean of the logs ("mean"), or their logsumexp ("logsumexp": the result are the
            log-probabilities of the renormalised vector). softmax is the same for all three.

    Returns:
        [..., K], a tensor (differentiable) for a tensor, else a NumPy array; float64 for float64, integers and lists,
        float32 for narrower floats. NaN for a row with a negative or NaN entry, or without a finite c.

    Raises:
        TypeError, ValueError: not numbers, or wrong shape or range.

    Source: Wang et al. 2024 (arXiv 2410.06707).

    Example:
        >>> inverse_softmax([0.5, 0.25, 0.25], center="logsumexp")
        array([-0.69314718, -1.38629436, -1.38629436])
    """
    return as_given(F.inverse_softmax(float_tensor(probs, "probs"), eps=eps, center=center), probs)


@overload
def temperature_scale(probs: Tensor, temperature: Any, *, eps: float = ...) -> Tensor: ...


@overload
def temperature_scale(probs: ArrayLike, temperature: Any, *, eps: float = ...) -> NDArray[Any]: ...


def temperature_scale(probs: Any, temperature: Any, *, eps: float = 1e-12) -> Any:
    r"""Probabilities at another temperature: :math:`p_i^{1/T} / \sum_j p_j^{1/T}`.

    :func:`pyqe.functional.temperature_scale` for array-likes as well.

    Args:
        probs: [..., K], non-negative; need not sum to 1.
        temperature: T > 0, a number or an array that broadcasts to [..., 1].
        eps: floor for zeros; see :func:`inverse_softmax`.

    Returns:
        [..., K], rows that sum to 1; of the kind that :func:`inverse_softmax` returns.

    Raises:
        TypeError, ValueError: not numbers, or wrong shape or range.

    Source: Wang et al. 2024 (arXiv 2410.06707).

    Example:
        >>> temperature_scale([0.7, 0.2, 0.1], 2.0).round(3)
        array([0.523, 0.279, 0.198])
    """
    tensor = float_tensor(probs, "probs")
    if not isinstance(temperature, int | float):
        temperature = float_tensor(temperature, "temperature").to(tensor.device, compute_dtype(tensor))
    return as_given(F.temperature_scale(tensor, temperature, eps=eps), probs)
