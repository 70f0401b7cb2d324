"""pyqe eval and pyqe calibrate, through the entry point: what goes in, what comes out, and the exit codes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from test_cli import FAILED, OK, SOME_ROWS_FAILED, USAGE, jsonl, rows
from test_readers import B, chat, sample

from pyqe import calibration
from pyqe.choice import evaluate
from pyqe.cli import main

Call = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(here: Path) -> Call:
    """Runs a command in this process."""

    def run(*arguments: object, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(main, list(map(str, arguments)), input=stdin)

    return run


def answers(n: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """Overconfident answers in two groups."""
    generator = np.random.default_rng(seed)
    confidence = generator.random(n).round(3)
    right = generator.random(n) < confidence**2
    pairs = zip(confidence.tolist(), right.tolist(), strict=True)
    return [{"confidence": sure, "correct": good, "set": "ab"[number % 2]} for number, (sure, good) in enumerate(pairs)]


def distributions(n: int = 300, classes: int = 3) -> list[dict[str, Any]]:
    """Probabilities that are too sharp, and the right class."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(n, classes))
    labels = (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)
    probs = np.exp(3 * logits)
    probs /= probs.sum(axis=1, keepdims=True)
    both = zip(logits.tolist(), probs.tolist(), labels.tolist(), strict=True)
    return [{"logits": [3 * z for z in row], "probs": p, "label": label} for row, p, label in both]


def put(path: str, items: list[dict[str, Any]]) -> None:
    Path(path).write_text(jsonl(items), encoding="utf-8")


# --- eval


def test_figures_are_those_of_evaluate(call: Call) -> None:
    items = answers()
    result = call("eval", "--json", "--group", "set", stdin=jsonl(items))
    assert result.exit_code == OK
    expected = evaluate(
        [item["confidence"] for item in items],
        [item["correct"] for item in items],
        groups=[item["set"] for item in items],
    ).to_dict()
    found = json.loads(result.stdout)
    for name, group in expected["groups"].items():
        confidences = [item["confidence"] for item in items if item["set"] == name]
        group["confidence"] = pytest.approx(np.mean(confidences))
    expected |= {"rows": 200, "failed": 0, "confidence": pytest.approx(np.mean([item["confidence"] for item in items]))}
    assert found == expected


def test_table(call: Call) -> None:
    items = answers()
    result = call("eval", "--group", "set", "--bins", 5, "--penalty", 4, stdin=jsonl(items))
    assert result.exit_code == OK
    lines = result.stdout.splitlines()
    accuracy = np.mean([item["correct"] for item in items])
    assert f"Accuracy {accuracy:.3f}" in [" ".join(line.split()) for line in lines]
    assert any(line.startswith("ECE, 5 bins of equal width") for line in lines)
    assert [line.split()[0] for line in lines if line.startswith(("4 ", "1 ", "2 "))] == ["4"]
    assert [line[0] for line in lines[-2:]] == ["a", "b"]
    assert all(line == line.rstrip() for line in lines)
    assert result.stderr == "pyqe: 200 rows, 0 failed\n"


def test_bad_rows_are_reported_by_number(call: Call) -> None:
    good = jsonl(answers(30))
    bad = [
        '{"confidence": NaN, "correct": true}',
        '{"confidence": null, "correct": true}',
        '{"confidence": 0.5}',
        '{"confidence": 0.5, "correct": "yes"}',
        '{"confidence": -1, "correct": 1}',
        "not JSON",
        "[1, 2]",
        "",
        '{"confidence": 0.5, "correct": 1, "set": null}',
    ]
    result = call("eval", "--json", "--group", "set", stdin=good + "\n".join(bad) + "\n")
    assert result.exit_code == SOME_ROWS_FAILED
    assert json.loads(result.stdout)["n"] == 30
    told = [line for line in result.stderr.splitlines() if line.startswith("pyqe: line ")]
    assert [int(line.split()[2].rstrip(":")) for line in told] == [31, 32, 33, 34, 35, 36, 37, 39]
    assert "NaN is no JSON number" in told[0]
    assert "confidence: expected a number, got null" in told[1]
    assert "expected a field 'correct'" in told[2]
    assert "set: expected a string or a number, got null" in told[7]
    assert "pyqe: 38 rows, 8 failed" in result.stderr


