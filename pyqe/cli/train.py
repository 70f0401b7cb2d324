"""pyqe train"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import click

from pyqe.cli.options import ModelOptions, config_option, model_options, option_group
from pyqe.cli.rows import FORMATS, check_text, complain, read_rows


@dataclass(frozen=True)
class Recipe:
    """How a head is trained, and where it goes."""

    output: str
    kind: Any
    rank: int
    base: Any
    loss: str
    sources: str
    negatives: int
    temperature: float
    exclude: str
    learning_rate: float
    epochs: float
    block_size: int
    batch_size: int
    accumulate: int
    max_tokens: int | None
    held_out: float
    patience: int
    save_steps: int
    sparse: bool
    report_to: str
    seed: int
    resume: bool


_recipe_options = option_group(
    "recipe",
    Recipe,
    click.option(
        "-o", "--output", required=True, metavar="FOLDER", help="Where the head goes, and checkpoints meanwhile."
    ),
    click.option(
        "--kind",
        type=click.Choice(["full", "low_rank", "rescaling"]),
        default="low_rank",
        show_default=True,
        help="Of head: a weight for every token, a low-rank correction of the LM, or two parameters.",
    ),
    click.option("--rank", type=click.IntRange(1), default=24, show_default=True, help="Of a low-rank head."),
    click.option(
        "--base",
        type=click.Choice(["logprob", "logit"]),
        default="logprob",
        show_default=True,
        help="What a low-rank or rescaling head starts from.",
    ),
    click.option(
        "--loss",
        type=click.Choice(["sampled", "vocabulary"]),
        default="sampled",
        show_default=True,
        help="Over sampled negatives, or over every token.",
    ),
    click.option("--sources", default="unigram,softmax", show_default=True, help="Of negatives; also uniform."),
    click.option("--negatives", type=click.IntRange(1), default=10, show_default=True, help="For each position."),
    click.option(
        "--temperature",
        type=click.FloatRange(0, min_open=True),
        default=1.0,
        show_default=True,
        help="Of negatives from the softmax; its authors take 2.",
    ),
    click.option(
        "--exclude", default="jump:first", show_default=True, help="Dominant tokens, never negatives; or none."
    ),
    click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=3e-4, show_default=True),
    click.option(
        "--epochs",
        type=click.FloatRange(0, min_open=True),
        default=2.0,
        show_default=True,
        help="Passes over the text; a fraction too.",
    ),
    click.option("--block-size", type=click.IntRange(2), default=256, show_default=True, help="Tokens in a block."),
    click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Blocks in a step."),
    click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Steps in an update."),
    click.option("--max-tokens", type=click.IntRange(2), help="Use no more text than this."),
    click.option(
        "--held-out",
        type=click.FloatRange(0, 0.5, min_open=True),
        default=0.05,
        show_default=True,
        help="Share of the text, its end, that the head is evaluated on.",
    ),
    click.option(
        "--patience", type=click.IntRange(1), default=3, show_default=True, help="Evaluations without progress."
    ),
    click.option("--save-steps", type=click.IntRange(1), default=200, show_default=True, help="Evaluate and save."),
    click.option("--sparse", is_flag=True, help="Sparse weight gradients: a step touches only the rows it met."),
    click.option("--report-to", default="none", show_default=True, help="tensorboard, wandb, ... as in transformers."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of everything random."),
    click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the folder."),
)

# Options that mean something only with some values of another one.
_ONLY_WITH = {
    "rank": ("kind", ("low_rank",)),
    "base": ("kind", ("low_rank", "rescaling")),
    "sparse": ("loss", ("sampled",)),
    "sources": ("loss", ("sampled",)),
    "negatives": ("loss", ("sampled",)),
    "temperature": ("loss", ("sampled",)),
}


@click.command("train")
@click.argument("files", nargs=-1, required=True, metavar="TEXTS...")
@model_options
@_recipe_options
@click.option(
    "--from", "form", type=click.Choice(["auto", *FORMATS]), default="auto", show_default=True, help="As in pyqe score."
)
@click.option("--strict", is_flag=True, help="Stop at the first bad row instead of reporting it.")
@click.option("--json", "as_json", is_flag=True, help="Print the final metrics as JSON.")
@config_option
def command(
    files: Sequence[str], language_model: ModelOptions, recipe: Recipe, form: str, strict: bool, as_json: bool
) -> None:
    """Train a Sigmoid Head on the texts in TEXTS... (plain text, JSON lines with "text", or TSV; '-' is stdin).

    The LM runs over the text once; its hidden states are kept in memory. Ctrl-C saves a checkpoint, --resume goes on
    from it, with the same texts and options. The output folder holds the head: model.safetensors, config.json and a
    model card. Bad rows are reported and left out (exit code 3).

    \b
    pyqe train -m smollm2 books.txt -o head
    pyqe train -m smollm2 books.txt -o head --kind full --sparse --learning-rate 1e-4
    """
    _check_options(recipe)
    texts, prompts, bad = _read_texts(files, form, strict)
    if not texts:
        raise ValueError(f"no texts in {', '.join(files)}")
    checkpoint = _checkpoint(recipe)
    with contextlib.redirect_stdout(sys.stderr):  # what transformers logs is not data
        metrics, interrupted = _train(*language_model.load(), texts, prompts, recipe, checkpoint)
    if interrupted:
        click.echo("pyqe: interrupted; the checkpoint is saved, --resume goes on from it", err=True)
        raise click.exceptions.Exit(130)
    click.echo(
        f"pyqe: held-out loss {metrics['loss_before']:.4f} before, {metrics['loss']:.4f} after {metrics['steps']} "
        f"steps; head in {recipe.output}",
        err=True,
    )
    if as_json:
        click.echo(json.dumps(metrics))
    if bad:
        raise click.exceptions.Exit(3)


def _check_options(recipe: Recipe) -> None:
    """Check what is only known to be wrong later, before hours are spent."""
    from pyqe.negatives import Source

    ctx = click.get_current_context()
    for name, (other, values) in _ONLY_WITH.items():
        given = ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given and getattr(recipe, other) not in values:
            raise click.UsageError(f"--{name} needs --{other} {' or '.join(values)}.", ctx)
    try:
        _excluded(recipe)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param_hint="--exclude") from error
    names = get_args(Source)
    if not set(_sources(recipe)) <= set(names):
        message = f"expected some of {', '.join(names)}; got {recipe.sources!r}"
        raise click.BadParameter(message, ctx, param_hint="--sources")


def _read_texts(paths: Sequence[str], form: str, strict: bool) -> tuple[list[str], list[Any], int]:
    """Texts and prompts of all files, and the number of bad rows; blank texts are left out."""
    texts, prompts, bad = [], [], 0
    for path in paths:
        for row in read_rows(path, form, "text", check_text):
            if row.status == "failed":
                complain(row.line, row.reason if len(paths) == 1 else f"{row.reason} ({path})", strict)
                bad += 1
            elif row.fields.get("text", "").strip():
                texts.append(row.fields["text"])
                prompts.append(row.fields.get("prompt"))
    return texts, prompts, bad


def _checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint to resume from.

    Raises:
        ValueError: there is none, or there is one and it was not asked for.
    """
    from pyqe.training.trainer import last_checkpoint

    checkpoint = last_checkpoint(recipe.output)
    if recipe.resume and checkpoint is None:
        raise ValueError(f"--resume: no checkpoint in {recipe.output}")
    if checkpoint is not None and not recipe.resume:
        raise ValueError(
            f"{recipe.output} has a checkpoint of an interrupted run: use --resume, or remove {checkpoint}"
        )
    return None if checkpoint is None else str(checkpoint)


