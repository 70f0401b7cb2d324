"""The report's figures, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.ambiguity import SHOWN
from benchmarks.quality.study import DECIDING, REFERENCE
from pyqe._files import atomic_path

_OTHER_HEADS = ("full", "full, 8 epochs", "rescaling")
_COLOURS = dict(zip(SHOWN, ("tab:red", "tab:orange", "tab:blue"), strict=True))


def draw(results: dict[str, Any], folder: Path) -> dict[str, str]:
    """Draw them.

    Returns:
        The file's name of each figure.
    """
    drawn = {
        "signals": _signals(results["signals"]),
        "rank": _rank(results["recipes"]),
        "reliability": _reliability(results["calibration"]),
    }
    if results["ambiguity"]:
        drawn["ambiguity"] = _ambiguity(results["ambiguity"])
    names = {name: f"{name}.png" for name in drawn}
    for name, figure in drawn.items():
        with atomic_path(folder / names[name]) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return names


def _panels(columns: int, height: float = 4.2) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.2 * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _signals(signals: Mapping[str, Any]) -> Figure:
    """Differences to the softmax probability on test, with intervals."""
    names = [name for name in signals if name != REFERENCE]
    figure, panels = _panels(len(DECIDING), 0.32 * len(names) + 1.2)
    for axes, (task, kind) in zip(panels, DECIDING, strict=True):
        for y, name in enumerate(reversed(names)):
            found = signals[name][task]["differences"]["test"][kind]
            axes.plot([found["low"], found["high"]], [y, y], color="grey")
            axes.plot(found["difference"], y, marker="o", color="tab:blue")
        axes.axvline(0, color="black", linewidth=0.8)
        labels = list(reversed(names)) if axes is panels[0] else []
        axes.set_yticks(range(len(labels)) if labels else [], labels)
        axes.set_title(f"{task}, {kind}")
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
    figure.supxlabel("difference to the softmax probability, 95 % interval")
    return figure


def _rank(recipes: list[dict[str, Any]]) -> Figure:
    """Low-rank heads by rank; full heads, the rescaling head and the softmax probability as lines."""
    figure, panels = _panels(len(DECIDING))
    ranked = [row for row in recipes if row["group"] in ("small", "rank") and row["recipe"]["kind"] == "low_rank"]
    ranked.sort(key=lambda row: row["recipe"]["rank"])
    lines = {row["name"]: row for row in recipes if row["group"] == "head" and row["name"] in _OTHER_HEADS}
    for axes, (task, kind) in zip(panels, DECIDING, strict=True):
        found = [row["tasks"][task]["differences"]["test"][kind] for row in ranked]
        axes.plot([row["recipe"]["rank"] for row in ranked], [x["value"] for x in found], marker="o", label="low rank")
        for (name, row), style in zip(lines.items(), ("--", "-.", ":"), strict=False):
            value = row["tasks"][task]["figures"]["test"][kind]
            axes.axhline(value, color="tab:blue", linestyle=style, linewidth=1, label=name)
        if found:
            softmax = found[0]["value"] - found[0]["difference"]
            axes.axhline(softmax, color="tab:red", linewidth=1, label=REFERENCE)
        axes.set_xscale("log", base=2)
        axes.set(title=f"{task}, {kind}", xlabel="rank")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    return figure


def _reliability(calibration: Mapping[str, Any]) -> Figure:
    figure, panels = _panels(len(calibration))
    for axes, (of, signals) in zip(panels, calibration.items(), strict=True):
        for name, found in signals.items():
            curve = found["curve"]
            label = f"{name}, ECE {found['ECE']:.3f}"
            axes.plot(curve["confidence"], curve["accuracy"], marker="o", color=_COLOURS[name], label=label)
            axes.fill_between(curve["confidence"], curve["low"], curve["high"], color=_COLOURS[name], alpha=0.15)
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set(title=of, xlabel="probability", ylabel="share right", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    return figure


def _ambiguity(found: Mapping[str, Any]) -> Figure:
    """Right next tokens as lines, negatives at the same places as dashed ones."""
    figure, panels = _panels(2)
    labels = {"alternatives": "attested right next tokens", "entropy": "entropy of the language model, nats"}
    for axes, (kind, label) in zip(panels, labels.items(), strict=True):
        _means(axes, found[kind])
        axes.set(xlabel=label, ylabel="mean score", ylim=(0, 1))
    panels[0].legend(fontsize="small")
    return figure


def _means(axes: Axes, rows: list[dict[str, Any]]) -> None:
    names = [row["name"] for row in rows]
    for of, style in (("right", "-"), ("negatives", "--")):
        for score in SHOWN:
            values = [row[of][score] for row in rows]
            axes.plot(names, values, style, marker="o", color=_COLOURS[score], label=f"{score}, {of}")
    axes.grid(alpha=0.3)
