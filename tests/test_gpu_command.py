"""``benchmarks/gpu.sh`` and what reads its results, without a GPU: steps, preferences, configurations, bars."""

from __future__ import annotations

import doctest
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pyqe.backends import preferences
from pyqe.bench.bars import BARS

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gpu, prefer, tune = script("gpu"), script("prefer"), script("tune")


# --- the command


class Calls:
    """In place of running commands: notes them, and ends them as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, str]] = []
        self.endings: dict[str, list[Any]] = {}
        monkeypatch.setattr(gpu.Run, "call", lambda run, *args, **environment: self._call(run, *args, **environment))

    def _call(self, run: Any, name: str, seconds: float, *command: str, **environment: str) -> Any:
        self.made.append((name, " ".join(command)))
        (run.out / f"{name}.log").write_text(f"output of {name}\n")
        endings = self.endings.get(name, [])
        outcome = endings.pop(0) if endings else gpu.Outcome("ok")
        if name == "bench" and outcome.status == "ok":
            run.report.write_text(json.dumps({**run.read(), "complete": True, "cases": []}))
        return outcome

    @property
    def steps(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.made))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: sys.executable)
    return Calls(monkeypatch)


def steps_of(out: Path) -> dict[str, str]:
    return {name: step["status"] for name, step in json.loads((out / "gpu.json").read_text())["steps"].items()}


def test_a_run_does_every_step_once(calls: Calls, tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path), "--tune"]) == 0
    assert calls.steps == ["build", "conformance", "sanitize", "bench", "tune"]
    assert set(steps_of(tmp_path).values()) == {"ok"}
    calls.made.clear()
    assert gpu.main([str(tmp_path)]) == 0
    assert calls.steps == ["build"]
    assert gpu.main([str(tmp_path), "--fresh"]) == 0
    assert calls.steps == ["build", "conformance", "sanitize", "bench"]


def test_what_failed_is_done_again(calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls.endings = {"conformance": [gpu.Outcome("failed", "exit code 1")]}
    assert gpu.main([str(tmp_path)]) == 1
    assert steps_of(tmp_path) == {"build": "ok", "conformance": "failed", "sanitize": "ok", "bench": "ok"}
    assert "output of conformance" in capsys.readouterr().out
    calls.made.clear()
    assert gpu.main([str(tmp_path)]) == 0
    assert calls.steps == ["build", "conformance"]


def test_the_benchmarks_go_on_after_a_lost_device(calls: Calls, tmp_path: Path) -> None:
    calls.endings = {"bench": [gpu.Outcome("failed", "exit code 75")] * 2}
    assert gpu.main([str(tmp_path), "--suites", "head", "loss"]) == 0
    commands = [command for name, command in calls.made if name == "bench"]
    assert len(commands) == 3
    assert all("bench head loss --device cuda --json" in command and "--resume" in command for command in commands)


def test_the_benchmarks_that_ran_out_of_time_are_not_done(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = gpu.Run.read
    monkeypatch.setattr(gpu.Run, "read", lambda run: {**read(run), "complete": False})
    assert gpu.main([str(tmp_path)]) == 1
    assert steps_of(tmp_path)["bench"] == "timed out"


def test_a_missing_sanitizer_is_said(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/nowhere/compute-sanitizer")
    assert gpu.main([str(tmp_path)]) == 0
    assert "sanitize" not in calls.steps
    assert steps_of(tmp_path)["sanitize"] == "skipped"


def test_the_dry_run_needs_no_gpu(calls: Calls, tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path), "--dry-run"]) == 0
    assert calls.steps == ["build", "compile", "list"]
    assert any(command.endswith("pyqe bench --device cuda --list") for _, command in calls.made)


def arguments(out: Path) -> Any:
    return gpu._arguments([str(out)])


def test_a_step_ends_when_its_time_is_over(tmp_path: Path) -> None:
    run = gpu.Run(arguments(tmp_path), None)
    start = time.monotonic()
    outcome = run.call("slow", 1.0, "bash", "-c", "echo begun; sleep 60 & wait")
    assert time.monotonic() - start < 30
    assert outcome.status == "timed out"
    assert "begun" in (tmp_path / "slow.log").read_text()
    assert run.call("wrong", 30.0, sys.executable, "-c", "raise SystemExit(3)").message == "exit code 3"


def test_no_step_starts_after_the_end(calls: Calls, tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path), "--minutes", "0"]) == 1
    assert calls.made == []
    assert set(steps_of(tmp_path).values()) == {"timed out"}


def test_wheels_are_put_on_the_path(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="found none"):
        gpu.main([str(tmp_path), "--wheels", str(tmp_path)])
    (tmp_path / "rival-1-py3-none-any.whl").touch()
    installed = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, check: installed.append(command))
    paths = []
    monkeypatch.setattr(gpu.Run, "__call__", lambda run: paths.append(run.environment["PYTHONPATH"]) or 0)
    assert gpu.main([str(tmp_path), "--wheels", str(tmp_path)]) == 0
    assert "--no-index" in installed[0]
    assert installed[0][installed[0].index("--target") + 1] in paths[0]


def test_the_shell_script_starts() -> None:
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--help"]
    result = subprocess.run(command, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}, capture_output=True)
    assert result.returncode == 0
    assert b"--dry-run" in result.stdout


# --- preferences


def case(decides: str | None, n: int, dtype: str = "bf16", **seconds: float) -> dict[str, Any]:
    rows = [{"rival": "pyqe", "missing": None, "backend": None, "median": 1e-9}]
    rows += [{"rival": name, "missing": None, "backend": name, "median": value} for name, value in seconds.items()]
    rows.append({"rival": "pyqe, other", "missing": "failed", "backend": "other"})
    return {"suite": "head", "name": "case", "decides": decides, "n": n, "dtype": dtype, "rivals": rows}


REPORT = {
    "machine": {"gpu": {"name": "Some GPU"}},
    "date": "2026-01-02T03:04:05",
    "cases": [
        case("linear_softmax_stats", 4096, cuda=3.0, triton=1.0, reference=9.0),
        case("linear_softmax_stats", 1, cuda=1.0, triton=2.0),
        case("linear_softmax_stats", 64, cuda=1.0, triton=1.1),
        case("softmax_stats", 512, cuda=1.0, triton=3.0),
        case("softmax_stats", 512, "fp16", cuda=2.0, triton=1.0),  # less is lost with the other one
        case("linear_softmax_stats", 64, "fp32", cuda=1.0, triton=2.0),
        case("kept", 64, "fp32", cuda=1.0, triton=2.0),
        case("sigmoid_stats", 512, triton=1.0),
        case(None, 7, cuda=1.0),
        {"suite": "head", "name": "lost", "rivals": [{"rival": "pyqe", "missing": "failed"}]},
    ],
}


def test_preferences_follow_the_times(tmp_path: Path) -> None:
    table, report = tmp_path / "preferences.json", tmp_path / "gpu.json"
    kept = {"kept": [{"backend": "triton"}], "sigmoid_stats": [{"dtypes": ["float32"], "backend": "reference"}]}
    table.write_text(json.dumps({"source": "guess", "operations": kept}))
    report.write_text(json.dumps(REPORT))
    prefer.main([str(report), "--table", str(table)])
    written = json.loads(table.read_text())
    assert written["operations"] == {
        "kept": [{"dtypes": ["float32"], "backend": "cuda"}, {"backend": "triton"}],
        "linear_softmax_stats": [
            {"dtypes": ["float32"], "backend": "cuda"},
            {"max_rows": 512, "backend": "cuda"},
            {"backend": "triton"},
        ],
        "softmax_stats": [{"backend": "cuda"}],
        "sigmoid_stats": [{"dtypes": ["float32"], "backend": "reference"}, {"backend": "triton"}],
    }
    assert written["source"].startswith("Measured on Some GPU, 2026-01-02")


def test_preferences_are_what_the_package_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    table = prefer.updated({"source": "", "operations": {}}, REPORT)
    monkeypatch.setattr(preferences, "_table", lambda: json.loads(prefer.text(table))["operations"])
    for rows, dtype, backend in (
        (512, torch.bfloat16, "cuda"),
        (513, torch.bfloat16, "triton"),
        (513, torch.float16, "triton"),
        (513, torch.float32, "cuda"),
    ):
        assert preferences.backend_for("linear_softmax_stats", rows, dtype, ()) == backend


def test_single_tokens_of_either_head_have_an_entry_of_their_own() -> None:
    """The places of the arguments that ask for them are those of the operators' schemas."""
    for operation, asking in (
        ("linear_softmax_stats", ("top_k", "dominant")),
        ("linear_joint_stats", ("top_k", "dominant", "sigmoid_top_k")),
        ("linear_sigmoid_stats", ("top_k",)),
    ):
        names = [argument.name for argument in getattr(torch.ops.pyqe, operation).default._schema.arguments]
        for wanted in (None, *asking):
            args = tuple(1 if name == wanted else 0 for name in names)
            expected = operation if wanted is None else f"{operation}, candidates"
            assert preferences._variant(operation, args) == expected


