"""The ``pyqe`` command. Its modules import torch and transformers only inside commands, so ``--help`` stays fast."""

from pyqe.cli.main import main

__all__ = ["main"]
