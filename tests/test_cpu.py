"""The CPU backend among threads and processes, and beyond 2^31 elements."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from threading import Barrier

import pytest
import torch
from torch import Tensor

import pyqe
from pyqe import functional as F
from pyqe.backends import available_backends
from pyqe.dominant import DominantRule
from pyqe.negatives import NegativeSampler

pytestmark = pytest.mark.skipif(available_backends()["cpu"].unavailable is not None, reason="needs the C++ library")

CALLERS = 8


@pytest.fixture(autouse=True)
def _cpu_backend() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    with pyqe.use_backend("cpu"):
        yield
    torch.set_num_threads(threads)


def operands(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D] and ids [N, 3]: enough for our threads to start, and too little for torch's.

    torch starts a team from 32768 elements on, and in a forked child waits for it forever.
    """
    generator = torch.Generator().manual_seed(seed)
    n, d, v = 300 + seed, 64, 2100
    hidden, weight = (torch.randn(rows, d, generator=generator) for rows in (n, v))
    return hidden.bfloat16(), weight.bfloat16(), torch.randint(0, v, (n, 3), generator=generator)


def softmax_stats(hidden: Tensor, weight: Tensor, ids: Tensor) -> list[Tensor]:
    stats = F.linear_softmax_stats(
        hidden, weight, token_ids=ids, top_k=3, temperature=2.0, entropy=True, dominant=DominantRule.jump("last")
    )
    assert stats.entropy is not None
    assert stats.token_logprob is not None
    assert stats.topk_ids is not None
    assert stats.dominant is not None
    return [stats.logsumexp, stats.entropy, stats.token_logprob, stats.topk_ids, stats.dominant.ids]


def sigmoid_stats(hidden: Tensor, weight: Tensor, ids: Tensor) -> list[Tensor]:
    stats = F.linear_sigmoid_stats(hidden, weight, token_ids=ids, threshold=0.5)
    assert stats.count_above is not None
    return [stats.sum_prob, stats.max_logit, stats.count_above]


def token_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> list[Tensor]:
    grad = torch.ones(ids.shape)
    return [
        F.linear_token_logits(hidden, weight, ids),
        torch.ops.pyqe.token_logits_grad_hidden(grad, weight, ids),
        *torch.ops.pyqe.token_logits_grad_rows(grad, hidden, ids),
    ]


def negatives(hidden: Tensor, weight: Tensor, ids: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sampler = NegativeSampler(("uniform", "softmax"), num_negatives=4)
    return [F.linear_sample_negatives(hidden, weight, ids[:, 0], sampler, generator=generator)]


def inverse_softmax(hidden: Tensor, weight: Tensor, ids: Tensor) -> list[Tensor]:
    return [F.inverse_softmax(hidden.float().abs(), center="mean")]


def temperature(hidden: Tensor, weight: Tensor, ids: Tensor) -> list[Tensor]:
    result = F.linear_temperature_nll(hidden, weight, ids[:, 0], 0.7)
    return [result.nll, result.first, result.second]


Operation = Callable[[Tensor, Tensor, Tensor], list[Tensor]]
OPERATIONS: list[Operation] = [softmax_stats, sigmoid_stats, token_logits, negatives, inverse_softmax, temperature]


def as_bytes(results: list[Tensor]) -> list[bytes]:
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in results]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_bits_for_any_number_of_threads(operation: Operation) -> None:
    expected = as_bytes(operation(*operands(0)))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert as_bytes(operation(*operands(0))) == expected


@pytest.mark.parametrize("operation", OPERATIONS)
def test_callers_on_several_threads(operation: Operation) -> None:
    expected = [as_bytes(operation(*operands(seed))) for seed in range(CALLERS)]
    barrier = Barrier(CALLERS)

    def call(seed: int) -> list[bytes]:
        arguments = operands(seed)
        barrier.wait()
        with pyqe.use_backend("cpu"):
            return as_bytes(operation(*arguments))

    with ThreadPoolExecutor(CALLERS) as pool:
        assert list(pool.map(call, range(CALLERS))) == expected


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_child_computes_the_same() -> None:
    arguments = operands(0)
    expected = [as_bytes(operation(*arguments)) for operation in OPERATIONS]  # a team of threads now exists
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child(to: Connection) -> None:
        torch.set_num_threads(3)
        to.send([as_bytes(operation(*arguments)) for operation in OPERATIONS])

    process = context.Process(target=child, args=(sender,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: what this is about
        process.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert receiver.recv() == expected
    finally:
        process.kill()
        process.join()
    assert [as_bytes(operation(*arguments)) for operation in OPERATIONS] == expected  # the parent has kept its team


def test_more_than_2_to_the_31_existing_logits() -> None:
    row = torch.randn(1, 2**22 + 5).bfloat16()
    logits = row.expand(520, -1)
    assert logits.numel() > 2**31
    ids = torch.full((520,), row.shape[1] - 1)
    stats = F.softmax_stats(logits, token_ids=ids, top_k=3)
    alone = F.softmax_stats(row, token_ids=ids[:1], top_k=3)
    for name in ("logsumexp", "argmax", "token_logprob", "topk_ids"):
        values, expected = getattr(stats, name), getattr(alone, name)
        assert torch.equal(values, expected.expand_as(values)), name


def test_more_than_2_to_the_31_computed_logits() -> None:
    hidden, weight = torch.randn(1040, 2).bfloat16(), torch.randn(2_100_000, 2).bfloat16()
    assert len(hidden) * len(weight) > 2**31
    stats = F.linear_softmax_stats(hidden, weight)
    alone = F.linear_softmax_stats(hidden[-3:], weight)
    assert torch.equal(stats.logsumexp[-3:], alone.logsumexp)
    assert torch.equal(stats.argmax[-3:], alone.argmax)
    expected = torch.logsumexp(hidden[-1:].float() @ weight.float().T, 1)
    torch.testing.assert_close(alone.logsumexp[-1:], expected, rtol=1e-5, atol=1e-5)


def test_rows_more_than_2_to_the_31_elements_apart() -> None:
    stride = 2**31 + 8
    storage = torch.empty(2 * stride, dtype=torch.bfloat16)  # memory that is never touched costs nothing
    matrix = storage.as_strided((3, 40), (stride - 20, 1)).copy_(torch.randn(3, 40))
    near = matrix.clone()
    other, ids = torch.randn(5, 40).bfloat16(), torch.tensor([[0], [2], [1], [2], [1]])
    assert torch.equal(F.linear_token_logits(other, matrix, ids), F.linear_token_logits(other, near, ids))
    assert torch.equal(F.linear_softmax_stats(other, matrix).logsumexp, F.linear_softmax_stats(other, near).logsumexp)
    assert torch.equal(F.linear_softmax_stats(matrix, other).logsumexp, F.linear_softmax_stats(near, other).logsumexp)
    assert torch.equal(F.softmax_stats(matrix).logsumexp, F.softmax_stats(near).logsumexp)
