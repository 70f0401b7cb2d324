"""The Sigmoid Head loss against a slow and literal one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pyqe
from pyqe import functional as F
from pyqe.dominant import DominantRule
from pyqe.heads import FullHead, HeadConfig, LowRankHead, RescalingHead, SigmoidHead
from pyqe.lm_head import LMHead
from pyqe.losses import SigmoidHeadLoss
from pyqe.negatives import NegativeSampler

V, D, N = 60, 12, 30
HEADS = {"full": FullHead, "low_rank": LowRankHead, "rescaling": RescalingHead}


def setting(kind: str = "full", base: Any = None) -> tuple[SigmoidHead, Tensor, Tensor, LMHead]:
    """A head with random parameters, hidden states, targets (two of them ignored) and an LM head."""
    base = base or (None if kind == "full" else "logprob")
    head = HEADS[kind](HeadConfig(kind, V, D, scale=0.7, shift=-1.0, base=base, rank=3))  # type: ignore[arg-type]
    for name, parameter in head.named_parameters():
        if name not in ("scale", "shift"):
            torch.nn.init.normal_(parameter, std=0.5)
    targets = torch.randint(0, V, (N,))
    targets[[4, 9]] = -100
    return head, torch.randn(N, D), targets, LMHead(torch.randn(V, D))


def literal_negatives(hidden: Tensor, targets: Tensor, lm_head: LMHead, sampler: NegativeSampler, seed: int) -> Tensor:
    """The same negatives that the loss draws: over the kept positions, in order."""
    return lm_head.sample_negatives(hidden, targets, sampler, torch.Generator().manual_seed(seed))


@torch.no_grad()
def literal_logit(head: SigmoidHead, hidden: Tensor, token: int, lm_head: LMHead) -> float:
    """z' of one token by the formulas, one number at a time."""
    logits = lm_head.weight.double() @ hidden.double()
    base = logits[token] - (torch.logsumexp(logits, 0) if head.config.base == "logprob" else 0.0)
    scale, shift = head.scale.double(), head.shift.double()
    if isinstance(head, FullHead):
        return float(scale * (head.weight[token].double() @ hidden.double()) + shift)
    z = scale * base + shift
    if isinstance(head, LowRankHead):
        z = z + head.token_bias[token] + head.A[token].double() @ (head.B.double() @ hidden.double())
    return float(z)


def bce(z: float, label: int, pos_weight: float = 1.0) -> float:
    return pos_weight * math.log1p(math.exp(-z)) if label else math.log1p(math.exp(z))


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("pos_weight", [1.0, "balance"])
def test_sampled_loss_is_the_literal_one(kind: str, pos_weight: Any) -> None:
    head, hidden, targets, lm_head = setting(kind)
    sampler = NegativeSampler(("uniform", "softmax"), num_negatives=6)
    kept = targets != -100
    negatives = literal_negatives(hidden[kept], targets[kept], lm_head, sampler, 5)
    pairs = [
        (h, token, label)
        for h, target, row in zip(hidden[kept], targets[kept].tolist(), negatives.tolist(), strict=True)
        for token, label in [(target, 1), *((token, 0) for token in row if token >= 0)]
    ]
    weight = 6.0 if pos_weight == "balance" else 1.0
    expected = sum(bce(literal_logit(head, h, t, lm_head), y, weight) for h, t, y in pairs) / len(pairs)
    loss = SigmoidHeadLoss(sampler, pos_weight=pos_weight)
    got = loss(head, hidden, targets, lm_head, generator=torch.Generator().manual_seed(5))
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_vocabulary_loss_is_the_literal_one(kind: str, reduction: Any) -> None:
    head, hidden, targets, lm_head = setting(kind)
    rule = DominantRule.jump("first", ratio=0.1)
    kept = (targets != -100).nonzero()[:, 0]
    dominant = F.linear_dominant_tokens(hidden, lm_head.weight, rule).ids
    sums, pairs = torch.zeros(N, dtype=torch.float64), 0
    for i in kept.tolist():
        for token in set(range(V)) - (set(dominant[i].tolist()) - {int(targets[i])}):
            sums[i] += bce(literal_logit(head, hidden[i], token, lm_head), int(token == targets[i]))
            pairs += 1
    expected = {"mean": sums.sum() / pairs, "sum": sums.sum(), "none": sums}[reduction]
    got = SigmoidHeadLoss(exclude=rule, reduction=reduction)(head, hidden, targets, lm_head)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [False, True])
