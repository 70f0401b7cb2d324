"""Training on transformers' Trainer, with tiny models."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXTS, model, tokenizer
from transformers import EarlyStoppingCallback, TrainerCallback

import pyqe
from pyqe import demo
from pyqe.heads import HeadMismatchError, SigmoidHead
from pyqe.training import (
    HiddenStateDataset,
    RowAdam,
    SigmoidHeadTrainer,
    SigmoidHeadTrainingArguments,
    StopOnInterrupt,
    TextDataset,
    TrainingModule,
    collate,
)
from pyqe.training.trainer import last_checkpoint


def text_data(repeat: int = 8) -> TextDataset:
    return TextDataset(tokenizer(), TEXTS * repeat, block_size=16)


def trainer(folder: Path, kind: str = "low_rank", cached: bool = True, sparse: bool = False, **options: Any) -> Any:
    """A trainer of a fresh head; ``options`` go to the arguments, but for ``callbacks``."""
    torch.manual_seed(3)
    lm, data = model(), text_data()
    train: Any = HiddenStateDataset.compute(lm, data, rows=16) if cached else data
    head = SigmoidHead.from_lm_head(lm, kind=kind, rank=4)  # type: ignore[arg-type]
    sampler = pyqe.NegativeSampler(unigram_counts=pyqe.NegativeSampler.count_tokens(train.targets, len(tokenizer())))
    callbacks = options.pop("callbacks", [])
    settings = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        **options,
    }
    return SigmoidHeadTrainer(
        lm,
        head,
        SigmoidHeadTrainingArguments(output_dir=str(folder), **settings),
        loss=pyqe.SigmoidHeadLoss(sampler, sparse_grad=sparse),
        tokenizer=tokenizer(),
        train_dataset=train,
        eval_dataset=train,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("cached", [True, False], ids=["hidden states", "tokens"])
@pytest.mark.parametrize(
    ("kind", "sparse"), [("full", False), ("full", True), ("low_rank", True), ("rescaling", False)]
)
def test_training_reduces_the_loss(tmp_path: Path, kind: str, sparse: bool, cached: bool) -> None:
    run = trainer(tmp_path, kind, cached, sparse)
    before = run.evaluate()["eval_loss"]
    assert run.evaluate()["eval_loss"] == before  # the same negatives every time
    frozen = {name: value.clone() for name, value in run.model._frozen[0].state_dict().items()}
    run.train()
    assert run.evaluate()["eval_loss"] < before - (0.0 if kind == "rescaling" else 0.01)
    for name, value in run.model._frozen[0].state_dict().items():
        assert torch.equal(value, frozen[name]), name


def test_cached_hidden_states_give_the_loss_of_the_tokens() -> None:
    lm, data = model(), text_data(2)
    states = HiddenStateDataset.compute(lm, data, batch_size=3, rows=7)
    with torch.no_grad():
        rows, labels = [], []
        for i in range(len(data)):
            item = data[i]
            output = lm.model(item["input_ids"][None]).last_hidden_state[0]
            rows.append(output[:-1])
            labels.append(item["labels"][1:])
    kept = torch.cat(labels) != -100
    assert torch.equal(states.labels, torch.cat(labels)[kept])
    torch.testing.assert_close(states.hidden, torch.cat(rows)[kept], atol=1e-5, rtol=1e-5)
    expected = torch.logsumexp(states.hidden @ lm.lm_head.weight.T, 1).detach()
    torch.testing.assert_close(states.logsumexp, expected, atol=1e-4, rtol=1e-4)
    assert sum(len(states[i]["labels"]) for i in range(len(states))) == len(states.labels)


def test_hidden_states_survive_their_file_and_split(tmp_path: Path) -> None:
    states = HiddenStateDataset.compute(model(), text_data(2), rows=8)
    states.save(tmp_path / "states.safetensors")
    loaded = HiddenStateDataset.load(tmp_path / "states.safetensors", rows=8)
    assert torch.equal(loaded.hidden, states.hidden)
    train, held_out = loaded.split(0.25)
    assert torch.equal(torch.cat([train.labels, held_out.labels]), states.labels)
    assert len(held_out) >= 1


@pytest.mark.parametrize("sparse", [False, True])
def test_resuming_gives_the_uninterrupted_run(tmp_path: Path, sparse: bool) -> None:
    whole = trainer(tmp_path / "whole", "full", sparse=sparse)
    whole.train()

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    first = trainer(tmp_path / "part", "full", sparse=sparse, save_strategy="steps", save_steps=3, callbacks=[Stop()])
    first.train()
    checkpoint = last_checkpoint(tmp_path / "part")
    assert checkpoint is not None
    assert {"config.json", "model.safetensors"} <= {path.name for path in checkpoint.iterdir()}
    assert (checkpoint / "model.safetensors").stat().st_size < 2 * whole.head.weight.numel() * 4  # no LM in it
    second = trainer(tmp_path / "part", "full", sparse=sparse, save_strategy="steps", save_steps=3)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == whole.state.global_step
    for (name, got), (_, expected) in zip(second.head.named_parameters(), whole.head.named_parameters(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)


def test_the_best_head_comes_back_after_early_stopping(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        learning_rate=10.0,  # diverges, so that the first evaluation is the best
        affine_learning_rate=10.0,
        num_train_epochs=20,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        callbacks=[EarlyStoppingCallback(2)],
    )
    run.train()
    assert run.state.global_step < run.state.max_steps
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-5)


def test_gradient_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    norms = []  # Adam's steps would not show a loss of the wrong size, the gradient's norm does
    for steps, size in ((1, 4), (2, 2)):
        run = trainer(tmp_path, gradient_accumulation_steps=steps, per_device_train_batch_size=size, max_steps=1)
        run.model.loss.sampler = pyqe.NegativeSampler(("uniform",), num_negatives=200, exclude=None)
        run.train()
        norms.append(run.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_bfloat16_mixed_precision(tmp_path: Path) -> None:
    run = trainer(tmp_path, cached=False, bf16=True)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    assert all(parameter.dtype == torch.float32 for parameter in run.head.parameters())


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_encoder_decoders_train(tmp_path: Path, kind: str) -> None:
    lm = model(kind)
    ids = [torch.tensor(tokenizer()(text)["input_ids"]) for text in TEXTS]
    data: Any = [{"input_ids": source, "labels": target} for source, target in zip(ids, reversed(ids), strict=True)]
    head = SigmoidHead.from_lm_head(lm, kind="low_rank", rank=2)
    args = SigmoidHeadTrainingArguments(
        str(tmp_path), max_steps=15, learning_rate=1e-2, disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    sampler = pyqe.NegativeSampler(("uniform", "softmax"))
    run = SigmoidHeadTrainer(lm, head, args, loss=pyqe.SigmoidHeadLoss(sampler), train_dataset=data, eval_dataset=data)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before


def test_ctrl_c_saves_a_checkpoint_and_stops(tmp_path: Path) -> None:
    class Press(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    stopper = StopOnInterrupt()
    run = trainer(tmp_path, callbacks=[stopper, Press()])
    previous = signal.getsignal(signal.SIGINT)
    run.train()
    assert stopper.interrupted
    assert run.state.global_step == 3
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert signal.getsignal(signal.SIGINT) == previous


@pytest.mark.parametrize("option", ["max_grad_norm", "weight_decay"])
def test_what_sparse_gradients_cannot_have_is_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=option):
        trainer(tmp_path, sparse=True, **{option: 1.0})


def test_weight_decay_is_honoured(tmp_path: Path) -> None:
    groups = trainer(tmp_path, weight_decay=0.1).create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]


def test_row_adam_is_adam_on_dense_and_sparse_adam_on_sparse_gradients() -> None:
    torch.manual_seed(0)
    start = torch.randn(10, 3)
    ours, dense, sparse = (torch.nn.Parameter(start.clone()) for _ in range(3))
    lazy = torch.nn.Parameter(start.clone())
    pairs = [
        (ours, RowAdam([ours], lr=0.1), dense, torch.optim.Adam([dense], lr=0.1), False),
        (lazy, RowAdam([lazy], lr=0.1), sparse, torch.optim.SparseAdam([sparse], lr=0.1), True),
    ]
    for _ in range(5):
        rows = torch.randint(0, 10, (4,))
        values = torch.randn(4, 3)
        grad = torch.sparse_coo_tensor(rows[None], values, (10, 3), check_invariants=True)
        for mine, optimizer, theirs, oracle, is_sparse in pairs:
            mine.grad = grad.clone() if is_sparse else grad.to_dense()
            theirs.grad = grad.clone() if is_sparse else grad.to_dense()
            optimizer.step()
            oracle.step()
    for mine, _, theirs, _, _ in pairs:
        torch.testing.assert_close(mine, theirs)


def test_text_blocks() -> None:
    data = TextDataset(tokenizer(), ["one two three four", "x"], ["a prompt", None], block_size=6)
    labelled = [token for i in range(len(data)) for token in data[i]["labels"].tolist() if token != -100]
    expected = tokenizer()("one two three four", add_special_tokens=False)["input_ids"] + [
        tokenizer().convert_tokens_to_ids("x")
    ]
    assert labelled == expected
    packed = TextDataset(tokenizer(), TEXTS, block_size=12)
    assert all(len(packed[i]["input_ids"]) <= 12 for i in range(len(packed)))
    batch = collate([packed[0], packed[len(packed) - 1]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape


def test_bos_between_packed_texts_is_no_target() -> None:
    data = TextDataset(tokenizer(), TEXTS, block_size=1000)
    labels, bos = data[0]["labels"].tolist(), tokenizer().bos_token_id
    assert data[0]["input_ids"].tolist().count(bos) == len(TEXTS)
    assert bos not in labels
    assert bos not in data.targets


def test_a_given_attention_mask_is_kept_and_padding_may_be_on_the_left() -> None:
    item = {"input_ids": torch.tensor([0, 5, 6, 7]), "attention_mask": torch.tensor([0, 1, 1, 1])}
    item["labels"] = torch.tensor([-100, -100, 6, 7])
    assert collate([item])["attention_mask"].tolist() == [[0, 1, 1, 1]]
    lm = model("gpt2")
    head = SigmoidHead.from_lm_head(lm, kind="rescaling")
    module = TrainingModule(lm, head, pyqe.SigmoidHeadLoss())
    left = module(**collate([item]))["loss"]
    right = module(**{name: value[1:][None] for name, value in item.items()})["loss"]
    torch.testing.assert_close(left, right)


def test_hidden_states_of_encoder_decoders_and_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="causal"):
        HiddenStateDataset.compute(model("bart"), text_data(1))
    with pytest.raises(ValueError, match="empty"):
        HiddenStateDataset.compute(model(), TextDataset(tokenizer(), []))


def test_a_head_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.head.config.tokenizer_fingerprint = "another"
    with pytest.raises(HeadMismatchError, match="another"):
        SigmoidHeadTrainer(model(), run.head, run.args, loss=run.model.loss, tokenizer=tokenizer())


def test_the_demo_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TOKENS", 2000)
    monkeypatch.setattr(demo, "BLOCK_SIZE", 32)
    lm, said = model(), []
    head = demo.train_head(lm, tokenizer(), tmp_path / "head", said.append)
    assert "held-out loss" in said[0]
    assert head.config.training["positions"] > 1000
    rows = demo.score_sentences(pyqe.QualityEstimator(lm, tokenizer(), head))
    assert set(demo.error_auroc(rows)) == set(demo.SHOWN)
    table = demo.token_table(rows)
    assert len(table.splitlines()) > sum(len(row["tokens"]) for row in rows)
    assert "* " in table
