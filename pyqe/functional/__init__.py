"""The operations: statistics, losses and samples of a language model's head, without its logits.

``linear_`` operations take the hidden states [..., D] that feed an unembedding ``weight`` [V, D] and never keep the
[N, V] logits; their namesakes without it take logits [..., V] that exist already. Numbers are float32 (float64 where an
input is), ids int64 with -1 as padding. Every operation is a torch operator (``torch.ops.pyqe``), works under
``torch.compile(fullgraph=True)`` and runs on the backend that :func:`pyqe.use_backend` chooses. An id out of range
raises ``IndexError`` on the CPU. On a GPU, where looking would wait for the device, it gives NaN for its row, in the
gradient of the hidden states too, and adds nothing to the gradients of weight and bias. A ``weight`` may be a DTensor
whose rows are sharded over processes (docs/distributed.md).
"""

from __future__ import annotations

from pyqe.functional import _ops  # noqa: F401  (registers the operators)
from pyqe.functional.joint import linear_joint_stats
from pyqe.functional.losses import linear_sampled_bce, linear_vocab_bce, sampled_bce
from pyqe.functional.results import DominantTokens, SigmoidStats, SoftmaxStats, TemperatureFit, TemperatureNLL
from pyqe.functional.sampling import linear_sample_negatives, sample_negatives
from pyqe.functional.sigmoid import linear_sigmoid_stats, order_preserving, sigmoid_stats
from pyqe.functional.softmax import (
    boosted_prob,
    dominant_tokens,
    linear_boosted_prob,
    linear_dominant_tokens,
    linear_softmax_stats,
    softmax_stats,
)
from pyqe.functional.temperature import (
    inverse_softmax,
    linear_temperature_nll,
    temperature_nll,
    temperature_scale,
)
from pyqe.functional.temperature_fit import fit_temperature, linear_fit_temperature
from pyqe.functional.token_logits import linear_token_logits

__all__ = [
    "DominantTokens",
    "SigmoidStats",
    "SoftmaxStats",
    "TemperatureFit",
    "TemperatureNLL",
    "boosted_prob",
    "dominant_tokens",
    "fit_temperature",
    "inverse_softmax",
    "linear_boosted_prob",
    "linear_dominant_tokens",
    "linear_fit_temperature",
    "linear_joint_stats",
    "linear_sample_negatives",
    "linear_sampled_bce",
    "linear_sigmoid_stats",
    "linear_softmax_stats",
    "linear_temperature_nll",
    "linear_token_logits",
    "linear_vocab_bce",
    "order_preserving",
    "sample_negatives",
    "sampled_bce",
    "sigmoid_stats",
    "softmax_stats",
    "temperature_nll",
    "temperature_scale",
]
