"""Sigmoid Heads and the LM's head: values, files, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pyqe
import pyqe.heads
from pyqe.heads import FullHead, HeadConfig, HeadMismatchError, SigmoidHead, tokenizer_fingerprint
from pyqe.lm_head import LMHead, capture_hidden, check_logits

MODELS = ["llama", "gpt2", "gemma2", "cohere", "granite", "t5", "bart"]
KINDS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "rescaling", "base": "logit"},
    {"kind": "rescaling", "base": "logprob"},
    {"kind": "low_rank", "base": "logit", "rank": 3},
    {"kind": "low_rank", "base": "logprob", "rank": 3},
]


def _name(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


def _head(model: Any, options: dict[str, Any], tokenizer: Any = None) -> SigmoidHead:
    """A head whose parameters are all random, as after training."""
    head = SigmoidHead.from_lm_head(model, tokenizer, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return head


def _model_with_bias() -> Any:
    """An output embedding with a bias."""
    model = tiny.model("llama")
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size)
    return model


def _states(*shape: int) -> Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(5))


# --- the LM's head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_lm_head_gives_the_models_logits(kind: str, dtype: torch.dtype) -> None:
    model = tiny.model(kind, dtype)
    if kind == "bart":
        model.final_logits_bias.normal_()
    head = LMHead.from_model(model)
    ids = torch.tensor([[5, 9, 17, 40]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad(), capture_hidden(model, skip_logits=False) as captured:
        logits = model(**inputs).logits.float()
    choices = torch.arange(head.vocab_size).expand(1, 4, -1)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2 * logits.abs().max().item()
    torch.testing.assert_close(head.token_logits(captured[0], choices), logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(head.logits(captured[0]), logits, rtol=0, atol=tolerance)
    stats = head.softmax_stats(captured[0], token_ids=ids)
    torch.testing.assert_close(stats.logsumexp, logits.logsumexp(-1), rtol=0, atol=tolerance)
    check_logits(model, head)


def test_lm_head_shares_the_models_memory() -> None:
    model = tiny.model()
    assert LMHead.from_model(model).weight.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("change", [lambda z: 1.1 * z, lambda z: z.tanh(), lambda z: z[..., :-1], lambda z: z - 1e4])
def test_unknown_change_of_the_logits_is_an_error(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    forward = type(model).forward

    def changed(self: Any, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        output.logits = change(output.logits)
        return output

    check_logits(model, LMHead.from_model(model))
    monkeypatch.setattr(type(model), "forward", changed)
    with pytest.raises(ValueError, match="model: "):
        check_logits(model, LMHead.from_model(model))


def test_tokens_that_a_model_masks_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    head = LMHead.from_model(model)
    monkeypatch.setattr(LMHead, "logits", lambda self, hidden: (hidden @ self.weight.T).index_fill(-1, ids, -math.inf))
    ids = torch.tensor([3])
    with pytest.raises(ValueError, match="changes its logits"):
        check_logits(model, head)


def test_broken_weights_are_left_to_the_scores() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    check_logits(model, LMHead.from_model(model))
    model.lm_head.weight.data.fill_(math.inf)
    check_logits(model, LMHead.from_model(model))


def test_a_model_that_does_not_call_its_output_embedding_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: torch.nn.Linear(32, 300))
    with pytest.raises(ValueError, match="called its output embedding 0 times"):
        check_logits(model, LMHead.from_model(model))


@pytest.mark.parametrize("embedding", [None, torch.nn.Identity(), torch.nn.Conv1d(2, 2, 1)])
def test_a_model_without_output_embedding_is_an_error(embedding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: embedding)
    with pytest.raises(ValueError, match="model: expected an output embedding"):
        LMHead.from_model(model)


def test_capture_removes_its_hook_after_an_error() -> None:
    model = tiny.model()

    def fail() -> None:
        with capture_hidden(model, skip_logits=True):
            assert len(model.lm_head._forward_pre_hooks) == 1
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert len(model.lm_head._forward_pre_hooks) == 0


# --- values


@pytest.mark.parametrize("options", KINDS, ids=_name)
@pytest.mark.parametrize("kind", ["llama", "cohere", "granite", "bart", "bias"])
def test_linear_terms_are_the_logits_of_forward(kind: str, options: dict[str, Any]) -> None:
    model = _model_with_bias() if kind == "bias" else tiny.model(kind)
    if kind == "bart":
        model.final_logits_bias.normal_()
    lm_head, head = LMHead.from_model(model), _head(model, options)
    hidden = _states(2, 3)
    ids = torch.arange(lm_head.vocab_size).expand(2, 3, -1)
    expected = head(hidden, ids, head.base_of(hidden, ids, lm_head))
    logsumexp = lm_head.softmax_stats(hidden).logsumexp
    for given in (None, logsumexp):
        terms = head.linear_terms(hidden, lm_head, given)
        logits = terms.hidden @ terms.weight.T
        logits = logits if terms.scale is None else logits * terms.scale
        logits = logits if terms.bias is None else logits + terms.bias
        logits = logits + (terms.shift[..., None] if terms.shift.dim() else terms.shift)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        head(hidden, ids, head.base_of(hidden, ids, lm_head, logsumexp)), expected, rtol=1e-4, atol=1e-4
    )
    stats = head.stats(hidden, lm_head, token_ids=ids[..., 4], threshold=0.5)
    torch.testing.assert_close(stats.token_logit, expected[..., 4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.sum_prob, expected.sigmoid().sum(-1), rtol=1e-4, atol=1e-4)
    assert torch.equal(stats.argmax, expected.argmax(-1))
    softmax, joint = head.joint_stats(hidden, lm_head, token_ids=ids[..., 4], threshold=0.5, entropy=True)
    torch.testing.assert_close(softmax.logsumexp, logsumexp)
    for name in ("token_logit", "sum_prob", "max_logit"):
        torch.testing.assert_close(getattr(joint, name), getattr(stats, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", KINDS, ids=_name)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "bias"])
def test_forward_is_the_formula(kind: str, options: dict[str, Any]) -> None:
    model = _model_with_bias() if kind == "bias" else tiny.model(kind)
    lm_head, head = LMHead.from_model(model), _head(model, options)
    hidden = _states(4)
    logits = hidden.double() @ lm_head.weight.double().T
    logits = (logits + (0 if lm_head.bias is None else lm_head.bias.double())) * lm_head.logit_scale
    if lm_head.logit_softcap is not None:
        logits = lm_head.logit_softcap * torch.tanh(logits / lm_head.logit_softcap)
    base = logits.log_softmax(-1) if options.get("base") == "logprob" else logits
    if options["kind"] == "full":
        base = hidden.double() @ head.weight.double().T  # type: ignore[operator]
    expected = head.scale.double() * base + head.shift.double()
    if options["kind"] == "low_rank":
        expected += hidden.double() @ head.B.double().T @ head.A.double().T + head.token_bias.double()  # type: ignore[operator]
    ids = torch.tensor([[3, -1], [4, 5], [0, 299], [7, 7]])
    found = head(hidden, ids, head.base_of(hidden, ids, lm_head))
    assert found.dtype == torch.float32
    assert bool(found[0, 1].isnan())
    expected = expected.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, math.nan).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    one = head(hidden, ids[:, 0], head.base_of(hidden, ids[:, 0], lm_head))
    torch.testing.assert_close(one, found[:, 0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("options", KINDS[1:], ids=_name)
def test_softcap_is_not_linear(options: dict[str, Any]) -> None:
    model = tiny.model("gemma2")
    head = _head(model, options)
    with pytest.raises(NotImplementedError, match="softcap"):
        head.linear_terms(_states(2), LMHead.from_model(model))
    with pytest.raises(NotImplementedError, match="softcap"):
        head.stats(_states(2), LMHead.from_model(model))


def test_heads_need_the_base_they_were_made_for() -> None:
    for options in KINDS[1:]:
        head = _head(tiny.model(), options)
        with pytest.raises(ValueError, match=f"base: expected the LM's {options['base']}"):
            head(_states(2), torch.tensor([1, 2]))


@pytest.mark.parametrize("options", KINDS, ids=_name)
def test_an_untrained_head_ranks_as_the_lm(options: dict[str, Any]) -> None:
    """Also with a logit scale, and without touching the model's weights or their gradients."""
    model = tiny.model("cohere").requires_grad_(True)
    before = model.lm_head.weight.detach().clone()
    head = SigmoidHead.from_lm_head(model, **options)
    lm_head = LMHead.from_model(model)
    hidden, ids = _states(3), torch.arange(lm_head.vocab_size).expand(3, -1)
    logits = head(hidden, ids, head.base_of(hidden, ids, lm_head))
    start, shift = pyqe.heads._START[options.get("base", "logit")]
    base = lm_head.token_logits(hidden, ids)
    if options.get("base") == "logprob":
        base = base.log_softmax(-1)
    torch.testing.assert_close(logits, start * base + shift, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    assert torch.equal(model.lm_head.weight, before)
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in head.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "half"}, "kind: expected one of full, low_rank, rescaling, got 'half'"),
        ({"kind": "rescaling", "base": "prob"}, "base: expected"),
        ({"kind": "low_rank", "rank": 0}, "rank: expected a positive integer, got 0"),
    ],
)
def test_from_lm_head_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SigmoidHead.from_lm_head(tiny.model(), **options)


