r"""The operators where the weight [V, D] is a DTensor: its rows are sharded over the processes of one mesh dimension.

Every process holds the same hidden states and ids, runs the plain operators on its own rows, and what is left is small:

* statistics are gathered, all columns in one collective, and merged in the order of the processes;
* logits of tokens, losses, and gradients of what every process holds are summed, in that order too.

So every process has the same result, bit for bit the same from run to run. The gradient of the weight is that of the
process's own rows, a DTensor placed as the weight.

Bytes that each of R processes receives for each row (for float64, 8 in place of the 4s of numbers):

================ =====================================================================================================
softmax stats    (R - 1) (12 + 4 [entropy] + 4 [temperature] + 4 ids + 4 choices + 8 k), k the greater of top_k and,
                 with a dominant rule, its ``max_size(V)`` + 1, but no more than a process's rows
sigmoid stats    (R - 1) (12 + 4 [threshold] + 4 ids + 8 top_k)
negatives        those of softmax stats with the rule of the exclusion, and (R - 1) 12 K
sums             8 (R - 1) / R a number: K of token logits, 1 of a vocabulary loss, D of the gradient of hidden states
================ =====================================================================================================

Merging: with :math:`m_r` the maximum of shard r, :math:`l_r` the log of its sum of :math:`e^{z - m_r}` and :math:`H_r`
its entropy,

.. math:: m = \max_r m_r, \quad l = \log\sum_r e^{s_r}, \; s_r = m_r - m + l_r, \quad
          H = \sum_r e^{s_r - l} (H_r - (s_r - l)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pyqe.backends import reference
from pyqe.dominant import DominantRule


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; found without importing those, which takes a second."""
    return hasattr(tensor, "placements")


def replicated_as(tensor: Tensor, like: Tensor) -> Tensor:
    """What every process holds, for arithmetic with another tensor: a replicated DTensor where that is a DTensor."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim)


def whole(tensor: Any) -> Tensor:
    """All rows of a tensor, on every process; a collective where it is a DTensor."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def operator(name: str, weight: Tensor) -> Callable[..., Any]:
    """The operator for this weight: torch's own, or where it is a DTensor the one of this module.

    Raises:
        NotImplementedError: there is none for DTensors.
    """
    if not is_sharded(weight):
        plain: Callable[..., Any] = getattr(torch.ops.pyqe, name)
        return plain
    if name not in _OPERATORS:
        raise NotImplementedError(f"{name}: not with a sharded weight; weight.full_tensor() gathers it")
    return _OPERATORS[name]


# --- sums over the processes ----------------------------------------------------------------------------------------


