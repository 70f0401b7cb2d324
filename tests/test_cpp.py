"""The compiled library through its raw bindings: shapes, dtypes, errors, instruction sets, repeatability."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyqe import _C

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
HALVES_AND_FLOAT = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [0, 1, 3, 7, 8, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 576, 1000]
FP32_EPS = torch.finfo(torch.float32).eps
POISON = 12345.0


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def padded_rows(matrix: Tensor, padding: int = 5) -> Tensor:
    """The same matrix with NaN between its rows."""
    rows, columns = matrix.shape
    storage = torch.full((rows, columns + padding), torch.nan, dtype=matrix.dtype)
    storage[:, :columns] = matrix
    return storage[:, :columns]


def forward(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None = None, threads: int = 1) -> Tensor:
    """hidden [N, D], weight [V, D], token_ids [N, K] -> [N, K]."""
    out = torch.full(token_ids.shape, POISON)
    _C.token_logits_forward(
        hidden.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        token_ids.data_ptr(),
        out.data_ptr(),
        n=token_ids.shape[0],
        k=token_ids.shape[1],
        dim=hidden.shape[1],
        vocab=weight.shape[0],
        hidden_stride=hidden.stride(0),
        weight_stride=weight.stride(0),
        dtype=DTYPES[weight.dtype],
        threads=threads,
    )
    return out


def backward_hidden(grad: Tensor, weight: Tensor, token_ids: Tensor, threads: int = 1) -> Tensor:
    """grad [N, K], weight [V, D], token_ids [N, K] -> [N, D]."""
    out = torch.full((grad.shape[0], weight.shape[1]), POISON, dtype=weight.dtype)
    _C.token_logits_backward_hidden(
        grad.data_ptr(),
        weight.data_ptr(),
        token_ids.data_ptr(),
        out.data_ptr(),
        n=grad.shape[0],
        k=grad.shape[1],
        dim=weight.shape[1],
        vocab=weight.shape[0],
        weight_stride=weight.stride(0),
        dtype=DTYPES[weight.dtype],
        threads=threads,
    )
    return out


def backward_weight(
    grad: Tensor, hidden: Tensor, token_ids: Tensor, vocab: int, *, dense: bool, threads: int = 1
) -> tuple[Tensor, Tensor]:
    """grad [N, K], hidden [N, D], token_ids [N, K] -> the tokens that occur [R], their rows [R, D].

    `dense` writes them into a [V, D] result by row_ids and picks them out again.
    """
    flat = token_ids.flatten()
    order = torch.argsort(flat, stable=True)
    pairs = order[flat[order] >= 0]
    tokens, counts = torch.unique_consecutive(flat[pairs], return_counts=True)
    row_starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    out = torch.full((vocab if dense else len(tokens), hidden.shape[1] + 3), POISON, dtype=hidden.dtype)
    _C.token_logits_backward_weight(
        grad.data_ptr(),
        hidden.data_ptr(),
        pairs.data_ptr(),
        row_starts.data_ptr(),
        tokens.data_ptr() if dense else 0,
        out.data_ptr(),
        rows=len(tokens),
        k=grad.shape[1],
        dim=hidden.shape[1],
        hidden_stride=hidden.stride(0),
        out_stride=out.stride(0),
        dtype=DTYPES[hidden.dtype],
        threads=threads,
    )
    assert (out[:, hidden.shape[1] :] == torch.tensor(POISON, dtype=out.dtype)).all(), "wrote past a row"
    return tokens, (out[tokens] if dense else out)[:, : hidden.shape[1]]


def inverse_softmax(probs: Tensor, eps: float = 1e-12, center: int = 0, threads: int = 1) -> Tensor:
    """probs [N, C] -> [N, C]."""
    out = torch.full(probs.shape, POISON, dtype=probs.dtype)
    _C.inverse_softmax(
        probs.data_ptr(),
        out.data_ptr(),
        n=probs.shape[0],
        classes=probs.shape[1],
        probs_stride=probs.stride(0),
        eps=eps,
        center=center,
        dtype=DTYPES[probs.dtype],
        threads=threads,
    )
    return out


def temperature_nll(logits: Tensor, labels: Tensor, beta: float, threads: int = 1) -> Tensor:
    """logits [N, C], labels int64 [N] or fp32 [N, C] -> NLL, first and second derivative [3]."""
    soft = labels.dim() == 2
    result = _C.temperature_nll(
        logits.data_ptr(),
        0 if soft else labels.data_ptr(),
        labels.data_ptr() if soft else 0,
        n=logits.shape[0],
        classes=logits.shape[1],
        beta=beta,
        logits_stride=logits.stride(0),
        soft_labels_stride=labels.stride(0) if soft else 0,
        dtype=DTYPES[logits.dtype],
        threads=threads,
    )
    return torch.tensor(result, dtype=torch.float64)


def assert_within(actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """|actual - expected| <= 4 fp32 roundings of `magnitude` + 1 rounding to the dtype of `actual`."""
    rounding = torch.finfo(actual.dtype)
    allowed = 4 * FP32_EPS * magnitude + rounding.eps * expected.abs() + rounding.smallest_normal * rounding.eps
    error = (actual.double() - expected).abs()
    assert (error <= allowed).all(), f"error {error.max():.3g}, {(error / allowed).max():.3g} of what is allowed"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.view(torch.uint8) == b.view(torch.uint8)).all())


def random_ids(n: int, k: int, vocab: int, seed: int = 1) -> Tensor:
    ids = torch.randint(0, vocab, (n, k), generator=torch.Generator().manual_seed(seed))
    ids.view(-1)[::5] = -1
    return ids


# ---- token logits


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 4), (7, 1)])
def test_forward(dtype: torch.dtype, dim: int, n: int, k: int) -> None:
    vocab = 29
    hidden, weight = padded_rows(randn(n, dim, dtype=dtype)), padded_rows(randn(vocab, dim, dtype=dtype, seed=2))
    bias, ids = randn(vocab, dtype=dtype, seed=3), random_ids(n, k, vocab)
    for used_bias in (None, bias):
        terms = hidden.double()[:, None, :] * weight.double()[ids]
        offset = torch.zeros(n, k) if used_bias is None else used_bias.double()[ids]
        actual = forward(hidden, weight, ids, used_bias)
        assert (actual.isnan() == (ids == -1)).all()
        real = ids >= 0
        expected, magnitude = terms.sum(-1) + offset, terms.abs().sum(-1) + offset.abs()
        assert_within(actual[real], expected[real], magnitude[real])


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 4), (7, 1)])
def test_backward_hidden(dtype: torch.dtype, dim: int, n: int, k: int) -> None:
    weight, ids, grad = padded_rows(randn(29, dim, dtype=dtype)), random_ids(n, k, 29), randn(n, k, seed=3)
    grad[ids == -1] = torch.nan  # must not be looked at
    terms = torch.where(ids >= 0, grad, 0).double()[..., None] * weight.double()[ids.clamp(min=0)]
    assert_within(backward_hidden(grad, weight, ids), terms.sum(1), terms.abs().sum(1))


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dense", [False, True])
def test_backward_weight(dtype: torch.dtype, dim: int, dense: bool) -> None:
    n, k, vocab = 23, 3, 11
    hidden, ids, grad = padded_rows(randn(n, dim, dtype=dtype)), random_ids(n, k, vocab), randn(n, k, seed=3)
    tokens, actual = backward_weight(grad, hidden, ids, vocab, dense=dense)
    chosen = torch.where(ids[None] == tokens[:, None, None], grad, 0).double()  # [R, N, K]
    assert_within(
        actual,
        torch.einsum("rnk,nd->rd", chosen, hidden.double()),
        torch.einsum("rnk,nd->rd", chosen.abs(), hidden.double().abs()),
    )


@pytest.mark.parametrize(("n", "k"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do(n: int, k: int) -> None:
    hidden, weight, ids = randn(n, 8), randn(5, 8), random_ids(n, k, 5)
    assert forward(hidden, weight, ids).shape == (n, k)
    assert (backward_hidden(torch.ones(n, k), weight, ids) == 0).all()
    tokens, rows = backward_weight(torch.ones(n, k), hidden, ids, 5, dense=False)
    assert tokens.shape == (0,)
    assert rows.shape == (0, 8)


def test_an_empty_sum_is_the_bias() -> None:
    bias, ids = randn(4), torch.tensor([[0, 3, -1]])
    out = forward(torch.empty(1, 0), torch.empty(4, 0), ids, bias)
    assert same_bits(out[:, :2], bias[ids[:, :2]])
    assert out[0, 2].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    ids = torch.arange(len(values))[None]
    torch.testing.assert_close(
        forward(one, values[:, None].contiguous(), ids)[0], values.float(), rtol=0, atol=0, equal_nan=True
    )
    for factor in (1.0, 1 / 3, 1.001, 2.0**-13, 3e3):
        # One product per element: fp32 and one rounding to the dtype, just as torch does it.
        actual = backward_hidden(torch.tensor([[factor]]), values[None], torch.zeros(1, 1, dtype=torch.int64))
        expected = (values.float() * factor).to(dtype)
        torch.testing.assert_close(actual[0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("dim", [33, 576])
def test_same_bits_for_any_batch_and_threads(dtype: torch.dtype, dim: int) -> None:
    n, k, vocab = 700, 3, 50
    hidden, weight, bias = (
        randn(n, dim, dtype=dtype),
        randn(vocab, dim, dtype=dtype, seed=2),
        randn(vocab, dtype=dtype, seed=3),
    )
    ids, grad = random_ids(n, k, vocab), randn(n, k, seed=4)
    logits, grad_hidden = forward(hidden, weight, ids, bias), backward_hidden(grad, weight, ids)
    tokens, grad_weight = backward_weight(grad, hidden, ids, vocab, dense=False)
    for threads in (1, 2, 3, 8):
        assert same_bits(forward(hidden, weight, ids, bias, threads), logits)
        assert same_bits(backward_hidden(grad, weight, ids, threads), grad_hidden)
        for dense in (False, True):
            again = backward_weight(grad, hidden, ids, vocab, dense=dense, threads=threads)
            assert same_bits(again[0], tokens)
            assert same_bits(again[1], grad_weight)
    for row in (0, 1, 349, n - 1):
        alone = slice(row, row + 1)
        assert same_bits(forward(hidden[alone], weight, ids[alone], bias), logits[alone])
        assert same_bits(backward_hidden(grad[alone], weight, ids[alone]), grad_hidden[alone])


def test_nan_and_inf_stay_in_their_row() -> None:
    hidden, weight, ids = randn(3, 40), randn(4, 40, seed=2), torch.tensor([[0], [1], [2]])
    clean = forward(hidden, weight, ids)
    hidden[1, 39], weight[3] = torch.inf, torch.nan
    out = forward(hidden, weight, ids)
    assert not out[1].isfinite()
    assert same_bits(out[::2], clean[::2])


@pytest.mark.parametrize(("bad", "position"), [(-2, (0, 0)), (5, (2, 1)), (2**63 - 1, (1, 0)), (-(2**63), (2, 0))])
def test_bad_token_id(bad: int, position: tuple[int, int]) -> None:
    n, k = position
    ids = torch.zeros(3, 2, dtype=torch.int64)
    ids[n, k] = bad
    message = rf"token_ids\[{n}, {k}\]: expected -1 .* in \[0, 5\), got {bad}"
    with pytest.raises(IndexError, match=message):
        forward(randn(3, 8), randn(5, 8), ids)
    with pytest.raises(IndexError, match=message):
        backward_hidden(torch.ones(3, 2), randn(5, 8), ids)


def test_a_bad_id_leaves_the_output_alone() -> None:
    out, ids = torch.full((2, 1), POISON), torch.tensor([[0], [9]])
    hidden, weight = randn(2, 4), randn(9, 4)
    with pytest.raises(IndexError):
        _C.token_logits_forward(
            hidden.data_ptr(), weight.data_ptr(), 0, ids.data_ptr(), out.data_ptr(),
            n=2, k=1, dim=4, vocab=9, hidden_stride=4, weight_stride=4, dtype=0, threads=1,
        )  # fmt: skip
    assert (out == POISON).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "threads: expected 1 or more, got 0"),
        ({"threads": -3}, "threads: expected 1 or more, got -3"),
        ({"n": -1}, "n: expected 0 or more, got -1"),
        ({"k": -1}, "k: expected 0 or more, got -1"),
        ({"dim": -1}, "dim: expected 0 or more, got -1"),
        ({"vocab": -1}, "vocab: expected 0 or more, got -1"),
        ({"dtype": 3}, "dtype: expected fp32"),
        ({"dtype": 9}, "dtype: expected fp32"),
    ],
)
def test_bad_number(change: dict[str, int], message: str) -> None:
    sizes = {"n": 0, "k": 0, "dim": 0, "vocab": 0, "dtype": 0, "threads": 1} | change
    with pytest.raises(ValueError, match=message):
        _C.token_logits_forward(0, 0, 0, 0, 0, hidden_stride=0, weight_stride=0, **sizes)
    with pytest.raises(ValueError, match=message):
        _C.token_logits_backward_hidden(0, 0, 0, 0, weight_stride=0, **sizes)


def test_sizes_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        _C.inverse_softmax(0, 0, 0, 0, 0, 0.0, 0, 0, 1)  # type: ignore[call-arg]


class GuardedPage:
    """Memory whose end is followed by a page that may not be touched."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._end = start + mmap.PAGESIZE
        assert self._libc.mprotect(ctypes.c_void_p(self._end), mmap.PAGESIZE, 0) == 0

    def place(self, tensor: Tensor) -> int:
        """Copies a contiguous tensor to the very end of the page and returns its address."""
        address = self._end - tensor.nbytes
        ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)
        return address


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through the C library")
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_nothing_past_the_end_is_touched(dtype: torch.dtype) -> None:
    guarded_hidden, guarded_weight = GuardedPage(), GuardedPage()
    for dim in range(1, 140):
        hidden, weight = randn(1, dim, dtype=dtype), randn(1, dim, dtype=dtype, seed=2)
        one, zero, out = torch.ones(1, 1), torch.zeros(2, dtype=torch.int64), torch.empty(1, 1)
        starts = torch.tensor([0, 1])
        sizes = {"k": 1, "dim": dim, "dtype": DTYPES[dtype], "threads": 1}
        _C.token_logits_forward(
            guarded_hidden.place(hidden), guarded_weight.place(weight), 0, zero.data_ptr(), out.data_ptr(),
            n=1, vocab=1, hidden_stride=dim, weight_stride=dim, **sizes,
        )  # fmt: skip
        assert same_bits(out, forward(hidden, weight, torch.zeros(1, 1, dtype=torch.int64)))
        _C.token_logits_backward_hidden(
            one.data_ptr(), guarded_weight.place(weight), zero.data_ptr(), guarded_hidden.place(hidden),
            n=1, vocab=1, weight_stride=dim, **sizes,
        )  # fmt: skip
        _C.token_logits_backward_weight(
            one.data_ptr(), guarded_hidden.place(hidden), zero.data_ptr(), starts.data_ptr(), 0,
            guarded_weight.place(weight), rows=1, hidden_stride=dim, out_stride=dim, **sizes,
        )  # fmt: skip
        logits, soft_labels = guarded_hidden.place(hidden), guarded_weight.place(weight.float())
        for labels in ((zero.data_ptr(), 0), (0, soft_labels)):
            _C.temperature_nll(
                logits, *labels, n=1, classes=dim, beta=1.0, logits_stride=dim, soft_labels_stride=dim,
                dtype=DTYPES[dtype], threads=1,
            )  # fmt: skip
        if dtype == torch.float32:
            _C.inverse_softmax(
                guarded_hidden.place(hidden.abs()), guarded_weight.place(weight),
                n=1, classes=dim, probs_stride=dim, eps=0.0, center=1, dtype=0, threads=1,
            )  # fmt: skip