def _train(
    model: Any, tokenizer: Any, texts: list[str], prompts: list[Any], recipe: Recipe, checkpoint: str | None
) -> tuple[dict[str, Any], bool]:
    """Metrics, and whether Ctrl-C ended it."""
    from transformers import set_seed

    import pyqe
    from pyqe.training import StopOnInterrupt

    set_seed(recipe.seed)
    states = _hidden_states(model, tokenizer, texts, prompts, recipe)
    head = pyqe.SigmoidHead.from_lm_head(model, tokenizer, kind=recipe.kind, rank=recipe.rank, base=recipe.base)
    stopper = StopOnInterrupt()
    trainer = _trainer(model, tokenizer, head, states, recipe, stopper)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = {
        "loss_before": before,
        "steps": trainer.state.global_step,
        "positions": len(trainer.train_dataset.targets),
    }
    if stopper.interrupted:
        return metrics, True
    metrics["loss"] = trainer.evaluate()["eval_loss"]
    sampling = ("loss", "sources", "negatives", "temperature", "exclude")
    recorded = (*sampling, "learning_rate", "epochs", "batch_size", "seed")
    head.config.training = {**{name: getattr(recipe, name) for name in recorded}, **metrics}
    head.save_pretrained(recipe.output)
    _remove_checkpoints(recipe.output)
    return metrics, False