def test_strict(call: Call) -> None:
    result = call("eval", "--strict", stdin=jsonl([*answers(5), {"confidence": None}, *answers(5)]))
    assert result.exit_code == FAILED
    assert result.stderr == "pyqe: error: line 6: confidence: expected a number, got null\n"
    assert result.stdout == ""


@pytest.mark.parametrize("n", [3, 1000])
def test_percentages_are_an_error(call: Call, n: int) -> None:
    items = [{"confidence": 100 * item["confidence"], "correct": item["correct"]} for item in answers(n)]
    result = call("eval", stdin=jsonl([{"confidence": 1, "correct": 1}, *items]))
    assert result.exit_code == FAILED
    assert "percentages have to be divided by 100" in result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) < 30


def test_a_single_percentage_is_a_bad_row(call: Call) -> None:
    result = call("eval", "--json", stdin=jsonl([*answers(20), {"confidence": 95, "correct": 1}]))
    assert result.exit_code == SOME_ROWS_FAILED
    assert "line 21: confidence: expected a number from 0 to 1, got 95; divide a percentage by 100" in result.stderr


@pytest.mark.parametrize("stdin", ["", "\n\n", "{}\n"])
def test_no_answers(call: Call, stdin: str) -> None:
    result = call("eval", stdin=stdin)
    assert result.exit_code == FAILED
    assert "stdin: expected one good row at least" in result.stderr


def test_fields_by_path(call: Call) -> None:
    items = [{"a": {"p": item["confidence"]}, "grades": [item["correct"]]} for item in answers()]
    result = call("eval", "--json", "--confidence", "a.p", "--correct", "grades.0", stdin=jsonl(items))
    assert json.loads(result.stdout) == json.loads(call("eval", "--json", stdin=jsonl(answers())).stdout)


def test_graded_answers(call: Call, here: Path) -> None:
    """AUROC is not defined; everything else is."""
    items = [{"confidence": 0.1 * (number % 10), "correct": 0.5 * (number % 3)} for number in range(60)]
    put("graded.jsonl", items)
    found = json.loads(call("eval", "graded.jsonl", "--json", "--report", "page.html").stdout)
    assert found["accuracy"] == pytest.approx(0.5)
    assert (found["auroc"]["auroc"], found["average_precision"]) == (None, None)
    assert found["aurc"] > 0
    assert (here / "page.html").exists()
    assert call("calibrate", "fit", "graded.jsonl", "--method", "platt", "-o", "folder").exit_code == OK


def test_lm_eval_samples(call: Call) -> None:
    items = [sample(-1.0, -2.0 - number, acc=float(number % 2)) for number in range(6)]
    put("samples.jsonl", items)
    result = call("eval", "samples.jsonl", "--json", "--group", "doc.subject")
    assert result.exit_code == OK
    found = json.loads(result.stdout)
    assert found["confidence"] == pytest.approx(np.mean([1 / (1 + math.exp(-1 - number)) for number in range(6)]))
    assert (found["accuracy"], list(found["groups"])) == (0.5, ["arithmetic"])


def test_responses_with_logprobs(call: Call) -> None:
    items = [{"response": chat(B), "key": "AB"[number % 2]} for number in range(6)]
    result = call("eval", "--json", "--gold", "key", "--choices", "A,B", stdin=jsonl(items))
    assert result.exit_code == OK
    found = json.loads(result.stdout)
    assert found["confidence"] == pytest.approx(0.6)
    assert found["choice_mass"] == pytest.approx(0.9)
    assert found["accuracy"] == 0.5
    assert "Mean probability of all choices, at least" in call("eval", "--gold", "key", stdin=jsonl(items)).stdout


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_that_is_one_json_list(call: Call, indent: int | None) -> None:
    items = [chat(B) | {"gold": "AB"[number % 2]} for number in range(6)]
    Path("responses.json").write_text(json.dumps([*items, {"choices": []}], indent=indent))
    result = call("eval", "responses.json", "--from", "openai", "--json")
    assert result.exit_code == SOME_ROWS_FAILED
    assert json.loads(result.stdout)["n"] == 6
    assert "line 7: choices: expected one completion, got 0" in result.stderr


def test_a_json_file_of_lines(call: Call) -> None:
    put("answers.json", answers(20))
    assert json.loads(call("eval", "answers.json", "--json").stdout)["n"] == 20


