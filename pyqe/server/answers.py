"""Answers in OpenAI's two forms, whole and in chunks."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from pyqe.scored import ScoredText
from pyqe.server.rows import LEAST_LOGPROB, FinishReason, Token

Json = dict[str, Any]
Decode = Callable[[int], str]


class Form:
    """How the answers to one request look.

    Args:
        model: name of the model.
        decode: text of a token, for the alternatives of ``logprobs``.
        with_quality: whether there is a head.
        with_logprobs: whether they are wanted.
    """

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str, decode: Decode, *, with_quality: bool, with_logprobs: bool) -> None:
        self.decode = decode
        self.with_quality = with_quality
        self.with_logprobs = with_logprobs
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Json], usage: Json) -> Json:
        """The body of an answer that is complete."""
        return {**self._head, "object": self.object, "choices": list(choices), "usage": usage}

    def chunk(self, choices: Sequence[Json], **usage: Json | None) -> Json:
        """A piece of an answer."""
        return {**self._head, "object": self.chunk_object, "choices": list(choices), **usage}

    def choice(self, index: int, tokens: Sequence[Token], finish_reason: FinishReason | None) -> Json:
        """A whole answer."""
        content = self._content(text_of(tokens))
        return self._choice(index, content, tokens, finish_reason, tokens, 0)

    def delta(
        self,
        index: int,
        tokens: Sequence[Token],
        finish_reason: FinishReason | None,
        so_far: Sequence[Token],
        offset: int,
    ) -> Json:
        """The next tokens of an answer; the quality of the whole comes with the last ones.

        Args:
            index: which answer.
            tokens: the next ones.
            finish_reason: with the last ones.
            so_far: all, these included.
            offset: length of the text before them.
        """
        whole = so_far if finish_reason is not None else ()
        return self._choice(index, self._delta(text_of(tokens)), tokens, finish_reason, whole, offset)

    def opening(self, index: int) -> Json | None:
        """The choice of a first chunk without tokens, if there is one."""
        return None

    def _choice(
        self,
        index: int,
        content: Json,
        tokens: Sequence[Token],
        finish_reason: FinishReason | None,
        whole: Sequence[Token],
        offset: int,
    ) -> Json:
        logprobs = self._logprobs(tokens, offset) if self.with_logprobs else None
        quality = _quality(tokens, whole) if self.with_quality else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason, "quality": quality}

    def _content(self, text: str) -> Json:
        raise NotImplementedError

    def _delta(self, text: str) -> Json:
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> Json:
        raise NotImplementedError


class CompletionForm(Form):
    """Of /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> Json:
        return {"text": text}

    _delta = _content

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> Json:
        lengths = (len(token.text) for token in tokens[:-1])
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [logprob(token.prob) for token in tokens],
            "top_logprobs": [
                {self.decode(id): value for id, value in token.top} if token.top else None for token in tokens
            ],
            "text_offset": list(accumulate(lengths, initial=offset))[: len(tokens)],
        }


class ChatForm(Form):
    """Of /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> Json:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "quality": None}

    def _content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> Json:
        return {"delta": {"content": text}}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> Json:
        content = [
            _alternative(token.text, logprob(token.prob))
            | {"top_logprobs": [_alternative(self.decode(id), value) for id, value in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _alternative(text: str, value: float | None) -> Json:
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def text_of(tokens: Sequence[Token]) -> str:
    """Their pieces joined."""
    return "".join(token.text for token in tokens)


def _quality(tokens: Sequence[Token], whole: Sequence[Token]) -> Json:
    """Qualities of tokens, and that of a whole answer (none: not yet)."""
    return {"sequence": _scored(whole)["quality"], "tokens": _scored(tokens)["token_quality"]}


def _scored(tokens: Sequence[Token]) -> Json:
    return ScoredText("", token_quality=np.array([token.quality for token in tokens], dtype=np.float32)).to_dict()


def logprob(prob: float) -> float | None:
    """The log-probability of a probability; None of NaN."""
    if math.isnan(prob):
        return None
    return math.log(prob) if prob > 0 else LEAST_LOGPROB


def usage_of(prompt: int, completion: int) -> Json:
    """Numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
