"""pyqe serve: what it answers, what it refuses, and that requests do not get into each other's way."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tiny
import torch
import uvicorn
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from pyqe import QualityEstimator
from pyqe.cli import main
from pyqe.server.app import create_app
from pyqe.server.engine import Engine
from pyqe.server.limits import Limits
from pyqe.server.model import ServedModel
from pyqe.server.rows import Row, Sampling, ScoreRow, StoppedText, Token, WriteRow

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[1]
MESSAGES = [{"role": "user", "content": "A dog"}]
ROUNDING = 1e-5


def estimator(kind: str = "llama", *, with_head: bool = True, **options: Any) -> QualityEstimator:
    model = tiny.model(kind, **options)
    tokenizer = tiny.tokenizer_with(chat_template=tiny.CHAT_TEMPLATE)
    return QualityEstimator(model, tokenizer, tiny.head(model, tokenizer) if with_head else None)


@contextmanager
def serving(
    served: QualityEstimator, limits: Limits | None = None, *, grace: int = 10, root_path: str = "", **options: Any
) -> Iterator[httpx.Client]:
    """A client of a server on a thread of this process."""
    app = create_app(served, name="tiny", limits=limits, **options)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # takes connections before the server does
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=grace, root_path=root_path)
        )
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def offline() -> QualityEstimator:
    return estimator()


@pytest.fixture(scope="module")
def client(offline: QualityEstimator) -> Iterator[httpx.Client]:
    limits = Limits(batch_size=8, max_tokens=32, rows=8, body_bytes=20_000, body_seconds=2)
    with serving(estimator(), limits) as found:
        yield found


def complete(client: httpx.Client, path: str = "completions", **options: Any) -> dict[str, Any]:
    """An answer, greedy if nothing else is said."""
    response = client.post(f"/v1/{path}", json={"temperature": 0, **options})
    assert response.status_code == 200, response.text
    return response.json()


def events(client: httpx.Client, path: str = "completions", **options: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed answer."""
    response = client.post(f"/v1/{path}", json={"temperature": 0, "stream": True, **options})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def check_quality(choice: dict[str, Any], expected: Any) -> None:
    np.testing.assert_allclose(choice["quality"]["tokens"], expected.token_quality, atol=ROUNDING)
    assert choice["quality"]["sequence"] == pytest.approx(expected.quality, abs=ROUNDING)


# --- what is answered


def test_completions_are_those_of_generate(client: httpx.Client, offline: QualityEstimator) -> None:
    prompts = ["The cat", "A dog, and", ""]
    answer = complete(client, prompt=prompts, max_tokens=7, logprobs=0, model="tiny")
    expected = offline.generate(prompts, max_new_tokens=7)
    for choice, scored in zip(answer["choices"], expected, strict=True):
        assert choice["text"] == scored.text == "".join(choice["logprobs"]["tokens"])
        check_quality(choice, scored)
        np.testing.assert_allclose(np.exp(choice["logprobs"]["token_logprobs"]), scored.token_prob, atol=ROUNDING)
        assert choice["finish_reason"] == {"eos": "stop"}.get(scored.finish_reason, scored.finish_reason)
        places = zip(choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], strict=True)
        assert all(choice["text"][place:].startswith(token) for place, token in places)
    read = sum(len(offline.tokenizer(prompt)["input_ids"]) or 1 for prompt in prompts)
    written = sum(len(scored.token_ids) + (scored.finish_reason == "eos") for scored in expected)
    assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")


def test_prompts_may_be_token_ids(client: httpx.Client, offline: QualityEstimator) -> None:
    text = complete(client, prompt="The cat")["choices"][0]["text"]
    ids = offline.tokenizer("The cat")["input_ids"]
    assert complete(client, prompt=ids)["choices"][0]["text"] == text
    assert [choice["text"] for choice in complete(client, prompt=[ids, ids])["choices"]] == [text, text]


