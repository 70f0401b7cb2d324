"""vLLM's custom logits processor: it tells the recorder which row of a step belongs to which request.

vLLM has two model runners with an interface each, and chooses one by model and platform. One class serves both.
Nothing is done to the logits.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from pyqe_vllm.client import KEY
from pyqe_vllm.recorder import Recorder, Row

_INTERFACES = ("vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor")  # runner V1, V2


def _bases() -> tuple[type, ...]:
    """The interfaces that this vLLM has."""
    found = []
    for name in _INTERFACES:
        try:
            found.append(importlib.import_module(name).LogitsProcessor)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
    if not found:
        raise ImportError(f"vllm: expected one of {', '.join(_INTERFACES)}")
    return tuple(found)


def check_config(vllm_config: Any) -> None:
    """Refuse engines whose steps are not one token a request in one worker.

    Raises:
        NotImplementedError: speculative decoding; tensor, pipeline or data parallel.
    """
    if vllm_config.speculative_config is not None:
        raise NotImplementedError("pyqe_vllm: expected no speculative decoding: its steps write several tokens")
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if getattr(vllm_config.parallel_config, name) != 1:
            raise NotImplementedError(f"pyqe_vllm: expected {name} 1: scores are kept in one worker")


class QualityProcessor(*_bases()):  # type: ignore[misc]
    """Scores the requests that have ``extra_args={"pyqe": key}`` with a key of their own.

    Args:
        vllm_config: the engine's.
        state: the device (V1), or the tokens that the runner has of each request (V2).
        is_pin_memory: of V1.
    """

    newest: Recorder | None = None  # the worker extension of the same process finds it here

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request that cannot be scored.

        Raises:
            ValueError: its key is no text, or several sequences would share it.
        """
        key = _key(sampling_params)
        if key is not None and (not isinstance(key, str) or not 1 <= len(key) <= 128):
            raise ValueError(f"extra_args[{KEY!r}]: expected a text of 1 to 128 characters, got {key!r:.150}")
        if key is not None and sampling_params.n != 1:
            raise ValueError(f"extra_args[{KEY!r}]: expected n 1, got {sampling_params.n}: a request for each sequence")

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool = False) -> None:
        check_config(vllm_config)
        self.recorder = Recorder(vllm_config.scheduler_config.max_num_seqs)
        QualityProcessor.newest = self.recorder
        self._state = state
        self._keys: dict[int, str] = {}  # by place in the batch (V1) or slot (V2)
        self._written: dict[int, list[int]] = {}  # V1: tokens so far, the runner's own lists

    def is_argmax_invariant(self) -> bool:
        """False, or V1 would leave this processor out of greedy steps."""
        return False

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """Tell the recorder whose rows these are; ``context`` is V2's."""
        if self._keys:
            rows, previous = self._rows(logits.device) if context is None else self._rows_of(context)
            self.recorder.step(rows, previous, len(logits))
        return logits

    # --- V1

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests through the batch: V1's, in the documented order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._leave(index)
        for index, params, _, output_ids in batch_update.added:
            self._enter(index, params)
            if index in self._keys:
                self._written[index] = output_ids
        for source, target, direction in batch_update.moved:
            for table in (self._keys, self._written):
                moved, back = table.pop(source, None), table.pop(target, None)
                if moved is not None:
                    table[target] = moved
                if back is not None and direction.name == "SWAP":
                    table[source] = back

    def _enter(self, index: int, params: Any) -> None:
        self._leave(index)
        key = _key(params)
        if key is not None:
            self._keys[index] = key
            self.recorder.add(key)

    def _leave(self, index: int) -> None:
        key = self._keys.pop(index, None)
        self._written.pop(index, None)
        if key is not None:
            self.recorder.leave(key)

    def _rows(self, device: torch.device) -> tuple[list[Row], Tensor]:
        rows = [Row(key, index, len(self._written[index])) for index, key in self._keys.items()]
        previous = [self._written[row.row][-1] if row.place else -1 for row in rows]
        return rows, torch.tensor(previous, dtype=torch.int64, device=device)

    # --- V2

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A request takes a slot; whether ``apply`` must see it."""
        self._enter(req_idx, sampling_params)
        return req_idx in self._keys

    def _rows_of(self, context: Any) -> tuple[list[Row], Tensor]:
        slots = context.idx_mapping_np.tolist()
        lengths = (context.seq_lens_upper_bound_np - self._state.prompt_len.np[slots]).tolist()
        chosen = [(row, slot) for row, slot in enumerate(slots) if slot in self._keys]
        rows = [Row(self._keys[slot], row, lengths[row]) for row, slot in chosen]
        return rows, context.input_ids[[row for row, _ in chosen]].long()


def _key(sampling_params: Any) -> Any:
    return (sampling_params.extra_args or {}).get(KEY)
