"""``benchmarks/gpu.sh`` and what reads its results, without a GPU: steps, preferences, configurations, bars."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import conftest
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
        monkeypatch.setattr(gpu.Run, "call", lambda run, *args: self._call(run, *args))

    def _call(self, run: Any, name: str, seconds: float, command: Any) -> Any:
        self.made.append((name, " ".join(command.words)))
        (run.out / f"{name}.log").write_text(f"output of {name}\n5 passed in 0.10s\n")
        endings = self.endings.get(name, [])
        outcome = endings.pop(0) if endings else gpu.Outcome("ok")
        if name == "bench" and outcome.status == "ok":
            run.report.write_text(json.dumps({**run.read(), "complete": True, "cases": []}))
        return outcome

    @property
    def steps(self) -> set[str]:
        return {name.split("-")[0] for name, _ in self.made}


PROOFS = {"conformance", "memcheck", "racecheck"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(gpu, "missing", lambda environment, gpu: [])
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: f"/bin/{name}")
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 6)
    return Calls(monkeypatch)


def steps_of(out: Path) -> dict[str, str]:
    return {name: step["status"] for name, step in json.loads((out / "gpu.json").read_text())["steps"].items()}


def test_a_run_does_every_step_once(calls: Calls, tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path), "--tune"]) == 0
    assert calls.steps == {"build", *PROOFS, "bench", "tune"}
    assert set(steps_of(tmp_path).values()) == {"ok"}
    assert [name for name, _ in calls.made][:2] == ["build", "build"]
    assert [name for name, _ in calls.made][-2:] == ["bench", "tune"]
    calls.made.clear()
    assert gpu.main([str(tmp_path)]) == 0
    assert calls.steps == {"build"}
    assert gpu.main([str(tmp_path), "--fresh"]) == 0
    assert calls.steps == {"build", *PROOFS, "bench"}


def test_what_failed_is_done_again(calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls.endings = {"conformance-1": [gpu.Outcome("failed", "exit code 1")]}
    assert gpu.main([str(tmp_path)]) == 1
    assert steps_of(tmp_path) == {"build": "ok", "bench": "ok", **dict.fromkeys(PROOFS, "ok"), "conformance": "failed"}
    assert "output of conformance-1" in capsys.readouterr().out.split("output of conformance-2")[-1]
    calls.made.clear()
    assert gpu.main([str(tmp_path)]) == 0
    assert calls.steps == {"build", "conformance"}


def test_the_suite_is_shared_among_processes(calls: Calls, tmp_path: Path) -> None:
    calls.endings = {"conformance-0": [gpu.Outcome("timed out")]}
    assert gpu.main([str(tmp_path)]) == 1
    assert sorted(name for name, _ in calls.made if name.startswith("conformance")) == [
        f"conformance-{number}" for number in range(3)
    ]
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]["conformance"]
    assert (found["status"], found["message"]) == ("timed out", "15 passed")
    assert sorted(path.name for path in tmp_path.glob("conformance*")) == ["conformance.log"]


def test_shares_divide_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(share: str) -> list[str]:
        monkeypatch.setenv("PYQE_TEST_SHARE", share)
        items, passed_over = [SimpleNamespace(nodeid=f"tests/test_it.py::test[{i}]") for i in range(90)], []
        hook = SimpleNamespace(pytest_deselected=lambda items: passed_over.extend(items))
        conftest.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
        assert len(items) + len(passed_over) == 90
        return [item.nodeid for item in items]

    shares = [kept(f"{number}/3") for number in range(3)]
    assert len(set().union(*shares)) == sum(map(len, shares)) == 90
    assert min(map(len, shares)) > 20


def test_nothing_follows_a_build_that_failed(calls: Calls, tmp_path: Path) -> None:
    calls.endings = {"build": [gpu.Outcome("ok"), gpu.Outcome("failed", "cuda: no driver")]}
    assert gpu.main([str(tmp_path)]) == 1
    assert steps_of(tmp_path) == {"build": "failed"}


def test_a_step_that_runs_is_noted(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that is killed leaves what it has found out, and where it was."""
    seen = {}
    monkeypatch.setattr(gpu.Run, "_bench", lambda run, seconds: seen.update(steps_of(run.out)) or gpu.Outcome("ok"))
    assert gpu.main([str(tmp_path)]) == 0
    assert seen == {"build": "ok", **dict.fromkeys(PROOFS, "ok"), "bench": "running"}


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
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: None)
    assert gpu.main([str(tmp_path)]) == 0
    assert calls.steps == {"build", "conformance", "bench"}
    assert steps_of(tmp_path)["memcheck"] == steps_of(tmp_path)["racecheck"] == "skipped"