# --- belonging to a model


def test_mismatches_say_both_sides() -> None:
    model = tiny.model()
    head = SigmoidHead.from_lm_head(model, tiny.tokenizer())
    head.check_compatible(LMHead.from_model(model), tiny.tokenizer())
    with pytest.raises(HeadMismatchError, match="vocab_size: the head has 300, the model 304"):
        head.check_compatible(LMHead.from_model(tiny.model(vocab_size=304)))
    with pytest.raises(HeadMismatchError, match="hidden_size: the head has 32, the model 48"):
        head.check_compatible(LMHead.from_model(tiny.model(hidden_size=48)))
    other = tiny.tokenizer_with()
    other.add_tokens(["<new>"])
    ours, theirs = tokenizer_fingerprint(tiny.tokenizer()), tokenizer_fingerprint(other)
    with pytest.raises(HeadMismatchError, match=f"tokenizer: the head was made with {ours}, this one is {theirs}"):
        head.check_compatible(LMHead.from_model(model), other)
    unknown = SigmoidHead.from_lm_head(model)
    unknown.check_compatible(LMHead.from_model(model), other)  # made without a tokenizer: nothing to compare


def test_fingerprint_is_of_the_vocabulary_alone() -> None:
    changed = tiny.tokenizer_with(chat_template="x", model_max_length=7, padding_side="left")
    assert tokenizer_fingerprint(changed) == tokenizer_fingerprint(tiny.tokenizer())
    assert len(tokenizer_fingerprint(changed)) == 16


