"""The benchmark suite: that it runs, says what it measured, and that rivals compute what pyqe computes. No times."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

import pyqe
from pyqe import functional as F
from pyqe.backends import available_backends
from pyqe.bench import Case, Rival, Settings, Shape, gpu, measure, plots, run, suites
from pyqe.bench import case as bench_case
from pyqe.bench.bars import BARS, markdown
from pyqe.bench.case import optional
from pyqe.bench.run import failures, planned
from pyqe.bench.suites import generate, head, logits, loss, overhead, sampling, temperature
from pyqe.cli import bench, main

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 5e-5  # relative to the largest value, in float32
SHAPE = Shape("701x33", 13, "fp32")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def measured(case: Case, **settings: Any) -> dict[str, measure.Measurement]:
    """A case's measurements by rival, of one round."""
    found = measure.measure(case, Settings(repeats=1, **settings), measure.Processor(), lambda text: None)
    return {item.rival.name: item for item in found}


# --- the command


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any]]:
    """``pyqe bench --quick``: what it printed, and its report."""
    file = tmp_path_factory.mktemp("bench") / "report.json"
    result = call("--quick", "--json", file)
    assert result.exit_code == 0, result.output
    return result, json.loads(file.read_text())


def test_quick_runs_every_suite(quick: tuple[Result, dict[str, Any]]) -> None:
    result, report = quick
    assert report["complete"]
    assert [case["suite"] for case in report["cases"]] == sorted(
        (case["suite"] for case in report["cases"]), key=bench.SUITES["cpu"].index
    )
    assert {case["suite"] for case in report["cases"]} == set(bench.SUITES["cpu"])
    assert set(bench.SUITES["cpu"]) | set(bench.SUITES["cuda"]) == set(suites.SUITES)
    for case in report["cases"]:
        assert f"{case['suite']}, {case['name']}" in result.stdout


def test_report_describes_the_machine(quick: tuple[Result, dict[str, Any]]) -> None:
    result, report = quick
    machine, ceilings = report["machine"], report["ceilings"]
    assert machine["processor"] in result.stdout
    assert machine["packages"]["torch"] == version("torch")
    assert machine["cpu"]["torch_threads"] == 1
    assert machine["amx_bf16"] == ("amx_bf16" in machine["cpu"].get("features", ()))
    assert set(machine["rivals"]) == {
        *("boostedprob", "cut-cross-entropy", "liger-kernel"),
        *("netcal", "scikit-learn", "trl"),
    }
    assert ceilings["read_gb_s"] > 0
    assert set(ceilings["matmul_gflop_s"]) == {"bf16", "fp32"}


def test_report_holds_every_figure(quick: tuple[Result, dict[str, Any]]) -> None:
    _, report = quick
    for case in report["cases"]:
        ours, *others = case["rivals"]
        assert others
        assert ours["rival"] == "pyqe"
        assert ours["times_pyqe"] == 1
        assert set(ours["backends"].values()) <= set(available_backends())
        assert ours["backends"]
        for row in case["rivals"]:
            if row["missing"] is None:
                assert len(row["seconds"]) == report["repeats"]
                assert 0 < row["q1"] <= row["median"] <= row["q3"]
                assert bool(row["backends"]) == row["rival"].startswith("pyqe")