def test_annotated_tokens(vocabulary: bool) -> None:
    head, hidden, targets, lm_head = setting()
    targets = targets.clamp(min=0)
    labels = torch.tensor([1, 0, -1] * 10)
    sampler = NegativeSampler(("uniform",), num_negatives=4, exclude=None)
    seed = torch.Generator().manual_seed(5)
    loss = SigmoidHeadLoss(None if vocabulary else sampler, reduction="none", error_weight=10.0)
    rows = loss(head, hidden, targets, lm_head, labels=labels, generator=seed)
    for i in range(1, 30, 3):
        z = literal_logit(head, hidden[i], int(targets[i]), lm_head)
        assert rows[i].item() == pytest.approx(10.0 * bce(z, 0), rel=1e-4)
    assert (rows[2::3] == 0).all()
    assert (rows[::3] > 0).all()
    skipped = targets.masked_fill(labels == -1, -100)
    right = loss(head, hidden, skipped.masked_fill(labels == 0, -100), lm_head)
    if vocabulary:
        torch.testing.assert_close(rows[::3], right[::3])


def test_token_weights_scale_the_losses() -> None:
    head, hidden, targets, lm_head = setting()
    weights = torch.rand(N)
    for sampler in (None, NegativeSampler(("uniform",), num_negatives=4)):
        loss = SigmoidHeadLoss(sampler, reduction="none")
        plain, weighted = (
            loss(head, hidden, targets, lm_head, weights=w, generator=torch.Generator().manual_seed(1))
            for w in (None, weights)
        )
        torch.testing.assert_close(weighted, plain * weights)


def test_ranking_term_is_the_literal_one() -> None:
    head, hidden, targets, lm_head = setting("low_rank")
    sampler = NegativeSampler(("uniform",), num_negatives=2)
    values = []
    for weight in (0.0, 2.0):
        loss = SigmoidHeadLoss(sampler, ranking_weight=weight, ranking_margin=0.3)
        values.append(loss(head, hidden, targets, lm_head, generator=torch.Generator().manual_seed(1)).item())
    dominant = F.linear_dominant_tokens(hidden, lm_head.weight, DominantRule.jump("first")).ids
    terms = []
    for i in (targets != -100).nonzero()[:, 0].tolist():
        z_y = literal_logit(head, hidden[i], int(targets[i]), lm_head)
        for token in dominant[i].tolist():
            if token >= 0 and token != targets[i]:
                terms.append(max(0.0, literal_logit(head, hidden[i], token, lm_head) - z_y + 0.3))
    assert terms
    assert values[1] - values[0] == pytest.approx(2.0 * sum(terms) / len(terms), rel=1e-4)


def test_ranking_term_by_reduction() -> None:
    head, hidden, targets, lm_head = setting("low_rank")
    results = {}
    for reduction in ("none", "sum"):
        terms = []
        for weight in (0.0, 2.0):
            loss = SigmoidHeadLoss(
                NegativeSampler(("uniform",)), ranking_weight=weight, ranking_margin=0.3, reduction=reduction
            )
            terms.append(loss(head, hidden, targets, lm_head, generator=torch.Generator().manual_seed(1)))
        results[reduction] = terms[1] - terms[0]
    assert (results["none"][targets == -100] == 0).all()
    torch.testing.assert_close(results["none"].sum(), results["sum"])


