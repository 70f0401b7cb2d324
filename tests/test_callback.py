"""A Sigmoid Head trained beside the model in the Trainers of others, with tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import TEXTS, model, tokenizer
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

import pyqe
from pyqe.heads import HeadMismatchError, SigmoidHead
from pyqe.training import SigmoidHeadCallback, TextDataset, TrainingModule, collate
from pyqe.training.callback import _FOLDER

pytestmark = pytest.mark.usefixtures("one_thread")

DROPOUT = ("dropout", "attention_dropout", "dropout_rate", "attn_pdrop", "embd_pdrop", "resid_pdrop")
EVERYTHING = pyqe.SigmoidHeadLoss()  # over the whole vocabulary: nothing in it is random


def text_data(repeat: int = 4) -> TextDataset:
    return TextDataset(tokenizer(), TEXTS * repeat, [None] * len(TEXTS) * repeat, block_size=16)  # of many lengths


def sequence_pairs() -> Any:
    ids = [torch.tensor(tokenizer()(text)["input_ids"]) for text in TEXTS]
    return [{"input_ids": source, "labels": target} for source, target in zip(ids, reversed(ids), strict=True)]


def callback(lm: Any, loss: pyqe.SigmoidHeadLoss | None = None, rank: int = 4, **options: Any) -> SigmoidHeadCallback:
    torch.manual_seed(3)
    head = SigmoidHead.from_lm_head(lm, kind="low_rank", rank=rank)
    sampler = pyqe.NegativeSampler(("uniform", "softmax"))
    return SigmoidHeadCallback(head, loss or pyqe.SigmoidHeadLoss(sampler), **{"learning_rate": 1e-2, **options})


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        **options,
    }


def trainer(folder: Path, lm: Any, callbacks: list[Any], data: Any = None, **options: Any) -> Trainer:
    """transformers' own."""
    data = data or text_data()
    return Trainer(
        lm,
        TrainingArguments(**settings(folder, **options)),
        data_collator=collate,
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
        processing_class=tokenizer(),
    )


