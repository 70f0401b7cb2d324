"""Training a Sigmoid Head on a frozen language model, on transformers' Trainer (``pip install pyqe[train]``)."""

from pyqe.training.data import HiddenStateDataset, TextDataset, collate
from pyqe.training.module import TrainingModule
from pyqe.training.optimizer import RowAdam
from pyqe.training.trainer import SigmoidHeadTrainer, SigmoidHeadTrainingArguments, StopOnInterrupt

__all__ = [
    "HiddenStateDataset",
    "RowAdam",
    "SigmoidHeadTrainer",
    "SigmoidHeadTrainingArguments",
    "StopOnInterrupt",
    "TextDataset",
    "TrainingModule",
    "collate",
]
