"""What requests may ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pyqe.encoding import Prompt
from pyqe.scored import Signal

# Options of OpenAI's that change no answer here.
_IGNORED = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
# Options that are not there, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    # of a message that was an answer
    "annotations": ([],),
    "tool_calls": ([],),
}

Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    """Knows its fields and refuses all others, but for those that ask for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None and name not in _IGNORED and value not in _NEUTRAL.get(name, ())
        }


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Generation(_Strict):
    """What completions and chat have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


Ids = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(Generation):
    """Of /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1)]


def chat(messages: list[Message]) -> list[dict[str, str]]:
    """Messages as chat templates have them."""
    return [{"role": message.role, "content": message.text} for message in messages]


class ChatRequest(Generation):
    """Of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: expected 'logprobs': true with it")
        return self


ScorePrompt = str | Messages


class ScoreRequest(_Strict):
    """Of /v1/score."""

    model: str | None = None
    text: str | None = None
    texts: Annotated[list[str], Field(min_length=1)] | None = None
    prompt: ScorePrompt | None = None
    prompts: list[ScorePrompt | None] | None = None
    signals: Annotated[list[Signal], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ScoreRequest:
        if (self.text is None) == (self.texts is None):
            raise ValueError("text: expected either 'text' or 'texts'")
        if (self.prompt if self.text is None else self.prompts) is not None:
            raise ValueError("prompt: expected 'prompt' with 'text', 'prompts' with 'texts'")
        if self.texts is not None and self.prompts is not None and len(self.prompts) != len(self.texts):
            raise ValueError(f"prompts: expected one for each of {len(self.texts)} texts, got {len(self.prompts)}")
        return self

    @property
    def pairs(self) -> list[tuple[str, Prompt | None]]:
        """Texts with their prompts."""
        texts = [self.text] if self.text is not None else self.texts or []
        prompts = [self.prompt] if self.text is not None else self.prompts or [None] * len(texts)
        return [
            (text, chat(prompt) if isinstance(prompt, list) else prompt)
            for text, prompt in zip(texts, prompts, strict=True)
        ]
