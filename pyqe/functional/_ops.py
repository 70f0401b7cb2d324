"""The operations as torch operators ``torch.ops.pyqe.*``: schema, backend, fake and autograd rules.

Operators take matrices (N rows); :mod:`pyqe.functional` gives them their public face. An operator chooses its backend
when it runs, so ``use_backend`` holds inside compiled code as well. Results that were not asked for are empty. They are
defined through ``torch.library.Library``, whose call costs a third of ``torch.library.custom_op``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyqe.backends.reference import compute_dtype
from pyqe.backends.registry import select
from pyqe.dominant import DominantRule

_library = torch.library.Library("pyqe", "DEF")
_defined: list[str] = []

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_LM_HEAD = f"{_HEAD}, float logit_scale, float? logit_softcap"
_SOFTMAX_OPTIONS = "Tensor? token_ids, Tensor? choice_ids, int top_k, float? temperature, bool entropy, str dominant"
_SAMPLER = (
    "Tensor targets, Tensor seed, str[] sources, int[] shares, float[] mixture_weights, str combination, "
    "float temperature, str exclude, Tensor? unigram_counts"
)
_AFFINE = "Tensor? scale, Tensor? shift"


def _returns(count: int) -> str:
    return "(" + ", ".join(["Tensor"] * count) + ")"


def _define(name: str, arguments: str, returns: str, fake: Callable[..., Any]) -> None:
    """Register an operator that runs on the backend which the registry selects for its tensors."""

    def run(*args: Any) -> Any:
        implementation = select(name, *args)
        device = _common_device(args)
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled(device)):
            return implementation(*args)
        with torch.no_grad(), torch.autocast(device, enabled=False):  # float32 means float32, and no hidden graph
            return implementation(*args)

    _library.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyqe::{name}", fake, lib=_library)
    _defined.append(name)
    torch.library.register_vmap(f"pyqe::{name}", partial(_one_by_one, name), lib=_library)


def _common_device(args: tuple[Any, ...]) -> str:
    """Type of the device that all tensors are on; numbers, such as a seed, may stay on the CPU."""
    devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.dim() > 0}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")
    return devices.pop().type if devices else "cpu"


def _one_by_one(name: str, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Batching rule: the operator on every example, stacked. Rows fold into [..., D] without ``vmap`` anyway."""
    operator = getattr(torch.ops.pyqe, name)
    dims = [*in_dims, *[None] * (len(args) - len(in_dims))]
    results = []
    for i in range(info.batch_size):
        example = (
            arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
            for arg, dim in zip(args, dims, strict=True)
        )
        results.append(operator(*example))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _empty(like: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype or compute_dtype(like))


# --- fake rules: shapes and dtypes of the results -------------------------------------------------------------------


def _fake_token_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> Tensor:
    return _empty(hidden, *token_ids.shape)


def _fake_grad_rows(grad: Tensor, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    return token_ids.new_empty(rows), hidden.new_empty(rows, hidden.shape[1])


def _fake_softmax(
    logits: Tensor,
    token_ids: Tensor | None,
    choice_ids: Tensor | None,
    top_k: int,
    temperature: float | None,
    entropy: bool,
    dominant: str,
    *,
    vocab_size: Any = None,
) -> tuple[Tensor, ...]:
    n, vocab_size = logits.shape[0], logits.shape[1] if vocab_size is None else vocab_size
    none, no_ids = _empty(logits, n, 0), _empty(logits, n, 0, dtype=torch.int64)
    row, row_id = _empty(logits, n), _empty(logits, n, dtype=torch.int64)
    k = min(top_k, vocab_size)
    members = DominantRule.parse(dominant).max_size(vocab_size) if dominant else 0
    return (
        row,
        torch.empty_like(row),
        row_id,
        torch.empty_like(row) if entropy else none,
        torch.empty_like(none) if token_ids is None else _empty(logits, *token_ids.shape),
        torch.empty_like(none) if temperature is None else torch.empty_like(row),
        _empty(logits, n, k),
        _empty(logits, n, k, dtype=torch.int64),
        torch.empty_like(none) if choice_ids is None else _empty(logits, n, choice_ids.shape[-1]),
        _empty(logits, n, members, dtype=torch.int64),
        torch.empty_like(row_id) if dominant else no_ids,
        torch.empty_like(row) if dominant else torch.empty_like(none),
    )


def _fake_linear_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, *options: Any
) -> tuple[Tensor, ...]:
    return _fake_softmax(hidden, *options, vocab_size=weight.shape[0])


