"""The definition of every operation, in plain torch.

Kernels are compared with this file, so it is written to be read. Matrices are two-dimensional here (N rows); results
are float32, or float64 where an input is. Rows go through in blocks of a fixed size, the last one padded with zeros:
a row then meets the same matrix product and the same reductions whatever else is in the call, so its result does not
depend on the batch, bit for bit (docs/notes/reference.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyqe.backends.philox import uniform
from pyqe.dominant import DominantRule

ROW_BLOCK = 64  # 128 rows are 4 % faster for SmolLM2's head, single rows then cost twice as much
_ROUNDING = 16  # units in the last place by which a drop must exceed its threshold
TILE = 256  # tokens in a tile of the two-level draw


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where an input is, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges, and those rows padded with zeros to ROW_BLOCK rows; one block of padding for no rows at all."""
    for start in range(0, max(len(matrix), 1), ROW_BLOCK):
        block = matrix[start : start + ROW_BLOCK]
        yield slice(start, start + len(block)), _pad_rows(block, 0)


def _pad_rows(block: Tensor, value: float) -> Tensor:
    return F.pad(block, (0, 0, 0, ROW_BLOCK - len(block)), value=value)


def logit_blocks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges and their logits [ROW_BLOCK, V], the last rows being padding."""
    dtype = compute_dtype(hidden, weight, bias)
    weight = weight.to(dtype)
    for rows, block in _blocks(hidden):
        logits = torch.mm(block.to(dtype), weight.T)
        if bias is not None:
            logits += bias.to(dtype)
        logits *= logit_scale
        if logit_softcap is not None:
            logits = logit_softcap * torch.tanh(logits / logit_softcap)
        yield rows, logits


def _reduce_blocks(
    blocks: Iterable[tuple[slice, Tensor]],
    row_function: Callable[..., tuple[Tensor, ...]],
    token_ids: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Concatenated results of ``row_function(logits, token_ids, *options)`` over the blocks, without the padding."""
    parts = []
    for rows, logits in blocks:
        ids = None if token_ids is None else _pad_rows(token_ids[rows], -1)
        results = row_function(logits, ids, *options)
        parts.append(tuple(result[: rows.stop - rows.start] for result in results))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _gather(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits of the given ids, [n, K]; NaN where the id is padding or out of range."""
    found = torch.gather(logits, 1, ids.clamp(0, logits.shape[1] - 1))
    return found.masked_fill((ids < 0) | (ids >= logits.shape[1]), torch.nan)


def out_of_range(ids: Tensor, vocab_size: int) -> Tensor:
    """True for an id that is neither -1 (padding) nor in [0, vocab_size)."""
    return (ids < -1) | (ids >= vocab_size)


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise IndexError if an id is out of range.

    Not on a GPU, where looking would wait for the device: the row becomes NaN there, its gradient too, and adds nothing
    to the gradients of weight and bias.
    """
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    bad = out_of_range(ids, vocab_size)
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise IndexError(
            f"{name}{place}: expected -1 (padding) or a token id in [0, {vocab_size}), got {int(ids[tuple(place)])}"
        )


def check_optional_ids(vocab_size: int, **ids: Tensor | None) -> None:
    for name, tensor in ids.items():
        if tensor is not None:
            check_ids(name, tensor, vocab_size)


# --- token logits ---------------------------------------------------------------------------------------------------


def linear_token_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [N, D], weight [V, D], token_ids [N, K] -> [N, K]: ``<hidden_n, weight_id> + bias_id``."""
    check_ids("token_ids", token_ids, weight.shape[0])
    dtype = compute_dtype(hidden, weight, bias)
    logits = torch.empty(token_ids.shape, dtype=dtype, device=hidden.device)
    for start in range(0, len(hidden), ROW_BLOCK):  # blocks bound the gathered rows, [ROW_BLOCK, K, D]
        rows = slice(start, start + ROW_BLOCK)
        gathered = weight[token_ids[rows].clamp(0, weight.shape[0] - 1)].to(dtype)
        logits[rows] = (hidden[rows, None, :].to(dtype) * gathered).sum(-1)
    if bias is not None:
        logits += bias[token_ids.clamp(0, weight.shape[0] - 1)].to(dtype)
    return logits.masked_fill((token_ids < 0) | (token_ids >= weight.shape[0]), torch.nan)


def token_logits_grad_hidden(grad: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """grad [N, K] -> [N, D]: ``sum_k grad_nk * weight_id``; padding contributes nothing."""
    check_ids("token_ids", token_ids, weight.shape[0])
    grad = grad.masked_fill(token_ids == -1, 0.0).masked_fill(out_of_range(token_ids, weight.shape[0]), torch.nan)
    rows = weight[token_ids.clamp(0, weight.shape[0] - 1)].to(grad.dtype)
    return (grad[:, :, None] * rows).sum(1).to(weight.dtype)


def token_logits_grad_rows(grad: Tensor, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the weight rows that were touched: their token ids [U], ascending, and the rows [U, D].

    Negative ids count for nothing.
    """
    flat = token_ids.reshape(-1)
    pairs = (flat >= 0).nonzero()[:, 0]
    row_ids, row_of_pair = torch.unique(flat[pairs], return_inverse=True)
    position = torch.div(pairs, max(token_ids.shape[1], 1), rounding_mode="floor")
    products = grad.reshape(-1)[pairs, None] * hidden[position].to(grad.dtype)
    rows = grad.new_zeros(len(row_ids), hidden.shape[1]).index_add_(0, row_of_pair, products)
    return row_ids, rows.to(hidden.dtype)


def token_logits_grad_weight(grad: Tensor, hidden: Tensor, token_ids: Tensor, vocab_size: int) -> Tensor:
    """The same gradient as a dense [V, D] tensor."""
    check_ids("token_ids", token_ids, vocab_size)
    token_ids = token_ids.masked_fill(out_of_range(token_ids, vocab_size), -1)
    row_ids, rows = token_logits_grad_rows(grad, hidden, token_ids)
    return rows.new_zeros(vocab_size, hidden.shape[1]).index_copy_(0, row_ids, rows)


# --- softmax statistics ---------------------------------------------------------------------------------------------


def _normaliser(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum m of each row and ``log sum exp(z - m)``; m is NaN for rows without a distribution.

    Those hold NaN or +inf, or nothing but -inf. Log-probabilities are ``(z - m) - log_sum``: taken from a logsumexp
    of 1e4 they would be off by 1e-3 in float32.
    """
    maximum = logits.amax(1)
    maximum = torch.where(maximum.isfinite(), maximum, torch.nan)
    return maximum, torch.exp(logits - maximum[:, None]).sum(1).log()


def _logprobs(logits: Tensor, maximum: Tensor, log_sum: Tensor) -> Tensor:
    return (logits - maximum[:, None]) - log_sum[:, None]


def _entropy(logits: Tensor, maximum: Tensor, log_sum: Tensor) -> Tensor:
    """``-sum p log p`` in nats; tokens of probability zero contribute nothing even where log p = -inf."""
    logprobs = _logprobs(logits, maximum, log_sum)
    probs = logprobs.exp()
    return -torch.where(probs == 0, 0.0, probs * logprobs).sum(1)


def _dominant(logits: Tensor, maximum: Tensor, log_sum: Tensor, rule: DominantRule) -> tuple[Tensor, Tensor, Tensor]:
    """Dominant ids [n, M] (descending probability, padded with -1), their number and their total probability."""
    vocab_size = logits.shape[1]
    max_size = rule.max_size(vocab_size)
    sorted_logits, ids = torch.topk(logits, min(max_size + 1, vocab_size), dim=1)
    entropy = _entropy(logits, maximum, log_sum) if rule.kind == "eta" else None
    return dominant_of_sorted(sorted_logits, ids, max_size, maximum, log_sum, entropy, rule)


def dominant_of_sorted(
    sorted_logits: Tensor,
    ids: Tensor,
    max_size: int,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    rule: DominantRule,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the M = ``max_size`` greatest logits of each row and one more (or all); "eta" needs the entropy."""
    probs = _logprobs(sorted_logits, maximum, log_sum).exp()
    rank = torch.arange(1, probs.shape[1] + 1, device=probs.device)
    if rule.kind == "jump":
        rounding = _ROUNDING * torch.finfo(probs.dtype).eps * probs[:, :-1]
        drop = probs[:, :-1] - probs[:, 1:] - rounding  # .01 - .005 must not exceed .005
        significant = F.pad((drop > rule.ratio * probs[:, :-1]) & (drop > rule.epsilon), (0, 1))
        first = torch.where(significant.any(1), significant.int().argmax(1) + 1, 0)
        last = torch.where(significant, rank, 0).amax(1)
        keep = rank <= (first if rule.cut == "first" else last)[:, None]
    elif rule.kind == "top_k":
        keep = rank <= rule.k
    elif rule.kind == "top_p":
        keep = torch.cumsum(probs, 1) < rule.p
    elif rule.kind == "min_p":
        keep = probs > rule.p * probs[:, :1]
    else:
        threshold = torch.full_like(maximum, rule.epsilon)
        if entropy is not None:
            threshold = torch.minimum(threshold, rule.epsilon**0.5 * torch.exp(-entropy))
        keep = probs > threshold[:, None]
    keep = keep & sorted_logits.isneginf().logical_not()  # what cannot come is not dominant
    keep = (keep & ~maximum.isnan()[:, None])[:, :max_size]
    mass = torch.where(keep, probs[:, :max_size], 0.0).sum(1)
    return (
        torch.where(keep, ids[:, :max_size], -1),
        keep.sum(1),
        mass.masked_fill(maximum.isnan(), torch.nan),
    )


def dominant_of(logits: Tensor, rule: DominantRule) -> tuple[Tensor, Tensor, Tensor]:
    """Dominant ids [n, M], their number and their mass, of logits [n, V]."""
    return _dominant(logits, *_normaliser(logits), rule)


def _logsumexp(logits: Tensor) -> Tensor:
    maximum, log_sum = _normaliser(logits)
    return maximum + log_sum


def _softmax_blocks(
    blocks: Iterable[tuple[slice, Tensor]],
    n: int,
    token_ids: Tensor | None,
    choice_ids: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Statistics of all blocks; tokens [N, K] and choices [N, C] (or [1, C] for all rows) are gathered together."""
    n_tokens = 0 if token_ids is None else token_ids.shape[1]
    ids = [ids.expand(n, -1) for ids in (token_ids, choice_ids) if ids is not None]
    columns = list(_reduce_blocks(blocks, _softmax_rows, torch.cat(ids, 1) if ids else None, *options))
    gathered = columns.pop(4)
    columns.insert(4, gathered[:, :n_tokens].clone())  # clones, as an operator's results must not share memory
    columns.insert(8, gathered[:, n_tokens:].clone())
    return tuple(columns)


def _softmax_rows(
    logits: Tensor,
    token_ids: Tensor | None,
    top_k: int,
    temperature: float | None,
    entropy: bool,
    dominant: str,
) -> tuple[Tensor, ...]:
    """All statistics of one block; those not asked for are empty columns."""
    n, vocab_size = logits.shape
    none = logits.new_empty(n, 0)
    no_ids = none.long()
    maximum, log_sum = _normaliser(logits)
    invalid = maximum.isnan()
    topk_logits, topk_ids = torch.topk(logits, min(top_k, vocab_size), dim=1)
    dominant_ids, size, mass = (
        _dominant(logits, maximum, log_sum, DominantRule.parse(dominant)) if dominant else (no_ids, no_ids, none)
    )
    return (
        maximum,
        -log_sum,
        logits.argmax(1).masked_fill(invalid, -1),
        _entropy(logits, maximum, log_sum) if entropy else none,
        none if token_ids is None else _gather(logits, token_ids).masked_fill(invalid[:, None], torch.nan),
        none if temperature is None else _logsumexp(logits / temperature),
        topk_logits.masked_fill(invalid[:, None], torch.nan),
        topk_ids.masked_fill(invalid[:, None], -1),
        dominant_ids,
        size,
        mass,
    )


def softmax_stats(
    logits: Tensor,
    token_ids: Tensor | None,
    choice_ids: Tensor | None,
    top_k: int,
    temperature: float | None,
    entropy: bool,
    dominant: str,
) -> tuple[Tensor, ...]:
    """Statistics of existing logits [N, V]; see :func:`pyqe.functional.softmax_stats`."""
    check_optional_ids(logits.shape[1], token_ids=token_ids, choice_ids=choice_ids)
    blocks = ((rows, block.to(compute_dtype(logits))) for rows, block in _blocks(logits))
    return _softmax_blocks(blocks, len(logits), token_ids, choice_ids, top_k, temperature, entropy, dominant)


def linear_softmax_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    token_ids: Tensor | None,
    choice_ids: Tensor | None,
    top_k: int,
    temperature: float | None,
    entropy: bool,
    dominant: str,
) -> tuple[Tensor, ...]:
    """Statistics of ``hidden @ weight.T``; see :func:`pyqe.functional.linear_softmax_stats`."""
    check_optional_ids(weight.shape[0], token_ids=token_ids, choice_ids=choice_ids)
    blocks = logit_blocks(hidden, weight, bias, logit_scale, logit_softcap)
    return _softmax_blocks(blocks, len(hidden), token_ids, choice_ids, top_k, temperature, entropy, dominant)


# --- sigmoid statistics ---------------------------------------------------------------------------------------------


def threshold_logit(threshold: float) -> float:
    """The logit whose sigmoid is the threshold; infinite where it is not in (0, 1)."""
    if not 0 < threshold < 1:
        return -math.inf if threshold <= 0 else math.inf
    return math.log(threshold / (1 - threshold))


def _sigmoid_rows(logits: Tensor, token_ids: Tensor | None, top_k: int, threshold: float | None) -> tuple[Tensor, ...]:
    none = logits.new_empty(len(logits), 0)
    invalid = logits.isnan().any(1)
    probs = torch.sigmoid(logits)
    max_logit, argmax = logits.max(1)
    topk_logits, topk_ids = torch.topk(logits, min(top_k, logits.shape[1]), dim=1)
    return (
        max_logit.masked_fill(invalid, torch.nan),
        argmax.masked_fill(invalid, -1),
        probs.sum(1),
        none.long() if threshold is None else (logits > threshold_logit(threshold)).sum(1).masked_fill(invalid, -1),
        none if token_ids is None else _gather(logits, token_ids).masked_fill(invalid[:, None], torch.nan),
        topk_logits.masked_fill(invalid[:, None], torch.nan),
        topk_ids.masked_fill(invalid[:, None], -1),
    )


def _affine(dots: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``scale * dots + bias + shift``: bias per token, scale and shift per row."""
    logits = dots if scale is None else dots * scale[:, None]
    if bias is not None:
        logits = logits + bias.to(dots.dtype)
    return logits if shift is None else logits + shift[:, None]


def _pad_optional(vector: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor | None:
    return None if vector is None else _pad_rows(vector[rows, None], 0)[:, 0].to(dtype)


def sigmoid_stats(logits: Tensor, token_ids: Tensor | None, top_k: int, threshold: float | None) -> tuple[Tensor, ...]:
    """Statistics of existing logits [N, V]; see :func:`pyqe.functional.sigmoid_stats`."""
    check_optional_ids(logits.shape[1], token_ids=token_ids)
    blocks = ((rows, block.to(compute_dtype(logits))) for rows, block in _blocks(logits))
    return _reduce_blocks(blocks, _sigmoid_rows, token_ids, top_k, threshold)


def linear_sigmoid_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    token_ids: Tensor | None,
    top_k: int,
    threshold: float | None,
) -> tuple[Tensor, ...]:
    """Statistics of ``scale * hidden @ weight.T + shift + bias``."""
    check_optional_ids(weight.shape[0], token_ids=token_ids)
    blocks = (
        (
            rows,
            _affine(dots, bias, _pad_optional(scale, rows, dots.dtype), _pad_optional(shift, rows, dots.dtype)),
        )
        for rows, dots in logit_blocks(hidden, weight, None)
    )
    return _reduce_blocks(blocks, _sigmoid_rows, token_ids, top_k, threshold)


def linear_joint_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    token_ids: Tensor | None,
    choice_ids: Tensor | None,
    top_k: int,
    temperature: float | None,
    entropy: bool,
    dominant: str,
    scale: Tensor,
    shift: Tensor,
    token_bias: Tensor | None,
    projected: Tensor | None,
    factors: Tensor | None,
    sigmoid_top_k: int,
    threshold: float | None,
) -> tuple[Tensor, ...]:
    """Softmax statistics of logits z, and sigmoid ones of ``scale z + token_bias + shift + projected @ factors.T``.

    All terms are float32: scale and shift [N], token_bias [V], projected [N, r], factors [V, r].
    """
    softmax_options = (token_ids, choice_ids, top_k, temperature, entropy, dominant)
    softmax = linear_softmax_stats(hidden, weight, bias, logit_scale, logit_softcap, *softmax_options)

    def corrected(rows: slice, logits: Tensor) -> Tensor:
        terms = (_pad_optional(term, rows, logits.dtype) for term in (scale, shift))
        result = _affine(logits, token_bias, *terms)
        if projected is not None and factors is not None:
            result = result + _pad_rows(projected[rows].to(result.dtype), 0) @ factors.to(result.dtype).T
        return result

    blocks = (
        (rows, corrected(rows, logits))
        for rows, logits in logit_blocks(hidden, weight, bias, logit_scale, logit_softcap)
    )
    return softmax + _reduce_blocks(blocks, _sigmoid_rows, token_ids, sigmoid_top_k, threshold)


# --- negatives ------------------------------------------------------------------------------------------------------


def _search(cdf: Tensor, value: Tensor) -> Tensor:
    """Index of the entry whose share of the cumulative sums [n, C] holds the value [n, m], 0 <= value < total.

    Rounding may carry a value to the total itself: the largest number below stands in for it, so that an entry of
    weight zero is never found.
    """
    below_total = torch.nextafter(cdf[:, -1:], torch.zeros_like(cdf[:, -1:]))
    return torch.searchsorted(cdf, torch.minimum(value, below_total).contiguous(), right=True)


def _draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """Ids [n, m] drawn from unnormalised weights [n, V] by inversion, with numbers [n, m] in [0, 1).

    In two levels, a tile and then a token inside it: only 1/TILE of the cumulative sums is needed, which leaves them
    affordable in float64 (in float32 a token less probable than 6e-8 could get lost).
    """
    n, m = numbers.shape
    tiles = F.pad(weights, (0, -weights.shape[1] % TILE)).view(n, -1, TILE)
    tile_sums = tiles.sum(2).double()
    cdf = tile_sums.cumsum(1)
    value = numbers * cdf[:, -1:]
    tile = _search(cdf, value)
    value = value - (cdf - tile_sums).gather(1, tile)
    chosen = tiles.gather(1, tile[:, :, None].expand(n, m, TILE)).double().cumsum(2)
    inside = _search(chosen.view(n * m, TILE), value.clamp(min=0).view(n * m, 1)).view(n, m)
    return tile * TILE + inside


def _draw_distinct(weights: Tensor, count: int, seed: int, stream: int, rows: Tensor) -> Tensor:
    """Ids [n, count] drawn without replacement from unnormalised weights [n, V], padded with -1.

    Drawing with replacement and passing over what was drawn before is drawing without replacement. A row that is not
    done after a round goes on with weight zero for what it holds, which is the same distribution again, so every
    round adds at least one token to it. Changes ``weights``.
    """
    picked = torch.full((len(weights), count), -1, dtype=torch.int64, device=weights.device)
    filled = torch.zeros_like(rows)
    per_round = count + 4
    todo = (weights > 0).any(1).nonzero()[:, 0]
    for start in range(0, count * per_round, per_round):
        if len(todo) == 0:
            break
        draws = torch.arange(start, start + per_round, device=weights.device)
        ids = _draw(weights[todo], uniform(seed, stream, rows[todo], draws))
        for column in ids.T:
            fresh = (picked[todo] != column[:, None]).all(1) & (filled[todo] < count)
            taken = todo[fresh]
            picked[taken, filled[taken]] = column[fresh]
            filled[taken] += 1
        weights[todo] = weights[todo].scatter(1, ids, 0.0)
        todo = todo[(filled[todo] < count) & (weights[todo] > 0).any(1)]
    return picked


def drop_repeats(ids: Tensor) -> Tensor:
    """-1 in place of every id that stands further left in its row already."""
    same = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(2)
    return ids.masked_fill(same, -1)


def _normalise(weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def sample_rows(
    logits: Tensor,
    targets: Tensor,
    first_row: int,
    seed: int,
    sources: list[str],
    shares: list[int],
    mixture_weights: list[float],
    combination: str,
    temperature: float,
    exclude: str,
    unigram_counts: Tensor | None,
) -> Tensor:
    maximum, log_sum = _normaliser(logits)
    excluded = targets[:, None]
    if exclude:
        excluded = torch.cat([excluded, _dominant(logits, maximum, log_sum, DominantRule.parse(exclude))[0]], 1)
    valid = ~maximum.isnan() & ~out_of_range(targets, logits.shape[1])
    allowed = valid[:, None] & ~mark(logits, excluded)

    def weights_of(source: str) -> Tensor:
        if source == "softmax":  # relative to the best token allowed, far below the dominant ones as it may be
            candidates = torch.where(allowed, logits, -torch.inf).double()  # float32 would lose all e^-104 below it
            best = candidates.amax(1, keepdim=True).nan_to_num(neginf=0.0)
            weights = torch.exp((candidates - best) / temperature)
        elif source == "unigram":
            assert unigram_counts is not None
            weights = unigram_counts.double().expand_as(logits)
        else:
            weights = torch.ones_like(logits, dtype=torch.float64)
        return torch.where(allowed, weights, 0.0)

    rows = torch.arange(first_row, first_row + len(logits), device=logits.device)
    if combination == "independent":
        draws = [
            _draw_distinct(weights_of(source), share, seed, stream, rows)
            for stream, (source, share) in enumerate(zip(sources, shares, strict=True))
        ]
        return drop_repeats(torch.cat(draws, 1))
    parts = [_normalise(weights_of(source)) for source in sources]
    if combination == "mixture":
        weights = sum((w * part for w, part in zip(mixture_weights, parts, strict=True)), torch.zeros_like(parts[0]))
    else:
        weights = torch.stack([part / part.amax(1, keepdim=True).clamp(min=1e-38) for part in parts]).prod(0)
    return _draw_distinct(weights, shares[0], seed, 0, rows)


def sample_blocks(blocks: Iterable[tuple[slice, Tensor]], targets: Tensor, *options: Any) -> Tensor:
    """Negatives of all blocks: row ranges and their logits [ROW_BLOCK, V], the last rows being padding."""
    parts = []
    for rows, logits in blocks:
        n = rows.stop - rows.start
        parts.append(sample_rows(logits, _pad_rows(targets[rows, None], -1)[:, 0], rows.start, *options)[:n])
    return torch.cat(parts)


def sample_negatives(logits: Tensor, targets: Tensor, seed: Tensor, *options: Any) -> Tensor:
    """Negatives [N, K] from existing logits; see :func:`pyqe.functional.sample_negatives`."""
    check_ids("targets", targets, logits.shape[1])
    blocks = ((rows, block.to(compute_dtype(logits))) for rows, block in _blocks(logits))
    return sample_blocks(blocks, targets, int(seed), *options)


def linear_sample_negatives(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    targets: Tensor,
    seed: Tensor,
    *options: Any,
) -> Tensor:
    """Negatives [N, K]; see :func:`pyqe.functional.linear_sample_negatives`."""
    check_ids("targets", targets, weight.shape[0])
    blocks = logit_blocks(hidden, weight, bias, logit_scale, logit_softcap)
    return sample_blocks(blocks, targets, int(seed), *options)


# --- vocabulary BCE -------------------------------------------------------------------------------------------------


def linear_vocab_bce(
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
    r"""Weighted total of the rows' losses, the losses, and the gradients of the total, in one pass over the logits.

    With :math:`z = s_n \langle h_n, w_v \rangle + b_v + t_n` and label :math:`y` (1 for the target, else 0),

        loss_n = sum over v not excluded of  y * pos_weight * softplus(-z) + (1 - y) * softplus(z)
        d loss_n / d z = -pos_weight * sigmoid(-z)  for the target, else  sigmoid(z)

    so no normaliser is needed and the gradient is known where the logit is. The target is never excluded; a row with
    target -1 has no positive.

    Returns:
        ``sum_n row_weights_n * loss_n``, losses [N], and the gradients of that sum in hidden [N, D], weight [V, D],
        bias [V], scale [N] and shift [N]; empty where not asked for or the argument is None.
    """
    check_optional_ids(weight.shape[0], targets=targets, exclude=exclude_ids)
    bad = out_of_range(targets, weight.shape[0])
    if exclude_ids is not None:
        bad = bad | out_of_range(exclude_ids, weight.shape[0]).any(1)
    row_weights = row_weights.masked_fill(bad, 0.0)  # nothing for the gradients of weight and bias
    dtype = compute_dtype(hidden, weight, bias)
    wide_weight = weight.to(dtype)
    total_grad_weight = torch.zeros_like(weight, dtype=dtype) if grad_weight else None
    total_grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None else None
    parts = []
    for rows, dots in logit_blocks(hidden, weight, None):
        row_scale, row_shift = _pad_optional(scale, rows, dtype), _pad_optional(shift, rows, dtype)
        logits = _affine(dots, bias, row_scale, row_shift)
        positive = mark(logits, _pad_rows(targets[rows, None], -1))
        kept = torch.ones_like(positive)
        if exclude_ids is not None:
            kept = ~mark(logits, _pad_rows(exclude_ids[rows], -1)) | positive
        loss = torch.where(positive, pos_weight * F.softplus(-logits), F.softplus(logits))
        grad = torch.where(positive, -pos_weight * torch.sigmoid(-logits), torch.sigmoid(logits))
        grad = torch.where(kept, grad, 0.0) * _pad_rows(row_weights[rows, None].to(dtype), 0)
        scaled = grad if row_scale is None else grad * row_scale[:, None]
        if total_grad_weight is not None:
            total_grad_weight.addmm_(scaled.T, _pad_rows(hidden[rows].to(dtype), 0))
        if total_grad_bias is not None:
            total_grad_bias += grad.sum(0)
        columns = (
            torch.where(kept, loss, 0.0).sum(1),
            scaled @ wide_weight if grad_hidden else scaled[:, :0],
            (grad * dots).sum(1),
            grad.sum(1),
        )
        parts.append(tuple(column[: rows.stop - rows.start] for column in columns))
    losses, total_grad_hidden, grad_scale, grad_shift = (
        torch.cat(column).masked_fill(bad.view(-1, *[1] * (column[0].dim() - 1)), torch.nan)
        for column in zip(*parts, strict=True)
    )

    def result(grad: Tensor | None, like: Tensor | None) -> Tensor:
        return hidden.new_empty(0) if grad is None or like is None else grad.to(like.dtype)

    return (
        (losses * row_weights).sum(),
        losses,
        result(total_grad_hidden if grad_hidden else None, hidden),
        result(total_grad_weight, weight),
        result(total_grad_bias, bias),
        result(grad_scale, scale),
        result(grad_shift, shift),
    )


def mark(logits: Tensor, ids: Tensor) -> Tensor:
    """Boolean [n, V]: true at the ids [n, M] of each row; -1 marks nothing."""
    n, vocab_size = logits.shape
    marks = logits.new_zeros((n, vocab_size + 1), dtype=torch.bool)  # the last column takes what marks nothing
    inside = (ids >= 0) & (ids < vocab_size)
    return marks.scatter_(1, torch.where(inside, ids, vocab_size), True)[:, :vocab_size]


# --- probabilities that are stated, temperature ---------------------------------------------------------------------


def inverse_softmax(probs: Tensor, eps: float, center: str) -> Tensor:
    """probs [N, C] -> ``log(max(p, eps))`` minus nothing, its mean or its logsumexp."""
    probs = probs.to(compute_dtype(probs))
    logits = torch.log(probs.clamp(min=eps))
    valid = (probs >= 0).all(1, keepdim=True)
    if center != "none":
        centre = logits.mean(1, keepdim=True) if center == "mean" else torch.logsumexp(logits, 1, keepdim=True)
        logits, valid = logits - centre, valid & centre.isfinite()
    return logits.masked_fill(~valid, torch.nan)


def _temperature_rows(logits: Tensor, labels: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's terms of :func:`temperature_nll`; labels are ids [n, 1] or probabilities [n, C]."""
    z = logits.double()
    z = z - z.amax(1, keepdim=True)
    if labels.is_floating_point():
        target = torch.where(labels == 0, 0.0, labels * z).sum(1)
    else:
        target = _gather(z, labels)[:, 0]
    log_probs = F.log_softmax(beta * z, 1)
    probs = log_probs.exp()
    mean = torch.where(probs == 0, 0.0, probs * z).sum(1)
    variance = torch.where(probs == 0, 0.0, probs * (z - mean[:, None]) ** 2).sum(1)
    losses = torch.logsumexp(beta * z, 1) - beta * target
    return losses, mean - target, variance


def temperature_nll(logits: Tensor, labels: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean NLL of ``softmax(beta * z)`` with first and second derivative in beta, float64.

    :math:`L = \frac1N \sum_n \log\sum_c e^{\beta z_{nc}} - \beta \langle y_n, z_n \rangle`,
    :math:`L' = \mathrm{mean}(E_\beta[z] - \langle y, z \rangle)`, :math:`L'' = \mathrm{mean}(\mathrm{Var}_\beta[z])`.
    Logits are taken relative to their row's maximum, which changes none of the three.
    """
    if labels.dim() == 1:
        check_ids("labels", labels, logits.shape[1])
        labels = labels[:, None]
    losses, first, second = _temperature_rows(logits, labels, beta.double())
    return losses.mean(), first.mean(), second.mean()


def linear_temperature_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    labels: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a head's logits, with labels [N]."""
    check_ids("labels", labels, weight.shape[0])
    blocks = logit_blocks(hidden, weight, bias, logit_scale, logit_softcap)
    losses, first, second = _reduce_blocks(blocks, _temperature_rows, labels[:, None], beta.double())
    return losses.mean(), first.mean(), second.mean()
