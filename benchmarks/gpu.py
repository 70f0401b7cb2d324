"""The whole verdict on a machine with a GPU: build, conformance, sanitizer, benchmarks; see docs/benchmarks.md.

A step after the build that has succeeded is not done again by the next run into the same folder, and the benchmarks go
on with the cases that are missing, so a run that was cut off loses little.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_LOST = 75  # exit code of `pyqe bench` after an error that only a new process gets over
_MOST_RESTARTS = 5
_LAST_CASE = 45.0  # seconds for a case that has started when the budget ends
_TAIL_LINES = 15
# The suite makes Triton compile some 400 variants of its kernels, a second or two each: it is shared among processes.
_MOST_SHARES, _OTHER_PROCESSES = 12, 3  # the others are those of the sanitizer
_GRAVITY = ("ok", "timed out", "failed")
_MODULES = (
    *("torch", "triton", "numpy", "transformers", "safetensors", "huggingface_hub", "jinja2", "markupsafe", "yaml"),
    *("click", "tqdm", "pytest", "setuptools", "pybind11"),
)
_LEAST_VERSIONS = {"setuptools": "77", "pybind11": "3"}  # of what builds; pyproject.toml has them too
_LEAST_CMAKE = "3.25"
_GPU_THERE = "import sys, torch; sys.exit(not torch.cuda.is_available())"
_MODULES_BUILT = "import pyqe._C, pyqe._cuda"
_BACKENDS_THERE = """
import sys
from pyqe.backends import available_backends
obstacles = {name: available_backends()[name].unavailable for name in ("cuda", "triton")}
sys.exit("; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items() if obstacle) or None)
"""
_SUMMARY = re.compile(r"^(?:=+ )?(\d+ \w+(?:, \d+ \w+)*) in \d+\.\d+s", re.MULTILINE)  # pytest's last line


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "ok", "failed", "timed out" or "skipped", and what there is to say. "running" before that."""

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


@dataclass(frozen=True)
class Command:
    """Something to run.

    Args:
        words: program and arguments.
        variables: what it has in its environment beside what all have.
    """

    words: Sequence[str]
    variables: dict[str, str] = field(default_factory=dict)


class Run:
    """A run into a folder: ``gpu.json``, ``gpu.md`` and a log for each step."""

    def __init__(self, arguments: argparse.Namespace, environment: dict[str, str]) -> None:
        self.arguments = arguments
        self.environment = environment
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.report = self.out / "gpu.json"
        if arguments.fresh:
            self.report.unlink(missing_ok=True)
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self._writing = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()

    # --- state

    def read(self) -> dict[str, Any]:
        return json.loads(self.report.read_text(encoding="utf-8")) if self.report.exists() else {}

    def note(self, step: Step, outcome: Outcome, seconds: float = 0.0) -> None:
        with self._writing:
            state = self.read()
            state.setdefault("steps", {})[step.name] = {**vars(outcome), "seconds": round(seconds, 1)}
            temporary = self.report.with_suffix(".tmp")
            temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.report)

    # --- steps

    def stages(self) -> Iterator[list[Step]]:
        """The steps; those of a stage run at the same time. Nothing is measured but the benchmarks, which run alone."""
        if self.arguments.dry_run:
            yield [Step("build", self._build, 1800, always=True)]
            yield [Step("compile", self._compile, 1800)]
            yield [Step("list", self._list, 120, always=True)]
            return
        yield [Step("build", self._build, 150, always=True)]
        yield [
            Step("conformance", self._conformance, 200),
            Step("memcheck", self._memcheck, 200),
            Step("racecheck", self._racecheck, 200),
        ]
        yield [Step("bench", self._bench, float("inf"))]
        if self.arguments.tune:
            yield [Step("tune", self._tune, float("inf"))]

    def call(self, name: str, seconds: float, command: Command) -> Outcome:
        """Run a command with its output in a log, and end it with all its children when time is over."""
        with (self.out / f"{name}.log").open("a", encoding="utf-8") as log:
            print("$", *command.words, file=log, flush=True)
            process = subprocess.Popen(
                command.words,
                cwd=ROOT,
                env={**self.environment, **command.variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._processes.add(process)
            try:
                code = process.wait(max(seconds, 1.0))
            except subprocess.TimeoutExpired:
                return Outcome("timed out")
            finally:
                _end(process)
                self._processes.discard(process)
        return Outcome("ok") if code == 0 else Outcome("failed", f"exit code {code}")

    def python(self, name: str, seconds: float, *arguments: str, **variables: str) -> Outcome:
        return self.call(name, seconds, Command([sys.executable, *arguments], variables))

    def together(self, name: str, seconds: float, commands: Sequence[Command]) -> Outcome:
        """Run pytests at the same time; their outputs follow each other in the step's log, those that failed last."""
        names = [f"{name}-{number}" for number in range(len(commands))]
        with ThreadPoolExecutor(len(commands)) as pool:
            outcomes = list(pool.map(self.call, names, [seconds] * len(names), commands))
        ended = sorted(zip(outcomes, names, strict=True), key=lambda pair: _GRAVITY.index(pair[0].status))
        logs = [self.out / f"{part}.log" for _, part in ended]
        whole = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
        (self.out / f"{name}.log").write_text(whole, encoding="utf-8")
        for log in logs:
            log.unlink()
        worst = ended[-1][0]
        return Outcome(worst.status, ", ".join(filter(None, [worst.message, _counted(whole)])))

    def _build(self, seconds: float) -> Outcome:
        end = time.monotonic() + seconds
        outcome = self.python("build", seconds, "setup.py", "build_ext", "--inplace", PYQE_CUDA="on")
        if outcome.status == "ok":
            there = _MODULES_BUILT if self.arguments.dry_run else _BACKENDS_THERE
            outcome = self.python("build", end - time.monotonic(), "-c", there)
        return outcome

    def _compile(self, seconds: float) -> Outcome:
        """Every kernel for every architecture, without a GPU."""
        tests = [f"tests/test_{name}.py" for name in ("triton", "triton_losses", "cuda")]
        words = [sys.executable, "-m", "pytest", *tests, "-k", "compile or nvcc or one_order"]
        return self.together("compile", seconds, [Command(words)])

    def _list(self, seconds: float) -> Outcome:
        outcome = self.python("list", seconds, *self._bench_command(), "--list")
        if outcome.status == "ok":
            outcome = self.python("list", seconds, "benchmarks/tune.py", "--dry-run")
        if outcome.status == "ok":
            print((self.out / "list.log").read_text(encoding="utf-8"))
        return outcome

    def _conformance(self, seconds: float) -> Outcome:
        count = max(1, min(_MOST_SHARES, (os.cpu_count() or 1) - _OTHER_PROCESSES))
        tests = ["tests/test_conformance.py", "tests/test_gpu.py"]
        words = [sys.executable, "-m", "pytest", "-vv", *tests, "-k", "triton or cuda or devices"]
        variables = [{"PYQE_TEST_SHARE": f"{number}/{count}", "OMP_NUM_THREADS": "1"} for number in range(count)]
        return self.together("conformance", seconds, [Command(words, own) for own in variables])

    def _memcheck(self, seconds: float) -> Outcome:
        """Every operator once: reads and writes out of bounds."""
        return self._sanitize("memcheck", seconds, {"cuda": ["pyqe"], "triton": _triton_kernels()})

    def _racecheck(self, seconds: float) -> Outcome:
        """Races in shared memory, which Triton's kernels leave to their compiler."""
        return self._sanitize("racecheck", seconds, {"cuda": ["pyqe"]})

    def _sanitize(self, tool: str, seconds: float, kernels: dict[str, list[str]]) -> Outcome:
        """Let compute-sanitizer look at each operator once, at the kernels of a backend whose names have a part."""
        program = shutil.which("compute-sanitizer", path=self.environment["PATH"])
        if program is None:
            return Outcome("skipped", "compute-sanitizer is not installed")
        commands = []
        for backend, parts in kernels.items():
            words = [program, "--tool", tool, "--error-exitcode", "9"]
            words += ["--report-api-errors", "no"]  # torch asks for what a driver may not have; others it raises
            words += ["--target-processes", "application-only", "--launch-timeout", "0"]  # not Triton's compilers
            words += [word for part in parts for word in ("--kernel-name", f"kns={part}")]
            words += [sys.executable, "-m", "pytest", "-vv", "tests/test_gpu.py", "-k", f"every_operator and {backend}"]
            # without torch's cache of memory, in which a read beyond a tensor would end
            commands.append(Command(words, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}))
        return self.together(tool, seconds, commands)

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
        stages = list(self.stages())
        for stage in stages:
            self._do_together(stage)
            if self.read()["steps"]["build"]["status"] != "ok":
                break
        steps = self.read()["steps"]
        print()
        wanted = [step.name for stage in stages for step in stage if step.name in steps]
        for name in wanted:
            found = steps[name]
            print(f"{name:12} {found['status']:10} {found['seconds']:7.1f} s  {found['message']}")
        return int(any(steps[name]["status"] in ("failed", "timed out") for name in wanted))

    def _do_together(self, stage: list[Step]) -> None:
        with ThreadPoolExecutor(len(stage)) as pool:
            running = [pool.submit(self._do, step) for step in stage]
            try:
                wait(running)
            except BaseException:  # an interrupt: the steps wait for what they have started
                for process in list(self._processes):
                    _end(process)
                raise
        for step in running:
            step.result()

    def _do(self, step: Step) -> None:
        if self.read().get("steps", {}).get(step.name, {}).get("status") == "ok" and not step.always:
            print(f"{step.name}: done before", flush=True)
            return
        print(f"{step.name} ...", flush=True)
        self.note(step, Outcome("running"))
        start = time.monotonic()
        left = self.deadline - start
        log = self.out / f"{step.name}.log"
        log.unlink(missing_ok=True)
        outcome = step.run(min(step.limit, left)) if left > 1 else Outcome("timed out", "no time was left for it")
        seconds = time.monotonic() - start
        self.note(step, outcome, seconds)
        tail = []
        if outcome.status in ("failed", "timed out") and log.exists():
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        said = f"{step.name}: {outcome.status} after {seconds:.0f} s"
        print("\n".join([" ".join(filter(None, [said, outcome.message])), *tail]), flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and of its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _counted(log: str) -> str:
    """Tests that passed, failed and so on, over several runs of pytest.

    Example:
        >>> _counted("== 2 failed, 30 passed, 1 warning in 1.25s ==\\n5 passed, 3 deselected in 61.00s (0:01:01)")
        '2 failed, 35 passed'
    """
    counts: Counter[str] = Counter()
    for summary in _SUMMARY.findall(log):
        for part in summary.split(", "):
            number, what = part.split()
            counts[what.rstrip("s")] += int(number)
    return ", ".join(f"{counts[what]} {what}" for what in ("error", "failed", "passed", "skipped") if counts[what])


def _triton_kernels() -> list[str]:
    """Names of the Triton kernels, as the GPU knows them."""
    sources = (ROOT / "pyqe" / "kernels").glob("*.py")
    names = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text("utf-8"), re.M)}
    return sorted(names)


