"""Render scored texts as one self-contained HTML page.

The page needs no network and, for reading, no JavaScript: the heat map of the first available signal, the
list of the least sure places and the histogram are drawn here. The script in ``report.js`` adds the switch
between signals, the threshold and the card on hover; ``_payload`` hands it the numbers.

Vocabulary of this module: a *signal* is one number per token (``SIGNALS``); a *span* is a piece of the text
with the tokens that lie on it, mostly one, several where a byte-level tokenizer splits a character; a *place*
is a span in the list of the least sure ones.
"""

from __future__ import annotations

import heapq
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from pyqe.report.page import ReportTable, counted, render_page, root_ticks, shown_number, write_page

COLOURS = 10  # classes q0 (worst) to q9 (best) of report.css
BINS = 20  # of the histogram
CONTEXT = 40  # characters either side of a place in the list
SLACK = 1e-3  # a probability may leave [0, 1] by this much: sums of rounded ones do

_VISIBLE = str.maketrans({"\n": "↵", "\r": "␍", "\t": "⇥"})


@dataclass(frozen=True)
class Signal:
    """A number per token that can colour the heat map."""

    key: str
    field: str
    label: str
    short: str
    lower_is_better: bool = False


SIGNALS = (
    Signal("quality", "token_quality", "Sigmoid quality", "sigmoid"),
    Signal("prob", "token_prob", "Softmax probability", "softmax"),
    Signal("boosted", "token_boosted_prob", "BoostedProb", "boosted"),
    Signal("entropy", "token_entropy", "Entropy", "entropy", lower_is_better=True),
)
SOFTMAX_MAXIMUM = Signal("max", "token_max_prob", "Softmax maximum", "maximum")  # in the card only


@dataclass(frozen=True)
class _Span:
    """Characters ``start:end`` of a text and the tokens ``first:last`` that lie on them."""

    start: int
    end: int
    first: int
    last: int


@dataclass(frozen=True)
class _Text:
    """A checked text. ``spans`` hold all tokens in order; ``placed``: whether their characters are known."""

    record: Mapping[str, Any]
    text: str
    tokens: Sequence[str]
    values: Mapping[str, Sequence[float | None]]
    spans: Sequence[_Span]
    placed: bool
    errors: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class _Scale:
    """A signal with the value at the far end of its colour scale: 1 for probabilities."""

    signal: Signal
    maximum: float

    def colour(self, value: float) -> int:
        """Colour class of ``value``: 0 is the worst, ``COLOURS - 1`` the best."""
        share = value / self.maximum
        good = 1 - share if self.signal.lower_is_better else share
        return min(COLOURS - 1, max(0, int(good * COLOURS)))

    def worst(self, values: Sequence[float]) -> float:
        """The value of a span with several tokens."""
        return max(values) if self.signal.lower_is_better else min(values)


def render_report(
    texts: Sequence[Mapping[str, Any]],
    *,
    title: str = "pyqe report",
    summary: Mapping[str, str] | None = None,
    tables: Sequence[ReportTable] = (),
    worst: int = 25,
) -> str:
    """Render scored texts as one HTML page that needs nothing else.

    Args:
        texts: what ``ScoredText.to_dict()`` gives and ``pyqe score`` writes: ``text`` (str), ``tokens``
            (T strings) and, each optional or None, ``token_ids`` (T), ``offsets`` (T pairs of character
            positions in ``text``), ``token_quality``, ``token_prob``, ``token_max_prob``,
            ``token_boosted_prob`` (T probabilities), ``token_entropy`` (T, nats), ``quality``, ``status``,
            ``reason``, ``finish_reason``, ``prompt``, ``id`` and ``errors`` (character spans known to be
            wrong). None and NaN stand for "no score". Text is shown as it is, except that control characters
            appear as their pictures (NUL as U+2400) and lone surrogates as U+FFFD.
        title: heading of the page.
        summary: names and values for the header, such as the model and the date.
        tables: further tables for the header.
        worst: length of the list of the least sure places.

    Raises:
        ValueError: a list has another length than ``tokens``, a position lies outside the text, a probability
            outside [0, 1], or ``worst`` is negative. The message names the text by its index, and the field.
        TypeError: a field has the wrong type.

    >>> page = render_report([{"text": "Hi <b>", "tokens": ["Hi", " <b>"], "token_quality": [0.9, 0.2]}])
    >>> "Hi</span>" in page, "<b>" in page
    (True, False)
    """
    if worst < 0:
        raise ValueError(f"worst must be 0 or more, got {worst}")
    checked = [_checked(index, record) for index, record in enumerate(texts)]
    scales = _scales(checked)
    main = scales[0] if scales else None
    places = _least_sure(checked, main, worst) if main else []
    return render_page(
        "report.html.jinja",
        ["page.css", "report.css"],
        "report.js",
        title=title,
        summary=dict(summary or {}),
        tables=tables,
        facts=_facts(checked, main),
        scales=scales,
        main=main,
        colours=range(COLOURS),
        has_errors=any(text.errors for text in checked),
        texts=_text_views(checked, main, places),
        places=[_place_view(checked[index], index, span, scales) for index, span in places],
        histogram=_histogram(checked),
        payload=_script_json(_payload(checked, scales)),
    )