@pytest.mark.parametrize("document", ["[1, 2]", "3"])
def test_a_json_file_of_something_else(call: Call, document: str) -> None:
    Path("answers.json").write_text(document)
    result = call("eval", "answers.json")
    assert result.exit_code == FAILED
    assert "answers.json: expected JSON objects, in a list or one a line" in result.stderr


def test_report(call: Call, here: Path) -> None:
    put("answers.jsonl", [*answers(), {}])
    result = call("eval", "answers.jsonl", "--group", "set", "--report", "page.html")
    assert result.exit_code == SOME_ROWS_FAILED
    page = (here / "page.html").read_text(encoding="utf-8")
    assert "Calibration of answers.jsonl" in page
    assert "201, 1 failed" in page
    assert "2 groups" in page


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bins", 0],
        ["--penalty", -1],
        ["--from", "csv"],
        ["--choices", "A"],
        ["--choices", "A,A"],
        ["--choices", "A,,B"],
        ["--from", "lm-eval", "--confidence", "p"],
    ],
)
def test_wrong_usage_of_eval(call: Call, arguments: list[object]) -> None:
    result = call("eval", *arguments)
    assert result.exit_code == USAGE
    assert result.stdout == ""


def test_settings_from_a_file(call: Call) -> None:
    Path("settings.yaml").write_text("confidence: p\npenalty: [3]\njson: true\n")
    items = [{"p": item["confidence"], "correct": item["correct"]} for item in answers()]
    found = json.loads(call("eval", "--config", "settings.yaml", stdin=jsonl(items)).stdout)
    assert [one["wrong_penalty"] for one in found["abstention"]] == [3.0]


# --- calibrate


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic", "histogram", "kde"])
def test_single_confidences(call: Call, here: Path, method: str) -> None:
    put("dev.jsonl", answers(300))
    inputs = ["--inputs", "probs"] if method == "temperature" else []
    result = call("calibrate", "fit", "dev.jsonl", "--method", method, *inputs, "-o", "folder")
    assert result.exit_code == OK, result.stderr
    assert "on these same rows" in result.stdout
    test = answers(100, seed=1)
    result = call("calibrate", "apply", "-m", "folder", stdin=jsonl(test))
    assert result.exit_code == OK, result.stderr
    found = rows(result.stdout)
    expected = calibration.load("folder").transform([item["confidence"] for item in test])
    assert [row["calibrated"] for row in found] == expected.tolist()
    for line, (row, item) in enumerate(zip(found, test, strict=True), 1):
        assert row == {"line": line, **item, "calibrated": row["calibrated"], "status": "ok", "reason": None}


def test_calibration_helps_on_other_rows(call: Call) -> None:
    put("test.jsonl", answers(2000, seed=1))
    call("calibrate", "fit", "-o", "folder", "--method", "platt", stdin=jsonl(answers(2000)))
    call("calibrate", "apply", "test.jsonl", "-m", "folder", "-o", "out.jsonl")
    before = json.loads(call("eval", "test.jsonl", "--json").stdout)
    after = json.loads(call("eval", "out.jsonl", "--confidence", "calibrated", "--json").stdout)
    assert after["ece"] < 0.5 * before["ece"]
    assert after["auroc"]["auroc"] == pytest.approx(before["auroc"]["auroc"])


@pytest.mark.parametrize(
    ("method", "inputs"), [("temperature", "probs"), ("temperature", "logits"), ("vector", "probs")]
)
def test_distributions(call: Call, method: str, inputs: str) -> None:
    items = distributions()
    put("dev.jsonl", items)
    fields = ["--probs", inputs]
    result = call("calibrate", "fit", "dev.jsonl", "--method", method, "--inputs", inputs, *fields, "-o", "folder")
    assert result.exit_code == OK, result.stderr
    calibrator: Any = calibration.load("folder")
    if method == "temperature":
        assert calibrator.temperature_ == pytest.approx(3, rel=0.4)
        assert f"{calibrator.temperature_:.3f} (1 before)" in result.stdout
    unlabelled = [{inputs: item[inputs]} for item in items]
    result = call("calibrate", "apply", *fields, "-m", "folder", stdin=jsonl(unlabelled))
    assert result.exit_code == OK, result.stderr
    found = rows(result.stdout)
    expected = calibrator.transform([item[inputs] for item in items])
    assert [row["calibrated_probs"] for row in found] == expected.tolist()
    assert [row["calibrated"] for row in found] == expected.max(axis=1).tolist()