def test_chat_is_that_of_generate(client: httpx.Client, offline: QualityEstimator) -> None:
    expected = offline.generate([MESSAGES], max_new_tokens=6)[0]
    parts = [{"role": "user", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "dog"}]}]
    for messages, limit in ((MESSAGES, "max_tokens"), (parts, "max_completion_tokens")):
        answer = complete(client, "chat/completions", messages=messages, **{limit: 6})
        choice = answer["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
        assert (choice["logprobs"], answer["object"]) == (None, "chat.completion")
        check_quality(choice, expected)
    empty = complete(client, "chat/completions", messages=MESSAGES, stop=expected.text[0])["choices"][0]
    assert (empty["message"]["content"], empty["quality"]) == ("", {"sequence": None, "tokens": []})
    rest = complete(client, "chat/completions", messages=MESSAGES)
    assert rest["choices"][0]["finish_reason"] == "stop" or rest["usage"]["completion_tokens"] == 32


def test_alternatives_are_the_most_probable_tokens(client: httpx.Client, offline: QualityEstimator) -> None:
    options: dict[str, Any] = {"max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    content = complete(client, "chat/completions", messages=MESSAGES, **options)["choices"][0]["logprobs"]["content"]
    ids = offline.tokenizer(
        offline.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True),
        add_special_tokens=False, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        most = offline.model(**ids).logits[0, -1].log_softmax(-1).topk(3)
    np.testing.assert_allclose([item["logprob"] for item in content[0]["top_logprobs"]], most.values, atol=ROUNDING)
    tokens = [offline.tokenizer.decode([i]) for i in most.indices]
    assert [item["token"] for item in content[0]["top_logprobs"]] == tokens
    assert all(item["top_logprobs"][0]["logprob"] == pytest.approx(item["logprob"]) for item in content)
    assert b"".join(bytes(item["bytes"]) for item in content).decode() == "".join(item["token"] for item in content)
    top = complete(client, prompt="x", logprobs=2, max_tokens=3)["choices"][0]["logprobs"]["top_logprobs"]
    assert all(len(item) <= 2 for item in top)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_is_the_whole_in_pieces(client: httpx.Client, path: str) -> None:
    is_chat = path != "completions"
    options: dict[str, Any] = (
        {"messages": MESSAGES, "logprobs": True} if is_chat else {"prompt": "The cat", "logprobs": 0}
    )
    options |= {"max_tokens": 9, "n": 2, "temperature": 1.0, "seed": 5, "stop": ["e", "zzz"]}
    whole = complete(client, path, **options)
    *chunks, last = events(client, path, stream_options={"include_usage": True}, **options)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    for expected in whole["choices"]:
        pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == expected["index"]]
        if is_chat:
            assert pieces.pop(0)["delta"] == {"role": "assistant", "content": ""}
            assert "".join(piece["delta"]["content"] for piece in pieces) == expected["message"]["content"]
        else:
            assert "".join(piece["text"] for piece in pieces) == expected["text"]
        for name in ("content",) if is_chat else ("tokens", "text_offset"):
            parts = chain.from_iterable(piece["logprobs"][name] for piece in pieces)
            wanted = expected["logprobs"][name]
            assert [part["token"] if is_chat else part for part in parts] == [
                part["token"] if is_chat else part for part in wanted
            ]
        qualities = [score for piece in pieces for score in piece["quality"]["tokens"]]
        np.testing.assert_allclose(qualities, expected["quality"]["tokens"], atol=ROUNDING)
        *before, end = pieces
        assert all(piece["finish_reason"] is None and piece["quality"]["sequence"] is None for piece in before)
        assert end["finish_reason"] == expected["finish_reason"]
        assert end["quality"]["sequence"] == pytest.approx(expected["quality"]["sequence"], abs=ROUNDING)


def test_scores_are_those_of_score(client: httpx.Client, offline: QualityEstimator) -> None:
    texts, prompts = ["The cat sat", "", "Héllo 🎉"], ["A", None, MESSAGES]
    body = {"texts": texts, "prompts": prompts}
    response = client.post("/v1/score", json=body).json()
    assert response["results"] == [json.loads(json.dumps(item.to_dict())) for item in offline.score(texts, prompts)]
    one = client.post("/v1/score", json={"text": "The cat", "signals": ["prob", "entropy"]}).json()
    assert one["results"] == [offline.score(["The cat"], signals=["entropy", "prob"])[0].to_dict()]


def test_models_health_and_metrics(client: httpx.Client) -> None:
    before = client.get("/metrics").text
    complete(client, prompt="x", max_tokens=3)
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["object"] == "model"
    assert client.get("/health").json() == {"status": "ok"}

    def value(text: str, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, flags=re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    after = client.get("/metrics").text
    for name, growth in {
        'pyqe_requests_total{route="/v1/completions",status="200"}': 1,
        'pyqe_tokens_total{kind="completion"}': 3,
        'pyqe_tokens_total{kind="prompt"}': 1,
        "pyqe_batch_rows_count": 1,
        "pyqe_sequence_quality_count": 1,
        'pyqe_request_seconds_count{route="/v1/completions"}': 1,
    }.items():
        assert value(after, name) == value(before, name) + growth, name
    assert "pyqe_waiting_rows 0.0" in after


def test_without_a_head_there_is_no_quality() -> None:
    with serving(estimator("gpt2", with_head=False)) as client:
        choice = complete(client, prompt="The cat", logprobs=0)["choices"][0]
        assert choice["quality"] is None
        assert len(choice["logprobs"]["tokens"]) == 16
        assert all(chunk["choices"][0]["quality"] is None for chunk in events(client, prompt="The cat"))
        empty = complete(client, prompt="The cat", stop=choice["text"][0])["choices"][0]
        assert (empty["text"], empty["quality"]) == ("", None)
        assert "token_quality" not in client.post("/v1/score", json={"text": "a"}).json()["results"][0]
        refused = client.post("/v1/score", json={"text": "a", "signals": ["quality"]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "signals")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders(kind: str) -> None:
    options = {"forced_bos_token_id": 7} if kind == "bart" else {}
    served = estimator(kind)
    served.model.generation_config.update(**options)
    expected = served.generate(["The cat", "A"], max_new_tokens=6)
    with serving(served) as client:
        choices = complete(client, prompt=["The cat", "A"], max_tokens=6)["choices"]
        for choice, scored in zip(choices, expected, strict=True):
            assert choice["text"] == scored.text
            check_quality(choice, scored)
        assert client.post("/v1/score", json={"text": "a"}).json()["error"]["param"] == "prompt"
        assert client.post("/v1/score", json={"text": "a", "prompt": "b"}).status_code == 200


def test_the_models_own_generation_config_is_kept_where_requests_say_nothing() -> None:
    served = estimator()
    served.model.generation_config.update(repetition_penalty=3.0, do_sample=True, top_k=1, temperature=0.1)
    expected = served.generate(["The cat"], max_new_tokens=9, do_sample=False)[0]
    with serving(served) as client:
        assert complete(client, prompt="The cat", max_tokens=9)["choices"][0]["text"] == expected.text


def test_broken_weights_give_null_and_not_nan() -> None:
    served = estimator()
    with torch.no_grad():
        served.model.get_output_embeddings().weight[5] = torch.nan
    with serving(served) as client:
        for temperature in (0, 1):
            choice = complete(client, prompt="x", logprobs=1, max_tokens=2, temperature=temperature)["choices"][0]
            assert choice["quality"]["sequence"] is None
            assert choice["logprobs"]["token_logprobs"][0] is None


# --- batches


@contextmanager
def one_batch(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[list[list[int]]]:
    """Lets the engine work when so many rows wait; yields the lengths in batches to come."""
    batches: list[list[int]] = []
    write, take = ServedModel.write, Engine._take

    def counted_write(self: ServedModel, rows: Sequence[WriteRow]) -> None:
        batches.append([row.reads for row in rows])
        write(self, rows)

    def patient_take(self: Engine) -> Sequence[Row]:
        return take(self) if len(self._queue) >= count or batches else ()

    with monkeypatch.context() as patch:
        patch.setattr(ServedModel, "write", counted_write)
        patch.setattr(Engine, "_take", patient_take)
        yield batches


def test_rows_of_a_batch_do_not_know_of_each_other(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": "The cat", "max_tokens": 20, "temperature": 0},
        {"prompt": "one two three four five six", "max_tokens": 3, "temperature": 1.5, "seed": 1},
        {"prompt": "x", "max_tokens": 12, "temperature": 0.7, "top_p": 0.5, "seed": 2, "n": 2, "logprobs": 3},
        {"prompt": "A dog", "max_tokens": 25, "temperature": 0, "stop": ["o"]},
        {"prompt": [5, 6], "max_tokens": 1, "temperature": 1, "seed": 3},
    ]

    def answer(request: dict[str, Any]) -> Any:
        response = client.post("/v1/completions", json=request).json()
        return [(choice["text"], choice["finish_reason"]) for choice in response["choices"]], response["usage"]

    alone = [answer(request) for request in requests]
    assert alone == [answer(request) for request in requests]  # seeds
    together: dict[int, Any] = {}
    with one_batch(monkeypatch, 6) as batches:
        threads = [
            threading.Thread(target=lambda i=i, request=request: together.update({i: answer(request)}))
            for i, request in enumerate(requests)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [len(batch) for batch in batches] == [6]
    assert [together[i] for i in range(len(requests))] == alone


def test_batches_keep_to_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(batch_size=3, batch_tokens=24, rows=8)
    with serving(estimator(), limits) as client:
        with one_batch(monkeypatch, 8) as batches:
            complete(client, prompt=[[5] * 2] * 8, max_tokens=2)  # 4 tokens each
        assert batches == [[2, 2, 2], [2, 2, 2], [2, 2]]
        with one_batch(monkeypatch, 4) as batches:
            complete(client, prompt=[[5] * 2, [5] * 8, [5] * 10, [5] * 9], max_tokens=2)
        assert batches == [[2, 8], [10, 9]]
        with one_batch(monkeypatch, 5) as batches:  # the oldest first, with those of about its length
            complete(client, prompt=[[5] * 9, [5] * 2, [5] * 8, [5] * 10, [5] * 2], max_tokens=2)
        assert batches == [[9, 8], [2, 2], [10]]
        too_long = client.post("/v1/completions", json={"prompt": [5] * 20, "max_tokens": 5})
        assert too_long.json()["error"]["code"] == "context_length_exceeded"


def test_a_row_that_is_done_does_not_wait_for_its_batch(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    short_is_done = threading.Event()
    add = WriteRow.add

    def held_add(self: WriteRow, token: Token, **options: Any) -> None:
        if self.written == 4:
            assert short_is_done.wait(60)
        add(self, token, **options)

    monkeypatch.setattr(WriteRow, "add", held_add)
    with one_batch(monkeypatch, 2) as batches:
        thread = threading.Thread(target=complete, args=[client], kwargs={"prompt": "x", "max_tokens": 9})
        thread.start()
        complete(client, prompt="The cat", max_tokens=2)
        short_is_done.set()
        thread.join()
    assert [len(batch) for batch in batches] == [2]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.6)):
        sampling = Sampling(max_tokens=1, temperature=temperature, top_p=top_p, seed=11)
        row = WriteRow(index=0, reads=1, prompt_ids=[1], sampling=sampling, tokenizer=tiny.tokenizer())
        probs = (logits[0] / temperature).softmax(-1).double()
        order = probs.argsort(descending=True)
        before = probs[order].cumsum(0) - probs[order]
        probs[order[before >= top_p]] = 0.0
        expected = (2000 * probs / probs.sum()).numpy()
        drawn = torch.cat([row.draw(torch.zeros(1, 1), logits) for _ in range(2000)])
        counts = torch.bincount(drawn, minlength=5).numpy()
        kept = expected > 0
        assert counts[~kept].sum() == 0
        assert chisquare(counts[kept], expected[kept]).pvalue > 1e-3


class Pieces:
    """A decoder whose tokens are places in a list."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def add(self, token_id: int) -> str:
        return self.pieces[token_id]


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    text = StoppedText(Pieces(pieces), stop)  # type: ignore[arg-type]
    given_out: list[Token] = []
    ends = []
    for i in range(len(pieces)):
        given_out += text.add(Token(i, 1.0, 0.5, []))
        if text.stopped:
            break
        ends.append("".join(token.text for token in given_out))
    given_out += text.rest()
    whole = "".join(pieces[: i + 1]) if pieces else ""
    expected = whole[: min((whole.find(item) for item in stop if item in whole), default=len(whole))]
    assert "".join(token.text for token in given_out) == expected
    assert text.stopped == any(item in whole for item in stop)
    assert all(expected.startswith(end) for end in ends)  # nothing was given out that had to be taken back
    assert [token.id for token in given_out] == list(range(len(given_out)))


# --- what is refused


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("completions", {}, 400, "prompt"),
        ("completions", {"prompt": 5}, 400, "prompt"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": [300]}, 400, "prompt"),
        ("completions", {"prompt": [-1]}, 400, "prompt"),
        ("completions", {"prompt": "x", "model": "gpt-4"}, 404, "model"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"prompt": "x", "max_tokens": 33}, 400, "max_tokens"),
        ("completions", {"prompt": "x", "max_tokens": "3"}, 400, "max_tokens"),
        ("completions", {"prompt": "a b c d " * 50}, 400, "prompt"),
        ("completions", {"prompt": [5] * 40, "max_tokens": 30}, 400, "prompt"),
        ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "x", "top_p": 0}, 400, "top_p"),
        ("completions", {"prompt": "x", "n": 9}, 400, "prompt"),
        ("completions", {"prompt": "x", "stop": ["a"] * 5}, 400, "stop"),
        ("completions", {"prompt": "x", "stop": ""}, 400, "stop"),
        ("completions", {"prompt": "x", "logprobs": 6}, 400, "logprobs"),
        ("completions", {"prompt": "x", "echo": True}, 400, "echo"),
        ("completions", {"prompt": "x", "best_of": 2}, 400, "best_of"),
        ("completions", {"prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias"),
        ("completions", {"prompt": "x", "presence_penalty": 1}, 400, "presence_penalty"),
        ("completions", {"prompt": "x", "tokenizer_path": "/etc/passwd"}, 400, "tokenizer_path"),
        ("completions", {"prompt": "\ud800"}, 400, "prompt"),
        ("completions", {"prompt": "x", "\ud800": 1}, 400, None),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, 400, "messages"),
        ("chat/completions", {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "tools"),
        ("chat/completions", {"messages": MESSAGES, "response_format": {"type": "json"}}, 400, "response_format"),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, 400, None),
        ("score", {}, 400, None),
        ("score", {"text": "a", "texts": ["a"]}, 400, None),
        ("score", {"texts": ["a"], "prompts": []}, 400, None),
        ("score", {"text": "a", "signals": ["x"]}, 400, "signals"),
        ("score", {"texts": ["a"] * 9}, 400, "texts"),
        ("score", {"text": "one two " * 50}, 400, "text"),
        ("nothing", {}, 404, None),
    ],
)  # fmt: skip
def test_bad_requests(client: httpx.Client, path: str, body: dict[str, Any], status: int, param: str | None) -> None:
    content = json.dumps(body).encode()
    response = client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b'"x"', b"[" * 10_000, b"\xff\xfe", b'{"prompt": "x", "temperature": NaN}',
     b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}", b'{"prompt": "x", "stop": ' + b"[" * 900 + b"]" * 900 + b"}"],
)  # fmt: skip
def test_bad_json(client: httpx.Client, body: bytes) -> None:
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_options_that_ask_for_nothing_are_taken(client: httpx.Client) -> None:
    plain = complete(client, prompt="x")["choices"]
    neutral = {"best_of": 1, "echo": False, "logit_bias": None, "presence_penalty": 0, "suffix": None, "user": "me"}
    assert complete(client, prompt="x", **neutral)["choices"] == plain
    tools: dict[str, Any] = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "metadata": {"a": "b"},
    }
    complete(client, "chat/completions", messages=[*MESSAGES, {**MESSAGES[0], "name": None}], **tools)


def test_a_model_without_a_chat_template() -> None:
    served = estimator()
    served.tokenizer.chat_template = None
    with serving(served) as client:
        response = client.post("/v1/chat/completions", json={"messages": MESSAGES})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def exchange(client: httpx.Client, *parts: bytes, shut: bool = False) -> bytes:
    """What the server says to these bytes."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        if shut:
            return b""
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def head(*lines: str) -> bytes:
    fields = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *lines]
    return "\r\n".join([*fields, "", ""]).encode()


def test_large_bodies(client: httpx.Client) -> None:
    assert exchange(client, head("Content-Length: 999999999")).startswith(b"HTTP/1.1 413 ")
    chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
    assert exchange(client, head("Transfer-Encoding: chunked"), chunk, chunk, chunk).startswith(b"HTTP/1.1 413 ")


def test_slow_bodies(client: httpx.Client) -> None:
    assert exchange(client, head("Content-Length: 100"), b'{"prompt"').startswith(b"HTTP/1.1 408 ")
    exchange(client, head("Content-Length: 100"), b'{"prompt"', shut=True)
    assert exchange(client, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    complete(client, prompt="x")


def test_api_key_below_a_root_path() -> None:
    with serving(estimator(), api_key="sesame", root_path="/api") as client:
        assert client.post("/v1/completions", json={"prompt": "The cat"}).status_code == 401


def test_the_key() -> None:
    with serving(estimator(), api_key="sésame") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {b"Authorization": "sésame".encode()}):
            response = client.post("/v1/completions", content=b"x" * 100, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        right = {b"Authorization": "Bearer sésame".encode()}
        assert client.post("/v1/completions", json={"prompt": "x"}, headers=right).status_code == 200


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event, list[WriteRow]]]:
    """Holds every first token back: events for its coming and for going on, and the rows that were held."""
    came, go_on, rows = threading.Event(), threading.Event(), []
    add = WriteRow.add

    def held_add(self: WriteRow, token: Token, **options: Any) -> None:
        if self.written == 0 and self.prompt_ids != [1]:  # not that of the trial
            rows.append(self)
            came.set()
            assert go_on.wait(60)
        add(self, token, **options)

    with monkeypatch.context() as patch:
        patch.setattr(WriteRow, "add", held_add)
        try:
            yield came, go_on, rows
        finally:
            go_on.set()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within half a minute")


def test_the_queue_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(estimator(), Limits(batch_size=1, queue_size=2)) as client, held(monkeypatch) as (came, go_on, _):
        threads = [threading.Thread(target=complete, args=[client], kwargs={"prompt": "x"}) for _ in range(3)]
        threads[0].start()
        assert came.wait(60)
        for thread in threads[1:]:
            thread.start()
        until(lambda: "pyqe_waiting_rows 2.0" in client.get("/metrics").text)
        refused = client.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        go_on.set()
        for thread in threads:
            thread.join()
        complete(client, prompt="x")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    with serving(estimator(), Limits(seconds=3)) as client:
        with held(monkeypatch) as (_, go_on, rows):
            late = {"prompt": "x", "max_tokens": 50, "stream": stream}
            response = client.post("/v1/completions", json=late)
            assert (response.status_code, "within 3 seconds" in response.text) == (200 if stream else 504, True)
            go_on.set()
            until(lambda: rows[0].done)
        assert rows[0].written < 50


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_rows(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 30, "temperature": 0, "stream": stream}).encode()
    with held(monkeypatch) as (came, go_on, rows):
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(head(f"Content-Length: {len(body)}") + body)
            assert came.wait(60)
        until(lambda: rows[0].cancelled)
        go_on.set()
        until(lambda: rows[0].done)
        assert rows[0].written < 30
    complete(client, prompt="x")


def test_time_is_that_of_all_texts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    score_row = ServedModel.score_row

    def slow(*arguments: Any, **options: Any) -> ScoreRow:
        time.sleep(0.4)
        return score_row(*arguments, **options)

    monkeypatch.setattr(ServedModel, "score_row", slow)
    with serving(estimator(), Limits(seconds=1)) as client:
        response = client.post("/v1/score", json={"texts": ["x"] * 5})
        assert (response.status_code, "within 1 seconds" in response.text) == (504, True)


def test_a_batch_that_fails_does_not_end_the_server(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ServedModel, rows: Sequence[WriteRow]) -> None:
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(ServedModel, "write", fail)
        response = client.post("/v1/completions", json={"prompt": "x"})
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert "memory" not in response.text
        assert "error" in events(client, prompt="x")[-1]
    complete(client, prompt="x")


def test_stopping_refuses_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(estimator(), name="tiny")

    def go_on_when_refused() -> None:
        until(lambda: rows[0].cancelled)
        go_on.set()

    async def stop_at_once() -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            async with app.router.lifespan_context(app):
                asked = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 40}))
                await asyncio.to_thread(came.wait, 60)
                threading.Thread(target=go_on_when_refused).start()
            assert (await asked).status_code == 503
            assert (await client.get("/health")).status_code == 503
            return (await client.post("/v1/completions", json={"prompt": "x"})).status_code

    with held(monkeypatch) as (came, go_on, rows):
        assert asyncio.run(stop_at_once()) == 503
    assert rows[0].written < 40


