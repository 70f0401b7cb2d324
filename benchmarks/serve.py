"""``pyqe serve`` under load beside bare batched ``generate`` of the same prompts; every answer is checked.

python benchmarks/serve.py --json serve.json

Bare generate and the server take turns, a slice of the prompts each time. The server is a process of its own; its
clients are here. Each client sends its next request when it has its answer, and in between some that are to be refused.
A slice begins with a batch of one row, the first that comes: slices should have many batches.
Exit code 1 where an answer was lost or wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

import pyqe
from pyqe import QualityEstimator, SigmoidHead
from pyqe.bench.machine import describe
from pyqe.cli.options import load_model
from pyqe.demo import training_texts

ROOT = Path(__file__).resolve().parent.parent
BAD = (  # beside every twentieth good request
    ({"content": b'{"prompt": '}, 400),
    ({"json": {"prompt": "x", "max_tokens": -1}}, 400),
    ({"json": {"prompt": "x", "model": "another"}}, 404),
    ({"content": b" " * 2**20}, 413),
)
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}


@dataclass
class Served:
    """What the server did.

    Attributes:
        answers: to each prompt, a choice.
        latencies: of each answer in seconds.
        resident: memory in MB at the start, in the middle and at the end.
        refused: bad requests that got the status they should.
        bad: bad requests.
    """

    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    refused: int = 0
    bad: int = 0


def prompts_of(count: int) -> list[str]:
    """Beginnings of English paragraphs, no two alike."""
    generator = random.Random(0)
    texts = training_texts()
    words = (texts[i % len(texts)].split()[i // len(texts) :][: generator.randint(4, 40)] for i in range(count))
    return [" ".join(part) for part in words]


def bare(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int, max_tokens: int) -> int:
    """Plain ``model.generate``; the number of tokens written."""
    written = 0
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
        output = model.generate(**inputs.to(model.device), max_new_tokens=max_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        tokenizer.batch_decode(new, skip_special_tokens=True)
        written += new.numel()
    return written


@contextmanager
def server(options: argparse.Namespace, head: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The server's process and address."""
    words = ["serve", "-m", options.model, "--dtype", options.dtype, "--device", options.device, "--head", head]
    words += ["--name", "model", "--port", "0", "--max-batch-size", str(options.batch_size)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-m", "pyqe", *words], env=environment, stderr=log)
        try:
            yield process, _address(process, log)
        finally:
            process.terminate()
            process.wait(60)


def _address(process: subprocess.Popen[bytes], log: Any) -> str:
    while process.poll() is None:
        found = re.search(rb"running on (http://\S+)", os.pread(log.fileno(), 65536, 0))
        if found:
            return found[1].decode()
        time.sleep(0.1)
    raise RuntimeError(f"the server ended: {os.pread(log.fileno(), 65536, 0).decode()}")


def resident(process: subprocess.Popen[bytes]) -> float:
    """Resident memory of a process in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


async def load(url: str, work: Sequence[tuple[int, str]], clients: int, max_tokens: int, served: Served) -> None:
    """Send the numbered prompts, as many at a time as there are clients."""
    todo = list(reversed(work))

    async def bother(client: httpx.AsyncClient, i: int) -> None:
        body, status = BAD[i // 20 % len(BAD)]
        served.bad += 1
        try:
            response = await client.post("/v1/completions", headers={"content-type": "application/json"}, **body)
            served.refused += response.status_code == status
        except (httpx.WriteError, httpx.ReadError):  # hung up on before all was sent
            served.refused += status == 413

    async def ask(client: httpx.AsyncClient) -> None:
        while todo:
            i, prompt = todo.pop()
            start = time.perf_counter()
            body = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
            response = await client.post("/v1/completions", json=body)
            if response.status_code == 200:
                served.answers[i] = response.json()["choices"][0]
                served.latencies.append(time.perf_counter() - start)
            if i % 20 == 0:
                await bother(client, i)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(ask(client) for _ in range(clients)))


def wrong_answers(served: Served, expected: Sequence[pyqe.ScoredText], tolerance: float) -> list[int]:
    """Numbers of the prompts whose answer is missing, has another text or other qualities."""
    wrong = []
    for i, scored in enumerate(expected):
        answer = served.answers.get(i)
        same = answer is not None and answer["text"] == scored.text
        if not same or not np.allclose(answer["quality"]["tokens"], scored.token_quality, atol=tolerance):
            wrong.append(i)
    return wrong


def run(options: argparse.Namespace, head_folder: str) -> dict[str, Any]:
    """Measure and check."""
    model, tokenizer = load_model(options.model, options.dtype, options.device)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if options.head is None:
        SigmoidHead.from_lm_head(model, tokenizer, kind="low_rank", rank=4).save_pretrained(head_folder)
    head = options.head or head_folder
    prompts = prompts_of(options.requests)
    work = list(enumerate(prompts))
    size = -(-len(work) // options.rounds)
    served, ratios, rates = Served(), [], {"bare": [], "server": []}
    with server(options, head) as (process, url):
        asyncio.run(load(url, [(-1 - i, prompt) for i, prompt in work[: options.batch_size]], 4, 8, Served()))
        bare(model, tokenizer, prompts[: options.batch_size], options.batch_size, 8)
        served.resident.append(resident(process))
        for start in range(0, len(work), size):
            part = work[start : start + size]
            begin = time.perf_counter()
            bare(model, tokenizer, [prompt for _, prompt in part], options.batch_size, options.max_tokens)
            middle = time.perf_counter()
            asyncio.run(load(url, part, options.clients, options.max_tokens, served))
            end = time.perf_counter()
            rates["bare"].append(len(part) / (middle - begin))
            rates["server"].append(len(part) / (end - middle))
            ratios.append((middle - begin) / (end - middle))
            served.resident.append(resident(process))
            print(f"{start + len(part)} requests: {ratios[-1]:.3f} of bare generate", file=sys.stderr)
    estimator = QualityEstimator(model, tokenizer, SigmoidHead.from_pretrained(head))
    expected = estimator.generate(
        prompts, signals=["quality"], batch_size=options.batch_size, max_new_tokens=options.max_tokens, do_sample=False
    )
    wrong = wrong_answers(served, expected, TOLERANCE[options.dtype])
    memory = served.resident
    return {
        "machine": describe(),
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "threads": torch.get_num_threads(),
        "requests_per_second": rates,
        "ratio": {"median": statistics.median(ratios), "rounds": ratios},
        "latency_seconds": dict(
            zip(("p50", "p90", "p99", "max"), np.quantile(served.latencies, (0.5, 0.9, 0.99, 1)).tolist(), strict=True)
        ),
        "resident_mb": {"start": memory[0], "middle": memory[len(memory) // 2], "end": memory[-1], "rounds": memory},
        "answers": {"right": len(prompts) - len(wrong), "lost": len(prompts) - len(served.answers), "wrong": wrong},
        "bad_requests": {"sent": served.bad, "refused": served.refused},
    }


def main() -> None:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, hub id or 'smollm2'")
    parser.add_argument("--head", help="folder of a head; default an untrained one of low rank")
    parser.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4, help="slices in which the two take turns")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, folder)
    text = json.dumps(result, indent=1, default=str)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "machine"}, indent=1, default=str))
    bad = result["bad_requests"]
    sys.exit(bool(result["answers"]["wrong"]) or bad["sent"] != bad["refused"])


if __name__ == "__main__":
    main()
