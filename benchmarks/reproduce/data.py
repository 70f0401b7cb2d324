"""What the scripts beside this one share: the folder of real data, and published figures beside computed ones.

Results are figures only; none of the data is copied into them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyqe._files import atomic_path


class MissingDataError(Exception):
    """The data is not here; the message says what is missing."""


def data_path(name: str) -> Path:
    """A file or folder of the real data.

    Args:
        name: inside the folder that the environment variable PYQE_DATA names, such as ``plaut_msp/zero_shot.npz``.

    Raises:
        MissingDataError: PYQE_DATA is not set, or names a folder without it.
    """
    folder = os.environ.get("PYQE_DATA")
    if not folder:
        raise MissingDataError(f"PYQE_DATA is not set: expected the folder of real data, with {name} in it")
    path = Path(folder) / name
    if not path.exists():
        raise MissingDataError(f"{path} is missing; PYQE_DATA is {folder}")
    return path


@dataclass(frozen=True)
class Figure:
    """One computed figure.

    Args:
        name: what it is of.
        computed: the figure, as it is printed.
        published: what it should be, as printed; empty where there is nothing to hold it to.
        holds: whether it is.
    """

    name: str
    computed: str
    published: str = ""
    holds: bool = True


@dataclass
class Reproduction:
    """Computed figures, held to published ones or to bars.

    Args:
        title: first line of the table.
        setting: everything that fixes the figures: method, seeds, data.

    Example:
        >>> result = Reproduction("example", {"bins": 10})
        >>> result.printed("AUROC", "76.1", 76.08)
        >>> result.within("temperature", 2.61, 2.633, 0.01)
        >>> [figure.holds for figure in result.figures]
        [True, False]
    """

    title: str
    setting: Mapping[str, Any] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)

    def printed(self, name: str, published: str, computed: float) -> None:
        """A figure that must be the published one to its printed digit."""
        decimals = len(published.partition(".")[2])
        text = f"{computed:.{decimals}f}"
        same = math.isfinite(computed) and float(text) == float(published)
        self.figures.append(Figure(name, text, published, same))

    def within(self, name: str, expected: float, computed: float, tolerance: float, digits: int = 4) -> None:
        """A figure that must be as expected but for ``tolerance``."""
        holds = abs(computed - expected) <= tolerance
        self.figures.append(Figure(name, f"{computed:.{digits}f}", f"{expected:g} +-{tolerance:g}", holds))

    def bar(self, name: str, computed: str, condition: str, holds: bool) -> None:
        """A figure that must meet a condition, given in words."""
        self.figures.append(Figure(name, computed, condition, holds))

    def note(self, name: str, computed: str) -> None:
        """A figure that is held to nothing."""
        self.figures.append(Figure(name, computed))

    def table(self) -> str:
        """One line a figure; what does not hold is marked."""
        widths = [max([len(str(getattr(figure, key))) for figure in self.figures] or [0]) for key in _COLUMNS]
        lines = [self.title, *(f"  {key}: {value}" for key, value in self.setting.items()), ""]
        header = ["", "computed", "published"]
        widths = [max(width, len(title)) for width, title in zip(widths, header, strict=True)]
        for row in [header, *([getattr(figure, key) for key in _COLUMNS] for figure in self.figures)]:
            cells = f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}"
            lines.append(cells.rstrip())
        for number, figure in enumerate(self.figures):
            if not figure.holds:
                lines[number - len(self.figures)] += "  MISMATCH"
        wrong = sum(not figure.holds for figure in self.figures)
        held = sum(bool(figure.published) for figure in self.figures)
        return "\n".join([*lines, "", f"{held - wrong} of {held} as published"])

    def save(self, path: Path) -> None:
        """JSON: title, setting and figures."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


_COLUMNS = ("name", "computed", "published")


def main(reproduce: Callable[[], Reproduction], description: str, arguments: list[str] | None = None) -> int:
    """The command of a script: prints the table and writes the JSON.

    Returns:
        The exit code: 1 if a figure is not as published, 2 if the data is missing.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("-o", "--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args(arguments)
    try:
        result = reproduce()
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    print(result.table())
    if options.output is not None:
        result.save(options.output)
    return int(not all(figure.holds for figure in result.figures))
