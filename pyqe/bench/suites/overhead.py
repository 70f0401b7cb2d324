"""What a call costs the host: the time to hand out work on inputs so small that the work itself is nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyqe import functional as F
from pyqe.bench.case import Case, Outcome, Rival, Settings, Shape

_N, _V, _D = 4, 128, 64
_WARM_UPS = 3  # before a graph is captured: kernels are compiled and workspaces made


def cases(settings: Settings) -> list[Callable[[], Case]]:
    builders: list[Callable[[], Case]] = [partial(call, name, settings.device) for name in CALLS]
    if settings.on_gpu:
        builders += [partial(replay, name) for name in CALLS]
    return builders


def _softmax(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
    return {"max_logit": F.linear_softmax_stats(hidden, weight, token_ids=ids).max_logit}


def _sigmoid(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
    return {"sum_prob": F.linear_sigmoid_stats(hidden, weight, token_ids=ids).sum_prob}


def _rows(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
    return {"max_logit": F.softmax_stats(hidden, entropy=True).max_logit}  # hidden states make as good logits as any


def _tokens(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
    return {"token_logit": F.linear_token_logits(hidden, weight, ids)}


def _loss(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
    return {"loss": F.linear_vocab_bce(hidden, weight, ids, reduction="sum")}


CALLS: dict[str, Callable[..., Outcome]] = {
    "softmax stats": _softmax,
    "sigmoid stats": _sigmoid,
    "row stats": _rows,
    "token logits": _tokens,
    "vocabulary BCE": _loss,
}


def _linear(hidden: Tensor, weight: Tensor, ids: Tensor) -> Outcome:
    return {"logits": torch.nn.functional.linear(hidden, weight)}


def _shape(device: str) -> Shape:
    return Shape(f"{_V}x{_D}", _N, "bf16", device)


def call(name: str, device: str) -> Case:
    shape = _shape(device)
    weight = shape.weight()
    return Case(
        "overhead",
        name,
        shape.facts(),
        lambda: (shape.hidden(), weight, shape.ids()),
        [Rival("pyqe", CALLS[name]), Rival("torch linear", _linear, "one call of torch, to compare with")],
        description="host time of a call",
        host=True,
    )


def replay(name: str) -> Case:
    """The same out of a captured graph, where nothing of a call is left but its kernels."""
    shape = _shape("cuda")
    weight = shape.weight()
    inputs = shape.hidden(), weight, shape.ids()

    def captured(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        graph: list[torch.cuda.CUDAGraph] = []  # captured by the first call, so that a failure is the rival's own

        def run(*_: Tensor) -> Outcome:
            if not graph:
                graph.append(capture(lambda: function(*inputs)))
            graph[0].replay()
            return {}

        return run

    return Case(
        "overhead",
        f"{name}, graph",
        shape.facts(),
        tuple,
        [
            Rival("pyqe", captured(CALLS[name])),
            Rival("torch linear", captured(_linear), "a graph of one call of torch"),
        ],
        description="host time to replay a captured call",
        host=True,
        by_backend=False,
    )


def capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what the function does on the current device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph
