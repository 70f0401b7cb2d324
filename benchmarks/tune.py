"""Chooses the Triton kernels' configurations by time, and writes them to ``pyqe/kernels/configs.json``.

Every candidate of the GPU's architecture runs the operations that use its kernel; the fastest takes the place of the
chosen one, which becomes a candidate. One that fails, or whose results differ, is passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

Table = dict[str, Any]
Entry = dict[str, int]

TABLE = Path(__file__).resolve().parent.parent / "pyqe" / "kernels" / "configs.json"
_ROUNDS = 7
_DIFFERENCE = 1e-2  # of the largest value: another order of sums, and bfloat16
_DTYPES = {"half": "bf16", "tf32": "fp32", "ieee": "fp32"}
_HALF, _FLOAT = ("Llama-3-8B", 4096), ("32000x2048", 1024)  # float32 products are slow without tensor cores


def planned(table: Table, architecture: str) -> Iterator[tuple[str, str, Entry, list[Entry]]]:
    """Kernel, kind of product, the chosen configuration and the others."""
    for kernel, architectures in table.items():
        if isinstance(architectures, dict):
            for product, entry in architectures.get(architecture, {}).items():
                yield kernel, product, entry["chosen"], [entry["chosen"], *entry["candidates"]]


def text(table: Table) -> str:
    """The table as JSON, a configuration a line."""

    def lines(value: Any, indent: str) -> str:
        if isinstance(value, dict) and any(isinstance(inner, (dict, list)) for inner in value.values()):
            parts = [f"{json.dumps(name)}: {lines(inner, indent + '  ')}" for name, inner in value.items()]
            return "{" + ",".join(f"\n{indent}  {part}" for part in parts) + f"\n{indent}}}"
        if isinstance(value, list) and value:
            return "[" + ",".join(f"\n{indent}  {json.dumps(inner)}" for inner in value) + f"\n{indent}]"
        return json.dumps(value)

    return lines(table, "") + "\n"


def workload(kernel: str) -> str:
    """Name of the function below that runs a kernel.

    Raises:
        KeyError: nothing here runs it.
    """
    for prefix, name in WORKLOADS.items():
        if kernel.startswith(prefix):
            return name
    raise KeyError(f"{kernel}: nothing in {Path(__file__).name} runs it")


# The kernel's name begins so.
WORKLOADS = {
    "vocab_bce": "losses",
    "scan": "statistics",
}


def _inputs(dtype: str) -> Any:
    from pyqe.bench.case import Shape

    model, n = _HALF if dtype == "bf16" else _FLOAT
    return Shape(model, n, dtype, "cuda")


def calls(kernel: str, product: str) -> list[Callable[[], dict[str, Any]]]:
    """What runs the kernel, on inputs made once."""
    from pyqe.bench.suites import head, loss

    shape = _inputs(_DTYPES[product])
    cases = {
        "statistics": [head.softmax_stats, head.sigmoid_stats, head.low_rank_head],
        "losses": [loss.vocabulary_bce, partial(loss.vocabulary_bce, frozen=True)],
    }[workload(kernel)]
    built = [build(shape) for build in cases]
    return [partial(_ours, case.rivals[0].run, case.inputs()) for case in built]


def _ours(run: Callable[..., dict[str, Any]], inputs: tuple[Any, ...]) -> dict[str, Any]:
    import pyqe

    with pyqe.use_backend("triton"):
        return run(*inputs)


def _choose(kernel: str, architecture: str, product: str, entry: Entry) -> None:
    """Make the kernels of this process use a configuration."""
    from pyqe.kernels import common

    common._table()[kernel][architecture][product]["chosen"] = entry
    common._config.cache_clear()


def seconds_of(
    choose: Callable[[Entry], None], runs: list[Callable[[], dict[str, Any]]], options: list[Entry], device: Any
) -> list[float]:
    """Time of each option, the sum over the runs of the medians; infinite where it fails or differs from the first."""
    from pyqe.bench.measure import RIVAL_ERRORS, difference

    expected: list[dict[str, Any]] = []
    times: list[list[list[float]]] = []
    for option in options:
        choose(option)
        try:
            results = [run() for run in runs]
            device.check()
        except RIVAL_ERRORS as error:
            print(f"  {option}: {type(error).__name__}: {error}"[:200])
            times.append([])
            continue
        expected = expected or results
        apart = max((difference(*pair) or 0.0 for pair in zip(results, expected, strict=True)), default=0.0)
        if not apart <= _DIFFERENCE:
            print(f"  {option}: its results differ by {apart:.1e}")
        times.append([[] for _ in runs] if apart <= _DIFFERENCE else [])
    for _ in range(_ROUNDS):  # in turns, as clocks change with the work before
        for option, own in zip(options, times, strict=True):
            choose(option)
            for run, taken in zip(runs if own else [], own, strict=True):
                taken.append(device.seconds(run))
    return [sum(sorted(taken)[len(taken) // 2] for taken in own) if own else float("inf") for own in times]


def tune(table: Table, architecture: str, out: Path) -> None:
    """Measure what has candidates, and write the table after each kernel."""
    import torch

    from pyqe.bench.gpu import Gpu

    device, name = Gpu(), torch.cuda.get_device_name()
    for kernel, product, chosen, options in list(planned(table, architecture)):
        if len(options) == 1:
            continue
        torch.set_float32_matmul_precision("high" if product == "tf32" else "highest")
        times = seconds_of(partial(_choose, kernel, architecture, product), calls(kernel, product), options, device)
        best = options[times.index(min(times))]
        if min(times) == float("inf"):
            best = chosen
        _choose(kernel, architecture, product, best)
        for option, taken in zip(options, times, strict=True):
            print(f"{kernel}, {product}: {1e3 * taken:9.3f} ms  {option}{'  <-' if option is best else ''}", flush=True)
        table[kernel][architecture][product] = {
            "chosen": best,
            "candidates": [option for option in options if option is not best],
        }
        table["note"] = (
            "Block sizes by kernel, architecture and kind of product. Those of "
            f"{architecture} chosen by benchmarks/tune.py on {name}, {date.today().isoformat()}."
        )
        for path in {out, TABLE}:
            path.write_text(text(table), encoding="utf-8")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE, help="a second copy of the table")
    parser.add_argument("--dry-run", action="store_true", help="name the kernels and their candidates")
    arguments = parser.parse_args(words)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if arguments.dry_run:
        for architecture in ("sm_80", "sm_90"):
            for kernel, product, _, options in planned(table, architecture):
                print(f"tune: {kernel}, {architecture}, {product}: {len(options)} configurations on {workload(kernel)}")
        return 0
    import torch

    from pyqe.kernels import common

    tune(table, common._architecture_of(torch.device("cuda")), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
