"""Python calls for the process that has the engine."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyqe.scored import Signal

KEY = "pyqe"  # of SamplingParams.extra_args
ENGINE_OPTIONS = {
    "logits_processors": ["pyqe_vllm.processor:QualityProcessor"],
    "worker_extension_cls": "pyqe_vllm.worker.WorkerExtension",
}


def default_signals(head: str | os.PathLike[str] | None) -> list[Signal]:
    """Those of ``pyqe.attach``."""
    return ["prob", "entropy"] if head is None else ["quality", "prob", "entropy"]


def attach(llm: Any, head: str | os.PathLike[str] | None, *, signals: Sequence[Signal] | None = None) -> None:
    """Let an engine score what it writes for :func:`generate` and :func:`chat`.

    Args:
        llm: a ``vllm.LLM(..., **ENGINE_OPTIONS)``.
        head: folder of a Sigmoid Head of that model, which the worker can read; None for the softmax signals alone.
        signals: some of "quality", "prob", "max_prob", "entropy", "boosted_prob"; default quality (with a head), prob
            and entropy.

    Raises:
        HeadMismatchError, ValueError: as ``pyqe.attach``.
    """
    chosen = default_signals(head) if signals is None else list(signals)
    llm.collective_rpc("pyqe_attach", args=(None if head is None else os.fspath(head), chosen))


def generate(llm: Any, prompts: Any, sampling_params: Any = None, **options: Any) -> list[Any]:
    """``llm.generate`` with scores.

    Args:
        llm: an engine with :func:`attach`.
        prompts: as ``llm.generate`` takes them.
        sampling_params: one, or one for each prompt; with ``n=1``.
        options: of ``llm.generate``.

    Returns:
        the ``RequestOutput`` of each prompt. Its completion, ``output.outputs[0]``, has besides its usual fields
        ``token_quality``, ``token_prob``, ``token_entropy`` (the signals that :func:`attach` was given), float32 [T]
        for its T ``token_ids``; and ``sequence_quality``, the mean over them without the token that ended it.

    Raises:
        RuntimeError: scores are missing, or belong to other tokens.
    """
    many = [prompts] if isinstance(prompts, str | dict) else list(prompts)
    return _scored(llm, llm.generate, many, sampling_params, options)


def chat(llm: Any, messages: Any, sampling_params: Any = None, **options: Any) -> list[Any]:
    """``llm.chat`` with scores; as :func:`generate`."""
    many = [messages] if isinstance(messages[0], dict) else list(messages)
    return _scored(llm, llm.chat, many, sampling_params, options)


def _scored(llm: Any, run: Callable[..., Any], prompts: list[Any], params: Any, options: dict[str, Any]) -> list[Any]:
    given = llm.get_default_sampling_params() if params is None else params
    params = [param.clone() for param in (given if isinstance(given, Sequence) else [given] * len(prompts))]
    keys = [uuid.uuid4().hex for _ in params]
    for param, key in zip(params, keys, strict=True):
        param.extra_args = {**(param.extra_args or {}), KEY: key}
    outputs: list[Any] = run(prompts, params, **options)
    wanted = [(key, list(output.outputs[0].token_ids)) for key, output in zip(keys, outputs, strict=True)]
    (answers,) = llm.collective_rpc("pyqe_scores", args=(wanted,))
    for output, answer in zip(outputs, answers, strict=True):
        _add_scores(output, answer)
    return outputs


def _add_scores(output: Any, answer: dict[str, Any]) -> None:
    if "error" in answer:
        raise RuntimeError(f"request {output.request_id}: no scores: {answer['error']}")
    (completion,) = output.outputs
    for signal, values in answer.items():
        setattr(completion, f"token_{signal}", np.array(values, dtype=np.float32))
    if "quality" in answer:
        # A stop string ends a text after its tokens; EOS and a stop token are one of them.
        ended = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
        text = answer["quality"][: len(answer["quality"]) - ended]
        completion.sequence_quality = float(np.mean(text)) if text else float("nan")