def _hidden_states(model: Any, tokenizer: Any, texts: list[str], prompts: list[Any], recipe: Recipe) -> Any:
    from tqdm import tqdm

    from pyqe.training import HiddenStateDataset, TextDataset

    if model.config.is_encoder_decoder:
        raise ValueError("model: expected a causal LM, got an encoder-decoder, which pyqe.training takes from Python")
    has_prompts = any(prompt is not None for prompt in prompts)
    text = TextDataset(tokenizer, texts, prompts if has_prompts else None, block_size=recipe.block_size)
    if recipe.max_tokens:
        text.blocks = text.blocks[: max(recipe.max_tokens // recipe.block_size, 1)]
    needed = f"expected text for at least two blocks of {recipe.block_size} tokens (--block-size)"
    if len(text) == 0:
        raise ValueError(f"{needed}, got none")
    with tqdm(unit=" tokens", desc="hidden states", disable=None) as bar:
        states = HiddenStateDataset.compute(model, text, rows=recipe.block_size, on_progress=bar.update)
    if len(states) < 2:
        raise ValueError(f"{needed}, got {len(states.targets)} tokens")
    return states


def _trainer(model: Any, tokenizer: Any, head: Any, states: Any, recipe: Recipe, stopper: Any) -> Any:
    from transformers import EarlyStoppingCallback, PrinterCallback

    from pyqe.training import SigmoidHeadTrainer
    from pyqe.training.trainer import LossBar

    train, held_out = states.split(recipe.held_out)
    trainer = SigmoidHeadTrainer(
        model,
        head,
        _arguments(recipe, model),
        loss=_loss(recipe, train.targets, head.config.vocab_size),
        tokenizer=tokenizer,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[stopper, LossBar(), EarlyStoppingCallback(recipe.patience)],
    )
    if sys.stderr.isatty():
        trainer.remove_callback(PrinterCallback)  # the bar shows the losses
    return trainer


def _arguments(recipe: Recipe, model: Any) -> Any:
    from pyqe.training import SigmoidHeadTrainingArguments

    return SigmoidHeadTrainingArguments(
        output_dir=recipe.output,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        eval_strategy="steps",
        eval_steps=recipe.save_steps,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=10,
        report_to=recipe.report_to,
        seed=recipe.seed,
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
    )


def _loss(recipe: Recipe, targets: Any, vocab_size: int) -> Any:
    import pyqe

    if recipe.loss == "vocabulary":
        return pyqe.SigmoidHeadLoss(exclude=_excluded(recipe))
    sampler = pyqe.NegativeSampler(
        _sources(recipe),
        num_negatives=recipe.negatives,
        temperature=recipe.temperature,
        exclude=_excluded(recipe),
        unigram_counts=pyqe.NegativeSampler.count_tokens(targets, vocab_size),
    )
    return pyqe.SigmoidHeadLoss(sampler, sparse_grad=recipe.sparse)


def _excluded(recipe: Recipe) -> Any:
    """The rule of the dominant tokens, or None."""
    import pyqe

    return None if recipe.exclude == "none" else pyqe.DominantRule.parse(recipe.exclude)


def _sources(recipe: Recipe) -> Any:
    return tuple(name.strip() for name in recipe.sources.split(","))


def _remove_checkpoints(folder: str) -> None:
    """Remove what the head replaces: a later run must not go on from them."""
    from pyqe.training.trainer import last_checkpoint

    while (checkpoint := last_checkpoint(folder)) is not None:
        shutil.rmtree(checkpoint)
