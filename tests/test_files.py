"""Files that are either whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyqe._files import atomic_path


def write_half(target: Path) -> None:
    with atomic_path(target) as path:
        path.write_text("half")
        raise OSError("full")


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(OSError, match="full"):
        write_half(target)
    assert (target.read_text(), os.listdir(tmp_path)) == ("old", ["file"])


def test_a_link_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(target)
    with atomic_path(link) as path:
        path.write_text("new")
    assert (target.read_text(), link.is_symlink()) == ("new", True)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd")
def test_a_pipe_is_written_in_place() -> None:
    source, sink = os.pipe()
    with atomic_path(f"/dev/fd/{sink}") as path:
        path.write_text("new")
    os.close(sink)
    assert os.read(source, 8) == b"new"
    os.close(source)
