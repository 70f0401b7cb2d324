"""The whole verdict on a machine with a GPU: build, conformance, sanitizer, benchmarks; see docs/benchmarks.md.

A step after the build that has succeeded is not done again by the next run into the same folder, and the benchmarks go
on with the cases that are missing, so a run that was cut off loses little.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_LOST = 75  # exit code of `pyqe bench` after an error that only a new process gets over
_MOST_RESTARTS = 5
_WORKERS = 8  # of pytest, where pytest-xdist is installed: compiling kernels is most of the work
_LAST_CASE = 45.0  # seconds for a case that has started when the budget ends
_TAIL_LINES = 15


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "ok", "failed", "timed out" or "skipped", and what there is to say."""

    status: str
    message: str = ""


@dataclass(frozen=True)
class Step:
    """A part of the run.

    Args:
        name: also that of its log.
        run: does the work within the seconds it is given.
        limit: seconds at the most.
        always: even if it has succeeded before: the folder may have come from another machine.
    """

    name: str
    run: Callable[[float], Outcome]
    limit: float
    always: bool = False


class Run:
    """A run into a folder: ``gpu.json``, ``gpu.md`` and a log for each step."""

    def __init__(self, arguments: argparse.Namespace, wheels: Path | None) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.report = self.out / "gpu.json"
        if arguments.fresh:
            self.report.unlink(missing_ok=True)
        paths = [str(ROOT), *([str(wheels)] if wheels else []), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.deadline = time.monotonic() + 60 * arguments.minutes

    # --- state

    def read(self) -> dict[str, Any]:
        return json.loads(self.report.read_text(encoding="utf-8")) if self.report.exists() else {}

    def note(self, step: Step, outcome: Outcome, seconds: float) -> None:
        state = self.read()
        state.setdefault("steps", {})[step.name] = {**vars(outcome), "seconds": round(seconds, 1)}
        temporary = self.report.with_suffix(".tmp")
        temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.report)

    # --- steps

    def steps(self) -> Iterator[Step]:
        yield Step("build", self._build, 240, always=True)
        if self.arguments.dry_run:
            yield Step("compile", self._compile, 1800)
            yield Step("list", self._list, 120, always=True)
            return
        yield Step("conformance", self._conformance, 180)
        yield Step("sanitize", self._sanitize, 75)
        yield Step("bench", self._bench, float("inf"))
        if self.arguments.tune:
            yield Step("tune", self._tune, float("inf"))

    def call(self, name: str, seconds: float, *command: str, **environment: str) -> Outcome:
        """Run a command with its output in the step's log, and end it with all its children when time is over."""
        with (self.out / f"{name}.log").open("a", encoding="utf-8") as log:
            print("$", *command, file=log, flush=True)
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(max(seconds, 1.0))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Outcome("timed out", f"after {seconds:.0f} s")
        return Outcome("ok") if code == 0 else Outcome("failed", f"exit code {code}")

    def python(self, name: str, seconds: float, *arguments: str, **environment: str) -> Outcome:
        return self.call(name, seconds, sys.executable, *arguments, **environment)

    def _build(self, seconds: float) -> Outcome:
        end = time.monotonic() + seconds
        outcome = self.python("build", seconds, "setup.py", "build_ext", "--inplace", PYQE_CUDA="on")
        if outcome.status == "ok":
            outcome = self.python("build", end - time.monotonic(), "-c", "import pyqe._C, pyqe._cuda")
        return outcome

    def _compile(self, seconds: float) -> Outcome:
        """Every kernel for every architecture, without a GPU."""
        tests = [f"tests/test_{name}.py" for name in ("triton", "triton_losses", "cuda")]
        return self.python("compile", seconds, "-m", "pytest", *tests, "-k", "compile or nvcc or one_order")

    def _list(self, seconds: float) -> Outcome:
        outcome = self.python("list", seconds, *self._bench_command(), "--list")
        if outcome.status == "ok":
            outcome = self.python("list", seconds, "benchmarks/tune.py", "--dry-run")
        if outcome.status == "ok":
            print((self.out / "list.log").read_text(encoding="utf-8"))
        return outcome

    def _conformance(self, seconds: float) -> Outcome:
        workers = ["-n", str(min(_WORKERS, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        tests = ["tests/test_conformance.py", "tests/test_gpu.py"]
        return self.python("conformance", seconds, "-m", "pytest", *tests, "-k", "triton or cuda", *workers)

    def _sanitize(self, seconds: float) -> Outcome:
        """Every operator once: reads and writes out of bounds, then races in shared memory (CUDA kernels alone)."""
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(tool).exists():
            return Outcome("skipped", "compute-sanitizer is not installed")
        end = time.monotonic() + seconds
        for check, backends in (("memcheck", "triton or cuda"), ("racecheck", "cuda")):
            outcome = self.call(
                "sanitize",
                end - time.monotonic(),
                *(tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-x"),
                *("tests/test_gpu.py", "-k", f"every_operator and ({backends})"),
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # or a read beyond a tensor would end in torch's own memory
            )
            if outcome.status != "ok":
                return Outcome(outcome.status, f"{check}: {outcome.message}")
        return outcome

    def _bench_command(self) -> list[str]:
        return ["-m", "pyqe", "bench", *self.arguments.suites, "--device", "cuda"]

    def _bench(self, seconds: float) -> Outcome:
        end = time.monotonic() + seconds
        for _ in range(_MOST_RESTARTS):
            left = end - time.monotonic()
            budget = f"{max(left - _LAST_CASE, 1.0):.0f}"
            files = ("--json", str(self.report), "--page", str(self.out / "gpu.md"))
            options = (*files, "--resume", "--budget", budget)
            outcome = self.python("bench", left, *self._bench_command(), *options)
            if outcome.message != f"exit code {_LOST}":
                break
        if outcome.status == "ok" and not self.read().get("complete"):
            return Outcome("timed out", "not all cases have run; the same command goes on with them")
        return outcome

    def _tune(self, seconds: float) -> Outcome:
        return self.python("tune", seconds, "benchmarks/tune.py", "--out", str(self.out / "configs.json"))

    # --- the whole

    def __call__(self) -> int:
        wanted = list(self.steps())
        for step in wanted:
            self._do(step)
        steps = self.read()["steps"]
        print()
        for step in wanted:
            found = steps[step.name]
            print(f"{step.name:12} {found['status']:10} {found['seconds']:7.1f} s  {found['message']}")
        return int(any(steps[step.name]["status"] in ("failed", "timed out") for step in wanted))

    def _do(self, step: Step) -> None:
        if self.read().get("steps", {}).get(step.name, {}).get("status") == "ok" and not step.always:
            print(f"{step.name}: done before", flush=True)
            return
        print(f"{step.name} ...", flush=True)
        start = time.monotonic()
        left = self.deadline - start
        log = self.out / f"{step.name}.log"
        log.unlink(missing_ok=True)
        outcome = step.run(min(step.limit, left)) if left > 1 else Outcome("timed out", "no time was left for it")
        self.note(step, outcome, time.monotonic() - start)
        if outcome.status in ("failed", "timed out") and log.exists():
            print(*log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:], sep="\n")


def _install(wheels: Path, target: Path) -> None:
    """Unpack the rivals' wheels; what they need beside torch and Triton has to be there already."""
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    if not files:
        raise SystemExit(f"--wheels: expected wheels in {wheels}, found none")
    options = ["--no-index", "--no-deps", "--quiet", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="rivals to install beside what is there")
    parser.add_argument("--suites", nargs="+", default=[], help="of `pyqe bench`; default all")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; default 9")
    parser.add_argument("--tune", action="store_true", help="also choose the Triton kernels' configurations anew")
    parser.add_argument("--fresh", action="store_true", help="do again what was done before")
    parser.add_argument("--dry-run", action="store_true", help="build, compile and list, without a GPU")
    arguments = parser.parse_args(words)
    if arguments.dry_run:
        arguments.minutes = float("inf")
    return arguments


def main(words: list[str] | None = None) -> int:
    arguments = _arguments(words)
    with tempfile.TemporaryDirectory() as folder:
        wheels = None
        if arguments.wheels is not None:
            wheels = Path(folder)
            _install(arguments.wheels, wheels)
        return Run(arguments, wheels)()


if __name__ == "__main__":
    sys.exit(main())
