"""pyqe generate"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from pyqe.cli.options import EstimatorOptions, config_option, estimator_options
from pyqe.cli.pipeline import Fields, Streams, Task, run, stream_options, without_tokens
from pyqe.cli.rows import Row, check_chat, check_prompt


def _generate_options(ctx: click.Context, parameter: click.Parameter, pairs: Sequence[str]) -> dict[str, Any]:
    """Options from ``name=value`` pairs, the values read as YAML."""
    import yaml

    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"expected name=value, got {pair!r}", ctx, parameter)
        if name == "max_new_tokens":
            raise click.BadParameter("max_new_tokens is --max-new-tokens", ctx, parameter)
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise click.BadParameter(f"{name}: expected a YAML value, got {value!r}", ctx, parameter) from error
    return options


@click.command("generate")
@stream_options("jsonl", "text")
@estimator_options
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Length limit.")
@click.option("--chat", is_flag=True, help="Wrap each prompt in the model's chat template.")
@click.option("--seed", type=int, help="Seed of sampling.")
@click.option(
    "-g",
    "more",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_generate_options,
    help="Any option of transformers' generate(), as often as needed: -g num_beams=4 -g early_stopping=true.",
)
@config_option
def command(
    streams: Streams,
    chosen: EstimatorOptions,
    max_new_tokens: int,
    chat: bool,
    seed: int | None,
    more: dict[str, Any],
) -> None:
    """Generate from the prompts in INPUT (default stdin), with a quality for every token.

    A JSON line needs "prompt", a text or a list of chat messages; its other fields are passed through, unless a result
    has their name. A line of plain text is a prompt. One output row for each sequence, in order, with the input's line
    number as "line" and, where a prompt gives several, "sequence" from 1. A blank line has status "empty", a bad one
    "failed", with the reason.

    \b
    echo "What is the capital of France?" | pyqe generate -m smollm2 --chat
    pyqe generate prompts.jsonl -m smollm2 --head head -g do_sample=true -g temperature=0.7
    """
    if streams.output_form == "text":
        chosen.require_quality("--to text")
    options = {"max_new_tokens": max_new_tokens, **more}
    run(
        streams,
        Fields("prompt", ("prompt",), check_prompt),
        chosen.batch_size,
        lambda: _task(chosen, options, chat, seed),
    )


def _task(chosen: EstimatorOptions, options: dict[str, Any], chat: bool, seed: int | None) -> Task:
    estimator = chosen.estimator()
    if chat and not getattr(estimator.tokenizer, "chat_template", None):
        raise ValueError(f"--chat: {chosen.model_name} has no chat template")

    def messages(fields: dict[str, Any]) -> Any:
        prompt = fields["prompt"]
        return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt

    def check(fields: dict[str, Any]) -> str | None:
        prompt = messages(fields)
        return check_chat(estimator.tokenizer, prompt) or _check_length(estimator, prompt, options["max_new_tokens"])

    def work(rows: Sequence[Row], on_progress: Callable[[int], object]) -> list[list[dict[str, Any]]]:
        if seed is not None:
            from transformers import set_seed

            set_seed(seed + rows[0].line)  # so that a resumed run samples what an uninterrupted one does
        generated = estimator.generate(
            [messages(row.fields) for row in rows],
            signals=chosen.signals,
            batch_size=chosen.batch_size,
            on_progress=on_progress,
            **options,
        )
        each = len(generated) // len(rows)
        results = [result.to_dict() for result in generated]
        if each > 1:
            results = [result | {"sequence": i % each + 1} for i, result in enumerate(results)]
        return [results[start : start + each] for start in range(0, len(results), each)]

    return Task(check, work, without_tokens)


def _check_length(estimator: Any, prompt: Any, max_new_tokens: Any) -> str | None:
    """Why the prompt and what is to come do not fit the model's context, or None."""
    from pyqe.encoding import prompt_ids

    count = len(prompt_ids(estimator.tokenizer, prompt)[1])
    room = estimator.context - (0 if estimator.model.config.is_encoder_decoder else max_new_tokens)
    if count <= room:
        return None
    return f"prompt: its {count} tokens and {max_new_tokens} new ones do not fit the context of {estimator.context}"
