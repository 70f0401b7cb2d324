"""pyqe serve"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pyqe.cli.options import EstimatorOptions, ModelOptions, config_option, model_options, option_group
from pyqe.server.limits import Limits


def _limit(flag: str, name: str, text: str) -> Any:
    default = getattr(Limits, name)
    kind = click.IntRange(1) if isinstance(default, int) else click.FloatRange(0, min_open=True)
    return click.option(flag, name, type=kind, default=default, show_default=True, help=text)


_limit_options = option_group(
    "limits",
    Limits,
    _limit("--max-batch-size", "batch_size", "Answers or texts that the model works on at a time."),
    _limit("--max-batch-tokens", "batch_tokens", "Tokens of a batch, padding and answers at their longest included."),
    _limit("--max-queue", "queue_size", "Answers or texts that wait; beyond that 429."),
    _limit("--max-rows", "rows", "Answers (prompts times n) or texts of one request."),
    _limit("--max-tokens", "max_tokens", "Tokens of one answer."),
    _limit("--max-body", "body_bytes", "Bytes of one request."),
    _limit("--body-timeout", "body_seconds", "Seconds in which a request has to arrive."),
    _limit("--timeout", "seconds", "Seconds in which a request has to be answered, waiting included."),
)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keeps torch from starting OpenMP's threads for this thread, which would slow down those of the engine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@click.command("serve")
@model_options
@click.option("--head", "head_name", metavar="NAME", help="Folder or hub id of a Sigmoid Head.")
@click.option("--name", help="What clients call the model; default the last part of --model.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key", envvar="PYQE_API_KEY", show_envvar=True, help="Bearer token that requests must bring; default none."
)
@click.option("--max-connections", type=click.IntRange(1), default=512, show_default=True, help="Beyond that 503.")
@click.option("--grace", type=click.IntRange(0), default=30, show_default=True, help="Seconds to finish at the end.")
@_limit_options
@config_option
def command(
    language_model: ModelOptions,
    head_name: str | None,
    name: str | None,
    host: str,
    port: int,
    api_key: str | None,
    max_connections: int,
    grace: int,
    limits: Limits,
) -> None:
    """Serve a model over HTTP as OpenAI does, with the quality of every token.

    /v1/completions and /v1/chat/completions, streaming too, /v1/score for given text, /v1/models, /health and
    /metrics. SIGTERM or Ctrl-C: no new requests, those under way are answered, exit code 0. Needs the extra 'serve'.

    \b
    pyqe serve -m smollm2 --head head
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon"}'
    """
    try:
        import uvicorn

        from pyqe.server.app import create_app
    except ImportError as error:
        raise ImportError(f"pyqe serve needs more packages (pip install 'pyqe[serve]'): {error}") from error
    if api_key == "":
        raise click.UsageError("--api-key: expected a key, got none.", click.get_current_context())
    options = EstimatorOptions(**vars(language_model), head_name=head_name, signals=None, batch_size=limits.batch_size)
    name = name or Path(language_model.model_name).resolve().name
    with _one_torch_thread():
        app = create_app(options.estimator(), name=name, limits=limits, api_key=api_key)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        limit_concurrency=max_connections,
        timeout_graceful_shutdown=grace,
        access_log=False,
        server_header=False,
        ws="none",
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again when it has shut down
        signal.signal(number, lambda *_: sys.exit(0))
    uvicorn.Server(config).run()
