"""pyqe-vllm on an engine that keeps to vLLM's documents."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pyqe import HeadMismatchError, SigmoidHead
from pyqe.scored import SIGNALS
from pyqe.signals import scores_of_logits

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]

import engine as fake  # noqa: E402
import pyqe_vllm  # noqa: E402
from pyqe_vllm.recorder import Recorder, Row  # noqa: E402
from pyqe_vllm.worker import WorkerExtension  # noqa: E402

EOS = 2


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The logits processor, on stand-ins for vLLM's modules, which go again: others ask whether vLLM is there."""
    for name, module in fake.stub_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("pyqe_vllm.processor").QualityProcessor
    sys.modules.pop("pyqe_vllm.processor", None)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, initializer_range=0.3, **sizes)).eval()


HEADS = {"full": {"kind": "full"}, "logit": {"kind": "rescaling", "base": "logit"}, "logprob": {"kind": "low_rank"}}


@pytest.fixture(params=list(HEADS), scope="module")
def head(request: pytest.FixtureRequest, model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    made = SigmoidHead.from_lm_head(model, **HEADS[request.param])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    made.save_pretrained(folder)
    return folder


class Worker(WorkerExtension):
    def __init__(self, engine: fake.Engine) -> None:
        self.get_model = engine.get_model
        self.vllm_config = fake.config(vocab_size=60)


class LLM:
    """``vllm.LLM`` as far as the adapter uses it."""

    def __init__(self, engine: fake.Engine) -> None:
        self.engine, self.worker = engine, Worker(engine)

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(self.worker, method)(*args)]

    def get_default_sampling_params(self) -> fake.SamplingParams:
        return fake.SamplingParams()

    def generate(self, prompts: list[list[int]], params: list[fake.SamplingParams]) -> list[Any]:
        requests = [fake.Request(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
        self.engine.run(requests)
        return [self.output(str(i), request) for i, request in enumerate(requests)]

    chat = generate

    def output(self, request_id: str, request: fake.Request) -> Any:
        reason = "stop" if request.drawn[-1] == EOS else "length"
        completion = SimpleNamespace(token_ids=request.drawn, finish_reason=reason, stop_reason=None)
        return SimpleNamespace(request_id=request_id, prompt_token_ids=request.prompt, outputs=[completion])


def offline(model: LlamaForCausalLM, head: SigmoidHead | None, output: Any) -> dict[str, Tensor]:
    """Scores of an output's tokens from one forward pass."""
    tokens = output.outputs[0].token_ids
    with torch.no_grad():
        hidden = model.model(torch.tensor([output.prompt_token_ids + tokens])).last_hidden_state[0]
        hidden = hidden[len(output.prompt_token_ids) - 1 : -1]
        names = SIGNALS if head is not None else SIGNALS[1:]
        found = scores_of_logits(names, head, hidden, model.lm_head(hidden), torch.tensor(tokens)[:, None])
    return {name: values[:, 0] for name, values in found.items()}


def prompts_and_params(count: int) -> tuple[list[list[int]], list[fake.SamplingParams]]:
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 60) for _ in range(draw.randint(1, 9))] for _ in range(count)]
    return prompts, [fake.SamplingParams(max_tokens=draw.randint(1, 8)) for _ in range(count)]


RUNNERS = ["V1", "V1 async", "V2"]


@pytest.mark.parametrize("runner", RUNNERS)
def test_scores_are_those_of_one_forward_pass(runner: str, processor: Any, model: LlamaForCausalLM, head: Path) -> None:
    engine = fake.Engine(model, processor, runner, eos=EOS)
    llm = LLM(engine)
    pyqe_vllm.attach(llm, head, signals=SIGNALS)
    outputs = pyqe_vllm.generate(llm, *prompts_and_params(25))
    loaded = SigmoidHead.from_pretrained(head)
    assert engine.preempted
    assert engine.discarded
    assert runner == "V2" or engine.moved
    ended = 0
    for output in outputs:
        (completion,) = output.outputs
        for name, expected in offline(model, loaded, output).items():
            np.testing.assert_allclose(getattr(completion, f"token_{name}"), expected, rtol=2e-4, atol=2e-6)
        stopped = completion.finish_reason == "stop"
        ended += stopped
        text = completion.token_quality[: len(completion.token_ids) - stopped]
        np.testing.assert_allclose(completion.sequence_quality, text.mean() if len(text) else np.nan, rtol=1e-5)
    assert 0 < ended < len(outputs)


