"""Options that commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pyqe.estimator import QualityEstimator

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def option_group(name: str, kind: type[Any], *options: Decorator) -> Decorator:
    """Adds options to a command, which gets their values as one argument ``name``, a dataclass ``kind``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_group(**values: Any) -> Any:
            group = kind(**{item.name: values.pop(item.name) for item in fields(kind)})
            return command(**values, **{name: group})

        for option in reversed(options):
            option(with_group)
        return with_group

    return decorate


# --- --config


def _read_config(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Use a YAML file's values as the defaults of the command's options."""
    if value is None:
        return
    options = {
        flag.lstrip("-"): option
        for option in ctx.command.params
        if isinstance(option, click.Option) and option is not parameter
        for flag in option.opts
    }
    content = {str(name).replace("_", "-"): setting for name, setting in _read_yaml(value, parameter).items()}
    unknown = sorted(set(content) - set(options))
    if unknown:
        raise click.BadParameter(f"{value}: {ctx.command.name} has no option {', '.join(unknown)}", ctx, parameter)
    ctx.default_map = {
        str(options[name].name): _setting(options[name], setting)
        for name, setting in content.items()
        if setting is not None
    }


def _read_yaml(path: str, parameter: click.Parameter) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise click.BadParameter(f"cannot read {path}: {error}", param=parameter) from error
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path}: expected 'option: value' lines, got {content!r:.40}", param=parameter)
    return content


def _setting(option: click.Option, setting: Any) -> Any:
    """A YAML value as it would stand on the command line; a list also for options that take commas."""
    if option.is_flag:
        return setting
    if isinstance(setting, list):
        parts = [str(part) for part in setting]
        return parts if option.multiple else ",".join(parts)
    return [str(setting)] if option.multiple else str(setting)


config_option = click.option(
    "--config",
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="YAML file with 'option: value' lines; options on the command line win.",
)


# --- the model


@dataclass(frozen=True)
class ModelOptions:
    """Which language model, and how it is loaded."""

    model_name: str
    dtype: str
    device: str

    def load(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        return load_model(self.model_name, self.dtype, self.device)


_MODEL_OPTIONS: tuple[Decorator, ...] = (
    click.option(
        "-m",
        "--model",
        "model_name",
        required=True,
        metavar="NAME",
        help="Folder or hub id of a causal LM or encoder-decoder; 'smollm2' is the demo's.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Precision of the LM; auto is what its files have, float32 on a processor without bfloat16 arithmetic.",
    ),
    click.option("--device", default="auto", show_default=True, help="torch device; auto takes a GPU if there is one."),
)
model_options = option_group("language_model", ModelOptions, *_MODEL_OPTIONS)


@dataclass(frozen=True)
class EstimatorOptions(ModelOptions):
    """Model, head and signals.

    Raises:
        click.UsageError: the quality is asked for without a head.
    """

    head_name: str | None
    signals: tuple[Any, ...] | None
    batch_size: int

    def __post_init__(self) -> None:
        if self.head_name is None and "quality" in (self.signals or ()):
            raise click.UsageError("--signals: the quality needs a --head.", click.get_current_context())

    def require_quality(self, option: str) -> None:
        """Check that there will be a quality.

        Raises:
            click.UsageError: there will be none.
        """
        if self.head_name is None or "quality" not in (self.signals or ("quality",)):
            message = f"{option} prints the quality, which needs a --head (and --signals with it, if given)."
            raise click.UsageError(message, click.get_current_context())

    def estimator(self) -> QualityEstimator:
        """The model with its head, if one is named."""
        from pyqe import QualityEstimator, SigmoidHead

        head = None if self.head_name is None else SigmoidHead.from_pretrained(self.head_name)
        model, tokenizer = self.load()
        return QualityEstimator(model, tokenizer, head)


def _split_signals(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    from pyqe.scored import SIGNALS

    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(","))
    if not set(names) <= set(SIGNALS):
        raise click.BadParameter(f"expected some of {', '.join(SIGNALS)}; got {value!r}", ctx, parameter)
    return names


estimator_options = option_group(
    "chosen",
    EstimatorOptions,
    *_MODEL_OPTIONS,
    click.option("--head", "head_name", metavar="NAME", help="Folder or hub id of a Sigmoid Head."),
    click.option(
        "--signals",
        metavar="LIST",
        callback=_split_signals,
        help="Comma-separated: quality, prob, max_prob, entropy, boosted_prob. Default all there are.",
    ),
    click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Rows at a time."),
)


def load_model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, hub id or 'smollm2'.

    Raises:
        FileNotFoundError: neither a folder nor a hub id.
        ValueError: no such device, or nothing that transformers can load.
    """
    import huggingface_hub
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    place = _torch_device(device)
    if name == "smollm2":
        from pyqe.demo import language_model

        name = str(language_model())
    with _clear_errors(name):
        config = AutoConfig.from_pretrained(name)
        loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = loader.from_pretrained(name, dtype=_torch_dtype(dtype, place))
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model.to(place).eval(), tokenizer


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """transformers' errors, which can take a page, as one line that says what was looked for."""
    is_folder = Path(name).is_dir()
    if not is_folder and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"model: no folder {name!r}")
    try:
        yield
    except Exception as error:  # tokenizers and safetensors have their own, without a common class
        summary = str(error).strip().partition("\n")[0]
        if is_folder:
            raise ValueError(f"model: cannot load the folder {name!r}: {summary}") from error
        raise FileNotFoundError(f"model: no folder {name!r}, and the hub does not give it: {summary}") from error


def _torch_dtype(name: str, device: Any) -> Any:
    """The dtype to load a model in: for "auto" what its files have, unless this processor would emulate it."""
    import torch

    from pyqe.backends.cpu import features

    if name != "auto":
        return getattr(torch, name)
    native = {"avx512_bf16", "amx_bf16"} & set(features())
    return torch.float32 if device.type == "cpu" and not native else "auto"


def _torch_device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        summary = str(error).strip().partition("\n")[0]
        raise ValueError(f"device: torch cannot use {name!r} here: {summary}") from error
    return device
