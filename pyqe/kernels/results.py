"""What the statistics kernels are asked for, and the tensors that they fill; None where not asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T", bound="_ByRow")


@dataclass
class _ByRow:
    """Tensors whose first dimension is the row."""

    @property
    def n(self) -> int:
        """Number of rows."""
        raise NotImplementedError

    def rows(self: _T, rows: slice) -> _T:
        """The part of some rows; it shares memory."""
        if rows == slice(0, self.n):
            return self  # the common case, and a new object takes 5 us
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in tensors.items() if isinstance(value, Tensor)})


def _optional(wanted: bool, like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return like.new_empty(shape, dtype=dtype) if wanted else None


@dataclass
class TokenRows(_ByRow):
    """Ids [N, n], in rows any distance apart, and their logits [N, n]."""

    ids: Tensor | None
    token_logits: Tensor | None

    @property
    def n_ids(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]

    @property
    def ids_stride(self) -> int:
        return 0 if self.ids is None else self.ids.stride(0)


@dataclass
class SoftmaxRows(TokenRows):
    max_logit: Tensor
    max_logprob: Tensor
    argmax: Tensor
    entropy: Tensor | None
    tempered: Tensor | None  # logsumexp of z / temperature
    temperature: float

    @classmethod
    def of(cls, like: Tensor, n: int, ids: Tensor | None, entropy: bool, temperature: float | None) -> SoftmaxRows:
        return cls(
            ids,
            _optional(ids is not None, like, n, 0 if ids is None else ids.shape[1]),
            like.new_empty(n, dtype=torch.float32),
            like.new_empty(n, dtype=torch.float32),
            like.new_empty(n, dtype=torch.int64),
            _optional(entropy, like, n),
            _optional(temperature is not None, like, n),
            1.0 if temperature is None else temperature,
        )

    @property
    def n(self) -> int:
        return len(self.max_logit)

    @property
    def slots(self) -> int:
        return 3 + (self.entropy is not None) + (self.tempered is not None)


@dataclass
class SigmoidRows(TokenRows):
    max_logit: Tensor
    argmax: Tensor
    sum_prob: Tensor
    above: Tensor | None
    threshold: float  # of the logit

    @classmethod
    def of(cls, like: Tensor, n: int, ids: Tensor | None, threshold: float | None) -> SigmoidRows:
        return cls(
            ids,
            _optional(ids is not None, like, n, 0 if ids is None else ids.shape[1]),
            like.new_empty(n, dtype=torch.float32),
            like.new_empty(n, dtype=torch.int64),
            like.new_empty(n, dtype=torch.float32),
            _optional(threshold is not None, like, n, dtype=torch.int64),
            0.0 if threshold is None else threshold,
        )

    @property
    def n(self) -> int:
        return len(self.max_logit)

    @property
    def slots(self) -> int:
        return 3 + (self.above is not None)


@dataclass
class MomentRows(TokenRows):
    """NLL under softmax(beta z) and its derivatives; the labels are ids [N, 1] or probabilities [N, V]."""

    soft_labels: Tensor | None
    losses: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, like: Tensor, labels: Tensor) -> MomentRows:
        n, hard = len(labels), not labels.is_floating_point()
        numbers = (like.new_empty(n, dtype=torch.float32) for _ in range(3))
        return cls(
            labels.reshape(n, 1) if hard else None, _optional(hard, like, n, 1), None if hard else labels, *numbers
        )

    @property
    def n(self) -> int:
        return len(self.losses)

    @property
    def slots(self) -> int:
        return 4 if self.soft_labels is None else 6