# --- what has to be there


def _environment(wheels: Path | None) -> dict[str, str]:
    """Variables of every command: the package and the rivals to import, and the programs of Python and CUDA."""
    own = [str(wheels)] if wheels else []
    modules = [str(ROOT), *own, os.environ.get("PYTHONPATH", "")]
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    programs += [str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")]
    programs = [str(Path(folder) / "bin") for folder in own] + programs
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, modules)),
        "PATH": os.pathsep.join(programs),
    }


def missing(environment: dict[str, str], *, gpu: bool) -> list[str]:
    """What the command needs and does not find; the build says by itself where there is no C++ compiler.

    Args:
        environment: of what it will run.
        gpu: whether there has to be one.
    """
    found = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    for name, least in _LEAST_VERSIONS.items():
        if name not in found and _number(metadata.version(name)) < _number(least):
            found.append(f"{name} >= {least} (here: {metadata.version(name)})")
    found += [name for name in ("cmake", "ninja", "nvcc") if shutil.which(name, path=environment["PATH"]) is None]
    if "cmake" not in found:
        said = subprocess.run(["cmake", "--version"], env=environment, capture_output=True, text=True).stdout
        version = said.split()[2] if len(said.split()) > 2 else "0"
        if _number(version) < _number(_LEAST_CMAKE):
            found.append(f"cmake >= {_LEAST_CMAKE} (here: {version})")
    if gpu and "torch" not in found and subprocess.run([sys.executable, "-c", _GPU_THERE], env=environment).returncode:
        found.append("a GPU that torch can use (--dry-run does without)")
    return found


def _number(version: str) -> tuple[int, ...]:
    """The first two parts of a version.

    Example:
        >>> _number("3.31.6rc1"), _number("77")
        ((3, 31), (77,))
    """
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


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
            sys.path.insert(0, folder)
        environment = _environment(wheels)
        absent = missing(environment, gpu=not arguments.dry_run)
        if absent:
            raise SystemExit(f"missing: {', '.join(absent)}; docs/benchmarks.md says what the command needs")
        return Run(arguments, environment)()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or what it has started would go on
    sys.exit(main())
