"""The command of the study; see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a folder
    sys.path.insert(0, str(ROOT))

from benchmarks.reproduce.data import MissingDataError, data_path  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 2 if data or model are missing."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description="How good a Sigmoid Head's scores are.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality", help="what a killed run goes on from")
    parser.add_argument("--limit", type=int, help="sentences of each file, for a quick pass")
    parser.add_argument("--seeds", type=int, default=3, help="how often the chosen recipe is trained")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    options = parser.parse_args(arguments)
    try:
        for name in ("realec", "mlqe_pe", "blimp", "text"):  # before anything slow
            data_path(name)
        results = _results(options)
    except (MissingDataError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    from benchmarks.quality.report import write

    write(results, options.output)
    print(options.output / "report.md")
    return 0


def _results(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks.quality.recipes import recipes
    from benchmarks.quality.states import LanguageModel
    from benchmarks.quality.study import Settings, run
    from pyqe.cli.options import load_model
    from pyqe.demo import LM_NAME

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    lm = LanguageModel(LM_NAME, *load_model("smollm2", "bfloat16", "cpu"))
    return run(lm, Settings(options.work, options.limit, options.seeds), recipes(options.seeds))


if __name__ == "__main__":
    sys.exit(main())
