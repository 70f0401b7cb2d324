"""What all calibrators have in common: scikit-learn's interface, and a file of their own."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

import pyqe
from pyqe._arrays import Floats, as_array, vector
from pyqe._files import atomic_path

_FILE, _FILE_VERSION = "calibrator.json", 1

Self = TypeVar("Self", bound="Calibrator")
Decoder = Callable[[Any], Any]


class Calibrator(TransformerMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """An estimator after scikit-learn: ``fit``, ``transform``, ``predict_proba``, ``get_params``, ``clone``.

    Attributes that ``fit`` learns end in an underscore. :meth:`save_pretrained` keeps them and the parameters as JSON.
    """

    # How the file's form of each learned attribute is read; what is not here is not kept.
    _learned: ClassVar[Mapping[str, Decoder]]

    @abstractmethod
    def transform(self, X: Any) -> Any:
        """Calibrated numbers, of the kind and shape of ``X``."""

    @abstractmethod
    def predict_proba(self, X: Any) -> Any:
        """Calibrated probabilities [N, K], of the kind of ``X``; K = 2, wrong and right, for confidences [N]."""

    def __sklearn_is_fitted__(self) -> bool:
        """Whether everything was learned; a ``fit`` that failed half-way does not count."""
        return all(hasattr(self, name) for name in self._learned)

    # --- files

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``calibrator.json`` to a folder, which is made if missing. Numbers come back exactly.

        Raises:
            sklearn.exceptions.NotFittedError: there is nothing to keep yet.
            OSError: the folder cannot be written; a file that was there stays as it was.
            ValueError: a parameter or learned number is not finite.
        """
        check_is_fitted(self)
        document = {
            "version": _FILE_VERSION,
            "class": type(self).__name__,
            "pyqe_version": pyqe.__version__,
            "parameters": {name: _encoded(value) for name, value in self.get_params().items()},
            "learned": {name: _encoded(getattr(self, name)) for name in self._learned},
        }
        text = json.dumps(document, indent=1, allow_nan=False)
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        with atomic_path(path / _FILE) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls: type[Self], folder: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save_pretrained` wrote. Nothing is unpickled or run.

        Raises:
            FileNotFoundError: no ``calibrator.json`` there.
            ValueError: the file is damaged, from another version, or of a class that is unknown or not this one.

        Example:
            >>> import tempfile
            >>> from pyqe.calibration import ConstantTemperature
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     ConstantTemperature(1.5, inputs="logits").save_pretrained(folder)
            ...     ConstantTemperature.from_pretrained(folder)
            ConstantTemperature(inputs='logits', temperature=1.5)
        """
        path = Path(folder) / _FILE
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            found = _known_class(document)
            if not issubclass(found, cls):
                raise ValueError(f"expected a {cls.__name__}, got a {found.__name__}")  # noqa: TRY004
            parameters, learned = document["parameters"], document["learned"]
            for name, given, expected in (
                ("parameters", parameters, found._get_param_names()),
                ("learned", learned, list(found._learned)),
            ):
                if not isinstance(given, dict) or sorted(given) != sorted(expected):
                    raise ValueError(f"{name}: expected {', '.join(expected) or 'none'}, got {given!r:.200}")
            calibrator = found(**parameters)
            for name, decode in found._learned.items():
                setattr(calibrator, name, decode(learned[name]))
        except (KeyError, TypeError, ValueError) as error:  # damaged JSON is a ValueError
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}: {reason}") from error
        return calibrator


def load(folder: str | os.PathLike[str]) -> Calibrator:
    """The calibrator of whatever class that a folder keeps; see :meth:`Calibrator.from_pretrained`.

    Raises:
        FileNotFoundError: no ``calibrator.json`` there.
        ValueError: the file is damaged, from another version, or of an unknown class.
    """
    return Calibrator.from_pretrained(folder)


def _known_class(document: Any) -> type[Any]:
    from pyqe import calibration

    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object, got {type(document).__name__}")  # noqa: TRY004
    if document["version"] != _FILE_VERSION:
        raise ValueError(f"version: expected {_FILE_VERSION}, got {document['version']!r}; is it from a newer pyqe?")
    found = getattr(calibration, document["class"]) if document["class"] in calibration.__all__ else None
    if not (isinstance(found, type) and issubclass(found, Calibrator) and hasattr(found, "_learned")):
        raise ValueError(f"class: {document['class']!r} is none of pyqe's calibrators")
    return found


def _encoded(value: Any) -> Any:
    """What JSON can hold: arrays as lists with null for NaN, numbers by group as pairs."""
    if isinstance(value, np.ndarray):
        return [None if isinstance(item, float) and math.isnan(item) else item for item in value.tolist()]
    if isinstance(value, dict):
        return {"groups": [[group, item] for group, item in value.items()]}
    return value.item() if isinstance(value, np.generic) else value


# --- decoders of learned attributes


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {value!r:.80}")
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    return float(value)


def positive(value: Any) -> float:
    if not number(value) > 0:
        raise ValueError(f"expected a positive number, got {value!r}")
    return float(value)


def count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a count, got {value!r:.80}")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r:.80}")
    return value


def numbers(value: Any) -> Floats:
    """float64 [n]; null is NaN."""
    if not isinstance(value, list):
        raise TypeError(f"expected a list of numbers, got {value!r:.80}")
    return np.array([math.nan if item is None else number(item) for item in value], dtype=np.float64)


def by_group(decode: Decoder) -> Decoder:
    """A value for all rows, or a dict of one for each group."""

    def decoder(value: Any) -> Any:
        if not isinstance(value, dict):
            return decode(value)
        return {group: decode(item) for group, item in value["groups"]}

    return decoder


# --- single confidences


class ConfidenceCalibrator(Calibrator):
    """A calibrator of single confidences [N], given which of the answers were right.

    Confidences are in [0, 1], as a list, NumPy array or torch tensor [N] or a column [N, 1]; what comes out has the
    same kind and shape, float32 for floats up to that, else float64; it is not differentiable. Correctness is 0, 1 or,
    where answers are graded, anything between.
    """

    def fit(self, confidence: Any, correct: Any) -> ConfidenceCalibrator:
        """Learn from answers.

        Args:
            confidence: [N] or [N, 1], in [0, 1].
            correct: [N], in [0, 1].

        Raises:
            TypeError: not numbers.
            ValueError: wrong shape or range; NaN; all answers right, or all wrong: nothing to learn from.
        """
        sure = _confidences(confidence)
        right = vector(correct, "correct", low=0, high=1, length=len(sure))
        if right.max(initial=0) == 0 or right.min(initial=1) == 1:
            which = "right" if right.any() else "wrong"
            what = f"{len(right)} answers that are all {which}" if len(right) else "no answers"
            raise ValueError(f"correct: expected right and wrong answers, got {what}")
        self._fit(sure, right)
        self.n_features_in_ = 1
        return self

    def transform(self, X: Any) -> Any:
        """Calibrated confidences, of the kind and shape of ``X``.

        Args:
            X: [N] or [N, 1], confidences in [0, 1].

        Raises:
            sklearn.exceptions.NotFittedError: ``fit`` comes first.
            TypeError, ValueError: not numbers; wrong shape or range; NaN.
        """
        check_is_fitted(self)
        return like(self._calibrated(_confidences(X)), X)

    def predict_proba(self, X: Any) -> Any:
        """[N, 2]: the calibrated probabilities of being wrong and of being right; see :meth:`transform`."""
        return wrong_and_right(self.transform(X))

    @abstractmethod
    def _fit(self, confidence: Floats, correct: Floats) -> None:
        """Set the learned attributes, from [N] and [N]."""

    @abstractmethod
    def _calibrated(self, confidence: Floats) -> Floats:
        """[N] -> [N]."""


def _confidences(values: Any) -> Floats:
    array = as_array(values, "confidence")
    if array.ndim == 2 and array.shape[1] != 1:
        raise ValueError(f"confidence: expected shape [N] or [N, 1], got {list(array.shape)}")
    return vector(array[:, 0] if array.ndim == 2 else array, "confidence", low=0, high=1)


def like(result: NDArray[Any], values: Any) -> Any:
    """A result in the kind, shape and device of ``values``: float32 for floats up to that, else float64."""
    if isinstance(values, torch.Tensor):
        narrow = values.is_floating_point() and values.dtype != torch.float64
        dtype = torch.float32 if narrow else torch.float64
        return torch.from_numpy(result).to(values.device, dtype).reshape(values.shape)
    narrow = isinstance(values, np.ndarray) and values.dtype in (np.float16, np.float32)
    return result.astype(np.float32 if narrow else np.float64, copy=False).reshape(np.shape(values))


def wrong_and_right(confidence: Any) -> Any:
    """[N] or [N, 1] -> [N, 2]."""
    flat = confidence.reshape(-1)
    return torch.stack([1 - flat, flat], 1) if isinstance(flat, torch.Tensor) else np.stack([1 - flat, flat], 1)
