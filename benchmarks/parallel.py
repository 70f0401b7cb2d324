"""Times of vocabulary parallel operations, and of the two ways to average a head's gradient over processes.

``python -m benchmarks.parallel --processes 2 --model Llama-3.2-1B --rows 256 1024`` prints one JSON line a case: median
seconds of ``--repeats`` interleaved runs, slowest process, and the bytes that each process receives. The processes
share this machine's cores (gloo), or take one GPU each (NCCL) where there are enough. One process alone, with as many
threads as one of them, is the rival of the vocabulary cases.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from pyqe import DominantRule, NegativeSampler
from pyqe import functional as F
from pyqe.bench.case import DTYPES, model_shape
from pyqe.training.parallel import mean_of_rows

NEGATIVES = 10


def _seconds(run: Callable[[], object], device: torch.device, *, together: bool) -> float:
    """One run, until the slowest process has ended where all run together."""
    if together:
        dist.barrier()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor([time.perf_counter() - start], device=device)
    if together:
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def _report(options: argparse.Namespace, **fields: Any) -> None:
    if dist.get_rank() == 0:
        print(json.dumps({"processes": dist.get_world_size(), "model": options.model, **fields}), flush=True)


def _compare(
    options: argparse.Namespace, device: torch.device, runs: dict[str, Callable[[], object]]
) -> dict[str, float]:
    """Median seconds of each; those named "one process" run on the first one alone."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats + 1):
        for name, run in runs.items():
            if name != "one process" or dist.get_rank() == 0:
                times[name].append(_seconds(run, device, together=name != "one process"))
    return {name: median(seconds[1:]) for name, seconds in times.items() if seconds}  # the first one warms up


def _head_gradients(options: argparse.Namespace, device: torch.device, rows: int, v: int, d: int) -> None:
    """Targets by Zipf's law and uniform negatives: an all-reduce of [V, D] beside an exchange of touched rows."""
    frequencies = 1 / torch.arange(1, v + 1, device=device)
    ids = torch.cat(
        [frequencies.multinomial(rows, True), torch.randint(v, (rows * NEGATIVES,), device=device)]
    ).unique()
    values = torch.randn(len(ids), d, device=device)
    dense, group = torch.zeros(v, d, device=device), dist.group.WORLD
    assert group is not None
    sparse = torch.sparse_coo_tensor(ids[None], values, (v, d), is_coalesced=True, check_invariants=True)
    seconds = _compare(
        options, device, {"dense": lambda: dist.all_reduce(dense), "rows": lambda: mean_of_rows(sparse, group)}
    )
    count = dist.get_world_size()
    received = {"dense": 8 * (count - 1) * v * d // count, "rows": (count - 1) * len(ids) * (4 * d + 8)}
    for name, value in seconds.items():
        _report(options, case="gradient", rows=rows, touched=len(ids), way=name, seconds=value, bytes=received[name])


def _vocabulary(options: argparse.Namespace, device: torch.device, rows: int, v: int, d: int) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    dtype = DTYPES[options.dtype]
    weight = torch.randn(v, d, device=device).div_(d**0.5).to(dtype)
    weights = {"one process": weight, "sharded": distribute_tensor(weight, mesh, [Shard(0)])}
    hidden = (4 * torch.randn(rows, d, device=device)).to(dtype)
    targets = torch.randint(v, (rows,), device=device)
    dist.broadcast(hidden, 0)
    dist.broadcast(targets, 0)
    sampler = NegativeSampler(("uniform", "softmax"), NEGATIVES)

    def trained(w: Tensor) -> None:
        leaf = w.detach().requires_grad_()
        F.linear_vocab_bce(hidden.clone().requires_grad_(), leaf, targets).backward()  # type: ignore[no-untyped-call]

    operations: dict[str, Callable[[Tensor], object]] = {
        "softmax stats": lambda w: F.linear_softmax_stats(hidden, w, token_ids=targets, entropy=True),
        "dominant tokens": lambda w: F.linear_dominant_tokens(hidden, w, DominantRule.jump("first")),
        "token logits": lambda w: F.linear_token_logits(hidden, w, targets),
        "negatives": lambda w: F.linear_sample_negatives(hidden, w, targets, sampler),
        "vocabulary loss and gradients": trained,
    }
    for case, operation in operations.items():
        runs = {name: (lambda w=w, operation=operation: operation(w)) for name, w in weights.items()}
        for name, value in _compare(options, device, runs).items():
            _report(options, case=case, rows=rows, dtype=options.dtype, way=name, seconds=value)


def _process(rank: int, options: argparse.Namespace, file: str) -> None:
    cuda = torch.cuda.device_count() >= options.processes
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max((os.cpu_count() or 1) // options.processes, 1))
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=options.processes)
    torch.manual_seed(rank)
    name, v, d = model_shape(options.model)
    options.model = name
    with torch.no_grad():
        for rows in options.rows:
            _head_gradients(options, device, rows, v, d)
    for rows in options.rows:
        _vocabulary(options, device, rows, v, d)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="SmolLM2-135M", help="name of a shape, or VxD")
    parser.add_argument("--rows", type=int, nargs="+", default=[256], help="positions of a process's batch")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the vocabulary cases")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (options, f"{folder}/store"), nprocs=options.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
