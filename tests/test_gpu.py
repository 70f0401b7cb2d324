"""What only a GPU can show: streams, graphs, hidden waits, several devices; and each operator once, for a sanitizer.

What needs no GPU runs on the CPU backend where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from devices import TensorsOn, device_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import pyqe
from pyqe import functional as F
from pyqe.backends import available_backends, select
from pyqe.bench.suites.sampling import zipf_counts

BACKENDS = [name for name in ("cpu", "cuda", "triton") if available_backends()[name].unavailable is None]
ON_GPU = [name for name in BACKENDS if device_of(name) == "cuda"] or [
    pytest.param("none", marks=pytest.mark.skip(reason="no backend has a GPU"))
]
DTYPES = [torch.float32, torch.bfloat16]
N, D, V = 37, 50, 1009  # divide nothing; rows begin at odd addresses
# it returns as many rows as there are different tokens, so it has to wait for the device to count them
DATA_DEPENDENT_SHAPE = {"token_logits_grad_rows"}
DRAWN = {"sample_negatives", "linear_sample_negatives"}
# the reference draws, from logits of the kernels: it looks which rows need another round, and at the seed
WAITS = {("triton", "linear_sample_negatives")}

Results = tuple[Tensor, ...]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with pyqe.use_backend(request.param):
        yield request.param


@pytest.fixture(params=ON_GPU)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with pyqe.use_backend(request.param):
        yield request.param


def samples(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator, and of some a second time with memory laid out in another way."""
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def ids(*shape: int, least: int = 0) -> Tensor:
        return torch.randint(least, V, shape, generator=generator).to(device)

    hidden, weight, bias = rand(N, D, dtype=dtype), rand(V, D, dtype=dtype), rand(V, dtype=dtype)
    logits, targets, tokens = 4 * rand(N, V, dtype=dtype), ids(N), ids(N, 3, least=-1)
    grad, row, labels = rand(N, 3), rand(N), ids(N)
    seed, beta = torch.tensor(7), torch.tensor(0.5, dtype=torch.float64, device=device)
    everything = (tokens, ids(1, 2), 5, 2.0, True, "jump:last")
    nothing = (None, None, 0, None, False, "")
    drawing = (targets, seed, ["unigram", "softmax"], [3, 2], [1.0, 1.0], "independent", 2.0, "jump:first")
    counts = rand(V).abs()
    head = (hidden, weight, bias)
    engine = 4 * rand(N, V + 7, dtype=dtype)[:, 3 : V + 3]  # rows further apart than V, that begin anywhere
    joint = (row, row, counts, rand(N, 2), rand(V, 2), 2, 0.5)
    return {
        "linear_token_logits": (hidden, weight, tokens, bias),
        "token_logits_grad_hidden": (grad, weight, tokens),
        "token_logits_grad_rows": (grad, hidden, tokens),
        "token_logits_grad_weight": (grad, hidden, tokens, V),
        "softmax_stats": (logits, *everything),
        "softmax_stats, plain": (logits, *nothing),
        "softmax_stats, an engine's rows": (engine, *everything),
        "linear_softmax_stats": (*head, 0.5, 30.0, *everything),
        "linear_softmax_stats, plain": (*head, 1.0, None, *nothing),
        "linear_softmax_stats, one row": (hidden[:1], weight, None, 1.0, None, tokens[:1], None, 0, None, True, ""),
        "sigmoid_stats": (logits, tokens, 5, 0.5),
        "sigmoid_stats, an engine's rows": (engine, None, 0, 0.5),
        "linear_sigmoid_stats": (*head, row, row, tokens, 5, 0.5),
        "linear_sigmoid_stats, plain": (*head, None, None, None, 0, None),
        "linear_joint_stats": (*head, 1.0, None, *everything, *joint),
        "linear_joint_stats, plain": (*head, 1.0, 30.0, *nothing, row, row, None, None, None, 0, None),
        "sample_negatives": (logits, *drawing, counts),
        "linear_sample_negatives": (*head, 1.0, None, *drawing, counts),
        "linear_vocab_bce": (*head, row, row, targets, tokens, row.abs(), 2.0, True, True),
        "linear_vocab_bce, frozen": (hidden, weight, None, None, None, targets, None, row.abs(), 1.0, False, True),
        "inverse_softmax": (logits.softmax(1), 1e-9, "mean"),
        "temperature_nll": (logits, labels, beta),
        "linear_temperature_nll": (*head, 1.0, None, labels, torch.tensor(0.5, dtype=torch.float64)),
    }


NAMES = list(samples("cpu"))


def operator(name: str, args: tuple[Any, ...]) -> Callable[[], Results]:
    """A call of the operator; skips where the backend has no such operation."""
    base = name.split(",")[0]
    try:
        select(base, *args)
    except RuntimeError as error:
        if "it has no" not in str(error):
            raise
        pytest.skip(str(error))

    def call() -> Results:
        result = getattr(torch.ops.pyqe, base)(*args)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    return call


def equal(first: Results, second: Results) -> bool:
    """Whether all bits agree, those of NaN too."""
    return all(torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0)) for a, b in zip(first, second, strict=True))


