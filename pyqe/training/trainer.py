"""The Sigmoid Head on transformers' Trainer."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from pyqe.heads import SigmoidHead, tokenizer_fingerprint
from pyqe.lm_head import LMHead
from pyqe.losses import SigmoidHeadLoss
from pyqe.training.data import collate
from pyqe.training.module import TrainingModule
from pyqe.training.optimizer import RowAdam, parameter_groups
from pyqe.training.parallel import average_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class SigmoidHeadTrainingArguments(TrainingArguments):  # type: ignore[misc]
    """transformers' arguments with the published recipe as defaults: cosine from 1e-4, 3 epochs, no clipping.

    Attributes:
        affine_learning_rate: of the head's scale and shift; default see :func:`parameter_groups`.
    """

    learning_rate: float = field(default=1e-4)
    lr_scheduler_type: str = field(default="cosine")
    num_train_epochs: float = field(default=3.0)
    max_grad_norm: float = field(default=0.0)
    remove_unused_columns: bool = field(default=False)
    report_to: Any = field(default="none")
    affine_learning_rate: float | None = field(default=None)


class SigmoidHeadTrainer(Trainer):  # type: ignore[misc]
    """Trains a Sigmoid Head; everything that transformers' Trainer does works: resuming, evaluation, early stopping,
    mixed precision, gradient accumulation, ``report_to``, several processes (docs/distributed.md). Checkpoints hold the
    head, not the LM.

    Args:
        lm: the frozen language model.
        head: the head to train.
        args: see :class:`SigmoidHeadTrainingArguments`.
        loss: its ``sparse_grad`` decides between a sparse weight gradient with :class:`RowAdam` and a dense one.
        tokenizer: remembered in the head, if given.
        data_collator: default :func:`collate`, for :class:`TextDataset` and :class:`HiddenStateDataset` items.
        **kwargs: ``train_dataset``, ``eval_dataset``, ``callbacks`` and the Trainer's other arguments.

    Raises:
        HeadMismatchError: the head belongs to another vocabulary, hidden size or tokenizer.
        ValueError: gradient clipping or weight decay together with sparse gradients; resuming with another number of
            steps an epoch.

    Source of the recipe: Dinh & Niehues 2026 (arXiv 2601.00680).
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        head: SigmoidHead,
        args: SigmoidHeadTrainingArguments,
        *,
        loss: SigmoidHeadLoss,
        tokenizer: PreTrainedTokenizerBase | None = None,
        data_collator: Any = collate,
        **kwargs: Any,
    ) -> None:
        for name in ("max_grad_norm", "weight_decay"):
            if loss.sparse_grad and getattr(args, name):
                raise ValueError(f"{name}: expected 0 with sparse gradients, got {getattr(args, name)}")
        if tokenizer is not None:
            head.check_compatible(LMHead.from_model(lm), tokenizer)
            head.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self.head = head
        module = TrainingModule(lm, head, loss)
        super().__init__(model=module, args=args, data_collator=data_collator, **kwargs)
        self.label_names = ["labels"]
        self.add_callback(_SameGlobalBatch())
        if loss.sparse_grad and args.world_size > 1:
            average_rows(module)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in two groups, as scale and shift have a learning rate of their own; :class:`RowAdam` if sparse."""
        if self.optimizer is None:  # type: ignore[has-type]
            groups = parameter_groups(self.head, self.args.affine_learning_rate)
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            options = {"lr": self.args.learning_rate, "betas": betas, "eps": self.args.adam_epsilon}
            self.optimizer = (
                RowAdam(groups, **options)
                if self.model.loss.sparse_grad
                else torch.optim.AdamW(groups, weight_decay=self.args.weight_decay, **options)
            )
        return self.optimizer

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm that the Trainer logs; its own takes no sparse gradients."""
        if not self.model.loss.sparse_grad:
            return super()._get_grad_norm(model, grad_norm)
        grads = (parameter.grad for parameter in self.head.parameters())
        dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads if grad is not None]
        return torch.stack([grad.norm() for grad in dense]).norm().item()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, with the same negatives every time."""
        self.model.restart_evaluation()
        return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone: there are no predictions worth keeping."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.head.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        loaded = SigmoidHead.from_pretrained(resume_from_checkpoint)
        self.head.load_state_dict(loaded.state_dict())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As the Trainer's; a process for which the checkpoint has no state does not repeat the first one's numbers."""
        set_seed(self.args.seed + self.state.global_step)
        super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class _SameGlobalBatch(TrainerCallback):  # type: ignore[misc]
    """Refuses to resume where a step takes more or fewer samples than before: the Trainer skips steps, not samples."""

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        if not state.epoch or args.ignore_data_skip or not hasattr(train_dataloader, "__len__"):
            return
        now, before = len(train_dataloader) / args.gradient_accumulation_steps, state.global_step / state.epoch
        if abs(now - before) >= 1:  # the last step of an epoch may be a part of one
            raise ValueError(
                f"resume_from_checkpoint: expected {before:.0f} steps an epoch as in the checkpoint, got {now:.0f}; "
                "keep the product of processes, per_device_train_batch_size and gradient_accumulation_steps"
            )


class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C finishes the step, saves a checkpoint and ends the training; a second one ends it at once.

    Attributes:
        interrupted: whether that happened.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._previous = signal.signal(signal.SIGINT, self._note)

    def _note(self, *_: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGINT, self._previous)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a training folder that is whole, or None."""
    checkpoints = [path for path in Path(folder).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(checkpoints, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


class LossBar(TrainerCallback):  # type: ignore[misc]
    """A progress bar on stderr, where that is a terminal, with the latest losses."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._losses: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit=" steps", desc="training", disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._losses.update(
            {name: f"{float(logs[name]):.4f}" for name in ("loss", "eval_loss") if name in (logs or {})}
        )
        if self._bar is not None:
            self._bar.set_postfix(self._losses)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
        self._bar = None
