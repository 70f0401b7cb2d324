"""One suite for every backend: results against float64 definitions written out here, gradients, operator rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from devices import TensorsOn, device_of
from torch import Tensor

import pyqe
from pyqe import functional as F
from pyqe.backends import available_backends, select
from pyqe.backends.reference import compute_dtype
from pyqe.dominant import DominantRule
from pyqe.negatives import NegativeSampler

BACKENDS = [name for name, backend in available_backends().items() if backend.unavailable is None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(0, 7, 5), (1, 1, 1), (3, 64, 17), (65, 31, 1031), (130, 40, 257)]  # N, D, V: divide nothing
# rounding of the inputs is common to both sides, so what is left is the accumulation in float32
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with TensorsOn(device_of(request.param), __file__), pyqe.use_backend(request.param):
        yield request.param


def looks_at_ids(tensor: Tensor) -> bool:
    """Whether a bad id raises; on a GPU, where looking would wait for the device, it makes its row NaN."""
    return tensor.device.type == "cpu"


def needs(operation: str, *tensors: Tensor) -> None:
    """Skip where the backend does not offer the operation for these tensors, and says so."""
    try:
        select(operation, *tensors)
    except RuntimeError as error:
        pytest.skip(str(error))


def head(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*shape).to(dtype) for shape in ((n, d), (v, d), (v,)))  # type: ignore[return-value]


def close(actual: Tensor | None, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    assert actual is not None
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[dtype] * scale
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


# --- token logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [None, 0, 1, 5])
def test_token_logits(backend: str, shape: tuple[int, int, int], dtype: torch.dtype, k: int | None) -> None:
    hidden, weight, bias = head(*shape, dtype)
    needs("linear_token_logits", hidden)
    rows = shape[:1] if k is None else (shape[0], k)
    ids = torch.randint(0, shape[2], rows)
    full = hidden.double() @ weight.double().T + bias.double()
    expected = full.gather(1, ids.reshape(shape[0], rows[1] if k is not None else 1)).reshape(rows)
    close(F.linear_token_logits(hidden, weight, ids, bias), expected, dtype, shape[1] ** 0.5)


def test_token_logits_of_strided_batched_input(backend: str) -> None:
    hidden, weight, _ = head(12, 9, 30, torch.float32)
    needs("linear_token_logits", hidden)
    ids = torch.randint(0, 30, (3, 4, 2))
    expected = F.linear_token_logits(hidden, weight, ids.reshape(12, 2)).reshape(3, 4, 2)
    strided = torch.randn(3, 4, 18)[..., ::2].copy_(hidden.reshape(3, 4, 9))
    wide = torch.randn(30, 20)[:, 3:12].copy_(weight)
    assert torch.equal(F.linear_token_logits(strided, wide, ids), expected)


def test_token_logits_of_padding_and_of_bad_ids(backend: str) -> None:
    hidden, weight, _ = head(2, 4, 6, torch.float32)
    needs("linear_token_logits", hidden)
    logits = F.linear_token_logits(hidden, weight, torch.tensor([[-1, 2], [3, -1]]))
    assert logits.isnan().tolist() == [[True, False], [False, True]]
    for bad in (6, -2, 2**40):
        ids = torch.tensor([[0, 1], [2, bad]])
        if looks_at_ids(hidden):
            with pytest.raises(IndexError, match=f"got {bad}"):
                F.linear_token_logits(hidden, weight, ids)
        else:
            assert F.linear_token_logits(hidden, weight, ids).isnan().tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_token_logits_gradients(backend: str, dtype: torch.dtype, sparse: bool) -> None:
    hidden, weight, bias = (tensor.requires_grad_() for tensor in head(33, 21, 12, dtype))
    needs("linear_token_logits", hidden)
    ids = torch.randint(-1, 12, (33, 7))
    grad = torch.randn(33, 7, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)
    F.linear_token_logits(hidden, weight, ids, bias, sparse_grad=sparse).backward(grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    full = wide[0] @ wide[1].T + wide[2]
    (full.gather(1, ids.clamp(min=0)) * (ids >= 0) * grad).sum().backward()
    loss_of_dtype = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
    for got, expected in zip((hidden, weight, bias), wide, strict=True):
        assert got.grad is not None
        assert got.grad.dtype == dtype
        dense = got.grad.to_dense() if got.grad.is_sparse else got.grad
        torch.testing.assert_close(dense.double(), expected.grad, rtol=loss_of_dtype, atol=10 * loss_of_dtype)
    assert weight.grad is not None
    assert weight.grad.is_sparse == sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [9, 1100])
def test_token_logits_same_bits_wherever_rows_lie(backend: str, dim: int, dtype: torch.dtype) -> None:
    hidden, weight, _ = head(6, dim, 30, dtype)
    needs("linear_token_logits", hidden)
    ids, grad, ops = torch.randint(0, 30, (6, 40)), torch.randn(6, 40), torch.ops.pyqe
    moved_hidden, moved_weight = (
        torch.full((len(m), dim + 5), torch.nan, dtype=dtype)[:, 3:-2] for m in (hidden, weight)
    )
    moved_hidden.copy_(hidden), moved_weight.copy_(weight)
    for name, first, second in (
        ("linear_token_logits", (hidden, weight, ids, None), (moved_hidden, moved_weight, ids, None)),
        ("token_logits_grad_hidden", (grad, weight, ids), (grad, moved_weight, ids)),
        ("token_logits_grad_weight", (grad, hidden, ids, 30), (grad, moved_hidden, ids, 30)),
    ):
        assert torch.equal(getattr(ops, name)(*first), getattr(ops, name)(*second))


def test_ids_out_of_range_that_nothing_has_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking at ids would wait for the device."""
    if backend == "cpu":
        pytest.skip("its kernels look at the ids themselves")
    monkeypatch.setattr("pyqe.backends.reference.check_ids", lambda *_: None)
    hidden, weight, bias = head(4, 24, 20, torch.float32)
    ids, upstream = torch.tensor([[0, 20], [-1, 5], [2**40, -(2**62)], [-2, 0]]), torch.ones(4, 2)
    outside = [[False, True], [True, False], [True, True], [True, False]]
    assert F.linear_token_logits(hidden, weight, ids).isnan().tolist() == outside
    expected = torch.zeros(20, 24).index_copy_(0, torch.tensor([0, 5]), torch.stack([hidden[0] + hidden[3], hidden[1]]))
    torch.testing.assert_close(torch.ops.pyqe.token_logits_grad_weight(upstream, hidden, ids, 20), expected)
    nowhere = torch.full((24,), torch.nan)
    for sparse in (False, True):
        operands = [operand.clone().requires_grad_() for operand in (hidden, weight, bias)]
        F.linear_token_logits(operands[0], operands[1], ids, operands[2], sparse_grad=sparse).sum().backward()
        grads = [operand.grad.to_dense() for operand in operands]
        torch.testing.assert_close(grads[0], torch.stack([nowhere, weight[5], nowhere, nowhere]), equal_nan=True)
        torch.testing.assert_close(grads[1], expected)
        assert grads[2].tolist() == [2.0, *[0.0] * 4, 1.0, *[0.0] * 14]
    assert F.temperature_nll(hidden, torch.tensor([0, 24, 2**40, 1])).nll.isnan()


