"""What quality adds to generating and to reading text with a language model."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import pyqe
from pyqe.bench.case import Case, Outcome, Rival, Settings
from pyqe.cli.options import load_model
from pyqe.lm_head import LMHead, capture_hidden

_SMOLLM2 = "smollm2"
_RANDOM = {"random LM": (128256, 256), "small random LM": (2000, 32)}  # V, D
_WORDS = "The capital of France is Paris, and the moon orbits the"


def cases(settings: Settings) -> list[Callable[[], Case]]:
    if settings.quick:
        name = "small random LM"
        return [partial(generate, name, 2, 4), partial(attached, name, 2, 4), partial(score, name, 2, 16)]
    return [
        case
        for name in ("random LM", _SMOLLM2)
        for case in (
            *(partial(generate, name, prompts, 32) for prompts in (1, 8)),
            partial(attached, name, 8, 64),
            partial(score, name, 8, 128),
        )
    ]


@lru_cache(maxsize=1)
def _load(name: str) -> tuple[Any, Any]:
    return load_model(name, "auto", "cpu") if name == _SMOLLM2 else _random_lm(*_RANDOM[name])


def _random_lm(vocab_size: int, hidden_size: int) -> tuple[Any, Any]:
    """A small Llama with random weights and a large vocabulary, and a tokenizer of as many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


def _facts(name: str, rows: int, model: Any) -> dict[str, Any]:
    head = LMHead.from_model(model)
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(head.weight.dtype, "fp32")
    return {"model": name, "n": rows, "d": head.hidden_size, "v": head.vocab_size, "dtype": dtype}


def _absent(case: str, name: str, rows: int, reason: Exception) -> Case:
    return Case("generate", case, {"model": name, "n": rows}, tuple, [Rival("pyqe", missing=str(reason))])


def generate(name: str, rows: int, new_tokens: int) -> Case:
    try:
        model, tokenizer = _load(name)
    except (FileNotFoundError, ImportError) as error:
        return _absent("generate", name, rows, error)
    qe = pyqe.QualityEstimator(model, tokenizer, pyqe.SigmoidHead.from_lm_head(model, tokenizer))
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def with_quality(prompts: list[str], signals: Any) -> Outcome:
        answers = qe.generate(prompts, signals=signals, **options)
        return {"tokens": torch.tensor([answer.token_ids for answer in answers])}

    @torch.inference_mode()
    def plain(prompts: list[str]) -> Outcome:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        sequences = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
        new = sequences[:, inputs["input_ids"].shape[1] :]
        tokenizer.batch_decode(new)
        return {"tokens": new}

    return Case(
        "generate",
        "generate",
        _facts(name, rows, model),
        lambda: ([_WORDS] * rows,),
        [
            Rival("pyqe", lambda prompts: with_quality(prompts, ("quality",)), "quality of a full head"),
            Rival("pyqe, all signals", lambda prompts: with_quality(prompts, None)),
            Rival("model.generate", plain, "no quality"),
        ],
        description=f"{new_tokens} tokens, greedy, N prompts at a time",
    )


def attached(name: str, rows: int, new_tokens: int) -> Case:
    """What ``pyqe.attach`` adds to the model's own ``generate``."""
    try:
        model, tokenizer = _load(name)
    except (FileNotFoundError, ImportError) as error:
        return _absent("attach", name, rows, error)
    head = pyqe.SigmoidHead.from_lm_head(model, tokenizer)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        "return_dict_in_generate": True,
    }

    def inputs() -> tuple[Any, ...]:
        batch = tokenizer([_WORDS] * rows, return_tensors="pt", padding=True, padding_side="left")
        return batch["input_ids"], batch["attention_mask"]

    def written(output: Any, ids: Tensor) -> Outcome:
        return {"tokens": output.sequences[:, ids.shape[1] :]}

    def with_quality(ids: Tensor, mask: Tensor) -> Outcome:
        with pyqe.attach(model, head):
            output = model.generate(ids, attention_mask=mask, **options)
        found = {name: output[name] for name in ("token_quality", "token_prob", "token_entropy")}
        return {**written(output, ids), **found}

    def plain(ids: Tensor, mask: Tensor) -> Outcome:
        return written(model.generate(ids, attention_mask=mask, **options), ids)

    def published(ids: Tensor, mask: Tensor) -> Outcome:
        output = model.generate(ids, attention_mask=mask, output_hidden_states=True, output_logits=True, **options)
        new = written(output, ids)
        return {**new, **_both_heads(output, head, new["tokens"])}

    return Case(
        "generate",
        "attach",
        _facts(name, rows, model),
        inputs,
        [
            Rival("pyqe", with_quality, "quality of a full head, probability, entropy"),
            Rival("model.generate", plain, "no quality"),
            Rival("authors", published, "hidden states and logits of all steps, both heads over the vocabulary"),
        ],
        logit_bytes=4 * rows * new_tokens * head.config.vocab_size,
        description=f"{new_tokens} tokens, greedy, N prompts at a time",
    )