def test_docstring_example() -> None:
    assert doctest.testmod(prefer) == (0, 1)


def test_a_backend_that_fails_somewhere_is_not_preferred() -> None:
    times = {8: {"cuda": [1.0], "triton": [1.5, 1.5]}}  # in one of two cases there was no time
    assert prefer.entries(times) == [{"backend": "triton"}]


# --- configurations

TABLE = {
    "note": "guess",
    "scan": {
        "interpreter": {"BLOCK_N": 32},
        "sm_90": {
            "half": {"chosen": {"BLOCK_N": 1}, "candidates": [{"BLOCK_N": 2}, {"BLOCK_N": 3}]},
            "tf32": {"chosen": {"BLOCK_N": 1}, "candidates": []},
        },
    },
}


def test_the_table_is_written_as_it_is_read() -> None:
    assert json.loads(tune.text(TABLE)) == TABLE
    assert '"candidates": [\n          {"BLOCK_N": 2},\n' in tune.text(TABLE)


def test_every_kernel_with_configurations_has_something_to_run() -> None:
    if not tune.TABLE.exists():
        pytest.skip("no kernels")
    for kernel, architectures in json.loads(tune.TABLE.read_text(encoding="utf-8")).items():
        if isinstance(architectures, dict):
            assert tune.workload(kernel)


