"""What the statistics operations return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class DominantTokens:
    """Dominant tokens of each row; leading shape [...] is that of the rows.

    Attributes:
        ids: int64 [..., M], by descending probability, padded with -1.
        size: int64 [...], how many there are.
        mass: float [...], their total probability in [0, 1]; NaN where the row has no distribution.
    """

    ids: Tensor
    size: Tensor
    mass: Tensor


@dataclass(eq=False)
class SoftmaxStats:
    """Softmax statistics of each row; fields that were not asked for are None. Log-probabilities are natural logs.

    A row with a NaN or +inf logit, or with nothing but -inf, has no distribution: its numbers are NaN, its ids -1.

    Attributes:
        max_logit: float [...], the largest logit.
        max_logprob: float [...], its log-probability, log of the maximum softmax probability (MSP).
        argmax: int64 [...], its token.
        entropy: float [...], in nats.
        token_logit: float [...] or [..., K], logits of ``token_ids``; NaN where the id is -1.
        tempered_logsumexp: float [...], logsumexp of the logits divided by ``temperature``.
        topk_logits: float [..., k], descending.
        topk_ids: int64 [..., k].
        choice_logits: float [..., C], logits of ``choice_ids``.
        dominant: the tokens that the rule calls dominant.
    """

    max_logit: Tensor
    max_logprob: Tensor
    argmax: Tensor
    entropy: Tensor | None = None
    token_logit: Tensor | None = None
    tempered_logsumexp: Tensor | None = None
    topk_logits: Tensor | None = None
    topk_ids: Tensor | None = None
    choice_logits: Tensor | None = None
    dominant: DominantTokens | None = None

    def _logprob(self, logits: Tensor | None) -> Tensor | None:
        """Relative to the largest logit, which keeps the digits of large logits."""
        if logits is None:
            return None
        maximum, max_logprob = self.max_logit, self.max_logprob
        if logits.dim() > maximum.dim():
            maximum, max_logprob = maximum[..., None], max_logprob[..., None]
        return (logits - maximum) + max_logprob

    @property
    def logsumexp(self) -> Tensor:
        """float [...]: log of the sum of the exponentials of the logits."""
        return self.max_logit - self.max_logprob

    @property
    def token_logprob(self) -> Tensor | None:
        """float [...] or [..., K]: log-probabilities of ``token_ids``."""
        return self._logprob(self.token_logit)

    @property
    def topk_logprobs(self) -> Tensor | None:
        """float [..., k], descending."""
        return self._logprob(self.topk_logits)

    @property
    def choice_logprob(self) -> Tensor | None:
        """float [..., C]: log-probabilities of ``choice_ids`` in the whole softmax, not renormalised."""
        return self._logprob(self.choice_logits)

    @property
    def choice_mass(self) -> Tensor | None:
        """float [...]: total probability of the choices, in [0, 1]."""
        logprob = self.choice_logprob
        return None if logprob is None else logprob.exp().sum(-1)

    def boosted_prob(self, token_ids: Tensor, gamma: float = 0.0) -> Tensor:
        """BoostedProb of the tokens whose statistics these are, in [0, 1].

        Args:
            token_ids: the ids that the statistics were taken with.
            gamma: power of the weighted variant, ``mass * p ** gamma`` (the authors use 0.01); 0 for the plain one.

        Raises:
            ValueError: taken without ``token_ids`` or without ``dominant``.
        """
        if self.token_logprob is None or self.dominant is None:
            raise ValueError("boosted_prob: expected statistics taken with token_ids and dominant")
        probs = self.token_logprob.exp()
        members, mass = self.dominant.ids, self.dominant.mass
        if probs.dim() > mass.dim():
            members, mass = members[..., None, :], mass[..., None]
        is_dominant = ((token_ids.unsqueeze(-1) == members) & (members >= 0)).any(-1)
        return torch.where(is_dominant, mass * probs**gamma, probs)


@dataclass(eq=False)
class SigmoidStats:
    """Sigmoid statistics of each row; fields that were not asked for are None.

    A row with a NaN logit has NaN numbers, and -1 for ids and counts.

    Attributes:
        max_logit: float [...], the largest logit.
        argmax: int64 [...], its token.
        sum_prob: float [...], sum of the sigmoids: the expected number of acceptable tokens.
        count_above: int64 [...], tokens whose sigmoid exceeds ``threshold``.
        token_logit: float [...] or [..., K], logits of ``token_ids``; NaN where the id is -1.
        topk_logits: float [..., k], descending.
        topk_ids: int64 [..., k].
    """

    max_logit: Tensor
    argmax: Tensor
    sum_prob: Tensor
    count_above: Tensor | None = None
    token_logit: Tensor | None = None
    topk_logits: Tensor | None = None
    topk_ids: Tensor | None = None

    @property
    def max_logprob(self) -> Tensor:
        """float [...]: log of the largest sigmoid."""
        return torch.nn.functional.logsigmoid(self.max_logit)

    @property
    def token_logprob(self) -> Tensor | None:
        """float [...] or [..., K]: logs of the sigmoids of ``token_ids``."""
        return None if self.token_logit is None else torch.nn.functional.logsigmoid(self.token_logit)


@dataclass
class TemperatureNLL:
    """Mean negative log-likelihood of ``softmax(beta * logits)``, float64 scalars.

    Attributes:
        nll: the mean NLL, in nats.
        first: its derivative in beta.
        second: its second derivative, >= 0: the problem is convex.
    """

    nll: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class TemperatureFit:
    """A temperature of maximum likelihood.

    Attributes:
        temperature: T, by which to divide the logits.
        nll: mean negative log-likelihood at T, in nats.
        nll_before: the same at T = 1.
        converged: False where no temperature between 0.001 and 1000 is best. T is then the end of the range towards
            which the NLL falls, or one from which on it is constant. The NLL falls towards T = 0 where every label has
            the largest logit of its row, and towards infinity where the logits say less than nothing about the labels.
    """

    temperature: float
    nll: float
    nll_before: float
    converged: bool
