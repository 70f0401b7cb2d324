"""What quality costs: token logits against the full head, and scoring against the LM's own forward pass.

    python benchmarks/overhead.py [--model smollm2] [--repeats 20] [--output benchmarks/results/overhead.json]

Rivals are interleaved within one run; figures are medians with quartiles. Memory is the peak beyond inputs.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

import pyqe
from pyqe import functional as F
from pyqe.cli.doctor import examine
from pyqe.cli.options import load_model
from pyqe.lm_head import capture_hidden


def interleave(rivals: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of each rival in milliseconds, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for round_number in range(repeats + 1):
        for name, rival in rivals.items():
            start = time.perf_counter()
            rival()
            if round_number:
                times[name].append(1e3 * (time.perf_counter() - start))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: dict(zip(("q1", "median", "q3"), values, strict=True)) for name, values in quartiles.items()}


def token_logits(repeats: int) -> dict[str, Any]:
    """``linear_token_logits`` and computing all logits to gather from them; N 512, D 2048, V 128256, bf16."""
    n, d, v = 512, 2048, 128256
    hidden, weight = torch.randn(n, d).bfloat16(), torch.randn(v, d).bfloat16()
    ids = [torch.randint(0, v, (n,)) for _ in range(repeats + 1)]
    fresh = iter(ids)  # rows that no cache has seen
    times = interleave(
        {
            "token_logits": lambda: F.linear_token_logits(hidden, weight, next(fresh)),
            "all_logits": lambda: (hidden @ weight.T).gather(1, ids[0][:, None]),
        },
        repeats,
    )
    return {**times, "ratio": times["all_logits"]["median"] / times["token_logits"]["median"]}


def scoring(model_name: str, dtype: str, repeats: int) -> dict[str, Any]:
    """A forward pass with logits, without them, and with the quality of the chosen tokens; 8 texts of 128 tokens."""
    model, _ = load_model(model_name, dtype, "cpu")
    head = pyqe.SigmoidHead.from_lm_head(model, kind="full")
    lm_head = pyqe.lm_head.LMHead.from_model(model)
    ids = torch.randint(0, lm_head.vocab_size, (8, 129))

    @torch.inference_mode()
    def forward() -> Any:
        return model(ids[:, :-1], use_cache=False).logits

    @torch.inference_mode()
    def without_logits() -> Any:
        with capture_hidden(model, skip_logits=True) as captured:
            model(ids[:, :-1], use_cache=False)
        return captured[0]

    @torch.inference_mode()
    def quality() -> Any:
        return torch.sigmoid(head(without_logits(), ids[:, 1:]))

    hidden = without_logits()

    @torch.inference_mode()
    def quality_alone() -> Any:
        return torch.sigmoid(head(hidden, ids[:, 1:]))

    @torch.inference_mode()
    def all_signals() -> Any:
        hidden = without_logits()
        stats = lm_head.softmax_stats(hidden, token_ids=ids[:, 1:], entropy=True, dominant=pyqe.DominantRule())
        return torch.sigmoid(head(hidden, ids[:, 1:])), stats

    rivals = {
        "forward": forward,
        "without_logits": without_logits,
        "quality": quality,
        "quality_alone": quality_alone,
        "all_signals": all_signals,
    }
    times = interleave(rivals, repeats)
    median = {name: value["median"] for name, value in times.items()}
    return {
        **times,
        "dtype": dtype,
        "added_by_quality": median["quality_alone"] / median["forward"],
        "quality_over_forward": median["quality"] / median["forward"],
        "all_signals_over_forward": median["all_signals"] / median["forward"],
        "memory_of_quality_bytes": peak_allocated(quality_alone),
        "memory_of_logits_bytes": 4 * ids[:, 1:].numel() * lm_head.vocab_size,
    }


def peak_allocated(function: Callable[[], Any]) -> int:
    """Bytes that torch allocates at the most while the function runs."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


@click.command()
@click.option("--model", "model_name", default="smollm2", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--repeats", default=20, show_default=True)
@click.option("--output", type=click.Path(path_type=Path))
def main(model_name: str, dtype: str, repeats: int, output: Path | None) -> None:
    """Print the figures, and write them with the machine's description as JSON."""
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), **examine()},
        "token_logits": token_logits(repeats),
        "scoring": scoring(model_name, dtype, repeats),
    }
    logits, score = result["token_logits"], result["scoring"]
    print(f"token logits, N 512, D 2048, V 128256, bf16: {logits['token_logits']['median']:.3f} ms,")
    print(f"  all logits and gather {logits['all_logits']['median']:.1f} ms: {logits['ratio']:.0f} times as long")
    print(f"scoring 8 x 128 tokens ({model_name}, {dtype}):")
    for name in ("forward", "without_logits", "quality", "quality_alone", "all_signals"):
        print(f"  {name:16} {score[name]['median']:9.2f} ms ({score[name]['q1']:.2f} to {score[name]['q3']:.2f})")
    print(f"  quality adds {100 * score['added_by_quality']:.2f} % to a forward pass")
    print(f"  memory: {score['memory_of_quality_bytes']:,} bytes; logits {score['memory_of_logits_bytes']:,}")
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