def sft_trainer(folder: Path, lm: Any, callbacks: list[Any], prompts: bool = False, **options: Any) -> Trainer:
    """TRL's, whose loss does not call the output embedding."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rows = [{"prompt": "one two", "completion": text} if prompts else {"text": text} for text in TEXTS * 4]
    data = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(
        lm,
        trl.SFTConfig(**settings(folder, **{"bf16": False, "max_length": 24, **options})),
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
        processing_class=tokenizer(),
    )


def logged(run: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


class FirstBatch(TrainerCallback):  # type: ignore[misc]
    """Remembers what the first forward pass of the training got, and the model at that time."""

    def __init__(self, lm: Any) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.weights = {name: value.clone() for name, value in lm.state_dict().items()}
        lm.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, lm: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if lm.training and not self.inputs:
            names = ("input_ids", "attention_mask", "position_ids", "labels")
            self.inputs = {name: kwargs[name].clone() for name in names if kwargs.get(name) is not None}


# --- what is learnt


@pytest.mark.parametrize("make", [trainer, sft_trainer])
def test_head_is_learnt_beside_the_model_and_told_in_the_logs(tmp_path: Path, make: Any) -> None:
    class Reporter(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.update(logs)

    reported: set[str] = set()
    lm = model()
    beside = callback(lm)
    run = make(tmp_path, lm, [beside, Reporter()], eval_strategy="steps", eval_steps=6)
    run.train()
    losses = logged(run, "head_loss")
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert len(logged(run, "eval_head_loss")) == 2
    assert {"head_loss", "eval_head_loss"} <= reported
    assert "forward" not in vars(lm.model)  # the model is as it was
    assert "eval_head_loss" not in run.evaluate()
    beside.attach(lm, tokenizer())
    again = [run.evaluate()["eval_head_loss"] for _ in range(2)]
    assert again[0] == again[1]  # the same negatives
    assert again[0] == pytest.approx(logged(run, "eval_head_loss")[1], rel=1e-5)


@pytest.mark.parametrize("make", [trainer, sft_trainer])
def test_the_model_learns_what_it_learns_alone(tmp_path: Path, make: Any) -> None:
    weights = []
    for beside in (True, False):
        lm = model(attention_dropout=0.3)
        make(tmp_path, lm, [callback(lm)] if beside else [], max_steps=4, gradient_accumulation_steps=2).train()
        weights.append(lm.state_dict())
    for name, value in weights[1].items():
        assert torch.equal(value, weights[0][name]), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "cohere", "bart", "t5"])
def test_its_loss_is_that_of_the_training_module(tmp_path: Path, kind: str) -> None:
    lm = model(kind, **dict.fromkeys(DROPOUT, 0.0))
    first, beside = FirstBatch(lm), callback(lm, EVERYTHING)
    data = sequence_pairs() if lm.config.is_encoder_decoder else None
    run = trainer(tmp_path, lm, [beside], data, max_steps=1)
    start = {name: value.clone() for name, value in beside.head.state_dict().items()}
    run.train()
    lm.load_state_dict(first.weights)
    beside.head.load_state_dict(start)
    expected = TrainingModule(lm, beside.head, EVERYTHING)(**first.inputs)["loss"]
    assert logged(run, "head_loss")[0] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": True},
        {"padding_free": True, "max_length": None},
        {"packing": True},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_batches_of_trl(tmp_path: Path, options: dict[str, Any]) -> None:
    """The mean over the positions whose labels the batch has, from the states that the model has in that batch."""
    lm = model()
    first, beside = FirstBatch(lm), callback(lm, EVERYTHING)
    run = sft_trainer(tmp_path, lm, [beside], max_steps=1, **options)
    start = {name: value.clone() for name, value in beside.head.state_dict().items()}
    run.train()
    lm.load_state_dict(first.weights)
    beside.head.load_state_dict(start)
    labels = first.inputs.pop("labels", None)
    if labels is None:  # smoothed: the model gets them in a second pass
        labels = first.inputs["input_ids"].masked_fill(first.inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        hidden = lm.eval().model(**{**first.inputs, "use_cache": False}).last_hidden_state
    lm_head = pyqe.lm_head.LMHead.from_model(lm)
    expected = EVERYTHING(beside.head, hidden[:, :-1], labels[:, 1:], lm_head).item()
    assert 0 < (labels[:, 1:] != -100).sum() < labels[:, 1:].numel() or "packing" in options
    assert logged(run, "head_loss")[0] == pytest.approx(expected, rel=2e-2 if "bf16" in options else 1e-4)


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    heads = []
    for steps, size in ((1, 4), (4, 1)):
        lm = model()
        beside = callback(lm, EVERYTHING)
        trainer(
            tmp_path,
            lm,
            [beside],
            max_steps=3,
            gradient_accumulation_steps=steps,
            per_device_train_batch_size=size,
        ).train()
        heads.append(beside.head)
    for (name, one), (_, many) in zip(heads[0].named_parameters(), heads[1].named_parameters(), strict=True):
        torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-5, msg=name)
    assert heads[0].A.abs().max() > 1e-3


def test_sparse_gradients(tmp_path: Path) -> None:
    lm = model()
    loss = pyqe.SigmoidHeadLoss(pyqe.NegativeSampler(("uniform",)), sparse_grad=True)
    beside = callback(lm, loss)
    run = trainer(tmp_path, lm, [beside], gradient_accumulation_steps=2)
    run.train()
    losses = logged(run, "head_loss")
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_compiled_model(tmp_path: Path) -> None:
    losses = []
    for options in ({"torch_compile": True, "torch_compile_backend": "eager"}, {}):
        lm = model(num_hidden_layers=1)
        data = [item for item in text_data() if len(item["input_ids"]) == 16]  # of one shape
        run = trainer(tmp_path, lm, [callback(lm)], data, max_steps=1, **options)
        run.train()
        losses.append(logged(run, "head_loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- checkpoints


class Stop(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


def test_resuming_gives_the_uninterrupted_run(tmp_path: Path) -> None:
    lm = model()
    whole = callback(lm)
    trainer(tmp_path / "whole", lm, [whole], max_steps=6).train()
    lm = model()
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path / "part", lm, [callback(lm), Stop()], **options).train()
    checkpoint = tmp_path / "part" / "checkpoint-3"
    lm = model()
    resumed = callback(lm)
    torch.nn.init.ones_(resumed.head.B)
    run = trainer(tmp_path / "part", lm, [resumed], **options)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 6
    for (name, got), (_, expected) in zip(resumed.head.named_parameters(), whole.head.named_parameters(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)
    saved = SigmoidHead.from_pretrained(checkpoint / _FOLDER)
    scored = pyqe.QualityEstimator(lm.eval(), tokenizer(), saved).score(TEXTS[:1])[0]
    assert 0 < scored.quality < 1


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    lm = model()
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, lm, [Stop()], **options).train()
    run = trainer(tmp_path, lm, [callback(lm)], **options)
    with pytest.raises(FileNotFoundError, match="checkpoint-3"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_best_head_comes_back(tmp_path: Path) -> None:
    lm = model()
    beside = callback(lm, learning_rate=10.0, affine_learning_rate=10.0)  # diverges: the first evaluation is the best
    run = trainer(
        tmp_path,
        lm,
        [beside, EarlyStoppingCallback(2)],
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_head_loss",
    )
    run.train()
    assert run.state.global_step < run.state.max_steps
    beside.attach(lm)
    assert run.evaluate()["eval_head_loss"] == pytest.approx(run.state.best_metric, rel=1e-4)


# --- models in other people's hands


def test_models_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm = model()
    adapted = peft.get_peft_model(lm, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    beside = callback(lm)
    run = sft_trainer(tmp_path, adapted, [beside], eval_strategy="steps", eval_steps=6, eval_on_start=True)
    run.train()
    before, _, after = logged(run, "eval_head_loss")
    assert after < 0.95 * before
    lm = model()
    adapted = peft.get_peft_model(lm, peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="adapter"):
        beside.attach(adapted)


PROCESSES = """
import sys
from pathlib import Path
import torch
from test_callback import EVERYTHING, callback, model, text_data, trainer
import pyqe