def test_losses_of_ids_out_of_range_that_nothing_has_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows are NaN, in hidden's gradient as well; the gradients of weight and bias are those of the others."""
    if backend == "cpu":
        pytest.skip("its kernels look at the ids themselves")
    hidden, weight, bias = head(6, 8, 40, torch.float32)
    needs("linear_vocab_bce", hidden)
    monkeypatch.setattr("pyqe.backends.reference.check_ids", lambda *_: None)
    scale, shift, row_weights = torch.rand(6), torch.randn(6), torch.rand(6)
    targets, excluded = torch.tensor([0, 40, -100, 7, 3, -1]), torch.full((6, 2), -1)
    excluded[4, 1] = 2**40
    good = torch.tensor([0, 3, 5])

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        terms = (scale[rows], shift[rows], targets[rows], excluded[rows], row_weights[rows])
        return torch.ops.pyqe.linear_vocab_bce(hidden[rows], weight, bias, *terms, 2.0, True, True)

    found, expected = run(torch.arange(6)), run(good)
    assert found[0].isnan()
    for place in (1, 2, 5, 6):  # losses, gradients of hidden, scale and shift
        assert found[place].reshape(6, -1).isnan().all(1).nonzero()[:, 0].tolist() == [1, 2, 4]
        torch.testing.assert_close(found[place][good], expected[place])
    for place in (3, 4):  # of weight and bias
        torch.testing.assert_close(found[place], expected[place])
    ids, trained = torch.tensor([[0, 40], [5, -1]]), bias.clone().requires_grad_()
    F.linear_sampled_bce(hidden[:2], weight, ids[:, 0], ids[:, 1:], trained, reduction="none")[1].sum().backward()
    assert trained.grad is not None
    assert trained.grad.nonzero()[:, 0].tolist() == [5]


@pytest.mark.parametrize("dim", [21, 520])
def test_token_logits_gradients_of_a_frequent_token(backend: str, dim: int) -> None:
    hidden = torch.randn(300, dim)
    needs("linear_token_logits", hidden)
    ids, grad = torch.randint(-1, 70, (300, 3)), torch.randn(300, 3)
    ids[:, 1] = 33
    dense = torch.ops.pyqe.token_logits_grad_weight(grad, hidden, ids, 70)
    pairs = torch.zeros(300, 71, dtype=torch.float64).scatter_add_(1, ids % 71, grad.double())
    torch.testing.assert_close(dense.double(), pairs[:, :70].T @ hidden.double(), rtol=1e-5, atol=1e-4)
    row_ids, rows = torch.ops.pyqe.token_logits_grad_rows(grad, hidden, ids)
    assert row_ids.tolist() == sorted(set(ids[ids >= 0].tolist()))
    torch.testing.assert_close(rows, dense[row_ids])


def test_same_bits_for_any_batch_and_thread_count(backend: str) -> None:
    hidden, weight, bias = head(400, 96, 301, torch.float32)  # enough for threads to start
    needs("linear_token_logits", hidden)
    ids, grad = torch.randint(0, 301, (400, 3)), torch.randn(400, 3)
    whole = F.linear_token_logits(hidden, weight, ids, bias)
    singles = [F.linear_token_logits(hidden[i : i + 1], weight, ids[i : i + 1], bias) for i in range(400)]
    assert torch.equal(whole, torch.cat(singles))
    threads = torch.get_num_threads()
    rows = torch.ops.pyqe.token_logits_grad_rows(grad, hidden, ids)
    torch.set_num_threads(1)
    try:
        assert torch.equal(whole, F.linear_token_logits(hidden, weight, ids, bias))
        assert all(map(torch.equal, rows, torch.ops.pyqe.token_logits_grad_rows(grad, hidden, ids)))
    finally:
        torch.set_num_threads(threads)


# --- softmax statistics