@torch.inference_mode()
def _both_heads(output: Any, head: pyqe.SigmoidHead, tokens: Tensor) -> Outcome:
    """Scores of an output with hidden states and logits, from softmax and sigmoid of every token."""
    hidden = torch.stack([states[-1][:, -1] for states in output.hidden_states], 1).float()  # [B, T, D]
    weight = head.get_parameter("weight")
    sigmoid = torch.sigmoid(head.scale * (hidden @ weight.T) + head.shift)
    logprobs = torch.stack(output.logits, 1).log_softmax(-1)
    probs = logprobs.exp()
    return {
        "token_quality": sigmoid.gather(2, tokens[..., None])[..., 0],
        "token_prob": probs.gather(2, tokens[..., None])[..., 0],
        "token_entropy": -(probs * logprobs).sum(-1),
    }


def score(name: str, rows: int, length: int) -> Case:
    try:
        model, tokenizer = _load(name)
    except (FileNotFoundError, ImportError) as error:
        return _absent("score", name, rows, error)
    head = pyqe.SigmoidHead.from_lm_head(model, tokenizer)
    lm_head = LMHead.from_model(model)

    def hidden_of(ids: Tensor) -> Tensor:
        with capture_hidden(model, skip_logits=True) as captured:
            model(ids[:, :-1], use_cache=False)
        return captured[0]

    def quality(hidden: Tensor, ids: Tensor) -> Tensor:
        return torch.sigmoid(head(hidden, ids[:, 1:]))

    @torch.inference_mode()
    def run(what: str, ids: Tensor, hidden: Tensor) -> Outcome:
        if what == "forward pass":
            return {"logits": model(ids[:, :-1], use_cache=False).logits}
        if what == "quality alone":
            return {"quality": quality(hidden, ids)}
        found = {"hidden": hidden_of(ids)}
        if what == "quality":
            return {"quality": quality(found["hidden"], ids)}
        if what == "all signals":
            stats = lm_head.softmax_stats(
                found["hidden"], token_ids=ids[:, 1:], entropy=True, dominant=pyqe.DominantRule()
            )
            return {"quality": quality(found["hidden"], ids), "boosted_prob": stats.boosted_prob(ids[:, 1:])}
        return found

    def inputs() -> tuple[Tensor, ...]:
        ids = torch.randint(lm_head.vocab_size, (rows, length + 1))
        with torch.inference_mode():
            return ids, hidden_of(ids)

    return Case(
        "generate",
        "score",
        _facts(name, rows * length, model),
        inputs,
        [
            Rival("pyqe", partial(run, "quality"), "hidden states, then quality"),
            Rival("pyqe, quality alone", partial(run, "quality alone"), "of hidden states that are there"),
            Rival("pyqe, all signals", partial(run, "all signals"), "entropy, probabilities, BoostedProb too"),
            Rival("forward pass", partial(run, "forward pass"), "logits, no quality"),
            Rival("forward pass without logits", partial(run, "hidden states"), "no quality"),
        ],
        logit_bytes=4 * rows * length * lm_head.vocab_size,
        description=f"{rows} texts of {length} tokens",
    )
