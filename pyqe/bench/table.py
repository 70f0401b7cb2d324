"""Reports as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HEADINGS = (
    "",
    "median",
    "quartiles",
    "x pyqe",
    "x matmul",
    "GFLOP/s",
    "of matmul",
    "GB/s",
    "of read",
    "of copy",
    "memory",
    "of logits",
    "differs",
    "result",
)
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def machine_lines(report: dict[str, Any]) -> list[str]:
    """What the figures were taken on."""
    machine, limits = report["machine"], report["ceilings"]
    cpu = machine["cpu"]
    rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in limits["matmul_gflop_s"].items())
    bandwidth = (
        f"copy {limits['copy_gb_s']:.0f} GB/s (read and written)"
        if "copy_gb_s" in limits
        else f"memory read {limits['read_gb_s']:.1f} GB/s"
    )
    return [
        *_gpu_lines(machine),
        f"{machine['processor']}, {cpu['torch_threads']} threads of {cpu['count']}, "
        f"load {machine['load_average']:.1f} before; AMX {'present' if machine['amx_bf16'] else 'not present'}",
        f"instructions: {cpu.get('instruction_set', 'none')} in use; {', '.join(cpu.get('features', ()))}",
        f"pyqe {machine['pyqe']}, torch {machine['packages']['torch']}, Python {machine['python']}, "
        f"{machine['platform']}",
        f"ceilings now: {bandwidth}; matmul {rates}",
    ]


def _gpu_lines(machine: dict[str, Any]) -> list[str]:
    if "gpu" not in machine:
        return []
    gpu = machine["gpu"]
    state = ", ".join(f"{name} {value}" for name, value in gpu["state"].items())
    return [
        f"{gpu['name']} ({gpu['capability']}), {gpu['multiprocessors']} multiprocessors, {gpu['memory_gib']} GiB, "
        f"L2 {gpu['l2_mib']} MiB; CUDA {gpu['cuda']}, Triton {machine['packages']['triton'] or 'none'}",
        *([state] if state else []),
    ]


def case_lines(case: dict[str, Any]) -> list[str]:
    """A case: its title, a table of the rivals measured, and the names of those that are missing."""
    measured = [row for row in case["rivals"] if row["missing"] is None]
    rows = [_cells(row) for row in measured]
    lines = [_title(case)]
    if rows:
        lines += [f"  {line}" for line in _aligned([_HEADINGS, *rows])]
    lines += [f"  {row['rival']}: missing: {row['missing']}" for row in case["rivals"] if row["missing"]]
    notes = [f"{row['rival']}: {row['note']}" for row in measured if row["note"]]
    return [*lines, *([f"  {'; '.join(notes)}"] if notes else [])]


def _title(case: dict[str, Any]) -> str:
    shape = [str(case[name]) for name in ("model", "dtype") if case.get(name)]
    shape += [f"{name.upper()} {case[name]}" for name in ("n", "d", "v") if case.get(name)]
    return f"{case['suite']}, {case['name']} ({case['description']}): {', '.join(shape)}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    backends = "+".join(sorted(set(row["backends"].values())))
    low, middle, high = (seconds_text(row[name]) for name in ("q1", "median", "q3"))
    return (
        f"{row['rival']} [{backends}]" if backends else row["rival"],
        middle,
        f"{low} to {high}",
        _number(row["times_pyqe"], "{:.3g}"),
        _number(row["times_matmul"], "{:.3g}"),
        _number(row["gflop_s"], "{:.4g}"),
        _number(row["of_matmul"], "{:.0%}"),
        _number(row["gb_s"], "{:.3g}"),
        _number(row.get("of_read"), "{:.0%}"),
        _number(row.get("of_copy"), "{:.0%}"),
        _number(row["extra_bytes"], "{:,.1f} MB", 1e-6),
        _number(row["of_logits"], "{:.1%}"),
        _number(row["difference"], "{:.0e}"),
        ", ".join(f"{name} {value:.6g}" for name, value in row["values"].items()),
    )


def seconds_text(seconds: float) -> str:
    """A time in the unit that suits it.

    Example:
        >>> seconds_text(0.0123)
        '12.30 ms'
    """
    scale, unit = next((pair for pair in _UNITS if seconds >= pair[0]), _UNITS[-1])
    return f"{seconds / scale:.2f} {unit}"


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(value * scale)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width, without those that are empty; names to the left, figures to the right."""
    kept = [0, *(i for i in range(1, len(rows[0])) if any(row[i] for row in rows[1:]))]
    widths = {i: max(len(row[i]) for row in rows) for i in kept}
    return ["  ".join(row[i].rjust(widths[i]) if i else row[i].ljust(widths[i]) for i in kept).rstrip() for row in rows]
