"""Which tokens of a distribution count as dominant, that is, may all be right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["jump", "top_k", "top_p", "min_p", "epsilon", "eta"]
Cut = Literal["first", "last"]

_PARAMETERS: dict[str, tuple[str, ...]] = {
    "jump": ("cut", "ratio", "epsilon"),
    "top_k": ("k",),
    "top_p": ("p",),
    "min_p": ("p",),
    "epsilon": ("epsilon",),
    "eta": ("epsilon",),
}


@dataclass(frozen=True)
class DominantRule:
    r"""Rule that says which tokens of a softmax distribution are dominant.

    With probabilities :math:`p_1 \ge p_2 \ge \dots` sorted descending, the dominant tokens are always a prefix:

    ========= ==========================================================================================
    kind      dominant ranks
    ========= ==========================================================================================
    jump      ranks 1..c, where c is the ``cut`` ("first" or "last") rank i with a significant drop:
              :math:`p_i - p_{i+1} > \max(\text{ratio} \cdot p_i, \epsilon)`, by more than rounding; none if
              nothing drops
    top_k     the ``k`` most probable
    top_p     those whose cumulative probability stays below ``p`` (the crossing token left out)
    min_p     :math:`p_i > p \cdot p_1`
    epsilon   :math:`p_i > \epsilon`
    eta       :math:`p_i > \min(\epsilon, \sqrt\epsilon\, e^{-H})`, H the entropy in nats
    ========= ==========================================================================================

    The constructor takes the fields; the class methods of the same names are shorter. :meth:`parse` reads the
    text that ``str(rule)`` gives.

    Source: Dinh & Niehues 2025 (arXiv 2502.11115) and 2026 (arXiv 2601.00680).

    Raises:
        ValueError: a parameter is out of its range.

    Example:
        >>> rule = DominantRule.jump("first")
        >>> str(rule)
        'jump:first:0.3:0.005'
        >>> DominantRule.parse("top_k:5").max_size(vocab_size=3)
        3
    """

    kind: Kind = "jump"
    cut: Cut = "last"
    ratio: float = 0.3
    epsilon: float = 0.005
    k: int = 5
    p: float = 0.9

    def __post_init__(self) -> None:
        if self.kind not in _PARAMETERS:
            raise ValueError(f"kind: expected one of {', '.join(_PARAMETERS)}, got {self.kind!r}")
        if self.cut not in ("first", "last"):
            raise ValueError(f"cut: expected 'first' or 'last', got {self.cut!r}")
        for name in ("ratio", "p"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
        if not 0.0 < self.epsilon < 1.0:
            raise ValueError(f"epsilon: expected a number in (0, 1), got {self.epsilon!r}")
        if self.k < 1:
            raise ValueError(f"k: expected a positive integer, got {self.k!r}")

    @classmethod
    def jump(cls, cut: Cut = "last", ratio: float = 0.3, epsilon: float = 0.005) -> DominantRule:
        """Dominant are the ranks up to the first or last significant drop."""
        return cls("jump", cut=cut, ratio=ratio, epsilon=epsilon)

    @classmethod
    def top_k(cls, k: int = 5) -> DominantRule:
        """Dominant are the ``k`` most probable tokens."""
        return cls("top_k", k=k)

    @classmethod
    def top_p(cls, p: float = 0.9) -> DominantRule:
        """Dominant are the tokens whose cumulative probability stays below ``p``."""
        return cls("top_p", p=p)

    @classmethod
    def min_p(cls, p: float = 0.9) -> DominantRule:
        """Dominant are the tokens more probable than ``p`` times the most probable one."""
        return cls("min_p", p=p)

    @classmethod
    def epsilon_cut(cls, epsilon: float = 0.005) -> DominantRule:
        """Dominant are the tokens more probable than ``epsilon``."""
        return cls("epsilon", epsilon=epsilon)

    @classmethod
    def eta(cls, epsilon: float = 0.005) -> DominantRule:
        """Dominant are the tokens above ``min(epsilon, sqrt(epsilon) * exp(-entropy))``."""
        return cls("eta", epsilon=epsilon)

    @classmethod
    def parse(cls, text: str) -> DominantRule:
        """Read ``kind[:parameter]...``, the form of ``str(rule)``; parameters left out keep their defaults.

        Raises:
            ValueError: unknown kind, too many parameters, or one that is no number.
        """
        return _parse(text)

    def __str__(self) -> str:
        return ":".join([self.kind, *(str(getattr(self, name)) for name in _PARAMETERS[self.kind])])

    def max_size(self, vocab_size: int) -> int:
        """Upper bound on the number of dominant tokens, the width of their ids; V for top_p, min_p and eta.

        A token above epsilon leaves less than 1 - epsilon to the others, so fewer than 1/epsilon are above it; a
        significant drop at rank i implies that rank i is one of them.
        """
        if self.kind == "top_k":
            return min(self.k, vocab_size)
        if self.kind in ("jump", "epsilon"):
            return min(math.ceil(1.0 / self.epsilon), vocab_size)
        return vocab_size


@lru_cache(maxsize=64)
def _parse(text: str) -> DominantRule:
    kind, *values = text.split(":")
    names = _PARAMETERS.get(kind)
    if names is None or len(values) > len(names):
        forms = ", ".join(":".join([kind, *names]) for kind, names in _PARAMETERS.items())
        raise ValueError(f"dominant rule: expected one of {forms}, got {text!r}")
    readers = {"cut": str, "k": int}
    fields = {name: readers.get(name, float)(value) for name, value in zip(names, values, strict=False)}
    return DominantRule(kind, **fields)  # type: ignore[arg-type]
