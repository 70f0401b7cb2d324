"""Training a Sigmoid Head: a whole step, and the loss over the vocabulary with its gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import pyqe
from pyqe import functional as F
from pyqe.bench.case import Case, Outcome, Rival, Settings, Shape, Work, compiled_rival, optional
from pyqe.bench.suites.sampling import TEMPERATURE, published_selection, zipf_counts
from pyqe.heads import FullHead, HeadConfig
from pyqe.lm_head import LMHead
from pyqe.training import RowAdam

_LEARNING_RATE = 1e-4
_MOST_EXCLUDED = 8
_FEW_ROWS = 512


def cases(settings: Settings) -> list[Callable[[], Case]]:
    if settings.on_gpu:
        largest, *few = settings.shapes(models=("Llama-3-8B",), n=(4096, _FEW_ROWS))
        steps = settings.shapes(models=("SmolLM2-135M",), n=(1024,))
        return [
            partial(vocabulary_bce, largest),
            partial(vocabulary_bce, largest, frozen=True),
            *(partial(training_step, shape) for shape in (largest, *steps)),
            *(partial(vocabulary_bce, shape) for shape in few),
        ]
    steps = settings.shapes(models=("SmolLM2-135M",), n=(1024,))
    losses = settings.shapes(models=("Llama-3.2-1B",), n=(512,))
    return [
        *(partial(training_step, shape) for shape in steps),
        *(partial(vocabulary_bce, shape) for shape in losses),
    ]


# --- a step, from hidden states to updated rows


def _fused_step(shape: Shape, lm_weight: Tensor) -> Callable[..., Outcome]:
    with torch.device(shape.device):  # half a billion numbers, which a CPU would take long to draw
        head = FullHead(HeadConfig("full", vocab_size=shape.v, hidden_size=shape.d, scale=0.3, shift=-5.0))
    lm_head = LMHead(lm_weight)
    head.initialise(lm_head)
    sampler = pyqe.NegativeSampler(temperature=TEMPERATURE, unigram_counts=zipf_counts(shape.v, shape.device))
    loss = pyqe.SigmoidHeadLoss(sampler, sparse_grad=True)
    optimizer = RowAdam(head.parameters(), lr=_LEARNING_RATE)

    def run(hidden: Tensor, targets: Tensor) -> Outcome:
        optimizer.zero_grad()
        value = loss(head, hidden, targets, lm_head)
        value.backward()
        optimizer.step()
        return {"loss": value.item()}

    return run


def published_loss(hidden: Tensor, weight: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Mean BCE over the pairs of a row and a token, the same pair counted once; the target is right whatever is drawn.

    Args:
        hidden: [N, D].
        weight: [V, D], float32; its gradient is sparse.
        targets: [N].
        negatives: [N, K].
    """
    places = torch.arange(len(targets), device=targets.device)
    rows = places[:, None].expand_as(negatives)
    wrong = negatives != targets[:, None]
    drawn = torch.unique(torch.stack([rows[wrong], negatives[wrong]]), dim=1)
    rows, tokens = torch.cat([torch.stack([places, targets]), drawn], 1)
    labels = (torch.arange(len(tokens), device=tokens.device) < len(targets)).float()
    embedded = torch.nn.functional.embedding(tokens, weight, sparse=True)
    return binary_cross_entropy_with_logits((hidden[rows].float() * embedded).sum(-1), labels)


def _published_step(shape: Shape, lm_weight: Tensor) -> Callable[..., Outcome]:
    weight = lm_weight.float().clone().requires_grad_()
    unigram = zipf_counts(shape.v, shape.device)
    optimizer = torch.optim.SparseAdam([weight], lr=_LEARNING_RATE)

    def run(hidden: Tensor, targets: Tensor) -> Outcome:
        optimizer.zero_grad()
        value = published_loss(hidden, weight, targets, published_selection(hidden, lm_weight, unigram))
        value.backward()
        optimizer.step()
        return {"loss": value.item()}

    return run


