"""Operations of the C++ library, ``pyqe._C``: pointers, sizes and strides of contiguous rows go across."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyqe.backends import reference
from pyqe.dominant import DominantRule

try:
    from pyqe import _C

    _import_error = None
except ImportError as error:  # the package runs on the reference backend without it; `pyqe doctor` says why
    _import_error = str(error)

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CENTER_CODES = {"none": 0, "mean": 1, "logsumexp": 2}
DTYPES = frozenset(_DTYPE_CODES)


def unavailable() -> str | None:
    """Why the library cannot be used, or None."""
    return None if _import_error is None else f"the C++ library did not load: {_import_error}"


def features() -> list[str]:
    """Instruction sets of this processor that matter here; none without the library."""
    return [] if _import_error is not None else _C.cpu_features()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows, which may be any (non-negative) distance apart."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def _check_pair(name: str, tensor: Tensor, dim: int, dtype: torch.dtype) -> None:
    """The library trusts what it is given: look before pointers go across."""
    if tensor.shape[1] != dim or tensor.dtype != dtype:
        raise ValueError(f"{name}: expected [..., {dim}] in {dtype}, got {list(tensor.shape)} in {tensor.dtype}")


def check_grad(grad: Tensor, token_ids: Tensor) -> None:
    if grad.shape != token_ids.shape:
        raise ValueError(f"grad: expected {list(token_ids.shape)} as token_ids, got {list(grad.shape)}")


def checked_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three with contiguous rows.

    Raises:
        ValueError: their shapes or dtypes do not fit.
    """
    _check_pair("hidden", hidden, weight.shape[1], weight.dtype)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias: expected [{weight.shape[0]}] in {weight.dtype}, got {list(bias.shape)} in {bias.dtype}"
        )
    return _rows(hidden), _rows(weight), None if bias is None else bias.contiguous()


def linear_token_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> Tensor:
    hidden, weight, bias = checked_head(hidden, weight, bias)
    if len(token_ids) != len(hidden):
        raise ValueError(f"token_ids: expected {len(hidden)} rows as hidden, got {len(token_ids)}")
    ids = token_ids.contiguous()
    out = torch.empty(ids.shape, dtype=torch.float32)
    _C.token_logits_forward(
        hidden.data_ptr(),
        weight.data_ptr(),
        _pointer(bias),
        ids.data_ptr(),
        out.data_ptr(),
        n=ids.shape[0],
        k=ids.shape[1],
        dim=hidden.shape[1],
        vocab=weight.shape[0],
        hidden_stride=hidden.stride(0),
        weight_stride=weight.stride(0),
        dtype=_DTYPE_CODES[hidden.dtype],
        threads=torch.get_num_threads(),
    )
    return out


