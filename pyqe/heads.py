"""Sigmoid Heads: a quality probability for every token from the hidden state that predicts it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyqe
from pyqe import functional as F
from pyqe._files import atomic_path
from pyqe.functional._sharded import is_sharded, replicated_as, whole
from pyqe.lm_head import LMHead

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["full", "low_rank", "rescaling"]
Base = Literal["logit", "logprob"]

# Near where training on SmolLM2-135M ends; a bare copy of the logits (1, 0) starts at a loss of 8 and takes very long.
_START = {"logit": (0.3, -5.0), "logprob": (1.0, 3.0)}
_WEIGHTS_FILE, _CONFIG_FILE = "model.safetensors", "config.json"


class HeadMismatchError(ValueError):
    """A head does not belong to the model or the tokenizer that it is used with."""


@dataclass
class HeadConfig:
    """What ``config.json`` of a head holds.

    Attributes:
        kind: "full", "low_rank" or "rescaling".
        vocab_size: V of the LM's output embedding.
        hidden_size: D.
        scale, shift: a and c of the logits ``a * base + c``.
        base: what a low-rank or rescaling head starts from: the LM's "logit" or its "logprob"; None for "full".
        rank: of a low-rank head.
        base_model, base_model_revision: the LM it was made for.
        tokenizer_fingerprint: see :func:`tokenizer_fingerprint`.
        training: the recipe, free form.
        pyqe_version: that wrote it.

    Raises:
        ValueError: a field has no sensible value, or does not go with the kind.
    """

    kind: Kind
    vocab_size: int
    hidden_size: int
    scale: float = 1.0
    shift: float = 0.0
    base: Base | None = None
    rank: int | None = None
    base_model: str | None = None
    base_model_revision: str | None = None
    tokenizer_fingerprint: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    pyqe_version: str = ""

    def __post_init__(self) -> None:
        if self.kind not in tuple(_KINDS):
            raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {self.kind!r}")
        bases = (None,) if self.kind == "full" else tuple(_START)
        if self.base not in bases:
            raise ValueError(f"base: expected one of {bases} for kind {self.kind!r}, got {self.base!r}")
        for name in ("vocab_size", "hidden_size", *(["rank"] if self.kind == "low_rank" else [])):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")


@dataclass
class LinearTerms:
    """A head's logits over the vocabulary as ``scale * hidden @ weight.T + bias + shift``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a tokenizer's vocabulary: the same tokens with the same ids give the same 16 hex digits."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


