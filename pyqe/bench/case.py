"""What is measured: shapes, rivals, and the case that brings them together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

MODELS: dict[str, tuple[int, int]] = {  # V, D of the unembedding
    "SmolLM2-135M": (49152, 576),
    "Qwen3-0.6B": (151936, 1024),
    "Llama-3.2-1B": (128256, 2048),
    "Llama-3-8B": (128256, 4096),
    "Gemma-2-2B": (256000, 2304),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_WEIGHT_SEED = 1000
_QUICK_N = 24
LOGIT_STD = 4.0  # gives rows a few dominant tokens, as an LM's have

Outcome = dict[str, Any]  # what a rival computed: tensors, which are compared with pyqe's, and numbers, which are kept


def model_shape(name: str) -> tuple[str, int, int]:
    """Name, V and D of a model, or of ``VxD`` itself.

    Raises:
        ValueError: unknown name.

    Example:
        >>> model_shape("qwen3-0.6b")
        ('Qwen3-0.6B', 151936, 1024)
        >>> model_shape("1000x64")
        ('1000x64', 1000, 64)
    """
    for known, (v, d) in MODELS.items():
        if known.lower() == name.lower():
            return known, v, d
    numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if numbers is None:
        raise ValueError(f"model: expected one of {', '.join(MODELS)} or VxD, got {name!r}")
    return name, int(numbers[1]), int(numbers[2])


@lru_cache(maxsize=2)  # the two heads of a case, kept for the model's next case
def _weight(v: int, d: int, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(_WEIGHT_SEED + seed)  # not that of the hidden states
    return torch.randn(v, d, generator=generator, device=device).div_(math.sqrt(d)).to(dtype)


@dataclass(frozen=True)
class Work:
    """What has to be done at the least: floating-point operations, and bytes of memory read and written."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Shape:
    """N hidden states of a model's head in a dtype, and random inputs of that shape on a device."""

    model: str
    n: int
    dtype: str
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} N {self.n}"

    @property
    def v(self) -> int:
        return model_shape(self.model)[1]

    @property
    def d(self) -> int:
        return model_shape(self.model)[2]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def logit_bytes(self) -> int:
        """Bytes of the float32 logits that nobody should need."""
        return 4 * self.n * self.v

    def head_work(self, heads: int = 1) -> Work:
        """The products of the hidden states and the weights of some heads."""
        return Work(
            flops=heads * 2 * self.n * self.v * self.d, bytes=(heads * self.v + self.n) * self.d * self.itemsize
        )

    def read_work(self, heads: int = 1) -> Work:
        """One read of the weights."""
        return Work(bytes=heads * self.v * self.d * self.itemsize)

    def weight(self, seed: int = 0) -> Tensor:
        """[V, D], the same for the same seed."""
        return _weight(self.v, self.d, DTYPES[self.dtype], seed, self.device)

    def hidden(self) -> Tensor:
        """[N, D], new ones each time."""
        return torch.randn(self.n, self.d, device=self.device).mul_(LOGIT_STD).to(DTYPES[self.dtype])

    def ids(self) -> Tensor:
        """int64 [N], new ones each time."""
        return torch.randint(self.v, (self.n,), device=self.device)

    def facts(self) -> dict[str, Any]:
        return {"model": self.model, "n": self.n, "d": self.d, "v": self.v, "dtype": self.dtype}


@dataclass(frozen=True)
class Settings:
    """What the user asked for; None where a suite's own choice stands.

    Args:
        models, n, dtypes: of the cases.
        repeats: timed rounds.
        only: parts of what cases are called; others are left out.
        without: names of rivals to leave out.
        quick: small shapes, to see that everything runs.
        large: also the cases that need much memory.
        device: "cpu" or "cuda".
    """

    models: tuple[str, ...] | None = None
    n: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    repeats: int = 7
    only: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()
    quick: bool = False
    large: bool = False
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def shapes(self, models: Sequence[str], n: Sequence[int], dtypes: Sequence[str] = ("bf16",)) -> list[Shape]:
        """Shapes of a suite that takes these by itself."""
        if self.quick:
            models, n = ("2000x96", "5000x96"), sorted({min(number, _QUICK_N) for number in (n[0], n[-1])})
        return [
            Shape(model_shape(model)[0], number, dtype, self.device)
            for model in self.models or models
            for dtype in self.dtypes or dtypes
            for number in self.n or n
        ]


@dataclass(frozen=True)
class Rival:
    """Somebody who does the work of a case.

    Args:
        name: "pyqe", or what is compared with it.
        run: does the work on the case's inputs.
        note: where it does less or more than pyqe does.
        missing: why it cannot run; it is shown with the reason.
        work: where it differs from the case's.
        backend: of pyqe, where it is not to choose by itself.
    """

    name: str
    run: Callable[..., Outcome] | None = None
    note: str = ""
    missing: str = ""
    work: Work | None = None
    backend: str = ""

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("pyqe")


@dataclass(frozen=True)
class Case:
    """One piece of work, and who does it.

    Args:
        suite, name: what it is called.
        facts: shape and dtype, for the table and the JSON.
        inputs: called for every round; all rivals of the round get what it returns.
        rivals: pyqe comes first.
        work: what every rival has to do, if it says nothing else.
        logit_bytes: of the logits that the work can do without, to compare the memory with.
        description: what the work is.
        decides: entry of the table of preferred backends that the backends' times decide, or "".
        host: time the host while it hands out the work, not the work.
        by_backend: on a GPU, run pyqe on each of its backends too.
    """

    suite: str
    name: str
    facts: Mapping[str, Any]
    inputs: Callable[[], tuple[Any, ...]]
    rivals: Sequence[Rival]
    work: Work = Work()
    logit_bytes: float = 0.0
    description: str = ""
    decides: str = ""
    host: bool = False
    by_backend: bool = True


def optional(rival: str, module: str, names: str, make: Callable[..., Callable[..., Outcome]], note: str = "") -> Rival:
    """A rival out of another package; one that says what is missing where that cannot be imported.

    Args:
        rival: its name.
        module: what to import, whose first part is the package.
        names: space-separated names in the module, the arguments of ``make``.
        make: gives what the rival runs.
        note: as in :class:`Rival`.
    """
    try:
        home = import_module(module)
        return Rival(rival, make(*(getattr(home, name) for name in names.split())), note)
    except (ImportError, AttributeError, RuntimeError) as error:
        return Rival(rival, note=note, missing=" ".join(str(error).split()))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function, with shapes of earlier cases forgotten: after eight it would give up."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def compiled_rival(
    function: Callable[..., Any],
    device: str,
    *,
    on_gpu: bool,
    around: Callable[[Callable[..., Any]], Callable[..., Outcome]] = lambda function: function,
) -> Rival:
    """Eager torch, compiled, with what is done around it; on a GPU compiling takes so long that few cases have it."""
    if device != "cpu" and not on_gpu:
        return Rival("torch.compile", missing="left out here: on a GPU compiling takes longer than a case")
    return Rival("torch.compile", around(compiled(function)))
