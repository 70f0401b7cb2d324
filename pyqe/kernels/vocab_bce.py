r"""Binary cross-entropy of every token of the vocabulary, with the gradients, in one pass over the logits.

With z = scale_n <h_n, w_v> + bias_v + shift_n and x = -z for the target, else z,

    loss_n = sum over v of  f softplus(x),         f = pos_weight for the target, else 1
    d loss_n / d z = g = +-f sigmoid(x),           minus for the target

so the gradient is known where the logit is. The vocabulary goes through in chunks. For each, a matrix product whose
epilogue computes losses and g writes G = weight_n scale_n g to a buffer [N, chunk] that all chunks share; two more
products then take the chunk's part of the gradients from it:

    grad_weight[chunk] = G^T hidden,          grad_hidden += G weight[chunk]

Sums over tokens are partial sums of tiles, or of blocks of tokens, added in the order of the vocabulary. None of their
widths depends on the number of rows, so a row's loss and gradient are the same bits in any batch
(docs/notes/gpu-vocab-bce.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyqe.backends.reference import out_of_range
from pyqe.kernels.common import (
    FUSED,
    INTERPRETED,
    config_for,
    input_precision,
    narrowed,
    operand,
    product,
    product_kind,
)

CHUNK = 256 if INTERPRETED else 2048  # tokens whose part of grad_hidden is summed before it is added to the others'
FULL_ROWS = 256 if INTERPRETED else 4096  # chunks are wider where there are fewer rows
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2_LEADING = tl.constexpr(0.693359375)  # 9 bits, so that products with exponents are exact
_LN2_REST = tl.constexpr(-2.1219444005469058e-4)
_NO_TOKEN = tl.constexpr(2**31 - 1)  # takes the place of padding among excluded ids, which are sorted
_ROW_BLOCK = 128
_BORROWED_SHARE = 8  # an eighth of grad_weight at most is lent to grad_hidden's sums: 4 % more work


@triton.jit
def softplus_and_slope(x):
    """``log(1 + e^x)`` and its derivative, the sigmoid of x, to a few units in the last place for any x.

    e^-|x| is e^r 2^k, as ``tl.exp`` is off by 4e-8 |x|. log1p is a polynomial (the CPU kernels'), as the rounded
    sum 1 + e^-|x| has none of the digits of a small e^-|x|.
    """
    y = -tl.abs(x)
    y = tl.where(y < -200.0, -200.0, y)  # a maximum would lose NaN
    k = tl.floor(y * _LOG2E + 0.5)
    r = (y - k * _LN2_LEADING) - k * _LN2_REST
    power = tl.exp2(r * _LOG2E) * tl.exp2(k)
    p = power * -0.00324402261 + 0.0198514499
    p = p * power - 0.0569595098
    p = p * power + 0.106036529
    p = p * power - 0.153055906
    p = p * power + 0.196759388
    p = p * power - 0.249541342
    p = p * power + 0.333299637
    p = p * power - 0.499999017
    p = p * power + 1.0
    return tl.where(x > 0, x, 0.0) + power * p, tl.where(x < 0, power, 1.0) / (1.0 + power)


@triton.jit
def _halves(block):
    return block.reshape(block.shape[0], 2, block.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _slices(block, SLICES: tl.constexpr):
    """The block in 1, 2 or 4 blocks of adjoining columns; each thread keeps the elements that it holds."""
    tl.static_assert(SLICES == 1 or SLICES == 2 or SLICES == 4)
    if SLICES > 1:
        parts = _halves(block)
        if SLICES == 4:
            a, b = _halves(parts[0])
            c, d = _halves(parts[1])
            parts = (a, b, c, d)
    else:
        parts = (block,)
    return parts


@triton.jit
def _count_below(excluded, n_excluded, first_step, token, zero):
    """How many of each row's sorted ids are less than ``token``, by bisection; ``zero`` is int32 [rows]."""
    count = zero
    step = first_step
    while step > 0:
        found = tl.load(excluded + count + (step - 1), mask=count + step <= n_excluded, other=_NO_TOKEN)
        count = tl.where(found < token, count + step, count)
        step = step // 2
    return count


@triton.jit(do_not_specialize=["n_rows", "start", "vocab_size", "n_excluded", "first_step"])
def gradient_kernel(
    hidden, weight, bias,  # [N, D], [V, D], [V]
    row_scale, row_shift, row_weights, row_factors,  # [N], float32
    targets, excluded,  # [N]; [N, n_excluded], int32, sorted
    gradient,  # [N, gradient_stride] with memory for N rounded up to BLOCK_N, or None
    row_partials,  # [1 to 3, tiles of a chunk, N], float32: sums of loss, of g, of g times the dot product
    bias_partials,  # [blocks of rows, gradient_stride], float32
    n_rows, dim, start, vocab_size, n_excluded, first_step, hidden_stride, weight_stride, gradient_stride, pos_weight,
    SUM_SLOPE: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Losses and G of one tile of the chunk that begins at token ``start``.

    After the product, the tile goes on in slices: z, its exponential, loss and g of all of it would not fit into
    registers.
    """
    n_row_blocks = tl.cdiv(n_rows, BLOCK_N)
    row_block = tl.program_id(0) % n_row_blocks  # programs side by side share the tile's weights
    tile = tl.program_id(0) // n_row_blocks
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < n_rows
    near_rows = tl.minimum(rows, n_rows - 1)  # rows and tokens past the end repeat the last: loads need no mask
    first = start + tile * BLOCK_V
    near_columns = tl.minimum(first + tl.arange(0, BLOCK_V), vocab_size - 1)
    dots = product(
        hidden, weight, near_rows, near_columns, dim, hidden_stride, weight_stride,
        BLOCK_N, BLOCK_V, BLOCK_D, WHOLE_BLOCKS, PRECISION,
    )  # fmt: skip

    if row_scale is not None:
        scales = tl.load(row_scale + near_rows)
    shifts = tl.load(row_shift + near_rows)
    target = tl.load(targets + near_rows).to(tl.int32)
    if excluded is not None:
        excluded += near_rows.to(tl.int64) * n_excluded
        low = _count_below(excluded, n_excluded, first_step, first, near_rows * 0)
        high = _count_below(excluded, n_excluded, first_step, first + BLOCK_V, near_rows * 0)
        most = tl.max(high - low, 0)  # rarely more than 2
    if gradient is not None:
        factors = tl.load(row_factors + near_rows)
        gradient += rows.to(tl.int64)[:, None] * gradient_stride + tile * BLOCK_V
    if bias is not None:
        weights = tl.load(row_weights + rows, mask=row_mask, other=0.0)
        bias_partials += row_block.to(tl.int64) * gradient_stride + tile * BLOCK_V
    loss_sum, slope_sum, dot_sum = (tl.zeros([BLOCK_N], tl.float32),) * 3

    parts = _slices(dots, SLICES)
    for part in tl.static_range(SLICES):
        place = part * (BLOCK_V // SLICES) + tl.arange(0, BLOCK_V // SLICES)
        columns = first + place
        z = parts[part]
        if row_scale is not None:
            z *= scales[:, None]
        if bias is not None:
            z += tl.load(bias + columns, mask=columns < vocab_size, other=0.0).to(tl.float32)[None, :]
        z += shifts[:, None]
        z = tl.where((columns < vocab_size)[None, :], z, float("-inf"))  # its loss and g are exactly 0
        if excluded is not None:
            for i in range(most):
                token = tl.load(excluded + low + i, mask=low + i < high, other=-1)
                token = tl.where(token == target, -1, token)  # the target is never excluded
                z = tl.where(columns[None, :] == token[:, None], float("-inf"), z)
        positive = columns[None, :] == target[:, None]
        loss, g = softplus_and_slope(tl.where(positive, -z, z))
        loss_sum += tl.sum(tl.where(positive, pos_weight * loss, loss), 1)
        g = tl.where(positive, -pos_weight * g, g)
        if gradient is not None:
            tl.store(gradient + place[None, :], narrowed(g * factors[:, None], gradient))
        if SUM_SLOPE:
            slope_sum += tl.sum(g, 1)
        if row_scale is not None:
            dot_sum += tl.sum(g * parts[part], 1)
        if bias is not None:
            tl.store(bias_partials + place, tl.sum(g * weights[:, None], 0))

    plane = (gradient_stride // BLOCK_V).to(tl.int64) * n_rows
    row_partials += tile.to(tl.int64) * n_rows + rows
    tl.store(row_partials, loss_sum, mask=row_mask)
    if SUM_SLOPE:
        tl.store(row_partials + plane, slope_sum, mask=row_mask)
    if row_scale is not None:
        tl.store(row_partials + (1 + SUM_SLOPE) * plane, dot_sum, mask=row_mask)


@triton.jit(do_not_specialize=["n_rows", "n_tiles", "chunk_tiles"])
def row_sums_kernel(
    partials,  # [sums, chunk_tiles, N], float32
    sums,  # [sums, N], float64
    n_rows, n_tiles, chunk_tiles, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of a chunk's tiles to those of the chunks before, tile by tile."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < n_rows
    kind = tl.program_id(1).to(tl.int64)
    place = sums + kind * n_rows + rows
    total = tl.load(place, mask=mask)
    for tile in range(n_tiles):
        total += tl.load(partials + (kind * chunk_tiles + tile) * n_rows + rows, mask=mask).to(tl.float64)
    tl.store(place, total, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "size"])
def product_kernel(
    left,  # [M, size], with memory for M rounded up to BLOCK_M
    right,  # [size, D]
    out,  # [M, D], contiguous
    unit,  # one float32 number, or None for 1
    n_rows, size, dim, left_stride, left_inner_stride, right_stride,
    ADD: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """``out = unit * left @ right``, or that added to ``out``."""
    n_row_blocks = tl.cdiv(n_rows, BLOCK_M)
    rows = (tl.program_id(0) % n_row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = (tl.program_id(0) // n_row_blocks) * BLOCK_D
    columns = first_column + tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_K)
    left += rows.to(tl.int64)[:, None] * left_stride + place[None, :] * left_inner_stride
    right += place.to(tl.int64)[:, None] * right_stride + columns[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, size, BLOCK_K):
        if WHOLE_BLOCKS:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = place < size - start
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None] & (columns < dim)[None, :], other=0.0)
        total = tl.dot(operand(a), operand(b), total, input_precision=PRECISION)
        left += BLOCK_K * left_inner_stride
        right += BLOCK_K * right_stride
    parts = _slices(total, SLICES)
    for part in tl.static_range(SLICES):
        columns = first_column + part * (BLOCK_D // SLICES) + tl.arange(0, BLOCK_D // SLICES)
        mask = (rows < n_rows)[:, None] & (columns < dim)[None, :]
        out_place = out + rows.to(tl.int64)[:, None] * dim + columns[None, :]
        result = parts[part]
        if unit is not None:
            result *= tl.load(unit)
        if ADD:
            result += tl.load(out_place, mask=mask, other=0.0)
        tl.store(out_place, narrowed(result, out), mask=mask)


@dataclass(frozen=True)
class _Rows:
    """What belongs to the rows of a call."""

    scale: Tensor | None  # [N], float32, as all of these
    shift: Tensor  # [N]
    weights: Tensor  # [N], 0 for bad rows
    factors: Tensor  # [N]: G = factors * g
    unit: Tensor | None  # what products with G are to be multiplied with; None for 1
    targets: Tensor  # [N], int64
    excluded: Tensor | None  # [N, M], int32, sorted
    bad: Tensor  # [N], bool: rows with an id out of range, whose results are NaN

    @staticmethod
    def of(
        hidden: Tensor,
        vocab_size: int,
        scale: Tensor | None,
        shift: Tensor | None,
        targets: Tensor,
        exclude_ids: Tensor | None,
        weights: Tensor,
        pos_weight: float,
    ) -> _Rows:
        bad = out_of_range(targets, vocab_size)
        excluded = None
        if exclude_ids is not None and exclude_ids.shape[1]:
            bad = bad | out_of_range(exclude_ids, vocab_size).any(1)
            ids = exclude_ids.masked_fill((exclude_ids < 0) | (exclude_ids >= vocab_size), _NO_TOKEN.value)
            excluded = torch.sort(ids.int(), 1).values
        shift = torch.zeros_like(weights, dtype=torch.float32) if shift is None else shift.float()
        weights = weights.float().masked_fill(bad, 0.0)
        scale = None if scale is None else scale.float().contiguous()
        factors, unit = _factors(weights if scale is None else weights * scale, pos_weight, hidden.dtype)
        return _Rows(scale, shift.contiguous(), weights, factors, unit, targets.contiguous(), excluded, bad)


def _factors(factors: Tensor, pos_weight: float, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Factors of g in G, and the unit that G is in: a power of two for float16, whose smallest number is 6e-8.

    The mean of a loss over 4096 x 128256 pairs has weights of 2e-9.
    """
    if dtype != torch.float16 or len(factors) == 0:
        return factors, None
    largest = torch.where(factors.isfinite(), factors.abs(), 0.0).amax() * max(pos_weight, 1.0)
    unit = torch.exp2(torch.ceil(torch.log2(largest.clamp(min=1e-30))) - 14)  # |G| is up to 2^14 then, of 65504
    return factors / unit, unit


@dataclass(frozen=True)
class _Chunks:
    """Operands of a call, and the buffers that its chunks of the vocabulary share."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    rows: _Rows
    pos_weight: float
    sum_slope: bool  # whether sums of g are wanted
    width: int  # tokens, a multiple of CHUNK
    gradient: Tensor | None  # [N or some more, width]
    row_partials: Tensor  # [sums, tiles, N]
    bias_partials: Tensor | None  # [blocks of rows, width]

    def compute(self, start: int) -> None:
        """Fill the buffers for the chunk that begins at token ``start``."""
        (n, dim), rows = self.hidden.shape, self.rows
        config = config_for("vocab_bce_gradient", self.hidden)
        if n == 0:
            return
        n_programs = self._tiles(start) * triton.cdiv(n, config.blocks["BLOCK_N"])
        n_excluded = 0 if rows.excluded is None else rows.excluded.shape[1]
        gradient_kernel[(n_programs,)](
            self.hidden, self.weight, self.bias,
            rows.scale, rows.shift, rows.weights, rows.factors, rows.targets, rows.excluded,
            self.gradient, self.row_partials, self.bias_partials,
            n, dim, start, len(self.weight), n_excluded, 1 << n_excluded.bit_length() >> 1,
            self.hidden.stride(0), self.weight.stride(0), self.width, self.pos_weight,
            SUM_SLOPE=self.sum_slope,
            WHOLE_BLOCKS=dim % config.blocks["BLOCK_D"] == 0,
            PRECISION=input_precision(product_kind(self.hidden.dtype)),
            **config.options,
            **FUSED,
        )  # fmt: skip

    def _tiles(self, start: int) -> int:
        return triton.cdiv(self._tokens(start), self.width // self.row_partials.shape[1])

    def _tokens(self, start: int) -> int:
        return min(self.width, len(self.weight) - start)

    def add_row_sums(self, start: int, sums: Tensor) -> None:
        """Add the chunk's partial sums to ``sums``, [sums, N] in float64."""
        kinds, chunk_tiles, n = self.row_partials.shape
        if n:
            grid = (triton.cdiv(n, _ROW_BLOCK), kinds)
            tiles = self._tiles(start), chunk_tiles
            row_sums_kernel[grid](self.row_partials, sums, n, *tiles, BLOCK_N=_ROW_BLOCK, **FUSED)

    def write_grad_bias(self, start: int, grad_bias: Tensor) -> None:
        assert self.bias_partials is not None
        tokens = self._tokens(start)
        grad_bias[start : start + tokens] = self.bias_partials[:, :tokens].sum(0)

    def write_grad_weight(self, start: int, grad_weight: Tensor) -> None:
        """Write the chunk's rows of ``grad_weight``, which has [V, D] or fewer rows."""
        assert self.gradient is not None
        out = grad_weight[start : start + self.width]
        left = self.gradient[: len(self.hidden), : len(out)].T
        if self.rows.unit is None:  # the library's product should be the faster one
            torch.mm(left, self.hidden, out=out)
        else:
            _multiply(left, self.hidden, out, self.rows.unit, add=False)

    def add_grad_hidden(self, start: int, total: Tensor) -> None:
        """Add the chunk's part of the gradient to ``total``, [N, D] in float32; the first chunk overwrites it."""
        assert self.gradient is not None
        for first in range(0, self._tokens(start), CHUNK):
            left = self.gradient[:, first : first + min(CHUNK, self._tokens(start) - first)]
            right = self.weight[start + first : start + first + CHUNK]
            _multiply(left, right, total, self.rows.unit, add=start + first > 0)


def _multiply(left: Tensor, right: Tensor, out: Tensor, unit: Tensor | None, add: bool) -> None:
    """``out = unit * left @ right``, or that added to it; rows of ``right`` are contiguous, and so is ``out``."""
    (n, columns), size = out.shape, len(right)
    if n == 0:
        return
    config = config_for("vocab_bce_product", right)
    blocks = config.blocks
    product_kernel[(triton.cdiv(n, blocks["BLOCK_M"]) * triton.cdiv(columns, blocks["BLOCK_D"]),)](
        left, right, out, unit,
        n, size, columns, left.stride(0), left.stride(1), right.stride(0),
        ADD=add,
        WHOLE_BLOCKS=size % blocks["BLOCK_K"] == 0 and columns % blocks["BLOCK_D"] == 0,
        PRECISION=input_precision(product_kind(right.dtype)),
        **config.options,
        **FUSED,
    )  # fmt: skip


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, pos_weight: float, sum_slope: bool, grads: bool
) -> _Chunks:
    n, blocks = len(hidden), config_for("vocab_bce_gradient", hidden).blocks
    whole_rows = max(blocks["BLOCK_N"], config_for("vocab_bce_product", hidden).blocks["BLOCK_M"])
    padded = max(triton.cdiv(n, whole_rows), 1) * whole_rows
    width = CHUNK * min(max(FULL_ROWS // padded, 1), triton.cdiv(len(weight), CHUNK))
    kinds = 1 + sum_slope + (rows.scale is not None)
    partials = partial(torch.empty, dtype=torch.float32, device=hidden.device)
    return _Chunks(
        hidden, weight, bias, rows, pos_weight, sum_slope, width,
        hidden.new_empty(padded, width) if grads else None,
        partials((kinds, width // blocks["BLOCK_V"], n)),
        None if bias is None else partials((triton.cdiv(n, blocks["BLOCK_N"]), width)),
    )  # fmt: skip


def _accumulator(grad_hidden: Tensor, grad_weight: Tensor | None, vocab_size: int) -> tuple[Tensor, int]:
    """Memory for grad_hidden's sums, float32 [N, D], and how many rows of grad_weight it leaves alone.

    grad_weight's end is free until its last chunks come, whose G has to be computed again then: a third of their work,
    so this is done where they are few.
    """
    size = 2 * grad_hidden.numel()
    if grad_hidden.dtype == torch.float32:
        return grad_hidden, vocab_size
    if grad_weight is None or grad_weight.numel() < _BORROWED_SHARE * size:
        return torch.empty_like(grad_hidden, dtype=torch.float32), vocab_size
    first = (grad_weight.numel() - size) // 8 * 8  # 16 bytes
    memory = grad_weight.view(-1)[first : first + size].view(torch.float32)
    return memory.view(grad_hidden.shape), first // grad_weight.shape[1] // CHUNK * CHUNK


def vocab_bce(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    targets: Tensor,
    exclude_ids: Tensor | None,
    row_weights: Tensor,
    pos_weight: float,
    grad_hidden: bool,
    grad_weight: bool,
) -> tuple[Tensor, ...]:
    """As :func:`pyqe.backends.reference.linear_vocab_bce`; rows of hidden and weight are contiguous."""
    none, vocab_size = hidden.new_empty, len(weight)
    rows = _Rows.of(hidden, vocab_size, scale, shift, targets, exclude_ids, row_weights, pos_weight)
    chunks = _chunks(hidden, weight, bias, rows, pos_weight, shift is not None, grad_hidden or grad_weight)
    sums = torch.zeros(len(chunks.row_partials), len(hidden), dtype=torch.float64, device=hidden.device)
    d_hidden = none(hidden.shape) if grad_hidden else none(0)
    d_weight = none(weight.shape) if grad_weight else none(0)
    d_bias = none(0) if bias is None else torch.empty_like(bias)
    total_hidden, free = d_hidden, vocab_size
    if grad_hidden:
        total_hidden, free = _accumulator(d_hidden, d_weight if grad_weight else None, vocab_size)

    for start in range(0, vocab_size, chunks.width):
        chunks.compute(start)
        chunks.add_row_sums(start, sums)
        if bias is not None:
            chunks.write_grad_bias(start, d_bias)
        if grad_hidden:
            chunks.add_grad_hidden(start, total_hidden)
        if grad_weight and start < free:
            chunks.write_grad_weight(start, d_weight[:free])
    if total_hidden is not d_hidden:
        d_hidden.copy_(total_hidden)
    for start in range(free, vocab_size if grad_weight else 0, chunks.width):
        chunks.compute(start)
        chunks.write_grad_weight(start, d_weight)

    if grad_hidden:
        d_hidden.masked_fill_(rows.bad[:, None], torch.nan)
    sums.masked_fill_(rows.bad, torch.nan)
    losses = sums[0].float()
    return (
        (losses * rows.weights).sum(),
        losses,
        d_hidden,
        d_weight,
        d_bias,
        none(0) if scale is None else (sums[-1].float() * rows.weights).to(scale.dtype),
        none(0) if shift is None else (sums[1].float() * rows.weights).to(shift.dtype),
    )
