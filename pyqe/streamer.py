"""Text and its quality while they are generated."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import TextIteratorStreamer

from pyqe.encoding import PieceDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class QualityStreamer(TextIteratorStreamer):  # type: ignore[misc]
    """Yields ``(text, quality)`` as the tokens of one sequence come; else as transformers' ``TextIteratorStreamer``.

    For ``model.generate(..., streamer=streamer)``, in another thread, of a model with :func:`pyqe.attach`. A piece of
    text is that of one token, or of the few that make up one character; its quality is the lowest of its tokens', in
    [0, 1]. The pieces joined are the text. NaN is the quality of the prompt, unless that is skipped, and of a token
    without a score. Tokens without text, such as special ones with ``skip_special_tokens=True``, give no piece.

    Args:
        tokenizer: the model's.
        skip_prompt: whether to leave the prompt out.
        timeout: seconds to wait for the next piece before ``queue.Empty`` is raised; None waits for ever, also where
            ``generate`` has failed.
        decode_kwargs: of ``tokenizer.decode``.

    Example:
        See the README.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, timeout, **decode_kwargs)
        self.scored: deque[float] = deque()  # of tokens that put() has not seen yet
        self._restart()

    def _restart(self) -> None:
        self._decoder = PieceDecoder(self.tokenizer, **self.decode_kwargs)
        self._waiting: list[float] = []  # of tokens without a piece yet
        self.scored.clear()
        self.next_tokens_are_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt's ids [1, T], or the next token [1].

        Raises:
            ValueError: more than one sequence.
            RuntimeError: the tokens come without quality.
        """
        if value.dim() > 1 and len(value) > 1:
            raise ValueError(f"streamer: expected one sequence, got {len(value)}")
        is_prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if is_prompt and self.skip_prompt:
            return
        for token_id in value.reshape(-1).tolist():
            if not is_prompt and not self.scored:
                raise RuntimeError("streamer: expected a model with pyqe.attach and a head, got tokens without quality")
            self._waiting.append(np.nan if is_prompt else self.scored.popleft())
            self._emit(self._decoder.add(token_id))

    def _emit(self, piece: str | None) -> None:
        if piece is None:
            return
        if piece:
            self.text_queue.put((piece, float(np.min(self._waiting))), timeout=self.timeout)
        self._waiting.clear()

    def end(self) -> None:
        """Give out what waits for the rest of its character, and finish."""
        self._emit(self._decoder.rest())
        self.text_queue.put(self.stop_signal, timeout=self.timeout)
        self._restart()