def softmax_definition(logits: Tensor) -> dict[str, Tensor]:
    logprobs = torch.log_softmax(logits, 1)
    return {
        "logsumexp": torch.logsumexp(logits, 1),
        "max_logprob": logprobs.amax(1),
        "entropy": -(logprobs.exp() * logprobs.nan_to_num(neginf=0.0)).sum(1),
        "tempered_logsumexp": torch.logsumexp(logits / 1.7, 1),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_softmax_stats(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, softcap: float | None
) -> None:
    hidden, weight, bias = head(*shape, dtype)
    needs("linear_softmax_stats", hidden)
    n, _, v = shape
    ids, choices = torch.randint(0, v, (n, 2)), torch.randint(0, v, (3,))
    logits = 0.5 * (hidden.double() @ weight.double().T + bias.double())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    stats = F.linear_softmax_stats(
        hidden,
        weight,
        bias,
        token_ids=ids,
        choice_ids=choices,
        top_k=4,
        temperature=1.7,
        logit_scale=0.5,
        logit_softcap=softcap,
        entropy=True,
    )
    for name, expected in softmax_definition(logits).items():
        close(getattr(stats, name), expected, dtype, 10)
    logprobs = torch.log_softmax(logits, 1)
    close(stats.token_logprob, logprobs.gather(1, ids), dtype, 10)
    close(stats.choice_mass, logprobs[:, choices].exp().sum(1), dtype, 10)
    close(stats.topk_logprobs, logprobs.topk(min(4, v), 1).values, dtype, 10)
    assert stats.topk_ids is not None
    assert torch.equal(stats.topk_ids[:, 0], stats.argmax)


def test_softmax_stats_agree_with_the_linear_ones(backend: str) -> None:
    hidden, weight, _ = head(70, 16, 99, torch.float64)
    needs("linear_softmax_stats", hidden)
    options: dict[str, Any] = {"token_ids": torch.randint(0, 99, (70,)), "entropy": True, "dominant": DominantRule()}
    fused = F.linear_softmax_stats(hidden, weight, **options)
    plain = F.softmax_stats(hidden @ weight.T, **options)
    assert fused.dominant is not None
    assert plain.dominant is not None
    assert torch.equal(fused.dominant.ids, plain.dominant.ids)
    torch.testing.assert_close(fused.entropy, plain.entropy)
    torch.testing.assert_close(fused.token_logprob, plain.token_logprob)


def test_bad_rows_are_nan_and_do_not_leak(backend: str) -> None:
    logits = torch.randn(6, 50)
    needs("softmax_stats", logits)
    ids = torch.zeros(6, dtype=torch.int64)
    options: dict[str, Any] = {
        "token_ids": ids,
        "entropy": True,
        "top_k": 2,
        "dominant": DominantRule(),
        "temperature": 2.0,
    }
    good = F.softmax_stats(logits, **options)
    bad = logits.clone()
    bad[1, 7], bad[2, 7], bad[3], bad[4, 7] = torch.nan, torch.inf, -torch.inf, -torch.inf
    stats = F.softmax_stats(bad, **options)
    assert stats.dominant is not None
    assert stats.argmax[1:4].tolist() == [-1, -1, -1]
    for name in ("logsumexp", "max_logprob", "entropy", "token_logprob", "tempered_logsumexp"):
        value = getattr(stats, name)
        assert value.isnan().tolist() == [False, True, True, True, False, False], name
        assert torch.equal(value[[0, 5]], getattr(good, name)[[0, 5]]), name
    assert stats.dominant.mass.isnan().tolist() == [False, True, True, True, False, False]
    assert (stats.dominant.ids[1:4] == -1).all()
    assert stats.boosted_prob(ids)[1:4].isnan().all()


@pytest.mark.parametrize("n", [1, 3, 64, 130])
def test_choices_for_all_rows_or_for_each(backend: str, n: int) -> None:
    hidden, weight, _ = head(n, 8, 40, torch.float64)
    needs("linear_softmax_stats", hidden)
    logits = hidden @ weight.T
    choices = torch.randint(0, 40, (n, 3))
    for ids, expected in ((choices, logits.gather(1, choices)), (choices[0], logits[:, choices[0]])):
        stats = F.linear_softmax_stats(hidden, weight, choice_ids=ids, token_ids=choices[:, 0])
        torch.testing.assert_close(stats.choice_logits, expected)
        torch.testing.assert_close(stats.token_logit, logits.gather(1, choices[:, :1])[:, 0])


def test_autocast_and_gradients_leave_statistics_alone(backend: str) -> None:
    hidden, weight, _ = head(5, 16, 40, torch.float32)
    needs("linear_softmax_stats", hidden)
    needs("linear_vocab_bce", hidden)
    expected = F.linear_softmax_stats(hidden, weight, entropy=True)
    hidden.requires_grad_()
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        stats = F.linear_softmax_stats(hidden, weight, entropy=True)
        loss = F.linear_vocab_bce(hidden, weight, torch.arange(5))
    assert stats.entropy is not None
    assert torch.equal(stats.entropy, expected.entropy)
    assert not stats.max_logprob.requires_grad
    assert loss.requires_grad
    torch.testing.assert_close(loss, F.linear_vocab_bce(hidden, weight, torch.arange(5)))


def test_bad_operands_of_the_operators_are_refused(backend: str) -> None:
    hidden, weight, _ = head(2, 4, 6, torch.float32)
    needs("linear_token_logits", hidden)
    ids, grad = torch.tensor([[1], [2]]), torch.ones(2, 1)
    ops = torch.ops.pyqe
    if backend == "cpu":
        for call in (
            lambda: ops.linear_token_logits(hidden[:, :3], weight, ids, None),
            lambda: ops.linear_token_logits(hidden, weight.bfloat16(), ids, None),
            lambda: ops.linear_token_logits(hidden, weight, ids[:1], None),
            lambda: ops.token_logits_grad_hidden(grad[:1], weight, ids),
            lambda: ops.token_logits_grad_rows(grad, hidden[:1], ids),
        ):
            with pytest.raises(ValueError, match="expected"):
                call()
    if looks_at_ids(ids):
        with pytest.raises(IndexError):
            ops.token_logits_grad_weight(grad, hidden, ids + 50_000_000, 5)


@pytest.mark.parametrize("rule", ["jump:last", "top_k:5", "top_p:0.9", "min_p:0.1", "epsilon:0.01", "eta:0.001"])
def test_masked_tokens_are_never_dominant(backend: str, rule: str) -> None:
    logits = torch.randn(4, 40)
    needs("softmax_stats", logits)
    logits[1:, 3:] = -torch.inf
    dominant = F.dominant_tokens(logits, DominantRule.parse(rule))
    with pyqe.use_backend("reference"):
        expected = F.dominant_tokens(logits, DominantRule.parse(rule))
    assert torch.equal(dominant.ids, expected.ids)
    assert torch.equal(dominant.size, expected.size)
    assert (dominant.size[1:] <= 3).all()


@pytest.mark.parametrize("rule", ["top_p:0.9", "eta:0.01"])
def test_dominant_tokens_of_more_rows_than_are_sorted_at_once(backend: str, rule: str) -> None:
    logits = 2 * torch.randn(300, 30)
    needs("softmax_stats", logits)
    stats = F.softmax_stats(logits, top_k=3, dominant=DominantRule.parse(rule))
    with pyqe.use_backend("reference"):
        expected = F.softmax_stats(logits, top_k=3, dominant=DominantRule.parse(rule))
    assert stats.entropy is None
    assert stats.dominant is not None
    assert expected.dominant is not None
    assert torch.equal(stats.topk_ids, expected.topk_ids)
    assert torch.equal(stats.dominant.ids, expected.dominant.ids)
    torch.testing.assert_close(stats.dominant.mass, expected.dominant.mass)


def test_ties_go_to_the_lower_ids(backend: str) -> None:
    logits = torch.randint(0, 3, (6, 9000)).float()
    needs("softmax_stats", logits)
    if backend == "reference":
        pytest.skip("torch.topk promises no order among equals")
    expected = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :50]
    assert torch.equal(F.softmax_stats(logits, top_k=50).topk_ids, expected)


