"""Dot products of the CUDA backend: the decode kernel on the emulator of CUDA's threads, and chunks of rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyqe.backends import cuda_library, cuda_product, cuda_statistics
from pyqe.backends.cuda_product import chunk_rows, product, row_chunks


@pytest.fixture(params=["forward", "reverse"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In reverse, a missing barrier or wait for copies gives other results."""
    monkeypatch.setenv("PYQE_EMULATOR_ORDER", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _emulated(emulator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = emulator.glob("_cuda*.so")
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    monkeypatch.setattr(cuda_library, "EMULATOR", str(emulator))
    monkeypatch.setattr(cuda_product, "library", library)


@pytest.fixture
def no_library_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "mm")


def matrices(n: int, v: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)


def check(dots: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Within the rounding of fp32 sums, which grows with the sum of absolute terms."""
    terms = hidden.double().abs() @ weight.double().abs().T
    error = (dots.double() - hidden.double() @ weight.double().T).abs()
    bound = 2.0**-24 * (hidden.shape[1] ** 0.5 + 4) * terms
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.usefixtures("no_library_product")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "v", "d"),
    [
        *[(n, 100, 136) for n in (1, 3, 8, 9, 16, 17, 32, 33, 64)],
        *[(17, v, 64) for v in (1, 15, 16, 192, 193, 257)],
        *[(9, 33, d) for d in (8, 40, 64, 72, 1000, 4104)],
        (64, 257, 1000),
    ],
)
def test_dots(n: int, v: int, d: int, dtype: torch.dtype, order: str) -> None:
    hidden, weight = matrices(n, v, d, dtype)
    buffer = torch.full((n + 2, v), torch.nan)
    dots = product(hidden, weight, buffer[1 : n + 1])
    check(dots, hidden, weight)
    assert buffer[0].isnan().all()
    assert buffer[n + 1].isnan().all()


@pytest.mark.usefixtures("no_library_product")
def test_rows_apart(order: str) -> None:
    """Nothing is read but the rows: what lies between them is NaN."""
    wide_hidden, wide_weight = (torch.full((n, 120), torch.nan, dtype=torch.bfloat16) for n in (5, 50))
    hidden, weight = wide_hidden[:, 8:112], wide_weight[:, 16:120]
    hidden.normal_()
    weight.normal_()
    check(product(hidden, weight, torch.full((5, 50), torch.nan)), hidden, weight)
    unaligned = wide_hidden[:, 3:107].normal_()
    check(product(unaligned, weight, torch.full((5, 50), torch.nan)), unaligned, weight)


@pytest.mark.usefixtures("no_library_product")
@pytest.mark.parametrize("d", [40, 392])
def test_same_bits_for_any_number_of_rows(d: int, order: str) -> None:
    hidden, weight = matrices(64, 70, d, torch.bfloat16)
    whole = product(hidden, weight, torch.empty(64, 70))
    for rows in (slice(0, 1), slice(63, 64), slice(5, 12), slice(20, 36), slice(1, 33)):
        part = product(hidden[rows], weight, torch.empty(rows.stop - rows.start, 70))
        assert torch.equal(part, whole[rows])


def test_not_finite_rows_stay_alone(order: str) -> None:
    hidden, weight = matrices(9, 40, 72, torch.float16)
    expected = product(hidden, weight, torch.empty(9, 40)).clone()
    hidden[3, 5], hidden[4, 70], weight[17, 71] = torch.nan, torch.inf, torch.inf
    dots = product(hidden, weight, torch.empty(9, 40))
    finite = torch.ones(9, 40, dtype=torch.bool)
    finite[3], finite[4], finite[:, 17] = False, False, False
    assert torch.equal(dots[finite], expected[finite])
    assert dots[3].isnan().all()
    assert not dots[~finite].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(0, 8), (3, 0), (3, 8), (64, 24), (67, 24), (67, 9), (300, 16)])
def test_row_chunks(n: int, d: int, dtype: torch.dtype) -> None:
    hidden, weight = matrices(n, 21, d, dtype)
    dots, buffers = torch.full((n, 21), torch.nan), set()
    for rows, chunk in row_chunks(hidden, weight):
        dots[rows] = chunk
        buffers.add(chunk.data_ptr())
    assert len(buffers) == (n > 0)
    check(dots, hidden, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_calls_of_one_kind(dtype: torch.dtype) -> None:
    hidden, weight = matrices(300, 33, 48, dtype)

    def dots(rows: slice) -> Tensor:
        return torch.cat([chunk.clone() for _, chunk in row_chunks(hidden[rows], weight)])

    for whole, part in [((0, 300), (256, 300)), ((0, 300), (100, 170)), ((0, 64), (63, 64)), ((0, 50), (7, 29))]:
        if dtype == torch.bfloat16 and (whole[1] - whole[0] > 64) != (part[1] - part[0] > 64):
            continue
        expected = dots(slice(*whole))[part[0] - whole[0] : part[1] - whole[0]]
        assert torch.equal(dots(slice(*part)), expected)


def test_chunks_depend_on_the_weights_alone() -> None:
    def rows(vocab_size: int, dim: int = 8, dtype: torch.dtype = torch.bfloat16) -> int:
        return chunk_rows(torch.empty(1, dim, dtype=dtype).expand(vocab_size, dim))

    assert [rows(v) for v in (0, 1, 128256, 262144, 400_000, 1_000_000)] == [256, 256, 256, 256, 128, 64]
    assert rows(128256, dtype=torch.float32) == rows(128256, dim=9) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_library_products_have_one_shape(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head and of low-rank factors alike: for another one the library may take another algorithm."""
    monkeypatch.setattr(cuda_statistics, "library", cuda_product.library)
    shapes, multiply = set(), torch.mm

    def recorded(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
        shapes.add((*left.shape, right.shape[1]))
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", recorded)
    weight, factors, options = torch.randn(21, 24).to(dtype), torch.randn(21, 3), (None, None, 0, None, False, "")
    for short, sizes in ((True, (1, 64)), (False, (65, 256, 300))):
        shapes.clear()
        for n in sizes:
            rows = (torch.rand(n), torch.randn(n), None, torch.randn(n, 3), factors, 0, None)
            hidden = torch.randn(n, 24).to(dtype)
            results = cuda_statistics.linear_joint_stats(hidden, weight, None, 1.0, None, *options, *rows)
            z = hidden.double() @ weight.double().T
            expected = rows[0][:, None] * z + rows[1][:, None] + rows[3].double() @ factors.double().T
            torch.testing.assert_close(results[12], expected.amax(1).float(), rtol=1e-4, atol=1e-4)
        chunk = 256 if dtype == torch.bfloat16 and not short else 64
        decoded = dtype == torch.bfloat16 and short
        assert shapes == {(chunk, 3, 21)} | (set() if decoded else {(chunk, 24, 21)})


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="64 rows"):
        cuda_product.library.decode(
            hidden=0, weight=0, dots=0, n=65, vocab=1, dim=8, hidden_stride=8, weight_stride=8, dtype=1, stream=0
        )