@pytest.mark.parametrize("runner", RUNNERS)
def test_generation_is_as_without(runner: str, processor: Any, model: LlamaForCausalLM) -> None:
    written = []
    for attached in (False, True):
        llm = LLM(fake.Engine(model, processor, runner, eos=EOS))
        if attached:
            pyqe_vllm.attach(llm, None)
        run = pyqe_vllm.generate if attached else LLM.generate
        written.append([output.outputs[0].token_ids for output in run(llm, *prompts_and_params(12))])
    assert written[0] == written[1]


@pytest.mark.parametrize("runner", RUNNERS)
def test_requests_that_ask_for_nothing(runner: str, processor: Any, model: LlamaForCausalLM) -> None:
    engine = fake.Engine(model, processor, runner, eos=EOS)
    llm = LLM(engine)
    pyqe_vllm.attach(llm, None)
    prompts, params = prompts_and_params(16)
    for i, param in enumerate(params):
        param.extra_args = {"pyqe": f"request {i}"} if i % 2 else None
    outputs = llm.generate(prompts, params)
    wanted = [(f"request {i}", outputs[i].outputs[0].token_ids) for i in range(1, 16, 2)]
    (answers,) = llm.collective_rpc("pyqe_scores", (wanted,))
    for i, answer in zip(range(1, 16, 2), answers, strict=True):
        np.testing.assert_allclose(answer["prob"], offline(model, None, outputs[i])["prob"], rtol=2e-4)
    recorder = processor.newest
    assert not recorder._requests  # what was taken is forgotten, and the others never were there
    assert recorder._step is None or not recorder._step.rows


def test_chat_and_default_parameters(processor: Any, model: LlamaForCausalLM) -> None:
    llm = LLM(fake.Engine(model, processor, "V1", eos=EOS))
    pyqe_vllm.attach(llm, None)
    (output,) = pyqe_vllm.generate(llm, [[5, 6]])
    assert len(output.outputs[0].token_prob) == len(output.outputs[0].token_ids)
    assert not hasattr(output.outputs[0], "token_quality")
    llm.chat = lambda messages, params: llm.generate([[7, 8]] * len(messages), params)  # type: ignore[method-assign]
    assert len(pyqe_vllm.chat(llm, [{"role": "user", "content": "x"}])) == 1
    assert len(pyqe_vllm.chat(llm, [[{"role": "user", "content": "x"}]] * 2)) == 2


def test_errors(processor: Any, model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(fake.Engine(model, processor, "V1", eos=EOS))
    with pytest.raises(ValueError, match="needs a Sigmoid Head"):
        pyqe_vllm.attach(llm, None, signals=["quality"])
    other = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=8, num_hidden_layers=1))
    SigmoidHead.from_lm_head(other, kind="rescaling").save_pretrained(tmp_path)
    with pytest.raises(HeadMismatchError, match="the head has 61, the model 60"):
        pyqe_vllm.attach(llm, tmp_path)
    monkeypatch.setattr(processor, "newest", None)
    with pytest.raises(RuntimeError, match="ENGINE_OPTIONS"):
        pyqe_vllm.attach(llm, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speculative_config": object()}, "speculative"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"data_parallel_size": 2}, "data_parallel_size"),
    ],
)
def test_engines_that_are_refused(change: dict[str, Any], message: str, processor: Any) -> None:
    with pytest.raises(NotImplementedError, match=message):
        processor(fake.config(**change), torch.device("cpu"), False)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (fake.SamplingParams(extra_args={"pyqe": "a"}, n=2), "expected n 1, got 2"),
        (fake.SamplingParams(extra_args={"pyqe": 3}), "expected a text"),
        (fake.SamplingParams(extra_args={"pyqe": "a" * 129}), "expected a text"),
    ],
)
def test_requests_that_are_refused(params: fake.SamplingParams, message: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=message):
        processor.validate_params(params)
    processor.validate_params(fake.SamplingParams(n=2))


def test_interfaces_of_vllm(processor: Any) -> None:
    assert issubclass(processor, fake.V1LogitsProcessor)
    assert issubclass(processor, fake.V2LogitsProcessor)
    assert not processor(fake.config(), torch.device("cpu"), False).is_argmax_invariant()  # or greedy steps skip it


