"""How well scores of tokens agree with what people judged, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.linear_model import LinearRegression, LogisticRegression

from benchmarks.quality.signals import Floats
from benchmarks.quality.tasks import RIGHT, SPLITS, UNJUDGED, WRONG, Task
from pyqe.metrics import average_precision, brier_score, expected_calibration_error

Bools = NDArray[np.bool_]

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)
BINS = 15
_SURE = -1e-9  # a logarithm closer to 0 has no finite logit worth speaking of


# --- scores of words and sentences


def _logit(logs: Floats) -> Floats:
    return -np.log(np.expm1(-np.minimum(logs, _SURE)))


# Each gives numbers of tokens of which the mean is taken; "min" stands for itself.
AGGREGATIONS: dict[str, Callable[[Floats], Floats] | None] = {
    "min": None,
    "mean": np.exp,
    "mean of logs": lambda logs: logs,
    "mean of logits": _logit,
    "product": lambda logs: logs,
}


class Judgements:
    """A task as arrays.

    Args:
        task: the task.
        token_words: for each sentence, the word of each token.

    Attributes:
        bad: [words] as in :class:`Sentence`.
        word_sentence: [words].
        unit: [sentences], what is drawn together when sentences are drawn: a sentence, or a pair.
        da, hter: [sentences], NaN where there is none.
        nmt_words, nmt_sentences: log-probability by the model that translated: [words] lowest, [sentences] mean.
    """

    def __init__(self, task: Task, token_words: Sequence[Sequence[int]]) -> None:
        sentences = task.sentences
        self.name, self.paired, n = task.name, task.paired, len(sentences)
        lengths = np.array([len(one.words) for one in sentences])
        starts = lengths.cumsum() - lengths
        self.bad = np.concatenate([one.bad for one in sentences])
        self.word_sentence = np.repeat(np.arange(n), lengths)
        self._token_sentence = np.repeat(np.arange(n), [len(words) for words in token_words])
        self._token_word = np.concatenate([start + np.array(w) for start, w in zip(starts, token_words, strict=True)])
        self.unit = np.arange(n) // 2 if task.paired else np.arange(n)
        self.split = np.array([one.split for one in sentences])
        self.da, self.hter = (np.array([getattr(one, x) for one in sentences], dtype=float) for x in ("da", "hter"))
        scored = np.bincount(self._token_word, minlength=len(self.bad)) > 0
        self.judged: Bools = scored & (self.bad != UNJUDGED)
        if not np.isnan(self.da).any():
            nmt_words = np.concatenate([s + np.array(x.nmt_word) for s, x in zip(starts, sentences, strict=True)])
            self.nmt_words = np.full(len(self.bad), np.inf)
            np.minimum.at(self.nmt_words, nmt_words, np.concatenate([x.nmt for x in sentences]))
            self.nmt_sentences = np.array([np.mean(x.nmt) for x in sentences])

    @cached_property
    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in SPLITS if (self.split == split).any())

    @property
    def has_sentence_judgements(self) -> bool:
        return not np.isnan(self.da).any()

    def words(self, split: str) -> Bools:
        """Which words are judged and in the split."""
        return self.judged & (self.split == split)[self.word_sentence]

    def sentence_weights(self, split: str) -> Floats:
        """[RESAMPLES, units of the split]: how often each sentence (pair) is drawn."""
        return resamples(len(np.unique(self.unit[self.split == split])))

    def word_units(self, split: str) -> NDArray[np.int64]:
        """[judged words of the split]: the column of those weights."""
        units = np.unique(self.unit[self.split == split])
        return np.searchsorted(units, self.unit[self.word_sentence[self.words(split)]])

    def word_scores(self, logs: Floats) -> Floats:
        """[words]: the lowest score of the tokens that end in the word; inf where none does."""
        scores = np.full(len(self.bad), np.inf)
        np.minimum.at(scores, self._token_word, logs)
        return scores

    def sentence_scores(self, logs: Floats, aggregation: str) -> Floats:
        """[sentences]."""
        n, values = len(self.split), AGGREGATIONS[aggregation]
        if values is None:
            scores = np.full(n, np.inf)
            np.minimum.at(scores, self._token_sentence, logs)
            return scores
        sums: Floats = np.bincount(self._token_sentence, values(logs), n).astype(np.float64)
        return sums if aggregation == "product" else sums / np.bincount(self._token_sentence, minlength=n)


# --- resampling


@lru_cache(maxsize=16)
def resamples(units: int) -> Floats:
    """[RESAMPLES, units]: how often each unit is drawn; the same for every signal, so differences are paired."""
    generator = np.random.default_rng(units)
    return generator.multinomial(units, np.full(units, 1 / units), size=RESAMPLES).astype(np.float64)


def auroc(right: Bools, scores: Floats) -> float:
    """Share of pairs of a right and a wrong one in which the right one has the higher score; ties count half."""
    return float(resampled_auroc(right, scores, np.zeros(len(right), dtype=np.int64), np.ones((1, 1)))[0])


def resampled_auroc(right: Bools, scores: Floats, unit: NDArray[np.int64], weights: Floats) -> Floats:
    """AUROC for each row of weights: wins are counted once for each pair of units, then weighted.

    Args:
        right: [N].
        scores: [N].
        unit: [N], the column of weights that each belongs to, ascending.
        weights: [R, units], not negative.

    Returns:
        [R], NaN where all that has weight is right, or wrong.
    """
    units = weights.shape[1]
    wins = np.zeros((units, units))
    present, starts = np.unique(unit[right], return_index=True)
    wrong, wrong_unit = np.sort(scores[~right]), unit[~right][np.argsort(scores[~right], kind="stable")]
    below = np.zeros((len(wrong) + 1, units), dtype=np.float32)  # wrong ones of each unit among the lowest
    np.cumsum(np.eye(units, dtype=np.float32)[wrong_unit], axis=0, out=below[1:])
    for side in ("left", "right"):  # ties are below on one side only
        found = below[np.searchsorted(wrong, scores[right], side)]
        wins[present] += np.add.reduceat(found, starts, axis=0, dtype=np.float64) / 2 if len(present) else 0
    counts = [np.bincount(unit[kept], minlength=units) for kept in (right, ~right)]
    pairs = (weights @ counts[0]) * (weights @ counts[1])
    with np.errstate(invalid="ignore"):
        return ((weights @ wins) * weights).sum(1) / pairs


def weighted_pearson(x: Floats, y: Floats, weights: Floats) -> Floats:
    """[R]: Pearson correlation for each row of weights [R, N]."""
    x, y, total = x - x.mean(), y - y.mean(), weights.sum(1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    covariance = weights @ (x * y) / total - mean_x * mean_y
    variances = (weights @ (x * x) / total - mean_x**2) * (weights @ (y * y) / total - mean_y**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return covariance / np.sqrt(variances)


def interval(values: Floats) -> tuple[float, float]:
    """95 % percentile interval; NaN, of resamples without right or without wrong ones, are left out."""
    low, high = np.nanpercentile(values, INTERVAL)
    return float(low), float(high)


# --- figures


@dataclass
class Evaluation:
    """What a signal is worth on a task.

    Attributes:
        figures: by split and name.
        replicates: of figures that get an interval, on the resamples, by split but dev and name, [RESAMPLES].
        aggregation: the one with the best Pearson correlation on dev, which "DA Pearson" is of.
    """

    figures: dict[str, dict[str, float]]
    replicates: dict[str, dict[str, Floats]]
    aggregation: str | None = None


def evaluate(task: Judgements, logs: Floats) -> Evaluation:
    """Figures of a signal.

    Args:
        task: the task.
        logs: [tokens], logarithms of the scores, high where all is right.
    """
    result = Evaluation({}, {})
    words = task.word_scores(logs)
    thresholds: dict[str, float] = {}
    if task.has_sentence_judgements:
        result.aggregation = best_aggregation(task, logs)
    for split in task.splits:  # dev is the first: thresholds come from it
        kept = task.words(split)
        right, scores = task.bad[kept] == RIGHT, words[kept]
        figures = {"AUROC": auroc(right, scores)}
        if task.paired:
            figures["accuracy"] = float(_pair_wins(task, words, split).mean())
        else:
            figures |= _detection(right, scores, thresholds)
        if result.aggregation is not None:
            figures |= _sentence_figures(task, logs, split, result.aggregation)
        result.figures[split] = figures
        if split != "dev":
            result.replicates[split] = _replicates(task, logs, split, result.aggregation)
    return result


def _replicates(task: Judgements, logs: Floats, split: str, aggregation: str | None) -> dict[str, Floats]:
    rows, words, kept = task.split == split, task.word_scores(logs), task.words(split)
    weights = task.sentence_weights(split)
    result = {"AUROC": resampled_auroc(task.bad[kept] == RIGHT, words[kept], task.word_units(split), weights)}
    if task.paired:
        result["accuracy"] = weights @ _pair_wins(task, words, split) / weights.sum(1)
    if aggregation is not None:
        for name in AGGREGATIONS:
            scores = task.sentence_scores(logs, name)[rows]
            result[f"DA Pearson, {name}"] = weighted_pearson(scores, task.da[rows], weights)
        result["DA Pearson"] = result[f"DA Pearson, {aggregation}"]
    return result


def _pair_wins(task: Judgements, words: Floats, split: str) -> Floats:
    """[pairs]: 1 where the right one has the higher score, a half where both have the same."""
    good, bad = words[task.judged].reshape(-1, 2)[task.split[::2] == split].T
    return (good > bad) + 0.5 * (good == bad)


def _detection(right: Bools, scores: Floats, thresholds: dict[str, float]) -> dict[str, float]:
    """Finding the wrong words; a threshold that is not given is chosen here."""
    figures = {"AP": float(average_precision(right, scores, positive="wrong"))}
    for name, figure in _DETECTION.items():
        if name not in thresholds:
            thresholds[name] = best_threshold(right, scores, figure)
        found = scores <= thresholds[name]
        counts = [np.array([float(x)]) for x in ((found & ~right).sum(), found.sum(), (~right).sum(), len(right))]
        figures[name] = float(figure(*counts)[0])
    return figures


def _f_half(hits: Floats, found: Floats, wrong: Floats, total: Floats) -> Floats:
    return 1.25 * hits / np.maximum(found + 0.25 * wrong, 1)


def _matthews(hits: Floats, found: Floats, wrong: Floats, total: Floats) -> Floats:
    variance = found * (total - found) * wrong * (total - wrong)
    return (hits * total - found * wrong) / np.sqrt(np.maximum(variance, 1))


_DETECTION = {"F.5": _f_half, "MCC": _matthews}


def best_threshold(right: Bools, scores: Floats, figure: Callable[..., Floats]) -> float:
    """The score up to which words are called wrong, so that the figure is largest."""
    order = np.argsort(scores, kind="stable")
    last = np.flatnonzero(np.append(scores[order][1:] != scores[order][:-1], True))
    hits, found = (~right[order]).cumsum()[last], last + 1.0
    values = figure(hits, found, np.full(len(last), float((~right).sum())), np.full(len(last), float(len(right))))
    return float(scores[order][last][values.argmax()])


def best_aggregation(task: Judgements, logs: Floats) -> str:
    """The aggregation that agrees best with the judgements of sentences on dev."""
    dev = task.split == "dev"
    found = {name: pearson(task.sentence_scores(logs, name)[dev], task.da[dev]) for name in AGGREGATIONS}
    return max(found, key=lambda name: found[name])


def _sentence_figures(task: Judgements, logs: Floats, split: str, chosen: str) -> dict[str, float]:
    kept = task.split == split
    judged = {"DA": task.da[kept], "HTER": -task.hter[kept]}  # less editing is better
    figures: dict[str, float] = {}
    for name in AGGREGATIONS:
        scores = task.sentence_scores(logs, name)[kept]
        for kind, truth in judged.items():
            figures[f"{kind} Pearson, {name}"] = pearson(scores, truth)
            figures[f"{kind} Spearman, {name}"] = pearson(rankdata(scores), rankdata(truth))
    return {**figures, "DA Pearson": figures[f"DA Pearson, {chosen}"]}


def pearson(x: Floats, y: Floats) -> float:
    return float(weighted_pearson(x, y, np.ones((1, len(x))))[0])


@dataclass(frozen=True)
class Difference:
    """A figure, and by how much it exceeds that of another signal."""

    value: float
    difference: float
    low: float
    high: float


def difference(ours: Evaluation, theirs: Evaluation, split: str, figure: str) -> Difference:
    """With the 95 % interval of the paired bootstrap over sentences (pairs)."""
    value = ours.figures[split][figure]
    replicates = ours.replicates[split][figure] - theirs.replicates[split][figure]
    return Difference(value, value - theirs.figures[split][figure], *interval(replicates))


# --- beside the model that translated


def beside_translator(task: Judgements, logs: Floats, aggregation: str) -> dict[str, dict[str, float]]:
    """AUROC of words and correlation of sentences for the translator's own log-probability, a signal, and both.

    "sum": of z-scores with dev's mean and deviation; "fitted": with weights by logistic (linear) regression on dev.

    Returns:
        By split, the figures by name.
    """
    words, sentences = task.word_scores(logs), task.sentence_scores(logs, aggregation)
    dev_words, dev = task.words("dev"), task.split == "dev"
    kept = task.judged & np.isfinite(task.nmt_words)
    by_word = _combined(task.nmt_words, words, dev_words & kept, task.bad != WRONG, LogisticRegression())
    by_sentence = _combined(task.nmt_sentences, sentences, dev, task.da, LinearRegression())
    result: dict[str, dict[str, float]] = {}
    for split in task.splits:
        chosen, rows = task.words(split) & kept, task.split == split
        right = task.bad[chosen] == RIGHT
        result[split] = {f"AUROC, {name}": auroc(right, scores[chosen]) for name, scores in by_word.items()}
        for name, scores in by_sentence.items():
            result[split][f"DA Pearson, {name}"] = pearson(scores[rows], task.da[rows])
    return result


def _combined(first: Floats, second: Floats, dev: Bools, truth: Any, model: Any) -> dict[str, Floats]:
    both = np.stack([first, second], 1)
    scaled = (both - both[dev].mean(0)) / both[dev].std(0)
    usable = np.isfinite(scaled).all(1)
    model.fit(scaled[dev], truth[dev])
    fitted = np.full(len(both), np.nan)
    fitted[usable] = scaled[usable] @ np.ravel(model.coef_)
    return {"translator": first, "signal": second, "sum": scaled.sum(1), "fitted": fitted}


# --- calibration


def calibration(right: Any, probs: Floats) -> dict[str, float]:
    """ECE with BINS bins of equal width, Brier score, mean probability and share of right ones."""
    return {
        "ECE": float(expected_calibration_error(right, probs, n_bins=BINS)),
        "Brier": float(brier_score(right, probs)),
        "mean probability": float(np.mean(probs)),
        "share right": float(np.mean(right)),
        "n": len(probs),
    }


def word_calibration(task: Judgements, logs: Floats, split: str) -> tuple[Bools, Floats]:
    """Whether each judged word is right, and the probability that the signal gives it."""
    kept = task.words(split)
    return task.bad[kept] == RIGHT, np.exp(task.word_scores(logs)[kept])


def brier_difference(task: Judgements, ours: Floats, theirs: Floats, split: str) -> Difference:
    """Brier score of the words by one signal's logs, and by how much it exceeds another's: below 0 is better."""
    errors = []
    for logs in (ours, theirs):
        right, probs = word_calibration(task, logs, split)
        errors.append((probs - right) ** 2)
    weights = task.sentence_weights(split)[:, task.word_units(split)]
    replicates = weights @ (errors[0] - errors[1]) / weights.sum(1)
    return Difference(float(errors[0].mean()), float((errors[0] - errors[1]).mean()), *interval(replicates))