# ---- inverse softmax


def in_ulp(actual: Tensor, expected: Tensor) -> Tensor:
    """The error of an fp32 tensor in units of the last place of the fp64 one."""
    rounded = expected.float().abs()
    spacing = torch.nextafter(rounded, torch.tensor(torch.inf)).double() - rounded.double()
    return (actual.double() - expected).abs() / spacing


def test_logarithm_within_2_ulp() -> None:
    generator = torch.Generator().manual_seed(0)
    everywhere = torch.randint(1, 0x7F800000, (1_000_000,), generator=generator)
    near_one = torch.arange(0x3F800000 - 200_000, 0x3F800000 + 200_000)
    subnormal = torch.cat([torch.arange(1, 5000), torch.randint(1, 0x800000, (100_000,), generator=generator)])
    for bits in (everywhere, near_one, subnormal):
        x = bits.to(torch.int32).view(torch.float32)[None]
        assert in_ulp(inverse_softmax(x, eps=0.0), x.double().log()).max() <= 2
    edges = torch.tensor([[0.0, 1.0, torch.inf, 1e-45]])
    assert inverse_softmax(edges, eps=0.0)[0, :3].tolist() == [-torch.inf, 0.0, torch.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 2, 5, 16, 31, 32, 33, 100, 1000])