def _ordered_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the processes in the order of their ranks, which an all-reduce does not promise.

    Each process sums one slice, so that it moves what a ring all-reduce moves and holds no copy for every process.
    """
    slices = F.pad(tensor.reshape(-1), (0, -tensor.numel() % group.size()))
    theirs, result = torch.empty_like(slices), torch.empty_like(slices)
    dist.all_to_all_single(theirs, slices, group=group)
    dist.all_gather(list(result.chunk(group.size())), theirs.view(group.size(), -1).sum(0), group=group)
    return result[: tensor.numel()].view(tensor.shape)


class _Sum(torch.autograd.Function):
    """Sum over the processes of what each has computed; every process then has the gradient of its own part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _ordered_sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Copy(torch.autograd.Function):
    """What every process holds; its gradient is the sum of what the processes find for their rows of the weight."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = grad.to(reference.compute_dtype(grad))  # sums of bfloat16 would round at every process
        return _ordered_sum(wide, ctx.group).to(grad.dtype), None


# --- one process's rows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """Rows [offset, offset + v) of a weight [V, D]; ``chunk`` are the rows of every process but the last ones."""

    weight: Tensor
    bias: Tensor | None
    vocab_size: int
    chunk: int
    offset: int
    group: dist.ProcessGroup | None  # None where every process has all rows

    @classmethod
    def of(cls, weight: Any, bias: Any) -> _Shard:
        mesh, placements = weight.device_mesh, weight.placements
        dims = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
        if len(dims) > 1 or not all(placements[dim].is_shard(0) for dim in dims):
            raise ValueError(f"weight: expected Shard(0) in one dimension of its mesh and no other, got {placements}")
        if bias is not None and (getattr(bias, "placements", None) != placements or bias.device_mesh != mesh):
            raise ValueError(f"bias: expected a DTensor placed as weight is, {placements}, got {type(bias).__name__}")
        vocab_size, count = weight.shape[0], mesh.size(dims[0]) if dims else 1
        chunk = -(-vocab_size // count)
        offset = min(mesh.get_local_rank(dims[0]) * chunk, vocab_size) if dims else 0
        rows, row_bias = weight.to_local(), None if bias is None else bias.to_local()
        if len(rows) != min(chunk, vocab_size - offset):
            raise ValueError(f"weight: expected {min(chunk, vocab_size - offset)} rows here, got {len(rows)}")
        if len(rows) == 0:  # more processes than chunks: a row that cannot come stands in
            row_bias = rows.new_empty(0) if row_bias is None else row_bias
            rows, row_bias = F.pad(rows, (0, 0, 0, 1)), F.pad(row_bias, (0, 1), value=-torch.inf)
        return cls(rows, row_bias, vocab_size, chunk, offset, mesh.get_group(dims[0]) if dims else None)

    def ids(self, ids: Tensor | None) -> Tensor | None:
        """Ids as row numbers of this shard; -1 for those of others, and what is no token stays none."""
        if ids is None:
            return None
        elsewhere = (ids < self.offset) | (ids >= self.offset + len(self.weight))
        token = (ids >= 0) & (ids < self.vocab_size)
        return torch.where(token, torch.where(elsewhere, -1, ids - self.offset), ids)

    def copy(self, tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or self.group is None else _Copy.apply(tensor, self.group)  # type: ignore[no-untyped-call]

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor if self.group is None else _Sum.apply(tensor, self.group)  # type: ignore[no-untyped-call]

    def gather(self, *columns: Tensor) -> list[Tensor]:
        """Columns [N, ...] of every process, [R, N, ...]; one collective of bytes for all of them."""
        if self.group is None or columns[0].numel() == 0:
            return [column[None] for column in columns]
        parts = [column.flatten().view(torch.uint8) for column in columns]
        packed = torch.cat(parts)
        everyone = packed.new_empty(self.group.size(), len(packed))
        dist.all_gather(list(everyone), packed, group=self.group)
        split = everyone.split([len(part) for part in parts], 1)
        return [
            theirs.clone()
            .flatten()
            .view(column.dtype)
            .view(len(everyone), *column.shape)  # clone: bytes must be aligned
            for theirs, column in zip(split, columns, strict=True)
        ]

    def of_owner(self, theirs: Tensor, ids: Tensor) -> Tensor:
        """Of columns [R, N, K] the numbers [N, K] that the owners of the ids found; NaN where an id is no token."""
        owner = (ids // self.chunk).clamp(0, len(theirs) - 1).expand(theirs.shape[1:])
        token = (ids >= 0) & (ids < self.vocab_size)
        return theirs.gather(0, owner[None])[0].masked_fill(~token, torch.nan)

    def candidates(self, logits: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Best tokens [N, k] of this shard, k <= count, as wide at every process; ids of the vocabulary, in 32 bits."""
        padding = (0, min(count, self.chunk) - logits.shape[1])
        ids = torch.where(ids < 0, -1, ids + self.offset)
        return F.pad(logits, padding, value=-torch.inf), F.pad(ids, padding, value=-1).int()