# --- files


@pytest.mark.parametrize("options", KINDS, ids=_name)
def test_round_trip_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    head = _head(tiny.model(), options, tiny.tokenizer())
    head.config.training = {"steps": 3, "note": "é"}
    head.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = SigmoidHead.from_pretrained(folder)
    assert type(loaded) is type(head)
    assert loaded.config == head.config
    assert loaded.config.pyqe_version == pyqe.__version__
    expected = dict(head.named_parameters())
    assert set(expected) == set(dict(loaded.named_parameters()))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert not parameter.requires_grad
    loaded.save_pretrained(tmp_path / "again")
    for name in ("README.md", "config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    if options["kind"] == "full":
        assert list(load_file(folder / "model.safetensors")) == ["weight"]


def test_model_card(tmp_path: Path) -> None:
    model = tiny.model()
    model.config._name_or_path = "owner/base-model"
    SigmoidHead.from_lm_head(model, kind="low_rank", rank=5).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert 'base_model: "owner/base-model"' in card
    assert "Sigmoid Head (low_rank) for owner/base-model" in card
    assert "rank 5" in card
    model.config._name_or_path = ""
    SigmoidHead.from_lm_head(model).save_pretrained(tmp_path)
    assert "base_model" not in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("foreign_config", [None, {"architectures": ["LlamaForCausalLM"], "vocab_size": 7}, [1, 2]])
@pytest.mark.parametrize("file", ["model.safetensors", "head.safetensors"])
def test_an_authors_released_head(dtype: torch.dtype, foreign_config: Any, file: str, tmp_path: Path) -> None:
    weight = torch.randn(11, 8).to(dtype)
    save_file({"weight": weight}, tmp_path / file)
    if foreign_config is not None:
        (tmp_path / "config.json").write_text(json.dumps(foreign_config))
    head = SigmoidHead.from_pretrained(tmp_path)
    assert isinstance(head, FullHead)
    assert (head.scale.item(), head.shift.item()) == (1.0, 0.0)
    assert torch.equal(head.weight, weight.float())
    assert (head.config.vocab_size, head.config.hidden_size, head.config.base) == (11, 8, None)


def _save(folder: Path, **options: Any) -> None:
    _head(tiny.model(), {"kind": "low_rank", "rank": 3, **options}).save_pretrained(folder)


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 299}, "expected tensors"),
        ({"hidden_size": 10**15}, "expected tensors"),
        ({"rank": 4}, "expected tensors"),
        ({"rank": None}, "rank: expected a positive integer, got None"),
        ({"kind": "full", "base": None}, "expected tensors"),
        ({"kind": "full"}, "base: expected one of"),
        ({"kind": "cubic"}, "kind: expected one of full, low_rank, rescaling, got 'cubic'"),
        ({"kind": ["full"]}, "kind: expected one of"),
        ({"base": "prob"}, "base: expected one of"),
        ({"base": None}, "base: expected one of"),
        ({"vocab_size": "300"}, "vocab_size: expected a positive integer, got '300'"),
        ({"vocab_size": -300}, "vocab_size: expected a positive integer"),
        ({"scale": math.nan}, "scale: expected a finite number, got nan"),
        ({"shift": "low"}, "shift: expected a finite number, got 'low'"),
        ({"new_field": 1}, r"unknown fields \['new_field'\]"),
        ({"hidden_size": ...}, r"missing fields \['hidden_size'\]"),
        ({"kind": ...}, r"missing fields \['kind'\]"),
    ],
)
def test_wrong_configs_are_clear_errors(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    _save(tmp_path)
    _edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        SigmoidHead.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_whole_numbers_in_a_config_are_numbers(tmp_path: Path) -> None:
    _save(tmp_path)
    _edit_config(tmp_path, scale=2)
    assert SigmoidHead.from_pretrained(tmp_path).scale.dtype == torch.float32


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"not json"])
def test_a_config_that_is_not_json(content: bytes, tmp_path: Path) -> None:
    _save(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        SigmoidHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["truncate", "empty", "header", "text", "pickle"])
