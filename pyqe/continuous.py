"""Token scores of transformers' continuous batching, ``model.generate_batch``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyqe.generation import stop_ids, trim
from pyqe.lm_head import around_forward, output_embedding, own_attribute
from pyqe.scored import Signal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = Callable[[Tensor, Tensor, Tensor], dict[Signal, Tensor]]


@dataclass
class _Step:
    """The rows of a forward pass that predict a token, until those tokens are known.

    Attributes:
        hidden: [n, D].
        logits: [n, V].
        places: for each row the request, and the place of the token in prompt and text.
    """

    hidden: Tensor
    logits: Tensor
    places: list[tuple[Any, int]]


class BatchScorer:
    """Scores the tokens of one ``generate_batch`` as they are written.

    The requests of a batch, which the manager knows, have their tokens when the next forward pass begins.

    Args:
        model: the model.
        score: scores [n, 1] of tokens [n, 1] from hidden states [n, D] and logits [n, V].
    """

    def __init__(self, model: PreTrainedModel, score: Score) -> None:
        self.model = model
        self.score = score
        self.scores: dict[tuple[str, int], dict[Signal, float]] = {}
        self._manager: Any = None
        self._hidden: Tensor | None = None
        self._step: _Step | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the manager that the model makes and at its forward passes, inside the ``with`` block."""
        make_manager = self.model.init_continuous_batching

        def init_continuous_batching(*args: Any, **kwargs: Any) -> Any:
            self._manager = make_manager(*args, **kwargs)
            one_batch_at_a_time(self._manager.continuous_batching_config)  # it may be an older one that was kept
            return self._manager

        with (
            own_attribute(self.model, "init_continuous_batching", init_continuous_batching),
            around_forward(output_embedding(self.model), self._see_hidden),
            around_forward(self.model, self._see_logits, before=self._settle),
        ):
            yield
        self._settle()

    def _see_hidden(self, output: Any, hidden: Tensor) -> None:
        self._hidden = hidden[0]

    def _see_logits(self, output: Any, *, logits_indices: Tensor, **inputs: Any) -> None:
        assert self._hidden is not None
        hidden, logits = self._hidden, output.logits[0]
        if "logits_to_keep" not in inputs:
            hidden, logits = hidden[logits_indices], logits[logits_indices]
        batch = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        places = [(item.state, _length(item.state)) for item in batch if item.has_new_token]
        self._step = _Step(hidden[: len(places)], logits[: len(places)], places)  # there is a row for every request
        self._hidden = None

    @torch.no_grad()
    def _settle(self) -> None:
        """Score the tokens of the last forward pass, which the requests have now."""
        step, self._step = self._step, None
        if step is None or not step.places:  # of a batch of beginnings of prompts
            return
        ids = [[_token_at(request, place)] for request, place in step.places]
        found = self.score(step.hidden, step.logits, torch.tensor(ids, device=step.logits.device))
        values = zip(*(scores[:, 0].tolist() for scores in found.values()), strict=True)
        for (request, place), row in zip(step.places, values, strict=True):
            self.scores[request.request_id, place] = dict(zip(found, row, strict=True))

    def add_to(self, results: dict[str, Any], options: dict[str, Any]) -> None:
        """Give each result of ``generate_batch``, whose options these are, the scores of its generated tokens."""
        stop = stop_ids(self.model, options)
        for request_id, result in results.items():
            first, count = len(result.prompt_ids), len(result.generated_tokens)
            rows = [self.scores.get((request_id, first + i), {}) for i in range(count)]
            names = {name for row in rows for name in row}
            for name in names:
                setattr(result, f"token_{name}", [row.get(name, np.nan) for row in rows])
            if "quality" in names:
                (text,), _ = trim([result.generated_tokens], [None], stop)
                result.sequence_quality = float(np.mean(result.token_quality[: len(text)])) if text else np.nan


def _length(request: Any) -> int:
    """Prompt and generated tokens; those of a request that was put off count as its prompt when it goes on."""
    return len(request.initial_tokens) + len(request.generated_tokens)


def _token_at(request: Any, place: int) -> int:
    """The generated token at a place, or -1 where the request ended without it."""
    return int(request.generated_tokens[place - len(request.initial_tokens)]) if place < _length(request) else -1


def one_batch_at_a_time(config: Any) -> Any:
    """A ``ContinuousBatchingConfig`` under which Python runs one batch after the other.

    Raises:
        NotImplementedError: it asks for CUDA graphs, compilation or asynchronous batches.
    """
    fast = ("use_cuda_graph", "use_async_batching", "varlen_compile_config", "decode_compile_config")
    wanted = [name for name in (*fast, "default_compile_level") if np.any(getattr(config, name))]
    if wanted:
        raise NotImplementedError(
            f"generate_batch: with pyqe.attach and return_logprobs, expected no {', '.join(wanted)} in "
            f"continuous_batching_config, got {getattr(config, wanted[0])!r:.80}"
        )
    config = copy.deepcopy(config)
    config.use_cuda_graph = config.use_async_batching = False
    return config
