"""Triton kernels of the losses and of token logits: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from shares import run_shared
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyqe
import pyqe.functional
from pyqe.backends import reference

triton = pytest.importorskip("triton", reason="the kernels need Triton")
import triton.language as tl  # noqa: E402
from ahead import SHARED_LIMIT, compile_for  # noqa: E402

from pyqe.kernels import token_logits, vocab_bce  # noqa: E402
from pyqe.kernels.common import FUSED, Config, all_configs, input_precision  # noqa: E402
from pyqe.kernels.vocab_bce import CHUNK, FULL_ROWS, softplus_and_slope  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, in a process of its own")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@compiled
def test_in_the_interpreter() -> None:
    run_shared("tests/test_triton_losses.py", TRITON_INTERPRET="1")


# --- softplus


@triton.jit
def softplus_kernel(x, value, slope, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v, s = softplus_and_slope(tl.load(x + place))
    tl.store(value + place, v)
    tl.store(slope + place, s)


@interpreted
def test_softplus_and_sigmoid_keep_their_digits() -> None:
    block = 1 << 16
    near, far = torch.linspace(-87, 100, 6 * block), torch.logspace(-30, 4, block)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, -3e38, -200.0]).repeat(block // 8)
    x = torch.cat([near, far, special])
    value, slope = torch.empty_like(x), torch.empty_like(x)
    softplus_kernel[(len(x) // block,)](x, value, slope, BLOCK=block)
    z = x.double()
    expected = z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
    torch.testing.assert_close(value.double(), expected, rtol=4e-7, atol=1e-37, equal_nan=True)
    torch.testing.assert_close(slope.double(), torch.sigmoid(z), rtol=4e-7, atol=1e-37, equal_nan=True)
    assert value[x == -torch.inf].eq(0).all()
    assert slope[x == -torch.inf].eq(0).all()


# --- vocabulary BCE


def arguments(n: int, d: int, v: int, dtype: torch.dtype, m: int = 5) -> dict[str, Any]:
    return {
        "hidden": torch.randn(n, d).to(dtype),
        "weight": torch.randn(v, d).to(dtype),
        "bias": torch.randn(v).to(dtype),
        "scale": torch.rand(n),
        "shift": torch.randn(n),
        "targets": torch.randint(-1, v, (n,)),
        "exclude_ids": torch.randint(-1, v, (n, m)),
        "row_weights": torch.rand(n),
        "pos_weight": 3.0,
        "grad_hidden": True,
        "grad_weight": True,
    }


def run(args: dict[str, Any]) -> tuple[Tensor, ...]:
    with pyqe.use_backend("triton"):
        return torch.ops.pyqe.linear_vocab_bce(*args.values())


def compare(args: dict[str, Any], tolerance: float) -> None:
    """With the reference in float64, relative to the largest number of each result."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in args.items()
    }
    for got, exact in zip(run(args), reference.linear_vocab_bce(*wide.values()), strict=True):
        assert got.shape == exact.shape
        if exact.numel():
            assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 70, 900), (150, 9, 700)], ids=str)  # lends memory of grad_weight, and not
