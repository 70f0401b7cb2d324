"""The script that runs the real language model on multiple-choice sets, with a tiny model and a few questions."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from pyqe.choice import ChoiceScorer
from pyqe.cli import options

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "reproduce"
PER_SET = 9  # beside the demonstrations


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("choice")
    monkeypatch.setattr(module, "HEAD_BAR", 1.0)  # the head of a tiny model is most of it
    monkeypatch.setattr(module, "CHUNK", 4)
    few = [setting for setting in module.SETTINGS if setting.name in ("text", "full text")]
    monkeypatch.setattr(module, "SETTINGS", few)
    yield module
    sys.modules.pop("choice")
    sys.modules.pop("data")


@pytest.fixture
def arguments(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Questions where the script looks for them, and its command line."""
    tokenizer = tiny.answer_tokenizer()
    lm = tiny.model(vocab_size=len(tokenizer), max_position_embeddings=1024)
    monkeypatch.setattr(options, "load_model", lambda *_: (lm, tokenizer))
    monkeypatch.setenv("PYQE_DATA", str(tmp_path))
    (tmp_path / "mcq").mkdir()
    for name in script.SETS.values():
        rows = [
            {"question": f"{name} {i}?", "choices": ["x", "y", "z"][: 2 + i % 2], "answer": i % 2}
            for i in range(PER_SET + script.N_SHOTS)
        ]
        (tmp_path / "mcq" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["-o", str(tmp_path / "choice.json"), "--folder", str(tmp_path / "scored")]


def run(script: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["choice.py", *arguments])
    try:
        return int(script.main())
    finally:
        torch.set_num_threads(threads)


def test_it_runs_and_goes_on_where_it_was(
    script: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, arguments, monkeypatch) == 0
    table = capsys.readouterr().out
    assert "format mass, text: " in table
    report = json.loads(Path(arguments[1]).read_text())
    assert len(report["results"]) == len(script.SETTINGS)
    for result in report["results"]:
        assert result["failed"] == 0
        assert result["evaluations"]["answer"]["n"] == PER_SET * len(script.SETS)
        assert all(result["evaluations"]["answer"]["groups"][name]["n"] == PER_SET for name in script.SETS)
    first = report["results"][0]
    assert set(first["evaluations"]) == {"answer", "letter", "MSP", "greedy"}
    assert 0 < first["means"]["all"]["format_mass"] < 1

    folder = Path(arguments[3])
    cut = folder / f"{script.SETS['CSQA']}-text-5.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:4]) + '{"torn')
    asked: list[int] = []
    score = ChoiceScorer.score
    monkeypatch.setattr(
        ChoiceScorer,
        "score",
        lambda self, questions, **more: asked.append(len(questions)) or score(self, questions, **more),
    )
    assert run(script, arguments, monkeypatch) == 0
    assert sum(asked) == PER_SET - 3
    again = json.loads(Path(arguments[1]).read_text())
    for one, other in zip(report["results"], again["results"], strict=True):
        assert (one["means"], one["evaluations"]) == (other["means"], other["evaluations"])


def test_other_prompts_begin_anew(script: Any, arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "old"}\n{"prediction": 1}\n')
    assert script.kept_rows(path, {"prompt": "old"}) == [{"prediction": 1}]
    assert script.kept_rows(path, {"prompt": "new"}) == []
    assert path.read_text() == '{"prompt": "new"}\n'


def test_missing_data(
    script: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYQE_DATA")
    assert run(script, arguments, monkeypatch) == 2
    assert "PYQE_DATA is not set" in capsys.readouterr().err


def test_a_slow_head_fails(script: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "HEAD_BAR", 0.0)
    assert run(script, [*arguments, "--limit", "2"], monkeypatch) == 1
