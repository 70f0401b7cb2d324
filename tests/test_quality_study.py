"""The study of the Sigmoid Head's quality, in benchmarks/quality."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyqe import functional as F

pytest.importorskip("sacremoses")
pytest.importorskip("matplotlib")

from sklearn.metrics import fbeta_score, matthews_corrcoef, roc_auc_score

from benchmarks.quality import ambiguity, evaluate, recipes, report, signals, states, study, tasks
from benchmarks.quality.states import LanguageModel, StateCache
from benchmarks.quality.tasks import RIGHT, UNJUDGED, WRONG, Sentence, Task
from benchmarks.quality.train import Recipe

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 12  # sentences of each file


@pytest.fixture
def lm(smollm2: tuple[Any, Any], one_thread: None) -> LanguageModel:
    return LanguageModel("SmolLM2", *smollm2)


@pytest.fixture
def tiny_lm(smollm2: tuple[Any, Any], one_thread: None) -> LanguageModel:
    """Random weights behind the real tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = smollm2
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **shape)
    return LanguageModel("tiny", LlamaForCausalLM(config).eval(), tokenizer)


def judged(n: int = 60, seed: int = 0, split: str = "test") -> tuple[Task, list[list[int]]]:
    """Sentences of random words, and the word of each token: one or two tokens for each word."""
    generator = np.random.default_rng(seed)
    sentences, token_words = [], []
    for _ in range(n):
        length = int(generator.integers(2, 9))
        bad = generator.integers(0, 2, length).tolist()
        words = ["word"] * length
        sentences.append(Sentence(words, bad, split, float(generator.normal()), 0.1, [-0.1] * length, [*range(length)]))
        token_words.append(np.repeat(np.arange(length), generator.integers(1, 3, length)).tolist())
    return Task("some", sentences), token_words


# --- texts and tasks


def test_examples() -> None:
    for module in (tasks, signals, evaluate, states):
        assert doctest.testmod(module).failed == 0


def test_words_of_a_detokenized_text_are_found() -> None:
    words = ["He", "said", ":", '"', "No", ",", "I", "ca", "n't", "(", "yet", ")", '"', "."]
    text = tasks.detokenize(words)
    assert [text[start:end] for start, end in tasks.word_spans(words, text)] == words
    with pytest.raises(ValueError, match="expected 'b'"):
        tasks.word_spans(["a", "b"], "a c")


def test_tokens_belong_to_the_word_in_which_they_end(lm: LanguageModel) -> None:
    sentence = Sentence(["Unquestionably", ",", "it", "is", "."], [0] * 5, "dev")
    ids, words = lm.encode_words(sentence)
    assert lm.tokenizer.decode(ids) == "Unquestionably, it is."
    pieces = [lm.tokenizer.decode([i for i, word in zip(ids, words, strict=True) if word == w]) for w in range(5)]
    assert [piece.strip() for piece in pieces] == sentence.words
    spaced, _ = lm.encode_words(sentence, spaced=True)
    assert lm.tokenizer.decode(spaced) == "Unquestionably , it is ."