def close(got: Results, expected: Results, tolerance: float, *, ids: bool = True) -> None:
    """Differences below the tolerance, relative to the largest value of each result."""
    for actual, wanted in zip(got, expected, strict=True):
        if actual.is_floating_point():
            largest = wanted.nan_to_num(0.0).abs().max().item() if wanted.numel() else 0.0
            torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
        else:
            assert torch.equal(actual, wanted) or not ids


def test_only_the_tensors_of_the_file_are_made_on_the_device() -> None:
    with TensorsOn("meta", __file__):
        assert torch.ones(2).is_meta
        assert not torch.ones(2, device="cpu").is_meta
        assert not zipf_counts(3).is_meta  # made by another file


def test_samples_cover_every_operator() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyqe::")}
    assert {name.split(",")[0] for name in NAMES} == registered


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_operator_computes_what_the_reference_does(backend: str, name: str, dtype: torch.dtype) -> None:
    args = samples(device_of(backend), dtype)[name]
    got = operator(name, args)()
    if name in DRAWN:
        assert ((got[0] >= 0) & (got[0] < V)).all()
        return
    with pyqe.use_backend("reference"):
        expected = operator(name, args)()
    rounded = any(result.dtype == torch.bfloat16 for result in got)
    tied = dtype == torch.bfloat16 and name.startswith(("softmax", "sigmoid"))  # logits, which any order may sort
    close(got, expected, 1e-2 if rounded else 2e-5, ids=not tied)


@pytest.mark.parametrize("name", NAMES)
def test_every_result_is_written(backend: str, name: str) -> None:
    """With new memory full of NaN and of huge numbers, as torch fills it when it is to be deterministic."""
    call = operator(name, samples(device_of(backend))[name])
    expected = call()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        got = call()
    finally:
        torch.use_deterministic_algorithms(False)
    close(got, expected, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_twice(backend: str, name: str) -> None:
    call = operator(name, samples(device_of(backend))[name])
    assert equal(call(), call())


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("name", sorted(set(NAMES) - DATA_DEPENDENT_SHAPE))
def test_compiles_in_one_graph(backend: str, name: str) -> None:
    args = samples(device_of(backend))[name]
    call = operator(name, args)
    target = getattr(torch.ops.pyqe, name.split(",")[0])
    torch._dynamo.reset()
    got = torch.compile(lambda *values: target(*values), fullgraph=True, backend="aot_eager")(*args)
    assert equal((got,) if isinstance(got, Tensor) else tuple(got), call())


def test_a_head_compiles_with_the_default_compiler(gpu_backend: str) -> None:
    args = samples("cuda")
    hidden, weight, _ = args["linear_token_logits"][:3]
    targets = args["temperature_nll"][1]
    operator("linear_softmax_stats, plain", args["linear_softmax_stats, plain"])

    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stats = F.linear_softmax_stats(hidden, weight, token_ids=targets, entropy=True)
        assert stats.entropy is not None
        assert stats.token_logprob is not None
        return stats.entropy * 2, stats.token_logprob.exp()

    close(torch.compile(step, fullgraph=True)(hidden, weight), step(hidden, weight), 1e-5)


def test_tensors_on_different_devices_are_refused() -> None:
    other = "cuda" if torch.cuda.is_available() else "meta"
    hidden, weight = torch.randn(3, 4, device=other), torch.randn(7, 4)
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="device"):
        F.linear_softmax_stats(hidden, weight)
    if other == "meta":
        return  # what follows is seen by the operators, which do not run on tensors without data
    with pytest.raises(ValueError, match="device"):
        F.linear_softmax_stats(hidden, weight.to(other), token_ids=ids)
    with pytest.raises(ValueError, match="device"):
        F.linear_token_logits(hidden, weight.to(other), ids)
    with pytest.raises(ValueError, match="device"):
        F.linear_vocab_bce(hidden, weight.to(other), ids)
    with pytest.raises(ValueError, match="device"):
        F.temperature_nll(hidden, ids)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_numbers_on_the_cpu_are_no_obstacle(name: str) -> None:
    """A seed or an inverse temperature may stay there; tensors of "meta" stand for those of a GPU."""
    backend = replace(available_backends()[name], devices=frozenset({"meta"}), find_obstacle=lambda: None)
    calls = samples("meta")
    places = {arg.device.type for args in calls.values() for arg in args if isinstance(arg, Tensor)}
    assert places == {"meta", "cpu"}
    obstacles = {backend.obstacle(call.split(",")[0], args) for call, args in calls.items()}
    assert {obstacle for obstacle in obstacles if obstacle is not None and "it has no" not in obstacle} == set()
    logits = calls["softmax_stats"][0]
    assert backend.obstacle("softmax_stats", (logits, torch.zeros(N, 1))) == "it serves meta tensors, got cpu"


