"""Inputs of any kind as torch tensors: probabilities or logits, and labels; results back as the kind that came in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyqe import functional as F
from pyqe._arrays import ABOVE_ONE, Inputs, as_array, class_labels, vector
from pyqe.backends.reference import compute_dtype

FLOOR = 1e-12  # of probabilities, unless one above 0 is less


def float_tensor(values: Any, name: str) -> Tensor:
    """A tensor of floats that shares the memory of ``values`` where it can: never change it in place.

    A tensor keeps its dtype and device, a NumPy array of floats its dtype; anything else becomes float64.

    Raises:
        TypeError: not numbers.
    """
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else values.double()
    array = values if isinstance(values, np.ndarray) and values.dtype.kind == "f" else as_array(values, name)
    if array.dtype not in (np.float16, np.float32, np.float64):
        array = array.astype(np.float64)
    if not array.flags.writeable or min(array.strides, default=0) < 0:  # which torch cannot take over
        array = array.copy()
    return torch.from_numpy(array)


def as_given(result: Tensor, values: Any) -> Any:
    """``result`` as a tensor if ``values`` is one, else as a NumPy array."""
    return result if isinstance(values, Tensor) else result.detach().cpu().numpy()


def is_single(values: Tensor) -> bool:
    """Whether these are single confidences [N] or [N, 1]."""
    return values.dim() == 1 or (values.dim() == 2 and values.shape[1] == 1)


@dataclass(frozen=True)
class Table:
    """Probabilities or logits [N, K] that have been checked; K = 2, wrong and right, for single confidences."""

    values: Tensor
    inputs: Inputs

    @staticmethod
    def read(values: Tensor, name: str, inputs: Inputs) -> Table:
        """From [N, K], or single confidences or log odds [N] or [N, 1].

        Raises:
            ValueError: wrong shape; numbers that are no probabilities, rows of zeros.
        """
        if inputs not in ("probs", "logits"):
            raise ValueError(f"inputs: expected 'probs' or 'logits', got {inputs!r}")
        if values.dim() not in (1, 2) or values.shape[-1:] == (0,) != values.shape:
            raise ValueError(f"{name}: expected shape [N], or [N, K] with K > 0, got {list(values.shape)}")
        if inputs == "probs":
            _check_probs(values, name)
        if is_single(values):
            column = values.reshape(-1).double()  # where 1 - p keeps the digits of p
            other = (1 - column).clamp(min=0) if inputs == "probs" else torch.zeros_like(column)
            values = torch.stack([other, column], 1)
        return Table(values, inputs)

    def floor(self, eps: float | None) -> float:
        """``eps``, or what is at most the smallest probability above 0; 0 for logits."""
        if self.inputs == "logits":
            return 0.0
        if eps is not None:
            return eps
        values = self.values.detach()
        least = float(values.amin()) if len(values) else 1.0
        if least == 0:
            positive = values[values > 0]
            least = float(positive.amin()) if len(positive) else 1.0
        return max(min(FLOOR, least), torch.finfo(compute_dtype(values)).tiny)

    def logits(self, eps: float) -> Tensor:
        """[N, K], with the floor ``eps`` for probabilities."""
        return self.values if self.inputs == "logits" else F.inverse_softmax(self.values, eps=eps)


def _check_probs(values: Tensor, name: str) -> None:
    """Fails for what is no probability, and for rows that are 0 throughout."""
    if values.numel() == 0:
        return
    least, most = (float(bound) for bound in values.detach().aminmax())
    if not (least >= 0 and most <= 1 + ABOVE_ONE):
        wrong = ~((values >= 0) & (values <= 1 + ABOVE_ONE)).reshape(len(values), -1)
        row = int(wrong.any(1).int().argmax())
        found = values.detach().reshape(len(values), -1)[row][wrong[row]][0].item()
        raise ValueError(f"{name}: expected probabilities in [0, 1], got {found:g} in row {row}")
    if least == 0 and not is_single(values):
        empty = values.detach().sum(1) == 0
        if bool(empty.any()):
            raise ValueError(f"{name}: expected probabilities, got nothing but 0 in row {int(empty.int().argmax())}")


def label_tensor(y: Any, logits: Tensor) -> Tensor:
    """Class numbers [N], or soft labels [N, K], as the kernel takes them."""
    rows, classes = logits.shape
    if getattr(y, "ndim", np.ndim(y)) == 2:
        soft = float_tensor(y, "y").detach().to(logits.device)
        if soft.shape != logits.shape:
            raise ValueError(f"y: expected [{rows}] or [{rows}, {classes}], got {list(soft.shape)}")
        return soft
    return torch.from_numpy(class_labels(y, "y", classes=classes, length=rows)).to(logits.device)


def right_or_wrong(y: Any, logits: Tensor) -> Tensor:
    """Soft labels [N, 2] of the classes wrong and right."""
    right = torch.from_numpy(vector(y, "y", low=0, high=1, length=len(logits)))
    return torch.stack([1 - right, right], 1).to(logits)
