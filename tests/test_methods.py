"""The methods against golden vectors and independent implementations."""

from __future__ import annotations

from typing import Any

import boostedprob
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyqe import functional as F
from pyqe.dominant import DominantRule

GOLDEN = [  # probabilities, dominant tokens by the first and by the last cut
    ([0.5, 0.4, 0.05, 0.05], 2, 2),
    ([0.6, 0.2, 0.1, 0.05, 0.03, 0.01, 0.005, 0.005], 1, 5),
    ([0.9, 0.05, 0.02, 0.01, 0.01, 0.01], 1, 3),
    ([0.125] * 8, 0, 0),
    ([0.3, 0.28, 0.25, 0.1, 0.04, 0.02, 0.01], 3, 6),
]
RULES = [
    (DominantRule.jump("first"), {"cut_point_mode": "first"}),
    (DominantRule.jump("last"), {"cut_point_mode": "last"}),
    (DominantRule.jump("last", ratio=0.1, epsilon=0.02), {"p_jump": 0.1, "epsilon": 0.02}),
    (DominantRule.top_k(7), {"find_dominant_method": "top-k", "k": 7}),
    (DominantRule.top_p(0.8), {"find_dominant_method": "top-p", "topp": 0.8}),
    (DominantRule.min_p(0.4), {"find_dominant_method": "min-p", "minp": 0.4}),
    (DominantRule.epsilon_cut(0.01), {"find_dominant_method": "epsilon-cut", "epsilon": 0.01}),
    (DominantRule.eta(0.01), {"find_dominant_method": "eta-cut", "epsilon": 0.01}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize(("probs", "first", "last"), GOLDEN)
def test_dominant_tokens_of_the_golden_vectors(
    probs: list[float], first: int, last: int, dtype: torch.dtype, shift: float
) -> None:
    order = torch.randperm(len(probs))
    logits = torch.tensor(probs, dtype=dtype).log()[order] + shift
    for cut, size in (("first", first), ("last", last)):
        dominant = F.dominant_tokens(logits, DominantRule.jump(cut))  # type: ignore[arg-type]
        assert int(dominant.size) == size, cut
        assert dominant.mass.item() == pytest.approx(sum(probs[:size]), abs=1e-6)
        assert (dominant.ids >= 0).sum() == size
        members = logits[dominant.ids[:size]].sort(descending=True).values
        assert torch.equal(members, logits.sort(descending=True).values[:size])


def random_logits(rows: int = 40, vocab_size: int = 300) -> Tensor:
    """Rows from flat to peaked, which meet every branch of the rules."""
    return torch.randn(rows, vocab_size, dtype=torch.float64) * torch.linspace(0.1, 6.0, rows)[:, None]


@pytest.mark.parametrize(
    ("rule", "options"), RULES, ids=lambda value: str(value) if isinstance(value, DominantRule) else ""
)
def test_dominant_tokens_and_boosted_prob_agree_with_the_authors_package(
    rule: DominantRule, options: dict[str, Any]
) -> None:
    logits = random_logits()
    logprobs = torch.log_softmax(logits, 1)
    targets = torch.cat([logits.argmax(1)[:20], torch.randint(0, 300, (20,))])
    theirs = boostedprob.find_dominant(logprobs.clone()[None], **options)[0]
    ours = F.dominant_tokens(logits, rule)
    assert torch.equal(ours.size, (theirs >= 0).sum(1))
    for row in range(len(logits)):
        assert set(ours.ids[row].tolist()) - {-1} == set(theirs[row].tolist()) - {-1}
    for gamma, method in ((0.0, "sum_dominant_mass"), (0.01, "weighted_sum_dominant_mass")):
        expected = boostedprob.calculate_boostedprob(
            logprobs.clone()[None], targets[None], ue_method=method, gamma=0.01, **options
        )[0]
        torch.testing.assert_close(F.boosted_prob(logits, targets, rule, gamma=gamma), expected)


def test_boosted_prob_of_the_published_example() -> None:
    logits = torch.tensor([0.5, 0.4, 0.05, 0.05]).log()
    expected = torch.tensor([0.9, 0.9, 0.05, 0.05])
    torch.testing.assert_close(F.boosted_prob(logits, torch.arange(4)), expected)


def test_a_vocabulary_of_one_token_has_no_drop() -> None:
    dominant = F.dominant_tokens(torch.zeros(2, 1))
    assert dominant.size.tolist() == [0, 0]
    assert dominant.mass.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("text", ["jump", "jump:first", "top_k:3", "top_p:0.5", "min_p:0.1", "epsilon:0.01", "eta:0.1"])
def test_rules_survive_their_text(text: str) -> None:
    rule = DominantRule.parse(text)
    assert DominantRule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text", ["", "jumps", "jump:middle", "top_k:0", "top_k:1:2", "top_p:2", "epsilon:0", "top_k:x"]
)
def test_bad_rules_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        DominantRule.parse(text)


# --- probabilities that are stated, temperature


def test_inverse_softmax_of_the_published_example() -> None:
    probs = torch.tensor([0.7, 0.2, 0.1])
    resoftmax = torch.softmax(probs, 0)
    torch.testing.assert_close(resoftmax, torch.tensor([0.464, 0.281, 0.255]), atol=5e-4, rtol=0)
    for temperature, expected in ((0.5, [0.907, 0.074, 0.019]), (2.0, [0.523, 0.279, 0.198]), (1.0, [0.7, 0.2, 0.1])):
        scaled = F.temperature_scale(probs, temperature)
        torch.testing.assert_close(scaled, torch.tensor(expected), atol=6e-4, rtol=0)


probabilities = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12).map(
    lambda values: torch.tensor(values, dtype=torch.float64) / sum(values)
)