def _fake_sigmoid(
    logits: Tensor, token_ids: Tensor | None, top_k: int, threshold: float | None, *, vocab_size: Any = None
) -> tuple[Tensor, ...]:
    n, k = logits.shape[0], min(top_k, logits.shape[1] if vocab_size is None else vocab_size)
    return (
        _empty(logits, n),
        _empty(logits, n, dtype=torch.int64),
        _empty(logits, n),
        _empty(logits, *((n, 0) if threshold is None else (n,)), dtype=torch.int64),
        _empty(logits, *((n, 0) if token_ids is None else token_ids.shape)),
        _empty(logits, n, k),
        _empty(logits, n, k, dtype=torch.int64),
    )


def _fake_linear_sigmoid(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    return _fake_sigmoid(hidden, *options, vocab_size=weight.shape[0])


def _fake_joint(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    token_ids: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    softmax, sigmoid = options[:5], options[-2:]
    vocab_size = weight.shape[0]
    return (
        *_fake_softmax(hidden, token_ids, *softmax, vocab_size=vocab_size),
        *_fake_sigmoid(hidden, token_ids, *sigmoid, vocab_size=vocab_size),
    )


def _fake_negatives(
    logits: Tensor, targets: Tensor, seed: Tensor, sources: list[str], shares: list[int], *_: Any
) -> Tensor:
    return targets.new_empty(targets.shape[0], sum(shares))


def _fake_linear_negatives(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, *options: Any
) -> Tensor:
    return _fake_negatives(hidden, *options)


def _fake_vocab_bce(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    targets: Tensor,
    exclude_ids: Tensor | None,
    row_weights: Tensor,
    pos_weight: float,
    grad_hidden: bool,
    grad_weight: bool,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None) -> Tensor:
        return hidden.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    grads = (hidden if grad_hidden else None, weight if grad_weight else None, bias, scale, shift)
    return _empty(hidden), _empty(hidden, hidden.shape[0]), *map(like, grads)


def _fake_temperature_nll(logits: Tensor, labels: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nll, first, second = (_empty(logits, dtype=torch.float64) for _ in range(3))
    return nll, first, second


def _fake_linear_temperature_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    labels: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_temperature_nll(hidden, labels, beta)


_define(
    "linear_token_logits",
    "Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias",
    "Tensor",
    _fake_token_logits,
)
_define(
    "token_logits_grad_hidden",
    "Tensor grad, Tensor weight, Tensor token_ids",
    "Tensor",
    lambda grad, weight, token_ids: weight.new_empty(token_ids.shape[0], weight.shape[1]),
)
_define("token_logits_grad_rows", "Tensor grad, Tensor hidden, Tensor token_ids", _returns(2), _fake_grad_rows)
_define(
    "token_logits_grad_weight",
    "Tensor grad, Tensor hidden, Tensor token_ids, SymInt vocab_size",
    "Tensor",
    lambda grad, hidden, token_ids, vocab_size: hidden.new_empty(vocab_size, hidden.shape[1]),
)
_define("softmax_stats", f"Tensor logits, {_SOFTMAX_OPTIONS}", _returns(12), _fake_softmax)
_define("linear_softmax_stats", f"{_LM_HEAD}, {_SOFTMAX_OPTIONS}", _returns(12), _fake_linear_softmax)
_define(
    "sigmoid_stats",
    "Tensor logits, Tensor? token_ids, int top_k, float? threshold",
    _returns(7),
    _fake_sigmoid,
)
_define(
    "linear_sigmoid_stats",
    f"{_HEAD}, {_AFFINE}, Tensor? token_ids, int top_k, float? threshold",
    _returns(7),
    _fake_linear_sigmoid,
)
_define(
    "linear_joint_stats",
    f"{_LM_HEAD}, {_SOFTMAX_OPTIONS}, Tensor scale, Tensor shift, Tensor? token_bias, Tensor? projected, "
    "Tensor? factors, int sigmoid_top_k, float? threshold",
    _returns(19),
    _fake_joint,
)
_define("sample_negatives", f"Tensor logits, {_SAMPLER}", "Tensor", _fake_negatives)
_define("linear_sample_negatives", f"{_LM_HEAD}, {_SAMPLER}", "Tensor", _fake_linear_negatives)
_define(
    "linear_vocab_bce",
    f"{_HEAD}, {_AFFINE}, Tensor targets, Tensor? exclude_ids, Tensor row_weights, float pos_weight, "
    "bool grad_hidden, bool grad_weight",
    _returns(7),
    _fake_vocab_bce,
)
_define(
    "inverse_softmax",
    "Tensor probs, float eps, str center",
    "Tensor",
    lambda probs, eps, center: probs.new_empty(probs.shape, dtype=compute_dtype(probs)),
)
_define("temperature_nll", "Tensor logits, Tensor labels, Tensor beta", _returns(3), _fake_temperature_nll)
_define("linear_temperature_nll", f"{_LM_HEAD}, Tensor labels, Tensor beta", _returns(3), _fake_linear_temperature_nll)


# --- autograd rules -------------------------------------------------------------------------------------------------


def _token_logits_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, token_ids, bias = inputs
    ctx.save_for_backward(hidden, weight, token_ids)
    ctx.bias_dtype = None if bias is None else bias.dtype


def grad_bias(grad: Tensor, token_ids: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Gradient [V] of a bias that was gathered at the ids [N, K]; ids that are no tokens have none."""
    grad = grad.masked_fill((token_ids < 0) | (token_ids >= vocab_size), 0.0).reshape(-1)
    ids = token_ids.reshape(-1).clamp(0, vocab_size - 1)
    return grad.new_zeros(vocab_size).index_add_(0, ids, grad).to(dtype)


def _token_logits_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, token_ids = ctx.saved_tensors
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad
    ops = torch.ops.pyqe
    return (
        ops.token_logits_grad_hidden(grad, weight, token_ids) if needs_hidden else None,
        ops.token_logits_grad_weight(grad, hidden, token_ids, weight.shape[0]) if needs_weight else None,
        None,
        grad_bias(grad, token_ids, weight.shape[0], ctx.bias_dtype) if needs_bias else None,
    )


def _vocab_bce_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], *output[2:])
    ctx.pos_weight = inputs[8]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _is_one(factor: Tensor) -> bool:
    """Whether a factor is known to be 1, as it is in ``loss.backward()``: the product would be a second [V, D] buffer.

    On a GPU looking would wait for the device; what is traced or transformed has no value to look at.
    """
    traced = torch.compiler.is_compiling() or type(factor) is not Tensor or torch._C._are_functorch_transforms_active()
    return not traced and factor.device.type == "cpu" and factor.item() == 1


def _vocab_bce_backward(
    ctx: Any, grad_total: Tensor | None, grad_losses: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of the total are there already; those of single losses take a second pass, weighted by row."""
    inputs, grads = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
    needed = ctx.needs_input_grad[:5]
    if grad_losses is not None:
        weights = grad_losses if grad_total is None else grad_losses + grad_total * inputs[7]
        detached = (tensor if tensor is None else tensor.detach() for tensor in inputs[:7])
        grads = torch.ops.pyqe.linear_vocab_bce(*detached, weights, ctx.pos_weight, needed[0], needed[1])[2:]
    elif grad_total is not None and not _is_one(grad_total):
        grads = tuple(grad * grad_total.to(grad.dtype) for grad in grads)
    elif grad_total is not None:
        grads = tuple(grads)
    else:
        needed = [False] * 5
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *[None] * 6)


def _inverse_softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    probs, ctx.eps, ctx.center = inputs
    ctx.save_for_backward(probs, output)


def _inverse_softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    probs, logits = ctx.saved_tensors
    if ctx.center == "mean":
        grad = grad - grad.mean(1, keepdim=True)
    elif ctx.center == "logsumexp":
        grad = grad - torch.exp(logits) * grad.sum(1, keepdim=True)
    return torch.where(probs > ctx.eps, grad / probs, 0.0).to(probs.dtype), None, None


def _no_gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*([output] if isinstance(output, Tensor) else output))


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError("this operator has no gradient")


_DIFFERENTIABLE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear_token_logits": (_token_logits_backward, _token_logits_setup),
    "linear_vocab_bce": (_vocab_bce_backward, _vocab_bce_setup),
    "inverse_softmax": (_inverse_softmax_backward, _inverse_softmax_setup),
}
for _name in _defined:  # results of the others do not require a gradient, whatever their inputs do
    _backward, _setup = _DIFFERENTIABLE.get(_name, (_no_gradient, _no_gradient_setup))
    torch.library.register_autograd(f"pyqe::{_name}", _backward, setup_context=_setup, lib=_library)
