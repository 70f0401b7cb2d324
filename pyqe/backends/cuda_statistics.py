"""Statistics of rows of logits on the CUDA backend: results, scratch memory, and chunks of a head's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyqe.backends import reference
from pyqe.backends.cuda_library import CODES, library, pointer, row_pointer, stream
from pyqe.backends.cuda_product import padded_rows, product, row_chunks
from pyqe.backends.operands import check_shape, checked_head, floats, on_its_device, row_terms, rows_of
from pyqe.dominant import DominantRule

_SORTED_ROWS = 256  # of 128256 tokens: a float32 copy, its sorted values and their ids take .5 GB
_KINDS = {"": 0, "jump": 1, "top_k": 2, "top_p": 3, "min_p": 4, "epsilon": 5, "eta": 6}


@dataclass
class Rows:
    """Logits of some rows of a call: a matrix, and what is to be done to its elements."""

    matrix: Tensor  # [n, V]
    bias: Tensor | None = None  # float32 [V]
    row_scale: Tensor | None = None  # float32 [n]
    row_shift: Tensor | None = None  # float32 [n]
    scale: float = 1.0
    softcap: float | None = None

    def handle(self) -> Any:
        """The same for the library."""
        n, vocab_size = self.matrix.shape
        return library.logits(
            self.matrix.data_ptr(),
            self.matrix.stride(0),
            n,
            vocab_size,
            CODES[self.matrix.dtype],
            pointer(self.bias),
            pointer(self.row_scale),
            pointer(self.row_shift),
            self.scale,
            self.softcap or 0.0,
        )

    def logits(self) -> Tensor:
        """float32 [n, V]."""
        z = self.matrix.float()
        z = z if self.row_scale is None else z * self.row_scale[:, None]
        z = z if self.bias is None else z + self.bias
        z = z if self.row_shift is None else z + self.row_shift[:, None]
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class Second(NamedTuple):
    """A second head's logits, made of the first one's z: ``scale z + bias + addend + shift``, all float32."""

    scale: Tensor  # [n]
    shift: Tensor  # [n]
    bias: Tensor | None  # [V]
    addend: Tensor | None  # [n, V]

    def of(self, logits: Tensor) -> Tensor:
        z = logits * self.scale[:, None] + self.shift[:, None]
        z = z if self.bias is None else z + self.bias
        return z if self.addend is None else z + self.addend


Block = tuple[slice, Rows, Second | None]


def _empty_ids(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=device)


class _Scratch:
    """Memory that the kernels need for so many rows; one allocation, used again for every block."""

    def __init__(
        self, n: int, vocab_size: int, device: torch.device, softmax: _Softmax | None, sigmoid: _Sigmoid | None
    ) -> None:
        segments = n * -(-vocab_size // library.SEGMENT)
        tiles = -(-n * -(-vocab_size // library.TILE) * 4 // 16) * 16  # bytes
        sizes = (
            segments * library.SOFTMAX_PARTIAL_BYTES if softmax else 0,
            segments * library.SIGMOID_PARTIAL_BYTES if sigmoid else 0,
            tiles if softmax and softmax.wants_tiles else 0,
            tiles if sigmoid and sigmoid.wants_tiles else 0,
        )
        self.memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        place, starts = self.memory.data_ptr(), accumulate(sizes[:-1], initial=0)
        places = [place + before if size else 0 for size, before in zip(sizes, starts, strict=True)]
        self.softmax, self.sigmoid, self.softmax_tiles, self.sigmoid_tiles = places


def _sorted(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest and their ids by a stable sort: ``torch.topk`` promises no order among equals."""
    order = torch.sort(logits, dim=1, descending=True, stable=True)
    return order.values[:, :count], order.indices[:, :count]


