"""The head of a Hugging Face language model: how its logits come from the hidden states."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyqe import functional as F
from pyqe.functional._sharded import replicated_as, whole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from pyqe.negatives import NegativeSampler


_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()


@dataclass(frozen=True)
class LMHead:
    r"""Logits of a model: ``softcap(logit_scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight: [V, D], the model's own memory. A DTensor where the model is tensor parallel.
        bias: [V] or None.
        logit_scale: factor applied to the logits.
        logit_softcap: c of ``c * tanh(logits / c)``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> LMHead:
        """Read the head of a model: output embedding, its bias, and the scaling or softcap applied after it.

        Whether that is all the model does to its logits is for :func:`check_logits` to say. The weight of a model under
        FSDP2 is gathered and copied, which takes a call on every process: the model's own comes and goes.

        Raises:
            ValueError: the model has no output embedding of shape [V, D].
        """
        embedding = output_embedding(model)
        bias = getattr(embedding, "bias", None)
        final_bias = getattr(model, "final_logits_bias", None)  # Bart, Marian
        if isinstance(final_bias, Tensor):
            final_bias = final_bias.reshape(-1).to(embedding.weight.dtype)
            bias = final_bias if bias is None else bias + final_bias
        weight = embedding.weight.detach()
        if any(hasattr(module, "reshard") for module in model.modules()):  # FSDP2
            weight, bias = whole(weight).clone(), None if bias is None else whole(bias.detach()).clone()
        config = model.config.get_text_config(decoder=True)
        softcap = _first(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        return cls(
            weight=weight,
            bias=None if bias is None else bias.detach(),
            logit_scale=_logit_scale(config),
            logit_softcap=softcap,
        )

    def shard(self, mesh: DeviceMesh) -> LMHead:
        """A head of which every process keeps the rows of a part of the vocabulary; see docs/distributed.md.

        A collective; the values are the first process's.

        Args:
            mesh: of one dimension.
        """
        from torch.distributed.tensor import Shard, distribute_tensor

        weight = distribute_tensor(self.weight, mesh, [Shard(0)])
        bias = None if self.bias is None else distribute_tensor(self.bias, mesh, [Shard(0)])
        return replace(self, weight=weight, bias=bias)

    @property
    def vocab_size(self) -> int:
        """V, rows of the weight (a tokenizer may have fewer tokens)."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.weight.shape[1]

    def softmax_stats(self, hidden: Tensor, **options: Any) -> F.SoftmaxStats:
        """:func:`pyqe.functional.linear_softmax_stats` of this head."""
        return F.linear_softmax_stats(
            hidden.to(self.weight.dtype),
            self.weight,
            self.bias,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            **options,
        )

    def token_logits(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """:func:`pyqe.functional.linear_token_logits` of this head, scaling and softcap included."""
        return self._scaled(F.linear_token_logits(hidden.to(self.weight.dtype), self.weight, token_ids, self.bias))

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits [..., V] of hidden states [..., D], computed as the model does it, to compare with its own."""
        hidden = replicated_as(hidden.to(self.weight.dtype), self.weight)
        return self._scaled(whole(torch.nn.functional.linear(hidden, self.weight, self.bias)).float())

    def _scaled(self, logits: Tensor) -> Tensor:
        logits = logits * self.logit_scale
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def sample_negatives(
        self, hidden: Tensor, targets: Tensor, sampler: NegativeSampler, generator: torch.Generator | None = None
    ) -> Tensor:
        """:func:`pyqe.functional.linear_sample_negatives` of this head."""
        return F.linear_sample_negatives(
            hidden.to(self.weight.dtype),
            self.weight,
            targets,
            sampler,
            generator,
            bias=self.bias,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
        )


def _first(config: Any, *names: str) -> float | None:
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)


def _logit_scale(config: Any) -> float:
    """Cohere multiplies (MPT has the field and does not use it), Granite divides, Falcon-H1 has a name of its own."""
    multiplier = _first(config, "logit_scale" if config.model_type.startswith("cohere") else "lm_head_multiplier")
    divisor = _first(config, "logits_scaling")
    return (1.0 if multiplier is None else multiplier) / (1.0 if divisor is None else divisor)


def output_embedding(model: PreTrainedModel) -> Any:
    """The module that makes the model's logits.

    Raises:
        ValueError: it has none, or its weight is no [V, D] float tensor (a packed, quantized one).
    """
    embedding = model.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"model: expected an output embedding with a float weight [V, D], got {type(embedding).__name__} "
            f"in {type(model).__name__}"
        )
    return embedding


