"""A scale and a shift for each class."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from pyqe._arrays import Floats, Inputs
from pyqe.calibration._inputs import Table, float_tensor, is_single, label_tensor
from pyqe.calibration.base import Calibrator, count, like, number, numbers

_ITERATIONS = 30  # of which a problem that has an optimum needs about ten
_DESCENT, _CHANGE = 1e-13, 1e-3  # of the NLL and the largest of a log-probability in Newton's last step


class VectorScaling(Calibrator):
    r"""Scale and shift of each class's logit, :math:`\mathrm{softmax}(w \odot z + b)`, of maximum likelihood.

    With 2K parameters it needs many labels for each class; it can change the top class.

    Args:
        inputs: "probs": X are probabilities, whose softmax is inverted with the floor ``eps``. "logits": X are logits.
            Unlike for a temperature, it matters which: adding a number to all logits of a row changes the result.
        eps: floor for probabilities; see :class:`TemperatureScaling`.

    Attributes:
        scale_: float64 [K], w.
        shift_: float64 [K], b, with mean 0.
        nll_before_: mean negative log-likelihood at w = 1, b = 0, in nats.
        nll_: the same at the optimum.
        eps_: the floor that was used; 0 for logits.
        n_features_in_: K.

    ``ConvergenceWarning``: no finite w and b are best, as where the classes can be told apart without an error.

    Source: Guo et al. 2017 (arXiv 1706.04599). The problem is convex: Newton's method, in float64.

    Example:
        >>> stated = [[0.8, 0.2]] * 10 + [[0.4, 0.6]] * 10
        >>> labels = [0] * 9 + [1] + [0] * 7 + [1] * 3
        >>> VectorScaling(inputs="probs").fit(stated, labels).transform([[0.8, 0.2], [0.4, 0.6]]).round(3)
        array([[0.9, 0.1],
               [0.7, 0.3]])
    """

    _learned: ClassVar = {
        "scale_": numbers,
        "shift_": numbers,
        "nll_before_": number,
        "nll_": number,
        "eps_": number,
        "n_features_in_": count,
    }

    def __init__(self, *, inputs: Inputs, eps: float | None = None) -> None:
        self.inputs = inputs
        self.eps = eps

    def fit(self, X: Any, y: Any) -> VectorScaling:
        """Learn w and b.

        Args:
            X: [N, K], K > 1, probabilities or logits.
            y: [N], class numbers; or [N, K], soft labels, rows that sum to 1.

        Raises:
            TypeError: not numbers.
            ValueError: wrong shape or range, no rows, NaN or infinite logits, or a class without a label, whose shift
                would be -inf.
        """
        table = self._table(X)
        eps = table.floor(self.eps)
        logits = _finite_logits(table, eps)
        targets = _targets(y, logits)
        self.scale_, self.shift_, self.nll_before_, self.nll_ = _newton(logits, targets)
        self.eps_ = eps
        self.n_features_in_ = logits.shape[1]
        return self

    def transform(self, X: Any) -> Any:
        """Calibrated probabilities.

        Args:
            X: [N, K].

        Returns:
            [N, K], of the kind and float dtype of ``X``; float64 for integers and lists. Not differentiable.

        Raises:
            sklearn.exceptions.NotFittedError: ``fit`` comes first.
            TypeError: not numbers.
            ValueError: wrong shape or range, NaN or infinite logits, another number of classes than in ``fit``.
        """
        check_is_fitted(self)
        logits = _finite_logits(self._table(X), self.eps_)
        if logits.shape[1] != self.n_features_in_:
            raise ValueError(f"X: expected {self.n_features_in_} classes, as in fit, got {logits.shape[1]}")
        return like(np.exp(log_softmax(self.scale_ * logits + self.shift_, axis=1)), X)

    def predict_proba(self, X: Any) -> Any:
        """As :meth:`transform`."""
        return self.transform(X)

    def _table(self, X: Any) -> Table:
        values = float_tensor(X, "X").detach()
        if values.dim() != 2 or is_single(values):
            raise ValueError(f"X: expected shape [N, K] with K > 1, got {list(values.shape)}")
        return Table.read(values.double(), "X", self.inputs)


def _finite_logits(table: Table, eps: float) -> Floats:
    logits = table.logits(eps).cpu().numpy()
    infinite = ~np.isfinite(logits).all(axis=1)
    if infinite.any():
        row = int(infinite.argmax())
        raise ValueError(f"X: expected finite logits, got {logits[row].tolist()} in row {row}")
    return logits


def _targets(y: Any, logits: Floats) -> Floats:
    """Soft labels [N, K]."""
    if len(logits) == 0:
        raise ValueError("X: expected one row or more, got none")
    labels = label_tensor(y, torch.from_numpy(logits))
    targets = labels.double() if labels.dim() == 2 else torch.nn.functional.one_hot(labels, logits.shape[1]).double()
    missing = (targets.sum(0) <= 0).nonzero()[:, 0].tolist()
    if missing:
        raise ValueError(f"y: expected every class among the labels, got none of class {missing[0]}")
    return targets.numpy()


def _newton(logits: Floats, targets: Floats) -> tuple[Floats, Floats, float, float]:
    """Scale and shift of the optimum, and the NLL at the start and there."""
    scale, shift = np.ones(logits.shape[1]), np.zeros(logits.shape[1])
    logprobs = log_softmax(logits, axis=1)
    before = nll = _nll(logprobs, targets)
    for _ in range(_ITERATIONS):
        step_scale, step_shift, descent = _newton_step(logits, targets, logprobs)
        for length in 0.5 ** np.arange(40):
            ahead = log_softmax((scale + length * step_scale) * logits + shift + length * step_shift, axis=1)
            if _nll(ahead, targets) <= nll - 1e-4 * length * descent:
                break
        else:  # rounding outweighs what is left to descend
            length, ahead = 0.0, logprobs
        scale, shift = scale + length * step_scale, shift + length * step_shift
        change = np.abs(ahead - logprobs).max()
        logprobs, nll = ahead, _nll(ahead, targets)
        # Where no optimum is finite, the NLL has soon next to nothing left to fall, and probabilities change as ever
        if descent < _DESCENT and change < _CHANGE:
            break
    else:
        warnings.warn(
            "no finite scales and shifts are best, as where classes can be told apart without an error; "
            f"they are left where {_ITERATIONS} of Newton's steps end",
            ConvergenceWarning,
            stacklevel=3,
        )
    return scale, shift - shift.mean(), before, nll


def _nll(logprobs: Floats, targets: Floats) -> float:
    return float(-(targets * logprobs).sum() / len(targets))


def _newton_step(logits: Floats, targets: Floats, logprobs: Floats) -> tuple[Floats, Floats, float]:
    r"""Newton's step of scale and shift, and how steep the NLL falls along it.

    With :math:`u = (z, 1)` for each class, the gradient is the mean of :math:`(p - y) u` and the Hessian that of
    :math:`\mathrm{diag}(p\,u u^T) - (p u)(p u)^T`. It is singular along equal shifts of all classes, and nearly so
    where a class is never in doubt: a small multiple of its trace is added.
    """
    rows, classes = logits.shape
    probs = np.exp(logprobs)
    weighted = np.concatenate([probs * logits, probs], axis=1)
    gradient = np.concatenate([((probs - targets) * logits).sum(0), (probs - targets).sum(0)]) / rows
    square, cross, mass = (probs * logits**2).sum(0), (probs * logits).sum(0), probs.sum(0)
    hessian = np.block([[np.diag(square), np.diag(cross)], [np.diag(cross), np.diag(mass)]])
    hessian = (hessian - weighted.T @ weighted) / rows
    hessian[np.diag_indices(2 * classes)] += 1e-12 * max(np.trace(hessian), np.finfo(float).tiny)
    step = -np.linalg.solve(hessian, gradient)
    return step[:classes], step[classes:], float(-gradient @ step)
