"""The report: tables, figures and all numbers as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import figures
from benchmarks.quality.ambiguity import SHOWN
from benchmarks.quality.evaluate import AGGREGATIONS, BINS, RESAMPLES
from benchmarks.quality.states import write_json
from benchmarks.quality.study import DECIDING, HEAD, HEADLINES, REFERENCE
from pyqe._files import atomic_path
from pyqe.bench.machine import describe

_TITLES = {
    "realec": "learners' errors",
    "mlqe": "translations",
    "blimp": "minimal pairs",
    ("realec", "AUROC"): "learners' errors, AUROC of words",
    ("mlqe", "AUROC"): "translations, AUROC of words",
    ("mlqe", "DA Pearson"): "translations, Pearson with DA",
    ("blimp", "AUROC"): "minimal pairs, AUROC over all",
    ("blimp", "accuracy"): "minimal pairs, accuracy",
}

_COMPARED = (
    "a third of the text, twice",
    "full",
    "full, 8 epochs",
    "literal recipe of the authors",
)  # recipes in the first lines


def write(results: dict[str, Any], folder: Path) -> None:
    """``results.json``, ``report.md`` and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"machine": describe(), **results}
    write_json(folder / "results.json", _short(results))
    pictures = figures.draw(results, folder)
    with atomic_path(folder / "report.md") as temporary:
        temporary.write_text("\n".join(_lines(results, pictures)) + "\n", encoding="utf-8")


