"""A corpus in shards: consecutive rows that are scored together, into a part that is there when it is whole.

A part that is there twice is the same twice, so a shard may be done again by anyone, after a crash for example: the
output has one row for each row of the input, whoever did what.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from pyqe._files import atomic_path
from pyqe.cli import parquet
from pyqe.cli.rows import SUFFIXES, Check, Row, form_of_file, rows_of_lines

_MOST_TRIES = 4  # of a shard in a run: rows that kill every worker must not do so for ever


def file_state(path: str) -> tuple[str, int, int]:
    """Name, size and time of a file: another state means that it was written again."""
    found = os.stat(path)
    return path, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of a file.

    Attributes:
        number: its place in the corpus, from 0.
        name: the file, as it was found.
        path: the same, from anywhere.
        form: of the file.
        first: number of the first row in the file, from 1.
        rows: how many there are.
        offset: where the first row starts in a file of lines, in bytes.
    """

    number: int
    name: str
    path: str
    form: str
    first: int
    rows: int
    offset: int

    def lines(self, name: str, check: Check) -> Iterator[Row]:
        """The rows of a file of lines; see :func:`pyqe.cli.rows.read_rows`."""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            yield from rows_of_lines(islice(stream, self.rows), self.first, self.form, name, check)

    def table(self) -> Any:
        """The rows of a Parquet file, with all columns."""
        return parquet.read_table(self.path, self.first - 1, self.rows)