@settings(max_examples=50, deadline=None)
@given(probabilities, st.sampled_from(["none", "mean", "logsumexp"]))
def test_softmax_of_inverse_softmax_is_the_identity(probs: Tensor, center: Any) -> None:
    torch.testing.assert_close(torch.softmax(F.inverse_softmax(probs, center=center), -1), probs)


@settings(max_examples=50, deadline=None)
@given(probabilities, st.floats(0.2, 5.0))
def test_temperature_scaling_equals_dividing_the_logits(probs: Tensor, temperature: float) -> None:
    logits = probs.log() + 7.0
    expected = torch.softmax(logits / temperature, -1)
    torch.testing.assert_close(F.temperature_scale(probs, temperature), expected)


@pytest.mark.parametrize("soft", [False, True])
def test_temperature_nll_and_its_derivatives(soft: bool) -> None:
    logits = torch.randn(50, 7, dtype=torch.float64) * 3
    labels = torch.rand(50, 7, dtype=torch.float64) if soft else torch.randint(0, 7, (50,))
    labels = labels / labels.sum(1, keepdim=True) if soft else labels
    beta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(beta * logits, labels)
    (first,) = torch.autograd.grad(expected, beta, create_graph=True)
    (second,) = torch.autograd.grad(first, beta)
    result = F.temperature_nll(logits, labels, 0.7)
    for got, want in zip((result.nll, result.first, result.second), (expected, first, second), strict=True):
        torch.testing.assert_close(got, want.detach())


def test_order_preserving_of_the_published_example() -> None:
    scores = F.order_preserving(torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.5, 0.9, 0.9, 0.2]))
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.4995, 0.4995, 0.2]))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(0, 1000))
def test_order_preserving_never_ranks_above_a_preferred_token(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs, scores = torch.rand(2, size, generator=generator)
    combined = F.order_preserving(probs, scores)
    ranked = combined[probs.argsort(descending=True)]
    assert (ranked.diff() <= 0).all()
    assert (combined <= scores).all()
