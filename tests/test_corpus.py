"""Scoring a corpus in shards: what goes in and out, crashes, torchrun and Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner, Result
from torch.distributed import HashStore

from benchmarks import scaling
from pyqe.cli import corpus, main, parquet, processes, ray_engine
from pyqe.cli.processes import local_device
from pyqe.cli.rows import check_text
from pyqe.cli.shards import Parts, cut, find_files

pytestmark = pytest.mark.usefixtures("one_thread")

OK, FAILED, USAGE, SOME_ROWS_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
ROOT = Path(__file__).parents[1]
SHARD = ("--batch-size", "1", "--shard-rows", "8")
BAD = {5: "not JSON", 7: "", 17: '{"text": 5}', 30: '{"id": 30}'}
LINES = [
    BAD.get(n, json.dumps({"text": f"the cat sat on mat {n}, {'and a dog ' * (n % 4)}!", "id": n})) for n in range(43)
]
# Ends its process once, just before a file of this name is there
KILL_ONCE = """
import os, signal
replace = os.replace
def replace_or_die(source, target):
    if os.path.basename(target) == os.environ["KILL_AT"] and not os.path.exists(os.environ["KILLED"]):
        open(os.environ["KILLED"], "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a head of it."""
    place = tmp_path_factory.mktemp("models")
    model, tokenizer = tiny.model(), tiny.tokenizer()
    model.save_pretrained(place / "llama")
    tokenizer.save_pretrained(place / "llama")
    tiny.head(model, tokenizer, "low_rank", rank=2).save_pretrained(place / "head")
    return place


@pytest.fixture
def call(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``pyqe score`` in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, shard: Sequence[str] = SHARD) -> Result:
        names = ("-m", str(models / "llama"), "--head", str(models / "head"))
        return CliRunner().invoke(main, ["score", *arguments, *names, *shard])

    return run


@pytest.fixture
def whole(call: Callable[..., Result], tmp_path: Path) -> bytes:
    """What the local engine makes of in.jsonl, which is left there."""
    (tmp_path / "in.jsonl").write_text("".join(line + "\n" for line in LINES))
    assert call("in.jsonl", "-o", "local.jsonl", shard=SHARD[:2]).exit_code == SOME_ROWS_FAILED
    return (tmp_path / "local.jsonl").read_bytes()


def rows(text: str | bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def environment(folder: Path, kill_at: str = "") -> dict[str, str]:
    """That of a subprocess, one of whose processes is killed before the file ``kill_at`` is there."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(KILL_ONCE)
    kill = {"KILL_AT": kill_at, "KILLED": str(folder / f"killed-{kill_at}")}
    paths = f"{folder / 'site'}{os.pathsep}{ROOT}"
    fixed = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**os.environ, **fixed, **kill}


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import_module("pyarrow.parquet").write_table(pyarrow.table(columns), path, **options)


def read_parquet(path: str | Path) -> Any:
    return import_module("pyarrow.parquet").read_table(path)


def finished(command: list[str], folder: Path, kill_at: str) -> subprocess.CompletedProcess[str]:
    """What a command with processes of its own has done; it ends them itself, if it takes too long."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment(folder, kill_at), **pipes) as child:
        try:
            output, errors = child.communicate(timeout=420)
        except subprocess.TimeoutExpired:
            child.terminate()
            raise
    return subprocess.CompletedProcess(command, child.returncode, output, errors)


# --- shards


def test_shards_hold_every_row_once(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "c"}\n{"text": "d"}')
    (tmp_path / "a.txt").write_bytes("é\nx\n".encode())
    (tmp_path / "_c.jsonl").write_bytes(b"{}\n")
    (tmp_path / "d.csv").write_bytes(b"not read\n")
    for size in (1, 2, 3, 10):
        shards = cut(find_files(str(tmp_path)), "auto", size)
        read = [row for shard in shards for row in shard.lines("text", check_text)]
        assert [(row.line, row.fields.get("text"), row.status) for row in read] == [
            (1, "é", "ok"),
            (2, "x", "ok"),
            (1, "a", "ok"),
            (2, None, "empty"),
            (3, "c", "ok"),
            (4, "d", "ok"),
        ]
        assert [shard.number for shard in shards] == list(range(len(shards)))
        assert max(shard.rows for shard in shards) <= size


def test_rows_of_parquet_are_read_by_place(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    write_parquet(path, {"text": [str(n) for n in range(23)]}, row_group_size=5)
    for start in range(23):
        for count in {1, 4, 5, 6, 23 - start}:
            table = parquet.read_table(str(path), start, min(count, 23 - start))
            assert table["text"].to_pylist() == [str(n) for n in range(start, min(start + count, 23))]
    write_parquet(path, {"prompt": pa.array([], pa.string())})
    with pytest.raises(ValueError, match="expected a column 'text', got 'prompt'"):
        parquet.count_rows(str(path))


# --- in this process


def test_shards_do_what_the_stream_does(call: Callable[..., Result], whole: bytes) -> None:
    result = call("in.jsonl", "-o", "scores/")
    assert result.exit_code == SOME_ROWS_FAILED
    parts = sorted(Path("scores").iterdir())
    assert [part.name for part in parts] == [f"part-{n:06d}.jsonl" for n in range(6)]
    assert b"".join(part.read_bytes() for part in parts) == whole
    assert not Path("scores.parts").exists()
    assert "pyqe: line 6: not JSON" in result.stderr
    assert "pyqe: line 18: text: expected a string, got a number" in result.stderr
    assert "pyqe: 43 rows, 3 failed" in result.stderr


def test_several_files(call: Callable[..., Result]) -> None:
    os.mkdir("texts")
    Path("texts/b.txt").write_text("the cat\n\n")
    Path("texts/a.jsonl").write_text('{"text": "a dog", "file": "mine"}\n{"no": "text"}\n')
    for source in ("texts", "texts/*"):
        result = call(source, "-o", "out.jsonl")
        assert result.exit_code == SOME_ROWS_FAILED
        assert "pyqe: line 2: expected a field 'text', got 'no' (texts/a.jsonl)" in result.stderr
        found = rows(Path("out.jsonl").read_text())
        assert [(row["file"], row["line"], row["status"]) for row in found] == [
            ("texts/a.jsonl", 1, "ok"),
            ("texts/a.jsonl", 2, "failed"),
            ("texts/b.txt", 1, "ok"),
            ("texts/b.txt", 2, "empty"),
        ]


def test_text_that_parquet_has_as_bytes(call: Callable[..., Result]) -> None:
    pytest.importorskip("pyarrow")
    write_parquet(Path("B.PARQUET"), {"text": [b"the cat", b"\xff", "é".encode()], "n": [b"\xff", b"a", None]})
    assert call("B.PARQUET", "-o", "out.jsonl").exit_code == SOME_ROWS_FAILED
    found = rows(Path("out.jsonl").read_text(encoding="utf-8"))
    assert [row["status"] for row in found] == ["ok", "failed", "ok"]
    assert found[1]["reason"] == "text: invalid UTF-8 at byte 1"
    assert [(found[i]["text"], found[i]["n"]) for i in (0, 2)] == [("the cat", "\\xff"), ("é", None)]
    Path("b.txt").write_text("the cat\n")
    assert call("b.txt", "-o", "lines.jsonl").exit_code == OK
    assert rows(Path("lines.jsonl").read_text())[0]["token_prob"] == found[0]["token_prob"]


def test_parquet_keeps_the_types_of_columns(call: Callable[..., Result]) -> None:
    pa = pytest.importorskip("pyarrow")
    texts = [None if n == 3 else f"the cat sat {n}" for n in range(11)]
    when = pa.array([86_400_000_000 * n for n in range(11)], pa.timestamp("us"))
    numbers = pa.array([float("nan"), *range(10)], pa.float32())
    write_parquet(Path("in.parquet"), {"when": when, "text": texts, "n": numbers, "quality": ["low"] * 11})
    for output in ("out.parquet", "out/"):
        result = call("in.parquet", "-o", output, "--to", "parquet")
        assert result.exit_code == SOME_ROWS_FAILED
        assert "pyqe: line 4: text: expected a string, got null" in result.stderr
    table = read_parquet("out.parquet")
    assert table.drop_columns("n") == read_parquet("out").drop_columns("n"), "in n there is a NaN"
    assert table.column_names[:5] == ["when", "text", "n", "line", "quality"]
    assert (table["when"].type, table["n"].type, table["quality"].type) == (when.type, numbers.type, pa.float64())
    assert table["line"].to_pylist() == list(range(1, 12))
    assert table["status"].to_pylist() == ["failed" if text is None else "ok" for text in texts]
    assert call("in.parquet", "-o", "out.jsonl").exit_code == SOME_ROWS_FAILED
    lines = rows(Path("out.jsonl").read_text())
    assert (lines[0]["n"], lines[1]["n"], lines[1]["when"]) == (None, 0.0, "1970-01-02T00:00:00")
    assert [row["quality"] for row in lines] == table["quality"].to_pylist()
    assert [row["tokens"] for row in lines] == table["tokens"].to_pylist()


def test_lines_become_parquet(call: Callable[..., Result], whole: bytes) -> None:
    pytest.importorskip("pyarrow")
    assert call("in.jsonl", "-o", "out.parquet").exit_code == SOME_ROWS_FAILED
    table, lines = read_parquet("out.parquet").to_pylist(), rows(whole)
    for name in ("line", "id", "status", "reason", "quality", "tokens", "offsets"):
        same = [row.get(name) for row in lines if row["status"] == "ok"]
        assert [row[name] for row in table if row["status"] == "ok"] == same
    assert [row["text"] for row in table][17:18] == ["5"], "JSON, where it is no string"
    Path("mixed.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "1"}\n')
    result = call("mixed.jsonl", "-o", "mixed.parquet")
    assert (result.exit_code, "n: Parquet needs one type" in result.stderr) == (FAILED, True)
    for output in ("mixed.parquet", "mixed/"):
        result = call("mixed.jsonl", "-o", output, "--to", "parquet", shard=("--shard-rows", "1"))
        assert (result.exit_code, "Parquet needs one type" in result.stderr) == (FAILED, True)
    Path("large.jsonl").write_text(json.dumps({"text": "a", "n": 2**64}))
    result = call("large.jsonl", "-o", "large.parquet")
    assert (result.exit_code, "n: Parquet needs one type" in result.stderr) == (FAILED, True)


def test_parts_of_a_parquet_folder_have_the_same_columns(call: Callable[..., Result]) -> None:
    pytest.importorskip("pyarrow")
    fields = [{"n": 1}, {"n": 2.5, "prompt": "b"}, {"note": "c"}]
    Path("in.jsonl").write_text("".join(json.dumps({"text": "a", **row}) + "\n" for row in fields))
    assert call("in.jsonl", "-o", "out/", "--to", "parquet", shard=("--shard-rows", "1")).exit_code == OK
    found = read_parquet("out").to_pylist()
    assert [{name: row[name] for name in ("n", "prompt", "note")} for row in found] == [
        {"n": 1.0, "prompt": None, "note": None},
        {"n": 2.5, "prompt": "b", "note": None},
        {"n": None, "prompt": None, "note": "c"},
    ]


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet", "out/"])
def test_no_rows(call: Callable[..., Result], output: str) -> None:
    if output.endswith("parquet"):
        pytest.importorskip("pyarrow")
    os.mkdir("texts")
    Path("texts/a.jsonl").touch()
    assert call("texts", "-o", output).exit_code == OK
    if output == "out.parquet":
        assert read_parquet(output).num_rows == 0
    else:
        assert Path(output.replace("/", "/part-000000.jsonl")).read_bytes() == b""


def test_strict_names_the_file(call: Callable[..., Result], whole: bytes) -> None:
    result = call("in.jsonl", "-o", "out/", "--strict")
    assert result.exit_code == FAILED
    reason = rows(whole)[5]["reason"]
    assert result.stderr.endswith(f"goes on from there\npyqe: error: in.jsonl: line 6: {reason}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "out/"], USAGE, "A corpus needs a file, folder or pattern"),
        (["in.jsonl", "--engine", "ray"], USAGE, "A corpus needs a file, folder or pattern"),
        (["in.jsonl", "-o", "/dev/null", "--to", "parquet"], USAGE, "A corpus needs a file, folder or pattern"),
        (["in.jsonl", "-o", "out/", "--to", "tsv"], USAGE, "written as jsonl or parquet"),
        (["in.jsonl", "-o", "out/", "--workers", "2"], USAGE, "need --engine ray"),
        (["in.jsonl", "-o", "."], FAILED, "has something in it already"),
        (["*.jsonl", "-o", "in.jsonl"], FAILED, "the output is one of the files of the input"),
        (["*.nosuch", "-o", "out.jsonl"], FAILED, "no file, no folder"),
        (["*.jsonl", "-o", "in.jsonl/"], FAILED, "a file has this name"),
    ],
)
def test_refusals(call: Callable[..., Result], arguments: list[str], code: int, message: str) -> None:
    Path("in.jsonl").write_text('{"text": "x"}\n')
    result = call(*arguments)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert os.listdir() == ["in.jsonl"]


# --- crashes


@pytest.fixture
def interrupted(call: Callable[..., Result], whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three shards of in.jsonl are in out.parts."""
    score = corpus.score_shard

    def stop(shard: Any, *arguments: Any) -> Any:
        if shard.number == 3:
            raise KeyboardInterrupt
        return score(shard, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "score_shard", stop)
        result = call("in.jsonl", "-o", "out/")
    assert result.exit_code == INTERRUPTED
    assert "out.parts; --resume goes on from there" in result.stderr


@pytest.mark.usefixtures("interrupted")
def test_resume_does_what_is_missing(call: Callable[..., Result], whole: bytes) -> None:
    before = {path.name: path.stat().st_ino for path in Path("out.parts").glob("part-*")}
    assert sorted(before) == [f"part-{n:06d}.jsonl" for n in range(3)]
    Path("out.parts/.part-000003.jsonl.0123.tmp").touch()  # of a process that was killed
    result = call("in.jsonl", "-o", "out/", "--resume")
    assert result.exit_code == SOME_ROWS_FAILED
    assert "pyqe: 19 rows, 24 from an earlier run, 3 failed" in result.stderr
    assert len(os.listdir("out")) == 6
    assert b"".join(path.read_bytes() for path in sorted(Path("out").iterdir())) == whole
    assert before.items() <= {path.name: path.stat().st_ino for path in Path("out").iterdir()}.items()


@pytest.mark.usefixtures("interrupted")
def test_without_resume_everything_is_done(call: Callable[..., Result], whole: bytes) -> None:
    Path("out.parts/part-000000.jsonl").write_text("spoilt")
    assert "pyqe: 43 rows, 3 failed" in call("in.jsonl", "-o", "out/").stderr
    assert b"".join(path.read_bytes() for path in sorted(Path("out").iterdir())) == whole


@pytest.mark.usefixtures("interrupted")
def test_a_part_that_is_gone_is_done_again(call: Callable[..., Result], whole: bytes) -> None:
    os.remove("out.parts/part-000001.jsonl")
    assert "pyqe: 27 rows, 16 from an earlier run, 3 failed" in call("in.jsonl", "-o", "out/", "--resume").stderr
    assert b"".join(path.read_bytes() for path in sorted(Path("out").iterdir())) == whole


def test_parts_are_no_input(call: Callable[..., Result], whole: bytes) -> None:
    os.mkdir("local.parts")
    Parts("local/", "jsonl").begin({}, resume=False)
    Path("local.parts/part-000000.jsonl").write_bytes(whole)
    os.rename("local.jsonl", "local.txt")
    assert "pyqe: 43 rows, 3 failed" in call("**/*.jsonl", "-o", "local/").stderr


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize(("options", "kept"), [((), True), (("--signals", "prob"), False)])
def test_torchrun_goes_on_with_the_same_run(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], kept: bool
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_MAX_RESTARTS", "2")):
        monkeypatch.setenv(name, value)
    part = Path("out.parts/part-000000.jsonl")
    before = part.stat().st_mtime_ns
    result = call("in.jsonl", "-o", "out/", *options)
    assert (result.exit_code, "24 from an earlier run" in result.stderr) == (OK, kept)
    assert (Path("out", part.name).stat().st_mtime_ns == before) == kept


@pytest.mark.usefixtures("interrupted")
def test_resume_refuses_another_run(call: Callable[..., Result], models: Path) -> None:
    result = call("in.jsonl", "-o", "out/", "--resume", "--signals", "prob")
    assert (result.exit_code, "has not the same signals" in result.stderr) == (FAILED, True)
    result = call("in.jsonl", "-o", "out/", "--resume", "--dtype", "bfloat16")
    assert (result.exit_code, "has not the same dtype" in result.stderr) == (FAILED, True)
    os.utime(models / "head" / "model.safetensors")  # trained again
    result = call("in.jsonl", "-o", "out/", "--resume")
    assert (result.exit_code, "has not the same files of the head" in result.stderr) == (FAILED, True)
    Path("in.jsonl").write_text('{"text": "another"}\n')
    result = call("in.jsonl", "-o", "out/", "--resume")
    assert (result.exit_code, "has not the same input" in result.stderr) == (FAILED, True)
    assert len(list(Path("out.parts").glob("part-*"))) == 3, "nothing is lost"


def test_folders_of_others_stay(call: Callable[..., Result]) -> None:
    os.mkdir("out.parts")
    Path("out.parts/mine").touch()
    Path("in.jsonl").write_text('{"text": "x"}\n')
    result = call("in.jsonl", "-o", "out/")
    assert (result.exit_code, "not of an earlier run" in result.stderr) == (FAILED, True)
    assert os.listdir("out.parts") == ["mine"]


def test_a_shard_that_ends_its_processes_is_given_up(tmp_path: Path) -> None:
    parts = Parts(f"{tmp_path}/out/", "jsonl")
    parts.begin({}, resume=False)
    for _ in range(4):
        parts.attempt(7)
    with pytest.raises(RuntimeError, match=r"part-000007.jsonl: begun 4 times"):
        parts.attempt(7)
    parts.begin({}, resume=True)
    parts.attempt(7)


def test_input_that_shrinks_is_an_error(
    call: Callable[..., Result], whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = corpus.score_shard

    def cut_off(shard: Any, *arguments: Any) -> Any:
        os.truncate("in.jsonl", 300)
        return score(shard, *arguments)

    monkeypatch.setattr(corpus, "score_shard", cut_off)
    result = call("in.jsonl", "-o", "out/")
    assert (result.exit_code, "have become" in result.stderr) == (FAILED, True)


# --- torchrun


def torchrun(folder: Path, models: Path, *arguments: str, kill_at: str) -> subprocess.CompletedProcess[str]:
    """``pyqe score`` of in.jsonl into out.jsonl by two processes, or as many as the arguments say."""
    job = ("--standalone", "--nproc-per-node", "2", *arguments)
    names = ("-m", str(models / "llama"), "--head", str(models / "head"), *SHARD)
    command = ("-m", "torch.distributed.run", *job, "-m", "pyqe", "score", "in.jsonl", "-o", "out.jsonl", *names)
    return finished([sys.executable, *command], folder, kill_at)


@pytest.mark.parametrize("count", ["1", "2"])
def test_torchrun_starts_again_after_a_kill(models: Path, whole: bytes, tmp_path: Path, count: str) -> None:
    options = ("--max-restarts", "1", "--nproc-per-node", count)
    ended = torchrun(tmp_path, models, *options, kill_at="part-000003.jsonl")
    assert ended.returncode == OK, ended.stderr
    assert (tmp_path / "killed-part-000003.jsonl").exists()
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert "from an earlier run, 3 failed" in ended.stderr
    assert not (tmp_path / "out.jsonl.parts").exists()


def test_killed_torchrun_is_resumed(call: Callable[..., Result], models: Path, whole: bytes, tmp_path: Path) -> None:
    ended = torchrun(tmp_path, models, kill_at="000002.json")  # its part is there, but not known to be whole
    assert ended.returncode == FAILED
    assert "-9" in ended.stderr
    assert not (tmp_path / "out.jsonl").exists()
    assert (tmp_path / "out.jsonl.parts" / "part-000000.jsonl").exists()
    result = call("in.jsonl", "-o", "out.jsonl", "--resume")
    assert result.exit_code == SOME_ROWS_FAILED, result.stderr
    assert " from an earlier run, 3 failed" in result.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.timeout(120)  # they would wait for ever
def test_what_processes_left_that_have_ended_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    monkeypatch.setattr(processes, "_job_store", lambda: store)
    monkeypatch.setenv("WORLD_SIZE", "3")

    def started() -> list[processes.Processes]:
        found = []
        for rank in "012":
            monkeypatch.setenv("RANK", rank)
            found.append(processes.Processes())
        return found

    def work(process: processes.Processes, shared: str) -> tuple[str, list[str] | None]:
        return (value := process.share(lambda: shared)), process.gather(f"{value} {process.rank}")

    with ThreadPoolExecutor(3) as pool:
        store.set("name-2", "of one that had to wait and was killed")
        for shared in ("first", "x" * 10_000_000):
            done = list(pool.map(lambda process, shared=shared: work(process, shared), reversed(started())))
            assert done == [(shared, None), (shared, None), (shared, [f"{shared} {rank}" for rank in range(3)])]


def test_a_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert local_device("auto") == "auto"
    for name, value in (("RANK", "7"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert (local_device("auto"), local_device("cuda")) == ("cuda:1", "cuda:1")
    assert (local_device("cpu"), local_device("cuda:0")) == ("cpu", "cuda:0")


# --- Ray


@pytest.fixture(scope="module")
def ray_report(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What tests/ray_session.py writes; a worker is killed in its first command."""
    pytest.importorskip("ray.data")
    folder = tmp_path_factory.mktemp("ray")
    (folder / "in.jsonl").write_text("".join(line + "\n" for line in LINES))
    os.mkdir(folder / "texts")
    write_parquet(folder / "texts" / "a.parquet", {"text": ["x", "the cat"], "n": [1, 2]})
    write_parquet(folder / "texts" / "b.parquet", {"text": ["x", "the cat", None], "n": [1, 2, 3]})
    names = ("-m", str(models / "llama"), "--head", str(models / "head"), "--engine", "ray", *SHARD)
    commands = [
        ["score", "in.jsonl", "-o", "out.jsonl", "--workers", "2", *names],
        ["score", "texts", "-o", "scores/", "--to", "parquet", "--strict", *names],
    ]
    session = [sys.executable, str(ROOT / "tests" / "ray_session.py")]
    names = (str(models / "llama"), str(models / "head"))
    ended = finished([*session, json.dumps(commands), *names, "report.json"], folder, "part-000002.jsonl")
    assert ended.returncode == OK, ended.stderr
    return folder, json.loads((folder / "report.json").read_text())


def test_ray_redoes_what_a_killed_worker_had(ray_report: tuple[Path, dict[str, Any]], whole: bytes) -> None:
    folder, report = ray_report
    code, errors = report["commands"][0]
    assert code == SOME_ROWS_FAILED, errors
    assert (folder / "killed-part-000002.jsonl").exists()
    assert (folder / "out.jsonl").read_bytes() == whole
    assert "pyqe: 43 rows, 3 failed" in errors
    assert "pyqe: line 18: text: expected a string, got a number" in errors


def test_what_a_ray_worker_raises_ends_the_command(ray_report: tuple[Path, dict[str, Any]]) -> None:
    code, errors = ray_report[1]["commands"][1]
    assert code == FAILED
    assert errors.splitlines()[-2].endswith("scores.parts; --resume goes on from there")
    assert errors.splitlines()[-1] == "pyqe: error: texts/b.parquet: line 3: text: expected a string, got null"


def test_ray_scorer_adds_columns(ray_report: tuple[Path, dict[str, Any]]) -> None:
    good, bad, _ = found = ray_report[1]["rows"]
    assert [(row["n"], row["status"]) for row in found] == [(1, "ok"), (2, "failed"), (3, "ok")]
    assert bad["reason"] == "text: expected a string, got null"
    assert bad["quality"] is None
    assert len(good["token_quality"]) == len(good["tokens"]) > 0
    assert good["token_prob"] is None, "not asked for"


@pytest.mark.parametrize(
    ("nodes", "options", "workers", "each"),
    [
        ([{"CPU": 8}], (None, None), 1, {"num_cpus": 8}),
        ([{"CPU": 8}], (4, None), 4, {"num_cpus": 2}),
        ([{"CPU": 8}, {"CPU": 2}, {}], (None, None), 2, {"num_cpus": 2}),
        ([{"CPU": 1}], (2, None), 2, {"num_cpus": 1}),
        ([{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}], (None, None), 8, {"num_gpus": 1.0}),
        ([{"CPU": 8, "GPU": 2}], (None, 0.5), 4, {"num_gpus": 0.5}),
        ([{"CPU": 8, "GPU": 2}], (None, 0.0), 1, {"num_cpus": 8}),
        ([{"CPU": 8, "GPU": 80}], (None, None), 10, {"num_gpus": 1.0}),
        ([{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3}], (None, 2.0), 2, {"num_gpus": 2.0}),
        ([{"CPU": 8}], (3, 1.0), 3, {"num_gpus": 1.0}),
    ],
)
def test_workers_of_a_cluster(
    nodes: list[dict[str, float]], options: tuple[Any, Any], workers: int, each: dict[str, float]
) -> None:
    pytest.importorskip("ray.data")
    described = [{"Alive": True, "Resources": node} for node in nodes]
    pool = ray_engine._pool([*described, {"Alive": False, "Resources": {"CPU": 99, "GPU": 99}}], 10, *options)
    assert pool.pop("compute").max_size == workers
    assert pool == each


@pytest.mark.parametrize(("node", "gpus"), [({"CPU": 8, "GPU": 1}, 2.0), ({"CPU": 8}, 1.0), ({}, None)])
def test_a_worker_that_no_cluster_has(node: dict[str, float], gpus: float | None) -> None:
    pytest.importorskip("ray.data")
    with pytest.raises(ValueError, match="workers: no node has"):
        ray_engine._pool([{"Alive": True, "Resources": node}], 10, None, gpus)


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("ray", ["in.jsonl", "-o", "out.jsonl", "--engine", "ray"]), ("pyarrow", ["in.jsonl", "-o", "out.parquet"])],
)
def test_what_is_not_installed_is_named(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, package: str, arguments: list[str]
) -> None:
    Path("in.jsonl").write_text('{"text": "x"}\n')
    monkeypatch.setitem(sys.modules, package, None)
    result = call(*arguments)
    extra = {"ray": "ray", "pyarrow": "parquet"}[package]
    assert (result.exit_code, f"pip install 'pyqe[{extra}]'" in result.stderr) == (FAILED, True), result.stderr


# --- the plan


def test_the_page_shows_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    scaling.main([])
    printed = capsys.readouterr().out
    assert f"<!-- python -m benchmarks.scaling -->\n{printed}<!-- end -->" in page


def test_the_plan_takes_measured_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rival = {"rival": "pyqe", "missing": None, "gflop_s": 4e5, "gb_s": 2e3}
    case = {"suite": "head", "dtype": "bf16", "rivals": [rival]}
    cases = [{**case, "name": "softmax stats", "n": 4096}, {**case, "name": "token logits, 11 a row", "n": 4096}]
    found = {"machine": {"gpu": {"name": "A GPU"}}, "ceilings": {"matmul_gflop_s": {"bf16": 5e5}}, "cases": cases}
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    scaling.main(["--results", str(tmp_path / "gpu.json"), "--matmul-tflops", "100", "--bandwidth", "1"])
    printed = capsys.readouterr().out
    # 1e6 x 2 x 6.98e9 / 5e14, 1e6 x 2 x 128256 x 4096 / 4e14 and 1e6 x 4 x 4096 / 2e12 seconds
    assert "| A GPU (rates measured) | 8B | 27.9 | 2.63 | 0.00819 |" in printed
    assert "| this GPU (rates given) | 8B | 140 | 10.5 | 0.0164 |" in printed
    assert "H100" not in printed
    (tmp_path / "gpu.json").write_text(json.dumps({**found, "cases": []}))
    with pytest.raises(ValueError, match="no case 'softmax stats'"):
        scaling.main(["--results", str(tmp_path / "gpu.json")])
