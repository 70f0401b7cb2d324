"""Data parallel training: gradients of single rows without an all-reduce of all of them, and FSDP2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from pyqe.training.module import TrainingModule


def processes() -> tuple[int, int]:
    """This process's rank and their number: (0, 1) where nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _average(parameter: Tensor, group: dist.ProcessGroup) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad, group=group)
    parameter.grad /= group.size()


def mean_of_rows(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Mean over the processes of a sparse gradient of rows, summed in the order of their ranks.

    Each of R processes receives (R - 1) * rows * (4 D + 8) bytes, rows being those that the widest batch touches. An
    all-reduce of all rows moves 2 (R - 1) / R * V * 4 D.
    """
    grad = grad.coalesce()
    count = torch.tensor([grad.values().shape[0]], device=grad.device)
    counts = [torch.empty_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    sizes = [int(size) for size in counts]
    padding = max(sizes) - len(grad.values())
    ids, rows = F.pad(grad.indices()[0], (0, padding)), F.pad(grad.values(), (0, 0, 0, padding))
    all_ids = [torch.empty_like(ids) for _ in sizes]
    all_rows = [torch.empty_like(rows) for _ in sizes]
    dist.all_gather(all_ids, ids, group=group)
    dist.all_gather(all_rows, rows, group=group)
    union = torch.unique(torch.cat([ids[:size] for ids, size in zip(all_ids, sizes, strict=True)]))
    total = rows.new_zeros(len(union), rows.shape[1])
    for ids, rows, size in zip(all_ids, all_rows, sizes, strict=True):  # no row twice in a call: no race, one order
        total.index_add_(0, torch.searchsorted(union, ids[:size]), rows[:size])
    total /= len(sizes)
    return torch.sparse_coo_tensor(union[None], total, grad.shape, is_coalesced=True, check_invariants=False)


def _average_rows(parameter: Tensor, group: dist.ProcessGroup) -> None:
    """What has come in earlier passes is averaged already; that again leaves it as it is."""
    assert parameter.grad is not None
    parameter.grad = mean_of_rows(parameter.grad, group)


def average_rows(module: TrainingModule, group: dist.ProcessGroup | None = None) -> None:
    """Exchange the sparse gradient of the head's rows in place of DDP; call it before DDP wraps the module.

    DDP sums sparse gradients with gloo only, as NCCL has no such collective. Here the rows that any process has touched
    are gathered and averaged after each backward pass, in the same order with every backend. The Trainer of this
    package does it by itself.

    Args:
        module: of a loss with ``sparse_grad``.
        group: default all processes.

    Example:
        >>> from pyqe.training import TrainingModule, average_rows
        >>> def wrapped(module: TrainingModule) -> torch.nn.Module:
        ...     average_rows(module)
        ...     return torch.nn.parallel.DistributedDataParallel(module)
    """
    group = group or dist.group.WORLD
    assert group is not None
    names = module.head.by_token[:1]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [f"head.{name}" for name in names])
    for name in names:
        parameter = getattr(module.head, name)
        dist.broadcast(parameter.detach(), group=group, group_src=0)
        parameter.register_post_accumulate_grad_hook(lambda p: _average_rows(p, group))


def fully_shard(module: TrainingModule, **options: Any) -> TrainingModule:
    """FSDP2 for a head: ``torch.distributed.fsdp.fully_shard`` of the module, but for scale and shift.

    Those are numbers, which FSDP2 cannot shard; their gradients are averaged over its processes.

    Args:
        module: the whole module, as the head computes in its forward pass.
        **options: of ``torch.distributed.fsdp.fully_shard``, such as ``mesh``.

    Raises:
        ValueError: a loss with ``sparse_grad``: FSDP2 reduces dense gradients.
    """
    from torch.distributed.fsdp import fully_shard as shard

    if module.loss.sparse_grad:
        raise ValueError("sparse_grad: expected False under FSDP2, which reduces dense gradients")
    mesh = options.get("mesh")
    group = dist.group.WORLD if mesh is None else mesh.get_group()
    assert group is not None
    numbers = [module.head.scale, module.head.shift]
    sharded: Any = shard(module, ignored_params=set(numbers), **options)
    for number in numbers:
        dist.broadcast(number.detach(), group=group, group_src=0)
        number.register_post_accumulate_grad_hook(lambda p: _average(p, group))
    return sharded
