"""Which stated number belongs to which label."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from pyqe.calibration._tokens import Token, Value


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words with which a number is not, or not simply, that of the label
_DOUBTS = _set(
    "not no non never neither nor without except excluding other than unlike anything against wrong incorrect false "
    "isn't aren't doesn't won't opposite or vs versus error errors mistake mistaken failure remaining remainder rest "
    "failing exclusion excluded reject rejected rejection doubt doubtful unlikely uncertain uncertainty unsure"
)
# Words with which a line above says that the numbers are not those of the labels
_HEADING_DOUBTS = _set(
    "not excluding exclusion excluded reject rejected rejection wrong incorrect false error errors mistake failure "
    "failing doubt unlikely uncertain uncertainty unsure"
)
# What may stand between a label and its number, and leaves no doubt that they belong together
_COPULAS = _set(
    "i say think guess is was are has have gets with at of the a an be being would will should i'd i'm my and as it "
    "its it's that this probability probabilities prob probs p likelihood likely chance chances confidence confident "
    "certain sure score value weight estimate estimated assigned goes about around approximately approx roughly circa "
    "ca nearly almost maybe perhaps for to on option answer choice label class category"
)
_PROBABILITY_NAMES = _set("probability prob p")
_NUMBER_NAMES = _PROBABILITY_NAMES | _set("confidence score value weight percentage percent likelihood")
# Of numbers that are no probabilities
_OTHER_NAMES = _set(
    "total sum rank index id number count logit logits logprob min max reason reasoning explanation rationale why"
)
SAME = 0.005  # numbers that differ less are the same, rounded


@dataclass(frozen=True)
class Pair:
    """A label and a number that belongs to it; ``certain`` if the words around leave no doubt."""

    label: int
    value: Value
    certain: bool


@dataclass
class Reading:
    """What a text states, and what is wrong with it; ``others`` are numbers of labels that are none."""

    pairs: list[Pair] = field(default_factory=list)
    others: list[Value] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def labels(self) -> int:
        """How many labels have a number."""
        return len({pair.label for pair in self.pairs})

    def add(self, other: Reading) -> None:
        self.pairs += other.pairs
        self.others += other.others
        self.problems += other.problems


def read(stream: list[Token], labels: int) -> Reading:
    """The last dict or list with the most labels, or the whole text where that has more."""
    stream = _probabilities(_without_total(stream))
    whole = read_text(stream)
    blocks = [(start, end, _read_block(stream[start:end])) for start, end in _blocks(stream)]
    blocks = [block for block in blocks if block[2].pairs]
    most = max([reading.labels for _, _, reading in blocks], default=0)
    if most > 1:
        blocks = [block for block in blocks if block[2].labels == most][-1:]
    reading = Reading()  # of a dict, or of several dicts with one label each
    for _, _, part in blocks:
        reading.add(part)
    if not whole.pairs and not reading.pairs:
        return _read_list(stream, labels)
    if reading.labels < whole.labels:
        return whole
    first, last = blocks[0][0], blocks[-1][1]
    if is_doubtful(_heading(stream[:first])):
        return _without_pairs(reading)
    outside = read_text([*stream[:first], Token("newline", "\n"), *stream[last:]])
    if outside.labels > 1 and _contradicts(outside, reading):
        reading.problems.append("other numbers stand outside the dict, which was taken")
    if stream[last - 1].kind != "close":
        reading.problems.append("a bracket is not closed: the reply may have been cut off")
    return reading


def _without_total(stream: list[Token]) -> list[Token]:
    """All tokens but "total" or "sum" and a 1 or 100% that follows."""
    found: list[Token] = []
    for token in stream:
        place = len(found) - (2 if found and (found[-1].kind == "link" or found[-1].text in ("of", "is")) else 1)
        named = place >= 0 and found[place].kind == "word" and found[place].text in ("total", "sum")
        if named and token.value and token.value.fraction == 1:
            del found[place:]
        else:
            found.append(token)
    return found


def _contradicts(outside: Reading, inside: Reading) -> bool:
    numbers = {pair.label: pair.value.fraction for pair in inside.pairs}
    last = {pair.label: pair.value.fraction for pair in outside.pairs}
    return any(not abs(number - numbers.get(label, math.inf)) <= SAME for label, number in last.items())


# --- parts of the text


def _blocks(stream: list[Token]) -> list[tuple[int, int]]:
    """Outermost brackets, as ranges of tokens; one that is not closed reaches to the end."""
    found, depth, start = [], 0, 0
    for index, token in enumerate(stream):
        if token.kind == "open":
            start = index if depth == 0 else start
            depth += 1
        elif token.kind == "close" and depth:
            depth -= 1
            if depth == 0:
                found.append((start, index + 1))
    return [*found, (start, len(stream))] if depth else found


def _read_block(block: list[Token]) -> Reading:
    """A dict or list, as one line."""
    comma, reading = Token("comma", "\n"), Reading()
    flat = [comma if token.kind == "newline" else token for token in block if token.kind not in ("open", "close")]
    labelled, kept = [], []
    for segment in _split(flat, "comma"):
        words = _word_list(segment)
        if "L" in _kinds(segment) or not words:
            labelled += [comma, *segment]
            kept += [comma, *segment]
        elif _NUMBER_NAMES.issuperset(words):
            kept += [comma, *segment]
        elif "V" in _kinds(segment) and words[0] not in _OTHER_NAMES:
            reading.others += [token.value for token in segment if token.value]
            reading.problems.append(f"{' '.join(words)!r:.80} is none of the labels; its number was left out")
    # "probability" names the number of a label before it, unless labels have numbers of their own
    pairs = _read_line(labelled)
    reading.add(pairs if pairs.pairs else _read_line(kept))
    return reading


def _probabilities(stream: list[Token]) -> list[Token]:
    """All tokens but, of several numbers that an inner dict has for a label, those that are not the probability."""
    found: list[Token] = []
    run: list[Token] = []
    depth = 0
    for token in stream:
        if token.kind in ("open", "close"):
            found += [*(_probability(run) if depth > 1 else run), token]
            run, depth = [], max(0, depth + (1 if token.kind == "open" else -1))
        else:
            run.append(token)
    return found + (_probability(run) if depth > 1 else run)


def _probability(run: list[Token]) -> list[Token]:
    """What is inside an inner bracket, without those of its named numbers that are no probabilities."""
    segments = _split(run, "comma")
    names = [set(_word_list(segment)) if _kinds(segment) == "V" else set() for segment in segments]
    ranks = [_rank(words) for words in names]
    best = 1 if any("L" in _kinds(segment) and "V" in _kinds(segment) for segment in segments) else max(ranks)
    kept: list[Token] = []
    for segment, words, rank in zip(segments, names, ranks, strict=True):
        if not words or not (rank < best or words & _OTHER_NAMES):
            kept += [Token("comma", ","), *segment]
    return kept[1:]


def _rank(words: set[str]) -> int:
    """How much a name of a number says that it is a probability: 3 most, 1 nothing."""
    if not words or not words <= _NUMBER_NAMES:
        return 1
    return 3 if words <= _PROBABILITY_NAMES else 2


def _read_list(stream: list[Token], labels: int) -> Reading:
    """Numbers without labels, in brackets or alone, one for each."""
    for start, end in [(0, len(stream)), *reversed(_blocks(stream))]:
        inside = [token for token in stream[start:end] if token.kind not in ("open", "close", "comma", "newline")]
        if len(inside) == labels and _kinds(inside) == "V" * labels:
            pairs = [Pair(label, token.value, True) for label, token in enumerate(inside) if token.value is not None]
            return Reading(pairs, problems=["there are no labels; the numbers were taken in their order"])
    return Reading()


def read_text(stream: list[Token]) -> Reading:
    """All lines."""
    reading, doubtful = Reading(), False
    for line in _joined(_split(stream, "newline")):
        doubtful = is_doubtful(line) if not _kinds(line) and line[-1].kind == "link" else doubtful
        reading.add(_without_pairs(_read_line(line)) if doubtful else _read_line(line))
    return reading


def _heading(before: list[Token]) -> list[Token]:
    """The line that ends with a colon or the like right before a dict, or nothing."""
    lines = [line for line in _split(before, "newline") if line]
    return lines[-1] if lines and lines[-1][-1].kind == "link" and not _kinds(lines[-1]) else []


def is_doubtful(line: list[Token]) -> bool:
    """Whether a line says, after its last comma, that its numbers or those below it are not those of the labels."""
    return bool(_words(_split(line, "comma")[-1]) & _HEADING_DOUBTS)


def _without_pairs(reading: Reading) -> Reading:
    problem = "the words above the numbers say that they may be about something else; they were left out"
    return Reading(problems=[problem]) if reading.pairs else reading


def _split(stream: Iterable[Token], kind: str) -> list[list[Token]]:
    parts: list[list[Token]] = [[]]
    for token in stream:
        if token.kind == kind:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _kinds(line: Iterable[Token]) -> str:
    """Labels and values as a string of L and V."""
    return "".join({"label": "L", "value": "V"}.get(token.kind, "") for token in line)


def _joined(lines: Iterable[list[Token]]) -> list[list[Token]]:
    """Lines of labels joined with lines of as many numbers that follow: what tables are made of."""
    joined: list[list[Token]] = []
    for line in lines:
        kinds, words = _kinds(line), [token.text for token in line if token.kind == "word"]
        if not kinds and not words:
            continue
        before = _kinds(joined[-1]) if joined else ""
        if "V" not in before and before and kinds == "V" * len(before) and _NUMBER_NAMES.issuperset(words):
            joined[-1] = [*joined[-1], Token("comma", "\n"), *line]
        else:
            joined.append(line)
    return joined


# --- within a line


def _read_line(line: list[Token]) -> Reading:
    kinds, segments = _kinds(line), [segment for segment in _split(line, "comma") if _kinds(segment)]
    half = len(kinds) // 2
    if "L" not in kinds or "V" not in kinds:
        return Reading()
    if all(_kinds(segment) in ("LV", "VL") for segment in segments):
        parts = [_alternating(segment) for segment in segments]
    elif kinds in ("LV" * half, "VL" * half):
        parts = [_alternating(line)]
    elif kinds in ("L" * half + "V" * half, "V" * half + "L" * half):
        parts = [_in_order(line)]
    else:
        parts = [_linked(segment) for segment in segments]
    reading = Reading()
    for part in parts:
        reading.add(part)
    return reading


def _alternating(line: list[Token]) -> Reading:
    """A line of labels and values in turn; pairs are the first two, the next two, and so on."""
    reading = Reading()
    items = [index for index, token in enumerate(line) if token.kind in ("label", "value")]
    before = 0
    for one, two, after in zip(items[::2], items[1::2], [*items[2::2], len(line)], strict=True):
        label, value = sorted((line[one], line[two]), key=lambda token: token.kind)
        assert value.value is not None
        words, between = _words(_after_link(line[before:one])), line[one + 1 : two]
        behind = _words(_clause(line[two:after])[1:])
        if (words | _words(between) | behind) & _DOUBTS:
            reading.problems.append(f"{label.text} {value.text} may be about something else; it was left out")
        else:
            sure = _belong(between)
            key = line[one + 1].kind == "link"  # so that words before are part of it: "very positive: 0.5"
            reading.pairs.append(Pair(label.label, value.value, sure and not (key and words - _COPULAS)))
        before = two + 1
    return reading


def _clause(line: list[Token]) -> list[Token]:
    """The line up to its first comma or end of a sentence."""
    ends = (index + 1 for index, token in enumerate(line) if token.ends)
    commas = (index for index, token in enumerate(line) if token.kind == "comma")
    return line[: min(next(ends, len(line)), next(commas, len(line)))]


def _belong(between: list[Token]) -> bool:
    """Whether what stands between a label and a value leaves no doubt that they belong together."""
    words = _word_list(between)
    if any(one.kind == "link" and two.text == "," for one, two in pairwise(between)):
        return False
    if any(token.kind == "comma" for token in between):
        return _NUMBER_NAMES.issuperset(words)
    linked = bool(between) and (between[-1].kind == "link" or between[-1].text == "is")
    return linked or _COPULAS.issuperset(words)


def _in_order(line: list[Token]) -> Reading:
    """All labels and then as many values, or the other way round."""
    labels = [token.label for token in line if token.kind == "label"]
    values = [token.value for token in line if token.value is not None]
    sure = _COPULAS.issuperset(_words(line) - {"respectively"})
    return Reading([Pair(label, value, sure) for label, value in zip(labels, values, strict=True)])


def _linked(segment: list[Token]) -> Reading:
    """Labels with one value behind a colon or the like, or in the next column; what is left is a problem."""
    reading, text = Reading(), " ".join(token.text for token in segment)
    starts = [index for index, token in enumerate(segment) if token.kind == "label"]
    chunks = [segment[start:end] for start, end in zip([0, *starts], [*starts, len(segment)], strict=True)]
    for before, chunk in pairwise(chunks):
        place = _linked_place(chunk)
        shared = _kinds(before) == "L"  # "positive and neutral: 0.9"
        if place and not shared and not (_words(_after_link(before)) | _words(chunk[:place])) & _DOUBTS:
            value = chunk[place].value
            assert value is not None
            reading.pairs.append(Pair(chunk[0].label, value, True))
    if len(reading.pairs) < _kinds(segment).count("V"):
        reading.problems.append(f"{text!r:.80} has numbers of which it is not clear what they are; they were left out")
    elif not reading.pairs and starts and (starts[0] == 0 or segment[starts[0] - 1].kind != "link"):
        reading.problems.append(f"{text!r:.80} has no number of its own")
    return reading


def _linked_place(chunk: list[Token]) -> int:
    """Where the value of the label that begins a chunk is, or 0."""
    places = [
        index for index in range(2, len(chunk)) if chunk[index].kind == "value" and chunk[index - 1].kind == "link"
    ]
    in_column = bool(places) and chunk[places[0] - 1].text == "|"
    return places[0] if len(places) == 1 or in_column else 0


def _after_link(tokens: list[Token]) -> list[Token]:
    """What follows the last link, comma, number or "is"."""
    for index in range(len(tokens), 0, -1):
        if tokens[index - 1].kind in ("link", "comma", "value") or tokens[index - 1].text == "is":
            return tokens[index:]
    return tokens


def _word_list(tokens: Iterable[Token]) -> list[str]:
    return [token.text for token in tokens if token.kind == "word"]


def _words(tokens: Iterable[Token]) -> set[str]:
    return set(_word_list(tokens))