rank = int(__import__("os").environ["RANK"])
lm = model()
beside = callback(lm, EVERYTHING)
torch.nn.init.constant_(beside.head.B, rank + 1.0)  # the first process's counts
trainer(Path(sys.argv[1]), lm, [beside], max_steps=3, per_device_train_batch_size=2, ddp_backend="gloo").train()
if rank == 0:
    beside.head.save_pretrained(sys.argv[1])
loss = pyqe.SigmoidHeadLoss(pyqe.NegativeSampler(("uniform",)), sparse_grad=True)
try:
    trainer(Path(sys.argv[1]), lm, [callback(lm, loss)], max_steps=1, ddp_backend="gloo").train()
except ValueError as error:
    assert "sparse_grad" in str(error)
else:
    raise AssertionError
"""


def test_two_processes_are_one_with_the_larger_batch(tmp_path: Path) -> None:
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    paths = [str(Path(__file__).parent), str(Path(pyqe.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    lm = model()
    alone = callback(lm, EVERYTHING)
    torch.nn.init.constant_(alone.head.B, 1.0)  # type: ignore[arg-type]
    trainer(tmp_path, lm, [alone], max_steps=3, per_device_train_batch_size=4).train()
    together = SigmoidHead.from_pretrained(tmp_path / "out")
    for (name, got), (_, expected) in zip(together.named_parameters(), alone.head.named_parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5, msg=name)


# --- what cannot work says so


def test_losses_without_hidden_states_are_refused(tmp_path: Path) -> None:
    lm = model("t5")  # its states are scaled after the backbone, so that they are seen at the output embedding alone
    lm.forward = lambda **inputs: CausalLMOutput(loss=lm.shared.weight.sum())
    with pytest.raises(RuntimeError, match="fused"):
        trainer(tmp_path, lm, [callback(lm)], sequence_pairs()).train()


def test_forward_passes_without_labels_are_refused(tmp_path: Path) -> None:
    lm = model()
    with pytest.raises(RuntimeError, match="no labels"):
        trainer(tmp_path, lm, [callback(lm)], label_smoothing_factor=0.1).train()


def test_a_head_of_another_model_or_tokenizer_is_refused(tmp_path: Path) -> None:
    lm = model()
    beside = callback(lm)
    beside.head.config.tokenizer_fingerprint = "another"
    with pytest.raises(HeadMismatchError, match="another"):
        trainer(tmp_path, lm, [beside]).train()
    with pytest.raises(HeadMismatchError, match="hidden_size"):
        beside.attach(model(hidden_size=16))


def test_one_process_for_several_gpus_is_refused() -> None:
    lm = model()
    with pytest.raises(ValueError, match="torchrun"):
        callback(lm).on_train_begin(SimpleNamespace(n_gpu=2), None, None, model=lm)


def test_losses_that_are_no_means_are_refused() -> None:
    with pytest.raises(ValueError, match="reduction"):
        callback(model(), pyqe.SigmoidHeadLoss(reduction="sum"))
