"""pyqe: token-level quality of language model output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqe._lazy import lazy_getattr

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pyqe import calibration, choice, functional, metrics, training
    from pyqe.attachment import attach, detach
    from pyqe.backends import use_backend
    from pyqe.dominant import DominantRule
    from pyqe.estimator import QualityEstimator, ScoredText
    from pyqe.heads import HeadMismatchError, SigmoidHead
    from pyqe.losses import SigmoidHeadLoss
    from pyqe.negatives import NegativeSampler
    from pyqe.ray_scorer import RayScorer
    from pyqe.streamer import QualityStreamer

# Loaded when first used: importing torch takes a second, and `pyqe --help` needs none of it.
_HOMES = {
    "DominantRule": "pyqe.dominant",
    "HeadMismatchError": "pyqe.heads",
    "NegativeSampler": "pyqe.negatives",
    "QualityEstimator": "pyqe.estimator",
    "QualityStreamer": "pyqe.streamer",
    "RayScorer": "pyqe.ray_scorer",
    "ScoredText": "pyqe.estimator",
    "SigmoidHead": "pyqe.heads",
    "SigmoidHeadLoss": "pyqe.losses",
    "attach": "pyqe.attachment",
    "calibration": "pyqe.calibration",
    "choice": "pyqe.choice",
    "detach": "pyqe.attachment",
    "functional": "pyqe.functional",
    "metrics": "pyqe.metrics",
    "training": "pyqe.training",
    "use_backend": "pyqe.backends",
}

__all__ = [
    "DominantRule",
    "HeadMismatchError",
    "NegativeSampler",
    "QualityEstimator",
    "QualityStreamer",
    "RayScorer",
    "ScoredText",
    "SigmoidHead",
    "SigmoidHeadLoss",
    "__version__",
    "attach",
    "calibration",
    "choice",
    "detach",
    "functional",
    "metrics",
    "training",
    "use_backend",
]


__getattr__ = lazy_getattr(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
