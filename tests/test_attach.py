"""``pyqe.attach`` and the streamer: the model's own ``generate`` with quality beside its output."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Thread
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    pipeline,
)
from transformers.generation import utils as generation_utils

import pyqe
from pyqe import QualityEstimator, QualityStreamer, ScoredText
from pyqe.attachment import StepScorer
from pyqe.heads import HeadMismatchError
from pyqe.scored import SIGNALS

MODELS = ["llama", "gpt2", "gemma2", "cohere", "t5", "bart"]
PROMPTS = ["A dog", "Héllo wörld 🎉, how", "x", "The cat sat on the mat. one two three four"]
HEADS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "rescaling", "base": "logit"},
    {"kind": "rescaling", "base": "logprob"},
    {"kind": "low_rank", "base": "logprob", "rank": 4},
    {"kind": "low_rank", "base": "logit", "rank": 4},
]
DICT: dict[str, Any] = {"return_dict_in_generate": True}

pytestmark = pytest.mark.usefixtures("one_thread")


def _model(kind: str = "llama", **options: Any) -> Any:
    model = tiny.model(kind, **options)
    if kind == "bart":
        model.final_logits_bias.normal_()
    return model


def _attached(kind: str = "llama", head: dict[str, Any] | None = None, **options: Any) -> Any:
    model = _model(kind, **options)
    pyqe.attach(model, tiny.head(model, tiny.tokenizer(), **(head or {})), signals=SIGNALS)
    return model


def _estimator(model: Any) -> QualityEstimator:
    """Of the same model and head as an attached model's."""
    return QualityEstimator(model, tiny.tokenizer(), model.generate.head)


def _inputs(model: Any, prompts: list[str] = PROMPTS) -> dict[str, Tensor]:
    side = "right" if model.config.is_encoder_decoder else "left"
    batch = tiny.tokenizer()(prompts, return_tensors="pt", padding=True, padding_side=side)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _start(model: Any, prompts: list[str] = PROMPTS) -> int:
    return 1 if model.config.is_encoder_decoder else _inputs(model, prompts)["input_ids"].shape[1]


def _generate(model: Any, prompts: list[str] = PROMPTS, **options: Any) -> Any:
    torch.manual_seed(2)
    return model.generate(**_inputs(model, prompts), **{"max_new_tokens": 7, **DICT, **options})


def _assert_scores(output: Any, start: int, items: list[ScoredText], atol: float = 2e-6) -> None:
    """The scores of an output are those of scored texts (which end before their EOS), and NaN after them."""
    new = output.sequences[:, start:]
    assert len(new) == len(items)
    for i, item in enumerate(items):
        length = len(item.token_ids)
        assert new[i, :length].tolist() == item.token_ids
        written = length + (item.finish_reason == "eos")
        for signal in SIGNALS:
            scores = output[f"token_{signal}"]
            assert scores.shape == new.shape
            assert scores.dtype == torch.float32
            torch.testing.assert_close(
                scores[i, :length].numpy(), getattr(item, f"token_{signal}"), rtol=2e-5, atol=atol, equal_nan=True
            )
            assert scores[i, :written].isfinite().all()
            assert scores[i, written:].isnan().all()
        expected = math.nan if item.quality is None else item.quality
        np.testing.assert_allclose(output.sequence_quality[i].item(), expected, rtol=2e-5, atol=atol)


# --- the scores


