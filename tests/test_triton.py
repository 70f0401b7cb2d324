"""Triton kernels without a GPU: in the interpreter, and compiled ahead of time for GPUs that are not there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shares import run_shared
from torch import Tensor

import pyqe
from pyqe import functional as F
from pyqe.backends import available_backends
from pyqe.dominant import DominantRule

pytest.importorskip("triton", reason="the kernels need Triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, in a process of its own")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@compiled
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("file", "chosen"),
    [("test_conformance.py", "triton and not thread_count"), ("test_triton.py", "")],  # threads are no matter of GPUs
)
def test_in_the_interpreter(file: str, chosen: str) -> None:
    run_shared(f"tests/{file}", "-k", chosen, TRITON_INTERPRET="1")


def test_says_why_it_is_not_available() -> None:
    backend = available_backends()["triton"]
    if INTERPRETED or torch.cuda.is_available():
        assert backend.unavailable is None
    else:
        assert backend.unavailable == "torch finds no CUDA device"
        with pyqe.use_backend("triton"), pytest.raises(RuntimeError, match="it serves cuda tensors, got cpu"):
            F.softmax_stats(torch.zeros(1, 2))


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


def test_float32_products_follow_either_of_torchs_settings(matmul_precision: None) -> None:
    from pyqe.kernels.common import product_kind

    for setting, kind in (("high", "tf32"), ("highest", "ieee")):
        torch.set_float32_matmul_precision(setting)
        assert product_kind(torch.float32) == kind
    for setting, kind in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")):
        torch.backends.cuda.matmul.fp32_precision = setting
        assert product_kind(torch.float32) == kind
    assert product_kind(torch.bfloat16) == "half"


# --- in the interpreter: what the conformance suite leaves out


def head(n: int, d: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, d), torch.randn(v, d), torch.randn(v)


@interpreted
def test_logits_of_a_chunk_are_those_of_the_statistics() -> None:
    from pyqe.kernels.results import SigmoidRows, SoftmaxRows
    from pyqe.kernels.scan import Head, copy_buffer, scan

    hidden, weight, bias = head(70, 33, 301)
    terms = torch.rand(70), torch.randn(70), torch.randn(301), torch.randn(70, 20), torch.randn(301, 20)
    every_id = torch.arange(301).expand(70, -1)
    softmax = SoftmaxRows.of(hidden, 70, every_id, entropy=True, temperature=None)
    sigmoid = SigmoidRows.of(hidden, 70, every_id, threshold=0.0)
    z, y = copy_buffer(hidden, 70, 301), copy_buffer(hidden, 70, 301)
    scan(hidden, Head(weight, bias, 1.0, 9.0, *terms), softmax, sigmoid, copy=z, head_copy=y)
    for rows, copy in ((softmax, z[:70, :301]), (sigmoid, y[:70, :301])):
        assert rows.token_logits is not None
        assert torch.equal(rows.token_logits, copy)
        assert torch.equal(rows.max_logit, copy.amax(1))
        assert torch.equal(rows.argmax, copy.argmax(1))
    low_rank = terms[3].double() @ terms[4].double().T
    expected = terms[0][:, None] * z[:70, :301].double() + terms[2] + terms[1][:, None] + low_rank
    torch.testing.assert_close(y[:70, :301].double(), expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_statistics_do_not_depend_on_what_else_is_asked_for() -> None:
    hidden, weight, bias = head(70, 40, 500)  # more rows than are ranked at a time
    with pyqe.use_backend("triton"):
        plain = F.linear_softmax_stats(hidden, weight, bias, entropy=True)
        ranked = F.linear_softmax_stats(
            hidden, weight, bias, entropy=True, top_k=2, temperature=0.7, dominant=DominantRule()
        )
        parts = [
            F.linear_softmax_stats(hidden[i : i + 1], weight, bias, top_k=2, dominant=DominantRule()) for i in range(70)
        ]
    for name in ("max_logit", "max_logprob", "argmax", "entropy"):
        assert torch.equal(getattr(plain, name), getattr(ranked, name)), name
    for name in ("ids", "size", "mass"):
        assert torch.equal(torch.cat([getattr(part.dominant, name) for part in parts]), getattr(ranked.dominant, name))


@interpreted
@pytest.mark.parametrize("rule", [None, DominantRule.jump(), DominantRule.min_p(0.2)], ids=str)
def test_negatives_are_those_of_the_reference(rule: DominantRule | None) -> None:
    hidden, weight, bias = head(150, 12, 400)
    sampler = pyqe.NegativeSampler(("softmax", "uniform"), num_negatives=4, exclude=rule)
    found = []
    for backend in ("reference", "triton"):
        with pyqe.use_backend(backend):
            generator = torch.Generator().manual_seed(3)
            targets = torch.arange(150)
            found.append(F.linear_sample_negatives(hidden, weight, targets, sampler, generator, bias=bias))
    assert (found[0] != found[1]).float().mean() < 0.01  # rounding may move a draw across the edge of a token
    assert F.linear_sample_negatives(hidden[:0], weight, targets[:0], sampler).shape == (0, 4)


@interpreted
def test_infinite_logits_under_sigmoids() -> None:
    logits = torch.randn(4, 300)
    logits[1], logits[2, 200], logits[3, 200:] = -torch.inf, torch.inf, -torch.inf
    with pyqe.use_backend("triton"):
        stats = F.sigmoid_stats(logits, threshold=0.5, top_k=1)
    assert stats.argmax.tolist() == logits.argmax(1).tolist()
    torch.testing.assert_close(stats.sum_prob, torch.sigmoid(logits).sum(1))
    assert stats.sum_prob[1] == 0
    assert stats.max_logit[2] == torch.inf


@interpreted
def test_labels_and_ids_out_of_range_are_nan_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyqe.backends.reference.check_ids", lambda *_: None)  # as on a GPU, where looking would wait
    hidden, weight, _ = head(3, 8, 130)
    ids = torch.tensor([[0, 130], [-1, 5], [2**40, -(2**40)]])
    with pyqe.use_backend("triton"):
        for stats in (
            F.linear_softmax_stats(hidden, weight, token_ids=ids),
            F.softmax_stats(hidden @ weight.T, token_ids=ids),
            F.linear_sigmoid_stats(hidden, weight, token_ids=ids),
        ):
            assert stats.token_logit.isnan().tolist() == [[False, True], [True, False], [True, True]]
            assert not stats.max_logit.isnan().any()
        for labels in (torch.tensor([0, 130, 1]), torch.tensor([0, 1, -5])):
            assert F.linear_temperature_nll(hidden, weight, labels).nll.isnan()
            assert F.temperature_nll(hidden @ weight.T, labels).nll.isnan()


# --- compiled ahead of time

FLOATS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
INTEGERS = (
    "n_rows", "n_parts", "n_ranges", "dim", "vocab_size", "n_ids", "n_token_ids", "rank", "hidden_stride",
    "weight_stride", "ids_stride", "copy_stride", "logits_stride", "labels_stride",
)  # fmt: skip
NUMBERS = ("logit_scale", "softcap", "tempered_scale", "threshold", "temperature")
LOW_RANK = ("projected", "factors")
SIGMOID_TERMS = ("row_scale", "row_shift", "token_bias", *LOW_RANK, "head_caught", "head_copy", "head_partials")
# arguments that are None, and flags, of what the scan can be asked for
SCANS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "softmax": ((*SIGMOID_TERMS, "copy", "beta"), ("SOFTMAX", "ENTROPY")),
    "sigmoid": (("bias", *LOW_RANK, "caught", "copy", "head_copy", "partials", "beta"), ("SIGMOID", "COUNT")),
    "joint": (("beta",), ("SOFTMAX", "ENTROPY", "TEMPERED", "CAPPED", "SIGMOID", "COUNT")),
    "moments": ((*SIGMOID_TERMS, "copy"), ("MOMENTS", "CAPPED")),
}
FLAGS = ("SOFTMAX", "ENTROPY", "TEMPERED", "MOMENTS", "SIGMOID", "COUNT", "CAPPED")
# bytes of registers that a thread may spill, once per tile in the epilogue; none in the loop over D
SPILL_BOUND = {"softmax": 256, "sigmoid": 256, "joint": 2048, "moments": 1280}
DTYPE_OF = {"half": "bfloat16", "tf32": "float32", "ieee": "float32"}


def types_of(kernel: Any, dtype: str, absent: tuple[str, ...], **others: str) -> dict[str, str]:
    """Triton's types of the arguments that are neither None nor constants."""
    known = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(NUMBERS, "fp32") | others
    for name in ("ids", "labels", "argmax", "count_above", "keys"):
        known[name] = "*i64"
    for name in ("hidden", "weight", "bias", "logits"):
        known[name] = FLOATS[dtype]
    given = [name for name in kernel.arg_names if name not in absent and not name.isupper()]
    return {name: known.get(name, "*fp32") for name in given}


