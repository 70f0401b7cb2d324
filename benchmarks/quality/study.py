"""The study from beginning to end; whatever takes long is kept in a folder, so that a killed run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality import ambiguity, evaluate, signals, throughput
from benchmarks.quality.evaluate import Evaluation, Judgements
from benchmarks.quality.signals import Floats
from benchmarks.quality.states import (
    LanguageModel,
    StateCache,
    Texts,
    enough,
    hashed,
    read_json,
    texts,
    write_json,
)
from benchmarks.quality.tasks import SPLITS, Task, tasks
from benchmarks.quality.train import Recipe, TrainingData, mixture, sampler, train
from pyqe._files import atomic_path
from pyqe.heads import SigmoidHead
from pyqe.metrics import reliability_curve
from pyqe.training import HiddenStateDataset

HEADLINES = (("realec", "AUROC"), ("mlqe", "AUROC"), ("mlqe", "DA Pearson"), ("blimp", "AUROC"), ("blimp", "accuracy"))
DECIDING = HEADLINES[:4]  # whose mean gain on dev says which recipe is best
REFERENCE, HEAD, KEPT_ORDER = "softmax probability", "Sigmoid Head", "rank-preserving combination"
HELD_OUT = 6000  # post-edits that no head is trained on
CALIBRATION = 2000  # of those, for calibration
_SEED = 0

Logs = Mapping[str, Floats]  # by task, [tokens]
Table = Iterable[tuple[str, str, Recipe]]  # group, name and recipe


@dataclass(frozen=True)
class Settings:
    """Attributes:
    work: folder of what takes long.
    limit: sentences of each file and text, for a quick pass.
    seeds: how often the chosen recipe is trained.
    """

    work: Path
    limit: int | None = None
    seeds: int = 3


class Prepared:
    """Tasks as tokens, states and judgements.

    Args:
        lm: whose tokens and states.
        cache: of states.
        found: the tasks.
        spaced: leave a space between each two words.
    """

    def __init__(
        self, lm: LanguageModel, cache: StateCache, found: Mapping[str, Task], *, spaced: bool = False
    ) -> None:
        self.cache = cache
        self.sequences: dict[str, list[list[int]]] = {}
        self.judgements: dict[str, Judgements] = {}
        for name, task in found.items():
            encoded = [lm.encode_words(sentence, spaced=spaced) for sentence in task.sentences]
            self.sequences[name] = [ids for ids, _ in encoded]
            self.judgements[name] = Judgements(task, [words for _, words in encoded])

    @cached_property
    def states(self) -> dict[str, HiddenStateDataset]:
        return {name: self.cache.states(name, sequences) for name, sequences in self.sequences.items()}

    def layer_states(self, layer: int) -> dict[str, Tensor]:
        return {name: self.cache.layer_states(name, found, layer) for name, found in self.sequences.items()}

    @cached_property
    def key(self) -> str:
        return hashed([self.cache.lm.name, self.cache.lm.context_id, self.sequences])

    def evaluate(self, logs: Logs) -> dict[str, Evaluation]:
        return {name: evaluate.evaluate(task, logs[name]) for name, task in self.judgements.items()}


@dataclass(frozen=True)
class Trained:
    """A head, what training it took, and its logits of the tasks' tokens."""

    head: SigmoidHead
    facts: dict[str, Any]
    logits: Logs

    @property
    def logs(self) -> Logs:
        return {name: signals.log_sigmoid(logits) for name, logits in self.logits.items()}