def _valid_top(best: tuple[Tensor, Tensor], top_k: int, invalid: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = (part[:, :top_k] for part in best)
    return values.masked_fill(invalid[:, None], torch.nan), ids.masked_fill(invalid[:, None], -1)


class _Softmax:
    """Results of softmax statistics for a call of n rows, filled some rows at a time."""

    def __init__(
        self,
        n: int,
        vocab_size: int,
        device: torch.device,
        top_k: int,
        temperature: float | None,
        entropy: bool,
        dominant: str,
    ) -> None:
        self.rule = DominantRule.parse(dominant) if dominant else None
        self.top_k, self.temperature = min(top_k, vocab_size), temperature
        self.members = self.rule.max_size(vocab_size) if self.rule else 0
        # more candidates than the kernel holds: torch finds them, sorting whole rows
        unbounded = self.rule is not None and self.rule.kind in ("top_p", "min_p", "eta")
        self.sorts = unbounded or max(self.top_k, self.members + 1) > library.MAX_CANDIDATES
        self.max_logit, self.max_logprob = torch.empty(n, device=device), torch.empty(n, device=device)
        self.argmax = _empty_ids(device, n)
        self.returns_entropy = entropy  # the rule may need it, too
        computed = entropy or (self.rule is not None and self.rule.kind == "eta")
        self.entropy = torch.empty((n,) if computed else (n, 0), device=device)
        self.tempered = torch.empty((n, 0) if temperature is None else (n,), device=device)
        self.topk_logits = torch.empty(n, self.top_k, device=device)
        self.topk_ids = _empty_ids(device, n, self.top_k)
        self.dominant_ids = _empty_ids(device, n, self.members)
        self.size = _empty_ids(device, *((n,) if self.rule else (n, 0)))
        self.mass = torch.empty((n,) if self.rule else (n, 0), device=device)

    @property
    def wants_tiles(self) -> bool:
        return not self.sorts and (self.top_k > 0 or self.rule is not None)

    def request(self, rows: slice, scratch: _Scratch) -> Any:
        return library.softmax_request(
            scratch.softmax,
            scratch.softmax_tiles,
            1.0 / (self.temperature or 1.0),
            row_pointer(self.max_logit, rows.start),
            row_pointer(self.max_logprob, rows.start),
            row_pointer(self.argmax, rows.start),
            row_pointer(self.entropy, rows.start) if self.entropy.dim() == 1 else 0,
            0 if self.temperature is None else row_pointer(self.tempered, rows.start),
        )

    def find_candidates(self, logits: Any, source: Rows, rows: slice, scratch: _Scratch) -> None:
        if self.sorts:
            self._sort(source.logits(), rows)
        elif self.wants_tiles:
            rule = self.rule or DominantRule()
            kind = _KINDS[rule.kind] if self.rule else 0
            library.row_candidates(
                logits,
                library.correction(),
                tile_max=scratch.softmax_tiles,
                max_logit=row_pointer(self.max_logit, rows.start),
                max_logprob=row_pointer(self.max_logprob, rows.start),
                top_k=self.top_k,
                topk_logits=row_pointer(self.topk_logits, rows.start),
                topk_ids=row_pointer(self.topk_ids, rows.start),
                rule=library.rule(kind, rule.cut == "last", rule.ratio, rule.epsilon, rule.p, rule.k),
                members=self.members,
                dominant_ids=row_pointer(self.dominant_ids, rows.start),
                size=row_pointer(self.size, rows.start),
                mass=row_pointer(self.mass, rows.start),
                stream=stream(source.matrix),
            )

    def _sort(self, logits: Tensor, rows: slice) -> None:
        maximum, log_sum = self.max_logit[rows], -self.max_logprob[rows]
        best = _sorted(logits, max(self.top_k, self.members + 1))
        self.topk_logits[rows], self.topk_ids[rows] = _valid_top(best, self.top_k, maximum.isnan())
        if self.rule is not None:
            values, ids = (part[:, : self.members + 1] for part in best)
            entropy = self.entropy[rows] if self.entropy.dim() == 1 else None
            found = reference.dominant_of_sorted(values, ids, self.members, maximum, log_sum, entropy, self.rule)
            self.dominant_ids[rows], self.size[rows], self.mass[rows] = found

    def results(self, tokens: Tensor, choices: Tensor) -> tuple[Tensor, ...]:
        return (
            self.max_logit,
            self.max_logprob,
            self.argmax,
            self.entropy if self.returns_entropy else self.mass.new_empty(len(self.mass), 0),
            tokens,
            self.tempered,
            self.topk_logits,
            self.topk_ids,
            choices,
            self.dominant_ids,
            self.size,
            self.mass,
        )


class _Sigmoid:
    """Results of sigmoid statistics for a call of n rows, filled some rows at a time."""

    def __init__(self, n: int, vocab_size: int, device: torch.device, top_k: int, threshold: float | None) -> None:
        self.top_k, self.threshold = min(top_k, vocab_size), threshold
        self.sorts = self.top_k > library.MAX_CANDIDATES
        self.max_logit, self.sum_prob = torch.empty(n, device=device), torch.empty(n, device=device)
        self.argmax = _empty_ids(device, n)
        self.above = _empty_ids(device, *((n, 0) if threshold is None else (n,)))
        self.topk_logits = torch.empty(n, self.top_k, device=device)
        self.topk_ids = _empty_ids(device, n, self.top_k)

    @property
    def wants_tiles(self) -> bool:
        return not self.sorts and self.top_k > 0

    def request(self, rows: slice, scratch: _Scratch) -> Any:
        return library.sigmoid_request(
            scratch.sigmoid,
            scratch.sigmoid_tiles,
            0.0 if self.threshold is None else reference.threshold_logit(self.threshold),
            row_pointer(self.max_logit, rows.start),
            row_pointer(self.sum_prob, rows.start),
            row_pointer(self.argmax, rows.start),
            0 if self.threshold is None else row_pointer(self.above, rows.start),
        )

    def find_candidates(
        self, logits: Any, second: Any, logits_of: Callable[[], Tensor], rows: slice, scratch: _Scratch, stream: int
    ) -> None:
        if self.sorts:
            invalid = self.max_logit[rows].isnan()
            best = _sorted(logits_of(), self.top_k)
            self.topk_logits[rows], self.topk_ids[rows] = _valid_top(best, self.top_k, invalid)
        elif self.wants_tiles:
            library.row_candidates(
                logits,
                second,
                tile_max=scratch.sigmoid_tiles,
                max_logit=row_pointer(self.max_logit, rows.start),
                max_logprob=0,
                top_k=self.top_k,
                topk_logits=row_pointer(self.topk_logits, rows.start),
                topk_ids=row_pointer(self.topk_ids, rows.start),
                rule=library.rule(0, False, 0.0, 0.0, 0.0, 0),
                members=0,
                dominant_ids=0,
                size=0,
                mass=0,
                stream=stream,
            )

    def results(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.max_logit, self.argmax, self.sum_prob, self.above, tokens, self.topk_logits, self.topk_ids


class _Pass:
    """What a call asks for of its n rows; :meth:`run` computes it, some rows at a time."""

    def __init__(
        self,
        n: int,
        vocab_size: int,
        device: torch.device,
        ids: tuple[Tensor | None, Tensor | None],
        softmax: _Softmax | None,
        sigmoid: _Sigmoid | None,
    ) -> None:
        for name, some in zip(("token_ids", "choice_ids"), ids, strict=True):
            if some is not None:
                reference.check_ids(name, some, vocab_size)
        given = [some.expand(n, -1) for some in ids if some is not None]
        self.ids = torch.cat(given, 1) if given else None
        self.n_tokens = 0 if ids[0] is None else ids[0].shape[1]
        self.vocab_size, self.device = vocab_size, device
        self.softmax, self.sigmoid = softmax, sigmoid
        width = 0 if self.ids is None else self.ids.shape[1]
        self.softmax_tokens = torch.empty(n if softmax else 0, width, device=device)
        self.sigmoid_tokens = torch.empty(n if sigmoid else 0, width, device=device)

    def run(self, blocks: Iterable[Block]) -> None:
        scratch = None
        for rows, source, second in blocks:
            if scratch is None:  # the first block is the largest
                scratch = _Scratch(len(source.matrix), self.vocab_size, self.device, self.softmax, self.sigmoid)
            self._read(rows, source, second, scratch)

    def _read(self, rows: slice, source: Rows, second: Second | None, scratch: _Scratch) -> None:
        logits = source.handle()
        correction = library.correction(*map(pointer, second or ()))
        library.row_statistics(
            logits,
            correction,
            self.softmax.request(rows, scratch) if self.softmax else library.softmax_request(),
            self.sigmoid.request(rows, scratch) if self.sigmoid else library.sigmoid_request(),
            token_ids=0 if self.ids is None else row_pointer(self.ids, rows.start),
            n_tokens=0 if self.ids is None else self.ids.shape[1],
            softmax_tokens=row_pointer(self.softmax_tokens, rows.start) if self.softmax else 0,
            sigmoid_tokens=row_pointer(self.sigmoid_tokens, rows.start) if self.sigmoid else 0,
            stream=stream(source.matrix),
        )
        if self.softmax:
            self.softmax.find_candidates(logits, source, rows, scratch)
        if self.sigmoid:
            logits_of = source.logits if second is None else lambda: second.of(source.logits())
            self.sigmoid.find_candidates(logits, correction, logits_of, rows, scratch, stream(source.matrix))

    def softmax_results(self) -> tuple[Tensor, ...]:
        assert self.softmax is not None
        tokens, choices = self.softmax_tokens[:, : self.n_tokens], self.softmax_tokens[:, self.n_tokens :]
        return self.softmax.results(tokens.clone(), choices.clone())


def head_blocks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Iterator[Block]:
    """Blocks of an LM's logits."""
    hidden, weight, bias = checked_head(hidden, weight, bias)
    bias = floats(bias)
    for rows, dots in row_chunks(hidden, weight):
        yield rows, Rows(dots, bias, scale=scale, softcap=softcap), None


def _existing_blocks(source: Rows, sorts: bool) -> Iterator[Block]:
    """Rows without terms of their own: all at once, or as many at a time as may be copied to be sorted."""
    n = len(source.matrix)
    step = _SORTED_ROWS if sorts else max(n, 1)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        yield rows, replace(source, matrix=source.matrix[rows]), None


def dominant_rows(source: Rows, dominant: str) -> tuple[Tensor, Tensor]:
    """Dominant ids [n, M] of the rows, padded with -1, and their largest logits [n], NaN for no distribution."""
    n, vocab_size = source.matrix.shape
    softmax = _Softmax(n, vocab_size, source.matrix.device, 0, None, False, dominant)
    asked = _Pass(n, vocab_size, source.matrix.device, (None, None), softmax, None)
    asked.run(_existing_blocks(source, softmax.sorts))
    return softmax.dominant_ids, softmax.max_logit


@on_its_device
def softmax_stats(
    logits: Tensor, token_ids: Tensor | None, choice_ids: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    n, vocab_size = logits.shape
    softmax = _Softmax(n, vocab_size, logits.device, *options)
    asked = _Pass(n, vocab_size, logits.device, (token_ids, choice_ids), softmax, None)
    asked.run(_existing_blocks(Rows(rows_of(logits)), softmax.sorts))
    return asked.softmax_results()


@on_its_device
def linear_softmax_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    token_ids: Tensor | None,
    choice_ids: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    n, vocab_size = len(hidden), len(weight)
    softmax = _Softmax(n, vocab_size, hidden.device, *options)
    asked = _Pass(n, vocab_size, hidden.device, (token_ids, choice_ids), softmax, None)
    asked.run(head_blocks(hidden, weight, bias, logit_scale, logit_softcap))
    return asked.softmax_results()


@on_its_device
def sigmoid_stats(logits: Tensor, token_ids: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    n, vocab_size = logits.shape
    sigmoid = _Sigmoid(n, vocab_size, logits.device, *options)
    asked = _Pass(n, vocab_size, logits.device, (token_ids, None), None, sigmoid)
    asked.run(_existing_blocks(Rows(rows_of(logits)), sigmoid.sorts))
    return sigmoid.results(asked.sigmoid_tokens)


@on_its_device
def linear_sigmoid_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    token_ids: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    hidden, weight, bias = checked_head(hidden, weight, bias)
    n, vocab_size = len(hidden), len(weight)
    bias, (scale, shift) = floats(bias), row_terms(n, scale, shift)
    sigmoid = _Sigmoid(n, vocab_size, hidden.device, *options)
    asked = _Pass(n, vocab_size, hidden.device, (token_ids, None), None, sigmoid)
    asked.run(
        (rows, Rows(dots, bias, None if scale is None else scale[rows], None if shift is None else shift[rows]), None)
        for rows, dots in row_chunks(hidden, weight)
    )
    return sigmoid.results(asked.sigmoid_tokens)


@on_its_device
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
    n, vocab_size = len(hidden), len(weight)
    check_shape("scale", scale, n)
    check_shape("shift", shift, n)
    check_shape("token_bias", token_bias, vocab_size)
    rank = 0 if factors is None else factors.shape[-1]
    check_shape("projected", projected, n, rank)
    check_shape("factors", factors, vocab_size, rank)
    scale, shift, token_bias = scale.float().contiguous(), shift.float().contiguous(), floats(token_bias)
    low_rank = None if projected is None or factors is None else (projected.float(), factors.float())
    softmax = _Softmax(n, vocab_size, hidden.device, top_k, temperature, entropy, dominant)
    sigmoid = _Sigmoid(n, vocab_size, hidden.device, sigmoid_top_k, threshold)
    asked = _Pass(n, vocab_size, hidden.device, (token_ids, choice_ids), softmax, sigmoid)

    def blocks() -> Iterator[Block]:
        buffer = torch.empty(padded_rows(n, weight) if low_rank else 0, vocab_size, device=hidden.device)
        for rows, source, _ in head_blocks(hidden, weight, bias, logit_scale, logit_softcap):
            addend = product(low_rank[0][rows], low_rank[1], buffer) if low_rank else None
            yield rows, source, Second(scale[rows], shift[rows], token_bias, addend)

    asked.run(blocks())
    n_tokens = 0 if token_ids is None else token_ids.shape[1]
    return *asked.softmax_results(), *sigmoid.results(asked.sigmoid_tokens[:, :n_tokens].contiguous())