class Clock:
    """A device on which a run takes as many seconds as it says; it waits for nothing."""

    def seconds(self, run: Callable[[], dict[str, Any]]) -> float:
        return float(run()["seconds"])

    def check(self) -> None:
        pass


def test_the_fastest_configuration_that_is_right_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    now: dict[str, int] = {}

    def run() -> dict[str, Any]:
        if now["BLOCK_N"] == 0:
            raise RuntimeError("out of shared memory")
        wrong = now["BLOCK_N"] == 1
        return {"seconds": torch.tensor(float(now["BLOCK_N"])), "value": torch.ones(2) + 0.5 * wrong}

    options = [{"BLOCK_N": size} for size in (4, 0, 1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyqe.bench.measure.difference", lambda a, b: float((a["value"] - b["value"]).abs().max()))
        times = tune.seconds_of(now.update, [run, run], options, Clock())
    assert times == [8.0, float("inf"), float("inf"), 4.0]
    assert "out of shared memory" in capsys.readouterr().out
    assert [found[:2] for found in tune.planned(TABLE, "sm_90")] == [("scan", "half"), ("scan", "tf32")]


# --- bars


def rows(**others: float) -> list[dict[str, Any]]:
    return [{"rival": name.replace("_", " "), "missing": None, "median": value} for name, value in others.items()]


def test_bars_say_met_or_not_or_why_there_is_no_figure() -> None:
    softmax, sigmoid = BARS[:2]
    shape = {"suite": "head", "n": 4096, "dtype": "bf16", "model": "Llama-3-8B"}
    report = {
        "cases": [
            {**shape, "name": "softmax stats", "model": "other", "rivals": rows(pyqe=9.0, bare_matmul=1.0)},
            {**shape, "name": "softmax stats", "rivals": rows(pyqe=1.2, bare_matmul=1.0)},
            {**shape, "name": "sigmoid stats", "rivals": rows(pyqe=1.3, bare_matmul=1.0)},
        ]
    }
    assert softmax.judge(report)[1:] == ("time over the bare matmul's <= 1.25x", "1.20x", "met")
    assert sigmoid.judge(report)[1:] == ("time over the bare matmul's <= 1.20x", "1.30x", "**not met**")
    report["cases"][2]["rivals"][1]["missing"] = "failed: no memory"
    assert sigmoid.judge(report)[3] == "not measured: bare matmul: failed: no memory"
    assert softmax.judge({"cases": []})[3] == "not measured: no such case"


def test_every_bar_has_its_case() -> None:
    """Cases that a bar names are measured: by suite, number of rows and dtype as the suites list them."""
    from pyqe.bench import Settings
    from pyqe.bench.run import planned
    from pyqe.cli.bench import SUITES

    listed = "\n".join(planned(SUITES["cuda"], Settings(device="cuda"))).lower()
    for bar in BARS:
        if bar.suite == "overhead":
            assert bar.name.removesuffix(", graph").lower() in listed
        elif bar.suite == "logits":
            assert f"{bar.dtype} n {bar.n}, {bar.name}" in listed
        else:
            assert f"{bar.name.lower()}, llama-3-8b {bar.dtype} n {bar.n}" in listed