class Study:
    """What the steps of the study share.

    Args:
        lm: the language model.
        settings: of this run.
        table: the recipes, the chosen one first.
    """

    def __init__(self, lm: LanguageModel, settings: Settings, table: Table) -> None:
        self.lm, self.settings, self.table = lm, settings, list(table)
        self.chosen = self.table[0][2]
        self.cache = StateCache(lm, settings.work / "states")
        self.scores = settings.work / "scores"
        self.scores.mkdir(parents=True, exist_ok=True)
        self.tasks = tasks(settings.limit)
        self.prepared = Prepared(lm, self.cache, self.tasks)

    @cached_property
    def texts(self) -> Texts:
        names = sorted({name for _, _, recipe in self.table for name, _ in recipe.text})
        return texts(self.lm, names, HELD_OUT, self.settings.limit)

    @cached_property
    def text_sequences(self) -> dict[str, list[list[int]]]:
        """As much of each text as any recipe asks for."""
        most: dict[str, int] = {}
        for _, _, recipe in self.table:
            for name, tokens in recipe.text:
                most[name] = max(tokens, most.get(name, 0))
        return {name: enough(self.texts.training[name], tokens) for name, tokens in most.items() if tokens}

    @cached_property
    def text_states(self) -> dict[str, HiddenStateDataset]:
        return {name: self.cache.states(name, found) for name, found in self.text_sequences.items()}

    @cached_property
    def held_out(self) -> HiddenStateDataset:
        return self.cache.states("held-out", self.texts.held_out[:CALIBRATION])

    def training_data(self, recipe: Recipe) -> TrainingData:
        states = mixture(self.text_states, recipe)
        if recipe.layer is None:
            return TrainingData(states)
        layers = []
        for name, tokens in ((name, tokens) for name, tokens in recipe.text if tokens):
            sequences = enough(self.text_sequences[name], tokens)
            layers.append(self.cache.layer_states(name, sequences, recipe.layer)[:tokens])
        return TrainingData(states, torch.cat(layers))

    def trained(self, recipe: Recipe) -> Trained:
        """The head of a recipe, trained now or before."""
        data = self.training_data(recipe)
        folder = self.settings.work / "heads" / hashed([asdict(recipe), data.key, self.prepared.key, self.lm.name])
        if not (folder / "training.json").exists():
            head, facts = train(recipe, data, self.lm)
            head.save_pretrained(folder)
            _save_arrays(folder / "logits.npz", self._logits(head, recipe))
            write_json(folder / "training.json", facts)
        head = SigmoidHead.from_pretrained(folder)
        return Trained(head, read_json(folder / "training.json"), _load_arrays(folder / "logits.npz"))

    def _logits(self, head: SigmoidHead, recipe: Recipe) -> Logs:
        layers = {} if recipe.layer is None else self.prepared.layer_states(recipe.layer)
        return {
            name: signals.head_logits(head, states, self.lm.head, layer_hidden=layers.get(name))
            for name, states in self.prepared.states.items()
        }

    def kept(self, name: str, key: Any, compute: Callable[[], Logs]) -> Logs:
        """Arrays that are computed once."""
        path = self.scores / f"{name}-{hashed(key)}.npz"
        if not path.exists():
            _save_arrays(path, compute())
        return _load_arrays(path)


# --- steps


def run(lm: LanguageModel, settings: Settings, table: Table) -> dict[str, Any]:
    """Everything that the report is made of."""
    study = Study(lm, settings, table)
    by_signal = softmax_evaluations(study)
    reference = by_signal[REFERENCE]
    chosen = study.trained(study.chosen)
    rows = recipe_rows(study, reference)
    by_signal[HEAD] = study.prepared.evaluate(chosen.logs)
    logs = {HEAD: chosen.logs, REFERENCE: _softmax_logs(study, study.prepared, "tasks")[REFERENCE]}
    if study.chosen.layer is None:
        logs[KEPT_ORDER] = _kept_order(study, chosen)
        by_signal[KEPT_ORDER] = study.prepared.evaluate(logs[KEPT_ORDER])
    by_signal |= variant_evaluations(study)
    return {
        "setting": {
            "model": lm.name,
            "context": lm.context,
            "limit": settings.limit,
            "seeds": settings.seeds,
            "chosen": asdict(study.chosen),
        },
        "data": data_facts(study),
        "signals": {name: _with_differences(found, reference) for name, found in by_signal.items()},
        "recipes": rows,
        "translator": {
            name: evaluate.beside_translator(
                study.prepared.judgements["mlqe"], found["mlqe"], by_signal[name]["mlqe"].aggregation or "mean"
            )
            for name, found in logs.items()
        },
        "calibration": calibration(study, chosen, logs),
        "ambiguity": ambiguity_rows(study, chosen),
        "throughput": measured(study),
    }