def test_losses_share_conventions() -> None:
    """Bias outside the scale, -1 as ignored, weights of ignored positions of no account."""
    _, hidden, targets, _ = setting()
    weight, bias = torch.randn(V, D), torch.randn(V)
    targets[0] = -1
    everything = torch.arange(V).expand(N, V)
    negatives = everything.masked_fill(everything == targets[:, None], -1)
    options: dict[str, Any] = {"bias": bias, "scale": 0.3, "shift": -0.5}
    sampled = F.linear_sampled_bce(hidden, weight, targets, negatives, **options)
    weights = torch.ones(N)
    weights[targets < 0] = torch.nan
    torch.testing.assert_close(F.linear_vocab_bce(hidden, weight, targets, weights=weights, **options), sampled)
    with pytest.raises(ValueError, match="weights"):
        F.linear_vocab_bce(hidden, weight, targets, weights=torch.ones(1), **options)


@pytest.mark.parametrize("kind", list(HEADS))
def test_gradients_reach_every_parameter_and_nothing_else(kind: str) -> None:
    head, hidden, targets, lm_head = setting(kind)
    for sampler in (None, NegativeSampler(("uniform", "softmax"), num_negatives=50)):
        head.zero_grad()
        SigmoidHeadLoss(sampler, ranking_weight=0.5)(head, hidden, targets, lm_head).backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert (parameter.grad != 0).any(), name
    assert lm_head.weight.grad is None


def test_sparse_gradients_are_the_dense_ones() -> None:
    head, hidden, targets, lm_head = setting()
    assert isinstance(head, FullHead)
    grads = []
    for sparse in (False, True):
        head.zero_grad()
        loss = SigmoidHeadLoss(NegativeSampler(("uniform",), num_negatives=3), sparse_grad=sparse)
        loss(head, hidden, targets, lm_head, generator=torch.Generator().manual_seed(1)).backward()
        assert head.weight.grad is not None
        assert head.weight.grad.is_sparse == sparse
        grads.append(head.weight.grad.to_dense())
    torch.testing.assert_close(grads[1], grads[0])


def test_nothing_to_learn_gives_zero() -> None:
    head, hidden, _, lm_head = setting()
    nothing = torch.full((N,), -100)
    for sampler in (None, NegativeSampler(("uniform",))):
        loss = SigmoidHeadLoss(sampler)(head, hidden, nothing, lm_head)
        loss.backward()
        assert loss.item() == 0.0
    assert head.scale.grad is not None
    assert head.scale.grad.isfinite()


def test_functional_loss_is_the_module() -> None:
    head, hidden, targets, lm_head = setting()
    assert isinstance(head, FullHead)
    sampler = NegativeSampler(("uniform",), num_negatives=3)
    kept = targets != -100
    negatives = torch.full((N, 3), -1)
    negatives[kept] = literal_negatives(hidden[kept], targets[kept], lm_head, sampler, 5)
    module = SigmoidHeadLoss(sampler)(head, hidden, targets, lm_head, generator=torch.Generator().manual_seed(5))
    plain = F.linear_sampled_bce(hidden, head.weight, targets, negatives, scale=head.scale, shift=head.shift)
    torch.testing.assert_close(plain, module)


def test_vocabulary_loss_takes_a_rule() -> None:
    _, hidden, targets, lm_head = setting()
    weight, rule = torch.randn(V, D), DominantRule.top_k(3)
    ids = F.linear_dominant_tokens(hidden, lm_head.weight, rule).ids
    by_rule = F.linear_vocab_bce(hidden, weight, targets, exclude=rule, lm_weight=lm_head.weight)
    torch.testing.assert_close(by_rule, F.linear_vocab_bce(hidden, weight, targets, exclude=ids))
    with pytest.raises(ValueError, match="lm_weight"):
        F.linear_vocab_bce(hidden, weight, targets, exclude=rule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction"),
        ({"pos_weight": "heavy"}, "pos_weight"),
        ({"sparse_grad": True}, "sparse_grad"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pyqe.SigmoidHeadLoss(**options)


def test_bad_labels_are_refused() -> None:
    head, hidden, targets, lm_head = setting()
    loss = SigmoidHeadLoss(NegativeSampler(("uniform",)))
    with pytest.raises(ValueError, match="labels"):
        loss(head, hidden, targets, lm_head, labels=torch.full_like(targets, 2))
    with pytest.raises(ValueError, match="weights"):
        loss(head, hidden, targets, lm_head, weights=torch.ones(3))
