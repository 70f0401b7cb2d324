"""pyqe generate"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from pyqe.cli.options import config_option, estimator_options, load_estimator, split_signals
from pyqe.cli.pipeline import io_options, run
from pyqe.cli.rows import Row


def _generate_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options from ``name=value`` pairs, the values read as YAML."""
    import yaml

    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"expected name=value, got {pair!r}", param_hint="-g")
        options[name] = yaml.safe_load(value)
    return options


@click.command("generate")
@io_options
@estimator_options
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Length limit.")
@click.option("--chat", is_flag=True, help="Wrap each prompt in the model's chat template.")
@click.option("--seed", type=int, help="Seed of sampling.")
@click.option("-g", "pairs", multiple=True, metavar="NAME=VALUE", help="Any option of generate(), e.g. -g num_beams=4.")
@config_option
def command(
    source: str,
    output: str,
    input_form: str,
    output_form: str,
    strict: bool,
    resume: bool,
    model_name: str,
    dtype: str,
    device: str,
    head_name: str | None,
    signals: str | None,
    batch_size: int,
    max_new_tokens: int,
    chat: bool,
    seed: int | None,
    pairs: Sequence[str],
) -> None:
    """Generate from the prompts in INPUT (default stdin), with a quality for every token.

    A JSON line needs "prompt", a text or a list of chat messages; its other fields are passed through. A line of plain
    text is a prompt. One output row for each sequence.

    \b
    echo "What is the capital of France?" | pyqe generate -m smollm2 --chat
    pyqe generate prompts.jsonl -m smollm2 --head head -g do_sample=true -g temperature=0.7
    """
    options = {"max_new_tokens": max_new_tokens, **_generate_options(pairs)}
    estimator = load_estimator(model_name, head_name, dtype, device)
    chosen = split_signals(signals)
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)

    def work(rows: Sequence[Row], on_progress: Callable[[int], object]) -> list[list[dict[str, Any]]]:
        prompts = [row.fields["prompt"] for row in rows]
        if chat:
            prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        generated = estimator.generate(
            prompts, signals=chosen, batch_size=batch_size, on_progress=on_progress, **options
        )
        each = len(generated) // len(rows)
        return [[result.to_dict() for result in generated[i * each : (i + 1) * each]] for i in range(len(rows))]

    run(
        work,
        source=source,
        output=output,
        input_form=input_form,
        output_form=output_form,
        strict=strict,
        resume=resume,
        batch_size=batch_size,
        required="prompt",
        types=(str, list),
    )