def test_counts_go_to_a_device_once() -> None:
    sampler = pyqe.NegativeSampler(unigram_counts=torch.ones(5))
    assert sampler.counts_on(torch.device("cpu")) is sampler.unigram_counts
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(sampler.counts_on(torch.device("meta")), FakeTensor)  # not kept
    placed = sampler.counts_on(torch.device("meta"))
    assert not isinstance(placed, FakeTensor)
    assert sampler.counts_on(torch.device("meta")) is placed


# --- on a GPU alone


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def may_wait(backend: str, name: str) -> None:
    if (backend, name) in WAITS:
        pytest.skip("it waits for the device")


@pytest.mark.parametrize("name", sorted(set(NAMES) - DATA_DEPENDENT_SHAPE))
def test_the_host_does_not_wait(gpu_backend: str, name: str) -> None:
    may_wait(gpu_backend, name)
    call = operator(name, samples("cuda")[name])
    call()  # kernels are compiled and loaded
    with no_waiting():
        call()


@pytest.mark.parametrize("name", sorted(set(NAMES) - DATA_DEPENDENT_SHAPE))
def test_graph_replays_on_new_numbers(gpu_backend: str, name: str) -> None:
    may_wait(gpu_backend, name)
    args = samples("cuda")[name]
    call = operator(name, args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    args[0].mul_(0.5)
    for result in results:
        result.zero_()
    graph.replay()
    assert equal(results, call())


def test_plain_numbers_and_counts_of_the_cpu_do_not_wait(gpu_backend: str) -> None:
    args = samples("cuda")
    (hidden, weight, _), logits, labels = args["linear_softmax_stats"][:3], *args["temperature_nll"][:2]
    sampler = pyqe.NegativeSampler(unigram_counts=torch.rand(V))

    def call() -> None:
        F.linear_sigmoid_stats(hidden, weight, scale=2.0, shift=-1.0)
        F.temperature_nll(logits, labels, 0.5)
        F.linear_sampled_bce(hidden, weight, labels, labels[:, None], pos_weight=3.0, scale=2.0)
        if gpu_backend != "triton":  # it draws with the reference
            F.sample_negatives(logits, labels, sampler)

    call()
    with no_waiting():
        call()


def test_replays_of_a_graph_draw_other_negatives(gpu_backend: str) -> None:
    logits, targets = samples("cuda")["sample_negatives"][:2]
    operator("sample_negatives", samples("cuda")["sample_negatives"])
    sampler = pyqe.NegativeSampler(("uniform", "softmax"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        F.sample_negatives(logits, targets, sampler)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = F.sample_negatives(logits, targets, sampler)
    graph.replay()
    first = ids.clone()
    graph.replay()
    assert not torch.equal(ids, first)


@pytest.mark.parametrize("name", sorted(set(NAMES) - DATA_DEPENDENT_SHAPE))
def test_runs_on_the_current_stream(gpu_backend: str, name: str) -> None:
    """The input arrives late on a stream of its own: work on any other stream would read what was there before."""
    args = samples("cuda")[name]
    call = operator(name, args)
    expected = tuple(result.clone() for result in call())
    right, wrong = args[0].clone(), args[0] * 0.25
    args[0].copy_(wrong)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
        args[0].copy_(right)
        got = call()
    stream.synchronize()
    assert equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_device_of_its_tensors(gpu_backend: str, name: str) -> None:
    expected = operator(name, samples("cuda:0")[name])()
    assert torch.cuda.current_device() == 0
    got = operator(name, samples("cuda:1")[name])()
    assert all(result.device == torch.device("cuda:1") for result in got)
    assert equal(tuple(result.to("cuda:0") for result in got), expected)
    assert torch.cuda.current_device() == 0


def test_beyond_two_to_the_31_logits(gpu_backend: str) -> None:
    rows, vocab_size = 17_000, 128_256
    logits = torch.empty(rows, vocab_size, dtype=torch.bfloat16, device="cuda").normal_(std=4.0)
    assert logits.numel() > 2**31
    ids = torch.randint(vocab_size, (rows,), device="cuda")
    operator("softmax_stats, plain", (logits, None, None, 0, None, False, ""))
    whole = F.softmax_stats(logits, token_ids=ids, entropy=True)
    last = F.softmax_stats(logits[-3:].clone(), token_ids=ids[-3:], entropy=True)
    for name in ("logsumexp", "argmax", "entropy", "token_logprob"):
        assert torch.equal(getattr(whole, name)[-3:], getattr(last, name)), name


def test_a_product_beyond_two_to_the_31_logits(gpu_backend: str) -> None:
    rows, vocab_size = 17_000, 128_256
    hidden = torch.randn(rows, 64, device="cuda").bfloat16()
    weight = torch.randn(vocab_size, 64, device="cuda").bfloat16()
    operator("linear_softmax_stats", (hidden, weight, None, 1.0, None, None, None, 0, None, False, ""))
    whole = F.linear_softmax_stats(hidden, weight, entropy=True)
    last = F.linear_softmax_stats(hidden[-3:], weight, entropy=True)
    torch.testing.assert_close(whole.logsumexp[-3:], last.logsumexp)
    torch.testing.assert_close(whole.entropy[-3:], last.entropy, rtol=1e-4, atol=1e-4)