def find_files(source: str) -> list[str]:
    """Files of a corpus by name: one, those of a folder, or those that a pattern such as "a/*.jsonl" fits.

    Raises:
        FileNotFoundError: there are none.
    """
    if os.path.isfile(source):
        return [source]
    if os.path.isdir(source):
        names = (name for name in os.listdir(source) if not name.startswith((".", "_")))  # which others hide, too
        paths = [os.path.join(source, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
    else:
        paths = glob.glob(source, recursive=True)
    files = sorted(path for path in paths if os.path.isfile(path))
    if not files:
        raise FileNotFoundError(f"{source}: no file, no folder with files named {', '.join(SUFFIXES)}, no pattern")
    return files


def cut(files: Sequence[str], form: str, size: int) -> list[Shard]:
    """Shards of ``size`` rows, less at the end of a file; at least one.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no Parquet.
    """
    shards: list[Shard] = []
    for path in files:
        found = form_of_file(path, form)
        for first, rows, offset in (_spans_of_table if found == "parquet" else _spans_of_lines)(path, size):
            shards.append(Shard(len(shards), path, os.path.abspath(path), found, first, rows, offset))
    return shards or [Shard(0, path, os.path.abspath(path), found, 1, 0, 0)]  # a corpus without rows has a result too


def _spans_of_table(path: str, size: int) -> Iterator[tuple[int, int, int]]:
    count = parquet.count_rows(path)
    for start in range(0, count, size):
        yield start + 1, min(size, count - start), 0


def _spans_of_lines(path: str, size: int) -> Iterator[tuple[int, int, int]]:
    first, offset = 1, 0
    with open(path, "rb") as stream:
        while lengths := [len(line) for line in islice(stream, size)]:
            yield first, len(lengths), offset
            first, offset = first + len(lengths), offset + sum(lengths)


def parts_folder(output: str) -> Path:
    """Where parts of the output are, until all are there."""
    target = Path(output).resolve()  # a link stays one
    return target.with_name(target.name + ".parts")


class Parts:
    """The folder ``OUTPUT.parts``: a part for each shard, and in ``_pyqe`` what was asked for and which are done.

    As a context manager it says, after an error, that it is there.

    Args:
        output: where everything goes in the end: a folder, if it is one or its name ends with "/", else a file.
        form: "jsonl" or "parquet".

    Raises:
        FileExistsError: the output is a folder with something in it.
    """

    def __init__(self, output: str, form: str) -> None:
        self._is_folder = output.endswith("/") or os.path.isdir(output)
        self._target = Path(output).resolve()
        if self._is_folder and self._target.is_dir() and any(self._target.iterdir()):
            raise FileExistsError(f"{output}: the folder has something in it already")
        if self._is_folder and self._target.exists() and not self._target.is_dir():
            raise FileExistsError(f"{output}: a file has this name")
        self.folder = parts_folder(output)
        self._form = form

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            click.echo(f"pyqe: what is done so far is in {self.folder}; --resume goes on from there", err=True)

    @property
    def _state(self) -> Path:
        return self.folder / "_pyqe"  # readers of data sets pass over names that begin so

    def begin(self, plan: dict[str, Any], *, resume: bool, restarting: bool = False) -> None:
        """Make the folder; with ``resume``, and ``restarting`` the same plan, keep what an earlier run has put there.

        Raises:
            FileExistsError: another folder has this name.
            ValueError: the run that is to be resumed was another one.
        """
        plan = json.loads(json.dumps(plan))  # as it is in the file
        saved = self._state / "plan.json"
        if saved.exists():
            before = json.loads(saved.read_text(encoding="utf-8"))
            differing = [name for name in plan if before.get(name) != plan[name]]
            if resume and differing:
                raise ValueError(
                    f"{self.folder}, of an earlier run, has not the same {', '.join(differing)}: remove it"
                )
            if resume or (restarting and not differing):
                for path in self._state.glob("*.tries"):
                    path.unlink()
                return
            shutil.rmtree(self.folder)
        elif self.folder.exists() and any(path.name != "_pyqe" for path in self.folder.iterdir()):
            raise FileExistsError(f"{self.folder}: in the way, and not of an earlier run")
        self._state.mkdir(parents=True, exist_ok=True)
        with atomic_path(saved) as path:
            path.write_text(json.dumps(plan), encoding="utf-8")

    def attempt(self, number: int) -> None:
        """Note that a shard is begun.

        Raises:
            RuntimeError: it has been so often, and each time ended the process: out of memory, for example.
        """
        with self._mark(number).with_suffix(".tries").open("ab") as stream:
            if stream.tell() >= _MOST_TRIES:
                raise RuntimeError(f"{self._part(number).name}: begun {_MOST_TRIES} times; does it end its process?")
            stream.write(b".")

    def write(self, number: int, pieces: Sequence[Any], counts: dict[str, int]) -> None:
        """Write a shard's results, bytes or tables, and note what they are.

        Raises:
            OSError: the disk is full, for example.
        """
        with atomic_path(self._part(number)) as path:
            if self._form == "parquet":
                parquet.write_table(pieces, path)
            else:
                path.write_bytes(b"".join(pieces))
        with atomic_path(self._mark(number)) as path:
            path.write_text(json.dumps(counts), encoding="utf-8")

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.{self._form}"

    def finished(self, number: int) -> dict[str, int] | None:
        """What was noted of a shard, if its part is whole."""
        mark = self._mark(number)
        return json.loads(mark.read_text(encoding="utf-8")) if mark.exists() and self._part(number).exists() else None

    def _mark(self, number: int) -> Path:
        return self._state / f"{number:06d}.json"

    def finish(self, count: int) -> None:
        """Make the output of all parts, in the order of the input, and remove the folder.

        Raises:
            RuntimeError: a part is missing.
        """
        missing = [number for number in range(count) if self.finished(number) is None]
        if missing:
            raise RuntimeError(f"{self.folder}: {len(missing)} parts are missing, the first is {missing[0]}")
        paths = [self._part(number) for number in range(count)]
        if self._is_folder:
            if self._form == "parquet":
                parquet.make_alike(paths)
            for path in self.folder.glob(".*.tmp"):  # of a process that was killed
                path.unlink(missing_ok=True)
            os.rename(self.folder, self._target)
            shutil.rmtree(self._target / "_pyqe")
            return
        with atomic_path(self._target) as whole:
            if self._form == "parquet":
                parquet.join(paths, whole)
            else:
                with whole.open("wb") as stream:
                    for path in paths:
                        with path.open("rb") as part:
                            shutil.copyfileobj(part, stream, 1 << 20)
        shutil.rmtree(self.folder)
