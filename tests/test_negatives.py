"""Negative samplers: exact exclusion, exact distributions, reproducible draws."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

import pyqe
from pyqe import functional as F
from pyqe.backends import available_backends, cuda_sampling, reference, select
from pyqe.backends.philox import philox, uniform
from pyqe.dominant import DominantRule
from pyqe.negatives import NegativeSampler

SIGNIFICANT = 1e-4  # with a fixed seed a test either always passes or always fails


def draw(sampler: NegativeSampler, logits: Tensor, target: int, rows: int, seed: int = 3) -> Tensor:
    """Negatives [rows, K] of one distribution [V], drawn over and over."""
    generator = torch.Generator().manual_seed(seed)
    return F.sample_negatives(logits.expand(rows, -1), torch.full((rows,), target), sampler, generator)


def without_replacement(weights: Tensor, count: int) -> dict[tuple[int, ...], float]:
    """Probability of every ordered draw without replacement, by definition."""
    result = {}
    for ids in itertools.permutations(weights.nonzero()[:, 0].tolist(), count):
        probability, rest = 1.0, weights.clone().double()
        for token in ids:
            probability *= float(rest[token] / rest.sum())
            rest[token] = 0.0
        result[ids] = probability
    return result


def assert_distribution(ids: Tensor, expected: dict[tuple[int, ...], float]) -> None:
    drawn = [tuple(row) for row in ids.tolist()]
    assert set(drawn) <= set(expected)
    observed = [drawn.count(key) for key in expected]
    assert chisquare(observed, [len(drawn) * p for p in expected.values()]).pvalue > SIGNIFICANT


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def test_softmax_source_draws_without_replacement_at_its_temperature() -> None:
    sampler = NegativeSampler(("softmax",), num_negatives=2, temperature=2.0, exclude=None)
    weights = torch.softmax(LOGITS / 2.0, 0)
    weights[1] = 0.0  # the target
    assert_distribution(draw(sampler, LOGITS, 1, 20_000), without_replacement(weights, 2))


def test_unigram_and_uniform_sources() -> None:
    counts = torch.tensor([5.0, 1.0, 0.0, 3.0, 2.0, 2.0])
    for source, weights in (("unigram", counts.clone()), ("uniform", torch.ones(6))):
        sampler = NegativeSampler((source,), num_negatives=2, exclude=None, unigram_counts=counts)  # type: ignore[arg-type]
        weights[0] = 0.0
        assert_distribution(draw(sampler, LOGITS, 0, 20_000), without_replacement(weights, 2))


def test_mixture_weighs_normalised_sources() -> None:
    counts = torch.tensor([100.0, 50.0, 0.0, 300.0, 20.0, 1.0])
    sampler = NegativeSampler(
        ("unigram", "uniform"),
        num_negatives=2,
        combination="mixture",
        weights=(1.0, 3.0),
        exclude=None,
        unigram_counts=counts,
    )
    counts[2], uniform_weights = 0.0, torch.ones(6)
    uniform_weights[2] = 0.0
    weights = counts / counts.sum() + 3.0 * uniform_weights / uniform_weights.sum()
    assert_distribution(draw(sampler, LOGITS, 2, 20_000), without_replacement(weights, 2))


def test_product_multiplies_sources() -> None:
    counts = torch.tensor([1.0, 2.0, 0.0, 3.0, 4.0, 5.0])
    sampler = NegativeSampler(
        ("unigram", "softmax"), num_negatives=2, combination="product", exclude=None, unigram_counts=counts
    )
    weights = counts * torch.softmax(LOGITS, 0)
    weights[5] = 0.0
    assert_distribution(draw(sampler, LOGITS, 5, 20_000), without_replacement(weights, 2))


def test_independent_sources_drop_what_an_earlier_one_drew() -> None:
    sampler = NegativeSampler(("uniform", "softmax"), num_negatives=5, exclude=None)
    ids = draw(sampler, LOGITS, 0, 4000)
    assert sampler.shares == (2, 3)
    assert (ids[:, :2] >= 0).all()
    for row in ids.tolist():
        kept = [token for token in row if token >= 0]
        assert len(set(kept)) == len(kept)
        assert 0 not in kept
    assert (ids[:, 2:] == -1).any()
    assert_distribution(ids[:, :2], without_replacement(torch.tensor([0.0, 1, 1, 1, 1, 1]), 2))


def test_one_token_nearly_certain_does_not_starve_the_others() -> None:
    logits = torch.tensor([60.0, 0.0, 0.1, 0.2, 0.3])
    sampler = NegativeSampler(("softmax",), num_negatives=3, temperature=1.0, exclude=None)
    ids = draw(sampler, logits, 4, 500)
    assert (ids[:, 0] == 0).all()
    assert (ids >= 0).all()
    expected = without_replacement(torch.tensor([0.0, 1.0, 1.105, 1.221, 0.0]), 2)
    assert_distribution(ids[:, 1:], expected)


def test_negatives_far_below_the_dominant_tokens_are_found() -> None:
    logits = torch.tensor([900.0, 0.0, 1.0, 2.0])
    sampler = NegativeSampler(("softmax",), num_negatives=2, temperature=2.0, exclude=DominantRule.jump("first"))
    ids = draw(sampler, logits, 3, 4000)
    assert_distribution(ids, without_replacement(torch.tensor([0.0, 1.0, 1.6487, 0.0]), 2))


@pytest.mark.parametrize("combination", ["independent", "mixture", "product"])
def test_never_the_target_never_dominant_never_twice(combination: Any) -> None:
    logits = torch.randn(200, 400) * torch.linspace(0.5, 5.0, 200)[:, None]
    targets = torch.randint(0, 400, (200,))
    rule = DominantRule.jump("first")
    sampler = NegativeSampler(
        ("unigram", "softmax", "uniform"), combination=combination, exclude=rule, unigram_counts=torch.rand(400)
    )
    ids = F.sample_negatives(logits, targets, sampler)
    dominant = F.dominant_tokens(logits, rule).ids
    assert ids.shape == (200, 10)
    for row, target, excluded in zip(ids.tolist(), targets.tolist(), dominant.tolist(), strict=True):
        kept = [token for token in row if token >= 0]
        assert kept
        assert len(set(kept)) == len(kept)
        assert not set(kept) & ({target} | set(excluded))


def test_rows_with_too_few_candidates_are_padded() -> None:
    sampler = NegativeSampler(("uniform",), num_negatives=5, exclude=None)
    ids = draw(sampler, torch.zeros(4), 1, 10)
    assert ((ids >= 0).sum(1) == 3).all()
    assert (draw(sampler, torch.zeros(1), 0, 2) == -1).all()


def test_a_row_without_a_distribution_gets_no_negatives() -> None:
    logits = torch.zeros(3, 8)
    logits[1, 2] = torch.nan
    ids = F.sample_negatives(logits, torch.zeros(3, dtype=torch.int64), NegativeSampler(("uniform",), exclude=None))
    assert (ids[1] == -1).all()
    assert (ids[[0, 2]] >= 0).any(1).all()


def test_the_generator_decides_and_rows_do_not_depend_on_each_other() -> None:
    hidden, weight = torch.randn(150, 16), torch.randn(500, 16)
    targets = torch.randint(0, 500, (150,))
    sampler = NegativeSampler(("uniform", "softmax"))

    def sample(rows: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return F.linear_sample_negatives(hidden[:rows], weight, targets[:rows], sampler, generator)

    assert torch.equal(sample(150, 1), sample(150, 1))
    assert not torch.equal(sample(150, 1), sample(150, 2))
    assert torch.equal(sample(150, 1)[:70], sample(70, 1))


def test_philox_known_answers() -> None:
    """Vectors of the authors' Random123 library, kat_vectors, philox 4x32-10."""
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        words = philox(tuple(torch.tensor([word]) for word in counter), key)  # type: ignore[arg-type]
        assert tuple(int(word) for word in words) == expected
    numbers = uniform(7, 0, torch.arange(100), torch.arange(100))
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert abs(numbers.mean().item() - 0.5) < 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"sources": ()},
        {"sources": ("other",)},
        {"sources": ("unigram",)},
        {"sources": ("uniform",), "num_negatives": 0},
        {"sources": ("uniform",), "temperature": 0.0},
        {"sources": ("uniform",), "counts": (1, 2)},
        {"sources": ("uniform",), "weights": (1.0,)},
        {"sources": ("uniform",), "combination": "sum"},
        {"sources": ("unigram",), "unigram_counts": torch.zeros(3)},
    ],
    ids=str,
)
def test_bad_samplers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        NegativeSampler(**options)