def test_plots(quick: tuple[Result, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, report = quick
    cases = [case for case in report["cases"] if case["name"] in ("token logits", "negatives", "fit")]
    written = plots.write_plots({**report, "cases": cases}, tmp_path)
    stems = {f"speed-head-token_logits-{model}-bf16" for model in ("2000x96", "5000x96")}
    stems |= {"memory-head-token_logits-n1-bf16", "memory-head-token_logits-n24-bf16"}
    stems |= {"memory-sampling-negatives-n24-bf16"}  # one N alone makes no line, nor do sizes of their own
    assert {path.name for path in written} == {f"{stem}.{form}" for stem in stems for form in ("png", "svg")}
    assert all(path.stat().st_size > 1000 for path in written)


def test_plots_of_the_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = call("sampling", "--quick", "--repeats", 1, "--models", "300x16", "--plots", tmp_path / "none")
    assert result.exit_code == 0
    assert "plots: nothing" in result.stderr


def test_shapes_are_chosen(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ("--models", "300x16,smollm2-135m", "--n", "2", "--dtypes", "fp32,bf16", "--quick")
    result = call("logits", *options, "--without", "torch.compile,boostedprob", "--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())["cases"]
    expected = [("300x16", 300, "fp32"), ("300x16", 300, "bf16")]
    expected += [("SmolLM2-135M", 49152, "fp32"), ("SmolLM2-135M", 49152, "bf16")]
    assert [(case["model"], case["v"], case["dtype"]) for case in found] == expected
    assert {case["n"] for case in found} == {2}


@pytest.mark.parametrize(
    "options",
    [
        ("--models", "gpt5"),
        ("--models", "0x8"),
        ("--n", "0"),
        ("--n", "1,x"),
        ("--dtypes", "fp8"),
        ("--only", "tails"),
        ("tails",),
    ],
)
def test_wrong_usage(options: tuple[str, ...]) -> None:
    assert call(*options).exit_code == 2


def test_an_interruption_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted() -> Case:
        raise KeyboardInterrupt

    monkeypatch.setitem(
        suites.SUITES, "head", lambda settings: [partial(head.token_logits, SHAPE), partial(interrupted)]
    )
    result = call("head", "--quick", "--json", tmp_path / "report.json")
    assert result.exit_code == 130
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["complete"]
    assert [case["name"] for case in report["cases"]] == ["token logits"]
    assert "head, token logits" in result.stdout


def test_cases_have_names_to_choose_by() -> None:
    every = call("--list").stdout.splitlines()
    assert not [name for name in every if " at 0x" in name]  # another one in each process
    chosen = call("--only", "attached, smollm2", "--only", "temperature", "--list").stdout.splitlines()
    assert chosen == [name for name in every if "attached, smollm2" in name or "temperature" in name]


def test_resumes_with_the_cases_that_are_missing(tmp_path: Path) -> None:
    file, options = tmp_path / "report.json", ("--quick", "--repeats", 1, "--models", "300x16", "--n", 2)
    assert call("logits", "sampling", *options, "--json", file, "--budget", 0).exit_code == 0
    nothing = json.loads(file.read_text())
    assert not nothing["complete"]
    assert nothing["cases"] == []
    assert call("logits", *options, "--json", file).exit_code == 0
    first = json.loads(file.read_text())
    file.write_text(json.dumps({**first, "kept": 1}))
    assert call("logits", "sampling", *options, "--json", file, "--resume").exit_code == 0
    both = json.loads(file.read_text())
    assert both["complete"]
    assert both["kept"] == 1
    assert [found["suite"] for found in both["cases"]] == ["logits", "sampling"]
    assert both["cases"][0] == first["cases"][0]
    assert call("logits", "--resume").exit_code == 2


def test_exit_code_tells_that_pyqe_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Case:
        def fails() -> dict[str, Any]:
            raise RuntimeError("no such kernel")

        return Case("head", "test", {}, tuple, [Rival("pyqe", fails), Rival("other", dict)])

    monkeypatch.setitem(suites.SUITES, "head", lambda settings: [partial(build)])
    result = call("head", "--quick")
    assert result.exit_code == 1
    assert "pyqe: head, test, pyqe: failed: RuntimeError: no such kernel" in result.stderr


# --- missing rivals


def test_missing_rivals_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("boostedprob", "netcal.scaling", "trl.kernels.chunked_logprob", "sklearn.calibration"):
        monkeypatch.setitem(sys.modules, module, None)
    file = tmp_path / "report.json"
    options = ("--quick", "--repeats", 1, "--models", "300x16", "--n", 2)
    result = call("head", "logits", "temperature", *options, "--json", file)
    assert result.exit_code == 0, result.output
    missing = {
        row["rival"]: row["missing"]
        for case in json.loads(file.read_text())["cases"]
        for row in case["rivals"]
        if row["missing"]
    }
    assert set(missing) == {"boostedprob", "netcal", "trl", "scikit-learn", "torch.compile"}
    assert missing["torch.compile"] == "left out"
    for name in missing:
        assert f"  {name}: missing: " in result.stdout


def test_who_fails_is_named() -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("no such\nkernel")

    def works() -> dict[str, Any]:
        return {"value": torch.ones(2)}

    def case(*rivals: Rival) -> Case:
        return Case("head", "test", {}, tuple, rivals)

    found = measured(case(Rival("pyqe", works), Rival("other", fails)))
    assert found["other"].missing == "failed: RuntimeError: no such kernel"
    assert not found["other"].seconds
    found = measured(case(Rival("pyqe", works), Rival("other", lambda: {"value": torch.tensor([1.0, torch.nan])})))
    assert found["other"].missing == "failed: ValueError: its results are not finite"
    found = measured(case(Rival("pyqe", fails), Rival("other", works)))
    assert found["pyqe"].missing == "failed: RuntimeError: no such kernel"
    assert len(found["other"].seconds) == 1


def test_a_language_model_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise FileNotFoundError("no wheel")

    monkeypatch.setattr(generate, "_load", load)
    for build in (generate.generate, generate.attached, generate.score):
        case = build("an LM", 1, 2)
        assert [rival.missing for rival in case.rivals] == ["no wheel"]


def test_optional_says_what_is_missing() -> None:
    rival = optional("other", "torch", "no_such_name", lambda function: function)
    assert "no_such_name" in rival.missing


# --- backends and devices


def test_a_backend_that_is_wrong_has_failed() -> None:
    def works(*_: Any) -> dict[str, Any]:
        return {"value": torch.ones(2), "ids": torch.tensor([5])}

    def wrong(*_: Any) -> dict[str, Any]:
        return {"value": torch.tensor([1.0, 1.1]), "ids": torch.tensor([5])}

    def draws(*_: Any) -> dict[str, Any]:
        return {"value": torch.ones(2), "ids": torch.tensor([7])}

    rivals = [Rival("pyqe", works), Rival("pyqe, a", wrong, backend="cpu"), Rival("pyqe, b", draws, backend="cpu")]
    found = measured(Case("head", "test", {}, tuple, [*rivals, Rival("other", wrong)]))
    assert found["pyqe, a"].missing.startswith("failed: differs from pyqe's own choice by 1.0e-01")
    assert not found["pyqe, b"].missing
    assert not found["other"].missing


def test_a_backend_that_does_not_offer_it_is_missing_and_has_not_failed() -> None:
    def run() -> dict[str, Any]:
        return {"value": F.inverse_softmax(torch.ones(1, 2))}

    found = measured(Case("head", "test", {}, tuple, [Rival("pyqe", run), Rival("pyqe, cuda", run, backend="cuda")]))
    assert found["pyqe, cuda"].missing.startswith("backend 'cuda' cannot run inverse_softmax")


def test_a_rival_that_takes_long_is_in_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Processor, "limit", 0.0)
    found = measure.measure(
        Case("head", "test", {}, tuple, [Rival("pyqe", dict)]), Settings(repeats=5), measure.Processor(), lambda _: None
    )
    assert len(found[0].seconds) == 3


def test_overhead_is_the_time_of_the_host() -> None:
    found = measured(overhead.call("softmax stats", "cpu"))
    assert 0 < found["torch linear"].seconds[0] < 1e-2  # of one call, though many are made


class Generator:
    """torch's has none for a device without data."""

    def __init__(self, device: str = "cpu") -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass


@contextmanager
def suppress_looks_at_data() -> Iterator[None]:
    """Pass over what is refused because it looks at data that are not there, and over nothing else."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not re.search(r"[Mm]eta tensor|Meta|unimplemented", str(error)):
            raise


class Kernels:
    """A GPU in place of torch's: a call is late unless the reads before it take long enough for the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, needs: int, milliseconds: float) -> None:
        self.reads: list[int] = []
        kernels, reading = self, 0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                pass

            def record(self) -> None:
                nonlocal reading
                if reading:
                    kernels.reads.append(reading)
                reading = 0

            def query(self) -> bool:
                return kernels.reads[-1] < needs

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return milliseconds + (1.0 if self.query() else 0.0)

        def read(buffer: torch.Tensor) -> None:
            nonlocal reading
            reading += 1

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(gpu.torch, "sum", read)
        monkeypatch.setattr(gpu.Gpu, "__init__", lambda device: None)
        self.device = gpu.Gpu()
        self.device._buffer, self.device._flush_seconds = torch.ones(1), 2e-3


def host(seconds: float) -> Callable[[], dict[str, Any]]:
    """A call that keeps the host busy."""

    def call() -> dict[str, Any]:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return {}

    return call


def test_a_call_that_the_device_had_to_wait_for_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    in_time = Kernels(monkeypatch, needs=1, milliseconds=3.0)
    assert in_time.device.seconds(host(5e-3)) == 3e-3
    assert in_time.reads == [1]
    late = Kernels(monkeypatch, needs=2, milliseconds=3.0)
    assert late.device.seconds(host(5e-3)) == 3e-3
    assert late.reads[0] == 1
    assert late.reads[1] >= 6  # of 2 ms, twice the time of the host
    assert len(late.reads) == 2


def test_a_wait_that_hardly_counts_is_not_worth_another_time(monkeypatch: pytest.MonkeyPatch) -> None:
    long = Kernels(monkeypatch, needs=2, milliseconds=5000.0)
    assert long.device.seconds(host(1e-4)) == 5.001
    waits = Kernels(monkeypatch, needs=10**6, milliseconds=3.0)
    waits.device._flush_seconds = 1e-5
    assert waits.device.seconds(host(5e-3)) == 4e-3  # more reads than are worth it
    assert long.reads == waits.reads == [1]


def gpu_cases(settings: Settings) -> dict[str, Callable[[], Case]]:
    return planned(bench.SUITES["cuda"], settings)


def test_gpu_cases_stay_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """At their real shapes, on torch's device without data: it refuses tensors of another one as a GPU does."""
    monkeypatch.setattr(Settings, "on_gpu", True)
    monkeypatch.setattr(torch, "Generator", Generator)
    bench_case._weight.cache_clear()
    need_kernels = {"torch.compile", "trl", "Liger", "Liger, scaled", "CCE"}
    ran = 0
    for key, build in gpu_cases(Settings(device="meta")).items():
        if "replay" in key:
            continue
        with suppress_looks_at_data():
            built = build()
            for rival in built.rivals:
                if rival.run is None or rival.name in need_kernels:
                    continue
                with suppress_looks_at_data():
                    outcome = rival.run(*built.inputs())
                    results = [value for value in outcome.values() if isinstance(value, Tensor)]
                    assert all(result.is_meta for result in results), (key, rival.name)
                    ran += 1
    bench_case._weight.cache_clear()
    assert ran > 80


class Stub(measure.Processor):
    """A GPU as far as the report goes."""

    def ceilings(self, dtypes: Any) -> dict[str, Any]:
        return {"copy_gb_s": 3000.0, "matmul_gflop_s": dict.fromkeys(dtypes, 7e5)}


STUB = {
    "name": "Stub GPU",
    "capability": "9.0",
    "multiprocessors": 132,
    "memory_gib": 80.0,
    "l2_mib": 50.0,
    "cuda": "13.0",
    "state": {"clocks.sm": "1980 MHz"},
}


def gpu_run(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """A report of the GPU's suites at small shapes, on the CPU."""
    monkeypatch.setattr(Settings, "on_gpu", True)
    monkeypatch.setattr(gpu, "Gpu", Stub)
    monkeypatch.setattr(gpu, "describe", lambda: STUB)
    settings = Settings(quick=True, repeats=1, models=("300x16",), without=frozenset({"torch.compile"}))
    silent = dict.fromkeys(("on_start", "on_case", "on_progress"), lambda *_: None)
    return run(names, settings, **silent, **options)


def test_gpu_suites_run_on_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(name for name in bench.SUITES["cuda"] if name != "overhead")  # whose graphs need a GPU
    report = gpu_run(monkeypatch, names)
    assert failures(report) == []
    assert {found["suite"] for found in report["cases"]} == set(names)
    for found in report["cases"]:
        rows = {row["rival"]: row for row in found["rivals"]}
        if found["name"] in ("both heads", "training step"):  # of more than one operation
            continue
        assert {"pyqe", "pyqe, cuda", "pyqe, triton", "pyqe, reference"} <= set(rows), found["key"]
        assert rows["pyqe, reference"]["backend"] == "reference"
        assert set(rows["pyqe, reference"]["backends"].values()) == {"reference"}
    page = markdown({**report, "device": "cuda"})
    assert "Stub GPU (9.0), 132 multiprocessors" in page
    assert "clocks.sm 1980 MHz" in page
    assert page.count("not measured: no such case") == len(BARS)  # at shapes of their own


def test_a_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Any) -> None:
        raise measure.DeviceLostError("gone")

    def fails() -> dict[str, Any]:
        raise RuntimeError("an illegal memory access was encountered")

    def build(number: int) -> Case:
        return Case("head", f"case {number}", {}, tuple, [Rival("pyqe", fails if number == 1 else dict)])

    monkeypatch.setattr(Stub, "check", lost)
    monkeypatch.setitem(suites.SUITES, "head", lambda settings: [partial(build, number) for number in range(3)])
    first = gpu_run(monkeypatch, ("head",))
    assert first["lost"]
    assert [found["key"] for found in first["cases"]] == ["head: build, 0", "head: build, 1"]
    assert failures(first) == ["head, head: build, 1, pyqe: failed: gone"]
    assert "failed: gone" in markdown({**first, "device": "cuda"})
    second = gpu_run(monkeypatch, ("head",), earlier=first)
    assert second["complete"]
    assert len(second["cases"]) == 3


def test_a_gpu_is_asked_for_where_there_is_none() -> None:
    listed = call("--device", "cuda", "--list")
    assert listed.exit_code == 0
    assert listed.stdout.splitlines() == list(gpu_cases(Settings(device="cuda")))
    assert call("generate", "--device", "cuda", "--list").exit_code == 2
    if not torch.cuda.is_available():
        result = call("--device", "cuda")
        assert result.exit_code == 2
        assert "finds no GPU" in result.stderr


# --- memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")
def test_memory_is_the_peak_beyond_the_results() -> None:
    mb = 2**20

    def run() -> dict[str, Any]:
        first = torch.ones(64 * mb // 4)
        second = torch.ones(32 * mb // 4)
        return {"kept": second[:1] + first[:1], "whole": second}

    extra = measure.Processor().extra_bytes(run)
    assert extra is not None
    assert 64 * mb * 0.95 < extra < 64 * mb * 1.1


# --- rivals compute what pyqe computes

CASES: dict[str, tuple[Callable[[], Case], float, set[str]]] = {
    "softmax stats": (
        lambda: head.softmax_stats(SHAPE),
        EXACT,
        {"eager", "torch.compile", "trl", "linear_cross_entropy"},
    ),
    "sigmoid stats": (lambda: head.sigmoid_stats(SHAPE), EXACT, {"eager", "torch.compile"}),
    "both heads": (lambda: head.both_heads(SHAPE), EXACT, {"pyqe, one head", "eager", "torch.compile"}),
    "low-rank head": (lambda: head.low_rank_head(SHAPE), EXACT, {"pyqe, one head", "eager", "torch.compile"}),
    "candidates": (lambda: head.candidates(SHAPE), EXACT, {"eager"}),
    "token logits": (lambda: head.token_logits(SHAPE), EXACT, {"eager", "eager, gathered rows"}),
    "several token logits": (lambda: head.token_logits(SHAPE, 3), EXACT, {"eager", "eager, gathered rows"}),
    "token gradients": (lambda: head.token_gradients(SHAPE, 3), EXACT, {"eager"}),
    "vocabulary BCE": (lambda: loss.vocabulary_bce(SHAPE), EXACT, {"eager", "torch.compile"}),
    "vocabulary BCE, frozen": (lambda: loss.vocabulary_bce(SHAPE, frozen=True), EXACT, {"eager", "torch.compile"}),
    **{
        f"rows, {kind}": (partial(logits.row_stats, SHAPE, kind), EXACT, {"eager", *(["torch.compile"] * compiled)})
        for kind, compiled in zip(logits.ROW_STATS, (0, 1, 0, 0, 0, 0), strict=True)
    },
    "one pass": (lambda: temperature.one_pass(500, 5, "cpu"), EXACT, {"eager"}),
    "logits": (lambda: logits.softmax_stats(SHAPE), EXACT, {"eager", "torch.compile", "boostedprob"}),
    "temperature": (lambda: temperature.fit(500, 5), 2e-3, {"torch L-BFGS", "netcal", "scikit-learn"}),
    "generate": (
        lambda: generate.generate("small random LM", 2, 3),
        0.0,
        {"pyqe, all signals", "model.generate"},
    ),
    "attach": (
        lambda: generate.attached("small random LM", 2, 3),
        EXACT,
        {"model.generate", "authors"},
    ),
    "score": (
        lambda: generate.score("small random LM", 2, 8),
        EXACT,
        {"pyqe, quality alone", "pyqe, all signals"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rivals_agree(name: str) -> None:
    build, tolerance, compared = CASES[name]
    found = measured(build(), without=frozenset({"torch.compile"}))
    present = {rival for rival in compared if not found[rival].missing}
    assert {rival for rival, item in found.items() if item.difference is not None} == present
    for rival in present:
        assert found[rival].difference <= tolerance, rival
    assert not any(item.missing.startswith("failed") for item in found.values())


def test_compiled_rival_agrees() -> None:
    found = measured(logits.softmax_stats(SHAPE))["torch.compile"]
    if found.missing:
        pytest.skip(found.missing)  # there may be no C++ compiler where the package is installed
    assert found.difference <= EXACT


@pytest.mark.parametrize("cut", ["first", "last"])
def test_dominant_by_sort(cut: Any) -> None:
    rows = SHAPE.hidden() @ SHAPE.weight().T
    ids, dominant = sampling.dominant_by_sort(torch.softmax(rows, -1), cut)
    expected = F.dominant_tokens(rows, pyqe.DominantRule.jump(cut))
    assert expected.size.max() > 0
    torch.testing.assert_close(dominant.sum(1), expected.size)
    torch.testing.assert_close(ids.masked_fill(~dominant, -1), expected.ids)


def shares(ids: Tensor, vocab_size: int) -> Tensor:
    """How often each token is drawn."""
    return torch.bincount(ids[ids >= 0], minlength=vocab_size) / len(ids)


def test_published_selection_draws_what_pyqe_draws() -> None:
    rows, vocab_size = 20_000, 40
    hidden = (3 * torch.randn(1, 8)).expand(rows, 8)
    weight, unigram = torch.randn(vocab_size, 8), sampling.zipf_counts(vocab_size)
    published = sampling.published_selection(hidden, weight, unigram)
    rule = pyqe.DominantRule.jump("first")
    dominant = F.linear_dominant_tokens(hidden[:1], weight, rule).ids
    target = dominant[0, 0]  # excluded anyway: the published step excludes no target
    assert target >= 0
    for source, half in (("unigram", published[:, :5]), ("softmax", published[:, 5:])):
        sampler = pyqe.NegativeSampler(
            (source,), num_negatives=5, temperature=sampling.TEMPERATURE, exclude=rule, unigram_counts=unigram
        )
        ours = F.linear_sample_negatives(hidden, weight, target.expand(rows), sampler)
        deviation = (2 * 0.25 / rows) ** 0.5  # at most, of the difference of two shares
        torch.testing.assert_close(shares(half, vocab_size), shares(ours, vocab_size), atol=5 * deviation, rtol=0)
        assert not torch.isin(half, dominant[dominant >= 0]).any()


def test_published_loss_is_the_sampled_bce() -> None:
    hidden, weight = SHAPE.hidden(), SHAPE.weight().clone().requires_grad_()
    targets = torch.arange(SHAPE.n)
    negatives = torch.arange(100, 100 + 3 * SHAPE.n).reshape(SHAPE.n, 3)
    published = loss.published_loss(hidden, weight, targets, negatives)
    torch.testing.assert_close(published, F.linear_sampled_bce(hidden, weight, targets, negatives))
    drawn_twice = torch.cat([negatives, negatives[:, :1], targets[:, None]], 1)
    torch.testing.assert_close(loss.published_loss(hidden, weight, targets, drawn_twice), published)