def test_log_likelihoods_of_samples(call: Call) -> None:
    items = [
        sample(*item["logits"], target=str(item["label"]), acc=float(np.argmax(item["logits"]) == item["label"]))
        for item in distributions()
    ]
    put("samples.jsonl", items)
    form = ["samples.jsonl", "--from", "lm-eval"]
    result = call("calibrate", "fit", *form, "--method", "temperature", "--inputs", "logits", "-o", "folder")
    assert result.exit_code == OK, result.stderr
    calibrator: Any = calibration.load("folder")
    plain = calibration.TemperatureScaling(inputs="logits")
    plain.fit([item["logits"] for item in distributions()], [item["label"] for item in distributions()])
    assert calibrator.temperature_ == pytest.approx(plain.temperature_)
    assert len(rows(call("calibrate", "apply", *form, "-m", "folder").stdout)[0]["calibrated_probs"]) == 3


def test_a_temperature_for_each_group(call: Call) -> None:
    put("dev.jsonl", answers(300))
    method = ["--method", "temperature", "--inputs", "probs", "--group", "set"]
    result = call("calibrate", "fit", "dev.jsonl", *method, "--per-group", "-o", "folder")
    assert result.exit_code == OK, result.stderr
    calibrator: Any = calibration.load("folder")
    assert sorted(calibrator.temperature_) == ["a", "b"]
    assert f"{calibrator.temperature_['a']:.3f}" in result.stdout
    result = call("calibrate", "apply", "dev.jsonl", "-m", "folder")
    assert result.exit_code == USAGE
    assert "--group FIELD" in result.stderr
    items = [*answers(4), {"confidence": 0.5, "set": "c"}]
    result = call("calibrate", "apply", "-m", "folder", "--group", "set", stdin=jsonl(items))
    assert result.exit_code == SOME_ROWS_FAILED
    assert [row["status"] for row in rows(result.stdout)] == ["ok"] * 4 + ["failed"]
    assert "line 5: set: expected a group that the calibrator was fitted to, got 'c'" in result.stderr