def write_report(
    path: str | os.PathLike[str],
    texts: Sequence[Mapping[str, Any]],
    *,
    title: str = "pyqe report",
    summary: Mapping[str, str] | None = None,
    tables: Sequence[ReportTable] = (),
    worst: int = 25,
) -> None:
    """Write the page of :func:`render_report` to ``path``, whole or not at all.

    The page goes to a temporary name in the same folder, which then replaces ``path``. On failure an older
    file stays as it was, and the temporary one is removed.

    Raises:
        ValueError, TypeError: as :func:`render_report`.
        OSError: the folder does not exist or can't be written.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(pathlib.Path(folder) / "report.html", [])
    ...     (pathlib.Path(folder) / "report.html").read_text(encoding="utf-8")[:15]
    '<!doctype html>'
    """
    write_page(path, render_report(texts, title=title, summary=summary, tables=tables, worst=worst))


# Checking ---------------------------------------------------------------------------------------------------


def _checked(index: int, record: Mapping[str, Any]) -> _Text:
    """Check one record and lay its tokens over its text."""
    text = record.get("text")
    if not isinstance(text, str):
        raise TypeError(f"texts[{index}]: text must be a string, got {type(text).__name__}")
    tokens = _token_list(index, record, "tokens", None) or []
    for number, token in enumerate(tokens):
        if not isinstance(token, str):
            kind = type(token).__name__
            raise TypeError(f"texts[{index}]: tokens[{number}] must be a string, got {kind}")
    count = len(tokens)
    _token_list(index, record, "token_ids", count)
    values = {}
    for signal in (*SIGNALS, SOFTMAX_MAXIMUM):
        numbers = _token_list(index, record, signal.field, count)
        values[signal.key] = [None] * count if numbers is None else _numbers(index, signal, numbers)
    offsets = _token_list(index, record, "offsets", count)
    if offsets is None and "".join(tokens) == text:
        offsets = _running_offsets(tokens)
    if offsets is None:
        spans = [_Span(0, 0, number, number + 1) for number in range(count)]
    else:
        spans = _grouped(_positions(index, "offsets", offsets, len(text)))
    errors = _positions(index, "errors", record.get("errors") or [], len(text))
    return _Text(record, text, tokens, values, spans, offsets is not None, _merged(errors))


def _token_list(index: int, record: Mapping[str, Any], field: str, count: int | None) -> Sequence[Any] | None:
    """The list in ``field``, checked to have ``count`` entries; None where it is missing."""
    values = record.get(field)
    if values is None:
        return None
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"texts[{index}]: {field} must be a list, got {type(values).__name__}")
    if count is not None and len(values) != count:
        expected = f"{count} entries, one for each token"
        raise ValueError(f"texts[{index}]: {field} must have {expected}, got {len(values)}")
    return values


