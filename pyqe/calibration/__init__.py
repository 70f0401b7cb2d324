"""Probabilities made to mean what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqe._lazy import lazy_getattr

if TYPE_CHECKING:
    from pyqe.calibration import prompts
    from pyqe.calibration.base import Calibrator, ConfidenceCalibrator, load
    from pyqe.calibration.binning import HistogramBinning, IsotonicCalibration
    from pyqe.calibration.density import KernelDensityCalibration
    from pyqe.calibration.inverse import inverse_softmax, temperature_scale
    from pyqe.calibration.parsing import (
        ConfidenceParseError,
        DistributionParseError,
        ParsedConfidence,
        ParsedDistribution,
        parse_confidence,
        parse_distribution,
    )
    from pyqe.calibration.platt import PlattScaling
    from pyqe.calibration.temperature import ConstantTemperature, DistilledTemperature, TemperatureScaling
    from pyqe.calibration.vector import VectorScaling

_HOMES = {
    "Calibrator": "pyqe.calibration.base",
    "ConfidenceCalibrator": "pyqe.calibration.base",
    "ConfidenceParseError": "pyqe.calibration.parsing",
    "ConstantTemperature": "pyqe.calibration.temperature",
    "DistilledTemperature": "pyqe.calibration.temperature",
    "DistributionParseError": "pyqe.calibration.parsing",
    "HistogramBinning": "pyqe.calibration.binning",
    "IsotonicCalibration": "pyqe.calibration.binning",
    "KernelDensityCalibration": "pyqe.calibration.density",
    "ParsedConfidence": "pyqe.calibration.parsing",
    "ParsedDistribution": "pyqe.calibration.parsing",
    "PlattScaling": "pyqe.calibration.platt",
    "TemperatureScaling": "pyqe.calibration.temperature",
    "VectorScaling": "pyqe.calibration.vector",
    "inverse_softmax": "pyqe.calibration.inverse",
    "load": "pyqe.calibration.base",
    "parse_confidence": "pyqe.calibration.parsing",
    "parse_distribution": "pyqe.calibration.parsing",
    "prompts": "pyqe.calibration.prompts",
    "temperature_scale": "pyqe.calibration.inverse",
}

__all__ = [
    "Calibrator",
    "ConfidenceCalibrator",
    "ConfidenceParseError",
    "ConstantTemperature",
    "DistilledTemperature",
    "DistributionParseError",
    "HistogramBinning",
    "IsotonicCalibration",
    "KernelDensityCalibration",
    "ParsedConfidence",
    "ParsedDistribution",
    "PlattScaling",
    "TemperatureScaling",
    "VectorScaling",
    "inverse_softmax",
    "load",
    "parse_confidence",
    "parse_distribution",
    "prompts",
    "temperature_scale",
]


__getattr__ = lazy_getattr(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