def test_tasks_have_the_judgements_of_the_data(data_folder: Path) -> None:
    found = tasks.tasks()
    assert {name: len(task.sentences) for name, task in found.items()} == {"realec": 2034, "mlqe": 3000, "blimp": 3000}
    for task in found.values():
        for sentence in task.sentences:
            assert len(sentence.words) == len(sentence.bad)
            assert len(sentence.nmt) == len(sentence.nmt_word)
            tasks.word_spans(sentence.words, tasks.detokenize(sentence.words))
    splits = {name: [one.split for one in task.sentences] for name, task in found.items()}
    assert {name: set(parts) for name, parts in splits.items()} == {
        "realec": {"dev", "test"},
        "mlqe": {"dev", "test", "et-en"},
        "blimp": {"dev", "test"},
    }
    for task in found.values():  # no sentence is on both sides
        by_split: dict[str, set[tuple[str, ...]]] = {}
        for one in task.sentences:
            by_split.setdefault(one.split, set()).add(tuple(one.words))
        assert len(by_split["dev"] & by_split["test"]) <= 0.01 * len(by_split["test"])
    pairs = found["blimp"].sentences
    assert all(a.words[:-1] == b.words[:-1] for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    assert {tuple(one.bad[-1] for one in pairs[i : i + 2]) for i in range(0, len(pairs), 2)} == {(RIGHT, WRONG)}
    assert {mark for one in pairs for mark in one.bad[:-1]} == {UNJUDGED}
    words = [text.split() for text in tasks.training_texts("postedits")]
    assert len(words) == 27_774
    assert tasks.training_texts("novels")[:5] == tasks.training_texts("novels")[:5]
    assert len(tasks.tasks(LIMIT)["mlqe"].sentences) == 3 * LIMIT


# --- states


def test_states_are_in_the_order_of_the_texts(lm: LanguageModel, tmp_path: Path) -> None:
    sequences = [lm.encode(text) for text in ("A longer sentence stands here.", "Short.", "Not so short.")]
    cache = StateCache(lm, tmp_path)
    found = cache.states("some", sequences)
    assert found.labels.tolist() == [token for ids in sequences for token in ids]
    alone = states.compute(lm, sequences[1:2])
    start = len(sequences[0])
    torch.testing.assert_close(found.hidden[start : start + len(sequences[1])], alone.hidden, rtol=1e-3, atol=1e-3)
    last = lm.model.config.num_hidden_layers
    layer = states.compute(lm, sequences, layer=last)
    torch.testing.assert_close(layer.hidden, found.hidden, rtol=1e-3, atol=1e-3)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert torch.equal(cache.states("some", sequences).hidden, found.hidden)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == kept


def test_combination_that_keeps_the_order(lm: LanguageModel, smollm2_head: Any) -> None:
    found = states.compute(lm, [lm.encode("The cat sat on the mat.")])
    head = smollm2_head
    expected = []
    with torch.no_grad():
        terms = head.linear_terms(found.hidden, lm.head, found.logsumexp)
        scores = terms.scale * terms.hidden if terms.scale is not None else terms.hidden
        logits = scores @ terms.weight.T + (0 if terms.bias is None else terms.bias) + terms.shift[:, None]
        ordered = F.order_preserving(lm.head.logits(found.hidden), logits.double().sigmoid())
        expected = ordered.gather(1, found.labels[:, None])[:, 0].log().numpy()
    np.testing.assert_allclose(signals.order_preserving_logs(head, found, lm.head), expected, rtol=1e-4, atol=1e-5)


# --- evaluation


def test_resampled_auroc_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    right = generator.random(200) < 0.7
    scores = generator.integers(0, 20, 200) / 4  # many ties
    unit = np.sort(generator.integers(0, 40, 200))
    weights = generator.integers(0, 4, (25, 40)).astype(float)
    expected = [roc_auc_score(right, scores, sample_weight=row[unit]) for row in weights]
    np.testing.assert_allclose(evaluate.resampled_auroc(right, scores, unit, weights), expected, rtol=1e-12)
    assert evaluate.auroc(right, scores) == pytest.approx(roc_auc_score(right, scores), rel=1e-12)


def test_weighted_pearson_is_that_of_repeated_rows() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 50))
    weights = generator.integers(0, 4, (5, 50)).astype(float)
    repeated = [np.repeat([x, y], row.astype(int), axis=1) for row in weights]
    expected = [np.corrcoef(*rows)[0, 1] for rows in repeated]
    np.testing.assert_allclose(evaluate.weighted_pearson(x, y, weights), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["F.5", "MCC"])
def test_best_threshold(name: str) -> None:
    generator = np.random.default_rng(0)
    right = generator.random(80) < 0.6
    scores = np.round(generator.normal(size=80) + right, 1)
    oracles = {"F.5": lambda *a: fbeta_score(*a, beta=0.5), "MCC": matthews_corrcoef}
    values = {t: oracles[name](~right, scores <= t) for t in np.unique(scores)}
    chosen = evaluate.best_threshold(right, scores, evaluate._DETECTION[name])
    assert values[chosen] == pytest.approx(max(values.values()))
    figures = evaluate._detection(right, scores, {"F.5": chosen, "MCC": chosen})
    assert figures[name] == pytest.approx(values[chosen])