def compile_scan(asked: str, architecture: str, product: str, dtype: str, config: Any) -> Any:
    from ahead import compile_for

    from pyqe.kernels.common import UNFUSED, input_precision
    from pyqe.kernels.scan import scan_kernel

    absent, flags = SCANS[asked]
    constants = dict.fromkeys(absent) | {flag: flag in flags for flag in FLAGS}
    constants |= {"WHOLE_BLOCKS": True, "PRECISION": input_precision(product)}
    types = types_of(scan_kernel, dtype, absent)
    return compile_for(architecture, scan_kernel, types, constants, config, **UNFUSED)


def scan_cases() -> list[Any]:
    """All that is asked for in each chosen config, and the largest kernel in each candidate."""
    from pyqe.kernels.common import all_configs

    cases, seen = [], set()
    for architecture, product, config in all_configs("scan"):
        chosen = (architecture, product) not in seen
        seen.add((architecture, product))
        for asked in SCANS if chosen else ("softmax", "joint"):
            dtypes = ("bfloat16", "float16") if product == "half" and asked == "softmax" else (DTYPE_OF[product],)
            for dtype in dtypes:
                name = "-".join([architecture, product, dtype, asked, *map(str, config.options.values())])
                cases.append(pytest.param(architecture, product, dtype, asked, config, id=name))
    return cases


