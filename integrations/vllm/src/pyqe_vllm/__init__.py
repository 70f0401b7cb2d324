"""Token quality of vLLM's output; see the README."""

from pyqe_vllm.client import ENGINE_OPTIONS, KEY, attach, chat, generate

__all__ = ["ENGINE_OPTIONS", "KEY", "attach", "chat", "generate"]
