"""QualityEstimator: scores of given and of generated text, against the model's own logits."""

from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boostedprob
import numpy as np
import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteria

from pyqe import DominantRule, QualityEstimator, ScoredText, SigmoidHead, use_backend
from pyqe import functional as F
from pyqe.estimator import TextTooLongError
from pyqe.heads import HeadMismatchError
from pyqe.scored import SIGNALS

DECODERS = ["llama", "gpt2", "gemma2", "cohere", "granite"]
MODELS = [*DECODERS, "t5", "bart"]
PROMPTS = ["A dog", "Héllo wörld 🎉, how", "x", "The cat sat on the mat. one two three four"]
HEADS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "rescaling", "base": "logit"},
    {"kind": "rescaling", "base": "logprob"},
    {"kind": "low_rank", "base": "logprob", "rank": 4},
    {"kind": "low_rank", "base": "logit", "rank": 4},
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """One: threads that wait for each other on a busy machine take longer than these models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _model(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = tiny.model(kind, dtype, **options)
    if kind == "bart":
        model.final_logits_bias.normal_()
    return model


def _estimator(kind: str = "llama", head: dict[str, Any] | None = None, **options: Any) -> QualityEstimator:
    return _with_head(_model(kind, **options), head)


def _with_head(model: Any, options: dict[str, Any] | None = None, tokenizer: Any = None) -> QualityEstimator:
    tokenizer = tokenizer or tiny.tokenizer()
    return QualityEstimator(model, tokenizer, tiny.head(model, tokenizer, **(options or {})))


def _hidden_and_logits(model: Any, before: list[int], text_ids: list[int], source: list[int] | None) -> Any:
    """Hidden states and raw logits of the positions that predict the text, from the model itself."""
    kept: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    ids = torch.tensor([[*before, *text_ids]])
    inputs = {"input_ids": ids} if source is None else {"input_ids": torch.tensor([source]), "decoder_input_ids": ids}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    handle.remove()
    places = slice(len(before) - 1, len(before) + len(text_ids) - 1)
    return kept[0][0][places], logits[places]


@torch.no_grad()
def _expected(qe: QualityEstimator, before: list[int], text_ids: list[int], source: list[int] | None = None) -> Any:
    """Every signal by its definition, in float64."""
    hidden, logits = _hidden_and_logits(qe.model, before, text_ids, source)
    logprobs = logits.double().log_softmax(-1)
    ids = torch.tensor(text_ids)[:, None]
    head: Any = qe.head
    quality = head.scale.double() * (hidden.double() * head.weight[ids[:, 0]].double()).sum(-1) + head.shift.double()
    return {
        "quality": quality.sigmoid(),
        "prob": logprobs.exp().gather(1, ids)[:, 0],
        "max_prob": logprobs.exp().amax(-1),
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
        "boosted_prob": boostedprob.calculate_boostedprob(logprobs[None], ids.T)[0],
    }


def _check(scored: ScoredText, expected: dict[str, Tensor], atol: float = 2e-6) -> None:
    for signal, values in expected.items():
        found = getattr(scored, f"token_{signal}")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, values.float().numpy(), rtol=2e-5, atol=atol, err_msg=signal)


def _scores(scored: ScoredText) -> np.ndarray:
    return np.stack([getattr(scored, f"token_{signal}") for signal in SIGNALS])


def _same(first: ScoredText, second: ScoredText, atol: float = 2e-6) -> None:
    assert first.token_ids == second.token_ids
    assert (first.text, first.status, first.finish_reason) == (second.text, second.status, second.finish_reason)
    np.testing.assert_allclose(_scores(first), _scores(second), rtol=2e-5, atol=atol)


def _ids(text: str) -> list[int]:
    return list(tiny.tokenizer()(text)["input_ids"])


# --- given text


@pytest.mark.parametrize("kind", DECODERS)
def test_scores_are_those_of_the_models_logits(kind: str) -> None:
    qe = _estimator(kind)
    scored = qe.score([*tiny.TEXTS, *tiny.TEXTS], [None] * 5 + ["x", "", "Hello", "A dog, ", "the cat"])
    for text, item in zip(tiny.TEXTS * 2, scored, strict=True):
        assert (item.text, item.status, item.reason, item.token_ids) == (text, "ok", None, _ids(text))
        assert item.tokens == [text[start:end] for start, end in item.offsets]
        _check(item, _expected(qe, _ids(item.prompt) if item.prompt else [1], item.token_ids))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_scores_of_an_encoder_decoder(kind: str) -> None:
    qe = _estimator(kind)
    start = qe.model.config.decoder_start_token_id
    sources = [*tiny.TEXTS[::-1][:4], "🎉"]
    for text, source, item in zip(tiny.TEXTS, sources, qe.score(tiny.TEXTS, sources), strict=True):
        assert item.status == "ok"
        _check(item, _expected(qe, [start], _ids(text), _ids(source)))


def test_an_encoder_decoder_reads_the_special_tokens_of_targets_and_needs_a_source() -> None:
    tokenizer = tiny.tokenizer_with()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    qe = _with_head(_model("bart"), tokenizer=tokenizer)
    (item,) = qe.score(["A dog"], ["The cat"])
    assert item.token_ids == _ids("A dog")
    _check(item, _expected(qe, [2, 1], item.token_ids, [1, *_ids("The cat"), 2]))
    with pytest.raises(ValueError, match="prompts: expected the source of every text"):
        qe.score(["A dog"])
    qe = _estimator("bart")
    (empty_source,) = qe.score(["A dog"], [""])
    _check(empty_source, _expected(qe, [2], _ids("A dog"), [1]))


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16(kind: str) -> None:
    qe = _with_head(_model(kind, torch.bfloat16))
    prompts = tiny.TEXTS[::-1]
    scored = qe.score(tiny.TEXTS, prompts)
    before = qe.model.config.decoder_start_token_id if kind in ("t5", "bart") else None
    for item, prompt in zip(scored, prompts, strict=True):
        ids = item.token_ids
        _, logits = _hidden_and_logits(
            qe.model, _ids(prompt) if before is None else [before], ids, None if before is None else _ids(prompt)
        )
        logprob = logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert item.status == "ok"
        bound = 0.02 * logits.abs().max().item()  # bfloat16 keeps 8 bits, of the logits here and in the layers
        assert np.abs(np.log(item.token_prob) - logprob.numpy()).max() < max(bound, 0.1)


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize(("kind", "threads"), [("llama", 2), ("llama", 1), ("gemma2", 1), ("gpt2", 1), ("bart", 1)])
def test_the_rest_of_a_batch_does_not_change_a_bit(kind: str, threads: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(threads)
    qe = _estimator(kind, options)
    texts = [text[:length] for text in tiny.TEXTS for length in (2, 23, 90)]
    prompts = [tiny.TEXTS[i % 5][: i % 11 + 1] for i in range(len(texts))]
    with use_backend("reference"):
        together = qe.score(texts, prompts, batch_size=32)
        for signals in (None, ["quality"]):
            for i, item in enumerate(together):
                (alone,) = qe.score([texts[i]], [prompts[i]], signals=signals)
                for signal in signals or SIGNALS:
                    first, second = getattr(item, f"token_{signal}"), getattr(alone, f"token_{signal}")
                    assert np.array_equal(first, second), (signal, i)


def test_the_rest_of_a_batch_in_bfloat16() -> None:
    qe = _with_head(_model(dtype=torch.bfloat16))
    for text, item in zip(tiny.TEXTS, qe.score(tiny.TEXTS), strict=True):
        (alone,) = qe.score([text])
        np.testing.assert_allclose(_scores(item), _scores(alone), atol=0.05)


def test_rule_and_signals() -> None:
    qe = _estimator()
    (scored,) = qe.score(["A dog"])
    only = QualityEstimator(qe.model, qe.tokenizer, rule=DominantRule.top_k(3))
    (without_head,) = only.score(["A dog"])
    assert without_head.token_quality is None
    assert without_head.quality is None
    assert "token_quality" not in without_head.to_dict()
    assert np.array_equal(without_head.token_prob, scored.token_prob)
    _, logits = _hidden_and_logits(qe.model, [1], _ids("A dog"), None)
    expected = F.boosted_prob(logits, torch.tensor(_ids("A dog")), DominantRule.top_k(3))
    np.testing.assert_allclose(without_head.token_boosted_prob, expected, rtol=1e-4)
    for signal in SIGNALS:
        (one,) = qe.score(["A dog"], signals=[signal])
        assert [name for name in SIGNALS if getattr(one, f"token_{name}") is not None] == [signal]
        assert np.array_equal(getattr(one, f"token_{signal}"), getattr(scored, f"token_{signal}"))
    for wrong in ("prob", [], ["probability"]):
        with pytest.raises(ValueError, match="signals: expected some of"):
            qe.score(["x"], signals=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'quality' needs a Sigmoid Head"):
        only.score(["x"], signals=["quality"])


def test_empty_input() -> None:
    qe = _estimator()
    assert qe.score([]) == []
    assert qe.generate([]) == []
    (empty, blank) = qe.score(["", "  \n"])
    assert (empty.status, empty.reason, empty.quality, empty.token_ids) == ("empty", "no tokens", None, [])
    assert empty.token_quality is not None
    assert len(empty.token_quality) == 0
    assert blank.status == "ok"
    assert "".join(blank.tokens) == "  \n"
    json.dumps(empty.to_dict(), allow_nan=False)
    (with_prompt,) = qe.score([""], ["A dog"])
    assert with_prompt.status == "empty"
    (seq2seq,) = _estimator("bart").score([""], ["A dog"])
    assert seq2seq.status == "empty"


def test_odd_texts_are_scored_whole() -> None:
    qe = _estimator()
    texts = ["a</s>b<s>", "🎉🏳️‍🌈", "e\u0301\u0327", "\x00", "שלום, مرحبا", "\ufffd"]
    for text, item in zip(texts, qe.score(texts), strict=True):
        assert item.status == "ok"
        assert item.text == text
        _check(item, _expected(qe, [1], item.token_ids))
        json.dumps(item.to_dict(), allow_nan=False)
    assert 2 in qe.score([texts[0]])[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": "x"}, TypeError, "texts: expected a list of strings, got one string"),
        ({"texts": ["x", None]}, TypeError, r"texts\[1\]: expected a string, got NoneType"),
        ({"texts": ["x"], "prompts": "y"}, ValueError, "prompts: expected one for each of 1 texts"),
        ({"texts": ["x"], "prompts": ["y", "z"]}, ValueError, "prompts: expected one for each of 1 texts, got 2"),
        ({"texts": ["x"], "prompts": [{"role": "user"}]}, TypeError, "prompt: expected a string or a list of chat"),
        ({"texts": ["x"], "batch_size": 0}, ValueError, "batch_size: expected 1 or more, got 0"),
        ({"texts": ["x"], "batch_size": -1}, ValueError, "batch_size: expected 1 or more, got -1"),
        ({"texts": ["x"], "max_length": 0}, ValueError, "max_length: expected 1 or more, got 0"),
        ({"texts": ["x"], "max_length": 9, "overlap": 9}, ValueError, r"overlap: expected a number in \[0, 9\), got 9"),
        ({"texts": [], "overlap": -1}, ValueError, r"overlap: expected a number in \[0, 64\), got -1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _estimator().score(**arguments)


def test_progress_counts_every_scored_token() -> None:
    qe, seen = _estimator(), []
    scored = qe.score(tiny.TEXTS, batch_size=2, on_progress=seen.append)
    assert sum(seen) == sum(len(item.token_ids) for item in scored)
    seen.clear()
    generated = qe.generate(PROMPTS, batch_size=3, max_new_tokens=4, on_progress=seen.append)
    assert len(seen) == 2
    assert sum(seen) == sum(len(item.token_ids) for item in generated)


# --- tokenizers


def test_without_bos_the_first_token_has_no_score() -> None:
    qe = _estimator()
    tokenizer = tiny.tokenizer_with(bos_token=None)
    without = QualityEstimator(qe.model, tokenizer, qe.head)
    for scored in (without.score(["A dog", "x"]), qe.score(["A dog", "x"], add_bos=False)):
        assert [item.status for item in scored] == ["partial", "failed"]
        for item in scored:
            assert item.reason == "the first token has no context (no BOS token, no prompt)"
        assert np.isnan(_scores(scored[0])[:, 0]).all()
        assert scored[0].to_dict()["token_prob"][0] is None
        ids = scored[0].token_ids
        expected = _expected(qe, ids[:1], ids[1:])
        np.testing.assert_allclose(scored[0].token_prob[1:], expected["prob"].float(), rtol=1e-4)
        assert scored[0].quality == pytest.approx(scored[0].token_quality[1:].mean())
        assert scored[1].quality is None
    (prompted,) = without.score(["A dog"], ["x"])
    assert prompted.status == "ok"


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_without_padding_token(kind: str) -> None:
    qe = _estimator(kind)
    prompts = PROMPTS[:3]
    for tokenizer in (
        tiny.tokenizer_with(pad_token=None),
        tiny.tokenizer_with(pad_token=None, eos_token=None),
        tiny.tokenizer_with(pad_token="<new>"),  # no embedding for it
    ):
        if tokenizer.pad_token is not None:
            tokenizer.add_special_tokens({"pad_token": "<new>"})
            assert tokenizer.pad_token_id == qe.model.config.vocab_size
        qe.head.config.tokenizer_fingerprint = None  # type: ignore[union-attr]
        other = QualityEstimator(qe.model, tokenizer, qe.head)
        for first, second in zip(other.score(tiny.TEXTS[:3], prompts), qe.score(tiny.TEXTS[:3], prompts), strict=True):
            _same(first, second)
        for first, second in zip(
            other.generate(prompts, max_new_tokens=5), qe.generate(prompts, max_new_tokens=5), strict=True
        ):
            _same(first, second)


def test_slow_tokenizer() -> None:
    tokenizer = tiny.SlowTokenizer(model_max_length=64)
    qe = _with_head(_model(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    (item,) = qe.score(["a dog é"])
    assert item.tokens == list("a dog é")
    assert item.status == "ok"
    (generated,) = qe.generate(["a dog"], max_new_tokens=6, eos_token_id=None)
    assert len(generated.tokens) == len(generated.token_ids) == 6
    assert "".join(generated.tokens) == generated.text


def test_chat_messages() -> None:
    tokenizer = tiny.tokenizer_with(chat_template=tiny.CHAT_TEMPLATE)
    qe = _with_head(_model(), tokenizer=tokenizer)
    chat = [{"role": "user", "content": "Hello"}]
    given = copy.deepcopy(chat)
    (item,) = qe.score(["A dog"], [chat])
    rendered = "<s>user: Hello</s><s>"
    assert item.prompt == rendered
    _check(item, _expected(qe, _ids(rendered), _ids("A dog")))
    (generated,) = qe.generate([chat], max_new_tokens=4)
    assert generated.prompt == rendered
    assert chat == given
    with pytest.raises(TypeError, match="prompt: expected a string or a list of chat messages"):
        qe.generate(chat)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chat_template"):
        _estimator().score(["A dog"], [chat])


# --- long text

LONG = "one two three four five six seven eight nine ten. The cat sat on the mat. " * 3


@pytest.mark.parametrize("overlap", [None, 0, 1, 15, 31])
@pytest.mark.parametrize("prompt", [None, "A dog", "The cat sat on the mat. " * 9])
def test_windows(prompt: str | None, overlap: int | None) -> None:
    qe = _estimator()
    (item,) = qe.score([LONG], [prompt], max_length=32, overlap=overlap)
    assert item.status == "ok"
    assert item.reason is not None
    assert item.reason.startswith("longer than 32 tokens: scored in ")
    ids, before = _ids(LONG), [1] if prompt is None else _ids(prompt)
    everything, overlap = [*before, *ids], 16 if overlap is None else overlap
    start = 0 if len(before) <= 32 else len(before) - 1 - overlap
    place, windows = len(before), 0
    while place < len(everything):
        end = min(start + 33, len(everything))
        expected = _expected(qe, everything[start:place], everything[place:end])
        part = slice(place - len(before), end - len(before))
        for signal in SIGNALS:
            found = getattr(item, f"token_{signal}")[part]
            np.testing.assert_allclose(found, expected[signal].float(), rtol=5e-5, atol=2e-6)
        start, place, windows = end - 1 - overlap, end, windows + 1
    assert item.reason.endswith(f"in {windows} windows")


def test_first_window_is_as_without_windows() -> None:
    qe = _estimator()
    text = LONG[:100]
    (whole,), (cut,) = qe.score([text]), qe.score([text], max_length=20)
    assert whole.reason is None
    assert len(whole.token_ids) > 30
    np.testing.assert_allclose(_scores(cut)[:, :20], _scores(whole)[:, :20], rtol=1e-5, atol=1e-6)
    assert not np.allclose(_scores(cut)[:, 20:], _scores(whole)[:, 20:], rtol=1e-2)
    assert np.isfinite(_scores(cut)).all()


def test_length_limits() -> None:
    qe = _estimator()
    assert qe.context == 64
    length = len(_ids(LONG[:100]))
    (exact,) = qe.score([LONG[:100]], max_length=length, strict=True)  # BOS and all but the last token are read
    assert exact.reason is None
    with pytest.raises(TextTooLongError, match=f"text 1: {length} tokens .* do not fit {length - 1}"):
        qe.score(["x", LONG[:100]], max_length=length - 1, strict=True)
    with pytest.raises(TextTooLongError, match="text 0"):  # a prompt that would be cut
        qe.score(["x"], [LONG], strict=True)
    (item,) = qe.score(["x"], [LONG])
    assert item.reason == "longer than 64 tokens: the prompt is cut"
    (larger,) = qe.score([LONG], max_length=10**6)  # no more than the model's context
    assert larger.reason is not None
    (short,) = qe.score(["A dog"], max_length=1)
    assert short.status == "ok"
    _check(short, {name: torch.cat([_expected(qe, [a], [b])[name] for a, b in _pairs("A dog")]) for name in SIGNALS})


def _pairs(text: str) -> Sequence[tuple[int, int]]:
    ids = [1, *_ids(text)]
    return list(itertools.pairwise(ids))


def test_context_of_tokenizer_and_model() -> None:
    assert QualityEstimator(_model(), tiny.tokenizer_with(model_max_length=int(1e30))).context == 64
    assert QualityEstimator(_model(), tiny.tokenizer_with(model_max_length=40)).context == 40
    assert QualityEstimator(_model("t5"), tiny.tokenizer_with(model_max_length=int(1e30))).context == 2**31


@pytest.mark.parametrize(("kind", "option"), [("gpt2", "n_positions"), ("bart", "max_position_embeddings")])
def test_padding_stays_within_learned_positions(kind: str, option: str) -> None:
    qe = QualityEstimator(tiny.model(kind, **{option: 50}), tiny.tokenizer())
    source = LONG[:90]
    assert 50 >= len(_ids(source)) > 32
    (item,) = qe.score([LONG if kind == "gpt2" else "A dog"], [source])
    assert item.status == "ok"


def test_a_text_too_long_for_an_encoder_decoder_fails() -> None:
    qe = _estimator("bart")
    for text, source in ((LONG, "x"), ("x", LONG)):
        failed, fine = qe.score([text, "A dog"], [source, "x"])
        assert failed.status == "failed"
        assert failed.reason is not None
        assert failed.reason.startswith("longer than 64 tokens")
        assert failed.quality is None
        assert fine.status == "ok"
        with pytest.raises(TextTooLongError):
            qe.score([text], [source], strict=True)


# --- generated text


def _decoder_context(qe: QualityEstimator, prompt: str) -> tuple[list[int], list[int] | None]:
    if qe.model.config.is_encoder_decoder:
        return [qe.model.config.decoder_start_token_id], _ids(prompt)
    return _ids(prompt), None


def _check_generated(qe: QualityEstimator, item: ScoredText, prompt: str) -> None:
    assert len(item.tokens) == len(item.offsets) == len(item.token_ids)
    assert item.tokens == [item.text[start:end] for start, end in item.offsets]
    assert item.text == qe.tokenizer.decode(item.token_ids, skip_special_tokens=True)
    if item.token_ids:
        before, source = _decoder_context(qe, prompt)
        _check(item, _expected(qe, before, item.token_ids, source), atol=5e-6)


@pytest.mark.parametrize("options", tiny.GENERATION, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_generated_scores_are_those_of_the_raw_logits(kind: str, options: dict[str, Any]) -> None:
    qe = _estimator(kind)
    torch.manual_seed(2)
    results = qe.generate(PROMPTS, max_new_tokens=7, batch_size=3, **options)
    each = options.get("num_return_sequences", 1)
    assert len(results) == len(PROMPTS) * each
    for i, item in enumerate(results):
        assert item.prompt == PROMPTS[i // each]
        assert item.finish_reason in ("eos", "length")
        _check_generated(qe, item, PROMPTS[i // each])


def test_static_cache_and_max_length() -> None:
    qe = _estimator()
    dynamic = qe.generate(PROMPTS, max_new_tokens=6)
    for first, second in zip(
        qe.generate(PROMPTS, max_new_tokens=6, cache_implementation="static"), dynamic, strict=True
    ):
        _same(first, second)
    (item,) = qe.generate(["A dog"], max_length=len(_ids("A dog")) + 4)
    assert len(item.token_ids) == 4
    _check_generated(qe, item, "A dog")


@pytest.mark.parametrize("kind", MODELS)
def test_prompts_of_different_lengths_are_as_alone(kind: str) -> None:
    qe = _estimator(kind)
    for prompt, item in zip(PROMPTS, qe.generate(PROMPTS, max_new_tokens=6), strict=True):
        _same(qe.generate([prompt], max_new_tokens=6)[0], item, atol=5e-6)


def test_scoring_what_was_generated_gives_its_scores() -> None:
    """With a tokenizer of one token a character, so that the text is tokenized as it was generated."""
    tokenizer = tiny.SlowTokenizer(model_max_length=64)
    qe = _with_head(_model(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    prompts = ["a dog", "cat", "the quick brown fox"]
    generated = qe.generate(prompts, max_new_tokens=8, suppress_tokens=[0, 1, 2, 3])
    for item, again in zip(generated, qe.score([item.text for item in generated], prompts), strict=True):
        assert item.token_ids == again.token_ids
        assert item.offsets == again.offsets
        np.testing.assert_allclose(_scores(item), _scores(again), rtol=2e-5, atol=2e-6)


def _greedy(qe: QualityEstimator, prompt: str, count: int = 8) -> list[int]:
    return qe.generate([prompt], max_new_tokens=count, eos_token_id=None)[0].token_ids


@pytest.mark.parametrize("way", ["argument", "generation_config", "model", "tensor", "both"])
def test_every_eos_id_is_honoured(way: str) -> None:
    qe = _estimator()
    first, second = _greedy(qe, "A dog"), _greedy(qe, "The cat")
    stop = [first[2], second[4]]
    options: dict[str, Any] = {"max_new_tokens": 8}
    if way == "argument":
        options["eos_token_id"] = stop
    elif way == "tensor":
        options["eos_token_id"] = torch.tensor(stop)
    elif way == "model":
        qe.model.generation_config.eos_token_id = stop
    elif way == "generation_config":
        options = {"generation_config": GenerationConfig(max_new_tokens=8, eos_token_id=stop)}
    else:  # what the config given leaves open comes from the model's
        qe.model.generation_config.eos_token_id = stop
        options = {"generation_config": GenerationConfig(max_new_tokens=8)}
    results = qe.generate(["A dog", "The cat"], **options)
    for item, ids in zip(results, (first, second), strict=True):
        end = next(i for i, token in enumerate(ids) if token in stop)
        assert item.token_ids == ids[:end]
        assert item.finish_reason == "eos"
    _check_generated(qe, results[1], "The cat")
    if "generation_config" in options:
        assert options["generation_config"].to_dict() == GenerationConfig(**_config_options(way, stop)).to_dict()


def _config_options(way: str, stop: list[int]) -> dict[str, Any]:
    return {"max_new_tokens": 8, **({"eos_token_id": stop} if way == "generation_config" else {})}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_empty_outputs(num_beams: int) -> None:
    qe = _estimator()
    for prompts in (["A dog"], ["A dog", "The cat"]):
        stop = [_greedy(qe, prompt)[0] for prompt in prompts[:1]]
        options = {"suppress_tokens": [i for i in range(300) if i not in stop]} if num_beams > 1 else {}
        results = qe.generate(prompts, max_new_tokens=5, eos_token_id=stop, num_beams=num_beams, **options)
        item = results[0]
        assert (item.text, item.token_ids, item.tokens, item.offsets) == ("", [], [], [])
        assert (item.status, item.reason, item.finish_reason) == ("empty", "no tokens", "eos")
        assert item.quality is None
        assert item.to_dict()["quality"] is None
        assert item.to_dict()["token_quality"] == []
        if len(prompts) > 1 and num_beams == 1:
            assert results[1].status == "ok"


def test_generated_padding_tokens_are_kept() -> None:
    """Padding is told from a token that the model wrote."""
    qe = _estimator()
    (item,) = qe.generate(["A dog"], max_new_tokens=4, suppress_tokens=list(range(1, 300)))
    assert item.token_ids == [0] * 4
    assert item.text == ""
    assert item.finish_reason == "length"
    assert item.status == "ok"
    _check_generated(qe, item, "A dog")


class _StopAfter(StoppingCriteria):  # type: ignore[misc]
    """Ends a row when it holds a token of our choice."""

    def __init__(self, token: int, start: int) -> None:
        self.token, self.start = token, start

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return (input_ids[:, self.start :] == self.token).any(1)


@pytest.mark.parametrize("eos", [None, 2, "pad"])
def test_stopping_criteria(eos: Any) -> None:
    """A row ends where its criterion held, whatever generate writes behind it; the same in a batch and alone."""
    qe = _estimator()
    ids = _greedy(qe, "A dog")
    assert 2 not in ids
    start = max(len(_ids(prompt)) for prompt in ("A dog", "The cat"))
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": 0 if eos == "pad" else eos}
    criterion = _StopAfter(ids[2], start)
    first, second = qe.generate(["A dog", "The cat"], stopping_criteria=[criterion], **options)
    assert first.token_ids == ids[: ids.index(ids[2]) + 1]
    assert first.finish_reason == "stop"
    assert second.token_ids == _greedy(qe, "The cat")
    assert second.finish_reason == "length"
    _check_generated(qe, first, "A dog")
    criterion = _StopAfter(ids[2], len(_ids("A dog")))
    _same(qe.generate(["A dog"], stopping_criteria=[criterion], **options)[0], first)
    (limited,) = qe.generate(["A dog"], stopping_criteria=[MaxLengthCriteria(start + 1)], **options)
    assert len(limited.token_ids) == start + 1 - len(_ids("A dog"))


@pytest.mark.parametrize("way", ["argument", "generation_config", "model"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_stop_strings(way: str, num_beams: int) -> None:
    tokenizer = tiny.SlowTokenizer(model_max_length=64)
    qe = _with_head(_model(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 8, "suppress_tokens": [0, 1, 2, 3], "num_beams": num_beams}
    text = qe.generate(["a dog"], **options)[0].text
    stop = text[2:4]
    if way == "argument":
        results = qe.generate(["a dog", "cat"], stop_strings=[stop], **options)
    elif way == "model":
        qe.model.generation_config.stop_strings = stop
        results = qe.generate(["a dog", "cat"], **options)
    else:
        results = qe.generate(["a dog", "cat"], generation_config=GenerationConfig(stop_strings=stop, **options))
    assert num_beams > 1 or results[0].finish_reason == "stop"
    for item in results:
        assert (item.finish_reason == "stop") == item.text.endswith(stop)
        assert stop not in item.text[:-2] or num_beams > 1
        assert len(item.token_ids) == len(item.text)
    if num_beams == 1:
        assert results[0].text == text[: text.index(stop) + 2]


def test_forced_bos_is_left_out() -> None:
    qe = _estimator("bart")
    results = qe.generate(PROMPTS[:2], max_new_tokens=5, forced_bos_token_id=1, eos_token_id=None)
    for prompt, item in zip(PROMPTS, results, strict=False):
        assert len(item.token_ids) == 4
        _check(item, _expected(qe, [2, 1], item.token_ids, _ids(prompt)))
    (item,) = qe.generate(["A dog"], max_new_tokens=3, forced_eos_token_id=2)
    assert len(item.token_ids) == 2
    assert item.finish_reason == "eos"


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": "self"},
        {"assistant_early_exit": 1},
        {"prefill_chunk_size": 2},
        {"prefill_chunk_size": 2, "num_beams": 2},
        {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "num_beams": 2},
        {"custom_generate": "owner/name"},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
    ],
    ids=str,
)
def test_unsupported_decoding(options: dict[str, Any]) -> None:
    qe = _estimator()
    options = {name: qe.model if value == "self" else value for name, value in options.items()}
    with pytest.raises(NotImplementedError, match="one forward pass a token"):
        qe.generate(["A dog A dog A dog"], max_new_tokens=4, **options)
    assert len(qe.model.lm_head._forward_pre_hooks) == 0


def test_forward_passes_that_are_not_one_a_token() -> None:
    """Whatever decoding comes up next."""
    qe = _estimator()

    def guide(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + qe.model(input_ids).logits[:, -1]

    with pytest.raises(NotImplementedError, match="8 forward passes of 1 rows for 1 sequences of 4 tokens"):
        qe.generate(["A dog"], max_new_tokens=4, logits_processor=[guide])


def test_generate_refuses() -> None:
    qe = _estimator()
    with pytest.raises(TypeError, match="prompts: expected a list of prompts"):
        qe.generate("A dog")
    with pytest.raises(TypeError, match="generate: input_ids come from prompts"):
        qe.generate(["A dog"], input_ids=torch.ones(1, 1))
    with pytest.raises(ValueError, match="batch_size: expected 1 or more, got 0"):
        qe.generate(["A dog"], batch_size=0)
    with pytest.raises(TypeError, match="prompt: expected"):
        qe.generate([3])  # type: ignore[list-item]


def test_generate_from_an_empty_prompt_starts_with_bos() -> None:
    qe = _estimator()
    (item,) = qe.generate([""], max_new_tokens=4)
    _check(item, _expected(qe, [1], item.token_ids))
    assert item.prompt == ""


# --- what must not look confident


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_broken_hidden_states(options: dict[str, Any], value: float) -> None:
    """One position of one text; its neighbours in the text and the batch keep their scores."""
    qe = _estimator("llama", options)
    texts = ["The cat sat", "A dog, and"]
    before = qe.score(texts)

    def spoil(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].clone()
        hidden[0, 2] = value
        return (hidden,)

    for signals in (None, ["quality"]):
        qe.model.lm_head.register_forward_pre_hook(spoil)
        first, second = qe.score(texts, signals=signals)
        qe.model.lm_head._forward_pre_hooks.clear()
        spoiled, whole = (first, second) if first.status != "ok" else (second, first)
        assert (spoiled.status, whole.status) == ("partial", "ok")
        assert spoiled.reason == f"logits that are not finite at 1 of {len(spoiled.token_ids)} tokens"
        clean = before[texts.index(spoiled.text)]
        for signal in signals or SIGNALS:
            scores = getattr(spoiled, f"token_{signal}")
            assert np.isnan(scores[2])
            assert np.isfinite(np.delete(scores, 2)).all()
            np.testing.assert_allclose(np.delete(scores, 2), np.delete(getattr(clean, f"token_{signal}"), 2), rtol=1e-5)
        assert spoiled.to_dict()["token_quality"][2] is None
        assert spoiled.quality is None  # what is missing may be what is wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_a_broken_weight_row(options: dict[str, Any], value: float) -> None:
    """The softmax is broken everywhere; a full head's own weight only where it is asked for that token."""
    qe = _estimator("llama", options)
    token = _ids("A dog")[1]
    with torch.no_grad():
        qe.model.lm_head.weight[token] = value
        if options["kind"] == "full":
            qe.head.weight[token] = value  # type: ignore[union-attr,operator]
    (item,) = qe.score(["A dog"])
    if value != value:
        assert item.status == "failed"
        assert item.reason is not None
        assert "not finite" in item.reason
        assert np.isnan(_scores(item)).all()
        assert item.quality is None
    else:
        assert item.status in ("partial", "failed")
        assert np.isnan(_scores(item)[:, 1]).all()
    (alone,) = qe.score(["A dog"], signals=["quality"])
    assert alone.status in ("partial", "failed")
    assert np.isnan(alone.token_quality[1])
    (generated,) = qe.generate(["A dog"], max_new_tokens=3, eos_token_id=None)
    assert generated.status in ("partial", "failed")
    json.dumps(generated.to_dict(), allow_nan=False)