@pytest.mark.parametrize("name", ["token_ids", "choice_ids"])
def test_a_bad_id_is_reported_by_the_name_of_its_argument(backend: str, name: str) -> None:
    logits = torch.randn(2, 5)
    needs("softmax_stats", logits)
    ids = {"token_ids": torch.zeros(2, 3, dtype=torch.int64), name: torch.tensor([[1], [9]])}
    if looks_at_ids(logits):
        with pytest.raises(IndexError, match=rf"^{name}\[1, 0\].* got 9"):
            F.softmax_stats(logits, **ids)
    else:
        result = {"token_ids": "token_logit", "choice_ids": "choice_logits"}[name]
        assert getattr(F.softmax_stats(logits, **ids), result).isnan().tolist() == [[False], [True]]
    with pytest.raises(ValueError, match="finite"):
        F.softmax_stats(logits, temperature=torch.inf)


def test_huge_logits(backend: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 9999.0], [-1e4, -1e4, -1e4]])
    needs("softmax_stats", logits)
    stats = F.softmax_stats(logits, entropy=True)
    close(stats.entropy, softmax_definition(logits.double())["entropy"], torch.float32, 100)


@pytest.mark.parametrize("operation", ["softmax", "sigmoid"])
def test_rows_do_not_depend_on_their_batch(backend: str, operation: str) -> None:
    hidden, weight, _ = head(67, 48, 999, torch.float32)
    needs(f"linear_{operation}_stats", hidden)
    names = {"softmax": ("logsumexp", "entropy", "max_logit"), "sigmoid": ("sum_prob", "max_logit")}[operation]
    options: dict[str, Any] = {"entropy": True} if operation == "softmax" else {}
    function = getattr(F, f"linear_{operation}_stats")
    whole = function(hidden, weight, **options)
    for rows in (slice(0, 1), slice(5, 23), slice(66, 67)):
        part = function(hidden[rows], weight, **options)
        for name in names:
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


# --- sigmoid statistics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_sigmoid_stats(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden, weight, bias = head(*shape, dtype)
    needs("linear_sigmoid_stats", hidden)
    n, _, v = shape
    ids, shift = torch.randint(0, v, (n,)), torch.randn(n)
    logits = 0.3 * (hidden.double() @ weight.double().T) + bias.double() + shift.double()[:, None]
    stats = F.linear_sigmoid_stats(hidden, weight, bias, scale=0.3, shift=shift, token_ids=ids, top_k=3, threshold=0.7)
    close(stats.sum_prob, torch.sigmoid(logits).sum(1), dtype, 100)
    close(stats.max_logit, logits.amax(1), dtype, 10)
    close(stats.token_logit, logits.gather(1, ids[:, None])[:, 0], dtype, 10)
    close(stats.topk_logits, logits.topk(min(3, v), 1).values, dtype, 10)
    assert stats.count_above is not None
    assert ((stats.count_above - (torch.sigmoid(logits) > 0.7).sum(1)).abs() <= 1).all()


def test_sigmoid_stats_of_nan_row(backend: str) -> None:
    logits = torch.zeros(3, 5)
    needs("sigmoid_stats", logits)
    logits[1, 2] = torch.nan
    stats = F.sigmoid_stats(logits, threshold=0.4)
    assert stats.max_logit.isnan().tolist() == stats.sum_prob.isnan().tolist() == [False, True, False]
    assert stats.argmax[1] == -1
    assert stats.count_above is not None
    assert stats.count_above.tolist() == [5, -1, 5]


# --- both in one pass


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [None, 1, 5])
def test_linear_joint_stats(backend: str, shape: tuple[int, int, int], dtype: torch.dtype, rank: int | None) -> None:
    hidden, weight, bias = head(*shape, dtype)
    needs("linear_joint_stats", hidden)
    n, _, v = shape
    ids, shift, token_bias = torch.randint(0, v, (n, 2)), torch.randn(n), torch.randn(v)
    projected, factors = (None, None) if rank is None else (torch.randn(n, rank), torch.randn(v, rank))
    options: dict[str, Any] = {"token_ids": ids, "top_k": 3, "entropy": True, "dominant": DominantRule()}
    softmax, sigmoid = F.linear_joint_stats(
        hidden,
        weight,
        bias,
        scale=0.3,
        shift=shift,
        token_bias=token_bias,
        projected=projected,
        factors=factors,
        logit_softcap=8.0,
        sigmoid_top_k=2,
        threshold=0.6,
        **options,
    )
    alone = F.linear_softmax_stats(hidden, weight, bias, logit_softcap=8.0, **options)
    for name in ("max_logit", "max_logprob", "argmax", "entropy", "token_logit", "topk_ids"):
        assert torch.equal(getattr(softmax, name), getattr(alone, name)), name
    assert softmax.dominant is not None
    assert alone.dominant is not None
    assert torch.equal(softmax.dominant.ids, alone.dominant.ids)
    logits = 8 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) / 8)
    logits = 0.3 * logits + token_bias.double() + shift.double()[:, None]
    if projected is not None and factors is not None:
        logits = logits + projected.double() @ factors.double().T
    close(sigmoid.sum_prob, torch.sigmoid(logits).sum(1), dtype, 100)
    close(sigmoid.max_logit, logits.amax(1), dtype, 10)
    close(sigmoid.token_logit, logits.gather(1, ids), dtype, 10)
    close(sigmoid.topk_logits, logits.topk(min(2, v), 1).values, dtype, 10)
    assert sigmoid.count_above is not None
    assert ((sigmoid.count_above - (torch.sigmoid(logits) > 0.6).sum(1)).abs() <= 1).all()