def test_resamples_are_of_whole_sentences() -> None:
    task, token_words = judged()
    found = evaluate.Judgements(task, token_words)
    generator = np.random.default_rng(1)
    logs = -generator.random(sum(map(len, token_words))) - 0.1
    evaluation = evaluate._replicates(found, logs, "test", "mean of logs")
    drawn = evaluate.resamples(len(task.sentences))[3].astype(int)
    order = np.repeat(np.arange(len(drawn)), drawn)
    starts = np.append(0, np.cumsum([len(words) for words in token_words]))
    repeated = evaluate.Judgements(Task("some", [task.sentences[i] for i in order]), [token_words[i] for i in order])
    repeated_logs = np.concatenate([logs[starts[i] : starts[i + 1]] for i in order])
    words = repeated.word_scores(repeated_logs)
    assert evaluation["AUROC"][3] == pytest.approx(roc_auc_score(repeated.bad == RIGHT, words))
    scores = repeated.sentence_scores(repeated_logs, "mean of logs")
    assert evaluation["DA Pearson"][3] == pytest.approx(np.corrcoef(scores, repeated.da)[0, 1])


def test_scores_of_words_and_sentences() -> None:
    sentences = [Sentence(["a", "b"], [0, 1], "dev", 0.5, 0.1, [-1.0, -2.0, -3.0], [0, 1, 1])]
    found = evaluate.Judgements(Task("some", sentences), [[0, 0]])
    logs = np.log([0.5, 0.25])
    np.testing.assert_allclose(found.word_scores(logs), [np.log(0.25), np.inf])
    assert found.words("dev").tolist() == [True, False]  # no token ends in the second
    expected = {"min": -1.386294, "mean": 0.375, "mean of logs": -1.039721, "mean of logits": -0.549306}
    expected["product"] = -2.079442
    for name, value in expected.items():
        assert found.sentence_scores(logs, name)[0] == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(found.nmt_words, [-1, -3])
    assert found.nmt_sentences[0] == -2


# --- ambiguity


def test_places_are_beginnings_that_sentences_share(lm: LanguageModel) -> None:
    found = ambiguity.places(lm, ["He was born in Rome.", "He was sent home.", "He was sent away.", "She left."] * 2)
    decoded = {
        lm.tokenizer.decode(place.ids): sorted(lm.tokenizer.decode([token]) for token in place.following)
        for place in found
    }
    assert decoded == {"He was": [" born", " sent"], "He was sent": [" away", " home"]}


# --- the whole


def few_recipes() -> list[tuple[str, str, Recipe]]:
    chosen = replace(recipes.CHOSEN, rank=2, rows=64, layer=None, text=(("postedits", 200),))
    return [
        ("chosen", "chosen", chosen),
        ("rank", "rank 1", replace(chosen, rank=1)),
        ("head", "full", replace(chosen, kind="full")),
        ("loss", "whole vocabulary", replace(chosen, loss="vocabulary", epochs=0.5)),
        ("text", "novels", replace(chosen, text=(("postedits", 100), ("novels", 100)))),
        ("layer", "layer 1", replace(chosen, layer=1)),
    ]


def test_the_whole_study(tiny_lm: LanguageModel, data_folder: Path, tmp_path: Path) -> None:
    settings = study.Settings(tmp_path / "work", limit=LIMIT, seeds=1)
    results = study.run(tiny_lm, settings, few_recipes())
    report.write(results, tmp_path / "first")
    heads = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.*")}
    report.write(study.run(tiny_lm, settings, few_recipes()), tmp_path / "second")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.*")} == heads  # nothing anew
    texts = [(tmp_path / name / "report.md").read_text() for name in ("first", "second")]
    assert texts[0] == texts[1]
    assert "Quick pass" in texts[0]
    assert not re.search(r"\bnan\b", texts[0])
    stored = json.loads((tmp_path / "first" / "results.json").read_text())
    assert [row["name"] for row in stored["recipes"]] == [name for _, name, _ in few_recipes()]
    assert {path.name for path in (tmp_path / "first").glob("*.png")} >= {"signals.png", "rank.png", "reliability.png"}


@pytest.mark.parametrize("module", [["-m", "benchmarks.quality"], ["benchmarks/quality"]])
def test_command_without_data(module: list[str], tmp_path: Path, smollm2: Any) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYQE_DATA"}
    command = [sys.executable, *module, "--work", str(tmp_path), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "PYQE_DATA is not set" in result.stderr


def test_recipes_differ() -> None:
    found = list(recipes.recipes(3))
    assert found[0][2] == recipes.CHOSEN
    assert len({recipe for _, _, recipe in found}) == len(found)
    assert len({name for _, name, _ in found}) == len(found)
