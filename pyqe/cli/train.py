"""pyqe train"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from pyqe.cli.options import config_option, load_model, model_options
from pyqe.cli.rows import FORMATS, complain, input_format, read_rows


def _read_texts(paths: Sequence[str], form: str, strict: bool) -> tuple[list[str], list[Any], int]:
    """Texts and prompts of all files, and the number of bad rows."""
    texts, prompts, bad = [], [], 0
    for path in paths:
        for row in read_rows(path, input_format(path, form), "text"):
            if row.problem is not None:
                complain(row, strict)
                bad += 1
            elif row.fields["text"].strip():
                texts.append(row.fields["text"])
                prompts.append(row.fields.get("prompt"))
    return texts, prompts, bad


@click.command("train")
@click.argument("files", nargs=-1, required=True, metavar="TEXTS...")
@model_options
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Where the head goes, and checkpoints meanwhile.")
@click.option("--from", "form", type=click.Choice(["auto", *FORMATS]), default="auto", show_default=True)
@click.option("--kind", type=click.Choice(["full", "low_rank", "rescaling"]), default="low_rank", show_default=True)
@click.option("--rank", type=click.IntRange(1), default=32, show_default=True, help="Of a low-rank head.")
@click.option("--base", type=click.Choice(["logprob", "logit"]), default="logprob", show_default=True)
@click.option("--loss", type=click.Choice(["sampled", "vocabulary"]), default="sampled", show_default=True)
@click.option("--sources", default="unigram,softmax", show_default=True, help="Of negatives; also uniform.")
@click.option("--negatives", type=click.IntRange(1), default=10, show_default=True, help="For each position.")
@click.option("--exclude", default="jump:first", show_default=True, help="Dominant tokens, never negatives; or none.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True)
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True)
@click.option("--block-size", type=click.IntRange(2), default=256, show_default=True, help="Tokens in a block.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Blocks in a step.")
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Steps in an update.")
@click.option("--max-tokens", type=click.IntRange(2), help="Use no more text than this.")
@click.option("--held-out", type=click.FloatRange(0, 0.5, min_open=True), default=0.05, show_default=True)
@click.option("--patience", type=click.IntRange(1), default=3, show_default=True, help="Evaluations without progress.")
@click.option("--save-steps", type=click.IntRange(1), default=200, show_default=True, help="Evaluate and save.")
@click.option("--sparse", is_flag=True, help="Sparse weight gradients: a step touches only the rows it met.")
@click.option("--report-to", default="none", show_default=True, help="tensorboard, wandb, ... as in transformers.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the folder.")
@click.option("--strict", is_flag=True, help="Stop at the first bad row instead of reporting it.")
@click.option("--json", "as_json", is_flag=True, help="Print the final metrics as JSON.")
@config_option
def command(files: Sequence[str], form: str, strict: bool, as_json: bool, **options: Any) -> None:
    """Train a Sigmoid Head on the texts in TEXTS... (plain text, JSON lines with "text", or TSV).

    The LM runs over the text once; its hidden states are kept in memory. Ctrl-C saves a checkpoint, --resume goes on
    from it. The output folder holds the head: model.safetensors, config.json and a model card.

    \b
    pyqe train -m smollm2 books.txt -o head
    pyqe train -m smollm2 books.txt -o head --kind full --sparse --learning-rate 1e-4
    """
    texts, prompts, bad = _read_texts(files, form, strict)
    if not texts:
        raise ValueError(f"no texts in {', '.join(files)}")
    model, tokenizer = load_model(options["model_name"], options["dtype"], options["device"])
    metrics, interrupted = _train(model, tokenizer, texts, prompts, options)
    if interrupted:
        click.echo("pyqe: interrupted; the checkpoint is saved, --resume goes on from it", err=True)
        raise click.exceptions.Exit(130)
    if as_json:
        click.echo(json.dumps(metrics))
    else:
        click.echo(
            f"pyqe: held-out loss {metrics['loss_before']:.4f} before, {metrics['loss']:.4f} after "
            f"{metrics['steps']} steps; head in {options['output']}",
            err=True,
        )
    if bad:
        raise click.exceptions.Exit(3)


def _train(
    model: Any, tokenizer: Any, texts: list[str], prompts: list[Any], options: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Metrics, and whether Ctrl-C ended it."""
    from tqdm import tqdm
    from transformers import EarlyStoppingCallback, set_seed

    import pyqe
    from pyqe.training import HiddenStateDataset, SigmoidHeadTrainer, StopOnInterrupt, TextDataset
    from pyqe.training.trainer import LossBar, last_checkpoint

    set_seed(options["seed"])
    checkpoint = last_checkpoint(options["output"]) if options["resume"] else None
    if options["resume"] and checkpoint is None:
        raise ValueError(f"--resume: no checkpoint in {options['output']}")
    has_prompts = any(prompt is not None for prompt in prompts)
    text = TextDataset(tokenizer, texts, prompts if has_prompts else None, block_size=options["block_size"])
    if options["max_tokens"]:
        text.blocks = text.blocks[: max(options["max_tokens"] // options["block_size"], 1)]
    with tqdm(unit=" tokens", desc="hidden states", disable=None) as bar:
        states = HiddenStateDataset.compute(model, text, rows=options["block_size"], on_progress=bar.update)
    if len(states) < 2:
        raise ValueError(f"expected text for at least two blocks of {options['block_size']} tokens, got {len(states)}")
    train, held_out = states.split(options["held_out"])
    head = pyqe.SigmoidHead.from_lm_head(
        model, tokenizer, kind=options["kind"], rank=options["rank"], base=options["base"]
    )
    stopper = StopOnInterrupt()
    trainer = SigmoidHeadTrainer(
        model,
        head,
        _arguments(options, model),
        loss=_loss(options, train.targets, head.config.vocab_size),
        tokenizer=tokenizer,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[stopper, LossBar(), EarlyStoppingCallback(options["patience"])],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = {"loss_before": before, "steps": trainer.state.global_step, "positions": len(train.targets)}
    if stopper.interrupted:
        return metrics, True
    metrics["loss"] = trainer.evaluate()["eval_loss"]
    recipe = ("loss", "sources", "negatives", "exclude", "learning_rate", "epochs", "batch_size", "seed")
    head.config.training = {**{name: options[name] for name in recipe}, **metrics}
    head.save_pretrained(options["output"])
    return metrics, False


def _arguments(options: dict[str, Any], model: Any) -> Any:
    from pyqe.training import SigmoidHeadTrainingArguments

    return SigmoidHeadTrainingArguments(
        output_dir=options["output"],
        num_train_epochs=options["epochs"],
        learning_rate=options["learning_rate"],
        per_device_train_batch_size=options["batch_size"],
        gradient_accumulation_steps=options["accumulate"],
        eval_strategy="steps",
        eval_steps=options["save_steps"],
        save_strategy="steps",
        save_steps=options["save_steps"],
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=10,
        report_to=options["report_to"],
        seed=options["seed"],
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
    )


def _loss(options: dict[str, Any], targets: Any, vocab_size: int) -> Any:
    import pyqe

    exclude = None if options["exclude"] == "none" else pyqe.DominantRule.parse(options["exclude"])
    if options["loss"] == "vocabulary":
        return pyqe.SigmoidHeadLoss(exclude=exclude)
    sampler = pyqe.NegativeSampler(
        tuple(name.strip() for name in options["sources"].split(",")),
        num_negatives=options["negatives"],
        exclude=exclude,
        unigram_counts=pyqe.NegativeSampler.count_tokens(targets, vocab_size),
    )
    return pyqe.SigmoidHeadLoss(sampler, sparse_grad=options["sparse"])
