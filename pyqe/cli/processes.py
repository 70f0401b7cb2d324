"""The processes of a torchrun job, as its environment describes them."""

from __future__ import annotations

import os
import pickle
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

Value = TypeVar("Value")

_PAUSE = 0.2  # seconds between two looks into the store
_MOST_BYTES = 4 << 20  # of a value in the store, which takes twice as much
_PATIENCE = timedelta(days=7)  # with the slowest process; torchrun ends all of them when one fails


def size_of_job() -> int:
    """Number of processes; 1 outside a job."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_restarted_by_torchrun() -> bool:
    """Whether torchrun starts this process again after any exit code but 0, or has done so."""
    return "RANK" in os.environ and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def local_device(device: str) -> str:
    """The GPU that is this process's own, where any GPU of a job would do."""
    if size_of_job() == 1 or device not in ("auto", "cuda"):
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


class Processes:
    """All processes of the job that this one is in, or this one alone.

    They leave values for each other in the job's store, where what the processes left is still there that torchrun has
    ended. So each takes a new name, and what is meant for it carries that.

    Attributes:
        size: how many there are.
        rank: which of them this is.
    """

    def __init__(self) -> None:
        self.size = size_of_job()
        self.rank = int(os.environ["RANK"]) if self.size > 1 else 0
        self._store: Any = _job_store() if self.size > 1 else None
        self._names = [secrets.token_hex(16)]  # of the others too, in the first process

    def share(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, for all; it waits for them."""
        if self.size == 1:
            return make()
        if self.rank > 0:
            return cast(Value, self._wait_for_shared())
        others = [f"name-{rank}" for rank in range(1, self.size)]
        for key in others:
            self._store.delete_key(key)  # of a process that has ended; one that lives says it again
        value = make()
        self._names += [self._store.get(key).decode() for key in others]
        data = pickle.dumps(value)
        pieces = [data[start : start + _MOST_BYTES] for start in range(0, len(data), _MOST_BYTES)]
        for number, piece in enumerate(pieces):
            self._store.set(f"{self._names[0]}-{number}", piece)
        for name in self._names[1:]:
            self._store.set(f"shared-{name}", f"{self._names[0]} {len(pieces)}")
        return value

    def _wait_for_shared(self) -> Any:
        while not self._store.check([f"shared-{self._names[0]}"]):
            self._store.set(f"name-{self.rank}", self._names[0])
            time.sleep(_PAUSE)
        first, count = self._store.get(f"shared-{self._names[0]}").decode().split()
        return pickle.loads(b"".join(self._store.get(f"{first}-{number}") for number in range(int(count))))

    def gather(self, value: Value) -> list[Value] | None:
        """The values of all processes, when all have come here; None for any but the first."""
        if self.size == 1:
            return [value]
        if self.rank > 0:
            self._store.set(f"gathered-{self._names[0]}", pickle.dumps(value))
            return None
        return [value, *(pickle.loads(self._store.get(f"gathered-{name}")) for name in self._names[1:])]


def _job_store() -> Any:
    """A store that all processes reach: torchrun's, which needs no connections between them as a process group does."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    store.set_timeout(_PATIENCE)
    return store
