"""The processes of a torchrun job, as its environment describes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

Value = TypeVar("Value")

_PATIENCE = timedelta(days=7)  # with the slowest process; torchrun ends all of them when one fails


def size_of_job() -> int:
    """Number of processes; 1 outside a job."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_device(device: str) -> str:
    """The GPU that is this process's own, where any GPU of a job would do."""
    if size_of_job() == 1 or device not in ("auto", "cuda"):
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


class Processes:
    """All processes of the job that this one is in, or this one alone. A context manager.

    Attributes:
        size: how many there are.
        rank: which of them this is.
        restarted: torchrun has started the job again.
        restarting: torchrun may start the job again, which it does after any exit code but 0.
    """

    def __init__(self) -> None:
        self.size = size_of_job()
        self.rank = int(os.environ["RANK"]) if self.size > 1 else 0
        self.restarted = self.size > 1 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        self.restarting = self.size > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0

    def __enter__(self) -> Processes:
        if self.size > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def share(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, for all."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        values: list[Any] = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(values)
        return cast(Value, values[0])

    def gather(self, value: Value) -> list[Value] | None:
        """The values of all processes, when all have come here; None for any but the first."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values