class Steps:
    """A recorder on a model whose hidden states are its logits."""

    def __init__(self, **options: Any) -> None:
        self.recorder = Recorder(4, **options)
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden.clone())
        self.recorder.attach(self.model, None, ["prob"])

    def step(self, rows: list[Row], previous: list[int], states: Tensor, count: int | None = None) -> None:
        self.model.compute_logits(states)
        self.recorder.step(rows, torch.tensor(previous), len(states) if count is None else count)


def test_a_key_twice_is_an_error() -> None:
    steps = Steps()
    steps.recorder.add("a")
    steps.step([Row("a", 0, 0), Row("a", 1, 0)], [-1, -1], torch.zeros(2, 5))
    assert steps.recorder.take([("a", [1])]) == [{"error": "two requests ran under one key"}]


def test_other_tokens_are_an_error() -> None:
    steps = Steps()
    steps.recorder.add("a")
    steps.step([Row("a", 0, 0)], [-1], torch.zeros(1, 5))
    steps.step([Row("a", 0, 1)], [3], torch.zeros(1, 5))
    assert steps.recorder.take([("a", [4, 1]), ("b", [1])]) == [
        {"error": "the request wrote other tokens"},
        {"error": "no such request, or its scores were taken or forgotten"},
    ]


def test_steps_that_cannot_be_matched_have_no_score() -> None:
    steps = Steps()
    steps.recorder.add("a")
    steps.step([Row("a", 0, 0)], [-1], torch.zeros(1, 5), count=2)  # the sampler has other rows
    steps.step([Row("a", 0, 1)], [3], torch.zeros(1, 5))
    steps.step([Row("a", 0, 2)], [-1], torch.zeros(1, 5))  # the engine lost a token
    steps.step([Row("a", 0, 3)], [2], torch.full((1, 5), torch.nan))
    (answer,) = steps.recorder.take([("a", [3, 1, 2, 4])])
    np.testing.assert_allclose(answer["prob"], [np.nan, np.nan, 0.2, np.nan], rtol=1e-6)


def test_nothing_grows() -> None:
    steps = Steps(capacity=3)
    for i in range(600):
        steps.recorder.add(f"{i // 100}")
        steps.step([Row(f"{i // 100}", 0, i % 100)], [i % 5], torch.randn(1, 5))
    assert list(steps.recorder._requests) == ["3", "4", "5"]
    assert len(steps.recorder._settled) < 256
    with torch.inference_mode():
        assert "error" in steps.recorder.take([("0", [1])])[0]


def test_nothing_is_copied_when_nobody_asks() -> None:
    steps = Steps()
    steps.model.compute_logits(torch.zeros(2, 5))
    assert steps.recorder._seen is None
    steps.recorder.add("a")
    steps.model.compute_logits(torch.zeros(9, 5))  # of a prompt's log-probabilities
    assert steps.recorder._seen is None
    for end in (lambda: steps.recorder.leave("a"), lambda: steps.recorder.take([("a", [])])):
        steps.recorder.add("a")
        steps.model.compute_logits(torch.zeros(2, 5))
        assert steps.recorder._seen is not None
        end()  # and its scores may never be fetched
        steps.model.compute_logits(torch.zeros(2, 5))
        assert steps.recorder._seen is None


def test_endpoint(processor: Any, model: LlamaForCausalLM, head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fastapi = pytest.importorskip("fastapi")
    testclient = pytest.importorskip("fastapi.testclient")
    import asyncio

    from pyqe_vllm.endpoint import ScoresEndpoint

    llm = LLM(fake.Engine(model, processor, "V2", eos=EOS))

    class EngineClient:
        async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
            return llm.collective_rpc(method, args)

    monkeypatch.setenv("PYQE_HEAD", str(head))
    plugin, app = ScoresEndpoint(), fastapi.FastAPI()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(EngineClient(), app.state, None))
    prompts, params = prompts_and_params(3)
    for i, param in enumerate(params):
        param.extra_args = {"pyqe": str(i)}
    outputs = llm.generate(prompts, params)
    client = testclient.TestClient(app)
    for i, output in enumerate(outputs):
        wanted = {"key": str(i), "token_ids": output.outputs[0].token_ids}
        answer = client.post("/v1/plugins/pyqe/scores", json=wanted).json()
        expected = offline(model, SigmoidHead.from_pretrained(head), output)
        np.testing.assert_allclose(answer["token_quality"], expected["quality"], rtol=2e-4)
        assert client.post("/v1/plugins/pyqe/scores", json=wanted).status_code == 404  # taken
    assert client.post("/v1/plugins/pyqe/scores", json={"key": "1"}).status_code == 422
