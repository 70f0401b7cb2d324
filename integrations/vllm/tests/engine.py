"""What vLLM's documents say of its interfaces, and an engine that keeps to them with a model of transformers.

The stand-ins hold only what the documents state: see the README for their addresses.
"""

from __future__ import annotations

import copy
import enum
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class V1LogitsProcessor(ABC):
    @abstractmethod
    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None: ...

    @abstractmethod
    def apply(self, logits: Tensor) -> Tensor: ...

    @abstractmethod
    def is_argmax_invariant(self) -> bool: ...

    @abstractmethod
    def update_state(self, batch_update: Any) -> None: ...


class V2LogitsProcessor(ABC):
    @abstractmethod
    def apply(self, logits: Tensor, ctx: Any) -> Tensor: ...


class MoveDirectionality(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


def stub_modules() -> dict[str, ModuleType]:
    """The modules that the adapter imports of vLLM, and their packages."""
    processors = {
        "vllm.v1.sample.logits_processor": V1LogitsProcessor,
        "vllm.v1.worker.gpu.sample.logits_processor": V2LogitsProcessor,
    }
    modules: dict[str, ModuleType] = {}
    for name, processor in processors.items():
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:length]), ModuleType(".".join(parts[:length])))
        modules[name].LogitsProcessor = processor  # type: ignore[attr-defined]
    return modules


def config(**changes: Any) -> Any:
    """A ``VllmConfig``."""
    sizes = {f"{kind}_parallel_size": 1 for kind in ("tensor", "pipeline", "data")}
    parallel = {name: changes.pop(name, 1) for name in sizes}
    model = SimpleNamespace(get_vocab_size=lambda: changes.get("vocab_size"), get_hidden_size=lambda: 32)
    return SimpleNamespace(
        speculative_config=changes.pop("speculative_config", None),
        parallel_config=SimpleNamespace(**parallel),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        model_config=model,
    )


@dataclass
class SamplingParams:
    max_tokens: int = 4
    n: int = 1
    extra_args: dict[str, Any] | None = None

    def clone(self) -> SamplingParams:
        return copy.deepcopy(self)


@dataclass(eq=False)
class Request:
    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)  # as the runner has them: -1 until a token is known
    drawn: list[int] = field(default_factory=list)  # as they are
    computed: int = 0
    stopped: bool = False

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.drawn