def test_bad_rows_keep_their_place(call: Call) -> None:
    call("calibrate", "fit", "-o", "folder", "--method", "isotonic", stdin=jsonl(answers()))
    lines = ['{"confidence": 0.5, "id": 7}', "", '{"confidence": null, "id": 8}', "nonsense", '{"confidence": 1}']
    result = call("calibrate", "apply", "-m", "folder", stdin="\n".join(lines) + "\n")
    assert result.exit_code == SOME_ROWS_FAILED
    found = rows(result.stdout)
    assert [row["line"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["status"] for row in found] == ["ok", "empty", "failed", "failed", "ok"]
    assert [row["calibrated"] is None for row in found] == [False, True, True, True, False]
    assert (found[0]["id"], found[2]["id"]) == (7, 8)
    assert found[2]["reason"] == "confidence: expected a number, got null"
    assert "pyqe: 4 rows, 2 failed" in result.stderr


def test_another_number_of_classes_is_a_bad_row(call: Call) -> None:
    items = distributions(50)
    items[10]["probs"] = [0.5, 0.5]
    items[10]["label"] = 0
    method = ["--method", "temperature", "--inputs", "probs", "--probs", "probs"]
    result = call("calibrate", "fit", *method, "-o", "folder", stdin=jsonl(items))
    assert result.exit_code == SOME_ROWS_FAILED
    assert "line 11: expected 3 classes, as before, got 2" in result.stderr
    result = call("calibrate", "apply", "--probs", "probs", "-m", "folder", stdin=jsonl(items))
    assert result.exit_code == SOME_ROWS_FAILED
    assert [row["line"] for row in rows(result.stdout) if row["status"] == "failed"] == [11]


def test_reports_of_calibration(call: Call, here: Path) -> None:
    put("dev.jsonl", answers())
    method = ["--method", "temperature", "--inputs", "probs", "--eps", "0.001"]
    result = call("calibrate", "fit", "dev.jsonl", *method, "-o", "folder", "--group", "set", "--report", "fit.html")
    assert result.exit_code == OK, result.stderr
    page = (here / "fit.html").read_text(encoding="utf-8")
    calibrator: Any = calibration.load("folder")
    assert f"{calibrator.temperature_:.3f} (1 before)" in page
    assert "fitted to, which flatters it" in page
    assert "0.001" in page
    result = call("calibrate", "apply", "dev.jsonl", "-m", "folder", "-o", "out.jsonl", "--report", "apply.html")
    assert result.exit_code == OK, result.stderr
    page = (here / "apply.html").read_text(encoding="utf-8")
    assert "after calibration" in page
    assert "fitted to" not in page
    result = call("calibrate", "apply", "-m", "folder", "--report", "x.html", stdin='{"confidence": 0.5}\n')
    assert result.exit_code == FAILED  # there is nothing to report on
    assert "expected a field 'correct'" in result.stderr


def test_output_is_whole_or_not_there(call: Call, here: Path) -> None:
    call("calibrate", "fit", "-o", "folder", "--method", "platt", stdin=jsonl(answers()))
    Path("out.jsonl").write_text("old")
    items = jsonl([*answers(5), {"confidence": None}])
    result = call("calibrate", "apply", "-m", "folder", "-o", "out.jsonl", "--strict", stdin=items)
    assert result.exit_code == FAILED
    assert Path("out.jsonl").read_text() == "old"
    assert sorted(os.listdir(here)) == ["folder", "out.jsonl"]


def test_warnings_are_spoken(call: Call) -> None:
    items = [{"confidence": 0.5, "correct": number % 2} for number in range(20)]
    result = call("calibrate", "fit", "-o", "folder", "--method", "platt", stdin=jsonl(items))
    assert result.exit_code == OK
    assert "pyqe: all confidences are the same" in result.stderr
    assert "Warning" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "temperature"], "needs --inputs"),
        (["--method", "temperature", "--inputs", "logits"], "needs --probs FIELD, or --from lm-eval"),
        (["--method", "vector", "--inputs", "probs"], "needs whole distributions"),
        (["--method", "platt", "--probs", "p"], "is for single confidences, without --probs"),
        (["--method", "kde", "--inputs", "probs"], "is for single confidences, without --inputs"),
        (["--method", "isotonic", "--eps", "0.1"], "has no --eps"),
        (["--method", "platt", "--per-group", "--group", "set"], "--per-group is for"),
        (["--method", "temperature", "--inputs", "probs", "--per-group"], "--per-group is for"),
        (["--method", "bogus"], "Invalid value"),
        ([], "Missing option"),
    ],
)
def test_wrong_usage_of_fit(call: Call, arguments: list[str], message: str) -> None:
    result = call("calibrate", "fit", "-o", "folder", *arguments, stdin=jsonl(answers()))
    assert result.exit_code == USAGE
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("fitted", "applied", "message"),
    [
        (["platt"], ["--probs", "probs"], "is for single confidences"),
        (["platt"], ["--inputs", "probs"], "the calibrator knows"),
        (["vector", "--inputs", "probs", "--probs", "probs"], [], "is for whole distributions"),
        (["temperature", "--inputs", "logits", "--probs", "logits"], [], "is for logits"),
    ],
)
def test_wrong_usage_of_apply(call: Call, fitted: list[str], applied: list[str], message: str) -> None:
    items = [{**one, **other} for one, other in zip(answers(300), distributions(), strict=True)]
    assert call("calibrate", "fit", "-o", "folder", "--method", *fitted, stdin=jsonl(items)).exit_code == OK
    result = call("calibrate", "apply", "-m", "folder", *applied, stdin=jsonl(items))
    assert result.exit_code == USAGE
    assert message in " ".join(result.stderr.split())


def test_what_cannot_be_fitted(call: Call, here: Path) -> None:
    items = [{"confidence": 0.5, "correct": True}] * 5
    result = call("calibrate", "fit", "-o", "folder", "--method", "isotonic", stdin=jsonl(items))
    assert result.exit_code == FAILED
    assert "answers that are all right" in result.stderr
    assert os.listdir(here) == []


def test_no_calibrator(call: Call) -> None:
    result = call("calibrate", "apply", "-m", "nowhere", stdin=jsonl(answers(2)))
    assert result.exit_code == FAILED
    assert "nowhere/calibrator.json: No such file or directory" in result.stderr
