"""Adam that touches only the rows that have a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pyqe.heads import SigmoidHead


class RowAdam(torch.optim.Optimizer):
    """Adam for parameters with sparse row gradients and with dense ones, in one optimizer.

    Rows without a gradient keep their value and their moments, as in ``torch.optim.SparseAdam`` (which takes sparse
    gradients only); dense gradients get ordinary Adam. No weight decay.

    Args:
        params: parameters or groups.
        lr: learning rate, > 0.
        betas: decay of the two moments, in [0, 1).
        eps: added to the denominator.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3, 1))
        >>> weight.grad = torch.sparse_coo_tensor([[1]], [[1.0]], (3, 1), check_invariants=True)
        >>> RowAdam([weight], lr=0.5).step()
        >>> weight.flatten().tolist()
        [0.0, -0.5, 0.0]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not lr > 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr, betas: expected lr > 0 and betas in [0, 1), got {lr} and {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient; returns what the closure gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, **{k: group[k] for k in ("lr", "betas", "eps")})
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, lr: float, betas: tuple[float, float], eps: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        rows: Any = ...
        if grad.is_sparse:
            grad = grad.coalesce()
            rows, grad = grad.indices()[0], grad.values()
        mean = torch.lerp(state["mean"][rows], grad, 1 - betas[0])
        square = torch.lerp(state["square"][rows], grad * grad, 1 - betas[1])
        state["mean"][rows], state["square"][rows] = mean, square
        correction = (1 - betas[1] ** state["step"]) ** 0.5 / (1 - betas[0] ** state["step"])
        denominator = square.sqrt() + eps * (1 - betas[1] ** state["step"]) ** 0.5
        parameter[rows] = parameter[rows] - lr * correction * mean / denominator


def parameter_groups(head: SigmoidHead, affine_learning_rate: float | None = None) -> list[dict[str, Any]]:
    """A head's parameters for an optimizer: scale and shift, and the weights.

    Args:
        head: the head.
        affine_learning_rate: of scale and shift; default the optimizer's for a low-rank head, which starts near where
            they end, and 1e-2 for others, whose scale and shift move much further than the weights.

    Returns:
        the two groups, or one where there are no weights (a rescaling head).
    """
    if affine_learning_rate is None and head.config.kind != "low_rank":
        affine_learning_rate = 1e-2
    affine = [head.scale, head.shift]
    rest = [p for p in head.parameters() if p.requires_grad and all(p is not a for a in affine)]
    own = {} if affine_learning_rate is None else {"lr": affine_learning_rate}
    groups: list[dict[str, Any]] = [{"params": affine, **own}, {"params": rest}]
    return [group for group in groups if group["params"]]
