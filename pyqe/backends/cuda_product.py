"""Dot products of hidden states with a head's weights, on the CUDA backend: in row chunks, into one buffer.

Up to 64 rows of bfloat16 or float16 go through a kernel that reads the weights once (csrc/cuda/decode.cu), everything
else through the library behind ``torch.mm``. In which of the two ways a row's bits depend on the rest of its call:

* Weights that the kernel takes (bfloat16 or float16, rows of a multiple of 8 elements that start at multiples of 16
  bytes): calls of up to 64 rows give a row the same bits whatever else is in them. Longer calls multiply chunks of one
  size, the last one padded with zeros, so the library gets the same shape whatever the call; rows have the same bits
  in all of these as far as the library treats all rows of one shape alike. The two kinds of calls differ by rounding.
* Other weights, float32 among them: chunks are always padded to 64 rows, in calls of any length, with the same proviso.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pyqe.backends.cuda_library import CODES, library, stream

_BLOCK = 64  # chunks are multiples of it
_CHUNK = 256  # an H100 multiplies about as long for 300 rows of bfloat16 as it reads the weights
_BUFFER_BYTES = 256 * 2**20  # a whole chunk for up to 262144 tokens, an eighth of the weights for D 4096


def _aligned(matrix: Tensor) -> bool:
    """Whether the decode kernel can read the rows: 16 bytes at a time."""
    return (
        matrix.dtype in (torch.bfloat16, torch.float16)
        and matrix.stride(1) == 1
        and matrix.stride(0) % 8 == matrix.shape[1] % 8 == 0
        and matrix.data_ptr() % 16 == 0
    )


def chunk_rows(weight: Tensor) -> int:
    """Rows that are multiplied at once: set by weight [V, D], never by the rows of a call.

    Their dot products take 256 MiB at most, more only where 64 rows do.
    """
    if not _aligned(weight):
        return _BLOCK
    fitting = _BUFFER_BYTES // (4 * max(len(weight), 1)) // _BLOCK * _BLOCK
    return max(_BLOCK, min(_CHUNK, fitting))


def padded_rows(n: int, weight: Tensor) -> int:
    """Rows to which a product beside those of :func:`row_chunks` is padded: one number for short calls, one for all."""
    return _BLOCK if n <= _BLOCK else chunk_rows(weight)


def product(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Dot products of hidden [n, D] with weight [V, D], both in one dtype: the first n rows of out, which is returned.

    Sums are in float32. For float32 inputs torch's setting decides about TF32:
    ``torch.backends.cuda.matmul.fp32_precision``.

    Args:
        out: float32 [rows, V], rows >= n. No more than 64 rows: the decode kernel, if it takes the weights. Otherwise
            the library multiplies all its rows, those after the n-th being padding.
    """
    n = len(hidden)
    if len(out) <= library.MAX_DECODE_ROWS and _aligned(weight):
        _decode(hidden, weight, out)
        return out[:n]
    if n < len(out):  # F.pad copies where there is nothing to pad, too
        hidden = F.pad(hidden, (0, 0, 0, len(out) - n))
    if hidden.device.type == "cpu":  # on the emulator, and torch.mm of a CPU has no out_dtype
        torch.mm(hidden.float(), weight.float().T, out=out)
    elif hidden.dtype == torch.float32:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    return out[:n]


def _decode(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    hidden = hidden if _aligned(hidden) else hidden.clone(memory_format=torch.contiguous_format)
    library.decode(
        hidden=hidden.data_ptr(),
        weight=weight.data_ptr(),
        dots=out.data_ptr(),
        n=len(hidden),
        vocab=weight.shape[0],
        dim=weight.shape[1],
        hidden_stride=hidden.stride(0),
        weight_stride=weight.stride(0),
        dtype=CODES[weight.dtype],
        stream=stream(weight),
    )


def row_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges of hidden [N, D] and their dot products with weight [V, D], float32 [rows, V].

    All chunks are in one buffer, which the next chunk overwrites.
    """
    rows = chunk_rows(weight)
    decodes = len(hidden) <= library.MAX_DECODE_ROWS and _aligned(weight)
    buffer = torch.empty(
        len(hidden) if decodes else rows, len(weight), dtype=torch.float32, device=hidden.device
    )  # a few rows need no padding, and so no memory for it
    for start in range(0, len(hidden), rows):
        chunk = hidden[start : start + rows]
        yield slice(start, start + len(chunk)), product(chunk, weight, buffer)