def test_counts_of_another_vocabulary_are_refused() -> None:
    sampler = NegativeSampler(("unigram",), unigram_counts=torch.ones(5))
    with pytest.raises(ValueError, match="unigram_counts"):
        F.sample_negatives(torch.zeros(1, 6), torch.tensor([0]), sampler)


@pytest.fixture(params=[name for name in available_backends() if name != "reference"])
def kernels(request: pytest.FixtureRequest) -> str:
    """A backend that is compared with the reference."""
    with pyqe.use_backend(request.param):
        try:
            select("sample_negatives", torch.zeros(1, 1))
        except RuntimeError as error:
            pytest.skip(str(error))
    name: str = request.param
    return name


def both_backends(
    kernels: str, logits: Tensor, sampler: NegativeSampler, seed: int = 0, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Negatives by the reference and by the kernels."""
    results = []
    for name in ("reference", kernels):
        with pyqe.use_backend(name):
            generator = torch.Generator().manual_seed(seed)
            some = torch.full((len(logits),), -1) if targets is None else targets
            results.append(F.sample_negatives(logits, some, sampler, generator))
    return results[0], results[1]


def agree(expected: Tensor, found: Tensor) -> None:
    """Rounding may move a draw to its neighbour."""
    assert (expected == found).float().mean() > 0.99


@pytest.mark.parametrize("combination", ["independent", "mixture", "product"])
@pytest.mark.parametrize("sources", [("softmax",), ("unigram",), ("uniform", "softmax", "unigram")])
@pytest.mark.parametrize("exclude", [None, DominantRule.jump("first"), DominantRule.top_p(0.5)], ids=str)
def test_kernels_draw_what_the_reference_draws(
    kernels: str, combination: Any, sources: tuple[Any, ...], exclude: DominantRule | None
) -> None:
    counts = torch.randint(0, 4, (1500,)).float()
    sampler = NegativeSampler(sources, num_negatives=9, combination=combination, exclude=exclude, unigram_counts=counts)
    agree(*both_backends(kernels, 3 * torch.randn(20, 1500), sampler))


def test_tokens_far_below_the_best_are_drawn_by_their_own_weights(kernels: str) -> None:
    """Once the three best are drawn, the rest are e^-120 below: more than float32 holds."""
    logits = torch.randn(20, 3000)
    logits[:, :3] += 60
    sampler = NegativeSampler(("softmax",), num_negatives=10, temperature=0.5, exclude=None)
    expected, found = both_backends(kernels, logits, sampler)
    assert (found >= 0).all()
    agree(expected, found)


@pytest.mark.parametrize("combination", ["independent", "mixture"])
def test_tokens_without_weight_are_never_drawn(kernels: str, combination: Any) -> None:
    counts = torch.zeros(300)
    counts[torch.tensor([5, 70, 140, 299 - 9])] = torch.tensor([0.1, 0.7, 3.3, 8.0])
    sampler = NegativeSampler(
        ("unigram",), num_negatives=6, combination=combination, exclude=None, unigram_counts=counts
    )
    for seed in range(10):
        expected, found = both_backends(kernels, torch.randn(10, 300), sampler, seed)
        assert torch.equal((found >= 0).sum(1), torch.full((10,), 4))
        assert (counts[found[found >= 0]] > 0).all()
        assert torch.equal(expected.sort().values, found.sort().values)


@pytest.mark.parametrize("combination", ["independent", "mixture", "product"])
def test_a_vocabulary_of_several_segments_in_several_rounds(kernels: str, combination: Any) -> None:
    """Six tokens far apart hold nearly all the weight: every round finds one or two."""
    places, counts = torch.tensor([3, 259, 8191, 8192, 16500, 17000]), torch.rand(17001)
    logits = torch.randn(4, 17001)
    logits[:, places] += 8.0 * torch.arange(2, 8)
    counts[places] += 1e5
    sampler = NegativeSampler(
        ("softmax", "unigram", "softmax"),
        num_negatives=24,
        combination=combination,
        temperature=1.0,
        exclude=None,
        unigram_counts=counts,
    )
    expected, found = both_backends(kernels, logits, sampler, targets=places[:4])
    agree(expected, found)
    for row, target in zip(found.tolist(), places[:4].tolist(), strict=True):
        assert set(places.tolist()) - set(row) == {target}


def test_the_last_two_tokens_that_are_left(kernels: str) -> None:
    logits = torch.randn(5, 301)
    sampler = NegativeSampler(("uniform", "softmax"), num_negatives=6, exclude=DominantRule.top_k(298))
    targets = logits.argmin(1)  # not dominant, but never drawn
    expected, found = both_backends(kernels, logits, sampler, targets=targets)
    assert torch.equal(expected, found)
    assert torch.equal((found >= 0).sum(1), torch.full((5,), 2))
    assert torch.equal(found[:, :2].sort().values, logits.argsort()[:, 1:3].sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_lie_anywhere(kernels: str, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(9, 777)).to(dtype)[::2, 1:-3]
    targets = torch.randint(0, 773, (5,))
    for aligned in (logits, logits.contiguous()):
        sampler = NegativeSampler(("softmax", "uniform"), num_negatives=8)
        agree(*both_backends(kernels, aligned, sampler, targets=targets))


def test_kernels_draw_by_the_weights(kernels: str) -> None:
    """Pairs of five tokens far apart that alone have weight."""
    weights = torch.zeros(9000)
    weights[torch.tensor([0, 255, 4000, 8191, 8999])] = torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0])
    sampler = NegativeSampler(("softmax",), num_negatives=2, temperature=1.0, exclude=None)
    with pyqe.use_backend(kernels):
        ids = draw(sampler, weights.log(), 4000, 600)
    weights[4000] = 0.0
    assert_distribution(ids, without_replacement(weights, 2))


def test_kernels_draw_from_a_head(kernels: str) -> None:
    """More rows than one chunk of products, terms of the head, a source that draws nothing."""
    hidden, weight, bias = torch.randn(70, 16), torch.randn(600, 16), torch.randn(600)
    targets, counts = torch.randint(-1, 600, (70,)), torch.rand(600)
    sampler = NegativeSampler(("uniform", "softmax", "unigram"), 5, counts=(2, 0, 3), unigram_counts=counts)
    head: dict[str, Any] = {"bias": bias, "logit_scale": 1.5, "logit_softcap": 9.0}
    results = []
    for name in ("reference", kernels):
        with pyqe.use_backend(name):
            generator = torch.Generator().manual_seed(1)
            results.append(F.linear_sample_negatives(hidden, weight, targets, sampler, generator, **head))
    agree(*results)


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_a_row_draws_by_its_place_and_not_by_the_chunks(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(11, 600), torch.randint(0, 600, (11,))
    sampler = NegativeSampler(("uniform", "softmax"), num_negatives=6)

    def sample(rows: int) -> Tensor:
        with pyqe.use_backend(kernels):
            generator = torch.Generator().manual_seed(2)
            return F.sample_negatives(logits[:rows], targets[:rows], sampler, generator)

    whole = sample(11)
    monkeypatch.setattr(cuda_sampling, "CHUNK", 4)
    assert torch.equal(sample(11), whole)
    assert torch.equal(sample(6), whole[:6])


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_a_target_out_of_range_that_nothing_has_refused(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking at ids would wait for the device."""
    monkeypatch.setattr(reference, "check_ids", lambda *_: None)
    sampler, targets = NegativeSampler(("uniform", "softmax")), torch.tensor([3, 50, -2, 2**62, -1])
    with pyqe.use_backend(kernels):
        ids = F.sample_negatives(torch.randn(5, 50), targets, sampler)
    assert (ids[1:4] == -1).all()
    assert (ids[[0, 4]] >= 0).any(1).all()