@pytest.mark.parametrize("center", [0, 1, 2])
def test_inverse_softmax(dtype: torch.dtype, classes: int, center: int) -> None:
    probs = padded_rows(torch.softmax(3 * randn(6, classes), dim=1).to(dtype))
    probs[2] *= 50  # need not sum to 1
    if classes > 1:
        probs[3, 0] = 0
    logs = probs.double().clamp(min=1e-6).log()
    centre = [torch.zeros(6, 1), logs.mean(1, keepdim=True), logs.logsumexp(1, keepdim=True)][center]
    error = (inverse_softmax(probs, 1e-6, center).double() - (logs - centre)).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * (1 + logs.abs() + centre.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("center", [0, 1, 2])
@pytest.mark.parametrize("bad", [torch.nan, -1e-9])
def test_an_invalid_probability_spoils_its_row_only(dtype: torch.dtype, center: int, bad: float) -> None:
    probs = torch.softmax(randn(3, 50), dim=1).to(dtype)
    clean = inverse_softmax(probs, center=center)
    for column in (0, 40, 49):
        spoilt = probs.clone()
        spoilt[1, column] = bad
        out = inverse_softmax(spoilt, center=center)
        assert out[1].isnan().all()
        assert same_bits(out[::2], clean[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_probability_without_eps(dtype: torch.dtype) -> None:
    probs = torch.tensor([[0.0, 0.25, 0.75], [0.0, 0.0, 0.0]], dtype=dtype)
    assert inverse_softmax(probs, 0.0, 0)[:, 0].tolist() == [-torch.inf, -torch.inf]
    assert inverse_softmax(probs, 0.0, 1).isnan().all()  # no finite mean
    normalised = inverse_softmax(probs, 0.0, 2)
    assert normalised[0, 0] == -torch.inf
    torch.testing.assert_close(normalised[0].exp(), probs[0])
    assert normalised[1].isnan().all()


def test_mean_of_many_classes() -> None:
    probs = torch.softmax(4 * randn(2, 300_001), dim=1)
    logs = probs.double().log()
    error = inverse_softmax(probs, 0.0, 1).double() - (logs - logs.mean(1, keepdim=True))
    assert error.abs().max() <= 3 * FP32_EPS * logs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("center", [0, 1, 2])
def test_inverse_softmax_same_bits_for_any_batch_and_threads(dtype: torch.dtype, center: int) -> None:
    probs = torch.softmax(randn(900, 77), dim=1).to(dtype)
    out = inverse_softmax(probs, center=center)
    for threads in (2, 3, 8):
        assert same_bits(inverse_softmax(probs, center=center, threads=threads), out)
    assert same_bits(inverse_softmax(probs[450:451], center=center), out[450:451])
    assert inverse_softmax(probs[:0], center=center).shape == (0, 77)
    assert inverse_softmax(torch.empty(4, 0, dtype=dtype), center=center).shape == (4, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -1e-9}, "eps: expected 0 or more"),
        ({"eps": float("nan")}, "eps: expected 0 or more"),
        ({"center": 3}, "center: expected none"),
        ({"center": -1}, "center: expected none"),
        ({"dtype": 1}, r"dtype: expected fp32 \(0\) or fp64 \(3\), got 1"),
        ({"n": -1}, "n: expected 0 or more"),
        ({"classes": -1}, "classes: expected 0 or more"),
        ({"threads": 0}, "threads: expected 1 or more"),
    ],
)
def test_inverse_softmax_bad_number(change: dict[str, float], message: str) -> None:
    arguments = {"n": 0, "classes": 0, "eps": 0.0, "center": 0, "dtype": 0, "threads": 1} | change
    with pytest.raises(ValueError, match=message):
        _C.inverse_softmax(0, 0, probs_stride=0, **arguments)  # type: ignore[arg-type]


