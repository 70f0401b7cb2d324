"""The HTTP application."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import cache
from typing import Any, TypeVar

from anyio import CapacityLimiter, current_time, fail_after, to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from pyqe.estimator import QualityEstimator
from pyqe.scored import SIGNALS, Signal
from pyqe.server.answers import ChatForm, CompletionForm, Form, Json, text_of, usage_of
from pyqe.server.engine import Engine
from pyqe.server.errors import ApiError, QueueFullError
from pyqe.server.guard import Guard
from pyqe.server.limits import Limits
from pyqe.server.metrics import Metrics
from pyqe.server.model import ServedModel
from pyqe.server.requests import ChatRequest, CompletionRequest, Generation, ScoreRequest, chat
from pyqe.server.responses import JsonResponse, dumps
from pyqe.server.rows import News, Sampling, ScoreNews, ScoreRow, Token, WriteRow
from pyqe.server.waiting import Answers, Deadline

T = TypeVar("T")

_COMPLETION_TOKENS = 16  # OpenAI's default


def create_app(
    estimator: QualityEstimator, *, name: str, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """An ASGI application that serves a model; its lifespan starts and stops the thread that runs it.

    Args:
        estimator: model, tokenizer and head; nobody else may use them meanwhile.
        name: of the model, for clients.
        limits: of everything.
        api_key: that requests below /v1 must bring as a bearer token; None for no key.

    Raises:
        NotImplementedError: the model generates in a way that cannot be scored.
        ValueError: the model changes its logits in a way that is not known.

    Example:
        See docs/serving.md.
    """
    model = ServedModel(estimator.model, estimator.tokenizer, estimator.head)
    model.try_out()
    service = Service(model, name, limits or Limits())
    app = FastAPI(title="pyqe", openapi_url=None, lifespan=service.lifespan)
    app.add_middleware(Guard, limits=service.limits, metrics=service.metrics, api_key=api_key)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.post("/v1/completions")(service.completions)
    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/score")(service.score)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{model:path}")(service.model_card)
    app.get("/health")(service.health)
    app.get("/metrics")(service.metrics_text)
    return app


class Service:
    """The routes."""

    engine: Engine

    def __init__(self, model: ServedModel, name: str, limits: Limits) -> None:
        self.model = model
        self.name = name
        self.limits = limits
        self.metrics = Metrics()
        self.created = int(time.time())
        self.room = min(model.context, limits.batch_tokens)
        self._token_text = cache(lambda token_id: str(model.tokenizer.decode([token_id])))  # there are V of them

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """While requests are taken."""
        self._tokenizing = CapacityLimiter(1)
        self.engine = Engine(self.model, self.limits, self.metrics.batch_rows.observe)
        self.metrics.watch_queue(lambda: self.engine.waiting)
        try:
            yield
        finally:
            await to_thread.run_sync(self.engine.close)

    # --- routes

    async def health(self) -> Response:
        ready = self.engine.is_ready
        return JsonResponse({"status": "ok" if ready else "stopping"}, 200 if ready else 503)

    async def metrics_text(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        return JsonResponse({"object": "list", "data": [self._card()]})

    async def model_card(self, model: str) -> Response:
        self._check_model(model)
        return JsonResponse(self._card())

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        deadline = Deadline(self.limits.seconds)
        self._check_model(body.model)
        self._check_rows(len(body.prompts) * body.n, "prompt")
        prompts = [
            self._checked_ids(prompt)
            if isinstance(prompt, list)
            else await self._tokenized("prompt", deadline, self.model.prompt_ids, prompt)
            for prompt in body.prompts
        ]
        top = body.logprobs or 0
        rows = self._rows(body, prompts, body.max_tokens, _COMPLETION_TOKENS, top, "prompt")
        form = self._form(CompletionForm, with_logprobs=body.logprobs is not None)
        return await self._answer(form, body, rows, sum(map(len, prompts)), deadline, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        deadline = Deadline(self.limits.seconds)
        self._check_model(body.model)
        self._check_rows(body.n, "n")
        if not getattr(self.model.tokenizer, "chat_template", None):
            raise ApiError(400, "the model has no chat template; use /v1/completions", param="messages")
        prompt = await self._tokenized("messages", deadline, self.model.prompt_ids, chat(body.messages))
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        rows = self._rows(body, [prompt], wanted, self.limits.max_tokens, body.top_logprobs, "messages")
        form = self._form(ChatForm, with_logprobs=body.logprobs)
        return await self._answer(form, body, rows, len(prompt), deadline, request)

    async def score(self, body: ScoreRequest, request: Request) -> Response:
        deadline = Deadline(self.limits.seconds)
        self._check_model(body.model)
        self._check_rows(len(body.pairs), "texts")
        signals = self._signals(body.signals)
        rows = []
        for index, (text, prompt) in enumerate(body.pairs):
            if prompt is None and self.model.model.config.is_encoder_decoder:
                raise ApiError(400, "prompt: expected the source of every text", param="prompt")
            row = await self._tokenized("prompt", deadline, self.model.score_row, index, text, prompt, signals)
            if row.reads > self.room:
                raise _too_long("text", f"{row.reads} tokens with its prompt", self.room)
            rows.append(row)
        answers = self._submit(rows, deadline)
        found: list[ScoreNews] = sorted(await answers.all(request.receive), key=lambda news: news.index)
        results = [news.scored.to_dict() for news in found]
        for row, result in zip(rows, results, strict=True):
            self.metrics.add(result["quality"], scored=row.reads)
        usage = usage_of(sum(row.reads for row in rows), 0)
        return JsonResponse({"object": "list", "model": self.name, "results": results, "usage": usage})

    # --- what requests ask for

    def _card(self) -> Json:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "pyqe"}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(404, f"no model {name!r:.80}; this is {self.name!r}", param="model", code="model_not_found")

    def _check_rows(self, count: int, param: str) -> None:
        most = min(self.limits.rows, self.limits.queue_size)
        if count > most:
            raise ApiError(400, f"expected at most {most} answers or texts in a request, got {count}", param=param)

    def _checked_ids(self, ids: list[int]) -> list[int]:
        size = self.model.lm_head.vocab_size
        if not all(0 <= token < size for token in ids):
            raise ApiError(400, f"prompt: expected token ids in [0, {size})", param="prompt")
        return ids

    async def _tokenized(self, param: str, deadline: Deadline, tokenize: Callable[..., T], *arguments: Any) -> T:
        """What a function makes of texts, on another thread; one request after the other, as they came."""
        if self._tokenizing.statistics().tasks_waiting >= self.limits.queue_size:
            raise QueueFullError
        try:
            with fail_after(deadline.time - current_time()):
                return await to_thread.run_sync(tokenize, *arguments, limiter=self._tokenizing)
        except TimeoutError as error:
            raise ApiError(504, f"not tokenized within {deadline.seconds:g} seconds") from error
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            raise ApiError(400, f"{param}: the model's tokenizer refuses it: {error}", param=param) from error

    def _signals(self, wanted: Sequence[Signal] | None) -> tuple[Signal, ...] | None:
        if wanted is None:
            return None
        if "quality" in wanted and self.model.head is None:
            raise ApiError(400, "signals: 'quality' needs a head, and the server has none", param="signals")
        return tuple(signal for signal in SIGNALS if signal in wanted)

    def _rows(
        self, body: Generation, prompts: Sequence[list[int]], wanted: int | None, default: int, top: int, param: str
    ) -> list[WriteRow]:
        """A row for each answer, those to one prompt together."""
        rows: list[WriteRow] = []
        for prompt in (prompt for prompt in prompts for _ in range(body.n)):
            sampling = Sampling(
                max_tokens=self._max_tokens(len(prompt), wanted, default, param),
                temperature=body.temperature,
                top_p=body.top_p,
                seed=body.seed,
                stop=body.stop_strings,
                top_logprobs=top,
                stream=body.stream,
            )
            rows.append(self.model.write_row(len(rows), prompt, sampling))
        return rows

    def _max_tokens(self, reads: int, wanted: int | None, default: int, param: str) -> int:
        """How long an answer to a prompt of ``reads`` tokens may become."""
        if wanted is not None and wanted > self.limits.max_tokens:
            message = f"expected at most {self.limits.max_tokens} tokens of an answer, got {wanted}"
            raise ApiError(400, message, param="max_tokens")
        is_seq2seq = self.model.model.config.is_encoder_decoder  # whose prompt and answer have a context each
        room = min(self.room, self.limits.batch_tokens - reads) if is_seq2seq else self.room - reads
        if reads > self.room or room < (wanted or 1):
            raise _too_long(param, f"{reads} tokens and {wanted or 1} of the answer", self.room)
        return wanted or min(default, self.limits.max_tokens, room)

    def _form(self, kind: type[Form], *, with_logprobs: bool) -> Form:
        with_quality = self.model.head is not None
        return kind(self.name, self._token_text, with_quality=with_quality, with_logprobs=with_logprobs)

    # --- answers

    def _submit(self, rows: Sequence[WriteRow] | Sequence[ScoreRow], deadline: Deadline) -> Answers:
        answers = Answers(rows, deadline)
        self.engine.submit(rows)
        return answers

    async def _answer(
        self,
        form: Form,
        body: Generation,
        rows: Sequence[WriteRow],
        prompt_tokens: int,
        deadline: Deadline,
        request: Request,
    ) -> Response:
        answers = self._submit(rows, deadline)
        self.metrics.add(None, prompt=prompt_tokens)
        if body.stream:
            events = self._events(form, answers, len(rows), prompt_tokens, body.stream_options.include_usage)
            return StreamingResponse(
                events,
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
                background=BackgroundTask(answers.cancel),  # of a client that left before the first event
            )
        found: list[News] = sorted(await answers.all(request.receive), key=lambda news: news.index)

        def build() -> Response:
            choices = [form.choice(news.index, news.tokens, news.finish_reason) for news in found]
            for news, choice in zip(found, choices, strict=True):
                self._count(news, choice)
            return JsonResponse(form.whole(choices, usage_of(prompt_tokens, sum(news.written for news in found))))

        return await to_thread.run_sync(build)  # long answers with alternatives take seconds

    async def _events(
        self, form: Form, answers: Answers, count: int, prompt_tokens: int, include_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events of a streamed answer."""
        no_usage: dict[str, Json | None] = {"usage": None} if include_usage else {}
        so_far: list[list[Token]] = [[] for _ in range(count)]
        offsets, written = [0] * count, 0
        for index in range(count):
            opening = form.opening(index)
            if opening is not None:
                yield _event(form.chunk([opening], **no_usage))
        try:
            async with aclosing(answers.news()) as found:
                async for news in found:
                    i = news.index
                    so_far[i] += news.tokens
                    choice = form.delta(i, news.tokens, news.finish_reason, so_far[i], offsets[i])
                    yield _event(form.chunk([choice], **no_usage))
                    offsets[i] += len(text_of(news.tokens))
                    if news.is_last:
                        written += news.written
                        self._count(news, choice)
        except ApiError as error:  # too late for a status
            yield _event(error.to_dict())
        else:
            if include_usage:
                yield _event(form.chunk([], usage=usage_of(prompt_tokens, written)))
        yield "data: [DONE]\n\n"

    def _count(self, news: News, choice: Json) -> None:
        self.metrics.add((choice["quality"] or {}).get("sequence"), completion=news.written)


def _event(content: Json) -> str:
    return f"data: {dumps(content)}\n\n"


def _too_long(param: str, what: str, room: int) -> ApiError:
    message = f"{param}: {what} do not fit the {room} that there is room for"
    return ApiError(400, message, param=param, code="context_length_exceeded")


# --- errors


async def _api_error(request: Request, error: Any) -> Response:
    return JsonResponse(error.to_dict(), error.status, error.headers)


async def _http_error(request: Request, error: Any) -> Response:
    return await _api_error(request, ApiError(error.status_code, str(error.detail), headers=error.headers))


async def _invalid(request: Request, error: Any) -> Response:
    problems = [([str(part) for part in item["loc"][1:]], item) for item in error.errors()]
    param = problems[0][0][0] if problems[0][0] and problems[0][1]["type"] != "json_invalid" else None
    # of an option that may be several things, what each of them lacks
    messages = [_problem(place, item) for place, item in problems if place[:1] == problems[0][0][:1]]
    return await _api_error(request, ApiError(400, "; ".join(messages[:4]), param=param))


def _problem(place: Sequence[str], problem: Json) -> str:
    what = "this option is not supported" if problem["type"] == "extra_forbidden" else problem["msg"]
    return ": ".join([".".join(place), what] if place else [what])
