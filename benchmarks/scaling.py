"""What scoring a corpus takes, by arithmetic: time per million tokens, memory, many GPUs; see docs/scaling.md.

Rates come from results files of ``pyqe bench`` or ``make gpu``, or from data sheets; those are bounds, and marked so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MEASURED = Path(__file__).parent / "results" / "cpu-epyc-avx512.json"
_BYTES = 2  # of a weight or a hidden state in bf16
_BATCH, _STEP = 4096, 16  # rows of a batch of given text, and of a step that generates
_RANKS = (1, 2, 4, 8)
_GPUS = (1, 10, 100, 1000)
_CORPUS = 1e12  # tokens
_LINK = 450e9  # bytes/s in one direction between GPUs of a node, NVLink 4
_EXCHANGED = 8  # float32 numbers that a rank gives for each row: maximum, sums, the token's logit, the largest one's id


@dataclass(frozen=True)
class Model:
    """A language model: V tokens, D dimensions, and parameters beside embedding and head."""

    name: str
    v: int
    d: int
    trunk: float

    @property
    def head_bytes(self) -> float:
        return self.v * self.d * _BYTES


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        name: of the device.
        kind: where the rates come from: "rates measured", "rates given" or "bound, not measured".
        is_gpu: it may stand in a cluster.
        matmul: operations of a square bf16 product.
        scan: operations of the softmax statistics, 2 N V D of them, on a batch.
        read: bytes of weights that the statistics of few rows read.
        gather: bytes of weights and hidden states that the logits of single tokens read.
    """

    name: str
    kind: str
    is_gpu: bool
    matmul: float
    scan: float
    read: float
    gather: float


# Llama 3.1 8B and 70B: 8.03e9 and 70.55e9 parameters, two of its matrices V x D
MODELS = (
    Model("8B", 128256, 4096, 8.03e9 - 2 * 128256 * 4096),
    Model("70B", 128256, 8192, 70.55e9 - 2 * 128256 * 8192),
)


def from_two(name: str, tflops: float, bandwidth: float, kind: str = "bound, not measured") -> Rates:
    """A GPU of which dense bf16 TFLOP/s and TB/s are known, those of a data sheet for example."""
    return Rates(name, kind, True, tflops * 1e12, tflops * 1e12, bandwidth * 1e12, bandwidth * 1e12)


SHEETS = (
    from_two("H100 SXM", 989, 3.35),
    from_two("H200", 989, 4.8),
    from_two("A100 80 GB", 312, 2.04),
)


