"""Chooses the backend of a call: by device, dtype and preference, or as the user says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyqe.backends import cpu, cuda, preferences, reference, triton

ENVIRONMENT_VARIABLE = "PYQE_BACKEND"


class UnservedError(RuntimeError):
    """The backend that was asked for cannot run an operation."""


@dataclass(frozen=True)
class Backend:
    """A set of operations and where they run.

    Args:
        name: what :func:`use_backend` calls it.
        operations: implementation by operation name.
        devices: device types it serves; None for all.
        dtypes: floating dtypes it serves; None for all.
        find_obstacle: says why it cannot be used on this machine, or None; asked when first needed.
    """

    name: str
    operations: Mapping[str, Callable[..., Any]] = field(repr=False)
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    find_obstacle: Callable[[], str | None] = field(default=lambda: None, repr=False)

    @cached_property
    def unavailable(self) -> str | None:
        """Why it cannot be used on this machine, or None."""
        return self.find_obstacle()

    def obstacle(self, operation: str, args: tuple[Any, ...]) -> str | None:
        """Why this backend cannot run the operation with these arguments, tensors and others; None if it can."""
        if operation not in self.operations:
            return f"it has no {operation}"
        for tensor in args:
            if not isinstance(tensor, Tensor) or tensor.dim() == 0:
                continue  # without dimensions it is a number, such as a seed: any device and dtype will do
            if self.devices is not None and tensor.device.type not in self.devices:
                return f"it serves {', '.join(sorted(self.devices))} tensors, got {tensor.device.type}"
            if self.dtypes is not None and tensor.is_floating_point() and tensor.dtype not in self.dtypes:
                return f"it serves {', '.join(sorted(map(str, self.dtypes)))}, got {tensor.dtype}"
        return self.unavailable


_CPU = Backend("cpu", cpu.OPERATIONS, frozenset({"cpu"}), cpu.DTYPES, cpu.unavailable)
_CUDA = Backend("cuda", cuda.OPERATIONS, cuda.DEVICES, cuda.DTYPES, cuda.unavailable)
_TRITON = Backend("triton", triton.OPERATIONS, triton.DEVICES, triton.DTYPES, triton.unavailable)
_REFERENCE = Backend("reference", vars(reference))
# in the order that "auto" tries, unless the table of preferences knows better
_BACKENDS = {backend.name: backend for backend in (_CPU, _CUDA, _TRITON, _REFERENCE)}

_chosen: ContextVar[str | None] = ContextVar("pyqe_backend", default=None)
_served: ContextVar[dict[str, str] | None] = ContextVar("pyqe_served", default=None)


def available_backends() -> Mapping[str, Backend]:
    """All backends by name, in the order in which "auto" tries them; see ``Backend.unavailable``."""
    return _BACKENDS


def _check_name(name: str) -> str:
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(_BACKENDS)}; got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the ``with`` block on one backend.

    Takes precedence over the environment variable ``PYQE_BACKEND``. What the backend cannot serve raises; only
    "auto" looks further.

    Args:
        name: "auto", or a name of :func:`available_backends`.

    Raises:
        ValueError: no such backend.

    Example:
        >>> with use_backend("reference"):
        ...     pass
    """
    token = _chosen.set(_check_name(name))
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def served_by() -> Iterator[dict[str, str]]:
    """Record which backend serves which operation inside the ``with`` block: names by operation.

    Example:
        >>> with use_backend("reference"), served_by() as names:
        ...     _ = torch.ops.pyqe.inverse_softmax(torch.ones(1, 2), 0.0, "none")
        >>> names
        {'inverse_softmax': 'reference'}
    """
    names: dict[str, str] = {}
    token = _served.set(names)
    try:
        yield names
    finally:
        _served.reset(token)


def _preferred(operation: str, args: tuple[Any, ...]) -> Iterator[Backend]:
    """Backends in the order that "auto" tries them."""
    first = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if first is not None and first.device.type == "cuda" and first.dim() > 0:
        yield _BACKENDS[preferences.backend_for(operation, first.shape[0], first.dtype, args)]
    yield from _BACKENDS.values()


def select(operation: str, *args: Any) -> Callable[..., Any]:
    """Implementation of an operation for these arguments.

    Raises:
        UnservedError: the backend that was asked for cannot run it; the message says why.
    """
    name = _chosen.get() or _check_name(os.environ.get(ENVIRONMENT_VARIABLE) or "auto")
    if name == "auto":
        backend = next(b for b in _preferred(operation, args) if b.obstacle(operation, args) is None)
    else:
        backend = _BACKENDS[name]
        obstacle = backend.obstacle(operation, args)
        if obstacle is not None:
            raise UnservedError(f"backend {name!r} cannot run {operation}: {obstacle}")
    served = _served.get()
    if served is not None:
        served[operation] = backend.name
    implementation: Callable[..., Any] = backend.operations[operation]
    return implementation