def _short(value: Any) -> Any:
    """Floats of six digits, and null for NaN, which JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): _short(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _lines(results: dict[str, Any], pictures: Mapping[str, str]) -> list[str]:
    parts = (
        _introduction(results),
        _verdicts(results),
        _signal_tables(results, pictures),
        _detection_table(results),
        _sentence_tables(results),
        _translator_table(results),
        _recipe_tables(results, pictures),
        _calibration_table(results, pictures),
        _ambiguity_tables(results, pictures),
    )
    return [line for part in parts for line in part]


# --- parts of the report


def _introduction(results: dict[str, Any]) -> list[str]:
    setting, machine, speed = results["setting"], results["machine"], results["throughput"]
    texts = ", ".join(f"{tokens:,} of {name}" for name, tokens in results["data"]["training tokens"].items())
    limited = (
        [] if setting["limit"] is None else [f"**Quick pass with {setting['limit']} sentences of each file.**", ""]
    )
    rows = [
        [_TITLES[name], split, *(f"{counts[key]:,}" for key in ("sentences", "words", "wrong"))]
        for name, splits in results["data"]["tasks"].items()
        for split, counts in splits.items()
    ]
    return [
        "# Quality of the Sigmoid Head",
        "",
        *limited,
        f"Language model: {setting['model']}, frozen, in bfloat16; {setting['context']} before each sentence. Command:",
        "`make quality`, or `python -m benchmarks.quality`.",
        f"Machine: {machine['processor']}, {machine['cpu']['torch_threads']} threads; torch "
        f"{machine['packages']['torch']}, pyqe {machine['pyqe']}.",
        "",
        f"Training text in tokens, at most: {texts}. The model's forward pass runs at {speed['forward']:,.0f} tokens a",
        f"second; training the chosen head from token ids at {speed['training']:,.0f}, {speed['share']:.2f} times as "
        "long (medians of interleaved rounds).",
        "",
        "A word's score is the lowest of the tokens that end in it. Thresholds, aggregations and weights are chosen on",
        "dev, and so is the recipe, among those that exclude dominant tokens. "
        f"Differences are to the {REFERENCE}, with a 95 % interval by {RESAMPLES:,} paired bootstrap "
        "resamples of sentences (of pairs for minimal pairs).",
        "",
        *_table(["task", "split", "sentences", "words", "wrong"], rows),
    ]


def _verdicts(results: dict[str, Any]) -> list[str]:
    found = {_TITLES[key]: results["signals"][HEAD][key[0]]["differences"]["test"][key[1]] for key in DECIDING}
    better = [name for name, one in found.items() if one["low"] > 0]
    worse = [name for name, one in found.items() if one["high"] < 0]
    words = {
        of: signals[HEAD]["Brier difference"] for of, signals in results["calibration"].items() if REFERENCE in signals
    }
    return [
        "## In short",
        "",
        f"* The chosen head beats the {REFERENCE} on test, the interval being above 0, on {len(better)} of "
        f"{len(found)}: {'; '.join(better) or 'none'}.",
        *([f"* It is worse, the interval being below 0, on: {'; '.join(worse)}."] if worse else []),
        f"* Brier score, of the head less of the {REFERENCE}: "
        + "; ".join(f"{of} {_interval(one)}" for of, one in words.items())
        + ".",
        *_recipe_verdicts(results["recipes"]),
        "",
    ]


def _recipe_verdicts(recipes: list[dict[str, Any]]) -> list[str]:
    """What the mean gain says of the chosen recipe beside others."""
    chosen, best = recipes[0], max(recipes, key=lambda row: row["gain"]["dev"])
    lines = [
        f"* Mean gain of these {len(DECIDING)} figures: chosen {_gain(chosen)}; best on dev is *{best['name']}* "
        f"({best['group']}) with {_gain(best)}."
    ]
    seeds = [row["gain"]["test"] for row in recipes if row["group"] in ("chosen", "seed")]
    if len(seeds) > 1:
        lines.append(f"* Over {len(seeds)} seeds the gain on test is {min(seeds):+.3f} to {max(seeds):+.3f}.")
    named = {row["name"]: row for row in recipes if row["group"] in ("small", "head")}
    compared = [named[name] for name in _COMPARED if name in named]
    return [
        *lines,
        *(f"* {row['name']} ({row['training']['parameters']:,} parameters): {_gain(row)}." for row in compared),
    ]


def _gain(row: dict[str, Any]) -> str:
    return f"{row['gain']['dev']:+.3f} on dev, {row['gain']['test']:+.3f} on test"


def _signal_tables(results: dict[str, Any], pictures: Mapping[str, str]) -> list[str]:
    lines = ["## Signals", "", f"![differences to the softmax probability]({pictures['signals']})", ""]
    for split, keys in (("test", HEADLINES), ("et-en", (("mlqe", "AUROC"), ("mlqe", "DA Pearson")))):
        rows = [
            [name, *(_cell(tasks[task], split, figure) for task, figure in keys)]
            for name, tasks in results["signals"].items()
        ]
        lines += [f"On {split}:", "", *_table(["signal", *(_TITLES[key] for key in keys)], rows)]
    return lines


def _detection_table(results: dict[str, Any]) -> list[str]:
    keys = [("realec", "test"), ("mlqe", "test"), ("mlqe", "et-en")]
    names = ("AP", "F.5", "MCC")
    header = ["signal", *(f"{_TITLES[task]} ({split}), {name}" for task, split in keys for name in names)]
    rows = [
        [signal, *(_number(tasks[task]["figures"][split][name]) for task, split in keys for name in names)]
        for signal, tasks in results["signals"].items()
    ]
    return ["## Finding wrong words", "", *_table(header, rows)]


def _sentence_tables(results: dict[str, Any]) -> list[str]:
    lines = ["## Sentences by aggregation", ""]
    for kind in ("DA Pearson", "DA Spearman", "HTER Pearson", "HTER Spearman"):
        rows = []
        for signal, tasks in results["signals"].items():
            found = tasks["mlqe"]
            cells = [_cell(found, "test", f"{kind}, {name}") for name in AGGREGATIONS]
            rows.append([signal, *cells, str(found["aggregation"])])
        sign = " (of the negative)" if kind.startswith("HTER") else ""
        lines += [f"{kind}{sign}, test:", "", *_table(["signal", *AGGREGATIONS, "best on dev"], rows)]
    return lines


def _translator_table(results: dict[str, Any]) -> list[str]:
    names = ("translator", "signal", "sum", "fitted")
    keys = [f"{figure}, {name}" for figure in ("AUROC", "DA Pearson") for name in names]
    rows = [
        [signal, split, *(_number(figures_of[key]) for key in keys)]
        for signal, splits in results["translator"].items()
        for split, figures_of in splits.items()
    ]
    return [
        "## Beside the translator's own log-probability",
        "",
        "Alone, the signal alone, the sum of z-scores, and with weights fitted on dev.",
        "",
        *_table(["signal", "split", *keys], rows),
    ]


def _recipe_tables(results: dict[str, Any], pictures: Mapping[str, str]) -> list[str]:
    lines = ["## Recipes", "", "In each group one thing of the recipe *small* changes (in *all the text*,"]
    lines += [
        "of the chosen one). Gain: mean difference of",
        f"{'; '.join(_TITLES[key] for key in DECIDING)} to the {REFERENCE}.",
        "",
        f"![rank and AUROC]({pictures['rank']})",
        "",
    ]
    for split in ("dev", "test"):
        header = ["group", "recipe", "parameters", "loss", "gain", *(_TITLES[key] for key in HEADLINES)]
        rows = [
            [
                row["group"],
                row["name"],
                f"{row['training']['parameters']:,}",
                _number(row["training"]["last_loss"]),
                f"{row['gain'][split]:+.3f}",
                *(_cell(row["tasks"][task], split, figure) for task, figure in HEADLINES),
            ]
            for row in results["recipes"]
        ]
        lines += [f"On {split}:", "", *_table(header, rows)]
    return lines


def _calibration_table(results: dict[str, Any], pictures: Mapping[str, str]) -> list[str]:
    keys = ("ECE", "Brier", "mean probability", "share right")
    rows = [
        [of, name, f"{found['n']:,}", *(_number(found[key]) for key in keys), _interval(found.get("Brier difference"))]
        for of, signals in results["calibration"].items()
        for name, found in signals.items()
    ]
    return [
        "## Calibration",
        "",
        f"Held-out text: references and negatives sampled as in training. ECE with {BINS} bins of equal width.",
        "",
        *_table(["of", "signal", "n", *keys, "Brier difference"], rows),
        f"![reliability]({pictures['reliability']})",
        "",
    ]


def _ambiguity_tables(results: dict[str, Any], pictures: Mapping[str, str]) -> list[str]:
    if not results["ambiguity"]:
        return []
    lines = [
        "## Ambiguity",
        "",
        "Mean scores of right next tokens, and of sampled negatives at the same places: by how many right ones are",
        "attested in post-edits that no head was trained on, and by the entropy of the language model.",
        "",
        f"![ambiguity]({pictures['ambiguity']})",
        "",
    ]
    for kind, title in (("alternatives", "right next tokens"), ("entropy", "entropy in nats")):
        header = [title, "places", *(f"{name}, {of}" for of in ("right", "negatives") for name in SHOWN)]
        rows = [
            [row["name"], f"{row['places']:,}", *(_number(row[of][x]) for of in ("right", "negatives") for x in SHOWN)]
            for row in results["ambiguity"][kind]
        ]
        lines += _table(header, rows)
    return lines


# --- cells


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _cell(task: Mapping[str, Any], split: str, figure: str) -> str:
    """A figure, with its difference and interval where there is one; the softmax probability has none to itself."""
    found = task["differences"].get(split, {}).get(figure)
    value = _number(task["figures"][split][figure])
    if found is None or found["low"] == found["high"] == 0:
        return value
    return f"{value} ({found['difference']:+.3f}, {found['low']:+.3f} to {found['high']:+.3f})"


def _interval(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:], ""]
