"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pyqe.estimator import QualityEstimator

Command = TypeVar("Command", bound=Callable[..., Any])


def _read_config(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Use a YAML file's values as the defaults of the command's options."""
    if value is None:
        return
    import yaml

    try:
        content = yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise click.BadParameter(f"cannot read {value}: {error}", ctx, parameter) from error
    if not isinstance(content, dict):
        raise click.BadParameter(
            f"{value}: expected 'option: value' lines, got {type(content).__name__}", ctx, parameter
        )
    values = {str(name).replace("-", "_"): setting for name, setting in content.items()}
    known = {p.name for p in ctx.command.params}
    unknown = sorted(set(values) - {name for name in known if name})
    if unknown:
        raise click.BadParameter(f"{value}: {ctx.command.name} has no option {', '.join(unknown)}", ctx, parameter)
    ctx.default_map = {**(ctx.default_map or {}), **values}


config_option = click.option(
    "--config",
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="YAML file with 'option: value' lines; options on the command line win.",
)


def model_options(command: Command) -> Command:
    """--model, --dtype, --device."""
    for option in (
        click.option(
            "--device", default="auto", show_default=True, help="torch device; auto takes a GPU if there is one."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
            help="Precision of the LM; auto is what its files have.",
        ),
        click.option(
            "-m",
            "--model",
            "model_name",
            required=True,
            metavar="NAME",
            help="Folder or hub id of a causal LM or encoder-decoder; 'smollm2' is the demo's.",
        ),
    ):
        command = option(command)
    return command


def estimator_options(command: Command) -> Command:
    """Model options and --head, --signals, --batch-size."""
    for option in (
        click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Rows at a time."),
        click.option(
            "--signals",
            metavar="LIST",
            help="Comma-separated: quality, prob, max_prob, entropy, boosted_prob. Default all there are.",
        ),
        click.option("--head", "head_name", metavar="NAME", help="Folder or hub id of a Sigmoid Head."),
    ):
        command = option(command)
    return model_options(command)


def load_model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, hub id or 'smollm2'.

    Raises:
        FileNotFoundError: neither a folder nor a hub id.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name == "smollm2":
        from pyqe.demo import language_model

        name = str(language_model())
    if not Path(name).is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"model: no folder {name!r}")
    config = AutoConfig.from_pretrained(name)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = loader.from_pretrained(name, dtype="auto" if dtype == "auto" else getattr(torch, dtype))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def load_estimator(model_name: str, head_name: str | None, dtype: str, device: str) -> QualityEstimator:
    """Estimator of a model and, if named, a head."""
    from pyqe import QualityEstimator, SigmoidHead

    head = None if head_name is None else SigmoidHead.from_pretrained(head_name)
    model, tokenizer = load_model(model_name, dtype, device)
    return QualityEstimator(model, tokenizer, head)


def split_signals(value: str | None) -> Any:
    """Names of a comma-separated list, or None."""
    return None if value is None else [name.strip() for name in value.split(",")]