@contextmanager
def capture_hidden(model: PreTrainedModel, *, skip_logits: bool, last_only: bool = False) -> Iterator[list[Tensor]]:
    """Collect what enters the model's output embedding in every forward pass inside the ``with`` block.

    Args:
        model: the language model.
        skip_logits: hand no positions on, so that the model computes (and keeps) no logits.
        last_only: keep the last position alone, [B, D].

    Yields:
        a list that grows by one tensor [..., D] a forward pass. The hook is removed at the end, also after an error.
    """
    captured: list[Tensor] = []

    def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        hidden = args[0].detach()
        captured.append(hidden[:, -1].clone() if last_only else hidden)
        return (args[0][..., :0, :], *args[1:]) if skip_logits else None

    handle = output_embedding(model).register_forward_pre_hook(hook)
    try:
        yield captured
    finally:
        handle.remove()


def restore_attribute(module: Any, name: str, own: Any) -> None:
    """Give a module its own attribute back that was in place of its class's; None where it had none."""
    if own is None:
        delattr(module, name)
    else:
        setattr(module, name, own)


@contextmanager
def own_attribute(module: Any, name: str, value: Any) -> Iterator[None]:
    """Let a module have an attribute in place of its class's inside the ``with`` block."""
    own = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        restore_attribute(module, name, own)


def around_forward(
    module: Any, after: Callable[..., object], *, before: Callable[[], object] | None = None
) -> AbstractContextManager[None]:
    """Call ``before()`` and ``after(output, *args, **kwargs)`` around every forward pass inside the ``with`` block.

    Not by a hook: code that ``torch.compile`` made before a hook came does not call it. Of a ``forward`` that is the
    module's own it takes notice.
    """
    plain = module.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        output = plain(*args, **kwargs)
        after(output, *args, **kwargs)
        return output

    return own_attribute(module, "forward", forward)


def one_thread_at_a_time(model: PreTrainedModel) -> threading.RLock:
    """The lock of a model: what looks into its forward passes sees those of every thread."""
    return _locks.setdefault(model, threading.RLock())


@contextmanager
def evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients inside the ``with`` block; every module's mode is put back.

    One thread at a time. Not ``inference_mode``: buffers that a model renews while it runs (rotary frequencies) would
    be unfit for training.
    """
    with one_thread_at_a_time(model):
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


@torch.no_grad()
def check_logits(model: PreTrainedModel, head: LMHead) -> None:
    """Compare the head's logits with the model's own on a tiny input; the model must be in evaluation mode.

    Logits that are not finite on both sides (broken weights) are left to the scores, which are NaN then.

    Raises:
        ValueError: they differ, so the model does something to its logits that :class:`LMHead` does not know; the
            probabilities would be wrong.
    """
    ids = torch.arange(3, device=head.weight.device)[None] % head.vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with capture_hidden(model, skip_logits=False) as captured:
        theirs = model(**inputs, use_cache=False).logits.float()
    if len(captured) != 1:
        raise ValueError(f"model: {type(model).__name__} called its output embedding {len(captured)} times, expected 1")
    ours = head.logits(captured[0])
    if ours.shape != theirs.shape:
        raise ValueError(
            f"model: expected logits {list(ours.shape)} of the output embedding, got {list(theirs.shape)} from "
            f"{type(model).__name__}"
        )
    broken = ~ours.isfinite() & ~theirs.isfinite()
    difference = (ours - theirs).masked_fill(broken, 0.0).abs().max().item()
    largest = theirs.masked_fill(~theirs.isfinite(), 0.0).abs().max().item()
    tolerance = 1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 2e-2
    if not difference <= tolerance * max(1.0, largest):
        raise ValueError(
            f"model: {type(model).__name__} changes its logits after the output embedding in a way that is not known "
            f"(largest difference {difference:.3g}); its probabilities would be wrong"
        )