# ---- temperature


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 5, 16, 33, 63, 64, 65, 80, 100, 513, 3000])
@pytest.mark.parametrize("n", [1, 17, 40])
def test_temperature_nll(dtype: torch.dtype, classes: int, n: int, soft: bool) -> None:
    logits = padded_rows((4 * randn(n, classes)).to(dtype))
    labels = padded_rows(randn(n, classes, seed=2).softmax(1)) if soft else random_ids(n, 1, classes)[:, 0].clamp(min=0)
    for beta in (0.3, 1.0, -2.0):
        z = beta * logits.double()
        target = labels.double() if soft else torch.nn.functional.one_hot(labels, classes).double()
        mean = (z.softmax(1) * logits.double()).sum(1, keepdim=True)
        spread = (logits.double() - mean).abs().amax()
        expected = [
            torch.nn.functional.cross_entropy(z, target),
            (mean[:, 0] - (target * logits.double()).sum(1)).mean(),
            (z.softmax(1) * (logits.double() - mean) ** 2).sum(1).mean(),
        ]
        scale = torch.stack([1 + spread, spread, spread**2])
        error = (temperature_nll(logits, labels, beta) - torch.stack(expected)).abs()
        assert (error <= 4 * FP32_EPS * scale).all()


def test_boltzmann_factor_within_1_ulp() -> None:
    # Logits (0, d) with exp(beta d) below fp32's rounding of 1 have the first derivative exp(beta d) d.
    exact_product = _C.cpu_isa() != "portable"  # which has no fused multiply-add
    label = torch.zeros(1, dtype=torch.int64)
    for d in torch.linspace(-80, -18, 3001).tolist():
        logits = torch.tensor([[0.0, d]])
        for beta in (1.0, 1 / 3):
            power = beta * logits[0, 1].double()
            if not -87 < power < -17.5:
                continue
            factor = temperature_nll(logits, label, beta)[1] / logits[0, 1].double()
            error = (factor / power.exp() - 1).abs() / FP32_EPS
            assert error <= 1.5 + (0 if exact_product else -power)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("n", "classes"), [(20_000, 5), (3000, 77), (30, 9000)])