def test_the_sanitizer_looks_at_the_kernels_of_the_package(calls: Calls, tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path)]) == 0
    memcheck = [command for name, command in calls.made if name.startswith("memcheck")]
    (racecheck,) = [command for name, command in calls.made if name.startswith("racecheck")]
    assert len(memcheck) == 2
    assert "kns=pyqe " in racecheck
    assert racecheck.endswith("-k every_operator and cuda")
    kernels = BENCHMARKS.parent / "pyqe" / "kernels"
    launched = {
        name
        for path in kernels.glob("*.py")
        for name in re.findall(r"^ +(\w+)\[.+\]\((?:$|.*FUSED)", path.read_text("utf-8"), re.MULTILINE)
    }
    assert {"scan_kernel", "row_sums_kernel"} <= launched
    for name in launched:
        assert f"--kernel-name kns={name} " in memcheck[-1] + memcheck[0]


def test_the_dry_run_needs_no_gpu(calls: Calls, tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path), "--dry-run"]) == 0
    assert calls.steps == {"build", "compile", "list"}
    assert any(command.endswith("pyqe bench --device cuda --list") for _, command in calls.made)


def run_into(out: Path) -> Any:
    return gpu.Run(gpu._arguments([str(out)]), dict(os.environ))


def test_a_step_ends_when_its_time_is_over(tmp_path: Path) -> None:
    run = run_into(tmp_path)
    start = time.monotonic()
    outcome = run.call("slow", 1.0, gpu.Command(["bash", "-c", "echo begun; sleep 60 & wait"]))
    assert time.monotonic() - start < 30
    assert outcome.status == "timed out"
    assert "begun" in (tmp_path / "slow.log").read_text()
    assert run.python("wrong", 30.0, "-c", "raise SystemExit(3)").message == "exit code 3"


def test_an_interrupt_ends_what_was_started(tmp_path: Path) -> None:
    """Nothing stays on the GPU."""
    program = f"""if True:
        import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
        import gpu, os, signal
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run = gpu.Run(gpu._arguments([{str(tmp_path)!r}]), dict(os.environ))
        sleep = gpu.Command(["bash", "-c", "echo $$; exec sleep 600"])
        run.stages = lambda: [[gpu.Step("slow", lambda seconds: run.call("slow", seconds, sleep), 300)]]
        run()
    """
    process = subprocess.Popen([sys.executable, "-c", program])
    log, numbers = tmp_path / "slow.log", []
    while not numbers:
        assert process.poll() is None
        time.sleep(0.05)
        numbers = [line for line in log.read_text().splitlines() if line.isdecimal()] if log.exists() else []
    process.terminate()
    assert process.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(numbers[0]), 0)
    assert steps_of(tmp_path) == {"slow": "failed"}


def test_no_step_starts_after_the_end(calls: Calls, tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path), "--minutes", "0"]) == 1
    assert calls.made == []
    assert steps_of(tmp_path) == {"build": "timed out"}


def test_wheels_are_put_on_the_path(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="found none"):
        gpu.main([str(tmp_path), "--wheels", str(tmp_path)])
    (tmp_path / "rival-1-py3-none-any.whl").touch()
    installed = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, check: installed.append(command))
    found = []
    monkeypatch.setattr(gpu.sys, "path", list(sys.path))
    monkeypatch.setattr(gpu.Run, "__call__", lambda run: found.append(run.environment) or 0)
    assert gpu.main([str(tmp_path), "--wheels", str(tmp_path)]) == 0
    assert "--no-index" in installed[0]
    target = installed[0][installed[0].index("--target") + 1]
    assert target in found[0]["PYTHONPATH"]
    assert found[0]["PATH"].startswith(f"{target}/bin")


def test_what_is_missing_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_MODULES", (*gpu._MODULES, "no_such_module"))
    monkeypatch.setattr(gpu.metadata, "version", lambda name: {"setuptools": "76.1"}.get(name, "3.0.1"))
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: None if name == "nvcc" else f"/bin/{name}")
    said = SimpleNamespace(stdout="cmake version 3.22.1\n\nsuite", returncode=1)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: said)
    expected = ["no_such_module", "setuptools >= 77 (here: 76.1)", "nvcc", "cmake >= 3.25 (here: 3.22.1)"]
    with pytest.raises(SystemExit, match=re.escape(", ".join([*expected, "a GPU"]))):
        gpu.main([str(tmp_path)])
    with pytest.raises(SystemExit, match=re.escape(", ".join(expected) + ";")):
        gpu.main([str(tmp_path), "--dry-run"])
    assert list(tmp_path.iterdir()) == []


def test_programs_of_python_and_of_cuda_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert gpu._environment(None)["PATH"].split(":") == [str(Path(sys.executable).parent), "/usr/bin", "/opt/cuda/bin"]
    monkeypatch.delenv("CUDA_HOME")
    assert gpu._environment(None)["PATH"].endswith(":/usr/local/cuda/bin")


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


def test_docstring_examples() -> None:
    assert doctest.testmod(prefer) == (0, 1)
    assert doctest.testmod(gpu) == (0, 2)


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