def from_results(path: Path) -> Rates:
    """Rates that ``pyqe bench`` or ``make gpu`` has measured.

    Raises:
        ValueError: a case is missing.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    machine = found["machine"]
    name = machine["gpu"]["name"] if "gpu" in machine else f"{machine['processor']}, {machine['cpu']['count']} cores"
    scans = _cases(found, "softmax stats")
    return Rates(
        name,
        "rates measured",
        "gpu" in machine,
        found["ceilings"]["matmul_gflop_s"]["bf16"] * 1e9,
        scans[-1]["gflop_s"] * 1e9,
        scans[0]["gb_s"] * 1e9,
        _cases(found, "token logits")[-1]["gb_s"] * 1e9,
    )


def _cases(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """What pyqe did in bf16, by number of rows."""
    cases = [
        (case["n"], rival)
        for case in results["cases"]
        if case["suite"] == "head" and case["name"].startswith(name) and case["dtype"] == "bf16"
        for rival in case["rivals"]
        if rival["rival"] == "pyqe" and rival["missing"] is None
    ]
    if not cases:
        raise ValueError(f"no case {name!r} of suite 'head' in bf16")
    return [rival for _, rival in sorted(cases, key=lambda case: case[0])]


# --- tables


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def heads() -> str:
    """What a head is."""
    rows = [["", *(model.name for model in MODELS)]]
    lines = {
        "V x D": lambda m: f"{m.v:,} x {m.d:,}",
        "weights in bf16, GB": lambda m: number(m.head_bytes / 1e9),
        "a scan, GFLOP a token (2 V D)": lambda m: number(2 * m.v * m.d / 1e9),
        "the layers below, GFLOP a token": lambda m: number(2 * m.trunk / 1e9),
        "a scan beside the layers": lambda m: f"{m.v * m.d / m.trunk:.1%}",
        "the token's own logit, KB a token (4 D)": lambda m: number(4 * m.d / 1e3),
        f"float32 logits of {_BATCH} rows, which are not written, GB": lambda m: number(4 * _BATCH * m.v / 1e9),
        "Sigmoid Head of rank 24 in float32, MB": lambda m: number(4 * 24 * (m.v + m.d) / 1e6),
    }
    rows += [[name, *(line(model) for model in MODELS)] for name, line in lines.items()]
    return markdown(rows)


def costs(devices: Sequence[Rates]) -> str:
    """Seconds of a device for a million tokens."""
    rows = [["device seconds per million tokens", "model", "layers below", "a scan", "quality alone"]]
    for device in devices:
        for model in MODELS:
            seconds = (2 * model.trunk / device.matmul, scan_seconds(model, device), 4 * model.d / device.gather)
            label = f"{device.name} ({device.kind})"
            rows.append([label, model.name, *(number(1e6 * second) for second in seconds)])
    return markdown(rows)


def scan_seconds(model: Model, device: Rates, rows: int = _BATCH, ranks: int = 1) -> float:
    """Seconds that a scan takes for a row of a batch on one of ``ranks`` that share the vocabulary."""
    operations = 2 * model.v * model.d / ranks / device.scan
    return max(operations, model.head_bytes / ranks / device.read / rows)


def clusters(devices: Sequence[Rates]) -> str:
    """Time of a corpus on many devices."""
    rows = [[f"hours for {_CORPUS:.0e} tokens, layers and a scan", "model", *(f"{count:,}" for count in _GPUS)]]
    for device in devices:
        for model in MODELS:
            hours = _CORPUS * (2 * model.trunk / device.matmul + scan_seconds(model, device)) / 3600
            rows.append([f"{device.name} ({device.kind})", model.name, *(number(hours / count) for count in _GPUS)])
    return markdown(rows)


def shared_vocabulary(device: Rates) -> str:
    """A head whose rows are shared by several devices."""
    head = ["ranks", "model", "weights a rank, GB", f"scan of {_STEP} rows, us", f"of {_BATCH} rows, ms"]
    rows = [[*head, f"exchange for {_BATCH} rows, KB a rank", "us on the link", "may take, us"]]
    for model in MODELS:
        for ranks in _RANKS:
            few = [scan_seconds(model, device, _STEP, n) * _STEP for n in (1, ranks)]
            batch = scan_seconds(model, device, _BATCH, ranks) * _BATCH
            exchanged = 2 * (ranks - 1) / ranks * _BATCH * _EXCHANGED * 4  # of a ring
            link = number(1e6 * exchanged / _LINK) if ranks > 1 else "-"
            allowed = number(1e6 * (few[0] - few[1])) if ranks > 1 else "-"
            sizes = (model.head_bytes / ranks / 1e9, 1e6 * few[1], 1e3 * batch, exchanged / 1e3)
            rows.append([str(ranks), model.name, *map(number, sizes), link, allowed])
    return markdown(rows)


def plan(devices: Sequence[Rates]) -> str:
    """All tables; the last one for the first GPU."""
    gpus = [device for device in devices if device.is_gpu]
    shared = gpus[0]
    parts = {
        "Heads": heads(),
        "Cost": costs(devices),
        "Many GPUs": clusters(gpus),
        f"A vocabulary shared by ranks: {shared.name} ({shared.kind})": shared_vocabulary(shared),
    }
    return "\n\n".join(f"**{title}**\n\n{table}" for title, table in parts.items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, action="append", help="file of `pyqe bench --json` or `make gpu`")
    parser.add_argument("--matmul-tflops", type=float, help="a GPU's rate of bf16 products that you have measured")
    parser.add_argument("--bandwidth", type=float, help="its memory's rate in TB/s, with --matmul-tflops")
    options = parser.parse_args(arguments)
    if (options.matmul_tflops is None) != (options.bandwidth is None):
        parser.error("--matmul-tflops and --bandwidth go together")
    devices = [from_results(path) for path in options.results or [_MEASURED]]
    if options.matmul_tflops is None:
        devices += SHEETS
    else:
        devices.append(from_two("this GPU", options.matmul_tflops, options.bandwidth, "rates given"))
    print(plan(devices))


if __name__ == "__main__":
    main()
