"""From texts to token ids, windows and batches, and from token ids back to pieces of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[dict[str, str]]

BUCKET = 16  # lengths are padded to a multiple of this, so that a row's arithmetic does not depend on its batch


@dataclass
class Encoded:
    """Token ids of one text and of what comes before it."""

    text: str
    prompt: str | None
    prompt_ids: list[int]
    text_ids: list[int]
    offsets: list[tuple[int, int]] = field(repr=False)


@dataclass
class Window:
    """A stretch of one text for one forward pass.

    Attributes:
        index: which text.
        input_ids: what the model (or the decoder) reads.
        encoder_ids: what an encoder reads, or None.
        first: the text's token that the first score is for.
        positions: for every scored token the position whose hidden state predicts it.
        targets: the scored tokens.
    """

    index: int
    input_ids: list[int]
    encoder_ids: list[int] | None
    first: int
    positions: range
    targets: list[int]

    @property
    def bucket(self) -> tuple[int, int]:
        """Padded lengths of ``input_ids`` and ``encoder_ids``."""
        return _round_up(len(self.input_ids)), _round_up(len(self.encoder_ids or ()))


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[str, bool]:
    """A prompt as text, and whether it came from chat messages (which bring their own special tokens).

    Raises:
        TypeError: neither a string nor a list of messages.
    """
    if isinstance(prompt, str):
        return prompt, False
    if not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt):
        raise TypeError(f"prompt: expected a string or a list of chat messages, got {prompt!r:.80}")
    return tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True), True


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt | None) -> tuple[str | None, list[int]]:
    """A prompt's text and ids, with the special tokens that the tokenizer puts first."""
    if prompt is None:
        return None, []
    text, is_chat = prompt_text(tokenizer, prompt)
    return text, list(tokenizer(text, add_special_tokens=not is_chat)["input_ids"])


def joint_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> tuple[list[int], int]:
    """Ids of a prompt and a text tokenized together, and how many of them are the prompt's own ids.

    Those are all, unless the tokenizer joins the prompt's end with the text's beginning.
    """
    before, is_chat = prompt_text(tokenizer, prompt)
    own, ids = (list(tokenizer(part, add_special_tokens=not is_chat)["input_ids"]) for part in (before, before + text))
    return ids, common_length(own, ids)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two sequences have in common at their beginning.

    Example:
        >>> common_length([1, 2, 3], [1, 2, 4, 5])
        2
    """
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, prompt: Prompt | None, *, is_target: bool) -> Encoded:
    """Tokenize a text apart from its prompt, without special tokens, so that its tokens are its own.

    Args:
        tokenizer: fast or slow.
        text: to be scored.
        prompt: text, chat messages or None.
        is_target: whether the text is a translation (encoder-decoder), for tokenizers with two vocabularies.
    """
    options: dict[str, Any] = {"text_target" if is_target else "text": text, "add_special_tokens": False}
    if tokenizer.is_fast:
        encoding = tokenizer(**options, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), [tuple(span) for span in encoding["offset_mapping"]]
    else:
        ids = list(tokenizer(**options)["input_ids"])
        offsets = locate(text, pieces(tokenizer, ids, skip_special_tokens=False))
    shown, before = prompt_ids(tokenizer, prompt)
    return Encoded(text, shown, before, ids, offsets)


def target_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer of an encoder-decoder puts before a target (Bart's BOS, NLLB's language)."""
    ids = list(tokenizer(text_target="")["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


class PieceDecoder:
    """What each token adds to the decoded text, one token after the other.

    Decoding starts a few tokens back at a place where characters are whole, which keeps it linear in the number of
    tokens.

    Args:
        tokenizer: fast or slow.
        decode_options: of ``tokenizer.decode``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **decode_options: Any) -> None:
        self._decode = partial(tokenizer.decode, **{"clean_up_tokenization_spaces": False, **decode_options})
        self._ids: list[int] = []  # from a place where characters are whole
        self._done = 0  # of them, those that have given their piece

    def add(self, token_id: int) -> str | None:
        """The piece of the next token, or None where it ends inside a character."""
        self._ids.append(token_id)
        piece = self.rest()
        if piece.endswith("\ufffd"):
            return None
        if len(self._ids) > BUCKET and piece:
            del self._ids[: self._done]
        self._done = len(self._ids)
        return piece

    def rest(self) -> str:
        """What the tokens since the last piece decode to."""
        return str(self._decode(self._ids))[len(str(self._decode(self._ids[: self._done]))) :]


def pieces(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], *, skip_special_tokens: bool = True
) -> list[str | None]:
    """What each token adds to the decoded text; their concatenation is the text.

    A character whose bytes are spread over tokens belongs to the last of them, the others have None.
    """
    decoder = PieceDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
    result = [decoder.add(token_id) for token_id in token_ids]
    if result and result[-1] is None:
        result[-1] = decoder.rest()
    return result


def locate(text: str, parts: Sequence[str | None]) -> list[tuple[int, int]]:
    """Character spans of consecutive pieces of a text; spaces that a tokenizer dropped or added are passed over.

    Example:
        >>> locate("a é", ["a", None, " é"])  # two tokens for one character share its span
        [(0, 1), (1, 3), (1, 3)]
    """
    spans: list[tuple[int, int]] = []
    position, waiting = 0, 0
    for part in parts:
        waiting += 1
        if part is None:
            continue
        found = text.find(part, position)
        if found < 0:
            part = part.strip()
            found = max(text.find(part, position), position)
        position = min(found + len(part), len(text))
        spans += [(found, position)] * waiting
        waiting = 0
    return spans


def causal_windows(index: int, encoded: Encoded, context: int, overlap: int) -> Iterator[Window]:
    """Windows of at most ``context`` tokens over the prompt and the text; neighbours share ``overlap`` of them.

    A text without anything before it has no score for its first token. A prompt that leaves no room for the text is cut
    on the left.

    Args:
        index: which text.
        encoded: its tokens, and those before it.
        context: >= 1.
        overlap: in [0, context).
    """
    ids = [*encoded.prompt_ids, *encoded.text_ids]
    prompt_length = len(encoded.prompt_ids)
    scored = max(prompt_length, 1)  # the next place in ids to score
    start = 0 if scored <= context else scored - 1 - overlap
    while scored < len(ids):
        end = min(start + context, len(ids) - 1)  # the last token is predicted, not read
        yield Window(
            index,
            ids[start:end],
            None,
            scored - prompt_length,
            range(scored - 1 - start, end - start),
            ids[scored : end + 1],
        )
        start, scored = end - overlap, end + 1


def decoder_window(index: int, encoded: Encoded, start_ids: Sequence[int]) -> Window:
    """The one window of an encoder-decoder: prompt into the encoder, text shifted right into the decoder."""
    ids = [*start_ids, *encoded.text_ids[:-1]]
    return Window(index, ids, encoded.prompt_ids, 0, range(len(start_ids) - 1, len(ids)), encoded.text_ids)


def batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Windows of one padded length together, longest first (so that running out of memory shows at once)."""
    by_bucket: dict[tuple[int, int], list[Window]] = {}
    for window in windows:
        by_bucket.setdefault(window.bucket, []).append(window)
    for bucket in sorted(by_bucket, reverse=True):
        group = by_bucket[bucket]
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
