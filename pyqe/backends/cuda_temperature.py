"""The NLL at a temperature with its derivatives, on the CUDA backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyqe.backends import reference
from pyqe.backends.cuda_library import CODES, library, stream
from pyqe.backends.cuda_statistics import head_blocks
from pyqe.backends.operands import check_shape, on_its_device, rows_of


def number_on(device: torch.device, beta: Tensor) -> Tensor:
    """beta as float64 where the kernels read it. Nothing waits for a number of the CPU."""
    if beta.device == device:
        return beta.double()
    return torch.full((), float(beta), dtype=torch.float64, device=device)


def write_terms(logits: Any, vocab_size: int, labels: Tensor, beta: Tensor, terms: Tensor) -> None:
    """Write the terms [3, n], float64, of n rows.

    Args:
        logits: the rows, as ``library.logits`` describes them.
        labels: ids [n], or float32 probabilities [n, vocab_size] in contiguous rows.
        beta: of :func:`number_on`.
        terms: NLL, first and second derivative of each row; may be columns of a wider matrix.
    """
    hard = labels.dim() == 1
    scratch = library.temperature_scratch(vocab_size) * terms.shape[1]
    partials = torch.empty(scratch, dtype=torch.uint8, device=terms.device)
    library.temperature_rows(
        logits,
        labels=labels.data_ptr() if hard else 0,
        soft_labels=0 if hard else labels.data_ptr(),
        soft_labels_stride=0 if hard else labels.stride(0),
        beta=beta.data_ptr(),
        partials=partials.data_ptr(),
        terms=terms.data_ptr(),
        terms_stride=terms.stride(0),
        stream=stream(terms),
    )


def mean_terms(terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of terms [3, N] over the rows: NLL, first and second derivative; NaN for no rows."""
    nll, first, second = (terms.new_empty(()) for _ in range(3))
    library.temperature_means(
        terms=terms.data_ptr(),
        stride=terms.stride(0),
        count=terms.shape[1],
        nll=nll.data_ptr(),
        first=first.data_ptr(),
        second=second.data_ptr(),
        stream=stream(terms),
    )
    return nll, first, second


@on_its_device
def temperature_nll(logits: Tensor, labels: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_shape("labels", labels, *logits.shape[: labels.dim()])
    n, classes = logits.shape
    if labels.dim() == 1:
        reference.check_ids("labels", labels, classes)
        labels = labels.contiguous()
    else:
        labels = rows_of(labels.float())
    logits = rows_of(logits)
    terms = torch.empty(3, n, dtype=torch.float64, device=logits.device)
    rows = library.logits(logits.data_ptr(), logits.stride(0), n, classes, CODES[logits.dtype])
    write_terms(rows, classes, labels, number_on(logits.device, beta), terms)
    return mean_terms(terms)


@on_its_device
def linear_temperature_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    labels: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    check_shape("labels", labels, len(hidden))
    reference.check_ids("labels", labels, len(weight))
    labels, number = labels.contiguous(), number_on(hidden.device, beta)
    terms = torch.empty(3, len(hidden), dtype=torch.float64, device=hidden.device)
    for rows, source, _ in head_blocks(hidden, weight, bias, logit_scale, logit_softcap):
        write_terms(source.handle(), len(weight), labels[rows], number, terms[:, rows])
    return mean_terms(terms)
