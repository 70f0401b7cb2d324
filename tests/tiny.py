"""Tiny random models and a tokenizer, for tests that need the whole path but no real language model."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
)

from pyqe import SigmoidHead

# Options of generate
GENERATION: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.3},
    {"do_sample": True, "top_k": 3, "num_return_sequences": 3},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 3, "do_sample": True, "temperature": 2.0},
    {"min_new_tokens": 5, "no_repeat_ngram_size": 2},
    {"use_cache": False},
]

TEXTS = [
    "The cat sat on the mat.",
    "A dog, and another dog!",
    "Héllo wörld 🎉, how are you?",
    "one two three four five six seven eight nine ten",
    "x",
]

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)

_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with <pad>, <s>, </s> and a small merged vocabulary."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


@cache
def answer_tokenizer(*, chat: bool = False, joins: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows how answers of a multiple choice look.

    Args:
        chat: with the chat template.
        joins: splits text as newer models do, who make one token of "(A" but not of " (A".
    """
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(words), "isolated")
    joined = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.pre_tokenizer = joined if joins else pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    answers = [f"Answer: {letter}\nAnswer: ({letter})\n({letter}) x" for letter in "ABCDE"]
    core.train_from_iterator((TEXTS + answers + ["Question: What is"]) * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def model(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A random model with large enough weights for its distributions to be uneven."""
    vocab = {"vocab_size": len(tokenizer()), **_IDS, "initializer_range": 0.3}
    decoder = {"num_key_value_heads": 1, "max_position_embeddings": 64}
    config: Any
    if kind == "llama":
        config = LlamaConfig(**{**vocab, **_SMALL, **decoder, **options})
    elif kind == "gpt2":
        config = GPT2Config(**{**vocab, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **options})
    elif kind == "gemma2":
        config = Gemma2Config(
            **{**vocab, **_SMALL, **decoder, "head_dim": 16, "final_logit_softcapping": 3.0, **options}
        )
    elif kind == "cohere":
        config = CohereConfig(**{**vocab, **_SMALL, **decoder, "logit_scale": 0.25, **options})
    elif kind == "granite":
        config = GraniteConfig(**{**vocab, **_SMALL, **decoder, "logits_scaling": 4.0, **options})
    elif kind == "t5":
        config = T5Config(
            **{**vocab, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, **options},
            decoder_start_token_id=0,
        )
    elif kind == "bart":
        sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
        sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        config = BartConfig(
            **{**vocab, **sizes, "max_position_embeddings": 64, "init_std": 0.3, **options},
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    else:
        raise ValueError(kind)
    torch.manual_seed(1)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return loader.from_config(config).to(dtype).eval()


def head(model: PreTrainedModel, tokenizer: Any, kind: str = "full", **options: Any) -> SigmoidHead:
    """A head whose qualities are neither all 0 nor all 1."""
    result = SigmoidHead.from_lm_head(model, tokenizer, kind=kind, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name in ("A", "token_bias"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        result.shift += 3.0
    return result


def tokenizer_with(**attributes: Any) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer with other attributes, such as ``bos_token=None``."""
    result = copy.deepcopy(tokenizer())
    for name, value in attributes.items():
        setattr(result, name, value)
    return result


class SlowTokenizer(PreTrainedTokenizer):
    """Characters of a small alphabet (and ``more``), in Python: a tokenizer that knows no offsets."""

    def __init__(self, *, more: str = "", **options: Any) -> None:
        self.alphabet = ["<pad>", "<s>", "</s>", "<unk>", *" abcdefghijklmnopqrstuvwxyzé🎉", *more]
        super().__init__(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.alphabet)}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 3)

    def _convert_id_to_token(self, index: int) -> str:
        return self.alphabet[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)
