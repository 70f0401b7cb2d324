"""vLLM's worker extension: calls that ``collective_rpc`` makes in the worker's process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyqe import HeadMismatchError, SigmoidHead
from pyqe.scored import Signal

if TYPE_CHECKING:
    from pyqe_vllm.recorder import Recorder


class WorkerExtension:
    """Mixed into vLLM's worker by ``worker_extension_cls``."""

    def pyqe_attach(self, head: str | None, signals: list[Signal]) -> None:
        """Load a head from a folder and score from now on.

        Raises:
            HeadMismatchError: the head belongs to another vocabulary or hidden size.
            RuntimeError: the engine runs without the logits processor.
        """
        from pyqe_vllm.processor import QualityProcessor  # needs vLLM's sampler, which the engine has loaded by now

        if QualityProcessor.newest is None:
            raise RuntimeError("pyqe_vllm: expected an engine with the logits_processors of ENGINE_OPTIONS")
        worker: Any = self
        loaded = None if head is None else SigmoidHead.from_pretrained(head)
        if loaded is not None:
            _check_fits(loaded, worker.vllm_config.model_config)
        recorder: Recorder = QualityProcessor.newest
        recorder.attach(worker.get_model(), loaded, signals)
        self._pyqe_recorder = recorder

    def pyqe_scores(self, wanted: list[tuple[str, list[int]]]) -> list[dict[str, Any]]:
        """Scores of finished requests; see :meth:`pyqe_vllm.recorder.Recorder.take`."""
        return self._pyqe_recorder.take(wanted)


def _check_fits(head: SigmoidHead, model_config: Any) -> None:
    sizes = {"vocab_size": model_config.get_vocab_size(), "hidden_size": model_config.get_hidden_size()}
    for name, theirs in sizes.items():
        ours = getattr(head.config, name)
        if ours != theirs:
            raise HeadMismatchError(f"{name}: the head has {ours}, the model {theirs}")
