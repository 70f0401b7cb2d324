"""A Sigmoid Head that is trained beside a language model, in the Trainer that trains the model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, get_cosine_schedule_with_warmup

from pyqe.heads import SigmoidHead, tokenizer_fingerprint
from pyqe.lm_head import (
    LMHead,
    around_forward,
    capture_hidden,
    check_logits,
    evaluation,
    output_embedding,
    own_attribute,
)
from pyqe.losses import SigmoidHeadLoss
from pyqe.training.optimizer import RowAdam, parameter_groups
from pyqe.training.parallel import processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FOLDER, _OPTIMIZER_FILE = "sigmoid_head", "optimizer.pt"
_EVAL_SEED = 0


class SigmoidHeadCallback(TrainerCallback):  # type: ignore[misc]
    """Trains a Sigmoid Head beside the model of any Trainer of transformers or TRL, on the same hidden states.

    There is no second forward pass, and the model learns what it would learn without the head, bit for bit: the head's
    loss is computed on detached states at the end of the model's own forward pass, with an optimizer and random numbers
    of its own. The head takes a step whenever the model does, on the mean over all labelled positions of that step, of
    all batches and processes (data parallel); its learning rate falls to 0 over the training, as a cosine.

    The labels are those that the model's forward pass gets: shifted for a causal LM, as they are for an
    encoder-decoder; -100 is left out. Losses that never call the output embedding (TRL's, Liger-Kernel's) are no
    hindrance where the states come out of the model's backbone as they are.

    The Trainer's logs get ``head_loss``, and those of an evaluation ``eval_head_loss``, which may choose the best
    checkpoint. Each checkpoint holds the head and its optimizer in ``sigmoid_head``; a training that is resumed goes on
    with them, and one that ends with its best checkpoint gets that one's head.

    Args:
        head: the head, made for the model.
        loss: with reduction "mean".
        learning_rate: of the weights.
        affine_learning_rate: of scale and shift; default see :func:`parameter_groups`.

    Raises:
        ValueError: a loss that is not a mean.

    Example:
        See ``examples/train_trl.py``.
    """

    def __init__(
        self,
        head: SigmoidHead,
        loss: SigmoidHeadLoss,
        *,
        learning_rate: float = 3e-4,
        affine_learning_rate: float | None = None,
    ) -> None:
        if loss.reduction != "mean":
            raise ValueError(f"loss: expected reduction 'mean', got {loss.reduction!r}")
        self.head = head.requires_grad_(True)
        self.loss = loss
        self.learning_rate, self.affine_learning_rate = learning_rate, affine_learning_rate
        self._attachment = ExitStack()
        self._hidden: Tensor | None = None
        self._generators = {training: torch.Generator().manual_seed(_EVAL_SEED) for training in (True, False)}
        self._clear()

    def _clear(self) -> None:
        self.head.zero_grad()
        self._positions: Tensor | None = None  # labelled ones since the last step, in this process
        device = self.head.scale.device
        self._losses = {training: torch.zeros(2, device=device) for training in (True, False)}  # sum, positions

    # --- the model's forward passes

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Look into the model's forward passes from now on; the start of a training does it, its end undoes it.

        For an evaluation outside of a training: ``callback.attach(trainer.model)`` before ``trainer.evaluate()``.

        Args:
            model: the language model, or what PEFT made of it.
            tokenizer: to check that the head was made for it.

        Raises:
            HeadMismatchError: the head belongs to another vocabulary, hidden size or tokenizer.
            ValueError: the model does something to its logits that is not known, or has an adapter on its output
                embedding: the probabilities would be wrong.
        """
        self.detach()
        lm = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's has one
        if hasattr(output_embedding(lm), "base_layer"):
            raise ValueError("model: expected a plain output embedding, got one with an adapter of PEFT")
        lm_head = LMHead.from_model(lm)
        self.head.check_compatible(lm_head, tokenizer)
        self.head.to(lm_head.weight.device)
        self._lm = lm
        self._clear()
        if _states_leave_backbone(lm, lm_head):
            watched = around_forward(lm.base_model, lambda output, *_, **__: self._keep(output[0]))
        else:
            watched = around_forward(output_embedding(lm), lambda _, hidden: self._keep(hidden))
        self._attachment.enter_context(watched)
        self._attachment.enter_context(around_forward(lm, self._learn, before=self._forget))

    def detach(self) -> None:
        """Leave the model's forward passes alone again."""
        self._attachment.close()

    def _forget(self) -> None:
        self._hidden = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, hidden: Tensor) -> None:
        self._hidden = hidden.detach()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _learn(
        self, _: object, *args: Any, labels: Tensor | None = None, shift_labels: Tensor | None = None, **kwargs: Any
    ) -> None:
        """Loss, and in training gradients, of the forward pass that has just ended."""
        hidden, self._hidden = self._hidden, None
        targets = labels if shift_labels is None else shift_labels
        if targets is None:
            return
        if hidden is None:
            raise RuntimeError(
                f"{type(self._lm).__name__} computed its loss without its output embedding, so that there are no "
                "hidden states for the Sigmoid Head: turn fused losses off"
            )
        if shift_labels is None and not self._lm.config.is_encoder_decoder:
            hidden, targets = hidden[:, :-1], targets[:, 1:]
        lm_head, training = LMHead.from_model(self._lm), self._lm.training
        hidden, targets = hidden.to(lm_head.weight.device), targets.to(lm_head.weight.device)
        positions = (targets != self.loss.ignore_index).sum()  # stays on the device: nobody waits for it
        with torch.set_grad_enabled(training), torch.autocast(hidden.device.type, enabled=False):
            loss = self.loss(self.head, hidden, targets, lm_head, generator=self._generators[training])
            total = loss * positions
            if training:
                total.backward()
                self._positions = positions if self._positions is None else self._positions + positions
        self._losses[training] += torch.stack([total.detach(), positions])

    # --- the Trainer's events

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        tokenizer = processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None
        if args.n_gpu > 1:
            raise ValueError("expected a process for each GPU (torchrun, accelerate launch), got one for all of them")
        if processes()[1] > 1 and self.loss.sparse_grad:
            raise ValueError("loss: expected dense gradients with several processes, got sparse_grad=True")
        self.attach(model, tokenizer)
        if tokenizer is not None:
            self.head.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self._optimizer = RowAdam(parameter_groups(self.head, self.affine_learning_rate), lr=self.learning_rate)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, 0, state.max_steps)
        if state.global_step:
            self._load(_checkpoint(args, state.global_step))
        for parameter in self.head.parameters():
            _from_first_process(parameter.data)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rank, count = processes()  # negatives differ between processes, and after each step
        self._generators[True].manual_seed(args.seed + state.global_step * count + rank)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._positions is None:
            raise RuntimeError(
                f"no labels reached the forward pass of {type(self._lm).__name__}: the Sigmoid Head needs a Trainer "
                "that gives the model its labels (no label smoothing, no loss function of its own)"
            )
        count = _sum(self._positions)
        for parameter in self.head.parameters():
            if parameter.grad is not None:
                parameter.grad = _sum(parameter.grad) / count.clamp(min=1)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self._positions = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        training = "loss" in logs
        kind = next((name.removesuffix("runtime") for name in logs if name.endswith("_runtime")), None)
        if not training and kind in (None, "train_"):  # nobody's loss, or the summary of the training
            return
        total, count = _sum(self._losses[training]).tolist()
        self._restart(training)
        if count:
            name = "head_loss" if training else f"{kind}head_loss"
            logs[name] = state.log_history[-1][name] = total / count

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self._restart(False)

    def _restart(self, training: bool) -> None:
        """Count the losses anew; every evaluation meets the same negatives."""
        self._losses[training].zero_()
        if not training:
            self._generators[training].manual_seed(_EVAL_SEED)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            folder = _checkpoint(args, state.global_step)
            self.head.save_pretrained(folder)
            states = {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}
            torch.save(states, folder / _OPTIMIZER_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_head(Path(state.best_model_checkpoint) / _FOLDER)

    def _load(self, folder: Path) -> None:
        self._load_head(folder)
        states = torch.load(folder / _OPTIMIZER_FILE, weights_only=True, map_location=self.head.scale.device)
        self._optimizer.load_state_dict(states["optimizer"])
        self._schedule.load_state_dict(states["schedule"])

    def _load_head(self, folder: Path) -> None:
        self.head.load_state_dict(SigmoidHead.from_pretrained(folder).state_dict())


def _states_leave_backbone(lm: PreTrainedModel, lm_head: LMHead) -> bool:
    """Whether the states leave the model's backbone as they enter its output embedding.

    There they are seen also where a fused loss takes the output embedding's weight and does not call it. The pass is
    the model's class's own: others have put autocast and fused losses in its place.

    Raises:
        ValueError: see :func:`check_logits`.
    """
    left: list[Tensor] = []
    with (
        own_attribute(lm, "forward", MethodType(type(lm).forward, lm)),
        evaluation(lm),
        capture_hidden(lm, skip_logits=False) as entered,
        around_forward(lm.base_model, lambda output, *_, **__: left.append(output[0])),
    ):
        check_logits(lm, lm_head)
    return bool(left) and torch.equal(left[-1].to(entered[0]), entered[0])


def _checkpoint(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}" / _FOLDER


# --- processes: data parallel


def _sum(tensor: Tensor) -> Tensor:
    """Its sum over the processes."""
    if processes()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def _from_first_process(tensor: Tensor) -> None:
    if processes()[1] > 1:
        dist.broadcast(tensor, src=0)