@pytest.mark.parametrize("options", tiny.GENERATION, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_those_of_the_estimator(kind: str, options: dict[str, Any]) -> None:
    model = _attached(kind)
    output = _generate(model, **options)
    torch.manual_seed(2)
    items = _estimator(model).generate(PROMPTS, max_new_tokens=7, **options)
    _assert_scores(output, _start(model), items)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_every_kind_of_head(head: dict[str, Any], num_beams: int) -> None:
    model = _attached("gemma2", head)
    items = _estimator(model).generate(PROMPTS, max_new_tokens=5, num_beams=num_beams)
    _assert_scores(_generate(model, max_new_tokens=5, num_beams=num_beams), _start(model), items)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_softmax_signals_are_those_of_the_models_logits(options: dict[str, Any]) -> None:
    model = _attached("bart")
    output = _generate(model, output_logits=True, **options)
    for i, row in enumerate(output.sequences[:, 1:].tolist()):
        for time, token in enumerate(row):
            if output.token_prob[i, time].isnan():
                continue
            at = i if "beam_indices" not in output else int(output.beam_indices[i, time])
            logprobs = torch.log_softmax(output.logits[time][at].double(), -1)
            assert output.token_prob[i, time].item() == pytest.approx(logprobs[token].exp().item(), rel=1e-5)
            assert output.token_max_prob[i, time].item() == pytest.approx(logprobs.max().exp().item(), rel=1e-5)
            entropy = -(logprobs.exp() * logprobs).sum().item()
            assert output.token_entropy[i, time].item() == pytest.approx(entropy, rel=1e-5)


def test_scoring_what_was_generated_gives_its_scores() -> None:
    """With a tokenizer of one token a character, so that the text is tokenized as it was generated."""
    tokenizer = tiny.SlowTokenizer(model_max_length=64)
    model = _model(vocab_size=len(tokenizer))
    head = tiny.head(model, tokenizer)
    ids = torch.tensor([tokenizer("a dog", add_special_tokens=False)["input_ids"]])
    with pyqe.attach(model, head, tokenizer=tokenizer, signals=SIGNALS):
        output = model.generate(ids, max_new_tokens=8, suppress_tokens=[0, 1, 2, 3], **DICT)
    text = tokenizer.decode(output.sequences[0, ids.shape[1] :])
    _assert_scores(output, ids.shape[1], QualityEstimator(model, tokenizer, head).score([text], ["a dog"]))


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_prompts_of_different_lengths_are_as_alone(kind: str) -> None:
    model = _attached(kind)
    together = _generate(model)
    for i, prompt in enumerate(PROMPTS):
        alone = _generate(model, [prompt])
        count = alone.token_quality.shape[1]
        torch.testing.assert_close(together.token_quality[i, :count], alone.token_quality[0], equal_nan=True)
        torch.testing.assert_close(together.sequence_quality[i], alone.sequence_quality[0], equal_nan=True)


def test_bfloat16_scores_are_those_of_the_logits_in_that_dtype() -> None:
    model = _attached(dtype=torch.bfloat16)
    output = _generate(model, output_logits=True)
    logits = torch.stack(output.logits, 1)
    new = output.sequences[:, _start(model) :]
    expected = logits.double().softmax(-1).gather(2, new[..., None])[..., 0].float()
    torch.testing.assert_close(
        output.token_prob, expected.masked_fill(output.token_prob.isnan(), torch.nan), equal_nan=True
    )
    items = _estimator(model).generate(PROMPTS, max_new_tokens=7)
    for i, item in enumerate(items):  # the quality of a full head has no rounded logits in it
        length = len(item.token_ids)
        assert item.token_quality is not None
        np.testing.assert_allclose(output.token_quality[i, :length].numpy(), item.token_quality, rtol=1e-5)


# --- where sequences end


def test_eos_ids_end_a_sequence() -> None:
    model = _attached()
    free = _generate(model, ["A dog", "The cat"], eos_token_id=None)
    start = _start(model, ["A dog", "The cat"])
    begun = set(free.sequences[:, start : start + 2].reshape(-1).tolist())  # each has a text before its EOS
    stop = [next(token for token in row if token not in begun) for row in free.sequences[:, start:].tolist()]
    output = _generate(model, ["A dog", "The cat"], eos_token_id=stop)
    written = (~output.token_quality.isnan()).sum(1)
    for i in range(2):
        end = next(t for t, token in enumerate(free.sequences[i, start:].tolist()) if token in stop)
        assert written[i] == end + 1  # the EOS has its scores
        torch.testing.assert_close(output.token_quality[i, : end + 1], free.token_quality[i, : end + 1])
        assert output.token_prob[i, end + 1 :].isnan().all()
        mean = free.token_quality[i, :end].mean()  # and no part in the mean
        torch.testing.assert_close(output.sequence_quality[i], mean)


def test_nothing_but_eos_is_not_confident() -> None:
    model = _attached()
    free = _generate(model, ["A dog"])
    first = int(free.sequences[0, _start(model, ["A dog"])])
    output = _generate(model, ["A dog", "The cat"], eos_token_id=[first])
    assert output.sequence_quality[0].isnan()
    assert output.sequence_quality[1].isfinite()
    assert output.token_quality[0].isfinite().tolist() == [True] + [False] * (output.token_quality.shape[1] - 1)


class _StopAfter(StoppingCriteria):  # type: ignore[misc]
    """Ends a row when it holds a token, and counts how often it was asked."""

    def __init__(self, token: int, start: int) -> None:
        self.token, self.start, self.calls = token, start, 0

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        self.calls += 1
        return (input_ids[:, self.start :] == self.token).any(1)


@pytest.mark.parametrize("eos", [None, 2])
def test_stopping_criteria_end_a_sequence_and_are_asked_once_a_token(eos: int | None) -> None:
    model = _attached()
    prompts = ["A dog", "The cat"]
    start = _start(model, prompts)
    token = int(_generate(model, prompts, eos_token_id=eos).sequences[0, start + 2])
    criterion = _StopAfter(token, start)
    output = _generate(model, prompts, eos_token_id=eos, stopping_criteria=[criterion])
    end = output.sequences[0, start:].tolist().index(token) + 1
    assert output.token_quality[0].isfinite().tolist() == [i < end for i in range(7)]
    torch.testing.assert_close(output.sequence_quality[0], output.token_quality[0, :end].mean())
    assert output.token_quality[1].isfinite().all()
    assert criterion.calls == 7


@pytest.mark.parametrize(("num_beams", "length"), [(1, 9), (2, 4)])
def test_criteria_that_replace_those_of_generate_still_do(num_beams: int, length: int) -> None:
    model = _attached()
    start = _start(model)
    criteria = [MaxLengthCriteria(start + length), EosTokenCriteria(5)]
    assert _generate(model, stopping_criteria=criteria, num_beams=num_beams).token_quality.shape[1] == length
    plain = _generate(_model(), stopping_criteria=criteria, num_beams=num_beams)
    attached = _generate(model, stopping_criteria=criteria, num_beams=num_beams)
    assert torch.equal(plain.sequences, attached.sequences)


def test_stop_strings() -> None:
    model, tokenizer = _attached(), tiny.tokenizer()
    text = tokenizer.decode(_generate(model, ["A dog"]).sequences[0, _start(model, ["A dog"]) :])
    output = _generate(model, ["A dog", "x"], stop_strings=[text[3:5]], tokenizer=tokenizer)
    items = _estimator(model).generate(["A dog", "x"], max_new_tokens=7, stop_strings=[text[3:5]])
    assert items[0].finish_reason == "stop"
    _assert_scores(output, _start(model, ["A dog", "x"]), items)
    with pytest.raises(ValueError, match="pass the model's tokenizer"):
        _generate(model, stop_strings=["x"])


def test_a_forced_bos_has_no_part_in_the_mean() -> None:
    model = _attached("bart")
    output = _generate(model, forced_bos_token_id=1, eos_token_id=None)
    assert (output.sequences[:, 1] == 1).all()
    torch.testing.assert_close(output.sequence_quality, output.token_quality[:, 1:].mean(1))


def test_padding_that_is_no_token_of_the_model() -> None:
    model = _attached()
    prompts = ["A dog", "The cat"]
    free, start = _generate(model, prompts, eos_token_id=None, max_new_tokens=2), _start(model, prompts)
    eos = int(free.sequences[0, start])
    assert eos not in free.sequences[1, start:]
    output = _generate(model, prompts, eos_token_id=eos, pad_token_id=999, max_new_tokens=2)
    assert output.sequences[0, -1] == 999
    assert output.token_prob.isfinite().tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_broken_weight_does_not_look_confident(head: dict[str, Any], value: float) -> None:
    model = _attached(head=head)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = value
    output = _generate(model, output_logits=True)
    logits = torch.stack(output.logits, 1)
    broken = (logits.isnan() | (logits == math.inf)).any(-1)
    assert broken.any()
    for signal in SIGNALS:
        assert output[f"token_{signal}"][broken].isnan().all()
    assert output.sequence_quality[broken.any(1)].isnan().all()


def test_inputs_of_other_kinds() -> None:
    model = _attached()
    inputs = _inputs(model)
    expected = _generate(model)
    positional = model.generate(inputs.pop("input_ids"), GenerationConfig(max_new_tokens=7, **DICT), **inputs)
    torch.testing.assert_close(positional.token_quality, expected.token_quality, equal_nan=True)
    embedded = model.get_input_embeddings()(_inputs(model)["input_ids"])
    output = model.generate(inputs_embeds=embedded, max_new_tokens=7, **inputs, **DICT)
    assert output.sequences.shape == output.token_quality.shape
    torch.testing.assert_close(output.token_quality, expected.token_quality, equal_nan=True)
    model.generation_config.return_dict_in_generate = True
    output = model.generate(**_inputs(model), max_new_tokens=7)
    torch.testing.assert_close(output.token_quality, expected.token_quality, equal_nan=True)


# --- the output, and what stays as it was


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_the_output_is_the_usual_one_with_more_fields(kind: str, options: dict[str, Any]) -> None:
    plain = _generate(_model(kind), output_scores=True, output_hidden_states=True, **options)
    model = _attached(kind)
    output = _generate(model, output_scores=True, output_hidden_states=True, **options)
    assert type(output) is type(plain)
    fields = {"sequence_quality", *(f"token_{signal}" for signal in SIGNALS)}
    assert set(output) - set(plain) == fields
    assert [key for key in output if key not in fields] == list(plain)
    assert torch.equal(output.sequences, plain.sequences)
    for ours, theirs in zip(output.scores, plain.scores, strict=True):
        assert torch.equal(ours, theirs)
    assert output["token_quality"] is output.token_quality
    assert output.sequence_quality.shape == (len(PROMPTS),)
    for copied in (copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert torch.equal(copied["sequence_quality"], output.sequence_quality)


def test_without_a_head() -> None:
    model = _model()
    pyqe.attach(model, None)
    output = _generate(model)
    assert {key for key in output if "quality" in key or key.startswith("token")} == {"token_prob", "token_entropy"}
    with pytest.raises(ValueError, match="'quality' needs a Sigmoid Head"):
        pyqe.attach(model, None, signals=["quality"])


@pytest.mark.parametrize(
    "options", [*tiny.GENERATION, {"prompt_lookup_num_tokens": 2, "input_ids": torch.arange(3, 9)[None]}]
)
def test_without_return_dict_nothing_changes(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = _model(), _attached()
    monkeypatch.setattr("pyqe.attachment.StepScorer", None)
    inputs = {"input_ids": torch.arange(3, 13).reshape(2, 5), "max_new_tokens": 5, **options}
    torch.manual_seed(0)
    expected = plain.generate(**inputs)
    torch.manual_seed(0)
    found = model.generate(**inputs)
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)


def _state(model: Any) -> Any:
    return [
        (name, sorted(vars(module)), module.training, len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


def test_detach_leaves_nothing() -> None:
    model = _model()
    before, state_dict = _state(model), set(model.state_dict())
    pyqe.attach(model, tiny.head(model, tiny.tokenizer()))
    assert set(model.state_dict()) == state_dict
    assert inspect.signature(model.generate) == inspect.signature(type(model).generate.__get__(model))
    attached = _state(model)
    _generate(model)
    assert _state(model) == attached
    broken = model.lm_head.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _generate(model)
    broken.remove()
    assert _state(model) == attached
    pyqe.detach(model)
    assert _state(model) == before
    assert not {"token_quality", "sequence_quality"} & set(_generate(model))
    with pytest.raises(ValueError, match=r"expected one with pyqe\.attach, got a plain LlamaForCausalLM"):
        pyqe.detach(model)


def test_what_others_put_on_the_model_stays() -> None:
    model, calls = _model(), []

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append("generate")
        return type(model).generate(model, *args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append("forward")
        return nn.Linear.forward(model.lm_head, *args, **kwargs)

    model.generate, model.lm_head.forward = generate, forward
    with pyqe.attach(model, None):
        output = model.generate(_inputs(model)["input_ids"], max_new_tokens=1, **DICT)
        assert "token_prob" in output
    assert calls == ["generate", "forward"]
    assert model.generate is generate
    assert model.lm_head.forward is forward


def test_attaching_again_replaces() -> None:
    model = _model()
    first, second = tiny.head(model, tiny.tokenizer()), tiny.head(model, tiny.tokenizer(), kind="rescaling")
    with pyqe.attach(model, first):
        one = _generate(model)
        with pyqe.attach(model, second):
            assert not torch.equal(_generate(model).sequence_quality, one.sequence_quality)
        assert "generate" not in vars(model)
    assert "generate" not in vars(model)


def test_a_copy_of_an_attached_model_is_its_own() -> None:
    model = _attached()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    output = _generate(copied)
    assert copied.generate.model is copied
    assert output.token_max_prob[0, 0] > 0.01
    pyqe.detach(copied)
    assert "generate" in vars(model)


def test_a_head_of_another_model() -> None:
    model = _model()
    head = tiny.head(model, tiny.tokenizer())
    with pytest.raises(HeadMismatchError, match="tokenizer"):
        pyqe.attach(model, head, tokenizer=tiny.SlowTokenizer())
    with pytest.raises(HeadMismatchError, match="hidden_size"):
        pyqe.attach(_model(hidden_size=16), head)
    assert "generate" not in vars(model)
    pyqe.attach(model, head)
    model.resize_token_embeddings(310)
    with pytest.raises(HeadMismatchError, match="vocab_size: the head has 300, the model 310"):
        _generate(model)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": "self"},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 2},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
    ],
    ids=str,
)
def test_unsupported_decoding(options: dict[str, Any]) -> None:
    model = _attached()
    options = {name: model if value == "self" else value for name, value in options.items()}
    with pytest.raises(NotImplementedError, match="one forward pass a token"):
        _generate(model, **options)


def test_forward_passes_that_are_not_one_a_token() -> None:
    model = _attached()

    def guide(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + model(input_ids).logits[:, -1]

    with pytest.raises(NotImplementedError, match="2 forward passes for a token"):
        _generate(model, logits_processor=[guide])


def test_a_generate_that_runs_another_model() -> None:
    outer, inner = _model(), _model()
    outer.lm_head, outer.generate = inner.lm_head, inner.generate  # as adapters around a model have it
    pyqe.attach(outer, None)
    with pytest.raises(NotImplementedError, match="runs another model"):
        _generate(outer)
    pyqe.attach(inner, None)
    assert "token_prob" in _generate(inner)


def test_paged_cache() -> None:
    with pytest.raises(NotImplementedError, match="use generate_batch"):
        _generate(_attached(), cache_implementation="paged")


def test_an_attached_model_can_assist_another() -> None:
    plain, model = _model(), _attached()
    ids = _inputs(model, ["A dog"])
    expected = plain.generate(**ids, max_new_tokens=7)
    assert torch.equal(plain.generate(**ids, max_new_tokens=7, assistant_model=model), expected)


# --- memory


@pytest.mark.parametrize(("num_beams", "candidates"), [(1, 1), (3, 6)])
def test_nothing_of_the_vocabularys_size_is_kept(
    num_beams: int, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scorers, logits, alive = _attached(), [], [], []
    scores_of = StepScorer.scores_of

    def spy(self: StepScorer, output: Any) -> Any:
        scorers.append(self)
        return scores_of(self, output)

    def count(module: Any, args: Any, output: Tensor) -> None:
        alive.append(sum(item() is not None for item in logits))
        logits.append(weakref.ref(output))

    monkeypatch.setattr(StepScorer, "scores_of", spy)
    model.lm_head.register_forward_hook(count)
    output = _generate(model, num_beams=num_beams, eos_token_id=None)
    rows, steps = len(PROMPTS) * num_beams, 7
    (scorer,) = scorers
    assert len(scorer.scores) == len(scorer.tokens) == steps
    assert sum(item.numel() for item in scorer.scores) == steps * rows * candidates * len(SIGNALS)
    assert sum(item.numel() for item in scorer.tokens) == steps * len(PROMPTS) * candidates
    held = [*scorer.scores, *scorer.tokens]
    assert sum(item.untyped_storage().nbytes() for item in held) == sum(item.nbytes for item in held)
    assert alive == [0] * steps  # the logits of a step are gone before the next one's are there
    assert scorer._hidden is None
    assert scorer._logits is None
    ours = [value for key, value in output.items() if key.startswith(("token", "sequence_"))]
    assert {value.shape for value in ours} == {(len(PROMPTS), steps), (len(PROMPTS),)}


class _Peak(TorchDispatchMode):
    """Largest sum of bytes of the tensors that exist at one time, of those made inside the ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self.live[StorageWeakRef(item.untyped_storage())] = item.untyped_storage().nbytes()
        self.live = {storage: size for storage, size in self.live.items() if not storage.expired()}
        self.bytes = max(self.bytes, sum(self.live.values()))
        return result


@pytest.mark.parametrize("num_beams", [1, 2])
def test_memory_beyond_plain_generate_does_not_grow_with_the_vocabulary(num_beams: int) -> None:
    extra = []
    for vocab_size in (2_000, 20_000):
        model = _model(vocab_size=vocab_size)
        head, peaks = tiny.head(model, tiny.tokenizer()), []
        for attached in (False, True):
            with pyqe.attach(model, head) if attached else nullcontext(), _Peak() as peak:
                _generate(model, eos_token_id=None, num_beams=num_beams)
            peaks.append(peak.bytes)
        assert peaks[0] > 4 * vocab_size * len(PROMPTS) * num_beams  # the logits of a step
        extra.append(peaks[1] - peaks[0])
    assert max(extra) < 20_000
    assert extra[0] == extra[1]


# --- compiled forward passes and other ways to run a model


class _Counting:
    """A compiler that compiles nothing, and counts how often it was asked."""

    calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.calls += 1
        forward: Callable[..., Any] = graph.forward
        return forward

    def __deepcopy__(self, memo: Any) -> _Counting:
        return self  # generate copies its options


@pytest.fixture
def compiler() -> Iterator[_Counting]:
    torch._dynamo.reset()
    yield _Counting()
    torch._dynamo.reset()


def _static(compiler: _Counting) -> dict[str, Any]:
    """Options of a static cache with the decoding step compiled whole, as transformers does on GPUs by itself."""
    config = CompileConfig(backend=compiler, mode=None, fullgraph=True)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config, "eos_token_id": None}


def _assert_close(output: Any, expected: Any) -> None:
    assert torch.equal(output.sequences, expected.sequences)
    for name in ("token_quality", "token_prob", "token_entropy", "sequence_quality"):
        torch.testing.assert_close(output[name], expected[name], equal_nan=True)


def test_static_cache_without_compilation() -> None:
    model = _attached()
    _assert_close(_generate(model, cache_implementation="static"), _generate(model))


@pytest.mark.parametrize("compiled_before", [False, True])
def test_compiled_decoding(compiled_before: bool, compiler: _Counting) -> None:
    """The forward pass is compiled whole, once with and once without the look into it."""
    model = _model()
    options = _static(compiler)
    if compiled_before:
        _generate(model, **options)
        assert compiler.calls == 1
    pyqe.attach(model, tiny.head(model, tiny.tokenizer()))
    expected = _generate(model, eos_token_id=None)
    calls = compiler.calls
    for _ in range(2):
        _assert_close(_generate(model, **options), expected)
    assert compiler.calls == calls + 1
    pyqe.detach(model)
    assert torch.equal(_generate(model, **options).sequences, expected.sequences)
    pyqe.attach(model, tiny.head(model, tiny.tokenizer(), kind="rescaling"))  # another one, seen by the same code
    output = _generate(model, **options)
    torch.testing.assert_close(output.token_prob, expected.token_prob)
    assert not torch.allclose(output.token_quality, expected.token_quality)
    assert compiler.calls == 2


@pytest.mark.parametrize("way", ["torch.compile", "compile", "forward"])
def test_compiled_models(way: str, compiler: _Counting) -> None:
    model = _model()
    head = tiny.head(model, tiny.tokenizer())
    with pyqe.attach(model, head):
        expected = _generate(model)
    run = model
    if way == "torch.compile":
        run = torch.compile(model, backend=compiler)  # type: ignore[assignment]
    elif way == "compile":
        model.compile(backend=compiler)
    else:
        model.forward = torch.compile(model.forward, backend=compiler)
    _generate(run)
    before = _state(model)
    pyqe.attach(run, head)
    _assert_close(_generate(run), expected)
    pyqe.detach(run)
    assert _state(model) == before
    assert (compiler.calls > 0) == (way != "torch.compile")  # whose generate runs the model that it wraps


def test_a_stop_that_is_seen_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Apple's GPUs: one step more is made, and undone."""
    model = _attached()
    expected = _generate(model, ["A dog"], eos_token_id=None)
    eos = int(expected.sequences[0, -3])
    expected = _generate(model, ["A dog"], eos_token_id=eos)
    monkeypatch.setattr(generation_utils.DeferredStopCheck, "is_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch, "Event", lambda **options: torch.cpu.Event())
    _assert_close(_generate(model, ["A dog"], eos_token_id=eos), expected)


def test_pipeline() -> None:
    model = _attached()
    generator = pipeline("text-generation", model=model, tokenizer=tiny.tokenizer())
    (item,) = generator("A dog", max_new_tokens=4, return_tensors=True, **DICT)
    ids = _inputs(model, ["A dog"])["input_ids"]
    assert item["generated_token_ids"][: ids.shape[1]] == ids[0].tolist()


def test_threads_on_one_model_do_not_mix_their_texts() -> None:
    model = _attached()
    alone = {prompt: _generate(model, [prompt]) for prompt in PROMPTS}
    with ThreadPoolExecutor(4) as pool:
        jobs = [(prompt, pool.submit(_generate, model, [prompt])) for prompt in PROMPTS * 4]
        for prompt, job in jobs:
            _assert_close(job.result(), alone[prompt])


# --- continuous batching


def _batch(model: Any, inputs: list[list[int]], config: dict[str, Any] | None = None, **options: Any) -> Any:
    small = {"page_size": 8, "num_blocks": 24, "max_batch_tokens": 64, "return_logprobs": True}
    return model.generate_batch(
        inputs,
        generation_config=GenerationConfig(**{"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, **options}),
        continuous_batching_config=ContinuousBatchingConfig(**{**small, **(config or {})}),
    )


def _assert_batch_scores(model: Any, result: Any) -> None:
    """The scores are those of one forward pass over prompt and text."""
    assert result.error is None
    ids, first = torch.tensor([result.prompt_ids + result.generated_tokens]), len(result.prompt_ids)
    with torch.no_grad():
        output = model(ids[:, :-1], output_hidden_states=True, use_cache=False)
        quality = torch.sigmoid(model.generate.head(output.hidden_states[-1][0, first - 1 :], ids[0, first:]))
    logprobs = output.logits[0, first - 1 :].log_softmax(-1)
    np.testing.assert_allclose(result.token_quality, quality.numpy(), rtol=1e-4)
    prob = logprobs.gather(1, ids[0, first:, None])[:, 0].exp()
    np.testing.assert_allclose(result.token_prob, prob.numpy(), rtol=1e-4)
    np.testing.assert_allclose(result.token_entropy, -(logprobs.exp() * logprobs).sum(1).numpy(), rtol=1e-4)
    written = len(result.generated_tokens) - (result.generated_tokens[-1] == 2)
    expected = np.mean(result.token_quality[:written]) if written else math.nan
    np.testing.assert_allclose(result.sequence_quality, expected)


BATCHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"max_batch_tokens": 8}, {}),  # prompts in several parts
    ({"num_blocks": 12, "page_size": 4}, {"max_new_tokens": 9}),  # requests put off and taken up again
    ({}, {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3}),
]


@pytest.mark.parametrize(("config", "options"), BATCHES, ids=str)
def test_continuous_batching(config: dict[str, Any], options: dict[str, Any]) -> None:
    model = _attached()
    inputs = [tiny.tokenizer()(prompt)["input_ids"] for prompt in [*PROMPTS, "A dog"]]
    results = _batch(model, inputs, config, **options)
    assert len(results) == len(inputs) * options.get("num_return_sequences", 1)
    for result in results.values():
        _assert_batch_scores(model, result)
    assert "init_continuous_batching" not in vars(model)
    assert "forward" not in vars(model)


def test_continuous_batching_of_a_model_that_makes_every_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _attached()
    monkeypatch.setattr(type(model), "_supports_logits_to_keep", lambda self: False)
    for result in _batch(model, [[5, 6, 7], [8, 9]]).values():
        _assert_batch_scores(model, result)


def test_continuous_batching_ends_at_eos() -> None:
    model = _attached()
    ids = _inputs(model, ["A dog"])["input_ids"][0].tolist()
    (free,) = _batch(model, [ids]).values()
    stop = [token for token in free.generated_tokens if token != free.generated_tokens[0]][1:3]
    (result,) = _batch(model, [ids], eos_token_id=stop).values()
    length = next(i for i, token in enumerate(free.generated_tokens) if token in stop)
    assert len(result.generated_tokens) == len(result.token_quality) == length + 1
    np.testing.assert_allclose(result.sequence_quality, np.mean(free.token_quality[:length]), rtol=1e-5)


def test_continuous_batching_without_log_probabilities_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _attached()
    monkeypatch.setattr("pyqe.attachment.BatchScorer", None)
    (result,) = _batch(model, [[5, 6, 7]], {"return_logprobs": False}).values()
    assert not hasattr(result, "token_quality")
    monkeypatch.undo()
    pyqe.detach(model)
    (result,) = _batch(model, [[5, 6, 7]]).values()
    assert not hasattr(result, "token_quality")
    assert "generate_batch" not in vars(model)


@pytest.mark.parametrize("name", ["use_cuda_graph", "use_async_batching", "default_compile_level"])
def test_continuous_batching_that_python_does_not_see(name: str) -> None:
    model = _attached()
    with pytest.raises(NotImplementedError, match=f"expected no {name} in continuous_batching_config, got 1|True"):
        _batch(model, [[5, 6, 7]], {name: 1 if name == "default_compile_level" else True})


# --- streaming


def _stream(model: Any, prompt: str, streamer: QualityStreamer, **options: Any) -> tuple[list[tuple[str, float]], Any]:
    outputs: list[Any] = []
    inputs = _inputs(model, [prompt])
    run = Thread(target=lambda: outputs.append(model.generate(**inputs, streamer=streamer, **options)))
    run.start()
    found = list(streamer)
    run.join()
    return found, outputs[0]


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_streamed_pieces_have_the_quality_of_their_tokens(kind: str) -> None:
    model, tokenizer = _attached(kind), tiny.tokenizer()
    options = {"max_new_tokens": 40, "do_sample": True, "temperature": 2.0, "eos_token_id": None, **DICT}
    streamer = QualityStreamer(tokenizer, skip_prompt=True, timeout=60)
    for seed in range(3):  # a streamer can be used again
        torch.manual_seed(seed)
        found, output = _stream(model, "A dog", streamer, **options)
        ids = output.sequences[0, _start(model, ["A dog"]) :].tolist()
        assert "".join(text for text, _ in found) == tokenizer.decode(ids)
        assert all(text for text, _ in found)
        quality, place = output.token_quality[0].tolist(), 0
        for text, score in found:
            end = place + 1
            while tokenizer.decode(ids[place:end]) != text and end < len(ids):
                end += 1
            assert score == min(quality[place:end])
            place = end
        assert place == len(ids)


def test_streaming_without_return_dict_with_special_tokens_skipped() -> None:
    model, tokenizer = _attached(), tiny.tokenizer()
    streamer = QualityStreamer(tokenizer, True, 60, skip_special_tokens=True)
    options = {"max_new_tokens": 6, "forced_eos_token_id": 2, "suppress_tokens": [0, 1]}
    found, sequences = _stream(model, "A dog", streamer, **options)
    assert isinstance(sequences, Tensor)
    assert sequences[0, -1] == 2
    assert "".join(text for text, _ in found) == tokenizer.decode(sequences[0, -6:-1])
    assert not any(math.isnan(quality) for _, quality in found)


def test_a_streamed_prompt_has_no_quality() -> None:
    model, tokenizer = _attached(), tiny.tokenizer()
    found, sequences = _stream(model, "A dog", QualityStreamer(tokenizer, timeout=60), max_new_tokens=3)
    assert "".join(text for text, _ in found) == tokenizer.decode(sequences[0])
    count = len(tokenizer.decode(_inputs(model, ["A dog"])["input_ids"][0]))
    before = "".join(text for text, quality in found if math.isnan(quality))
    assert len(before) == count


def test_streamer_refuses() -> None:
    model, tokenizer = _model(), tiny.tokenizer()
    ids = _inputs(model, ["A dog"])
    with pytest.raises(RuntimeError, match=r"expected a model with pyqe\.attach and a head"):
        model.generate(**ids, streamer=QualityStreamer(tokenizer), max_new_tokens=2)
    pyqe.attach(model, None)
    with pytest.raises(ValueError, match="streamer: expected 'quality' among the signals"):
        model.generate(**ids, streamer=QualityStreamer(tokenizer), max_new_tokens=2)
    model = _attached()
    with pytest.raises(ValueError, match="streamer: expected one sequence, got 4"):
        _generate(model, streamer=QualityStreamer(tokenizer))