class Engine:
    """Runs requests in a batch that changes from step to step: chunks of prompts, preemption, other rows each time.

    Args:
        model: of transformers.
        processor: makes the logits processor, from (config, state, ...).
        runner: "V1", "V1 async" (a token is known one step late, and an ended request may run on) or "V2".
        eos: token that ends a request.
    """

    def __init__(self, model: Any, processor: Callable[..., Any], runner: str, *, eos: int, seed: int = 0) -> None:
        self.model, self.runner, self.eos = model, runner, eos
        self.random = random.Random(seed)
        self.compute_logits = self._compute_logits  # the adapter puts its own in this place
        self.batch: list[Request | None] = []  # by place (V1) or slot (V2)
        self.added: list[tuple[int, Request]] = []
        self.prompt_len = SimpleNamespace(np=torch.zeros(8, dtype=torch.int64).numpy())
        state = SimpleNamespace(prompt_len=self.prompt_len) if runner == "V2" else torch.device("cpu")
        more = [] if runner == "V2" else [False]
        self.processor = processor(config(), state, *more)
        self.preempted = self.discarded = self.moved = 0

    def get_model(self) -> Engine:
        return self

    def _compute_logits(self, hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model.lm_head(hidden)

    def run(self, requests: list[Request]) -> None:
        """Until all have ended."""
        waiting = list(requests)
        while waiting or any(self.batch):
            self._schedule(waiting)
            self._step([request for request in self.batch if request is not None])

    # --- who takes part

    def _schedule(self, waiting: list[Request]) -> None:
        left = [index for index, request in enumerate(self.batch) if request is not None and self._leaves(request)]
        for index in left:
            request = self.batch[index]
            assert request is not None
            if not request.stopped:
                self.preempted += 1
                request.computed = 0
                waiting.insert(0, request)
            self.batch[index] = None
        running = sum(request is not None for request in self.batch)
        new = [waiting.pop(0) for _ in range(min(len(waiting), 4 - running, self.random.randint(1, 3)))]
        (self._place_v2 if self.runner == "V2" else self._place_v1)(left, new)

    def _leaves(self, request: Request) -> bool:
        return request.stopped or (len(request.drawn) > 0 and self.random.random() < 0.1)

    def _place_v1(self, left: list[int], new: list[Request]) -> None:
        """Build a BatchUpdate as the documents describe it: adds fill holes, then the batch is condensed."""
        holes, added, moved = sorted(left), [], []
        for request in new:
            index = holes.pop(0) if holes else len(self.batch)
            self.batch[index : index + 1] = [request]
            added.append((index, request.params, request.prompt, request.tokens))
        removed = list(holes)
        while None in self.batch:
            if self.batch[-1] is not None:
                hole = self.batch.index(None)
                self.batch[hole] = self.batch[-1]
                moved.append((len(self.batch) - 1, hole, MoveDirectionality.UNIDIRECTIONAL))
            self.batch.pop()
        if len(self.batch) > 1 and self.random.random() < 0.3:
            a, b = self.random.sample(range(len(self.batch)), 2)
            self.batch[a], self.batch[b] = self.batch[b], self.batch[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        self.moved += len(moved)
        update = SimpleNamespace(batch_size=len(self.batch), removed=removed, added=added, moved=moved)
        self.processor.update_state(update if removed or added or moved else None)

    def _place_v2(self, left: list[int], new: list[Request]) -> None:
        for request in new:
            free = [slot for slot in range(8) if slot >= len(self.batch) or self.batch[slot] is None]
            slot = self.random.choice(free)
            self.batch += [None] * (slot + 1 - len(self.batch))
            self.batch[slot] = request
            self.prompt_len.np[slot] = len(request.prompt)
            self.processor.add_request(slot, request.params)

    # --- one step

    @torch.inference_mode()
    def _step(self, rows: list[Request]) -> None:
        if not rows:
            return
        if self.runner == "V2":
            self.random.shuffle(rows)
        for request in rows:  # prompts are read in chunks
            request.computed += min(len(request.ids) - request.computed, self.random.randint(1, 6))
        states = [
            self.model.model(torch.tensor([request.ids[: request.computed]])).last_hidden_state[0, -1]
            for request in rows
        ]
        logits = self.compute_logits(torch.stack(states))
        logits[:, 3] = -torch.inf  # a grammar's mask, in place
        for request in rows:
            request.tokens[:] = request.drawn  # known now, before logits processors run
        more = [self._context(rows)] if self.runner == "V2" else []
        logits = self.processor.apply(logits, *more)
        logits /= 0.5
        for request, row in zip(rows, logits, strict=True):
            self._draw(request, row)
        self.compute_logits(torch.zeros(20, len(states[0])))  # log-probabilities of a prompt

    def _context(self, rows: list[Request]) -> Any:
        """V2's LogitsContext."""
        return SimpleNamespace(
            idx_mapping_np=torch.tensor([self.batch.index(request) for request in rows]).numpy(),
            seq_lens_upper_bound_np=torch.tensor([request.computed for request in rows], dtype=torch.int32).numpy(),
            input_ids=torch.tensor([request.ids[request.computed - 1] for request in rows], dtype=torch.int32),
        )

    def _draw(self, request: Request, logits: Tensor) -> None:
        token = self.random.choice(logits.topk(3).indices.tolist())
        if request.computed < len(request.ids):
            self.discarded += 1  # the prompt is not read yet
            return
        if request.drawn and request.drawn[-1] == self.eos:
            request.stopped = True  # it ran on until the engine knew
            return
        request.drawn.append(token)
        request.tokens.append(-1 if self.runner == "V1 async" else token)
        ended = token == self.eos and self.runner != "V1 async"
        request.stopped = ended or len(request.drawn) == request.params.max_tokens
