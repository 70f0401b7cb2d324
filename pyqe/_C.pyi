"""The compiled library. Pointers are addresses (`Tensor.data_ptr()`), strides count elements, rows are contiguous.

dtype codes: 0 fp32, 1 bf16, 2 fp16, 3 fp64. Sums are in fp32 whatever the dtype. A row of a result is the
same bit for bit at any batch size and number of threads. Pointers are trusted; everything else is checked:
ValueError for a size, dtype code, option or PYQE_CPU_ISA that is not allowed.
"""

def cpu_isa() -> str:
    """The instruction-set level in use: the best one, or the one that PYQE_CPU_ISA names."""

def cpu_isas() -> list[str]:
    """The levels that this processor can run, best first."""

def cpu_features() -> list[str]:
    """The instruction-set extensions that matter here and that processor and operating system support."""

def build_info() -> dict[str, str]:
    """version, compiler, build_type, openmp (yes or no), isas (compiled, separated by spaces)."""

def max_threads() -> int:
    """The number of threads that OpenMP would use."""

def token_logits_forward(
    hidden: int,
    weight: int,
    bias: int,
    token_ids: int,
    out: int,
    *,
    n: int,
    k: int,
    dim: int,
    vocab: int,
    hidden_stride: int,
    weight_stride: int,
    dtype: int,
    threads: int,
) -> None:
    """out[n, k] (fp32) = hidden[n] . weight[token_ids[n, k]] + bias[token_ids[n, k]]; NaN where the id is -1.

    A bias of 0 is none. IndexError for an id that is neither -1 nor below vocab, before anything is written.
    """

def token_logits_backward_hidden(
    grad: int,
    weight: int,
    token_ids: int,
    grad_hidden: int,
    *,
    n: int,
    k: int,
    dim: int,
    vocab: int,
    weight_stride: int,
    dtype: int,
    threads: int,
) -> None:
    """grad_hidden[n] = sum over k of grad[n, k] (fp32) weight[token_ids[n, k]], ids of -1 left out.

    IndexError for an id that is neither -1 nor below vocab, before anything is written.
    """

def token_logits_backward_weight(
    grad: int,
    hidden: int,
    pairs: int,
    row_starts: int,
    row_ids: int,
    out: int,
    *,
    rows: int,
    k: int,
    dim: int,
    hidden_stride: int,
    out_stride: int,
    dtype: int,
    threads: int,
) -> None:
    """out[r] = sum of grad[p] (fp32) hidden[p // k] over p in pairs[row_starts[r]:row_starts[r + 1]], in order.

    With row_ids (not 0) the sum of row r goes to out[row_ids[r]]; the ids must differ.
    """

def inverse_softmax(
    probs: int,
    out: int,
    *,
    n: int,
    classes: int,
    probs_stride: int,
    eps: float,
    center: int,
    dtype: int,
    threads: int,
) -> None:
    """out[n] = log(max(probs[n], eps)) - c, with c = 0, the mean or the logsumexp for center 0, 1, 2.

    dtype is fp32 or fp64; eps is rounded to it. A row with a NaN or negative probability is NaN as a whole,
    and so is one without a finite c, as eps = 0 and a probability of 0 give with the mean.
    """

def vocab_bce(
    logits: object,
    *,
    targets: int,
    exclude_ids: int,
    n_exclude: int,
    row_weights: int,
    pos_weight: float,
    total: int,
    losses: int,
    grad_hidden: int,
    grad_weight: int,
    grad_bias: int,
    grad_scale: int,
    grad_shift: int,
    threads: int,
) -> None:
    """Binary cross-entropy of every token, label 1 for the target, without the excluded ones, and its gradients.

    logits come from linear_logits, without softcap. losses[n] sums over the vocabulary; total and the gradients are
    those of sum_n row_weights[n] losses[n], in one pass. row_weights, total, losses, grad_scale and grad_shift are
    fp32, the other gradients of the dtype of the logits and without gaps between rows; a gradient of 0 is not
    computed. targets [n] and exclude_ids [n, n_exclude] hold -1 for none; a target is not excluded.

    IndexError for an id that is neither -1 nor below vocab, before anything is written.
    """