def _numbers(index: int, signal: Signal, values: Sequence[Any]) -> list[float | None]:
    """``values`` as floats with None for "no score" (None, NaN, infinite), checked for their range."""
    highest = math.inf if signal.lower_is_better else 1 + SLACK
    numbers: list[float | None] = []
    for number, value in enumerate(values):
        if value is not None and not isinstance(value, (int, float)):
            kind = type(value).__name__
            raise TypeError(f"texts[{index}]: {signal.field}[{number}] must be a number or None, got {kind}")
        if value is None or not math.isfinite(value):
            numbers.append(None)
        elif -SLACK <= value <= highest:
            numbers.append(float(value))
        else:
            limits = "0 or more" if signal.lower_is_better else "between 0 and 1"
            raise ValueError(f"texts[{index}]: {signal.field}[{number}] must be {limits}, got {value}")
    return numbers


def _positions(index: int, field: str, pairs: Sequence[Any], length: int) -> list[tuple[int, int]]:
    """Character spans checked to lie in the text; None, a token without a place, follows the one before."""
    positions: list[tuple[int, int]] = []
    for number, pair in enumerate(pairs):
        if pair is None:
            end = positions[-1][1] if positions else 0
            positions.append((end, end))
            continue
        if len(pair) != 2 or not 0 <= pair[0] <= pair[1] <= length:
            raise ValueError(
                f"texts[{index}]: {field}[{number}] must be [start, end] with 0 <= start <= end <= {length}, "
                f"the length of the text, got {list(pair)}"
            )
        positions.append((int(pair[0]), int(pair[1])))
    return positions


