"""The rows that make up the engine's batches: answers to be written and texts to be scored."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from pyqe.encoding import Encoded, PieceDecoder
from pyqe.scored import ScoredText, Signal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]

LEAST_LOGPROB = -9999.0  # as OpenAI has it for a probability of 0
_GREEDY_BELOW = 1e-5  # a temperature that would only overflow


@dataclass
class Token:
    """A token that the model wrote.

    Attributes:
        id: its id.
        prob: its probability before temperature, in [0, 1] or NaN.
        quality: in [0, 1] or NaN.
        top: ids and log-probabilities of the most probable tokens at its place, as many as were asked for.
        text: its piece of the answer; that of a character which several tokens make up belongs to the last of them.
    """

    id: int
    prob: float
    quality: float
    top: list[tuple[int, float]]
    text: str = ""


@dataclass(eq=False, kw_only=True)
class Row:
    """What the engine's queue consists of. Rows of one ``kind`` may share a batch.

    Attributes:
        index: which row of its request.
        reads: tokens of its prompt, or of the text that is scored with its prompt.
        writes: tokens that it writes at most.
        report: takes the news of it, or an exception; the engine's thread calls it.
        cancelled: whether nobody waits for it any more.
        done: whether all is reported.
    """

    index: int
    reads: int
    writes: int = field(default=0, init=False)
    report: Callable[[Any], object] = field(init=False)
    cancelled: bool = field(default=False, init=False)
    done: bool = field(default=False, init=False)

    @property
    def kind(self) -> Hashable:
        raise NotImplementedError


@dataclass(eq=False, kw_only=True)
class ScoreRow(Row):
    """A text to be scored; the news is :class:`ScoreNews`."""

    encoded: Encoded
    signals: tuple[Signal, ...] | None

    @property
    def kind(self) -> Hashable:
        return self.signals, "score"


@dataclass(frozen=True)
class ScoreNews:
    """A text with its scores."""

    index: int
    scored: ScoredText
    is_last = True


@dataclass(frozen=True)
class Sampling:
    """How an answer is written.

    Attributes:
        max_tokens: its length at most.
        temperature: >= 0; 0 takes the most probable token.
        top_p: in (0, 1], probability of the tokens that may be drawn.
        seed: None for another answer each time.
        stop: texts before which the answer ends.
        top_logprobs: alternatives of each token that are wanted.
        stream: whether tokens are wanted as they come.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    stream: bool = False


@dataclass(frozen=True)
class News:
    """Tokens of a row, all of them or the next ones.

    Attributes:
        index: which row of its request.
        tokens: with their pieces of the text.
        finish_reason: after the last ones.
        written: tokens that the model has written so far, those of EOS and stop strings included.
    """

    index: int
    tokens: list[Token]
    finish_reason: FinishReason | None
    written: int

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None


@dataclass(eq=False, kw_only=True)
class WriteRow(Row):
    """An answer to be written; the news is :class:`News`."""

    prompt_ids: list[int]
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        self.writes = self.sampling.max_tokens
        self.text = StoppedText(PieceDecoder(self.tokenizer, skip_special_tokens=True), self.sampling.stop)
        self.written = 0
        self._unreported: list[Token] = []
        self._generator: torch.Generator | None = None
        self._warpers = LogitsProcessorList(
            [TemperatureLogitsWarper(self.sampling.temperature)] if self.samples else []
        )
        if self.sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(self.sampling.top_p))

    @property
    def kind(self) -> Hashable:
        return "write"

    @property
    def samples(self) -> bool:
        return self.sampling.temperature >= _GREEDY_BELOW

    def draw(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The next token [1], drawn by its log-probabilities [1, V].

        By one random number of the row's own, so that its neighbours in the batch change nothing.
        """
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed((self.sampling.seed + self.index) % 2**63)
        cumulative = self._warpers(input_ids, scores)[0].softmax(-1, dtype=torch.float64).cumsum(-1)
        place = torch.rand(1, dtype=torch.float64, device=scores.device, generator=self._generator) * cumulative[-1]
        return torch.searchsorted(cumulative, place, right=True).clamp(max=len(cumulative) - 1)

    def add(self, token: Token, *, is_text: bool, is_end: bool) -> None:
        """Take the next token; report it, where that is wanted, or the end of the row."""
        self.written += 1
        if is_text:
            self._unreported += self.text.add(token)
        if is_end or self.text.stopped:
            self.finish("stop")
        elif self.written == self.sampling.max_tokens:
            self.finish("length")
        elif self.sampling.stream and self._unreported:
            self._report(None)

    def finish(self, reason: FinishReason) -> None:
        """Report the end of the row, if that is not done."""
        if not self.done:
            self._unreported += self.text.rest()
            self.done = True
            self._report("stop" if self.text.stopped else reason)

    def _report(self, finish_reason: FinishReason | None) -> None:
        tokens, self._unreported = self._unreported, []
        self.report(News(self.index, tokens, finish_reason, self.written))


class StoppedText:
    """The text of tokens up to a stop string: gives out tokens that no stop string can take back.

    Args:
        decoder: of the tokenizer.
        stop: strings that end the text and are not in it.

    Attributes:
        stopped: whether one of them came.
    """

    def __init__(self, decoder: PieceDecoder, stop: Sequence[str]) -> None:
        self._decoder = decoder
        self._stop = stop
        self._held: list[Token] = []
        self._inside_character = False
        self.stopped = False

    def add(self, token: Token) -> list[Token]:
        """The tokens that are given out when this one has come."""
        piece = self._decoder.add(token.id)
        self._held.append(token)
        self._inside_character = piece is None
        if piece is None:
            return []
        token.text = piece
        return self._settled(is_end=False)

    def rest(self) -> list[Token]:
        """The tokens that are left when no more come."""
        if self._inside_character and self._held:
            self._held[-1].text = self._decoder.rest()
        return self._settled(is_end=True)

    def _settled(self, *, is_end: bool) -> list[Token]:
        text = "".join(token.text for token in self._held)
        found = min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=None)
        self.stopped = self.stopped or found is not None
        end = found if found is not None else len(text) if is_end else len(text) - _beginning(text, self._stop)
        settled: list[Token] = []
        start = 0
        for token in self._held:
            if found is not None:
                if start >= end:
                    break
                token.text = token.text[: end - start]  # the last one may reach into the stop string
            elif start + len(token.text) > end:
                break
            start += len(token.text)
            settled.append(token)
        self._held = [] if self.stopped else self._held[len(settled) :]
        return settled


def _beginning(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of a text with which a stop string begins.

    Example:
        >>> _beginning("one, tw", ["two", "three"])
        2
    """
    lengths = (length for string in stop for length in range(1, len(string)) if text.endswith(string[:length]))
    return max(lengths, default=0)
