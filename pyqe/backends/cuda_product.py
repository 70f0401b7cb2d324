"""Stand-in."""

from collections.abc import Iterator

import torch
from torch import Tensor


def row_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(hidden), 64):
        block = hidden[start : start + 64]
        padded = torch.zeros(64, hidden.shape[1])
        padded[: len(block)] = block
        yield slice(start, start + len(block)), (padded @ weight.float().T)[: len(block)]
