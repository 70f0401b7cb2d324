"""What all kernel files share: block sizes by device, precision of float32 products, operands for the interpreter."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# ptxas may otherwise compute (x * y) - m without rounding the product that was written to memory or became a maximum.
UNFUSED = {"enable_fp_fusion": False}
FUSED = {"enable_fp_fusion": True}  # said everywhere, as versions of Triton differ in what they take for granted
_INTERPRETED = tl.constexpr(INTERPRETED)  # kernels see only globals of this kind


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled: its block sizes by name, warps, and stages of the software pipeline.

    Block sizes never depend on the number of rows, or a row's result would depend on its batch.
    """

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 1

    @cached_property
    def options(self) -> dict[str, int]:
        """As a kernel's launch takes them."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@cache
def _table() -> dict[str, Any]:
    return json.loads(files("pyqe.kernels").joinpath("configs.json").read_text(encoding="utf-8"))


def _read(entry: dict[str, int]) -> Config:
    blocks = {name: size for name, size in entry.items() if name.isupper()}
    return Config(blocks, entry.get("num_warps", 4), entry.get("num_stages", 1))


def _architecture(major: int) -> str:
    return "sm_90" if major >= 9 else "sm_80"


def all_configs(kernel: str) -> Iterator[tuple[str, str, Config]]:
    """Architecture, kind of product and config, the chosen and the candidates alike, of a kernel."""
    for architecture, products in _table()[kernel].items():
        if architecture == "interpreter":
            continue
        for product, entry in products.items():
            for config in (entry["chosen"], *entry["candidates"]):
                yield architecture, product, _read(config)


@cache
def _config(kernel: str, product: str, architecture: str) -> Config:
    entry = _table()[kernel][architecture]
    return _read(entry if architecture == "interpreter" else entry[product]["chosen"])


@cache
def _architecture_of(device: torch.device) -> str:
    return "interpreter" if INTERPRETED else _architecture(torch.cuda.get_device_capability(device)[0])


def config_for(kernel: str, like: Tensor) -> Config:
    """The chosen config of a kernel for a tensor's device and dtype."""
    return _config(kernel, product_kind(like.dtype), _architecture_of(like.device))


def product_kind(dtype: torch.dtype) -> str:
    """How matrix products of a dtype are computed: "half", "tf32" or "ieee", as the table of configs calls it.

    float32 is exact ("ieee", without tensor cores) unless torch's setting allows tf32 for its own products:
    ``torch.backends.cuda.matmul.fp32_precision``, which ``torch.set_float32_matmul_precision`` sets as well.
    """
    if dtype != torch.float32:
        return "half"
    return "ieee" if torch.backends.cuda.matmul.fp32_precision in ("ieee", "none") else "tf32"


@triton.jit
def operand(block):
    """A block as ``tl.dot`` may take it: the interpreter's arithmetic in bf16 is wrong, so float32 there."""
    if _INTERPRETED:
        return block.to(tl.float32)
    return block


@triton.jit
def product(
    hidden, weight, rows, columns, dim, hidden_stride, weight_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dot products [BLOCK_N, BLOCK_V] of the given rows of hidden and weight, in float32."""
    place = tl.arange(0, BLOCK_D)
    hidden += rows.to(tl.int64)[:, None] * hidden_stride + place[None, :]
    weight += columns.to(tl.int64)[None, :] * weight_stride + place[:, None]
    dots = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, dim, BLOCK_D):
        if WHOLE_BLOCKS:
            h, w = tl.load(hidden), tl.load(weight)
        else:
            h = tl.load(hidden, mask=place[None, :] < dim - start, other=0.0)
            w = tl.load(weight, mask=place[:, None] < dim - start, other=0.0)
        dots = tl.dot(operand(h), operand(w), dots, input_precision=PRECISION)
        hidden += BLOCK_D
        weight += BLOCK_D
    return dots


@triton.jit
def narrowed(block, like):
    """A float32 block in the dtype that the pointer ``like`` points to; the interpreter would not round to bf16."""
    if _INTERPRETED and like.dtype.element_ty == tl.bfloat16:
        bits = block.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        block = tl.where(block == block, rounded, block)
    return block.to(like.dtype.element_ty)


def input_precision(product: str) -> str:
    """``input_precision`` of ``tl.dot`` for a kind of product."""
    return "tf32" if product == "tf32" else "ieee"