def test_overflow_in_the_head_is_not_confidence() -> None:
    qe = _estimator()
    with torch.no_grad():
        qe.head.weight.fill_(3e38)  # type: ignore[union-attr,operator]
    (item,) = qe.score(["A dog"], signals=["quality"])
    assert np.isnan(item.token_quality).all()
    assert item.status == "failed"


def test_unknown_change_of_the_logits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    qe = _estimator()
    forward = type(qe.model).forward

    def changed(self: Any, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        output.logits = output.logits / 2
        return output

    monkeypatch.setattr(type(qe.model), "forward", changed)
    for call in (lambda: qe.score(["x"]), lambda: qe.generate(["x"], max_new_tokens=2)):
        with pytest.raises(ValueError, match="changes its logits after the output embedding"):
            call()


def test_head_of_another_model_or_tokenizer() -> None:
    model = _model()
    head = SigmoidHead.from_lm_head(model, tiny.tokenizer())
    with pytest.raises(HeadMismatchError, match="vocab_size: the head has 300, the model 304"):
        QualityEstimator(_model(vocab_size=304), tiny.tokenizer(), head)
    with pytest.raises(HeadMismatchError, match="tokenizer: the head was made with"):
        QualityEstimator(model, tiny.SlowTokenizer(), head)


# --- the model is left as it was


def _state(model: Any) -> Any:
    return [
        (name, module.training, len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()]


def _assert_state(model: Any, before: Any) -> None:
    for now, then in zip(_state(model), before, strict=True):
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(now, then, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def _raise_in(module: Any) -> Any:
    def fail(*args: Any) -> None:
        raise RuntimeError("broken layer")

    return module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_nothing_is_left_on_the_model(kind: str) -> None:
    qe = _estimator(kind)
    model = qe.model
    model.train()
    part = model.get_output_embeddings()
    part.eval()  # a module frozen by hand stays so
    next(model.parameters()).requires_grad_(False)
    state, config, generation = _state(model), model.config.to_dict(), model.generation_config.to_dict()
    calls: list[Callable[[], Any]] = [
        lambda: qe.score(["A dog"], ["x"]),
        lambda: qe.generate(["A dog"], max_new_tokens=3),
        lambda: qe.generate(["A dog"], max_new_tokens=3, num_beams=2),
    ]
    for call in calls:
        call()
        _assert_state(model, state)
        broken = _raise_in(part)
        with pytest.raises(RuntimeError, match="broken layer"):
            call()
        broken.remove()
        _assert_state(model, state)
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    ids = torch.tensor([[5, 6, 7]])  # what the model renewed while it ran can be trained with
    inputs = {"decoder_input_ids": ids} if kind == "bart" else {}
    model(input_ids=ids, **inputs).logits.sum().backward()


def test_no_logits_are_computed_when_text_is_scored() -> None:
    qe, shapes, options = _estimator(), [], []
    qe.score(["x"])  # the check of the logits needs some, once
    qe.model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    qe.model.register_forward_pre_hook(lambda module, args, kwargs: options.append(kwargs), with_kwargs=True)
    qe.score(tiny.TEXTS)
    assert shapes
    assert all(shape.numel() == 0 for shape in shapes)
    assert not any(kwargs.get("output_hidden_states") for kwargs in options)


def test_generate_keeps_the_last_positions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    qe, seen = _estimator(), {}
    generate = type(qe.model).generate

    def spy(self: Any, **options: Any) -> Any:
        seen.update(options)
        output = generate(self, **options)
        assert output.logits is None
        assert output.scores is None
        assert output.hidden_states is None
        return output

    monkeypatch.setattr(type(qe.model), "generate", spy)
    qe.generate(PROMPTS, max_new_tokens=3)
    assert not {"output_scores", "output_logits", "output_hidden_states"} & set(seen)


def test_inputs_are_not_changed() -> None:
    qe = _estimator()
    texts, prompts = ["A dog", "x" * 400], ["The cat", None]
    signals, criteria, stop = ["prob", "quality"], [_StopAfter(5, 0)], [2, 7]
    copies = copy.deepcopy((texts, prompts, signals, stop))
    qe.score(texts, prompts, signals=signals)
    config = GenerationConfig(max_new_tokens=3, eos_token_id=stop)
    before = config.to_dict()
    qe.generate(["A dog"], signals=signals, stopping_criteria=criteria, generation_config=config)
    assert (texts, prompts, signals, stop) == copies
    assert config.to_dict() == before
    assert len(criteria) == 1
    assert isinstance(criteria[0], _StopAfter)


def test_a_model_that_changed_since_is_read_anew() -> None:
    qe = QualityEstimator(_model(), tiny.tokenizer())
    (before,) = qe.score(["A dog"])
    with torch.no_grad():
        qe.model.lm_head.weight.mul_(0.5)
    (scaled,) = qe.score(["A dog"])
    assert not np.allclose(before.token_prob, scaled.token_prob, rtol=1e-2)
    qe.model.double()
    (double,) = qe.score(["A dog"])
    np.testing.assert_allclose(scaled.token_prob, double.token_prob, rtol=1e-4)
    qe.model.resize_token_embeddings(310)
    (resized,) = qe.score(["A dog"])
    assert resized.status == "ok"
    with_head = _estimator()
    with_head.model.resize_token_embeddings(310)
    with pytest.raises(HeadMismatchError, match="vocab_size: the head has 300, the model 310"):
        with_head.score(["A dog"])


# --- ScoredText


def _scored(*quality: float) -> ScoredText:
    return ScoredText("x", token_ids=[1] * len(quality), token_quality=np.array(quality, dtype=np.float32))


def test_aggregate() -> None:
    item = _scored(math.nan, 0.5, 0.25, 1.0)
    expected = {
        "mean": 1.75 / 3,
        "min": 0.25,
        "product": 0.125,
        "mean_log": math.log(0.125) / 3,
        "sum_log": math.log(0.125),
    }
    for method, value in expected.items():
        assert item.aggregate(method) == pytest.approx(value)  # type: ignore[arg-type]
        assert isinstance(item.aggregate(method), float)  # type: ignore[arg-type]
        for nothing in (_scored(), _scored(math.nan), _scored(0.5, math.nan, 0.5), ScoredText("x")):
            assert nothing.aggregate(method) is None  # type: ignore[arg-type]
        assert item.aggregate(method, "prob") is None  # type: ignore[arg-type]
    assert item.quality == pytest.approx(1.75 / 3)
    assert _scored(0.0).aggregate("sum_log") == -math.inf
    assert _scored(*[0.1] * 30).aggregate("product") == pytest.approx(1e-30)
    item.token_entropy = np.array([0.5, 1.5], dtype=np.float32)
    assert item.aggregate("mean", "entropy") == 1.0


@pytest.mark.parametrize("item", [_scored(), _scored(0.5), ScoredText("x")])
def test_aggregate_refuses(item: ScoredText) -> None:
    with pytest.raises(ValueError, match="method: expected one of mean, min, product, mean_log, sum_log"):
        item.aggregate("median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="signal: expected one of quality, prob"):
        item.aggregate("mean", "logit")  # type: ignore[arg-type]
    for method in ("product", "mean_log", "sum_log"):
        with pytest.raises(ValueError, match="method: expected one of mean, min for entropy"):
            item.aggregate(method, "entropy")  # type: ignore[arg-type]


def test_to_dict_is_json_and_exact() -> None:
    values = [0.1, math.nan, 1 / 3, 1e-38, 1e-45, 1.0, 0.0, np.nextafter(np.float32(1), np.float32(0))]
    item = _scored(*values)
    item.offsets = [(0, 1)]
    text = json.dumps(item.to_dict(), allow_nan=False)
    read = json.loads(text)["token_quality"]
    assert read[1] is None
    back = np.array([math.nan if value is None else value for value in read], dtype=np.float32)
    assert np.array_equal(back, np.array(values, dtype=np.float32), equal_nan=True)
    assert read[0] == 0.1  # the shortest decimal that is the same float32
    assert "0.33333334" in text
    assert json.loads(text)["offsets"] == [[0, 1]]
    assert not {"token_prob", "token_entropy"} & set(json.loads(text))


def test_estimator_results_are_json() -> None:
    qe = _estimator()
    for item in [*qe.score([*tiny.TEXTS, ""]), *qe.generate(PROMPTS, max_new_tokens=5)]:
        content = json.loads(json.dumps(item.to_dict(), allow_nan=False))
        count = len(item.token_ids)
        assert all(len(value) == count for name, value in content.items() if name.startswith("token"))
        assert len(content["offsets"]) == count


# --- the package


def test_importing_pyqe_does_not_import_torch() -> None:
    code = (
        "import sys, pyqe; assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "dir(pyqe); pyqe.__version__; assert 'torch' not in sys.modules;"
        "pyqe.SigmoidHead; assert 'torch' in sys.modules;"
        "assert all(getattr(pyqe, name) is not None for name in pyqe.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_on_one_model_do_not_mix_their_texts() -> None:
    lm, texts = tiny.model(), ["The cat sat", "one two three four five", "x", "A dog, and another dog!"]
    estimators = [QualityEstimator(lm, tiny.tokenizer()) for _ in range(2)]
    alone = {text: estimators[0].score([text])[0].token_prob for text in texts}
    with ThreadPoolExecutor(4) as pool:
        jobs = [(text, pool.submit(estimators[i % 2].score, [text])) for i, text in enumerate(texts * 10)]
        for text, job in jobs:
            assert np.array_equal(job.result()[0].token_prob, alone[text])
