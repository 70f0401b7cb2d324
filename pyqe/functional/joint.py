"""Statistics of an LM's head and of a Sigmoid Head on top of it, from one pass."""

from __future__ import annotations

from torch import Tensor

from pyqe.backends.reference import compute_dtype
from pyqe.dominant import DominantRule
from pyqe.functional._arguments import check_top_k, head_matrix, optional_ids, per_row, rule_spec
from pyqe.functional._sharded import operator
from pyqe.functional.results import SigmoidStats, SoftmaxStats
from pyqe.functional.sigmoid import sigmoid_result
from pyqe.functional.softmax import check_softmax_options, choice_matrix, softmax_result


def _term(name: str, term: Tensor | None, shape: list[int], like: Tensor) -> Tensor | None:
    if term is not None and list(term.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, got {list(term.shape)}")
    return None if term is None else term.to(compute_dtype(like))


def linear_joint_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | float = 1.0,
    shift: Tensor | float = 0.0,
    token_bias: Tensor | None = None,
    projected: Tensor | None = None,
    factors: Tensor | None = None,
    token_ids: Tensor | None = None,
    top_k: int = 0,
    temperature: float | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    choice_ids: Tensor | None = None,
    entropy: bool = False,
    dominant: DominantRule | None = None,
    sigmoid_top_k: int = 0,
    threshold: float | None = None,
) -> tuple[SoftmaxStats, SigmoidStats]:
    r"""Softmax statistics of an LM's head and sigmoid ones of a head on top of it, in one pass. Not differentiable.

    With z the LM's logits (after scale and softcap), those of the Sigmoid Head are

    .. math:: z'_v = \text{scale} \cdot z_v + \text{token\_bias}_v + \text{shift} + \langle
              \text{projected}, \text{factors}_v \rangle

    which is a rescaling head, or a low-rank one of rank r: it costs its rank beside the LM's head, not a second head.

    Args:
        hidden: [..., D].
        weight: [V, D].
        bias: [V] or None.
        scale, shift: numbers that broadcast to [...].
        token_bias: [V] or None.
        projected, factors: [..., r] and [V, r], or both None.
        token_ids: int64 [...] or [..., K]: tokens whose logits are wanted from both.
        top_k, temperature, logit_scale, logit_softcap, choice_ids, entropy, dominant: of the softmax, as in
            :func:`linear_softmax_stats`.
        sigmoid_top_k, threshold: of the sigmoid, as in :func:`linear_sigmoid_stats`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range.
        IndexError: an id outside [0, V) other than -1 (CPU).

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(2, 3), torch.randn(4, 3)
        >>> softmax, sigmoid = linear_joint_stats(hidden, weight, entropy=True)
        >>> softmax.entropy.exp(), sigmoid.sum_prob  # all logits are 0
        (tensor([4., 4.]), tensor([2., 2.]))
    """
    matrix, rows, vocab_size = head_matrix(hidden, weight, bias), hidden.shape[:-1], weight.shape[0]
    check_softmax_options(top_k, temperature)
    check_top_k(sigmoid_top_k)
    if (projected is None) != (factors is None):
        raise ValueError("projected, factors: expected both or none of them")
    rank = 0 if factors is None else factors.shape[-1]
    projected = _term("projected", projected, [*rows, rank], matrix)
    ids, choices = optional_ids(token_ids, rows), choice_matrix(choice_ids, rows)
    columns = operator("linear_joint_stats", weight)(
        matrix,
        weight,
        bias,
        logit_scale,
        logit_softcap,
        ids,
        choices,
        top_k,
        temperature,
        entropy,
        rule_spec(dominant),
        per_row(scale, rows, matrix, "scale"),
        per_row(shift, rows, matrix, "shift"),
        _term("token_bias", token_bias, [vocab_size], matrix),
        None if projected is None else projected.reshape(-1, rank),
        _term("factors", factors, [vocab_size, rank], matrix),
        sigmoid_top_k,
        threshold,
    )
    softmax = softmax_result(columns[:12], rows, token_ids, top_k, temperature, entropy, choice_ids, dominant)
    return softmax, sigmoid_result(columns[12:], rows, token_ids, sigmoid_top_k, threshold)
