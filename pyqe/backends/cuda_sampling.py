"""Negatives on the CUDA backend: scratch memory, and chunks of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyqe.backends import reference
from pyqe.backends.cuda_library import library, pointer, stream
from pyqe.backends.cuda_statistics import Rows, dominant_rows, head_blocks
from pyqe.backends.operands import check_shape, floats, on_its_device, rows_of
from pyqe.backends.sources import Sources

CHUNK = 1024  # rows whose marks and sums of tiles are kept at a time: 21 KB each for 128256 tokens


class _Sampler:
    """What a call draws; :meth:`draw` does so for some of its rows."""

    def __init__(
        self,
        n: int,
        vocab_size: int,
        targets: Tensor,
        seed: Tensor,
        sources: list[str],
        shares: list[int],
        mixture_weights: list[float],
        combination: str,
        temperature: float,
        exclude: str,
        unigram_counts: Tensor | None,
    ) -> None:
        reference.check_ids("targets", targets, vocab_size)
        check_shape("targets", targets, n)
        check_shape("unigram_counts", unigram_counts, vocab_size)
        self.targets, self.seed, self.exclude = targets.contiguous(), seed, exclude
        counts = floats(unigram_counts)
        self.sources = Sources.of(sources, shares, mixture_weights, combination, temperature, counts)
        self.tile_counts = None if self.sources.counts is None else _tile_counts(self.sources.counts)
        self.ids = torch.empty(n, sum(shares), dtype=torch.int64, device=targets.device)
        rows, tiles = min(n, CHUNK), -(-vocab_size // library.TILE)
        wants_softmax = any(softmax > 0 for softmax, *_ in self.sources.parts)
        self.barred = torch.empty(rows, tiles, library.TILE_WORDS, dtype=torch.int32, device=targets.device)
        self.tile_sums = torch.empty(rows, tiles, 2, device=targets.device) if wants_softmax else None

    def draw(self, source: Rows, first_row: int) -> None:
        """Negatives of some rows, the first of which has that number in the call."""
        for start in range(0, len(source.matrix), CHUNK):
            self._draw(replace(source, matrix=source.matrix[start : start + CHUNK]), first_row + start)

    def _draw(self, source: Rows, first_row: int) -> None:
        excluded, max_logit = dominant_rows(source, self.exclude)
        here = self.seed.device == source.matrix.device
        library.sample_negatives(
            source.handle(),
            self.sources.parts,
            targets=self.targets[first_row:].data_ptr(),
            excluded=excluded.data_ptr(),
            n_excluded=excluded.shape[1],
            max_logit=max_logit.data_ptr(),
            beta=self.sources.beta,
            factor=pointer(self.sources.factor),
            counts=pointer(self.sources.counts),
            tile_counts=pointer(self.tile_counts),
            first_row=first_row,
            seed_at=self.seed.data_ptr() if here else 0,  # looking at it here would wait for the device
            seed=0 if here else int(self.seed),
            barred=self.barred.data_ptr(),
            tile_sums=pointer(self.tile_sums),
            ids=self.ids[first_row:].data_ptr(),
            width=self.ids.shape[1],
            stream=stream(source.matrix),
        )


def _tile_counts(counts: Tensor) -> Tensor:
    """Sums of the counts [V] of each tile, float64; zero where all are."""
    return F.pad(counts.double(), (0, -len(counts) % library.TILE)).view(-1, library.TILE).sum(1)


@on_its_device
def sample_negatives(logits: Tensor, *options: Any) -> Tensor:
    logits = rows_of(logits)
    sampler = _Sampler(*logits.shape, *options)
    sampler.draw(Rows(logits), 0)
    return sampler.ids


@on_its_device
def linear_sample_negatives(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    *options: Any,
) -> Tensor:
    sampler = _Sampler(hidden.shape[0], weight.shape[0], *options)
    for rows, source, _ in head_blocks(hidden, weight, bias, logit_scale, logit_softcap):
        sampler.draw(source, rows.start)
    return sampler.ids
