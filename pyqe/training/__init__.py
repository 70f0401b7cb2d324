"""Training a Sigmoid Head, on transformers' Trainer and in others (``pip install pyqe[train]``)."""

from pyqe.training.callback import SigmoidHeadCallback
from pyqe.training.data import HiddenStateDataset, TextDataset, collate
from pyqe.training.module import TrainingModule
from pyqe.training.optimizer import RowAdam, parameter_groups
from pyqe.training.parallel import average_rows, fully_shard
from pyqe.training.trainer import SigmoidHeadTrainer, SigmoidHeadTrainingArguments, StopOnInterrupt

__all__ = [
    "HiddenStateDataset",
    "RowAdam",
    "SigmoidHeadCallback",
    "SigmoidHeadTrainer",
    "SigmoidHeadTrainingArguments",
    "StopOnInterrupt",
    "TextDataset",
    "TrainingModule",
    "average_rows",
    "collate",
    "fully_shard",
    "parameter_groups",
]