def test_a_stop_that_takes_too_long_cuts_answers_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as (came, go_on, rows):
        lost: list[Exception] = []

        def ask() -> None:
            try:
                complete(client, prompt="x", max_tokens=40)
            except httpx.HTTPError as error:
                lost.append(error)

        asking = threading.Thread(target=ask)

        def go_on_when_cut_off() -> None:
            until(lambda: rows[0].cancelled)
            go_on.set()

        with serving(estimator(), grace=1) as client:
            asking.start()
            assert came.wait(60)
            threading.Thread(target=go_on_when_cut_off).start()
        asking.join()
        assert (len(lost), rows[0].written) == (1, 1)


# --- under load


def test_load(offline: QualityEstimator) -> None:
    """A hundred requests of twenty clients, and beside them what no server wants; every answer is the right one."""
    generator = random.Random(4)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "one", "two", "three", "four", "five"]
    prompts = [" ".join(generator.choices(words, k=generator.randint(1, 5))) + str(i) for i in range(100)]
    lengths = [generator.randint(1, 20) for _ in prompts]
    expected = [
        offline.score([prompt], ["x"])[0] if i % 4 == 3 else offline.generate([prompt], max_new_tokens=length)[0]
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    limits = Limits(batch_size=8, body_bytes=10_000, body_seconds=3)
    is_json = {"content-type": "application/json"}

    async def ask(client: httpx.AsyncClient, i: int) -> None:
        prompt = prompts[i]
        if i % 4 == 3:
            response = await client.post("/v1/score", json={"text": prompt, "prompt": "x"})
            assert response.json()["results"] == [expected[i].to_dict()]
            return
        body = {"prompt": prompt, "max_tokens": lengths[i], "temperature": 0}
        if i % 4 == 2:
            response = await client.post("/v1/completions", json={**body, "stream": True})
            *lines, _, _ = response.text.split("\n\n")
            pieces = [json.loads(line[6:])["choices"][0] for line in lines]
            choice = {**pieces[-1], "text": "".join(piece["text"] for piece in pieces)}
            choice["quality"]["tokens"] = [score for piece in pieces for score in piece["quality"]["tokens"]]
        else:
            choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        assert choice["text"] == expected[i].text
        check_quality(choice, expected[i])

    async def bother(client: httpx.AsyncClient) -> None:
        for body, status in ((b"{", 400), (b'{"prompt": 1}', 400), (b" " * 9000 + b"x", 400), (b"a" * 100_000, 413)):
            try:
                response = await client.post("/v1/completions", content=body, headers=is_json)
            except (httpx.WriteError, httpx.ReadError):  # it hung up before all was sent
                assert status == 413
            else:
                assert response.status_code == status
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(head("Content-Length: 100") + b"{")
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()

    async def all_of_them(url: httpx.URL) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=90) as client:
            todo = list(range(len(prompts)))

            async def work() -> None:
                while todo:
                    await ask(client, todo.pop())

            await asyncio.gather(*(work() for _ in range(20)), *(bother(client) for _ in range(5)))

    with serving(estimator(), limits) as client:
        asyncio.run(all_of_them(client.base_url))
        counts = client.get("/metrics").text
    assert 'pyqe_requests_total{route="/v1/completions",status="200"} 75.0' in counts
    assert 'pyqe_requests_total{route="/v1/score",status="200"} 25.0' in counts
    assert 'pyqe_requests_total{route="other",status="408"} 5.0' in counts


# --- the command


@pytest.fixture
def command(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], openai.OpenAI]]:
    """``pyqe serve`` in a process of its own, and OpenAI's client of it."""
    served = estimator()
    served.model.save_pretrained(tmp_path / "llama")
    served.tokenizer.save_pretrained(tmp_path / "llama")
    assert served.head is not None
    served.head.save_pretrained(tmp_path / "head")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYQE_API_KEY": "sesame"}
    words = ["serve", "-m", tmp_path / "llama", "--head", tmp_path / "head", "--port", "0", "--timeout", "60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pyqe", *map(str, words)], env=environment, stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line.decode())
            found = re.search(r"running on (http://\S+)", lines[-1])
            if found:
                break
        else:
            raise AssertionError("".join(lines))
        yield process, openai.OpenAI(base_url=f"{found[1]}/v1", api_key="sesame", timeout=60, max_retries=0)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.timeout(300)
def test_the_official_client_and_an_orderly_end(
    command: tuple[subprocess.Popen[bytes], openai.OpenAI], offline: QualityEstimator
) -> None:
    process, client = command
    expected = offline.generate(["The cat"], max_new_tokens=8)[0]
    assert [model.id for model in client.models.list()] == ["llama"]
    options: dict[str, Any] = {"model": "llama", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(prompt="The cat", logprobs=1, **options)
    assert whole.choices[0].text == expected.text
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].model_extra is not None
    check_quality(whole.choices[0].model_extra, expected)
    chunks = list(client.completions.create(prompt="The cat", stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text

    expected = offline.generate([MESSAGES], max_new_tokens=8)[0]
    chat: Any = {**options, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**chat)
    assert answer.choices[0].message.content == expected.text
    check_quality(answer.choices[0].model_extra, expected)
    pieces = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content for piece in pieces[:-1]) == expected.text
    assert pieces[-1].usage == answer.usage
    assert pieces[-2].choices[0].model_extra["quality"]["sequence"] == pytest.approx(expected.quality, abs=ROUNDING)
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="llama", prompt="x", best_of=2)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()

    stream = client.completions.create(prompt="The cat", stream=True, **{**options, "max_tokens": 50, "temperature": 1})
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    *_, last = stream
    assert last.choices[0].finish_reason in ("length", "stop")
    assert process.wait(30) == 0


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(main, ["serve", "-m", "x"])
    assert result.exit_code == 1
    assert "pip install 'pyqe[serve]'" in result.output


def test_an_empty_key_is_none_that_anybody_meant() -> None:
    result = CliRunner().invoke(main, ["serve", "-m", "x", "--api-key", ""])
    assert result.exit_code == 2
