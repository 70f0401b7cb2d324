"""Which tokens the Sigmoid Head is shown as wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from pyqe.dominant import DominantRule

Source = Literal["softmax", "unigram", "uniform"]
Combination = Literal["independent", "mixture", "product"]


@dataclass(frozen=True)
class NegativeSampler:
    r"""How negatives are drawn for the Sigmoid Head loss.

    Every source is a distribution over the vocabulary in which the target and the dominant tokens have weight 0:

    * ``softmax``: :math:`q \propto \mathrm{softmax}(z / T)` of the frozen LM's logits z;
    * ``unigram``: relative frequency of each token among the training targets (``unigram_counts``);
    * ``uniform``.

    They are drawn from without replacement, and combined as

    * ``independent``: each source draws its own share; a token that an earlier source drew already is dropped, so a
      row may hold fewer than ``num_negatives`` (the rest is padding, -1);
    * ``mixture``: one draw from the weighted sum of the sources (each normalised after the exclusion);
    * ``product``: one draw from the normalised product of the sources.

    A reference token is never drawn as its own negative (the authors' code draws it and then drops the pair).

    Args:
        sources: one or more of "softmax", "unigram", "uniform".
        num_negatives: negatives per position, K.
        combination: "independent", "mixture" or "product".
        temperature: T of the softmax source; > 0. At 1 it draws what the LM would write itself; the authors take 2.
        counts: how many each source draws (independent only); default an even split, remainder to the last.
        weights: weight of each source (mixture only); default equal.
        exclude: rule whose tokens are never negatives, or None.
        unigram_counts: [V] frequencies (any non-negative numbers); needed by the "unigram" source.

    Raises:
        ValueError: unknown names, lengths that do not match, numbers out of range, a missing ``unigram_counts``.

    Source: Dinh & Niehues 2026 (arXiv 2601.00680), section on negative sampling.

    Example:
        >>> sampler = NegativeSampler(("uniform", "softmax"), num_negatives=5)
        >>> sampler.shares
        (2, 3)
    """

    sources: tuple[Source, ...] = ("unigram", "softmax")
    num_negatives: int = 10
    combination: Combination = "independent"
    temperature: float = 1.0
    counts: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    exclude: DominantRule | None = field(default_factory=lambda: DominantRule.jump("first"))
    unigram_counts: Tensor | None = field(default=None, repr=False, compare=False)
    _counts_by_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.sources or not set(self.sources) <= set(get_args(Source)):
            raise ValueError(f"sources: expected some of {get_args(Source)}, got {self.sources!r}")
        if self.combination not in get_args(Combination):
            raise ValueError(f"combination: expected one of {get_args(Combination)}, got {self.combination!r}")
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives: expected a positive integer, got {self.num_negatives}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: expected a positive, finite number, got {self.temperature}")
        self._check_per_source("counts", "independent", total=self.num_negatives)
        self._check_per_source("weights", "mixture")
        if "unigram" in self.sources:
            self._check_unigram()

    def _check_per_source(self, name: str, combination: str, total: int | None = None) -> None:
        values = getattr(self, name)
        if values is None:
            return
        if self.combination != combination:
            raise ValueError(f"{name}: only for combination={combination!r}, got {self.combination!r}")
        if len(values) != len(self.sources) or min(values) < 0 or sum(values) <= 0:
            raise ValueError(f"{name}: expected {len(self.sources)} non-negative numbers, got {values!r}")
        if total is not None and sum(values) != total:
            raise ValueError(f"{name}: expected a sum of num_negatives = {total}, got {values!r}")

    def _check_unigram(self) -> None:
        counts = self.unigram_counts
        if counts is None:
            raise ValueError("unigram_counts: expected a [V] tensor for the 'unigram' source, got None")
        if counts.dim() != 1 or not bool((counts >= 0).all() & counts.isfinite().all()) or not float(counts.sum()) > 0:
            raise ValueError(
                f"unigram_counts: expected a [V] tensor of non-negative numbers, some positive, got shape "
                f"{tuple(counts.shape)}"
            )

    @property
    def shares(self) -> tuple[int, ...]:
        """Negatives that each source draws; one number, ``num_negatives``, unless independent."""
        if self.combination != "independent":
            return (self.num_negatives,)
        if self.counts is not None:
            return self.counts
        share, rest = divmod(self.num_negatives, len(self.sources))
        return (*[share] * (len(self.sources) - 1), share + rest)

    def counts_on(self, device: torch.device) -> Tensor | None:
        """``unigram_counts`` on a device, where they are copied once: a copy waits for the device."""
        if self.unigram_counts is None or self.unigram_counts.device == device:
            return self.unigram_counts
        counts = self._counts_by_device.get(device)
        if counts is None:
            counts = self.unigram_counts.to(device)
            if type(counts) is Tensor and not torch.compiler.is_compiling():  # else it may have no numbers
                self._counts_by_device[device] = counts
        return counts

    @staticmethod
    def count_tokens(token_ids: Tensor, vocab_size: int) -> Tensor:
        """Frequencies of the tokens among training targets.

        Args:
            token_ids: int64, any shape; negative ids (padding, ``ignore_index``) are left out.
            vocab_size: V.

        Returns:
            float32 [V].

        Example:
            >>> NegativeSampler.count_tokens(torch.tensor([2, 0, 2, -100]), vocab_size=4)
            tensor([1., 0., 2., 0.])
        """
        ids = token_ids.reshape(-1)
        return torch.bincount(ids[ids >= 0], minlength=vocab_size).float()