def softmax_evaluations(study: Study) -> dict[str, dict[str, Evaluation]]:
    found = _softmax_logs(study, study.prepared, "tasks")
    return {name: study.prepared.evaluate(logs) for name, logs in tqdm(found.items(), desc="signals", disable=None)}


def _softmax_logs(study: Study, prepared: Prepared, name: str) -> dict[str, Logs]:
    """By signal, then by task."""

    def compute() -> Logs:
        by_task = {task: signals.softmax_signals(states, study.lm.head) for task, states in prepared.states.items()}
        return {f"{signal}|{task}": logs for task, found in by_task.items() for signal, logs in found.items()}

    result: dict[str, dict[str, Floats]] = {}
    for key, logs in study.kept(f"softmax-{name}", prepared.key, compute).items():
        signal, task = key.split("|")
        result.setdefault(signal, {})[task] = logs
    return dict(result)


def variant_evaluations(study: Study) -> dict[str, dict[str, Evaluation]]:
    """The softmax probability where texts are given to the LM in other ways."""
    bos = study.lm.tokenizer.bos_token
    others = {
        "a space between each two words": (study.lm, True),
        f"{bos} before each sentence": (replace(study.lm, context=bos), False),
    }
    result = {}
    for name, (lm, spaced) in others.items():
        cache = StateCache(lm, study.settings.work / "states-of-variants")
        prepared = Prepared(lm, cache, study.tasks, spaced=spaced)
        result[f"{REFERENCE}, {name}"] = prepared.evaluate(_softmax_logs(study, prepared, "variant")[REFERENCE])
    return result