def test_broken_weights_file(change: str, tmp_path: Path) -> None:
    _save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    if change == "pickle":
        torch.save({"weight": torch.ones(2, 2)}, path)
    else:
        contents = {"truncate": whole[:-5], "empty": b"", "header": b"\xff" * 8 + whole[8:], "text": b"hello"}
        path.write_bytes(contents[change])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        SigmoidHead.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "expected"),
        ({"weight": torch.ones(4)}, r"one tensor 'weight' \[V, D\]"),
        ({"weight": torch.ones(0, 4)}, "vocab_size: expected a positive integer"),
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, "one tensor 'weight'"),
        ({"lm_head.weight": torch.ones(2, 4)}, "one tensor 'weight'"),
        ({"weight": torch.ones(2, 4, dtype=torch.int8)}, "expected floats, got weight in torch.int8"),
    ],
)
def test_tensors_that_are_no_head(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        SigmoidHead.from_pretrained(tmp_path)


def test_tensors_missing_or_too_many(tmp_path: Path) -> None:
    _save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for changed in ({"A": tensors["A"]}, {**tensors, "more": torch.ones(1)}, {**tensors, "A": tensors["A"][1:]}):
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"expected tensors .* got"):
            SigmoidHead.from_pretrained(tmp_path)


def test_no_head_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        SigmoidHead.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a folder or a hub id"):
        SigmoidHead.from_pretrained(tmp_path / "missing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")  # a pickle is not even opened
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        SigmoidHead.from_pretrained(tmp_path)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path)
    before = _contents(tmp_path)

    def full(tensors: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyqe.heads, "save_file", full)
    other = _head(tiny.model(), {"kind": "full"})
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(tmp_path)
    assert _contents(tmp_path) == before
    monkeypatch.undo()
    write_text = Path.write_text

    def full_for_config(self: Path, *args: Any, **options: Any) -> int:
        if "config" in self.name:
            raise OSError(28, "No space left on device")
        return write_text(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", full_for_config)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(tmp_path)  # new weights beside an old config would load and be wrong
    assert _contents(tmp_path) == before


def test_a_head_that_diverged_is_not_saved(tmp_path: Path) -> None:
    head = _head(tiny.model(), {"kind": "full"})
    head.save_pretrained(tmp_path)
    before = _contents(tmp_path)
    with torch.no_grad():
        head.shift.fill_(math.nan)
    with pytest.raises(ValueError, match="shift: expected a finite number, got nan"):
        head.save_pretrained(tmp_path)
    assert _contents(tmp_path) == before


def test_config_checks_itself() -> None:
    assert HeadConfig("low_rank", 5, 4, base="logit", rank=2).rank == 2
    with pytest.raises(ValueError, match="rank"):
        HeadConfig("low_rank", 5, 4, base="logit")