# --- losses


def vocab_bce_definition(
    hidden: Tensor, weight: Tensor, terms: dict[str, Tensor], targets: Tensor, exclude: Tensor, pos_weight: float
) -> Tensor:
    """Sum of the losses, with torch's own operations."""
    logits = hidden @ weight.T
    logits = terms["scale"][:, None].to(logits.dtype) * logits + terms["bias"] + terms["shift"].to(logits.dtype)
    labels, mask = torch.zeros_like(logits), torch.ones_like(logits, dtype=torch.bool)
    for i, target in enumerate(targets.tolist()):
        mask[i, exclude[i][exclude[i] >= 0]] = False
        if target == -100:
            mask[i] = False
        else:
            mask[i, target], labels[i, target] = True, 1.0
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits[mask], labels[mask], pos_weight=torch.tensor(pos_weight, dtype=logits.dtype), reduction="sum"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1030, 12, 2100)], ids=str)
def test_vocab_bce_against_torch(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden, weight, bias = head(*shape, dtype)
    needs("linear_vocab_bce", hidden)
    n, _, v = shape
    wide = torch.promote_types(dtype, torch.float32)
    terms = {"bias": bias, "scale": torch.rand(n, dtype=wide), "shift": torch.randn((), dtype=wide)}
    targets, exclude = torch.randint(0, v, (n,)), torch.randint(-1, v, (n, 6))
    targets[3:4] = -100
    exclude[:, 4], exclude[:, 5] = targets.clamp(min=-1), exclude[:, 0]  # the target stays, and twice is once
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, *terms.values())]
    loss = F.linear_vocab_bce(hidden, weight, targets, exclude=exclude, pos_weight=3.0, reduction="sum", **terms)
    double = [tensor.detach().double().requires_grad_() for tensor in inputs]
    eager, expected = (
        vocab_bce_definition(*tensors[:2], dict(zip(terms, tensors[2:], strict=True)), targets, exclude, 3.0)
        for tensors in (inputs, double)
    )
    close(loss.detach(), expected.detach(), dtype, 10)
    grads = [
        torch.autograd.grad(total, given) for total, given in ((loss, inputs), (eager, inputs), (expected, double))
    ]
    for got, rounded, exact in zip(*grads, strict=True):
        assert got.dtype == rounded.dtype
        if exact.numel():
            lost = (rounded.double() - exact).abs().max()
            allowed = 2 * lost + 8 * torch.finfo(torch.promote_types(got.dtype, wide)).eps * exact.abs().max()
            assert (got.double() - exact).abs().max() <= allowed