def _best(keys: Tensor, ids: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` greatest keys of all shards [R, N, k] and their ids, descending; of equals the lowest id first."""
    keys, order = keys.transpose(0, 1).flatten(1).sort(dim=1, descending=True, stable=True)
    ids = ids.transpose(0, 1).flatten(1).gather(1, order[:, :count])
    return keys[:, :count].contiguous(), ids.long()


# --- statistics -----------------------------------------------------------------------------------------------------


def _softmax_columns(
    shard: _Shard,
    hidden: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    token_ids: Tensor | None,
    choice_ids: Tensor | None,
    count: int,
    temperature: float | None,
    entropy: bool,
) -> list[Tensor]:
    """What a shard has to tell: maximum, log of the sum, entropy, tempered, tokens, choices, argmax, best tokens."""
    ids = (shard.ids(token_ids), shard.ids(choice_ids))
    maximum, max_logprob, argmax, entropies, tokens, tempered, topk, topk_ids, choices, *_ = (
        torch.ops.pyqe.linear_softmax_stats(
            hidden, shard.weight, shard.bias, logit_scale, logit_softcap, *ids, count, temperature, entropy, ""
        )
    )
    columns = [maximum, -max_logprob, entropies, tempered, tokens, choices, topk]
    if shard.bias is not None:  # a shard whose tokens cannot come says NaN, but those of others may
        absent = maximum.isnan() & shard.bias.isneginf().all() & hidden.isfinite().all(1)
        columns = [torch.where(absent.view(-1, *[1] * (c.dim() - 1)), -torch.inf, c) for c in columns]
    *columns, topk = columns
    return [*columns, (argmax + shard.offset).int(), *shard.candidates(topk, topk_ids, count)]


def _linear_softmax_stats(
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
    shard = _Shard.of(weight.detach(), None if bias is None else bias.detach())
    reference.check_optional_ids(shard.vocab_size, token_ids=token_ids, choice_ids=choice_ids)
    rule = DominantRule.parse(dominant) if dominant else None
    members = 0 if rule is None else rule.max_size(shard.vocab_size)
    count = min(max(top_k, members + 1 if rule else 0), shard.vocab_size)
    entropy = entropy or (rule is not None and rule.kind == "eta")
    wanted = (logit_scale, logit_softcap, token_ids, choice_ids, count, temperature, entropy)
    all_maximum, all_log_sum, entropies, tempered, tokens, choices, argmax, *best = shard.gather(
        *_softmax_columns(shard, hidden, *wanted)
    )
    maximum = all_maximum.amax(0)
    maximum = torch.where(maximum.isfinite(), maximum, torch.nan)
    invalid = maximum.isnan()
    shares = all_maximum - maximum + all_log_sum
    log_sum = torch.logsumexp(shares, 0)
    topk, topk_ids = _best(*best, count=count)
    topk, topk_ids = _valid(topk, invalid), topk_ids.masked_fill(invalid[:, None], -1)
    if entropy:
        shares = shares - log_sum
        entropies = torch.where(shares.exp() == 0, 0.0, shares.exp() * (entropies - shares)).sum(0)
    dominants: tuple[Tensor, ...] = (topk_ids[:, :0],) * 3
    if rule is not None:
        kept = (topk[:, : members + 1], topk_ids[:, : members + 1])
        dominants = reference.dominant_of_sorted(*kept, members, maximum, log_sum, entropies, rule)
    return (
        maximum,
        -log_sum,
        argmax.gather(0, all_maximum.argmax(0)[None])[0].long().masked_fill(invalid, -1),
        entropies,
        tokens if token_ids is None else _valid(shard.of_owner(tokens, token_ids), invalid),
        tempered if temperature is None else torch.logsumexp(tempered, 0).masked_fill(invalid, torch.nan),
        topk[:, :top_k],
        topk_ids[:, :top_k],
        choices if choice_ids is None else _valid(shard.of_owner(choices, choice_ids), invalid),
        *dominants,
    )


def _valid(numbers: Tensor, invalid: Tensor) -> Tensor:
    return numbers.masked_fill(invalid[:, None], torch.nan)


def _linear_sigmoid_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    token_ids: Tensor | None,
    top_k: int,
    threshold: float | None,
) -> tuple[Tensor, ...]:
    shard = _Shard.of(weight.detach(), None if bias is None else bias.detach())
    reference.check_optional_ids(shard.vocab_size, token_ids=token_ids)
    top_k = min(top_k, shard.vocab_size)
    maximum, argmax, sum_prob, above, tokens, topk, topk_ids = torch.ops.pyqe.linear_sigmoid_stats(
        hidden, shard.weight, shard.bias, scale, shift, shard.ids(token_ids), top_k, threshold
    )
    all_maximum, all_argmax, all_sums, all_above, all_tokens, *all_topk = shard.gather(
        *(maximum, (argmax + shard.offset).int(), sum_prob, above.int(), tokens),
        *shard.candidates(topk, topk_ids, top_k),
    )
    maximum = all_maximum.amax(0)
    invalid = maximum.isnan()
    topk, topk_ids = _best(*all_topk, count=top_k)
    return (
        maximum,
        all_argmax.gather(0, all_maximum.argmax(0)[None])[0].long().masked_fill(invalid, -1),
        all_sums.sum(0),
        above if threshold is None else all_above.sum(0).masked_fill(invalid, -1),
        tokens if token_ids is None else _valid(shard.of_owner(all_tokens, token_ids), invalid),
        _valid(topk, invalid),
        topk_ids.masked_fill(invalid[:, None], -1),
    )


# --- token logits and losses ----------------------------------------------------------------------------------------


def _linear_token_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> Tensor:
    shard = _Shard.of(weight, bias)
    reference.check_ids("token_ids", token_ids, shard.vocab_size)
    ids = shard.ids(token_ids)
    logits = torch.ops.pyqe.linear_token_logits(shard.copy(hidden), shard.weight, ids, shard.bias)
    return shard.sum(logits.masked_fill((ids == -1) & (token_ids >= 0), 0.0))


def _linear_vocab_bce(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    targets: Tensor,
    exclude_ids: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    shard = _Shard.of(weight, bias)
    reference.check_optional_ids(shard.vocab_size, targets=targets, exclude=exclude_ids)
    total, losses, *_ = torch.ops.pyqe.linear_vocab_bce(
        shard.copy(hidden),
        *(shard.weight, shard.bias, shard.copy(scale), shard.copy(shift)),
        *(shard.ids(targets), shard.ids(exclude_ids), *options),
    )
    return shard.sum(total), shard.sum(losses)


# --- negatives ------------------------------------------------------------------------------------------------------


def _log_weights(
    logits: Tensor, allowed: Tensor, sources: list[str], temperature: float, log_counts: Tensor | None
) -> Tensor:
    """Logs of each source's unnormalised weights, float64 [S, n, v]; -inf for what may not be drawn."""

    def of(source: str) -> Tensor:
        if source == "softmax":
            return logits.double() / temperature
        if source == "unigram":
            assert log_counts is not None
            return log_counts
        return torch.zeros_like(logits, dtype=torch.float64)

    return torch.stack([torch.where(allowed, of(source), -torch.inf) for source in sources])


def _linear_sample_negatives(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    targets: Tensor,
    seed: Tensor,
    sources: list[str],
    shares: list[int],
    mixture_weights: list[float],
    combination: str,
    temperature: float,
    exclude: str,
    unigram_counts: Tensor | None,
) -> Tensor:
    """An exponential race: the tokens v with the least :math:`E_v / w_v`, E standard exponential, are drawn from the
    weights w without replacement. Each shard runs the race of its tokens; the winners of all shards are gathered.
    """
    detached = (weight.detach(), None if bias is None else bias.detach())
    shard = _Shard.of(*detached)
    head = (hidden, *detached, logit_scale, logit_softcap)
    maximum, *_, dominant, _, _ = _linear_softmax_stats(*head, None, None, 0, None, False, exclude)
    valid = ~maximum.isnan() & ~reference.out_of_range(targets, shard.vocab_size)
    reference.check_ids("targets", targets, shard.vocab_size)
    excluded = shard.ids(torch.cat([targets[:, None], dominant], 1))
    assert excluded is not None
    log_counts = None
    if unigram_counts is not None:
        log_counts = F.pad(unigram_counts, (0, 1))[shard.offset :][: len(shard.weight)].double().log()

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        rows_here = torch.arange(len(shard.weight), device=hidden.device) < shard.vocab_size - shard.offset
        for rows, logits in reference.logit_blocks(hidden, shard.weight, shard.bias, logit_scale, logit_softcap):
            logits = logits[: rows.stop - rows.start]
            allowed = rows_here & valid[rows, None] & ~reference.mark(logits, excluded[rows])
            yield rows, _log_weights(logits, allowed, sources, temperature, log_counts)

    log_shares = torch.zeros(len(hidden), len(sources), dtype=torch.float64, device=hidden.device)
    if combination == "mixture":
        (masses,) = shard.gather(torch.cat([torch.logsumexp(log_weights, 2).T for _, log_weights in blocks()]))
        log_shares += torch.tensor(mixture_weights, dtype=torch.float64, device=hidden.device).log()
        log_shares -= torch.logsumexp(masses, 0).nan_to_num(neginf=0.0)  # 0 for a source that has nothing left
    generator = torch.Generator(hidden.device).manual_seed((int(seed) + shard.offset) % 2**63)
    winners: list[list[tuple[Tensor, Tensor]]] = [[] for _ in shares]
    for rows, log_weights in blocks():
        if combination == "mixture":
            log_weights = torch.logsumexp(log_weights + log_shares[rows].T[:, :, None], 0, keepdim=True)
        elif combination == "product":
            log_weights = log_weights.sum(0, keepdim=True)
        race = log_weights - torch.empty_like(log_weights).exponential_(generator=generator).log()
        for best, keys, share in zip(winners, race, shares, strict=True):
            best.append(keys.topk(min(share, keys.shape[1]), 1))
    drawn = [_finish(shard, best, share) for best, share in zip(winners, shares, strict=True)]
    return reference.drop_repeats(torch.cat(drawn, 1))


def _finish(shard: _Shard, winners: list[tuple[Tensor, Tensor]], share: int) -> Tensor:
    """The first ``share`` of all shards' winners, blocks of (keys, ids), as ids [N, share] padded with -1."""
    local_keys, local_ids = (torch.cat(column) for column in zip(*winners, strict=True))
    keys, ids = _best(*shard.gather(*shard.candidates(local_keys, local_ids, share)), count=share)
    return F.pad(ids.masked_fill(keys.isneginf(), -1), (0, share - ids.shape[1]), value=-1)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "linear_softmax_stats": _linear_softmax_stats,
    "linear_sigmoid_stats": _linear_sigmoid_stats,
    "linear_token_logits": _linear_token_logits,
    "linear_vocab_bce": _linear_vocab_bce,
    "linear_sample_negatives": _linear_sample_negatives,
}