def test_temperature_nll_same_bits_for_any_number_of_threads(
    dtype: torch.dtype, n: int, classes: int, soft: bool
) -> None:
    logits = (3 * randn(n, classes)).to(dtype)
    labels = randn(n, classes, seed=2).softmax(1) if soft else random_ids(n, 1, classes)[:, 0].clamp(min=0)
    result = temperature_nll(logits, labels, 0.8)
    for threads in (2, 3, 8):
        assert same_bits(temperature_nll(logits, labels, 0.8, threads), result)


@pytest.mark.parametrize("classes", [4, 100])
def test_temperature_nll_of_special_values(classes: int) -> None:
    labels = torch.arange(50) % (classes - 1)
    for column in (0, classes // 2, classes - 1):
        for bad in (torch.nan, torch.inf):
            logits = randn(50, classes)
            logits[41, column] = bad
            assert temperature_nll(logits, labels, 1.0).isnan().all()
        payload = randn(50, classes)
        payload.view(torch.int32)[41, column] = 0x7FC00001  # a NaN whose last bits are not zero
        assert temperature_nll(payload, labels, 1.0).isnan().all()
    logits = randn(50, classes)
    logits[3] = -torch.inf
    assert temperature_nll(logits, labels, 1.0).isnan().all()
    huge = torch.tensor([[1e4, -1e4, 9999.0] + [-1e4] * (classes - 3)])
    nll, first, second = temperature_nll(huge, torch.tensor([2]), 1.0).tolist()
    e = torch.tensor(1.0, dtype=torch.float64).exp().item()
    assert nll == pytest.approx(1 + torch.tensor(1 / e).log1p().item(), rel=1e-6)
    assert first == pytest.approx(1 - 1 / (1 + e), rel=1e-6)
    assert second == pytest.approx(e / (1 + e) ** 2, rel=1e-6)


@pytest.mark.parametrize("bad", [-2, 4, 2**63 - 1, -(2**63)])
def test_temperature_nll_bad_label(bad: int) -> None:
    labels = torch.zeros(60, dtype=torch.int64)
    labels[57] = bad
    with pytest.raises(IndexError, match=rf"labels\[57\]: expected -1 .* in \[0, 4\), got {bad}"):
        temperature_nll(randn(60, 4), labels, 1.0)
    labels[57] = -1
    assert temperature_nll(randn(60, 4), labels, 1.0)[:2].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 3}, r"dtype: expected fp32 \(0\), bf16 \(1\) or fp16 \(2\), got 3"),
        ({"n": -1}, "n: expected 0 or more"),
        ({"classes": 0}, "classes: expected 1 or more"),
        ({"threads": 0}, "threads: expected 1 or more"),
    ],
)
def test_temperature_nll_bad_number(change: dict[str, int], message: str) -> None:
    arguments = {"n": 0, "classes": 1, "dtype": 0, "threads": 1} | change
    with pytest.raises(ValueError, match=message):
        _C.temperature_nll(0, 0, 0, beta=1.0, logits_stride=0, soft_labels_stride=0, **arguments)


