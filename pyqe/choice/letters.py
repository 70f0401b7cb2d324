"""An answer by its letter: one forward pass a question."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyqe.choice.prompts import LETTERS, PromptFormat, Question
from pyqe.choice.scored import Floats, ScoredChoice
from pyqe.encoding import Window, joint_ids, prompt_ids
from pyqe.lm_head import LMHead
from pyqe.runner import pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = Question("?", ("0", "1"))


@dataclass(frozen=True)
class LetterTokens:
    """The tokens of which answers are made, white space around them not counted.

    Attributes:
        letters: for each of the 26 letters, the tokens that are it.
        labels: for each letter, the tokens that are "(" and it.
        opening: the tokens that are "(".
        space: what the tokenizer puts between prompt and answer in tokens of its own; it is counted with the prompt.
        forced: the "(" that is put after the prompt, to see the letter's position as well; None in letter style, or
            where no token is it.
        joined: whether the tokenizer makes one token of "(A" after the prompt.
    """

    letters: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    opening: tuple[int, ...]
    space: tuple[int, ...]
    forced: int | None
    joined: bool

    @classmethod
    def find(cls, tokenizer: PreTrainedTokenizerBase, vocab_size: int, form: PromptFormat) -> LetterTokens:
        """Look through a whole vocabulary.

        Raises:
            ValueError: parentheses are wanted, and no token is one.
        """
        found: dict[str, list[int]] = {name: [] for name in (*LETTERS, *(f"({letter}" for letter in LETTERS), "(")}
        blank = set()
        for token in range(min(len(tokenizer), vocab_size)):
            piece = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()
            found.get(piece, []).append(token)
            if not piece:
                blank.add(token)
        letters = tuple(tuple(found[letter]) for letter in LETTERS)
        labels = tuple(tuple(found[f"({letter}"]) for letter in LETTERS)
        opening = tuple(found["("])
        ids, start = joint_ids(tokenizer, form.prompt(_PROBE), form.before_answer + form.label(0))
        space = tuple(itertools.takewhile(blank.__contains__, ids[start:]))
        if form.style == "letter":
            return cls(letters, labels, opening, space, None, False)
        first = ids[start + len(space)]
        if not opening and first not in labels[0]:
            raise ValueError("style: expected a tokenizer with a token '(', got one that writes it in several")
        forced = next((token for token in (first, *opening) if token in opening), None)
        return cls(letters, labels, opening, space, forced, first in labels[0])

    def missing(self, count: int) -> list[str]:
        """Those of the first letters that no token is."""
        named = zip(LETTERS[:count], self.letters, self.labels, strict=False)
        return [letter for letter, alone, label in named if not alone and not (self.joined and label)]


@dataclass(frozen=True)
class _Reading:
    """What one prompt gives.

    Attributes:
        letters: float64 [26], log-probabilities of the answers.
        direct: float64 [26], those of answers in one token.
        opening: log-probability of "("; -inf in letter style.
        max_logprob, max_logit, argmax: [1 or 2], at the end of the prompt and after "(".
    """

    letters: Floats
    direct: Floats
    opening: float
    max_logprob: Floats
    max_logit: Floats
    argmax: NDArray[np.int64]


class LetterMethod:
    """Probabilities of the choices' letters after the prompt.

    In the style "(A)" the prompt goes on with "(", and two positions are looked at: the one where it should come, and
    the next one with the letter. A token that is "(A" counts at the first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, form: PromptFormat) -> None:
        self._tokenizer = tokenizer
        self._form = form
        self.tokens = LetterTokens.find(tokenizer, vocab_size, form)
        by_letter = [*self.tokens.letters, *self.tokens.labels]
        self._letter_of = {token: i % len(LETTERS) for i, tokens in enumerate(by_letter) for token in tokens}
        self._ids = [*self._letter_of, *self.tokens.opening]
        self._column = {token: column for column, token in enumerate(self._ids)}

    def problem(self, question: Question) -> str | None:
        """Why a question cannot be answered so, or None."""
        missing = self.tokens.missing(len(question.choices))
        if not missing:
            return None
        return f"choices: the tokenizer has no token that is {', '.join(missing)} alone; method 'text' needs none"

    def windows(self, question: Question, shots: Sequence[Question], orders: Sequence[Sequence[int]]) -> list[Window]:
        """One forward pass for each order of the choices."""
        forced = [] if self.tokens.forced is None else [self.tokens.forced]
        windows = []
        for order in orders:
            ids = [*prompt_ids(self._tokenizer, self._form.prompt(question, shots, order))[1], *self.tokens.space]
            windows.append(Window(0, ids + forced, None, 0, range(len(ids) - 1, len(ids) + len(forced)), []))
        return windows

    def read(self, lm_head: LMHead, hidden: Tensor, targets: Tensor, batch: Sequence[Window]) -> list[_Reading]:
        """What each prompt gives, from the hidden states at its positions."""
        choice_ids = torch.tensor(self._ids, device=hidden.device)
        stats = lm_head.softmax_stats(pad_rows(hidden), choice_ids=choice_ids)
        shape = (len(batch), len(hidden) // len(batch))

        def steps(column: Tensor) -> NDArray[Any]:
            return column[: len(hidden)].cpu().numpy().reshape(*shape, *column.shape[1:])

        max_logprob, max_logit, argmax = map(steps, (stats.max_logprob, stats.max_logit, stats.argmax))
        assert stats.choice_logprob is not None
        logprobs = steps(stats.choice_logprob.double())
        return [
            _Reading(*self._answers(logprobs[i]), max_logprob[i], max_logit[i], argmax[i]) for i in range(len(batch))
        ]

    def _answers(self, logprobs: Floats) -> tuple[Floats, Floats, float]:
        """Log-probabilities of the answers, of those in one token, and of "(", from those of all tokens [1 or 2, K]."""
        alone = self._together(logprobs[0], self.tokens.letters)
        if self._form.style == "letter":
            return alone, alone, -np.inf
        direct = self._together(logprobs[0], self.tokens.labels)
        if self.tokens.forced is None:
            return direct, direct, -np.inf
        opening = float(self._together(logprobs[0], [self.tokens.opening])[0])
        after = self._together(logprobs[1], self.tokens.letters)
        return np.logaddexp(direct, opening + after), direct, opening

    def _together(self, logprobs: Floats, groups: Sequence[Sequence[int]]) -> Floats:
        """Log of the summed probability of each group of tokens; -inf for an empty one."""
        columns = ([self._column[token] for token in group] for group in groups)
        with np.errstate(invalid="ignore"):  # NaN has its own end
            return np.array([np.logaddexp.reduce(logprobs[group]) for group in columns])

    def conclude(self, result: ScoredChoice, readings: Sequence[_Reading], orders: Sequence[Sequence[int]]) -> None:
        """Put what the prompts of a question give into its result."""
        count = len(result.question.choices)
        first = readings[0]
        shown = np.array([reading.letters[:count] for reading in readings])
        if not np.isfinite([reading.max_logprob for reading in readings]).all() or np.isnan(shown).any():
            result.fail("logits that are not finite")
            return
        places = np.argsort(np.array(orders), axis=1)  # of each choice in each order
        logprobs = np.take_along_axis(shown, places, axis=1)
        formats = [np.logaddexp(reading.opening, np.logaddexp.reduce(reading.direct[:count])) for reading in readings]
        result.set_logprobs(logprobs)
        if result.status == "failed":
            return
        result.format_mass = min(float(np.exp(formats).mean()), 1.0)
        answered = 0 if self.tokens.joined else -1
        result.msp = _prob(first.max_logprob[answered])
        result.max_logit = float(first.max_logit[answered])
        result.argmax = int(first.argmax[answered])
        self._set_greedy(result, first, count)

    def _set_greedy(self, result: ScoredChoice, reading: _Reading, count: int) -> None:
        """The answer that the most probable tokens are."""
        step = int(len(reading.argmax) > 1 and reading.argmax[0] in self.tokens.opening)
        tokens = [int(token) for token in reading.argmax[: step + 1]]
        letter = self._letter_of.get(tokens[-1], count)
        result.greedy_text = self._tokenizer.decode(tokens)
        result.greedy_answer = letter if letter < count else None
        result.greedy_msp = _prob(reading.max_logprob[step]) if letter < count else 0.0


def _prob(logprob: np.float32) -> float:
    """At most 1, whatever rounding does."""
    return min(float(np.exp(logprob)), 1.0)
