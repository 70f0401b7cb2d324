"""Scores of the tokens that an engine writes, from what it computes in each step. Knows nothing of vLLM."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyqe.heads import SigmoidHead
from pyqe.scored import Signal
from pyqe.signals import check_signals, scores_of_logits

_STEPS_ON_DEVICE = 256  # scores of so many steps are copied to the CPU together: each copy waits for the device


@dataclass
class Row:
    """What an engine's step computes for one request.

    Attributes:
        key: of the request.
        row: of the step's logits.
        place: of the token that the row predicts, counted from the first one generated.
    """

    key: str
    row: int
    place: int


@dataclass
class _Step:
    """A step whose tokens are not known yet: hidden states [R, D], logits [R, V] before the sampler changes them."""

    hidden: Tensor
    logits: Tensor
    rows: dict[str, Row] = field(default_factory=dict)


@dataclass
class _Request:
    """Scores [S] and tokens by their places; where the token is not known yet, the hidden state [D] instead."""

    tokens: dict[int, int] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)
    waiting: dict[int, Tensor] = field(default_factory=dict)
    problem: str | None = None


class Recorder:
    """Scores of the requests that ask for them.

    The token that a step chooses is known in the next step of its request: until then the step's hidden states and
    logits are kept. Of a request that takes no part in the next step, the hidden state alone is kept, and its logits
    are computed again when somebody asks.

    Args:
        max_rows: the most requests in a step; other products with the output embedding are none.
        capacity: requests whose scores are kept until somebody asks; the oldest go first.
    """

    def __init__(self, max_rows: int, capacity: int = 4096) -> None:
        self.max_rows = max_rows
        self.capacity = capacity
        self.signals: tuple[Signal, ...] = ()
        self.head: SigmoidHead | None = None
        self._compute_logits: Callable[[Tensor], Tensor | None] | None = None
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        self._running: set[str] = set()
        self._seen: _Step | None = None
        self._step: _Step | None = None
        self._settled: list[tuple[list[Row], Tensor, Tensor]] = []

    def attach(self, model: Any, head: SigmoidHead | None, signals: Sequence[Signal]) -> None:
        """Look at what ``model.compute_logits(hidden)`` takes and gives from now on. A second head replaces the first.

        Raises:
            ValueError: unknown signals, or the quality without a head.
        """
        self.signals, self.head = check_signals(signals, head), head
        if self._compute_logits is None:
            compute_logits = self._compute_logits = model.compute_logits

            def observed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
                logits: Tensor | None = compute_logits(hidden_states, *args, **kwargs)
                self._see(hidden_states, logits)
                return logits

            model.compute_logits = observed

    def _see(self, hidden: Tensor, logits: Tensor | None) -> None:
        """Copy what the sampler and masks of a grammar may change in place."""
        self._seen = None
        if self._running and logits is not None and len(logits) <= self.max_rows:
            self._seen = _Step(hidden.clone(), logits.clone())

    def add(self, key: str) -> None:
        """Begin a request, or go on with one that was put off."""
        self._requests.setdefault(key, _Request())
        self._running.add(key)
        while len(self._requests) > self.capacity:
            self.leave(self._requests.popitem(last=False)[0])

    def leave(self, key: str) -> None:
        """The request takes part in no step from now on, unless it is added again."""
        self._running.discard(key)

    def step(self, rows: Iterable[Row], previous: Tensor, count: int) -> None:
        """The engine is about to choose tokens.

        Args:
            rows: those of the requests that were added.
            previous: int64, for each row the token before the one that it predicts; -1 where it is not known.
            count: rows of the logits that the sampler has.
        """
        last, seen = self._step, self._seen
        self._step = self._seen = None
        now: dict[str, tuple[Row, int]] = {}
        for index, row in enumerate(rows):
            if row.key in now and row.key in self._requests:
                self._requests[row.key].problem = "two requests ran under one key"
            now[row.key] = row, index
        if last is not None:
            self._settle(last, now, previous)
        if seen is not None and len(seen.logits) == count:
            seen.rows = {key: row for key, (row, _) in now.items() if row.place >= 0}
            self._step = seen

    def _settle(self, last: _Step, now: dict[str, tuple[Row, int]], previous: Tensor) -> None:
        """Score the last step's tokens as far as they are known now."""
        known = []
        for key, row in last.rows.items():
            next_row, index = now.get(key, (None, -1))
            if next_row is not None and next_row.place == row.place + 1:
                known.append((row, index))
            elif next_row is None or next_row.place != row.place:  # the same place again: the prompt was not read yet
                self._put_off(last, row)
        if known:
            rows = [row.row for row, _ in known]
            tokens = previous[[index for _, index in known]]
            scores = self._scores(last.hidden[rows], last.logits[rows], tokens)
            self._settled.append(([row for row, _ in known], tokens, scores))
        if len(self._settled) >= _STEPS_ON_DEVICE:
            self._flush()

    def _put_off(self, step: _Step, row: Row) -> None:
        if row.key in self._requests:
            self._requests[row.key].waiting[row.place] = step.hidden[row.row].clone()

    def _scores(self, hidden: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
        """Scores [n, S] of tokens [n]."""
        found = scores_of_logits(self.signals, self.head, hidden, logits, tokens[:, None])
        return torch.cat([found[signal] for signal in self.signals], -1)

    def _flush(self) -> None:
        """Give the requests their scores."""
        settled, self._settled = self._settled, []
        if not settled:
            return
        tokens = torch.cat([item[1] for item in settled]).tolist()
        scores = torch.cat([item[2] for item in settled]).tolist()
        rows = [row for item in settled for row in item[0]]
        for row, token, values in zip(rows, tokens, scores, strict=True):
            request = self._requests.get(row.key)
            if request is not None:
                request.tokens[row.place], request.scores[row.place] = token, values
                request.waiting.pop(row.place, None)

    @torch.inference_mode()
    def take(self, wanted: Sequence[tuple[str, list[int]]]) -> list[dict[str, Any]]:
        """Scores of finished requests, which are forgotten then.

        Args:
            wanted: key and generated tokens of each request.

        Returns:
            for each request a list of floats for each signal, NaN where a token has no score; or, under "error", why
            there are none.
        """
        self._flush()
        requests = [(self._requests.pop(key, None), key, token_ids) for key, token_ids in wanted]
        for key, _ in wanted:
            self.leave(key)
        if self._step is not None:
            for request, key, _ in requests:
                row = self._step.rows.pop(key, None)
                if request is not None and row is not None:
                    request.waiting[row.place] = self._step.hidden[row.row]
        self._score_waiting([(request, token_ids) for request, _, token_ids in requests if request is not None])
        return [self._answer(request, token_ids) for request, _, token_ids in requests]

    def _score_waiting(self, requests: Sequence[tuple[_Request, list[int]]]) -> None:
        """Score tokens that the engine never told, mostly each request's last one."""
        waiting = [
            (request, place, token_ids[place], hidden)
            for request, token_ids in requests
            for place, hidden in request.waiting.items()
            if place < len(token_ids)
        ]
        for start in range(0, len(waiting), self.max_rows):
            part = waiting[start : start + self.max_rows]
            hidden = torch.stack([item[3] for item in part])
            assert self._compute_logits is not None
            logits = self._compute_logits(hidden)
            if logits is None:
                return
            tokens = torch.tensor([item[2] for item in part], device=hidden.device)
            values = self._scores(hidden, logits, tokens).tolist()
            for (request, place, token, _), scores in zip(part, values, strict=True):
                request.tokens[place], request.scores[place] = token, scores

    def _answer(self, request: _Request | None, token_ids: list[int]) -> dict[str, Any]:
        if request is None:
            return {"error": "no such request, or its scores were taken or forgotten"}
        if request.problem is not None:
            return {"error": request.problem}
        if any(
            token not in (-1, token_ids[place]) for place, token in request.tokens.items() if place < len(token_ids)
        ):
            return {"error": "the request wrote other tokens"}
        missing = [float("nan")] * len(self.signals)
        rows = [request.scores.get(place, missing) for place in range(len(token_ids))]
        return {signal: [row[i] for row in rows] for i, signal in enumerate(self.signals)}
