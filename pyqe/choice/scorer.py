"""Multiple-choice questions put to a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyqe import encoding
from pyqe.choice.answers import find_answer
from pyqe.choice.letters import LetterMethod
from pyqe.choice.prompts import (
    METHODS,
    STYLES,
    Method,
    Permutations,
    PromptFormat,
    Question,
    Style,
    orders,
    question_problem,
    shot_problem,
)
from pyqe.choice.scored import ScoredChoice
from pyqe.choice.texts import TextMethod
from pyqe.encoding import Window
from pyqe.prefix import SharedPrefix
from pyqe.runner import ModelRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyqe.scored import ScoredText

_PROBES = [Question(text, ("0", "1")) for text in ("0", "What", "the", "(")]  # prompts differ where a question begins


class ChoiceScorer(ModelRunner):
    """A language model that answers multiple-choice questions, with the uncertainty of its answers.

    What the model's softmax says where the answer should begin is split in two: the probability that an answer comes
    there at all (format mass), and how it is spread over the choices. One forward pass a question, and the softmax over
    the vocabulary at one or two of its positions alone.

    Args:
        model: a decoder-only Hugging Face LM, on any one device, in any float dtype.
        tokenizer: its tokenizer.
        style: "letter" for "A", "parenthesis" for "(A)".
        method: "letter": the options are listed, and their letters compared; "text": they are not, and each is read as
            the answer (one forward pass an option).
        chat: whether to use the tokenizer's chat template; None: if it has one.
        instruction: what the prompt begins with; None for a default.

    Raises:
        ValueError: an encoder-decoder, a tokenizer without the chat template that is asked for or without "(".

    Source: He et al. 2023 (arXiv 2310.11732); Plaut, Nguyen, Trinh 2024 (arXiv 2402.13213).

    Example:
        See docs/choice.md; ``ChoiceScorer(model, tokenizer).score(questions)[0].distribution``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        style: Style = "letter",
        method: Method = "letter",
        chat: bool | None = None,
        instruction: str | None = None,
    ) -> None:
        if model.config.is_encoder_decoder:
            raise ValueError(f"model: expected a decoder-only LM, got {type(model).__name__}")
        if style not in STYLES:
            raise ValueError(f"style: expected one of {', '.join(STYLES)}, got {style!r}")
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has_template:
            raise ValueError("chat: the tokenizer has no chat template")
        super().__init__(model, tokenizer)
        self.method = method
        self.form = PromptFormat(style, has_template if chat is None else chat, method == "letter", instruction)
        self._method: LetterMethod | TextMethod
        if method == "letter":
            self._method = LetterMethod(tokenizer, self.lm_head.vocab_size, self.form)
        else:
            self._method = TextMethod(tokenizer, self.form)

    def score(
        self,
        questions: Sequence[Question | Mapping[str, Any]],
        *,
        shots: Sequence[Question | Mapping[str, Any]] = (),
        batch_size: int = 16,
        permutations: Permutations = 1,
        seed: int = 0,
        greedy_tokens: int = 0,
        on_progress: Callable[[int], object] | None = None,
    ) -> list[ScoredChoice]:
        """Answer questions.

        Questions are batched by length; what else is in a batch does not change a result beyond rounding (and not by a
        bit in float32). What all prompts begin with, the shots above all, is read once a call where the model's cache
        allows it.

        Args:
            questions: questions, or fields of such (see :meth:`Question.from_dict`). A bad one fails alone.
            shots: questions with answers, put before each question as demonstrations.
            batch_size: prompts in a forward pass, >= 1.
            permutations: in how many orders to show the choices, to average out what the model thinks of positions:
                a number (the given order and random others), "cyclic" (each choice once at each position) or "all".
            seed: of random orders.
            greedy_tokens: if not 0, generate as many tokens and take the greedy answer from the text (see
                :func:`parse_answer`), with the MSP where its letter stands.
            on_progress: called with the number of prompts read after each batch.

        Returns:
            one :class:`ScoredChoice` for each question, in order.

        Raises:
            TypeError: something that is no question, or not a list of them.
            ValueError: a shot that is no question or has no answer, a number out of range, orders or generation with
                the method "text"; the model changes its logits in a way that is not known.
        """
        self._check_numbers(batch_size, permutations, greedy_tokens)
        shots = _shots(shots)
        results = [_result(question, number, shots) for number, question in enumerate(questions)]
        with self._inference():
            prefix = self._prefix(shots) if results else None
            shown = [self._orders(result, permutations, seed) for result in results]
            jobs = [self._windows(*pair, shots, greedy_tokens) for pair in zip(results, shown, strict=True)]
            readings = iter(self._read([window for job in jobs for window in job], prefix, batch_size, on_progress))
            for result, job, order in zip(results, jobs, shown, strict=True):
                if job:
                    self._method.conclude(result, [next(readings) for _ in job], order)
            if greedy_tokens:
                self._generate(results, shots, greedy_tokens, batch_size)
        return results

    def _check_numbers(self, batch_size: int, permutations: Permutations, greedy_tokens: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        if permutations not in ("cyclic", "all") and (type(permutations) is not int or permutations < 1):
            raise ValueError(f"permutations: expected 1 or more, 'cyclic' or 'all', got {permutations!r}")
        if greedy_tokens < 0:
            raise ValueError(f"greedy_tokens: expected 0 or more, got {greedy_tokens}")
        if self.method == "text" and (permutations != 1 or greedy_tokens):
            name = "greedy_tokens" if greedy_tokens else "permutations"
            raise ValueError(f"{name}: expected method 'letter', as prompts of method 'text' list no choices")

    def _prefix(self, shots: Sequence[Question]) -> SharedPrefix | None:
        """What all prompts begin with; None where that is little or the model cannot go on from it.

        It depends on the shots alone, not on the questions, and so does the arithmetic of a question's result.
        """
        first, *others = (encoding.prompt_ids(self.tokenizer, self.form.prompt(probe, shots))[1] for probe in _PROBES)
        length = min(encoding.common_length(first, other) for other in others)
        if not encoding.BUCKET <= length <= self.context:
            return None
        return SharedPrefix.compute(self.model, first[:length])

    def _orders(self, result: ScoredChoice, permutations: Permutations, seed: int) -> list[tuple[int, ...]]:
        if result.status == "failed":
            return []
        try:
            return orders(result.question, permutations, seed)
        except ValueError as error:
            result.fail(str(error))
            return []

    def _windows(
        self, result: ScoredChoice, shown: Sequence[Sequence[int]], shots: Sequence[Question], greedy_tokens: int
    ) -> list[Window]:
        """The forward passes for a question; none where it fails."""
        if result.status == "failed":
            return []
        problem = self._method.problem(result.question)
        windows = [] if problem else self._method.windows(result.question, shots, shown)
        longest = max((len(window.input_ids) for window in windows), default=0) + greedy_tokens
        if longest > self.context:
            problem = f"{longest} tokens (shots and generated ones included) do not fit the context of {self.context}"
        if problem is not None:
            result.fail(problem)
            return []
        return windows

    def _read(
        self,
        windows: Sequence[Window],
        prefix: SharedPrefix | None,
        batch_size: int,
        on_progress: Callable[[int], object] | None,
    ) -> list[Any]:
        """What the method reads from each window."""
        readings: list[Any] = [None] * len(windows)
        for number, window in enumerate(windows):
            window.index = number
        for batch, before in _batches(windows, prefix, batch_size):
            hidden, targets = self._hidden_of(batch, before)
            for window, reading in zip(batch, self._method.read(self.lm_head, hidden, targets, batch), strict=True):
                readings[window.index] = reading
            if on_progress is not None:
                on_progress(len(batch))
        return readings

    def _generate(
        self, results: Sequence[ScoredChoice], shots: Sequence[Question], tokens: int, batch_size: int
    ) -> None:
        """Greedy answers from generated text."""
        from pyqe.estimator import QualityEstimator

        good = [result for result in results if result.status == "ok"]
        prompts = [self.form.prompt(result.question, shots) for result in good]
        replies = QualityEstimator(self.model, self.tokenizer).generate(
            prompts, signals=["max_prob"], batch_size=batch_size, max_new_tokens=tokens, do_sample=False, num_beams=1
        )
        for result, reply in zip(good, replies, strict=True):
            _set_greedy(result, reply)


def _shots(shots: Sequence[Question | Mapping[str, Any]]) -> list[Question]:
    """Questions with answers.

    Raises:
        TypeError: something else than questions.
        ValueError: a bad one.
    """
    questions = []
    for number, shot in enumerate(shots):
        fields = _fields(shot, f"shots[{number}]")
        problem = shot_problem(fields)
        if problem is not None:
            raise ValueError(f"shots[{number}]: {problem}")
        questions.append(Question.from_dict(fields))
    return questions


def _result(question: Question | Mapping[str, Any], number: int, shots: Sequence[Question]) -> ScoredChoice:
    """A result to be filled, or one that has failed already."""
    fields = _fields(question, f"questions[{number}]")
    problem = question_problem(fields)
    given = question if isinstance(question, Question) else _as_it_is(fields)
    result = ScoredChoice(given)
    if problem is None and any(_same(given, shot) for shot in shots):
        problem = "it is one of the demonstrations, which give its answer away"
    if problem is not None:
        result.fail(problem)
    return result


def _fields(question: Any, name: str) -> Mapping[str, Any]:
    if isinstance(question, Question):
        return vars(question)
    if isinstance(question, Mapping):
        return question
    raise TypeError(f"{name}: expected a Question or its fields, got {type(question).__name__}")


def _as_it_is(fields: Mapping[str, Any]) -> Question:
    """A question of fields that may be bad."""
    names = ("question", "choices", "answer", "id")
    defaults = {"question": "", "choices": ()}
    return Question(**{name: fields.get(name, defaults.get(name)) for name in names})


def _same(question: Question, other: Question) -> bool:
    return question.question == other.question and list(question.choices) == list(other.choices)


def _batches(
    windows: Sequence[Window], prefix: SharedPrefix | None, batch_size: int
) -> Iterator[tuple[list[Window], SharedPrefix | None]]:
    """Windows of one padded length, those that begin with the prefix without it, and the prefix for these."""
    before = [] if prefix is None else prefix.token_ids
    after: list[Window] = []
    whole: list[Window] = []
    for window in windows:
        begins = window.input_ids[: len(before)] == before and window.positions.start >= len(before) > 0
        (after if begins else whole).append(_without(window, len(before)) if begins else window)
    for batch in encoding.batches(after, batch_size):
        yield batch, prefix
    for batch in encoding.batches(whole, batch_size):
        yield batch, None


def _without(window: Window, length: int) -> Window:
    """A window without its first tokens."""
    positions = range(window.positions.start - length, window.positions.stop - length)
    return Window(window.index, window.input_ids[length:], None, window.first, positions, window.targets)


def _set_greedy(result: ScoredChoice, reply: ScoredText) -> None:
    """The answer that a reply names, and the MSP of the token where it stands."""
    found = find_answer(reply.text, result.question.choices)
    result.greedy_text = reply.text
    result.greedy_answer = None if found is None else found.index
    result.greedy_msp = 0.0
    if found is not None and reply.token_max_prob is not None:
        token = next(i for i, (_, end) in enumerate(reply.offsets) if end > found.start)
        result.greedy_msp = float(reply.token_max_prob[token])
