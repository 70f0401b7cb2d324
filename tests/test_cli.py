"""The command line, through its entry point: what goes in, what comes out, and the exit codes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner, Result

import pyqe
from pyqe.cli import main
from pyqe.scored import SIGNALS

pytestmark = pytest.mark.usefixtures("one_thread")

OK, FAILED, USAGE, SOME_ROWS_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
ROOT = Path(__file__).parents[1]
LINES = [f"the cat sat on mat {number}, {'and a dog ' * (number % 4)}!" for number in range(20)]
CHAT_TEMPLATE = """{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('only users') }}{% endif %}
[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %} [assistant] {% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models with their tokenizer, and a head of the first."""
    place = tmp_path_factory.mktemp("models")
    tokenizer = tiny.tokenizer()
    for name, template in (("llama", CHAT_TEMPLATE), ("gpt2", None), ("t5", None)):
        tiny.model(name).save_pretrained(place / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(place / name)
    tokenizer.chat_template = None
    pyqe.SigmoidHead.from_lm_head(tiny.model("llama"), tokenizer, kind="rescaling").save_pretrained(
        place / "llama-head"
    )
    return place


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(folder: Path, here: Path) -> Callable[..., Result]:
    """Runs a command in this process; names of models and heads become their folders."""

    def run(command: str, *arguments: object, stdin: str | bytes = "") -> Result:
        words = [str(folder / word) if word in os.listdir(folder) else str(word) for word in arguments]
        return CliRunner().invoke(main, [command, *words], input=stdin)

    return run


def process(*arguments: object, env: Mapping[str, str] = {}, **options: Any) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "pyqe", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **{**pipes, **options})


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def jsonl(items: Sequence[object]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[bytes]) -> None:
    for _ in range(6000):
        if condition():
            return
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    raise AssertionError("it did not happen within a minute")


# --- the entry point


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["score", "--help"], ["train", "--help"]])
def test_help_is_quick(arguments: list[str]) -> None:
    """Neither torch nor transformers nor numpy is imported."""
    command = [sys.executable, "-X", "importtime", "-m", "pyqe", *arguments]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
    imported = {line.rsplit("|", 1)[1].strip() for line in ended.stderr.decode().splitlines() if "|" in line}
    assert "pyqe.cli.main" in imported
    assert not imported & {"torch", "transformers", "numpy", "safetensors", "jinja2", "yaml", "tqdm"}


def test_import_is_quick() -> None:
    code = "import sys, pyqe; assert not {'torch', 'transformers', 'numpy', 'click'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_help_teaches() -> None:
    text = CliRunner().invoke(main, ["--help"]).stdout
    assert all(f"pyqe {name}" in text for name in ("demo", "train", "score", "generate", "report", "bench", "doctor"))
    assert "Exit codes" in text
    for name in main.commands:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == OK
        assert "Usage: main" in result.stdout


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["score"], ["score", "-m"], ["score", "--nonsense"], ["train", "-m", "x", "-o", "y"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == USAGE
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_pyqe_debug_shows_the_traceback(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in call("score", "-m", "./nosuch").stderr
    monkeypatch.setenv("PYQE_DEBUG", "1")
    assert "Traceback" in call("score", "-m", "./nosuch").stderr


# --- score: what goes in


def test_each_format_gives_the_same_scores(call: Callable[..., Result], here: Path) -> None:
    texts = ["the cat", "a dog"]
    (here / "a.jsonl").write_text(jsonl([{"text": text} for text in texts]))
    (here / "a.txt").write_text("\n".join(texts))
    (here / "a.tsv").write_text("".join(f"\t{text}\r\n" for text in texts))
    outputs = [rows(call("score", name, "-m", "llama").stdout) for name in ("a.jsonl", "a.txt", "a.tsv")]
    for line, text in enumerate(texts, 1):
        assert [output[line - 1]["text"] for output in outputs] == [text] * 3
        assert [output[line - 1]["line"] for output in outputs] == [line] * 3
    assert outputs[0] == outputs[1]
    scores = [row["token_prob"] for row in outputs[0]]
    assert [row["token_prob"] for row in outputs[2]] == scores, "an empty source is BOS alone"


@pytest.mark.parametrize("name", ["a.data", "-"])
def test_unnamed_input_is_json_if_its_first_line_is(call: Callable[..., Result], here: Path, name: str) -> None:
    for content in ('\n  {"text": "a dog", "id": 7}\n', '\ufeff{"text": "a dog", "id": 7}\n'):
        (here / "a.data").write_text(content, encoding="utf-8")
        row = rows(call("score", name, "-m", "llama", stdin=content.encode()).stdout)[-1]
        assert (row["text"], row["id"]) == ("a dog", 7)
    (here / "a.data").write_text("a dog\n{}\n")
    found = rows(call("score", name, "-m", "llama", stdin="a dog\n{}\n").stdout)
    assert [row["text"] for row in found] == ["a dog", "{}"]


def test_stdin_and_stdout_by_name(call: Callable[..., Result]) -> None:
    result = call("score", "-", "-o", "-", "-m", "llama", stdin="a dog\n")
    assert result.exit_code == OK
    assert rows(result.stdout)[0]["tokens"] == ["a", " dog"]
    assert "1 rows, 0 failed, 2 tokens in" in result.stderr
    assert result.stderr.count("\n") == 1, "no progress bar, as this is no terminal"


@pytest.mark.parametrize("form", ["jsonl", "text", "tsv", "auto"])
@pytest.mark.parametrize("to", ["jsonl", "tsv"])
def test_empty_input(call: Callable[..., Result], here: Path, form: str, to: str) -> None:
    result = call("score", "-m", "llama", "--from", form, "--to", to, "-o", "out")
    assert (result.exit_code, result.stdout) == (OK, "")
    assert (here / "out").read_bytes() == b""


BAD_ROWS = {
    "broken JSON": (b'{"text": "a"', "not JSON"),
    "missing field": (b'{"txt": "a", "id": 3}', "expected a field 'text', got 'txt', 'id'"),
    "no fields": (b"{}", "no fields"),
    "wrong type": (b'{"text": ["a"]}', "text: expected a string, got a list"),
    "null": (b'{"text": null}', "got null"),
    "wrong prompt": (b'{"text": "a", "prompt": 5}', "prompt: expected a string or a list of messages, got a number"),
    "no messages": (b'{"text": "a", "prompt": []}', "an empty list"),
    "wrong message": (b'{"text": "a", "prompt": [{"role": "user"}]}', "message 1"),
    "refused by the template": (b'{"text": "a", "prompt": [{"role": "x", "content": "y"}]}', "only users"),
    "not an object": (b"[1]", "expected a JSON object, got list"),
    "invalid UTF-8": (b'{"text": "\xff"}', "invalid UTF-8 at byte 11"),
    "half a character": (b'{"text": "\\ud800"}', "surrogate"),
    "NaN": (b'{"text": "a", "x": NaN}', "NaN"),
    "deep": (b"[" * 100_000, "not JSON"),
}


def test_bad_rows_take_no_others_along(call: Callable[..., Result]) -> None:
    lines = [b'{"text": "good"}', *(line for line, _ in BAD_ROWS.values()), b"", b'{"text": "", "id": "last"}']
    result = call("score", "-m", "llama", "--batch-size", "1", stdin=b"\n".join(lines))
    assert result.exit_code == SOME_ROWS_FAILED
    found = rows(result.stdout)
    assert [row["line"] for row in found] == list(range(1, len(lines) + 1))
    assert [row["status"] for row in found] == ["ok", *["failed"] * len(BAD_ROWS), "empty", "empty"]
    for row, (_, reason) in zip(found[1:], BAD_ROWS.values(), strict=False):
        assert reason in row["reason"]
        assert row["quality"] is None
        assert row["tokens"] == []
        assert f"line {row['line']}: {row['reason']}" in result.stderr
    assert found[2]["id"] == 3, "a failed row keeps its fields"
    assert found[-1]["id"] == "last"


@pytest.mark.parametrize("line", [line for line, _ in BAD_ROWS.values()], ids=list(BAD_ROWS))
def test_strict_stops_at_a_bad_row(call: Callable[..., Result], here: Path, line: bytes) -> None:
    stdin = b'{"text": "good"}\n' * 6 + line + b"\n"
    result = call("score", "-m", "llama", "--strict", "-o", "out.jsonl", stdin=stdin)
    assert result.exit_code == FAILED
    assert "pyqe: error: line 7: " in result.stderr
    assert not (here / "out.jsonl").exists()


def test_other_fields_pass_through_and_results_win(call: Callable[..., Result]) -> None:
    messages = [{"role": "user", "content": "hi"}]
    given = {"id": "x", "text": "a dog", "prompt": messages, "tokens": "old", "line": 99, "meta": {"deep": [1]}}
    row = rows(call("score", "-m", "llama", stdin=jsonl([given])).stdout)[0]
    assert (row["id"], row["meta"], row["prompt"]) == ("x", {"deep": [1]}, messages)
    assert (row["line"], row["tokens"]) == (1, ["a", " dog"])


def test_a_wrong_number_of_columns(call: Callable[..., Result]) -> None:
    result = call("score", "-m", "t5", "--from", "tsv", stdin="a\tb\nc\nd\te\tf\n\n")
    assert result.exit_code == SOME_ROWS_FAILED
    assert [row["status"] for row in rows(result.stdout)] == ["ok", "failed", "failed", "empty"]
    assert "line 2: expected source TAB target, got 1 columns" in result.stderr


def test_an_encoder_decoder_needs_a_source(call: Callable[..., Result]) -> None:
    stdin = jsonl([{"text": "b"}, {"text": "b", "prompt": "a"}])
    result = call("score", "-m", "t5", stdin=stdin)
    assert result.exit_code == SOME_ROWS_FAILED
    assert [row["status"] for row in rows(result.stdout)] == ["failed", "ok"]
    assert "line 1: prompt: expected the source" in result.stderr


def test_a_text_longer_than_the_context(call: Callable[..., Result]) -> None:
    long = "one two three " * 40
    row = rows(call("score", "-m", "llama", stdin=f"{long}\n").stdout)[0]
    assert row["status"] == "ok"
    assert "windows" in row["reason"]
    assert None not in row["token_prob"]
    strict = call("score", "-m", "llama", "--strict", stdin=f"short\nshort\n{long}\n")
    assert strict.exit_code == FAILED
    assert "pyqe: error: line 3: " in strict.stderr
    assert "do not fit 64" in strict.stderr
    windows = rows(call("score", "-m", "llama", "--max-length", "8", "--overlap", "2", stdin=LINES[0]).stdout)[0]
    assert "longer than 8 tokens" in windows["reason"]


def test_missing_files(call: Callable[..., Result], here: Path) -> None:
    result = call("score", "nosuch.jsonl", "-m", "llama", "-o", "out.jsonl")
    assert (result.exit_code, result.stderr) == (FAILED, "pyqe: error: nosuch.jsonl: No such file or directory\n")
    result = call("score", "-m", "llama", "-o", "nosuch/out.jsonl")
    assert (result.exit_code, result.stderr.count("\n")) == (FAILED, 1)
    result = call("score", "-m", "./nosuch", "-o", "out.jsonl")
    assert (result.exit_code, result.stderr) == (FAILED, "pyqe: error: model: no folder './nosuch'\n")
    result = call("score", "-m", "llama-head")
    assert (result.exit_code, result.stderr.count("\n")) == (FAILED, 1)
    result = call("score", "-m", "llama", "--head", "./nosuch")
    assert (result.exit_code, result.stderr.count("\n")) == (FAILED, 1)
    assert "./nosuch" in result.stderr
    assert list(here.iterdir()) == []


def test_no_such_model_says_so_in_one_line(here: Path) -> None:
    child = process("score", "-m", "nosuch", stdin=subprocess.DEVNULL)
    output, errors = child.communicate()
    assert (child.returncode, output, errors.count(b"\n")) == (FAILED, b"", 1)
    assert b"no folder 'nosuch', and the hub does not give it" in errors


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_damaged_model_folders(
    call: Callable[..., Result], folder: Path, here: Path, name: str, content: bytes | None
) -> None:
    shutil.copytree(folder / "llama", here / "damaged")
    (here / "damaged" / name).unlink()
    if content is not None:
        (here / "damaged" / name).write_bytes(content)
    result = call("score", "-m", "./damaged", stdin="a")
    assert (result.exit_code, result.stderr.count("\n")) == (FAILED, 1)
    assert result.stderr.startswith("pyqe: error: model: cannot load the folder './damaged': ")


def test_devices_and_dtypes(call: Callable[..., Result]) -> None:
    result = call("score", "-m", "llama", "--device", "toaster", stdin="a")
    assert (result.exit_code, result.stderr.count("\n")) == (FAILED, 1)
    assert "device: torch cannot use 'toaster'" in result.stderr
    assert call("score", "-m", "llama", "--device", "cpu", "--dtype", "bfloat16", stdin="a").exit_code == OK


# --- score: heads and signals


def test_quality_of_a_head(call: Callable[..., Result]) -> None:
    row = rows(call("score", "-m", "llama", "--head", "llama-head", stdin="a dog\n").stdout)[0]
    assert row["quality"] == pytest.approx(sum(row["token_quality"]) / 2)
    assert {f"token_{signal}" for signal in SIGNALS} <= set(row)


def test_a_head_of_another_model(call: Callable[..., Result], here: Path) -> None:
    tokenizer = tiny.tokenizer()
    for name, options, numbers in (
        ("wide", {"hidden_size": 64}, "hidden_size: the head has 64, the model 32"),
        ("many", {"vocab_size": 500}, f"vocab_size: the head has 500, the model {len(tokenizer)}"),
    ):
        pyqe.SigmoidHead.from_lm_head(tiny.model("llama", **options), kind="rescaling").save_pretrained(here / name)
        result = call("score", "-m", "llama", "--head", here / name, stdin="a")
        assert (result.exit_code, result.stderr) == (FAILED, f"pyqe: error: {numbers}\n")


def test_signals(call: Callable[..., Result]) -> None:
    row = rows(call("score", "-m", "llama", "--signals", "prob, entropy", stdin="a dog\n").stdout)[0]
    assert {name for name in row if name.startswith("token_")} == {"token_ids", "token_prob", "token_entropy"}
    for arguments in (["--signals", "nonsense"], ["--signals", ""], ["--signals", "quality"], ["--to", "text"]):
        result = call("score", "-m", "./nosuch", *arguments)
        assert result.exit_code == USAGE, "known before a model is loaded"
        assert arguments[0] in result.stderr
    result = call("score", "-m", "llama", "--head", "llama-head", "--signals", "prob", "--to", "text")
    assert result.exit_code == USAGE


# --- score: what comes out


def test_to_text(call: Callable[..., Result]) -> None:
    result = call("score", "-m", "llama", "--head", "llama-head", "--to", "text", stdin="a dog\n\nthe cat\n")
    first, blank, last = result.stdout.splitlines()
    assert blank == "nan"
    assert all(0 < float(number) < 1 for number in (first, last))


def test_to_tsv(call: Callable[..., Result]) -> None:
    stdin = jsonl([{"text": "a dog"}, {"txt": "bad"}, {"text": 'x\t"\n'}])
    result = call("score", "-m", "llama", "--signals", "prob,entropy", "--to", "tsv", stdin=stdin)
    assert result.exit_code == SOME_ROWS_FAILED
    header, *cells = [line.split("\t") for line in result.stdout.splitlines()]
    assert header == ["line", "token", "prob", "entropy"]
    assert {len(row) for row in cells} == {4}
    assert [row[0] for row in cells] == ["1", "1", *["3"] * (len(cells) - 2)]
    assert "".join(json.loads(f'"{row[1]}"') for row in cells) == 'a dogx\t"\n'


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_links_stay_links(call: Callable[..., Result], here: Path) -> None:
    (here / "link.jsonl").symlink_to("out.jsonl")
    assert call("score", "-m", "llama", "-o", "link.jsonl", stdin="a dog\n").exit_code == OK
    assert (here / "link.jsonl").is_symlink()
    assert rows((here / "out.jsonl").read_text())[0]["text"] == "a dog"
    with (here / "out.jsonl").open("r+b") as file:
        name = f"/proc/self/fd/{file.fileno()}"
        assert call("score", "-m", "llama", "-o", name, stdin="the cat\n").exit_code == OK
        assert rows(file.read().decode())[0]["text"] == "the cat", "written to, not replaced"


def test_a_file_is_replaced_at_the_end(call: Callable[..., Result], here: Path) -> None:
    (here / "texts.txt").write_text("a dog\n")
    (here / "out.jsonl").write_text("old")
    assert call("score", "texts.txt", "-m", "./nosuch", "-o", "out.jsonl").exit_code == FAILED
    assert (here / "out.jsonl").read_text() == "old"
    result = call("score", "texts.txt", "-m", "llama", "-o", "out.jsonl")
    assert (result.exit_code, result.stdout) == (OK, "")
    assert rows((here / "out.jsonl").read_text())[0]["text"] == "a dog"
    assert call("score", "texts.txt", "-m", "llama", "-o", "texts.txt").exit_code == OK, "onto the input"
    assert sorted(path.name for path in here.iterdir()) == ["out.jsonl", "texts.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(call: Callable[..., Result], folder: Path, here: Path) -> None:
    result = call("score", "-m", "llama", "-o", "/dev/full", stdin="a dog\n")
    assert (result.exit_code, result.stdout) == (FAILED, "")
    assert result.stderr == "pyqe: error: /dev/full: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_stdout(folder: Path, here: Path, unbuffered: str) -> None:
    """Also where stdout keeps what it could not write, which Python does by itself unless told otherwise."""
    environment = {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        child = process("score", "-m", folder / "llama", stdout=full, env=environment)
        _, errors = child.communicate(b"a dog\n")
        assert (child.returncode, errors) == (FAILED, b"pyqe: error: stdout: No space left on device\n")
        child = process("--help", stdout=full, env=environment)
        _, errors = child.communicate()
        assert (child.returncode, errors) == (FAILED, b"pyqe: error: No space left on device\n")


def test_a_broken_pipe_is_quiet(folder: Path, here: Path) -> None:
    child = process("score", "-m", folder / "llama", "--batch-size", "1")
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(b"a dog\n" * 40)
    child.stdin.flush()
    assert b'"line": 1,' in child.stdout.readline()
    child.stdout.close()
    child.stdin.write(b"a dog\n" * 2000)
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    assert child.stderr is not None
    assert (child.wait(), child.stderr.read()) == (FAILED, b"")


def test_the_progress_bar_is_for_terminals(folder: Path, here: Path) -> None:
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    child = process("score", "-m", folder / "llama", stderr=end, env={"PYTHONIOENCODING": "ascii"})
    os.close(end)
    output, _ = child.communicate("Héllo 🎉\n".encode())
    assert rows(output.decode())[0]["text"] == "Héllo 🎉", "UTF-8 whatever the locale is"
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while piece := os.read(terminal, 4096):
            shown += piece
    os.close(terminal)
    assert b"tokens/s]" in shown


# --- interrupting and resuming


@pytest.fixture
def whole(call: Callable[..., Result], here: Path) -> bytes:
    """What an uninterrupted run of texts.txt writes."""
    (here / "texts.txt").write_text("\n".join(LINES))
    assert call("score", "texts.txt", "-m", "llama", "--batch-size", "1", "-o", "whole.jsonl").exit_code == OK
    return (here / "whole.jsonl").read_bytes()


def test_ctrl_c_and_resume(call: Callable[..., Result], folder: Path, here: Path, whole: bytes) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it may be ignored
    child = process("score", "-m", folder / "llama", "--batch-size", "1", "-o", "out.jsonl", "--from", "text")
    assert child.stdin is not None
    child.stdin.write("".join(f"{line}\n" for line in LINES[:17]).encode())
    child.stdin.flush()
    partial = here / "out.jsonl.partial"
    wait_for(lambda: partial.exists() and partial.read_bytes().count(b"\n") == 16, child)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate()
    assert (child.returncode, output) == (INTERRUPTED, b"")
    assert errors.endswith(b"pyqe: interrupted\n")
    assert b"out.jsonl.partial; --resume" in errors
    assert not (here / "out.jsonl").exists()
    result = call("score", "texts.txt", "-m", "llama", "--batch-size", "1", "-o", "out.jsonl", "--resume")
    assert result.exit_code == OK
    assert "12 rows, 8 from an earlier run, 0 failed" in result.stderr
    assert (here / "out.jsonl").read_bytes() == whole
    assert not partial.exists()


@pytest.mark.parametrize("done", [0, 3, 8, 9, 16, 20])
@pytest.mark.parametrize("torn", [b"", b'{"line": 3, "te'])
def test_resume_gives_the_same_file(
    call: Callable[..., Result], here: Path, whole: bytes, done: int, torn: bytes
) -> None:
    (here / "out.jsonl.partial").write_bytes(b"".join(whole.splitlines(keepends=True)[:done]) + torn)
    result = call("score", "texts.txt", "-m", "llama", "--batch-size", "1", "-o", "out.jsonl", "--resume")
    assert result.exit_code == OK
    assert (here / "out.jsonl").read_bytes() == whole


def test_resume_counts_what_failed_before(call: Callable[..., Result], here: Path) -> None:
    (here / "in.jsonl").write_text('{"no": "text"}\n' + jsonl([{"text": line, "prompt": "x"} for line in LINES]))
    arguments = ("score", "in.jsonl", "-m", "llama", "--batch-size", "1", "-o", "out.jsonl")
    assert call(*arguments).exit_code == SOME_ROWS_FAILED
    whole = (here / "out.jsonl").read_bytes()
    (here / "out.jsonl.partial").write_bytes(b"".join(whole.splitlines(keepends=True)[:10]))
    result = call(*arguments, "--resume")
    assert (result.exit_code, (here / "out.jsonl").read_bytes()) == (SOME_ROWS_FAILED, whole)
    assert "1 failed" in result.stderr


def test_resume_refuses_another_input(call: Callable[..., Result], here: Path, whole: bytes) -> None:
    partial = here / "out.jsonl.partial"
    arguments = ("-m", "llama", "--batch-size", "1", "-o", "out.jsonl", "--resume")
    for changed in (["another", *LINES[1:]], LINES[:5]):
        partial.write_bytes(whole)
        (here / "changed.txt").write_text("\n".join(changed))
        result = call("score", "changed.txt", *arguments)
        assert result.exit_code == FAILED
        assert "belongs to another input" in result.stderr
        assert partial.read_bytes() == whole, "nothing is lost"
    for damaged in (b"nonsense\n", b"{}\n", b"[]\n"):
        partial.write_bytes(damaged)
        result = call("score", "texts.txt", *arguments)
        assert result.exit_code == FAILED
        assert "line 1 is not what pyqe writes" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["-o", "-"], ["-o", "out.tsv", "--to", "tsv"], ["-o", "/dev/null"]])
def test_resume_needs_a_json_lines_file(call: Callable[..., Result], arguments: list[str]) -> None:
    result = call("score", "-m", "./nosuch", "--resume", *arguments)
    assert result.exit_code == USAGE
    assert "--resume needs a JSON lines file" in result.stderr


# --- --config


def test_config_gives_defaults(call: Callable[..., Result], folder: Path, here: Path) -> None:
    settings = f"model: {folder / 'llama'}\nsignals: [prob, entropy]\nto: tsv\nbatch_size: 2\nhead:\nstrict: false\n"
    (here / "c.yaml").write_text(settings)
    result = call("score", "--config", "c.yaml", stdin="a dog\n")
    assert result.stdout.startswith("line\ttoken\tprob\tentropy\n")
    result = call("score", "--config", "c.yaml", "--to", "jsonl", "--signals", "prob", stdin="a dog\n")
    assert "token_entropy" not in rows(result.stdout)[0], "flags win"
    (here / "g.yaml").write_text(
        f"model: {folder / 'llama'}\ng: [num_beams=2, num_return_sequences=2]\nmax-new-tokens: 2"
    )
    assert len(rows(call("generate", "--config", "g.yaml", stdin="a dog\n").stdout)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: x", "no option modle"),
        ("source: x", "no option source"),
        ("config: x", "no option config"),
        ("- model", "expected 'option: value' lines"),
        ("text", "expected 'option: value' lines"),
        ("a: [", "cannot read c.yaml"),
        ("batch-size: many", "--batch-size"),
        ("batch-size: 2.5", "--batch-size"),
        ("dtype: float99", "--dtype"),
    ],
)
def test_config_that_is_wrong(call: Callable[..., Result], here: Path, content: str, message: str) -> None:
    (here / "c.yaml").write_text(content)
    result = call("score", "-m", "./nosuch", "--config", "c.yaml")
    assert result.exit_code == USAGE
    assert message in result.stderr


def test_config_that_is_missing(call: Callable[..., Result]) -> None:
    assert call("score", "-m", "llama", "--config", "nosuch.yaml").exit_code == USAGE


# --- generate


def test_generate(call: Callable[..., Result]) -> None:
    stdin = jsonl([{"prompt": "the cat", "id": 1}, {"text": "no prompt"}, {"prompt": ""}]) + "\n"
    result = call("generate", "-m", "llama", "--head", "llama-head", "--max-new-tokens", 4, stdin=stdin)
    assert result.exit_code == SOME_ROWS_FAILED
    first, bad, empty_prompt, blank = rows(result.stdout)
    assert (first["prompt"], first["id"], first["status"]) == ("the cat", 1, "ok")
    assert len(first["token_quality"]) == len(first["token_ids"]) <= 4
    assert first["finish_reason"] in ("eos", "length")
    assert bad["reason"] == "expected a field 'prompt', got 'text'"
    assert empty_prompt["status"] == "ok"
    assert (blank["status"], blank["tokens"]) == ("empty", [])


def test_generate_with_beams(call: Callable[..., Result]) -> None:
    arguments = ("-g", "num_beams=2", "-g", "num_return_sequences=2", "--max-new-tokens", "3")
    result = call("generate", "-m", "gpt2", *arguments, stdin="the cat\na dog\n")
    assert [(row["line"], row["sequence"]) for row in rows(result.stdout)] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    table = call("generate", "-m", "gpt2", *arguments, "--to", "tsv", stdin="the cat\n").stdout.splitlines()
    assert table[0].startswith("line\tsequence\ttoken\tprob")
    assert {line.split("\t")[1] for line in table[1:]} == {"1", "2"}


def test_generate_chat(call: Callable[..., Result]) -> None:
    messages = [{"role": "user", "content": "hi"}]
    stdin = jsonl([{"prompt": "hi"}, {"prompt": messages}, {"prompt": [{"role": "x", "content": "hi"}]}])
    result = call("generate", "-m", "llama", "--chat", "--max-new-tokens", 3, stdin=stdin)
    assert result.exit_code == SOME_ROWS_FAILED
    plain, listed, refused = rows(result.stdout)
    assert (plain["prompt"], listed["prompt"]) == ("hi", messages)
    assert plain["token_ids"] == listed["token_ids"], "the same conversation"
    assert refused["reason"] == "prompt: the model's chat template refuses it: only users"
    unwrapped = rows(call("generate", "-m", "llama", "--max-new-tokens", 3, stdin=stdin).stdout)[0]
    assert unwrapped["token_max_prob"] != plain["token_max_prob"]


def test_generate_chat_without_a_template(call: Callable[..., Result]) -> None:
    result = call("generate", "-m", "gpt2", "--chat", stdin="hi\n")
    assert (result.exit_code, result.stderr.count("\n")) == (FAILED, 1)
    assert "has no chat template" in result.stderr
    stdin = jsonl([{"prompt": [{"role": "user", "content": "hi"}]}])
    result = call("generate", "-m", "gpt2", stdin=stdin)
    assert result.exit_code == SOME_ROWS_FAILED
    assert "no chat template" in rows(result.stdout)[0]["reason"]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("num_beams", "expected name=value"),
        ("=4", "expected name=value"),
        ("num beams=4", "expected name=value"),
        ("x=[1", "expected a YAML value"),
        ("max_new_tokens=4", "--max-new-tokens"),
    ],
)
def test_generate_option_that_is_malformed(call: Callable[..., Result], pair: str, message: str) -> None:
    result = call("generate", "-m", "./nosuch", "-g", pair)
    assert result.exit_code == USAGE
    assert message in result.stderr


def test_generate_option_that_is_unknown(call: Callable[..., Result], here: Path) -> None:
    result = call("generate", "-m", "llama", "-g", "nonsense=1", "--max-new-tokens", 3, "-o", "out", stdin="hi\n")
    assert (result.exit_code, result.stderr.count("\n")) == (FAILED, 1)
    assert "nonsense" in result.stderr
    assert list(here.iterdir()) == []


def test_generate_beyond_the_context(call: Callable[..., Result]) -> None:
    result = call("generate", "-m", "gpt2", "--max-new-tokens", 4, stdin="one two three " * 30 + "\nhi\n")
    assert result.exit_code == SOME_ROWS_FAILED
    long, short = rows(result.stdout)
    assert "4 new ones do not fit the context of 64" in long["reason"]
    assert short["status"] == "ok"


def test_generate_reads_no_tsv(call: Callable[..., Result], here: Path) -> None:
    (here / "a.tsv").write_text("a\tb\n")
    result = call("generate", "a.tsv", "-m", "./nosuch")
    assert result.exit_code == FAILED
    assert "there is no target here" in result.stderr
    assert call("generate", "a.tsv", "--from", "tsv", "-m", "./nosuch").exit_code == USAGE


@pytest.mark.parametrize("done", [1, 16, 17, 19])
def test_generate_resumes_with_the_same_samples(call: Callable[..., Result], here: Path, done: int) -> None:
    (here / "in.txt").write_text("\n".join(LINES[:10]))
    sampling = ("-g", "do_sample=true", "-g", "num_return_sequences=2", "--seed", 3, "--max-new-tokens", 3)
    arguments = ("generate", "in.txt", "-m", "llama", "--chat", *sampling, "--batch-size", 1, "-o", "out.jsonl")
    assert call(*arguments).exit_code == OK
    whole = (here / "out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 20
    (here / "out.jsonl.partial").write_bytes(b"".join(lines[:done]))
    assert call(*arguments, "--resume").exit_code == OK
    assert (here / "out.jsonl").read_bytes() == whole


# --- train

TEXT = "".join(f"{line}\n\n" for line in LINES * 2)
SHORT = ("--block-size", "16", "--batch-size", "8", "--epochs", "1", "-o", "head")


@pytest.mark.parametrize(
    "options",
    [
        ["--rank", "2"],
        ["--kind", "full", "--sparse", "--learning-rate", "1e-4"],
        ["--kind", "rescaling", "--base", "logit", "--exclude", "none"],
        ["--kind", "full", "--loss", "vocabulary"],
        ["--sources", "uniform, softmax", "--exclude", "top_k:3", "--sparse"],
        ["--sources", "uniform", "--max-tokens", "200", "--accumulate", "2", "--negatives", "3"],
    ],
    ids=" ".join,
)
def test_train(call: Callable[..., Result], here: Path, options: list[str]) -> None:
    (here / "text.txt").write_text(TEXT)
    result = call("train", "text.txt", "-m", "llama", *SHORT, *options, "--json")
    assert result.exit_code == OK, result.stderr
    metrics = json.loads(result.stdout)
    assert set(metrics) == {"loss_before", "steps", "positions", "loss"}
    assert metrics["steps"] > 0
    assert sorted(os.listdir("head")) == ["README.md", "config.json", "model.safetensors"], "no checkpoints left"
    assert "head in head" in result.stderr
    scored = call("score", "-m", "llama", "--head", here / "head", stdin="a dog\n")
    assert rows(scored.stdout)[0]["quality"] > 0


def test_train_with_bad_rows(call: Callable[..., Result], here: Path) -> None:
    (here / "a.jsonl").write_text(jsonl([{"text": line, "prompt": "hi"} for line in LINES]) + "nonsense\n")
    (here / "b.tsv").write_text("".join(f"hi\t{line}\n" for line in LINES) + "one column\n")
    result = call("train", "a.jsonl", "b.tsv", "-m", "llama", *SHORT)
    assert (result.exit_code, result.stdout) == (SOME_ROWS_FAILED, "")
    assert "line 21: not JSON" in result.stderr
    assert "(a.jsonl)" in result.stderr
    assert "line 21: expected source TAB target, got 1 columns (b.tsv)" in result.stderr
    assert (here / "head" / "model.safetensors").is_file()
    result = call("train", "b.tsv", "-m", "llama", *SHORT, "--strict")
    assert result.exit_code == FAILED
    assert "error: line 21" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--sources", "nonsense"],
        ["--exclude", "nonsense"],
        ["--kind", "nonsense"],
        ["--loss", "vocabulary", "--sparse"],
        ["--loss", "vocabulary", "--negatives", "3"],
        ["--kind", "full", "--rank", "3"],
        ["--kind", "full", "--base", "logit"],
    ],
    ids=" ".join,
)
def test_train_options_that_are_wrong(call: Callable[..., Result], here: Path, options: list[str]) -> None:
    (here / "text.txt").write_text(TEXT)
    result = call("train", "text.txt", "-m", "./nosuch", "-o", "head", *options)
    assert result.exit_code == USAGE
    assert options[-2 if options[-1] != "--sparse" else -1] in result.stderr


@pytest.mark.parametrize(("text", "message"), [("\n\n", "no texts in text.txt"), ("a", "at least two blocks")])
def test_train_with_too_little_text(call: Callable[..., Result], here: Path, text: str, message: str) -> None:
    (here / "text.txt").write_text(text)
    result = call("train", "text.txt", "-m", "llama", "-o", "head")
    assert result.exit_code == FAILED
    assert message in result.stderr
    assert not (here / "head").exists()


def test_train_takes_no_encoder_decoder(call: Callable[..., Result], here: Path) -> None:
    (here / "text.txt").write_text(TEXT)
    result = call("train", "text.txt", "-m", "t5", *SHORT)
    assert result.exit_code == FAILED
    assert "expected a causal LM" in result.stderr


def test_train_ctrl_c_and_resume(call: Callable[..., Result], folder: Path, here: Path) -> None:
    (here / "text.txt").write_text(TEXT)
    arguments = ["text.txt", "-m", folder / "llama", "-o", "head", "--kind", "rescaling", "--block-size", "64"]
    arguments += ["--batch-size", "2", "--epochs", "40", "--save-steps", "20", "--patience", "1000"]
    child = process("train", *arguments)
    wait_for(lambda: any((here / "head").glob("checkpoint-*/trainer_state.json")), child)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate()
    assert (child.returncode, output) == (INTERRUPTED, b"")
    assert b"interrupted; the checkpoint is saved" in errors
    states = [json.loads(path.read_text()) for path in (here / "head").glob("checkpoint-*/trainer_state.json")]
    reached, last = max(state["global_step"] for state in states), states[0]["max_steps"]
    assert reached < last
    assert not (here / "head" / "model.safetensors").exists()
    result = call("train", *arguments)
    assert result.exit_code == FAILED, "neither resumed nor overwritten unasked"
    assert "use --resume" in result.stderr
    result = call("train", *arguments, "--resume", "--json")
    assert result.exit_code == OK
    assert json.loads(result.stdout)["steps"] == last
    assert sorted(os.listdir("head")) == ["README.md", "config.json", "model.safetensors"]
    result = call("train", *arguments, "--resume")
    assert result.exit_code == FAILED
    assert "--resume: no checkpoint in head" in result.stderr


# --- report, doctor, demo


def test_report(call: Callable[..., Result], here: Path) -> None:
    messages = [{"role": "user", "content": "what is it"}]
    stdin = jsonl([{"text": "a dog", "prompt": messages}, {"text": 5}, {"nonsense": 1}, {"text": ""}]) + "\n"
    scores = call("score", "-m", "llama", stdin=stdin).stdout
    result = call("report", "-o", "page.html", "--title", "My scores", stdin=scores)
    assert (result.exit_code, result.stdout) == (OK, "")
    page = (here / "page.html").read_text(encoding="utf-8")
    assert "My scores" in page
    assert "user: what is it" in page
    assert "text: expected a string, got a number" in page
    assert "5 texts" in result.stderr
    assert call("report", "-o", "-", "--title", "My scores", stdin=scores).stdout == page


def test_report_of_rows_that_are_no_scores(call: Callable[..., Result], here: Path) -> None:
    good = {"text": "a dog", "tokens": ["a", " dog"], "token_prob": [0.1, 0.2]}
    bad = [{"text": "no tokens"}, {**good, "token_prob": [0.1]}, {**good, "text": 5}, {**good, "token_prob": [7, 7]}]
    stdin = jsonl([good, *bad]) + "nonsense\n\n"
    result = call("report", stdin=stdin)
    assert result.exit_code == SOME_ROWS_FAILED
    assert all(f"pyqe: line {line}: " in result.stderr for line in range(2, 7))
    assert "wrote report.html: 1 texts" in result.stderr
    (here / "report.html").write_text("old")
    assert call("report", "--strict", stdin=stdin).exit_code == FAILED
    assert (here / "report.html").read_text() == "old"


def test_report_onto_a_device(call: Callable[..., Result]) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full")
    result = call("report", "-o", "/dev/full")
    assert (result.exit_code, result.stderr) == (FAILED, "pyqe: error: No space left on device\n")
    assert Path("/dev/full").is_char_device()
    assert call("report", "nosuch.jsonl").exit_code == FAILED
    assert call("report", "-o", "nosuch/page.html").exit_code == FAILED


def test_doctor(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("doctor")
    assert (result.exit_code, result.stderr) == (OK, "")
    assert all(word in result.stdout for word in (pyqe.__version__, "torch", "Backends", "reference", "Processor"))
    found = json.loads(call("doctor", "--json").stdout)
    assert found["pyqe"] == pyqe.__version__
    assert found["backends"]["reference"] == "ok"
    assert found["torch_error"] is None
    monkeypatch.setenv("PYQE_BACKEND", "nonsense")
    assert "nonsense, which does not exist" in call("doctor").stdout


def test_doctor_without_torch(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = call("doctor")
    assert result.exit_code == OK
    assert "cannot be imported" in result.stdout


def test_demo_options(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    import pyqe.demo

    def run(output: Path, *, retrain: bool, say: Callable[[str], None]) -> None:
        say(f"{output} {retrain}")

    monkeypatch.setattr(pyqe.demo, "run", run)
    result = call("demo", "-o", "here", "--retrain")
    assert (result.exit_code, result.stdout, result.stderr) == (OK, "", "here True\n")