class SigmoidHead(nn.Module, ABC):
    r"""Independent probability for every token that it is a right continuation, :math:`\sigma(z_v)`.

    Three kinds, all with a learned scale a and shift c, all arithmetic in float32; the LM stays frozen:

    ========= ============================================== ==========================================
    kind      logit of token v                               parameters
    ========= ============================================== ==========================================
    full      :math:`a \langle h, w'_v \rangle + c`          W' [V, D], starts as the LM's unembedding
    low_rank  :math:`a\,base_v + c + b_v + \langle A_v, B h\rangle`  A [V, r], B [r, D], b [V]
    rescaling :math:`a\,base_v + c`                          none
    ========= ============================================== ==========================================

    ``base`` is the LM's logit or its log-probability. Make one with :meth:`from_lm_head`, load one with
    :meth:`from_pretrained`.

    Source: Dinh & Niehues 2026 (arXiv 2601.00680); the low-rank kind is pyqe's own.
    """

    kind: ClassVar[str]
    by_token: ClassVar[
        tuple[str, ...]
    ] = ()  # parameters with a row for every token; the first may have sparse gradients

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = nn.Parameter(torch.tensor(config.scale, dtype=torch.float32))
        self.shift = nn.Parameter(torch.tensor(config.shift, dtype=torch.float32))

    # --- making one

    @staticmethod
    def from_lm_head(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        kind: Kind = "full",
        rank: int = 24,
        base: Base = "logprob",
    ) -> SigmoidHead:
        """An untrained head for a model.

        Args:
            model: any Hugging Face model with an output embedding.
            tokenizer: remembered by its fingerprint, so that the head refuses another one.
            kind: "full", "low_rank" or "rescaling".
            rank: r of a low-rank head.
            base: "logprob" or "logit", for the low-rank and rescaling kinds.

        Raises:
            ValueError: unknown kind or base, rank < 1, a model without an output embedding.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            ...                      num_attention_heads=1)
            >>> SigmoidHead.from_lm_head(LlamaForCausalLM(config), kind="low_rank", rank=2).config.base
            'logprob'
        """
        if kind not in _KINDS:
            raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
        if base not in _START:
            raise ValueError(f"base: expected 'logprob' or 'logit', got {base!r}")
        if rank < 1:
            raise ValueError(f"rank: expected a positive integer, got {rank}")
        lm_head = LMHead.from_model(model)
        scale, shift = _START["logit" if kind == "full" else base]
        config = HeadConfig(
            kind=kind,
            vocab_size=lm_head.vocab_size,
            hidden_size=lm_head.hidden_size,
            scale=scale * (lm_head.logit_scale if kind == "full" else 1.0),
            shift=shift,
            base=None if kind == "full" else base,
            rank=rank if kind == "low_rank" else None,
            base_model=model.config._name_or_path or None,
            base_model_revision=getattr(model.config, "_commit_hash", None),
            tokenizer_fingerprint=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        )
        head: SigmoidHead = _KINDS[kind](config)
        head.initialise(lm_head)
        head = head.to(lm_head.weight.device)
        return head.shard(lm_head.weight.device_mesh) if is_sharded(lm_head.weight) else head  # type: ignore[attr-defined]

    def initialise(self, lm_head: LMHead) -> None:
        """Set the parameters that start from the LM's head."""

    def shard(self, mesh: DeviceMesh) -> SigmoidHead:
        """Keep the rows of a part of the vocabulary on every process; see docs/distributed.md.

        A collective. What has a row for every token becomes a DTensor, the rest and all values are the first
        process's. The parameters are new ones: make the optimizer afterwards.

        Args:
            mesh: of one dimension, that over which the LM's head is sharded.

        Returns:
            this head.
        """
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        for name, parameter in list(self.named_parameters()):
            if not is_sharded(parameter):
                placement = Shard(0) if name in self.by_token else Replicate()
                placed = distribute_tensor(parameter.detach(), mesh, [placement])
                tensor = placed if name in self.by_token else placed.to_local()
                setattr(self, name, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
        return self

    # --- computing

    @abstractmethod
    def forward(
        self, hidden: Tensor, token_ids: Tensor, base: Tensor | None = None, *, sparse_grad: bool = False
    ) -> Tensor:
        """Logits of given tokens; ``sigmoid`` of them are the quality probabilities.

        Args:
            hidden: [..., D], what feeds the LM's output embedding.
            token_ids: int64 [...] or [..., K]; -1 is padding and gives NaN.
            base: the LM's values of those tokens, as :meth:`base_of` gives them; only where ``config.base`` is set.
            sparse_grad: sparse gradient of a full head's weight.

        Returns:
            float32, shaped as ``token_ids``.
        """

    @abstractmethod
    def linear_terms(self, hidden: Tensor, lm_head: LMHead, logsumexp: Tensor | None = None) -> LinearTerms:
        """The logits of the whole vocabulary as one linear form, for the vocabulary-wide operations.

        Args:
            hidden: [..., D].
            lm_head: the LM's head.
            logsumexp: [...] of the LM, where it is known already; else computed where the base needs it.

        Raises:
            NotImplementedError: the base is a logit with a softcap, which is not linear.
        """

    def base_of(
        self, hidden: Tensor, token_ids: Tensor, lm_head: LMHead, logsumexp: Tensor | None = None
    ) -> Tensor | None:
        """The LM's logits or log-probabilities [...] or [..., K] of the tokens, as ``config.base`` says; or None."""
        if self.config.base is None:
            return None
        if self.config.base == "logprob" and logsumexp is None:
            return lm_head.softmax_stats(hidden, token_ids=token_ids).token_logprob
        logits = lm_head.token_logits(hidden, token_ids)
        if self.config.base == "logit":
            return logits
        assert logsumexp is not None
        return logits - (logsumexp if logits.dim() == logsumexp.dim() else logsumexp[..., None])

    @torch.no_grad()
    def stats(self, hidden: Tensor, lm_head: LMHead, logsumexp: Tensor | None = None, **options: Any) -> F.SigmoidStats:
        """:func:`pyqe.functional.linear_sigmoid_stats` of this head: best tokens, number of acceptable ones.

        Args:
            hidden: [..., D].
            lm_head: the LM's head.
            logsumexp: [...] of the LM, where it is known already.
            options: of :func:`pyqe.functional.linear_sigmoid_stats`, but for bias, scale and shift.
        """
        terms = self.linear_terms(hidden, lm_head, logsumexp)
        return F.linear_sigmoid_stats(
            terms.hidden, terms.weight, terms.bias, scale=terms.scale, shift=terms.shift, **options
        )

    @torch.no_grad()
    def joint_stats(
        self, hidden: Tensor, lm_head: LMHead, *, threshold: float | None = None, **options: Any
    ) -> tuple[F.SoftmaxStats, F.SigmoidStats]:
        """Softmax statistics of the LM's head and sigmoid ones of this head.

        One pass where this head is on the LM's logits, at the price of its rank; else two, as the logsumexp that a
        log-probability needs is known after the first.

        Args:
            hidden: [..., D].
            lm_head: the LM's head.
            threshold: of the sigmoid's ``count_above``.
            options: of :func:`pyqe.functional.linear_softmax_stats`; ``token_ids`` are those of both.
        """
        softmax = lm_head.softmax_stats(hidden, **options)
        token_ids = options.get("token_ids")
        return softmax, self.stats(hidden, lm_head, softmax.logsumexp, token_ids=token_ids, threshold=threshold)

    # --- belonging to a model

    def check_compatible(self, lm_head: LMHead, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Check that the head was made for this LM head and tokenizer.

        Raises:
            HeadMismatchError: vocabulary, hidden size or tokenizer differ; the message says both.
        """
        for name in ("vocab_size", "hidden_size"):
            ours, theirs = getattr(self.config, name), getattr(lm_head, name)
            if ours != theirs:
                raise HeadMismatchError(f"{name}: the head has {ours}, the model {theirs}")
        ours = self.config.tokenizer_fingerprint
        if tokenizer is not None and ours is not None:
            theirs = tokenizer_fingerprint(tokenizer)
            if ours != theirs:
                raise HeadMismatchError(f"tokenizer: the head was made with {ours}, this one is {theirs}")

    # --- files

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors``, ``config.json`` and a model card to a folder, which is made if missing.

        A sharded head is gathered, which takes a call on every process; the first one writes.

        Raises:
            OSError: the folder cannot be written; files that were there stay as they were.
            ValueError: scale or shift is not finite, as after a training that diverged.
        """
        path = Path(folder)
        self.config = replace(
            self.config, scale=self.scale.item(), shift=self.shift.item(), pyqe_version=pyqe.__version__
        )
        parameters = self._tensors()
        tensors = {name: whole(parameter.detach()).cpu().contiguous() for name, parameter in parameters.items()}
        if any(map(is_sharded, parameters.values())) and torch.distributed.get_rank() != 0:
            return
        path.mkdir(parents=True, exist_ok=True)
        with (
            atomic_path(path / _WEIGHTS_FILE) as weights,
            atomic_path(path / _CONFIG_FILE) as config,
            atomic_path(path / "README.md") as card,
        ):
            card.write_text(_model_card(self.config), encoding="utf-8")
            config.write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
            try:
                save_file(tensors, weights, metadata={"format": "pt"})
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(f"cannot write {path / _WEIGHTS_FILE}: {error}") from error

    def _tensors(self) -> dict[str, nn.Parameter]:
        """The parameters that are kept in the weights file."""
        return {name: p for name, p in self.named_parameters() if name not in ("scale", "shift")}

    @staticmethod
    def from_pretrained(name: str | os.PathLike[str], *, revision: str | None = None) -> SigmoidHead:
        """Load a head from a folder, or from the Hugging Face Hub by its id.

        A folder with nothing but a safetensors file that holds one tensor ``weight`` [V, D], as the method's authors
        release them, is a full head with scale 1 and shift 0. Nothing is unpickled or run.

        Raises:
            FileNotFoundError: no such folder or hub id, or no safetensors file in it.
            ValueError: tensors missing, unknown or of the wrong shape.
        """
        folder = _local_folder(name, revision)
        tensors = _load_tensors(folder)
        config = _load_config(folder, tensors)
        with torch.device("meta"):  # shapes alone: a wrong config must not allocate
            head = _KINDS[config.kind](config)
        shapes = {name: tuple(parameter.shape) for name, parameter in head._tensors().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != found:
            raise ValueError(f"{folder}: expected tensors {shapes}, got {found}")
        state = {name: tensor.float() for name, tensor in tensors.items()}
        state |= {name: torch.tensor(getattr(config, name), dtype=torch.float32) for name in ("scale", "shift")}
        head.load_state_dict(state, assign=True)
        return head.requires_grad_(False)


class FullHead(SigmoidHead):
    """W' of its own, [V, D]."""

    kind = "full"
    by_token = ("weight",)

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def initialise(self, lm_head: LMHead) -> None:
        copied = lm_head.weight.detach().to(torch.float32, copy=True)  # sharded as the LM's, if that is
        self.weight = nn.Parameter(copied)

    def forward(
        self, hidden: Tensor, token_ids: Tensor, base: Tensor | None = None, *, sparse_grad: bool = False
    ) -> Tensor:
        logits = F.linear_token_logits(hidden.float(), self.weight, token_ids, sparse_grad=sparse_grad)
        return self.scale * logits + self.shift

    def linear_terms(self, hidden: Tensor, lm_head: LMHead, logsumexp: Tensor | None = None) -> LinearTerms:
        return LinearTerms(hidden.float(), self.weight, None, self.scale, self.shift)


class RescalingHead(SigmoidHead):
    """Two parameters on the LM's logit or log-probability."""

    kind = "rescaling"

    def forward(
        self, hidden: Tensor, token_ids: Tensor, base: Tensor | None = None, *, sparse_grad: bool = False
    ) -> Tensor:
        return self.scale * self._required(base) + self.shift

    def _required(self, base: Tensor | None) -> Tensor:
        if base is None:
            raise ValueError(f"base: expected the LM's {self.config.base} of the tokens, got None (see base_of)")
        return base

    def linear_terms(self, hidden: Tensor, lm_head: LMHead, logsumexp: Tensor | None = None) -> LinearTerms:
        if lm_head.logit_softcap is not None:
            raise NotImplementedError(f"a {self.kind} head over the whole vocabulary on logits with a softcap")
        scale = self.scale * lm_head.logit_scale
        bias = None if lm_head.bias is None else replicated_as(scale, lm_head.bias) * lm_head.bias.float()
        shift: Tensor = self.shift
        if self.config.base == "logprob":
            logsumexp = lm_head.softmax_stats(hidden).logsumexp if logsumexp is None else logsumexp
            shift = shift - self.scale * logsumexp
        return LinearTerms(hidden.float(), lm_head.weight.float(), bias, scale, shift)

    @torch.no_grad()
    def joint_stats(
        self, hidden: Tensor, lm_head: LMHead, *, threshold: float | None = None, **options: Any
    ) -> tuple[F.SoftmaxStats, F.SigmoidStats]:
        if self.config.base != "logit" or is_sharded(lm_head.weight):
            return super().joint_stats(hidden, lm_head, threshold=threshold, **options)
        return F.linear_joint_stats(
            hidden.to(lm_head.weight.dtype),
            lm_head.weight,
            lm_head.bias,
            scale=self.scale,
            shift=self.shift,
            logit_scale=lm_head.logit_scale,
            logit_softcap=lm_head.logit_softcap,
            threshold=threshold,
            **self._correction(hidden),
            **options,
        )

    def _correction(self, hidden: Tensor) -> dict[str, Any]:
        """What is added to the rescaled logits, for :func:`pyqe.functional.linear_joint_stats`."""
        return {}


class LowRankHead(RescalingHead):
    """Rescaling with a correction of rank r: ``b_v + <A_v, B h>``."""

    kind = "low_rank"
    by_token = ("A", "token_bias")

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        assert config.rank is not None
        self.A = nn.Parameter(torch.zeros(config.vocab_size, config.rank))
        self.B = nn.Parameter(torch.empty(config.rank, config.hidden_size))
        self.token_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def initialise(self, lm_head: LMHead) -> None:
        nn.init.normal_(self.B, std=1.0 / math.sqrt(self.config.hidden_size))

    def forward(
        self, hidden: Tensor, token_ids: Tensor, base: Tensor | None = None, *, sparse_grad: bool = False
    ) -> Tensor:
        projected = self._project(hidden)
        correction = F.linear_token_logits(projected, self.A, token_ids, self.token_bias, sparse_grad=sparse_grad)
        return super().forward(hidden, token_ids, base) + correction

    def _project(self, hidden: Tensor) -> Tensor:
        """B h, [..., r], in float32 whatever autocast says."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.B.T

    def _correction(self, hidden: Tensor) -> dict[str, Any]:
        return {"token_bias": self.token_bias, "projected": self._project(hidden), "factors": self.A}

    def linear_terms(self, hidden: Tensor, lm_head: LMHead, logsumexp: Tensor | None = None) -> LinearTerms:
        terms = super().linear_terms(hidden, lm_head, logsumexp)
        assert terms.scale is not None
        bias = self.token_bias if terms.bias is None else self.token_bias + terms.bias
        joined = torch.cat([terms.scale * terms.hidden, self._project(hidden)], -1)
        return LinearTerms(joined, torch.cat([terms.weight, self.A], 1), bias, None, terms.shift)


_KINDS: dict[str, type[SigmoidHead]] = {head.kind: head for head in (FullHead, LowRankHead, RescalingHead)}


# --- reading files


def _local_folder(name: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or str(name).count("/") != 1:
        raise FileNotFoundError(f"head: expected a folder or a hub id (owner/name), got {str(name)!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise FileNotFoundError(f"head: no folder {str(name)!r}, and the hub does not give it: {error}") from error


def _load_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    path = folder / _WEIGHTS_FILE if folder / _WEIGHTS_FILE in files or len(files) != 1 else files[0]
    if not path.is_file():
        raise FileNotFoundError(f"head: no {_WEIGHTS_FILE} in {folder}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: expected floats, got {name} in {tensor.dtype}")
    return tensors


def _load_config(folder: Path, tensors: dict[str, Tensor]) -> HeadConfig:
    """The config that pyqe wrote; else, whatever ``config.json`` there is, that of an authors' release."""
    path = folder / _CONFIG_FILE
    content: Any = None
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
    if isinstance(content, dict) and "pyqe_version" in content:
        return _own_config(path, content)
    if set(tensors) != {"weight"} or tensors["weight"].dim() != 2:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{folder}: expected a {_CONFIG_FILE} by pyqe or one tensor 'weight' [V, D], got {found}")
    vocab_size, hidden_size = tensors["weight"].shape
    return HeadConfig(kind="full", vocab_size=vocab_size, hidden_size=hidden_size)


def _own_config(path: Path, content: dict[str, Any]) -> HeadConfig:
    unknown = sorted(set(content) - {f.name for f in fields(HeadConfig)})
    missing = sorted({"kind", "vocab_size", "hidden_size"} - set(content))
    if unknown or missing:
        raise ValueError(
            f"{path}: unknown fields {unknown}, missing fields {missing}; written by pyqe {content['pyqe_version']}, "
            f"this is {pyqe.__version__}"
        )
    try:
        return HeadConfig(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _model_card(config: HeadConfig) -> str:
    training = "".join(f"* {name}: {value}\n" for name, value in config.training.items()) or "* none recorded\n"
    base_model = "" if config.base_model is None else f"base_model: {json.dumps(config.base_model)}\n"
    return f"""---
library_name: pyqe
tags: [pyqe, sigmoid-head, quality-estimation]
{base_model}---

# Sigmoid Head ({config.kind}) for {config.base_model or "an unnamed model"}

Gives every token of the frozen language model's output a probability, independent of the other tokens', that it is a
right continuation. Vocabulary {config.vocab_size}, hidden size {config.hidden_size}, scale {config.scale:.4g}, shift
{config.shift:.4g}{f", rank {config.rank}" if config.rank else ""}{f", base {config.base}" if config.base else ""}.

```python
import pyqe
head = pyqe.SigmoidHead.from_pretrained("this folder")
```

## Training

{training}
Method: Dinh & Niehues 2026, arXiv 2601.00680.
"""
