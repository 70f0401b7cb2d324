"""Files that are either whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; renamed to ``path`` at the end, removed if that is not reached.

    A link stays one: the file behind it is replaced. A device or pipe cannot be renamed to and is written in place.

    Raises:
        OSError: the folder is missing or cannot be written, the disk is full; ``path`` is left as it was.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield Path(path)  # /dev/stdout may lead to a pipe, which has no name of its own
        return
    target = Path(os.path.realpath(path))
    # Not tempfile, whose files only their owner can read
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
