"""The examples run as they are, on a tiny model, and learn."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXTS, model, tokenizer

import pyqe

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"train_lightning": "lightning", "train_trl": "trl"}
HEADS = {"train_trl": "head/head"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model(max_position_embeddings=256).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example_learns_a_head(
    name: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, "--model", str(tiny_model), "--output", "head", "--steps", "12"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if re.search("held.out.loss", line)]
    losses = [float(number) for line in lines for number in re.findall(r"\d+\.\d+", line)]
    assert losses[-1] < losses[0]
    head = pyqe.SigmoidHead.from_pretrained(tmp_path / HEADS.get(name, "head"))
    lm: Any = model(max_position_embeddings=256)
    assert not torch.equal(head.A, torch.zeros_like(head.A))
    scored = pyqe.QualityEstimator(lm, tokenizer(), head).score(TEXTS[:1])[0]
    assert 0 < scored.quality < 1


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines()) < 40