def _running_offsets(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Positions of tokens that make up the text without gaps."""
    offsets, end = [], 0
    for token in tokens:
        offsets.append((end, end + len(token)))
        end += len(token)
    return offsets


def _grouped(positions: Sequence[tuple[int, int]]) -> list[_Span]:
    """Disjoint spans in order: tokens that overlap share one."""
    spans: list[_Span] = []
    for number, (start, end) in enumerate(positions):
        span = _Span(start, end, number, number + 1)
        while spans and span.start < spans[-1].end:
            before = spans.pop()
            span = _Span(min(before.start, span.start), max(before.end, span.end), before.first, span.last)
        spans.append(span)
    return spans


def _merged(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of character spans, sorted; empty ones are dropped."""
    union: list[tuple[int, int]] = []
    for start, end in sorted(pairs):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        elif start < end:
            union.append((start, end))
    return union


# Signals ----------------------------------------------------------------------------------------------------


def _scales(texts: Sequence[_Text]) -> list[_Scale]:
    """The signals that have at least one value, in the order of ``SIGNALS``, with their ranges."""
    scales = []
    for signal in SIGNALS:
        values = [value for text in texts for value in text.values[signal.key] if value is not None]
        if values:
            highest = math.ceil(max(values) * 10) / 10 or 1.0
            scales.append(_Scale(signal, highest if signal.lower_is_better else 1.0))
    return scales


def _span_values(text: _Text, span: _Span, signal: Signal) -> list[float]:
    """The scores of a span's tokens, without those that have none."""
    return [value for value in text.values[signal.key][span.first : span.last] if value is not None]


def _least_sure(texts: Sequence[_Text], scale: _Scale, count: int) -> list[tuple[int, _Span]]:
    """Index of the text and span of the ``count`` worst places, worst first; ties in reading order."""
    sign = -1 if scale.signal.lower_is_better else 1
    ranked = (
        (sign * scale.worst(values), index, span.first, span)
        for index, text in enumerate(texts)
        for span in text.spans
        if (values := _span_values(text, span, scale.signal))
    )
    places = heapq.nsmallest(count, ranked, key=lambda place: place[:3])
    return [(index, span) for _, index, _, span in places]


def _facts(texts: Sequence[_Text], main: _Scale | None) -> list[str]:
    """Counts for the line below the title."""
    tokens = sum(len(text.tokens) for text in texts)
    facts = [counted(len(texts), "text"), counted(tokens, "token")]
    if main:
        unscored = sum(value is None for text in texts for value in text.values[main.signal.key])
        if unscored:
            facts.append(f"{counted(unscored, 'token')} without a score")
    unfinished = sum(text.record.get("status") not in (None, "ok") for text in texts)
    if unfinished:
        facts.append(f"{counted(unfinished, 'text')} not fully scored")
    return facts


# Heat map ---------------------------------------------------------------------------------------------------


def _text_views(
    texts: Sequence[_Text], main: _Scale | None, places: Sequence[tuple[int, _Span]]
) -> list[dict[str, Any]]:
    """What the template needs of each text."""
    anchors = {(index, span.first) for index, span in places}
    views = []
    for index, text in enumerate(texts):
        own = {first for at, first in anchors if at == index} if anchors else set()
        quality = text.record.get("quality")
        if quality is not None and not math.isfinite(quality):
            quality = None
        views.append(
            {
                "id": text.record.get("id"),
                "prompt": text.record.get("prompt"),
                "status": text.record.get("status") or "ok",
                "reason": text.record.get("reason"),
                "finish_reason": text.record.get("finish_reason"),
                "quality": quality,
                "quality_class": "qn" if quality is None else f"q{_Scale(SIGNALS[0], 1.0).colour(quality)}",
                "errors": len(text.errors),
                "tokens": counted(len(text.tokens), "token"),
                "is_empty": not text.text,
                "placed": text.placed,
                "plain": Markup(_marked(text, 0, len(text.text))),
                "heat": Markup("".join(_heat(index, text, main, own))),
            }
        )
    return views


def _heat(index: int, text: _Text, main: _Scale | None, anchors: set[int]) -> Iterator[str]:
    """Pieces of the heat map: token spans and, uncoloured, what no token covers. Without tags, the text."""
    position = 0
    for span in text.spans:
        if text.placed:
            yield _marked(text, position, span.start)
            inner = _marked(text, span.start, span.end)
        else:
            inner = escape(text.tokens[span.first])
        anchor = f' id="p{index + 1}-{span.first + 1}"' if span.first in anchors else ""
        yield f"<span{anchor}{_span_attributes(text, span, main)}>{inner}</span>"
        position = span.end
    if text.placed:
        yield _marked(text, position, len(text.text))


def _span_attributes(text: _Text, span: _Span, main: _Scale | None) -> str:
    """Class and title of a token span.

    The class is the colour, and h where one of several scores is missing, z for a span without characters, n
    for line breaks alone.
    """
    shown = text.text[span.start : span.end] if text.placed else text.tokens[span.first]
    classes, hover = "qn", "no score"
    if main:
        scores = text.values[main.signal.key][span.first : span.last]
        known = [score for score in scores if score is not None]
        if known:
            classes = f"q{main.colour(main.worst(known))}" + (" h" if len(known) < len(scores) else "")
            hover = f"{main.signal.short} {', '.join(map(shown_number, scores))}"
    if not shown:
        classes += " z"
    elif "\n" in shown and shown.isspace():
        classes += " n"
    return f' class="{classes}" title="{hover}"'


def _marked(text: _Text, start: int, end: int) -> str:
    """Characters ``start:end`` escaped, those in known errors within ``<u>``."""
    pieces, position = [], start
    for low, high in text.errors:
        low, high = max(low, position), min(high, end)
        if low < high:
            pieces += [escape(text.text[position:low]), "<u>", escape(text.text[low:high]), "</u>"]
            position = high
    return "".join([*pieces, escape(text.text[position:end])])


def _place_view(text: _Text, index: int, span: _Span, scales: Sequence[_Scale]) -> dict[str, Any]:
    """What the template needs of a place in the list of the least sure ones."""
    if text.placed:
        before = text.text[max(0, span.start - CONTEXT) : span.start]
        shown = text.text[span.start : span.end]
        after = text.text[span.end : span.end + CONTEXT]
    else:
        before = "".join(text.tokens[max(0, span.first - 5) : span.first])[-CONTEXT:]
        shown = ""
        after = "".join(text.tokens[span.last : span.last + 5])[:CONTEXT]
    shown = shown or "".join(text.tokens[span.first : span.last])
    if not shown.isspace():  # the space that most tokens begin with belongs to neither word
        before, shown = before + shown[: -len(shown.lstrip())], shown.lstrip()
    numbers = []
    for scale in scales:
        values = _span_values(text, span, scale.signal)
        numbers.append((scale.signal.short, shown_number(scale.worst(values) if values else None)))
    main = scales[0]
    return {
        "anchor": f"p{index + 1}-{span.first + 1}",
        "number": index + 1,
        "before": before.translate(_VISIBLE),
        "shown": (shown.replace(" ", "␣") if shown.isspace() else shown).translate(_VISIBLE),
        "after": after.translate(_VISIBLE),
        "colour": main.colour(main.worst(_span_values(text, span, main.signal))),
        "numbers": numbers,
    }


# Histogram --------------------------------------------------------------------------------------------------


def _histogram(texts: Sequence[_Text]) -> dict[str, Any] | None:
    """Bars of the sigmoid and softmax probabilities on one pair of axes; None where there are neither.

    The height goes with the square root of the count: most tokens are certain, and the rare bins that
    matter would vanish on a linear axis; a logarithmic one has no place for empty bins.
    """
    series = [(signal, counts) for signal in SIGNALS[:2] if any(counts := _bin_counts(texts, signal))]
    if not series:
        return None
    width, height = 400.0, 160.0  # of the plot; the template adds the margins
    top = max(max(counts) for _, counts in series)
    step = width / BINS
    bar = (step - 3) / len(series)
    bins = []
    for number in range(BINS):
        bars = []
        for place, (signal, counts) in enumerate(series):
            tall = height * math.sqrt(counts[number] / top)
            bars.append((signal.key, number * step + 1.5 + place * bar, height - tall, bar, tall))
        bins.append(
            {
                "x": number * step,
                "range": f"{number / BINS:.2f}–{(number + 1) / BINS:.2f}",
                "bars": bars,
                "counts": [(signal.short, counts[number]) for signal, counts in series],
            }
        )
    ticks = [(value, height - height * math.sqrt(value / top)) for value in root_ticks(top, height)]
    signals = [signal for signal, _ in series]
    return {"width": width, "height": height, "step": step, "signals": signals, "bins": bins, "ticks": ticks}


def _bin_counts(texts: Sequence[_Text], signal: Signal) -> list[int]:
    """How many tokens have ``signal`` in each of the equal bins of [0, 1]; exactly 1 is in the last."""
    counts = [0] * BINS
    for text in texts:
        for value in text.values[signal.key]:
            if value is not None:
                counts[min(BINS - 1, max(0, int(value * BINS)))] += 1
    return counts


# Page -------------------------------------------------------------------------------------------------------


def _payload(texts: Sequence[_Text], scales: Sequence[_Scale]) -> dict[str, Any]:
    """The numbers for the script.

    ``texts`` holds for each text its tokens (``t``), token ids (``i``), the number of tokens of each span
    (``n``, left out where all are 1), the spans in known errors (``w``) and the values of each signal under
    its key.
    """
    card = [scale.signal for scale in scales]
    if any(value is not None for text in texts for value in text.values[SOFTMAX_MAXIMUM.key]):
        card.append(SOFTMAX_MAXIMUM)
    maxima = {scale.signal.key: scale.maximum for scale in scales}
    signals = [
        {
            "key": signal.key,
            "label": signal.label,
            "low": signal.lower_is_better,
            "max": maxima.get(signal.key, 1.0),
        }
        for signal in card
    ]
    return {"colours": COLOURS, "signals": signals, "texts": [_text_payload(text, card) for text in texts]}


def _text_payload(text: _Text, signals: Sequence[Signal]) -> dict[str, Any]:
    """One entry of ``texts`` in :func:`_payload`."""
    entry: dict[str, Any] = {"t": list(text.tokens)}
    if text.record.get("token_ids") is not None:
        entry["i"] = [None if token_id is None else int(token_id) for token_id in text.record["token_ids"]]
    sizes = [span.last - span.first for span in text.spans]
    if any(size != 1 for size in sizes):
        entry["n"] = sizes
    if text.errors:
        entry["w"] = [
            number
            for number, span in enumerate(text.spans)
            if any(span.start < high and low < span.end for low, high in text.errors)
        ]
    for signal in signals:
        values = text.values[signal.key]
        if any(value is not None for value in values):
            entry[signal.key] = [None if value is None else float(f"{value:.4g}") for value in values]
    return entry


def _script_json(value: object) -> Markup:
    """JSON that can stand in a ``<script>`` element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
