"""What tests/test_parallel.py runs on several processes: every function whose name begins with ``check_``.

``torchrun --nproc-per-node 2 tests/parallel_worker.py FOLDER``: a check that went well on all processes leaves an empty
file of its name in the folder.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pages import code_blocks
from scipy.stats import chisquare
from tiny import TEXTS, model, tokenizer
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, DistributedConfig, TrainerCallback

import pyqe
from pyqe import DominantRule, NegativeSampler, SigmoidHead, SigmoidHeadLoss
from pyqe import functional as F
from pyqe.functional._sharded import is_sharded, whole
from pyqe.lm_head import LMHead
from pyqe.training import (
    HiddenStateDataset,
    RowAdam,
    SigmoidHeadTrainer,
    SigmoidHeadTrainingArguments,
    TextDataset,
    TrainingModule,
    average_rows,
    fully_shard,
)

STOPPED, BATCH = 7, 4  # step of the checkpoints, in the second epoch; items in a step
ROWS = 8  # positions in an item


# --- training, also of one process in test_parallel.py


class _Stop(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == STOPPED


def trained(
    folder: Path, processes: int, *, resume: Path | None = None, stop: bool = False, sampled: bool = False
) -> Any:
    """Train a head, the items of a step divided among the processes; the checkpoint of step 7 is in the folder.

    Without sampling every process's mean is over as many pairs, so that their mean is that of the whole step.
    """
    torch.manual_seed(3)
    lm = model()
    states = HiddenStateDataset.compute(lm, TextDataset(tokenizer(), TEXTS * 5, block_size=16), rows=ROWS)
    length = ROWS * BATCH * 5  # five steps an epoch
    data = HiddenStateDataset(*(x[:length] for x in (states.hidden, states.labels, states.logsumexp)), rows=ROWS)
    args = SigmoidHeadTrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH // processes,
        num_train_epochs=2,
        learning_rate=1e-3,
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="steps",
        save_steps=STOPPED,
    )
    sampler = NegativeSampler(("uniform", "softmax"), num_negatives=4, exclude=None) if sampled else None
    run = SigmoidHeadTrainer(
        lm,
        SigmoidHead.from_lm_head(lm),
        args,
        loss=SigmoidHeadLoss(sampler, sparse_grad=sampled),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[_Stop()] if stop else [],
    )
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    return run


# --- vocabulary parallel


def _close(got: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance or {"atol": 2e-5, "rtol": 2e-5})


def _same_everywhere(tensor: Tensor) -> None:
    """The same bits on every process."""
    theirs = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, tensor.detach().contiguous())
    for other in theirs:
        assert torch.equal(other.nan_to_num(), tensor.nan_to_num())


def _fields(result: Any) -> dict[str, Tensor]:
    """Tensors of a result; what stands in a row for a token that cannot come has no order, so no id."""
    fields = {name: value for name, value in vars(result).items() if isinstance(value, Tensor)}
    fields["topk_ids"] = fields["topk_ids"].masked_fill(fields["topk_logits"].isneginf(), -1)
    return fields


def _sharded(*tensors: Tensor | None) -> list[Tensor | None]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return [None if x is None else distribute_tensor(x, mesh, [Shard(0)]) for x in tensors]


RULES = [None, DominantRule.jump("first"), DominantRule.top_p(0.8), DominantRule.eta(), DominantRule.min_p(0.1)]


def _heads() -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Hidden states, weight and bias: one row is NaN, one process's bias all -inf, of 5 tokens one of four has none."""
    heads = []
    for vocab_size, bias in ((5, "finite"), (5, "-inf"), (301, "none"), (301, "-inf")):
        hidden, weight, terms = torch.randn(70, 16), torch.randn(vocab_size, 16), torch.randn(vocab_size)
        hidden[3, 2] = torch.nan
        if bias == "-inf":
            terms[: -(-vocab_size // dist.get_world_size())] = -torch.inf
        heads.append((hidden, weight, None if bias == "none" else terms))
    return heads


def check_statistics() -> None:
    for hidden, weight, bias in _heads():
        rows = _sharded(weight, bias)
        ids = torch.randint(-1, len(weight), (70, 3))
        for rule in RULES:
            options: dict[str, Any] = {"token_ids": ids, "top_k": 4, "temperature": 1.7, "entropy": True}
            options |= {"choice_ids": torch.tensor([0, len(weight) - 1]), "dominant": rule}
            expected = F.linear_softmax_stats(hidden, weight, bias, **options)
            got = F.linear_softmax_stats(hidden, *rows, **options)  # type: ignore[arg-type]
            for name, value in _fields(expected).items():
                _close(_fields(got)[name], value)
                _same_everywhere(_fields(got)[name])
            if rule is not None:
                for name, value in vars(expected.dominant).items():
                    _close(getattr(got.dominant, name), value)
            again = F.linear_softmax_stats(hidden, *rows, **options)  # type: ignore[arg-type]
            assert torch.equal(again.entropy.nan_to_num(), got.entropy.nan_to_num())
        options = {"token_ids": ids, "top_k": 4, "threshold": 0.3, "scale": 0.7, "shift": torch.randn(70)}
        expected = F.linear_sigmoid_stats(hidden, weight, bias, **options)
        got = F.linear_sigmoid_stats(hidden, *rows, **options)  # type: ignore[arg-type]
        for name, value in _fields(expected).items():
            _close(_fields(got)[name], value)
            _same_everywhere(_fields(got)[name])


def check_softcap_and_other_dtypes() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        hidden, weight = torch.randn(9, 8, dtype=dtype), torch.randn(37, 8, dtype=dtype)
        options: dict[str, Any] = {"logit_scale": 0.5, "logit_softcap": 2.0, "token_ids": torch.arange(9), "top_k": 40}
        expected = F.linear_softmax_stats(hidden, weight, **options)
        got = F.linear_softmax_stats(hidden, *_sharded(weight), **options)  # type: ignore[arg-type]
        assert got.max_logprob.dtype == expected.max_logprob.dtype
        for name, value in _fields(expected).items():
            _close(_fields(got)[name].sort(-1).values, value.sort(-1).values)  # as bfloat16 has equal logits
        probs = F.linear_boosted_prob(hidden, *_sharded(weight), torch.arange(9))  # type: ignore[arg-type]
        _close(probs, F.linear_boosted_prob(hidden, weight, torch.arange(9)))
    empty = F.linear_softmax_stats(hidden[:0], *_sharded(weight), entropy=True)  # type: ignore[arg-type]
    assert empty.max_logit.shape == empty.entropy.shape == (0,)


def _gradients(loss_of: Callable[..., Tensor], *tensors: Tensor | None) -> list[Tensor | None]:
    """Loss and gradients, those of sharded tensors gathered."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    loss = loss_of(*leaves)
    loss.backward()  # type: ignore[no-untyped-call]
    for leaf in leaves:
        assert leaf is None or leaf.grad is not None
        assert getattr(leaf, "placements", None) == getattr(getattr(leaf, "grad", None), "placements", None)
    return [loss.detach(), *(None if leaf is None else whole(leaf.grad) for leaf in leaves)]


def check_losses_and_gradients() -> None:
    for hidden, weight, bias in _heads():
        hidden = hidden.nan_to_num()
        if bias is not None and bool(bias.isneginf().any()):
            continue
        targets, others = torch.randint(0, len(weight), (70,)), torch.randint(-1, len(weight), (70, 3))
        targets[5] = -100
        numbers = (torch.tensor(0.7), torch.tensor(-0.3))

        def sampled(h: Tensor, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return F.linear_sampled_bce(h, w, targets, others, b, scale=scale, shift=shift)  # noqa: B023

        def vocabulary(h: Tensor, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return F.linear_vocab_bce(h, w, targets, exclude=others, bias=b, scale=scale, shift=shift)  # noqa: B023

        def weighted(h: Tensor, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            options: dict[str, Any] = {"bias": b, "scale": scale, "shift": shift, "reduction": "none"}
            return (F.linear_vocab_bce(h, w, targets, **options) * torch.arange(70)).mean()  # noqa: B023

        for loss_of in (sampled, vocabulary, weighted):
            expected = _gradients(loss_of, hidden, weight, bias, *numbers)
            got = _gradients(loss_of, hidden, *_sharded(weight, bias), *numbers)
            again = _gradients(loss_of, hidden, *_sharded(weight, bias), *numbers)
            for mine, theirs, second in zip(got, expected, again, strict=True):
                if mine is None or theirs is None or second is None:
                    continue
                _close(mine, theirs, atol=1e-5 * max(1.0, theirs.abs().max().item()), rtol=1e-5)
                assert torch.equal(mine, second)
                _same_everywhere(mine)


def check_what_cannot_be_is_refused() -> None:
    hidden, weight, ids = torch.randn(4, 6), torch.randn(9, 6), torch.tensor([0, 1, 2, 9])
    (rows,) = _sharded(weight)
    assert rows is not None
    with pytest.raises(IndexError, match="9"):
        F.linear_token_logits(hidden, rows, ids)
    with pytest.raises(NotImplementedError, match="sparse_grad"):
        F.linear_token_logits(hidden, rows, ids - 1, sparse_grad=True)
    with pytest.raises(NotImplementedError, match="linear_joint_stats"):
        F.linear_joint_stats(hidden, rows)
    with pytest.raises(ValueError, match="bias"):
        F.linear_softmax_stats(hidden, rows, torch.zeros(9))
    with pytest.raises(ValueError, match=r"Shard\(0\)"):
        F.linear_softmax_stats(hidden, distribute_tensor(weight, rows.device_mesh, [Shard(1)]))  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="hidden"):
        F.linear_softmax_stats(*_sharded(hidden, weight))  # type: ignore[arg-type]


def check_other_meshes() -> None:
    """A replicated weight is used as it is, and a mesh may have a dimension for the data."""
    hidden, weight = torch.randn(4, 6), torch.randn(9, 6)
    count = dist.get_world_size()
    expected = F.linear_softmax_stats(hidden, weight, entropy=True).entropy
    for shape, placements in (((count,), [Replicate()]), ((2, count // 2), [Replicate(), Shard(0)])):
        placed = distribute_tensor(weight, init_device_mesh("cpu", shape), placements)
        _close(F.linear_softmax_stats(hidden, placed, entropy=True).entropy, expected)


def check_negatives() -> None:
    """Never the target, a dominant token or one twice, though the processes' generators differ."""
    vocab_size, rows = 41, 300
    hidden, weight = torch.randn(rows, 8), torch.randn(vocab_size, 8)
    targets, counts = torch.randint(0, vocab_size, (rows,)), torch.randint(0, 3, (vocab_size,)).float()
    (sharded,) = _sharded(weight)
    assert sharded is not None
    torch.manual_seed(100 + dist.get_rank())
    rule = DominantRule.jump("first")
    dominant = F.linear_dominant_tokens(hidden, weight, rule).ids
    for combination in ("independent", "mixture", "product"):
        sampler = NegativeSampler(("unigram", "softmax"), 9, combination, exclude=rule, unigram_counts=counts)  # type: ignore[arg-type]
        ids = F.linear_sample_negatives(hidden, sharded, targets, sampler)
        assert ids.shape == (rows, 9)
        _same_everywhere(ids)
        for row, target, members in zip(ids.tolist(), targets.tolist(), dominant.tolist(), strict=True):
            drawn = [token for token in row if token >= 0]
            assert len(set(drawn)) == len(drawn) >= 5
            assert not {target, *members} & set(drawn)


def check_negatives_come_as_their_weights_say() -> None:
    """Ordered pairs of six tokens, as many on every process that has any: equal random numbers there would show."""
    many, row, weight = 20_000, torch.randn(1, 8), torch.randn(6, 8)
    target, counts = torch.tensor([2]), torch.arange(6.0)
    (sharded,) = _sharded(weight)
    assert sharded is not None
    distributions = [torch.softmax(row @ weight.T / 2, 1)[0], counts]
    for combination in ("independent", "mixture", "product"):
        sources = ("softmax", "unigram")[: 1 if combination == "independent" else 2]
        options: dict[str, Any] = {"temperature": 2.0, "exclude": None, "unigram_counts": counts}
        sampler = NegativeSampler(sources, 2, combination, **options)  # type: ignore[arg-type]
        parts = torch.stack(distributions[: len(sources)]).double() * (torch.arange(6) != 2)
        parts = parts / parts.sum(1, keepdim=True)
        weights = parts.sum(0) if combination == "mixture" else parts.prod(0)
        weights = weights / weights.sum()
        pairs = weights[:, None] * weights / (1 - weights[:, None])  # a second one from what the first has left
        pairs.fill_diagonal_(0)
        ids = F.linear_sample_negatives(row.expand(many, -1), sharded, target.expand(many), sampler)
        found = torch.bincount(ids[:, 0] * 6 + ids[:, 1], minlength=36)
        possible = pairs.flatten() > 0
        assert found[~possible].sum() == 0
        assert chisquare(found[possible], many * pairs.flatten()[possible]).pvalue > 1e-4


def _steps(head: SigmoidHead, lm_head: LMHead, hidden: Tensor, targets: Tensor, loss: SigmoidHeadLoss) -> list[float]:
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        value = loss(head, hidden, targets, lm_head)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(value.item())
    return losses


def check_heads_train_with_everything_sharded(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    lm = model()
    hidden, targets = torch.randn(30, 32), torch.randint(0, lm.config.vocab_size, (30,))
    plain = LMHead(lm.lm_head.weight.detach(), torch.randn(lm.config.vocab_size))
    for kind in ("full", "low_rank", "rescaling"):
        torch.manual_seed(dist.get_rank())  # so that the matrix B differs until it is shared
        head = SigmoidHead.from_lm_head(lm, kind=kind, rank=3)  # type: ignore[arg-type]
        head.shard(mesh)
        head.save_pretrained(folder / kind)
        dist.barrier()
        alone = SigmoidHead.from_pretrained(folder / kind).requires_grad_(True)
        every = SigmoidHeadLoss(ranking_weight=0.5, exclude=DominantRule.jump("first"))
        expected = _steps(alone, plain, hidden, targets, every)
        _close(torch.tensor(_steps(head, plain.shard(mesh), hidden, targets, every)), torch.tensor(expected))
        for mine, theirs in zip(head.parameters(), alone.parameters(), strict=True):
            _close(whole(mine.detach()), theirs.detach(), atol=1e-4, rtol=1e-4)
        sampled = SigmoidHeadLoss(NegativeSampler(("softmax", "uniform")))
        losses = torch.tensor(_steps(head, plain.shard(mesh), hidden, targets, sampled))
        assert bool(losses.isfinite().all())
        for tensor in (losses, *(p.detach() for name, p in head.named_parameters() if name not in head.by_token)):
            _same_everywhere(tensor)


def check_tensor_parallel_model(folder: Path) -> None:
    """A model that transformers has sharded: its head is a DTensor, and scores are those of one process."""
    hidden = torch.randn(5, 32)
    if dist.get_rank() == 0:
        model(num_attention_heads=4, num_key_value_heads=4).save_pretrained(folder / "lm")
    dist.barrier()
    plain = AutoModelForCausalLM.from_pretrained(folder / "lm").eval()
    parallel = AutoModelForCausalLM.from_pretrained(
        folder / "lm", distributed_config=DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    ).eval()
    for kind, base in (("full", "logit"), ("low_rank", "logit"), ("low_rank", "logprob")):
        options: Any = {"kind": kind, "base": base}
        heads = [SigmoidHead.from_lm_head(lm, tokenizer(), **options) for lm in (plain, parallel)]
        assert is_sharded(getattr(heads[1], heads[1].by_token[0]))
        pairs = zip((plain, parallel), heads, strict=True)
        scored = [pyqe.QualityEstimator(lm, tokenizer(), head).score(TEXTS) for lm, head in pairs]
        for mine, theirs in zip(scored[1], scored[0], strict=True):
            _close(torch.tensor(mine.token_quality), torch.tensor(theirs.token_quality))
        joint = [
            head.joint_stats(hidden, LMHead.from_model(lm)) for lm, head in zip((plain, parallel), heads, strict=True)
        ]
        _close(joint[1][1].sum_prob, joint[0][1].sum_prob)


# --- data parallel


def check_sparse_gradients_are_averaged() -> None:
    """Under DDP the gradient is the mean of the processes', also of one whose batch has nothing to learn."""
    rank, lm = dist.get_rank(), model()
    hidden = torch.randn(2, 12, 32)
    labels = torch.randint(0, lm.config.vocab_size, (2, 12))
    if rank == 1:
        hidden, labels = hidden + 1, torch.full_like(labels, -100)
    module = TrainingModule(
        lm, SigmoidHead.from_lm_head(lm), SigmoidHeadLoss(NegativeSampler(("uniform",)), sparse_grad=True)
    )
    torch.manual_seed(5)
    module(labels, hidden=hidden)["loss"].backward()
    expected = [parameter.grad.to_dense() for parameter in module.head.parameters()]  # type: ignore[union-attr]
    for grad in expected:
        dist.all_reduce(grad)
    module.zero_grad()
    average_rows(module)
    parallel = DistributedDataParallel(module)
    optimizer = RowAdam(module.parameters())
    for passes in (1, 2):  # the second adds up
        torch.manual_seed(5)
        parallel(labels, hidden=hidden)["loss"].backward()
        for parameter, total in zip(module.head.parameters(), expected, strict=True):
            assert parameter.grad is not None
            _close(parameter.grad.to_dense(), passes * total / dist.get_world_size())
        assert module.head.weight.grad.is_sparse  # type: ignore[union-attr]
    optimizer.step()
    for parameter in module.parameters():
        _same_everywhere(parameter.detach())


def check_processes_draw_other_negatives() -> None:
    lm = model()
    module = TrainingModule(lm, SigmoidHead.from_lm_head(lm), SigmoidHeadLoss())
    for module.training in (True, False):
        torch.manual_seed(0)
        generator = module._generator()
        assert generator is not None
        seeds = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(seeds, torch.tensor(generator.initial_seed()))
        assert len({int(seed) for seed in seeds}) == len(seeds)


def check_trainer_with_sparse_gradients(folder: Path) -> None:
    run = trained(folder, dist.get_world_size(), sampled=True)
    assert run.state.global_step == 10
    for parameter in run.head.parameters():
        _same_everywhere(parameter.detach())
    losses = [entry["eval_loss"] for entry in (run.evaluate(), run.evaluate()) if "eval_loss" in entry]
    assert losses[0] == losses[1]


def check_fsdp2(folder: Path) -> None:
    """The head's module and the LM under FSDP2 train as one process does on the whole batch."""
    count, rank = dist.get_world_size(), dist.get_rank()
    ids = torch.randint(3, len(tokenizer()), (2 * count, 9))
    loss = SigmoidHeadLoss()  # over the vocabulary: as many pairs on every process
    alone, sharded = model(), model()
    for layer in sharded.model.layers:
        torch.distributed.fsdp.fully_shard(layer)
    torch.distributed.fsdp.fully_shard(sharded)
    for kind in ("full", "low_rank"):
        torch.manual_seed(1)
        modules = [TrainingModule(lm, SigmoidHead.from_lm_head(lm, kind=kind), loss) for lm in (alone, sharded)]  # type: ignore[arg-type]
        modules[1].head.load_state_dict(modules[0].head.state_dict())
        fully_shard(modules[1])
        mine = ids[2 * rank : 2 * rank + 2]
        for module, batch in zip(modules, (ids, mine), strict=True):
            optimizer = torch.optim.SGD(module.parameters(), lr=1.0)  # shows the size of a gradient, as Adam does not
            for _ in range(3):
                optimizer.zero_grad()
                module(batch, input_ids=batch)["loss"].backward()
                optimizer.step()
        assert all(is_sharded(getattr(modules[1].head, name)) for name in modules[1].head.by_token)
        modules[1].head.save_pretrained(folder / kind)
        dist.barrier()
        saved = SigmoidHead.from_pretrained(folder / kind)
        for (name, got), expected in zip(saved.named_parameters(), modules[0].head.parameters(), strict=True):
            torch.testing.assert_close(got, expected.detach(), atol=1e-6, rtol=1e-5, msg=name)


def check_page(folder: Path) -> None:
    """The examples of docs/distributed.md run."""
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    lm = model()
    hidden, targets = torch.randn(30, 32), torch.randint(0, lm.config.vocab_size, (30,))
    names = {"lm": lm, "tokenizer": tokenizer(), "texts": TEXTS * 4, "hidden": hidden, "targets": targets}
    os.chdir(folder)
    for block in code_blocks(page, "py"):
        exec(compile(block, "distributed.md", "exec"), names)
    dist.barrier()
    for name in ("head", "run"):
        SigmoidHead.from_pretrained(folder / name)


def check_checkpoint(folder: Path) -> None:
    trained(folder / f"from {dist.get_world_size()}", dist.get_world_size(), stop=True)


def check_resuming(folder: Path) -> None:
    """Where the parent has put checkpoints of 1 and of 4 processes."""
    for source in folder.parent.glob("from */checkpoint-*"):
        run = trained(folder / source.parent.name, dist.get_world_size(), resume=source)
        run.save_model()
        assert run.state.global_step == 10


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            torch.manual_seed(0)
            place = folder / name
            place.mkdir(exist_ok=True)
            check(place) if "folder" in check.__annotations__ else check()
            dist.barrier()
            (place / "passed").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