def vocab_bce(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The operator itself: total, losses and gradients in hidden and weight."""
    row_weights = options.get("row_weights", torch.ones(len(hidden)))
    arguments = (None, None, None, targets, options.get("exclude"), row_weights, 1.0, True, True)
    return torch.ops.pyqe.linear_vocab_bce(hidden, weight, *arguments)[:4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocab_bce_of_a_row_does_not_depend_on_its_batch(backend: str, dtype: torch.dtype) -> None:
    hidden, weight, _ = head(67, 48, 2999, dtype)
    needs("linear_vocab_bce", hidden)
    targets, exclude = torch.randint(-1, 2999, (67,)), torch.randint(-1, 2999, (67, 9))
    _, losses, grad_hidden, _ = vocab_bce(hidden, weight, targets, exclude=exclude)
    for rows in (slice(0, 1), slice(5, 23), slice(66, 67)):
        part = vocab_bce(hidden[rows], weight, targets[rows], exclude=exclude[rows])
        assert torch.equal(part[1], losses[rows])
        assert torch.equal(part[2], grad_hidden[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocab_bce_is_the_same_bits_for_any_thread_count(backend: str, dtype: torch.dtype) -> None:
    hidden, weight, _ = head(150, 65, 5001, dtype)
    needs("linear_vocab_bce", hidden)
    if backend == "reference":
        pytest.skip("torch's matrix products depend on the number of threads")
    targets = torch.randint(-1, 5001, (150,))
    threads = torch.get_num_threads()
    expected = vocab_bce(hidden, weight, targets)
    try:
        for count in (1, 3, 16):
            torch.set_num_threads(count)
            assert all(map(torch.equal, vocab_bce(hidden, weight, targets), expected))
    finally:
        torch.set_num_threads(threads)


def test_vocab_bce_of_a_nan_row(backend: str) -> None:
    hidden, weight, _ = head(20, 9, 50, torch.float32)
    needs("linear_vocab_bce", hidden)
    targets = torch.randint(0, 50, (20,))
    good = vocab_bce(hidden, weight, targets)
    hidden[7, 3] = torch.nan
    total, losses, grad_hidden, grad_weight = vocab_bce(hidden, weight, targets)
    others = torch.arange(20) != 7
    for got, expected in ((losses, good[1]), (grad_hidden, good[2])):
        assert torch.equal(got[others], expected[others])
        assert got[7].isnan().all()
    assert total.isnan()
    assert grad_weight.isnan().all()  # every token has met the row


def test_vocab_bce_of_huge_and_of_tiny_losses(backend: str) -> None:
    logits = torch.tensor([-1e4, -100, -87, -60, -20, -17, -3, -1e-4, 0, 1e-6, 1, 5, 16.5, 20, 87, 100, 1e4])
    weight = torch.ones(1, 1)
    needs("linear_vocab_bce", weight)
    for target, sign in ((-1, 1), (0, -1)):
        _, losses, grad_hidden, _ = vocab_bce(logits[:, None], weight, torch.full((17,), target))
        z = sign * logits.double()
        expected = z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
        torch.testing.assert_close(losses.double(), expected, rtol=5e-7, atol=1e-37)
        torch.testing.assert_close(grad_hidden[:, 0].double(), sign * torch.sigmoid(z), rtol=5e-7, atol=1e-37)


def test_vocab_bce_backward_twice_and_of_a_multiple(backend: str) -> None:
    hidden, weight, _ = head(5, 4, 11, torch.float32)
    needs("linear_vocab_bce", hidden)
    hidden.requires_grad_()
    loss = F.linear_vocab_bce(hidden, weight.requires_grad_(), torch.arange(5))
    loss.backward(retain_graph=True)
    assert hidden.grad is not None
    assert weight.grad is not None
    once = hidden.grad.clone(), weight.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), (4 * once[0], 4 * once[1]))


def test_vocab_bce_refuses_bad_ids(backend: str) -> None:
    hidden, weight, _ = head(3, 4, 6, torch.float32)
    needs("linear_vocab_bce", hidden)
    targets = torch.tensor([0, 5, -1])
    if not looks_at_ids(hidden):
        assert vocab_bce(hidden, weight, targets + 1)[1].isnan().tolist() == [False, True, False]
        return
    with pytest.raises(IndexError, match="got 6"):
        vocab_bce(hidden, weight, targets + 1)
    with pytest.raises(IndexError, match=r"exclude.*got -2"):
        vocab_bce(hidden, weight, targets, exclude=torch.tensor([[0], [-2], [1]]))


def test_ignored_rows_do_not_leak(backend: str) -> None:
    hidden, weight, _ = head(6, 4, 11, torch.float32)
    needs("linear_vocab_bce", hidden)
    targets = torch.tensor([1, 2, -100, 3, -100, 4])
    kept = targets != -100
    shift = torch.randn(6)
    weight.requires_grad_()
    expected = F.linear_vocab_bce(hidden[kept], weight, targets[kept], shift=shift[kept])
    hidden[~kept], shift[~kept] = torch.nan, torch.nan
    got = F.linear_vocab_bce(hidden, weight, targets, shift=shift)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, weight), torch.autograd.grad(expected, weight))


# --- probabilities that are stated, temperature


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("center", ["none", "mean", "logsumexp"])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (65, 7), (3, 1031)], ids=str)
def test_inverse_softmax(backend: str, shape: tuple[int, int], center: Any, dtype: torch.dtype) -> None:
    probs = torch.rand(shape).to(dtype)
    if probs.numel() > 3:
        probs[0, 0] = 0.0
    needs("inverse_softmax", probs)
    expected = probs.double().clamp(min=1e-6).log()
    if center == "mean":
        expected -= expected.mean(1, keepdim=True)
    elif center == "logsumexp":
        expected -= expected.logsumexp(1, keepdim=True)
    close(F.inverse_softmax(probs, eps=1e-6, center=center), expected, dtype, 1)


def test_inverse_softmax_of_bad_rows(backend: str) -> None:
    probs = torch.tensor([[0.5, 0.5], [-0.1, 1.1], [torch.nan, 1.0], [0.2, 0.8]])
    needs("inverse_softmax", probs)
    assert F.inverse_softmax(probs).isnan().all(1).tolist() == [False, True, True, False]


def nll_definition(logits: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, ...]:
    """Mean NLL of softmax(beta * logits) and its derivatives in beta, by automatic differentiation."""
    inverse = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    nll = torch.nn.functional.cross_entropy(inverse * logits.double(), labels)
    (first,) = torch.autograd.grad(nll, inverse, create_graph=True)
    (second,) = torch.autograd.grad(first, inverse)
    return nll.detach(), first.detach(), second.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (65, 7), (33, 64), (3, 1031)], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.6, -1.5])
def test_temperature_nll(backend: str, shape: tuple[int, int], dtype: torch.dtype, soft: bool, beta: float) -> None:
    logits = (3 * torch.randn(shape[0], 2 * shape[1])).to(dtype)[:, : shape[1]]
    needs("temperature_nll", logits)
    labels = torch.rand(shape).softmax(1) if soft else torch.randint(0, shape[1], shape[:1])
    expected = nll_definition(logits, labels.double() if soft else labels, beta)
    result = F.temperature_nll(logits, labels, beta)
    # soft labels in float32 sum to 1 within 1e-7, which is all that the largest logit's cancelling needs
    tolerance = 1e-6 if dtype == torch.float64 and soft else TOLERANCE[dtype]
    for got, want in zip((result.nll, result.first, result.second), expected, strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [5, 200])
def test_temperature_nll_of_special_logits(backend: str, classes: int, soft: bool) -> None:
    logits, labels = torch.randn(20, classes), torch.randint(0, classes - 1, (20,))
    needs("temperature_nll", logits)
    targets = torch.nn.functional.one_hot(labels, classes).float() if soft else labels
    shorter = targets[:, :-1] if soft else targets
    logits[:, -1] = -torch.inf  # probability 0, as if the class were not there
    masked, without = F.temperature_nll(logits, targets, 0.7), F.temperature_nll(logits[:, :-1], shorter, 0.7)
    assert (masked.nll - without.nll).abs() < 1e-6
    assert (masked.first - without.first).abs() < 1e-6
    assert (masked.second - without.second).abs() < 1e-5
    for bad in (torch.nan, torch.inf):
        spoilt = logits.clone()
        spoilt[7, 3] = bad
        result = F.temperature_nll(spoilt, targets)
        assert result.nll.isnan()
        assert result.first.isnan()
        assert result.second.isnan()
    logits[torch.arange(20), labels] = -torch.inf
    assert F.temperature_nll(logits, targets).nll == torch.inf


def test_temperature_nll_of_long_rows_with_masked_parts(backend: str) -> None:
    logits, labels = torch.randn(4, 5000) - 1e3, torch.full((4,), 1550)
    needs("temperature_nll", logits)
    rest = torch.cat([logits[:, 1500:4000], logits[:, 4500:]], 1)
    logits[:, :1500], logits[:, 4000:4500] = torch.finfo(torch.float32).min, -torch.inf  # two ways to mask
    for beta in (0.01, 0.7, 40.0):
        masked, without = F.temperature_nll(logits, labels, beta), F.temperature_nll(rest, labels - 1500, beta)
        for got, want in zip(
            (masked.nll, masked.first, masked.second), (without.nll, without.first, without.second), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_temperature_nll_of_bad_labels(backend: str) -> None:
    logits, labels = torch.randn(40, 6), torch.zeros(40, dtype=torch.int64)
    needs("temperature_nll", logits)
    assert F.temperature_nll(logits[:0], labels[:0]).nll.isnan()
    for bad in (6, -2, -100, 2**40):
        labels[33] = bad
        if not looks_at_ids(labels):
            assert F.temperature_nll(logits, labels).nll.isnan()
            continue
        with pytest.raises(IndexError, match=rf"labels\[33\].* \[0, 6\), got {bad}"):
            F.temperature_nll(logits, labels)
    labels[33] = -1
    assert F.temperature_nll(logits, labels).nll.isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[1:], (3, 8, 5000)], ids=str)
@pytest.mark.parametrize(("beta", "softcap"), [(0.3, None), (1.0, 5.0), (4.0, 5.0), (0.0, None), (-1.5, 5.0)])
def test_linear_temperature_nll(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, beta: float, softcap: float | None
) -> None:
    hidden, weight, bias = head(*shape, dtype)
    needs("linear_temperature_nll", hidden)
    labels = torch.randint(0, shape[2], shape[:1])
    logits = 0.5 * (hidden.double() @ weight.double().T + bias.double())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    result = F.linear_temperature_nll(hidden, weight, labels, beta, bias, logit_scale=0.5, logit_softcap=softcap)
    for got, want in zip((result.nll, result.first, result.second), nll_definition(logits, labels, beta), strict=True):
        close(got.to(compute_dtype(hidden)), want, dtype, 10)
    with pyqe.use_backend("reference"):
        plain = F.temperature_nll(logits, labels, beta)
    close(result.nll.to(compute_dtype(hidden)), plain.nll, dtype, 10)


def test_linear_temperature_nll_of_large_logits(backend: str) -> None:
    hidden, weight, bias = head(20, 16, 3000, torch.float32)
    needs("linear_temperature_nll", hidden)
    labels = torch.randint(0, 1000, (20,))
    bias[1000:2000], bias[2000:] = -torch.inf, torch.finfo(torch.float32).min  # two ways to mask
    for beta in (1e-3, 1.0, 50.0):
        result = F.linear_temperature_nll(100 * hidden, weight, labels, beta, bias)
        logits = 100 * hidden.double() @ weight[:1000].double().T + bias[:1000].double()
        expected = nll_definition(logits, labels, beta)
        for got, want in zip((result.nll, result.first, result.second), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_linear_temperature_nll_of_bad_rows_and_labels(backend: str) -> None:
    hidden, weight, bias = head(70, 8, 1100, torch.float32)
    needs("linear_temperature_nll", hidden)
    labels = torch.arange(70)
    assert F.linear_temperature_nll(hidden[:0], weight, labels[:0]).nll.isnan()
    for bad in (torch.nan, torch.inf):
        spoilt = bias.clone()
        spoilt[1050] = bad
        result = F.linear_temperature_nll(hidden, weight, labels, 0.5, spoilt)
        assert result.nll.isnan()
        assert result.first.isnan()
        assert result.second.isnan()
    assert F.linear_temperature_nll(hidden, weight, labels, 0.5, torch.full_like(bias, -torch.inf)).nll.isnan()
    bias[33] = -torch.inf  # the label of row 33, which has probability 0
    assert F.linear_temperature_nll(hidden, weight, labels, 0.5, bias).nll == torch.inf
    for wrong in (1100, -2, -100, 2**40):
        labels[33] = wrong
        if not looks_at_ids(labels):
            assert F.linear_temperature_nll(hidden, weight, labels).nll.isnan()
            continue
        with pytest.raises(IndexError, match=rf"labels\[33\].* \[0, 1100\), got {wrong}"):
            F.linear_temperature_nll(hidden, weight, labels)
    labels[33] = -1
    assert F.linear_temperature_nll(hidden, weight, labels).nll.isnan()


def test_linear_temperature_nll_same_bits_for_any_thread_count(backend: str) -> None:
    hidden, weight, _ = head(1100, 32, 3000, torch.bfloat16)  # more rows than are scanned at a time
    needs("linear_temperature_nll", hidden)
    labels = torch.randint(0, 3000, (1100,))
    expected = F.linear_temperature_nll(hidden, weight, labels, 0.7)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert F.linear_temperature_nll(hidden, weight, labels, 0.7) == expected
    finally:
        torch.set_num_threads(threads)


def test_inputs_are_never_changed(backend: str) -> None:
    hidden, weight, bias = head(5, 4, 11, torch.float32)
    targets = torch.randint(0, 11, (5,))
    before = [tensor.clone() for tensor in (hidden, weight, bias, targets)]
    sampler = NegativeSampler(("uniform", "softmax"), num_negatives=2)
    for name, call in {
        "linear_token_logits": lambda: F.linear_token_logits(hidden, weight, targets, bias),
        "linear_softmax_stats": lambda: F.linear_softmax_stats(hidden, weight, bias, token_ids=targets, entropy=True),
        "linear_sigmoid_stats": lambda: F.linear_sigmoid_stats(hidden, weight, bias, scale=2.0, shift=1.0),
        "linear_temperature_nll": lambda: F.linear_temperature_nll(hidden, weight, targets, 0.5, bias),
        "linear_sample_negatives": lambda: F.linear_sample_negatives(hidden, weight, targets, sampler),
        "linear_vocab_bce": lambda: F.linear_vocab_bce(hidden, weight, targets, bias=bias),
    }.items():
        if available_backends()[backend].obstacle(name, (hidden,)) is None:
            call()
    for tensor, copy in zip((hidden, weight, bias, targets), before, strict=True):
        assert torch.equal(tensor, copy)


# --- torch's own checks, on every operator


def operator_samples(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    hidden, weight, bias = head(5, 4, 11, dtype)
    ids, targets = torch.randint(-1, 11, (5, 3)), torch.randint(0, 11, (5,))
    grad, row = torch.randn(5, 3, dtype=dtype), torch.rand(5, dtype=dtype)
    logits = hidden @ weight.T
    seed, counts = torch.tensor(7, device="cpu"), torch.rand(11)
    softmax = (ids, torch.randint(0, 11, (1, 2)), 3, 2.0, True, "jump:last")
    sampler = (targets, seed, ["unigram", "softmax"], [1, 2], [1.0, 1.0], "independent", 2.0, "jump:first", counts)
    return {
        "linear_token_logits": (hidden, weight, ids, bias),
        "token_logits_grad_hidden": (grad, weight, ids),
        "token_logits_grad_rows": (grad, hidden, ids),
        "token_logits_grad_weight": (grad, hidden, ids, 11),
        "softmax_stats": (logits, *softmax),
        "linear_softmax_stats": (hidden, weight, bias, 1.0, 30.0, *softmax),
        "sigmoid_stats": (logits, ids, 3, 0.5),
        "linear_sigmoid_stats": (hidden, weight, bias, row, row, ids, 3, 0.5),
        "linear_joint_stats": (
            hidden,
            weight,
            bias,
            1.0,
            30.0,
            *softmax,
            row,
            row,
            counts,
            row[:, None],
            weight[:, :1],
            2,
            0.5,
        ),
        "sample_negatives": (logits, *sampler),
        "linear_sample_negatives": (hidden, weight, bias, 1.0, None, *sampler),
        "linear_vocab_bce": (hidden, weight, bias, row, row, targets, ids, row, 2.0, True, True),
        "inverse_softmax": (torch.rand(5, 4, dtype=dtype), 1e-9, "mean"),
        "temperature_nll": (logits, targets, torch.tensor(0.5, dtype=torch.float64)),
        "linear_temperature_nll": (hidden, weight, bias, 1.0, 30.0, targets, torch.tensor(0.5, dtype=torch.float64)),
    }


def test_operator_samples_cover_every_operator() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyqe::")}
    assert registered == set(operator_samples())


_ROW_ARGUMENTS = {
    "linear_sigmoid_stats": "scale shift",
    "linear_joint_stats": "scale shift token_bias projected factors",
    "sample_negatives": "targets unigram_counts",
    "linear_sample_negatives": "targets unigram_counts",
    "linear_vocab_bce": "scale shift targets exclude_ids row_weights",
    "temperature_nll": "labels",
    "linear_temperature_nll": "labels",
}


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ library trusts the pointers that it gets")
@pytest.mark.parametrize(
    ("name", "argument"), [(op, arg) for op, args in _ROW_ARGUMENTS.items() for arg in args.split()]
)
def test_operands_with_a_row_too_few_are_refused(name: str, argument: str) -> None:
    operator, sample = getattr(torch.ops.pyqe, name), list(operator_samples()[name])
    place = [declared.name for declared in operator.default._schema.arguments].index(argument)
    sample[place] = sample[place][:-1]
    with pyqe.use_backend("cpu"), pytest.raises(ValueError, match=rf"^{argument}: expected \["):
        operator(*sample)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ library trusts the pointers that it gets")
def test_projected_states_without_factors_are_refused() -> None:
    for place, left in ((-4, "factors"), (-3, "projected")):
        sample = list(operator_samples()["linear_joint_stats"])
        sample[place] = None
        with pyqe.use_backend("cpu"), pytest.raises(ValueError, match=f"^{left}: expected"):
            torch.ops.pyqe.linear_joint_stats(*sample)


@pytest.mark.parametrize("name", list(operator_samples()))
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend: str, name: str, requires_grad: bool) -> None:
    sample = operator_samples()[name]
    needs(name, *(arg for arg in sample if isinstance(arg, Tensor)))
    if requires_grad:
        if name not in ("linear_token_logits", "linear_vocab_bce", "inverse_softmax"):
            pytest.skip("not differentiable")
        sample = tuple(
            arg.requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() and i < 5 else arg
            for i, arg in enumerate(sample)
        )
    torch.library.opcheck(getattr(torch.ops.pyqe, name).default, sample)


@pytest.mark.parametrize("name", ["linear_token_logits", "linear_vocab_bce", "inverse_softmax"])
def test_gradcheck(name: str) -> None:
    sample = operator_samples(torch.float64)[name]
    variables = [i for i, arg in enumerate(sample) if isinstance(arg, Tensor) and arg.is_floating_point() and i < 5]
    operator = getattr(torch.ops.pyqe, name)

    def function(*values: Tensor) -> Any:
        args = list(sample)
        for i, value in zip(variables, values, strict=True):
            args[i] = value
        result = operator(*args)
        if name == "linear_token_logits":
            return result.masked_fill(sample[2] < 0, 0.0)
        return result[:2] if isinstance(result, tuple) else result

    values = [sample[i].clone().requires_grad_() for i in variables]
    assert torch.autograd.gradcheck(function, values)


def test_operations_compile_in_one_graph(backend: str) -> None:
    hidden, weight, _ = head(6, 4, 11, torch.float32)
    needs("linear_token_logits", hidden)
    needs("linear_softmax_stats", hidden)
    targets = torch.randint(0, 11, (6,))
    negatives = torch.randint(0, 11, (6, 2))

    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.linear_sampled_bce(hidden, weight, targets, negatives, scale=0.5, shift=-1.0)
        stats = F.linear_softmax_stats(hidden.detach(), weight.detach(), token_ids=targets, entropy=True)
        assert stats.entropy is not None
        return loss, stats.entropy

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain, fused = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    expected, got = step(hidden, plain), compiled(hidden, fused)
    torch.testing.assert_close(got, expected)
    expected[0].backward()
    got[0].backward()
    torch.testing.assert_close(fused.grad, plain.grad)


def test_vmap(backend: str) -> None:
    hidden, weight, _ = head(6, 4, 11, torch.float32)
    needs("linear_token_logits", hidden)
    ids = torch.randint(0, 11, (6, 2))
    hidden.requires_grad_()
    got = torch.vmap(lambda h, i: F.linear_token_logits(h[None], weight, i[None])[0])(hidden, ids)
    torch.testing.assert_close(got, F.linear_token_logits(hidden, weight, ids))
    got.sum().backward()
    torch.testing.assert_close(hidden.grad, weight[ids].sum(1))
