"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The real language model in float32, and its tokenizer."""
    from pyqe.cli.options import load_model

    try:
        return load_model("smollm2", "float32", "cpu")
    except FileNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_head(smollm2: tuple[Any, Any]) -> Any:
    """An untrained low-rank head of the real language model."""
    import pyqe

    return pyqe.SigmoidHead.from_lm_head(*smollm2, kind="low_rank", rank=4)
