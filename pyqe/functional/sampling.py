"""Negatives for the Sigmoid Head loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyqe.functional._arguments import check_ids, head_matrix, logit_matrix, rule_spec
from pyqe.functional._sharded import operator
from pyqe.negatives import NegativeSampler


def _sampler_options(
    targets: Tensor, sampler: NegativeSampler, vocab_size: int, generator: torch.Generator | None
) -> tuple[Any, ...]:
    check_ids(targets, "targets")
    counts = sampler.counts_on(targets.device)
    if counts is not None and len(counts) != vocab_size:
        raise ValueError(f"sampler.unigram_counts: expected [{vocab_size}], got {list(counts.shape)}")
    # drawn beside the tokens, so that every replay of a CUDA graph draws another one, and nobody waits for it
    device = targets.device if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
    return (
        targets.reshape(-1),
        seed,
        list(sampler.sources),
        list(sampler.shares),
        list(sampler.weights or [1.0] * len(sampler.sources)),
        sampler.combination,
        sampler.temperature,
        rule_spec(sampler.exclude),
        counts,
    )


def sample_negatives(
    logits: Tensor, targets: Tensor, sampler: NegativeSampler, generator: torch.Generator | None = None
) -> Tensor:
    """Negatives from logits [..., V] that exist already; see :func:`linear_sample_negatives`.

    Example:
        >>> sampler = NegativeSampler(("uniform",), num_negatives=2, exclude=None)
        >>> sample_negatives(torch.zeros(1, 3), torch.tensor([1]), sampler).sort().values
        tensor([[0, 2]])
    """
    matrix = logit_matrix(logits)
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets: expected {list(logits.shape[:-1])}, got {list(targets.shape)}")
    options = _sampler_options(targets, sampler, logits.shape[-1], generator)
    ids = torch.ops.pyqe.sample_negatives(matrix, *options)
    return ids.reshape(targets.shape + ids.shape[1:])


def linear_sample_negatives(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sampler: NegativeSampler,
    generator: torch.Generator | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Negatives for the Sigmoid Head loss: never the target, never a dominant token, never one twice.

    The draw is exact sampling without replacement. One number from the generator seeds a counter-based generator, so
    a row's negatives depend on that number, the row's place and its logits, not on how the work is split.

    Args:
        hidden: [..., D].
        weight: [V, D] of the LM's head: softmax source and dominant tokens come from it.
        targets: int64 [...]; -1 excludes nothing.
        sampler: sources, temperature, number and exclusion; see :class:`pyqe.NegativeSampler`.
        generator: default torch's own of the device. A CUDA graph captures the number that a generator of the CPU
            gave: every replay draws the same negatives.
        bias, logit_scale, logit_softcap: of the LM's head, as in :func:`linear_softmax_stats`.

    Returns:
        int64 [..., K], padded with -1 where fewer are left.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
        IndexError: a target outside [0, V) other than -1 (CPU).

    Example:
        >>> sampler = NegativeSampler(("softmax",), num_negatives=3, exclude=None)
        >>> targets = torch.zeros(4, dtype=torch.int64)
        >>> linear_sample_negatives(torch.ones(4, 2), torch.randn(9, 2), targets, sampler).shape
        torch.Size([4, 3])
    """
    matrix = head_matrix(hidden, weight, bias)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets: expected {list(hidden.shape[:-1])}, got {list(targets.shape)}")
    options = _sampler_options(targets, sampler, weight.shape[0], generator)
    ids = operator("linear_sample_negatives", weight)(matrix, weight, bias, logit_scale, logit_softcap, *options)
    return ids.reshape(targets.shape + ids.shape[1:])
