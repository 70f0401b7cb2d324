"""What negatives are drawn from, in the form that the kernels take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Sources:
    """Distributions to draw from; a part is the weights of (softmax, unigram, uniform), and how many are drawn."""

    parts: list[tuple[float, float, float, int]]
    beta: float  # the softmax part is e^(beta z) * factor
    factor: Tensor | None  # [V]
    counts: Tensor | None  # [V]

    @classmethod
    def of(
        cls,
        sources: list[str],
        shares: list[int],
        weights: list[float],
        combination: str,
        temperature: float,
        counts: Tensor | None,
    ) -> Sources:
        def weight(name: str) -> float:
            return sum(weight for source, weight in zip(sources, weights, strict=True) if source == name)

        def only(name: str, share: int) -> tuple[float, float, float, int]:
            return float(name == "softmax"), float(name == "unigram"), float(name == "uniform"), share

        if combination == "independent":
            parts = [only(name, share) for name, share in zip(sources, shares, strict=True)]
            return cls(parts, 1 / temperature, None, counts)
        if combination == "mixture":
            part = (weight("softmax"), weight("unigram"), weight("uniform"), shares[0])
            return cls([part], 1 / temperature, None, counts)
        # a product of e^(z/T), a times, and of counts, b times
        softmax, unigram = sources.count("softmax"), sources.count("unigram")
        powers = None if counts is None or not unigram else (counts / counts.max()) ** unigram
        if softmax:
            return cls([only("softmax", shares[0])], softmax / temperature, powers, None)
        return cls([only("unigram" if unigram else "uniform", shares[0])], 1 / temperature, None, powers)