def recipe_rows(study: Study, reference: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Each recipe's training and figures, beside the softmax probability's."""
    rows = []
    for group, name, recipe in tqdm(study.table, desc="recipes", unit=" recipes", disable=None):
        trained = study.trained(recipe)
        evaluations = study.prepared.evaluate(trained.logs)
        row = {"group": group, "name": name, "recipe": asdict(recipe), "training": trained.facts}
        rows.append({**row, "tasks": _with_differences(evaluations, reference), "gain": gains(evaluations, reference)})
    return rows


def gains(evaluations: Mapping[str, Evaluation], reference: Mapping[str, Evaluation]) -> dict[str, float]:
    """Mean difference of the deciding figures on dev and test."""
    return {
        split: float(
            np.mean([_figure(evaluations, task, split, x) - _figure(reference, task, split, x) for task, x in DECIDING])
        )
        for split in ("dev", "test")
    }


def _figure(evaluations: Mapping[str, Evaluation], task: str, split: str, figure: str) -> float:
    return evaluations[task].figures[split][figure]


def _with_differences(ours: Mapping[str, Evaluation], theirs: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Figures by task and split, and the differences of those that have an interval."""
    result: dict[str, Any] = {}
    for task, found in ours.items():
        result[task] = {"aggregation": found.aggregation, "figures": found.figures, "differences": {}}
        for split, replicates in found.replicates.items():
            result[task]["differences"][split] = {
                figure: asdict(evaluate.difference(found, theirs[task], split, figure)) for figure in replicates
            }
    return result


def _kept_order(study: Study, chosen: Trained) -> Logs:
    def compute() -> Logs:
        return {
            name: signals.order_preserving_logs(chosen.head, states, study.lm.head)
            for name, states in tqdm(study.prepared.states.items(), desc=KEPT_ORDER, disable=None)
        }

    return study.kept("kept-order", [asdict(study.chosen), chosen.facts, study.prepared.key], compute)


def calibration(study: Study, chosen: Trained, logs: Mapping[str, Logs]) -> dict[str, Any]:
    """Of the head on held-out text, and of words by the people who judged them."""
    result: dict[str, Any] = {}
    if study.chosen.layer is None:
        result["held-out text"] = {HEAD: _calibrated(*_held_out_pairs(study, chosen))}
    for task in ("realec", "mlqe"):
        judged = study.prepared.judgements[task]
        result[f"words of {task}"] = {
            name: _calibrated(*evaluate.word_calibration(judged, found[task], "test"))
            for name, found in logs.items()
            if name in (HEAD, REFERENCE)
        }
        difference = evaluate.brier_difference(judged, logs[HEAD][task], logs[REFERENCE][task], "test")
        result[f"words of {task}"][HEAD]["Brier difference"] = asdict(difference)
    return result


def _calibrated(right: Any, probs: Floats) -> dict[str, Any]:
    curve = reliability_curve(right, probs, n_bins=evaluate.BINS)
    kept = curve.count > 0
    columns = {name: getattr(curve, name)[kept].tolist() for name in ("count", "accuracy", "confidence", "low", "high")}
    return {**evaluate.calibration(right, probs), "curve": columns}


def _held_out_pairs(study: Study, chosen: Trained) -> tuple[Any, Floats]:
    """References and sampled negatives, as in training."""
    states = study.held_out
    generator = torch.Generator().manual_seed(_SEED)
    drawn = study.lm.head.sample_negatives(states.hidden, states.labels, _sampler(study), generator)
    ids = torch.cat([states.labels[:, None], drawn], 1)
    logits = signals.head_logits(chosen.head, states, study.lm.head, ids.clamp(min=0))
    right = np.zeros(ids.shape, dtype=bool)
    right[:, 0] = True
    kept = ids.numpy() >= 0
    return right[kept], np.exp(signals.log_sigmoid(logits[kept]))


def _sampler(study: Study) -> Any:
    labels = mixture(study.text_states, study.chosen).labels
    return sampler(study.chosen, labels, study.lm.head.vocab_size)


def ambiguity_rows(study: Study, chosen: Trained) -> dict[str, Any]:
    if study.chosen.layer is not None:
        return {}
    found = ambiguity.places(study.lm, study.texts.held_out_texts)
    return {
        "alternatives": ambiguity.by_alternatives(found, study.cache, chosen.head, _sampler(study)) if found else [],
        "entropy": ambiguity.by_entropy(study.held_out, study.lm, chosen.head, _sampler(study)),
    }


def measured(study: Study) -> dict[str, float]:
    """Rates of training, measured once."""
    path = study.settings.work / f"throughput-{hashed([asdict(study.chosen), study.lm.name])}.json"
    if not path.exists():
        write_json(path, throughput.measure(study.lm, study.chosen, study.texts.held_out_texts))
    rates: dict[str, float] = read_json(path)
    return rates


def data_facts(study: Study) -> dict[str, Any]:
    """How much there is of everything."""
    by_task: dict[str, Any] = {}
    for name, task in study.prepared.judgements.items():
        splits = [split for split in SPLITS if split in task.splits]
        by_task[name] = {
            split: {
                "sentences": int((task.split == split).sum()),
                "words": int(task.words(split).sum()),
                "wrong": int(task.bad[task.words(split)].sum()),
            }
            for split in splits
        }
    return {
        "tasks": by_task,
        "training tokens": {name: len(states.labels) for name, states in study.text_states.items()},
        "held-out sentences": len(study.texts.held_out),
    }


def _save_arrays(path: Path, arrays: Mapping[str, Floats]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _load_arrays(path: Path) -> dict[str, Floats]:
    with np.load(path) as arrays:
        return dict(arrays)