@pytest.mark.parametrize("absent", [(), ("bias", "scale", "shift", "exclude_ids")], ids=["all", "few"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_vocab_bce_whatever_is_asked_for(
    shape: tuple[int, int, int], dtype: torch.dtype, absent: tuple[str, ...], wanted: tuple[bool, bool]
) -> None:
    args = arguments(*shape, dtype) | dict.fromkeys(absent)
    args["grad_hidden"], args["grad_weight"] = wanted
    compare(args, {torch.float32: 5e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype])


@interpreted
def test_vocab_bce_of_many_excluded_ids_in_one_tile() -> None:
    args = arguments(20, 8, 600, torch.float32)
    args["exclude_ids"] = torch.randint(-1, 300, (20, 200))
    args["exclude_ids"][3] = torch.arange(200)
    args["exclude_ids"][4] = -1
    args["exclude_ids"][:, 7] = args["targets"]
    compare(args, 5e-6)
    args["exclude_ids"] = torch.full((20, 1), 599)
    compare(args, 5e-6)
    args["exclude_ids"] = torch.empty(20, 0, dtype=torch.int64)
    compare(args, 5e-6)


@interpreted
def test_vocab_bce_in_float16_of_small_weights() -> None:
    args = arguments(40, 16, 300, torch.float16)
    args["hidden"], args["weight"] = args["hidden"] * 2.0**10, args["weight"] * 2.0**6
    args["scale"], args["row_weights"] = torch.full((40,), 2.0**-16), torch.rand(40) * 2.0**-4
    compare(args, 2.0**-10)  # elements of the gradient are below 2^-20, results are not small


@interpreted
def test_ids_out_of_range_are_nan_in_their_row_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(6, 8, 40, torch.float32)
    args["targets"], args["exclude_ids"] = torch.arange(6), torch.full((6, 2), -1)
    good = run(args)
    monkeypatch.setattr("pyqe.backends.reference.check_ids", lambda *_: None)  # as on a GPU, where looking would wait
    args["targets"][1], args["targets"][2] = 40, -100
    args["exclude_ids"][4, 1], args["exclude_ids"][5, 0] = 2**40, -2
    bad = torch.tensor([False, True, True, False, True, True])
    result = run(args)
    args["row_weights"] = args["row_weights"].masked_fill(bad, 0.0)
    args["targets"], args["exclude_ids"] = torch.arange(6), torch.full((6, 2), -1)
    without = run(args)
    for place in (3, 4):  # gradients of weight and bias
        assert result[place].equal(without[place])
    for place in (1, 2, 5, 6):
        assert result[place].reshape(6, -1).isnan().all(1).equal(bad)
        assert result[place][~bad].equal(good[place][~bad])
    assert result[0].isnan()


class Allocations(TorchDispatchMode):
    """Bytes of every tensor that torch's operators make, by place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}  # keeps them alive, so that no memory is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple) else (results,):
            if isinstance(result, Tensor):
                self.kept[result.untyped_storage().data_ptr()] = result
        return results

    def bytes_beyond(self, tensors: Any) -> int:
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}
        return sum(t.untyped_storage().nbytes() for place, t in self.kept.items() if place not in places)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocab_bce_keeps_one_chunk_of_gradients(dtype: torch.dtype) -> None:
    n, d, v = FULL_ROWS, 64, 16 * FULL_ROWS
    args = arguments(n, d, v, dtype) | dict.fromkeys(("bias", "scale", "shift", "exclude_ids"))
    with Allocations() as allocations:
        results = vocab_bce.vocab_bce(*args.values())
    inputs = [value for value in args.values() if isinstance(value, Tensor)]
    vectors = 40 * n * 4  # of one number a row
    assert allocations.bytes_beyond([*inputs, *results]) <= CHUNK * n * dtype.itemsize + vectors


# --- token logits


@interpreted
def test_token_logits_of_ids_out_of_range_are_nan_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyqe.backends.reference.check_ids", lambda *_: None)  # as on a GPU, where looking would wait
    hidden, weight, grad = torch.randn(4, 8), torch.randn(20, 8), torch.ones(4, 2)
    ids = torch.tensor([[0, 20], [-1, 5], [2**40, 3], [-2, -1]])
    ops = torch.ops.pyqe
    with pyqe.use_backend("triton"):
        logits = ops.linear_token_logits(hidden, weight, ids, None)
        grad_hidden = ops.token_logits_grad_hidden(grad, weight, ids)
        grad_weight = ops.token_logits_grad_weight(grad, hidden, ids, 20)
    assert logits.isnan().equal(torch.tensor([[False, True], [True, False], [True, False], [True, True]]))
    assert grad_hidden.isnan().all(1).equal(torch.tensor([True, False, True, True]))
    torch.testing.assert_close(grad_hidden[1], weight[5])
    expected = torch.zeros(20, 8).index_copy_(0, torch.tensor([0, 5, 3]), hidden[:3])
    assert grad_weight.equal(expected)


@interpreted
@pytest.mark.parametrize(("k", "dtype"), [(1, torch.float32), (11, torch.bfloat16), (200, torch.float32)], ids=str)
def test_token_logits_with_many_ids_and_long_runs(k: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(9, 600).to(dtype), torch.randn(30, 600).to(dtype)
    ids = torch.where(torch.rand(9, k) < 0.5, 7, torch.randint(-1, 30, (9, k)))  # token 7 comes in half of the pairs
    grad = torch.randn(9, k)
    grad[ids < 0] = torch.nan  # counts for nothing
    ops = torch.ops.pyqe
    with pyqe.use_backend("triton"):
        logits = ops.linear_token_logits(hidden, weight, ids, None)
        grad_hidden = ops.token_logits_grad_hidden(grad, weight, ids)
        row_ids, rows = ops.token_logits_grad_rows(grad, hidden, ids)
        dense = ops.token_logits_grad_weight(grad, hidden, ids, 30)
        assert dense.equal(ops.token_logits_grad_weight(grad, hidden, ids, 30))
    wide = hidden.double(), weight.double()
    expected = (wide[0] @ wide[1].T).gather(1, ids.clamp(min=0)).masked_fill(ids < 0, torch.nan)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-4, equal_nan=True)
    factors = torch.zeros(9, 30, dtype=torch.float64)
    factors.scatter_add_(1, ids.clamp(min=0), grad.double().masked_fill(ids < 0, 0.0))
    tolerance = {"rtol": 2.0**-8 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-4}
    torch.testing.assert_close(grad_hidden.double(), factors @ wide[1], **tolerance)
    torch.testing.assert_close(dense.double(), factors.T @ wide[0], **tolerance)
    assert row_ids.equal(ids[ids >= 0].unique())
    assert rows.equal(dense[row_ids])


# --- compiled ahead of time

SPILL_BOUND = 256  # bytes of registers that a thread may spill, once for a tile, after the product
DTYPES = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}
NUMBERS = {"pos_weight": "fp32", "targets": "*i64", "excluded": "*i32", "sums": "*fp64"}


def types_of(kernel: Any, floats: str, *, absent: tuple[str, ...] = (), of_input: tuple[str, ...]) -> dict[str, str]:
    """Triton's types of the arguments: those of the input's dtype are named, float32 comes before the integers."""
    types = dict.fromkeys(of_input, f"*{floats}") | NUMBERS
    for name in kernel.arg_names:
        whole = name.startswith(("n_", "first_")) or name.endswith("_stride")
        kind = "i32" if whole or name in ("dim", "k", "start", "size", "vocab_size", "chunk_tiles") else "*fp32"
        types.setdefault(name, kind)
    return {
        name: kind
        for name, kind in types.items()
        if name in kernel.arg_names and name not in absent and not name.isupper()
    }


def compile_all(kernel_name: str) -> list[Any]:
    return [
        pytest.param(*case, floats, id="-".join([case[0], case[1], floats, *map(str, case[2].options.values())]))
        for case in all_configs(kernel_name)
        for floats in DTYPES[case[1]]
    ]


def check(kernel: Any, architecture: str, product: str) -> None:
    assert kernel.shared <= SHARED_LIMIT[architecture]
    assert kernel.spills_in_product == 0
    assert max(kernel.spill_stores, kernel.spill_loads) <= SPILL_BOUND
    if product != "ieee":
        assert ("wgmma.mma_async" if architecture == "sm_90" else "mma.sync") in kernel.ptx


@compiled
@pytest.mark.parametrize(("architecture", "product", "config", "floats"), compile_all("vocab_bce_gradient"))
def test_gradient_kernel_compiles(architecture: str, product: str, config: Any, floats: str) -> None:
    types = types_of(vocab_bce.gradient_kernel, floats, of_input=("hidden", "weight", "bias", "gradient"))
    constants = {"SUM_SLOPE": True, "WHOLE_BLOCKS": True, "PRECISION": input_precision(product)}
    check(
        compile_for(architecture, vocab_bce.gradient_kernel, types, constants, config, **FUSED), architecture, product
    )


@compiled
@pytest.mark.parametrize(("architecture", "product", "config", "floats"), compile_all("vocab_bce_product"))
def test_product_kernel_compiles(architecture: str, product: str, config: Any, floats: str) -> None:
    transposed = floats == "fp16"  # grad_weight, which a library computes for the others
    constants = {"ADD": not transposed, "WHOLE_BLOCKS": True, "PRECISION": input_precision(product)}
    absent = ("left_stride",) if transposed else ("left_inner_stride", "unit")
    constants |= dict.fromkeys(absent) | {absent[0]: 1}
    of_input = ("left", "right", "out") if transposed else ("left", "right")
    types = types_of(vocab_bce.product_kernel, floats, absent=absent, of_input=of_input)
    check(compile_for(architecture, vocab_bce.product_kernel, types, constants, config, **FUSED), architecture, product)


@compiled
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("floats", ["bf16", "fp32"])
@pytest.mark.parametrize("k", [1, 11])
def test_token_logits_kernels_compile(architecture: str, floats: str, k: int) -> None:
    ids = dict.fromkeys(("token_ids", "pairs", "out_rows"), "*i64")
    for kernel, of_input in (
        (token_logits.forward_kernel, ("hidden", "weight", "bias")),
        (token_logits.grad_hidden_kernel, ("weight", "out")),
        (token_logits.add_pairs_kernel, ("hidden", "out")),
    ):
        types = {name: ids.get(name, kind) for name, kind in types_of(kernel, floats, of_input=of_input).items()}
        result = compile_for(architecture, kernel, types, {}, Config(token_logits.tile_sizes(k, 4096)), **FUSED)
        assert result.spill_stores == 0
        assert result.registers <= 200
        assert ".v4.b32" in result.ptx  # 16 bytes at a time