# ---- the library itself


def test_levels() -> None:
    compiled = _C.build_info()["isas"].split()
    assert _C.cpu_isas()[-1] == "portable"
    assert set(_C.cpu_isas()) <= set(compiled)
    assert _C.cpu_isa() == (os.environ.get("PYQE_CPU_ISA") or _C.cpu_isas()[0])
    assert ("avx2" in _C.cpu_features()) or _C.cpu_isas() == ["portable"]
    assert _C.max_threads() >= 1
    assert set(_C.build_info()) == {"version", "compiler", "build_type", "openmp", "isas"}


def run_python(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYQE_CPU_ISA": isa}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.skipif("PYQE_CPU_ISA" in os.environ, reason="runs this file for the other levels")
@pytest.mark.parametrize("isa", _C.cpu_isas()[1:])
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_cpp.py", ""),
        # operator rules are no matter of instruction sets
        ("test_conformance.py", "cpu and not opcheck and not compile and not vmap"),
    ],
)
def test_every_other_level_passes(isa: str, file: str, chosen: str) -> None:
    path = Path(__file__).resolve().with_name(file)
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), "-k", chosen, isa=isa)
    assert result.returncode == 0, result.stdout[-3000:]


def test_unknown_level_is_an_error() -> None:
    result = run_python("-c", "import torch; from pyqe import _C; _C.cpu_isa()", isa="sse9")
    assert result.returncode != 0
    assert f"PYQE_CPU_ISA=sse9: expected one of the levels that run on this processor: {', '.join(_C.cpu_isas())}" in (
        result.stderr
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_one_openmp_pool_with_torch() -> None:
    program = "import torch; from pyqe import _C; print(open('/proc/self/maps').read())"
    maps = run_python("-c", program, isa="").stdout
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) <= 1