@compiled
@pytest.mark.parametrize(("architecture", "product", "dtype", "asked", "config"), scan_cases())
def test_scan_compiles(architecture: str, product: str, dtype: str, asked: str, config: Any) -> None:
    from ahead import SHARED_LIMIT

    kernel = compile_scan(asked, architecture, product, dtype, config)
    assert kernel.shared <= SHARED_LIMIT[architecture]
    assert kernel.spills_in_product == 0
    assert max(kernel.spill_stores, kernel.spill_loads) <= SPILL_BOUND[asked]
    if product != "ieee":
        assert ("wgmma.mma_async" if architecture == "sm_90" else "mma.sync") in kernel.ptx


def layout_of_first_product(ttgir: str) -> str:
    """The layout of the logits in registers, which gives the order of the sums."""
    dot = re.search(r"(?:tt\.dot|warp_group_dot) .*-> tensor<\w+, (#\w+)", ttgir)
    assert dot
    layout = re.search(rf"^{dot.group(1)} = (.*)$", ttgir, re.MULTILINE)
    assert layout
    return layout.group(1)


@compiled
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_sums_have_one_order_with_and_without_a_head(architecture: str) -> None:
    from pyqe.kernels.common import all_configs

    config = next(
        config for place, product, config in all_configs("scan") if (place, product) == (architecture, "half")
    )
    layouts = {
        layout_of_first_product(compile_scan(asked, architecture, "half", "bfloat16", config).ttgir)
        for asked in ("softmax", "joint")
    }
    assert len(layouts) == 1


@compiled
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("asked", ["softmax", "sigmoid", "moments"])
@pytest.mark.parametrize("vocab_size", [5, 128256])
def test_row_kernel_compiles(architecture: str, dtype: str, asked: str, vocab_size: int) -> None:
    from ahead import compile_for

    from pyqe.kernels.common import UNFUSED
    from pyqe.kernels.rows import rows_config, rows_kernel

    flags = {"softmax": ("SOFTMAX", "ENTROPY", "TEMPERED"), "sigmoid": ("SIGMOID", "COUNT"), "moments": ("MOMENTS",)}
    absent = () if asked == "moments" else ("soft_labels", "beta")
    constants = dict.fromkeys(absent) | {flag: flag in flags[asked] for flag in FLAGS if flag != "CAPPED"}
    types = types_of(rows_kernel, dtype, absent)
    kernel = compile_for(architecture, rows_kernel, types, constants, rows_config(vocab_size), **UNFUSED)
    assert kernel.spill_stores == 0
    assert kernel.registers <= (255 if asked == "moments" else 128)  # 4 blocks of 4 warps at a time


@compiled
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("existing", [False, True])
def test_small_kernels_compile(architecture: str, existing: bool) -> None:
    from ahead import compile_for

    from pyqe.kernels import merge
    from pyqe.kernels.common import UNFUSED, Config
    from pyqe.kernels.rows import TILE, keys_kernel

    absent = () if existing else ("logits",)
    for kernel, flags in (
        (merge.softmax_kernel, {"ENTROPY": True, "TEMPERED": True}),
        (merge.sigmoid_kernel, {"COUNT": True}),
        (merge.moments_kernel, {}),
    ):
        types, constants = types_of(kernel, "bfloat16", absent), dict.fromkeys(absent) | flags
        result = compile_for(architecture, kernel, types, constants, merge.CONFIG, **UNFUSED)
        assert result.spill_stores == 0
    dtype = "bfloat16" if existing else "float32"
    types = types_of(keys_kernel, dtype, ())
    assert compile_for(architecture, keys_kernel, types, {}, Config({"BLOCK_V": TILE}), **UNFUSED).spill_stores == 0
