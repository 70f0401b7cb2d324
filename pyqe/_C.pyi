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

def temperature_nll(
    logits: int,
    labels: int,
    soft_labels: int,
    *,
    n: int,
    classes: int,
    beta: float,
    logits_stride: int,
    soft_labels_stride: int,
    dtype: int,
    threads: int,
) -> tuple[float, float, float]:
    """Mean NLL of softmax(beta logits[n]), and its first and second derivative in beta.

    labels [n] are int64, or 0 where there are soft_labels [n, classes] (fp32). A row with NaN, +inf or a label of
    -1 makes the result NaN. Rows are added up in fp64, in an order that does not depend on threads. IndexError for
    a label that is neither -1 nor below classes.
    """

class Logits:
    """Where the logits of n rows come from: they exist, or a head computes them."""

def existing_logits(logits: int, *, n: int, vocab: int, stride: int, dtype: int) -> Logits:
    """Logits [n, vocab] that exist."""

def linear_logits(
    hidden: int,
    weight: int,
    bias: int,
    row_scale: int,
    row_shift: int,
    *,
    scale: float,
    softcap: float,
    n: int,
    dim: int,
    vocab: int,
    hidden_stride: int,
    weight_stride: int,
    dtype: int,
) -> Logits:
    """z[n, v] = scale (row_scale[n] hidden[n] . weight[v] + bias[v]) + row_shift[n], capped by softcap.

    A softcap of 0 is none. bias, row_scale and row_shift (the latter fp32) may be 0: none.
    """

class DominantRule:
    """A rule of :class:`pyqe.DominantRule`."""

def dominant_rule(*, kind: int, last_cut: bool, ratio: float, epsilon: float, p: float, k: int) -> DominantRule:
    """kind: 0 none, 1 jump, 2 top_k, 3 top_p, 4 min_p, 5 epsilon, 6 eta."""

class SoftmaxRequest:
    """Softmax statistics and where they go."""

class SigmoidRequest:
    """Sigmoid statistics and where they go."""

def softmax_request(
    logits: Logits,
    rule: DominantRule,
    *,
    token_ids: int,
    token_logits: int,
    n_tokens: int,
    max_logit: int,
    max_logprob: int,
    argmax: int,
    entropy: int,
    tempered: int,
    temperature: float,
    topk_logits: int,
    topk_ids: int,
    top_k: int,
    dominant_ids: int,
    size: int,
    mass: int,
    members: int,
) -> SoftmaxRequest:
    """Statistics of every row, as :class:`pyqe.functional.SoftmaxStats` has them; entropy and tempered may be 0.

    size is -1 where a rule without a bound on its members needs more logits than were kept.
    """

def sigmoid_request(
    logits: Logits,
    *,
    token_ids: int,
    token_logits: int,
    n_tokens: int,
    max_logit: int,
    argmax: int,
    sum_prob: int,
    count_above: int,
    threshold: float,
    topk_logits: int,
    topk_ids: int,
    top_k: int,
) -> SigmoidRequest:
    """Statistics of every row, as :class:`pyqe.functional.SigmoidStats` has them.

    threshold is a logit; count_above may be 0.
    """

def softmax_stats(request: SoftmaxRequest, *, threads: int) -> None: ...
def sigmoid_stats(request: SigmoidRequest, *, threads: int) -> None: ...
def joint_stats(
    softmax: SoftmaxRequest,
    sigmoid: SigmoidRequest,
    *,
    scale: int,
    shift: int,
    bias: int,
    projected: int,
    factors: int,
    rank: int,
    threads: int,
) -> None:
    """Both, the latter of z'[n, v] = scale[n] z[n, v] + bias[v] + shift[n] + projected[n] . factors[v].

    All fp32: scale and shift [n], bias [vocab] or 0, projected [n, rank], factors [vocab, rank]. Logits come from
    linear_logits.
    """

def linear_temperature_nll(logits: Logits, *, labels: int, beta: float, threads: int) -> tuple[float, float, float]:
    """As temperature_nll with labels [n], of a head's logits; labels are checked before anything."""

def copy_logits(logits: Logits, to: int, *, threads: int) -> None:
    """to [n, vocab] (fp32) = the logits themselves."""

def sample_negatives(
    logits: Logits,
    exclude: DominantRule,
    sources: list[tuple[float, float, float, int]],
    *,
    targets: int,
    members: int,
    beta: float,
    factor: int,
    counts: int,
    seed: int,
    ids: int,
    undecided: int,
    threads: int,
) -> None:
    """ids [n, K] drawn without replacement, padded with -1; K is the sum of what the sources draw.

    sources: weights of the softmax, unigram and uniform parts of a distribution, and how many to draw from it. The
    softmax part is e^(beta z) factor (fp32 [vocab], or 0), the unigram part counts (fp32 [vocab]). undecided [n] is 1
    where nothing was drawn, as the rule needs more logits than were kept.
    """

def vocab_bce(
    logits: Logits,
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
