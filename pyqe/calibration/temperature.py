r"""One temperature for all classes: :math:`\mathrm{softmax}(z / T)`.

Three ways to T: from labels, from another model's probabilities, or a constant. Each takes logits, or probabilities
whose softmax is inverted first: which of the two is said by ``inputs`` and never guessed, since ``softmax(p / T)``
looks like an answer and is none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from pyqe import functional as F
from pyqe._arrays import Inputs, group_names
from pyqe.backends.reference import compute_dtype
from pyqe.calibration._inputs import (
    FLOOR,
    Table,
    as_given,
    float_tensor,
    is_single,
    label_tensor,
    right_or_wrong,
)
from pyqe.calibration.base import Calibrator, by_group, count, flag, number, positive
from pyqe.functional import TemperatureFit


class _TemperatureCalibrator(Calibrator):
    """What the three share: reading inputs, dividing by T."""

    inputs: Inputs
    eps_: float

    def transform(self, X: Any, groups: Any = None) -> Any:
        """Probabilities at the learned temperature.

        Args:
            X: [N, K], or confidences [N] or [N, 1] (log odds if ``inputs`` is "logits").
            groups: [N], if there is a temperature for each group.

        Returns:
            Of the kind and shape of ``X``; float64 for float64, integers and lists, float32 for narrower floats;
            differentiable for a tensor.

        Raises:
            sklearn.exceptions.NotFittedError: ``fit`` comes first.
            TypeError: not numbers.
            ValueError: wrong shape or range, NaN, another number of classes than in ``fit``, an unknown group.
        """
        probs, values = self._scaled(X, groups), float_tensor(X, "X")
        return as_given(probs[:, 1].reshape(values.shape) if is_single(values) else probs, X)

    def predict_proba(self, X: Any, groups: Any = None) -> Any:
        """[N, K], or for confidences [N] the probabilities [N, 2] of being wrong and right; see :meth:`transform`."""
        return as_given(self._scaled(X, groups), X)

    def _scaled(self, X: Any, groups: Any) -> Tensor:
        check_is_fitted(self)
        values = float_tensor(X, "X")
        logits = Table.read(values, "X", self.inputs).logits(self.eps_)
        expected = getattr(self, "n_features_in_", logits.shape[1])
        if logits.shape[1] != expected:
            raise ValueError(f"X: expected {expected} classes, as in fit, got {logits.shape[1]}")
        probs = torch.softmax(logits / self._row_temperatures(logits, groups), -1)
        if bool(probs.detach().sum().isnan()):
            row = int(probs.detach().isnan().any(1).int().argmax())
            raise ValueError(f"X: expected finite {self.inputs}, got {values[row].tolist()} in row {row}")
        return probs.to(compute_dtype(values))

    def _row_temperatures(self, logits: Tensor, groups: Any) -> Tensor | float:
        """T, or [N, 1]."""
        temperature: Any = self.temperature_
        if not isinstance(temperature, dict):
            if groups is not None:
                raise ValueError("groups: expected None, as in fit")
            return float(temperature)
        if groups is None:
            raise ValueError("groups: expected a group for every row, as in fit")
        names, numbers = group_names(groups, "groups", length=len(logits))
        unknown = [name for name in names.tolist() if name not in temperature]
        if unknown:
            raise ValueError(f"groups: expected those of fit, got {unknown[0]!r}")
        of_group = np.array([temperature[name] for name in names.tolist()], dtype=np.float64)
        return torch.from_numpy(of_group[numbers]).to(logits)[:, None]

    def _fit_groups(
        self, fit: Callable[[Tensor, Tensor, str], dict[str, Any]], logits: Tensor, labels: Tensor, groups: Any
    ) -> None:
        """Set the learned attributes to what ``fit`` returns for all rows, or to dicts of that by group.

        Args:
            fit: of logits [n, K], labels, and words that say of which group.
            logits: [N, K].
            labels: [N, ...].
            groups: [N] or None.
        """
        if len(logits) == 0:
            raise ValueError("X: expected one row or more, got none")
        if groups is None:
            learned = fit(logits, labels, "")
        else:
            names, numbers = group_names(groups, "groups", length=len(logits))
            order = np.argsort(numbers, kind="stable")
            rows = np.split(order, np.cumsum(np.bincount(numbers, minlength=len(names)))[:-1])
            fits = {}
            for name, index in zip(names.tolist(), map(torch.from_numpy, rows), strict=True):
                index = index.to(logits.device)
                fits[name] = fit(logits[index], labels[index], f" in group {name!r}")
            learned = {key: {name: result[key] for name, result in fits.items()} for key in next(iter(fits.values()))}
        for key, value in learned.items():
            setattr(self, key, value)
        self.n_features_in_ = logits.shape[1]


class TemperatureScaling(_TemperatureCalibrator):
    """The temperature of maximum likelihood on labelled data.

    The top class stays the same; without groups, so does the ranking by confidence where K = 2.

    Args:
        inputs: "probs": X are probabilities, such as those that a model states, and their softmax is inverted with the
            floor ``eps``; they need not sum to 1. "logits": X are logits.
        eps: floor for probabilities. With zeros it is a real hyper-parameter, as a zero then says ``p = eps``: report
            it, or choose it on held-out data. None: 1e-12, or the smallest probability above 0 if that is less.

    Attributes:
        temperature_: T in [0.001, 1000]; with groups a dict of one for each.
        nll_before_: mean negative log-likelihood at T = 1, in nats; with groups a dict.
        nll_: the same at T.
        eps_: the floor that was used; 0 for logits.
        converged_: bool, or a dict of bools: whether T is an optimum. Where none is, ``ConvergenceWarning`` says why:
            every label has the largest logit of its row (T runs to 0); the logits mislead (T runs to infinity); or the
            likelihood does not depend on T, which stays 1.
        n_features_in_: K.

    Source: Guo et al. 2017 (arXiv 1706.04599); for stated probabilities Wang et al. 2024 (arXiv 2410.06707). Newton's
    method of :func:`pyqe.functional.fit_temperature`.

    Example:
        >>> stated = [[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]]
        >>> scaling = TemperatureScaling(inputs="probs").fit(stated, [0, 0, 1, 1])
        >>> round(scaling.temperature_, 3), scaling.transform([[0.9, 0.1]]).round(3)
        (2.0, array([[0.75, 0.25]]))
    """

    _learned: ClassVar = {
        "temperature_": by_group(positive),
        "nll_before_": by_group(number),
        "nll_": by_group(number),
        "converged_": by_group(flag),
        "eps_": number,
        "n_features_in_": count,
    }

    def __init__(self, *, inputs: Inputs, eps: float | None = None) -> None:
        self.inputs = inputs
        self.eps = eps

    def fit(self, X: Any, y: Any, groups: Any = None) -> TemperatureScaling:
        """Learn T.

        Args:
            X: [N, K] probabilities or logits; or [N] or [N, 1]: single confidences (log odds if ``inputs`` is
                "logits"), taken as probabilities of the two classes wrong and right.
            y: [N], class numbers; or [N, K], soft labels, rows that sum to 1. For single confidences [N] in [0, 1]:
                whether the answer was right.
            groups: [N], strings or numbers: a temperature of its own for each.

        Raises:
            TypeError: not numbers.
            ValueError: wrong shape or range, no rows, NaN, or a label whose logit is -inf (with ``eps`` = 0: whose
                probability is 0).
        """
        values = float_tensor(X, "X").detach()
        table = Table.read(values, "X", self.inputs)
        eps = table.floor(self.eps)
        logits = table.logits(eps)
        labels = right_or_wrong(y, logits) if is_single(values) else label_tensor(y, logits)
        self._fit_groups(_fit_labels, logits, labels, groups)
        self.eps_ = eps
        return self


class DistilledTemperature(_TemperatureCalibrator):
    r"""The temperature at which an aligned model agrees with its base model, without labels.

    :math:`\arg\min_T \sum \mathrm{KL}(p_{base} \,\|\, \mathrm{softmax}(z_{aligned} / T))` over the items of one task.
    The base model's probabilities should be those under the same in-context prompt.

    Args:
        inputs: what X, the aligned model's numbers, are: "probs" or "logits".
        teacher_inputs: what ``teacher``, the base model's numbers, are.
        agreement_only: only items whose top class is the same for both. On the others the base model's
            uncertainty is about another answer, and T comes out too high.
        eps: floor for probabilities, of both; see :class:`TemperatureScaling`.

    Attributes:
        temperature_: T in [0.001, 1000]; with groups a dict of one for each.
        kl_before_: mean KL divergence at T = 1 of the items used, in nats; with groups a dict.
        kl_: the same at T.
        agreement_: share of the items with the same top class, in [0, 1]; with groups a dict.
        eps_: the floor that was used for X; 0 for logits.
        converged_: whether T is an optimum; see :class:`TemperatureScaling`.
        n_features_in_: K.

    Source: He et al. 2023 (arXiv 2310.11732); agreement: Luo et al. 2025, DACA (arXiv 2505.16690).

    Example:
        >>> aligned, base = [[4.0, 0.0, 0.0], [0.0, 6.0, 0.0]], [[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]
        >>> distilled = DistilledTemperature(inputs="logits", teacher_inputs="logits", agreement_only=True)
        >>> round(distilled.fit(aligned, base).temperature_, 3)
        2.0
    """

    _learned: ClassVar = {
        "temperature_": by_group(positive),
        "kl_before_": by_group(number),
        "kl_": by_group(number),
        "agreement_": by_group(number),
        "converged_": by_group(flag),
        "eps_": number,
        "n_features_in_": count,
    }

    def __init__(
        self, *, inputs: Inputs, teacher_inputs: Inputs, agreement_only: bool = False, eps: float | None = None
    ) -> None:
        self.inputs = inputs
        self.teacher_inputs = teacher_inputs
        self.agreement_only = agreement_only
        self.eps = eps

    def fit(self, X: Any, teacher: Any, groups: Any = None) -> DistilledTemperature:
        """Learn T.

        Args:
            X: [N, K], the aligned model's probabilities or logits.
            teacher: [N, K], the base model's, of the same items in the same order.
            groups: [N], strings or numbers, such as the tasks: a temperature of its own for each.

        Raises:
            TypeError: not numbers.
            ValueError: wrong shape or range, no rows, NaN; with ``agreement_only`` no row in which the two agree.
        """
        values, base = float_tensor(X, "X").detach(), float_tensor(teacher, "teacher").detach()
        if values.dim() != 2 or values.shape != base.shape:
            raise ValueError(f"X, teacher: expected [N, K] for both, got {list(values.shape)} and {list(base.shape)}")
        table, base_table = Table.read(values, "X", self.inputs), Table.read(base, "teacher", self.teacher_inputs)
        eps = table.floor(self.eps)
        logits = table.logits(eps)
        target = torch.softmax(base_table.logits(base_table.floor(self.eps)), -1)
        self._fit_groups(self._fit_teacher, logits, target.to(logits), groups)
        self.eps_ = eps
        return self

    def _fit_teacher(self, logits: Tensor, target: Tensor, where: str) -> dict[str, Any]:
        agree = logits.argmax(1) == target.argmax(1)
        if self.agreement_only:
            if len(agree) and not bool(agree.any()):
                raise ValueError(f"X, teacher: expected rows with the same top class, got none of {len(agree)}{where}")
            logits, target = logits[agree], target[agree]
        fit = F.fit_temperature(_narrow(logits), target)
        _warn_unless_converged(fit, where)
        entropy = float(torch.special.entr(target.double()).sum(1).mean())
        return {
            "temperature_": fit.temperature,
            "kl_before_": fit.nll_before - entropy,
            "kl_": fit.nll - entropy,
            "agreement_": float(agree.double().mean()),
            "converged_": fit.converged,
        }


class ConstantTemperature(_TemperatureCalibrator):
    """A temperature that is given, not learned: 2.5 serves aligned models on the average, with no data at all.

    Args:
        temperature: T > 0.
        inputs: what X are: "probs" or "logits".
        eps: floor for probabilities.

    Source: the baseline of He et al. 2023 (arXiv 2310.11732).

    Example:
        >>> ConstantTemperature(2.5, inputs="probs").transform([0.99, 0.5]).round(3)
        array([0.863, 0.5  ])
    """

    _learned: ClassVar = {}

    def __init__(self, temperature: float = 2.5, *, inputs: Inputs, eps: float = FLOOR) -> None:
        self.temperature = temperature
        self.inputs = inputs
        self.eps = eps

    def fit(self, X: Any = None, y: Any = None) -> ConstantTemperature:
        """Does nothing; it is there for pipelines."""
        return self

    @property
    def temperature_(self) -> float:
        """T."""
        if isinstance(self.temperature, bool) or not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature!r}")
        return float(self.temperature)

    @property
    def eps_(self) -> float:  # type: ignore[override]
        """The floor."""
        return self.eps


def _fit_labels(logits: Tensor, labels: Tensor, where: str) -> dict[str, Any]:
    fit = F.fit_temperature(_narrow(logits), labels)
    _warn_unless_converged(fit, where)
    return {
        "temperature_": fit.temperature,
        "nll_before_": fit.nll_before,
        "nll_": fit.nll,
        "converged_": fit.converged,
    }


def _narrow(logits: Tensor) -> Tensor:
    """float64 as float32, for which there are kernels: 10 to 25 times faster, with the same T to nine digits."""
    if logits.dtype != torch.float64:
        return logits
    return (logits - logits.amax(1, keepdim=True)).float()  # so that large logits keep the digits of their differences


def _warn_unless_converged(fit: TemperatureFit, where: str) -> None:
    if fit.converged:
        return
    if fit.nll_before == fit.nll and fit.temperature == 1:
        reason = "the likelihood does not depend on it"
    elif fit.temperature < 1:
        reason = "the likelihood rises towards T = 0, as where every label has the largest logit of its row"
    else:
        reason = "the likelihood rises towards infinite T, as where the logits say less than nothing about the labels"
    warnings.warn(
        f"no temperature is best{where}: {reason}; T is left at {fit.temperature:g}", ConvergenceWarning, stacklevel=5
    )