def training_step(shape: Shape) -> Case:
    weight = shape.weight()
    return Case(
        "loss",
        "training step",
        shape.facts(),
        lambda: (shape.hidden(), shape.ids()),
        [
            Rival("pyqe", _fused_step(shape, weight)),
            Rival("authors", _published_step(shape, weight), "as published, in eager torch with SparseAdam"),
        ],
        shape.head_work(),
        shape.logit_bytes,
        "negatives, loss, gradients and update of a full head",
        by_backend=False,
    )


# --- the loss over the vocabulary


def eager_vocabulary_bce(hidden: Tensor, weight: Tensor, targets: Tensor, exclude: Tensor) -> Tensor:
    """The mean over all pairs that are not excluded, by autograd over the whole logits."""
    logits = (hidden @ weight.T).float()
    kept = torch.ones_like(logits).scatter_(1, exclude, 0.0).scatter_(1, targets[:, None], 1.0)
    labels = torch.zeros_like(logits).scatter_(1, targets[:, None], 1.0)
    return binary_cross_entropy_with_logits(logits, labels, weight=kept, reduction="sum") / kept.sum()


def _gpu_rivals(
    shape: Shape, frozen: bool, with_gradients: Callable[[Callable[..., Tensor], str], Callable[..., Outcome]]
) -> list[Rival]:
    """Fused softmax cross-entropies, whose kernels need a GPU."""
    if shape.device == "cpu":
        return []
    note = "softmax cross-entropy"

    def make(cross_entropy: Callable[..., Tensor]) -> Callable[..., Outcome]:
        return with_gradients(lambda hidden, weight, targets, exclude: cross_entropy(hidden, weight, targets), note)

    liger = optional("Liger", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", make, note)
    if frozen:
        liger = Rival("Liger", missing="it computes both gradients or none")
    return [liger, optional("CCE", "cut_cross_entropy", "linear_cross_entropy", make, note)]


def vocabulary_bce(shape: Shape, frozen: bool = False) -> Case:
    """With both gradients, or with that of the weight alone, as for a head on a frozen LM."""

    def with_gradients(loss: Callable[..., Tensor], name: str) -> Callable[..., Outcome]:
        def run(hidden: Tensor, weight: Tensor, targets: Tensor, exclude: Tensor) -> Outcome:
            value = loss(hidden, weight, targets, exclude)
            grads = torch.autograd.grad(value, (weight,) if frozen else (weight, hidden))
            return {name: value.detach(), **{f"{name}, gradient {i}": grad for i, grad in enumerate(grads)}}

        return run

    def fused(hidden: Tensor, weight: Tensor, targets: Tensor, exclude: Tensor) -> Tensor:
        return F.linear_vocab_bce(hidden, weight, targets, exclude=exclude)

    def inputs() -> tuple[Tensor, ...]:
        excluded = torch.randint(shape.v, (shape.n, _MOST_EXCLUDED), device=shape.device)
        return shape.hidden().requires_grad_(not frozen), weight, shape.ids(), excluded

    weight, once, bce = shape.weight().detach().requires_grad_(), shape.head_work(), "mean loss"
    return Case(
        "loss",
        "vocabulary BCE, frozen LM" if frozen else "vocabulary BCE",
        shape.facts(),
        inputs,
        [
            Rival("pyqe", with_gradients(fused, bce)),
            Rival("eager", with_gradients(eager_vocabulary_bce, bce)),
            compiled_rival(
                eager_vocabulary_bce,
                shape.device,
                on_gpu=shape.n > _FEW_ROWS and not frozen,
                around=partial(with_gradients, name=bce),
            ),
            *_gpu_rivals(shape, frozen, with_gradients),
        ],
        Work(flops=(2 if frozen else 3) * once.flops, bytes=2 * once.bytes),  # the weight is read, its gradient written
        shape.logit_bytes,
        f"forward and {'the weight gradient' if frozen else 'both gradients'}, "
        f"up to {_MOST_EXCLUDED} dominant tokens a row left out",
        "linear_vocab_bce",
    )