def token_logits_grad_hidden(grad: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    check_grad(grad, token_ids)
    weight, ids, grad = _rows(weight), token_ids.contiguous(), grad.float().contiguous()
    out = torch.empty(ids.shape[0], weight.shape[1], dtype=weight.dtype)
    _C.token_logits_backward_hidden(
        grad.data_ptr(),
        weight.data_ptr(),
        ids.data_ptr(),
        out.data_ptr(),
        n=ids.shape[0],
        k=ids.shape[1],
        dim=weight.shape[1],
        vocab=weight.shape[0],
        weight_stride=weight.stride(0),
        dtype=_DTYPE_CODES[weight.dtype],
        threads=torch.get_num_threads(),
    )
    return out


def _sorted_pairs(token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (as places in the flattened ids) sorted by token, where each token's pairs start, and the tokens."""
    tokens, pairs = torch.sort(token_ids.reshape(-1), stable=True)
    padding = int(torch.searchsorted(tokens, 0))
    row_ids, counts = torch.unique_consecutive(tokens[padding:], return_counts=True)
    starts = torch.zeros(len(row_ids) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=starts[1:])
    return pairs[padding:].contiguous(), starts, row_ids.contiguous()


def _accumulate_rows(
    grad: Tensor, hidden: Tensor, k: int, pairs: Tensor, starts: Tensor, row_ids: Tensor | None, out: Tensor
) -> None:
    _C.token_logits_backward_weight(
        grad.data_ptr(),
        hidden.data_ptr(),
        pairs.data_ptr(),
        starts.data_ptr(),
        _pointer(row_ids),
        out.data_ptr(),
        rows=len(starts) - 1,
        k=k,
        dim=hidden.shape[1],
        hidden_stride=hidden.stride(0),
        out_stride=out.stride(0),
        dtype=_DTYPE_CODES[hidden.dtype],
        threads=torch.get_num_threads(),
    )


def checked_hidden(grad: Tensor, hidden: Tensor, token_ids: Tensor) -> Tensor:
    check_grad(grad, token_ids)
    if len(hidden) != len(token_ids):
        raise ValueError(f"hidden: expected {len(token_ids)} rows as token_ids, got {len(hidden)}")
    return _rows(hidden)


def token_logits_grad_rows(grad: Tensor, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    pairs, starts, row_ids = _sorted_pairs(token_ids)
    hidden = checked_hidden(grad, hidden, token_ids)
    out = torch.empty(len(row_ids), hidden.shape[1], dtype=hidden.dtype)
    _accumulate_rows(grad.float().contiguous(), hidden, token_ids.shape[1], pairs, starts, None, out)
    return row_ids, out


def token_logits_grad_weight(grad: Tensor, hidden: Tensor, token_ids: Tensor, vocab_size: int) -> Tensor:
    pairs, starts, row_ids = _sorted_pairs(token_ids)
    hidden = checked_hidden(grad, hidden, token_ids)
    if len(row_ids) and int(row_ids[-1]) >= vocab_size:
        raise IndexError(f"token_ids: expected ids in [0, {vocab_size}), got {int(row_ids[-1])}")
    out = torch.zeros(vocab_size, hidden.shape[1], dtype=hidden.dtype)
    _accumulate_rows(grad.float().contiguous(), hidden, token_ids.shape[1], pairs, starts, row_ids, out)
    return out


def inverse_softmax(probs: Tensor, eps: float, center: str) -> Tensor:
    probs = _rows(probs if probs.dtype == torch.float32 else probs.float())
    out = torch.empty(probs.shape, dtype=torch.float32)
    _C.inverse_softmax(
        probs.data_ptr(),
        out.data_ptr(),
        n=probs.shape[0],
        classes=probs.shape[1],
        probs_stride=probs.stride(0),
        eps=eps,
        center=_CENTER_CODES[center],
        dtype=_DTYPE_CODES[probs.dtype],
        threads=torch.get_num_threads(),
    )
    return out


def temperature_nll(logits: Tensor, labels: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if labels.shape != logits.shape[: labels.dim()]:
        raise ValueError(f"labels: expected {len(logits)} rows as logits, got {list(labels.shape)}")
    logits = _rows(logits)
    hard = labels.dim() == 1
    labels = labels.contiguous() if hard else _rows(labels.float())
    derivatives = _C.temperature_nll(
        logits.data_ptr(),
        labels.data_ptr() if hard else 0,
        0 if hard else labels.data_ptr(),
        n=logits.shape[0],
        classes=logits.shape[1],
        beta=float(beta),
        logits_stride=logits.stride(0),
        soft_labels_stride=0 if hard else labels.stride(0),
        dtype=_DTYPE_CODES[logits.dtype],
        threads=torch.get_num_threads(),
    )
    return _scalars(derivatives)


def _scalars(numbers: tuple[float, float, float]) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (torch.tensor(number, dtype=torch.float64) for number in numbers)
    return first, second, third


# --- statistics -----------------------------------------------------------------------------------------------------


def _existing(logits: Tensor) -> Any:
    """Logits [N, V] for the library; ``logits`` must have contiguous rows."""
    return _C.existing_logits(
        logits.data_ptr(),
        n=len(logits),
        vocab=logits.shape[1],
        stride=logits.stride(0),
        dtype=_DTYPE_CODES[logits.dtype],
    )


def _linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float = 1.0,
    bias_scale: float = 1.0,
    softcap: float | None = None,
    row_scale: Tensor | None = None,
    row_shift: Tensor | None = None,
) -> Any:
    """``scale * row_scale * hidden @ weight.T + bias_scale * bias + row_shift``, capped, for the library."""
    return _C.linear_logits(
        hidden.data_ptr(),
        weight.data_ptr(),
        _pointer(bias),
        _pointer(row_scale),
        _pointer(row_shift),
        scale=scale,
        bias_scale=bias_scale,
        softcap=softcap or 0.0,
        n=len(hidden),
        dim=hidden.shape[1],
        vocab=weight.shape[0],
        hidden_stride=hidden.stride(0),
        weight_stride=weight.stride(0),
        dtype=_DTYPE_CODES[weight.dtype],
    )


_RULE_KINDS = {"jump": 1, "top_k": 2, "top_p": 3, "min_p": 4, "epsilon": 5, "eta": 6}


def _rule(rule: DominantRule | None) -> Any:
    if rule is None:
        return _C.dominant_rule(kind=0, last_cut=False, ratio=0.0, epsilon=0.0, p=0.0, k=0)
    return _C.dominant_rule(
        kind=_RULE_KINDS[rule.kind],
        last_cut=rule.cut == "last",
        ratio=rule.ratio,
        epsilon=rule.epsilon,
        p=rule.p,
        k=rule.k,
    )


def _joined_ids(n: int, token_ids: Tensor | None, choice_ids: Tensor | None) -> Tensor:
    """Token ids [N, K] and choices [N, C] (or [1, C] for all rows) beside each other."""
    given = [ids.expand(n, -1) for ids in (token_ids, choice_ids) if ids is not None]
    return torch.cat(given, 1).contiguous() if given else torch.empty(n, 0, dtype=torch.int64)


@dataclass
class _Softmax:
    """Softmax statistics: what the library is asked for, and the tensors that it fills."""

    request: Any
    ids: Tensor  # [N, K + C]
    n_tokens: int
    columns: list[Tensor]  # the operator's results but for the logits of tokens and choices
    gathered: Tensor

    @classmethod
    def of(
        cls,
        logits: Any,
        n: int,
        vocab_size: int,
        token_ids: Tensor | None,
        choice_ids: Tensor | None,
        top_k: int,
        temperature: float | None,
        entropy: bool,
        dominant: str,
    ) -> _Softmax:
        rule = DominantRule.parse(dominant) if dominant else None
        members = rule.max_size(vocab_size) if rule else 0
        for name, given in (("token_ids", token_ids), ("choice_ids", choice_ids)):
            if given is not None:
                reference.check_ids(name, given, vocab_size)
        ids, k = _joined_ids(n, token_ids, choice_ids), min(top_k, vocab_size)

        def row(wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty((n,) if wanted else (n, 0), dtype=dtype)

        max_logit, max_logprob, argmax = row(), row(), row(dtype=torch.int64)
        row_entropy, tempered = row(entropy), row(temperature is not None)
        gathered = torch.empty(ids.shape)
        topk_logits, topk_ids = torch.empty(n, k), torch.empty(n, k, dtype=torch.int64)
        dominant_ids = torch.empty(n, members, dtype=torch.int64)
        size, mass = row(rule is not None, torch.int64), row(rule is not None)
        request = _C.softmax_request(
            logits,
            _rule(rule),
            token_ids=ids.data_ptr(),
            token_logits=gathered.data_ptr(),
            n_tokens=ids.shape[1],
            max_logit=max_logit.data_ptr(),
            max_logprob=max_logprob.data_ptr(),
            argmax=argmax.data_ptr(),
            entropy=row_entropy.data_ptr() if entropy else 0,
            tempered=0 if temperature is None else tempered.data_ptr(),
            temperature=temperature or 1.0,
            topk_logits=topk_logits.data_ptr(),
            topk_ids=topk_ids.data_ptr(),
            top_k=k,
            dominant_ids=dominant_ids.data_ptr(),
            size=size.data_ptr(),
            mass=mass.data_ptr(),
            members=members,
        )
        columns = [
            max_logit,
            max_logprob,
            argmax,
            row_entropy,
            tempered,
            topk_logits,
            topk_ids,
            dominant_ids,
            size,
            mass,
        ]
        return cls(request, ids, 0 if token_ids is None else token_ids.shape[1], columns, gathered)

    def results(self) -> tuple[Tensor, ...]:
        tokens, choices = self.gathered[:, : self.n_tokens].clone(), self.gathered[:, self.n_tokens :].clone()
        return (*self.columns[:4], tokens, *self.columns[4:7], choices, *self.columns[7:])


def _softmax_stats(*arguments: Any) -> tuple[Tensor, ...]:
    asked = _Softmax.of(*arguments)
    _C.softmax_stats(asked.request, threads=torch.get_num_threads())
    return asked.results()


def _look_again(
    results: tuple[Tensor, ...], dominant: str, logits_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Dominant tokens of the rows that the scan left open: rules without a bound may need many tokens."""
    dominant_ids, size, mass = results[9:]
    if dominant:
        for rows in (size < 0).nonzero()[:, 0].split(reference.ROW_BLOCK):
            found = reference.dominant_of(logits_of(rows), DominantRule.parse(dominant))
            dominant_ids[rows], size[rows], mass[rows] = found
    return results


def _lm_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Logits of an LM's head for the library, and a function that computes those of some rows, float32 [n, V]."""
    hidden, weight, bias = checked_head(hidden, weight, bias)

    def head(hidden: Tensor) -> Any:
        return _linear(hidden, weight, bias, scale=scale, bias_scale=scale, softcap=softcap)

    def logits_of(rows: Tensor) -> Tensor:
        some = hidden[rows]
        out = torch.empty(len(some), weight.shape[0])
        _C.copy_logits(head(some), out.data_ptr(), threads=torch.get_num_threads())
        return out

    return head(hidden), logits_of


def softmax_stats(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    logits = _rows(logits)
    results = _softmax_stats(_existing(logits), *logits.shape, *options)
    return _look_again(results, options[-1], lambda rows: logits[rows].float())


def linear_softmax_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    logits, logits_of = _lm_logits(hidden, weight, bias, logit_scale, logit_softcap)
    results = _softmax_stats(logits, len(hidden), weight.shape[0], *options)
    return _look_again(results, options[-1], logits_of)


def linear_temperature_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    labels: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = checked_head(hidden, weight, bias)
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels: expected {len(hidden)} rows as hidden, got {list(labels.shape)}")
    labels = labels.contiguous()
    logits = _linear(hidden, weight, bias, scale=logit_scale, bias_scale=logit_scale, softcap=logit_softcap)
    return _scalars(
        _C.linear_temperature_nll(logits, labels=labels.data_ptr(), beta=float(beta), threads=torch.get_num_threads())
    )


def _sigmoid_request(
    logits: Any, n: int, vocab_size: int, token_ids: Tensor | None, top_k: int, threshold: float | None
) -> tuple[Any, Tensor, tuple[Tensor, ...]]:
    """What the library is asked for, the ids of the tokens, and the results that it fills."""
    ids, k = _joined_ids(n, token_ids, None), min(top_k, vocab_size)
    max_logit, sum_prob, argmax = torch.empty(n), torch.empty(n), torch.empty(n, dtype=torch.int64)
    above = torch.empty((n,) if threshold is not None else (n, 0), dtype=torch.int64)
    gathered = torch.empty(ids.shape)
    topk_logits, topk_ids = torch.empty(n, k), torch.empty(n, k, dtype=torch.int64)
    request = _C.sigmoid_request(
        logits,
        token_ids=ids.data_ptr(),
        token_logits=gathered.data_ptr(),
        n_tokens=ids.shape[1],
        max_logit=max_logit.data_ptr(),
        argmax=argmax.data_ptr(),
        sum_prob=sum_prob.data_ptr(),
        count_above=0 if threshold is None else above.data_ptr(),
        threshold=0.0 if threshold is None else reference.threshold_logit(threshold),
        topk_logits=topk_logits.data_ptr(),
        topk_ids=topk_ids.data_ptr(),
        top_k=k,
    )
    return request, ids, (max_logit, argmax, sum_prob, above, gathered, topk_logits, topk_ids)


def _sigmoid_stats(*arguments: Any) -> tuple[Tensor, ...]:
    request, _ids, results = _sigmoid_request(*arguments)
    _C.sigmoid_stats(request, threads=torch.get_num_threads())
    return results


def sigmoid_stats(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    logits = _rows(logits)
    return _sigmoid_stats(_existing(logits), *logits.shape, *options)


def linear_sigmoid_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    hidden, weight, bias = checked_head(hidden, weight, bias)
    row_scale, row_shift = (None if term is None else term.float().contiguous() for term in (scale, shift))
    logits = _linear(hidden, weight, bias, row_scale=row_scale, row_shift=row_shift)
    return _sigmoid_stats(logits, len(hidden), weight.shape[0], *options)


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
    n, vocab_size = len(hidden), weight.shape[0]
    logits, logits_of = _lm_logits(hidden, weight, bias, logit_scale, logit_softcap)
    softmax = _Softmax.of(logits, n, vocab_size, token_ids, choice_ids, top_k, temperature, entropy, dominant)
    request, _ids, results = _sigmoid_request(logits, n, vocab_size, token_ids, sigmoid_top_k, threshold)
    terms = [
        None if term is None else term.float().contiguous() for term in (scale, shift, token_bias, projected, factors)
    ]
    _C.joint_stats(
        softmax.request,
        request,
        scale=_pointer(terms[0]),
        shift=_pointer(terms[1]),
        bias=_pointer(terms[2]),
        projected=_pointer(terms[3]),
        factors=_pointer(terms[4]),
        rank=0 if factors is None else factors.shape[1],
        threads=torch.get_num_threads(),
    )
    return (*_look_again(softmax.results(), dominant, logits_of), *results)


# --- negatives ------------------------------------------------------------------------------------------------------


@dataclass
class _Sources:
    """What to draw from, as the library takes it; a part is (softmax, unigram, uniform, how many)."""

    parts: list[tuple[float, float, float, int]]
    beta: float  # the softmax part is e^(beta z) * factor
    factor: Tensor | None  # [V]
    counts: Tensor | None  # [V]

    @classmethod
    def of(
        cls,
        sources: list[str],
        shares: list[int],
        weights: list[float],
        combination: str,
        temperature: float,
        counts: Tensor | None,
    ) -> _Sources:
        def weight(name: str) -> float:
            return sum(weight for source, weight in zip(sources, weights, strict=True) if source == name)

        def only(name: str, share: int) -> tuple[float, float, float, int]:
            return float(name == "softmax"), float(name == "unigram"), float(name == "uniform"), share

        if combination == "independent":
            parts = [only(name, share) for name, share in zip(sources, shares, strict=True)]
            return cls(parts, 1 / temperature, None, counts)
        if combination == "mixture":
            part = (weight("softmax"), weight("unigram"), weight("uniform"), shares[0])
            return cls([part], 1 / temperature, None, counts)
        # a product of e^(z/T), a times, and of counts, b times
        softmax, unigram = sources.count("softmax"), sources.count("unigram")
        powers = None if counts is None or not unigram else (counts / counts.max()) ** unigram
        if softmax:
            return cls([only("softmax", shares[0])], softmax / temperature, powers, None)
        return cls([only("unigram" if unigram else "uniform", shares[0])], 1 / temperature, None, powers)


def _sample_negatives(
    logits: Any,
    vocab_size: int,
    logits_of: Callable[[Tensor], Tensor],
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
    rule = DominantRule.parse(exclude) if exclude else None
    counts = None if unigram_counts is None else unigram_counts.float().contiguous()
    drawn = _Sources.of(sources, shares, mixture_weights, combination, temperature, counts)
    targets = targets.contiguous()
    ids = torch.empty(len(targets), sum(shares), dtype=torch.int64)
    undecided = torch.empty(len(targets), dtype=torch.int64)
    _C.sample_negatives(
        logits,
        _rule(rule),
        drawn.parts,
        targets=targets.data_ptr(),
        members=rule.max_size(vocab_size) if rule else 0,
        beta=drawn.beta,
        factor=_pointer(drawn.factor),
        counts=_pointer(drawn.counts),
        seed=int(seed),
        ids=ids.data_ptr(),
        undecided=undecided.data_ptr(),
        threads=torch.get_num_threads(),
    )
    options = (sources, shares, mixture_weights, combination, temperature, exclude, unigram_counts)
    for row in undecided.nonzero()[:, 0].tolist():  # the rule has no bound, and this row has very many dominant tokens
        rows = torch.tensor([row])
        ids[row] = reference.sample_rows(logits_of(rows), targets[rows], row, int(seed), *options)[0]
    return ids


def sample_negatives(logits: Tensor, *options: Any) -> Tensor:
    logits = _rows(logits)
    return _sample_negatives(_existing(logits), logits.shape[1], lambda rows: logits[rows].float(), *options)


def linear_sample_negatives(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    *options: Any,
) -> Tensor:
    logits, logits_of = _lm_logits(hidden, weight, bias, logit_scale, logit_softcap)
    return _sample_negatives(logits, weight.shape[0], logits_of, *options)


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
    hidden, weight, bias = checked_head(hidden, weight, bias)
    n, none = len(hidden), hidden.new_empty(0)
    per_row = {"scale": scale, "shift": shift, "targets": targets, "exclude_ids": exclude_ids, "weights": row_weights}
    for name, tensor in per_row.items():
        if tensor is not None and len(tensor) != n:
            raise ValueError(f"{name}: expected {n} rows as hidden, got {len(tensor)}")
    row_scale, row_shift = (None if term is None else term.float().contiguous() for term in (scale, shift))
    ids, excluded = targets.contiguous(), None if exclude_ids is None else exclude_ids.contiguous()
    row_weights = row_weights.float().contiguous()
    total, losses = torch.empty(()), torch.empty(n)
    grads = [
        torch.empty(hidden.shape, dtype=hidden.dtype) if grad_hidden else none,
        torch.empty(weight.shape, dtype=weight.dtype) if grad_weight else none.clone(),
        none.clone() if bias is None else torch.empty_like(bias),
        none.clone() if row_scale is None else torch.empty_like(row_scale),
        none.clone() if row_shift is None else torch.empty_like(row_shift),
    ]
    wanted = (grad_hidden, grad_weight, bias is not None, scale is not None, shift is not None)
    pointers = [grad.data_ptr() if want else 0 for grad, want in zip(grads, wanted, strict=True)]
    _C.vocab_bce(
        _linear(hidden, weight, bias, row_scale=row_scale, row_shift=row_shift),
        targets=ids.data_ptr(),
        exclude_ids=_pointer(excluded),
        n_exclude=0 if excluded is None else excluded.shape[1],
        row_weights=row_weights.data_ptr(),
        pos_weight=pos_weight,
        total=total.data_ptr(),
        losses=losses.data_ptr(),
        grad_hidden=pointers[0],
        grad_weight=pointers[1],
        grad_bias=pointers[2],
        grad_scale=pointers[3],
        grad_shift=pointers[4],
        threads=torch.get_num_threads(),
    )
    like = (hidden, weight, bias, scale, shift)
    grads = [grad if x is None else grad.to(x.dtype) for grad, x in zip(grads, like, strict=True)]
    return total, losses, *grads


OPERATIONS: dict[str, Callable[..., Any]] = {
    "linear_token_logits": linear_token_logits,
    "token_logits_grad_hidden": token_logits_grad_hidden,
    "token_logits_grad_rows": token_logits_grad_rows,
    "token_logits_grad_weight": token_logits_grad_weight,
    "softmax_stats": softmax_stats,
    "linear_softmax_stats": linear_softmax_stats,
    "sigmoid_stats": sigmoid_stats,
    "linear_sigmoid_stats": linear_sigmoid_stats,
    "linear_joint_stats": linear_joint_stats,
    "sample_negatives": sample_negatives,
    "linear_sample_negatives": linear_sample_negatives,
    "linear_vocab_bce": linear_vocab_bce,
    "inverse_softmax": inverse_softmax,
    "temperature_nll": temperature_nll,
    "linear_temperature_nll": linear_temperature_nll,
}
