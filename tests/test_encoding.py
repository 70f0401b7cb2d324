"""Texts to tokens and back, windows, batches."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from pyqe.encoding import (
    Encoded,
    Window,
    batches,
    causal_windows,
    decoder_window,
    encode,
    locate,
    pieces,
    prompt_ids,
    target_prefix,
)

ODD_TEXTS = [
    "</s> in the middle <s> of a text</s>",
    "🎉🏳️‍🌈👨‍👩‍👧",
    "e\u0301 combining \u0327",
    "NUL \x00 and \x7f",
    "שלום עולם, مرحبا",
    "   ",
    "\n\n\t\r\n",
    "a\u2028b\u00a0c\ufeff",
    "\ufffd replacement \ufffd\ufffd",
    "漢字かな交じり文",
]


@pytest.mark.parametrize("text", [*tiny.TEXTS, *ODD_TEXTS])
def test_offsets_of_a_byte_level_tokenizer_cover_the_text(text: str) -> None:
    item = encode(tiny.tokenizer(), text, None, is_target=False)
    assert len(item.offsets) == len(item.text_ids)
    covered = set()
    for start, end in item.offsets:
        assert 0 <= start < end <= len(text)
        covered |= set(range(start, end))
    assert covered == set(range(len(text)))
    assert item.offsets == sorted(item.offsets)


def test_special_tokens_are_not_added_but_read() -> None:
    tokenizer = tiny.tokenizer()
    assert encode(tokenizer, "x", None, is_target=False).text_ids == tokenizer.convert_tokens_to_ids(["x"])
    item = encode(tokenizer, "x</s>y", None, is_target=False)
    assert item.text_ids[1] == tokenizer.eos_token_id
    assert item.offsets == [(0, 1), (1, 5), (5, 6)]


def test_prompt_gets_the_special_tokens_of_the_tokenizer_and_a_chat_those_of_its_template() -> None:
    tokenizer = tiny.tokenizer_with(chat_template=tiny.CHAT_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert prompt_ids(tokenizer, "x") == ("x", [1, *tokenizer.convert_tokens_to_ids(["x"])])
    text, ids = prompt_ids(tokenizer, [{"role": "user", "content": "x"}])
    assert text == "<s>user: x</s><s>"
    assert ids.count(1) == 2
    assert ids[0] == ids[-1] == 1
    assert prompt_ids(tokenizer, None) == (None, [])
    item = encode(tokenizer, "y", "x", is_target=False)
    assert item.prompt == "x"
    assert item.text_ids == tokenizer.convert_tokens_to_ids(["y"])


@pytest.mark.parametrize("prompt", [3, {"role": "user", "content": "x"}, ["x"], b"x"])
def test_what_is_no_prompt_is_refused(prompt: object) -> None:
    with pytest.raises(TypeError, match="prompt: expected a string or a list of chat messages"):
        prompt_ids(tiny.tokenizer_with(chat_template=tiny.CHAT_TEMPLATE), prompt)  # type: ignore[arg-type]


def test_target_prefix_is_what_a_tokenizer_puts_before_a_target() -> None:
    assert target_prefix(tiny.tokenizer()) == []
    for template, prefix in (("<s> $A </s>", [1]), ("$A </s>", []), ("</s> <s> $A </s>", [2, 1])):
        tokenizer = tiny.tokenizer_with()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        assert target_prefix(tokenizer) == prefix


# --- back to text


@pytest.mark.parametrize("text", [*tiny.TEXTS, *ODD_TEXTS[1:]])
def test_pieces_make_up_the_decoded_text(text: str) -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer(text * 5)["input_ids"]
    parts = pieces(tokenizer, ids)
    assert len(parts) == len(ids)
    assert "".join(part or "" for part in parts) == text * 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, len(tiny.tokenizer()) - 1), max_size=60))
def test_pieces_of_any_tokens_make_up_what_the_tokenizer_decodes(ids: list[int]) -> None:
    """Also of bytes that are no UTF-8 and of special tokens, as a random model writes them."""
    tokenizer = tiny.tokenizer()
    parts = pieces(tokenizer, ids)
    text = "".join(part or "" for part in parts)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    spans = locate(text, parts)
    assert len(spans) == len(ids)
    assert [span[1] for span in spans] == sorted(span[1] for span in spans)
    assert set().union(*(range(*span) for span in spans)) == set(range(len(text)))


def test_tokens_of_one_character_share_its_span() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("x☃y")["input_ids"]  # three bytes that training never merged
    assert len(ids) == 5
    parts = pieces(tokenizer, ids)
    assert parts == ["x", None, None, "☃", "y"]
    assert locate("x☃y", parts) == [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    assert encode(tokenizer, "x☃y", None, is_target=False).offsets == locate("x☃y", parts)


def test_pieces_take_linear_time() -> None:
    """Counted in tokens given to the tokenizer, not in seconds."""

    class Counting:
        decoded = 0

        def decode(self, ids: list[int], **options: object) -> str:
            Counting.decoded += len(ids)
            return "a" * len(ids)

    assert pieces(Counting(), list(range(2000))) == ["a"] * 2000  # type: ignore[arg-type]
    assert Counting.decoded < 2000 * 50


def test_slow_tokenizer_is_located_by_its_pieces() -> None:
    tokenizer = tiny.SlowTokenizer()
    assert not tokenizer.is_fast
    item = encode(tokenizer, "ab é🎉 c", None, is_target=False)
    assert [item.text_ids, item.offsets] == [
        tokenizer.convert_tokens_to_ids(list("ab é🎉 c")),
        [(i, i + 1) for i in range(7)],
    ]
    with_unknown = encode(tokenizer, "aXb", None, is_target=False)
    assert len(with_unknown.offsets) == 3
    assert all(0 <= start <= end <= 3 for start, end in with_unknown.offsets)
    special = encode(tokenizer, "a</s>b", None, is_target=False)
    assert special.text_ids[1] == tokenizer.eos_token_id
    assert special.offsets == [(0, 1), (1, 5), (5, 6)]


def test_locate_passes_over_spaces() -> None:
    assert locate("a  b", ["a", " b"]) == [(0, 1), (2, 4)]
    assert locate("ab", ["a", " b"]) == [(0, 1), (1, 2)]  # the decoder added a space
    assert locate("ab", ["z", "b"])[1] == (1, 2)
    assert locate("", []) == []
    assert locate("a", [None, "a"]) == [(0, 1), (0, 1)]


# --- windows


def _encoded(prompt: int, text: int) -> Encoded:
    ids = list(range(prompt + text))
    return Encoded("", None, ids[:prompt], ids[prompt:], [])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 30), st.integers(0, 60), st.integers(1, 20), st.data())
def test_every_token_is_scored_once_from_the_tokens_before_it(
    prompt: int, text: int, context: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, context - 1))
    windows = list(causal_windows(7, _encoded(prompt, text), context, overlap))
    scored = []
    for i, window in enumerate(windows):
        assert window.index == 7
        assert 1 <= len(window.input_ids) <= context
        assert window.encoder_ids is None
        assert len(window.positions) == len(window.targets) > 0
        assert window.targets[0] == prompt + window.first
        for position, target in zip(window.positions, window.targets, strict=True):
            assert window.input_ids[position] == target - 1  # ids are consecutive numbers here
        if i:
            assert len(set(window.input_ids) & set(windows[i - 1].input_ids)) == overlap
            assert window.positions.start == overlap
        scored += window.targets
    assert scored == list(range(prompt + (prompt == 0), prompt + text))
    if prompt + text - 1 <= context:
        assert len(windows) <= 1
    if windows and prompt <= context:
        assert windows[0].input_ids[0] == 0
    elif windows:
        assert windows[0].positions.start == overlap


def test_decoder_window() -> None:
    item = Encoded("", "", [5, 6], [7, 8, 9], [])
    assert decoder_window(1, item, [2]) == Window(1, [2, 7, 8], [5, 6], 0, range(3), [7, 8, 9])
    assert decoder_window(1, item, [2, 0]) == Window(1, [2, 0, 7, 8], [5, 6], 0, range(1, 4), [7, 8, 9])


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(0, 40)), max_size=30), st.integers(1, 5))
def test_batches_hold_every_window_once_and_one_padded_length(lengths: list[tuple[int, int]], batch_size: int) -> None:
    windows = [Window(i, [1] * a, [1] * b or None, 0, range(1), [1]) for i, (a, b) in enumerate(lengths)]
    found = list(batches(windows, batch_size))
    assert sorted(window.index for batch in found for window in batch) == list(range(len(windows)))
    for batch in found:
        assert 1 <= len(batch) <= batch_size
        assert len({window.bucket for window in batch}) == 1
        assert batch[0].bucket[0] % 16 == 0
    assert [batch[0].bucket for batch in found] == sorted((batch[0].bucket for batch in found), reverse=True)
